"""Clusters: what they say, how a configuration writes them, and that planning and simulating look at it."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from commands import MLP, call
from torch import nn

from modelpar import Objective, partitioners, plan
from modelpar import config as configs
from modelpar.errors import ConfigError, PartitionError
from modelpar.planning.cluster import UNKNOWN, Cluster, Link
from modelpar.planning.cluster_options import read_cluster
from modelpar.planning.graph import StageGraph
from modelpar.planning.schedules import gpipe
from modelpar.planning.simulate import StageCost, simulate
from modelpar.planning.sizes import parse_bytes, show_apart, show_bytes
from modelpar.task import task_of

NOTHING = {"devices": None, "memory": None, "link": {"latency": None, "bandwidth": None}, "links": None}
QUICK = [*MLP, "pipeline.profile=flops", "training.batch_size=8", "pipeline.num_microbatches=4"]


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("8GB", 8e9), ("8 gb", 8e9), ("1.5GiB", 1.5 * 2**30), ("512MiB", 2**29), ("4e3", 4e3), ("7B", 7), (12, 12.0)],
)
def test_sizes_as_people_write_them(text, num_bytes):
    assert parse_bytes(text, "memory") == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "8XB", "-8GB", 0, -1, True, "1.2.3GB", "nan", None, [8]])
def test_what_is_no_size(text):
    with pytest.raises(
        ConfigError, match=r"^memory is .*; expected bytes above 0, as a number or such as 8GB or 512MiB$"
    ):
        parse_bytes(text, "memory")


def test_sizes_are_shown_with_as_many_digits_as_tell_them_apart():
    assert [show_bytes(size) for size in (0, 999, 1000, 4.25e9, 2e13)] == ["0 B", "999 B", "1 KB", "4.25 GB", "20 TB"]
    assert show_apart(4.001e9, 4e9) == ("4.001 GB", "4 GB")
    assert show_apart(5e9, 4e9) == ("5 GB", "4 GB")


def test_a_cluster_and_its_json():
    cluster = Cluster(
        ("cpu",) * 3, (1.0, 1.0, 0.5), Link(1e-4), memory=(8, None, 4), links=((2, 0, Link(bandwidth=1e9)),)
    )
    assert Cluster.from_json(json.loads(json.dumps(cluster.to_json()))) == cluster
    assert (cluster.limited, cluster.memory_of(1), cluster.memory_of(2)) == (True, None, 4)
    assert cluster.link_between(0, 2) == cluster.link_between(2, 0) == Link(bandwidth=1e9)
    assert cluster.link_between(0, 1) == Link(1e-4)
    earlier = {key: value for key, value in Cluster(("cpu",)).to_json().items() if key not in ("memory", "links")}
    assert Cluster.from_json(earlier) == Cluster(("cpu",))
    assert not Cluster(("cpu",)).limited


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"speeds": (1.0,)}, "the cluster has 2 devices and 1 speeds; expected equal"),
        ({"memory": (1, 2, 3)}, "the cluster has 2 devices and 3 sizes of memory; expected equal"),
        ({"memory": (1, 0)}, "rank 1 has 0 bytes of memory; expected more than 0, or None for no limit"),
        ({"links": ((0, 0, Link()),)}, "a link joins ranks 0 and 0; expected two of 0 … 1"),
        ({"links": ((0, 2, Link()),)}, "a link joins ranks 0 and 2; expected two of 0 … 1"),
    ],
)
def test_a_cluster_of_parts_that_do_not_fit(parts, message):
    with pytest.raises(ConfigError) as error:
        Cluster(("cpu", "cpu"), **parts)
    assert str(error.value) == message


def test_options():
    assert read_cluster(NOTHING, 2) == Cluster(("device 0", "device 1"))
    assert read_cluster(NOTHING, 2, ("cpu", "cpu")).link is UNKNOWN
    full = NOTHING | {
        "devices": [{"speed": 1, "memory": "8GB"}, {"speed": 0.5}],
        "memory": "2MiB",
        "link": {"latency": None, "bandwidth": "10GB"},
        "links": [{"ranks": [0, 1], "latency": 0.5, "bandwidth": "inf"}],
    }
    assert read_cluster(full, 2, usual=Link(0.1, 1.0)) == Cluster(
        ("device 0", "device 1"), (1.0, 0.5), Link(0.1, 1e10), memory=(8 * 10**9, 2 * 2**20), links=((0, 1, Link(0.5)),)
    )
    free = read_cluster(NOTHING | {"link": {"latency": 0, "bandwidth": float("inf")}}, 2)
    assert free.link == Link()
    assert free.link is not UNKNOWN


def test_the_example_is_of_two_hosts():
    cluster = configs.cluster_of(configs.load("train", ["cluster=two_hosts"]))
    assert cluster.num_ranks == 4
    assert cluster.speeds == (1.0, 1.0, 0.5, 0.5)
    assert cluster.memory == (16 * 10**9, 16 * 10**9, 8 * 10**9, 8 * 10**9)
    across = {(a, b) for a in (0, 1) for b in (2, 3)}
    assert {(a, b) for a in range(4) for b in range(a + 1, 4) if cluster.link_between(a, b).bandwidth == 1e9} == across


def test_the_simulator_sends_over_the_link_of_the_pair():
    cluster = Cluster(("cpu",) * 3, link=Link(1.0), links=((2, 1, Link(5.0)),))
    timeline = simulate(gpipe(3, 1), [StageCost(1, 1, 0)] * 3, StageGraph.chain(3), cluster)
    assert timeline.makespan == 3 + 3 + 2 * (1 + 5)


def test_a_slow_pair_gets_the_cheap_border():
    """Between ranks 0 and 1 it costs 1 s there and back, between 1 and 2 nothing."""
    objective, batch = objective_of_eight()
    cluster = Cluster(("cpu",) * 3, link=Link(), links=((0, 1, Link(latency=1.0)),))
    counted = plan(objective, batch, cluster=cluster, profile="flops")
    assert counted.partition.bottleneck < 1.0  # counted costs are never weighed against seconds
    timed = replace(counted.profile, source="measured")
    assert plan(objective, batch, cluster=cluster, profile=timed).partition.bottleneck > 2.0
    assert plan(objective, batch, num_ranks=3, link=Link(), profile=timed).partition.bottleneck < 1.0


def objective_of_eight():
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16) for _ in range(8)]
    return Objective(nn.Sequential(*layers), F.cross_entropy), (torch.randn(8, 16), torch.randint(16, (8,)))


def test_plan_takes_a_cluster():
    objective, batch = objective_of_eight()
    cluster = Cluster(("cpu", "cpu"), (3.0, 1.0), Link(1e-3), "threads", memory=(10**9, 10**9))
    decided = plan(objective, batch, cluster=cluster, profile="flops")
    assert decided.cluster == cluster
    assert decided.partition.balance == (6, 2)
    assert plan(objective, batch, cluster=cluster, transport="rpc", profile="flops").cluster.transport == "rpc"
    assert plan(objective, batch, cluster=cluster, num_ranks=2, profile="flops").cluster == cluster


def test_a_cluster_of_another_number_of_ranks():
    objective, batch = objective_of_eight()
    with pytest.raises(ConfigError, match=r"^num_ranks is 3, but the cluster has 2 devices; expected as many$"):
        plan(objective, batch, cluster=Cluster(("cpu", "cpu")), num_ranks=3)


def test_what_does_not_fit_is_found_before_anything_is_started():
    def started():
        raise AssertionError("workers were started")

    objective, batch = objective_of_eight()
    small = Cluster(("cpu", "cpu"), memory=(9000, 9000))
    with pytest.raises(PartitionError, match=r"^2 stages do not fit into memory: with \d stage \d.* stages would fit"):
        plan(objective, batch, cluster=small, profile="anew", workers=started)
    manual = partial(partitioners.manual, balance=[1, 7])
    with pytest.raises(PartitionError, match=r"^stage 1, 1 … 7, would hold .* on rank 1, which has 9 KB"):
        plan(objective, batch, cluster=small, profile="anew", workers=started, partitioner=manual)


def test_an_optimizer_that_keeps_nothing_is_not_refused_before_it_is_measured():
    """8 layers of 1088 bytes each: of 4, 2 copies fit into 14 KB beside their activations, 4 copies do not."""
    objective, batch = objective_of_eight()
    cluster = Cluster(("cpu", "cpu"), transport="threads", memory=(14000, 14000))
    with pytest.raises(PartitionError, match="do not fit"):
        plan(objective, batch, cluster=cluster, profile="flops")
    bare = plan(objective, batch, cluster=Cluster(("cpu", "cpu")), profile="flops").profile
    measured = [layer.__class__(**{**vars(layer), "optimizer_bytes": 0}) for layer in bare.layers]
    profile = bare.__class__(**{**vars(bare), "layers": tuple(measured)})
    assert plan(objective, batch, cluster=cluster, profile=profile).partition.balance == (4, 4)


def test_the_commands_take_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cluster = task_of(configs.load("simulate", [*QUICK, "cluster.memory=1GB"])).plan().cluster
    assert cluster.memory == (10**9, 10**9)
    outcome = call("simulate", *QUICK, "cluster.devices=[{speed:3},{}]", "model.depth=6")
    assert outcome.code == 0
    assert "stem … block4" in outcome.out or "(6)" in outcome.out
    for command in ("train", "simulate", "compare", "profile"):
        outcome = call(command, *QUICK, "cluster.memory=1KB")
        assert outcome.code == 2
        assert outcome.err.startswith("modelpar: 2 stages do not fit into memory: ")
        outcome = call(command, *QUICK, "cluster=two_hosts", "pipeline.num_ranks=3")
        assert outcome.code == 2
        assert outcome.err.startswith("modelpar: pipeline.num_ranks is 3, but cluster.devices has 4; ")
