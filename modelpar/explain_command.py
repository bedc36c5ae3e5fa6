"""`modelpar explain`: where the time of a run went, and the one change that helps most."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from modelpar.errors import ConfigError, ModelparError
from modelpar.planning.explain import Explanation, explain
from modelpar.report.explanation import explanation_text
from modelpar.report.runs import GONE, Run
from modelpar.report.tensorboard.reader import Reader, provider_of
from modelpar.report.tensorboard.view import run_folders
from modelpar.report.trace import decode


def explain_runs(paths: Sequence[str], console: Console) -> None:
    """Explains runs, or all runs in folders, from their event files; they may still go on, or have been killed.

    What cannot be explained gets a line. Raises ConfigError where a path holds no event file, or nothing can be.
    """
    provider, _ = provider_of(run_folders(paths))
    reader = Reader(provider)
    runs, notes = reader.runs()
    problems: list[str] = []
    for run in runs:
        try:
            found = _explain(run, reader)
        except ModelparError as error:
            problems.append(f"{run.name}: {error}")
            continue
        console.print(Text(run.name, style="dim"), soft_wrap=True)
        console.print(explanation_text(found))
        console.print()
    if len(problems) == len(runs):
        raise ConfigError("; ".join([*problems, *notes]))
    for note in (*problems, *notes):
        console.print(note, style="yellow", highlight=False, markup=False)


def _explain(run: Run, reader: Reader) -> Explanation:
    if run.problem or not run.blobs:
        raise ConfigError(run.problem or GONE)
    traces = [decode(blob) for blob in run.blobs]
    plan = traces[-1].plan
    return explain(plan, [trace.timeline for trace in traces], reader.step_times(run.name, plan))
