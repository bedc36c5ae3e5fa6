"""How values reach a rank: Mailbox, Transport, and the transport between threads of one process.

Push, never pull: a sender puts a value into the mailbox of the rank that will need it; that rank's one executor takes
it out. Nothing else happens on arrival.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Condition
from time import monotonic
from typing import Any, Protocol

from modelpar.run import wire

CONTROLLER = -1
"""The address of the process that runs the user's code."""


class Unreachable(ConnectionError):
    """Reports a rank that a value did not reach, mostly because it has ended."""


class Mailbox:
    """Values by key, each put once and taken once. One thread takes; any thread puts."""

    def __init__(self, routes: dict[str, Callable[[Any, Any], None]] | None = None):
        self._values: dict[Any, Any] = {}
        self._changed = Condition()
        self._awaited: Any = None
        self._error: BaseException | None = None
        self._discarded: set[Any] = set()
        self._routes = routes or {}

    def put(self, key: tuple[Any, ...], value: Any) -> None:
        """Files a value, and wakes the taker if it waits for this key; a routed kind (its first item) is handed on."""
        if key[0] in self._routes:
            self._routes[key[0]](key, value)
            return
        with self._changed:
            if key[0] in self._discarded:
                return
            assert key not in self._values, f"{key} was sent twice"
            self._values[key] = value
            if key == self._awaited:
                self._changed.notify()

    def wait(self, key: tuple[Any, ...]) -> Any:
        """Takes a value out, waiting until it has arrived. Raises what `close` was given, if closed."""
        self.wait_for(key, None)
        with self._changed:
            if self._error is not None:
                raise self._error
            return self._values.pop(key)

    def wait_for(self, key: tuple[Any, ...], deadline: float | None) -> bool:
        """Waits until a value has arrived or the mailbox is closed; False where the deadline (monotonic) came first."""
        with self._changed:
            self._awaited = key
            left = None if deadline is None else max(0.0, deadline - monotonic())
            found = self._changed.wait_for(lambda: key in self._values or self._error is not None, left)
            self._awaited = None
            return found

    def has(self, key: tuple[Any, ...]) -> bool:
        """Tells whether a value has arrived, without taking it."""
        return key in self._values

    def discard(self, run: Any) -> None:
        """Drops all values of a run, also those still to come."""
        with self._changed:
            self._discarded.add(run)
            for key in [key for key in self._values if key[0] == run]:
                del self._values[key]

    def left(self, run: Any) -> list[tuple[Any, ...]]:
        """Returns the keys of a run that nobody took."""
        with self._changed:
            return [key for key in self._values if key[0] == run]

    def close(self, error: BaseException) -> None:
        """Makes every wait, now and later, raise an error; the first one given stays."""
        with self._changed:
            if self._error is None:
                self._error = error
            self._changed.notify_all()


class Transport(Protocol):
    """Carries values to ranks."""

    def pack(self, tree: Any) -> Any:
        """Returns a pytree of tensors as it should be sent; `wire.unpack` makes it whole on the other side."""

    def send(self, to: int, key: tuple[Any, ...], value: Any) -> None:
        """Starts sending a value; raises Unreachable if an earlier send is known to have failed."""

    def flush(self) -> None:
        """Waits until everything sent has arrived; raises Unreachable where something did not."""


class ThreadTransport:
    """Carries values between threads of one process: a tensor's memory is shared, never copied."""

    pack = staticmethod(wire.detach)

    def __init__(self, mailboxes: Sequence[Mailbox], controller: Mailbox):
        self._mailboxes = {**dict(enumerate(mailboxes)), CONTROLLER: controller}

    def send(self, to: int, key: tuple[Any, ...], value: Any) -> None:
        """Puts a value into the other thread's mailbox."""
        self._mailboxes[to].put(key, value)

    def flush(self) -> None:
        """Does nothing: what was sent has arrived."""
