"""Where compute grows: the layers of a stage alone on the machine, with all ranks busy, and in the running pipeline."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from statistics import median
from unittest import mock

from benchmarks import stats, tasks
from benchmarks.contenders import Modelpar
from benchmarks.hosts import Host
from benchmarks.markdown import table
from benchmarks.options import Options
from benchmarks.rounds import interleave
from benchmarks.tasks import MODELS
from modelpar.planning.plan import Plan

NUM_STAGES = 2
NUM_MICROBATCHES = 8

TEXT = f"""\
{NUM_STAGES} stages over RPC, 1F1B, m = {NUM_MICROBATCHES}, one thread per rank. *Alone*: the forward and backward of a
stage's layers, each timed as a stage of its own, in one process while nothing else runs, ms per micro-batch; then the
same while all ranks do it at once, and a stage's own forward and backward spans (wall clock) in the running pipeline,
both over *alone*, medians with quartiles over rounds in which each is measured anew."""


def run(options: Options) -> str:
    """Measures all models; returns a table."""
    rows = []
    with Host(partial(Modelpar, "rpc", NUM_STAGES)) as host:
        for model in MODELS:
            options.say(f"compute: {model}")
            task = MODELS[model](NUM_MICROBATCHES)
            plan = tasks.plans(task, NUM_STAGES, NUM_MICROBATCHES)["1f1b"]
            turns = {how: partial(_profiled, task, plan, how) for how in ("alone", "anew")}
            rounds = interleave(
                {**turns, "live": partial(_live, host, task, plan)},
                options.rounds(full=10, quick=2),
                options.most_seconds,
            )
            for stage in range(NUM_STAGES):
                cells = [stats.text(rounds.summary(lambda values, s=stage: values["alone"][s]), 2, 1e3)]
                for how in ("anew", "live"):
                    cells.append(
                        stats.text(rounds.summary(lambda values, s=stage, how=how: values[how][s] / values["alone"][s]))
                    )
                rows.append([model, str(stage), *cells, rounds.note])
    head = ["model", "stage", "alone, ms", "all ranks busy / alone", "in the pipeline / alone", "rounds"]
    return f"{TEXT}\n\n{table(head, rows)}"


def _profiled(task: tasks.Task, plan: Plan, how: str) -> tuple[float, ...]:
    """Returns, per stage of the plan, the seconds of its layers in a profile measured now."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, XDG_CACHE_HOME=folder):
        profile = tasks.plans(task, NUM_STAGES, NUM_MICROBATCHES, profile=how)["1f1b"].profile
    layers = [[profile.layers[i] for i in plan.partition.layers(stage)] for stage in range(NUM_STAGES)]
    return tuple(sum(layer.seconds for layer in own) for own in layers)


def _live(host: Host, task: tasks.Task, plan: Plan) -> tuple[float, ...]:
    """Returns the median forward plus the median backward of each stage in the running pipeline."""
    host.call("load", "", task, plan)
    timelines = host.call("steps", "", 6).timelines
    host.call("unload")
    return tuple(
        sum(
            median(s.seconds for timeline in timelines for s in timeline.of_rank(stage) if s.kind == kind)
            for kind in ("F", "B")
        )
        for stage in range(NUM_STAGES)
    )
