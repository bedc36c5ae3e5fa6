"""`modelpar compare`: many ways to split and schedule one model, predicted and measured side by side."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean, median

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from modelpar import config as configs
from modelpar.errors import ConfigError, PlanError, RunError, written
from modelpar.planning.doing import Doing
from modelpar.planning.explain import MOST_TIMELINES, explain, whole_steps
from modelpar.planning.memory import stage_memory_bytes
from modelpar.planning.partitioners import stage_seconds
from modelpar.planning.plan import Plan
from modelpar.planning.profile import Profile
from modelpar.planning.result import StepResult
from modelpar.planning.simulate import predict
from modelpar.report.comparison import Row, best_first, comparison_table, write
from modelpar.report.explanation import headline
from modelpar.report.strips import Strip
from modelpar.report.strips_image import comparison_image
from modelpar.report.strips_text import draw_comparison
from modelpar.report.tensorboard.writer import RunWriter
from modelpar.report.text import prediction_notes
from modelpar.run.workers import Workers
from modelpar.rundir import RunDir
from modelpar.screen import screen
from modelpar.task import Task, task_of


@dataclass
class _Candidate:
    """One combination."""

    name: str
    config: DictConfig
    task: Task
    plan: Plan
    results: list[StepResult] = field(default_factory=list)
    run: Path | None = None


def compare(overrides: Sequence[str], console: Console) -> list[Row]:
    """Predicts every combination of the values given, runs the best, and shows them in a table and a picture.

    Both are also written to a new folder.

    All combinations run on one set of workers. Each round runs every one of them for a few steps, so that a machine
    that slows down or speeds up meanwhile does so for all; a combination's time is the median over all its steps.
    Combinations that come to the same plan are run once, and share their numbers.
    """
    lists = configs.parse_lists(overrides)
    combinations = list(dict.fromkeys(itertools.product(*lists)))
    loaded = [configs.load("compare", combination) for combination in combinations]
    _check_same(loaded)
    tasks = _tasks_of(loaded)
    first = loaded[0]
    with ExitStack() as exits:
        doing = exits.enter_context(screen(console, first.verbose))
        folder = RunDir.when_needed(first.output.folder, first.output.name, "compare", exits)
        num_ranks = max(1, *(config.pipeline.num_ranks for config in loaded))
        workers = tasks[0].workers(num_ranks, lambda: folder().ranks, doing)
        start = cache(lambda: exits.enter_context(workers))
        candidates = _plan_all(tasks, [_name(combination, lists) for combination in combinations], start, doing)
        by_prediction = sorted(candidates, key=lambda candidate: candidate.plan.prediction.step_seconds)
        measured = by_prediction[: first.measure] if first.measure is not None else by_prediction
        for candidate in measured:
            candidate.task.pipeline(candidate.plan)  # finds out what cannot train, before anything is made
        run = folder()
        ended = _measure(measured, start(), doing) if measured else None
        if ended and not any(candidate.results for candidate in candidates):
            raise ended
        doing.stop()
        _show(candidates, console)  # before anything is written, which may fail
        for candidate in candidates:
            candidate.run = _write_run(candidate, run.path)
        rows = best_first([_row(candidate) for candidate in candidates])
        with written(run.path):
            write(rows, run.path)
            comparison_image(_strips(candidates)).save(run.path / "comparison.png")
    for note in dict.fromkeys(note for candidate in candidates for note in prediction_notes(candidate.plan)):
        console.print(note, style="yellow", highlight=False)
    console.print(run.view_command(), style="bold", soft_wrap=True, highlight=False, markup=False)
    if ended:
        raise ended
    return rows


def _show(candidates: list[_Candidate], console: Console) -> None:
    """Prints the table, the picture, and what there is to say of the best."""
    best, *_ = rows = best_first([_row(candidate) for candidate in candidates])
    console.print(comparison_table(rows))
    if drawn := draw_comparison(_strips(candidates), console.width):
        console.print()
        console.print(drawn)
    console.print(_verdict(next(each for each in candidates if each.name == best.name)), highlight=False)


def _check_same(loaded: list[DictConfig]) -> None:
    first = loaded[0]
    if first.measure is not None and (type(first.measure) is not int or first.measure < 0):
        raise ConfigError(
            f"measure is {first.measure}; expected how many combinations to run, 0 or more, or null for all"
        )
    for name in ("rounds", "steps"):
        if first.comparison[name] < 1:
            raise ConfigError(f"comparison.{name} is {first.comparison[name]}; expected at least 1")
    for key in ("measure", "comparison", "transport", "output", "verbose"):
        if any(config[key] != first[key] for config in loaded):
            raise ConfigError(f"{key} has several values; all combinations share one")


_OF_TASK = ["model", "data", "training", "optimizer", "lr_schedule"]
"""The parts of a configuration that `task_of` reads."""


def _tasks_of(loaded: list[DictConfig]) -> list[Task]:
    """Returns the task of each configuration; those that differ only in how to split share model and data."""
    known: dict[str, Task] = {}
    tasks = []
    for config in loaded:
        what = _what(config)
        if what not in known:
            known[what] = task_of(config)
        tasks.append(replace(known[what], config=config))
    return tasks


def _plan_all(tasks: list[Task], names: list[str], start: Callable[[], Workers], doing: Doing) -> list[_Candidate]:
    """Plans every combination; those of the same model, micro-batches and threads share one profile."""
    profiles: dict[tuple[object, ...], Profile] = {}
    candidates = []
    for task, name in zip(tasks, names, strict=True):
        pipeline = task.config.pipeline
        ranks = (pipeline.num_ranks, str(pipeline.devices), pipeline.num_threads)
        key = (_what(task.config), pipeline.profile, pipeline.num_microbatches, *ranks)
        plan = task.plan(profiles.get(key), start, partial(_doing_for, name, doing))
        profiles[key] = plan.profile
        candidates.append(_Candidate(name, task.config, task, plan))
    return candidates


def _doing_for(name: str, doing: Doing, what: str, done: float = 0, total: float | None = None) -> None:
    """Tells what is done for one of the combinations."""
    doing(f"{name}: {what}", done, total)


def _what(config: DictConfig) -> str:
    """Returns what is trained, as text."""
    return OmegaConf.to_yaml(OmegaConf.masked_copy(config, _OF_TASK))


def _measure(candidates: list[_Candidate], workers: Workers, doing: Doing) -> BaseException | None:
    """Runs all different plans in turn, round after round, on running workers.

    Returns what ended it early, a failure or Ctrl-C; what has been measured by then is kept.
    """
    comparison = candidates[0].config.comparison
    turns = list(itertools.product(range(comparison.rounds), _equal(candidates)))
    for number, (_, equals) in enumerate(turns):
        doing(f"measuring {equals[0].name}", number, len(turns))
        task, plan = equals[0].task, equals[0].plan
        try:
            with task.pipeline(plan, workers) as pipeline:
                training = task.config.training
                batches = task.data.batches(training.batch_size, training.seed)
                results = list(pipeline.steps(itertools.islice(batches, 1 + comparison.steps)))
        except RunError as error:
            return RunError(f"{equals[0].name}: {error}")
        except KeyboardInterrupt as error:
            return error
        for candidate in equals:
            candidate.results += results[1:]
    return None


def _equal(candidates: list[_Candidate]) -> list[list[_Candidate]]:
    """Returns the candidates in groups that come to the same plan."""
    same: dict[str, list[_Candidate]] = {}
    for candidate in candidates:
        same.setdefault(_runs_as(candidate), []).append(candidate)
    return list(same.values())


def _runs_as(candidate: _Candidate) -> str:
    """Returns what a candidate's run depends on, as text."""
    plan = candidate.plan
    placed = [plan.partition.bounds, plan.schedule.lines(), plan.cluster.devices, plan.num_threads, plan.tied]
    return _what(candidate.config) + repr(placed)


def _row(candidate: _Candidate) -> Row:
    plan, results = candidate.plan, candidate.results
    assert plan.prediction
    config, homes = candidate.config, plan.schedule.stage_to_rank
    return Row(
        name=candidate.name,
        partition=plan.partition.method,
        schedule=configs.choice(config, "schedule"),
        num_ranks=plan.num_ranks,
        num_microbatches=plan.num_microbatches,
        balance=plan.partition.balance,
        bottleneck_seconds=max(
            stage_seconds(plan.graph, plan.profile, plan.cluster, plan.partition, stage_to_rank=homes)
        ),
        predicted_step_seconds=plan.prediction.step_seconds,
        bubble=fmean(result.timeline.bubble for result in results) if results else plan.prediction.bubble,
        measured_step_seconds=median(result.timeline.makespan for result in results) if results else None,
        peak_bytes=max(max(result.peak_bytes) for result in results) if results else max(stage_memory_bytes(plan)),
        run=str(candidate.run),
    )


def _strips(candidates: list[_Candidate]) -> list[Strip]:
    """Returns each plan once, with the measured step whose time is next to the median, or with the predicted step."""
    strips = []
    for equals in _equal(candidates):
        rows = tuple(best_first([_row(candidate) for candidate in equals]))
        steps = [result.timeline for candidate in equals for result in candidate.results]
        middle = rows[0].measured_step_seconds or 0.0
        step = min(steps, key=lambda timeline: abs(timeline.makespan - middle), default=None)
        strips.append(Strip(rows, step or predict(equals[0].plan)))
    return strips


def _verdict(best: _Candidate) -> str:
    """Returns where the best combination's time goes, and what would help it most, or why nobody can tell."""
    timelines = [best.results[number].timeline for number in _traced(best)] or [predict(best.plan)]
    try:
        return f"{best.name}: {headline(explain(best.plan, timelines))}"
    except PlanError as error:
        return f"{best.name}: {error}"


def _write_run(candidate: _Candidate, folder: Path) -> Path:
    """Writes a TensorBoard run of one candidate: its plan, its steps, its row on the hparams page."""
    run = RunDir.create(folder, candidate.name.replace(" ", "_").replace("/", "-"), "")
    with written(run.path):
        OmegaConf.save(candidate.config, run.config)
        candidate.plan.save(run.plan)
    row = _row(candidate)
    with RunWriter(run.path, candidate.plan, schedule=row.schedule) as writer:
        for number, result in enumerate(candidate.results):
            writer.step(replace(result, step=number), result.timeline.makespan, int(result.count))
        expected = predict(candidate.plan)
        if candidate.results:
            for number in _traced(candidate):
                writer.trace(number, candidate.results[number].timeline, candidate.results[number].peak_bytes)
        else:
            writer.trace(0, expected, measured=False)
        writer.timeline(0, candidate.results[-1].timeline if candidate.results else expected, expected)
        values = {"partition": row.partition, "schedule": row.schedule, "balance": "-".join(map(str, row.balance))}
        numbers = {"num_ranks": row.num_ranks, "num_microbatches": row.num_microbatches}
        metrics = {"predicted_step_seconds": row.predicted_step_seconds, "bubble": row.bubble}
        if row.measured_step_seconds is not None:
            metrics["step_seconds"] = row.measured_step_seconds
        writer.hparams(values | numbers, metrics)
    return run.path


def _traced(candidate: _Candidate) -> list[int]:
    """Returns the positions of the steps that a candidate's run keeps: the last whole ones, where there are any."""
    timelines = [result.timeline for result in candidate.results]
    whole = set(map(id, whole_steps(candidate.plan, timelines) or timelines))
    return [i for i, timeline in enumerate(timelines) if id(timeline) in whole][-MOST_TIMELINES:]


def _name(combination: Sequence[str], lists: list[list[str]]) -> str:
    """Returns what tells a combination from the others, such as "optimal 1f1b num_ranks=4"."""
    words = []
    for part in (override for override, choices in zip(combination, lists, strict=True) if len(choices) > 1):
        key, _, value = part.partition("=")
        words.append(value if key in configs.GROUPS else f"{key.split('.')[-1]}={value}")
    return " ".join(words) or "the only one"
