"""`modelpar simulate`: the planned timeline and its numbers on the screen, and nothing else."""

import subprocess

import pytest
from commands import MLP, call, listing

from modelpar import config as configs
from modelpar.planning.simulate import predict
from modelpar.task import task_of

QUICK = [*MLP, "pipeline.profile=flops", "training.batch_size=8", "pipeline.num_microbatches=4"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, in which no process can be started; the screen has 120 columns."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", None)
    return tmp_path


def drawn(out):
    """Returns what is drawn per rank."""
    return [line.split("│")[1] for line in out.splitlines() if line.startswith("rank ") and "│" in line]


@pytest.mark.parametrize(
    ("schedule", "in_flight"), [("gpipe", [4, 4, 4]), ("1f1b", [3, 2, 1]), ("fill_drain", [1, 1, 1])]
)
def test_it_draws_the_timeline_and_prints_its_numbers(folder, schedule, in_flight):
    instant = ["cluster.link.latency=0", "cluster.link.bandwidth=inf"]
    words = [*QUICK, *instant, "pipeline.num_ranks=3", f"schedule={schedule}"]
    outcome = call("simulate", *words)
    assert (outcome.code, outcome.err) == (0, "")
    assert listing(folder) == set()
    ranks = drawn(outcome.out)
    assert len(ranks) == 3
    assert all(f"F{number}" in ranks[0] for number in range(4))
    assert all(("B" in rank) == (schedule != "fill_drain") for rank in ranks)
    timeline = predict(task_of(configs.load("simulate", words)).plan())
    [line] = [line for line in outcome.out.splitlines() if line.startswith("step ")]
    milliseconds, bubble = float(line.split()[1]), float(line.split()[-2]) / 100
    assert milliseconds == pytest.approx(timeline.makespan * 1e3, rel=0.01)
    assert bubble == pytest.approx(timeline.bubble, abs=0.01)
    stages = outcome.out[outcome.out.index("peak micro-batches") :].splitlines()[2:]
    assert [int(line.split()[-3]) for line in stages if line.strip()] == in_flight


def test_every_line_fits_the_terminal(folder, monkeypatch):
    for columns in (60, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert max(map(len, call("simulate", *QUICK).out.splitlines())) <= columns


def test_it_takes_what_train_takes(folder):
    outcome = call(
        "simulate", *QUICK, "partition=manual", "partition.balance=[1,3]", "optimizer=sgd", "training.steps=9"
    )
    assert outcome.code == 0
    assert "2 stages by manual, 4 micro-batches" in outcome.out
    assert "stem (1)" in outcome.out


def test_bad_input_costs_one_line(folder):
    outcome = call("simulate", *QUICK, "partition=manual", "partition.balance=[1,1]")
    assert outcome.code == 2
    assert outcome.err == (
        "modelpar: balance [1, 1] adds up to 2 layers with 2 stages; expected positive counts that add up to 4\n"
    )
