"""What travels between ranks: values packed for a message or for shared memory, modules as bytes and tensors."""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import cloudpickle
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from modelpar.errors import CaptureError, describe
from modelpar.run import layout
from modelpar.run.cuda import HandedOver, Shared
from modelpar.run.reducers import culprit, reduced


@dataclass(slots=True)
class _Packed:
    """A tensor as the window of storage it spans, with its shape, strides and place in a vector: all change bits."""

    window: Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """Where in the window the tensor begins, less than layout.ALIGNMENT bytes."""
    requires_grad: bool


def pack(tree: Any) -> Any:
    """Returns a pytree fit for the wire: detached tensors on the CPU, hardly larger than what they span."""
    return pytree.tree_map_only(Tensor, _pack, tree)


def unpack(tree: Any, device: torch.device) -> Any:
    """Returns what was sent, on a device; tensors that required a gradient are leaves that do."""
    if type(tree) is Tensor and tree.device == device:  # as nearly all are
        return tree
    if type(tree) is HandedOver:
        tree = tree.accept()
    return pytree.tree_map_only((_Packed, Shared, Tensor), lambda leaf: _unpack(leaf, device), tree)


def detach(tree: Any) -> Any:
    """Returns a pytree for another thread: the same memory, as leaves of their own graph."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), tree)


def dumps(obj: Any) -> tuple[bytes, list[NDArray[np.uint8]]]:
    """Returns an object as bytes, and the memory that its tensors span, apart and not copied (on the CPU)."""
    file = io.BytesIO()
    windows: list[pickle.PickleBuffer] = []
    _ValuePickler(file, protocol=5, buffer_callback=windows.append).dump(obj)
    return file.getvalue(), [np.asarray(window) for window in windows]


def loads(data: bytes | memoryview, windows: Sequence[NDArray[np.uint8]]) -> Any:
    """Returns the object; its tensors lie in the memory given, which must begin at multiples of layout.ALIGNMENT."""
    return pickle.loads(data, buffers=windows)


def aligned(data: bytes) -> NDArray[np.uint8]:
    """Returns bytes in writable memory that begins at a multiple of layout.ALIGNMENT."""
    memory: NDArray[np.uint8] = torch.empty(len(data), dtype=torch.uint8).numpy()
    memory[:] = np.frombuffer(data, np.uint8)
    return memory


def _pack(tensor: Tensor) -> _Packed | Tensor:
    flat = tensor.detach()
    if flat.layout is not torch.strided:
        return flat.cpu()
    window, offset = _window(flat)
    if window.untyped_storage().nbytes() != window.numel() * window.element_size():
        window = window.clone()  # RPC sends whole storages
    return _Packed(window, tuple(flat.shape), tuple(flat.stride()), offset, tensor.requires_grad)


def _window(tensor: Tensor) -> tuple[Tensor, int]:
    """Returns what a tensor spans of its storage, as a vector on the CPU, and where in it the tensor begins."""
    window, offset = layout.window(tensor)
    return window if window.device.type == "cpu" else window.cpu(), offset


def _unpack(leaf: _Packed | Shared | Tensor, device: torch.device) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf if leaf.device == device else layout.move(leaf, device).requires_grad_(leaf.requires_grad)
    if isinstance(leaf, Shared):
        return leaf.open(device)
    tensor = layout.put(leaf.window, device).as_strided(leaf.shape, leaf.stride, leaf.offset)
    return tensor.requires_grad_(leaf.requires_grad)


_DTYPES = {dtype: name for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}
"""One name of each dtype: pickling one by itself looks through all modules."""


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def _reduce(tensor: Tensor) -> Any:
    """Says how a tensor is pickled: its window apart, so that it can be copied straight to where it should lie."""
    flat = tensor.detach()
    if flat.layout is not torch.strided or flat.is_quantized:
        return flat.cpu().__reduce_ex__(5)
    window, offset = _window(flat)
    place = tuple(flat.shape), flat.stride(), offset, tensor.requires_grad
    return _restore, (pickle.PickleBuffer(window.view(torch.uint8).numpy()), _DTYPES[flat.dtype], *place)


def _restore(
    window: NDArray[np.uint8], dtype: str, shape: tuple[int, ...], stride: tuple[int, ...], offset: int, grad: bool
) -> Tensor:
    kind = _dtype(dtype)
    if window.size:
        tensor = torch.frombuffer(window, dtype=kind).as_strided(shape, stride, offset)
    else:
        tensor = torch.empty_strided(shape, stride, dtype=kind)
    return tensor.requires_grad_() if grad else tensor


class _ValuePickler(pickle.Pickler):
    dispatch_table: ClassVar = {
        **copyreg.dispatch_table,
        Tensor: _reduce,
        nn.Parameter: _reduce,
        torch.dtype: lambda dtype: (_dtype, (_DTYPES[dtype],)),
    }


class _Pickler(cloudpickle.Pickler):
    """Pickles classes and functions by value where they cannot be imported, and sets tensors aside."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.tensors: list[Tensor | None] = []
        """None for one that is not there."""
        self.index: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> Any:
        if not _is_apart(obj):
            return None
        attributes = None
        if id(obj) not in self.index:
            self.index[id(obj)] = len(self.index)
            with torch._C.DisableTorchFunctionSubclass():
                self.tensors.append(None if obj.is_meta else obj.detach().as_subclass(Tensor))
            attributes = vars(obj) or None  # only once: they may lead back to the tensor
        form = (tuple(obj.shape), obj.stride(), _DTYPES[obj.dtype]) if obj.is_meta else None
        return self.index[id(obj)], type(obj), obj.requires_grad, form, attributes

    def reducer_override(self, obj: Any) -> Any:
        found = reduced(obj)
        return super().reducer_override(obj) if found is NotImplemented else found


def _is_apart(obj: Any) -> bool:
    """Tells whether something is a tensor that travels apart, with its memory; others are pickled as torch does."""
    if type(obj) in (Tensor, nn.Parameter):
        return True
    return isinstance(obj, nn.Parameter) and not is_traceable_wrapper_subclass(obj)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor | None]):
        super().__init__(file)
        self._tensors, self._made = tensors, dict[int, Tensor]()

    def persistent_load(self, pid: Any) -> Tensor:
        index, kind, requires_grad, form, attributes = pid
        if index not in self._made:
            tensor = self._tensors[index]
            if form is not None:
                tensor = torch.empty_strided(form[0], form[1], dtype=_dtype(form[2]), device="meta")
            assert tensor is not None
            if kind is not Tensor:
                tensor = Tensor._make_subclass(kind, tensor, requires_grad)
            self._made[index] = tensor
        vars(self._made[index]).update(attributes or {})
        return self._made[index]


@dataclass(slots=True)
class Parcel:
    """Any object as bytes plus the tensors it holds, which keep their identity: a tied tensor stays one tensor."""

    data: bytes
    tensors: list[Tensor | None]
    """None for one that is to be made where it arrives."""


def ship(obj: Any, foreign: Mapping[int, str] | None = None) -> Parcel:
    """Packs an object, classes defined in a notebook or script included.

    Raises CaptureError where it holds something that cannot be pickled, or a tensor that it must not hold: `foreign`
    gives the names of those by id.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    try:
        pickler.dump(obj)
    except Exception as error:  # whatever a user's class raises
        place = culprit(obj, _cannot_travel)
        reason = " ".join(describe(error).split()) + (f", found at {place}" if place else "")
        raise CaptureError(f"cannot be sent to the workers: {reason}; expected what cloudpickle can pickle") from error
    found = [name for number, name in (foreign or {}).items() if number in pickler.index]
    if found:
        raise CaptureError(
            f"uses {found[0]}, which is not its own: it would be a copy that is never updated; expected layers that "
            "share a tensor to hold it as an attribute of each, or to be on one stage"
        )
    return Parcel(file.getvalue(), [None if tensor is None else _exact(tensor) for tensor in pickler.tensors])


def _cannot_travel(obj: Any) -> bool:
    try:
        _Pickler(io.BytesIO()).dump(obj)
    except Exception:
        return True
    return False


def ship_as(what: str, obj: Any, foreign: Mapping[int, str] | None = None) -> Parcel:
    """Packs an object as `ship` does; its errors begin with what it is."""
    try:
        return ship(obj, foreign)
    except CaptureError as error:
        raise CaptureError(f"{what} {error}") from error


def copy(tree: Any) -> Any:
    """Returns a copy of a pytree's tensors, laid out in the same way."""
    return pytree.tree_map_only(Tensor, _exact, tree)


def receive(parcel: Parcel) -> Any:
    """Returns the object; its tensors are the parcel's own."""
    return _Unpickler(io.BytesIO(parcel.data), parcel.tensors).load()


def _exact(tensor: Tensor) -> Tensor:
    """Returns a copy in memory of its own, laid out in the same way, so that neither side sees the other write."""
    if tensor.layout is not torch.strided:
        return tensor.cpu().clone()
    window, offset = _window(tensor)
    return window.clone().as_strided(tensor.shape, tensor.stride(), offset)
