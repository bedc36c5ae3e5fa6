"""How a tensor lies in memory, kept when it goes elsewhere: strides, and its place in a vector, change bits."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes to which torch aligns new memory on the CPU, and the widest vectors; on CUDA it aligns to more."""


def window(tensor: Tensor) -> tuple[Tensor, int]:
    """Returns what a tensor spans of its storage, as a vector, and where in it the tensor begins.

    The offset places the tensor relative to vectors of 64 bytes as it was: matrix products round otherwise where rows
    begin elsewhere, as those of a micro-batch cut out of a batch do.
    """
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    span = 1 + sum((n - 1) * s for n, s in strides) if tensor.numel() else 0
    offset = tensor.data_ptr() % ALIGNMENT // tensor.element_size() if span else 0
    start = tensor.storage_offset() - offset
    if start < 0:  # memory that torch did not allocate
        found = tensor.new_zeros(offset + span)
        found[offset:] = tensor.as_strided((span,), (1,), tensor.storage_offset())
        return found, offset
    return tensor.as_strided((offset + span,), (1,), start), offset


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a detached tensor on a device, laid out in the same way; on its own device the same memory."""
    flat = tensor.detach()
    if flat.device == device:
        return flat
    if flat.layout is not torch.strided or flat.is_quantized:
        return flat.to(device)
    vector, offset = window(flat)
    return put(vector, device).as_strided(flat.shape, flat.stride(), offset)


def put(vector: Tensor, device: torch.device) -> Tensor:
    """Copies a vector to a device.

    From the CPU to CUDA it goes through pinned memory of its own, which torch keeps until the device has read it. So
    nobody waits for the device, and the vector's own memory may be used again at once.
    """
    if device.type == "cuda" and vector.device.type == "cpu" and vector.numel():
        return vector.pin_memory().to(device, non_blocking=True)
    return vector.to(device)
