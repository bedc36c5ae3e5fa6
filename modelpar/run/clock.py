"""When a CUDA device computed, on the host's clock: DeviceClock, and the one timeline of a device and its host.

Python runs ahead of the device, so that what it does (waiting for a value, sending one) and what the device does may
happen at the same time. A rank's timeline shows the device's work as the device did it, and of the host's only what the
device was idle in: a wait that is hidden behind a computation has cost nothing::

    device    ....F0F0F0F0F0......F1F1F1
    host      s.wwwwwwwwwwwwwwwwss......
    found     s.wwF0F0F0F0F0wwwwssF1F1F1        no two spans overlap
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from time import perf_counter

import torch

from modelpar.planning.timeline import Span


class DeviceClock:
    """Marks points in the work of a device's current stream, and says afterwards when it got there."""

    def __init__(self, device: torch.device):
        self._device = device
        self._origin = torch.cuda.Event(enable_timing=True)
        self._started = 0.0

    def begin(self) -> None:
        """Reads the device's clock and the host's at the same time, once per run, since they drift."""
        self._origin = self.mark()
        self._origin.synchronize()
        self._started = perf_counter()

    def mark(self) -> torch.cuda.Event:
        """Marks the end of what the stream has been given so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, mark: torch.cuda.Event) -> float:
        """Returns when the stream got to a mark, by `perf_counter`; waits until it has."""
        mark.synchronize()
        return self._started + self._origin.elapsed_time(mark) / 1e3


def clock_of(device: torch.device) -> DeviceClock | None:
    """Returns the clock of a CUDA device; None for the CPU, where a computation ends when its line of Python does."""
    return DeviceClock(device) if device.type == "cuda" else None


def merge(on_device: Sequence[Span], on_host: Sequence[Span]) -> list[Span]:
    """Returns the spans of one rank: the device's, and those parts of the host's during which it had none.

    The device's must be in its order; where rounding lets two overlap the later one is cut.
    """
    found: list[Span] = []
    for span in on_device:
        start = max(span.start, found[-1].end) if found else span.start
        found.append(span._replace(start=start, end=max(start, span.end)))
    busy = list(found)
    ends = [span.end for span in busy]
    for span in on_host:
        start = span.start
        for i in range(bisect_right(ends, start), len(busy)):
            if busy[i].start >= span.end:
                break
            if busy[i].start > start:
                found.append(span._replace(start=start, end=busy[i].start))
            start = busy[i].end
        if span.end > start:
            found.append(span._replace(start=start))
    return found
