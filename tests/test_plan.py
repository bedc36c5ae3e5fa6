"""Plan: what it refuses, how it names its schedule's generator, and that plan.json brings all of it back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from modelpar.errors import PlanError, PlanMismatch
from modelpar.planning.cluster import Cluster, Link
from modelpar.planning.graph import BATCH, Layer, ModelGraph, Parameter, Tied, Value
from modelpar.planning.partition import Partition
from modelpar.planning.plan import Plan, Prediction
from modelpar.planning.profile import LayerCost, Profile
from modelpar.planning.schedule import Schedule

WEIGHT = Parameter("embed.weight", (10, 4), "float32", True)
GRAPH = ModelGraph(
    layers=(
        Layer("embed", "Embedding", (WEIGHT,)),
        Layer("mid", "Linear", (Parameter("mid.weight", (4, 4), "float32", True),)),
        Layer("head", "Linear", (replace(WEIGHT, name="head.weight"),)),
    ),
    values=(
        Value("inputs", BATCH, (0,), 8.0, needs_grad=False),
        Value("h0", 0, (1,), 16.0),
        Value("h1", 1, (2,), 16.0),
        Value("targets", BATCH, (2,), 8.0, needs_grad=False),
        Value("predictions", 2, (BATCH,), 40.0),
    ),
    cuts=(1, 2),
    tied=(Tied(("embed.weight", "head.weight"), (0, 2), 160),),
)


def forwards_first(num_ranks: int, num_microbatches: int, swap: bool = False) -> Schedule:
    """All forwards, then all backwards; with `swap`, stage s is on the mirrored rank."""
    batch = range(num_microbatches)
    lines = [" ".join([f"{s}F{m}" for m in batch] + [f"{s}B{m}" for m in batch]) for s in range(num_ranks)]
    return Schedule.of(lines[::-1] if swap else lines)


anonymous = lambda ranks, microbatches: forwards_first(ranks, microbatches)  # noqa: E731 it must have no name


def make(generator: Callable[..., Schedule] | None = forwards_first, schedule: Schedule | None = None) -> Plan:
    return Plan(
        graph=GRAPH,
        profile=Profile(tuple(LayerCost(f"{x.name}", 0.1, 0.2, 0.3) for x in GRAPH.layers), 2, "measured"),
        cluster=Cluster(("cpu", "cpu"), (1.0, 0.5), Link(1e-4, 1e9)),
        partition=Partition((0, 1, 3), "optimal", 1.8, 1.2),
        schedule=schedule or (generator or forwards_first)(2, 4),
        generator=generator,
        num_threads=2,
        tied="exact",
        prediction=Prediction(4.5, 0.25, (0.7, 0.8)),
    )


def through_text(plan: Plan) -> Plan:
    return Plan.from_json(json.loads(json.dumps(plan.to_json(), allow_nan=False)))


def test_round_trip(tmp_path):
    plan = make()
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.generator is forwards_first
    assert again.prediction == plan.prediction
    assert again.stage_graph == plan.stage_graph
    assert again.stage_graph.tied_exact
    assert through_text(replace(plan, prediction=None)).prediction is None


def test_a_person_can_read_it():
    data = make().to_json()
    assert data["graph_hash"] == GRAPH.hash
    assert data["stages"] == [
        {"stage": 0, "rank": 0, "layers": ["embed"]},
        {"stage": 1, "rank": 1, "layers": ["mid", "head"]},
    ]
    assert data["schedule"] == {"generator": f"{__name__}:forwards_first", "arguments": {}}
    assert data["partition"]["balance"] == [1, 2]


def test_it_says_how_each_value_travels():
    values = tuple(replace(value, bytes_per_sample=4096.0) if value.name == "h0" else value for value in GRAPH.values)
    plan = replace(make(), graph=replace(GRAPH, values=values))
    edge = {"value": "h0", "producer": 0, "consumer": 1, "num_bytes": 8192}
    for cluster, carrier in [
        (plan.cluster, "shared memory"),
        (replace(plan.cluster, shared_memory=False), "message"),
        (replace(plan.cluster, transport="threads"), "memory"),
        (replace(plan.cluster, cuda_ipc=True, devices=("cuda:0", "cpu")), "cuda ipc"),
        (replace(plan.cluster, cuda_ipc=True), "shared memory"),
    ]:
        data = replace(plan, cluster=cluster).to_json()
        assert data["edges"] == [{**edge, "carrier": carrier}]
        assert Plan.from_json(data).cluster == cluster
    assert make().to_json()["edges"] == [{**edge, "num_bytes": 32, "carrier": "datagram"}]
    both_on_one = Schedule.of(["0F0 1F0 1B0 0B0"])
    alone = replace(plan, schedule=both_on_one, cluster=Cluster(("cpu",)))
    assert [each.carrier for each in alone.edges] == ["memory"]


def test_a_partial_keeps_its_arguments():
    plan = make(partial(forwards_first, swap=True))
    assert plan.to_json()["schedule"] == {"generator": f"{__name__}:forwards_first", "arguments": {"swap": True}}
    again = through_text(plan)
    assert again == plan
    assert again.schedule.stage_to_rank == (1, 0)
    assert again.schedule_for(2) == forwards_first(2, 2, swap=True)


def test_a_partial_without_arguments_is_the_function_itself():
    """What Hydra makes of `_partial_: true`."""
    assert through_text(make(partial(forwards_first))).generator is forwards_first


def inside() -> Callable[[int, int], Schedule]:
    def local(num_ranks: int, num_microbatches: int) -> Schedule:
        return forwards_first(num_ranks, num_microbatches)

    return local


class Method:
    def __call__(self, num_ranks: int, num_microbatches: int) -> Schedule:
        return forwards_first(num_ranks, num_microbatches)


def with_options(num_ranks: int, num_microbatches: int, options: Any = None) -> Schedule:
    return forwards_first(num_ranks, num_microbatches)


def placed(first: str, num_ranks: int, num_microbatches: int) -> Schedule:
    return forwards_first(num_ranks, num_microbatches)


@pytest.mark.parametrize(
    "generator",
    [
        None,
        anonymous,
        inside(),
        Method(),
        partial(anonymous),
        partial(placed, "x"),
        partial(with_options, options={1, 2}),
        partial(with_options, options=(1, 2)),
    ],
    ids=["none", "lambda", "local", "object", "partial lambda", "positional", "not json", "changed by json"],
)
def test_what_has_no_name_is_written_as_an_order(generator):
    plan = make(generator)
    assert plan.to_json()["schedule"] == {
        "kind": "train",
        "ranks": ["0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3", "1F0 1F1 1F2 1F3 1B0 1B1 1B2 1B3"],
    }
    again = through_text(plan)
    assert again == plan
    assert again.generator is None


def test_fewer_microbatches():
    plan = make()
    assert plan.schedule_for(4) is plan.schedule
    assert plan.schedule_for(3) == forwards_first(2, 3)
    with pytest.raises(
        PlanError,
        match=r"^the batch has 3 micro-batches, and this plan holds only an explicit order for 4; "
        r"give a schedule function, or batches of at least that many samples$",
    ):
        make(None).schedule_for(3)


def test_the_forward_schedule_keeps_the_placement():
    forward = make(partial(forwards_first, swap=True)).forward_schedule(3)
    assert forward.kind == "forward"
    assert forward.lines() == ["1F0 1F1 1F2", "0F0 0F1 0F2"]


def changed(**layers: Layer | None) -> ModelGraph:
    return replace(GRAPH, layers=tuple(new for x in GRAPH.layers if (new := layers.get(x.name, x)) is not None))


@pytest.mark.parametrize(
    ("graph", "what"),
    [
        (changed(mid=None), "mid is gone"),
        (replace(GRAPH, layers=(*GRAPH.layers, Layer("extra", "Linear"))), "extra is new"),
        (changed(mid=Layer("middle", "Linear")), "mid is gone, middle is new"),
        (changed(mid=Layer("mid", "Conv2d", GRAPH.layers[1].parameters)), "mid changed"),
        (changed(embed=Layer("embed", "Embedding", (replace(WEIGHT, shape=(11, 4)),))), "embed changed"),
        (replace(GRAPH, layers=GRAPH.layers[::-1]), "the order of layers or the tied tensors changed"),
        (replace(GRAPH, tied=()), "the order of layers or the tied tensors changed"),
    ],
)
def test_another_model_is_refused_with_what_changed(graph, what):
    with pytest.raises(PlanMismatch) as caught:
        make().check_model(graph)
    assert str(caught.value) == f"the plan was made for another model (hash {GRAPH.hash}, now {graph.hash}): {what}"


def test_the_same_model_with_other_sizes_is_accepted():
    values = tuple(replace(value, bytes_per_sample=1.0) for value in GRAPH.values)
    make().check_model(replace(GRAPH, values=values))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"partition": Partition((0, 1, 2))}, PlanMismatch, "the partition has 2 layers, the model 3"),
        ({"partition": Partition((0, 1, 2, 3))}, PlanError, "the partition has 3 stages, the schedule 2"),
        ({"cluster": Cluster(("cpu",))}, PlanError, "the cluster has 1 ranks, the schedule 2"),
        ({"tied": "slow"}, PlanError, 'tied is \'slow\'; expected "fast" or "exact"'),
    ],
)
def test_parts_that_do_not_fit(change, error, message):
    with pytest.raises(error) as caught:
        replace(make(), **change)
    assert str(caught.value) == message


def test_a_plan_of_another_time():
    data = make().to_json()
    with pytest.raises(PlanError, match=r"^plan has schema version 99; expected 1$"):
        Plan.from_json({**data, "schema_version": 99})
    for name in ("no_such_module:gpipe", f"{__name__}:no_such_function", ":x"):
        with pytest.raises(PlanError, match=f"^the plan's schedule generator {name} cannot be imported: "):
            Plan.from_json({**data, "schedule": {"generator": name, "arguments": {}}})


def test_two_chunks_per_rank():
    """Four stages on two ranks, from explicit text."""
    graph = replace(GRAPH, layers=(*GRAPH.layers, Layer("last", "Linear")), cuts=(1, 2, 3))
    schedule = Schedule.of(["0F0 2F0 2B0 0B0", "1F0 3F0 3B0 1B0"])
    plan = replace(make(None), graph=graph, partition=Partition((0, 1, 2, 3, 4)), schedule=schedule)
    assert (plan.num_ranks, plan.num_stages, plan.num_microbatches) == (2, 4, 1)
    assert [(stage["stage"], stage["rank"]) for stage in plan.to_json()["stages"]] == [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert through_text(plan) == plan


def even_only(num_ranks: int, num_microbatches: int) -> Schedule:
    """Refuses odd numbers in a way of its own."""
    if num_microbatches % 2:
        raise KeyError(num_microbatches)
    return forwards_first(num_ranks, num_microbatches)


def always_four(num_ranks: int, num_microbatches: int) -> Schedule:
    """Does not care how many there are."""
    return forwards_first(num_ranks, 4)


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        (even_only, "no schedule for 3 micro-batches: KeyError: 3"),
        (always_four, r"the schedule function gave 4 micro-batches and stages on the ranks \(0, 1\); expected 3 and"),
    ],
)
def test_a_schedule_function_that_does_not_do_is_refused(generator: Callable[..., Schedule], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make(generator, schedule=forwards_first(2, 4)).schedule_for(3)
