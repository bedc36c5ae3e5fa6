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

Where memory is limited, a stage from i may end at any position up to a farthest one, so that the maximum for j is over
those i that get as far as j.

Costs are integers, in units of a power of two near 2⁻⁶⁰ of the whole chain's cost: sums are exact, so is the optimum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from modelpar.planning.intervals import Ints
from modelpar.planning.limits import Limits

Floats = NDArray[np.float64]

_NEVER = -(2**62)
_MAX_SWEEPS = 20


@dataclass(frozen=True, eq=False)
class Chain:
    """What each stage of a chain would cost, in integers."""

    prefixes: tuple[Ints, ...]
    """Per stage, the cost of everything before each position, at the speed of that stage's device."""
    crossings: tuple[Ints, ...]
    """Per border, from the start of the first stage to the end of the last, its cost at each position; 0 at both ends.
    """
    overlap: bool
    """Whether a stage costs the maximum of its compute and each border, instead of their sum."""
    limits: Limits | None = None
    """Where the stages' memory is limited."""

    @classmethod
    def of(
        cls,
        costs: Floats,
        crossing: Floats | Sequence[Floats],
        positions: Sequence[int],
        speeds: Sequence[float],
        overlap: bool,
        limits: Limits | None = None,
    ) -> Chain:
        """Builds a chain from the cost of each layer, and of each position, and the speed of each stage's device.

        `crossing` is one array for all borders, or one for each of them.
        """
        crossings = [crossing] * (len(speeds) + 1) if isinstance(crossing, np.ndarray) else crossing
        different = {id(values): values for values in crossings}
        largest = float(costs.sum()) / min(speeds) + 2 * max(float(values.max()) for values in different.values())
        exponent = 60 - math.frexp(largest)[1]

        def whole(values: Floats) -> Ints:
            return np.rint(np.ldexp(values, exponent)).astype(np.int64)

        at = np.asarray(positions)
        by_speed = {v: np.concatenate([[0], np.cumsum(whole(costs / v))])[at] for v in set(speeds)}
        by_border = {key: whole(values) for key, values in different.items()}
        prefixes, borders = (by_speed[v] for v in speeds), (by_border[id(values)] for values in crossings)
        return cls(tuple(prefixes), tuple(borders), overlap, limits)

    @property
    def num_stages(self) -> int:
        """How many stages there are to be."""
        return len(self.prefixes)

    @property
    def end(self) -> int:
        """The last position."""
        return len(self.prefixes[0]) - 1

    def costs(self, stage: int, start: int | slice, end: int | slice) -> Ints:
        """Returns the cost of a stage between two positions; a slice gives an array."""
        compute = self.prefixes[stage][end] - self.prefixes[stage][start]
        before, after = self.crossings[stage][start], self.crossings[stage + 1][end]
        cost: Ints = np.maximum(compute, np.maximum(before, after)) if self.overlap else compute + before + after
        return cost

    @cached_property
    def cheapest(self) -> list[int]:
        """Per border, the least that it costs anywhere, or 0 where borders are not added."""
        some = not self.overlap and self.end > 1
        inner = {id(values): int(values[1:-1].min()) if some else 0 for values in self.crossings}
        return [0, *(inner[id(values)] for values in self.crossings[1:-1]), 0]

    def bottleneck(self, bounds: Sequence[int]) -> int:
        """Returns the cost of the costliest stage."""
        return max(int(self.costs(s, bounds[s], bounds[s + 1])) for s in range(self.num_stages))


@dataclass(frozen=True)
class _Level:
    """The reachable positions of one level: those of start, start + 1, … where the mask is true."""

    start: int
    mask: NDArray[np.bool_]


def split(chain: Chain) -> list[int] | None:
    """Returns the positions of the borders, both ends included, of a split with the smallest possible bottleneck.

    Of several, it takes one in which no single border can move to lower the sum of the squared costs (then, of the
    squared block counts) of the two stages beside it, as far as a bounded number of sweeps gets. None where no split is
    within the limits.
    """
    even = _even(chain)
    found = chain.limits is None or chain.limits.hold(even)
    low, high = _lower_bound(chain), chain.bottleneck(even) if found else _upper_bound(chain)
    probe, step = True, 1 / 128
    while low < high:
        # Thresholds far above the optimum leave many positions, and take long: so come from below at first.
        if step and step < 4 and low * step >= 1:
            threshold, step = min(int(low * (1 + step)), (low + high) // 2), 2 * step
        elif not found:
            threshold = high
        else:
            # Near the end ask for strictly less than the best found: mostly nothing is between, and that proves it.
            threshold = high - 1 if probe and high - low <= high >> 16 else (low + high) // 2
        levels = _levels(chain, threshold)
        if levels is not None:
            high = chain.bottleneck(_walk_back(chain, levels, threshold))
            found, step, probe = True, 0, not probe
        elif threshold == high:
            return None
        else:
            low, probe = threshold + 1, True
    levels = _levels(chain, high)
    if levels is None:
        assert not found, "the best split found is within its own bottleneck"
        return None
    return _settle(chain, _walk_back(chain, levels, high), high)


def has_split(limits: Limits) -> bool:
    """Tells whether any split is within the limits, whatever it costs."""
    stages, nothing = limits.num_stages, np.zeros(limits.end + 1, dtype=np.int64)
    if stages > limits.end:
        return False
    return _levels(Chain((nothing,) * stages, (nothing,) * (stages + 1), False, limits), 0) is not None


def _even(chain: Chain) -> list[int]:
    """Returns some split: each stage takes its share of the compute as nearly as blocks allow."""
    num_stages, prefix = chain.num_stages, chain.prefixes[0]
    stages = np.arange(num_stages + 1)
    bounds = np.searchsorted(prefix, prefix[-1] * (stages / num_stages))
    bounds[0], bounds[-1] = 0, chain.end
    bounds = np.maximum.accumulate(bounds - stages) + stages
    return [int(bound) for bound in np.minimum(bounds, chain.end - num_stages + stages)]


def _lower_bound(chain: Chain) -> int:
    """Returns a bottleneck that no split can beat: the largest block on the fastest device, or all devices' even share.

    The share is rounded down a little, since it is not computed in integers.
    """
    fastest = min(chain.prefixes, key=lambda prefix: int(prefix[-1]))
    if not fastest[-1]:
        return 0
    share = 1 / math.fsum(1 / int(prefix[-1]) for prefix in chain.prefixes)
    return max(int(np.diff(fastest).max()), int(share * (1 - 1e-9)))


def _upper_bound(chain: Chain) -> int:
    """Returns a bottleneck that no split exceeds."""
    borders = {id(crossing): int(crossing.max()) for crossing in chain.crossings}
    return max(int(prefix[-1]) for prefix in chain.prefixes) + 2 * max(borders.values())


def _levels(chain: Chain, threshold: int) -> list[_Level] | None:
    """Returns the reachable positions after 0, 1, … stages of cost at most the threshold, or None if that is too low.

    Only positions are kept from which the remaining stages could get to the end if every border were the cheapest one,
    which leaves a few per level where the threshold is tight.
    """
    num_stages, end, limits = chain.num_stages, chain.end, chain.limits
    cheapest = chain.cheapest
    room = [threshold - cheapest[s] - cheapest[s + 1] for s in range(num_stages)]
    if min(room) < 0 or (limits and limits.farthest[-1] < end):
        return None
    earliest = [0] * num_stages + [end]
    for s in range(num_stages - 1, 0, -1):
        prefix = chain.prefixes[s]
        earliest[s] = int(np.searchsorted(prefix, prefix[earliest[s + 1]] - room[s]))
        if limits:
            earliest[s] = max(earliest[s], limits.earliest[s])
    levels = [_Level(0, np.ones(1, dtype=np.bool_))]
    for s in range(num_stages):
        prefix, (start, mask) = chain.prefixes[s], (levels[-1].start, levels[-1].mask)
        stop = start + len(mask)
        keys = prefix[start:stop] if chain.overlap else prefix[start:stop] - chain.crossings[s][start:stop]
        keys = np.where(mask, keys, _NEVER)
        first = max(earliest[s + 1], start + 1)
        last = int(np.searchsorted(prefix, prefix[stop - 1] + room[s], side="right")) - 1
        if limits:
            last = min(last, limits.farthest[s + 1])
        if first > last:
            return None
        reach = limits.reach(s, start, stop, last) if limits else None
        before = _best_before(keys, first - start, last - start, None if reach is None else reach - start)
        needed = prefix[first : last + 1] - before
        if chain.overlap:
            needed = np.maximum(needed, chain.crossings[s + 1][first : last + 1])
        else:
            needed += chain.crossings[s + 1][first : last + 1]
        reachable = np.flatnonzero(needed <= threshold)
        if not len(reachable):
            return None
        levels.append(_Level(first + int(reachable[0]), (needed <= threshold)[reachable[0] : reachable[-1] + 1]))
    return levels


def _best_before(keys: Ints, first: int, last: int, reach: Ints | None) -> Ints:
    """Returns, for each position from first to last, the largest of the keys before it that reach as far as it.

    Positions count from that of the first key. `reach` says how far each key counts; None: all count for ever.
    """
    best = np.maximum.accumulate(keys)
    # best[k] is for the position k + 1: a stage holds at least one block.
    which = np.minimum(np.arange(first - 1, last), len(keys) - 1)
    if reach is None:
        return best[which]
    source = np.maximum.accumulate(np.where(keys == best, np.arange(len(keys)), 0))[which]
    if (reach[source] >= np.arange(first, last + 1)).all():
        return best[which]
    # Each key is for a run of positions, which two runs of a power of two cover; runs are handed down in halves.
    begin = np.arange(1, len(keys) + 1)
    some = np.flatnonzero(reach >= begin)
    begin, end, values = begin[some], reach[some] + 1, keys[some]
    power = np.frexp(end - begin)[1] - 1
    height, width = int(power.max(initial=0)) + 1, last + 1
    rows = np.full((height, width), _NEVER)
    for at in (begin, end - (1 << power)):
        np.maximum.at(rows.reshape(-1), power * width + at, values)
    for p in range(height - 1, 0, -1):
        half = 1 << (p - 1)
        np.maximum(rows[p - 1], rows[p], out=rows[p - 1])
        np.maximum(rows[p - 1, half:], rows[p, :-half], out=rows[p - 1, half:])
    found: Ints = rows[0, first:]
    return found


def _walk_back(chain: Chain, levels: list[_Level], threshold: int) -> list[int]:
    """Returns a split along the levels: from the end, each stage takes what is nearest its share of what is left."""
    bounds = [chain.end]
    for s in range(chain.num_stages - 1, -1, -1):
        level, prefix, after = levels[s], chain.prefixes[s], bounds[-1]
        window = slice(level.start, min(level.start + len(level.mask), after))
        possible = level.mask[: window.stop - window.start] & (chain.costs(s, window, after) <= threshold)
        reach = chain.limits.reach(s, window.start, window.stop, after) if chain.limits else None
        if reach is not None:
            possible &= reach == after
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
            if chain.limits:
                middle = np.arange(window.start, window.stop)
                fit = chain.limits.fit(s - 1, left, middle, left, window.stop - 1)
                fit = chain.limits.fit(s, middle, right, window.start, right) & fit
                squares[np.logical_not(fit)] = np.inf
            ties = window.start + np.flatnonzero(squares == squares.min())
            blocks = (ties - left) ** 2 + (right - ties) ** 2
            here = np.flatnonzero(ties == bounds[s])
            if not len(here) or blocks.min() < blocks[here[0]]:
                bounds[s] = int(ties[np.argmin(blocks)])
        if bounds == before:
            break
    return bounds
