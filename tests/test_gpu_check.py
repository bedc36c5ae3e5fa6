"""scripts/gpu_check: what it says without a GPU, that a part that fails hides no other, and the page."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))

import gpu_check  # noqa: E402
from benchmarks.on_gpu import page, parity  # noqa: E402

EQUAL = {"part": "parity rpc", "check": "parity", "way": "rpc", "model": "gpt", "ranks": 2, "schedule": "gpipe"}


def run(*arguments, python=sys.executable):
    process = subprocess.run(
        [ROOT / "scripts" / "gpu_check", *arguments],
        env={**os.environ, "BENCH_PYTHON": str(python)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    return process.returncode, process.stdout, process.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs, which it would check")
def test_without_a_gpu_it_says_so_in_one_line():
    code, output, errors = run()
    assert (code, errors) == (0, "")
    assert output.startswith("no GPU: torch ")
    assert output.count("\n") == 1


def test_an_interpreter_without_torch_is_named_in_one_line(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    code, output, errors = run(python=bare)
    assert (code, output) == (1, "")
    assert "lacks torch, numpy, cloudpickle; BENCH_PYTHON=" in errors
    assert errors.count("\n") == 1


def test_on_the_cpu_parity_holds_and_what_cannot_run_is_listed(tmp_path):
    output = tmp_path / "page.md"
    only = ("--only", "parity threads", "torch nccl")
    code, _, errors = run("--device", "cpu", *only, "--output", str(output))
    assert code == 0, errors
    text = output.read_text()
    assert "16 of 16 equal" in text
    assert "| threads | 4 | 1f1b | equal | equal | equal | equal |" in text
    assert "* torch over nccl: nccl needs GPUs" in text


def test_a_part_that_hangs_or_crashes_keeps_what_it_found(tmp_path, monkeypatch):
    script = tmp_path / "part.py"
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    file = tmp_path / "findings"
    says = "import sys, time, os; open(sys.argv[-1], 'a').write('{\"check\": \"step\"}\\n'); "
    for then, why in (("time.sleep(60)", "was stopped after 5 s"), ("os.abort()", "ended with exit code -6")):
        script.write_text(says + then)
        found = gpu_check._run("steps rpc", "cpu", file, 5.0)
        assert found[0] == {"part": "steps rpc", "check": "step"}
        assert found[1]["why"].startswith(why)
    assert gpu_check._run("steps rpc", "cpu", file, 1.0)[0]["why"] == "no time was left"


def test_parity_holds_only_where_every_case_was_equal():
    equal = {**EQUAL, "found": "equal"}
    other = {"part": "steps rpc", "check": "failed", "what": "steps rpc", "why": "a bug"}
    assert page.is_equal([equal, other])
    assert not page.is_equal([equal, {**EQUAL, "found": "differs: losses by 1e-7"}])
    assert not page.is_equal([equal, {**other, "part": "parity threads"}])


def test_the_page_has_every_figure_and_every_failure():
    step = {"part": "steps rpc", "check": "step", "model": "gpt", "schedule": "1f1b"}
    memory = {"peaks": [80_000_000, 50_000_000], "predicted_bytes": [40_000_000, 50_000_000], "balance": "4-4"}
    found = [
        {**EQUAL, "found": "differs: losses by 1e-7"},
        {**step, "who": "modelpar rpc", "seconds": 0.25, "bubble": 0.2, "predicted_seconds": 0.2, **memory},
        {**step, "who": "unsplit", "schedule": "–", "seconds": 0.5, "peaks": [0]},
        {"part": "torch gloo", "check": "failed", "what": "torch gloo", "why": "was stopped after 45 s"},
    ]
    text = page.write(found, "cpu", ["--device", "cpu"], 60.0)
    assert "| rpc | 2 | gpipe | differs |" in text
    assert "| gpt | 1f1b | 250.0 (200.0, 20%) | 500.0 |" in text
    assert "| gpt | 1f1b | modelpar rpc | 4-4 | 40, 50 | 80, 50 | -50 %, +0 % |" in text
    assert "* torch gloo: was stopped after 45 s" in text
    assert "* rpc, gpt, 2 ranks, gpipe: differs: losses by 1e-7" in text


def test_a_difference_is_named_with_its_size():
    state = {"a": torch.ones(2), "b": torch.ones(2)}
    expected = parity.Training([1.0, 2.0], [0.5, 0.5], state)
    assert parity.difference(expected, expected) == ""
    found = parity.Training([1.0, 2.25], [0.5, 0.5], {"a": torch.ones(2), "b": torch.tensor([1.0, 1.5])})
    assert parity.difference(found, expected) == "differs: losses by 2.5e-01; 1 of 2 weights by 5.0e-01, first b"
