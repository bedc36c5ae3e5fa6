"""Memory that one process writes and others of its host read: Pool, and Views of other processes' pools.

A pool is made of slabs, anonymous files of equal slots that others map when they first hear of them. They have no name,
so that nothing is left of them when the last process ends, however it ends. A slot is used again as soon as its reader
says that it needs it no more; fresh pages cost more than a copy. Slots that were never used take no memory::

    slab 0    [ 64 KB used | 64 KB free | 64 KB never used … ]
    slab 1    [ 8 MB used  | 8 MB never used … ]
"""

from __future__ import annotations

import mmap
import os
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_PAGE = mmap.PAGESIZE
_SLOTS = 64
"""Slots per slab: a file descriptor serves so many values."""


class Slot(NamedTuple):
    """A place in a process's pool: what its messages say instead of the bytes."""

    slab: int
    start: int
    """Bytes from the beginning of the slab, a multiple of the page size."""


class _Slab(NamedTuple):
    descriptor: int
    size: int
    """Of each slot, in bytes."""
    memory: Bytes


class Pool:
    """This process's own slots."""

    def __init__(self) -> None:
        self._slabs: list[_Slab] = []
        self._fresh: defaultdict[int, list[Slot]] = defaultdict(list)
        """Slots never used, by size."""
        self._free: defaultdict[int, list[Slot]] = defaultdict(list)
        """Slots given back; the last one is used first, since its pages are most likely in a cache."""

    def has_free(self, num_bytes: int) -> bool:
        """Tells whether there is a slot for so many bytes that was used before."""
        return bool(self._free[slot_size(num_bytes)])

    def take(self, num_bytes: int) -> tuple[Slot, Bytes]:
        """Returns a slot of at least so many bytes, one that was used before if there is one; and its memory."""
        size = slot_size(num_bytes)
        if not self._free[size] and not self._fresh[size]:
            self._add_slab(size)
        slot = (self._free[size] or self._fresh[size]).pop()
        return slot, self._slabs[slot.slab].memory[slot.start : slot.start + num_bytes]

    def give_back(self, slot: Slot) -> None:
        """Makes a slot free again."""
        self._free[self._slabs[slot.slab].size].append(slot)

    def descriptor(self, slab: int) -> int:
        """Returns the file descriptor by which another process can map a slab."""
        return self._slabs[slab].descriptor

    @property
    def num_bytes(self) -> int:
        """How much memory the pool takes: that of the slots ever used."""
        return sum(os.fstat(slab.descriptor).st_blocks * 512 for slab in self._slabs)

    def close(self) -> None:
        """Closes the files; memory that is still in use stays until it is not."""
        for slab in self._slabs:
            os.close(slab.descriptor)
        self._slabs.clear()

    def _add_slab(self, size: int) -> None:
        number = len(self._slabs)
        descriptor = os.memfd_create(f"modelpar-{number}")
        os.ftruncate(descriptor, size * _SLOTS)
        self._slabs.append(_Slab(descriptor, size, _map(descriptor)))
        self._fresh[size] += [Slot(number, i * size) for i in reversed(range(_SLOTS))]


class Views:
    """What this process sees of another one's pool."""

    def __init__(self, release: Callable[[Slot], None]):
        self._release = release
        self._slabs: dict[int, Bytes] = {}

    def open(self, slab: int, descriptor: int) -> None:
        """Maps a slab, and closes the descriptor."""
        self._slabs[slab] = _map(descriptor)
        os.close(descriptor)

    def windows(self, slot: Slot, bounds: list[tuple[int, int]]) -> list[Bytes]:
        """Returns parts of a slot, from and to these bytes; when nobody uses any of them any more, it is released."""
        lease = _Lease(self._release, slot)
        slab, found = self._slabs[slot.slab], []
        for begin, end in bounds:
            window = slab[slot.start + begin : slot.start + end].view(_Leased)
            window.lease = lease
            found.append(window)
        return found


def slot_size(num_bytes: int) -> int:
    """Returns how large a slot for so many bytes is: in whole pages, and in steps of at most a quarter."""
    step = max(_PAGE, (1 << max(0, num_bytes - 1).bit_length()) // 8)
    return max(1, -(-num_bytes // step)) * step


class _Lease:
    """Releases a slot when it goes."""

    def __init__(self, release: Callable[[Slot], None], slot: Slot):
        self._release, self._slot = release, slot

    def __del__(self) -> None:
        self._release(self._slot)


class _Leased(np.ndarray):
    """Memory that holds a lease; a tensor made of it holds the array."""

    lease: _Lease


def _map(descriptor: int) -> Bytes:
    return np.frombuffer(mmap.mmap(descriptor, 0), np.uint8)
