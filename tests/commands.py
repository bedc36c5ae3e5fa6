"""Runs the commands as a user would: in this process, which is fast, or in one of their own."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from conftest import ROOT, interruptible

from modelpar.cli import main

THREADS = ["transport=threads", "pipeline.profile=flops", "pipeline.num_threads=1"]
GPT = ["model.width=16", "model.depth=2", "model.heads=2", "model.context=8", "data=text", "data.path=text.txt"]
MLP = ["model=mlp", "model.width=16", "model.depth=2", "model.input_shape=[8]", "data.num_samples=64"]
TEXT = "".join(f"line {i}: the quick brown fox jumps over the lazy dog\n" for i in range(60))


class Outcome(NamedTuple):
    """What a command left on the screen."""

    code: int
    out: str
    err: str


def call(*words: str) -> Outcome:
    """Runs a command in this process, in the current folder."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as ended:
            code = ended.code or 0
    return Outcome(code, out.getvalue(), err.getvalue())


class Command(subprocess.Popen):
    """A command in a process of its own, marked so that its workers can be found."""

    def __init__(self, folder: Path, *words: str):
        self.mark = f"MODELPAR_TEST_MARK={uuid4()}"
        name, _, value = self.mark.partition("=")
        own = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", name: value}
        with interruptible():
            super().__init__(
                [sys.executable, "-m", "modelpar.cli", *words],
                cwd=folder,
                env={**os.environ, **own},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

    def wait_line(self, start: str) -> str:
        """Waits until the command prints a line that begins like this."""
        seen = []
        for line in self.stdout:
            seen.append(line)
            if line.startswith(start):
                return line
        raise AssertionError(f"no line begins with {start!r}: {''.join(seen)}{self.stderr.read()}")

    def outcome(self) -> Outcome:
        """Waits until the command ends."""
        out, err = self.communicate()
        return Outcome(self.returncode, out, err)

    def left(self) -> list[str]:
        """Returns the command lines of its processes that still run, this one included."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                    found.append((process / "cmdline").read_text())
        return found


def listing(folder: Path) -> set[str]:
    """Returns what is in a folder; an event file as "events"."""
    return {"events" if path.name.startswith("events.out.tfevents.") else path.name for path in folder.iterdir()}
