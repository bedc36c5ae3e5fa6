"""The simulator: its rules one by one, and its results against known makespans."""

import csv
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from drawing import drawn_in, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_graphs import stage_graphs

from modelpar.errors import DeadlockError, PlanError
from modelpar.planning import simulate as simulate_module
from modelpar.planning.cluster import Cluster, Link
from modelpar.planning.graph import BATCH, Layer, ModelGraph, StageGraph, Tied, Value
from modelpar.planning.partition import Partition
from modelpar.planning.plan import Plan
from modelpar.planning.profile import LayerCost, Profile
from modelpar.planning.schedule import Action, Op, Schedule, gives, needs
from modelpar.planning.schedules import fill_drain, gpipe, one_f_one_b
from modelpar.planning.simulate import StageCost, predict, prediction, simulate, stage_costs
from modelpar.planning.timeline import COMPUTE, Span, Timeline

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="there are no reference facts in ../shared/reference"
)


def cluster(num_ranks: int, latency: float = 0.0, bandwidth: float = float("inf")) -> Cluster:
    return Cluster(("cpu",) * num_ranks, link=Link(latency, bandwidth))


def run(lines: list[str], cost: StageCost, latency: float = 0.0) -> Timeline:
    """Simulates a chain of equal stages."""
    schedule = Schedule.of(lines)
    graph = StageGraph.chain(schedule.num_stages)
    return simulate(schedule, [cost] * schedule.num_stages, graph, cluster(schedule.num_ranks, latency))


def test_the_docstrings_example() -> None:
    layout = (
        "0F0 0F1 ... ... ... ... 0B0 0B0 ... 0B1 0B1\n"
        "... ... 1F0 1B0 1B0 1F1 1B1 1B1"
    )  # fmt: skip
    timeline = run(["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"], StageCost(1, 1, 1), latency=1)
    assert picture(timeline, waits=True) == layout
    docstring = drawn_in(simulate_module.__doc__).splitlines()
    assert [line.removeprefix(f"rank {rank}   ") for rank, line in enumerate(docstring)] == layout.splitlines()


def orders() -> list[Any]:
    """Every reference order that has no overlapped pair "(a;b)"."""
    if not REFERENCE.is_dir():
        return []
    return [order for order in json.loads((REFERENCE / "schedules.json").read_text()) if "(" not in str(order["ranks"])]


@needs_reference
@pytest.mark.parametrize("order", orders(), ids=lambda order: order["name"])
def test_reference_makespans(order: dict[str, Any]) -> None:
    schedule = Schedule.of(order["ranks"])
    assert schedule.stage_to_rank == tuple(order["stage_to_rank"])
    assert schedule.peak_microbatches() == tuple(order["peak_stage_microbatches"])
    for times, makespan in order["makespan"].items():
        forward, input_grad, weight_grad, latency = map(float, times.split(","))
        assert run(order["ranks"], StageCost(forward, input_grad, weight_grad), latency).makespan == makespan


def bubble_rate(p: int, m: int, cost: StageCost, latency: float) -> float:
    """Returns 1 − m(F + B + W) / longest; longest is the largest (last end − first start) of a rank, waits left out."""
    timeline = simulate(one_f_one_b(p, m), [cost] * p, StageGraph.chain(p), cluster(p, latency))
    compute = [[span for span in timeline.of_rank(rank) if span.kind in COMPUTE] for rank in range(p)]
    longest = max(spans[-1].end - spans[0].start for spans in compute)
    return 1 - m * (cost.forward_seconds + cost.input_grad_seconds + cost.weight_grad_seconds) / longest


@needs_reference
def test_zero_bubble_paper() -> None:
    with (REFERENCE / "zero_bubble.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7
    for row in rows:
        columns = ("forward_ms", "input_grad_ms", "weight_grad_ms", "latency_ms")
        forward, input_grad, weight_grad, latency = (float(row[column]) for column in columns)
        size = (int(row["num_ranks"]), int(row["num_microbatches"]))
        rate = bubble_rate(*size, StageCost(forward, input_grad, weight_grad), latency)
        assert f"{rate:.4f}" == row["bubble_1f1b"]


def test_zero_bubble_paper_one_row() -> None:
    """1.5B, 8 ranks, 24 micro-batches, 1F1B: 0.2431 (Qi et al. 2024, arXiv 2401.10241, tables 4 and 6)."""
    assert f"{bubble_rate(8, 24, StageCost(18.522, 18.086, 9.337), 0.601):.4f}" == "0.2431"


def test_a_message_takes_latency_and_bytes_over_bandwidth() -> None:
    """3 bytes a sample, 4 samples, 2 bytes a second: 6 s, and 1 s of latency; the gradient is as large."""
    graph = StageGraph.chain(2, bytes_per_sample=3)
    timeline = simulate(gpipe(2, 1), [StageCost(1, 1, 1)] * 2, graph, cluster(2, 1, 2), microbatch_size=4)
    assert timeline.spans == (
        Span(0, "F", 0, 1, 0, 0),
        Span(0, "wait", 1, 18, 0, 0, "grad v0 of micro-batch 0 from stage 1"),
        Span(0, "B", 18, 20, 0, 0),
        Span(1, "wait", 0, 8, 1, 0, "value v0 of micro-batch 0 from stage 0"),
        Span(1, "F", 8, 9, 1, 0),
        Span(1, "B", 9, 11, 1, 0),
    )


def test_nothing_travels_on_one_rank() -> None:
    timeline = run(["0F0 1F0 1B0 0B0"], StageCost(1, 1, 1), latency=100)
    assert picture(timeline, waits=True) == "0F0 1F0 1B0 1B0 0B0 0B0"


def test_an_input_gradient_leaves_before_the_weight_gradient() -> None:
    whole = run(["0F0 0B0", "1F0 1B0"], StageCost(1, 1, 1))
    assert picture(whole, waits=True) == "0F0 ... ... ... 0B0 0B0\n... 1F0 1B0 1B0"
    split = run(["0F0 0I0 0W0", "1F0 1I0 1W0"], StageCost(1, 1, 1))
    assert picture(split, waits=True) == "0F0 ... ... 0I0 0W0\n... 1F0 1I0 1W0"


def test_sending_does_not_block() -> None:
    timeline = run(["0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1"], StageCost(1, 1, 0), latency=3)
    assert picture(timeline).splitlines()[0].startswith("0F0 0F1")
    assert picture(timeline).splitlines()[1] == "                1F0 1F1 1B0 1B1"


def test_sending_and_taking_keep_ranks_busy() -> None:
    """F = 1, B = 2; sending a value takes its rank 1 s, the way 1 s, taking it 1 s; each action 1 s more."""
    link = Link(latency=1, send_seconds=1, take_seconds=1, action_seconds=1)
    timeline = simulate(gpipe(2, 1), [StageCost(1, 1, 1)] * 2, StageGraph.chain(2), Cluster(("cpu",) * 2, link=link))
    assert timeline.spans == (
        Span(0, "F", 0, 2, 0, 0),
        Span(0, "send", 2, 3, 0, 0),
        Span(0, "wait", 3, 12, 0, 0, "grad v0 of micro-batch 0 from stage 1"),
        Span(0, "B", 13, 16, 0, 0),
        Span(1, "wait", 0, 4, 1, 0, "value v0 of micro-batch 0 from stage 0"),
        Span(1, "F", 5, 7, 1, 0),
        Span(1, "B", 7, 10, 1, 0),
        Span(1, "send", 10, 11, 1, 0),
    )


def test_each_part_of_a_message_has_a_rate_of_its_own() -> None:
    link = Link(1, 10.0, send_seconds=2, send_bandwidth=20.0, take_seconds=3, take_bandwidth=40.0)
    assert (link.send(40), link.seconds(40), link.take(40)) == (4, 5, 4)
    assert link.hand_off(40) == 13
    assert Link().hand_off(1e12) == 0.0


def test_the_first_micro_batch_has_to_come() -> None:
    where = Cluster(("cpu",) * 2, link=Link(data_seconds=2))
    inputs = Value("inputs", BATCH, (0,), needs_grad=False)
    graph = StageGraph(2, (inputs, Value("v0", 0, (1,))))
    timeline = simulate(gpipe(2, 2), [StageCost(1, 1, 0)] * 2, graph, where)
    assert timeline.of_rank(0)[0] == Span(0, "data", 0, 2, 0, 0, "value inputs of micro-batch 0 from the controller")
    assert timeline.of_rank(1)[0].end == 3
    assert timeline.makespan == 2 + simulate(gpipe(2, 2), [StageCost(1, 1, 0)] * 2, graph, cluster(2)).makespan


def test_the_first_forward_of_every_stage_is_colder() -> None:
    timeline = simulate(gpipe(2, 2), [StageCost(1, 1, 0, cold_seconds=2)] * 2, StageGraph.chain(2), cluster(2))
    assert picture(timeline) == "0F0 0F0 0F0 0F1                 0B0 0B1\n            1F0 1F0 1F0 1F1 1B0 1B1"


def ended(graph: StageGraph, link: Link) -> Timeline:
    """Simulates one micro-batch on stages that reduce for 1 s and update for 10 s."""
    costs = [StageCost(1, 1, 0, reduce_seconds=1, update_seconds=10)] * graph.num_stages
    return simulate(gpipe(graph.num_stages, 1), costs, graph, Cluster(("cpu",) * graph.num_stages, link=link))


def test_the_end_of_a_step_is_simulated_where_it_costs_something() -> None:
    """
    ::

        rank 0   F . . B r . optimizer      its own norms, then those of rank 1
        rank 1   . F B r optimizer          the count is its own
    """
    timeline = ended(StageGraph.chain(2), Link())
    assert [(s.kind, s.start, s.end) for s in timeline.of_rank(0) if s.kind not in "FB"] == [
        ("wait", 1, 3),
        ("reduce", 4, 5),
        ("optimizer", 5, 15),
    ]
    assert [(s.kind, s.start, s.end) for s in timeline.of_rank(1)][-2:] == [("reduce", 3, 4), ("optimizer", 4, 14)]
    forward = simulate(fill_drain(2, 1), [StageCost(1, 1, 0, 1, 10)] * 2, StageGraph.chain(2), cluster(2))
    assert {span.kind for span in forward.spans} == {"F", "wait"}


def test_clipping_waits_for_the_norm_of_all() -> None:
    """Rank 1 gives its norms at 4 + 1, they arrive at 6; the total leaves at 6 + 1 and arrives at 8."""
    link = Link(latency=1, send_seconds=1)
    free, clipped = (ended(replace(StageGraph.chain(2), clips=clips), link) for clips in (False, True))
    assert free.of_rank(1)[-1].kind == clipped.of_rank(1)[-1].kind == "optimizer"
    waits = [span for span in clipped.of_rank(1) if span.cause == "total_norm gradients from stage 0"]
    assert len(waits) == 1
    assert clipped.of_rank(1)[-1].start == waits[0].end > free.of_rank(1)[-1].start
    assert clipped.of_rank(0)[-1].start == free.of_rank(0)[-1].start + link.send_seconds


def test_gradients_of_tied_tensors_travel_at_the_end_and_weights_come_back() -> None:
    """6 bytes at 1 byte/s each way; the owner updates in between."""
    tied = StageGraph(2, StageGraph.chain(2).values, TIED.tied)
    timeline = ended(tied, Link(bandwidth=1))
    causes = [span.cause for span in timeline.spans if span.kind == "wait"]
    assert "tied_grad embed.weight from stage 1" in causes
    last = timeline.of_rank(1)[-1]
    assert (last.kind, last.cause) == ("wait", "weight embed.weight from stage 0")
    assert last.end == timeline.of_rank(0)[-1].end + 6


def test_stages_of_one_rank_end_the_step_together() -> None:
    costs = [StageCost(1, 1, 0, reduce_seconds=1, update_seconds=10)] * 2
    schedule = Schedule.of(["0F0 1F0 1B0 0B0"])
    link = Link(latency=9, send_seconds=9, take_seconds=9, end_seconds=2)
    timeline = simulate(schedule, costs, StageGraph.chain(2), Cluster(("cpu",), link=link))
    assert [(s.kind, s.start, s.end) for s in timeline.spans[-2:]] == [("reduce", 4, 8), ("optimizer", 8, 28)]


def test_faster_devices_take_less_time() -> None:
    mixed = Cluster(("cpu", "cpu"), speeds=(1.0, 2.0))
    timeline = simulate(gpipe(2, 1), [StageCost(2, 2, 2)] * 2, StageGraph.chain(2), mixed)
    assert picture(timeline) == "0F0 0F0             0B0 0B0 0B0 0B0\n        1F0 1B0 1B0"


def test_stages_of_different_cost() -> None:
    timeline = simulate(fill_drain(2, 2), [StageCost(1, 9, 9), StageCost(2, 9, 9)], StageGraph.chain(2), cluster(2))
    assert picture(timeline) == "0F0 0F1\n    1F0 1F0 1F1 1F1"


def test_waits_name_the_value_that_came_last() -> None:
    """The skip value goes from stage 0 to stage 2 directly and is large; its gradient comes back the same way."""
    skip, middle = Value("skip", 0, (2,), bytes_per_sample=10), [Value(f"v{s}", s, (s + 1,)) for s in (0, 1)]
    graph = StageGraph(3, (skip, *middle))
    timeline = simulate(gpipe(3, 1), [StageCost(1, 1, 0)] * 3, graph, cluster(3, bandwidth=1))
    waits = {span.stage: span for span in timeline.spans if span.kind == "wait" and span.start == 0}
    assert waits[1] == Span(1, "wait", 0, 1, 1, 0, "value v0 of micro-batch 0 from stage 0")
    assert waits[2] == Span(2, "wait", 0, 11, 2, 0, "value skip of micro-batch 0 from stage 0")
    assert timeline.of_rank(0)[1] == Span(0, "wait", 1, 23, 0, 0, "grad skip of micro-batch 0 from stage 2")


def test_a_shared_values_gradient_comes_back_as_a_chain() -> None:
    """Stage 0 feeds stages 1 and 2; the gradient goes 2 → 1 → 0, a second each."""
    graph = StageGraph(3, (Value("h", 0, (1, 2)),))
    timeline = simulate(gpipe(3, 1), [StageCost(1, 1, 0)] * 3, graph, cluster(3, latency=1))
    assert picture(timeline, waits=True).splitlines() == [
        "0F0 ... ... ... ... ... ... 0B0",
        "... ... 1F0 ... ... 1B0",
        "... ... 2F0 2B0",
    ]
    assert [span.cause for span in timeline.spans if span.kind == "wait" and span.start > 0] == [
        "grad h of micro-batch 0 from stage 1",
        "grad h of micro-batch 0 from stage 2",
    ]


TIED = StageGraph(2, StageGraph.chain(2).values, (Tied(("embed.weight", "head.weight"), (0, 1), bytes=6),), True)


def test_tied_gradients_travel_per_microbatch_where_they_are_exact() -> None:
    """6 bytes, whatever the micro-batch size."""
    timeline = simulate(gpipe(2, 1), [StageCost(1, 1, 0)] * 2, TIED, cluster(2, bandwidth=1), microbatch_size=9)
    assert timeline.of_rank(0)[1].cause == "tied_grad embed.weight of micro-batch 0 from stage 1"
    assert timeline.of_rank(0)[1].end == 3 + 6


def test_deadlock_beyond_the_schedules_own_check() -> None:
    """Legal as a chain, but 0W0 needs the tied gradient of 1W0, which comes after 1F1, and that after 0W0."""
    schedule = Schedule.of(["0F0 0I0 0W0 0F1 0I1 0W1", "1F0 1I0 1F1 1I1 1W0 1W1"])
    costs = [StageCost(1, 1, 1)] * 2
    assert simulate(schedule, costs, StageGraph.chain(2), cluster(2)).makespan > 0
    with pytest.raises(DeadlockError) as error:
        simulate(schedule, costs, TIED, cluster(2))
    assert str(error.value) == (
        "rank 0 can never run 0W0: it waits for tied_grad embed.weight of micro-batch 0 from stage 1, which never comes"
    )


@st.composite
def simulations(draw: st.DrawFn) -> tuple[Schedule, list[StageCost], StageGraph, Cluster, int]:
    graph = draw(stage_graphs(max_stages=4))
    p = graph.num_stages
    schedule = draw(st.sampled_from([gpipe, one_f_one_b, fill_drain]))(p, draw(st.integers(1, 6)))
    seconds = st.integers(0, 5)
    costs = [StageCost(draw(seconds), draw(seconds), draw(seconds)) for _ in range(p)]
    speeds = tuple(draw(st.sampled_from([0.5, 1.0, 2.0])) for _ in range(p))
    link = Link(draw(seconds), draw(st.sampled_from([1.0, 2.0, float("inf")])))
    return schedule, costs, graph, Cluster(("cpu",) * p, speeds, link), draw(st.integers(1, 3))


@settings(deadline=None)
@given(simulations())
def test_every_rule_on_any_graph(case: tuple[Schedule, list[StageCost], StageGraph, Cluster, int]) -> None:
    """Reads the rules off the finished timeline: order, lengths, earliest possible starts, and gapless spans."""
    schedule, costs, graph, where, size = case
    timeline = simulate(schedule, costs, graph, where, size)
    num_bytes = {value.name: value.bytes_per_sample * size for value in graph.values}
    num_bytes |= {tie.names[0]: tie.bytes for tie in graph.tied}
    compute = {
        Action(span.stage, Op(span.kind), span.microbatch): span for span in timeline.spans if span.kind in COMPUTE
    }
    arrival = {
        key: span.end + (where.link.latency + num_bytes[key.name] / where.link.bandwidth)
        for action, span in compute.items()
        for key in gives(graph, action)
    }
    for rank in range(schedule.num_ranks):
        spans = timeline.of_rank(rank)
        assert spans[0].start == 0
        assert all(first.end == second.start for first, second in pairwise(spans))
        assert all(span.seconds > 0 for span in spans if span.kind == "wait")
        assert [compute[action] for action in schedule.actions(rank)] == [s for s in spans if s.kind in COMPUTE]
        free = 0.0
        for action in schedule.actions(rank):
            span, cost = compute[action], costs[action.stage]
            lengths = {"F": cost.forward_seconds, "B": cost.input_grad_seconds + cost.weight_grad_seconds}
            assert span.seconds == lengths[action.op] / where.speeds[rank]
            came = {str(key): arrival[key] for key in needs(graph, action) if key.source != BATCH}
            assert span.start == max([free, *came.values()])
            if span.start > free:
                before = spans[spans.index(span) - 1]
                assert before[:6] == (rank, "wait", free, span.start, action.stage, action.microbatch)
                assert came[before.cause] == span.start
            free = span.end


def test_arguments_that_do_not_fit() -> None:
    cost = StageCost(1, 1, 1)
    with pytest.raises(PlanError) as error:
        simulate(gpipe(2, 1), [cost] * 3, StageGraph.chain(2), cluster(2))
    assert str(error.value) == (
        "the schedule has 2 stages, the graph 2, and there are 3 stage costs; expected equal numbers"
    )
    with pytest.raises(PlanError, match="the schedule has 2 stages, the graph 4"):
        simulate(gpipe(2, 1), [cost] * 2, StageGraph.chain(4), cluster(2))
    with pytest.raises(PlanError) as error:
        simulate(gpipe(2, 1), [cost] * 2, StageGraph.chain(2), cluster(3))
    assert str(error.value) == "the cluster has 3 ranks, the schedule 2"


def layer_costs(*seconds: tuple[float, float, float]) -> tuple[LayerCost, ...]:
    return tuple(LayerCost(f"layer{i}", *times) for i, times in enumerate(seconds))


def test_stage_costs_are_sums_over_layers() -> None:
    profile = Profile(layer_costs((1, 2, 3), (10, 20, 30), (100, 200, 300)), microbatch_size=1, source="flops")
    assert stage_costs(profile, Partition((0, 2, 3))) == (StageCost(11, 22, 33), StageCost(100, 200, 300))
    with pytest.raises(PlanError) as error:
        stage_costs(profile, Partition((0, 2, 4)))
    assert str(error.value) == "the partition has 4 layers, the profile 3"


def test_predict_a_plan() -> None:
    """Layers of F = 1, B = 2 on two ranks, the second one twice as fast; messages of 2 × 5 bytes at 10 bytes/s."""
    values = tuple(Value(f"h{i}", i, (i + 1,), bytes_per_sample=5) for i in range(3))
    plan = Plan(
        graph=ModelGraph(tuple(Layer(f"layer{i}", "Linear") for i in range(4)), values, cuts=(1, 2, 3)),
        profile=Profile(layer_costs(*[(1, 1, 1)] * 4), microbatch_size=2, source="flops"),
        cluster=Cluster(("cpu", "cpu"), speeds=(1.0, 2.0), link=Link(bandwidth=10)),
        partition=Partition((0, 2, 4)),
        schedule=one_f_one_b(2, 2),
        generator=one_f_one_b,
    )
    timeline = predict(plan)
    assert picture(timeline, waits=True).splitlines() == [
        "0F0 0F0 0F1 0F1 ... ... ... 0B0 0B0 0B0 0B0 0B1 0B1 0B1 0B1",
        "... ... ... 1F0 1B0 1B0 1F1 1B1 1B1",
    ]
    assert timeline.of_rank(1)[0].cause == "value h1 of micro-batch 0 from stage 0"
    told = prediction(timeline)
    assert told.step_seconds == 15
    assert told.utilization == (12 / 15, 6 / 15)
    assert told.bubble == pytest.approx(1 - 18 / 30)
    assert Plan.from_json(plan.with_prediction(told).to_json()).prediction == told
