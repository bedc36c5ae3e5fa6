"""Whether the steps of a run take equally long: stragglers, and drift from the first to the last."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import NamedTuple, TypeVar

Step = TypeVar("Step")

_SETTLING = 3
"""Steps at the beginning of a run that do not count, where there are enough others."""
_FAR = 1.5
"""A step is a straggler where it takes that many times the median, and lies outside of what is usual, too."""
_DEVIATIONS = 6.0
_BUSIER = 1.25
"""A rank is named where it computed for so many times as long as it usually does."""
_FEWEST = 12
"""Fewer steps say nothing about drift."""


def settled(steps: Sequence[Step]) -> Sequence[Step]:
    """Returns what a run's steps are without the first three, where there are more than twice as many."""
    return steps[_SETTLING:] if len(steps) > 2 * _SETTLING else steps


class StepTime(NamedTuple):
    """How long one step of a run took."""

    step: int
    seconds: float
    """Its makespan: what the controller does between two steps is not part of it."""
    busy: tuple[float, ...] = ()
    """Per rank the seconds it computed; empty where that is not known."""


class Straggler(NamedTuple):
    """A step that took much longer than most."""

    step: int
    times: float
    """Its duration over the median."""
    rank: int
    """The rank that computed longer than it usually does, by the largest factor; −1 where none did."""


def stragglers(steps: Sequence[StepTime]) -> tuple[Straggler, ...]:
    """Returns the steps that took longer than 1.5 × the median and than 6 median deviations above it."""
    if len(steps) < 3:
        return ()
    usual = median(step.seconds for step in steps)
    deviation = median(abs(step.seconds - usual) for step in steps)
    limit = max(_FAR * usual, usual + _DEVIATIONS * deviation)
    known = [step.busy for step in steps if step.busy]
    busy = [median(rank) for rank in zip(*known, strict=True)]
    found = []
    for step in steps:
        if step.seconds > limit:
            factors = [own / rank if rank else 1.0 for own, rank in zip(step.busy, busy, strict=False)]
            worst = max(factors, default=1.0)
            found.append(Straggler(step.step, step.seconds / usual, factors.index(worst) if worst > _BUSIER else -1))
    return tuple(found)


def drift(step_seconds: Sequence[float]) -> float:
    """Returns by what share the last quarter of the steps took longer than the first; 0 where that may be chance.

    It is not taken for chance where the medians of the four quarters all go the same way.
    """
    if len(step_seconds) < _FEWEST:
        return 0.0
    bounds = [round(len(step_seconds) * quarter / 4) for quarter in range(5)]
    medians = [median(step_seconds[start:end]) for start, end in pairwise(bounds)]
    changes = [after - before for before, after in pairwise(medians)]
    same_way = all(change > 0 for change in changes) or all(change < 0 for change in changes)
    return medians[-1] / medians[0] - 1.0 if same_way and medians[0] else 0.0
