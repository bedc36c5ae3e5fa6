"""What all pictures are made of: colours, fonts, boxes, hatched waits, the time axis, the legend; with Pillow alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from modelpar.planning.timeline import Span
from modelpar.report.palette import LOOKS, look, look_key, nice_ticks

MARGIN = 14
PAPER, TEXT, FAINT, GRID, IDLE = "#ffffff", "#1c1c22", "#6c6c78", "#e3e3e8", "#f4f4f6"
TITLE_SIZE, SIZE, SMALL = 16, 13, 11
LEGEND_LINE = 22
"""The height of a line of the legend."""

Draw = ImageDraw.ImageDraw
Legend = list[tuple[str, str, int]]
"""One line: (key of the look, or "" for idle time; name; x)."""


def draw_hatched(image: Image.Image, area: tuple[int, int, int, int], colour: str) -> None:
    """Fills an area with pale diagonal lines; each is cut off at the area's edges."""
    width, height = area[2] - area[0], area[3] - area[1]
    tile = Image.new("RGB", (width, height), "#fbfbfc")
    draw = ImageDraw.Draw(tile)
    for x in range(-height - area[0] % 6, width, 6):
        draw.line((x, height, x + height, 0), colour, 2)
    image.paste(tile, area[:2])


@dataclass(frozen=True)
class TimeAxis:
    """Where a time lies in a picture: 0 at `left`, `end` seconds at `right`."""

    end: float
    left: int
    right: int

    def x(self, seconds: float) -> int:
        """Returns the pixel of a time. All ends are rounded alike, so that neighbours touch and never overlap."""
        return self.left + (round(seconds * ((self.right - self.left) / self.end)) if self.end > 0 else 0)

    def ticks(self) -> list[tuple[str, int]]:
        """Returns the ticks in ms with their pixels, at least 80 apart."""
        ticks = nice_ticks(self.end * 1e3, max((self.right - self.left) // 80, 1))
        return [(f"{tick:.6g}", self.x(tick / 1e3)) for tick in ticks]

    def draw(self, draw: Draw, top: int, bottom: int) -> None:
        """Draws the grid from top to bottom, and the axis with its ticks below."""
        for tick, x in self.ticks():
            draw.line((x, top, x, bottom + 4), GRID)
            draw.text((x, bottom + 14), tick, FAINT, font(SMALL), anchor="mm")
        draw.line((self.left, bottom, self.right, bottom), FAINT)
        draw.text((self.right + 14, bottom + 14), "ms", FAINT, font(SMALL), anchor="lm")

    def draw_lane(self, draw: Draw, y: int, height: int, end: float | None = None) -> None:
        """Draws an idle lane with the grid on it, up to `end` or over the whole axis."""
        right = self.right if end is None else max(self.x(end), self.left + 1)
        draw.rectangle((self.left, y, right - 1, y + height - 1), IDLE)
        for _, x in self.ticks():
            if x < right:
                draw.line((x, y, x, y + height - 1), GRID)


def draw_span(image: Image.Image, draw: Draw, span: Span, axis: TimeAxis, y: int, height: int) -> tuple[int, int]:
    """Draws a span as a box without text, and returns where it begins and ends."""
    x0, x1 = axis.x(span.start), axis.x(span.end)
    colour = look(look_key(span)).colour
    if span.kind == "wait":
        if x1 > x0:
            draw_hatched(image, (x0, y, x1, y + height), colour)
        return x0, x1
    x1 = max(x1, x0 + 1)
    draw.rectangle((x0, y, x1 - 1, y + height - 1), colour)
    if x1 - x0 >= 4:
        draw.line((x1 - 1, y, x1 - 1, y + height - 1), PAPER)
    return x0, x1


def legend_lines(spans: Iterable[Span], width: int) -> list[Legend]:
    """Returns the kinds that occur as lines of (key, name, x), wrapped to the width."""
    present = {look_key(span) for span in spans}
    keys = [key for key in LOOKS if key in present] + sorted(present - set(LOOKS))
    lines: list[Legend] = [[]]
    x = MARGIN
    for key, name in [*((key, look(key).name) for key in keys), ("", "idle")]:
        needed = 22 + 6 + text_width(name, SMALL)
        if x + needed > width - MARGIN and lines[-1]:
            lines.append([])
            x = MARGIN
        lines[-1].append((key, name, x))
        x += needed + 18
    return lines


def draw_legend(image: Image.Image, draw: Draw, lines: list[Legend], y: int) -> None:
    """Draws the lines of a legend, LEGEND_LINE apart, from y down."""
    for line, entries in enumerate(lines):
        top = y + LEGEND_LINE * line
        for key, name, x in entries:
            chosen = look(key)
            if key.startswith("wait "):
                draw_hatched(image, (x, top, x + 22, top + 16), chosen.colour)
            else:
                draw.rectangle((x, top, x + 21, top + 15), chosen.colour if key else IDLE)
                if key:
                    draw.text((x + 11, top + 8), chosen.letter, chosen.ink, font(SMALL), anchor="mm")
            draw.text((x + 28, top + 8), name, TEXT, font(SMALL), anchor="lm")


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Returns the font of all pictures, in pixels."""
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> int:
    """Returns how many pixels a text takes."""
    return round(font(size).getlength(text)) if text else 0


def wrapped(text: str, size: int, room: int) -> list[str]:
    """Returns a text as lines of at most `room` pixels, broken between words; a word too long for one is cut off."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size) <= room:
            lines[-1] = longer
        else:
            lines.append(cut_off(word, size, room))
    return lines


def cut_off(text: str, size: int, room: int) -> str:
    """Returns a text of at most `room` pixels: where it is longer its beginning and three dots."""
    if text_width(text, size) <= room:
        return text
    while text and text_width(text + "…", size) > room:
        text = text[:-1]
    return text + "…"
