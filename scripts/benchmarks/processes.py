"""What processes cost beside their work: CPU time while idle, and memory over torch's own."""

from __future__ import annotations

import os
import subprocess
import sys
from time import perf_counter, sleep

from benchmarks import load, tasks
from benchmarks.fleet import Fleet
from benchmarks.hosts import search_path
from benchmarks.markdown import table
from benchmarks.options import Options

IDLE_SECONDS = 5.0
_READ_PEAK = "import os, torch; from benchmarks.load import status_bytes; print(status_bytes(os.getpid(), 'VmHWM'))"

TEXT = f"""\
The default GPT, 2 stages, m = 8, after some steps of GPipe and of 1F1B. *Idle* is the CPU time of a process over
{IDLE_SECONDS:g} s in which nobody trains, in per cent of a core. *Peak* is the most resident memory so far (VmHWM), and
how much that is above a process that only imported torch."""


def run(options: Options) -> str:
    """Measures all contenders' processes; returns a table."""
    options.say("idle CPU and memory of processes")
    alone = _peak_of_torch()
    with Fleet(2, unsplit=not options.quick) as fleet:
        fleet.load(tasks.gpt, tasks.plans(tasks.gpt, 2, 8))
        groups = fleet.pids()
        start, before = perf_counter(), _cpu_seconds(groups)
        sleep(IDLE_SECONDS)
        seconds, after = perf_counter() - start, _cpu_seconds(groups)
        rows = []
        for name, pids in groups.items():
            idle = [(after[pid] - before[pid]) / seconds for pid in pids]
            peaks = [load.status_bytes(pid, "VmHWM") for pid in pids]
            rows.append(
                [
                    name,
                    ", ".join(f"{100 * share:.1f}" for share in idle),
                    ", ".join(f"{peak / 1e6:.0f}" for peak in peaks),
                    ", ".join(f"{(peak - alone) / 1e6:.0f}" for peak in peaks),
                ]
            )
    rows.append(["`import torch`", "–", f"{alone / 1e6:.0f}", "0"])
    return f"{TEXT}\n\n{table(['processes', 'idle, % of a core', 'peak, MB', 'over torch, MB'], rows)}"


def _cpu_seconds(groups: dict[str, list[int]]) -> dict[int, float]:
    return {pid: load.cpu_seconds(pid) for pids in groups.values() for pid in pids}


def _peak_of_torch() -> int:
    """Returns the peak of a process that only imported torch."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search_path())}
    command = [sys.executable, "-c", _READ_PEAK]
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
