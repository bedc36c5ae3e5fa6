"""Sees what a model's code calls while it runs: modules, custom autograd functions, torch functions.

The first two are seen by replacing a method of torch's classes, in the whole process, so one at a time. Nothing is
attached to the user's modules, and no mode is on inside what is called whole: torch's own layers, for one, take another
path where they see either.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _FunctionBase
from torch.autograd.function import _SingleLevelFunction
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

_PATCHING = threading.RLock()

ModuleCall = Callable[[Callable[..., Any], nn.Module, Any, Any], Any]
"""Calls a module, given how to, the module, its arguments and keyword arguments."""

CustomCall = Callable[[type, Callable[..., Any], Any, Any], Any]
"""Likewise a custom autograd function."""


@contextmanager
def module_calls(around: ModuleCall, model: nn.Module | None = None) -> Iterator[None]:
    """Has the calls of all modules on this thread go through `around`; once each, also where a class of the model has a
    `__call__` of its own around torch's, as layers that checkpoint themselves do."""
    thread, entered = threading.get_ident(), list[tuple[nn.Module, type]]()

    def patch(kind: type, call: Callable[..., Any]) -> Callable[..., Any]:
        def patched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            within = bool(entered) and entered[-1][0] is module and entered[-1][1] is not kind
            if threading.get_ident() != thread or within:
                return call(module, *args, **kwargs)

            def enter(*args: Any, **kwargs: Any) -> Any:
                entered.append((module, kind))
                try:
                    return call(module, *args, **kwargs)
                finally:
                    entered.pop()

            return around(enter, module, args, kwargs)

        return patched

    classes = {kind for module in (model.modules() if model is not None else ()) for kind in type(module).__mro__}
    own = [kind for kind in classes if issubclass(kind, nn.Module) and "__call__" in vars(kind)]
    own = [kind for kind in own if not issubclass(kind, torch.jit.ScriptModule)]
    with _PATCHING:
        calls = {kind: vars(kind)["__call__"] for kind in {nn.Module, *own}}
        for kind, call in calls.items():
            kind.__call__ = patch(kind, call)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for kind, call in calls.items():
                kind.__call__ = call  # type: ignore[method-assign]


@contextmanager
def attribute_sets(before: Callable[[nn.Module, str, Any], None]) -> Iterator[None]:
    """Has `before` told of every attribute of a module that this thread is about to set."""
    put, thread = nn.Module.__setattr__, threading.get_ident()

    def patched(module: nn.Module, name: str, value: Any) -> None:
        if threading.get_ident() == thread:
            before(module, name, value)
        put(module, name, value)

    with _PATCHING:
        nn.Module.__setattr__ = patched  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.__setattr__ = put  # type: ignore[method-assign]


@contextmanager
def custom_calls(around: CustomCall) -> Iterator[None]:
    """Has all custom autograd functions that this thread applies go through `around`, by whatever name it calls them.

    What Function.apply itself calls is replaced: `apply` may have been bound to another name before.
    """
    apply, thread = _FunctionBase.__dict__["apply"], threading.get_ident()

    def patched(kind: type, *args: Any, **kwargs: Any) -> Any:
        bound = apply.__get__(None, kind)
        if threading.get_ident() != thread:
            return bound(*args, **kwargs)
        return around(kind, bound, args, kwargs)

    with _PATCHING:
        _SingleLevelFunction.apply = classmethod(patched)  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            del _SingleLevelFunction.apply


class Functions(TorchFunctionMode):
    """Has all torch functions that are called on this thread go through `around`."""

    def __init__(self, around: Callable[[Callable[..., Any], Any, Any], Any]):
        super().__init__()
        self._around, self._thread = around, threading.get_ident()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if threading.get_ident() != self._thread:
            return func(*args, **(kwargs or {}))
        return self._around(func, args, kwargs or {})

    @contextmanager
    def away(self) -> Iterator[None]:
        """Takes this mode, and no other, off the stack meanwhile."""
        above: list[Any] = []
        while (mode := _pop_mode()) is not self:
            above.append(mode)
        _push(above)
        try:
            yield
        finally:
            for _ in above:
                _pop_mode()
            _push_mode(self)
            _push(above)


def _push(modes: list[Any]) -> None:
    for mode in reversed(modes):
        _push_mode(mode)


def generator_states() -> list[Tensor]:
    """Returns the states of the CPU generator and, where CUDA is in use, of the current device's."""
    with torch._C.DisableTorchFunction():
        states = [torch.default_generator.get_state()]
        return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else states


def set_generator_states(states: list[Tensor]) -> None:
    """Sets what `generator_states` returned."""
    torch.default_generator.set_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


def may_draw(module: nn.Module, kinds: set[type]) -> bool:
    """Tells whether a module that was not called could draw if it were: it is of a kind that drew, or torch's own."""
    if isinstance(module, (nn.modules.dropout._DropoutNd, nn.RNNBase, nn.MultiheadAttention)):
        return module.training and float(getattr(module, "p", getattr(module, "dropout", 0.0))) > 0
    return type(module) in kinds or isinstance(module, (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d))


def has_drawn(before: list[Tensor]) -> bool:
    """Tells whether a generator has moved since."""
    return not all(map(torch.equal, before, generator_states()))
