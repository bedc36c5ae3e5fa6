"""How far `optimal` stays from all devices working the same time, and what keeps it from that."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from modelpar.planning.partition import together
from modelpar.planning.partitioners import optimal, stage_seconds
from modelpar.planning.plan import Plan

_WORTH_SAYING = 0.05
_SAME = 1.001
_FAR = 2.0
"""How many times the ideal stage a stage takes before its layers are not looked at, where hand-offs are most of it."""


def imbalance(plan: Plan) -> str:
    """Returns a sentence on why the slowest stage takes longer than the ideal one, all times seen relative to that.

    The ideal stage is what each rank would have if the work could be cut anywhere and hand-offs took no time. Empty
    where the slowest one takes up to 5 % more, or where the partition is not by `optimal`::

        Stage 2 takes 24 % longer than the ideal stage, as in any split: h3 alone is 124 % of it.
        Stage 2 takes 24 % longer than the ideal stage: h3 alone is 61 % of it.
        Stage 2 takes 24 % longer than the ideal stage: hand-offs are 22 % of its time.
        Stage 2 takes 24 % longer than the ideal stage: with more memory per device it would be 3 %.
    """
    graph, profile, cluster, partition = plan.graph, plan.profile, plan.cluster, plan.partition
    bottleneck, lower_bound = partition.bottleneck, partition.lower_bound
    if partition.method != "optimal" or not bottleneck or lower_bound is None:
        return ""
    homes = plan.schedule.stage_to_rank
    seconds = [layer.seconds for layer in profile.layers]
    ideal = math.fsum(seconds) / math.fsum(cluster.speed(rank) for rank in homes)
    if bottleneck <= ideal * (1 + _WORTH_SAYING):
        return ""
    both = [
        stage_seconds(graph, profile, cluster, partition, overlap=overlap, stage_to_rank=homes)
        for overlap in (False, True)
    ]
    costs = min(both, key=lambda costs: abs(max(costs) - bottleneck))
    slowest = costs.index(max(costs))
    start = f"Stage {slowest} takes {_percent(max(costs) / ideal - 1)} longer than the ideal stage"
    own, speed = partition.layers(slowest), cluster.speed(homes[slowest])
    compute = math.fsum(seconds[i] for i in own) / speed
    handing_on = f"{start}: hand-offs are {_percent(1 - compute / max(costs))} of its time."
    if max(costs) > ideal * _FAR and compute - ideal < 0.5 * (max(costs) - ideal):
        return handing_on
    runs = [range(*pair) for pair in itertools.pairwise((0, *graph.cuts, len(seconds)))]
    taken = [math.fsum(seconds[i] for i in run) for run in runs]

    def alone(k: int, speed: float) -> str:
        return (
            f"{together([graph.layers[i].name for i in runs[k]])} alone is {_percent(taken[k] / speed / ideal)} of it"
        )

    if lower_bound > ideal * _SAME:
        fastest = max(cluster.speed(rank) for rank in homes)
        least = f"at least {_percent(lower_bound / ideal - 1)} in any split"
        least = "as in any split" if bottleneck <= lower_bound * _SAME else least
        return f"{start}, {least}: {alone(taken.index(max(taken)), fastest)}."
    if cluster.limited:
        free = optimal(graph, profile, replace(cluster, memory=()), plan.num_stages, overlap=costs is both[1])
        if free.bottleneck and free.bottleneck * _SAME < bottleneck:
            more = _percent(max(0.0, free.bottleneck / ideal - 1))
            return f"{start}: with more memory per device it would be {more}."
    if compute <= ideal * (1 + _WORTH_SAYING):
        return handing_on
    largest = max((k for k, run in enumerate(runs) if run.start in own), key=lambda k: taken[k])
    return f"{start}: {alone(largest, speed)}."


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
