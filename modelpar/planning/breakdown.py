"""Where the time of a step goes, in six parts that add up to it.

A timeline is played again without one thing after the other; what the step gets shorter by is what that thing took::

    step                                              as it was
     └─ no waits for data                             − data
         └─ no end of step, nothing between actions   − overhead
             └─ messages cost nothing                 − communication
                 └─ every stage takes the mean        − stage imbalance
                     └─ useful work (mean over ranks) − schedule bubble

Played again with nothing changed it takes exactly as long as it did: every span keeps its length, what lay between two
spans of a rank stays, and a value that was waited for arrives as long after it was sent as it did.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

from modelpar.planning.flow import Flow, pair, ways
from modelpar.planning.timeline import COMPUTE, Span

PARTS = ("useful work", "schedule bubble", "stage imbalance", "communication", "data", "overhead")


@dataclass(frozen=True)
class Breakdown:
    """Seconds of one step by what they went into; they add up to its makespan."""

    useful: float
    """Forward and backward: the mean over ranks."""
    bubble: float
    """What the schedule loses with equal stages, free messages and nothing else to do."""
    imbalance: float
    """What unequal stages add to that."""
    communication: float
    """What sending, and waiting for values on their way, adds."""
    data: float
    """What waiting for the batch adds."""
    overhead: float
    """What the end of the step (norms, clipping, optimizer) and the time between actions add."""
    step_end: float
    """That part of `overhead` which is the end of the step."""

    @property
    def parts(self) -> tuple[tuple[str, float], ...]:
        """The six parts with their names, in the order of `PARTS`."""
        values = (self.useful, self.bubble, self.imbalance, self.communication, self.data, self.overhead)
        return tuple(zip(PARTS, values, strict=True))

    @property
    def seconds(self) -> float:
        """The step's makespan."""
        return sum(seconds for _, seconds in self.parts)


def breakdown(flow: Flow) -> Breakdown:
    """Returns where the time of a step went.

    The parts are never negative. Each is what its cause still costs once those above it are gone: of two causes that
    hide each other, such as a slow link and an uneven split, the one that is removed later gets what both share.
    """
    replay = _Replay(flow)
    spans = flow.timeline.spans
    of_kind: defaultdict[str, list[float]] = defaultdict(list)
    for span in spans:
        of_kind[span.kind].append(span.seconds)
    means = {kind: fmean(seconds) for kind, seconds in of_kind.items()}
    useful = sum(sum(of_kind[kind]) for kind in COMPUTE) / max(1, flow.timeline.num_ranks)

    def without(*kinds: str) -> Callable[[Span], float]:
        return lambda span: 0.0 if span.kind in kinds else span.seconds

    def balanced(span: Span) -> float:
        return means[span.kind] if span.kind in COMPUTE else 0.0

    end = ("reduce", "optimizer")
    lengths = [
        flow.timeline.makespan,
        replay.makespan(without("data")),
        replay.makespan(without("data", *end)),
        replay.makespan(without("data", *end), gaps=False),
        replay.makespan(without("data", *end, "send", "receive"), gaps=False, transfers=False),
        replay.makespan(balanced, gaps=False, transfers=False),
        useful,
    ]
    for i in range(1, len(lengths)):  # rounding, and an uneven split that happens to fit the schedule
        lengths[i] = max(useful, min(lengths[i - 1], lengths[i]))
    data, step_end, between, communication, imbalance, bubble = (a - b for a, b in pairwise(lengths))
    return Breakdown(useful, bubble, imbalance, communication, data, step_end + between, step_end)


class _Arrival(NamedTuple):
    """A value that something had to wait for, if it had been there later."""

    source: int
    """The span that sent it."""
    share: float
    """The share of that span after which it was sent."""
    transfer: float
    """Seconds from then on until it was there; negative where the clocks of two ranks disagree by more."""


class _Replay:
    """A step that can be played again with other lengths."""

    def __init__(self, flow: Flow):
        spans, usual = flow.timeline.spans, ways([flow])
        working = [i for i, span in enumerate(spans) if span.kind != "wait"]
        self._spans = spans
        self._before = [_working(flow, i) for i in flow.previous]
        ready = [spans[i].end if i >= 0 else 0.0 for i in self._before]
        """When each span could begin: what its rank did before has ended, the last thing it waited for is there."""
        after = _next_working(flow)
        for arrow in flow.arrows:
            if arrow.wait >= 0:
                user = after[arrow.wait]
                ready[user] = max(ready[user], spans[arrow.wait].end)
        self._arrivals: defaultdict[int, list[_Arrival]] = defaultdict(list)
        for arrow in flow.arrows:
            source, target = spans[arrow.source], spans[arrow.target]
            if arrow.wait >= 0:
                arrived, user = spans[arrow.wait].end, after[arrow.wait]
            else:  # it was there in time, nobody knows since when
                user = arrow.target
                arrived = min(source.end + usual.get(pair(source, target), 0.0), ready[user])
            sent = min(max(arrived, source.start), source.end)
            share = (sent - source.start) / source.seconds if source.seconds else 1.0
            self._arrivals[user].append(_Arrival(arrow.source, share, arrived - sent))
        self._gaps = [max(0.0, span.start - ready[i]) for i, span in enumerate(spans)]
        self._order = list(TopologicalSorter({i: self._comes_after(i) for i in working}).static_order())
        self._last_waits = [each for i, span in enumerate(spans) if span.kind == "wait" for each in self._arrivals[i]]

    def _comes_after(self, span: int) -> list[int]:
        before = self._before[span]
        return [*(each.source for each in self._arrivals[span]), *([before] if before >= 0 else [])]

    def makespan(self, seconds: Callable[[Span], float], *, gaps: bool = True, transfers: bool = True) -> float:
        """Returns how long the step takes if spans last `seconds(span)`, with or without gaps and transfers."""
        starts, ends = [0.0] * len(self._spans), [0.0] * len(self._spans)

        def arrival(each: _Arrival) -> float:
            sent = starts[each.source] + each.share * (ends[each.source] - starts[each.source])
            return sent + (each.transfer if transfers else min(each.transfer, 0.0))

        for i in self._order:
            before = self._before[i]
            start = max([ends[before] if before >= 0 else 0.0, *map(arrival, self._arrivals[i])])
            starts[i] = start + (self._gaps[i] if gaps else 0.0)
            ends[i] = starts[i] + seconds(self._spans[i])
        return max([0.0, *ends, *map(arrival, self._last_waits)])


def _working(flow: Flow, span: int) -> int:
    """Returns a span, or where it is a wait the last one before it on its rank that is none; −1 where there is none."""
    while span >= 0 and flow.timeline.spans[span].kind == "wait":
        span = flow.previous[span]
    return span


def _next_working(flow: Flow) -> list[int]:
    """Returns for each span, where it is a wait, the next one on its rank that is none; itself where there is none."""
    spans, found = flow.timeline.spans, list(range(len(flow.timeline.spans)))
    for i in reversed(range(len(spans) - 1)):
        if spans[i].kind == "wait" and spans[i + 1].rank == spans[i].rank:
            found[i] = found[i + 1]
    return found
