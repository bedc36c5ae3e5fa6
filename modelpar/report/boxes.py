"""Timelines as cells of a terminal: runs of cells that show one span, the time axis, the legend.

::

    F0─F1─:::::::::B0════B1════      a box: its letter, its micro-batch where there is room, then the line that fills it
    0              5            ms

Nothing here knows of ranks or of lines; `draw_timeline` and the comparison put them together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.style import Style
from rich.text import Text

from modelpar.planning.timeline import Span
from modelpar.report.palette import LOOKS, look, look_key, nice_ticks

Box = tuple[Span | None, int]
"""A span, or None for idle time, and how many cells show it."""


def boxes_of(spans: Sequence[Span], end: float, cells: int) -> list[Box]:
    """Returns one rank's cells as runs of cells that show the same span."""
    runs = groupby(_majority(spans, end, cells))
    return [(spans[index] if index >= 0 else None, len(list(run))) for index, run in runs]


def numbered_kinds(boxes: Sequence[Box]) -> set[str]:
    """Returns the kinds of which at least half of the boxes have room for the longest label."""
    rooms: dict[str, list[int]] = {}
    longest: dict[str, int] = {}
    for span, length in boxes:
        if span is not None and span.microbatch >= 0:
            rooms.setdefault(span.kind, []).append(length)
            longest[span.kind] = max(longest.get(span.kind, 0), 1 + len(str(span.microbatch)))
    return {kind for kind, lengths in rooms.items() if sorted(lengths)[len(lengths) // 2] >= longest[kind]}


def box_text(span: Span | None, length: int, numbered: set[str]) -> Text:
    """Returns one box of `length` cells."""
    if span is None:
        return Text("·" * length, style="dim")
    chosen = look(look_key(span))
    if span.kind == "wait":
        return Text(chosen.fill * length, style=chosen.colour)
    label = f"{chosen.letter}{span.microbatch}" if span.kind in numbered and span.microbatch >= 0 else chosen.letter
    shown = label if len(label) <= length else chosen.letter
    return Text(shown.ljust(length, chosen.fill), style=Style(color=chosen.ink, bgcolor=chosen.colour))


def _majority(spans: Sequence[Span], end: float, cells: int) -> list[int]:
    """Returns per cell the index of the span that fills most of it, −1 where idle time does."""
    best = [-1] * cells
    if end <= 0:
        return best
    seconds = end / cells
    most, filled = [0.0] * cells, [0.0] * cells
    for index, span in enumerate(spans):
        for cell in range(int(span.start / seconds), min(int(span.end / seconds) + 1, cells)):
            overlap = min(span.end, (cell + 1) * seconds) - max(span.start, cell * seconds)
            filled[cell] += max(overlap, 0.0)
            if overlap > most[cell] * (1 + 1e-9):
                best[cell], most[cell] = index, overlap
    return [-1 if seconds - filled[c] > most[c] * (1 + 1e-9) else best[c] for c in range(cells)]


def axis_text(end: float, cells: int) -> str:
    """Returns the ticks in ms under the cells, each number beginning at its time."""
    line = [" "] * cells
    for tick in nice_ticks(end * 1e3, max(cells // 8, 2)):
        number = f"{tick:.6g}"
        at = round(tick / (end * 1e3) * cells) if end else 0
        if at + len(number) <= cells:
            line[at : at + len(number)] = number
    return "".join(line)


def legend_text(spans: Iterable[Span], indent: int, width: int) -> Text:
    """Returns the kinds that occur, wrapped to the width."""
    present = {look_key(span) for span in spans}
    entries: list[tuple[str, Style | str, str]] = []
    for key in [k for k in LOOKS if k in present] + sorted(present - set(LOOKS)):
        chosen = look(key)
        wait = key.startswith("wait ")
        style: Style | str = chosen.colour if wait else Style(color=chosen.ink, bgcolor=chosen.colour)
        entries.append(((chosen.letter + chosen.fill * 2)[:3], style, chosen.name))
    entries.append(("···", "dim", "idle"))
    text, used = Text(" " * indent), indent
    for mark, style, name in entries:
        length = len(mark) + 1 + len(name) + 2
        if used + length - 2 > width and used > indent:
            text.rstrip()
            text.append("\n" + " " * indent)
            used = indent
        text.append(mark, style=style)
        text.append(f" {name}  ")
        used += length
    text.rstrip()
    return text
