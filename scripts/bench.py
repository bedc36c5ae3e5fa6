"""Measures modelpar and writes what it found as Markdown; scripts/bench runs this. See --help for the sections."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

SCRIPTS = Path(__file__).resolve().parent
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS.parent)]

from benchmarks import actions, capture, compute, markdown, prediction, processes, recording, startup, steps, transport  # noqa: E402
from benchmarks.hosts import HostError  # noqa: E402
from benchmarks.options import Options  # noqa: E402


class Section(NamedTuple):
    """One part of the report."""

    title: str
    run: Callable[[Options], str]


SECTIONS = {
    "steps": Section("Step time", steps.run),
    "compute": Section("Compute, alone and in the pipeline", compute.run),
    "capture": Section("Capture and replay", capture.run),
    "actions": Section("Overhead per action", actions.run),
    "transport": Section("Transport", transport.run),
    "startup": Section("Command to first step", startup.run),
    "processes": Section("Idle CPU and memory of processes", processes.run),
    "recording": Section("Cost of recording", recording.run),
    "prediction": Section("Prediction", prediction.run),
}

NOT_QUICK = ("compute", "capture", "processes", "recording")
"""Sections that cannot be shortened: --quick leaves them out unless --only names them."""


def main(words: Sequence[str] | None = None) -> int:
    """Runs the sections asked for; returns the exit code."""
    arguments = _parser().parse_args(words)
    signal.signal(signal.SIGTERM, _interrupt)
    options = Options(arguments.quick, arguments.rounds, tuple(arguments.case or ()), perf_counter())
    parts = ["# Benchmarks", markdown.provenance()]
    try:
        for name in arguments.only or [name for name in SECTIONS if not (options.quick and name in NOT_QUICK)]:
            begun = perf_counter()
            text = SECTIONS[name].run(options)
            parts.append(f"## {SECTIONS[name].title}\n\n{text}")
            options.say(f"{name} took {perf_counter() - begun:.0f} s")
            if arguments.output:  # after every section, so that nothing measured gets lost
                arguments.output.write_text("\n\n".join(parts) + "\n")
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    except HostError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if not arguments.output:
        print("\n\n".join(parts))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="fewer cases and rounds: two minutes; without " + " and ".join(NOT_QUICK)
    )
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"some of: {', '.join(SECTIONS)}"
    )
    parser.add_argument(
        "--case", nargs="+", metavar="MODEL,STAGES,M", help="of the steps section, only these rows, such as gpt,2,8"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the Markdown goes (default: printed)")
    parser.add_argument("--rounds", type=_positive, metavar="N", help="undisturbed rounds per case (default: 30)")
    return parser


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} rounds; expected at least 1")
    return number


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
