"""CUDA tensors on their way from one rank to another, in order with the streams that work on them.

When a line of Python that computes on CUDA is done, the device has mostly not begun. Whoever reads the result must come
later on the same stream, have its stream wait for an event behind the work, or wait in Python for the stream::

    to another process    staged       device ──▶ pinned host memory, wait for the stream; then as any tensor on the CPU
                          shared       a copy on the device, and torch's handle of it, which holds an event
    to another thread     handed over  the tensor itself, and an event
    into a rank           its stream waits for the event; from host memory through pinned memory, nobody waits

Every thread works on the current stream of a device, torch's default one unless the user says otherwise. Nothing here
does anything in a process that has not used CUDA.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions
from torch.utils import _pytree as pytree

from modelpar.run import layout

_LEAST_SHARED = 64 * 1024
"""From how many bytes a tensor is shared; a smaller one is staged, since opening a handle takes longer than a copy."""


def resolve(name: str) -> torch.device:
    """Returns a device by its name; "cuda" is the first one."""
    device = torch.device(name)
    return torch.device("cuda", 0) if device == torch.device("cuda") else device


def use(device: torch.device) -> None:
    """Makes a CUDA device the current one of this thread, for what a model creates by itself."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def warm_up(device: torch.device) -> None:
    """Multiplies matrices, forward and backward: libraries keep memory from their first use on, for no stage."""
    parameter = torch.nn.Parameter(torch.zeros(8, 8, device=device))
    # squares, whose gradient comes first: torch warns of a thread of autograd that begins with a product of matrices
    (parameter @ parameter).square().sum().backward()


def staged(tree: Any) -> Any:
    """Returns a pytree whose CUDA tensors lie in host memory, and are there: waits for the streams that make them."""
    if not torch.cuda.is_initialized():
        return tree
    streams: set[torch.cuda.Stream] = set()

    def fetch(tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor
        flat = tensor.detach()
        if flat.layout is not torch.strided or flat.is_quantized:
            return flat.cpu().requires_grad_(tensor.requires_grad)
        vector, offset = layout.window(flat)
        host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
        host.copy_(vector, non_blocking=True)
        streams.add(torch.cuda.current_stream(flat.device))
        return host.as_strided(flat.shape, flat.stride(), offset).requires_grad_(tensor.requires_grad)

    found = pytree.tree_map_only(Tensor, fetch, tree)
    for stream in streams:
        stream.synchronize()
    return found


@dataclass(slots=True)
class Shared:
    """A tensor in memory of another process's device, as torch's handle of the vector that it spans.

    The memory stays until every receiver has opened the handle and dropped what it got; torch counts.
    """

    handle: tuple[Any, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    requires_grad: bool

    def open(self, device: torch.device) -> Tensor:
        """Returns the tensor, once, on a device; the stream waits for the event in the handle, Python does not."""
        vector = reductions.rebuild_cuda_tensor(*self.handle)
        tensor = vector.as_strided(self.shape, self.stride, self.offset)
        return layout.move(tensor, device).requires_grad_(self.requires_grad)


def shared(tree: Any) -> Any:
    """Returns a pytree for another process of this host: large CUDA tensors are Shared, the others staged."""
    if not torch.cuda.is_initialized():
        return tree
    return staged(pytree.tree_map_only(Tensor, _share, tree))


def _share(tensor: Tensor) -> Tensor | Shared:
    flat = tensor.detach()
    if not flat.is_cuda or flat.layout is not torch.strided or flat.is_quantized:
        return tensor
    vector, offset = layout.window(flat)
    if vector.nbytes < _LEAST_SHARED:
        return tensor
    # a copy: memory received from another process cannot be shared again, and what shares a storage with other tensors
    # would be taken by the receiver for what it got of that storage before, without a wait
    _, handle = reductions.reduce_tensor(vector.clone())
    return Shared(handle, tuple(flat.shape), tuple(flat.stride()), offset, tensor.requires_grad)


def why_not_shared(environment: Mapping[str, str] = os.environ) -> str | None:
    """Says what keeps torch from sharing device memory, as far as the environment tells."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:true" in environment.get(name, "").lower().replace(" ", ""):
            return f"{name} has expandable_segments:True, whose memory not every torch can share"
    return None


def forget(pid: int) -> None:
    """Removes the files in which torch counted the receivers of what a process shared, which it leaves when killed."""
    for path in Path("/dev/shm").glob(f"torch_{pid}_*"):
        with suppress(OSError):
            path.unlink()


@dataclass(slots=True)
class HandedOver:
    """A value for another thread of this process, with an event behind the work that makes its tensors, per device."""

    value: Any
    events: dict[torch.device, torch.cuda.Event]

    def accept(self) -> Any:
        """Returns the value; what this thread's streams do from now on comes after what makes it.

        The memory is kept for these streams: its allocator knows only of the one that it was made on.
        """
        for device, event in self.events.items():
            torch.cuda.current_stream(device).wait_event(event)
        for tensor in _on_cuda(self.value):
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return self.value


def handed_over(value: Any) -> Any:
    """Returns a value for another thread of this process: HandedOver where it has CUDA tensors, else as it is."""
    if not torch.cuda.is_initialized():
        return value
    value = pytree.tree_map_only(Tensor, lambda t: t.cpu() if t.is_cuda and t.layout is not torch.strided else t, value)
    devices = {tensor.device for tensor in _on_cuda(value)}
    events = {device: torch.cuda.current_stream(device).record_event() for device in devices}
    return HandedOver(value, events) if events else value


def waits_for_events(value: Any) -> bool:
    """Tells whether a value comes with events, so that taking it may keep a stream waiting."""
    return isinstance(value, HandedOver) or any(isinstance(leaf, Shared) for leaf in pytree.tree_leaves(value))


def _on_cuda(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_cuda]
