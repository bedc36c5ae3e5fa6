"""Overhead per action: what a step costs where there is almost nothing to compute."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import NamedTuple

from benchmarks import stats, tasks
from benchmarks.contenders import Lap
from benchmarks.fleet import TRANSPORTS, Fleet
from benchmarks.markdown import table
from benchmarks.options import Options
from benchmarks.rounds import interleave
from benchmarks.tasks import SCHEDULES
from modelpar.planning.timeline import COMPUTE, Timeline

NUM_STAGES = 2
NUM_MICROBATCHES = 32
PER_RANK = 2 * NUM_MICROBATCHES
"""Actions per rank and step: a forward and a backward of every micro-batch."""

TEXT = f"""\
Two stages of two `nn.Linear(4, 4)` each, m = {NUM_MICROBATCHES}. Microseconds, over a rank's {PER_RANK} actions per
step. *Step* is step time over actions. The next columns split a step's timeline, mean of both ranks: *hand-off* is
waiting for the other rank's value, *data* for the batch, *compute* the layers themselves, *send* packing and sending,
*end* the gradient norm and the optimizer, *bookkeeping* what no span covers. *CPU* is the CPU time of all processes of
the contender over the actions of all ranks; over RPC the controller, which sends the batch, has its own column."""

PARTS = ("hand-off", "data", "compute", "send", "end", "bookkeeping")


class Turn(NamedTuple):
    """One contender's turn."""

    lap: Lap
    cpu: Mapping[str, float]
    """CPU seconds per action, of groups of processes."""


def run(options: Options) -> str:
    """Measures modelpar and torch; returns a table."""
    options.say("overhead per action")
    plans = tasks.plans(tasks.near_empty, NUM_STAGES, NUM_MICROBATCHES, profile="flops")
    with Fleet(NUM_STAGES, unsplit=False) as fleet:
        fleet.load(tasks.near_empty, plans)
        turns = {name: partial(_with_cpu, fleet, turn) for name, turn in fleet.turns(options.slice_seconds).items()}
        rounds = interleave(turns, options.rounds(full=30, quick=4), options.most_seconds)
    rows = []
    for name in (f"{kind} {schedule}" for kind in (*TRANSPORTS, "torch") for schedule in SCHEDULES):

        def cell(of: Callable[[Turn], float | None], name: str = name) -> str:
            return stats.text(rounds.summary(lambda turns: of(turns[name])), 0, 1e6)

        group = name.split()[0]
        cells = [cell(lambda turn: stats.step_seconds(turn.lap.ends) / PER_RANK)]
        cells += [cell(lambda turn, part=part: _part(turn.lap.timelines, part)) for part in PARTS]
        cells.append(cell(lambda turn, group=group: turn.cpu.get(group, turn.cpu.get(f"{group} ranks"))))
        cells.append(cell(lambda turn, group=group: turn.cpu.get(f"{group} controller")))
        rows.append([name, *cells])
    head = ["contender", "step", *PARTS, "CPU", "CPU of the controller"]
    return f"{TEXT}\n\n{table(head, rows)}\n\nRounds: {rounds.note}"


def parts(timeline: Timeline) -> dict[str, float]:
    """Returns where the seconds of a step went, mean over ranks; they add up to the makespan."""
    names = {"wait": "hand-off", "data": "data", "send": "send"} | dict.fromkeys(COMPUTE, "compute")
    found: defaultdict[str, float] = defaultdict(float)
    for span in timeline.spans:
        found[names.get(span.kind, "end")] += span.seconds / timeline.num_ranks
    found["bookkeeping"] = timeline.makespan - sum(found.values())
    return dict(found)


def _part(timelines: Sequence[Timeline], part: str) -> float | None:
    if not timelines:
        return None
    return fmean(parts(timeline).get(part, 0.0) for timeline in timelines) / PER_RANK


def _with_cpu(fleet: Fleet, turn: Callable[[], Lap]) -> Turn:
    before = fleet.cpu_seconds()
    lap = turn()
    actions = len(lap.ends) * PER_RANK * NUM_STAGES
    return Turn(lap, {name: (after - before[name]) / actions for name, after in fleet.cpu_seconds().items()})
