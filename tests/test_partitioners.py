"""Every partitioner against brute force over all legal splits. Memory is in test_fitting.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpar.errors import PartitionError
from modelpar.planning.cluster import Cluster, Link
from modelpar.planning.graph import BATCH, Layer, ModelGraph, Value
from modelpar.planning.minmax import Chain, split
from modelpar.planning.partition import Partition
from modelpar.planning.partitioners import (
    by_flops,
    by_memory,
    by_parameters,
    by_time,
    manual,
    optimal,
    stage_seconds,
    uniform,
)
from modelpar.planning.profile import LayerCost, Profile

ALL = (uniform, by_parameters, by_memory, by_flops, by_time, optimal)


class Case(NamedTuple):
    graph: ModelGraph
    profile: Profile
    cluster: Cluster
    num_stages: int


def chain(
    seconds: Sequence[float],
    crossing: Sequence[float] = (),
    *,
    cuts: Sequence[int] | None = None,
    values: Sequence[Value] = (),
    microbatch_size: int = 1,
) -> tuple[ModelGraph, Profile]:
    """Layers l0, l1, …; `crossing` holds the bytes per sample from each layer to the next."""
    n = len(seconds)
    crossing = crossing or [0.0] * (n - 1)
    between = tuple(Value(f"v{i}", i, (i + 1,), size) for i, size in enumerate(crossing))
    graph = ModelGraph(
        tuple(Layer(f"l{i}", "Linear") for i in range(n)),
        (Value("inputs", BATCH, (0,), 8.0), *between, *values, Value("outputs", n - 1, (BATCH,), 8.0)),
        tuple(range(1, n) if cuts is None else cuts),
    )
    # Each quantity has its own order, so that a partitioner that reads the wrong one gives another split.
    costs = [
        LayerCost(
            f"l{i}",
            forward_seconds=t / 4,
            input_grad_seconds=t / 4,
            weight_grad_seconds=t / 2,
            flops=float((7 * i + 3) % 5),
            parameter_bytes=(5 * i + 1) % 7,
            saved_bytes=(3 * i + 2) % 11,
        )
        for i, t in enumerate(seconds)
    ]
    return graph, Profile(tuple(costs), microbatch_size, "measured")


def cpus(num_ranks: int, *speeds: float, link: Link = Link()) -> Cluster:  # noqa: B008 a frozen value
    return Cluster(("cpu",) * num_ranks, speeds, link)


def brute_force(case: Case, cost: Callable[[int, int, int], Fraction]) -> Fraction:
    """The smallest possible maximum of cost(stage, start, end) over all legal splits, in exact fractions."""
    splits = (
        (0, *inner, len(case.graph.layers)) for inner in itertools.combinations(case.graph.cuts, case.num_stages - 1)
    )
    return min(max(cost(s, *pair) for s, pair in enumerate(itertools.pairwise(bounds))) for bounds in splits)


def time_and_transfers(case: Case, overlap: bool) -> Callable[[int, int, int], Fraction]:
    """The cost that `optimal` minimises, written out for one stage at a time."""
    graph, profile, cluster, _ = case
    link = cluster.link

    def border(cut: int) -> Fraction:
        if cut in (0, len(graph.layers)) or cluster.num_ranks == 1:
            return Fraction(0)
        num_bytes = Fraction(graph.crossing_bytes(cut)) * profile.microbatch_size
        wire = 0 if link.bandwidth == float("inf") else num_bytes / Fraction(link.bandwidth)
        return 2 * (Fraction(link.latency) + wire)

    def cost(stage: int, start: int, end: int) -> Fraction:
        seconds = sum((Fraction(layer.seconds) for layer in profile.layers[start:end]), Fraction(0))
        compute = seconds / Fraction(cluster.speed(stage % cluster.num_ranks))
        return max(compute, border(start), border(end)) if overlap else compute + border(start) + border(end)

    return cost


def check(partition: Partition, case: Case) -> None:
    """Nothing lost, nothing doubled, no stage empty, only legal cuts, and a lower bound that is one."""
    assert [i for s in range(case.num_stages) for i in partition.layers(s)] == list(range(len(case.graph.layers)))
    assert partition.num_stages == case.num_stages
    assert min(partition.balance) >= 1
    assert set(partition.bounds[1:-1]) <= set(case.graph.cuts)
    assert partition.bottleneck is not None
    assert partition.lower_bound is not None
    assert 0 <= partition.lower_bound <= partition.bottleneck


# Binary fractions make floats exact, so that equal means equal; general floats test the rounding.
eighths = st.integers(0, 80).map(lambda k: k / 8)
exact_numbers = (eighths, st.sampled_from([0.5, 1.0, 2.0, 4.0]), st.sampled_from([float("inf"), 1.0, 8.0]))
floats = (st.floats(0, 1e3), st.floats(0.1, 10), st.floats(0.01, 1e9))


@st.composite
def cases(draw: st.DrawFn, numbers: tuple[st.SearchStrategy[float], ...]) -> Case:
    cost, speed, bandwidth = numbers
    n = draw(st.integers(1, 9))
    cuts = sorted(draw(st.sets(st.integers(1, n - 1)))) if n > 1 else []
    skips = [
        Value(f"skip{a}-{b}", a, tuple(sorted({draw(st.integers(a + 1, b)), b})), draw(cost))
        for a, b in draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=3))
        if a < b
    ]
    graph, profile = chain(
        draw(st.lists(cost, min_size=n, max_size=n)),
        draw(st.lists(cost, min_size=n - 1, max_size=n - 1)),
        cuts=cuts,
        values=skips,
        microbatch_size=draw(st.integers(1, 3)),
    )
    num_stages = draw(st.integers(1, len(cuts) + 1))
    num_ranks = draw(st.integers(1, num_stages + 1))
    speeds = draw(st.lists(speed, min_size=num_ranks, max_size=num_ranks)) if draw(st.booleans()) else []
    return Case(graph, profile, cpus(num_ranks, *speeds, link=Link(draw(cost), draw(bandwidth))), num_stages)


@pytest.mark.parametrize("overlap", [False, True])
@settings(max_examples=250, deadline=None, derandomize=True)
@given(case=cases(exact_numbers))
def test_optimal_equals_brute_force(case, overlap):
    partition = optimal(*case, overlap=overlap)
    check(partition, case)
    assert partition.bottleneck == brute_force(case, time_and_transfers(case, overlap))
    assert partition.bottleneck == max(stage_seconds(*case[:3], partition, overlap=overlap))


@pytest.mark.parametrize("overlap", [False, True])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=cases(floats))
def test_optimal_equals_brute_force_for_any_floats(case, overlap):
    partition = optimal(*case, overlap=overlap)
    check(partition, case)
    assert partition.bottleneck == pytest.approx(float(brute_force(case, time_and_transfers(case, overlap))), rel=1e-12)


QUANTITIES = [
    (uniform, lambda layer: 1),
    (by_parameters, lambda layer: layer.parameter_bytes),
    (by_flops, lambda layer: layer.flops),
    (by_time, lambda layer: layer.seconds),
    (by_memory, lambda layer: 4 * layer.parameter_bytes + layer.saved_bytes),
    (
        partial(by_memory, optimizer_slots=0, microbatches=5),
        lambda layer: 2 * layer.parameter_bytes + 5 * layer.saved_bytes,
    ),
]


@pytest.mark.parametrize(("partitioner", "quantity"), QUANTITIES)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=cases(exact_numbers))
def test_each_quantity_alone_equals_brute_force(case, partitioner, quantity):
    partition = partitioner(*case)
    check(partition, case)
    costs = [Fraction(quantity(layer)) for layer in case.profile.layers]
    assert partition.bottleneck == brute_force(case, lambda stage, start, end: sum(costs[start:end], Fraction(0)))


@pytest.mark.parametrize(
    ("seconds", "num_stages", "balance"),
    [
        ([1] * 12, 4, (3, 3, 3, 3)),
        ([0] * 8, 4, (2, 2, 2, 2)),
        # One heavy layer decides the bottleneck; the others are shared out all the same.
        ([100, 1, 1, 1, 1, 1, 1], 3, (1, 3, 3)),
        ([1, 1, 1, 1, 1, 1, 100], 3, (3, 3, 1)),
        ([10, 0, 0, 0, 0, 10], 2, (3, 3)),
    ],
)
def test_equally_good_splits_are_settled_by_evenness(seconds, num_stages, balance):
    graph, profile = chain(seconds)
    assert by_time(graph, profile, cpus(num_stages), num_stages).balance == balance


def test_uniform_differs_by_at_most_one_layer():
    for n, num_stages in itertools.product(range(1, 30), range(1, 9)):
        if num_stages <= n:
            graph, profile = chain([1.0] * n)
            balance = uniform(graph, profile, cpus(num_stages), num_stages).balance
            assert max(balance) - min(balance) <= 1, (n, balance)


def test_a_faster_device_gets_more():
    graph, profile = chain([1.0] * 9)
    partition = optimal(graph, profile, cpus(2, 2.0, 1.0), 2)
    assert partition.balance == (6, 3)
    assert (partition.bottleneck, partition.lower_bound) == (3.0, 3.0)


def test_a_dear_border_is_avoided():
    """The even cut in the middle carries 100 bytes: at 10 bytes/s it costs 20 s there and back."""
    graph, profile = chain([1.0] * 4, [0, 100, 0])
    assert optimal(graph, profile, cpus(2, link=Link(bandwidth=1e9)), 2).balance == (2, 2)
    slow = cpus(2, link=Link(latency=0.25, bandwidth=10.0))
    partition = optimal(graph, profile, slow, 2)
    assert 2 not in partition.bounds
    assert partition.bottleneck == 3.5
    assert optimal(graph, profile, slow, 2, overlap=True).bottleneck == 3.0
    assert by_time(graph, profile, slow, 2).balance == (2, 2)


def test_one_rank_sends_nothing():
    graph, profile = chain([1.0] * 4, [0, 100, 0])
    assert optimal(graph, profile, cpus(1, link=Link(bandwidth=10.0)), 2).bottleneck == 2.0


@pytest.mark.parametrize("partitioner", ALL)
def test_too_many_stages(partitioner):
    graph, profile = chain([1.0] * 5)
    with pytest.raises(
        PartitionError,
        match=r"^7 stages, but the model has 5 layers that can be cut in 4 places; expected at most 5$",
    ):
        partitioner(graph, profile, cpus(7), 7)
    graph, profile = chain([1.0] * 5, cuts=[2])
    with pytest.raises(
        PartitionError,
        match=r"^3 stages, but the model has 5 layers that can be cut in 1 places; expected at most 2$",
    ):
        partitioner(graph, profile, cpus(3), 3)
    with pytest.raises(PartitionError, match=r"^0 stages; expected at least 1$"):
        partitioner(graph, profile, cpus(1), 0)


@pytest.mark.parametrize("partitioner", ALL)
def test_a_profile_of_another_model(partitioner):
    graph, _ = chain([1.0] * 5)
    _, profile = chain([1.0] * 4)
    with pytest.raises(PartitionError, match=r"^the profile has 4 layers, the model 5$"):
        partitioner(graph, profile, cpus(2), 2)


def test_numbers_that_are_no_costs():
    graph, profile = chain([1.0, float("nan"), 1.0])
    with pytest.raises(PartitionError, match=r"^by_time: layer l1 costs nan; expected a finite number from 0 up$"):
        by_time(graph, profile, cpus(2), 2)
    graph, profile = chain([1.0, -1.0, 1.0])
    with pytest.raises(PartitionError, match=r"^optimal: layer l1 costs -1.0; expected"):
        optimal(graph, profile, cpus(2), 2)
    graph, profile = chain([1.0] * 3, [1.0, float("inf")])
    with pytest.raises(PartitionError, match=r"^value v1 has inf bytes per sample; expected a finite"):
        optimal(graph, profile, cpus(2, link=Link(bandwidth=1.0)), 2)
    graph, profile = chain([1.0] * 3)
    with pytest.raises(PartitionError, match=r"^rank 1 has speed 0.0; expected a number above 0$"):
        optimal(graph, profile, cpus(2, 1.0, 0.0), 2)
    with pytest.raises(PartitionError, match=r"bandwidth=0\.0.*expected a finite latency from 0 up, and a bandwidth"):
        optimal(graph, profile, cpus(2, link=Link(bandwidth=0.0)), 2)


def test_manual():
    graph, profile = chain([1.0] * 5, cuts=[1, 3])
    assert manual(graph, profile, cpus(2), 2, balance=[3, 2]) == Partition((0, 3, 5), "manual")
    with pytest.raises(PartitionError, match=r"^balance \[3, 1\] adds up to 4 layers .* add up to 5$"):
        manual(graph, profile, cpus(2), 2, balance=[3, 1])
    with pytest.raises(PartitionError, match=r"^balance \[5, 0\] .* expected positive counts"):
        manual(graph, profile, cpus(2), 2, balance=[5, 0])
    with pytest.raises(PartitionError, match=r"^balance \[3, 2\] has 2 stages; expected 3$"):
        manual(graph, profile, cpus(3), 3, balance=[3, 2])
    with pytest.raises(PartitionError, match=r"cuts between l1 and l2, after 2 layers, .* after 1, 3 layers$"):
        manual(graph, profile, cpus(2), 2, balance=[2, 3])


def test_the_same_question_gets_the_same_answer():
    rng = np.random.default_rng(0)
    graph, profile = chain(rng.integers(0, 3, 60).astype(float).tolist(), rng.integers(0, 3, 59).astype(float).tolist())
    cluster = cpus(8, link=Link(0.0, 4.0))
    for partitioner in ALL:
        assert len({partitioner(graph, profile, cluster, 8) for _ in range(3)}) == 1
    # Scaling by a power of two changes no decision.
    doubled = replace(profile, layers=tuple(replace(x, flops=x.flops * 2**20) for x in profile.layers))
    assert by_flops(graph, doubled, cluster, 8).bounds == by_flops(graph, profile, cluster, 8).bounds


@pytest.mark.parametrize("overlap", [False, True])
def test_the_search_equals_dynamic_programming_on_spiky_chains(overlap):
    """Dear borders between cheap ones leave holes in the sets of reachable positions."""
    rng = np.random.default_rng(0)
    for _ in range(1500):
        n = int(rng.integers(2, 16))
        num_stages = int(rng.integers(1, n + 1))
        costs = rng.integers(0, 10, n) * 1.0
        crossing = rng.choice([0.0, 1.0, 5.0, 12.0], n + 1)
        crossing[[0, -1]] = 0
        problem = Chain.of(costs, crossing, range(n + 1), rng.choice([1.0, 2.0, 4.0], num_stages).tolist(), overlap)
        best = {0: 0}
        for s in range(num_stages):
            best = {
                j: min(max(best[i], int(problem.costs(s, i, j))) for i in best if i < j) for j in range(s + 1, n + 1)
            }
        assert problem.bottleneck(split(problem)) == best[n]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_long_chain_beats_every_other_way_to_cut_it(overlap):
    """20,000 layers in 200 stages, where dear borders abound; moving any one border must not help."""
    rng = np.random.default_rng(1)
    costs, crossing = rng.exponential(size=20_000), rng.exponential(size=20_001) * 20
    crossing[[0, -1]] = 0
    problem = Chain.of(costs, crossing, range(20_001), [1.0, 2.0] * 100, overlap)
    bounds = split(problem)
    assert bounds[0] == 0
    assert bounds[-1] == 20_000
    assert min(np.diff(bounds)) >= 1
    best = problem.bottleneck(bounds)
    assert best < 1.1 * costs.sum() / 300 * 2.0 ** (60 - np.frexp(costs.sum() + 2 * crossing.max())[1])
    for s in range(1, 200):
        window = slice(bounds[s - 1] + 1, bounds[s + 1])
        pair = np.maximum(problem.costs(s - 1, bounds[s - 1], window), problem.costs(s, window, bounds[s + 1]))
        here = max(problem.costs(s - 1, bounds[s - 1], bounds[s]), problem.costs(s, bounds[s], bounds[s + 1]))
        assert here <= max(best, int(pair.min()))


def test_counted_costs_are_not_weighed_against_seconds_of_links():
    """Nobody knows how long a layer takes that was only counted: equal layers are cut evenly, however slow the link."""
    graph, profile = chain([1e-6] * 8, [1e6] * 6 + [1.0])
    cluster = cpus(2, link=Link(latency=0.5e-3, bandwidth=1e9))
    counted = replace(profile, source="flops")
    assert optimal(graph, profile, cluster, 2).balance == (7, 1)
    found = optimal(graph, counted, cluster, 2)
    assert found.balance == (4, 4)
    assert found.bottleneck == found.lower_bound == max(stage_seconds(graph, counted, cluster, found))
