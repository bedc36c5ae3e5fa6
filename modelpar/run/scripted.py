"""How modules that torch.jit made travel: as torch saves them, and their tensors beside, which keep their identity."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor


def parts(module: torch.jit.ScriptModule) -> tuple[bytes, dict[str, Tensor]]:
    """Returns a scripted module in two parts."""
    file = io.BytesIO()
    torch.jit.save(module, file)  # type: ignore[no-untyped-call]
    return file.getvalue(), _tensors(module)


def restored(saved: bytes, tensors: dict[str, Tensor]) -> Any:
    """Returns the module with the tensors given in the place of those that were saved with it."""
    module = torch.jit.load(io.BytesIO(saved))  # type: ignore[no-untyped-call]
    owners = dict(module.named_modules(remove_duplicate=False))
    for name, tensor in tensors.items():
        owner, _, last = name.rpartition(".")
        setattr(owners[owner], last, tensor)
    return module


def _tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return dict(named)
