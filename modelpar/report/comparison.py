"""One table of several ways to split and schedule the same model, best first, for the terminal and for files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from modelpar.report.units import error, megabytes, ms, percent

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Row:
    """One combination of a partition and a schedule, predicted and, where it was run, measured."""

    name: str
    """What a person calls it, such as "optimal 1f1b"."""
    partition: str
    schedule: str
    num_ranks: int
    num_microbatches: int
    balance: tuple[int, ...]
    """Layers per stage."""
    bottleneck_seconds: float
    """Predicted seconds of the slowest stage for one micro-batch, forward and backward."""
    predicted_step_seconds: float
    bubble: float
    """Share of 1: of the measured steps where there are any, else predicted."""
    measured_step_seconds: float | None = None
    peak_bytes: int | None = None
    """Peak memory of the fullest rank: measured where there are measured steps, else predicted."""
    run: str | None = None
    """The folder of its TensorBoard run."""

    @property
    def error(self) -> float | None:
        """The prediction's relative error, predicted / measured − 1; None where nothing was measured."""
        if not self.measured_step_seconds:
            return None
        return self.predicted_step_seconds / self.measured_step_seconds - 1.0

    def to_json(self) -> dict[str, Any]:
        """Returns plain data for json, with `error` among it."""
        return {**asdict(self), "balance": list(self.balance), "error": self.error}


def best_first(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows by measured step time, then those without one by predicted step time.

    Measured and predicted times are not mixed: a prediction that is 10 % too low everywhere would put every combination
    that was not run above those that were.
    """
    return sorted(
        rows,
        key=lambda row: (
            row.measured_step_seconds is None,
            row.predicted_step_seconds if row.measured_step_seconds is None else row.measured_step_seconds,
        ),
    )


def comparison_table(rows: Sequence[Row]) -> Table:
    """Returns the rows, best first, as a table for the terminal; the best row is bold."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    extra = telling(rows)
    for heading in (*extra, *_HEADINGS):
        left = heading in _LEFT  # only words may break where the terminal is narrow, never numbers
        justify: Literal["left", "right"] = "left" if left else "right"
        table.add_column(heading.replace(" ", "\n"), justify=justify, no_wrap=not left, overflow="fold")
    for place, row in enumerate(best_first(rows)):
        table.add_row(
            *map(Text, (say(row) for say in extra.values())),
            *map(Text, _cells(row)),
            style="bold" if place == 0 else "",
        )
    return table


def comparison_markdown(rows: Sequence[Row]) -> str:
    """Returns the rows, best first, as a Markdown table."""
    extra = telling(rows)
    headings = [*extra, *_HEADINGS]
    lines = [[heading.replace("- ", "-") for heading in headings]]
    lines += [[":--" if heading in _LEFT else "--:" for heading in headings]]
    cells = [[*(say(row) for say in extra.values()), *_cells(row)] for row in best_first(rows)]
    lines += [[cell.replace("|", "\\|") for cell in line] for line in cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(rows: Sequence[Row], folder: str | Path) -> None:
    """Writes comparison.csv, comparison.json and comparison.md, best first, into a folder, which is made if needed.

    The csv and the json hold full precision in seconds, bytes and shares of 1; what was not measured is empty or null.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = [row.to_json() for row in best_first(rows)]
    text = json.dumps({"schema_version": SCHEMA_VERSION, "rows": data}, indent=1)
    (folder / "comparison.json").write_text(text + "\n", encoding="utf-8")
    with open(folder / "comparison.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _FIELDS)
        writer.writeheader()
        writer.writerows({**entry, "balance": "-".join(map(str, entry["balance"]))} for entry in data)
    (folder / "comparison.md").write_text(comparison_markdown(rows), encoding="utf-8")


_FIELDS = (
    "name",
    "partition",
    "schedule",
    "num_ranks",
    "num_microbatches",
    "balance",
    "bottleneck_seconds",
    "predicted_step_seconds",
    "measured_step_seconds",
    "error",
    "bubble",
    "peak_bytes",
    "run",
)
_HEADINGS = (
    "partition",
    "schedule",
    "balance",
    "slowest stage",
    "predicted step",
    "measured step",
    "error",
    "bubble",
    "peak memory",
)
_LEFT = ("name", "partition", "schedule", "balance")


def telling(rows: Sequence[Row]) -> dict[str, Callable[[Row], str]]:
    """Returns the columns without which nobody could tell what a row is, and what they say."""
    columns: dict[str, Callable[[Row], str]] = {}
    if len({row.num_microbatches for row in rows}) > 1:
        columns["micro- batches"] = lambda row: str(row.num_microbatches)
    told = [
        (row.partition, row.schedule, row.num_ranks, row.num_microbatches, row.partition == "manual" and row.balance)
        for row in rows
    ]
    if len(set(told)) < len(told):
        columns["name"] = lambda row: row.name
    return columns


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.partition,
        row.schedule,
        "-".join(map(str, row.balance)),
        ms(row.bottleneck_seconds),
        ms(row.predicted_step_seconds),
        "–" if row.measured_step_seconds is None else ms(row.measured_step_seconds),
        "–" if row.error is None else error(row.error),
        percent(row.bubble),
        "–" if row.peak_bytes is None else megabytes(row.peak_bytes),
    )
