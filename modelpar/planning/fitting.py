"""Which splits fit into the devices' memory; and where none does, what is in the way and how many stages would do.

::

    4 GB each    [ embed h0 h1 ] [ h2 h3 h4 ] head          head does not fit: 2 stages are too few, 3 would do
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from modelpar.errors import PartitionError
from modelpar.planning.cluster import Cluster
from modelpar.planning.graph import ModelGraph
from modelpar.planning.limits import NO_LIMIT, Limits
from modelpar.planning.memory import MemoryModel, peak_microbatches_per_stage, stage_memory_bytes
from modelpar.planning.minmax import has_split
from modelpar.planning.partition import together
from modelpar.planning.plan import Plan
from modelpar.planning.profile import Profile
from modelpar.planning.schedule import Schedule
from modelpar.planning.sizes import show_apart

Schedules = Callable[[int], Schedule]
"""Gives the schedule for a number of ranks."""

_TRY_ALL = 64
"""Up to how many stages every number is tried; beyond, each 1.25 times the one before, and then the gap is bisected."""
_TRY_MOST = 1024


@dataclass(frozen=True, eq=False)
class Memory:
    """What any stages of a model would hold, and what the ranks of a cluster have for it."""

    graph: ModelGraph
    model: MemoryModel
    cluster: Cluster
    schedule: Schedules | None
    """None: one stage per rank, with one micro-batch in flight."""

    @classmethod
    def of(cls, graph: ModelGraph, profile: Profile, cluster: Cluster, schedule: Schedules | None) -> Memory:
        """Builds the model of the layers."""
        kind = schedule(cluster.num_ranks).kind if schedule else "train"
        return cls(graph, MemoryModel.of(graph, profile, kind), cluster, schedule)

    def limits(self, num_ranks: int, num_stages: int) -> tuple[Limits, Sequence[int]]:
        """Returns what each stage may hold, and its rank; ranks beyond the cluster's get devices like its first ones.

        Several stages of one rank get equal shares of its memory.
        """
        homes: Sequence[int] = tuple(stage % num_ranks for stage in range(num_stages))
        in_flight: Sequence[int] = (1,) * num_stages
        if self.schedule:
            order = self.schedule(num_ranks)
            homes, in_flight = order.stage_to_rank, peak_microbatches_per_stage(order)
        shares = np.bincount(homes)
        room = []
        for rank in homes:
            size = self.cluster.memory_of(rank % self.cluster.num_ranks)
            room.append(NO_LIMIT if size is None else size // int(shares[rank]))
        positions = np.array([0, *self.graph.cuts, len(self.graph.layers)])
        return Limits(self.model, positions, tuple(in_flight), tuple(room)), homes

    def refusal(self, num_stages: int) -> PartitionError:
        """Returns the error for a number of stages of which no split fits."""
        limits, homes = self.limits(self.cluster.num_ranks, num_stages)
        stage, start, position, num_bytes = _alone_too_large(limits) or _where_it_ends(limits)
        layers = self.graph.layers[limits.at[position] : limits.at[position + 1]]
        name = together([layer.name for layer in layers])
        what = f"{name} alone needs"
        if start < position:
            what = f"with {name} stage {stage}, from {self.graph.layers[limits.at[start]].name} on, needs"
        needed, room = show_apart(num_bytes, limits.room[stage])
        share = " for each of its stages" if list(homes).count(homes[stage]) > 1 else ""
        most = min(limits.end, _TRY_MOST)
        fewest = self._fewest(most, max(1, num_stages // self.cluster.num_ranks))
        would = f"no number of stages up to {most} would fit on such devices"
        if fewest:
            would = f"{fewest} {'stage' if fewest == 1 else 'stages'} would fit"
            would += " on such devices" if fewest > num_stages else ""
        return PartitionError(
            f"{num_stages} stages do not fit into memory: {what} {needed} on rank {homes[stage]}, which has "
            f"{room}{share}; {would}"
        )

    def _fewest(self, most: int, chunks: int) -> int | None:
        """Returns the smallest number of stages that fits, up to `most`, as far as it looks; None where none does."""

        def stages(num_ranks: int) -> int:
            return self.schedule(num_ranks).num_stages if self.schedule else num_ranks * chunks

        def fits(num_ranks: int) -> bool:
            return stages(num_ranks) <= most and has_split(self.limits(num_ranks, stages(num_ranks))[0])

        low, high, top = 0, 1, max(1, most // chunks)
        while not fits(high):
            if high == top:
                return None
            low, high = high, min(high + 1 if high < _TRY_ALL else high * 5 // 4, top)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return stages(high)


def check_memory(plan: Plan) -> None:
    """Raises PartitionError where a rank's device has less memory than its stages are predicted to hold at once."""
    if not plan.cluster.limited:
        return
    stages, homes = stage_memory_bytes(plan), plan.schedule.stage_to_rank
    for rank in range(plan.num_ranks):
        room, own = plan.cluster.memory_of(rank), [stage for stage, home in enumerate(homes) if home == rank]
        held = sum(stages[stage] for stage in own)
        if room is not None and held > room:
            which = f"stage {own[0]}" if len(own) == 1 else f"stages {', '.join(map(str, own))}"
            layers = [plan.graph.layers[i].name for stage in own for i in plan.partition.layers(stage)]
            needed, has = show_apart(held, room)
            raise PartitionError(
                f"{which}, {layers[0]} … {layers[-1]}, would hold {needed} on rank {rank}, which has {has}; "
                "expected a split that fits, such as partition=optimal finds where there is one"
            )


class _Obstacle(NamedTuple):
    """A stage that would have to hold more than it has room for."""

    stage: int
    start: int
    """The position where the stage begins."""
    position: int
    """That before the run of layers that is too much."""
    num_bytes: int


def _alone_too_large(limits: Limits) -> _Obstacle | None:
    """Returns the run of layers, between neighbouring positions, that exceeds by most the stage that suits it best.

    None where each has room in some stage.
    """
    starts = np.arange(limits.end)
    excess, where = np.full(limits.end, np.iinfo(np.int64).max), np.zeros(limits.end, dtype=np.int64)
    kinds = list(zip(limits.in_flight, limits.room, strict=True))
    for stage in sorted({kind: stage for stage, kind in reversed(list(enumerate(kinds)))}.values()):
        here = limits.bytes(stage, starts, starts + 1) - limits.room[stage]
        where[here < excess] = stage
        excess = np.minimum(excess, here)
    worst = int(np.argmax(excess))
    stage = int(where[worst])
    if excess[worst] <= 0:
        return None
    return _Obstacle(stage, worst, worst, int(limits.bytes(stage, worst, worst + 1)))


def _where_it_ends(limits: Limits) -> _Obstacle:
    """Returns what stops the stages that get farthest from the start."""
    reached = np.zeros(limits.end + 1, dtype=np.bool_)
    reached[0] = True
    for stage in range(limits.num_stages):
        starts = np.flatnonzero(reached[:-1])
        low, high = int(starts[0]), int(starts[-1]) + 1
        reach = limits.reach(stage, low, high, limits.end)
        ends = np.full(len(starts), limits.end) if reach is None else reach[starts - low]
        change = np.zeros(limits.end + 2, dtype=np.int64)
        some = ends > starts
        np.add.at(change, starts[some] + 1, 1)
        np.add.at(change, ends[some] + 1, -1)
        after = np.cumsum(change)[:-1] > 0
        after[limits.end - (limits.num_stages - stage - 1) + 1 :] = False  # the other stages hold something too
        farthest = int(ends.max())
        if not after.any() or (stage == limits.num_stages - 1 and farthest < limits.end):
            # Where no stage can begin at all, the one that lacks least; else the one that could take the next layers.
            last = starts if not after.any() else np.full(len(starts), farthest)
            sizes = limits.bytes(stage, starts, last + 1)
            best = int(np.argmin(sizes))
            return _Obstacle(stage, int(starts[best]), int(last[best]), int(sizes[best]))
        reached = after
    raise AssertionError("a split fits")
