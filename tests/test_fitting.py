"""Splits that must fit into memory: against brute force over all splits, and against memory written out per stage."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpar.errors import PartitionError
from modelpar.planning import partitioners, schedules
from modelpar.planning.cluster import Cluster, Link
from modelpar.planning.fitting import check_memory
from modelpar.planning.graph import BATCH, Layer, ModelGraph, Parameter, Tied, Value
from modelpar.planning.limits import Limits
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
    slack = 1 + profile.slack_share
    kept = sum(round(cost.kept_bytes * slack) for cost in costs)
    for value in graph.values:
        if 0 <= value.producer < start and any(start <= consumer < end for consumer in value.consumers):
            kept += round(value.bytes_per_sample * profile.microbatch_size * slack)
    return total + in_flight * kept + max(round(cost.temporary_bytes * slack) for cost in costs)


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
    profile = Profile(costs, draw(st.integers(1, 2)), "measured", slack_share=draw(st.sampled_from([0.0, 0.5])))
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


def even(num_layers: int, kept: int = 10) -> tuple[ModelGraph, Profile]:
    """Equal layers, which keep 10 bytes per micro-batch and have no weights."""
    layers = tuple(Layer(f"h{i}", "Linear") for i in range(num_layers))
    values = tuple(Value(f"v{i}", i, (i + 1,), 0.0) for i in range(num_layers - 1))
    profile = tuple(LayerCost(f"h{i}", 1.0, 1.0, 1.0, kept_bytes=kept) for i in range(num_layers))
    return ModelGraph(layers, values, tuple(range(1, num_layers))), Profile(profile, 1, "measured")


def limited(*memory: int | None) -> Cluster:
    return Cluster(("cpu",) * len(memory), memory=memory)


def test_stages_with_more_micro_batches_in_flight_get_fewer_layers():
    """Under 1F1B with 4 micro-batches the first of two stages holds two of them, the second one."""
    graph, profile = even(6)
    partition = optimal(graph, profile, limited(40, 40), 2, schedule=lambda ranks: schedules.one_f_one_b(ranks, 4))
    assert partition.balance == (2, 4)
    assert optimal(graph, profile, limited(60, 60), 2).balance == (3, 3)


@pytest.mark.parametrize(
    ("memory", "num_microbatches", "message"),
    [
        (
            (30, 30),
            1,
            "2 stages do not fit into memory: with h6 stage 1, from h3 on, needs 40 B on rank 1, which has 30 B; "
            "3 stages would fit on such devices",
        ),
        (
            (30, 9),
            1,
            "2 stages do not fit into memory: h1 alone needs 10 B on rank 1, which has 9 B; "
            "no number of stages up to 8 would fit on such devices",
        ),
        (
            (9, 9),
            1,
            "2 stages do not fit into memory: h0 alone needs 10 B on rank 0, which has 9 B; "
            "no number of stages up to 8 would fit on such devices",
        ),
        (
            (80, 9),
            1,
            "2 stages do not fit into memory: h1 alone needs 10 B on rank 1, which has 9 B; 1 stage would fit",
        ),
    ],
)
def test_a_refusal_says_what_is_in_the_way_and_how_many_stages_would_do(memory, num_microbatches, message):
    graph, profile = even(8)
    with pytest.raises(PartitionError) as error:
        optimal(graph, profile, limited(*memory), 2, schedule=lambda ranks: schedules.gpipe(ranks, num_microbatches))
    assert str(error.value) == message


def test_layers_that_stay_together_are_named_together():
    graph, profile = even(4)
    graph = replace(graph, cuts=(1, 3))
    with pytest.raises(
        PartitionError, match=r": h1 … h2, which stay together, alone needs 20 B on rank 0, which has 1"
    ):
        optimal(graph, profile, limited(15, 15), 2)


def test_many_stages_are_found_without_trying_each():
    graph, profile = even(500)
    with pytest.raises(PartitionError, match=r"; 167 stages would fit on such devices$"):
        optimal(graph, profile, limited(30, 30), 2)


def test_stages_of_one_rank_share_its_memory():
    graph, profile = even(8)
    partition = optimal(graph, profile, limited(40, 40), 4)
    assert partition.balance == (2, 2, 2, 2)
    with pytest.raises(PartitionError, match=r"needs 20 B on rank 1, which has 15 B for each of its stages; 6 st"):
        optimal(graph, profile, limited(50, 30), 4)


def test_any_partition_is_checked():
    graph, profile = even(4)
    order = schedules.gpipe(2, 1)
    plan = Plan(graph, profile, limited(20, 25), Partition((0, 1, 4)), order)
    with pytest.raises(
        PartitionError,
        match=r"^stage 1, h1 … h3, would hold 30 B on rank 1, which has 25 B; expected a split that fits",
    ):
        check_memory(plan)
    check_memory(replace(plan, partition=Partition((0, 2, 4))))
    check_memory(replace(plan, cluster=Cluster(("cpu", "cpu"))))


@pytest.mark.parametrize("overlap", [False, True])
def test_the_search_within_limits_equals_dynamic_programming(overlap):
    """Longer chains than brute force can do, with skips, temporary values and limits that bind."""
    rng, infeasible = np.random.default_rng(0), 0
    for _ in range(300):
        n = int(rng.integers(10, 40))
        num_stages = int(rng.integers(2, 8))
        values = [Value(f"v{i}", i, (i + 1,), float(rng.integers(0, 9))) for i in range(n - 1)]
        for a, b in rng.integers(0, n, (6, 2)):
            values += [Value(f"s{a}-{b}", int(a), (int(b),), float(rng.integers(0, 30)))] if a < b else []
        graph = ModelGraph(tuple(Layer(f"h{i}", "Linear") for i in range(n)), tuple(values), tuple(range(1, n)))
        kept, temporary = rng.integers(0, 20, (2, n)).tolist()
        layers = [LayerCost(f"h{i}", 1, 1, 1, kept_bytes=kept[i], temporary_bytes=temporary[i]) for i in range(n)]
        model = MemoryModel.of(graph, Profile(tuple(layers), 1, "measured"))
        in_flight = tuple(range(num_stages, 0, -1))
        mean = sum(k * sum(kept) for k in in_flight) / num_stages**2
        room = tuple((mean * rng.uniform(0.9, 2.0, num_stages)).astype(int).tolist())
        limits = Limits(model, np.arange(n + 1), in_flight, room)
        crossing = rng.choice([0.0, 1.0, 5.0, 12.0], n + 1)
        crossing[[0, -1]] = 0
        problem = Chain.of(rng.integers(0, 10, n) * 1.0, crossing, range(n + 1), [1.0] * num_stages, overlap, limits)
        best = {0: 0}
        for s in range(num_stages):
            after: dict[int, int] = {}
            for i, so_far in best.items():
                for j in range(i + 1, n + 1):
                    if model.bytes(i, j, in_flight[s]) <= room[s]:
                        after[j] = min(after.get(j, 2**62), max(so_far, int(problem.costs(s, i, j))))
            best = after
        found = split(problem)
        assert has_split(limits) == (n in best)
        infeasible += n not in best
        if n in best:
            assert limits.hold(found)
            assert problem.bottleneck(found) == best[n]
        else:
            assert found is None
    assert 30 < infeasible < 270
