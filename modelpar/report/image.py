"""Draws timelines as a picture, with Pillow alone.

::

    title · makespan 12.3 ms, bubble 14 %
    rank 0  predicted  [F0][F1]    [B0 ][F2][B1 ]          ···
            measured   [F0 ][F1 ]//[B0  ][F2 ][B1  ]       ···        81 %
    rank 1  …
            0         5         10         15 ms
    [F] forward  [B] backward  [/] waits for activations …
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from modelpar.planning.timeline import Span, Timeline
from modelpar.report.palette import LOOKS, look, look_key, nice_ticks
from modelpar.report.units import ms, percent

_MARGIN = 14
_RIGHT = 58
"""Room for the utilization at the right."""
_LANE, _PREDICTED_LANE, _GAP, _RANK_GAP = 26, 18, 3, 9
_PAPER, _TEXT, _FAINT, _GRID, _IDLE = "#ffffff", "#1c1c22", "#6c6c78", "#e3e3e8", "#f4f4f6"
_TITLE_SIZE, _SIZE, _SMALL = 16, 13, 11

_Draw = ImageDraw.ImageDraw


def timeline_image(
    timeline: Timeline, title: str = "", predicted: Timeline | None = None, width: int = 1200
) -> Image.Image:
    """Returns a picture of a timeline, `width` pixels wide, with a lane per rank.

    Boxes are computations, with letter and micro-batch where they fit; hatched ones are waits, coloured by what they
    waited for. Where `predicted` is given its lane stands above each rank's measured one on the same time axis. At the
    right is each rank's utilization; the title line ends with makespan and bubble.
    """
    lanes = [(timeline, _LANE)] if predicted is None else [(predicted, _PREDICTED_LANE), (timeline, _LANE)]
    last_rank = f"rank {timeline.num_ranks - 1}"
    names = [""] if predicted is None else ["predicted", "measured"]
    left = (
        _MARGIN + _width(last_rank, _SIZE) + 8 + max(_width(name, _SMALL) for name in names) + (8 if predicted else 2)
    )
    right = width - _MARGIN - _RIGHT
    end = max(each.makespan for each, _ in lanes)
    scale = (right - left) / end if end > 0 else 0.0

    head = _heading(title, timeline, predicted, width)
    top = _MARGIN + len(head) * 22 + 6
    rank_height = sum(height for _, height in lanes) + _GAP * (len(lanes) - 1)
    axis = top + timeline.num_ranks * (rank_height + _RANK_GAP)
    legend = _legend_lines((span for each, _ in lanes for span in each.spans), width)
    image = Image.new("RGB", (width, axis + 34 + 22 * len(legend) + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(image)

    for line, (text, at, size, colour) in enumerate(head):
        draw.text((at, _MARGIN + 22 * line + 9), text, colour, _font(size), anchor="lm")
    _draw_axis(draw, end, scale, left, right, top, axis)
    styles = [_label_styles(each, scale, height) for each, height in lanes]
    for rank in range(timeline.num_ranks):
        y = top + rank * (rank_height + _RANK_GAP)
        draw.text((_MARGIN, y + rank_height / 2), f"rank {rank}", _TEXT, _font(_SIZE), anchor="lm")
        for (each, height), name, label_styles in zip(lanes, names, styles, strict=True):
            draw.text((left - 8, y + height / 2), name, _FAINT, _font(_SMALL), anchor="rm")
            draw.rectangle((left, y, right - 1, y + height - 1), _IDLE)
            for x in _tick_positions(end, scale, left, right):
                draw.line((x, y, x, y + height - 1), _GRID)
            for span in each.of_rank(rank):
                _draw_span(image, draw, span, left, scale, y, height, label_styles)
            shown = percent(each.utilization(rank)) if rank < each.num_ranks else ""
            colour, size = (_TEXT, _SIZE) if height == _LANE else (_FAINT, _SMALL)
            draw.text((width - _MARGIN, y + height / 2), shown, colour, _font(size), anchor="rm")
            y += height + _GAP
    for line, entries in enumerate(legend):
        _draw_legend_line(image, draw, entries, axis + 34 + 22 * line)
    return image


def _heading(
    title: str, timeline: Timeline, predicted: Timeline | None, width: int
) -> list[tuple[str, float, int, str]]:
    """Returns the title lines as (text, x, font size, colour): title and numbers on one line where both fit."""
    numbers = f"makespan {ms(timeline.makespan)}, bubble {percent(timeline.bubble)}"
    if predicted is not None:
        numbers += f" (predicted {ms(predicted.makespan)}, {percent(predicted.bubble)})"
    if timeline.clock_error:
        numbers += f", clocks ± {ms(timeline.clock_error)}"
    if not title:
        return [(numbers, _MARGIN, _SIZE, _TEXT)]
    room = width - 2 * _MARGIN
    together = f"{title}  ·  {numbers}"
    if _width(together, _TITLE_SIZE) <= room:
        return [(together, _MARGIN, _TITLE_SIZE, _TEXT)]
    while title and _width(title + "…", _TITLE_SIZE) > room:
        title = title[:-1]
        if _width(title + "…", _TITLE_SIZE) <= room:
            title += "…"
            break
    return [(title, _MARGIN, _TITLE_SIZE, _TEXT), (numbers, _MARGIN, _SIZE, _TEXT)]


_LabelStyle = tuple[bool, int]
"""Whether a label begins with its kind's letter, and its font size."""


def _label(span: Span, letter: bool) -> str:
    """Returns what stands in a box: "F3", or only "3"; a kind without micro-batches always shows its letter."""
    mark = look(look_key(span)).letter
    if span.microbatch < 0 or not mark.isupper():
        return mark
    return f"{mark}{span.microbatch}" if letter else str(span.microbatch)


def _label_styles(timeline: Timeline, scale: float, height: int) -> dict[str, _LabelStyle]:
    """Returns per kind the largest style that fits into most of its boxes, so that all boxes of a kind look alike."""
    of_kind: dict[str, list[Span]] = {}
    for span in timeline.spans:
        of_kind.setdefault(span.kind, []).append(span)
    styles: dict[str, _LabelStyle] = {}
    for kind, spans in of_kind.items():
        for letter, size in ((True, _SIZE), (True, _SMALL), (False, _SMALL), (False, 9)):
            size = min(size, height - 6)
            fitting = sum(_width(_label(span, letter), size) + 4 <= round(span.seconds * scale) for span in spans)
            if fitting >= 0.7 * len(spans):
                styles[kind] = (letter, size)
                break
    return styles


def _draw_span(
    image: Image.Image,
    draw: _Draw,
    span: Span,
    left: int,
    scale: float,
    y: int,
    height: int,
    styles: Mapping[str, _LabelStyle],
) -> None:
    """Draws one box. Ends are rounded alike everywhere, so that neighbours touch and never overlap."""
    x0, x1 = left + round(span.start * scale), left + round(span.end * scale)
    chosen = look(look_key(span))
    if span.kind == "wait":
        if x1 > x0:
            _draw_hatched(image, (x0, y, x1, y + height), chosen.colour)
        return
    x1 = max(x1, x0 + 1)
    draw.rectangle((x0, y, x1 - 1, y + height - 1), chosen.colour)
    if x1 - x0 >= 4:
        draw.line((x1 - 1, y, x1 - 1, y + height - 1), _PAPER)
    if span.kind in styles:
        letter, size = styles[span.kind]
        text = _label(span, letter)
        if _width(text, size) + 2 <= x1 - x0:
            draw.text(((x0 + x1 - 1) / 2, y + height / 2), text, chosen.ink, _font(size), anchor="mm")


def _draw_hatched(image: Image.Image, area: tuple[int, int, int, int], colour: str) -> None:
    """Fills an area with pale diagonal lines; each is cut off at the area's edges."""
    width, height = area[2] - area[0], area[3] - area[1]
    tile = Image.new("RGB", (width, height), "#fbfbfc")
    draw = ImageDraw.Draw(tile)
    for x in range(-height - area[0] % 6, width, 6):
        draw.line((x, height, x + height, 0), colour, 2)
    image.paste(tile, area[:2])


def _tick_positions(end: float, scale: float, left: int, right: int) -> list[int]:
    return [left + round(tick / 1e3 * scale) for tick in _ticks(end, right - left)]


def _ticks(end: float, pixels: int) -> list[float]:
    """Returns the ticks in ms, at least 80 pixels apart."""
    return nice_ticks(end * 1e3, max(pixels // 80, 1))


def _draw_axis(draw: _Draw, end: float, scale: float, left: int, right: int, top: int, axis: int) -> None:
    """Draws the grid behind the lanes, and the axis with its ticks in ms below them."""
    ticks = _ticks(end, right - left)
    for tick, x in zip(ticks, _tick_positions(end, scale, left, right), strict=True):
        draw.line((x, top, x, axis + 4), _GRID)
        draw.text((x, axis + 14), f"{tick:.6g}", _FAINT, _font(_SMALL), anchor="mm")
    draw.line((left, axis, right, axis), _FAINT)
    draw.text((right + 14, axis + 14), "ms", _FAINT, _font(_SMALL), anchor="lm")


_Legend = list[tuple[str, str, int]]


def _legend_lines(spans: Iterable[Span], width: int) -> list[_Legend]:
    """Returns the kinds that occur as lines of (key, name, x), wrapped to the width."""
    present = {look_key(span) for span in spans}
    keys = [key for key in LOOKS if key in present] + sorted(present - set(LOOKS))
    lines: list[_Legend] = [[]]
    x = _MARGIN
    for key, name in [*((key, look(key).name) for key in keys), ("", "idle")]:
        needed = 22 + 6 + _width(name, _SMALL)
        if x + needed > width - _MARGIN and lines[-1]:
            lines.append([])
            x = _MARGIN
        lines[-1].append((key, name, x))
        x += needed + 18
    return lines


def _draw_legend_line(image: Image.Image, draw: _Draw, entries: Sequence[tuple[str, str, int]], y: int) -> None:
    for key, name, x in entries:
        chosen = look(key)
        if key.startswith("wait "):
            _draw_hatched(image, (x, y, x + 22, y + 16), chosen.colour)
        else:
            draw.rectangle((x, y, x + 21, y + 15), chosen.colour if key else _IDLE)
            if key:
                draw.text((x + 11, y + 8), chosen.letter, chosen.ink, _font(_SMALL), anchor="mm")
        draw.text((x + 28, y + 8), name, _TEXT, _font(_SMALL), anchor="lm")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _width(text: str, size: int) -> int:
    return round(_font(size).getlength(text)) if text else 0
