"""One traced step as bytes: what is kept, versions, broken and foreign bytes."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tensorboard import small_plan, step

from modelpar.errors import ConfigError
from modelpar.planning import schedules
from modelpar.planning.plan import Plan
from modelpar.planning.schedule import Schedule
from modelpar.planning.simulate import predict
from modelpar.planning.timeline import Span, Timeline
from modelpar.report.trace import FORMAT, Trace, decode, encode

FORMAT_1 = Path(__file__).parent / "traces" / "format1.gz"


def own_schedule(num_ranks: int, num_microbatches: int) -> Schedule:
    """Stands for a schedule that a user wrote."""
    return schedules.gpipe(num_ranks, num_microbatches)


def content(data: bytes) -> dict[str, Any]:
    return json.loads(gzip.decompress(data))


def packed(data: dict[str, Any]) -> bytes:
    return gzip.compress(json.dumps(data).encode())


def test_a_trace_comes_back_as_it_was() -> None:
    plan = replace(small_plan(schedules.one_f_one_b(3, 5)), generator=schedules.one_f_one_b)
    timeline = replace(predict(plan), clock_error=0.00125)
    trace = Trace(plan, 99, timeline, (3, 2, 1), measured=False, schedule="1f1b")
    found = decode(encode(trace))
    assert found.plan == plan
    assert found.plan.generator is schedules.one_f_one_b
    assert (found.step, found.peak_bytes, found.measured, found.schedule) == (99, (3, 2, 1), False, "1f1b")
    assert found.timeline == timeline
    assert encode(found) == encode(trace)


@given(st.lists(st.tuples(st.integers(0, 10**12), st.integers(0, 10**9)), max_size=8), st.integers(0, 1))
def test_times_are_kept_to_the_nanosecond(times: list[tuple[int, int]], rank: int) -> None:
    spans, now = [], 0
    for gap, length in times:
        spans.append(Span(rank, "F", (now + gap) / 1e9, (now + gap + length) / 1e9, rank, len(spans)))
        now += gap + length
    timeline = Timeline(2, tuple(spans))
    found = decode(encode(Trace(small_plan(), 0, timeline))).timeline
    assert found == timeline
    for before, after in zip(found.spans, found.spans[1:], strict=False):
        assert before.end <= after.start


def test_spans_that_overlap_are_kept_as_they_are() -> None:
    timeline = Timeline(2, (Span(0, "F", 0.0, 0.5, 0, 0), Span(0, "send", 0.25, 0.375, 0, 0)))
    assert decode(encode(Trace(small_plan(), 0, timeline))).timeline == timeline


def test_format_1_is_still_read() -> None:
    """A step of four layers in two stages over threads, written by the first version of the format."""
    written = content(FORMAT_1.read_bytes())
    trace = decode(FORMAT_1.read_bytes())
    assert written["format"] == 1 < FORMAT
    assert (trace.step, trace.measured, trace.peak_bytes, trace.schedule) == (5, True, (), "")
    assert trace.plan.partition.balance == (2, 2)
    assert trace.plan.num_microbatches == 4
    assert len(trace.timeline.spans) == len(written["spans"]) == 36
    rank, kind, start, end, stage, microbatch, cause = written["spans"][3]
    assert trace.timeline.spans[3] == (rank, kind, start / 1e9, end / 1e9, stage, microbatch, cause)
    assert trace.timeline.makespan == pytest.approx(7.327906e-3)
    assert decode(encode(trace)).timeline == trace.timeline


def test_a_newer_format_is_refused_with_both_numbers() -> None:
    data = content(encode(Trace(small_plan(), 0, step(0).timeline)))
    with pytest.raises(ConfigError) as raised:
        decode(packed({**data, "format": FORMAT + 1}))
    assert str(raised.value) == f"the trace has format {FORMAT + 1}, of a newer modelpar; expected {FORMAT} or less"


def broken_traces() -> dict[str, bytes]:
    whole = encode(Trace(small_plan(), 0, step(0).timeline))
    data = content(whole)
    lacking = {key: value for key, value in data.items() if key != "ranks"}
    short = {**data, "ranks": [{**data["ranks"][0], "kind": []}, data["ranks"][1]]}
    stage = {**data["ranks"][0], "stage": [7] * len(data["ranks"][0]["stage"])}

    def first(column: str, value: object) -> bytes:
        """The trace with another first entry of a column of rank 0."""
        columns = data["ranks"][0]
        changed = {**columns, column: [value, *columns[column][1:]]}
        return packed({**data, "ranks": [changed, data["ranks"][1]]})

    return {
        "far too deep": gzip.compress(b"[" * 100_000 + b"]" * 100_000),
        "a time beyond all floats": first("gap", 10**400),
        "a span that ends before it begins": first("length", -(10**9)),
        "a start before the step's": first("gap", -(10**9)),
        "a computation of no stage": first("stage", -1),
        "a stage below none": first("stage", -5),
        "a computation of no micro-batch": first("microbatch", -1),
        "a kind that is no text": first("kind", None),
        "peaks that are no numbers": packed({**data, "peak_bytes": [None, None]}),
        "more peaks than ranks": packed({**data, "peak_bytes": [1, 2, 3]}),
        "a step that is no number": packed({**data, "step": "x"}),
        "a clock error that is no number": packed({**data, "clock_error": float("nan")}),
        "no bytes": b"",
        "cut off": whole[: len(whole) // 2],
        "no gzip": b"hello",
        "no json": gzip.compress(b"hello"),
        "a list": gzip.compress(b"[]"),
        "nothing in it": packed({}),
        "no spans": packed(lacking),
        "columns of different lengths": packed(short),
        "a stage that the plan has not": packed({**data, "ranks": [stage, data["ranks"][1]]}),
        "a rank that the plan has not": packed({**data, "ranks": [*data["ranks"], data["ranks"][0]]}),
        "no plan": packed({**data, "plan": {"schedule": {}}}),
    }


@pytest.mark.parametrize("what", broken_traces())
def test_broken_bytes_are_one_line(what: str) -> None:
    with pytest.raises(ConfigError, match="the trace is broken") as raised:
        decode(broken_traces()[what])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("generator", [own_schedule, partial(own_schedule), None])
def test_a_schedule_of_ones_own_is_kept_as_its_order(generator: Any) -> None:
    plan = replace(small_plan(schedules.gpipe(2, 3)), generator=generator)
    written = content(encode(Trace(plan, 0, predict(plan))))["plan"]["schedule"]
    assert written == {"kind": "train", "ranks": plan.schedule.lines()}
    assert decode(encode(Trace(plan, 0, predict(plan)))).plan.schedule == plan.schedule


def test_reading_a_trace_imports_nothing() -> None:
    data = content(encode(Trace(small_plan(), 0, step(0).timeline)))
    data["plan"]["schedule"] = {"generator": "antigravity:fly", "arguments": {}}
    with pytest.raises(ConfigError, match="the schedule antigravity:fly; expected one of modelpar's own"):
        decode(packed(data))


def test_large_traces_stay_small() -> None:
    plan: Plan = small_plan(schedules.one_f_one_b(16, 128))
    assert len(encode(Trace(plan, 0, predict(plan)))) < 20_000  # 4,096 spans


def test_a_newer_plan_is_refused_with_both_numbers() -> None:
    data = content(encode(Trace(small_plan(), 0, step(0).timeline)))
    with pytest.raises(ConfigError, match="the trace is broken: plan has schema version 99; expected 1"):
        decode(packed({**data, "plan": {**data["plan"], "schema_version": 99}}))
