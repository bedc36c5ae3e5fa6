"""What a message costs is read off timelines: put in, it comes out again; and real ranks have such timelines."""

import math

import pytest

from modelpar.calibration import LARGE, SMALL, calibrate, link_of
from modelpar.machine import Setting
from modelpar.planning.cluster import Cluster, Link
from modelpar.planning.graph import BATCH, StageGraph, Value
from modelpar.planning.partition import Partition
from modelpar.planning.profile import LayerCost, Profile
from modelpar.planning.schedules import one_f_one_b
from modelpar.planning.simulate import simulate, stage_costs

LINK = Link(
    latency=0.25,
    bandwidth=2e6,
    send_seconds=0.125,
    send_bandwidth=4e6,
    take_seconds=0.0625,
    take_bandwidth=8e6,
    action_seconds=0.5,
    data_seconds=1.5,
    end_seconds=0.75,
)


def timeline(num_ranks, num_microbatches, num_bytes, cost):
    """Simulates a step of equal stages with messages of so many bytes."""
    chain = StageGraph.chain(num_ranks, num_bytes)
    inputs = Value("inputs", BATCH, (0,), 0.0, needs_grad=False)
    graph = StageGraph(num_ranks, (inputs, *chain.values[1:]))
    costs = stage_costs(Profile((cost,) * num_ranks, 1, "measured"), Partition(tuple(range(num_ranks + 1))))
    cluster = Cluster(("cpu",) * num_ranks, link=LINK)
    return simulate(one_f_one_b(num_ranks, num_microbatches), costs, graph, cluster)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_link_of_simulated_timelines_is_the_one_they_were_simulated_with(num_ranks):
    busy = LayerCost("busy", 7.0, 6.0, 4.0, cold_seconds=0.5, reduce_seconds=0.25, update_seconds=1.0)
    idle = LayerCost("idle", 0.0, 0.0, 0.0, reduce_seconds=0.25, update_seconds=1.0)
    profile = Profile((busy,) * num_ranks, 1, "measured")
    small, large = ([timeline(num_ranks, 1, size, idle)] * 4 for size in (SMALL, LARGE))
    found = link_of([timeline(num_ranks, 8, SMALL, busy)] * 4, profile, small, large)
    assert found.send(SMALL) == pytest.approx(LINK.send(SMALL))
    assert found.send(LARGE) == pytest.approx(LINK.send(LARGE))
    assert found.seconds(SMALL) == pytest.approx(LINK.seconds(SMALL))
    assert found.seconds(LARGE) == pytest.approx(LINK.seconds(LARGE))
    assert found.action_seconds == pytest.approx(LINK.action_seconds)
    assert found.data_seconds == pytest.approx(LINK.data_seconds)


def test_one_rank_sends_nothing():
    busy = LayerCost("busy", 7.0, 6.0, 4.0, cold_seconds=0.5, reduce_seconds=0.25, update_seconds=1.0)
    steps = [timeline(1, 8, SMALL, busy)] * 4
    found = link_of(steps, Profile((busy,), 1, "measured"), steps, steps)
    assert found.hand_off(1e9) == 0.0
    assert found.action_seconds == pytest.approx(LINK.action_seconds)


def test_real_ranks_are_calibrated(workers, request):
    kind = "threads" if "threads" in request.node.name else "rpc"
    link = calibrate(workers, Setting(("cpu", "cpu"), 1, kind))
    numbers = [link.latency, link.send_seconds, link.take_seconds, link.action_seconds, link.end_seconds]
    assert all(math.isfinite(number) and number >= 0 for number in numbers)
    assert link.bandwidth > 0
    assert 0 < link.hand_off(SMALL) <= link.hand_off(LARGE) < 10
