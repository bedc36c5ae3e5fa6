"""A plan with the costs that a run has shown: found in a simulated run they are what that was simulated with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpar.planning.advice import Advice, advise
from modelpar.planning.cluster import Cluster, Link
from modelpar.planning.explain import explain
from modelpar.planning.fitted import Fitted, fitted
from modelpar.planning.graph import BATCH, Layer, ModelGraph, Parameter, Tied, Value
from modelpar.planning.partition import Partition
from modelpar.planning.plan import Plan
from modelpar.planning.profile import LayerCost, Profile
from modelpar.planning.schedule import Schedule
from modelpar.planning.schedules import gpipe, one_f_one_b
from modelpar.planning.simulate import predict
from modelpar.planning.steadiness import StepTime, drift, stragglers
from modelpar.report.explanation import headline


def chain(
    seconds: Sequence[float],
    balance: Sequence[int],
    m: int = 8,
    *,
    link: Link = Link(),  # noqa: B008  (frozen)
    make: Callable[[int, int], Schedule] = one_f_one_b,
    tied: bool = False,
    clips: bool = True,
    **of_cluster: object,
) -> Plan:
    """Layers h0, h1, … that take so long, forward, and twice that backward; samples cut into micro-batches of two."""
    n = len(seconds)
    weights = [Parameter(f"h{i}.weight", (1000,), "float32", True) for i in range(n)]
    values = [Value("x", BATCH, (0,), 0.0, False), *(Value(f"v{i}", i, (i + 1,), 100.0) for i in range(n - 1))]
    ties = (Tied((weights[0].name, weights[-1].name), (0, n - 1), 4000),) if tied else ()
    graph = ModelGraph(
        layers=tuple(Layer(f"h{i}", "Block", (weights[i],)) for i in range(n)),
        values=(*values, Value("y", BATCH, (n - 1,), 0.0, False)),
        cuts=tuple(range(1, n)),
        tied=ties,
        parameters=tuple(weight.name for weight in weights),
    )
    costs = [
        LayerCost(f"h{i}", s, s, s, parameter_bytes=4000, reduce_seconds=s / 10, update_seconds=s / 5)
        for i, s in enumerate(seconds)
    ]
    ranks = len(balance)
    return Plan(
        graph=graph,
        profile=Profile(tuple(costs), 2, "measured", clips=clips),
        cluster=Cluster(("cpu",) * ranks, link=link, **of_cluster),  # type: ignore[arg-type]
        partition=Partition.of_balance(balance, n),
        schedule=make(ranks, m),
        generator=make,
    )


def advice(found: Fitted, change: str) -> Advice:
    """The advice that says so."""
    return next(each for each in advise(found) if each.change == change)


few = st.floats(0.0, 0.3)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0.05, 2.0), min_size=4, max_size=4),
    st.lists(st.floats(0.2, 4.0), min_size=3, max_size=3),
    st.tuples(few, few, few, few, few, few),
    st.sampled_from([gpipe, one_f_one_b]),
    st.booleans(),
    st.booleans(),
)
def test_a_prediction_fits_itself(seconds, speeds, costs, make, tied, clips) -> None:  # type: ignore[no-untyped-def]
    latency, send, take, action, data, end = costs
    link = Link(latency, 1e4, send, 1e4, take, 1e4, action, data, end)
    p = chain(seconds, (1, 2, 1), 4, link=link, make=make, tied=tied, clips=clips, speeds=tuple(speeds))
    found = fitted(p, [predict(p)])
    assert found.error == pytest.approx(0.0, abs=1e-6)
    assert found.slowness == (1.0, 1.0, 1.0)


def test_a_step_that_took_longer_everywhere_is_fitted() -> None:
    p = chain([1.0] * 4, (1, 2, 1), link=Link(latency=0.5, send_seconds=0.1, action_seconds=0.05))
    slower = [
        replace(x, forward_seconds=1.5, input_grad_seconds=1.5, weight_grad_seconds=1.5) for x in p.profile.layers
    ]
    there = replace(p, profile=replace(p.profile, layers=tuple(slower)))
    found = fitted(p, [predict(there)])
    assert found.error == pytest.approx(0.0, abs=1e-6)
    assert found.slowness == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("factor", [1.5, 3.0])
def test_a_slow_rank_gets_a_lower_speed_and_its_layers_keep_their_costs(factor: float) -> None:
    p = chain([1.0] * 6, (2, 2, 2), link=Link(latency=0.1, action_seconds=0.05))
    slow = replace(p, cluster=replace(p.cluster, speeds=(1.0, 1.0 / factor, 1.0)))
    found = fitted(p, [predict(slow)])
    assert found.slowness == pytest.approx((1.0, factor, 1.0), rel=0.03)
    assert found.error == pytest.approx(0.0, abs=0.02)
    assert [round(layer.forward_seconds, 1) for layer in found.plan.profile.layers] == [1.0] * 6
    gained = advice(found, "rank 1 being as fast as the others").gain
    assert gained == pytest.approx(1 - predict(p).makespan / predict(slow).makespan, abs=0.02)


def test_a_slow_link_among_others_is_found_and_named() -> None:
    p = chain([1.0] * 4, (1, 1, 1, 1), link=Link(latency=0.01))
    slow = replace(p, cluster=replace(p.cluster, links=((1, 2, Link(latency=3.0)),)))
    timeline = predict(slow)
    found = fitted(p, [timeline])
    assert found.error == pytest.approx(0.0, abs=0.01)
    latencies = {(a, b): link.latency for a, b, link in found.plan.cluster.links}
    assert latencies[1, 2] == pytest.approx(3.0, abs=0.01)
    assert latencies[0, 1] == pytest.approx(0.01, abs=0.001)
    gained = advice(found, "a link between ranks 1 and 2 as fast as the others").gain
    assert gained == pytest.approx(1 - predict(p).makespan / timeline.makespan, abs=0.01)
    assert explain(p, [timeline]).largest_loss[0] == "communication"


def test_moved_layers_bring_what_was_said() -> None:
    p = chain([1, 1, 1, 1, 4, 1], (3, 3))
    found = explain(p, [predict(p)])
    best = found.advice[0]
    assert (best.change, best.options) == (
        "moving h3 from stage 1 to stage 0",
        "partition=manual partition.balance=[4,2]",
    )
    moved = chain([1, 1, 1, 1, 4, 1], (4, 2))
    assert best.gain == pytest.approx(1 - predict(moved).makespan / predict(p).makespan)
    assert headline(found).startswith("stage 1 is on ")
    assert len({each.options for each in found.advice if each.options}) == len(
        [each for each in found.advice if each.options]
    )


def test_more_microbatches_bring_what_was_said() -> None:
    p = chain([1.0] * 4, (1, 1, 1, 1), 2)
    found = explain(p, [predict(p)])
    assert found.largest_loss[0] == "schedule bubble"
    assert found.advice[0].change == "cutting batches into 4 micro-batches"
    halved = chain([0.5] * 4, (1, 1, 1, 1), 4)
    end = [replace(a, reduce_seconds=b.reduce_seconds, update_seconds=b.update_seconds) for a, b in zip(
        halved.profile.layers, p.profile.layers, strict=True)]  # fmt: skip
    halved = replace(halved, profile=replace(halved.profile, layers=tuple(end)))
    assert found.advice[0].gain == pytest.approx(1 - predict(halved).makespan / predict(p).makespan)


def test_one_sample_is_not_cut_and_a_larger_batch_counts_by_the_sample() -> None:
    p = chain([1.0] * 4, (1, 1, 1, 1), 2)
    p = replace(p, profile=replace(p.profile, microbatch_size=1))
    best = explain(p, [predict(p)]).advice[0]
    assert best.change == "doubling the batch, in 4 micro-batches"
    twice = replace(p, schedule=one_f_one_b(4, 4))
    assert best.gain == pytest.approx(1 - predict(twice).makespan / 2 / predict(p).makespan)


def test_a_schedule_function_that_refuses_takes_nothing_else_along() -> None:
    def only_eight(num_ranks: int, num_microbatches: int) -> Schedule:
        if num_microbatches != 8:
            raise RuntimeError("eight, I said")
        return gpipe(num_ranks, 8)

    p = chain([1, 1, 1, 1, 4, 1], (3, 3), make=only_eight)
    found = explain(p, [predict(p)])
    assert "moving h3 from stage 1 to stage 0" in [each.change for each in found.advice]
    assert not any("micro-batches" in each.change for each in found.advice)


def test_what_does_not_fit_is_not_advised() -> None:
    p = chain([1, 1, 1, 1, 4, 1], (3, 3), memory=(3 * 4 * 4000, None))
    assert "moving h3 from stage 1 to stage 0" not in [each.change for each in explain(p, [predict(p)]).advice]


def test_stragglers_are_found_with_the_rank_that_caused_them() -> None:
    steps = [StepTime(i, 0.1 + 0.001 * (i % 3), (0.08, 0.08)) for i in range(20)]
    steps[7] = StepTime(7, 0.3, (0.08, 0.27))
    steps[12] = StepTime(12, 0.25, (0.08, 0.08))
    assert [(s.step, round(s.times, 1), s.rank) for s in stragglers(steps)] == [(7, 3.0, 1), (12, 2.5, -1)]
    assert stragglers(steps[:7]) == ()


def test_drift_is_found_and_chance_is_not() -> None:
    steady = [0.1 + 0.01 * ((7 * i) % 5) for i in range(40)]
    assert drift(steady) == 0.0
    assert drift([seconds * (1 + i / 100) for i, seconds in enumerate(steady)]) == pytest.approx(0.29, abs=0.03)
    assert drift([0.1] * 5 + [0.2] * 5) == 0.0  # too few
