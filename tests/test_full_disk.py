"""Output that cannot be written: a full disk, a reader that has gone. One line, and nothing finished is lost."""

import json
import os
import subprocess
import sys

import pytest
from commands import MLP, THREADS
from conftest import ROOT

RUN_IN_SHELL = f'exec {sys.executable} -m modelpar.cli "$@"'


def shell(tmp_path, before, after, *words):
    """Runs a command in a shell of its own, with something set before, and what comes after it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = ["bash", "-c", f"{before}{RUN_IN_SHELL}{after}", "bash", *words]
    return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["simulate", *MLP, *THREADS[1:]]])
def test_output_that_cannot_be_written_is_one_line(tmp_path, words):
    ended = shell(tmp_path, "", " >/dev/full", *words)
    assert (ended.returncode, ended.stderr) == (1, "modelpar: standard output: No space left on device\n")


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_output_that_nobody_reads_is_no_error(tmp_path, words):
    ended = shell(tmp_path, "set -o pipefail; (", ") | true", *words)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_a_disk_that_gets_full_costs_no_weights_and_one_line(tmp_path):
    """The limit on the size of a file is met by the event file, long before the weights would meet it."""
    words = ["training.steps=100000", "training.trace_every=1", "training.eval_every=0", "output.name=full"]
    ended = shell(tmp_path, "ulimit -f 200; ", "", "train", *MLP, *THREADS, *words)
    assert ended.returncode == 1
    assert ended.stderr == "modelpar: the event file in runs/full cannot be written: File too large\n"
    assert json.loads((tmp_path / "runs" / "full" / "result.json").read_text())["status"] == "failed"
    assert (tmp_path / "runs" / "full" / "weights.safetensors").exists()
    assert not list((tmp_path / "runs" / "full").glob("*.tmp"))
