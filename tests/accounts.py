"""Checks that a timeline accounts for all of its time."""

from itertools import pairwise

import pytest

from modelpar.planning.analysis import analyse
from modelpar.planning.timeline import Timeline


def assert_accounted(timeline: Timeline) -> None:
    """Checks that no spans of a rank overlap, and that busy, waits, other and idle add up to the makespan for each."""
    analysis = analyse(timeline)
    assert analysis.makespan == timeline.makespan
    assert len(analysis.ranks) == timeline.num_ranks
    for number, rank in enumerate(analysis.ranks):
        spans = timeline.of_rank(number)
        assert all(0 <= span.start <= span.end <= timeline.makespan for span in spans)
        assert all(first.end <= second.start for first, second in pairwise(spans))
        parts = rank.busy + sum(rank.waits.values()) + sum(rank.other.values()) + rank.idle
        assert parts == pytest.approx(timeline.makespan, rel=1e-9)
        assert rank.idle >= 0
        assert rank.busy == timeline.busy(number)
        assert rank.utilization == timeline.utilization(number)
