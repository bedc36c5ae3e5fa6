"""What timelines show of a plan's costs: how long values are on their way, and what each stage's layers take.

Both undo what `simulate` does: found in a simulated timeline they are what that was simulated with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from modelpar.planning.cluster import Cluster, Link
from modelpar.planning.flow import Flow, ways
from modelpar.planning.plan import Plan
from modelpar.planning.profile import LayerCost
from modelpar.planning.timeline import Timeline, computations


def observed_cluster(cluster: Cluster, flows: Sequence[Flow], expected: Flow) -> Cluster:
    """Returns a cluster with as much more latency per pair of ranks, and time to send, as `flows` show than expected.

    Of pairs between which no value was waited for nothing is known; their links stay.
    """
    sends = _median([span.seconds for each in flows for span in each.timeline.spans if span.kind == "send"])
    usual = _median([span.seconds for span in expected.timeline.spans if span.kind == "send"])
    more = sends - usual if sends is not None and usual is not None else 0.0
    data = [
        max((_seconds(each.timeline, rank, "data") for rank in range(cluster.num_ranks)), default=0.0) for each in flows
    ]

    def observed(link: Link, latency: float) -> Link:
        return replace(
            link,
            latency=max(0.0, latency),
            send_seconds=max(0.0, link.send_seconds + more),
            data_seconds=median(data),
        )

    known = ways([expected])
    links = {(first, second): observed(link, link.latency) for first, second, link in cluster.links}
    for pair, seconds in ways(flows).items():
        link = cluster.link_between(*pair)
        links[pair] = observed(link, link.latency + seconds - known.get(pair, link.latency))
    return replace(
        cluster,
        link=observed(cluster.link, cluster.link.latency),
        links=tuple((*pair, link) for pair, link in sorted(links.items())),
    )


def observed_layers(
    plan: Plan, stage: int, timelines: Sequence[Timeline], speeds: Sequence[float], expected: Timeline
) -> list[LayerCost]:
    """Returns the layers of a stage with what they took together, shared out as profiled.

    `speeds` are those of the ranks, by which the layers' seconds are divided; `expected` is the plan's prediction.
    """
    layers = [plan.profile.layers[i] for i in plan.partition.layers(stage)]
    rank, link = plan.schedule.stage_to_rank[stage], plan.cluster.link
    of_rank = [other for other, home in enumerate(plan.schedule.stage_to_rank) if home == rank]
    speed = speeds[rank]

    known = computations(timelines)

    def took(kind: str) -> float | None:
        found = known.get((stage, kind))
        return max(0.0, median(found) - link.action_seconds) * speed if found else None

    def at_end(kind: str, besides: float) -> float:
        found = median(_seconds(each, rank, kind) for each in timelines)
        return max(0.0, found - besides) * speed / len(of_rank)

    own = sum(plan.profile.layers[i].reduce_seconds for s in of_rank for i in plan.partition.layers(s))
    besides = _seconds(expected, rank, "reduce") - own / plan.cluster.speed(rank)  # what is no layer's: messages
    forward, both, inputs, weights = (took(kind) for kind in "FBIW")
    backward = sum(layer.backward_seconds for layer in layers)
    part = sum(layer.input_grad_seconds for layer in layers) / backward if backward else 0.5
    if both is not None:
        inputs, weights = both * part, both * (1.0 - part)
    profiled = sum(layer.forward_seconds for layer in layers)
    seconds = {
        "forward_seconds": forward,
        "input_grad_seconds": inputs,
        "weight_grad_seconds": weights,
        "reduce_seconds": at_end("reduce", besides),
        "update_seconds": at_end("optimizer", 0.0),
        "cold_seconds": sum(layer.cold_seconds for layer in layers) * (forward or 0.0) / (profiled or 1.0),
    }
    shared = {name: _share_out(layers, name, total) for name, total in seconds.items() if total is not None}
    found = []
    for i, layer in enumerate(layers):
        costs: dict[str, Any] = {name: values[i] for name, values in shared.items()}
        found.append(replace(layer, **costs))
    return found


def _share_out(layers: Sequence[LayerCost], name: str, total: float) -> list[float]:
    """Shares out seconds as the profile has them; where it has none, by parameters, or else evenly."""
    for weights in ([getattr(layer, name) for layer in layers], [float(layer.parameter_bytes) for layer in layers]):
        if sum(weights) > 0:
            return [total * weight / sum(weights) for weight in weights]
    return [total / len(layers)] * len(layers)


def _seconds(timeline: Timeline, rank: int, kind: str) -> float:
    """Returns how many seconds a rank spent in spans of a kind."""
    return sum(span.seconds for span in timeline.of_rank(rank) if span.kind == kind)


def _median(values: list[float]) -> float | None:
    return median(values) if values else None
