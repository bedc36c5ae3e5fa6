"""Draws a comparison for the terminal: per plan a bar of its step time, and one step of it, all on one time axis.

::

    optimal 1f1b · 4-4                              52.5 ms  × 1.00  52.0 ms predicted (-0.9 %)
      ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╋━
    0 F0─F1─:::::::::::B0═F4─B1══F5─B2═::::B3═::::B4═::::B5═▒
    1 ....F0─F1──F2─:::::::B0═F3──B1═F4──B2═F5──B3═::::B4═:::B5
      0                 20                40                60        ms
"""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

from rich.text import Text

from modelpar.report.boxes import axis_text, box_text, boxes_of, legend_text, numbered_kinds
from modelpar.report.strips import Strip, in_order, longest_seconds, predicted_words, step_words, title

NARROWEST = 60
"""With fewer cells than this nothing is drawn."""
_MOST_RANKS = 4


def draw_comparison(strips: Sequence[Strip], width: int) -> Text | None:
    """Returns plans, best first, as coloured text, `width` cells wide; None where that is too narrow to tell anything.

    A line ━ is the measured step time, with ╋ or ┃ where the prediction lies; ╌ is a predicted one. Below it lies one
    step with a line per rank, of many ranks four, which have their number before them.
    """
    if width < NARROWEST:
        return None
    strips = in_order(strips)
    rows = [row for strip in strips for row in strip.rows]
    last = max((strip.timeline.num_ranks for strip in strips), default=1) - 1
    indent = len(str(last)) + 1
    cells, end = width - indent - len(" ms"), longest_seconds(strips)
    text = Text(no_wrap=True, overflow="ignore", end="")
    for strip in strips:
        text.append_text(_head(title(strip, rows), strip, strips, width))
        text.append(" " * indent).append_text(_bar(strip, end, cells)).append("\n")
        text.append_text(_strip(strip, end, cells, indent))
    text.append(" " * indent + axis_text(end, cells) + " ms\n", style="dim")
    text.append(" " * indent + _bar_legend(strips) + "\n")
    text.append_text(legend_text((span for strip in strips for span in strip.timeline.spans), indent, width))
    return text


def _head(name: str, strip: Strip, strips: Sequence[Strip], width: int) -> Text:
    """Returns a plan's name and numbers, on one line where both fit."""
    numbers = f"{step_words(strip, strips)}  "
    numbers += predicted_words(strip) if strip.measured else "predicted"
    if len(name) + 2 + len(numbers) <= width:
        return Text.assemble((name, "bold"), numbers.rjust(width - len(name)), "\n")
    return Text.assemble(
        ("\n".join(wrap(name, width, break_on_hyphens=False)), "bold"), "\n", numbers.rjust(width), "\n"
    )


def _bar(strip: Strip, end: float, cells: int) -> Text:
    length = max(_cells(strip.step_seconds, end, cells), 1)
    if not strip.measured:
        return Text("╌" * length)
    line = list("━" * length + " " * (cells - length))
    mark = max(_cells(strip.row.predicted_step_seconds, end, cells), 1) - 1
    line[mark] = "╋" if mark < length else "┃"
    return Text("".join(line).rstrip())


def _strip(strip: Strip, end: float, cells: int, indent: int) -> Text:
    """Returns a line per rank, of many ranks of four."""
    timeline = strip.timeline
    length = max(_cells(timeline.makespan, end, cells), 1)
    ranks = _shown_ranks(timeline.num_ranks)
    boxes = [boxes_of(timeline.of_rank(rank), timeline.makespan, length) for rank in ranks]
    numbered = numbered_kinds([one for line in boxes for one in line])
    text = Text()
    for rank, line in zip(ranks, boxes, strict=True):
        text.append(f"{rank} ".rjust(indent), style="dim")
        for span, covered in line:
            text.append_text(box_text(span, covered, numbered))
        text.append("\n")
    return text


def _shown_ranks(num_ranks: int) -> list[int]:
    """Returns all ranks, or of many the first, the last and some between, evenly spaced."""
    if num_ranks <= _MOST_RANKS:
        return list(range(num_ranks))
    return [round(i * (num_ranks - 1) / (_MOST_RANKS - 1)) for i in range(_MOST_RANKS)]


def _cells(seconds: float, end: float, cells: int) -> int:
    return round(seconds / end * cells) if end > 0 else 0


def _bar_legend(strips: Sequence[Strip]) -> str:
    measured = "━━━ measured step  ╋ ┃ its prediction" if any(strip.measured for strip in strips) else ""
    predicted = "╌╌╌ predicted step" if any(not strip.measured for strip in strips) else ""
    return "  ".join(filter(None, (measured, predicted)))
