"""What runs inside hosts: modelpar, torch.distributed.pipelining, and the unsplit model, all with the same methods.

Each holds several models by key, so that all wait, loaded, for their turn::

    load(key, …)        makes a model ready and runs a few steps; returns about how long one takes
    steps(key, count)   trains 1 + count steps; returns when each ended
    unload()            drops all models
"""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.stats import step_seconds
from benchmarks.tasks import Built, Task
from modelpar import Objective, Pipeline, Workers
from modelpar.planning.plan import Plan
from modelpar.planning.timeline import Timeline

WARM_STEPS = 1


@dataclass(frozen=True)
class Lap:
    """Some training steps in a row."""

    ends: tuple[float, ...]
    """When each step ended, by `time.perf_counter`, which all processes of a host share on Linux."""
    timelines: tuple[Timeline, ...] = ()
    """Of the steps after the first; only modelpar has them."""
    peak_bytes: tuple[int, ...] = ()
    """Per rank, the most memory so far; only modelpar over RPC has it."""


class Contender:
    """A context manager with something to close."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends what was started."""


class Modelpar(Contender):
    """modelpar's pipelines on one set of workers; this process is their controller."""

    def __init__(self, transport: str, num_ranks: int):
        self._exits = ExitStack()
        self._workers = self._exits.enter_context(Workers(num_ranks, transport=transport))
        self._pipelines: dict[str, tuple[Pipeline, Built]] = {}

    def load(self, key: str, task: Task, plan: Plan) -> float:
        """Loads a plan's stages on the workers."""
        built = task()
        objective = Objective(built.model, built.loss)
        pipeline = Pipeline(objective, plan, workers=self._workers, optimizer=built.optimizer)
        self._pipelines[key] = pipeline.__enter__(), built
        return step_seconds(self.steps(key, WARM_STEPS).ends)

    def steps(self, key: str, count: int) -> Lap:
        """Trains as `modelpar train` does, with the next step under way."""
        pipeline, built = self._pipelines[key]
        ends, timelines, peaks = [], [], ()
        for result in pipeline.steps([built.batch] * (1 + count)):
            ends.append(perf_counter())
            timelines.append(result.timeline)
            peaks = result.peak_bytes
        return Lap(tuple(ends), tuple(timelines[1:]), tuple(peaks))

    def single_steps(self, key: str, count: int) -> Lap:
        """Trains one step after the other, each begun when the one before has ended, as a prediction assumes."""
        pipeline, built = self._pipelines[key]
        results = [pipeline.step(built.batch) for _ in range(1 + count)]
        return Lap((), tuple(result.timeline for result in results[1:]), tuple(results[-1].peak_bytes))

    def unload(self) -> None:
        """Drops all pipelines."""
        for pipeline, _ in self._pipelines.values():
            pipeline.__exit__(None, None, None)
        self._pipelines.clear()

    def close(self) -> None:
        """Stops the workers."""
        self._exits.close()


class Torch(Contender):
    """One rank of torch.distributed.pipelining: one stage, made by hand of the same layers."""

    def __init__(self, rank: int, num_ranks: int, store: str, backend: str = "gloo", device: str = "cpu"):
        from torch.distributed import pipelining  # takes seconds, which only these processes need to spend

        self._pipelining = pipelining
        torch.set_num_threads(1)
        _warm_up()
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        self._rank, self._num_ranks = rank, num_ranks
        self._device = torch.device(device)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        dist.init_process_group(
            backend,
            store=dist.FileStore(store, num_ranks),
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=120),
        )
        self._loaded: dict[str, tuple[Any, Any, Built]] = {}

    def load(self, key: str, task: Task, bounds: tuple[int, ...], schedule: str, num_microbatches: int) -> float:
        """Makes this rank's stage and joins the others in a few steps; `bounds` are those of modelpar's partition."""
        built = task()
        layers = list(built.model.named_children())[bounds[self._rank] : bounds[self._rank + 1]]
        module = nn.Sequential(*(layer for _, layer in layers)).to(self._device)
        built = built._replace(batch=tuple(part.to(self._device) for part in built.batch))
        stage = self._pipelining.PipelineStage(module, self._rank, self._num_ranks, self._device)
        kind = {"gpipe": self._pipelining.ScheduleGPipe, "1f1b": self._pipelining.Schedule1F1B}[schedule]
        parameters = list(module.parameters())
        optimizer = built.optimizer(parameters) if parameters else None
        self._loaded[key] = kind(stage, num_microbatches, loss_fn=built.loss), optimizer, built
        return step_seconds(self.steps(key, WARM_STEPS).ends)

    def steps(self, key: str, count: int) -> Lap:
        """Trains; the last rank reads the loss after every step, as one who trains does."""
        schedule, optimizer, built = self._loaded[key]
        inputs, targets = built.batch
        ends = []
        for _ in range(1 + count):
            losses: list[torch.Tensor] = []
            arguments = (inputs,) if self._rank == 0 else ()
            if self._rank == self._num_ranks - 1:
                schedule.step(*arguments, target=targets, losses=losses)
                float(torch.stack(losses).detach().mean())
            else:
                schedule.step(*arguments)
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            ends.append(perf_counter())
        return Lap(tuple(ends))

    def unload(self) -> None:
        """Drops all stages."""
        self._loaded.clear()

    def close(self) -> None:
        """Leaves the group."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dist.destroy_process_group()


class Unsplit(Contender):
    """The whole model in one process, on full batches or on micro-batches one after the other, as is faster.

    Micro-batches can be much faster: tensors of more than 32 MB are new to the process each time, page by page.
    """

    def __init__(self, num_threads: int):
        torch.set_num_threads(num_threads)
        _warm_up()
        self._loaded: dict[str, tuple[Any, Built, int]] = {}

    def load(self, key: str, task: Task, num_microbatches: int) -> tuple[float, int]:
        """Makes the model; returns the seconds of a step and into how many pieces its batch is cut."""
        built = task()
        optimizer = built.optimizer(built.model.parameters())
        found = []
        for pieces in (1, num_microbatches):
            self._loaded[key] = optimizer, built, pieces
            found.append((step_seconds(self.steps(key, WARM_STEPS).ends), pieces))
        self._loaded[key] = optimizer, built, min(found)[1]
        return min(found)

    def steps(self, key: str, count: int) -> Lap:
        """Trains."""
        optimizer, built, pieces = self._loaded[key]
        inputs, targets = (part.tensor_split(pieces) for part in built.batch)
        ends = []
        for _ in range(1 + count):
            total = 0.0
            for x, y in zip(inputs, targets, strict=True):
                loss = built.loss(built.model(x), y) / pieces
                loss.backward()
                total += float(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            ends.append(perf_counter())
        return Lap(tuple(ends))

    def unload(self) -> None:
        """Drops all models."""
        self._loaded.clear()


def _warm_up() -> None:
    """Trains once: the first time loads code for seconds, which all processes do at once here, while they start."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
