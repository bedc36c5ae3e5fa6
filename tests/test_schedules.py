"""The known schedules, laid out as in the pictures of their docstrings, and against torch's and the closed forms."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from drawing import drawn_in, picture
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpar.errors import ScheduleError
from modelpar.planning.cluster import Cluster
from modelpar.planning.graph import StageGraph
from modelpar.planning.schedule import Schedule
from modelpar.planning.schedules import fill_drain, gpipe, one_f_one_b
from modelpar.planning.simulate import StageCost, simulate
from modelpar.planning.timeline import Timeline

Generator = Callable[[int, int], Schedule]
ORDERS = Path(__file__).parents[2] / "shared" / "reference" / "schedules.json"

ranks = st.integers(1, 9)
microbatches = st.integers(1, 20)
seconds = st.integers(0, 100)


def run(schedule: Schedule, forward: float = 1, input_grad: float = 0.5, weight_grad: float = 0.5) -> Timeline:
    """Simulates equal stages on ranks of equal speed, with messages that take no time; F = B = 1 by default."""
    costs = [StageCost(forward, input_grad, weight_grad)] * schedule.num_stages
    cluster = Cluster(("cpu",) * schedule.num_ranks)
    return simulate(schedule, costs, StageGraph.chain(schedule.num_stages), cluster)


def check_layout(generator: Generator, num_ranks: int, num_microbatches: int, layout: str) -> None:
    """Checks order and, with equal times, the time of every action."""
    layout = textwrap.dedent(layout).strip()
    schedule = generator(num_ranks, num_microbatches)
    kind = "forward" if generator is fill_drain else "train"
    assert schedule == Schedule.of(layout.splitlines(), kind)
    assert picture(run(schedule)) == layout


def test_gpipe() -> None:
    layout = """
        0F0 0F1 0F2 0F3                 0B0 0B1 0B2 0B3
            1F0 1F1 1F2 1F3         1B0 1B1 1B2 1B3
                2F0 2F1 2F2 2F3 2B0 2B1 2B2 2B3
    """
    check_layout(gpipe, 3, 4, layout)
    check_layout(gpipe, 1, 3, "0F0 0F1 0F2 0B0 0B1 0B2")


def test_one_f_one_b() -> None:
    layout = """
        0F0 0F1 0F2         0B0 0F3 0B1     0B2     0B3
            1F0 1F1     1B0 1F2 1B1 1F3 1B2     1B3
                2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3
    """
    check_layout(one_f_one_b, 3, 4, layout)
    check_layout(one_f_one_b, 1, 3, "0F0 0B0 0F1 0B1 0F2 0B2")


def test_one_f_one_b_with_fewer_microbatches_than_ranks() -> None:
    layout = """
        0F0 0F1                     0B0     0B1
            1F0 1F1             1B0     1B1
                2F0 2F1     2B0     2B1
                    3F0 3B0 3F1 3B1
    """
    check_layout(one_f_one_b, 4, 2, layout)


def test_fill_drain() -> None:
    layout = """
        0F0 0F1 0F2 0F3
            1F0 1F1 1F2 1F3
                2F0 2F1 2F2 2F3
    """
    check_layout(fill_drain, 3, 4, layout)


@pytest.mark.parametrize("generator", [gpipe, one_f_one_b, fill_drain])
def test_docstrings_draw_what_happens(generator: Generator) -> None:
    assert drawn_in(generator.__doc__) == picture(run(generator(3, 4)))


@settings(deadline=None)
@given(ranks, microbatches, seconds, seconds, seconds)
def test_closed_forms(p: int, m: int, forward: int, input_grad: int, weight_grad: int) -> None:
    """GPipe: Huang et al. 2019; 1F1B: Narayanan et al. 2021, as fast with less memory."""
    times = (forward, input_grad, weight_grad)
    assert run(gpipe(p, m), *times).makespan == (m + p - 1) * sum(times)
    assert run(one_f_one_b(p, m), *times).makespan == (m + p - 1) * sum(times)
    assert run(fill_drain(p, m), *times).makespan == (m + p - 1) * forward
    assert gpipe(p, m).peak_microbatches() == (m,) * p
    assert one_f_one_b(p, m).peak_microbatches() == tuple(min(m, p - s) for s in range(p))
    assert fill_drain(p, m).peak_microbatches() == (1,) * p


@settings(deadline=None)
@given(ranks, microbatches)
def test_bubble(p: int, m: int) -> None:
    """(p − 1) / (m + p − 1) of the rank-time is idle (Huang et al. 2019)."""
    for generator in (gpipe, one_f_one_b, fill_drain):
        assert run(generator(p, m)).bubble == pytest.approx((p - 1) / (m + p - 1))


@settings(deadline=None)
@given(ranks, microbatches)
def test_all_keep_the_order_of_microbatches(p: int, m: int) -> None:
    for generator in (gpipe, one_f_one_b, fill_drain):
        schedule = generator(p, m)
        assert schedule.exact
        assert schedule.stage_to_rank == tuple(range(p))
        assert schedule.num_microbatches == m


# As run by torch.distributed.pipelining's Schedule1F1B (torch 2.x).
TORCH_1F1B_2_4 = ["0F0 0F1 0B0 0F2 0B1 0F3 0B2 0B3", "1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3"]


def test_one_f_one_b_is_torchs() -> None:
    assert one_f_one_b(2, 4).lines() == TORCH_1F1B_2_4


@pytest.mark.skipif(not ORDERS.exists(), reason="there are no reference facts in ../shared/reference")
def test_reference_orders() -> None:
    orders = {order["name"]: order for order in json.loads(ORDERS.read_text())}
    for p, m in ((2, 4), (4, 8)):
        assert one_f_one_b(p, m).lines() == orders[f"torchrun_1F1B_p{p}_m{m}_v1"]["ranks"]
        for source in ("torch", "torchrun"):
            theirs = orders[f"{source}_GPipe_p{p}_m{m}_v1"]
            assert gpipe(p, m).peak_microbatches() == tuple(theirs["peak_stage_microbatches"])
            assert run(gpipe(p, m), 1, 1, 1).makespan == theirs["makespan"]["1,1,1,0"]


@pytest.mark.parametrize("generator", [gpipe, one_f_one_b, fill_drain])
@pytest.mark.parametrize(("p", "m"), [(0, 4), (4, 0), (-1, 4), (4, -8)])
def test_bad_arguments(generator: Generator, p: int, m: int) -> None:
    with pytest.raises(ScheduleError) as error:
        generator(p, m)
    assert str(error.value) == f"a schedule for {p} ranks and {m} micro-batches; expected at least 1 of each"


MEASURE = """
import tracemalloc
from modelpar.planning.schedules import one_f_one_b
tracemalloc.start()
schedule = one_f_one_b(1024, 4096)
held, peak = tracemalloc.get_traced_memory()
tracemalloc.stop()
assert schedule.peak_microbatches() == tuple(range(1024, 0, -1))
print(held, peak)
"""


def test_a_thousand_ranks_fit_in_memory() -> None:
    """8.4 million actions: 9 bytes each, and no Python object per action while they are checked.

    In a process of its own: where other threads allocate meanwhile, as those of RPC do, `tracemalloc.stop` crashes.
    """
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, cwd=ROOT, check=True)
    held, peak = map(int, done.stdout.split())
    assert held < 100e6
    assert peak < 1e9
