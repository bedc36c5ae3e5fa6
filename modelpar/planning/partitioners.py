"""Which layers form which stage: plain functions of (graph, profile, cluster, num_stages). To add one, write one.

Each of `uniform`, `by_parameters`, `by_memory`, `by_flops` and `by_time` finds the exact min-max of its one quantity::

    layers        embed   h0   h1   h2   head          by_flops, 2 stages
    GFLOP             0    4    4    4      9
                [           12          ] [ 9 ]        bottleneck 12; the other cuts give 13 and more

`optimal` is the exact min-max of seconds on the stage's own device plus what its borders cost. Where the cluster says
how much memory its devices have, each of them looks only at splits whose stages fit (see `fitting`). `schedule`, which
gives the schedule for a number of ranks, then tells how many micro-batches are in flight, and on which rank each stage
is; without one it is one micro-batch, and stage s is on rank s % num_ranks.

Only legal cuts are used, and no stage is ever empty, even where layers cost nothing. Among equally good splits the one
with the more even stages is taken, always the same one (see `minmax.split`). A parameter tied between layers counts in
each of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import NamedTuple

import numpy as np

from modelpar.errors import PartitionError
from modelpar.planning.cluster import Cluster, Link
from modelpar.planning.fitting import Memory, Schedules
from modelpar.planning.graph import BATCH, ModelGraph
from modelpar.planning.minmax import Chain, Floats, split
from modelpar.planning.partition import Partition
from modelpar.planning.profile import Profile

Partitioner = Callable[[ModelGraph, Profile, Cluster, int], Partition]
"""A function of (graph, profile, cluster, num_stages), such as `optimal`."""


def uniform(
    graph: ModelGraph, profile: Profile, cluster: Cluster, num_stages: int, *, schedule: Schedules | None = None
) -> Partition:
    """Returns the split whose longest stage has the fewest layers."""
    return _alone("uniform", _Case(graph, profile, cluster, num_stages, schedule), [1] * len(graph.layers))


def by_parameters(
    graph: ModelGraph, profile: Profile, cluster: Cluster, num_stages: int, *, schedule: Schedules | None = None
) -> Partition:
    """Returns the split whose largest stage has the fewest bytes of parameters."""
    case = _Case(graph, profile, cluster, num_stages, schedule)
    return _alone("by_parameters", case, [layer.parameter_bytes for layer in profile.layers])


def by_memory(
    graph: ModelGraph,
    profile: Profile,
    cluster: Cluster,
    num_stages: int,
    *,
    optimizer_slots: int = 2,
    microbatches: int = 1,
    schedule: Schedules | None = None,
) -> Partition:
    """Returns the split whose largest stage has the fewest bytes of weights, gradients, optimizer state, activations.

    A layer takes parameter_bytes · (2 + optimizer_slots) + microbatches · saved_bytes: its weights, their gradients, as
    many values per weight as the optimizer keeps (Adam's two moments; 1 for momentum, 0 for plain SGD), and the
    activations of the micro-batches in flight, the same number for every stage.
    """
    copies = 2 + optimizer_slots
    sizes = [layer.parameter_bytes * copies + microbatches * layer.saved_bytes for layer in profile.layers]
    return _alone("by_memory", _Case(graph, profile, cluster, num_stages, schedule), sizes)


def by_flops(
    graph: ModelGraph, profile: Profile, cluster: Cluster, num_stages: int, *, schedule: Schedules | None = None
) -> Partition:
    """Returns the split whose largest stage has the fewest floating-point operations."""
    case = _Case(graph, profile, cluster, num_stages, schedule)
    return _alone("by_flops", case, [layer.flops for layer in profile.layers])


def by_time(
    graph: ModelGraph, profile: Profile, cluster: Cluster, num_stages: int, *, schedule: Schedules | None = None
) -> Partition:
    """Returns the split whose slowest stage takes the fewest profiled seconds; speeds and borders are ignored."""
    case = _Case(graph, profile, cluster, num_stages, schedule)
    return _alone("by_time", case, [layer.seconds for layer in profile.layers])


def optimal(
    graph: ModelGraph,
    profile: Profile,
    cluster: Cluster,
    num_stages: int,
    *,
    overlap: bool = False,
    schedule: Schedules | None = None,
) -> Partition:
    """Returns the split whose slowest stage takes the fewest seconds per micro-batch, transfers included where the
    profile was measured.

    The cost of a stage is that of `stage_seconds`. Its lower bound is the largest run of layers between legal cuts on
    the fastest device, or all devices' even share, whichever is more; `balance.imbalance` says what keeps it from that.
    """
    case = _Case(graph, profile, cluster, num_stages, schedule)
    case.check()
    homes = case.homes
    seconds, borders = [layer.seconds for layer in profile.layers], _border_seconds(graph, profile, cluster, homes)
    return _solve("optimal", case, seconds, borders, _speeds(cluster, homes), overlap)


def manual(
    graph: ModelGraph, profile: Profile, cluster: Cluster, num_stages: int, *, balance: Sequence[int]
) -> Partition:
    """Returns the split with the given number of layers per stage.

    Raises PartitionError where the counts do not add up, or ask for a cut that is not legal. Memory is not looked at.
    """
    _Case(graph, profile, cluster, num_stages, None).check()
    if not all(isinstance(count, int) for count in balance):
        raise PartitionError(f"balance {list(balance)}; expected whole numbers, one per stage")
    if len(balance) != num_stages:
        raise PartitionError(f"balance {list(balance)} has {len(balance)} stages; expected {num_stages}")
    partition = Partition.of_balance(balance, len(graph.layers))
    for bound in partition.bounds[1:-1]:
        if bound not in graph.cuts:
            before, after = graph.layers[bound - 1].name, graph.layers[bound].name
            raise PartitionError(
                f"balance {list(balance)} cuts between {before} and {after}, after {bound} layers, which cannot be "
                f"cut there; expected cuts after {', '.join(map(str, graph.cuts)) or 'no'} layers"
            )
    return partition


def with_schedule(partitioner: Partitioner, schedule: Schedules) -> Partitioner:
    """Returns a partitioner that gets the schedule, where it has a parameter of that name; others as they are."""
    function: Callable[..., Partition] = partitioner
    return partial(function, schedule=schedule) if "schedule" in signature(function).parameters else partitioner


def stage_seconds(
    graph: ModelGraph,
    profile: Profile,
    cluster: Cluster,
    partition: Partition,
    *,
    overlap: bool = False,
    stage_to_rank: Sequence[int] | None = None,
) -> tuple[float, ...]:
    """Returns the seconds that each stage of any partition costs per micro-batch; `optimal` minimises their maximum.

    That is its profiled seconds over the speed of its rank (s % num_ranks, where nothing else is said), plus the
    transfers over both of its borders: the bytes that cross, forward as activations and back as gradients. With
    `overlap`, transfers run beside the compute, and the cost is the maximum of compute, traffic in and traffic out
    (Narayanan et al., PipeDream, SOSP 2019, §3.1).
    """
    homes = _homes(cluster, partition.num_stages) if stage_to_rank is None else stage_to_rank
    seconds, borders = [layer.seconds for layer in profile.layers], _border_seconds(graph, profile, cluster, homes)
    return _stage_costs(partition.bounds, seconds, borders, _speeds(cluster, homes), overlap)


class _Case(NamedTuple):
    """What a partitioner is asked."""

    graph: ModelGraph
    profile: Profile
    cluster: Cluster
    num_stages: int
    schedule: Schedules | None

    @property
    def homes(self) -> Sequence[int]:
        """The rank of each stage."""
        if self.schedule is None:
            return _homes(self.cluster, self.num_stages)
        return self.schedule(self.cluster.num_ranks).stage_to_rank

    def check(self) -> None:
        """Raises PartitionError unless the profile fits the graph and the graph can have that many stages."""
        layers, cuts = self.graph.layers, self.graph.cuts
        if len(self.profile.layers) != len(layers):
            raise PartitionError(f"the profile has {len(self.profile.layers)} layers, the model {len(layers)}")
        if self.num_stages < 1:
            raise PartitionError(f"{self.num_stages} stages; expected at least 1")
        if self.num_stages > len(cuts) + 1:
            found, more = self.graph.obstacles[:3], len(self.graph.obstacles) - 3
            rest = [f"{more} more"] if more > 0 else []
            way = f"; in the way: {'; '.join([*found, *rest])}" if found else ""
            raise PartitionError(
                f"{self.num_stages} stages, but the model has {len(layers)} layers that can be cut in {len(cuts)} "
                f"places; expected at most {len(cuts) + 1}{way}"
            )


def _alone(method: str, case: _Case, costs: Sequence[float]) -> Partition:
    """Returns the exact min-max of one quantity, with equally fast devices and free borders."""
    case.check()
    free = [np.zeros(len(case.graph.layers) + 1)] * (case.num_stages + 1)
    return _solve(method, case, costs, free, [1.0] * case.num_stages, overlap=False)


def _solve(
    method: str, case: _Case, costs: Sequence[float], borders: Sequence[Floats], speeds: Sequence[float], overlap: bool
) -> Partition:
    """Returns the exact min-max; `borders` hold the cost of each stage's start and end at each cut, 0 at both ends."""
    graph = case.graph
    for i, cost in enumerate(costs):
        if not (math.isfinite(cost) and cost >= 0):
            raise PartitionError(
                f"{method}: layer {graph.layers[i].name} costs {cost}; expected a finite number from 0 up"
            )
    positions = np.array([0, *graph.cuts, len(graph.layers)])
    memory = limits = None
    if case.cluster.limited:
        memory = Memory.of(graph, case.profile, case.cluster, case.schedule)
        limits, _ = memory.limits(case.cluster.num_ranks, case.num_stages)
    at_cuts = {key: values[positions] for key, values in {id(values): values for values in borders}.items()}
    crossing = [at_cuts[id(values)] for values in borders]
    chain = Chain.of(np.array(costs, dtype=np.float64), crossing, positions.tolist(), speeds, overlap, limits)
    found = split(chain)
    if found is None:
        assert memory is not None, "without limits there is always a split"
        raise memory.refusal(case.num_stages)
    bounds = tuple(positions[found].tolist())
    bottleneck = max(_stage_costs(bounds, costs, borders, speeds, overlap))
    blocks = max(math.fsum(costs[start:end]) for start, end in itertools.pairwise(positions.tolist()))
    lower = max(blocks / max(speeds), math.fsum(costs) / math.fsum(speeds))
    return Partition(bounds, method, bottleneck, min(lower, bottleneck))


def _stage_costs(
    bounds: Sequence[int], costs: Sequence[float], borders: Sequence[Floats], speeds: Sequence[float], overlap: bool
) -> tuple[float, ...]:
    stages = []
    for stage, (start, end, speed) in enumerate(zip(bounds, bounds[1:], speeds, strict=False)):
        traffic = float(borders[stage][start]), float(borders[stage + 1][end])
        parts = (math.fsum(costs[start:end]) / speed, *traffic)
        stages.append(max(parts) if overlap else math.fsum(parts))
    return tuple(stages)


def _homes(cluster: Cluster, num_stages: int) -> tuple[int, ...]:
    return tuple(stage % cluster.num_ranks for stage in range(num_stages))


def _speeds(cluster: Cluster, homes: Sequence[int]) -> list[float]:
    """Returns the speed of each stage's device."""
    speeds = [cluster.speed(rank) for rank in homes]
    for rank, speed in zip(homes, speeds, strict=True):
        if not (math.isfinite(speed) and speed > 0):
            raise PartitionError(f"rank {rank} has speed {speed}; expected a number above 0")
    return speeds


def _border_seconds(graph: ModelGraph, profile: Profile, cluster: Cluster, homes: Sequence[int]) -> list[Floats]:
    """Returns per border, before, between and after the stages, the seconds of transfers over it at each position:
    activations there, gradients back.

    Stages of one rank send each other nothing. What skips stages counts at each border that it passes. Counted costs
    are seconds of a nominal device, of which only ratios mean anything: beside them borders cost nothing.
    """
    num_bytes = np.zeros(len(graph.layers) + 1)
    for value in graph.values:  # graph.crossing_bytes of every cut at once
        if not (math.isfinite(value.bytes_per_sample) and value.bytes_per_sample >= 0):
            raise PartitionError(
                f"value {value.name} has {value.bytes_per_sample} bytes per sample; expected a finite number from 0 up"
            )
        if value.producer != BATCH:
            num_bytes[value.producer + 1 : max(value.consumers) + 1] += value.bytes_per_sample
    num_bytes *= profile.microbatch_size
    nothing = np.zeros_like(num_bytes)
    if profile.source == "flops":
        return [nothing] * (len(homes) + 1)
    known: dict[Link, Floats] = {}
    borders = [nothing]
    for first, second in itertools.pairwise(homes):
        link = cluster.link_between(first, second)
        if first != second and link not in known:
            known[link] = _transfers(link, num_bytes)
        borders.append(nothing if first == second else known[link])
    return [*borders, nothing]


def _transfers(link: Link, num_bytes: Floats) -> Floats:
    """Returns the seconds of a hand-off there and back, at each position; none at both ends."""
    if not (math.isfinite(link.latency) and link.latency >= 0 and link.bandwidth > 0):
        raise PartitionError(f"{link}; expected a finite latency from 0 up, and a bandwidth above 0")
    seconds = np.array([2 * link.hand_off(size) for size in num_bytes.tolist()])
    seconds[[0, -1]] = 0.0
    return seconds
