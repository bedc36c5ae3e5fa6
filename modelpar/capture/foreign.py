"""Calls that a mode for torch functions does not see: `torch.vmap`, scripted functions, arrays that become tensors.

Each becomes one node, as a torch function does. What a function under vmap has captured counts as its arguments.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any

import numpy as np
import torch
import torch._functorch.apis
from torch import Tensor

from modelpar.capture.watch import _PATCHING

ForeignCall = Callable[[Callable[..., Any], Any, Any], Any]
"""Calls a function that stands for the call in a recording, given its arguments and keyword arguments."""


@dataclass(frozen=True)
class Vmapped:
    """A call of a function under `torch.vmap`; its first arguments are the tensors that the function has captured."""

    function: Any
    """With None in the place of these."""
    options: tuple[Any, ...]
    captured: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls it."""
        tensors = iter(args[: self.captured])
        function = _rebuild(self.function, lambda value: next(tensors) if value is _GAP else value)
        return _vmap(function, *self.options, *args[self.captured :], **kwargs)


@dataclass(frozen=True, eq=False)
class Scripted:
    """A scripted function."""

    function: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls it."""
        if isinstance(self.function, torch._C.ScriptFunction):
            return _call_scripted(self.function, *args, **kwargs)
        return self.function(*args, **kwargs)


def from_array(array: np.ndarray[Any, Any]) -> Tensor:
    """Returns a tensor of an array's values."""
    return _from_numpy(array.copy())


class _Gap:
    """Stands for a tensor that a function has captured."""

    def __reduce__(self) -> str:
        return "_GAP"


_GAP = _Gap()
_vmap, _from_numpy, _call_scripted = (
    torch._functorch.apis.vmap_impl,
    torch.from_numpy,
    torch._C.ScriptFunction.__call__,
)


@contextmanager
def foreign_calls(around: ForeignCall, is_value: Callable[[Tensor], bool]) -> Iterator[None]:
    """Has such calls of this thread go through `around`; `is_value` tells the tensors that a function must be given."""
    thread = threading.get_ident()

    def vmapped(function: Any, *rest: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return _vmap(function, *rest, **kwargs)
        found: list[Tensor] = []

        def take(value: Any) -> Any:
            if isinstance(value, Tensor) and is_value(value):
                found.append(value)
                return _GAP
            return value

        call = Vmapped(_rebuild(function, take), rest[:4], len(found))
        return around(call, (*found, *rest[4:]), kwargs)

    def scripted(function: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return _call_scripted(function, *args, **kwargs)
        return around(Scripted(function), args, kwargs)

    def from_numpy(array: Any) -> Any:
        if threading.get_ident() != thread or not isinstance(array, np.ndarray):
            return _from_numpy(array)
        return around(from_array, (array,), {})

    with _PATCHING, ExitStack() as back:
        for place, name, patch in (
            (torch._functorch.apis, "vmap_impl", vmapped),
            (torch._C.ScriptFunction, "__call__", scripted),
            (torch, "from_numpy", from_numpy),
        ):
            back.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, patch)
        yield


def _rebuild(value: Any, change: Callable[[Any], Any]) -> Any:
    """Returns a function with what it has captured changed, also in functions that it has captured."""
    if isinstance(value, functools.partial):
        args = [_rebuild(arg, change) for arg in value.args]
        return functools.partial(
            _rebuild(value.func, change), *args, **{k: _rebuild(v, change) for k, v in value.keywords.items()}
        )
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(_rebuild(item, change) for item in value)
    if not isinstance(value, FunctionType):
        return change(value)
    cells = tuple(CellType(_rebuild(cell.cell_contents, change)) for cell in value.__closure__ or ())
    defaults = _rebuild(value.__defaults__, change) if value.__defaults__ else None
    found = FunctionType(value.__code__, value.__globals__, value.__name__, defaults, cells or None)
    found.__kwdefaults__, found.__dict__ = value.__kwdefaults__, dict(value.__dict__)
    return found
