"""How long a step takes in torch.distributed.pipelining, over gloo and over nccl, with modelpar's stages."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from benchmarks.contenders import Torch
from benchmarks.hosts import Host, call_together
from benchmarks.on_gpu.ranks import one_line, places
from benchmarks.on_gpu.steps import steps_in
from benchmarks.on_gpu.work import NUM_MICROBATCHES, NUM_RANKS, models, plans


def run(backend: str, device: str, say: Callable[..., None]) -> None:
    """Measures all models over one backend; says each number as it comes, or why there is none."""
    why = ""
    if backend == "nccl" and device == "cpu":
        why = "nccl needs GPUs"
    elif backend == "nccl" and torch.cuda.device_count() < NUM_RANKS:
        why = f"nccl needs a GPU per rank; there are {torch.cuda.device_count()} for {NUM_RANKS}"
    elif backend == "gloo" and device != "cpu":
        why = "gloo sends from host memory only; handed CUDA tensors it aborts"
    if why:
        say(check="failed", what=f"torch over {backend}", why=why)
        return
    decided = {model: plans(task, device, "flops", say) for model, task in models(device).items()}
    for model, task in models(device).items():
        try:  # with processes of its own: one that fails takes all of a group along
            with ExitStack() as exits:
                store = str(Path(exits.enter_context(tempfile.TemporaryDirectory()), "store"))
                hosts = [
                    exits.enter_context(Host(partial(Torch, rank, NUM_RANKS, store, backend, place)))
                    for rank, place in enumerate(places(device, NUM_RANKS))
                ]
                for schedule, plan in decided[model].items():
                    arguments = schedule, task, plan.partition.bounds, schedule, NUM_MICROBATCHES
                    seconds = max(call_together(hosts, "load", *arguments))
                    laps = call_together(hosts, "steps", schedule, steps_in(seconds))
                    ends = [max(step) for step in zip(*(lap.ends for lap in laps), strict=True)]
                    found = median(b - a for a, b in pairwise(ends))
                    say(check="step", who=f"torch {backend}", model=model, schedule=schedule, seconds=found)
        except Exception as error:
            say(check="failed", what=f"torch over {backend}, {model}", why=one_line(error))
