"""`modelpar train`: config → plan → pipeline → loop → result."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from threading import current_thread, main_thread
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from modelpar.config import choice
from modelpar.data.prefetch import prefetch
from modelpar.errors import ModelparError, PlanError, written
from modelpar.planning.explain import Explanation
from modelpar.planning.plan import Plan
from modelpar.planning.simulate import predict
from modelpar.record import HeldOut, Record
from modelpar.report.progress import TrainingProgress
from modelpar.report.tensorboard.writer import RunWriter
from modelpar.report.text import TrainingSummary, partition_table, prediction_notes, training_summary
from modelpar.run.pipeline import Pipeline
from modelpar.rundir import RunDir
from modelpar.screen import screen
from modelpar.task import Task, model_name, run_name, task_of

_FIRST_TRACED = 4
"""The first step by which a training has settled: a run that is stopped soon has something to show."""
_STOPPING = b"modelpar: stopping after the step under way; once more ends it at once\n"


def train(config: DictConfig, console: Console) -> RunDir:
    """Trains what a configuration says, and returns the folder with everything that came of it.

    The first Ctrl-C ends the training after the step under way, as if it had been the last one, and raises
    KeyboardInterrupt when everything is saved; a second one ends it at once. Whatever fails, the steps that were
    finished are in the event file and in result.json.
    """
    task = task_of(config)
    with ExitStack() as exits:
        doing = exits.enter_context(screen(console, config.verbose))
        folder = RunDir.when_needed(config.output.folder, config.output.name, run_name(config), exits)
        num_ranks = max(1, config.pipeline.num_ranks)  # planning refuses fewer, and says why
        workers = task.workers(num_ranks, lambda: folder().ranks, doing)
        start = cache(lambda: exits.enter_context(workers))
        plan = task.plan(workers=start, doing=doing)
        pipeline = task.pipeline(plan, workers)
        run = folder()
        record, status = Record(plan), "failed"
        console.print(task.data.description, highlight=False, markup=False)
        console.print(partition_table(plan))
        for note in prediction_notes(plan):
            console.print(note, style="yellow", highlight=False)
        if plan.whole:
            console.print(f"pieces = whole: {plan.whole}", highlight=False)
        start()
        doing("handing out the stages")
        exits.enter_context(pipeline)
        with written(run.path):
            OmegaConf.save(config, run.config)
            plan.save(run.plan)
        writer = exits.enter_context(RunWriter(run.path, plan, schedule=choice(config, "schedule")))
        doing.stop()
        progress = TrainingProgress(console, config.training.steps, quiet=config.verbose == 0)
        try:
            with _stop_between_steps() as stop, progress:
                _loop(task, plan, pipeline, writer, run, record, progress, stop)
            status = "interrupted" if stop else "done"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            run.write_result(record.to_json(status, task.data.baseline))
            if record.results:
                every = config.training.trace_every
                if every and not _is_traced(record.results[-1].step, every):
                    _trace(writer, record)
                writer.hparams(_hparams(config, plan), record.metrics())
    _say_summary(console, run, task, record)
    if status == "interrupted":
        raise KeyboardInterrupt
    return run


def _loop(
    task: Task,
    plan: Plan,
    pipeline: Pipeline,
    writer: RunWriter,
    run: RunDir,
    record: Record,
    progress: TrainingProgress,
    stop: list[int],
) -> None:
    """Trains in stretches from one held-out loss to the next; saves the weights at the end of each."""
    training = task.config.training
    expected = predict(plan)
    try:
        with prefetch(task.data.batches(training.batch_size, training.seed)) as batches:
            while len(record.results) < training.steps and not stop:
                done = len(record.results)
                stretch = min(training.eval_every or training.steps, training.steps - done)
                coming = itertools.takewhile(lambda _: not stop, itertools.islice(batches, stretch))
                last = time.perf_counter()
                for result in pipeline.steps(coming):
                    now = time.perf_counter()
                    if pipeline.check and not record.results:
                        progress.say(f"{pipeline.check.what}: {pipeline.check.detail}")
                    seconds, last = now - last, now
                    record.results.append(result)
                    record.step_seconds.append(seconds)
                    samples = int(result.count)
                    writer.step(result, seconds, samples)
                    progress.step(result.step, result.loss, seconds, samples, result.timeline.bubble)
                    if training.trace_every and (result.step + 1) % training.trace_every == 0:
                        writer.timeline(result.step, result.timeline, expected)
                    if _is_traced(result.step, training.trace_every):
                        _trace(writer, record)
                heldout = task.data.heldout(training.batch_size, training.eval_samples)
                for first in itertools.islice(heldout, 1):  # with data.heldout=0 there is none
                    found = pipeline.evaluate(itertools.chain([first], heldout))
                    record.heldout.append(HeldOut(len(record.results), found.loss, found.metrics))
                    writer.heldout(len(record.results) - 1, found.loss, found.metrics)
                    progress.heldout(found.loss, found.metrics)
                run.write_weights(pipeline.state_dict(), plan.graph.tied)
    except (Exception, SystemExit):  # the latter where nobody reads what is printed any more
        _keep_weights(pipeline, run, plan)
        raise


def _is_traced(step: int, trace_every: int) -> bool:
    """Returns whether a step is traced as soon as it is done; the last one of a training is in any case."""
    return trace_every > 0 and (step == _FIRST_TRACED or (step + 1) % trace_every == 0)


def _trace(writer: RunWriter, record: Record) -> None:
    """Keeps the timeline of the last step."""
    last = record.results[-1]
    writer.trace(last.step, last.timeline, last.peak_bytes)
    record.traced.append(last.timeline)


def _keep_weights(pipeline: Pipeline, run: RunDir, plan: Plan) -> None:
    """Saves the weights of the last finished step, where the workers still have them."""
    try:
        run.write_weights(pipeline.state_dict(), plan.graph.tied)
    except ModelparError:  # they are gone; the weights saved last stay
        return


@contextmanager
def _stop_between_steps() -> Iterator[list[int]]:
    """Turns the first Ctrl-C or SIGTERM into an entry in the list yielded; a second one acts as usual.

    What is ignored stays so: a shell starts background jobs that ignore Ctrl-C.
    """
    asked: list[int] = []
    if current_thread() is not main_thread():
        yield asked
        return

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, before[number])
        os.write(2, _STOPPING)  # print could be interrupted while it prints

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _hparams(config: DictConfig, plan: Plan) -> dict[str, Any]:
    return {
        "model": model_name(config),
        "schedule": choice(config, "schedule"),
        "partition": plan.partition.method,
        "balance": "-".join(map(str, plan.partition.balance)),
        "transport": config.transport.kind,
        "num_ranks": plan.num_ranks,
        "num_microbatches": plan.num_microbatches,
        "num_threads": plan.num_threads,
        "optimizer": choice(config, "optimizer"),
        "lr": config.optimizer.lr,
        "batch_size": config.training.batch_size,
    }


def _explained(record: Record) -> Explanation | str:
    """Returns where the time went, or why nobody can tell."""
    try:
        return record.explain()
    except PlanError as error:
        return str(error)


def _say_summary(console: Console, run: RunDir, task: Task, record: Record) -> None:
    if not record.results:
        return
    prediction = record.plan.prediction
    summary = TrainingSummary(
        first_loss=record.results[0].loss,
        last_loss=record.results[-1].loss,
        step_seconds=record.measured_step_seconds,
        utilization=record.utilization(),
        view_command=run.view_command(),
        heldout_loss=record.heldout[-1].loss if record.heldout else None,
        heldout_metrics=record.heldout[-1].metrics if record.heldout else {},
        baseline=task.data.baseline,
        predicted_step_seconds=prediction.step_seconds if prediction else None,
        explanation=_explained(record),
    )
    console.print(training_summary(summary), soft_wrap=True)
