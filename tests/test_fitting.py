"""Splits that must fit into memory: against brute force over all splits, and against memory written out per stage."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelpar.errors import PartitionError
from modelpar.planning import partitioners, schedules
from modelpar.planning.cluster import Cluster, Link
from modelpar.planning.fitting import check_memory
from modelpar.planning.graph import BATCH, Layer, ModelGraph, Parameter, Tied, Value
from modelpar.planning.memory import MemoryModel, peak_microbatches_per_stage, stage_memory_bytes
from modelpar.planning.minmax import Chain, has_split, split
from modelpar.planning.partition import Partition
from modelpar.planning.partitioners import optimal, stage_seconds
from modelpar.planning.plan import Plan
from modelpar.planning.profile import LayerCost, Profile

SCHEDULES = (schedules.gpipe, schedules.one_f_one_b, schedules.fill_drain)


class Case(NamedTuple):
    graph: ModelGraph
    profile: Profile
    cluster: Cluster
    num_stages: int
    schedule: partitioners.Schedules

    def plan(self, bounds: tuple[int, ...]) -> Plan:
        order = self.schedule(self.cluster.num_ranks)
        return Plan(self.graph, self.profile, self.cluster, Partition(bounds), order)


def held(case: Case, start: int, end: int, in_flight: int, train: bool) -> int:
    """What a stage holds, written out: each tensor and each value that comes from elsewhere once."""
    graph, profile = case.graph, case.profile
    owner = {name: tie.names[0] for tie in graph.tied for name in tie.names}
    tensors = {owner.get(p.name, p.name): p for i in range(start, end) for p in graph.layers[i].parameters}
    total = 0
    for tensor in tensors.values():
        copies = 4 if train and tensor.trainable and not tensor.buffer else 1
        total += 4 * tensor.shape[0] * copies
    costs = profile.layers[start:end]
    if not train:
        return total + max(cost.output_bytes for cost in costs)
    kept = sum(cost.kept_bytes for cost in costs)
    for value in graph.values:
        if 0 <= value.producer < start and any(start <= consumer < end for consumer in value.consumers):
            kept += int(value.bytes_per_sample * profile.microbatch_size)
    return total + in_flight * kept + max(cost.temporary_bytes for cost in costs) + profile.slack_bytes


sizes = st.integers(0, 9)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n = draw(st.integers(1, 8))
    cuts = sorted(draw(st.sets(st.integers(1, n - 1)))) if n > 1 else []
    own = [Parameter(f"l{i}.w", (draw(sizes),), "float32", draw(st.booleans()), i % 3 == 2) for i in range(n)]
    shared = sorted(draw(st.sets(st.integers(0, n - 1), max_size=3)))
    names = tuple(f"l{i}.tied" for i in shared)
    length = draw(sizes)
    tied = (Tied(names, tuple(shared), 4 * length),) if len(shared) > 1 else ()
    layers = []
    for i, parameter in enumerate(own):
        copy = (Parameter(f"l{i}.tied", (length,), "float32", True),) if tied and i in shared else ()
        layers.append(Layer(f"l{i}", "Linear", (parameter, *copy)))
    values = [Value("inputs", BATCH, (0,), 8.0, needs_grad=False), Value("outputs", n - 1, (BATCH,), 8.0)]
    for a in range(n - 1):
        consumers = {a + 1} | draw(st.sets(st.integers(a + 1, n - 1), max_size=2))
        values.append(Value(f"v{a}", a, tuple(sorted(consumers)), float(draw(sizes))))
    costs = tuple(
        LayerCost(
            f"l{i}",
            *(draw(sizes) / 4 for _ in range(3)),
            output_bytes=draw(sizes),
            kept_bytes=draw(sizes),
            temporary_bytes=draw(sizes),
        )
        for i in range(n)
    )
    graph = ModelGraph(tuple(layers), tuple(values), tuple(cuts), tied)
    profile = Profile(costs, draw(st.integers(1, 2)), "measured", slack_bytes=draw(st.integers(0, 5)))
    num_stages = draw(st.integers(1, len(cuts) + 1))
    speeds = draw(st.sampled_from([(), tuple([1.0, 2.0, 0.5, 1.0] * 2)[:num_stages]]))
    memory = tuple(draw(st.one_of(st.integers(20, 400), st.none())) for _ in range(num_stages))
    link = draw(st.sampled_from([Link(), Link(0.5, 4.0)]))
    links = ((0, num_stages - 1, Link(2.0, 1.0)),) if num_stages > 1 and draw(st.booleans()) else ()
    cluster = Cluster(("cpu",) * num_stages, speeds, link, memory=memory, links=links)
    generator, num_microbatches = draw(st.sampled_from(SCHEDULES)), draw(st.integers(1, 4))
    return Case(graph, profile, cluster, num_stages, lambda ranks: generator(ranks, num_microbatches))


def splits(case: Case, num_stages: int):
    inner = itertools.combinations(case.graph.cuts, num_stages - 1)
    return [(0, *cuts, len(case.graph.layers)) for cuts in inner]


def fits(case: Case, bounds: tuple[int, ...]) -> bool:
    """Whether the stages between these bounds fit, on as many ranks, which repeat the cluster's devices."""
    order = case.schedule(len(bounds) - 1)
    in_flight = peak_microbatches_per_stage(order)
    for stage, (start, end) in enumerate(itertools.pairwise(bounds)):
        room = case.cluster.memory_of(stage % case.cluster.num_ranks)
        if room is not None and held(case, start, end, in_flight[stage], order.kind == "train") > room:
            return False
    return True


@settings(max_examples=400, deadline=None, derandomize=True)
@given(case=cases())
def test_optimal_within_memory_equals_brute_force(case):
    homes = range(case.num_stages)
    seconds = {
        bounds: max(stage_seconds(case.graph, case.profile, case.cluster, Partition(bounds), stage_to_rank=homes))
        for bounds in splits(case, case.num_stages)
        if fits(case, bounds)
    }
    if seconds:
        partition = optimal(*case[:4], schedule=case.schedule)
        assert partition.bounds in seconds
        assert partition.bottleneck == pytest.approx(min(seconds.values()), rel=1e-12)
        assert partition.lower_bound <= partition.bottleneck
        check_memory(case.plan(partition.bounds))
        return
    with pytest.raises(PartitionError) as error:
        optimal(*case[:4], schedule=case.schedule)
    numbers = range(1, len(case.graph.cuts) + 2)
    fewest = next((n for n in numbers if any(fits(case, bounds) for bounds in splits(case, n))), None)
    start = f"{case.num_stages} stages do not fit into memory: "
    assert str(error.value).startswith(start)
    end = f"; no number of stages up to {numbers[-1]} would fit on such devices"
    if fewest:
        end = f"; {fewest} {'stage' if fewest == 1 else 'stages'} would fit"
        end += " on such devices" if fewest > case.num_stages else ""
    assert str(error.value).endswith(end)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=cases())
def test_every_strategy_takes_only_what_fits(case):
    some = any(fits(case, bounds) for bounds in splits(case, case.num_stages))
    names = ("uniform", "by_parameters", "by_memory", "by_flops", "by_time")
    for partitioner in (getattr(partitioners, name) for name in names):
        if some:
            assert fits(case, partitioner(*case[:4], schedule=case.schedule).bounds)
        else:
            with pytest.raises(PartitionError, match="do not fit into memory"):
                partitioner(*case[:4], schedule=case.schedule)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=cases())
def test_the_model_is_what_a_stage_holds_written_out(case):
    for bounds in splits(case, case.num_stages):
        plan = case.plan(bounds)
        in_flight, train = peak_microbatches_per_stage(plan.schedule), plan.schedule.kind == "train"
        expected = [held(case, *pair, in_flight[s], train) for s, pair in enumerate(itertools.pairwise(bounds))]
        assert list(stage_memory_bytes(plan)) == expected
