"""How far off the prediction is: step time and memory per stage, predicted against measured."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from statistics import median
from unittest import mock

from benchmarks import load, tasks
from benchmarks.contenders import Modelpar
from benchmarks.hosts import Host
from benchmarks.markdown import table
from benchmarks.options import Options
from benchmarks.rounds import QUIET
from benchmarks.tasks import MODELS
from modelpar.planning import partitioners
from modelpar.planning.memory import stage_memory_bytes
from modelpar.planning.plan import Plan
from modelpar.planning.profile import Profile

NUM_MICROBATCHES = 8
PARTITIONERS = {"uniform": partitioners.uniform, "optimal": partitioners.optimal}

TEXT = f"""\
m = {NUM_MICROBATCHES}, one thread per rank, over RPC. Layers and messages are measured anew, as `modelpar profile`
does, per model and number of stages. *Step* is the median makespan of steps begun one after the other;
errors are (predicted − measured) ÷ measured. *Memory* is per stage: the peak of the worker's resident memory above
what it used before it had its stage, in MB, against the plan's prediction. *Others* is how many cores other processes
kept busy meanwhile: rows above {QUIET:g} are disturbed, and do not count towards the median errors. With more ranks
than cores the prediction's assumption, a core per rank, does not hold. Equal partitions share a row."""


def run(options: Options) -> str:
    """Measures every combination; returns a table and the median errors."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, XDG_CACHE_HOME=folder):
        return _run(options)


def _run(options: Options) -> str:
    rows: list[list[str]] = []
    time_errors, memory_errors = [], []
    for num_ranks in (2,) if options.quick else (2, 4):
        with Host(partial(Modelpar, "rpc", num_ranks)) as host:
            for model in MODELS:
                options.say(f"prediction: {model}, {num_ranks} stages")
                for cells, time_error, memories, counts in _model(host, model, num_ranks, options):
                    rows.append(cells)
                    if counts and num_ranks <= options.num_cores:
                        time_errors.append(abs(time_error))
                        memory_errors += [abs(error) for error in memories]
    head = ["model", "stages", "partition", "balance", "schedule", "predicted, ms", "measured, ms", "error"]
    head += ["memory predicted", "memory measured", "error of memory", "others"]
    verdict = f"Median error of {len(time_errors)} undisturbed combinations with a core per rank: "
    verdict += f"step time {_percent(time_errors)}, memory {_percent(memory_errors)}."
    return f"{TEXT}\n\n{table(head, rows)}\n\n{verdict}"


def _model(
    host: Host, model: str, num_ranks: int, options: Options
) -> list[tuple[list[str], float, list[float], bool]]:
    """Returns a row, the errors of step time and memory, and whether nobody disturbed it, for each combination."""
    task = MODELS[model](NUM_MICROBATCHES)
    profile: str | Profile = "measured"
    found = []
    by_stages: dict[tuple[int, ...], tuple[list[str], dict[str, Plan]]] = {}
    for partition, partitioner in PARTITIONERS.items():
        plans = tasks.plans(task, num_ranks, NUM_MICROBATCHES, partitioner=partitioner, profile=profile)
        profile = plans["gpipe"].profile
        by_stages.setdefault(plans["gpipe"].partition.bounds, ([], plans))[0].append(partition)
    for partitions, plans in by_stages.values():
        for schedule, plan in plans.items():
            host.call("load", "", task, plan)  # one at a time: what another keeps would count towards the peak
            before = load.mark()
            lap = host.call("single_steps", "", options.rounds(full=12, quick=3))
            foreign = load.foreign_load(before, load.mark())
            host.call("unload")
            assert plan.prediction
            predicted, measured = plan.prediction.step_seconds, median(each.makespan for each in lap.timelines)
            error = predicted / measured - 1
            expected, peaks = stage_memory_bytes(plan), lap.peak_bytes
            errors = [a / b - 1 for a, b in zip(expected, peaks, strict=True) if b]
            cells = [model, str(num_ranks), ", ".join(partitions), "-".join(map(str, plan.partition.balance)), schedule]
            cells += [f"{predicted * 1e3:.0f}", f"{measured * 1e3:.0f}", f"{100 * error:+.0f} %"]
            cells += [_megabytes(expected), _megabytes(peaks), ", ".join(f"{100 * each:+.0f} %" for each in errors)]
            cells.append("–" if foreign is None else f"{foreign:.2f}")
            found.append((cells, error, errors, foreign is None or foreign <= QUIET))
    return found


def _megabytes(values: tuple[int, ...]) -> str:
    return ", ".join(f"{value / 1e6:.0f}" for value in values)


def _percent(errors: list[float]) -> str:
    return f"{100 * median(errors):.0f} %" if errors else "–"
