"""How work that takes a while says what it does: it calls a `Doing`, which by default is nobody."""

from __future__ import annotations

from typing import Protocol


class Doing(Protocol):
    """Somebody who is told what goes on; may be called from any thread."""

    def __call__(self, what: str, done: float = 0, total: float | None = None) -> None:
        """Hears what begins or goes on, in a few words, and how much of it is done where that is known.

        `done` and `total` count things where they are whole numbers, and are seconds where they are floats.
        """


def silent(what: str, done: float = 0, total: float | None = None) -> None:
    """Hears nothing."""
