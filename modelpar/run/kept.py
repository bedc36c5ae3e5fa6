"""What a forward may change of a module besides its gradients, remembered and put back: Kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


class Kept:
    """The buffers and attributes of a module and those inside it, as they are now.

    Lists, dicts, sets and tensors among the attributes are remembered with what they hold; of other objects only which
    they are.
    """

    def __init__(self, module: nn.Module):
        self._buffers = [(m, name, b, b.detach().clone()) for m in module.modules() for name, b in _tensors(m._buffers)]
        self._attributes = [(m, name, value, _copy(value)) for m in module.modules() for name, value in _own(m)]
        self._module = module

    def restore(self) -> None:
        """Puts all back; what did not change is not written to."""
        for module, name, buffer, value in self._buffers:
            module._buffers[name] = buffer
            _fill(buffer, value)
        known = {(id(module), name) for module, name, _, _ in self._attributes}
        for module in self._module.modules():
            for name in [name for name, _ in _own(module) if (id(module), name) not in known]:
                del vars(module)[name]
        for module, name, value, held in self._attributes:
            vars(module)[name] = value
            if isinstance(value, Tensor):
                _fill(value, held)
            elif isinstance(value, list):
                value[:] = held
            elif isinstance(value, (dict, set)):
                value.clear()
                value.update(held)


def _own(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in list(vars(module).items()) if name not in _OF_TORCH)


def _tensors(named: dict[str, Tensor | None]) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in named.items() if tensor is not None]


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if type(value) in (list, dict, set) else value


def _fill(tensor: Tensor, value: Tensor) -> None:
    here = tensor.detach()
    if here.shape != value.shape:
        tensor.data = value
    elif not torch.equal(here, value):
        here.copy_(value)
