"""A measured profile: all ranks time layers at once, as busy as in a real step. What each does is in run/sweep.py."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import nn

from modelpar.capture.cut import StageProgram, cut_stage
from modelpar.capture.objective import Batch, Objective
from modelpar.capture.profiler import Count
from modelpar.machine import Setting
from modelpar.planning.cluster import Cluster
from modelpar.planning.graph import ModelGraph
from modelpar.planning.memory import activation_bytes
from modelpar.planning.partition import Partition
from modelpar.planning.plan import Plan
from modelpar.planning.profile import LayerCost, Profile
from modelpar.planning.schedule import Action, Op, Schedule
from modelpar.run import wire
from modelpar.run.sweep import IN_FLIGHT, SweepResult, SweepWork, UnitTimes
from modelpar.run.update import OptimizerFactory
from modelpar.run.workers import Workers

_MOST_MICROBATCHES = 8
"""Per measured step; more tell nothing new."""
_MOST_EQUAL = 4
"""How many of equal layers are run. One alone would find its weights in the caches, as it never will in a stage with
others; more tell nothing new."""


@dataclass(frozen=True)
class Subject:
    """What is to be timed: a model, counted on a micro-batch, and how it trains."""

    objective: Objective
    graph: ModelGraph
    model: nn.Module
    microbatch: Batch
    count: Count
    num_microbatches: int
    optimizer: OptimizerFactory | None = None
    max_norm: float | None = None

    @property
    def runs(self) -> tuple[range, ...]:
        """The layers between legal cuts, which no partition tears apart."""
        edges = (0, *self.graph.cuts, len(self.graph.layers))
        return tuple(range(start, end) for start, end in pairwise(edges))

    def key(self) -> dict[str, Any]:
        """Returns, as plain data, what the times depend on besides the setting."""
        return {
            "graph": self.graph.hash,
            "cuts": list(self.graph.cuts),
            "layers": [repr(key) for key in self.count.keys],
            "loss": _description(self.objective.loss),
            "optimizer": _description(self.optimizer),
            "max_norm": self.max_norm,
            "samples": self.count.profile.microbatch_size,
            "microbatches": min(self.num_microbatches, _MOST_MICROBATCHES),
        }


def swept(subject: Subject, setting: Setting, workers: Workers, seconds: float = 1.5) -> Profile:
    """Returns the profile that the first ranks of running workers measure, without a link.

    Equal layers get equal times. It takes about as long as given, or some rounds of one step of the layers.
    """
    runs = subject.runs
    keys = [tuple(subject.count.keys[i] for i in run) for run in runs]
    chosen = [position for position, key in enumerate(keys) if keys[:position].count(key) < _MOST_EQUAL]
    last = {keys[position]: unit for unit, position in enumerate(chosen)}
    sources = [
        unit - 1 if position - 1 in chosen else last[keys[position - 1]] if position else -1
        for unit, position in enumerate(chosen)
    ]
    programs = [*_programs(subject, chosen), _nothing()]
    work = SweepWork(
        sources=(*sources, -1),
        microbatch=dict(zip(("inputs", "targets"), subject.microbatch, strict=True)),
        num_samples=subject.count.profile.microbatch_size,
        num_microbatches=min(subject.num_microbatches, _MOST_MICROBATCHES),
        num_threads=setting.num_threads,
        optimizer=subject.optimizer,
        max_norm=subject.max_norm,
        seconds=seconds,
    )
    with torch.random.fork_rng(devices=[]):  # ranks that are threads draw from this process's generator
        setup = wire.ship_as("the optimizer", work)
        tickets = []
        for rank, device in enumerate(setting.devices):  # ranks that are threads must not share what they are sent
            parcels = [wire.ship_as(f"stage {program.stage}", program) for program in programs]
            tickets.append(workers.command(rank, "sweep", setup=setup, programs=parcels, device=device))
        results: list[SweepResult] = workers.wait_replies(tickets)
    times = {
        key: _mean(
            [result.times[u] for result in results for u, position in enumerate(chosen) if keys[position] == key]
        )
        for key in last
    }
    layers: list[LayerCost] = []
    for run, key in zip(runs, keys, strict=True):
        layers += _shared([subject.count.profile.layers[i] for i in run], times[key])
    return replace(
        subject.count.profile,
        layers=tuple(layers),
        source="measured",
        device=setting.devices[0],
        num_threads=setting.num_threads,
        num_ranks=setting.num_ranks,
        clips=subject.max_norm is not None,
        measured_at=datetime.now().astimezone().isoformat(timespec="seconds"),
        slack_bytes=_slack_bytes([layers[i] for position in chosen for i in runs[position]], results),
    )


def _slack_bytes(layers: Sequence[LayerCost], results: Sequence[SweepResult]) -> int:
    """Returns what ranks took beyond the tensors that these layers hold; 0 where that cannot be measured."""
    peaks = [result.peak_bytes for result in results if result.peak_bytes is not None]
    held = sum(2 * layer.parameter_bytes + (layer.optimizer_bytes or 0) for layer in layers)
    return max(0, min(peaks, default=0) - held - activation_bytes(layers, IN_FLIGHT))


def swept_alone(subject: Subject, setting: Setting) -> Profile:
    """Returns the profile measured in this process, with no other rank busy; starts no process."""
    with Workers(1, transport="threads") as workers:
        return swept(subject, replace(setting, devices=setting.devices[:1], transport="threads"), workers)


def _programs(subject: Subject, positions: Sequence[int]) -> list[StageProgram]:
    """Returns runs of layers as stages."""
    assert isinstance(subject.model, nn.Sequential)
    runs = subject.runs
    actions = [Action(stage, Op.FORWARD, 0) for stage in range(len(runs))]
    plan = Plan(
        graph=subject.graph,
        profile=subject.count.profile,
        cluster=Cluster(("cpu",)),
        partition=Partition((*(run.start for run in runs), len(subject.graph.layers))),
        schedule=Schedule.of([actions], "forward"),
    )
    return [cut_stage(subject.model, subject.objective.loss, plan, position) for position in positions]


def _nothing() -> StageProgram:
    """Returns a stage that does nothing."""
    module = nn.Sequential(OrderedDict(nothing=nn.Identity()))
    return StageProgram(-1, module, "inputs", "nothing", False, False, (), {}, ())


def _mean(times: Sequence[UnitTimes]) -> UnitTimes:
    """Returns what all ranks found together for equal layers."""
    return UnitTimes(*(fmean(column) for column in zip(*times, strict=True)))


def _shared(layers: Sequence[LayerCost], times: UnitTimes) -> list[LayerCost]:
    """Returns the layers of a run with its times, shared out by their FLOPs; evenly where there are none."""
    total = sum(layer.flops for layer in layers)
    shares = [layer.flops / total if total else 1 / len(layers) for layer in layers]
    return [
        replace(
            layer,
            forward_seconds=times.forward * share,
            input_grad_seconds=times.input_grad * share,
            weight_grad_seconds=times.weight_grad * share,
            cold_seconds=times.cold * share,
            reduce_seconds=times.reduce * share,
            update_seconds=times.update * share,
            optimizer_bytes=int(times.optimizer_bytes * share),
        )
        for layer, share in zip(layers, shares, strict=True)
    ]


def _description(function: Callable[..., Any] | None) -> Any:
    """Returns a callable as plain data: its name, and the arguments that a partial has bound."""
    if isinstance(function, partial):
        bound = [repr(value) for value in (*function.args, *sorted(function.keywords.items()))]
        return [_description(function.func), *bound]
    if isinstance(function, nn.Module):
        return repr(function)
    return f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', type(function).__qualname__)}"
