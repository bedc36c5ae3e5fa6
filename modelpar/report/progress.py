"""How a training goes, while it goes: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from modelpar.report.units import ms, percent

_LINES = 10
"""How many lines a training prints where there is no terminal."""


class TrainingProgress:
    """Shows step, loss, step time, samples per second and bubble. A context manager."""

    def __init__(self, console: Console, num_steps: int):
        self._console, self._num_steps = console, num_steps
        self._every = max(1, num_steps // _LINES)
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=None),  # what the numbers leave
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            expand=True,
            console=console,
            disable=not console.is_terminal,
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
        if not self._console.is_terminal and ((step + 1) % self._every == 0 or step == 0):
            self._console.print(f"step {step + 1}/{self._num_steps}  {numbers}", highlight=False)

    def heldout(self, loss: float) -> None:
        """Shows a loss on held-out data."""
        self._console.print(f"held-out loss {loss:.4f}", highlight=False)
