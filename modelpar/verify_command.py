"""`modelpar verify`: trains a model split and unsplit, compares every number, prints and writes what it found."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from modelpar.errors import ConfigError
from modelpar.planning.verdict import Verdict
from modelpar.proof import verify
from modelpar.report.text import partition_table
from modelpar.report.verdict import verdict_line, verdict_notes, verdict_table
from modelpar.rundir import RunDir
from modelpar.screen import screen
from modelpar.task import run_name, task_of


def verify_command(config: DictConfig, console: Console) -> Verdict:
    """Plans, compares, prints, and writes verify.json into a folder of its own, beside config.yaml and plan.json.

    Raises ConfigError for what cannot be verified, before any process starts.
    """
    if config.steps < 1:
        raise ConfigError(f"steps is {config.steps}; expected at least 1")
    task = task_of(config)
    with ExitStack() as exits:
        doing = exits.enter_context(screen(console, config.verbose))
        folder = RunDir.when_needed(config.output.folder, config.output.name, f"{run_name(config)}-verify", exits)
        num_ranks = max(1, config.pipeline.num_ranks)  # planning refuses fewer, and says why
        workers = task.workers(num_ranks, lambda: folder().ranks, doing)
        start = cache(lambda: exits.enter_context(workers))
        plan = task.plan(workers=start, doing=doing)
        task.pipeline(plan)  # refuses what cannot train
        run = folder()
        console.print(partition_table(plan))
        start()
        OmegaConf.save(config, run.config)
        plan.save(run.plan)
        verdict = verify(
            task.objective,
            task.example,
            plan,
            optimizer=task.optimizer,
            workers=workers,
            max_norm=config.training.max_norm,
            seed=config.training.seed,
            steps=config.steps,
            doing=doing,
        )
    run.write_verdict(verdict.to_json())
    console.print(verdict_table(verdict))
    for note in verdict_notes(verdict):
        console.print(note)
    console.print(str(run.verdict), highlight=False, markup=False, soft_wrap=True)
    console.print(verdict_line(verdict))
    return verdict
