"""What a message and an action cost between these ranks: runs small pipelines, and reads their timelines.

::

    busy      rank 0   F send F send . B F send . B .          the same work on every rank, small messages
              rank 1   . . . F B send . F B send
    idle      rank 0   F send . . . . . . . . B                nothing to compute, one message each way, small or large
              rank 1   . . . . . . F B send

The first gives what comes with every action while all ranks compute; the others what a message costs per byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modelpar.capture import profiler
from modelpar.capture.capture import capture
from modelpar.capture.objective import Objective
from modelpar.machine import Setting
from modelpar.planning.cluster import Cluster, Link
from modelpar.planning.doing import Doing, silent
from modelpar.planning.partition import Partition
from modelpar.planning.plan import Plan
from modelpar.planning.profile import Profile
from modelpar.planning.schedules import one_f_one_b
from modelpar.planning.timeline import COMPUTE, Timeline
from modelpar.profiling import Subject, swept
from modelpar.run.pipeline import Pipeline
from modelpar.run.workers import Workers

LARGE = 8_000_000
"""Bytes of the messages that tell, with small ones, the part of a cost that grows with size."""
_WIDTH, _SAMPLES, _MICROBATCHES = 512, 64, 8
"""Of the busy pipeline."""
SMALL = _WIDTH * _SAMPLES * 4
"""Bytes of its messages: 128 KB."""
_STEPS, _IDLE_STEPS, _WARMUP_STEPS = 24, 12, 3
_SWEEP_SECONDS = 0.5


class Source(nn.Module):
    """Hands on a tensor of a given size that it has ready."""

    def __init__(self, num_bytes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, num_bytes // 4))

    def forward(self, x: Tensor) -> Tensor:
        """Maps anything to (1, number of values)."""
        return self.weight + 0.0


class Sink(nn.Module):
    """Takes a tensor of any size; its gradient is as large."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps any shape to (1, 1)."""
        return x[:, :1]


def calibrate(workers: Workers, setting: Setting, doing: Doing = silent) -> Link:
    """Returns what a message and an action cost between the first ranks of running workers, in a few seconds."""
    num_ranks = setting.num_ranks
    with torch.random.fork_rng(devices=[]):
        work = [nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH) for _ in range(4))) for _ in range(num_ranks)]
    what = "measuring messages between ranks"
    doing(what, 0, 3)
    inputs = torch.zeros(_SAMPLES * _MICROBATCHES, _WIDTH)
    busy, profile = _run(workers, setting, nn.Sequential(*work), inputs, _MICROBATCHES, _STEPS)
    idle = []
    for number, num_bytes in enumerate((SMALL, LARGE), 1):
        doing(what, number, 3)
        layers = [Source(num_bytes), *(nn.Identity() for _ in range(num_ranks - 2)), Sink()]
        idle.append(_run(workers, setting, nn.Sequential(*layers), torch.zeros(1, 1), 1, _IDLE_STEPS)[0])
    return link_of(busy, profile, *idle)


def _run(
    workers: Workers, setting: Setting, model: nn.Sequential, inputs: Tensor, num_microbatches: int, steps: int
) -> tuple[list[Timeline], Profile]:
    """Trains a model, its layers shared out evenly; returns the timelines and the layers' profile."""
    batch = inputs, torch.zeros(len(inputs), 1)
    objective, num_ranks = Objective(model, _loss), setting.num_ranks
    microbatch = tuple(part[: len(inputs) // num_microbatches] for part in batch)
    captured = capture(objective, microbatch, model, num_ranks=num_ranks)
    count = profiler.count(objective, captured, microbatch, model)
    optimizer = partial(torch.optim.SGD, lr=0.0)
    subject = Subject(objective, captured, model, microbatch, count, num_microbatches, optimizer)
    profile = swept(subject, setting, workers, _SWEEP_SECONDS) if num_microbatches > 1 else count.profile
    plan = Plan(
        graph=captured.graph,
        profile=profile,
        cluster=Cluster(setting.devices),
        partition=Partition((*range(num_ranks), len(model))),
        schedule=one_f_one_b(num_ranks, num_microbatches),
        generator=one_f_one_b,
        num_threads=setting.num_threads,
    )
    with Pipeline(objective, plan, workers=workers, optimizer=optimizer, check=False) as pipeline:
        return [pipeline.step(batch).timeline for _ in range(_WARMUP_STEPS + steps)][_WARMUP_STEPS:], profile


def _loss(output: Tensor, targets: Tensor) -> Tensor:
    return output.mean()


def link_of(busy: Sequence[Timeline], profile: Profile, small: Sequence[Timeline], large: Sequence[Timeline]) -> Link:
    """Returns the link that explains timelines: of a busy pipeline with a layer of the profile per rank, whose messages
    have SMALL bytes, and of two with nothing to compute and messages of SMALL and of LARGE bytes."""
    busy, small, large = map(_quieter, (busy, small, large))
    costs = map(_fixed_and_rate, _message(busy), _message(small), _message(large))
    (sending, send_bandwidth), (latency, bandwidth), (taking, take_bandwidth) = costs
    own = sum(layer.seconds for layer in profile.layers) / (2 * busy[0].num_ranks)
    firsts = [_first(timeline) for timeline in busy]
    reduces = [sum(s.seconds for s in timeline.of_rank(0) if s.kind == "reduce") for timeline in busy]
    return Link(
        latency=latency,
        bandwidth=bandwidth,
        send_seconds=sending,
        send_bandwidth=send_bandwidth,
        take_seconds=taking,
        take_bandwidth=take_bandwidth,
        action_seconds=max(0.0, _action(busy) - own),
        data_seconds=max(0.0, fmean(firsts) - profile.layers[0].cold_seconds),
        end_seconds=max(0.0, fmean(reduces) - profile.layers[0].reduce_seconds),
    )


def _fixed_and_rate(busy: float, small: float, large: float) -> tuple[float, float]:
    """Returns the seconds that no bytes take a busy rank, and the bytes per second that more of them take."""
    rate = (LARGE - SMALL) / (large - small) if large > small else float("inf")
    return max(0.0, busy - SMALL / rate), rate


def _action(timelines: Sequence[Timeline]) -> float:
    """Returns the mean seconds of a forward and a backward; the first forward of a stage does not count."""
    spans = [span for timeline in timelines for span in timeline.spans]
    forward = fmean(span.seconds for span in spans if span.kind == "F" and span.microbatch > 0)
    return (forward + fmean(span.seconds for span in spans if span.kind == "B")) / 2


def _first(timeline: Timeline) -> float:
    """Returns how long rank 0 waits for the first micro-batch, and how much longer that one then takes it: the rest of
    the batch arrives meanwhile."""
    waited = sum(span.seconds for span in timeline.of_rank(0) if span.kind == "data" and span.microbatch <= 0)
    forward = [span.seconds for span in timeline.of_rank(0) if span.kind == "F"]
    return waited + (forward[0] - fmean(forward[1:]) if len(forward) > 1 else 0.0)


def _quieter(timelines: Sequence[Timeline]) -> list[Timeline]:
    """Returns the shorter half of steps that should be equal: what made the others longer came from elsewhere."""
    return sorted(timelines, key=lambda timeline: timeline.makespan)[: (len(timelines) + 1) // 2]


class _Message(NamedTuple):
    """What a message costs, in seconds."""

    send: float
    wire: float
    take: float


def _message(timelines: Sequence[Timeline]) -> _Message:
    """Returns the means over all messages between stages."""
    sends = [s.seconds for timeline in timelines for s in timeline.spans if s.kind == "send"]
    wires = [wire for timeline in timelines for wire in _wires(timeline)]
    takes = [gap for timeline in timelines for gap in _gaps(timeline)]
    return _Message(*(max(0.0, fmean(found)) if found else 0.0 for found in (sends, wires, takes)))


def _wires(timeline: Timeline) -> Iterator[float]:
    """Yields how long messages were on their way, of those whose receiver waited for them before they were sent."""
    sends = {}
    for rank in range(timeline.num_ranks):
        for action, send in pairwise(timeline.of_rank(rank)):
            if send.kind == "send":
                sends[action.kind, action.stage, action.microbatch] = send
    for rank in range(timeline.num_ranks):
        for wait, action in pairwise(timeline.of_rank(rank)):
            source = action.stage - 1 if action.kind == "F" else action.stage + 1
            send = sends.get((action.kind, source, action.microbatch)) if wait.kind == "wait" else None
            if send is not None and wait.start < send.end:
                yield wait.end - send.end


def _gaps(timeline: Timeline) -> Iterator[float]:
    """Yields the time between what a rank did before and an action that takes another stage's value."""
    ends = {("F", 0), ("B", timeline.num_ranks - 1)}
    for rank in range(timeline.num_ranks):
        for before, action in pairwise(timeline.of_rank(rank)):
            if action.kind in COMPUTE and (action.kind, action.stage) not in ends:
                yield action.start - before.end
