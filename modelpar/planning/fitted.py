"""A plan with the costs that a run of it has shown: `fitted`. What its changes would bring is simulated from there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median, median_low
from typing import Any

from modelpar.planning.cluster import Link
from modelpar.planning.flow import Flow, flow, usual_transfers
from modelpar.planning.plan import Plan
from modelpar.planning.profile import LayerCost
from modelpar.planning.simulate import predict
from modelpar.planning.timeline import COMPUTE, Timeline

_SLOW = 1.2
"""How many times longer than the others a rank must take for its layers before the rank, not the profile, is blamed."""


@dataclass(frozen=True)
class Fitted:
    """A plan whose simulation is as near to what was measured as its costs can bring it."""

    plan: Plan
    slowness: tuple[float, ...]
    """Per rank how many times longer its layers take than profiled, relative to the usual rank; 1 where that is within
    what profiles are worth. All 1 where no profile was measured: layers may then well cost something else."""
    seconds: float
    """Simulated step time."""
    error: float
    """That over the measured one, − 1: what the simulation does not explain."""


def fitted(plan: Plan, timelines: Sequence[Timeline]) -> Fitted:
    """Returns a plan with the costs that one or more timelines of full batches show.

    Medians over micro-batches and timelines replace what the profile says: of each stage's forward and backward, shared
    out over its layers as profiled; of norms and optimizer; of the wait for data; of sending, and of values' way. A
    rank that takes far longer for its layers than others do for theirs gets a lower speed instead.
    """
    expected = predict(plan)
    flows, known = ([_flow(plan, each) for each in group] for group in (timelines, (expected,)))
    slowness = _slowness(plan, timelines, expected)
    speeds = tuple(plan.cluster.speed(rank) / slow for rank, slow in enumerate(slowness))
    links = tuple((first, second, _link(link, flows, known)) for first, second, link in plan.cluster.links)
    cluster = replace(plan.cluster, speeds=speeds, link=_link(plan.cluster.link, flows, known), links=links)
    layers = [
        layer for stage in range(plan.num_stages) for layer in _layers(plan, stage, timelines, speeds, cluster.link)
    ]
    found = replace(plan, cluster=cluster, profile=replace(plan.profile, layers=tuple(layers)), prediction=None)
    seconds, measured = predict(found).makespan, median(timeline.makespan for timeline in timelines)
    return Fitted(found, slowness, seconds, seconds / measured - 1.0 if measured else 0.0)


def _flow(plan: Plan, timeline: Timeline) -> Flow:
    return flow(timeline, plan.stage_graph, plan.schedule.stage_to_rank)


def _slowness(plan: Plan, timelines: Sequence[Timeline], expected: Timeline) -> tuple[float, ...]:
    took, profiled = _usual_seconds(plan, timelines), _usual_seconds(plan, [expected])
    if plan.profile.source != "measured" or not all(profiled):
        return (1.0,) * plan.num_ranks
    ratios = [own / before for own, before in zip(took, profiled, strict=True)]
    usual = median_low(ratios)
    return tuple(ratio / usual if usual and ratio > _SLOW * usual else 1.0 for ratio in ratios)


def _usual_seconds(plan: Plan, timelines: Sequence[Timeline]) -> list[float]:
    """Returns per rank what one micro-batch usually takes in all its stages; one slow computation does not count."""
    known: defaultdict[tuple[int, str], list[float]] = defaultdict(list)
    for span in (span for timeline in timelines for span in timeline.spans if span.kind in COMPUTE):
        known[span.stage, span.kind].append(span.seconds)
    found = [0.0] * plan.num_ranks
    for (stage, _), seconds in known.items():
        found[plan.schedule.stage_to_rank[stage]] += median(seconds)
    return found


def _link(link: Link, flows: Sequence[Flow], known: Sequence[Flow]) -> Link:
    """Returns a link with as much more latency, and time to send, as values took longer than expected."""

    def sends(flows: Sequence[Flow]) -> list[float]:
        return [span.seconds for each in flows for span in each.timeline.spans if span.kind == "send"]

    def ways(flows: Sequence[Flow]) -> list[float]:
        return [seconds for each in flows for seconds in usual_transfers(each).values()]

    def more(found: list[float], expected: list[float]) -> float:
        return median(found) - median(expected) if found and expected else 0.0

    return replace(
        link,
        latency=max(0.0, link.latency + more(ways(flows), ways(known))),
        send_seconds=max(0.0, link.send_seconds + more(sends(flows), sends(known))),
        data_seconds=median(max(_seconds(each.timeline, "data"), default=0.0) for each in flows),
        end_seconds=0.0,
    )


def _layers(
    plan: Plan, stage: int, timelines: Sequence[Timeline], speeds: Sequence[float], link: Link
) -> list[LayerCost]:
    """Returns the layers of a stage with what they took together, shared out as profiled."""
    layers = [plan.profile.layers[i] for i in plan.partition.layers(stage)]
    rank = plan.schedule.stage_to_rank[stage]
    on_rank = sum(home == rank for home in plan.schedule.stage_to_rank)

    def took(kind: str) -> float | None:
        found = [s.seconds for each in timelines for s in each.spans if s.kind == kind and s.stage == stage]
        return max(0.0, median(found) * speeds[rank] - link.action_seconds) if found else None

    def at_end(kind: str) -> float:
        found = [sum(s.seconds for s in each.of_rank(rank) if s.kind == kind) for each in timelines]
        return median(found) * speeds[rank] / on_rank

    forward, both, inputs, weights = (took(kind) for kind in "FBIW")
    backward = sum(layer.backward_seconds for layer in layers)
    part = sum(layer.input_grad_seconds for layer in layers) / backward if backward else 0.5
    if both is not None:
        inputs, weights = both * part, both * (1.0 - part)
    seconds = {
        "forward_seconds": forward,
        "input_grad_seconds": inputs,
        "weight_grad_seconds": weights,
        "reduce_seconds": at_end("reduce"),
        "update_seconds": at_end("optimizer"),
    }
    shared = {name: _share_out(layers, name, total) for name, total in seconds.items() if total is not None}
    found = []
    for i, layer in enumerate(layers):
        costs: dict[str, Any] = {name: values[i] for name, values in shared.items()}
        found.append(replace(layer, **costs, cold_seconds=0.0))
    return found


def _share_out(layers: Sequence[LayerCost], name: str, total: float) -> list[float]:
    """Shares out seconds as the profile has them; where it has none, by parameters, or else evenly."""
    for weights in ([getattr(layer, name) for layer in layers], [float(layer.parameter_bytes) for layer in layers]):
        if sum(weights) > 0:
            return [total * weight / sum(weights) for weight in weights]
    return [total / len(layers)] * len(layers)


def _seconds(timeline: Timeline, kind: str) -> Iterable[float]:
    """Yields per rank the seconds of a kind of span."""
    return (sum(s.seconds for s in timeline.of_rank(rank) if s.kind == kind) for rank in range(timeline.num_ranks))
