"""`modelpar report`: runs as one HTML file, or the last traced step of a run in Chrome's trace format."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from modelpar.errors import ConfigError, ModelparError
from modelpar.planning.balance import imbalance
from modelpar.planning.plan import Plan
from modelpar.planning.steadiness import StepTime
from modelpar.report.chrome import write_trace
from modelpar.report.html import html_report
from modelpar.report.runs import GONE, Run
from modelpar.report.tensorboard.reader import Reader, provider_of
from modelpar.report.tensorboard.view import run_folders
from modelpar.report.text import partition_table
from modelpar.report.trace import decode
from modelpar.report.view_trace import chrome_json
from modelpar.rundir import RunDir

_WIDTH = 100
_KINDS = (".html", ".json", ".json.gz")


def report(paths: Sequence[str], output: str) -> Path:
    """Writes what `output` says by its ending, of runs or folders of runs; returns the file.

    Raises ConfigError where no run has traces, where the ending is another one, a Chrome trace of several runs is asked
    for, or the file cannot be written.
    """
    path = Path(output)
    if not path.name.endswith(_KINDS) or not path.resolve().parent.is_dir():
        raise ConfigError(
            f"the output is {output!r}; expected a name that ends in {', '.join(_KINDS)}, in a folder that exists"
        )
    provider, folders = provider_of(run_folders(paths))
    reader = Reader(provider)
    runs, notes = reader.runs()
    with_traces = [run for run in runs if run.blobs]
    if not with_traces:
        problem = next((run.problem for run in runs if run.problem), None)
        found = notes[0] if notes else GONE
        raise ConfigError(f"{', '.join(paths)} {problem or f'holds no traces: {found}'}")
    try:
        if path.name.endswith(".html"):
            texts = {run.name: _texts(run, RunDir(Path(folders[run.name]))) for run in with_traces}
            steps = {run.name: _steps(run, reader) for run in with_traces}
            path.write_text(html_report(runs, notes, texts, steps), encoding="utf-8")
        else:
            _write_chrome(with_traces, path)
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}") from error
    return path


def _steps(run: Run, reader: Reader) -> list[StepTime]:
    """Returns the settled steps of a run; none where its traces cannot be read, as then its row says."""
    try:
        return reader.step_times(run.name, decode(run.blobs[-1]).plan)
    except ModelparError:
        return []


def _texts(run: Run, folder: RunDir) -> list[tuple[str, str]]:
    """Returns a run's plan and options as (title, text), as far as they can be read."""
    try:
        plan = decode(run.blobs[-1]).plan
    except ModelparError as error:
        return [("plan", str(error))]
    texts = [("partition", _plan_text(plan)), ("order of actions", "\n".join(plan.schedule.lines()))]
    if folder.config.is_file():
        texts.append(("options", folder.config.read_text(encoding="utf-8")))
    return texts


def _plan_text(plan: Plan) -> str:
    console = Console(file=io.StringIO(), width=_WIDTH)
    with console.capture() as captured:
        console.print(partition_table(plan))
        if sentence := imbalance(plan):
            console.print(sentence, highlight=False, markup=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _write_chrome(runs: Sequence[Run], path: Path) -> None:
    if len(runs) > 1:
        raise ConfigError(
            f"a Chrome trace is of one run, and these are {len(runs)}: {runs[0].name}, {runs[1].name}"
            f"{', …' if len(runs) > 2 else ''}; expected one run, or an output that ends in .html"
        )
    write_trace(chrome_json(decode(runs[0].blobs[-1])), path)
