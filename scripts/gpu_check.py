"""Checks modelpar on the GPUs of this machine, and writes one page of Markdown; scripts/gpu_check runs this.

Every part runs in a process of its own, which writes down what it finds as it goes: a part that fails, hangs or crashes
hides nothing of the others. The exit code is 1 where the split model did not equal the unsplit one everywhere.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
NEEDED = ("torch", "numpy", "cloudpickle")
TOTAL_SECONDS = 450.0
"""How long all parts together may take; eight minutes with what comes before and after."""
PARTS = {
    "parity threads": 60.0,
    "parity rpc": 75.0,
    "parity cuda_ipc": 75.0,
    "steps unsplit": 60.0,
    "steps threads": 75.0,
    "steps rpc": 90.0,
    "steps cuda_ipc": 90.0,
    "torch gloo": 45.0,
    "torch nccl": 45.0,
}
"""The parts, and how many seconds each may take."""

Say = Callable[..., None]
"""Writes down one finding, as keywords."""


def main(words: Sequence[str] | None = None) -> int:
    """Runs all parts, or as a child one of them; returns the exit code."""
    arguments = _parser().parse_args(words)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if sys.version_info < (3, 11) or missing:
        lacks = f"lacks {', '.join(missing)}" if missing else "is older than Python 3.11"
        print(f"gpu_check: {sys.executable} {lacks}; BENCH_PYTHON=/path/to/python chooses another", file=sys.stderr)
        return 1
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: deterministic products need it
    sys.path[:0] = [str(SCRIPTS), str(ROOT), str(ROOT / "tests")]
    if arguments.part:
        return _do(arguments.part, arguments.device, arguments.findings)
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
        print(f"no GPU: torch {torch.__version__}, built for {built}, finds no CUDA device; nothing was checked")
        return 0
    from benchmarks.on_gpu import page

    begun, found = perf_counter(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only or PARTS:
            left = TOTAL_SECONDS - (perf_counter() - begun)
            print(f"gpu_check: {perf_counter() - begun:4.0f} s  {name}", file=sys.stderr, flush=True)
            found += _run(name, arguments.device, Path(folder, "findings"), min(PARTS[name], left))
            text = page.write(found, arguments.device, sys.argv[1:], perf_counter() - begun)
            if arguments.output:  # after every part, so that nothing gets lost
                arguments.output.write_text(text)
    if not arguments.output:
        print(text)
    return 0 if page.is_equal(found) else 1


def _run(name: str, device: str, file: Path, seconds: float) -> list[dict[str, Any]]:
    """Runs one part in a process; returns what it found, and why it found no more if it did not end well."""
    file.write_text("")
    if seconds < 5:
        return [{"part": name, "check": "failed", "what": name, "why": "no time was left"}]
    command = [sys.executable, __file__, "--part", name, "--device", device, "--findings", str(file)]
    path = os.pathsep.join([str(SCRIPTS), str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=sys.stderr, start_new_session=True
    )
    why = ""
    try:
        code = process.wait(seconds)
        why = f"ended with exit code {code}; its output says why" if code else ""
    except subprocess.TimeoutExpired:
        why = f"was stopped after {seconds:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its workers end with it
        process.wait()
    found = [{"part": name, **json.loads(line)} for line in file.read_text().splitlines()]
    return [*found, {"part": name, "check": "failed", "what": name, "why": why}] if why else found


def _do(name: str, device: str, file: Path) -> int:
    """Does one part in this process."""
    from benchmarks.on_gpu import parity, steps, torch_pipelines

    def say(**finding: Any) -> None:
        with file.open("a") as findings:
            findings.write(json.dumps(finding) + "\n")

    kind, _, way = name.partition(" ")
    parts: dict[str, Callable[..., None]] = {
        "parity": partial(parity.run, way),
        "steps": partial(steps.run, way),
        "torch": partial(torch_pipelines.run, way),
    }
    try:
        parts[kind](device, say)
    except Exception as error:
        traceback.print_exc()
        say(check="failed", what=name, why=" ".join(f"{type(error).__name__}: {error}".splitlines()[:1]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the page goes (default: printed)")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"some of: {', '.join(PARTS)}")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu runs small models, to try this script itself"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--findings", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
