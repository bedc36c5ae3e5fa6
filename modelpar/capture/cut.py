"""A slice of a recording as one stage runs it: StageProgram, its part of the model and the Routine that replays it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from torch import nn

from modelpar.capture.graph import Layers, first_names
from modelpar.capture.recording import PLACEHOLDER, Guard, Node, Recording, Ref, Template
from modelpar.planning.graph import BATCH, ModelGraph, StageGraph


@dataclass(frozen=True)
class Step:
    """One node, and what is kept of it."""

    number: int
    node: Node
    kept: tuple[int | None, ...]
    """Which of its values later steps or other stages take."""
    dropped: tuple[Ref, ...]
    """Values that nobody takes any more behind it."""
    exact: bool
    """Whether what it returns besides tensors must be as it was recorded, since code of the model may depend on it."""


@dataclass(frozen=True)
class Routine:
    """What a stage does with the values it is given."""

    steps: tuple[Step, ...]
    takes: Mapping[str, Ref]
    gives: Mapping[str, Ref]
    needs_grad: frozenset[str]
    """Which of the values given have their gradients come back."""
    cloned: frozenset[str]
    """Which of the values taken it writes to: what another stage gave is frozen, so it writes to a copy."""
    output: Template | None
    """Only on the last stage: what the loss is given."""
    targets: Template | None
    """Only on the last stage: what else it is given."""
    held: tuple[Any, ...] = ()
    draws: frozenset[str] = frozenset()
    """FQNs of the modules whose own forward draws random numbers."""
    calls: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Of those, the ones that several stages call: how often the earlier stages do, and how often this one does."""


@dataclass
class StageProgram:
    """One stage: some layers of the user's model under their original names, and what it does with them."""

    stage: int
    is_last: bool
    module: nn.Module
    """Holds the layers' modules, parameters and buffers by the FQNs of the unsplit model."""
    layers: tuple[str, ...]
    """Their names."""
    draws: tuple[str, ...]
    """FQNs of the modules whose own forward draws random numbers; "" is the model itself."""
    tied: dict[str, str]
    """The FQN by which this stage knows each tensor that other stages use too, by the owner's FQN."""
    copies: tuple[str, ...]
    """Those of them, by this stage's FQN, that another stage owns."""
    first_names: dict[str, str] = field(default_factory=dict)
    """How the model first names what this stage knows by another name."""
    loss: Callable[[Any, Any], Any] | None = None
    """Only on the last stage."""
    routines: dict[int, Routine] = field(default_factory=dict)
    """By number of the recording that they replay a part of."""

    def owned_parameters(self) -> dict[str, nn.Parameter]:
        """Returns the trainable parameters that this stage updates, by the names that the model has for them first."""
        return {
            self.first_names.get(name, name): parameter
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad and name not in self.copies
        }

    def failing_layer(self, traceback: TracebackType | None) -> str:
        """Returns the FQN of the innermost module on a traceback, the call of a function, or "the loss"."""
        names = {id(module): name for name, module in self.module.named_modules()}
        found = ""
        while traceback:
            local = traceback.tb_frame.f_locals
            if (node := getattr(local.get("call"), "node", None)) is not None:
                found = node.name if node.is_module else f"{node.name} in {node.inside or 'the model'} ({node.line})"
            found = names.get(id(local.get("self")), "") or found
            traceback = traceback.tb_next
        return found or ("the loss" if self.is_last else "the stage")


def cut_stage(
    model: nn.Module,
    graph: ModelGraph,
    stages: StageGraph,
    layers: range,
    stage: int,
    loss: Callable[[Any, Any], Any] | None = None,
) -> StageProgram:
    """Cuts one stage's layers out of a model, without routines; the modules are the model's own, not copies."""
    own = [graph.layers[i] for i in layers]
    module = skeleton(model, [m for layer in own for m in layer.modules], [p.name for x in own for p in x.parameters])
    names, known = dict(module.named_parameters()), first_names(model)
    shared = [tie for tie in stages.tied if stage in tie.layers]
    tied = {tie.names[0]: next(name for name in tie.names if name in names) for tie in shared}
    return StageProgram(
        stage=stage,
        is_last=stage == stages.num_stages - 1,
        module=module,
        layers=tuple(layer.name for layer in own),
        draws=tuple(dict.fromkeys(name for layer in own for name in layer.draws if _is_within(name, layer.modules))),
        tied=tied,
        copies=tuple(tied[tie.names[0]] for tie in shared if tie.layers[0] != stage),
        first_names={name: first for name in names if (first := known[name]) != name},
        loss=loss if stage == stages.num_stages - 1 else None,
    )


def _is_within(name: str, modules: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def skeleton(model: nn.Module, modules: list[str], states: list[str]) -> nn.Module:
    """Returns a module that holds only these modules, parameters and buffers of a model, under the same names."""
    root = nn.Module()
    root.training = model.training
    wanted = set(modules)

    def parent(name: str) -> tuple[nn.Module, str]:
        place = root
        *path, last = name.split(".")
        for i, part in enumerate(path):
            if part not in place._modules:
                place.add_module(part, nn.Module())
                place._modules[part].training = model.get_submodule(".".join(path[: i + 1])).training  # type: ignore[union-attr]
            place = place._modules[part]  # type: ignore[assignment]
        return place, last

    for name, module in model.named_modules(remove_duplicate=False):
        if name in wanted and name:
            place, last = parent(name)
            place._modules[last] = module
    inside = {f"{name}." for name in wanted}
    for name in dict.fromkeys(states):
        if any(name.startswith(prefix) for prefix in inside):
            continue
        place, last = parent(name)
        owner = model.get_submodule(name.rpartition(".")[0])
        if last in owner._parameters:
            place._parameters[last] = owner._parameters[last]
        else:
            place.register_buffer(last, owner._buffers[last], last not in owner._non_persistent_buffers_set)
    return root


def cut_routine(recording: Recording, bounds: tuple[int, ...], stage: int, layers: Layers | None = None) -> Routine:
    """Returns what one stage does, of the stages layers[bounds[s]:bounds[s + 1]]."""
    layers = layers or Layers(recording)
    own = range(bounds[stage], bounds[stage + 1])
    last = stage == len(bounds) - 2
    numbers = {number for layer in own for number in layers.nodes[layer]}
    ends = recording.last_takes if last else ()
    refs = tuple(ref for number in numbers for ref in recording.nodes[number].takes) + ends
    ordered = sorted(numbers | set(recording.needed(refs)))
    names, nodes = layers.value_names, recording.nodes
    inside = set(ordered)
    takes: dict[str, Ref] = {}
    for ref in [ref for number in ordered for ref in nodes[number].takes] + list(ends):
        if ref.node not in inside:
            takes[names[ref]] = ref
    gives = {
        names[ref]: ref
        for ref, consumers in layers.consumers.items()
        if ref.node in numbers and any(consumer not in own for consumer in consumers)
    }
    calls = {"before": Counter[str](), "here": Counter[str](), "behind": Counter[str]()}
    for number, node in enumerate(nodes):
        place = "here" if number in numbers else "before" if number < min(numbers, default=0) else "behind"
        calls[place].update(dict(node.calls))
    draws = frozenset(name for number in ordered if nodes[number].is_module for name in nodes[number].draws)
    touched = {ref for number in ordered for ref in nodes[number].touches}
    return Routine(
        steps=_steps(recording, ordered, set(gives.values()) | set(ends)),
        takes=takes,
        gives=gives,
        needs_grad=frozenset(name for name, ref in gives.items() if nodes[ref.node].needs_grad_at(ref.index)),
        cloned=frozenset(name for name, ref in takes.items() if {ref, layers.original(ref)} & touched),
        output=recording.output if last else None,
        targets=recording.targets if last else None,
        held=recording.held,
        draws=draws,
        calls={n: (calls["before"][n], calls["here"][n]) for n in draws if calls["before"][n] or calls["behind"][n]},
    )


def cut_guard(recording: Recording, guard: Guard) -> Routine:
    """Returns what gives a guard's arguments: the free nodes they depend on, and what these take of the batch."""
    numbers, refs = recording.needed(guard.args.refs), guard.args.refs
    taken = (*(ref for number in numbers for ref in recording.nodes[number].takes), *refs)
    takes = {recording.batch[ref.index]: ref for ref in taken if ref.node == BATCH and ref.index is not None}
    touched = {ref for number in numbers for ref in recording.nodes[number].touches}
    return Routine(
        steps=_steps(recording, numbers, set(refs)),
        takes=takes,
        gives={},
        needs_grad=frozenset(),
        cloned=frozenset(name for name, ref in takes.items() if ref in touched),
        output=guard.args,
        targets=None,
    )


def _steps(recording: Recording, numbers: list[int], wanted: set[Ref]) -> tuple[Step, ...]:
    """Returns steps that keep values only as long as somebody takes them."""
    nodes, last_use = recording.nodes, dict[Ref, int]()
    for number in numbers:
        last_use |= dict.fromkeys(nodes[number].takes, number)
    whole = {ref.node for ref in (*last_use, *wanted) if ref.index is None}
    steps = []
    for number in numbers:
        node = nodes[number]
        kept = tuple(ref.index for ref in dict.fromkeys((*last_use, *wanted)) if ref.node == number)
        dropped = tuple(ref for ref, last in last_use.items() if last == number and ref not in wanted)
        looked_at = any(leaf is not None and leaf != PLACEHOLDER for leaf in node.plain)
        steps.append(Step(number, node, kept, dropped, node.is_module and looked_at and number not in whole))
    return tuple(steps)
