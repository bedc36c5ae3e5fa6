"""Markdown: tables, and the head of a report that says when, where and how it was made."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table; a column whose cells all begin like numbers is aligned to the right."""
    right = [all(row[i][:1] in "–0123456789-+" for row in rows) for i in range(len(head))]
    rule = ["---:" if flag else "---" for flag in right]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])


def provenance() -> str:
    """Returns date, machine and command as a list."""
    import torch

    command = shlex.join(["scripts/bench", *sys.argv[1:]])
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    return (
        f"* {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}, load average at the start {load}\n"
        f"* {os.cpu_count()} cores, {_processor()}, {platform.system()} {platform.release()}\n"
        f"* Python {platform.python_version()}, torch {torch.__version__}\n"
        f"* `{command}`"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
