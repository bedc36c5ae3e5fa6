"""What keeps `optimal` from an even share, in a sentence."""

from dataclasses import replace

import pytest

from modelpar.planning import partitioners, schedules
from modelpar.planning.balance import imbalance
from modelpar.planning.cluster import Cluster, Link
from modelpar.planning.graph import Layer, ModelGraph, Value
from modelpar.planning.plan import Plan
from modelpar.planning.profile import LayerCost, Profile
from modelpar.report.text import prediction_notes


def planned(seconds, cluster, *, cuts=None, crossing=0.0, kept=0, partitioner=partitioners.optimal):
    n, order = len(seconds), schedules.gpipe(cluster.num_ranks, 1)
    layers = tuple(Layer(f"h{i}", "Linear") for i in range(n))
    values = tuple(Value(f"v{i}", i, (i + 1,), crossing) for i in range(n - 1))
    graph = ModelGraph(layers, values, tuple(range(1, n)) if cuts is None else cuts)
    costs = tuple(LayerCost(f"h{i}", t / 3, t / 3, t / 3, kept_bytes=kept) for i, t in enumerate(seconds))
    profile = Profile(costs, 1, "measured", num_ranks=cluster.num_ranks)
    with_order = partitioners.with_schedule(partitioner, lambda ranks: order)
    partition = with_order(graph, profile, cluster, cluster.num_ranks)
    return Plan(graph, profile, cluster, partition, order)


TWO = Cluster(("cuda:0", "cuda:1"))


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (planned([1, 1, 1, 1], TWO), ""),
        (planned([1.02, 1, 1, 1], TWO), ""),
        (planned([1, 6, 1], TWO), "Stage 1 takes 75 % longer than the ideal stage, at least 50 % in any split: h1"),
        (planned([0, 6, 1], TWO), "Stage 0 takes 71 % longer than the ideal stage, as in any split: h1 alone is 171 %"),
        (
            planned([1, 3, 3, 1, 1], TWO, cuts=(1, 3)),
            "Stage 0 takes 56 % longer than the ideal stage, at least 33 % in any split: h1 … h2, which stay together, "
            "alone is 133 % of it.",
        ),
        (planned([2, 2, 2], TWO), "Stage 1 takes 33 % longer than the ideal stage: h1 alone is 67 % of it."),
        (
            planned([1] * 4, replace(TWO, link=Link(0.25)), crossing=1.0),
            "Stage 0 takes 25 % longer than the ideal stage: hand-offs are 20 % of its time.",
        ),
        (
            planned([1, 1, 4], replace(TWO, link=Link(100.0)), crossing=1.0),
            "Stage 1 takes 6700 % longer than the ideal stage: hand-offs are 98 % of its time.",
        ),
        (
            planned([1] * 8, replace(TWO, memory=(20, 100)), kept=10),
            "Stage 1 takes 50 % longer than the ideal stage: with more memory per device it would be 0 %.",
        ),
        (planned([1, 1, 1, 5], TWO, partitioner=partitioners.uniform), ""),
        (planned([0, 0], TWO), ""),
        (planned([3, 3, 3], replace(TWO, speeds=(2.0, 1.0))), ""),
    ],
)
def test_the_sentence(plan, sentence):
    assert imbalance(plan).startswith(sentence)
    assert bool(imbalance(plan)) == bool(sentence)
    assert [note for note in prediction_notes(plan) if "ideal" in note] == ([imbalance(plan)] if sentence else [])
