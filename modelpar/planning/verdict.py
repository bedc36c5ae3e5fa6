"""What a comparison of a split model with the unsplit one found: Check, Verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """One thing that was compared."""

    what: str
    passed: bool
    detail: str
    """What was equal, or where it first differs and by how much at most, or why it was not compared."""
    compared: bool = True
    """Whether it could be compared; where not, it has not passed, and does not count against the verdict."""


@dataclass(frozen=True)
class Verdict:
    """What `verify` found."""

    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()
    """What micro-batches change whether or not the model is split, and what to do about it."""

    @property
    def passed(self) -> bool:
        """Whether all checks hold that could be made."""
        return all(check.passed for check in self.checks if check.compared)

    @property
    def left_out(self) -> tuple[str, ...]:
        """What could not be compared."""
        return tuple(check.what for check in self.checks if not check.compared)

    def to_json(self) -> dict[str, Any]:
        """Returns plain data for json."""
        return {"passed": self.passed, **asdict(self)}
