"""Step time: modelpar against torch's pipelines, the unsplit model and the ideal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks import stats, tasks
from benchmarks.contenders import Lap
from benchmarks.fleet import TRANSPORTS, Fleet
from benchmarks.markdown import table
from benchmarks.options import Options
from benchmarks.rounds import QUIET, Rounds, interleave
from benchmarks.tasks import MODELS, SCHEDULES
from modelpar.planning.plan import Plan

UNSPLIT = ("unsplit 1 thread", "unsplit all threads")

TEXT = f"""\
Each contender trains on the same batch with the same layers, AdamW, and one thread per rank; modelpar and torch have
the same stages and micro-batches. In every round each contender gets one turn, in random order, while the others wait;
a turn is some steps in a row, of which the first does not count. Cells are medians over rounds with their quartiles;
ratios are made within a round. *Ideal* is max over stages (compute + optimizer) × (m + s − 1) / m of the contender's
own spans during which all ranks compute; with more ranks than cores it says nothing and is left out. modelpar also
sends every batch from the controller, computes the gradient norm and checks the loss; torch's ranks have the batch
already. The unsplit model takes its batch whole or in m pieces, as is faster: *unsplit in* says which, for 1 thread and
for all. A round is dropped where other processes kept more than {QUIET:g} cores busy during a turn."""


@dataclass(frozen=True)
class Case:
    """One row: a model, split in so many stages, with so many micro-batches."""

    model: str
    num_stages: int
    num_microbatches: int


@dataclass(frozen=True)
class Measured:
    """What a case gave."""

    case: Case
    plan: Plan
    rounds: Rounds[Lap]
    unsplit_pieces: dict[str, int]


def cases(quick: bool) -> list[Case]:
    """Returns what is measured, by number of stages, since each number needs processes of its own."""
    if quick:
        return [Case("gpt", 2, 8), Case("mlp", 2, 8), Case("convnet", 2, 4), Case("gpt", 4, 8)]
    return [Case(model, 2, m) for model in MODELS for m in (4, 8, 16)] + [Case(model, 4, 8) for model in MODELS]


def run(options: Options) -> str:
    """Measures all cases; returns their tables."""
    measured = []
    chosen = [case for case in cases(options.quick) if not options.cases or _name(case, ",") in options.cases]
    for num_stages in dict.fromkeys(case.num_stages for case in chosen):
        with Fleet(num_stages, unsplit=not options.quick or num_stages == 2) as fleet:
            for case in chosen:
                if case.num_stages == num_stages:
                    options.say(f"step time: {case.model}, {num_stages} stages, m = {case.num_microbatches}")
                    measured.append(_measure(fleet, case, options))
    return "\n\n".join([TEXT, _seconds_table(measured), _ratio_table(measured, options.num_cores)])


def _measure(fleet: Fleet, case: Case, options: Options) -> Measured:
    task = MODELS[case.model](case.num_microbatches)
    plans = tasks.plans(task, case.num_stages, case.num_microbatches)
    fleet.load(task, plans)
    rounds = interleave(fleet.turns(options.slice_seconds), options.rounds(full=30, quick=3), options.most_seconds)
    return Measured(case, plans["gpipe"], rounds, dict(fleet.unsplit_pieces))


def _seconds_table(measured: list[Measured]) -> str:
    pipelines = [f"{name} {schedule}" for name in (*TRANSPORTS, "torch") for schedule in SCHEDULES]
    head = ["model, stages, m", "balance", "MB per cut", *pipelines, *UNSPLIT, "unsplit in", "rounds"]
    rows = []
    for each in measured:
        cells = [stats.text(each.rounds.summary(_seconds(name)), 1, 1e3) for name in (*pipelines, *UNSPLIT)]
        balance = "-".join(map(str, each.plan.partition.balance))
        crossing = f"{tasks.cut_bytes(each.plan) / 1e6:.2f}"
        pieces = " and ".join(str(each.unsplit_pieces[name]) for name in UNSPLIT if name in each.unsplit_pieces)
        rows.append([_name(each.case), balance, crossing, *cells, pieces or "–", each.rounds.note])
    return "Milliseconds per step\n\n" + table(head, rows)


def _ratio_table(measured: list[Measured], num_cores: int) -> str:
    head = ["model, stages, m", "schedule", "ideal / rpc", "rpc / torch"]
    head += [f"rpc / {name}" for name in UNSPLIT]
    head += ["rpc / threads", "ideal / threads", "threads / torch", *(f"threads / {name}" for name in UNSPLIT)]
    rows = []
    for each in measured:
        for schedule in SCHEDULES:

            def ratio(over: str, under: str, each: Measured = each) -> str:
                return stats.text(each.rounds.summary(_ratio(over, under)))

            def ideal(transport: str, each: Measured = each, schedule: str = schedule) -> str:
                if each.case.num_stages > num_cores:
                    return "–"
                return stats.text(each.rounds.summary(_ideal(f"{transport} {schedule}", each.case.num_microbatches)))

            rpc, threads, torch = (f"{name} {schedule}" for name in ("rpc", "threads", "torch"))
            cells = [ideal("rpc"), ratio(rpc, torch), *(ratio(rpc, name) for name in UNSPLIT), ratio(rpc, threads)]
            cells += [ideal("threads"), ratio(threads, torch), *(ratio(threads, name) for name in UNSPLIT)]
            rows.append([_name(each.case), schedule, *cells])
    return "Ratios of step times, within a round\n\n" + table(head, rows)


def _name(case: Case, separator: str = ", ") -> str:
    return separator.join((case.model, str(case.num_stages), str(case.num_microbatches)))


def _seconds(name: str) -> Callable[[Mapping[str, Lap]], float | None]:
    return lambda laps: stats.step_seconds(laps[name].ends) if name in laps else None


def _ratio(over: str, under: str) -> Callable[[Mapping[str, Lap]], float | None]:
    def ratio(laps: Mapping[str, Lap]) -> float | None:
        if under not in laps:
            return None
        return stats.step_seconds(laps[over].ends) / stats.step_seconds(laps[under].ends)

    return ratio


def _ideal(name: str, num_microbatches: int) -> Callable[[Mapping[str, Lap]], float | None]:
    def share(laps: Mapping[str, Lap]) -> float | None:
        ideal = stats.ideal_seconds(laps[name].timelines, num_microbatches)
        return None if ideal is None else ideal / stats.step_seconds(laps[name].ends)

    return share
