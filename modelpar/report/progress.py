"""What goes on, while it goes on: a line or a bar in a terminal; of a training a line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from modelpar.report.units import ms, percent

_LINES = 10
"""How many lines a training prints where there is no terminal."""


class Activity:
    """Shows in a terminal what goes on, how much of it is done and how long it will take; elsewhere nothing.

    A context manager, and a `Doing`: what it is told is one line, which goes when the block is left or `stop` called.
    """

    def __init__(self, console: Console, *, shown: bool = True):
        columns = SpinnerColumn(), TextColumn("{task.description}"), _Part(), TimeElapsedColumn(), _Left()
        hidden = not (shown and console.is_terminal)
        self._line = Progress(*columns, console=console, transient=True, disable=hidden)
        self._lock = Lock()
        self._stopped = hidden

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __call__(self, what: str, done: float = 0, total: float | None = None) -> None:
        """Shows what begins or goes on; see `Doing`."""
        with self._lock:
            if self._stopped:
                return
            self._line.start()
            for task in self._line.tasks:
                if _goes_on(task, what, done, total):
                    self._line.update(task.id, description=what, completed=done, total=total, refresh=True)
                    return
                self._line.remove_task(task.id)
            self._line.add_task(what, completed=done, total=total)
            self._line.refresh()

    def stop(self) -> None:
        """Removes the line; nothing is shown any more."""
        with self._lock:
            self._stopped = True
            self._line.stop()


def _goes_on(task: Task, what: str, done: float, total: float | None) -> bool:
    """Tells whether it is the work of before: of the same name, or the next of as many things."""
    return task.description == what or (total is not None and task.total == total and task.completed <= done)


class _Part(ProgressColumn):
    """How many of how many, where things are counted."""

    def render(self, task: Task) -> Text:
        """Returns the text, empty for seconds."""
        counted = isinstance(task.total, int) and task.total > 1
        return Text(f"{task.completed} of {task.total}" if counted else "")


class _Left(ProgressColumn):
    """How long it will take, where that is known."""

    def render(self, task: Task) -> Text:
        """Returns the text; seconds that are told go by as clocks do."""
        left = task.remaining if isinstance(task.total, float) else task.time_remaining
        return Text("" if not left or task.finished else f"about {max(1, round(left))} s left")


class TrainingProgress:
    """Shows step, loss, step time, samples per second and bubble. A context manager.

    With `quiet` it shows nothing.
    """

    def __init__(self, console: Console, num_steps: int, *, quiet: bool = False):
        self._console, self._num_steps, self._quiet = console, num_steps, quiet
        self._every = max(1, num_steps // _LINES)
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=None),  # what the numbers leave
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            expand=True,
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=num_steps, numbers="starting")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, step: int, loss: float, step_seconds: float, samples: int, bubble: float) -> None:
        """Shows one finished step; steps count from 0."""
        rate = samples / step_seconds
        numbers = f"loss {loss:.4f}  {ms(step_seconds)}/step  {rate:.1f} samples/s  bubble {percent(bubble)}"
        self._bar.update(self._task, completed=step + 1, numbers=numbers)
        if not (self._quiet or self._console.is_terminal) and ((step + 1) % self._every == 0 or step == 0):
            self._console.print(f"step {step + 1}/{self._num_steps}  {numbers}", highlight=False)

    def say(self, line: str) -> None:
        """Shows a line about the training."""
        if not self._quiet:
            self._console.print(line, highlight=False, markup=False)

    def heldout(self, loss: float, metrics: Mapping[str, float] | None = None) -> None:
        """Shows a loss on held-out data, and the loss function's own metrics."""
        if not self._quiet:
            more = "".join(f"  {name} {value:.4f}" for name, value in (metrics or {}).items())
            self._console.print(f"held-out loss {loss:.4f}{more}", highlight=False, markup=False)
