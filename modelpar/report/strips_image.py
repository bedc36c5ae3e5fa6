"""Draws a comparison as a picture: per plan a bar of its step time, and one step of it, all on one time axis.

::

    Step time of 2 plans, best first
    optimal 1f1b · 4-4
           ██████████████████┃██                     52.5 ms x 1.00
    ranks  [F0][F1]//[B0][F2][B1]                    52.0 ms predicted (-0.9 %)
    0-1    //[F0][B0]//[F1][B1]
    uniform gpipe · 4-4
           …
           0         10        20        30 ms
    █ measured step  ┃ predicted  [F] forward  [B] backward …
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from modelpar.report.drawing import (
    FAINT,
    IDLE,
    LEGEND_LINE,
    MARGIN,
    PAPER,
    SIZE,
    SMALL,
    TEXT,
    TITLE_SIZE,
    Draw,
    TimeAxis,
    draw_legend,
    draw_span,
    font,
    legend_lines,
    text_width,
    wrapped,
)
from modelpar.report.strips import Strip, in_order, longest_seconds, predicted_words, step_words, title

# Pillow's own font has no ×, no dash, and no letters beyond Latin.
_LINE, _BAR, _GAP, _BETWEEN = 18, 12, 5, 16
"""The heights of a line of text and of a bar; what lies between bar and strip, and between two plans."""
_BAR_COLOUR = "#46566b"


def comparison_image(strips: Sequence[Strip], width: int = 1200) -> Image.Image:
    """Returns a picture of plans, best first, `width` pixels wide, one block of bar and strip per plan.

    A full bar is the measured step time, an empty one a predicted one; the mark on it is the prediction. The strip
    below has a lane per rank with one step.
    """
    strips = in_order(strips)
    rows = [row for strip in strips for row in strip.rows]
    names = [wrapped(title(strip, rows), SIZE, width - 2 * MARGIN) for strip in strips]
    numbers = [
        (
            step_words(each, strips, "x"),
            predicted_words(each) if each.measured else "predicted",
        )
        for each in strips
    ]
    margin = max((max(text_width(first, SIZE), text_width(second, SMALL)) for first, second in numbers), default=0)
    last = max((strip.timeline.num_ranks for strip in strips), default=1) - 1
    left = MARGIN + max(text_width("ranks", SMALL), text_width(f"0-{last}", SMALL)) + 12
    axis = TimeAxis(longest_seconds(strips), left, width - MARGIN - margin - 24)

    top = MARGIN + LEGEND_LINE + 8
    tops = [top]
    for strip, lines in zip(strips, names, strict=True):
        lanes = max(_lane(strip) * strip.timeline.num_ranks, _LINE)
        tops.append(tops[-1] + _LINE * len(lines) + _BAR + _GAP + lanes + _BETWEEN)
    bottom = tops[-1]
    legend = legend_lines((span for strip in strips for span in strip.timeline.spans), width)
    image = Image.new("RGB", (width, bottom + 34 + LEGEND_LINE * (len(legend) + 1) + MARGIN), PAPER)
    draw = ImageDraw.Draw(image)
    what = "Step time of 1 plan" if len(strips) == 1 else f"Step time of {len(strips)} plans, best first"
    draw.text((MARGIN, MARGIN + 9), what, TEXT, font(TITLE_SIZE), anchor="lm")
    axis.draw(draw, top, bottom)
    for strip, lines, (first, second), y in zip(strips, names, numbers, tops[:-1], strict=True):
        for line in lines:
            draw.rectangle((MARGIN, y, MARGIN + text_width(line, SIZE) + 4, y + _LINE - 2), PAPER)  # over the grid
            draw.text((MARGIN, y + _LINE / 2 - 1), line, TEXT, font(SIZE), anchor="lm")
            y += _LINE
        _draw_bar(draw, strip, axis, y)
        draw.text((width - MARGIN, y + _BAR / 2), first, TEXT, font(SIZE), anchor="rm")
        _draw_strip(image, draw, strip, axis, y + _BAR + _GAP)
        draw.text((width - MARGIN, y + _BAR + _GAP + 7), second, FAINT, font(SMALL), anchor="rm")
    _draw_bar_legend(draw, strips, bottom + 34)
    draw_legend(image, draw, legend, bottom + 34 + LEGEND_LINE)
    return image


def _lane(strip: Strip) -> int:
    """Returns the height of a rank's lane: all lanes of a plan take about 60 pixels, each at least 3."""
    return min(14, max(3, 60 // max(strip.timeline.num_ranks, 1)))


def _draw_bar(draw: Draw, strip: Strip, axis: TimeAxis, y: int) -> None:
    _draw_bar_box(draw, axis.left, max(axis.x(strip.step_seconds), axis.left + 1), y, strip.measured)
    if strip.measured:
        _draw_mark(draw, axis.x(strip.row.predicted_step_seconds), y)


def _draw_bar_box(draw: Draw, left: int, right: int, y: int, full: bool) -> None:
    fill = _BAR_COLOUR if full else IDLE
    draw.rectangle((left, y, right - 1, y + _BAR - 1), fill, _BAR_COLOUR)


def _draw_mark(draw: Draw, x: int, y: int) -> None:
    """Draws the mark of a prediction, with a pale edge so that it is seen on a full bar."""
    draw.rectangle((x - 2, y - 3, x + 2, y + _BAR + 2), PAPER)
    draw.rectangle((x - 1, y - 3, x + 1, y + _BAR + 2), TEXT)


def _draw_strip(image: Image.Image, draw: Draw, strip: Strip, axis: TimeAxis, y: int) -> None:
    timeline, height = strip.timeline, _lane(strip)
    inner = height - 1 if height > 3 else height
    for rank in range(timeline.num_ranks):
        axis.draw_lane(draw, y + rank * height, inner, timeline.makespan)
        for span in timeline.of_rank(rank):
            draw_span(image, draw, span, axis, y + rank * height, inner)
    ranks = ["rank 0"] if timeline.num_ranks == 1 else ["ranks", f"0-{timeline.num_ranks - 1}"]
    for line, words in enumerate(ranks):
        draw.text((axis.left - 8, y + 6 + 12 * line), words, FAINT, font(SMALL), anchor="rm")


def _draw_bar_legend(draw: Draw, strips: Sequence[Strip], y: int) -> None:
    """Explains bars, marks and "x", as far as they occur."""
    measured, predicted = (any(each.measured is which for each in strips) for which in (True, False))
    entries = []
    if measured:
        entries += [("full", "measured step (median)"), ("mark", "its prediction")]
    if predicted:
        entries += [("empty", "predicted step, not measured")]
    best = "x  times the best measured step" if measured else "x  times the best prediction"
    entries += [("", best + (" (a prediction: times the best prediction)" if measured and predicted else ""))]
    x = MARGIN
    for kind, words in entries:
        if kind == "mark":
            _draw_mark(draw, x + 10, y + 2)
        elif kind:
            _draw_bar_box(draw, x, x + 22, y + 2, kind == "full")
        x += 28 if kind else 0
        draw.text((x, y + 8), words, TEXT, font(SMALL), anchor="lm")
        x += text_width(words, SMALL) + 18
