"""Objects that a model hands on and that are no trees of tensors, such as caches: HeldObjects."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from modelpar.capture import trees
from modelpar.capture.recording import Held, Settings, Template, as_set
from modelpar.capture.traps import SCALARS
from modelpar.capture.watch import generator_states, set_generator_states


class HeldObjects:
    """Keeps objects as they were when first seen, and knows which calls took them.

    Each stage gets a fresh copy for every micro-batch. That is the same as long as no call finds in an object what
    another left there, so a call that takes one a second time is tried with a fresh copy, too.
    """

    def __init__(self) -> None:
        self.snapshots: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._pickled: dict[int, bytes | None] = {}
        self._alive: list[Any] = []
        self._holders: dict[int, list[int]] = {}
        """The nodes that took each object."""
        self._trials: dict[int, Trial] = {}
        """By node."""

    def find(self, thing: Any) -> Held | None:
        """Returns an object's number, if it has one."""
        number = self._numbers.get(id(thing))
        return None if number is None else Held(number)

    def add(self, thing: Any) -> Held:
        """Takes a copy of an object; raises what copying it raises."""
        self.snapshots.append(copy.deepcopy(thing))
        self._numbers[id(thing)] = len(self.snapshots) - 1
        self._alive.append(thing)
        return Held(self._numbers[id(thing)])

    def trial(
        self, call: Callable[..., Any], template: Template, settings: Settings | None, args: Any, kwargs: Any
    ) -> Trial | None:
        """Returns, before a call, with what it is to be tried later, if others took an object that it takes."""
        if not any(self._holders.get(held.number) for held in template.held):
            return None
        leaves, spec = trees.flatten((args, kwargs))
        fresh = [
            self._fresh(t.number) if type(t) is Held else clone(leaf)
            for leaf, t in zip(leaves, template.leaves, strict=True)
        ]
        return Trial(call, trees.unflatten(fresh, spec), settings, generator_states(), template)

    def _fresh(self, number: int) -> Any:
        """Returns a copy of an object as it was; by pickle where that can be done, which is far quicker."""
        if number not in self._pickled:
            try:
                self._pickled[number] = pickle.dumps(self.snapshots[number])
            except Exception:
                self._pickled[number] = None
        pickled = self._pickled[number]
        return copy.deepcopy(self.snapshots[number]) if pickled is None else pickle.loads(pickled)

    def taken(self, number: int, template: Template, trial: Trial | None, output: Any) -> None:
        """Notes which objects a node took, and what it returned."""
        for held in template.held:
            self._holders.setdefault(held.number, []).append(number)
        if trial:
            trial.returned(output)
            self._trials[number] = trial

    def bound(self) -> Iterator[tuple[int, int, str]]:
        """Tries the calls; yields the pairs of which one uses what the other left in an object, and why.

        To be called when the forward is over, so that nobody outside sees what is only tried.
        """
        for number, trial in self._trials.items():
            if not trial.is_same():
                for held in trial.template.held:
                    kind = type(self.snapshots[held.number]).__name__
                    yield self._holders[held.number][0], number, f"they hand values to each other in a {kind}"


@dataclass
class Trial:
    """A call to be made again, to see whether it finds what others left somewhere."""

    call: Callable[..., Any]
    arguments: tuple[Any, Any]
    settings: Settings | None
    states: list[Tensor]
    template: Template
    output: list[Tensor] = field(default_factory=list)

    def returned(self, output: Any) -> None:
        """Notes what the call returned the first time."""
        self.output = [clone(leaf) for leaf in trees.tensors_of(output)]

    def is_same(self) -> bool:
        """Tells whether it returns the same."""
        args, kwargs = self.arguments
        set_generator_states(self.states)
        try:
            with torch.no_grad(), as_set(self.settings and self.settings._replace(grad=None)):
                found = trees.tensors_of(self.call(*args, **kwargs))
        except Exception:  # it needs what others left in the object
            return False
        return len(found) == len(self.output) and all(map(_same, found, self.output))


def tensors_in(thing: Any) -> Iterator[Tensor]:
    """Yields the tensors that can be reached from an object, other than through classes, modules and functions."""
    todo, seen = [thing], {id(thing)}
    while todo:
        found = todo.pop()
        if isinstance(found, Tensor):
            yield found
        elif not isinstance(found, (type, ModuleType, FunctionType, nn.Module, *SCALARS)):
            for inner in gc.get_referents(found):
                if id(inner) not in seen:
                    seen.add(id(inner))
                    todo.append(inner)


def clone(leaf: Any) -> Any:
    """Returns a copy of a tensor, and anything else as it is."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.detach(), b.detach())
