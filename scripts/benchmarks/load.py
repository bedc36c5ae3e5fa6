"""Who uses the processors: this benchmark's own processes, or others. Linux only; elsewhere nothing is known."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

_PROC = Path("/proc")
_IDLE = (3, 4)
"""Fields of /proc/stat's first line in which nobody computed: idle, iowait. Time stolen by the host counts as used."""
_GUEST = 8
"""Fields from here on are counted in earlier ones already."""


@dataclass(frozen=True)
class Mark:
    """The processors' clocks at one moment, in seconds."""

    wall: float
    machine: float
    """CPU time used on the whole machine."""
    own: float
    """CPU time used by our processes, those that have ended included."""


def mark(root: int | None = None) -> Mark | None:
    """Reads the clocks; ours are `root` (this process) and its descendants. None where the kernel does not say."""
    if not (_PROC / "stat").exists():
        return None
    fields = (_PROC / "stat").read_text().splitlines()[0].split()[1 : 1 + _GUEST]
    machine = sum(int(ticks) for i, ticks in enumerate(fields) if i not in _IDLE) * _tick()
    own = sum(cpu_seconds(pid, ended=True) for pid in tree(os.getpid() if root is None else root))
    return Mark(perf_counter(), machine, own)


def foreign_load(before: Mark | None, after: Mark | None) -> float | None:
    """Returns how many cores processes other than ours kept busy in between, at least 0; None where unknown."""
    if before is None or after is None:
        return None
    others = (after.machine - before.machine) - (after.own - before.own)
    return max(0.0, others) / (after.wall - before.wall)


def tree(root: int) -> list[int]:
    """Returns a process and its descendants, by process id."""
    children = defaultdict(list)
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children[int(fields[1])].append(int(entry.name))
    found = [root]
    for pid in found:  # grows while it is walked
        found += children[pid]
    return found


def cpu_seconds(pid: int, *, ended: bool = False) -> float:
    """Returns the CPU time that a process has used, user and system; 0 if it is gone.

    `ended` includes that of its children that have ended, and theirs.
    """
    fields = _stat(pid)
    return sum(int(ticks) for ticks in fields[11 : 15 if ended else 13]) * _tick()


def status_bytes(pid: int, field: str) -> int:
    """Returns a memory figure of a process, such as VmRSS (resident now) or VmHWM (its peak)."""
    lines = (_PROC / str(pid) / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def _stat(pid: int) -> list[str]:
    """Returns what follows the name in a process's stat line; nothing if it is gone."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _tick() -> float:
    return 1.0 / os.sysconf("SC_CLK_TCK")
