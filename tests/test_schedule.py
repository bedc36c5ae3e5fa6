"""The Schedule type: its text form, what makes one illegal, and the data flow of its actions."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_graphs import stage_graphs

from modelpar.errors import DeadlockError, PlanError, ScheduleError
from modelpar.planning.graph import BATCH, StageGraph, Tied, Value
from modelpar.planning.schedule import Action, Op, Schedule, ValueKey, gives, needs

V_SHAPE = [
    "0F0 0F1 3F0 3I0 3W0 3F1 0I0 3B1 0W0 0B1",
    "1F0 2F0 1F1 2F1 2B0 1I0 1W0 2B1 1B1",
]  # stages 0 and 3 on rank 0, 1 and 2 on rank 1


def test_text_and_back() -> None:
    schedule = Schedule.of(V_SHAPE)
    assert schedule.lines() == V_SHAPE
    assert str(schedule) == "\n".join(V_SHAPE)
    assert Schedule.of([list(schedule.actions(rank)) for rank in range(2)]) == schedule
    assert list(schedule.actions(1))[:2] == [Action(1, Op.FORWARD, 0), Action(2, Op.FORWARD, 0)]
    assert str(Action(3, Op.UPDATE)) == "3U"


def test_what_a_schedule_knows() -> None:
    schedule = Schedule.of(V_SHAPE)
    assert (schedule.num_ranks, schedule.num_stages, schedule.num_microbatches) == (2, 4, 2)
    assert schedule.stage_to_rank == (0, 1, 1, 0)
    # Freed at W or B: rank 0 holds 0F0 0F1 3F0, frees 3F0, takes 3F1; rank 1 holds all four forwards.
    assert schedule.peak_microbatches() == (3, 4)
    assert schedule.exact
    assert not Schedule.of(["0F0 0F1 0B1 0B0"]).exact


def test_equality() -> None:
    forward = ["0F0 0F1"]
    assert Schedule.of(V_SHAPE) == Schedule.of(V_SHAPE)
    assert hash(Schedule.of(V_SHAPE)) == hash(Schedule.of(V_SHAPE))
    assert Schedule.of(forward, "forward") != Schedule.of(["0F1 0F0"], "forward")


ILLEGAL = {
    "missing backward": (["0F0 0F1 0B0"], "stage 0, micro-batch 1 has 1 × F; expected B once, or I and W once"),
    "missing forward": (["0F0 0B0 0B1"], "stage 0, micro-batch 1 has 1 × B; expected F once"),
    "missing on one stage": (["0F0 0F1 0B0 0B1", "1F1 1B1"], "stage 1, micro-batch 0 has no action; expected F once"),
    "missing weight gradient": (
        ["0F0 0I0"],
        "stage 0, micro-batch 0 has 1 × F, 1 × I; expected B once, or I and W once",
    ),
    "doubled": (["0F0 0F0 0B0"], "stage 0, micro-batch 0 has 2 × F, 1 × B; expected F once"),
    "backward twice over": (
        ["0F0 0B0 0I0 0W0"],
        "stage 0, micro-batch 0 has 1 × F, 1 × B, 1 × I, 1 × W; expected B once, or I and W once",
    ),
    "misplaced stage": (["0F0 0B0", "0F1 0B1"], "stage 0 is on rank 0 and on rank 1; expected one rank"),
    "no such stage": (["0F0 0B0 2F0 2B0"], "no rank has an action of stage 1"),
    "no action": (["", ""], "no rank has an action of stage 0"),
    "no rank": ([], "no rank has an action of stage 0"),
    "bad word": (
        ["0F0 0X0"],
        "'0X0' is not an action; expected a form such as 2F0: stage, one of F B I W, micro-batch",
    ),
    "update": (
        ["0F0 0B0", [Action(1, Op.FORWARD, 0), Action(1, Op.BACKWARD, 0), Action(1, Op.UPDATE)]],
        "rank 1 has 1U; expected F, B, I or W of a stage and a micro-batch",
    ),
    "negative": ([[Action(-1, Op.FORWARD, 0)]], "rank 0 has -1F0; expected F, B, I or W of a stage and a micro-batch"),
}


@pytest.mark.parametrize(("ranks", "message"), ILLEGAL.values(), ids=ILLEGAL)
def test_illegal(ranks: list[str | list[Action]], message: str) -> None:
    with pytest.raises(ScheduleError) as error:
        Schedule.of(ranks)
    assert str(error.value) == message


def test_forward_schedules_have_no_backward() -> None:
    with pytest.raises(ScheduleError) as error:
        Schedule.of(["0F0 0B0"], "forward")
    assert str(error.value) == "stage 0, micro-batch 0 has 1 × F, 1 × B; expected no B, I or W in a forward schedule"
    with pytest.raises(ScheduleError) as error:
        Schedule.of(["0F0"], "backward")
    assert str(error.value) == 'schedule kind is \'backward\'; expected "train" or "forward"'


DEADLOCKS = {
    "own forward": (["0B0 0F0"], "0B0", "0F0 on rank 0"),
    "own input gradient": (["0F0 0W0 0I0"], "0W0", "0I0 on rank 0"),
    "previous stage": (["1F0 0F0 1B0 0B0"], "1F0", "0F0 on rank 0"),
    "next stage": (["0F0 0B0 1F0 1B0"], "0B0", "1B0 on rank 0"),
    "next stage, split": (["0F0 0I0 1F0 1I0 0W0 1W0"], "0I0", "1I0 on rank 0"),
    "two ranks": (["0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"], "0B0", "1B0 on rank 1"),
}


@pytest.mark.parametrize(("ranks", "action", "missing"), DEADLOCKS.values(), ids=DEADLOCKS)
def test_deadlock(ranks: list[str], action: str, missing: str) -> None:
    with pytest.raises(DeadlockError) as error:
        Schedule.of(ranks)
    assert str(error.value) == f"rank 0 can never run {action}: it waits for {missing}, which never comes"


def finishes(ranks: list[list[Action]], last: int) -> bool:
    """Says whether the ranks come to their ends, one action at a time, in the plainest way."""
    done: set[str] = set()
    ranks = [list(rank) for rank in ranks]
    while True:
        for rank in ranks:
            if not rank:
                continue
            stage, op, microbatch = rank[0]
            before = {
                "F": [f"{stage - 1}F{microbatch}"] if stage else [],
                "W": [f"{stage}I{microbatch}"],
            }.get(op, [f"{stage}F{microbatch}"] + ([f"{stage + 1}I{microbatch}"] if stage < last else []))
            if set(before) <= done:
                done.add(f"{stage}{'I' if op == 'B' else op}{microbatch}")
                rank.pop(0)
                break
        else:
            return not any(ranks)


@st.composite
def orders(draw: st.DrawFn) -> list[list[Action]]:
    """Complete sets of actions in an order that is legal, or nearly so, on any placement of stages."""
    num_ranks, num_stages, num_microbatches = (draw(st.integers(1, limit)) for limit in (3, 4, 3))
    ranks: list[list[tuple[float, Action]]] = [[] for _ in range(num_ranks)]
    for stage in range(num_stages):
        rank = draw(st.sampled_from(ranks))
        split = draw(st.booleans())
        for microbatch in range(num_microbatches):
            away = 2 * num_stages - stage  # of the backward, as if nothing else took time
            times = (
                {Op.FORWARD: stage, Op.INPUT_GRAD: away, Op.WEIGHT_GRAD: away + 0.5}
                if split
                else {
                    Op.FORWARD: stage,
                    Op.BACKWARD: away,
                }
            )
            for op, time in times.items():
                late = draw(st.sampled_from([0, 0, 0, 0, 1, 4]))
                rank.append((time + 2 * microbatch + late, Action(stage, op, microbatch)))
    return [[action for _, action in sorted(rank)] for rank in ranks]


@settings(deadline=None, max_examples=300)
@given(orders())
def test_deadlock_is_found_exactly_where_it_is(ranks: list[list[Action]]) -> None:
    last = max(action.stage for rank in ranks for action in rank)
    if finishes(ranks, last):
        assert [list(Schedule.of(ranks).actions(rank)) for rank in range(len(ranks))] == ranks
    else:
        with pytest.raises(DeadlockError, match=r"rank \d can never run \d[FBIW]\d: it waits for \d"):
            Schedule.of(ranks)


@settings(deadline=None)
@given(stage_graphs(), st.integers(1, 3), st.booleans())
def test_needs_mirror_gives(graph: StageGraph, num_microbatches: int, split: bool) -> None:
    backward = (Op.INPUT_GRAD, Op.WEIGHT_GRAD) if split else (Op.BACKWARD,)
    actions = [
        Action(stage, op, microbatch)
        for stage in range(graph.num_stages)
        for op in (Op.FORWARD, *backward)
        for microbatch in range(num_microbatches)
    ] + [Action(stage, Op.UPDATE) for stage in range(graph.num_stages)]
    needed = Counter((key, action.stage) for action in actions for key in needs(graph, action))
    given_ = Counter((key, action.stage) for action in actions for key in gives(graph, action))
    assert all(key.target == stage for key, stage in needed)
    assert all(key.source == stage for key, stage in given_)
    needed_keys = Counter(key for key, _ in needed.elements() if key.source != BATCH)
    given_keys = Counter(key for key, _ in given_.elements() if key.target != BATCH)
    assert needed_keys == given_keys
    # A key names one value: two of the same name would overwrite each other in a mailbox.
    assert set(needed.values()) | set(given_.values()) <= {1}


def test_every_gradient_goes_where_its_value_came_from() -> None:
    graph = StageGraph.chain(3)
    assert needs(graph, Action(1, Op.FORWARD, 5)) == [ValueKey("value", "v0", 5, 0, 1)]
    assert gives(graph, Action(1, Op.FORWARD, 5)) == [ValueKey("value", "v1", 5, 1, 2)]
    for op in (Op.BACKWARD, Op.INPUT_GRAD):
        assert needs(graph, Action(1, op, 5)) == [ValueKey("grad", "v1", 5, 2, 1)]
        assert gives(graph, Action(1, op, 5)) == [ValueKey("grad", "v0", 5, 1, 0)]
    assert needs(graph, Action(1, Op.WEIGHT_GRAD, 5)) == gives(graph, Action(1, Op.WEIGHT_GRAD, 5)) == []


def test_a_skip_goes_directly_and_its_gradient_as_a_chain() -> None:
    """The value goes 0 → 1, 0 → 3, 0 → 4; its gradient 4 → 3 → 1 → 0, the order in which autograd adds."""
    skip = Value("skip", 0, (1, 3, 4))
    graph = StageGraph(5, (skip,))
    value = [ValueKey("value", "skip", 0, 0, consumer) for consumer in (1, 3, 4)]
    assert gives(graph, Action(0, Op.FORWARD, 0)) == value
    assert [needs(graph, Action(stage, Op.FORWARD, 0)) for stage in range(5)] == [
        [],
        value[:1],
        [],
        value[1:2],
        value[2:],
    ]
    route = {(key.source, key.target) for stage in range(5) for key in gives(graph, Action(stage, Op.BACKWARD, 0))}
    assert route == {(4, 3), (3, 1), (1, 0)}
    no_grad = StageGraph(5, (Value("mask", 0, (1, 3, 4), needs_grad=False),))
    assert [gives(no_grad, Action(stage, Op.BACKWARD, 0)) for stage in range(5)] == [[]] * 5


@pytest.mark.parametrize("op", [Op.BACKWARD, Op.WEIGHT_GRAD])
def test_tied_gradients_go_from_the_latest_use_to_the_owner(op: Op) -> None:
    tie = Tied(("embed.weight", "head.weight"), (0, 2, 3))

    def route(graph: StageGraph, action: Op, microbatch: int) -> list[tuple[int, int, int]]:
        keys = [key for stage in range(4) for key in gives(graph, Action(stage, action, microbatch))]
        return [(key.source, key.target, key.microbatch) for key in keys if key.kind == "tied_grad"]

    exact, fast = (StageGraph(4, (), (tie,), tied_exact=exact) for exact in (True, False))
    assert route(exact, op, 7) == [(2, 0, 7), (3, 2, 7)]
    assert route(exact, Op.UPDATE, -1) == route(fast, op, 7) == []
    assert route(fast, Op.UPDATE, -1) == [(2, 0, -1), (3, 2, -1)]


def test_values_are_named_for_people() -> None:
    assert str(ValueKey("value", "h3", 2, 0, 1)) == "value h3 of micro-batch 2 from stage 0"
    assert str(ValueKey("value", "inputs", 0, BATCH, 0)) == "value inputs of micro-batch 0 from the controller"
    assert str(ValueKey("count", "samples", -1, 3, 0)) == "count samples from stage 3"


def test_errors_are_plan_errors() -> None:
    assert issubclass(ScheduleError, PlanError)
    assert issubclass(DeadlockError, PlanError)
