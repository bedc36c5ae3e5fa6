"""Predicts when everything happens: a schedule and costs give a Timeline, as a real step does.

With F = 1 s, B = 2 s and 1 s per message (`...` waits)::

    rank 0   0F0 0F1 ... ... ... ... 0B0 0B0 ... 0B1 0B1
    rank 1   ... ... 1F0 1B0 1B0 1F1 1B1 1B1
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from modelpar.errors import DeadlockError, PlanError
from modelpar.planning.analysis import analyse
from modelpar.planning.cluster import Cluster, Link
from modelpar.planning.graph import BATCH, StageGraph
from modelpar.planning.partition import Partition
from modelpar.planning.plan import Plan, Prediction
from modelpar.planning.profile import Profile
from modelpar.planning.schedule import Action, Op, Schedule, ValueKey, gives, needs
from modelpar.planning.timeline import COMPUTE, Span, Timeline


@dataclass(frozen=True)
class StageCost:
    """Seconds of one stage for one micro-batch, and for the end of a step, on a device of speed 1."""

    forward_seconds: float
    input_grad_seconds: float
    weight_grad_seconds: float
    reduce_seconds: float = 0.0
    update_seconds: float = 0.0
    cold_seconds: float = 0.0
    """How much longer the first forward of a step takes."""

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
                sum(layer.reduce_seconds for layer in layers),
                sum(layer.update_seconds for layer in layers),
                sum(layer.cold_seconds for layer in layers),
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
    """Returns the timeline of one step: compute, sends, waits named by what came last, and the end of the step.

    Every rank runs its list in order, one action at a time. An action starts once its rank is free, all that it needs
    has arrived, and the rank has taken it; then the rank sends what the action gives. What that costs each side, and
    how long it is on its way, is said by `cluster.link_between`; on the same rank it is there at once. The wire is not
    part of what a rank does, and messages do not share bandwidth. The end of the step (the count, the norms, the
    optimizer) is part of it where `costs` say what it takes.

    `costs` holds one entry per stage, in seconds at speed 1; `microbatch_size` is in samples.

    Raises PlanError where the arguments do not fit together, and DeadlockError where no rank can go on: a legal
    schedule can still wait for ever for the gradient of a tied tensor that is added per micro-batch.
    """
    _check(schedule, costs, graph, cluster)
    flows = _Flows(schedule, costs, graph, cluster, microbatch_size)
    queues = [list(flows.of_rank(rank)) for rank in range(schedule.num_ranks)]
    position, clock = [0] * schedule.num_ranks, [0.0] * schedule.num_ranks
    spans: list[list[Span]] = [[] for _ in queues]
    arrived: dict[tuple[ValueKey, int], float] = {}
    waiting: dict[tuple[ValueKey, int], int] = {}
    ready = list(range(schedule.num_ranks))
    while ready:
        rank = ready.pop()
        queue, now = queues[rank], clock[rank]
        while position[rank] < len(queue):
            flow, stage, microbatch = queue[position[rank]]
            lacking = next((key for key, _ in flow.inputs if (key, microbatch) not in arrived), None)
            if lacking:
                waiting[lacking, microbatch] = rank
                break
            if flow.from_batch and not spans[rank]:
                now = cluster.link.data_seconds
                if now:
                    spans[rank].append(Span(rank, "data", 0.0, now, stage, microbatch, str(flow.from_batch[0])))
            arrivals = [(arrived.pop((key, microbatch)), key) for key, _ in flow.inputs]
            latest, last = max(arrivals, default=(now, None))
            if last and latest > now:
                cause = str(last._replace(microbatch=microbatch))
                spans[rank].append(Span(rank, "wait", now, latest, stage, microbatch, cause))
                now = latest
            now += sum(taking for _, taking in flow.inputs)
            if flow.seconds or flow.kind in COMPUTE:
                spans[rank].append(Span(rank, flow.kind, now, now + flow.seconds, stage, microbatch))
            now += flow.seconds
            begun = now
            for key, sending, travelling in flow.outputs:
                now += sending
                arrived[key, microbatch] = now + travelling
                if (key, microbatch) in waiting:
                    ready.append(waiting.pop((key, microbatch)))
            if now > begun:
                kind = "send" if flow.kind in COMPUTE else flow.kind
                spans[rank].append(Span(rank, kind, begun, now, stage, microbatch))
            position[rank] += 1
        clock[rank] = now
    _check_finished(queues, position, waiting)
    return Timeline(schedule.num_ranks, tuple(span for of_rank in spans for span in of_rank))


def predict(plan: Plan) -> Timeline:
    """Returns the timeline that a plan should have with full micro-batches of its profile's size."""
    costs = stage_costs(plan.profile, plan.partition)
    graph = replace(plan.stage_graph, clips=plan.profile.clips)
    return simulate(plan.schedule, costs, graph, plan.cluster, plan.profile.microbatch_size)


def prediction(timeline: Timeline) -> Prediction:
    """Returns a timeline's few numbers that a plan keeps."""
    analysis = analyse(timeline)
    return Prediction(analysis.makespan, analysis.bubble, tuple(rank.utilization for rank in analysis.ranks))


class _Flow(NamedTuple):
    """One thing that a rank does: what it takes, how long it works, what it sends."""

    kind: str
    """Of its span."""
    seconds: float
    inputs: list[tuple[ValueKey, float]]
    """Values from other stages, and how long taking each keeps the rank busy."""
    outputs: list[tuple[ValueKey, float, float]]
    """Values for other stages, how long sending each keeps the rank busy, and how long it is on its way."""
    from_batch: list[ValueKey]


_Item = tuple[_Flow, int, int]
"""A flow with its stage and micro-batch, −1 at the end of the step."""


class _Flows:
    """What each rank does in turn.

    The keys are those of micro-batch 0: micro-batches of one stage and op differ in nothing else, so that `needs` and
    `gives` are asked once for all of them.
    """

    def __init__(
        self,
        schedule: Schedule,
        costs: Sequence[StageCost],
        graph: StageGraph,
        cluster: Cluster,
        microbatch_size: float,
    ):
        self._schedule, self._costs, self._graph, self._cluster = schedule, costs, graph, cluster
        self._home = schedule.stage_to_rank
        self._bytes = {("tied_grad", tie.names[0]): float(tie.bytes) for tie in graph.tied}
        self._bytes |= {("weight", tie.names[0]): float(tie.bytes) for tie in graph.tied}
        for value in graph.values:
            size = value.bytes_per_sample * microbatch_size
            self._bytes["value", value.name] = self._bytes["grad", value.name] = size

    def of_rank(self, rank: int) -> Iterator[_Item]:
        """Yields a rank's actions, then what it does at the end of the step."""
        flows: dict[tuple[int, Op], _Flow] = {}
        speed, overhead = self._cluster.speed(rank), self._cluster.link.action_seconds
        for stage, op, microbatch in self._schedule.actions(rank):
            if (stage, op) not in flows:
                seconds = self._costs[stage].seconds(op) / speed + overhead
                action = Action(stage, op, 0)
                flow = self._flow(op.value, seconds, needs(self._graph, action), gives(self._graph, action))
                flows[stage, op] = flow
                if op is Op.FORWARD:
                    flow = flow._replace(seconds=seconds + self._costs[stage].cold_seconds / speed)
                yield flow, stage, microbatch
            else:
                yield flows[stage, op], stage, microbatch
        if self._schedule.kind == "train" and any(cost.reduce_seconds or cost.update_seconds for cost in self._costs):
            yield from self._end(rank)

    def _end(self, rank: int) -> Iterator[_Item]:
        """Yields the end of the step as a rank does it: count, tied gradients, norms, clipping, optimizer, weights."""
        stages = [stage for stage, home in enumerate(self._home) if home == rank]
        speed, link = self._cluster.speed(rank), self._cluster.link
        reducing = sum(self._costs[stage].reduce_seconds for stage in stages) / speed + link.end_seconds
        updating = sum(self._costs[stage].update_seconds for stage in stages) / speed
        for stage in stages:
            yield self._gives(stage, "count")
        for stage in stages:
            yield self._needs(stage, "count")
        for stage in reversed(stages):
            yield self._needs(stage, "tied_grad")
            yield self._gives(stage, "tied_grad")
        yield _Flow("reduce", reducing, [], [], []), -1, -1
        for stage in stages:
            yield self._gives(stage, "norms")
        if 0 in stages:
            yield self._needs(0, "norms")
            yield self._gives(0, "total_norm")
        for stage in stages:
            yield self._needs(stage, "total_norm")
        yield _Flow("optimizer", updating, [], [], []), -1, -1
        for stage in stages:
            yield self._gives(stage, "weight")
        for stage in stages:
            yield self._needs(stage, "weight")

    def _needs(self, stage: int, kind: str) -> _Item:
        keys = [key for key in needs(self._graph, Action(stage, Op.UPDATE)) if key.kind == kind]
        return self._flow("reduce", 0.0, keys, []), stage, -1

    def _gives(self, stage: int, kind: str) -> _Item:
        keys = [key for key in gives(self._graph, Action(stage, Op.UPDATE)) if key.kind == kind]
        return self._flow("reduce", 0.0, [], keys), stage, -1

    def _flow(self, kind: str, seconds: float, needed: list[ValueKey], given: list[ValueKey]) -> _Flow:
        inputs, outputs = [], []
        for key in needed:
            if key.source != BATCH:
                link = self._link(key)
                inputs.append((key, link.take(self._size(key)) if link else 0.0))
        for key in given:
            if key.target != BATCH:
                link = self._link(key)
                cost = (link.send(self._size(key)), link.seconds(self._size(key))) if link else (0.0, 0.0)
                outputs.append((key, *cost))
        return _Flow(kind, seconds, inputs, outputs, [key for key in needed if key.source == BATCH])

    def _link(self, key: ValueKey) -> Link | None:
        """Returns what a value travels over, None where both stages are on one rank."""
        ranks = self._home[key.source], self._home[key.target]
        return None if ranks[0] == ranks[1] else self._cluster.link_between(*ranks)

    def _size(self, key: ValueKey) -> float:
        return self._bytes.get((key.kind, key.name), 0.0)  # counts and norms are next to nothing


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
    queues: Sequence[Sequence[_Item]], position: Sequence[int], waiting: dict[tuple[ValueKey, int], int]
) -> None:
    """Raises DeadlockError for the first rank that still waits, if there is one."""
    if waiting:
        (key, microbatch), rank = min(waiting.items(), key=lambda item: item[1])
        flow, stage, number = queues[rank][position[rank]]
        action = Action(stage, Op(flow.kind) if flow.kind in COMPUTE else Op.UPDATE, number)
        value = key._replace(microbatch=microbatch)
        raise DeadlockError(f"rank {rank} can never run {action}: it waits for {value}, which never comes")
