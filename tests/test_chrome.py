"""Chrome traces: what is in them, and that viewers can read them. tests/trace_format.py is the reader."""

from __future__ import annotations

import copy
import gzip
import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_report import measured_timeline, unit_timeline
from trace_format import Event, check, end_of, ns

from modelpar import Objective, Pipeline, Workers, partitioners, plan
from modelpar.errors import ConfigError
from modelpar.planning import schedules
from modelpar.planning.cluster import Cluster, Link
from modelpar.planning.flow import flow
from modelpar.planning.graph import StageGraph
from modelpar.planning.schedule import Schedule
from modelpar.planning.simulate import StageCost, predict, simulate
from modelpar.planning.timeline import Span, Timeline
from modelpar.report.chrome import chrome_trace, write_trace

CHAIN = StageGraph.chain(2)


def with_messages(graph: StageGraph) -> Timeline:
    """Returns a simulated step with sends, transfers and the end of the step."""
    ranks = graph.num_stages
    cluster = Cluster(("cpu",) * ranks, link=Link(latency=1e-4, bandwidth=1e9, send_seconds=3.3e-5))
    costs = [StageCost(1e-3 / 3, 1e-3 / 7, 1e-3 / 9, 2e-4, 4e-4)] * ranks
    return simulate(schedules.one_f_one_b(ranks, 8), costs, graph, cluster)


def slices(trace: dict[str, Any]) -> list[Event]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def names(trace: dict[str, Any], what: str) -> dict[int, Any]:
    """Returns what processes or lanes are called, or how they are ordered, by number."""
    number = "tid" if what.startswith("thread") else "pid"
    found = [event for event in trace["traceEvents"] if event["name"] == what]
    return {event[number]: next(iter(event["args"].values())) for event in found}


def lanes(trace: dict[str, Any]) -> dict[tuple[str, str], list[str]]:
    """Returns the names of the slices by (process, lane)."""
    processes, threads = names(trace, "process_name"), names(trace, "thread_name")
    found: dict[tuple[str, str], list[str]] = {}
    for event in slices(trace):
        found.setdefault((processes[event["pid"]], threads[event["tid"]]), []).append(event["name"])
    return found


def test_a_process_per_stage_and_a_lane_per_kind() -> None:
    trace = chrome_trace(measured_timeline(), CHAIN, (0, 1))
    check(trace)
    assert lanes(trace) == {
        ("stage 0", "step"): ["data", "reduce", "optimizer"],
        ("stage 0", "compute"): ["F0", "B0"],
        ("stage 0", "transfers"): ["send"],
        ("stage 0", "waits"): ["waits for gradients"],
        ("stage 1", "waits"): ["waits for activations", "waits at the step's end"],
        ("stage 1", "compute"): ["F0", "B0"],
        ("stage 1", "step"): ["optimizer"],
    }
    [wait] = [event for event in slices(trace) if event["name"] == "waits for gradients"]
    assert (wait["ts"], wait["dur"]) == (2100, 3900)
    assert wait["args"] == {"rank": 0, "stage": 0, "microbatch": 0, "cause": "grad v1 of micro-batch 0 from stage 1"}
    assert list(names(trace, "process_labels").values()) == ["rank 0", "rank 1"]


def test_every_arrow_is_bound_to_the_spans_that_sent_and_used_the_value() -> None:
    graph = replace(StageGraph.chain(4), clips=True)
    timeline = with_messages(graph)
    trace = chrome_trace(timeline, graph, range(4), timeline)
    found = check(trace)
    arrows = flow(timeline, graph, range(4)).arrows
    assert len(arrows) >= 3 * 8 * 2  # a value and a gradient per border and micro-batch
    assert trace["otherData"] == {"writer": "modelpar", "arrows": 2 * len(arrows), "arrows_left_out": 0}
    by_start = {(span.rank, round(span.start * 1e9), round(span.end * 1e9)): i for i, span in enumerate(timeline.spans)}

    def index(event: Event) -> int:
        return by_start[event["args"]["rank"], ns(event["ts"]), end_of(event)]

    bound = sorted((index(arrow.source), index(arrow.target)) for arrow in found)
    assert bound == sorted(2 * [(arrow.source, arrow.target) for arrow in arrows])
    assert {arrow.start["name"] for arrow in found} == {"activations", "gradients", "step's end"}
    assert {arrow.source["name"] for arrow in found if arrow.start["name"] == "gradients"} == {"send"}


def test_the_predicted_step_is_in_processes_of_its_own_above_the_measured_one() -> None:
    trace = chrome_trace(measured_timeline(), CHAIN, (0, 1), unit_timeline(schedules.gpipe(2, 1)))
    check(trace)
    assert lanes(trace)["stage 1 predicted", "compute"] == ["F0", "B0"]
    assert len(slices(trace)) == len(measured_timeline().spans) + len(unit_timeline(schedules.gpipe(2, 1)).spans)
    called, order = names(trace, "process_name"), names(trace, "process_sort_index")
    assert [called[pid] for pid in sorted(order, key=lambda pid: order[pid])] == [
        "stage 0 predicted",
        "stage 0",
        "stage 1 predicted",
        "stage 1",
    ]


def test_what_belongs_to_a_rank_is_in_the_process_of_its_first_stage() -> None:
    schedule = Schedule.of(["0F0 2F0 2B0 0B0", "1F0 3F0 3B0 1B0"])
    costs = [StageCost(1e-3, 1e-3, 1e-3, 1e-4, 1e-4)] * 4
    timeline = simulate(schedule, costs, StageGraph.chain(4), Cluster(("cpu", "cpu"), link=Link(latency=1e-4)))
    trace = chrome_trace(timeline, StageGraph.chain(4), schedule.stage_to_rank)
    assert len(check(trace)) >= 6
    found = lanes(trace)
    assert {process for (process, lane), events in found.items() if "optimizer" in events} == {"stage 0", "stage 1"}
    assert found["stage 2", "compute"] == ["F0", "B0"]
    assert list(names(trace, "process_labels").values()) == ["rank 0", "rank 1", "rank 0", "rank 1"]


def test_memory_is_a_counter_of_the_rank() -> None:
    trace = chrome_trace(measured_timeline(), CHAIN, (0, 1), memory={1: [(0.0, 2e6), (0.005, 3.5e6)]})
    check(trace)
    counters = [event for event in trace["traceEvents"] if event["ph"] == "C"]
    assert [(event["name"], event["ts"], event["args"]) for event in counters] == [
        ("memory", 0, {"MB": 2.0}),
        ("memory", 5000, {"MB": 3.5}),
    ]
    assert {names(trace, "process_name")[event["pid"]] for event in counters} == {"stage 1"}


def test_a_span_of_a_kind_that_is_new_has_a_lane_too() -> None:
    trace = chrome_trace(Timeline(1, (Span(0, "defrag", 0.0, 1.0),)), StageGraph.chain(1), (0,))
    check(trace)
    assert lanes(trace) == {("stage 0", "other"): ["defrag"]}


@given(st.lists(st.floats(0, 1e-3, allow_subnormal=False), min_size=1, max_size=30), st.floats(0, 1e5))
def test_spans_that_touch_do_not_overlap_in_nanoseconds(seconds: list[float], begin: float) -> None:
    spans, now = [], begin
    for number, each in enumerate(seconds):
        spans.append(Span(0, "F", now, now + each, 0, number))
        now += each
    trace = chrome_trace(Timeline(1, tuple(spans)), StageGraph.chain(1), (0,))
    check(trace)
    found = slices(trace)
    for before, after in pairwise(found):
        assert end_of(before) == ns(after["ts"])  # neither an overlap nor a gap


def test_every_nanosecond_is_the_same_cut_off_or_rounded() -> None:
    """1.001 µs times 1,000 is 1000.9999999999999."""
    spans = tuple(Span(0, "F", i / 1e9, (i + 1) / 1e9, 0, i) for i in range(3000))
    trace = chrome_trace(Timeline(1, spans), StageGraph.chain(1), (0,))
    check(trace)
    assert [ns(event["ts"]) for event in slices(trace)] == list(range(3000))


def sending(sent: tuple[float, float], used: tuple[float, float]) -> Timeline:
    """Returns a forward and its send on rank 0, and the forward on rank 1 that uses the value; times are in ms."""
    first, send = Span(0, "F", 0.0, sent[0] / 1e3, 0, 0), Span(0, "send", sent[0] / 1e3, sent[1] / 1e3, 0, 0)
    return Timeline(2, (first, send, Span(1, "F", used[0] / 1e3, used[1] / 1e3, 1, 0)))


def test_an_arrow_begins_earlier_where_its_target_began_before_the_send_was_over() -> None:
    [arrow] = check(chrome_trace(sending((1.0, 2.0), (1.5, 3.0)), CHAIN, (0, 1)))
    assert (arrow.source["name"], arrow.target["name"]) == ("send", "F0")
    assert (ns(arrow.start["ts"]), ns(arrow.end["ts"])) == (1_500_001, 1_500_001)
    [arrow] = check(chrome_trace(sending((1.0, 2.0), (2.5, 3.0)), CHAIN, (0, 1)))
    assert (ns(arrow.start["ts"]), ns(arrow.end["ts"])) == (1_999_999, 2_500_001)


def test_an_arrow_ends_later_where_clocks_put_its_target_before_the_send() -> None:
    [arrow] = check(chrome_trace(sending((1.0, 2.0), (0.9, 3.0)), CHAIN, (0, 1)))
    assert (ns(arrow.start["ts"]), ns(arrow.end["ts"])) == (1_000_001, 1_000_001)


@pytest.mark.parametrize(
    "timeline",
    [sending((1.0, 2.0), (0.2, 0.7)), sending((1.0, 1.000001), (2.0, 3.0)), sending((1.0, 2.0), (2.0, 2.000001))],
    ids=["used before it was sent", "sent in a nanosecond", "used in a nanosecond"],
)
def test_arrows_that_cannot_be_drawn_are_left_out_and_counted(timeline: Timeline) -> None:
    trace = chrome_trace(timeline, CHAIN, (0, 1))
    assert check(trace) == []
    assert trace["otherData"] == {"writer": "modelpar", "arrows": 0, "arrows_left_out": 1}


def test_a_real_step_with_its_prediction() -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(4)]
    objective = Objective(torch.nn.Sequential(*layers), torch.nn.functional.mse_loss)
    batch = torch.randn(16, 8), torch.randn(16, 8)
    settings = {"partitioner": partitioners.uniform, "schedule": schedules.one_f_one_b, "profile": "flops"}
    p = plan(objective, batch, num_ranks=3, num_microbatches=4, **settings)
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    with Workers(3, transport="threads") as workers, Pipeline(objective, p, workers=workers, optimizer=sgd) as pipeline:
        timeline = [result.timeline for result in pipeline.steps([batch] * 2)][-1]
    trace = chrome_trace(timeline, p.stage_graph, p.schedule.stage_to_rank, predict(p))
    found = check(trace)
    measured = [arrow for arrow in found if arrow.source["pid"] <= 3]
    kinds = [arrow.start["name"] for arrow in measured]
    assert (kinds.count("activations"), kinds.count("gradients")) == (2 * 4, 2 * 4)
    assert trace["otherData"]["arrows_left_out"] == 0
    assert len(slices(trace)) == len(timeline.spans) + len(predict(p).spans)


def test_a_trace_is_written_plain_or_packed(tmp_path) -> None:
    timeline = Timeline(1, (Span(0, "wait", 0.0, 1.0, 0, 0, "value übergang of micro-batch 0 from stage 0"),))
    trace = chrome_trace(timeline, StageGraph.chain(1), (0,))
    write_trace(trace, tmp_path / "a.json")
    write_trace(trace, tmp_path / "a.json.gz")
    plain = (tmp_path / "a.json").read_bytes()
    assert gzip.decompress((tmp_path / "a.json.gz").read_bytes()) == plain
    assert json.loads(plain) == trace
    assert b"\\u" not in plain
    assert "übergang" in plain.decode()
    for name in ("trace", "trace.gz", "trace.txt"):
        message = f"the trace file is {tmp_path / name}; expected a name that ends in .json or .json.gz"
        with pytest.raises(ConfigError, match=re.escape(message)):
            write_trace(trace, tmp_path / name)


def first(trace: dict[str, Any], **values: Any) -> Event:
    events: list[Event] = trace["traceEvents"]
    return next(event for event in events if all(event.get(key) == value for key, value in values.items()))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: first(t, ph="X").pop("dur"), "dur"),
        (lambda t: first(t, ph="X").update(ts=-1.0), "negative"),
        (lambda t: first(t, ph="X").update(pid="1"), "whole number"),
        (lambda t: first(t, ph="X", name="F1").update(dur=1500.0), "overlaps"),
        (lambda t: first(t, ph="X", name="F3").update(dur=1.001), "cut off"),
        (lambda t: t["traceEvents"].reverse(), "order of time"),
        (lambda t: t["traceEvents"].remove(first(t, ph="s")), "has none"),
        (lambda t: t["traceEvents"].remove(first(t, ph="f")), "without an end"),
        (lambda t: first(t, ph="f").pop("bp"), "slice after it"),
        (lambda t: first(t, ph="f").update(id=999), "has none"),
        (lambda t: first(t, ph="f", name="gradients").update(tid=10_001), "in no slice|another process"),
        (lambda t: first(t, ph="f").update(ts=float(round(first(t, ph="f")["ts"]))), "on its edge"),
        (lambda t: t["traceEvents"].remove(first(t, name="thread_name")), "has no name"),
        (lambda t: first(t, name="thread_name").update(tid=2), "number of a process|has no name"),
        (lambda t: t.update(displayTimeUnit="s"), "display unit"),
        (lambda t: first(t, ph="X").update(ts=float("nan")), "not JSON compliant|nan"),
    ],
)
def test_the_reader_finds_what_is_wrong(spoil: Callable[[dict[str, Any]], object], message: str) -> None:
    trace = chrome_trace(unit_timeline(schedules.gpipe(2, 4)), CHAIN, (0, 1))
    check(trace)
    spoilt = copy.deepcopy(trace)
    spoil(spoilt)
    with pytest.raises((AssertionError, KeyError, ValueError), match=message):
        check(spoilt)
