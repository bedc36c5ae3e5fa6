"""Splits a chain into stages so that the costliest stage is as cheap as possible: exact, in numpy.

A position is where the chain may be cut; position 0 is its start, the last one its end. For a bottleneck T, level s is
the set of positions that s stages can reach, each of cost at most T::

    level 0   x . . . . . .
    level 1   . x x x . . .       stage 0 ends here
    level 2   . . . x x x .       stage 1 ends here
    level 3   . . . . . . x       T is feasible where the last level holds the end

A stage from i to j costs prefix[j] − prefix[i] + crossing[i] + crossing[j], so that j can be reached where
prefix[j] + crossing[j] − T is at most the running maximum of prefix[i] − crossing[i] over the positions i < j of the
level before: one pass of numpy per level. T is bisected, and each partition found replaces it by its own bottleneck.

Costs are integers, in units of a power of two near 2⁻⁶⁰ of the whole chain's cost: sums are exact, so is the optimum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_NEVER = -(2**62)
_MAX_SWEEPS = 20


@dataclass(frozen=True, eq=False)
class Chain:
    """What each stage of a chain would cost, in integers."""

    prefixes: tuple[Ints, ...]
    """Per stage, the cost of everything before each position, at the speed of that stage's device."""
    crossing: Ints
    """The cost of a border at each position; 0 at both ends."""
    overlap: bool
    """Whether a stage costs the maximum of its compute and each border, instead of their sum."""

    @classmethod
    def of(
        cls, costs: Floats, crossing: Floats, positions: Sequence[int], speeds: Sequence[float], overlap: bool
    ) -> Chain:
        """Builds a chain from the cost of each layer, and of each position, and the speed of each stage's device."""
        largest = float(costs.sum()) / min(speeds) + 2 * float(crossing.max())
        exponent = 60 - math.frexp(largest)[1]

        def whole(values: Floats) -> Ints:
            return np.rint(np.ldexp(values, exponent)).astype(np.int64)

        at = np.asarray(positions)
        by_speed = {v: np.concatenate([[0], np.cumsum(whole(costs / v))])[at] for v in set(speeds)}
        return cls(tuple(by_speed[v] for v in speeds), whole(crossing), overlap)

    @property
    def num_stages(self) -> int:
        """How many stages there are to be."""
        return len(self.prefixes)

    @property
    def end(self) -> int:
        """The last position."""
        return len(self.crossing) - 1

    def costs(self, stage: int, start: int | slice, end: int | slice) -> Ints:
        """Returns the cost of a stage between two positions; a slice gives an array."""
        parts = self.prefixes[stage][end] - self.prefixes[stage][start], self.crossing[start], self.crossing[end]
        cost: Ints = np.maximum(parts[0], np.maximum(*parts[1:])) if self.overlap else parts[0] + parts[1] + parts[2]
        return cost

    def bottleneck(self, bounds: Sequence[int]) -> int:
        """Returns the cost of the costliest stage."""
        return max(int(self.costs(s, bounds[s], bounds[s + 1])) for s in range(self.num_stages))


@dataclass(frozen=True)
class _Level:
    """The reachable positions of one level: those of start, start + 1, … where the mask is true."""

    start: int
    mask: NDArray[np.bool_]


def split(chain: Chain) -> list[int]:
    """Returns the positions of the borders, both ends included, of a split with the smallest possible bottleneck.

    Of several, it takes one in which no single border can move to lower the sum of the squared costs (then, of the
    squared block counts) of the two stages beside it, as far as a bounded number of sweeps gets.
    """
    bounds = _even(chain)
    low, high = _lower_bound(chain), chain.bottleneck(bounds)
    probe = True
    while low < high:
        # Near the end ask for strictly less than the best found: mostly there is nothing between, and that proves it.
        threshold = high - 1 if probe and high - low <= high >> 24 else (low + high) // 2
        levels = _levels(chain, threshold)
        if levels is None:
            low, probe = threshold + 1, True
        else:
            bounds = _walk_back(chain, levels, threshold)
            high, probe = chain.bottleneck(bounds), not probe
    levels = _levels(chain, high)
    assert levels is not None, "the best split found is within its own bottleneck"
    return _settle(chain, _walk_back(chain, levels, high), high)


def _even(chain: Chain) -> list[int]:
    """Returns some split: each stage takes its share of the compute as nearly as blocks allow."""
    num_stages, prefix = chain.num_stages, chain.prefixes[0]
    stages = np.arange(num_stages + 1)
    bounds = np.searchsorted(prefix, prefix[-1] * (stages / num_stages))
    bounds[0], bounds[-1] = 0, chain.end
    bounds = np.maximum.accumulate(bounds - stages) + stages
    return [int(bound) for bound in np.minimum(bounds, chain.end - num_stages + stages)]


def _lower_bound(chain: Chain) -> int:
    """Returns a bottleneck that no split can beat: the largest block on the fastest device."""
    fastest = min(chain.prefixes, key=lambda prefix: int(prefix[-1]))
    return int(np.diff(fastest).max())


def _levels(chain: Chain, threshold: int) -> list[_Level] | None:
    """Returns the reachable positions after 0, 1, … stages of cost at most the threshold, or None if that is too low.

    Only positions are kept from which the remaining stages could get to the end if every border were the cheapest one,
    which leaves a few per level where the threshold is tight.
    """
    num_stages, end, crossing = chain.num_stages, chain.end, chain.crossing
    cheapest = 0 if chain.overlap or num_stages == 1 else int(crossing[1:-1].min())
    room = [threshold - cheapest * ((s > 0) + (s < num_stages - 1)) for s in range(num_stages)]
    if min(room) < 0:
        return None
    earliest = [0] * num_stages + [end]
    for s in range(num_stages - 1, 0, -1):
        prefix = chain.prefixes[s]
        earliest[s] = int(np.searchsorted(prefix, prefix[earliest[s + 1]] - room[s]))
    levels = [_Level(0, np.ones(1, dtype=np.bool_))]
    for s in range(num_stages):
        prefix, (start, mask) = chain.prefixes[s], (levels[-1].start, levels[-1].mask)
        stop = start + len(mask)
        keys = prefix[start:stop] if chain.overlap else prefix[start:stop] - crossing[start:stop]
        best = np.maximum.accumulate(np.where(mask, keys, _NEVER))
        first = max(earliest[s + 1], start + 1)
        last = int(np.searchsorted(prefix, prefix[stop - 1] + room[s], side="right")) - 1
        if first > last:
            return None
        # best[k] is for the position after start + k: a stage holds at least one block.
        before = best[first - 1 - start : last - start]
        if len(before) < last + 1 - first:
            before = np.concatenate([before, np.full(last + 1 - first - len(before), best[-1])])
        needed = prefix[first : last + 1] - before
        if chain.overlap:
            needed = np.maximum(needed, crossing[first : last + 1])
        else:
            needed += crossing[first : last + 1]
        reachable = np.flatnonzero(needed <= threshold)
        if not len(reachable):
            return None
        levels.append(_Level(first + int(reachable[0]), (needed <= threshold)[reachable[0] : reachable[-1] + 1]))
    return levels


def _walk_back(chain: Chain, levels: list[_Level], threshold: int) -> list[int]:
    """Returns a split along the levels: from the end, each stage takes what is nearest its share of what is left."""
    bounds = [chain.end]
    for s in range(chain.num_stages - 1, -1, -1):
        level, prefix, after = levels[s], chain.prefixes[s], bounds[-1]
        window = slice(level.start, min(level.start + len(level.mask), after))
        possible = level.mask[: window.stop - window.start] & (chain.costs(s, window, after) <= threshold)
        share = int(prefix[after]) * s // (s + 1)
        distance = np.where(possible, np.abs(prefix[window] - share), np.iinfo(np.int64).max)
        # Layers that cost nothing leave ties: then blocks are shared out instead.
        ties = level.start + np.flatnonzero(distance == distance.min())
        bounds.append(int(ties[np.argmin(np.abs(ties - after * s / (s + 1)))]))
    return bounds[::-1]


def _settle(chain: Chain, bounds: list[int], threshold: int) -> list[int]:
    """Moves single borders while that evens out the two stages beside one and keeps all stages within the threshold."""
    for _ in range(_MAX_SWEEPS):
        before = list(bounds)
        for s in range(1, chain.num_stages):
            left, right = bounds[s - 1], bounds[s + 1]
            # The first and the last border at which both stages stay within the threshold, were crossings free.
            low = np.searchsorted(chain.prefixes[s], chain.prefixes[s][right] - threshold)
            high = np.searchsorted(chain.prefixes[s - 1], chain.prefixes[s - 1][left] + threshold, side="right")
            window = slice(max(left + 1, int(low)), min(right, int(high)))
            costs = chain.costs(s - 1, left, window), chain.costs(s, window, right)
            squares = costs[0].astype(np.float64) ** 2 + costs[1].astype(np.float64) ** 2
            squares[np.maximum(*costs) > threshold] = np.inf
            ties = window.start + np.flatnonzero(squares == squares.min())
            blocks = (ties - left) ** 2 + (right - ties) ** 2
            here = np.flatnonzero(ties == bounds[s])
            if not len(here) or blocks.min() < blocks[here[0]]:
                bounds[s] = int(ties[np.argmin(blocks)])
        if bounds == before:
            break
    return bounds
