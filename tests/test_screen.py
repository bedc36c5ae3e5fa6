"""What commands say besides their results: with verbose=0, 1 and 2, in a terminal and elsewhere."""

import io
import logging
import os
import pty
import re
import subprocess
import sys
import warnings
from contextlib import suppress

import pytest
from commands import MLP, THREADS, Command, call, listing
from conftest import ROOT
from rich.console import Console

from modelpar.report.progress import Activity
from modelpar.screen import screen

MODEL_PY = """
import logging
import sys
import threading
import warnings

import torch
from torch import nn

class Talk(nn.Module):
    def forward(self, x):
        if sys.argv[0] == "-c":  # in a rank's process
            print("a layer prints")
            warnings.warn("a layer warns")
        if threading.current_thread().name.startswith("modelpar-rank"):
            logging.getLogger("mine").warning("a layer logs")
        return x * 1

def build():
    batch = torch.randn(8, 4), torch.randint(3, (8,))
    return nn.Sequential(nn.Linear(4, 4), Talk(), nn.Linear(4, 3)), batch, nn.functional.cross_entropy
"""
SPLIT = ["partition=manual", "partition.balance=[1,2]"]
SHORT = ["pipeline.num_microbatches=2", "training.steps=2", "training.batch_size=4", "training.eval_samples=4"]
TALK = ["model=file", "model.factory=model.py:build", *SPLIT, *SHORT, "output.name=run", "pipeline.profile=flops"]
GOES_ON = ["recording the model", "planning", "starting the ranks", "handing out the stages"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("screen")
    (folder / "model.py").write_text(MODEL_PY)
    return folder


# --- processes, in a terminal and not -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def piped(folder):
    return Command(folder, "train", *TALK, "output.folder=piped").outcome()


@pytest.fixture(scope="module")
def shown(folder):
    """Returns what the same command writes to a terminal."""
    terminal, end = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-m", "modelpar.cli", "train", *TALK, "output.folder=shown"],
        cwd=folder,
        env=environment,
        stdin=end,
        stdout=end,
        stderr=end,
    )
    os.close(end)
    written = b""
    try:
        while some := os.read(terminal, 65536):
            written += some
    except OSError:  # how a terminal says that nobody has its other end any more
        pass
    finally:
        process.wait(60)
        os.close(terminal)
    assert process.returncode == 0, written.decode()
    return written.decode()


def test_a_terminal_shows_what_goes_on(shown):
    places = [shown.find(what) for what in GOES_ON]
    assert -1 not in places
    assert places == sorted(places)
    assert "0 of 2" in shown
    assert "2/2" in shown  # steps


def test_a_terminal_is_left_as_it_was(shown):
    """The cursor is there again, and the line of what goes on is gone: it was erased before what came next."""
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") > -1
    assert shown.rfind("handing out the stages") < shown.find("2/2")
    final = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).splitlines()[-1]
    assert final.endswith(" view shown/run")


def test_elsewhere_nothing_of_it_is_printed(piped):
    assert piped.code == 0
    assert not [what for what in GOES_ON if what in piped.out + piped.err]
    assert "\x1b" not in piped.out
    assert [line.split()[1] for line in piped.out.splitlines() if line.startswith("step ") and "/2 " in line] == [
        "1/2",
        "2/2",
    ]


def test_a_rank_has_its_file_and_its_warnings_are_said_once(folder, piped, shown):
    assert re.fullmatch(r"rank 1: UserWarning: a layer warns \(.*model\.py:\d+\)\n", piped.err)
    assert "rank 1: UserWarning: a layer warns" in shown
    assert "a layer prints" not in piped.out + shown
    run = folder / "piped" / "run"
    assert listing(run / "ranks") == {"rank0.log", "rank1.log"}
    lines = (run / "ranks" / "rank1.log").read_text().splitlines()
    assert "a layer prints" in lines
    assert any("WARNING py.warnings: UserWarning: a layer warns" in line for line in lines)
    assert any("INFO modelpar.run.worker: has stage 1" in line for line in lines)
    assert not any(" DEBUG " in line for line in lines)


def test_verify_and_compare_pass_the_folder_too(folder):
    small = [*MLP, *SHORT[:1], "training.batch_size=4", "pipeline.profile=flops", "output.folder=others"]
    for command, more in (("verify", ["steps=1"]), ("compare", ["comparison.rounds=1", "comparison.steps=1"])):
        outcome = Command(folder, command, *small, *more, f"output.name={command}", "verbose=2").outcome()
        assert outcome.code == 0, outcome.err
        assert listing(folder / "others" / command / "ranks") == {"rank0.log", "rank1.log"}
        log = (folder / "others" / command / "ranks" / "rank0.log").read_text()
        assert " DEBUG modelpar.run.worker: is told to load\n" in log
        assert re.search(r"^rank 1 is ready, [\d.]+ s after it was started$", outcome.err, re.MULTILINE)


# --- threads --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0, 1, 2])
def outcome(folder, monkeypatch, request):
    monkeypatch.chdir(folder)
    words = [*TALK, *THREADS, f"output.folder=threads{request.param}", f"verbose={request.param}"]
    return request.param, call("train", *words)


def test_how_much_is_said(outcome, folder):
    verbose, said = outcome
    assert said.code == 0
    assert " stage   layers " in said.out  # results, always
    assert "loss   " in said.out
    assert ("step 1/2  loss" in said.out) is (verbose > 0)
    assert bool(re.search(r"^held-out loss \d", said.out, re.MULTILINE)) is (verbose > 0)
    lines = said.err.splitlines()
    assert ("rank 1: a layer logs" in lines) is (verbose > 0)
    assert any(line.startswith("recorded the model: 3 layers") for line in lines) is (verbose > 1)
    assert ("rank 1: has stage 1, 1 … 2, on cpu" in lines) is (verbose > 1)
    assert not (folder / f"threads{verbose}" / "run" / "ranks").exists()  # they are this process


def test_logging_is_as_it_was_afterwards(monkeypatch):
    root, ours = logging.getLogger(), logging.getLogger("modelpar")
    monkeypatch.setattr(root, "level", logging.INFO)
    before = root.handlers[:], root.level, ours.level, warnings.showwarning
    with suppress(KeyError), screen(Console(file=io.StringIO()), 2):
        assert (root.handlers, ours.level) != (before[0], before[2])
        raise KeyError
    assert (root.handlers, root.level, ours.level, warnings.showwarning) == before


def test_errors_are_said_whatever_verbose_is(capsys):
    with screen(Console(file=io.StringIO()), 0):
        logging.getLogger("mine").warning("a warning")
        logging.getLogger("mine").error("an error")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("another", stacklevel=1)
    assert capsys.readouterr().err == "an error\n"


# --- the line of what goes on ---------------------------------------------------------------------------------------


def test_the_line_says_how_much_is_left(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")  # nothing moves in a dumb terminal
    clock = iter(range(1000))
    console = Console(file=io.StringIO(), force_terminal=True, width=80, get_time=lambda: float(next(clock)))
    with Activity(console) as doing:
        doing("counting", 0, 4)
        doing("counting", 1, 4)
        doing("another count", 2, 4)
        assert "another count 2 of 4" in last_line(console)
        assert re.search(r"about \d+ s left", last_line(console))
        doing("waiting", 1.5, 8.0)
        assert "waiting" in last_line(console)
        assert last_line(console).endswith("about 6 s left")
        doing("without an end")
        assert "left" not in last_line(console)
    doing("too late")
    assert "too late" not in console.file.getvalue()


def last_line(console):
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    return re.split(r"[\r\n]+", text.rstrip())[-1].rstrip()


@pytest.mark.parametrize(
    "options", [{"force_terminal": False, "shown": True}, {"force_terminal": True, "shown": False}]
)
def test_without_a_terminal_or_with_verbose_0_there_is_no_line(options):
    console = Console(file=io.StringIO(), force_terminal=options["force_terminal"])
    with Activity(console, shown=options["shown"]) as doing:
        doing("counting", 1, 4)
    assert console.file.getvalue() == ""


def test_what_several_plans_have_in_common_is_said_once(capsys):
    with screen(Console(file=io.StringIO()), 1):
        for note in ("one thing", "another", "one thing"):
            logging.getLogger("modelpar.planner").warning(note)
    assert capsys.readouterr().err.splitlines() == ["one thing", "another"]
