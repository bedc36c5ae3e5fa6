"""Makes .venv and installs modelpar into it; scripts/setup runs this when something changed. Standard library only.

Standard input says what is wanted: two lines for the place and the interpreter, then every file that decides what gets
installed. .venv/modelpar-setup keeps the text that .venv was made from, and is empty while work is under way:

    .venv                        what happens
    missing, or empty            is made
    stamp equal to what's wanted nothing
    stamp with other pins        pip brings it up to date
    stamp empty, or moved, or    is emptied and made again
      for another interpreter
    without a stamp              is somebody else's: refused
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "modelpar-setup"
EXTRAS = "test"


def main() -> int:
    """Brings .venv up to date, one process at a time; returns the exit code."""
    wanted = sys.stdin.read()
    with (ROOT / ".venv.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another setup of this folder to finish")
            fcntl.flock(lock, fcntl.LOCK_EX)
        installed = STAMP.read_text() if STAMP.exists() else ""
        if installed == wanted:
            return 0
        if not STAMP.exists() and VENV.exists() and any(VENV.iterdir()):
            say(f"{VENV} was not made by scripts/setup: move it away, or install modelpar there with pip yourself")
            return 1
        start = time.monotonic()
        try:
            install(wanted, installed, lock)
        except subprocess.CalledProcessError as error:
            say(f"failed (exit code {error.returncode}), the output is above: {' '.join(error.cmd)}")
            return 1
        except KeyboardInterrupt:
            say("interrupted; the next call starts over")
            return 130
        say(f"done in {time.monotonic() - start:.0f} s")
        return 0


def install(wanted: str, installed: str, lock: IO[str]) -> None:
    """Makes or updates .venv and writes the stamp; raises CalledProcessError when venv or pip fails."""
    update = installed.splitlines()[:2] == wanted.splitlines()[:2]
    python = str(VENV / "bin" / "python")
    pip = [python, "-I", "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    pip += ["--constraint", str(ROOT / "scripts" / "constraints.txt")]
    build_requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]

    VENV.mkdir(exist_ok=True)
    STAMP.write_text("")
    if update:
        say("bringing .venv up to date")
    else:
        version = "{}.{}".format(*sys.version_info)
        say(f"making .venv with Python {version} and installing PyTorch and more: minutes on a slow line, only once")
        clear()
        run([sys.executable, "-m", "venv", "--prompt", "modelpar", str(VENV.resolve())], lock)
    try:
        # The pinned build tools, and no build isolation, so that what builds is as fixed as what is built.
        if build_requires:
            run([*pip, *build_requires], lock)
        run([*pip, "--no-build-isolation", "--editable", f".[{EXTRAS}]"], lock)
    except subprocess.CalledProcessError:
        if update:  # pip has put back what it took out, so the next call need not start from nothing
            STAMP.write_text(installed)
        raise
    complete = VENV / "modelpar-setup.new"
    complete.write_text(wanted)
    complete.replace(STAMP)


def clear() -> None:
    """Empties .venv but for the stamp, which says it is ours. The folder stays: it may be a link to another disk."""
    for entry in VENV.iterdir():
        if entry == STAMP:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def run(command: list[str], lock: IO[str]) -> None:
    """Runs a command quietly; shows what it printed when it fails, and its last line meanwhile on a terminal."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"PIP_USER": "0", "PIP_PROGRESS_BAR": "off"}
    start = time.monotonic()
    with (VENV / "setup.log").open("w+", errors="replace") as log:
        # The child holds the lock too: should this process be killed, the next setup waits for the child to finish.
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()],
        )
        try:
            while child.poll() is None:
                try:
                    child.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    show_progress(time.monotonic() - start)
        except KeyboardInterrupt:
            child.terminate()
            child.wait()
            raise
        finally:
            show_progress(None)
        if child.returncode:
            log.seek(0)
            sys.stderr.write(log.read())
            raise subprocess.CalledProcessError(child.returncode, command)


def show_progress(seconds: float | None) -> None:
    """Shows the seconds so far and the log's last line on a terminal, in place; None wipes the line."""
    if not sys.stderr.isatty():
        return
    text = ""
    if seconds is not None:
        lines = (VENV / "setup.log").read_text(errors="replace").splitlines() or [""]
        text = f"setup: {seconds:.0f} s  {lines[-1].strip()}"[: shutil.get_terminal_size().columns - 1]
    sys.stderr.write(f"\r\x1b[K{text}")
    sys.stderr.flush()


def say(message: str) -> None:
    """Prints one line to standard error."""
    print(f"setup: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
