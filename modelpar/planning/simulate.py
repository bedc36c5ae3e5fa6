"""Predicts when everything happens: a schedule and costs give a Timeline, as a real step does.

With F = 1 s, B = 2 s and 1 s per message (`...` waits)::

    rank 0   0F0 0F1 ... ... ... ... 0B0 0B0 ... 0B1 0B1
    rank 1   ... ... 1F0 1B0 1B0 1F1 1B1 1B1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modelpar.errors import DeadlockError, PlanError
from modelpar.planning.analysis import analyse
from modelpar.planning.cluster import Cluster
from modelpar.planning.graph import BATCH, StageGraph
from modelpar.planning.partition import Partition
from modelpar.planning.plan import Plan, Prediction
from modelpar.planning.profile import Profile
from modelpar.planning.schedule import Action, Op, Schedule, ValueKey, gives, needs
from modelpar.planning.timeline import Span, Timeline


@dataclass(frozen=True)
class StageCost:
    """Seconds of one stage for one micro-batch, on a device of speed 1."""

    forward_seconds: float
    input_grad_seconds: float
    weight_grad_seconds: float

    def seconds(self, op: Op) -> float:
        """Returns the seconds of an op; a full backward is input gradient plus weight gradient."""
        return {
            Op.FORWARD: self.forward_seconds,
            Op.BACKWARD: self.input_grad_seconds + self.weight_grad_seconds,
            Op.INPUT_GRAD: self.input_grad_seconds,
            Op.WEIGHT_GRAD: self.weight_grad_seconds,
        }[op]


def stage_costs(profile: Profile, partition: Partition) -> tuple[StageCost, ...]:
    """Returns the cost of each stage: the sums over its layers.

    Raises PlanError where the profile and the partition are of different models.
    """
    if partition.num_layers != len(profile.layers):
        raise PlanError(f"the partition has {partition.num_layers} layers, the profile {len(profile.layers)}")
    costs = []
    for stage in range(partition.num_stages):
        layers = [profile.layers[i] for i in partition.layers(stage)]
        costs.append(
            StageCost(
                sum(layer.forward_seconds for layer in layers),
                sum(layer.input_grad_seconds for layer in layers),
                sum(layer.weight_grad_seconds for layer in layers),
            )
        )
    return tuple(costs)


def simulate(
    schedule: Schedule,
    costs: Sequence[StageCost],
    graph: StageGraph,
    cluster: Cluster,
    microbatch_size: float = 1,
) -> Timeline:
    """Returns the timeline of one step: compute spans, and the waits between them, each named by what came last.

    Every rank runs its list in order, one action at a time. An action starts once its rank is free and all that it
    needs has arrived. What it gives leaves at its end and arrives after latency + bytes / bandwidth, at once on the
    same rank; sending does not block. Messages do not share bandwidth. The optimizer's update is not simulated.

    `costs` holds one entry per stage, in seconds at speed 1; `microbatch_size` is in samples.

    Raises PlanError where the arguments do not fit together, and DeadlockError where no rank can go on: a legal
    schedule can still wait for ever for the gradient of a tied tensor that is added per micro-batch.
    """
    _check(schedule, costs, graph, cluster)
    flows = _flows(schedule, costs, graph, cluster, microbatch_size)
    queues = [list(schedule.actions(rank)) for rank in range(schedule.num_ranks)]
    position, clock = [0] * schedule.num_ranks, [0.0] * schedule.num_ranks
    spans: list[list[Span]] = [[] for _ in queues]
    arrived: dict[tuple[ValueKey, int], float] = {}
    waiting: dict[tuple[ValueKey, int], int] = {}
    ready = list(range(schedule.num_ranks))
    while ready:
        rank = ready.pop()
        queue, now = queues[rank], clock[rank]
        while position[rank] < len(queue):
            stage, op, microbatch = queue[position[rank]]
            seconds, inputs, outputs = flows[stage, op]
            lacking = next((key for key in inputs if (key, microbatch) not in arrived), None)
            if lacking:
                waiting[lacking, microbatch] = rank
                break
            arrivals = [(arrived.pop((key, microbatch)), key) for key in inputs]
            latest, last = max(arrivals, default=(now, None))
            if last and latest > now:
                cause = str(last._replace(microbatch=microbatch))
                spans[rank].append(Span(rank, "wait", now, latest, stage, microbatch, cause))
                now = latest
            spans[rank].append(Span(rank, op.value, now, now + seconds, stage, microbatch))
            now += seconds
            for key, delay in outputs:
                arrived[key, microbatch] = now + delay
                if (key, microbatch) in waiting:
                    ready.append(waiting.pop((key, microbatch)))
            position[rank] += 1
        clock[rank] = now
    _check_finished(queues, position, waiting)
    return Timeline(schedule.num_ranks, tuple(span for of_rank in spans for span in of_rank))


def predict(plan: Plan) -> Timeline:
    """Returns the timeline that a plan should have with full micro-batches of its profile's size."""
    costs = stage_costs(plan.profile, plan.partition)
    return simulate(plan.schedule, costs, plan.stage_graph, plan.cluster, plan.profile.microbatch_size)


def prediction(timeline: Timeline) -> Prediction:
    """Returns a timeline's few numbers that a plan keeps."""
    analysis = analyse(timeline)
    return Prediction(analysis.makespan, analysis.bubble, tuple(rank.utilization for rank in analysis.ranks))


_Flow = tuple[float, list[ValueKey], list[tuple[ValueKey, float]]]


def _flows(
    schedule: Schedule, costs: Sequence[StageCost], graph: StageGraph, cluster: Cluster, microbatch_size: float
) -> dict[tuple[int, Op], _Flow]:
    """Returns per stage and op its seconds, the keys it needs, and the keys it gives with their travel times.

    The keys are those of micro-batch 0: micro-batches of one stage and op differ in nothing else, so that `needs` and
    `gives` are asked once for all of them.
    """
    num_bytes = {("tied_grad", tie.names[0]): float(tie.bytes) for tie in graph.tied}
    for value in graph.values:
        num_bytes["value", value.name] = num_bytes["grad", value.name] = value.bytes_per_sample * microbatch_size
    home = schedule.stage_to_rank
    flows: dict[tuple[int, Op], _Flow] = {}
    for stage in range(schedule.num_stages):
        for op in (Op.FORWARD, Op.BACKWARD, Op.INPUT_GRAD, Op.WEIGHT_GRAD):
            action = Action(stage, op, 0)
            outputs = [
                (key, 0.0 if home[key.target] == home[stage] else cluster.link.seconds(num_bytes[key.kind, key.name]))
                for key in gives(graph, action)
                if key.target != BATCH
            ]
            inputs = [key for key in needs(graph, action) if key.source != BATCH]
            flows[stage, op] = (costs[stage].seconds(op) / cluster.speed(home[stage]), inputs, outputs)
    return flows


def _check(schedule: Schedule, costs: Sequence[StageCost], graph: StageGraph, cluster: Cluster) -> None:
    """Raises PlanError unless all four speak of the same stages and ranks."""
    if not schedule.num_stages == graph.num_stages == len(costs):
        raise PlanError(
            f"the schedule has {schedule.num_stages} stages, the graph {graph.num_stages}, "
            f"and there are {len(costs)} stage costs; expected equal numbers"
        )
    if cluster.num_ranks != schedule.num_ranks:
        raise PlanError(f"the cluster has {cluster.num_ranks} ranks, the schedule {schedule.num_ranks}")


def _check_finished(
    queues: Sequence[Sequence[Action]], position: Sequence[int], waiting: dict[tuple[ValueKey, int], int]
) -> None:
    """Raises DeadlockError for the first rank that still waits, if there is one."""
    if waiting:
        (key, microbatch), rank = min(waiting.items(), key=lambda item: item[1])
        action = queues[rank][position[rank]]
        value = key._replace(microbatch=microbatch)
        raise DeadlockError(f"rank {rank} can never run {action}: it waits for {value}, which never comes")
