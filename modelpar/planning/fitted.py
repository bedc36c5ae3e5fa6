"""A plan with the costs that a run of it has shown: `fitted`. What its changes would bring is simulated from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median, median_low

from modelpar.planning.flow import flow
from modelpar.planning.observed import observed_cluster, observed_layers
from modelpar.planning.plan import Plan
from modelpar.planning.simulate import predict
from modelpar.planning.timeline import Timeline, computations

_SLOW = 1.3
"""How many times longer than the others a rank must take for its layers before the rank, not the profile, is blamed."""
_NOTHING = 1e-12
"""Seconds that stand for none where a profile has no end of a step, so that the simulation has one."""


@dataclass(frozen=True)
class Fitted:
    """A plan whose simulation is as near to what was measured as its costs can bring it."""

    plan: Plan
    slowness: tuple[float, ...]
    """Per rank how many times longer its layers take than profiled, relative to the usual rank; 1 where that is within
    what profiles are worth. All 1 where no profile was measured: layers may then well cost something else."""
    pace: float
    """How many times longer than profiled layers take on the usual rank; 1 where no profile was measured."""
    seconds: float
    """Simulated step time."""
    error: float
    """That over the measured one, − 1: what the simulation does not explain."""


def fitted(plan: Plan, timelines: Sequence[Timeline]) -> Fitted:
    """Returns a plan with the costs that one or more timelines of full batches show.

    Medians over micro-batches and timelines replace what the profile says: of each stage's forward and backward, shared
    out over its layers as profiled; of norms and optimizer; of the wait for data; of sending, and of the way between
    two ranks. A rank that takes far longer for its layers than others for theirs gets a lower speed instead.
    """
    expected = predict(_with_end(plan))
    flows = [flow(each, plan.stage_graph, plan.schedule.stage_to_rank) for each in (*timelines, expected)]
    pace, slowness = _pace(plan, timelines, expected)
    speeds = tuple(plan.cluster.speed(rank) / slow for rank, slow in enumerate(slowness))
    cluster = replace(observed_cluster(plan.cluster, flows[:-1], flows[-1]), speeds=speeds)
    stages = (observed_layers(plan, stage, timelines, speeds, expected) for stage in range(plan.num_stages))
    profile = replace(plan.profile, layers=tuple(layer for stage in stages for layer in stage))
    found = replace(plan, cluster=cluster, profile=profile, prediction=None)
    seconds, measured = predict(found).makespan, median(timeline.makespan for timeline in timelines)
    return Fitted(found, slowness, pace, seconds, seconds / measured - 1.0 if measured else 0.0)


def _with_end(plan: Plan) -> Plan:
    """Returns a plan that is simulated with the end of the step, as every step that is run has one."""
    layers = plan.profile.layers
    if plan.schedule.kind != "train" or any(layer.reduce_seconds or layer.update_seconds for layer in layers):
        return plan
    return replace(
        plan, profile=replace(plan.profile, layers=tuple(replace(x, reduce_seconds=_NOTHING) for x in layers))
    )


def _pace(plan: Plan, timelines: Sequence[Timeline], expected: Timeline) -> tuple[float, tuple[float, ...]]:
    """Returns the pace of the usual rank, and the slowness of each: no rank that keeps up with its profile is slow."""
    took, profiled = _usual_seconds(plan, timelines), _usual_seconds(plan, [expected])
    if plan.profile.source != "measured" or not all(profiled):
        return 1.0, (1.0,) * plan.num_ranks
    ratios = [own / before for own, before in zip(took, profiled, strict=True)]
    usual = median_low(ratios)
    return usual, tuple(ratio / usual if ratio > _SLOW * max(usual, 1.0) else 1.0 for ratio in ratios)


def _usual_seconds(plan: Plan, timelines: Sequence[Timeline]) -> list[float]:
    """Returns per rank what one micro-batch usually takes in all its stages; one slow computation does not count."""
    found = [0.0] * plan.num_ranks
    for (stage, _), seconds in computations(timelines).items():
        found[plan.schedule.stage_to_rank[stage]] += median(seconds)
    return found
