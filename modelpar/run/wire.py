"""What travels between ranks: pytrees packed for the wire, and modules shipped as bytes and tensors."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(slots=True)
class _Packed:
    """A tensor as the exact window of storage it spans, with its shape and strides (strides change bits)."""

    window: Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool


def pack(tree: Any) -> Any:
    """Returns a pytree fit for the wire: detached tensors on the CPU, no larger than what they span."""
    return pytree.tree_map_only(Tensor, _pack, tree)


def unpack(tree: Any, device: torch.device) -> Any:
    """Returns what was sent, on a device; tensors that required a gradient are leaves that do."""
    return pytree.tree_map_only((_Packed, Tensor), lambda leaf: _unpack(leaf, device), tree)


def detach(tree: Any) -> Any:
    """Returns a pytree for another thread: the same memory, as leaves of their own graph."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), tree)


def _pack(tensor: Tensor) -> _Packed | Tensor:
    flat = tensor.detach()
    if flat.layout is not torch.strided:
        return flat.cpu()
    shape, stride = tuple(flat.shape), tuple(flat.stride())
    span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if flat.numel() else 0
    window = flat.as_strided((span,), (1,), flat.storage_offset())
    if flat.device.type != "cpu":
        window = window.cpu()
    elif window.untyped_storage().nbytes() > span * window.element_size():
        window = window.clone()
    return _Packed(window, shape, stride, tensor.requires_grad)


def _unpack(leaf: _Packed | Tensor, device: torch.device) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf if leaf.device == device else leaf.detach().to(device).requires_grad_(leaf.requires_grad)
    tensor = leaf.window.to(device).as_strided(leaf.shape, leaf.stride)
    return tensor.requires_grad_(leaf.requires_grad)


class _Pickler(cloudpickle.Pickler):
    """Pickles classes and functions by value where they cannot be imported, and sets tensors aside."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._index: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> Any:
        if type(obj) not in (Tensor, nn.Parameter, nn.Buffer):
            return None
        if id(obj) not in self._index:
            self._index[id(obj)] = len(self.tensors)
            self.tensors.append(obj.detach())
        attributes = {name: value for name, value in vars(obj).items() if not name.startswith("_")}
        return self._index[id(obj)], type(obj), obj.requires_grad, attributes


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]):
        super().__init__(file)
        self._tensors, self._made = tensors, dict[int, Tensor]()

    def persistent_load(self, pid: Any) -> Tensor:
        index, kind, requires_grad, attributes = pid
        if index not in self._made:
            tensor = self._tensors[index]
            if kind is nn.Parameter:
                tensor = nn.Parameter(tensor, requires_grad)
            elif kind is nn.Buffer:
                tensor = nn.Buffer(tensor)
            vars(tensor).update(attributes)
            self._made[index] = tensor
        return self._made[index]


@dataclass(slots=True)
class Parcel:
    """Any object as bytes plus the tensors it holds, which keep their identity: a tied tensor stays one tensor."""

    data: bytes
    tensors: list[Tensor]


def ship(obj: Any) -> Parcel:
    """Packs an object, classes defined in a notebook or script included."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(obj)
    return Parcel(file.getvalue(), [_exact(tensor) for tensor in pickler.tensors])


def receive(parcel: Parcel) -> Any:
    """Returns the object; its tensors are the parcel's own."""
    return _Unpickler(io.BytesIO(parcel.data), parcel.tensors).load()


def _exact(tensor: Tensor) -> Tensor:
    """Returns a copy of its own memory, with the same strides, so that neither side sees the other write."""
    return tensor.cpu().clone() if tensor.device.type == "cpu" else tensor.cpu()
