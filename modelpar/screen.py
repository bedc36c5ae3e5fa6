"""What a command says besides its results, by its option `verbose`.

::

    verbose=0   errors
    verbose=1   and warnings, those of any rank with its name; in a terminal what goes on, and how long it will take
    verbose=2   and what was found, reused and measured; ranks log more into their files
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console

from modelpar.report.progress import Activity
from modelpar.run.notices import log_warning

_SHOWN = (logging.ERROR, logging.WARNING, logging.DEBUG)
"""From which level on records are shown, by `verbose`."""
_LOGGED = (logging.WARNING, logging.INFO, logging.DEBUG)
"""From which level on modelpar logs, here and in the ranks' files."""
_RANK = "modelpar-rank"
"""How the names of threads begin that are ranks."""


@contextmanager
def screen(console: Console, verbose: int) -> Iterator[Activity]:
    """Shows log records and Python's warnings on standard error while the block runs; yields what shows progress."""
    root, ours = logging.getLogger(), logging.getLogger("modelpar")
    before = root.handlers[:], root.level, ours.level, warnings.showwarning, threading.excepthook
    root.handlers[:] = [_Shown(_SHOWN[verbose])]  # Hydra has one of its own there
    root.setLevel(logging.WARNING)
    ours.setLevel(_LOGGED[verbose])
    warnings.showwarning = log_warning
    threading.excepthook = partial(_thread_failed, threading.excepthook)
    try:
        with Activity(console, shown=verbose > 0) as activity:
            yield activity
    finally:
        root.handlers[:], level, our_level, warnings.showwarning, threading.excepthook = before
        root.setLevel(level)
        ours.setLevel(our_level)


def _thread_failed(otherwise: Callable[[threading.ExceptHookArgs], object], failure: threading.ExceptHookArgs) -> None:
    """Says nothing of an event file that cannot be written: whoever wrote is told with the next record."""
    writer = type(failure.thread).__module__.startswith("tensorboard.")
    if not (writer and isinstance(failure.exc_value, OSError)):
        otherwise(failure)


class _Shown(logging.Handler):
    """Prints records on whatever standard error is at the time: a progress bar puts itself there to stay below.

    What the planner warns of is printed once, however many plans of a model are made.
    """

    def __init__(self, level: int):
        super().__init__(level)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record; one of a thread that is a rank with the rank's name."""
        if record.name == "modelpar.planner" and record.levelno == logging.WARNING:
            if record.getMessage() in self._said:
                return
            self._said.add(record.getMessage())
        thread = threading.current_thread().name
        name = f"rank {thread.removeprefix(_RANK)}: " if thread.startswith(_RANK) else ""
        try:
            print(name + self.format(record), file=sys.stderr, flush=True)
        except Exception:  # a text that its arguments do not fit, or nobody to print for
            self.handleError(record)
