"""The plain data of planning: what crosses a cut, what a partition refuses, and that everything survives json."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from modelpar.errors import PartitionError
from modelpar.planning.cluster import Cluster, Link
from modelpar.planning.graph import BATCH, Layer, ModelGraph, Parameter, StageGraph, Tied, Value
from modelpar.planning.partition import Partition
from modelpar.planning.profile import LayerCost, Profile

# inputs ─▶ embed ──h──▶ a ──i──▶ b ──j──▶ head ─▶ predictions        embed.weight is head.weight
#             └──────────skip──────▶┘        ▲
# targets ───────────────────────────────────┘
WEIGHT = Parameter("embed.weight", (10, 4), "float32", True)
GRAPH = ModelGraph(
    layers=(
        Layer("embed", "Embedding", (WEIGHT,)),
        Layer("a", "Linear", (Parameter("a.weight", (4, 4), "float32", True),), draws=("a.dropout",)),
        Layer("b", "BatchNorm1d", (Parameter("b.running_mean", (4,), "float32", False, buffer=True),), (), ("b", "m")),
        Layer("head", "Linear", (replace(WEIGHT, name="head.weight"),)),
    ),
    values=(
        Value("inputs", BATCH, (0,), 8.0, needs_grad=False),
        Value("h", 0, (1,), 16.0),
        Value("skip", 0, (1, 2), 4.0),
        Value("i", 1, (2,), 16.0),
        Value("j", 2, (3,), 32.0),
        Value("targets", BATCH, (3,), 8.0, needs_grad=False),
        Value("predictions", 3, (BATCH,), 40.0),
    ),
    cuts=(1, 2, 3),
    tied=(Tied(("embed.weight", "head.weight"), (0, 3), 160),),
)


def test_bytes_that_cross_a_cut():
    """A value counts once, however many layers beyond the cut use it; the batch and the predictions do not."""
    assert [GRAPH.crossing_bytes(cut) for cut in GRAPH.cuts] == [20.0, 20.0, 32.0]


def test_stages():
    """The value j vanishes inside the last stage; skip goes directly to both of its consumers."""
    assert GRAPH.stages((0, 1, 2, 4)) == StageGraph(
        3,
        (
            Value("inputs", BATCH, (0,), 8.0, needs_grad=False),
            Value("h", 0, (1,), 16.0),
            Value("skip", 0, (1, 2), 4.0),
            Value("i", 1, (2,), 16.0),
            Value("targets", BATCH, (2,), 8.0, needs_grad=False),
            Value("predictions", 2, (BATCH,), 40.0),
        ),
        (Tied(("embed.weight", "head.weight"), (0, 2), 160),),
    )


def test_one_stage_keeps_only_the_batch():
    stages = GRAPH.stages((0, 4), tied_exact=True)
    assert [value.name for value in stages.values] == ["inputs", "targets", "predictions"]
    assert stages.tied == ()
    assert stages.tied_exact


def test_a_consumer_in_the_producers_stage_needs_no_message():
    skip = next(value for value in GRAPH.stages((0, 2, 4)).values if value.name == "skip")
    assert (skip.producer, skip.consumers) == (0, (1,))


def test_chain():
    chain = StageGraph.chain(3, 8.0)
    assert [(v.producer, v.consumers) for v in chain.values] == [(BATCH, (0,)), (0, (1,)), (1, (2,)), (BATCH, (2,))]
    assert StageGraph.chain(1).values == (
        Value("inputs", BATCH, (0,), 0.0, needs_grad=False),
        Value("targets", BATCH, (0,), 0.0, needs_grad=False),
    )


def layer(index: int, **changes: object) -> ModelGraph:
    layers = list(GRAPH.layers)
    layers[index] = replace(layers[index], **changes)
    return replace(GRAPH, layers=tuple(layers))


@pytest.mark.parametrize(
    "other",
    [
        layer(1, name="c"),
        layer(1, kind="Conv2d"),
        layer(1, parameters=()),
        layer(0, parameters=(replace(WEIGHT, shape=(11, 4)),)),
        layer(0, parameters=(replace(WEIGHT, dtype="float64"),)),
        layer(0, parameters=(replace(WEIGHT, trainable=False),)),
        replace(GRAPH, tied=()),
        replace(GRAPH, layers=(GRAPH.layers[1], GRAPH.layers[0], *GRAPH.layers[2:])),
    ],
    ids=["name", "class", "parameters", "shape", "dtype", "frozen", "ties", "order"],
)
def test_the_hash_tells_structures_apart(other):
    assert other.hash != GRAPH.hash


def test_the_hash_ignores_sizes_of_values():
    """Another batch or sequence length is the same model."""
    values = tuple(replace(value, bytes_per_sample=2 * value.bytes_per_sample) for value in GRAPH.values)
    assert replace(GRAPH, values=values).hash == GRAPH.hash


PROFILE = Profile(
    (LayerCost("a", 0.1, 0.2, 1 / 3, 5e9, 64, 128, 16), LayerCost("b", 0.0, 0.0, 0.0)),
    microbatch_size=4,
    source="measured",
    device="cuda:1",
    num_threads=2,
    measured_at="2025-01-31T12:00:00+00:00",
)


@pytest.mark.parametrize(
    "data",
    [
        GRAPH,
        PROFILE,
        Cluster(("cpu", "cuda:0"), (1.0, 7.5), Link(1e-4, 1e9)),
        Cluster(("cpu",)),
        Partition((0, 2, 5), "optimal", 0.1 + 0.2, 1 / 3),
        Partition((0, 1)),
    ],
    ids=["graph", "profile", "cluster", "infinite bandwidth", "partition", "manual partition"],
)
def test_json_round_trip(data):
    """Equal to the bit, through text that any json reader accepts."""
    text = json.dumps(data.to_json(), allow_nan=False)
    again = type(data).from_json(json.loads(text))
    assert again == data
    assert hash(again) == hash(data)


def test_the_hash_survives_json():
    assert ModelGraph.from_json(json.loads(json.dumps(GRAPH.to_json()))).hash == GRAPH.hash


def test_costs_add_up():
    cost = LayerCost("a", forward_seconds=1.0, input_grad_seconds=2.0, weight_grad_seconds=4.0)
    assert (cost.backward_seconds, cost.seconds) == (6.0, 7.0)


def test_cluster():
    cluster = Cluster(("cpu", "cpu"), (1.0, 2.0), Link(latency=0.5, bandwidth=10.0))
    assert (cluster.num_ranks, cluster.speed(1), cluster.link.seconds(20)) == (2, 2.0, 2.5)
    assert Cluster(("cpu", "cpu")).speed(1) == 1.0
    assert Link().seconds(1e12) == 0.0


def test_partition():
    partition = Partition.of_balance([2, 1, 3], 6)
    assert partition.bounds == (0, 2, 3, 6)
    assert partition.balance == (2, 1, 3)
    assert (partition.num_stages, partition.num_layers) == (3, 6)
    assert [list(partition.layers(stage)) for stage in range(3)] == [[0, 1], [2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((0,), r"partition bounds are \[0\]; expected 0 first and at least one stage"),
        ((1, 2), r"partition bounds are \[1, 2\]; expected 0 first and at least one stage"),
        ((0, 2, 2, 3), r"stage 1 would be empty: bounds are \[0, 2, 2, 3\]; expected ascending ones"),
        ((0, 3, 2), r"stage 1 would be empty: bounds are \[0, 3, 2\]; expected ascending ones"),
    ],
)
def test_bounds_that_lose_layers(bounds, message):
    with pytest.raises(PartitionError, match=f"^{message}$"):
        Partition(bounds)


@pytest.mark.parametrize(
    ("balance", "total"),
    [([2, 2], "4 layers with 2 stages"), ([6, 0, -1], "5 layers with 3 stages"), ([], "0 layers with 0 stages")],
)
def test_a_balance_that_does_not_add_up(balance, total):
    with pytest.raises(PartitionError, match=rf"adds up to {total}; expected positive counts that add up to 5$"):
        Partition.of_balance(balance, 5)
