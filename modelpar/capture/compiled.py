"""Modules that torch.compile has made faster: they are called whole, and compiled again where they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
