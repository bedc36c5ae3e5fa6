"""How much memory a rank has used for its stages."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress
from pathlib import Path

import torch

from modelpar.run import cuda

_STATUS = Path("/proc/self/status")


class PeakMemory:
    """The most memory used since creation, above what was in use then.

    On CUDA the allocator counts; what it has given to another process counts here until that one drops it. A process
    that serves one rank reads its resident set from the kernel. Where the number would be that of several ranks, as for
    threads on the CPU or on one CUDA device, there is none.
    """

    def __init__(self, device: torch.device, alone: bool, received: int = 0):
        """Begins to measure; `alone` says that no other rank uses the device (the CPU: the process) from here.

        `received` is how many bytes of what is to be counted the process holds already.
        """
        self._device = device
        self._on_cuda = alone and device.type == "cuda"
        self._readable = alone and device.type == "cpu" and sys.platform == "linux" and _STATUS.exists()
        self._start = 0
        if self._on_cuda:
            cuda.warm_up(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._start = torch.cuda.memory_allocated(device)
        elif self._readable:
            gc.collect()
            return_freed_memory()
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present size
            self._start = _status_bytes("VmRSS") - received

    def bytes(self) -> int | None:
        """Returns the peak so far, or None where it cannot be measured."""
        if self._on_cuda:
            return torch.cuda.max_memory_allocated(self._device) - self._start
        return _status_bytes("VmHWM") - self._start if self._readable else None


def _status_bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def keep_freed_memory() -> None:
    """Makes the C library keep what is freed for what comes next, in a process that serves one rank.

    Otherwise it gives large blocks back to the kernel after every layer, and gets them again, page by page: in a
    convolutional network that was half of all forward time. The peak grew by up to 15 % there, and doubled at most
    where tensors had more than 32 MB: freed blocks that large do not always fit what comes next.
    """
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            library = ctypes.CDLL(None)
            # Older C libraries take no more than 32 MB. Without this one the others would make things worse.
            if any(library.mallopt(_M_MMAP_THRESHOLD, size) for size in (1 << 30, 1 << 25)):
                library.mallopt(_M_TRIM_THRESHOLD, -1)
                library.mallopt(_M_TOP_PAD, 64 << 20)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
"""From malloc.h."""


def return_freed_memory() -> None:
    """Gives freed pages back to the kernel, where the C library can.

    It keeps what lies below something that is still in use, and a small record kept for good between large values is
    enough for that: 250 recordings of a small model, one after the other, left 1.2 GB of free memory.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return
