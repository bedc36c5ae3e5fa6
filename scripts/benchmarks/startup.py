"""From the command to the first step: how long `modelpar train` takes until it has trained once."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from time import perf_counter

from benchmarks import stats
from benchmarks.hosts import HostError, search_path
from benchmarks.markdown import table
from benchmarks.options import Options
from benchmarks.rounds import interleave

COMMAND = "modelpar train model=gpt training.steps=1"
_IMPORT = "import torch"

TEXT = f"""\
Seconds from starting `{COMMAND}` (a process of its own, defaults otherwise) until it prints
its first step; and how long `{_IMPORT}` alone takes in a new process."""


def run(options: Options) -> str:
    """Measures 2 and 4 ranks; returns a table."""
    options.say("command to first step")
    turns: dict[str, Callable[[], float]] = {f"{ranks} ranks": partial(first_step_seconds, ranks) for ranks in (2, 4)}
    turns[_IMPORT] = _import_seconds
    rounds = interleave(turns, options.rounds(full=10, quick=1), options.most_seconds)
    head = [*turns, "rounds"]
    cells = [stats.text(rounds.summary(lambda values, name=name: values[name]), 1) for name in turns]
    return f"{TEXT}\n\n{table(head, [[*cells, rounds.note]])}"


def first_step_seconds(num_ranks: int) -> float:
    """Returns the seconds until `modelpar train` prints its first step; waits for its end, too."""
    words = COMMAND.split()[1:]
    start = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "modelpar.cli", *words),
                *(f"pipeline.num_ranks={num_ranks}", f"output.folder={folder}"),
            ],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(search_path()), "PYTHONUNBUFFERED": "1"},
            text=True,
            start_new_session=True,
        )
        assert process.stdout
        seconds = None
        try:
            for line in process.stdout:
                if seconds is None and line.startswith("step 1/"):
                    seconds = perf_counter() - start
            code = process.wait()  # it ends in order, so that its CPU time is known to be ours
        finally:
            process.kill()  # after Ctrl-C; its workers notice, and end too
            process.wait()
            process.stdout.close()
    if seconds is None:
        raise HostError(f"`{COMMAND}` ended with exit code {code} before its first step")
    return seconds


def _import_seconds() -> float:
    start = perf_counter()
    subprocess.run([sys.executable, "-c", _IMPORT], check=True, start_new_session=True)
    return perf_counter() - start
