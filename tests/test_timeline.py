"""Timelines, simulated or measured, and the account of where their time went."""

import json
from collections.abc import Callable

import pytest
import torch
from accounts import assert_accounted
from drawing import drawn_in
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import momentum
from stage_graphs import stage_graphs
from unsplit import make_plan

from modelpar.capture.objective import Objective
from modelpar.models import gpt
from modelpar.planning import analysis as analysis_module
from modelpar.planning.analysis import Analysis, RankTime, analyse
from modelpar.planning.cluster import Cluster, Link
from modelpar.planning.schedule import Schedule
from modelpar.planning.schedules import fill_drain, gpipe, one_f_one_b
from modelpar.planning.simulate import StageCost, simulate
from modelpar.planning.timeline import COMPUTE, Span, Timeline
from modelpar.run.pipeline import Pipeline
from modelpar.run.workers import Workers

GRAD = "grad h of micro-batch {} from stage 1"
EXAMPLE = Timeline(
    2,
    (
        Span(0, "F", 0, 1, 0, 0),
        Span(0, "F", 1, 2, 0, 1),
        Span(0, "wait", 2, 3, 0, 0, GRAD.format(0)),
        Span(0, "B", 3, 4, 0, 0),
        Span(0, "wait", 4, 5, 0, 1, GRAD.format(1)),
        Span(0, "B", 5, 6, 0, 1),
        Span(0, "optimizer", 6, 7),
        Span(1, "F", 1, 2, 1, 0),
        Span(1, "B", 2, 3, 1, 0),
        Span(1, "F", 3, 4, 1, 1),
        Span(1, "B", 4, 5, 1, 1),
    ),
)


def test_spans_on_any_clock_are_shifted_and_sorted() -> None:
    late = [span._replace(start=span.start + 100, end=span.end + 100) for span in EXAMPLE.spans]
    assert Timeline.of(2, reversed(late)) == EXAMPLE


def test_shares_of_a_timeline() -> None:
    assert EXAMPLE.makespan == 7
    assert EXAMPLE.of_rank(1) == EXAMPLE.spans[7:]
    assert (EXAMPLE.busy(0), EXAMPLE.busy(1)) == (4, 4)
    assert EXAMPLE.utilization(0) == 4 / 7
    assert EXAMPLE.bubble == pytest.approx(6 / 14)
    assert EXAMPLE.spans[6].seconds == 1


def test_to_json_and_back() -> None:
    assert Timeline.from_json(json.loads(json.dumps(EXAMPLE.to_json()))) == EXAMPLE


def test_nothing_happened() -> None:
    empty = Timeline.of(2, [])
    assert (empty.makespan, empty.bubble, empty.utilization(1)) == (0, 0, 0)
    nothing = RankTime(busy=0, waits={}, other={}, idle=0, utilization=0)
    assert analyse(empty) == Analysis(makespan=0, bubble=0, imbalance=1, ranks=(nothing, nothing))


def test_analysis_of_the_example() -> None:
    first = RankTime(busy=4, waits={"grad h from stage 1": 2}, other={"optimizer": 1}, idle=0, utilization=4 / 7)
    second = RankTime(busy=4, waits={}, other={}, idle=3, utilization=4 / 7)
    assert analyse(EXAMPLE) == Analysis(makespan=7, bubble=EXAMPLE.bubble, imbalance=1, ranks=(first, second))
    assert (first.wait, second.wait) == (2, 0)


def test_the_docstring_shows_the_example() -> None:
    for line, rank in zip(drawn_in(analysis_module.__doc__).splitlines(), analyse(EXAMPLE).ranks, strict=True):
        account = " ".join(line.split("busy")[1].split())
        waits, other = (json.dumps({k: int(v) for k, v in d.items()}) for d in (rank.waits, rank.other))
        assert account == f"{rank.busy:g} waits {waits} other {other} idle {rank.idle:g}"


def test_waits_are_grouped_by_cause_longest_first() -> None:
    spans = [
        Span(0, "wait", 0, 1, 0, 0, "value a of micro-batch 0 from stage 3"),
        Span(0, "wait", 1, 4, 0, 0, "value b of micro-batch 10 from stage 3"),
        Span(0, "wait", 4, 5, 0, 1, "value a of micro-batch 11 from stage 3"),
        Span(0, "wait", 5, 9, cause="count samples from stage 3"),
    ]
    (rank,) = analyse(Timeline.of(1, spans)).ranks
    assert list(rank.waits.items()) == [
        ("count samples from stage 3", 4),
        ("value b from stage 3", 3),
        ("value a from stage 3", 2),
    ]


def test_imbalance_is_the_busiest_rank_over_the_mean() -> None:
    spans = [Span(0, "F", 0, 3, 0, 0), Span(1, "F", 0, 1, 1, 0)]
    assert analyse(Timeline.of(2, spans)).imbalance == 1.5


@st.composite
def measured(draw: st.DrawFn) -> Timeline:
    """What ranks of one thread each could have done: any spans, gaps between some, none that overlap."""
    num_ranks, spans = draw(st.integers(1, 4)), []
    for rank in range(num_ranks):
        now = draw(st.integers(0, 50))
        for _ in range(draw(st.integers(0, 12))):
            kind = draw(st.sampled_from([*sorted(COMPUTE), "wait", "send", "receive", "optimizer", "reduce", "data"]))
            cause = f"value h of micro-batch {draw(st.integers(0, 2))} from stage 0" if kind == "wait" else ""
            start = now + draw(st.integers(0, 3))
            now = start + draw(st.integers(0, 5))
            spans.append(Span(rank, kind, start, now, cause=cause))
    return Timeline.of(num_ranks, spans)


@st.composite
def simulated(draw: st.DrawFn) -> Timeline:
    """What any plan would do: real-valued costs of stages, messages and the step's ends, on any graph of stages."""
    graph = draw(stage_graphs(max_stages=4))
    p, seconds = graph.num_stages, st.floats(0, 10)
    schedule = draw(st.sampled_from([gpipe, one_f_one_b, fill_drain]))(p, draw(st.integers(1, 8)))
    costs = [StageCost(*draw(st.tuples(*[seconds] * 6))) for _ in range(p)]
    rate, speed = st.floats(0.1, 1e9), st.floats(0.1, 10)
    link = Link(draw(seconds), draw(rate), draw(seconds), draw(rate), draw(seconds), draw(rate), *draw(_THREE))
    return simulate(schedule, costs, graph, Cluster(("cpu",) * p, tuple(draw(speed) for _ in range(p)), link))


_THREE = st.tuples(*[st.floats(0, 10)] * 3)


@settings(deadline=None)
@given(measured() | simulated())
def test_every_second_is_accounted_for(timeline: Timeline) -> None:
    assert_accounted(timeline)
    analysis = analyse(timeline)
    assert analysis.imbalance >= 1 - 1e-9
    rates = [rank.utilization for rank in analysis.ranks]
    assert analysis.bubble == pytest.approx(1 - sum(rates) / len(rates) if analysis.makespan else 0)


@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_so_it_is_in_steps_that_ran(workers: Workers, num_ranks: int, schedule: Callable[..., Schedule]) -> None:
    torch.manual_seed(0)
    model, batch, loss = gpt.build(vocab_size=50, context=16, width=32, depth=4, heads=2, dropout=0.1)
    objective = Objective(model, loss)
    plan = make_plan(objective, batch, num_ranks=num_ranks, schedule=schedule, tied="fast")
    with Pipeline(objective, plan, workers=workers, optimizer=momentum, max_norm=1.0) as pipeline:
        for result in pipeline.steps([batch] * 3):
            timeline = result.timeline
            assert_accounted(timeline)
            assert timeline.clock_error == 0
            assert {span.rank for span in timeline.spans} == set(range(num_ranks))
            computed = [span for span in timeline.spans if span.kind in COMPUTE]
            assert len(computed) == 2 * num_ranks * plan.num_microbatches
