"""Modules that torch.compile has made faster: they are called whole, and compiled again where they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Tells whether `torch.compile` made a module, or its `compile()` was called."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Runs the code of compiled modules as it is written: a micro-batch or two are not worth compiling for."""
    if not any(map(is_compiled, model.modules())):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def compiler_of(module: nn.Module) -> Callable[[Any], Any] | None:
    """Returns what `module.compile()` compiled a module's call with, as a function that does so again; None for a
    module that was not compiled in place.

    torch keeps the arguments nowhere, and drops what it compiled from a copy of the module.
    """
    call = getattr(module, "_compiled_call_impl", None)
    if call is None:
        return None
    inside = dict(zip(call.__code__.co_freevars, call.__closure__ or (), strict=False))
    compiler = inside["self"].cell_contents if "self" in inside else None
    if not callable(compiler):
        raise TypeError(f"{type(module).__name__}.compile() was called in a way that cannot be repeated")
    return compiler


def with_call_compiled(module: nn.Module, state_and_compiler: tuple[Any, Callable[[Any], Any]]) -> None:
    """Gives a fresh module its state, and compiles its call."""
    state, compiler = state_and_compiler
    module.__setstate__(state)
    module._compiled_call_impl = compiler(module._call_impl)
