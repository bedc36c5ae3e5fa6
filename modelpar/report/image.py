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

from PIL import Image, ImageDraw

from modelpar.planning.timeline import Span, Timeline
from modelpar.report.drawing import (
    FAINT,
    LEGEND_LINE,
    MARGIN,
    PAPER,
    SIZE,
    SMALL,
    TEXT,
    TITLE_SIZE,
    Draw,
    TimeAxis,
    cut_off,
    draw_legend,
    draw_span,
    font,
    legend_lines,
    text_width,
)
from modelpar.report.palette import look, look_key
from modelpar.report.units import ms, percent

_RIGHT = 58
"""Room for the utilization at the right."""
_LANE, _PREDICTED_LANE, _GAP, _RANK_GAP = 26, 18, 3, 9


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
        MARGIN
        + text_width(last_rank, SIZE)
        + 8
        + max(text_width(name, SMALL) for name in names)
        + (8 if predicted else 2)
    )
    axis = TimeAxis(max(each.makespan for each, _ in lanes), left, width - MARGIN - _RIGHT)

    head = _heading(title, timeline, predicted, width)
    top = MARGIN + len(head) * 22 + 6
    rank_height = sum(height for _, height in lanes) + _GAP * (len(lanes) - 1)
    bottom = top + timeline.num_ranks * (rank_height + _RANK_GAP)
    legend = legend_lines((span for each, _ in lanes for span in each.spans), width)
    image = Image.new("RGB", (width, bottom + 34 + LEGEND_LINE * len(legend) + MARGIN), PAPER)
    draw = ImageDraw.Draw(image)

    for line, (text, at, size, colour) in enumerate(head):
        draw.text((at, MARGIN + 22 * line + 9), text, colour, font(size), anchor="lm")
    axis.draw(draw, top, bottom)
    styles = [_label_styles(each, axis, height) for each, height in lanes]
    for rank in range(timeline.num_ranks):
        y = top + rank * (rank_height + _RANK_GAP)
        draw.text((MARGIN, y + rank_height / 2), f"rank {rank}", TEXT, font(SIZE), anchor="lm")
        for (each, height), name, label_styles in zip(lanes, names, styles, strict=True):
            draw.text((left - 8, y + height / 2), name, FAINT, font(SMALL), anchor="rm")
            axis.draw_lane(draw, y, height)
            for span in each.of_rank(rank):
                box = draw_span(image, draw, span, axis, y, height)
                if span.kind in label_styles:
                    _draw_label(draw, span, box, y + height / 2, label_styles[span.kind])
            shown = percent(each.utilization(rank)) if rank < each.num_ranks else ""
            colour, size = (TEXT, SIZE) if height == _LANE else (FAINT, SMALL)
            draw.text((width - MARGIN, y + height / 2), shown, colour, font(size), anchor="rm")
            y += height + _GAP
    draw_legend(image, draw, legend, bottom + 34)
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
        return [(numbers, MARGIN, SIZE, TEXT)]
    room = width - 2 * MARGIN
    together = f"{title}  ·  {numbers}"
    if text_width(together, TITLE_SIZE) <= room:
        return [(together, MARGIN, TITLE_SIZE, TEXT)]
    return [(cut_off(title, TITLE_SIZE, room), MARGIN, TITLE_SIZE, TEXT), (numbers, MARGIN, SIZE, TEXT)]


_LabelStyle = tuple[bool, int]
"""Whether a label begins with its kind's letter, and its font size."""


def _label(span: Span, letter: bool) -> str:
    """Returns what stands in a box: "F3", or only "3"; a kind without micro-batches always shows its letter."""
    mark = look(look_key(span)).letter
    if span.microbatch < 0 or not mark.isupper():
        return mark
    return f"{mark}{span.microbatch}" if letter else str(span.microbatch)


def _label_styles(timeline: Timeline, axis: TimeAxis, height: int) -> dict[str, _LabelStyle]:
    """Returns per kind the largest style that fits into most of its boxes, so that all boxes of a kind look alike."""
    of_kind: dict[str, list[Span]] = {}
    for span in timeline.spans:
        of_kind.setdefault(span.kind, []).append(span)
    styles: dict[str, _LabelStyle] = {}
    for kind, spans in of_kind.items():
        for letter, size in ((True, SIZE), (True, SMALL), (False, SMALL), (False, 9)):
            size = min(size, height - 6)
            fitting = sum(
                text_width(_label(span, letter), size) + 4 <= axis.x(span.seconds) - axis.left for span in spans
            )
            if fitting >= 0.7 * len(spans):
                styles[kind] = (letter, size)
                break
    return styles


def _draw_label(draw: Draw, span: Span, box: tuple[int, int], middle: float, style: _LabelStyle) -> None:
    """Writes into a box, from and to the pixels given, what is in it, if that fits."""
    letter, size = style
    text = _label(span, letter)
    if span.kind != "wait" and text_width(text, size) + 2 <= box[1] - box[0]:
        draw.text(((box[0] + box[1] - 1) / 2, middle), text, look(look_key(span)).ink, font(size), anchor="mm")
