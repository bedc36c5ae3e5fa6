"""Statistics of measurements, as pure functions: medians with quartiles, and the ideal step of a timeline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from modelpar.planning.timeline import COMPUTE, Span, Timeline

OVERLAP = 0.75
"""Share of a span during which all other ranks must compute too for the span to count as measured under load."""


@dataclass(frozen=True)
class Summary:
    """A median with its quartiles."""

    median: float
    low: float
    """The first quartile."""
    high: float
    """The third quartile."""
    count: int

    def text(self, digits: int = 2, scale: float = 1.0) -> str:
        """Returns "0.93 (0.91–0.95)"; a single value has no quartiles."""
        middle, low, high = (f"{value * scale:.{digits}f}" for value in (self.median, self.low, self.high))
        return middle if self.count < 2 else f"{middle} ({low}–{high})"


def summarize(values: Iterable[float]) -> Summary | None:
    """Returns the median and quartiles (inclusive: the least and the largest value are the 0 and 100 % quantiles).

    None where there are no values.
    """
    found = sorted(values)
    if not found:
        return None
    if len(found) == 1:
        return Summary(found[0], found[0], found[0], 1)
    low, middle, high = quantiles(found, n=4, method="inclusive")
    return Summary(middle, low, high, len(found))


def text(summary: Summary | None, digits: int = 2, scale: float = 1.0) -> str:
    """Returns a summary as text, a dash where there is none."""
    return "–" if summary is None else summary.text(digits, scale)


def step_seconds(ends: Sequence[float]) -> float:
    """Returns the mean time from one step's end to the next; the first step only starts the clock."""
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def ideal_seconds(timelines: Sequence[Timeline], num_microbatches: int) -> float | None:
    """Returns the step time without a wait: the slowest stage's work, and the pipeline's filling and draining.

    ::

        max over stages (compute + optimizer) × (m + s − 1) / m

    A stage's compute is m × (its median F + its median B) over spans during which all other ranks compute as well: a
    stage alone on the machine is faster than it can be in a pipeline. None where a stage has no such spans.
    """
    num_stages = timelines[0].num_ranks
    costs = []
    for rank in range(num_stages):
        under_load = [span for timeline in timelines for span in _under_load(timeline, rank)]
        updates = [s.seconds for timeline in timelines for s in timeline.of_rank(rank) if s.kind == "optimizer"]
        total = median(updates) if updates else 0.0
        for kind in ("F", "B"):
            seconds = [span.seconds for span in under_load if span.kind == kind]
            if not seconds:
                return None
            total += num_microbatches * median(seconds)
        costs.append(total)
    return max(costs) * (num_microbatches + num_stages - 1) / num_microbatches


def _under_load(timeline: Timeline, rank: int) -> list[Span]:
    others = [
        [span for span in timeline.of_rank(other) if span.kind in COMPUTE]
        for other in range(timeline.num_ranks)
        if other != rank
    ]
    return [
        span
        for span in timeline.of_rank(rank)
        if span.kind in COMPUTE and all(_covered(span, spans) >= OVERLAP * span.seconds for spans in others)
    ]


def _covered(span: Span, others: Iterable[Span]) -> float:
    """Returns how many seconds of a span fall into others, which do not overlap each other."""
    return sum(max(0.0, min(span.end, other.end) - max(span.start, other.start)) for other in others)
