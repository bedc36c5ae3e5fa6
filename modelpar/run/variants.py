"""Which recording a micro-batch replays: Variants, the controller's memory of what the model does with which inputs.

A model's code may branch on shapes, on plain values, on what a mask holds, and on whether it trains. So a recording is
used only for micro-batches of the same shapes and plain values (its signature) whose guards, evaluated on their own
inputs, come out the same. Anything else is recorded when it is met: one more forward, here, of the unsplit model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from modelpar.capture.capture import record
from modelpar.capture.cut import Routine, cut_routine
from modelpar.capture.graph import Layers, build_graph
from modelpar.capture.guards import Watched, hold, watch
from modelpar.capture.objective import Batch, Objective
from modelpar.capture.recording import Recording, signature
from modelpar.errors import CaptureError
from modelpar.planning.graph import ModelGraph, StageGraph
from modelpar.planning.plan import Plan


class Variant(NamedTuple):
    """A recording, split as the plan says."""

    number: int
    graph: StageGraph
    routines: tuple[Routine, ...]
    """One per stage."""
    draws: frozenset[str]
    """FQNs of the modules whose own forward draws random numbers; "" is the model itself."""


class Variants:
    """All recordings of an objective's model so far."""

    def __init__(self, objective: Objective, plan: Plan, build: Callable[[], nn.Module]):
        """`build` returns the unsplit model; it is called only when there is something to record."""
        self._objective, self._plan, self._build = objective, plan, build
        self._known: defaultdict[Any, list[tuple[list[Watched], Variant]]] = defaultdict(list)
        self._count = 0
        self._checked = False
        made_from, recording = plan.captured or (None, None)
        self._given: Recording | None = recording if made_from is objective.model else None
        """What the plan was made from, not looked at yet."""

    def find(self, mode: str, microbatch: Batch) -> Variant | None:
        """Returns the variant that a micro-batch replays, if it is known; `mode` is "train", "evaluate" or
        "predict"."""
        known = self._known.get(self._signature(mode, microbatch), [])
        return next((variant for guards, variant in known if hold(guards, microbatch)), None)

    def add(self, mode: str, microbatch: Batch) -> Variant:
        """Records what the model does with a micro-batch.

        Raises PlanMismatch where the plan was made for another model, and CaptureError where the model cannot be
        recorded, or does its work in an order that does not fit the stages.
        """
        model = self._build()
        if self._given is not None and self._given.signature == self._signature(mode, microbatch):
            recording, self._given = self._given, None
            if hold(watch(recording, model), microbatch):
                return self._split(recording, mode, model)
        leaves = frozenset(name for layer in self._plan.graph.layers for name in layer.modules)
        recording = record(self._objective, microbatch, model, leaves, mode, may_close=False)
        return self._split(recording, mode, model)

    def _split(self, recording: Recording, mode: str, model: nn.Module) -> Variant:
        plan = self._plan
        graph = build_graph(recording, model)
        if mode == "train" and not self._checked:
            plan.check_model(graph)
            self._checked = True
        bounds = self._bounds(graph, mode)
        stages = replace(graph.stages(bounds, plan.tied == "exact"), tied=plan.stage_graph.tied)
        layers = Layers(recording)
        routines = tuple(cut_routine(recording, bounds, stage, layers) for stage in range(plan.num_stages))
        for stage, routine in enumerate(routines):
            self._check_has(stage, routine, mode)
        draws = frozenset(name for node in recording.nodes for name in node.draws)
        variant = Variant(self._count, stages, routines, draws)
        self._count += 1
        self._known[recording.signature].append((watch(recording, model), variant))
        return variant

    def _signature(self, mode: str, microbatch: Batch) -> Any:
        inputs, targets = microbatch
        takes_targets = mode != "predict" and self._objective.loss is not None
        return signature(mode, inputs, targets if takes_targets else None, self._plan.graph.straight)

    def _bounds(self, graph: ModelGraph, mode: str) -> tuple[int, ...]:
        """Returns where the plan's stages begin among a recording's layers, which may be others than the plan's."""
        partition = self._plan.partition
        home = {
            self._plan.graph.layers[i].name: stage
            for stage in range(partition.num_stages)
            for i in partition.layers(stage)
        }
        stages: list[int] = []
        for layer in graph.layers:
            stages.append(home.get(layer.name, stages[-1] if stages else 0))
        if stages != sorted(stages) or stages[-1] != partition.num_stages - 1:
            raise CaptureError(
                f"to {mode} on this batch the model calls its layers in another order than when it was planned "
                f"({', '.join(layer.name for layer in graph.layers[:8])}, …), which does not fit the stages; expected "
                "the same order, or a plan made for this batch"
            )
        return tuple(sum(s < stage for s in stages) for stage in range(partition.num_stages + 1))

    def _check_has(self, stage: int, routine: Routine, mode: str) -> None:
        """Raises CaptureError where a stage would need a module or tensor that it was not given."""
        layers = [self._plan.graph.layers[i] for i in self._plan.partition.layers(stage)]
        modules = {name for layer in layers for name in layer.modules}
        states = {parameter.name for layer in layers for parameter in layer.parameters}
        needed = {step.node.name for step in routine.steps if step.node.is_module} - modules
        needed |= {state.name for step in routine.steps for state in step.node.args.states} - states
        if needed:
            first = min(needed)
            around = self._module_around(first)
            raise CaptureError(
                f"to {mode} on this batch stage {stage} would need {first}, which it does not use when the model "
                "trains as planned; expected "
                + (
                    f"a plan made with the module around it called whole: leaf=[{around!r}]"
                    if around
                    else f"the code that chooses whether to use {first} in a module of its own, which holds {first} "
                    "and what else may be chosen; planned with that module as `leaf`"
                )
            )

    def _module_around(self, name: str) -> str:
        """Returns the innermost module around a part that the plan has parts of and that leaves enough others."""
        layers = self._plan.graph.layers
        used = {module for layer in layers for module in layer.modules}
        while name := name.rpartition(".")[0]:
            others = sum(not any(f"{m}.".startswith(f"{name}.") for m in layer.modules) for layer in layers)
            if others + 1 >= self._plan.num_stages and any(module.startswith(f"{name}.") for module in used):
                return name
        return ""
