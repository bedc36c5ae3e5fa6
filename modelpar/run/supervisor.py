"""Watches the ranks and decides what went wrong first: Supervisor."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event, Thread
from typing import Any

from modelpar.errors import ModelparError, StageError, WorkerLost
from modelpar.run.launch.base import Launch
from modelpar.run.worker import Failure

_POLL_SECONDS = 0.05
_ECHO_SECONDS = 0.5
"""How long a failure that looks like an echo waits for the cause to show up."""


class Supervisor:
    """Turns lost processes, silence and reported failures into one error, the first cause, and ends all ranks.

    Everything is decided on one thread of its own, which calls `on_error` once, with the error, after it has killed the
    ranks; reports only leave notes for it.
    """

    def __init__(self, num_ranks: int, heartbeat_timeout: float, on_error: Callable[[ModelparError], None]):
        self._num_ranks = num_ranks
        self._timeout = heartbeat_timeout
        self._on_error = on_error
        self._launch: Launch | None = None
        self._cause: ModelparError | None = None
        self._echo: tuple[float, ModelparError] | None = None
        self._beats: dict[int, float] = {}
        self._statuses: dict[int, str] = {}
        self._stopped = False
        self._wake = Event()
        self._thread = Thread(target=self._watch, name="modelpar-supervisor", daemon=True)

    def watch(self, launch: Launch) -> None:
        """Starts watching."""
        self._launch = launch
        self._thread.start()

    def stop(self) -> None:
        """Stops watching."""
        self._stopped = True
        self._wake.set()
        self._thread.join()

    def heartbeat(self, key: Any, status: str) -> None:
        """Notes a sign of life."""
        self._beats[key[1]] = time.monotonic()
        self._statuses[key[1]] = status

    def failure(self, _: Any, failure: Failure) -> None:
        """Notes what a rank reports."""
        where = f" ({failure.where})" if failure.where else ""
        message = f"rank {failure.rank} failed{where}: {failure.what}\n\n{failure.traceback.rstrip()}"
        if failure.secondary:
            self._echo = self._echo or (time.monotonic(), WorkerLost(message))
        else:
            self.fail(StageError(message))

    def fail(self, error: ModelparError) -> None:
        """Has all ranks ended for this reason, unless there was an earlier one."""
        self._cause = self._cause or error
        self._wake.set()

    def statuses(self) -> list[str]:
        """Says, per rank, what it is doing as far as known."""
        assert self._launch
        found = [self._launch.status(rank) or self._statuses.get(rank, "is silent") for rank in range(self._num_ranks)]
        return [f"rank {rank} {status}" for rank, status in enumerate(found)]

    def _watch(self) -> None:
        assert self._launch
        last = time.monotonic()
        while self._cause is None:
            self._wake.wait(_POLL_SECONDS)
            if self._stopped:
                return
            now = time.monotonic()
            if now - last > 1:  # this process itself was stopped, so the silence was not theirs
                self._beats = {rank: beat + now - last for rank, beat in self._beats.items()}
            last = now
            self._cause = self._cause or self._look(now)
        self._launch.kill()
        self._on_error(self._cause)

    def _look(self, now: float) -> ModelparError | None:
        """Returns what is wrong now, if anything is."""
        assert self._launch
        for rank, how in self._launch.lost().items():
            return WorkerLost(f"the process of rank {rank} {how}; {self._last_words(rank)}")
        for rank, beat in self._beats.items():
            if now - beat > self._timeout:
                limit = f"more than heartbeat_timeout = {self._timeout:g} s"
                return WorkerLost(
                    f"rank {rank} has been silent for {now - beat:.1f} s, {limit}; {self._last_words(rank)}"
                )
        return self._echo[1] if self._echo and now - self._echo[0] > _ECHO_SECONDS else None

    def _last_words(self, rank: int) -> str:
        said = f"it last said that it {self._statuses[rank]}" if rank in self._statuses else "it never said anything"
        log = self._launch.log(rank) if self._launch else None
        return f"{said}; its log is {log}" if log else said
