"""What is known of one run when it is shown beside others: Run."""

from __future__ import annotations

from dataclasses import dataclass

GONE = "its traces are gone, it was written anew meanwhile"
"""What is said of a run that had traces and has none."""


@dataclass(frozen=True)
class Run:
    """One run, as its event file tells it; it may still go on."""

    name: str
    problem: str | None = None
    """Why there is nothing to show; None where there is."""
    steps: tuple[int, ...] = ()
    """Traced steps, ascending."""
    blobs: tuple[bytes, ...] = ()
    """The last of these traces, as `trace.encode` wrote them; those of earlier steps first."""
    num_steps: int = 0
    """How many steps have been done so far."""
    step_seconds: float | None = None
    """The median of the settled steps; None where nothing was run."""
    bubble: float | None = None
    """The mean of the settled steps."""
