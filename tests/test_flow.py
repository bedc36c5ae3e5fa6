"""What waited for what, the critical path, and the parts of a step that add up to it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from stage_graphs import stage_graphs

from modelpar import Objective, Pipeline, plan, schedules
from modelpar.errors import DeadlockError
from modelpar.models import mlp
from modelpar.planning import breakdown as breakdown_module
from modelpar.planning.breakdown import PARTS, Breakdown, breakdown
from modelpar.planning.cluster import Cluster, Link
from modelpar.planning.flow import Flow, flow
from modelpar.planning.graph import StageGraph
from modelpar.planning.schedules import gpipe, one_f_one_b
from modelpar.planning.simulate import StageCost, simulate
from modelpar.planning.timeline import COMPUTE, Timeline


def simulated(
    costs: Sequence[StageCost], num_microbatches: int, link: Link, make: object = one_f_one_b
) -> tuple[Timeline, Flow]:
    """A chain of stages, one per rank."""
    order = make(len(costs), num_microbatches)  # type: ignore[operator]
    graph = StageGraph.chain(len(costs), bytes_per_sample=1.0)
    timeline = simulate(order, costs, graph, Cluster(("cpu",) * len(costs), link=link))
    return timeline, flow(timeline, graph, order.stage_to_rank)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Timeline, Flow, StageGraph]:
    """Simulated steps of all kinds of graphs, stage s on rank s."""
    graph = draw(stage_graphs())
    seconds = st.floats(0.01, 3.0)
    costs = [StageCost(*(draw(seconds) for _ in range(5))) for _ in range(graph.num_stages)]
    make = draw(st.sampled_from([gpipe, one_f_one_b]))
    order = make(graph.num_stages, draw(st.integers(1, 6)))
    little = st.floats(0.0, 0.5)
    link = Link(draw(little), 10.0, draw(little), 10.0, draw(little), 10.0, draw(little), draw(little), draw(little))
    cluster = Cluster(("cpu",) * graph.num_stages, link=link)
    try:
        timeline = simulate(order, costs, graph, cluster)
    except DeadlockError:  # a tied tensor's gradient per micro-batch, in an order that never has it
        assume(False)
    return timeline, flow(timeline, graph, order.stage_to_rank), graph


def test_the_docstrings_example() -> None:
    timeline, found = simulated([StageCost(1, 1, 0)] * 2, 2, Link(send_seconds=0.5))
    spans = timeline.spans
    ends = [(spans[arrow.source], spans[arrow.target], arrow.wait >= 0) for arrow in found.arrows]
    arrows = [(a.kind, a.microbatch, b.kind, b.microbatch, waited) for a, b, waited in ends]
    assert arrows == [
        ("send", 0, "B", 0, True),
        ("send", 1, "B", 1, True),
        ("send", 0, "F", 0, True),
        ("send", 1, "F", 1, False),
    ]


def test_the_critical_path_of_a_step_with_one_slow_stage_runs_through_it() -> None:
    costs = [StageCost(1, 1, 0), StageCost(10, 10, 0), StageCost(1, 1, 0)]
    timeline, found = simulated(costs, 8, Link(0.1))
    assert found.critical_share(1) == pytest.approx(160 / timeline.makespan)
    assert found.critical_share(1) > 0.9 > found.critical_share(0)


@settings(deadline=None, max_examples=50)
@given(steps())
def test_the_critical_path_covers_the_step_without_a_hole(step: tuple[Timeline, Flow, StageGraph]) -> None:
    timeline, found, _ = step
    path = [timeline.spans[i] for i in found.critical]
    taking = max(0.5, 3 * 0.1) * 9  # what a rank does without a span: taking values
    assert path[-1].end == timeline.makespan
    for before, after in pairwise(path):
        if after.kind == "wait":  # it ends when what was sent is there
            assert before.start <= after.end
        else:
            assert -1e-9 <= after.start - before.end <= taking + 1e-9
    assert path[0].start <= taking


@settings(deadline=None, max_examples=50)
@given(steps())
def test_arrows_join_ranks_and_do_not_go_back_in_time(step: tuple[Timeline, Flow, StageGraph]) -> None:
    timeline, found, _ = step
    for arrow in found.arrows:
        source, target = timeline.spans[arrow.source], timeline.spans[arrow.target]
        assert source.rank != target.rank
        assert source.start <= target.end
        if source.kind in COMPUTE | {"send"} and target.kind in COMPUTE:
            assert source.microbatch == target.microbatch
            assert source.start <= target.start  # one span may send several values


@settings(deadline=None, max_examples=50)
@given(steps())
def test_played_again_a_step_takes_as_long_and_its_parts_add_up(step: tuple[Timeline, Flow, StageGraph]) -> None:
    timeline, found, _ = step
    again = breakdown_module._Replay(found).makespan(lambda span: span.seconds)
    assert again == pytest.approx(timeline.makespan, rel=1e-9)
    parts = breakdown(found)
    assert parts.seconds == pytest.approx(timeline.makespan, rel=1e-9)
    assert all(seconds >= 0 for _, seconds in parts.parts)
    assert tuple(name for name, _ in parts.parts) == PARTS


@settings(deadline=None, max_examples=30)
@given(steps(), st.data())
def test_what_is_on_the_critical_path_makes_a_step_longer(
    step: tuple[Timeline, Flow, StageGraph], data: st.DataObject
) -> None:
    timeline, found, _ = step
    replay = breakdown_module._Replay(found)
    computing = [i for i, span in enumerate(timeline.spans) if span.kind in COMPUTE]
    chosen = timeline.spans[data.draw(st.sampled_from(computing))]
    longer = replay.makespan(lambda span: span.seconds + (1e-6 if span is chosen else 0.0)) - timeline.makespan
    if any(timeline.spans[i] is chosen for i in found.critical):
        assert longer == pytest.approx(1e-6, rel=1e-2)
    else:  # it may be as critical as the path that was found, never more so
        assert -1e-9 <= longer <= 1.01e-6


def of_chain(costs: Sequence[StageCost], m: int, link: Link = Link()) -> Breakdown:  # noqa: B008  (frozen)
    return breakdown(simulated(costs, m, link)[1])


@pytest.mark.parametrize(("num_stages", "m"), [(1, 4), (2, 4), (4, 8), (8, 2)])
def test_equal_stages_and_free_messages_leave_the_schedules_bubble(num_stages: int, m: int) -> None:
    found = of_chain([StageCost(1, 1, 1)] * num_stages, m)
    assert found.useful == pytest.approx(3 * m)
    assert found.bubble == pytest.approx(3 * (num_stages - 1))
    assert found.imbalance == found.communication == found.data == found.overhead == 0.0


def test_what_is_added_to_a_step_is_found_in_its_part() -> None:
    equal = [StageCost(1, 1, 1)] * 3
    base = of_chain(equal, 6)
    uneven = of_chain([StageCost(1, 1, 1), StageCost(2, 2, 2), StageCost(1, 1, 1)], 6)
    assert uneven.imbalance == pytest.approx(
        (1 + 6 * 6 + 1 + 2) - 4 * (6 + 2)
    )  # fill, stage 1, its wait for 2B0, drain
    assert uneven.bubble == pytest.approx(2 * 4)
    late = of_chain(equal, 6, Link(data_seconds=5.0))
    assert late.data == pytest.approx(5.0)
    assert late.seconds == pytest.approx(base.seconds + 5.0)
    far = of_chain(equal, 6, Link(latency=0.25))
    assert far.communication == pytest.approx(far.seconds - base.seconds)
    assert far.communication > 4 * 0.25
    busy = of_chain([StageCost(1, 1, 1, reduce_seconds=1.0, update_seconds=2.0)] * 3, 6)
    assert busy.overhead == busy.step_end == pytest.approx(3.0)


@pytest.mark.parametrize("transport", ["threads", "rpc"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("schedule", [schedules.gpipe, schedules.one_f_one_b])
def test_a_measured_step_is_played_again_as_it_was(shared_workers, transport, num_ranks, schedule) -> None:  # type: ignore[no-untyped-def]
    model, batch, loss = mlp.build()
    p = plan(Objective(model, loss), batch, num_ranks=num_ranks, num_microbatches=4, schedule=schedule, profile="flops")
    optimizer = partial(torch.optim.SGD, lr=0.1)
    workers = shared_workers[transport].get()
    with Pipeline(Objective(model, loss), p, workers=workers, optimizer=optimizer, max_norm=1.0) as pipeline:
        timelines = [result.timeline for result in pipeline.steps([batch] * 4)]
    for timeline in timelines:
        found = flow(timeline, p.stage_graph, p.schedule.stage_to_rank)
        again = breakdown_module._Replay(found).makespan(lambda span: span.seconds)
        assert again == pytest.approx(timeline.makespan, rel=1e-9)
        assert breakdown(found).seconds == pytest.approx(timeline.makespan, rel=1e-9)
        values = [a for a in found.arrows if timeline.spans[a.target].kind in COMPUTE]
        assert len(values) == 2 * 4 * (num_ranks - 1)  # every micro-batch crosses every cut, forth and back


def as_on_a_gpu(timeline: Timeline) -> Timeline:
    """The same step with what a GPU's timeline has besides: the time between a wait and its computation receives."""
    spans = []
    for i, span in enumerate(timeline.spans):
        spans.append(span)
        following = timeline.spans[i + 1] if i + 1 < len(timeline.spans) else span
        if span.kind == "wait" and following.rank == span.rank and following.kind in COMPUTE:
            spans.append(span._replace(kind="receive", start=span.end, end=following.start))
    return Timeline(timeline.num_ranks, tuple(spans))


def named(found: Flow) -> list[tuple[object, ...]]:
    """The arrows without what depends on positions."""
    spans = found.timeline.spans
    return [(spans[a.source], spans[a.target], spans[a.wait] if a.wait >= 0 else None) for a in found.arrows]


@settings(deadline=None, max_examples=50)
@given(steps())
def test_what_a_gpu_receives_changes_no_arrow(step: tuple[Timeline, Flow, StageGraph]) -> None:
    timeline, found, graph = step
    there = as_on_a_gpu(timeline)
    again = flow(there, graph, range(graph.num_stages))
    assert named(again) == named(found)
    assert sum(again.critical_share(stage) for stage in range(graph.num_stages)) <= 1 + 1e-9
    assert breakdown(again).seconds == pytest.approx(timeline.makespan, rel=1e-9)
    assert breakdown(again).communication >= breakdown(found).communication - 1e-9


@settings(deadline=None, max_examples=50)
@given(steps(), st.data())
def test_a_step_is_played_again_as_it_was_also_where_clocks_disagree(
    step: tuple[Timeline, Flow, StageGraph], data: st.DataObject
) -> None:
    timeline, _, graph = step
    shifts = [data.draw(st.floats(-3.0, 3.0)) for _ in range(timeline.num_ranks)]
    moved = [s._replace(start=s.start + shifts[s.rank], end=s.end + shifts[s.rank]) for s in timeline.spans]
    there = Timeline.of(timeline.num_ranks, moved)
    again = flow(there, graph, range(graph.num_stages))
    assert breakdown_module._Replay(again).makespan(lambda span: span.seconds) == pytest.approx(there.makespan)
