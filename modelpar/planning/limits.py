"""How much memory the stages of a chain may take, and how far each of them gets with it: Limits."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from modelpar.planning.intervals import Ints
from modelpar.planning.memory import MemoryModel

NO_LIMIT = 2**60
_GUESSES = 5
"""How often the end of a stage is guessed from its layers' own bytes, before it is bisected."""


@dataclass(frozen=True, eq=False)
class Limits:
    """Bytes that each stage may hold, and what it would hold between two positions of a chain.

    A stage that ends later never holds less; one that begins later may, or may hold more: what it takes from others.
    """

    model: MemoryModel
    at: Ints
    """The layer after each position; the number of layers for the last one."""
    in_flight: tuple[int, ...]
    """Per stage, micro-batches whose activations it holds at once."""
    room: tuple[int, ...]
    """Per stage, in bytes; `NO_LIMIT` where there is none."""
    _known: dict[int, tuple[int, int, int, Ints]] = field(default_factory=dict)

    @property
    def num_stages(self) -> int:
        """How many stages there are."""
        return len(self.room)

    @property
    def end(self) -> int:
        """The last position."""
        return len(self.at) - 1

    def bytes(self, stage: int, start: Ints | int, end: Ints | int) -> Ints:
        """Returns what a stage holds between two positions; takes arrays."""
        return self.model.bytes(self.at[start], self.at[end], self.in_flight[stage])

    def hold(self, bounds: Sequence[int]) -> bool:
        """Tells whether every stage has room for what it holds between these positions."""
        pairs = enumerate(itertools.pairwise(bounds))
        return all(self.bytes(stage, start, end) <= self.room[stage] for stage, (start, end) in pairs)

    def fit(
        self, stage: int, start: Ints | int, end: Ints | int, lowest: int, highest: int
    ) -> NDArray[np.bool_] | bool:
        """Tells whether a stage has room for what it holds between positions, all from `lowest` to `highest`."""
        room = self.room[stage]
        return self._upper(stage, lowest, highest) <= room or self.bytes(stage, start, end) <= room

    def reach(self, stage: int, start: int, stop: int, last: int) -> Ints | None:
        """Returns, for a stage that begins at each of the positions from start to stop − 1, the last position, up to
        `last`, at which it may end: where it begins, if it has no room for anything. None where all may end at `last`.
        """
        if self._upper(stage, start, last) <= self.room[stage]:
            return None
        known = self._known.get(stage)
        if known is None or not (known[0] <= start and stop <= known[1] and last <= known[2]):
            most = min(self.farthest[stage + 1], 2 * last - start)
            known = self._known[stage] = (start, stop, most, self._reach(stage, start, stop, most))
        return np.minimum(known[3][start - known[0] : stop - known[0]], last)

    @cached_property
    def farthest(self) -> tuple[int, ...]:
        """After 0, 1, … stages, a position beyond which these cannot get."""
        found = [0]
        for stage in range(self.num_stages):
            most = self._own(stage, found[-1]) + self._most(stage)
            found.append(bisect_right(range(self.end + 1), most, key=lambda i, stage=stage: self._own(stage, i)) - 1)  # type: ignore[misc]
        return tuple(found)

    @cached_property
    def earliest(self) -> tuple[int, ...]:
        """After 0, 1, … stages, a position before which the others cannot get to the end any more."""
        found = [self.end]
        for stage in reversed(range(self.num_stages)):
            least = self._own(stage, found[-1]) - self._most(stage)
            found.append(bisect_left(range(self.end + 1), least, key=lambda i, stage=stage: self._own(stage, i)))  # type: ignore[misc]
        return tuple(reversed(found))

    def _reach(self, stage: int, start: int, stop: int, last: int) -> Ints:
        """Does what `reach` says, without looking whether it is known: bisects, beginning with good guesses."""
        room, begin = self.room[stage], np.arange(start, stop)
        fits, fails = begin.copy(), np.full(stop - start, last + 1)
        at = self.at[start : last + 1]
        own = self.model.weights[at] + self.in_flight[stage] * self.model.activations[at]
        guess = start + np.searchsorted(own, own[begin - start] + room, side="right") - 1
        for turn in range(64):
            open_ = np.flatnonzero(fails - fits > 1)
            if not len(open_):
                break
            first, low, high = begin[open_], fits[open_], fails[open_]
            tried = np.clip(guess[open_], low + 1, high - 1) if turn < _GUESSES else (low + high) // 2
            taken = self.bytes(stage, first, tried)
            fits[open_], fails[open_] = np.where(taken <= room, tried, low), np.where(taken <= room, high, tried)
            # What it takes besides its layers' own bytes changes little from one end to the next.
            wanted = own[tried - start] + room - taken
            guess[open_] = start + np.searchsorted(own, wanted, side="right") - 1
        return fits

    def _own(self, stage: int, position: int) -> int:
        layer = self.at[position]
        return int(self.model.weights[layer]) + self.in_flight[stage] * int(self.model.activations[layer])

    def _most(self, stage: int) -> int:
        """Returns how many of its layers' own bytes a stage has room for at most, were all that is shared within it."""
        model = self.model
        return self.room[stage] + model.shared_weights.total + self.in_flight[stage] * model.shared_activations.total

    def _upper(self, stage: int, start: int, last: int) -> int:
        """Returns bytes that no stage between these positions exceeds."""
        own = self._own(stage, last) - self._own(stage, start)
        return own + self.in_flight[stage] * self._most_entering + self._most_temporary

    @cached_property
    def _most_entering(self) -> int:
        return int(self.model.entering.max())

    @cached_property
    def _most_temporary(self) -> int:
        return int(self.model.temporary.rows[0].max())
