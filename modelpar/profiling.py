"""A measured profile: all ranks time layers at once, as busy as in a real step. What each does is in run/sweep.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import nn

from modelpar.capture.capture import Captured, leaf_names
from modelpar.capture.cut import Routine, StageProgram, cut_routine, cut_stage
from modelpar.capture.graph import Layers
from modelpar.capture.objective import Batch, Objective
from modelpar.capture.profiler import Count
from modelpar.capture.recording import Ref
from modelpar.machine import Setting
from modelpar.planning.doing import Doing, silent
from modelpar.planning.graph import BATCH, ModelGraph
from modelpar.planning.memory import activation_bytes
from modelpar.planning.profile import LayerCost, Profile
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
    captured: Captured
    model: nn.Module
    microbatch: Batch
    count: Count
    num_microbatches: int
    optimizer: OptimizerFactory | None = None
    max_norm: float | None = None

    @property
    def graph(self) -> ModelGraph:
        """The model's graph."""
        return self.captured.graph

    @property
    def bounds(self) -> tuple[int, ...]:
        """Where the runs of layers begin that no partition tears apart, and where the last one ends."""
        return (0, *self.graph.cuts, len(self.graph.layers))

    @property
    def runs(self) -> tuple[range, ...]:
        """The layers between legal cuts."""
        return tuple(range(start, end) for start, end in pairwise(self.bounds))

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


def swept(subject: Subject, setting: Setting, workers: Workers, seconds: float = 1.5, doing: Doing = silent) -> Profile:
    """Returns the profile that the first ranks of running workers measure, without a link.

    Equal layers get equal times. It takes about as long as given, or some rounds of one step of the layers.
    """
    runs = subject.runs
    keys = [tuple(subject.count.keys[i] for i in run) for run in runs]
    routines = _routines(subject)
    chosen, sources = _choose(subject, keys, routines)
    programs = [*(_program(subject, routines, position) for position in chosen), _nothing()]
    work = SweepWork(
        sources=(*sources, {"inputs": (-1, next(iter(leaf_names(*subject.microbatch))))}),
        microbatch=dict(leaf_names(*subject.microbatch)),
        num_samples=subject.count.profile.microbatch_size,
        num_microbatches=min(subject.num_microbatches, _MOST_MICROBATCHES),
        num_threads=setting.num_threads,
        optimizer=subject.optimizer,
        max_norm=subject.max_norm,
        seconds=seconds,
    )
    with torch.random.fork_rng(devices=[]):  # ranks that are threads draw from this process's generator
        what = f"timing the layers on {setting.num_ranks} rank{'s' if setting.num_ranks > 1 else ''}"
        doing(what)
        setup = wire.ship_as("the optimizer", work)
        tickets = []
        for rank, device in enumerate(setting.devices):  # ranks that are threads must not share what they are sent
            parcels = [wire.ship_as(f"stage {program.stage}", program) for program in programs]
            tickets.append(workers.command(rank, "sweep", setup=setup, programs=parcels, device=device))
        results: list[SweepResult] = workers.wait_replies(tickets, progress=partial(doing, what))
    times = {
        key: _mean(
            [result.times[u] for result in results for u, position in enumerate(chosen) if keys[position] == key]
        )
        for key in dict.fromkeys(keys)
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
        slack_share=_slack_share([layers[i] for position in chosen for i in runs[position]], results, setting),
    )


def _slack_share(layers: Sequence[LayerCost], results: Sequence[SweepResult], setting: Setting) -> float:
    """Returns what ranks took beyond the tensors that these layers hold, as a share of their activations; 0 where that
    cannot be measured. It is negative where a GPU's kernels keep less than those of the CPU, where tensors are counted:
    fused attention does."""
    least = -0.99 if setting.devices[0].startswith("cuda") else 0.0
    peaks = [result.peak_bytes for result in results if result.peak_bytes is not None]
    held = sum(2 * layer.parameter_bytes + (layer.optimizer_bytes or 0) for layer in layers)
    activations = activation_bytes(layers, IN_FLIGHT)
    return max(least, (min(peaks) - held) / activations - 1) if activations and peaks else 0.0


def swept_alone(subject: Subject, setting: Setting, doing: Doing = silent) -> Profile:
    """Returns the profile measured in this process, with no other rank busy; starts no process."""
    with Workers(1, transport="threads") as workers:
        alone = replace(setting, devices=setting.devices[:1], transport="threads")
        return swept(subject, alone, workers, doing=doing)


def _routines(subject: Subject) -> list[Routine]:
    """Returns the runs of layers as stages' routines."""
    layers = Layers(subject.captured.recording)
    return [cut_routine(layers.recording, subject.bounds, p, layers) for p in range(len(subject.runs))]


def _choose(
    subject: Subject, keys: list[Any], routines: list[Routine]
) -> tuple[list[int], list[dict[str, tuple[int, str]]]]:
    """Returns the positions of the runs to time, and for each where the values come from that it takes: the position in
    this list of another one, or −1 for the batch, and a name there. Where the run that makes a value is not timed, one
    that is equal stands for it."""
    chosen = {position for position, key in enumerate(keys) if keys[:position].count(key) < _MOST_EQUAL}
    makers = {name: position for position, routine in enumerate(routines) for name in routine.gives}
    places: dict[tuple[int, str], tuple[int, str]] = {}
    todo = sorted(chosen)
    while todo:
        position = todo.pop()
        for name in routines[position].takes:
            maker = makers.get(name)
            if maker is None or maker in chosen:
                places[position, name] = (-1 if maker is None else maker), name
                continue
            index = list(routines[maker].gives).index(name)
            equal = [p for p in chosen if keys[p] == keys[maker] and p < position and len(routines[p].gives) > index]
            if equal:
                places[position, name] = max(equal), list(routines[max(equal)].gives)[index]
            else:
                chosen.add(maker)
                todo += [maker, position]
    order = sorted(chosen)
    unit = {position: i for i, position in enumerate(order)} | {-1: -1}
    sources = []
    for position in order:
        found = {name: places[position, name] for name in routines[position].takes}
        sources.append({name: (unit[maker], there) for name, (maker, there) in found.items()})
    return order, sources


def _program(subject: Subject, routines: list[Routine], position: int) -> StageProgram:
    """Returns a run of layers as a stage."""
    stages, run = subject.graph.stages(subject.bounds), subject.runs[position]
    program = cut_stage(subject.model, subject.graph, stages, run, position, subject.objective.loss)
    return replace(program, routines={0: routines[position]})


def _nothing() -> StageProgram:
    """Returns a stage that does nothing."""
    ref = Ref(BATCH, 0)
    routine = Routine((), {"inputs": ref}, {"nothing": ref}, frozenset(), frozenset(), None, None)
    return StageProgram(-1, False, nn.Module(), ("nothing",), (), {}, (), routines={0: routine})


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
