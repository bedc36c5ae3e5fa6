"""Says where the time of a step went, rank by rank.

::

    rank 0   0F0 0F1 ... 0B0 ... 0B1 opt     busy 4   waits {"grad h from stage 1": 2}   other {"optimizer": 1}   idle 0
    rank 1       1F0 1B0 1F1 1B1             busy 4   waits {}                           other {}                 idle 3

For every rank busy + waits + other + idle is the makespan.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from modelpar.planning.timeline import COMPUTE, Timeline

_MICROBATCH = re.compile(r" of micro-batch \d+")


@dataclass(frozen=True)
class RankTime:
    """Where the seconds of one rank went."""

    busy: float
    """Computing: forward, backward, recompute."""
    waits: Mapping[str, float]
    """Seconds by what was waited for, such as "value h3 from stage 0", micro-batches together; longest first."""
    other: Mapping[str, float]
    """Seconds by kind of everything else: optimizer, reduce, send, receive, data; longest first."""
    idle: float
    """Covered by no span."""
    utilization: float
    """busy / makespan."""

    @property
    def wait(self) -> float:
        """Seconds of all waits together."""
        return sum(self.waits.values())


@dataclass(frozen=True)
class Analysis:
    """Where the seconds of one step went."""

    makespan: float
    bubble: float
    """Share of all rank-time in which nothing was computed."""
    imbalance: float
    """Largest busy time of a rank over the mean; 1 is perfect balance."""
    ranks: tuple[RankTime, ...]


def analyse(timeline: Timeline) -> Analysis:
    """Returns where the time of a step went; a rank's spans must not overlap, as those of one thread do not."""
    makespan = timeline.makespan
    busy, idle, covered = ([0.0] * timeline.num_ranks for _ in range(3))
    waits, other = ([defaultdict[str, float](float) for _ in range(timeline.num_ranks)] for _ in range(2))
    for span in timeline.spans:
        idle[span.rank] += max(0.0, span.start - covered[span.rank])
        covered[span.rank] = max(covered[span.rank], span.end)
        if span.kind in COMPUTE:
            busy[span.rank] += span.seconds
        elif span.kind == "wait":
            waits[span.rank][without_microbatch(span.cause)] += span.seconds
        else:
            other[span.rank][span.kind] += span.seconds
    ranks = tuple(
        RankTime(
            busy=busy[rank],
            waits=_longest_first(waits[rank]),
            other=_longest_first(other[rank]),
            idle=idle[rank] + makespan - covered[rank],
            utilization=busy[rank] / makespan if makespan else 0.0,
        )
        for rank in range(timeline.num_ranks)
    )
    mean = sum(busy) / len(busy) if busy else 0.0
    return Analysis(makespan, timeline.bubble, max(busy) / mean if mean else 1.0, ranks)


def without_microbatch(cause: str) -> str:
    """Returns what a wait waited for, the same for all micro-batches."""
    return _MICROBATCH.sub("", cause)


def _longest_first(seconds: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))
