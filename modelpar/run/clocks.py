"""The spans of all ranks on the controller's clock: Clocks.

All processes of a host share the clock that spans are taken from (CLOCK_MONOTONIC), and so do threads. On another host,
or in a container with a time namespace of its own, it shows something else.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from time import perf_counter

from modelpar.planning.timeline import Span
from modelpar.run.offset import Offset, RoundTrip, estimate, interpolate

_ROUND_TRIPS = 8
"""Per comparison; each takes half a millisecond of CPU time of both processes."""
_EVERY_SECONDS = 1.0
_KEPT = 8
"""Comparisons per rank: no step that is still to be collected began before them."""


def read_clock() -> tuple[str, float]:
    """Returns which clock this process takes spans from, by a name that no other clock has, and what it shows."""
    return _identity(), perf_counter()


@cache
def _identity() -> str:
    """Names the clock: the boot of a kernel that it counts from, and the time namespace that shifts it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
    try:
        return f"{boot} {Path('/proc/self/ns/time').readlink()}"
    except OSError:  # a kernel without time namespaces
        return boot


class Clocks:
    """Compares the ranks' clocks with this process's, again and again where they differ, and shifts spans."""

    def __init__(self, num_ranks: int):
        self._unknown = set(range(num_ranks))
        self._offsets: dict[int, deque[Offset]] = {}
        """Of the ranks whose clock is another; the others need no shift, and are not asked again."""

    def compare(self, read: Callable[[int], tuple[str, float]]) -> None:
        """Compares where that is due; `read` is `read_clock` on a rank, and may raise Unreachable."""
        for rank in sorted(self._unknown):
            identity, trip = _ask(read, rank)
            if identity != _identity() or not trip.sent <= trip.remote <= trip.received:
                self._offsets[rank] = deque(maxlen=_KEPT)
            self._unknown.remove(rank)
        for rank, known in self._offsets.items():
            if not known or perf_counter() - (known[-1].at - known[-1].seconds) > _EVERY_SECONDS:
                known.append(estimate([_ask(read, rank)[1] for _ in range(_ROUND_TRIPS)]))

    def shift(self, spans: Iterable[Span]) -> tuple[list[Span], float]:
        """Returns ranks' spans by this process's clock, and by how many seconds any of their ends may be off."""
        shifted, error = [], 0.0
        for span in spans:
            known = self._offsets.get(span.rank)
            if known:
                start, end = interpolate(known, span.start), interpolate(known, span.end)
                span = span._replace(start=span.start - start.seconds, end=span.end - end.seconds)
                error = max(error, start.error, end.error)
            shifted.append(span)
        return shifted, error


def _ask(read: Callable[[int], tuple[str, float]], rank: int) -> tuple[str, RoundTrip]:
    sent = perf_counter()
    identity, remote = read(rank)
    return identity, RoundTrip(sent, remote, perf_counter())
