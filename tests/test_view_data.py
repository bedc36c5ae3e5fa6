"""What the Pipeline view is told: RUNS and TRACE, from traces of which every number is known."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tensorboard import small_plan, step

from modelpar.planning import schedules
from modelpar.planning.analysis import analyse
from modelpar.planning.breakdown import PARTS
from modelpar.planning.cluster import Cluster, Link
from modelpar.planning.graph import BATCH, Layer, ModelGraph, Parameter, Value
from modelpar.planning.memory import memory_curves, stage_memory_bytes
from modelpar.planning.partition import Partition
from modelpar.planning.plan import Plan
from modelpar.planning.profile import LayerCost, Profile
from modelpar.planning.schedule import Schedule
from modelpar.planning.simulate import predict
from modelpar.planning.timeline import COMPUTE, Span, Timeline
from modelpar.report.runs import Run
from modelpar.report.trace import Trace, encode
from modelpar.report.view_runs import ideal_bubble, runs_json
from modelpar.report.view_trace import chrome_json, trace_json, waiting


def chain_plan(schedule: Schedule, seconds: list[float], link: Link | None = None, **cluster: object) -> Plan:
    """Returns a plan of a layer per stage, each with a forward of so many seconds and a backward of twice that."""
    size = len(seconds)
    layers = tuple(Layer(f"h{i}", "Linear", (Parameter(f"h{i}.weight", (4, 4), "float32", True),)) for i in range(size))
    costs = tuple(
        LayerCost(layer.name, s, s, s, kept_bytes=100, temporary_bytes=10)
        for layer, s in zip(layers, seconds, strict=True)
    )
    values = [Value(f"h{i}", i, (i + 1,), 8.0) for i in range(size - 1)]
    batch = [Value("inputs", BATCH, (0,), 0.0, False), Value("targets", BATCH, (size - 1,), 0.0, False)]
    return Plan(
        graph=ModelGraph(layers, (*batch, *values), tuple(range(1, size))),
        profile=Profile(costs, 1, "measured"),
        cluster=Cluster(("cpu",) * schedule.num_ranks, link=link or Link(), **cluster),  # type: ignore[arg-type]
        partition=Partition(tuple(range(size + 1)), "optimal"),
        schedule=schedule,
        generator=schedules.one_f_one_b,
    )


def run_of(plan: Plan, name: str = "run", measured: bool = True, seconds: float | None = None) -> Run:
    blob = encode(Trace(plan, 4, predict(plan), (), measured, "1f1b"))
    return Run(name, steps=(4,), blobs=(blob,), num_steps=5, step_seconds=seconds, bubble=0.25 if seconds else None)


# --- memory in the course of a step --------------------------------------------------------------------------------


def test_memory_rises_with_forwards_and_falls_with_backwards() -> None:
    plan = chain_plan(schedules.gpipe(1, 2), [1.0])
    fixed = 4 * 4 * 4 * (1 + 1 + 2)  # weight, gradient, two moments
    timeline = Timeline(
        1,
        (
            Span(0, "F", 1.0, 2.0, 0, 0),
            Span(0, "wait", 2.0, 3.0, 0, 1, "value"),
            Span(0, "F", 3.0, 4.0, 0, 1),
            Span(0, "B", 4.0, 6.0, 0, 0),
            Span(0, "B", 7.0, 9.0, 0, 1),
        ),
    )
    (curve,) = memory_curves(plan, timeline)
    assert curve == (
        (0.0, fixed),
        (1.0, fixed + 110),
        (2.0, fixed + 100),
        (3.0, fixed + 210),
        (6.0, fixed + 100),
        (7.0, fixed + 110),
        (9.0, fixed),
    )


def test_input_gradients_free_nothing_and_weight_gradients_do() -> None:
    plan = chain_plan(Schedule.of(["0F0 0I0 0W0"]), [1.0])
    spans = (Span(0, "F", 0.0, 1.0, 0, 0), Span(0, "I", 1.0, 2.0, 0, 0), Span(0, "W", 2.0, 3.0, 0, 0))
    (curve,) = memory_curves(plan, Timeline(1, spans))
    assert [held - curve[-1][1] for _, held in curve] == [110, 0]


@settings(max_examples=30)
@given(st.sampled_from([schedules.gpipe, schedules.one_f_one_b]), st.integers(1, 5), st.integers(1, 9))
def test_the_highest_point_of_a_predicted_step_is_the_predicted_peak(generator, num_ranks, num_microbatches) -> None:  # type: ignore[no-untyped-def]
    plan = chain_plan(generator(num_ranks, num_microbatches), [1.0 + i for i in range(num_ranks)], Link(0.5))
    curves = memory_curves(plan, predict(plan))
    assert tuple(max(held for _, held in curve) for curve in curves) == stage_memory_bytes(plan)
    for curve in curves:
        times = [seconds for seconds, _ in curve]
        assert times == sorted(set(times))
        assert times[0] == 0.0
        assert curve[-1][1] == min(held for _, held in curve)


def test_a_rank_holds_all_of_its_stages() -> None:
    plan = chain_plan(Schedule.of(["0F0 2F0 2B0 0B0", "1F0 3F0 3B0 1B0"]), [1.0] * 4)
    fixed = sum(stage_memory_bytes(plan)[stage] - 10 - 100 - (8 if stage else 0) for stage in (0, 2))
    assert memory_curves(plan, predict(plan))[0][0] == (0.0, fixed + 110)
    assert memory_curves(plan, predict(plan))[0][-1][1] == fixed


# --- shares of a step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 4), (2, 8), (4, 6)])
@pytest.mark.parametrize("generator", [schedules.gpipe, schedules.one_f_one_b])
def test_the_ideal_bubble_is_that_of_the_formula(generator, num_ranks, num_microbatches) -> None:  # type: ignore[no-untyped-def]
    """(p − 1) / (m + p − 1), however uneven the stages and slow the links."""
    plan = chain_plan(generator(num_ranks, num_microbatches), [1.0 + 3 * i for i in range(num_ranks)], Link(5.0))
    assert ideal_bubble(plan) == pytest.approx((num_ranks - 1) / (num_microbatches + num_ranks - 1))


def test_waits_are_split_where_computing_begins_and_ends() -> None:
    spans = (
        Span(0, "data", 0.0, 1.0),
        Span(0, "wait", 1.0, 3.0, 0, 0, "value"),
        Span(0, "F", 3.5, 4.0, 0, 0),
        Span(0, "wait", 4.0, 5.0, 0, 0, "grad"),
        Span(0, "B", 5.25, 6.0, 0, 0),
        Span(0, "wait", 6.0, 8.0, 0, -1, "count"),
        Span(0, "reduce", 8.0, 9.0),
    )
    assert waiting(spans, 10.0) == (2.5, 1.25, 3.0)
    assert waiting((), 10.0) == (10.0, 0.0, 0.0)


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 6), st.floats(0.0, 3.0), st.lists(st.floats(0.1, 3.0), min_size=4, max_size=4))
def test_fill_stall_and_drain_are_the_waits_and_the_idle_time(ranks, microbatches, latency, seconds) -> None:  # type: ignore[no-untyped-def]
    link = Link(latency, send_seconds=0.1, take_seconds=0.2, data_seconds=0.5)
    timeline = predict(chain_plan(schedules.one_f_one_b(ranks, microbatches), seconds[:ranks], link))
    for rank, times in enumerate(analyse(timeline).ranks):
        found = waiting(timeline.of_rank(rank), timeline.makespan)
        assert sum(found) == pytest.approx(times.wait + times.idle, abs=1e-9)


# --- TRACE -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trace() -> Trace:
    """A step in which stage 1 took twice as long as planned."""
    plan = chain_plan(schedules.one_f_one_b(2, 4), [1.0, 1.0], Link(0.25, send_seconds=0.125), memory=(1000, None))
    slow = predict(chain_plan(plan.schedule, [1.0, 2.0], plan.cluster.link))
    return Trace(plan, 7, replace(slow, clock_error=0.5), (900, 800), schedule="1f1b")


def test_a_trace_shows_every_span_in_order(trace: Trace) -> None:
    found = trace_json("a run", trace)
    assert (found["run"], found["step"], found["measured"], found["clock_error"]) == ("a run", 7, True, 0.5)
    assert found["makespan"] == trace.timeline.makespan
    assert found["predicted_makespan"] == predict(trace.plan).makespan < found["makespan"]
    for rank, shown in enumerate(found["ranks"]):
        spans = trace.timeline.of_rank(rank)
        assert [(start, end, stage, number) for _, start, end, stage, number, _ in shown["spans"]] == [
            (pytest.approx(s.start), pytest.approx(s.end), s.stage, s.microbatch) for s in spans
        ]
        assert len(shown["predicted"]) == len(predict(trace.plan).of_rank(rank))
        assert {span[0] for span in (*shown["spans"], *shown["predicted"])} <= set(found["looks"])
        assert shown["utilization"] == trace.timeline.utilization(rank)
    assert [rank["name"] for rank in found["ranks"]] == ["stage 0", "stage 1"]
    assert [rank["memory_limit"] for rank in found["ranks"]] == [1000, None]
    assert [rank["peak_bytes"] for rank in found["ranks"]] == [900, 800]
    assert found["headline"]
    assert found["sentences"]
    json.dumps(found, allow_nan=False)


def test_arrows_lead_from_what_sent_a_value_to_what_used_it(trace: Trace) -> None:
    found = trace_json("run", trace)
    ways = []
    for source, i, target, j in found["arrows"]:
        sent, used = found["ranks"][source]["spans"][i], found["ranks"][target]["spans"][j]
        assert sent[2] <= used[1]
        ways.append((sent[0], sent[3], used[0], used[3], used[4]))
    forwards = [("send", 0, "F", 1, number) for number in range(4)]
    backwards = [("send", 1, "B", 0, number) for number in range(4)]
    assert sorted(ways) == sorted(forwards + backwards)
    assert len(found["predicted_arrows"]) == 8


def test_the_critical_path_ends_with_the_step_and_runs_through_the_slow_stage(trace: Trace) -> None:
    found = trace_json("run", trace)
    path = [found["ranks"][rank]["spans"][i] for rank, i in found["critical"]]
    assert path[-1][2] == pytest.approx(found["makespan"])
    assert [span[2] for span in path] == sorted(span[2] for span in path)
    shares = [stage["critical_share"] for stage in found["stages"]]
    assert shares[1] > 0.6 > shares[0] > 0


def test_the_stages_have_their_own_times(trace: Trace) -> None:
    first, second = trace_json("run", trace)["stages"]
    assert (first["layers"], first["parameters"], first["peak_bytes"]) == (["h0"], 16, 900)
    assert second["forward_seconds"] == pytest.approx(2.0)
    assert second["backward_seconds"] == pytest.approx(4.0)
    assert second["predicted_forward_seconds"] == pytest.approx(1.0)
    assert second["predicted_backward_seconds"] == pytest.approx(2.0)
    assert list(second["waits"]) == ["value h0 from stage 0"]
    waited = sum(s.seconds for s in trace.timeline.of_rank(0) if s.kind == "wait")
    assert sum(first["waits"].values()) == pytest.approx(waited)


def test_split_backwards_are_added_up_per_micro_batch() -> None:
    plan = chain_plan(Schedule.of(["0F0 0F1 0I0 0I1 0W0 0W1"]), [1.0])
    (stage,) = trace_json("run", Trace(plan, 0, predict(plan)))["stages"]
    assert stage["backward_seconds"] == pytest.approx(2.0)


def test_a_rank_with_several_stages_keeps_its_peak_to_itself() -> None:
    plan = chain_plan(Schedule.of(["0F0 2F0 2B0 0B0", "1F0 3F0 3B0 1B0"]), [1.0] * 4)
    found = trace_json("run", Trace(plan, 0, predict(plan), (5, 6)))
    assert [(rank["name"], rank["stages"], rank["peak_bytes"]) for rank in found["ranks"]] == [
        ("rank 0", [0, 2], 5),
        ("rank 1", [1, 3], 6),
    ]
    assert [stage["peak_bytes"] for stage in found["stages"]] == [None] * 4


def test_a_prediction_is_not_shown_twice() -> None:
    plan = chain_plan(schedules.gpipe(2, 2), [1.0, 1.0])
    found = trace_json("run", Trace(plan, 0, predict(plan), measured=False))
    assert not found["measured"]
    assert found["predicted_arrows"] == []
    for rank in found["ranks"]:
        assert (rank["predicted"], rank["predicted_memory"], rank["peak_bytes"]) == ([], [], None)
        assert len(rank["spans"]) > 3


def test_a_single_stage_has_no_arrows() -> None:
    plan = chain_plan(schedules.gpipe(1, 3), [1.0])
    found = trace_json("run", Trace(plan, 0, predict(plan)))
    assert found["arrows"] == []
    assert len(found["critical"]) == len(found["ranks"][0]["spans"]) == 6
    assert found["stages"][0]["critical_share"] == pytest.approx(1.0)


def test_a_step_of_few_samples_is_shown_all_the_same() -> None:
    plan = chain_plan(schedules.one_f_one_b(2, 4), [1.0, 1.0])
    ragged = predict(replace(plan, schedule=schedules.one_f_one_b(2, 3)))
    found = trace_json("run", Trace(plan, 9, ragged))
    assert found["headline"] == "a step with fewer micro-batches than planned"
    assert sum(span[0] in COMPUTE for rank in found["ranks"] for span in rank["spans"]) == 12
    (row,) = runs_json([Run("run", blobs=(encode(Trace(plan, 9, ragged)),))], [])["runs"]
    assert row["problem"] is None
    assert sum(part["seconds"] for part in row["parts"]) == pytest.approx(ragged.makespan)


def test_a_chrome_trace_holds_both_timelines(trace: Trace) -> None:
    events = chrome_json(trace)["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {"stage 0", "stage 1", "stage 0 predicted", "stage 1 predicted"}
    assert any(event["ph"] == "C" for event in events)


# --- RUNS ------------------------------------------------------------------------------------------------------------


def test_a_row_has_the_numbers_of_the_run_and_of_its_trace() -> None:
    plan = chain_plan(schedules.one_f_one_b(2, 4), [1.0, 1.5], memory=(1000, 2000))
    found = runs_json([run_of(plan, seconds=20.0)], ["a note"])
    assert (found["format"], found["notes"]) == (1, ["a note"])
    (row,) = found["runs"]
    assert (row["schedule"], row["partition"], row["balance"], row["steps"]) == ("1f1b", "optimal", [1, 1], [4])
    assert (row["num_ranks"], row["num_stages"], row["num_microbatches"], row["num_steps"]) == (2, 2, 4, 5)
    assert (row["step_seconds"], row["relative"], row["utilization"], row["bubble"]) == (20.0, 1.0, 0.75, 0.25)
    assert row["predicted_seconds"] == predict(plan).makespan
    assert row["error"] == pytest.approx(row["predicted_seconds"] / 20.0 - 1.0)
    assert [part["name"] for part in row["parts"]] == list(PARTS)
    assert sum(part["seconds"] for part in row["parts"]) == pytest.approx(predict(plan).makespan)
    assert row["imbalance"] == pytest.approx(1.2)
    assert row["ideal_bubble"] == pytest.approx(0.2)
    fullest = max(stage_memory_bytes(plan))
    assert (row["peak_bytes"], row["memory_limit"]) == (fullest, 1000)
    assert row["headline"]
    json.dumps(found, allow_nan=False)


def test_the_memory_limit_is_that_of_the_fullest_rank() -> None:
    plan = chain_plan(schedules.one_f_one_b(2, 4), [1.0, 1.5], memory=(1000, 2000))
    blob = encode(Trace(plan, 4, predict(plan), (700, 900)))
    (row,) = runs_json([Run("run", blobs=(blob,))], [])["runs"]
    assert (row["peak_bytes"], row["memory_limit"]) == (900, 2000)


def test_the_step_of_median_length_stands_for_a_run() -> None:
    plan = chain_plan(schedules.one_f_one_b(2, 4), [1.0, 1.0])
    slower = [predict(chain_plan(plan.schedule, [seconds, seconds])) for seconds in (3.0, 1.0, 2.0)]
    blobs = tuple(encode(Trace(plan, number, timeline)) for number, timeline in enumerate(slower))
    (row,) = runs_json([Run("run", steps=(0, 1, 2), blobs=blobs)], [])["runs"]
    assert row["parts_step"] == 2
    assert sum(part["seconds"] for part in row["parts"]) == pytest.approx(slower[2].makespan)


def test_runs_are_in_order_measured_then_predicted_then_broken() -> None:
    plan = chain_plan(schedules.one_f_one_b(2, 4), [1.0, 1.0])
    slow_plan = chain_plan(schedules.one_f_one_b(2, 4), [2.0, 2.0])
    runs = [
        Run("without", "holds no traces: none"),
        run_of(slow_plan, "predicted slow", measured=False),
        run_of(plan, "slow", seconds=30.0),
        run_of(plan, "predicted", measured=False),
        Run("broken", blobs=(b"nonsense",)),
        run_of(plan, "fast", seconds=20.0),
    ]
    rows = runs_json(runs, [])["runs"]
    assert [(row["run"], row["relative"]) for row in rows] == [
        ("fast", 1.0),
        ("slow", 1.5),
        ("predicted", 1.0),
        ("predicted slow", pytest.approx(2.0)),
        ("broken", None),
        ("without", None),
    ]
    predicted = rows[2]
    assert (predicted["measured"], predicted["error"]) == (False, None)
    assert predicted["step_seconds"] == predicted["predicted_seconds"] == predict(plan).makespan
    assert rows[4]["problem"].startswith("the trace is broken")
    assert rows[5]["problem"] == "holds no traces: none"
    assert rows[4].keys() == rows[0].keys()


def test_a_run_without_a_name_for_its_schedule_shows_its_function() -> None:
    plan = replace(small_plan(), generator=schedules.gpipe)
    for generator, shown in ((schedules.gpipe, "gpipe"), (None, "an order of its own")):
        blob = encode(Trace(replace(plan, generator=generator), 0, step(0).timeline))
        assert runs_json([Run("run", blobs=(blob,))], [])["runs"][0]["schedule"] == shown
