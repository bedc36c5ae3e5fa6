"""How each kind of span looks and what it is called, the same in the terminal and in pictures.

The colours stay apart in the common kinds of colour blindness: forward is light blue, backward dark orange, and the two
also differ in brightness, letter and, in the terminal, in the line that fills them.
"""

from __future__ import annotations

from typing import NamedTuple

from modelpar.planning.timeline import Span


class Look(NamedTuple):
    """The look of one kind of span."""

    name: str
    letter: str
    fill: str
    """The character that fills the rest of a box in the terminal."""
    colour: str
    ink: str
    """The colour of text on it."""


LOOKS = {
    "F": Look("forward", "F", "─", "#9ccbf0", "#0b2239"),
    "B": Look("backward", "B", "═", "#b8501a", "#ffffff"),
    "I": Look("input gradient", "I", "═", "#b8501a", "#ffffff"),
    "W": Look("weight gradient", "W", "≈", "#efc48a", "#3a2000"),
    "R": Look("recompute", "R", "┄", "#c9c3e6", "#201a40"),
    "optimizer": Look("optimizer", "U", "▒", "#2a8a3e", "#ffffff"),
    "reduce": Look("reduce", "r", "+", "#a8327a", "#ffffff"),
    "send": Look("send", ">", ">", "#d6c23a", "#2e2900"),
    "receive": Look("receive", "<", "<", "#8f8a2a", "#ffffff"),
    "data": Look("data", "d", "d", "#5d5d66", "#ffffff"),
    "wait activations": Look("waits for activations", ".", ".", "#c4dcef", "#55707f"),
    "wait gradients": Look("waits for gradients", ":", ":", "#ecc9b3", "#7f5a45"),
    "wait data": Look("waits for data", "~", "~", "#c9c9cf", "#55555f"),
    "wait end": Look("waits at the step's end", ",", ",", "#c3dfc8", "#4a6f50"),
}
"""In the order of legends. "wait …" stands for a wait by the kind of its cause; the rest are span kinds."""

_OTHER = Look("other", "?", "?", "#888888", "#ffffff")


def look_key(span: Span) -> str:
    """Returns the span's key in LOOKS: its kind, and for a wait also what kind of thing it waited for."""
    if span.kind != "wait":
        return span.kind
    first = span.cause.split(" ", 1)[0]
    if "from the controller" in span.cause or first in ("data", "inputs", "targets"):
        return "wait data"
    kinds = {"value": "wait activations", "grad": "wait gradients"}
    if first == "tied_grad" and " of micro-batch " in span.cause:
        return "wait gradients"
    return kinds.get(first, "wait end")


def look(key: str) -> Look:
    """Returns the look of a key of LOOKS; a kind that is not there is drawn grey, with a question mark."""
    return LOOKS.get(key, _OTHER._replace(name=key))


def nice_ticks(end: float, most: int) -> list[float]:
    """Returns at most `most` + 1 evenly spaced ticks from 0 to `end`, their distance 1, 2 or 5 times a power of ten."""
    if end <= 0 or most < 1:
        return [0.0]
    exponent = -12
    while True:
        for base in (1, 2, 5):
            distance = base * 10.0**exponent
            if end / distance <= most:
                return [i * distance for i in range(int(end / distance + 1e-9) + 1)]
        exponent += 1
