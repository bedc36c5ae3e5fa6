"""What modules keep in plain attributes from one call to the next: Calls; `fingerprint` and `changed`."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from modelpar.capture import trees
from modelpar.capture.held import Trial, clone
from modelpar.capture.recording import Settings, Template
from modelpar.capture.traps import SCALARS
from modelpar.capture.untouched import Attributes, attributes_of, put_back
from modelpar.capture.watch import generator_states

_CONTAINERS = (list, dict, set, deque, OrderedDict)
_OF_MODULES = frozenset(vars(nn.Module())) | {"_is_full_backward_hook"}
"""What torch itself keeps in every module."""

Fingerprint = dict[tuple[int, str], Any]
"""By id of a module and name of an attribute, what tells that it is still the same."""


def fingerprint(modules: Iterable[nn.Module]) -> Fingerprint:
    """Returns what tells whether plain attributes, and containers of them, are as they were."""
    return {
        (id(module), name): _print(value)
        for module in modules
        for name, value in vars(module).items()
        if name not in _OF_MODULES and isinstance(value, (*SCALARS, Tensor, *_CONTAINERS))
    }


def changed(before: Fingerprint, after: Fingerprint) -> list[tuple[int, str]]:
    """Returns the attributes that differ, by id of their module and name."""
    missing = object()
    return [key for key in before.keys() | after.keys() if before.get(key, missing) != after.get(key, missing)]


def _spoiled(held: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Returns tensors of NaN for those that earlier calls set: what is there may be left of a run on the same batch."""
    tensors = {name: held[name] for name in names if isinstance(held.get(name), Tensor)}
    return {n: torch.full_like(t, torch.nan) if t.is_floating_point() else t for n, t in tensors.items()}


class _Same:
    """Objects that are equal only to the very same ones, and stay alive to tell."""

    def __init__(self, objects: Iterable[Any], more: Any = None):
        self._objects, self._more = list(objects), more

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same) or self._more != other._more or len(self._objects) != len(other._objects):
            return False
        return all(a is b for a, b in zip(self._objects, other._objects, strict=True))

    __hash__ = None  # type: ignore[assignment]


def _print(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Same([value], -1 if value.is_inference() else value._version)
    if isinstance(value, dict):
        return _Same(of for item in value.items() for of in item)
    if isinstance(value, _CONTAINERS):
        return _Same(value, type(value))
    return type(value), repr(value) if isinstance(value, (float, complex)) else value  # nan is not nan


class Calls:
    """Finds calls of modules that depend on an attribute which an earlier call set.

    A module that is called again, by itself or as a part of another one, is tried with its attributes as they were when
    the forward began: as another stage would have it.
    """

    def __init__(self) -> None:
        self._first: dict[int, Attributes] = {}
        """By id of a module, its attributes when it was first called."""
        self._alive: list[nn.Module] = []
        self._set_by: dict[tuple[int, str], int] = {}
        """The last call that set an attribute, by id of its module and name."""
        self._trials: list[tuple[int, Trial, dict[str, int]]] = []

    def begin(self, module: nn.Module) -> Fingerprint:
        """Remembers a module's attributes before its first call; returns what tells whether the call changes them."""
        for part in module.modules():
            if id(part) not in self._first:
                self._first[id(part)] = attributes_of([part])
                self._alive.append(part)
        return fingerprint(module.modules())

    def trial(
        self, module: nn.Module, call: Callable[..., Any], template: Template, settings: Settings | None, arguments: Any
    ) -> Trial | None:
        """Returns, before a call, with what it is to be tried later, where an earlier call set an attribute of it."""
        if not (names := dict(self._setters(module))):
            return None
        parts = list(module.modules())

        def as_first(*args: Any, **kwargs: Any) -> Any:
            now = attributes_of(parts)
            for part in parts:
                put_back(self._first[id(part)])
                vars(part).update(_spoiled(vars(part), names))
            try:
                return call(*args, **kwargs)
            finally:
                put_back(now)

        return Trial(as_first, trees.map_tensors(clone, arguments), settings, generator_states(), template)

    def end(
        self, number: int, module: nn.Module, before: Fingerprint, trial: Trial | None, output: Any
    ) -> list[tuple[int, str]]:
        """Notes what a call changed, and returned; returns the former, by id of the module and name."""
        if trial is not None:
            trial.returned(output)
            self._trials.append((number, trial, dict(self._setters(module))))
        found = changed(before, fingerprint(module.modules()))
        self._set_by |= dict.fromkeys(found, number)
        return found

    def bound(self) -> Iterator[tuple[int, int, str]]:
        """Tries the calls; yields the pairs of which one uses what the other set, and why. After the forward."""
        for number, trial, setters in self._trials:
            if not trial.is_same():
                for name, setter in setters.items():
                    yield setter, number, f"one sets the attribute {name!r}, which the other uses"

    def _setters(self, module: nn.Module) -> Iterator[tuple[str, int]]:
        parts = {id(part) for part in module.modules()}
        for (part, name), number in self._set_by.items():
            if part in parts:
                yield name, number
