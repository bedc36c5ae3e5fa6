"""`modelpar profile`: what each layer costs, measured by all ranks at once; prints a table and writes profile.json."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from modelpar.errors import ConfigError
from modelpar.planning.profile import Profile
from modelpar.report.text import profile_summary, profile_table
from modelpar.screen import screen
from modelpar.task import task_of


def profile(config: DictConfig, console: Console) -> Profile:
    """Measures, prints and writes a profile. It measures anew what this machine has measured before.

    Raises ConfigError where the file cannot be written, before anything is measured.
    """
    task, path = task_of(config), Path(config.file)
    if path.suffix != ".json" or not path.resolve().parent.is_dir():
        raise ConfigError(f"file is {config.file!r}; expected a name that ends in .json, in a folder that exists")
    wanted = config.pipeline.profile
    with ExitStack() as exits:
        doing = exits.enter_context(screen(console, config.verbose))
        num_ranks = max(1, config.pipeline.num_ranks)  # planning refuses fewer, and says why
        workers = task.workers(num_ranks, doing=doing)
        plan = task.plan("anew" if wanted == "measured" else wanted, partial(exits.enter_context, workers), doing)
    try:
        plan.profile.save(path)
    except OSError as error:
        raise ConfigError(f"the profile {path} cannot be written: {error.strerror}") from error
    console.print(profile_table(plan.profile))
    console.print(profile_summary(plan, str(path)), highlight=False, soft_wrap=True)
    return plan.profile
