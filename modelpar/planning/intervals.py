"""Facts about runs of layers that no prefix sum gives, for many runs at once: Overlaps and Maxima."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Overlaps:
    """Weighted pairs of layers, and the weight of those pairs of which both layers are in a run.

    Pairs of equal distance are kept together: of these, those within a run follow one another.
    """

    by_distance: tuple[tuple[int, Ints, Ints], ...]
    """A distance; the first layers of its pairs, ascending; the weight before each of them, and of all."""

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, int, int]]) -> Overlaps:
        """Builds it from (first layer, second layer, weight)."""
        found = defaultdict[int, list[tuple[int, int]]](list)
        for first, second, weight in pairs:
            found[second - first].append((first, weight))
        by_distance = []
        for distance, entries in sorted(found.items()):
            firsts, weights = np.array(sorted(entries), dtype=np.int64).T
            by_distance.append((distance, firsts, np.concatenate([[0], np.cumsum(weights)])))
        return cls(tuple(by_distance))

    def within(self, start: Ints | int, end: Ints | int) -> Ints | int:
        """Returns the weight of the pairs inside layers[start:end]."""
        total: Ints | int = 0
        for distance, firsts, before in self.by_distance:
            inside = before[np.searchsorted(firsts, np.maximum(np.subtract(end, distance), start))]
            total = total + inside - before[np.searchsorted(firsts, start)]
        return total

    @property
    def total(self) -> int:
        """The weight of all pairs."""
        return sum(int(before[-1]) for _, _, before in self.by_distance)


@dataclass(frozen=True, eq=False)
class Maxima:
    """The largest value in a run: a table of the maxima of all runs of 1, 2, 4, … values, a row each."""

    rows: Ints

    @classmethod
    def of(cls, values: Ints) -> Maxima:
        """Builds the table."""
        rows = np.tile(values, (len(values).bit_length(), 1))
        for row in range(1, len(rows)):
            half = 1 << (row - 1)
            np.maximum(rows[row - 1, :-half], rows[row - 1, half:], out=rows[row, :-half])
        return cls(rows)

    def over(self, start: Ints | int, end: Ints | int) -> Ints:
        """Returns the largest of values[start:end], which must not be empty."""
        row = np.frexp(np.subtract(end, start))[1] - 1
        found: Ints = np.maximum(self.rows[row, start], self.rows[row, end - (1 << row)])
        return found
