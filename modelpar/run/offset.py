"""How far a rank's clock is ahead of the controller's: RoundTrip, Offset. Arithmetic only; nothing here reads a clock.

::

    controller   sent ──────╮            ╭──▶ received        remote − received ≤ offset ≤ remote − sent
    rank                    ╰──▶ remote ─╯

Clocks of two hosts do not run equally fast. Here the offset is taken to change by at most `DRIFT` seconds per second:
two quartz clocks, each off by less than 50 millionths.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

DRIFT = 1e-4


class RoundTrip(NamedTuple):
    """One question to a rank for its time: seconds, `remote` by the rank's clock, the others by the controller's."""

    sent: float
    remote: float
    received: float


class Offset(NamedTuple):
    """By how many seconds a rank's clock is ahead of the controller's when it shows `at`: within ± `error`."""

    at: float
    seconds: float
    error: float


def estimate(trips: Sequence[RoundTrip]) -> Offset:
    """Returns the middle of what all round trips allow, at the time of the quickest one.

    Where they contradict each other, which clocks that drift faster can bring about, the quickest alone counts.
    """
    best = min(trips, key=lambda trip: trip.received - trip.sent)
    drifts = [DRIFT * abs(trip.remote - best.remote) for trip in trips]
    low = max(trip.remote - trip.received - drift for trip, drift in zip(trips, drifts, strict=True))
    high = min(trip.remote - trip.sent + drift for trip, drift in zip(trips, drifts, strict=True))
    if low > high:
        low, high = best.remote - best.received, best.remote - best.sent
    return Offset(best.remote, (low + high) / 2, (high - low) / 2)


def interpolate(known: Sequence[Offset], at: float) -> Offset:
    """Returns the offset when the rank's clock shows `at`, from known ones in the order of their times.

    Between two it lies on the line from one to the other. A clock that drifts by DRIFT this way until some moment, and
    the other way from there on, leaves that line by 2 × DRIFT × before × after ÷ (before + after) at most. Outside, the
    nearest holds, with DRIFT times the distance for an error on top.
    """
    i = bisect_right(known, at, key=lambda offset: offset.at)
    if i in (0, len(known)):
        nearest = known[0] if i == 0 else known[-1]
        return Offset(at, nearest.seconds, nearest.error + DRIFT * abs(at - nearest.at))
    first, second = known[i - 1], known[i]
    before, after = at - first.at, second.at - at
    share = before / (before + after)
    seconds = first.seconds + share * (second.seconds - first.seconds)
    error = first.error + share * (second.error - first.error)
    return Offset(at, seconds, error + 2 * DRIFT * share * after)
