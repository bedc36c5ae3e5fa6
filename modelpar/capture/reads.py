"""Numbers that code reads off values which depend on weights: `settle` tries what they change.

Such a number is not known before the step, so that a branch on it cannot be replayed. Much of what code reads changes
nothing, though: a metric that is returned, a check that raises. So the forward is recorded again with another outcome
at that line::

    the same calls    nothing depends on it but arithmetic that is recorded
    an exception      a check: made in every step, by whichever stage has the value
    other calls       a branch: Trap
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from typing import Any, NamedTuple

from modelpar.capture.recording import Recording, function_name
from modelpar.capture.sameness import difference
from modelpar.capture.traps import Trap

_MOST = 24
"""Places in the code that are tried at most."""


class Place(NamedTuple):
    """Where code reads numbers: all that it reads there are tried at once."""

    inside: str
    line: str
    name: str


class Trial(NamedTuple):
    """Another outcome for what is read at a place."""

    place: Place
    number: int
    """Which of the other outcomes."""


class AsList(NamedTuple):
    """A function whose array is to be compared as a list."""

    function: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the function returns, as a list."""
        return self.function(*args, **kwargs).tolist()


class Endless(Exception):
    """Reports a forward that goes on and on once a number is another one."""


def place_of(inside: str, line: str, function: Callable[..., Any]) -> Place:
    """Returns where a number is read."""
    return Place(inside, line, function_name(function))


def other(outcome: Any, trial: Trial) -> Any:
    """Returns another outcome of the same type."""
    if isinstance(outcome, bool):
        return not outcome
    if isinstance(outcome, int):
        return (outcome + 3, 0 if outcome else 1, -1 - abs(outcome), 10_000)[trial.number]
    return (outcome * 1.7 + 0.37, 0.0, -1.0 - abs(outcome), 1e4 + abs(outcome))[trial.number]


@contextmanager
def _silence() -> Iterator[None]:
    """Lets nobody hear what code says that believes something went wrong."""
    nowhere, before = io.StringIO(), logging.root.manager.disable
    logging.disable()
    try:
        with redirect_stdout(nowhere), redirect_stderr(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def settle(recording: Recording, again: Callable[[Trial], Recording]) -> Recording:
    """Returns a recording without numbers that change nothing; `again` records with other outcomes at a place.

    Raises Trap where the code depends on a number.
    """
    checks: set[int] = set()
    places = dict.fromkeys(read.place for read in recording.reads)
    for place in places:
        reads = [read for read in recording.reads if read.place == place]
        trap = Trap(place.inside, place.line, f"reads a value that depends on {reads[0].of} ({place.name})")
        if len(places) > _MOST:
            raise trap
        yes_or_no = all(isinstance(read.outcome, bool) for read in reads)
        for number in range(1 if yes_or_no else 4):
            try:
                with _silence():
                    found = again(Trial(place, number))
            except KeyboardInterrupt:
                raise
            except Endless:
                raise trap from None
            except BaseException:  # such as sys.exit()
                if not yes_or_no:
                    raise trap from None
                checks |= {read.node for read in reads}
                break
            if difference(recording, found) is not None:
                raise trap
    nodes = tuple(replace(node, check=node.check or i in checks) for i, node in enumerate(recording.nodes))
    return replace(recording, nodes=nodes, reads=())
