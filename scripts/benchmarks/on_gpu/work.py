"""What trains on a GPU: models large enough to keep one busy, and small ones to try the script on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks import tasks
from benchmarks.on_gpu.ranks import Ranks, Told, places
from benchmarks.tasks import Built, Task
from modelpar.capture.objective import Objective
from modelpar.models import gpt as gpt_model
from modelpar.models import mlp as mlp_model
from modelpar.planner import plan
from modelpar.planning import partitioners
from modelpar.planning.plan import Plan
from modelpar.planning.profile import Profile

NUM_RANKS = 2
NUM_MICROBATCHES = 8


def gpt() -> Built:
    """Returns a GPT of 100 million parameters and 16 × 512 tokens; its weights are not tied, as torch wants it."""
    torch.manual_seed(0)
    model, _, loss = gpt_model.build(context=512, width=1024, depth=8, heads=16, tied=False)
    tokens = torch.randint(256, (16, 513))
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return Built(model, batch, loss, partial(torch.optim.AdamW, lr=1e-4))


def mlp() -> Built:
    """Returns an MLP of width 4096 with 8 layers, and 4096 samples: 8 MB per micro-batch and cut."""
    torch.manual_seed(0)
    model, _, loss = mlp_model.build(width=4096, depth=8)
    batch = torch.randn(4096, 256), torch.randint(10, (4096,))
    return Built(model, batch, loss, partial(torch.optim.AdamW, lr=1e-4))


LARGE: dict[str, Task] = {
    "gpt": gpt,
    "mlp": mlp,
    "convnet": partial(tasks.convnet, 4 * NUM_MICROBATCHES),  # 34 MB per micro-batch and cut
    "near empty": tasks.near_empty,
}
SMALL: dict[str, Task] = {
    "gpt": tasks.gpt,
    "mlp": tasks.mlp,
    "near empty": tasks.near_empty,
}


def models(device: str) -> dict[str, Task]:
    """Returns what trains on a device."""
    return SMALL if device == "cpu" else LARGE


def plans(
    task: Task, device: str, profile: str, say: Callable[..., None], ranks: Ranks | None = None
) -> dict[str, Plan]:
    """Returns a plan per schedule, always with the same stages; where measuring on the ranks fails it counts, and says
    so."""
    try:
        return _plans(task, device, profile, ranks)
    except Exception as error:
        say(check="failed", what="measuring the layers", why=f"{type(error).__name__}: {error}"[:300])
        if ranks is not None:
            ranks.drop()
        return _plans(task, device, "flops", None)


def _plans(task: Task, device: str, profile: str | Profile, ranks: Ranks | None) -> dict[str, Plan]:
    built = task()
    found: dict[str, Plan] = {}
    more = {"workers": ranks.get, **ranks.how} if ranks is not None else {}
    for name, schedule in tasks.SCHEDULES.items():
        found[name] = plan(
            Objective(built.model, built.loss),
            built.batch,
            num_ranks=NUM_RANKS,
            num_microbatches=NUM_MICROBATCHES,
            partitioner=partitioners.uniform,
            schedule=schedule,
            num_threads=1,
            devices=places(device, NUM_RANKS),
            profile=profile,
            optimizer=built.optimizer,
            doing=Told(),
            **more,
        )
        profile = found[name].profile
    return found
