"""Contenders side by side: each round runs all of them in random order, so that a machine's drift hits all alike."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Generic, TypeVar

from benchmarks import load
from benchmarks.stats import Summary, summarize

QUIET = 0.12
"""How many cores others may keep busy during a contender's turn. The kernel counts in ticks of 10 ms: 0.02 is noise."""
MOST = 1.5
"""How many rounds are run at most, as a multiple of those wanted, to make up for disturbed ones."""

T = TypeVar("T")


@dataclass(frozen=True)
class Round(Generic[T]):
    """What each contender measured in one round."""

    values: Mapping[str, T]
    foreign: float | None = None
    """Cores kept busy by others, in the turn in which it was most; None where unknown."""

    @property
    def disturbed(self) -> bool:
        """Whether others computed so much that the round does not count."""
        return self.foreign is not None and self.foreign > QUIET


@dataclass(frozen=True)
class Rounds(Generic[T]):
    """The rounds that count."""

    kept: Sequence[Round[T]]
    dropped: int
    """Rounds that were disturbed and do not count."""
    disturbed: bool
    """Whether so few were quiet that the disturbed ones had to count as well."""

    def summary(self, of: Callable[[Mapping[str, T]], float | None]) -> Summary | None:
        """Returns the median over rounds of a number made of one round's values; None leaves a round out."""
        found = (of(each.values) for each in self.kept)
        return summarize(value for value in found if value is not None)

    @property
    def note(self) -> str:
        """Says how many rounds count, how many were dropped, and how busy others were."""
        foreign = summarize(each.foreign for each in self.kept if each.foreign is not None)
        others = f", others {foreign.median:.2f} cores" if foreign else ""
        if self.disturbed:
            return f"{len(self.kept)}, all kept: **disturbed**{others}"
        return f"{len(self.kept)}, {self.dropped} dropped{others}"


def interleave(
    contenders: Mapping[str, Callable[[], T]], count: int, most_seconds: float = math.inf, seed: int = 0
) -> Rounds[T]:
    """Runs rounds until `count` were quiet, at most MOST × as many; calls each contender once per round.

    After `most_seconds` no further round begins.
    """
    begun = perf_counter()
    order = random.Random(seed)
    rounds: list[Round[T]] = []
    while (
        sum(not each.disturbed for each in rounds) < count
        and len(rounds) < MOST * count
        and perf_counter() - begun < most_seconds
    ):
        values: dict[str, T] = {}
        foreign: list[float] = []
        for name in order.sample(list(contenders), len(contenders)):
            before = load.mark()
            values[name] = contenders[name]()
            found = load.foreign_load(before, load.mark())
            if found is not None:
                foreign.append(found)
        rounds.append(Round(values, max(foreign) if foreign else None))
    return keep_quiet(rounds, count)


def keep_quiet(rounds: Sequence[Round[T]], count: int) -> Rounds[T]:
    """Drops disturbed rounds; keeps all, and says so, where less than half of those wanted, or run, would be left."""
    quiet = [each for each in rounds if not each.disturbed]
    if 2 * len(quiet) < min(count, len(rounds)):
        return Rounds(rounds, 0, disturbed=True)
    return Rounds(quiet, len(rounds) - len(quiet), disturbed=False)
