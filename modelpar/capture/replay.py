"""Runs a routine on the modules of its stage: Replay, its steps made ready once, so that a call costs little."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modelpar.capture import trees
from modelpar.capture.cut import Routine, Step
from modelpar.capture.recording import PLACEHOLDER, Held, Node, Ref, State, Template, as_set
from modelpar.errors import RunError

Drawing = Callable[[str, int, Any], AbstractContextManager[list[Any]]]
"""Sets the random generators for code that draws and is no module called whole: whose it is, in which call of that, and
the state that it left them in before; gives the state in which it leaves them, in a list."""

_CONSTANT, _VALUE, _STATE, _HELD = range(4)


class _Leaf(NamedTuple):
    """A leaf of a template: its kind, and a constant, a slot, (module, attribute), or the number of a held object."""

    kind: int
    what: Any


class _Call(NamedTuple):
    """A step made ready."""

    function: Callable[..., Any]
    leaves: tuple[_Leaf, ...]
    spec: trees.Spec | None
    """None where the leaves are the positional arguments."""
    writes: tuple[_Leaf, ...]
    kept: tuple[tuple[int | None, int], ...]
    """Which leaf of the output goes to which slot; None is the output itself, −1 − k the k-th of `writes`."""
    dropped: tuple[int, ...]
    node: Node
    after: int | None
    """The slot with the state in which the code that draws left the generators before."""
    exact: bool
    special: bool
    """Whether something must be set around it, or what modules inside it return is wanted as well."""


class Replay:
    """A routine, the modules it calls, and the device it runs on."""

    def __init__(self, routine: Routine, module: nn.Module, device: torch.device | None = None):
        self.routine = routine
        self._module, self._device = module, device or torch.device("cpu")
        self._slots: dict[Ref, int] = {}
        self._takes = [(name, self._slot(ref), name in routine.cloned) for name, ref in routine.takes.items()]
        self._calls = [self._ready(step) for step in routine.steps]
        self._gives = [(name, self._slot(ref)) for name, ref in routine.gives.items()]
        self._ends = [
            (name, tuple(self._leaf(None if type(leaf) is Held else leaf) for leaf in end.leaves), _unless_single(end))
            for name, end in (("output", routine.output), ("targets", routine.targets))
            if end is not None
        ]

    def __call__(self, values: Mapping[str, Any], drawing: Drawing | None = None) -> dict[str, Any]:
        """Replays the steps; returns the values given, and on the last stage "output" and "targets"."""
        held: dict[int, Any] = {}
        env: list[Any] = [None] * len(self._slots)
        for name, slot, cloned in self._takes:
            env[slot] = trees.map_tensors(Tensor.clone, values[name]) if cloned else values[name]

        def rarer(kind: int, what: Any) -> Any:
            if kind == _STATE:
                return getattr(*what)
            if what not in held:
                held[what] = copy.deepcopy(self.routine.held[what])
            return held[what]

        def filled(leaves: tuple[_Leaf, ...]) -> list[Any]:
            return [env[w] if k == _VALUE else w if k == _CONSTANT else rarer(k, w) for k, w in leaves]

        for call in self._calls:
            arguments = filled(call.leaves)
            written = filled(call.writes) if call.writes else ()
            keywords: dict[str, Any] = {}
            if call.spec is not None:
                arguments, keywords = trees.unflatten(arguments, call.spec)
            if call.special:
                before = env[call.after] if call.after is not None else None
                output, leaves = self._in_its_settings(call, drawing, before, arguments, keywords)
            else:
                output = call.function(*arguments, **keywords)
                leaves = [output] if isinstance(output, Tensor) else trees.leaves_of(output)
            if call.exact:
                _check(call.node, leaves)
            elif call.node.check and output != call.node.plain[0]:
                raise RunError(
                    f"{call.node.name} of a value was {output} where it was {not output} when the model was captured, "
                    f"and {call.node.inside or 'the model'} raised an exception when that was tried "
                    f"({call.node.line}): what it checks does not hold on this micro-batch"
                )
            for index, slot in call.kept:
                env[slot] = output if index is None else leaves[index] if index >= 0 else written[-1 - index]
            del arguments, keywords, written, output, leaves
            for slot in call.dropped:
                env[slot] = None
        found = {name: env[slot] for name, slot in self._gives}
        if self.routine.output is not None:
            found["targets"] = None  # unless the loss takes some
        for name, ends, spec in self._ends:
            value = filled(ends)
            found[name] = value[0] if spec is None else trees.unflatten(value, spec)
        return found

    def _in_its_settings(self, call: _Call, drawing: Drawing | None, before: Any, arguments: Any, keywords: Any) -> Any:
        """Makes a call with the generators, grad mode and autocast as they should be; returns it and its leaves."""
        own = call.node.own
        with as_set(call.node.settings), drawing(*own, before) if drawing and own else nullcontext([]) as left:
            output, leaves = call.node.call(self._module, arguments, keywords)
        return output, [*leaves, tuple(left)] if own else leaves

    def _slot(self, ref: Ref) -> int:
        return self._slots.setdefault(ref, len(self._slots))

    def _leaf(self, leaf: Any) -> _Leaf:
        if type(leaf) is Ref:
            return _Leaf(_VALUE, self._slot(leaf))
        if type(leaf) is State:
            place, _, last = leaf.name.rpartition(".")
            return _Leaf(_STATE, (self._module.get_submodule(place), last))
        if type(leaf) is Held:
            return _Leaf(_HELD, leaf.number)
        if isinstance(leaf, torch.device):  # wherever the code named one
            return _Leaf(_CONSTANT, leaf if self._device.type == "cpu" else self._device)
        return _Leaf(_CONSTANT, leaf.to(self._device) if isinstance(leaf, Tensor) else leaf)

    def _ready(self, step: Step) -> _Call:
        node = step.node
        args: Template = node.args
        return _Call(
            function=self._module.get_submodule(node.target) if isinstance(node.target, str) else node.target,
            leaves=tuple(map(self._leaf, args.leaves)),
            spec=None if _is_flat(args) else args.spec,
            writes=tuple(map(self._leaf, node.writes)),
            kept=tuple((index, self._slot(Ref(step.number, index))) for index in step.kept),
            dropped=tuple(self._slot(ref) for ref in step.dropped),
            node=node,
            after=None if node.after is None else self._slot(node.after),
            exact=step.exact,
            special=bool(node.settings or node.own or node.inner or node.placed or node.checkpoint),
        )


def _unless_single(end: Template) -> trees.Spec | None:
    """Returns the spec of a template that is more than a leaf."""
    return None if end.spec == trees.flatten(0)[1] else end.spec


def _is_flat(args: Template) -> bool:
    """Tells whether a template's leaves are positional arguments, and that is all."""
    return args.spec == trees.flatten((tuple(0 for _ in args.leaves), {}))[1]


def _check(node: Node, leaves: list[Any]) -> None:
    """Raises RunError where a module returned other plain values than when it was recorded."""
    found = tuple(PLACEHOLDER if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    for now, then in zip(found, node.plain, strict=False):
        if isinstance(then, (bool, int, float, str, type(None))) and now != then:
            raise RunError(
                f"{node.name} returned {now!r} where it returned {then!r} when the model was captured, and the code "
                f"around it may depend on that ({node.line}); expected the same, or tensors"
            )
    if len(found) != len(node.plain):
        raise RunError(f"{node.name} returned {len(found)} values; expected {len(node.plain)}, as when it was captured")
