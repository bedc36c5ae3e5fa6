"""What ranks log, and which of it the controller says: warnings, each text once, with the rank's name.

::

    prints, libraries ─────────────────────▶ rank1.log         where the workers were given a folder for logs
    logging, warnings.warn ──┬─────────────▶ rank1.log
                             └─ Notices ───▶ the controller    "rank 1: …", from level WARNING on, never too many

Ranks that are threads log as any thread of their process does.
"""

from __future__ import annotations

import io
import logging
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:  # it imports torch, which a command that starts no ranks does without
    from modelpar.run.transport import Key

_MOST = 10
"""How many texts pass within `_SECONDS`."""
_SECONDS = 10.0
_MOST_SEEN = 10_000
"""How many texts are remembered, so that none passes twice."""
_LONGEST = 2000
"""Characters of a text that travel; all of it is in the log."""

_log = logging.getLogger("modelpar.ranks")


class Limit:
    """Lets each text pass once, and only so many at a time; counts what it holds back."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._passed: deque[float] = deque(maxlen=_MOST)
        self._held = 0
        self._due, self._pause = 0.0, _SECONDS

    def passes(self, text: str, now: float) -> bool:
        """Tells whether a text passes; `now` is in seconds and never goes back."""
        room = len(self._passed) < _MOST or now - self._passed[0] >= _SECONDS
        if room and text not in self._seen:
            if len(self._seen) == _MOST_SEEN:
                self._seen.clear()
            self._seen.add(text)
            self._passed.append(now)
            return True
        if not self._held:
            self._due = now + self._pause
        self._held += 1
        return False

    def held_back(self, now: float) -> int:
        """Returns how many were held back and not yet spoken of; 0 where it is too early to speak of them again."""
        if not self._held or now < self._due:
            return 0
        self._pause *= 2  # a layer that warns in every step shall not be heard of every few seconds
        held, self._held = self._held, 0
        return held


class Notices(logging.Handler):
    """Hands on warnings to the controller, by `send(level, text)`, which returns what can be waited for.

    It takes the thread that warns half a millisecond for a text that passes, and microseconds for any other.
    """

    def __init__(self, send: Callable[[int, str], Any], log: str | None):
        super().__init__(logging.WARNING)
        assert self.lock
        self._lock = self.lock
        self._send, self._limit = send, Limit()
        self._where = f"; they are in {log}" if log else ""
        self._sent: deque[Any] = deque(maxlen=4 * _MOST)
        self._sending = False

    def emit(self, record: logging.LogRecord) -> None:
        """Sends a record's text, if it passes the limit."""
        try:
            text = record.getMessage().rstrip()
        except Exception:  # a text that its arguments do not fit
            self.handleError(record)
            return
        text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
        if not self._sending and self._limit.passes(text, time.monotonic()):
            self._tell(record.levelno, text)

    def count(self, now: float) -> None:
        """Says how many warnings were held back, now and then."""
        with self._lock:
            if held := self._limit.held_back(now):
                more = "1 more warning is not shown" if held == 1 else f"{held} more warnings are not shown"
                self._tell(logging.WARNING, more + self._where)

    def finish(self) -> None:
        """Waits until the controller has heard all that was sent, and then how much was not."""
        self._wait()
        self.count(float("inf"))
        self._wait()

    def _wait(self) -> None:
        while self._sent:
            with suppress(RuntimeError):
                self._sent.popleft().wait()

    def _tell(self, level: int, text: str) -> None:
        self._sending = True  # whatever sending itself logs stays here
        try:
            with suppress(RuntimeError):  # the controller is gone, and soon this process
                self._sent.append(self._send(level, text))
        finally:
            self._sending = False


def write_log(level: int, *, to_file: bool) -> None:
    """Sets how this process, a rank, logs: modelpar's own from a level on, all of it to standard error if that is a
    file of its own. What is printed reaches the file line by line."""
    logging.getLogger("modelpar").setLevel(level)
    warnings.showwarning = log_warning
    if to_file:
        for stream in (sys.stdout, sys.stderr):
            cast(io.TextIOWrapper, stream).reconfigure(line_buffering=True)
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)


def say(key: Key, notice: tuple[int, str]) -> None:
    """Logs in the controller what a rank sent."""
    level, text = notice
    _log.log(level, "rank %d: %s", key[1], text)


def log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Logs a warning of Python's in one line; takes the place of `warnings.showwarning`."""
    if file is not None:
        file.write(warnings.formatwarning(message, category, filename, lineno, line))
    else:
        logging.getLogger("py.warnings").warning("%s: %s (%s:%d)", category.__name__, message, filename, lineno)
