"""`modelpar explain` on runs as they are found: finished, killed, on one rank, without traces, not of modelpar."""

import os
import re
import signal
from pathlib import Path

import pytest
from commands import MLP, THREADS, Command, call
from torch.utils.tensorboard import SummaryWriter

from modelpar.planning.breakdown import PARTS

TRAIN = [*MLP, *THREADS, "training.batch_size=8", "pipeline.num_microbatches=4"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(name, *words):
    outcome = call("train", *TRAIN, f"output.name={name}", "training.steps=15", "training.trace_every=5", *words)
    assert outcome.code == 0, outcome.err
    return outcome.out


def shares(text):
    """The parts of a step in an explanation, in per cent."""
    found = re.findall(rf"^({'|'.join(PARTS)}) +([\d.]+) % ", text, re.MULTILINE)
    return {name: float(share) for name, share in found}


def test_a_training_ends_with_what_explain_says_of_it():
    trained = train("first")
    told = call("explain", "runs/first")
    assert told.code == 0
    name, verdict = told.out.splitlines()[:2]
    assert name == "first"
    shown = " ".join(trained.split("verdict")[1].split())
    assert shown.startswith(verdict.strip())
    assert set(shares(told.out)) == set(PARTS)
    assert sum(shares(told.out).values()) == pytest.approx(100, abs=3)  # each is rounded
    largest = max(shares(told.out), key=shares(told.out).get)
    assert f"made of        {largest} " in trained


def test_runs_without_traces_are_told_from_those_with(tmp_path):
    train("traced")
    train("untraced", "training.trace_every=0")
    with SummaryWriter("runs/other") as writer:
        writer.add_scalar("loss", 1.0, 0)
    told = call("explain", "runs")
    assert told.code == 0
    assert told.out.startswith("traced\n")
    said = " ".join(told.out.split())
    assert "untraced: holds no traces: " in said
    assert said.endswith("1 run is not of modelpar: other")
    alone = call("explain", "runs/untraced")
    assert (alone.code, alone.out) == (2, "")
    assert alone.err.startswith("modelpar: untraced: holds no traces: ")
    assert len(alone.err.splitlines()) == 1


def test_a_single_stage_is_explained():
    train("alone", "pipeline.num_ranks=1")
    told = call("explain", "runs/alone")
    found = shares(told.out)
    assert told.code == 0
    assert found["schedule bubble"] == found["stage imbalance"] == found["communication"] == 0.0


def test_a_run_that_was_killed_is_explained(tmp_path):
    words = ["output.name=killed", "training.steps=100000", "training.trace_every=5", "training.eval_every=0"]
    command = Command(tmp_path, "train", *TRAIN, *words)
    command.wait_line("step 1/")
    events = next(Path("runs/killed").glob("events*"))
    while events.read_bytes().count(b"pipeline/trace") < 2:
        pass
    os.kill(command.pid, signal.SIGKILL)
    command.outcome()
    with events.open("r+b") as file:  # the last record may be half there
        file.truncate(events.stat().st_size - 5)
    told = call("explain", "runs/killed")
    assert told.code == 0
    assert set(shares(told.out)) == set(PARTS)
    assert not Path("runs/killed/result.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "modelpar: nowhere does not exist; expected a run or a folder of runs"),
        (["empty"], "modelpar: empty holds no TensorBoard event file (events.out.tfevents.*) at any depth"),
    ],
)
def test_what_cannot_be_explained_gets_one_line(words, said):
    Path("empty").mkdir()
    told = call("explain", *words)
    assert (told.code, told.err.strip()) == (2, said)


def test_compare_ends_with_a_verdict_on_the_best():
    told = call("compare", *TRAIN, "schedule=gpipe,1f1b", "comparison.rounds=1", "output.name=both")
    assert told.code == 0, told.err
    lines = [line for line in told.out.splitlines() if line.startswith(("gpipe: ", "1f1b: "))]
    best = next(Path("runs/both").glob("comparison.csv")).read_text().splitlines()[1].split(",")[0]
    assert len(lines) == 1
    assert lines[0].startswith(f"{best}: ")
