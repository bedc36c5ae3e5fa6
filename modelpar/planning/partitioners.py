"""Which layers form which stage: plain functions of (graph, profile, cluster, num_stages). To add one, write one.

Each of `uniform`, `by_parameters`, `by_memory`, `by_flops` and `by_time` finds the exact min-max of its one quantity::

    layers        embed   h0   h1   h2   head          by_flops, 2 stages
    GFLOP             0    4    4    4      9
                [           12          ] [ 9 ]        bottleneck 12; the other cuts give 13 and more

`optimal` is the exact min-max of seconds on the stage's own device plus what its borders cost. Only legal cuts are
used, and no stage is ever empty, even where layers cost nothing. Among equally good splits the one with the more even
stages is taken, always the same one (see `minmax.split`). A parameter tied between layers counts in each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from modelpar.errors import PartitionError
from modelpar.planning.cluster import Cluster
from modelpar.planning.graph import BATCH, ModelGraph
from modelpar.planning.minmax import Chain, Floats, split
from modelpar.planning.partition import Partition
from modelpar.planning.profile import Profile

Partitioner = Callable[[ModelGraph, Profile, Cluster, int], Partition]
"""A function of (graph, profile, cluster, num_stages), such as `optimal`."""


def uniform(graph: ModelGraph, profile: Profile, cluster: Cluster, num_stages: int) -> Partition:
    """Returns the split whose longest stage has the fewest layers."""
    return _alone("uniform", graph, profile, num_stages, [1] * len(graph.layers))


def by_parameters(graph: ModelGraph, profile: Profile, cluster: Cluster, num_stages: int) -> Partition:
    """Returns the split whose largest stage has the fewest bytes of parameters."""
    return _alone("by_parameters", graph, profile, num_stages, [layer.parameter_bytes for layer in profile.layers])


def by_memory(
    graph: ModelGraph,
    profile: Profile,
    cluster: Cluster,
    num_stages: int,
    *,
    optimizer_slots: int = 2,
    microbatches: int = 1,
) -> Partition:
    """Returns the split whose largest stage has the fewest bytes of weights, gradients, optimizer state, activations.

    A layer takes parameter_bytes · (2 + optimizer_slots) + microbatches · saved_bytes: its weights, their gradients, as
    many values per weight as the optimizer keeps (Adam's two moments; 1 for momentum, 0 for plain SGD), and the
    activations of the micro-batches in flight, the same number for every stage.
    """
    copies = 2 + optimizer_slots
    sizes = [layer.parameter_bytes * copies + microbatches * layer.saved_bytes for layer in profile.layers]
    return _alone("by_memory", graph, profile, num_stages, sizes)


def by_flops(graph: ModelGraph, profile: Profile, cluster: Cluster, num_stages: int) -> Partition:
    """Returns the split whose largest stage has the fewest floating-point operations."""
    return _alone("by_flops", graph, profile, num_stages, [layer.flops for layer in profile.layers])


def by_time(graph: ModelGraph, profile: Profile, cluster: Cluster, num_stages: int) -> Partition:
    """Returns the split whose slowest stage takes the fewest profiled seconds; speeds and borders are ignored."""
    return _alone("by_time", graph, profile, num_stages, [layer.seconds for layer in profile.layers])


def optimal(
    graph: ModelGraph, profile: Profile, cluster: Cluster, num_stages: int, *, overlap: bool = False
) -> Partition:
    """Returns the split whose slowest stage takes the fewest seconds per micro-batch, transfers included.

    The cost of a stage is that of `stage_seconds`; stage s runs on rank s % num_ranks.
    """
    _check(graph, profile, num_stages)
    seconds, crossing = [layer.seconds for layer in profile.layers], _crossing_seconds(graph, profile, cluster)
    return _solve("optimal", graph, seconds, crossing, _speeds(cluster, num_stages), overlap)


def manual(
    graph: ModelGraph, profile: Profile, cluster: Cluster, num_stages: int, *, balance: Sequence[int]
) -> Partition:
    """Returns the split with the given number of layers per stage.

    Raises PartitionError where the counts do not add up, or ask for a cut that is not legal.
    """
    _check(graph, profile, num_stages)
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


def stage_seconds(
    graph: ModelGraph, profile: Profile, cluster: Cluster, partition: Partition, *, overlap: bool = False
) -> tuple[float, ...]:
    """Returns the seconds that each stage of any partition costs per micro-batch; `optimal` minimises their maximum.

    That is its profiled seconds over the speed of rank s % num_ranks, plus the transfers over both of its borders: the
    bytes that cross, forward as activations and back as gradients. With `overlap`, transfers run beside the compute,
    and the cost is the maximum of compute, traffic in and traffic out (Narayanan et al., PipeDream, SOSP 2019, §3.1).
    """
    seconds, crossing = [layer.seconds for layer in profile.layers], _crossing_seconds(graph, profile, cluster)
    return _stage_costs(partition.bounds, seconds, crossing, _speeds(cluster, partition.num_stages), overlap)


def _alone(method: str, graph: ModelGraph, profile: Profile, num_stages: int, costs: Sequence[float]) -> Partition:
    """Returns the exact min-max of one quantity, with equal devices and free borders."""
    _check(graph, profile, num_stages)
    return _solve(method, graph, costs, np.zeros(len(graph.layers) + 1), [1.0] * num_stages, overlap=False)


def _solve(
    method: str, graph: ModelGraph, costs: Sequence[float], crossing: Floats, speeds: Sequence[float], overlap: bool
) -> Partition:
    """Returns the exact min-max; `crossing` holds the cost of a border at each cut, and 0 at both ends."""
    for i, cost in enumerate(costs):
        if not (math.isfinite(cost) and cost >= 0):
            raise PartitionError(
                f"{method}: layer {graph.layers[i].name} costs {cost}; expected a finite number from 0 up"
            )
    positions = [0, *graph.cuts, len(graph.layers)]
    chain = Chain.of(np.array(costs, dtype=np.float64), crossing[positions], positions, speeds, overlap)
    bounds = tuple(positions[k] for k in split(chain))
    bottleneck = max(_stage_costs(bounds, costs, crossing, speeds, overlap))
    lower = max(max(costs) / max(speeds), math.fsum(costs) / math.fsum(speeds))
    return Partition(bounds, method, bottleneck, min(lower, bottleneck))


def _stage_costs(
    bounds: Sequence[int], costs: Sequence[float], crossing: Floats, speeds: Sequence[float], overlap: bool
) -> tuple[float, ...]:
    stages = []
    for start, end, speed in zip(bounds, bounds[1:], speeds, strict=False):
        parts = (math.fsum(costs[start:end]) / speed, float(crossing[start]), float(crossing[end]))
        stages.append(max(parts) if overlap else math.fsum(parts))
    return tuple(stages)


def _check(graph: ModelGraph, profile: Profile, num_stages: int) -> None:
    """Raises PartitionError unless the profile fits the graph and the graph can have that many stages."""
    if len(profile.layers) != len(graph.layers):
        raise PartitionError(f"the profile has {len(profile.layers)} layers, the model {len(graph.layers)}")
    if num_stages < 1:
        raise PartitionError(f"{num_stages} stages; expected at least 1")
    if num_stages > len(graph.cuts) + 1:
        raise PartitionError(
            f"{num_stages} stages, but the model has {len(graph.layers)} layers that can be cut in {len(graph.cuts)} "
            f"places; expected at most {len(graph.cuts) + 1}"
        )


def _speeds(cluster: Cluster, num_stages: int) -> list[float]:
    """Returns the speed of each stage's device: stage s is on rank s % num_ranks."""
    speeds = [cluster.speed(stage % cluster.num_ranks) for stage in range(num_stages)]
    for stage, speed in enumerate(speeds):
        if not (math.isfinite(speed) and speed > 0):
            raise PartitionError(f"rank {stage % cluster.num_ranks} has speed {speed}; expected a number above 0")
    return speeds


def _crossing_seconds(graph: ModelGraph, profile: Profile, cluster: Cluster) -> Floats:
    """Returns the seconds of transfers over a border at each position: activations there, gradients back.

    One rank alone sends nothing, whatever its number of stages.
    """
    num_bytes = np.zeros(len(graph.layers) + 1)
    for value in graph.values:  # graph.crossing_bytes of every cut at once
        if not (math.isfinite(value.bytes_per_sample) and value.bytes_per_sample >= 0):
            raise PartitionError(
                f"value {value.name} has {value.bytes_per_sample} bytes per sample; expected a finite number from 0 up"
            )
        if value.producer != BATCH:
            num_bytes[value.producer + 1 : max(value.consumers) + 1] += value.bytes_per_sample
    if cluster.num_ranks == 1:
        return np.zeros_like(num_bytes)
    link = cluster.link
    if not (math.isfinite(link.latency) and link.latency >= 0 and link.bandwidth > 0):
        raise PartitionError(f"{link}; expected a finite latency from 0 up, and a bandwidth above 0")
    seconds = np.array([2 * link.hand_off(size) for size in (num_bytes * profile.microbatch_size).tolist()])
    seconds[[0, -1]] = 0.0
    return seconds
