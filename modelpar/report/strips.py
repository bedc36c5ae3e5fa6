"""Plans side by side, as the pictures of a comparison show them: Strip, and what is said of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modelpar.planning.timeline import Timeline
from modelpar.report.comparison import Row, best_first, telling
from modelpar.report.units import error, ms


@dataclass(frozen=True)
class Strip:
    """One plan: the rows that come to it, of which there may be several, and one step of it."""

    rows: tuple[Row, ...]
    timeline: Timeline
    """A measured step where there is one, else the predicted one."""

    @property
    def row(self) -> Row:
        """The row with the plan's numbers: a measured one where there is one."""
        return best_first(self.rows)[0]

    @property
    def measured(self) -> bool:
        """Whether the plan was run."""
        return self.row.measured_step_seconds is not None

    @property
    def step_seconds(self) -> float:
        """The measured step time, else the predicted one."""
        seconds = self.row.measured_step_seconds
        return self.row.predicted_step_seconds if seconds is None else seconds


def in_order(strips: Sequence[Strip]) -> list[Strip]:
    """Returns the strips in the order of their rows in the table: measured ones first, by step time."""
    return sorted(strips, key=lambda strip: (not strip.measured, strip.step_seconds))


def title(strip: Strip, rows: Sequence[Row]) -> str:
    """Returns what a plan is called among all rows: "uniform 1f1b = optimal 1f1b · 4-4" where two come to it."""
    extra = telling(rows)
    names = []
    for row in strip.rows:
        words = [row.partition, row.schedule]
        words += [f"{row.num_microbatches} micro-batches"] if "micro- batches" in extra else []
        words += [f"({row.name})"] if "name" in extra else []
        names.append(" ".join(words))
    return f"{' = '.join(dict.fromkeys(names))} · {'-'.join(map(str, strip.row.balance))}"


def times_best(strip: Strip, strips: Sequence[Strip]) -> float:
    """Returns a plan's step time over the best.

    What was measured is held against the best measured time, what was only predicted against the best prediction.
    """
    if strip.measured:
        best = min(other.step_seconds for other in strips if other.measured)
    else:
        best = min(row.predicted_step_seconds for other in strips for row in other.rows)
    return strip.step_seconds / best if best > 0 else 1.0


def step_words(strip: Strip, strips: Sequence[Strip], sign: str = "×") -> str:
    """Returns a plan's step time and how much that is of the best: "57.8 ms  × 1.10"."""
    return f"{ms(strip.step_seconds)}  {sign} {times_best(strip, strips):.2f}"


def predicted_words(strip: Strip) -> str:
    """Returns the prediction in words, with its error where there is a measured time: "52.0 ms predicted (-0.9 %)"."""
    off = strip.row.error
    return f"{ms(strip.row.predicted_step_seconds)} predicted" + ("" if off is None else f" ({error(off)})")


def longest_seconds(strips: Sequence[Strip]) -> float:
    """Returns the end of the time axis on which all bars and strips lie."""
    return max(
        (max(each.step_seconds, each.row.predicted_step_seconds, each.timeline.makespan) for each in strips), default=0
    )
