"""How values reach a rank: Inbox, Mailbox, Transport, and the transport between threads of one process.

Push, never pull: a sender puts a value into the inbox of the rank that will need it; that rank's one executor files
what has arrived by key, and takes it out. No thread stands in between::

    any thread or process  ──put──▶  Inbox  ──get──▶  Mailbox, filed by key  ──wait──▶  the executor
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any, Protocol

from modelpar.run import cuda, wire
from modelpar.run.clocks import read_clock

CONTROLLER = -1
"""The address of the process that runs the user's code."""

Key = tuple[Any, ...]
"""What a value is filed under; its first item is a kind, or the number of a run."""

Routes = Mapping[str, Callable[[Key, Any], None]]
"""Who takes arrivals of some kinds at once, on the thread that brings them."""

_WAKE: Key = ("wake",)


class Unreachable(ConnectionError):
    """Reports a rank that a value did not reach, mostly because it has ended."""


class Inbox(Protocol):
    """Arrivals in order, until the one taker files them."""

    def put(self, key: Key, value: Any) -> None:
        """Adds an arrival, from any thread of this process."""

    def get(self, timeout: float | None) -> tuple[Key, Any] | None:
        """Returns the next arrival; None where there is none after `timeout` seconds (None: waits for ever)."""


class QueueInbox:
    """The inbox of a thread among threads."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Key, Any]] = SimpleQueue()

    def put(self, key: Key, value: Any) -> None:
        """Adds an arrival."""
        self._queue.put((key, value))

    def get(self, timeout: float | None) -> tuple[Key, Any] | None:
        """Returns the next arrival; see `Inbox.get`."""
        try:
            return self._queue.get(timeout != 0, timeout)
        except Empty:
            return None


class Mailbox:
    """Values by key, each put once and taken once. One thread takes; any thread puts."""

    def __init__(self, routes: Routes | None = None, inbox: Inbox | None = None):
        self._inbox = inbox or QueueInbox()
        self._values: dict[Key, Any] = {}
        self._error: BaseException | None = None
        self._discarded: set[Any] = set()
        self._routes = routes or {}

    def put(self, key: Key, value: Any) -> None:
        """Adds a value, and wakes the taker if it waits; a routed kind (its first item) is handed on."""
        if key[0] in self._routes:
            self._routes[key[0]](key, value)
        else:
            self._inbox.put(key, value)

    def wait(self, key: Key) -> Any:
        """Takes a value out, waiting until it has arrived. Raises what `close` was given, if closed."""
        self.wait_for(key, None)
        if self._error is not None:
            raise self._error
        return self._values.pop(key)

    def wait_for(self, key: Key, deadline: float | None) -> bool:
        """Waits until a value has arrived or the mailbox is closed; False where the deadline (monotonic) came first."""
        while key not in self._values and self._error is None:
            if not self._file(None if deadline is None else max(0.0, deadline - monotonic())):
                return False
        return True

    def has(self, key: Key) -> bool:
        """Tells whether a value has arrived, without taking it."""
        while key not in self._values and self._file(0):
            pass
        return key in self._values

    def discard(self, run: Any) -> None:
        """Drops all values of a run, also those still to come."""
        self._discarded.add(run)
        for key in [key for key in self._values if key[0] == run]:
            del self._values[key]

    def left(self, run: Any) -> list[Key]:
        """Returns the keys of a run that nobody took."""
        while self._file(0):
            pass
        return [key for key in self._values if key[0] == run]

    def close(self, error: BaseException) -> None:
        """Makes every wait, now and later, raise an error; the first one given stays."""
        if self._error is None:
            self._error = error
            self._inbox.put(_WAKE, None)

    def _file(self, timeout: float | None) -> bool:
        """Files the next arrival; returns whether there was one in time."""
        arrived = self._inbox.get(timeout)
        if arrived is None:
            return False
        key, value = arrived
        if key[0] not in self._discarded:
            assert key not in self._values, f"{key} was sent twice"
            self._values[key] = value
        return True


class Transport(Protocol):
    """Carries values to ranks."""

    def send(self, to: int, key: Key, value: Any) -> None:
        """Starts sending an object; raises Unreachable if an earlier one is known not to have arrived."""

    def give(self, to: int, key: Key, value: Any) -> None:
        """Hands over a value of a run, by the fastest way; only from the one thread that runs or submits batches.

        Tensors arrive as leaves of their own graph, with their strides and their place in a vector. Where the receiver
        could see the sender write to one, neither may.
        """

    def flush(self) -> None:
        """Waits until everything sent has arrived; raises Unreachable where something did not."""

    def read_clock(self, rank: int) -> tuple[str, float]:
        """Asks a rank for its clock, see `clocks.read_clock`, which it says at once, whatever it is doing."""


class ThreadTransport:
    """Carries values between threads of one process: a tensor's memory is shared, never copied."""

    def __init__(self, mailboxes: Sequence[Mailbox], controller: Mailbox):
        self._mailboxes = {**dict(enumerate(mailboxes)), CONTROLLER: controller}

    def send(self, to: int, key: Key, value: Any) -> None:
        """Puts an object into the other thread's mailbox."""
        self._mailboxes[to].put(key, value)

    def give(self, to: int, key: Key, value: Any) -> None:
        """Puts a value into the other thread's mailbox; see `Transport.give`."""
        self.send(to, key, cuda.handed_over(wire.detach(value)))

    def flush(self) -> None:
        """Does nothing: what was sent has arrived."""

    def read_clock(self, rank: int) -> tuple[str, float]:
        """Reads the clock of this process, which is that of all its threads."""
        return read_clock()
