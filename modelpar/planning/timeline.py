"""What happened, or would happen, when: Span and Timeline. Running a plan and simulating it both give a Timeline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

COMPUTE = frozenset({"F", "B", "I", "W", "R"})
"""Span kinds that count as useful work: forward, backward, input gradient, weight gradient, recompute."""


class Span(NamedTuple):
    """What one rank did from start to end (seconds).

    `kind` is a compute op (F, B, I, W, R) or one of wait, send, receive, optimizer, reduce, data. `cause` says what a
    wait waited for, such as "value h3 of micro-batch 2 from stage 0".
    """

    rank: int
    kind: str
    start: float
    end: float
    stage: int = -1
    microbatch: int = -1
    cause: str = ""

    @property
    def seconds(self) -> float:
        """How long it lasted."""
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """The spans of one step on all ranks, in order of start within each rank; time 0 is the first start."""

    num_ranks: int
    spans: tuple[Span, ...]
    clock_error: float = 0.0
    """By how many seconds any time may be off against those of other ranks; 0 where all have one clock."""

    @classmethod
    def of(cls, num_ranks: int, spans: Iterable[Span], clock_error: float = 0.0) -> Timeline:
        """Builds a timeline from spans on any common clock: shifts the first start to 0 and sorts by rank and start."""
        ordered = sorted(spans, key=lambda span: (span.rank, span.start, span.end))
        origin = min((span.start for span in ordered), default=0.0)
        shifted = tuple(s._replace(start=s.start - origin, end=s.end - origin) for s in ordered)
        return cls(num_ranks, shifted, clock_error)

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last end."""
        return max((span.end for span in self.spans), default=0.0)

    def of_rank(self, rank: int) -> tuple[Span, ...]:
        """Returns one rank's spans."""
        return tuple(span for span in self.spans if span.rank == rank)

    def busy(self, rank: int) -> float:
        """Returns the seconds a rank computed."""
        return sum(span.seconds for span in self.spans if span.rank == rank and span.kind in COMPUTE)

    def utilization(self, rank: int) -> float:
        """Returns the share of the step in which a rank computed."""
        return self.busy(rank) / self.makespan if self.makespan else 0.0

    @property
    def bubble(self) -> float:
        """Idle rank-time over total rank-time: 1 − mean utilization."""
        total = self.makespan * self.num_ranks
        return 1.0 - sum(span.seconds for span in self.spans if span.kind in COMPUTE) / total if total else 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns plain data for json."""
        spans = [list(span) for span in self.spans]
        return {"num_ranks": self.num_ranks, "clock_error": self.clock_error, "spans": spans}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Timeline:
        """Reads what `to_json` wrote, also before it wrote `clock_error`."""
        return cls(data["num_ranks"], tuple(Span(*span) for span in data["spans"]), data.get("clock_error", 0.0))


def computations(timelines: Iterable[Timeline]) -> dict[tuple[int, str], list[float]]:
    """Returns, by stage and kind, how many seconds each computation of the timelines took."""
    found: defaultdict[tuple[int, str], list[float]] = defaultdict(list)
    for span in (span for timeline in timelines for span in timeline.spans if span.kind in COMPUTE):
        found[span.stage, span.kind].append(span.seconds)
    return dict(found)
