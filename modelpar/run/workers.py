"""Processes or threads that serve ranks, started, supervised and stopped together: Workers."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from modelpar.errors import ConfigError, ModelparError, RunError, StepTimeout
from modelpar.planning.doing import Doing, silent
from modelpar.planning.timeline import Span
from modelpar.run import cuda, notices
from modelpar.run.clocks import Clocks
from modelpar.run.launch.base import Launch
from modelpar.run.launch.local import ProcessLaunch
from modelpar.run.launch.threads import ThreadLaunch
from modelpar.run.supervisor import Supervisor
from modelpar.run.transport import Key, Unreachable
from modelpar.run.worker import RUN

TRANSPORTS = ("rpc", "threads")

_log = logging.getLogger(__name__)


class Workers:
    """Ranks that pipelines run on; nothing of them outlives the `with` block.

    ::

        with Workers(2, transport="rpc") as workers, Pipeline(objective, plan, workers=workers) as pipeline:
            ...

    `transport="rpc"` starts one process per rank, which talk over torch.distributed.rpc; "threads" starts threads of
    this process. `heartbeat_timeout` (seconds) is how long a process may be silent; `step_timeout` how long one batch
    may take, by default any time. `port` is where processes meet on the loopback interface; 0 picks a free one.
    `shared_memory=False` sends the values of a run, too, as messages over RPC, as between hosts. `cuda_ipc=True` leaves
    CUDA tensors on the device on their way between processes, by CUDA's own sharing.

    `logs` is a folder, or a function that makes one when it is needed: each process then writes what it logs and prints
    to a file of its own there, rank0.log and so on; without one, prints go where those of this process go. Warnings of
    any rank are logged here, too, with its name. Processes take over the level of the logger "modelpar". `doing` is
    told how the start goes.

    Raises ConfigError for arguments that cannot be used, before anything is started.
    """

    def __init__(
        self,
        num_ranks: int,
        *,
        transport: str = "rpc",
        heartbeat_timeout: float = 60.0,
        step_timeout: float | None = None,
        port: int = 0,
        shared_memory: bool = True,
        cuda_ipc: bool = False,
        logs: str | Path | Callable[[], str | Path] | None = None,
        doing: Doing = silent,
    ):
        if num_ranks < 1:
            raise ConfigError(f"num_ranks is {num_ranks}; expected at least 1")
        if transport not in TRANSPORTS:
            raise ConfigError(f"transport is {transport!r}; expected one of {', '.join(TRANSPORTS)}")
        if heartbeat_timeout <= 0 or (step_timeout is not None and step_timeout <= 0):
            raise ConfigError(
                f"heartbeat_timeout is {heartbeat_timeout} and step_timeout {step_timeout}; expected seconds above 0"
            )
        if not 0 <= port <= 65535:
            raise ConfigError(f"port is {port}; expected 0 to 65535")
        if cuda_ipc and transport == "rpc" and (reason := cuda.why_not_shared()):
            raise ConfigError(f"cuda_ipc cannot be used: {reason}; expected cuda_ipc=False, or other memory settings")
        self.num_ranks = num_ranks
        self._kind, self._port, self._shared_memory, self._cuda_ipc = transport, port, shared_memory, cuda_ipc
        self._heartbeat_timeout, self._step_timeout = heartbeat_timeout, step_timeout
        self._logs, self._doing = logs, doing
        self._on_progress = _nobody
        self._launch: Launch | None = None
        self._commands = [itertools.count() for _ in range(num_ranks)]
        self._numbers = itertools.count()
        self._clocks = Clocks(num_ranks)
        self._supervisor = Supervisor(num_ranks, heartbeat_timeout, self._on_error)
        self._error: ModelparError | None = None
        self._routes = {"heartbeat": self._supervisor.heartbeat, "failure": self._supervisor.failure}
        self._routes |= {"notice": notices.say, "progress": lambda _, progress: self._on_progress(*progress)}

    def __enter__(self) -> Self:
        """Starts the ranks; raises ConfigError where the port is in use, StartError where a process does not start."""
        if self._launch is not None:
            raise RunError("these workers were started before; expected a new Workers for each `with` block")
        begun = time.perf_counter()
        if self._kind == "threads":
            self._launch = ThreadLaunch(self.num_ranks, self._routes)
        else:
            beat = min(1.0, self._heartbeat_timeout / 4, (self._step_timeout or 4.0) / 4)
            logs = self._logs() if callable(self._logs) else self._logs
            how = {"shared_memory": self._shared_memory, "cuda_ipc": self._cuda_ipc}
            how |= {"logs": None if logs is None else Path(logs), "doing": self._doing}
            self._launch = ProcessLaunch(self.num_ranks, self._routes, self._port, beat, **how)
        self._supervisor.watch(self._launch)
        _log.debug("%d ranks over %s started in %.1f s", self.num_ranks, self._kind, time.perf_counter() - begun)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stops the ranks: in order, or at once where the block was left by an exception."""
        self._supervisor.stop()
        assert self._launch
        if self._error is None:
            if error is None:
                for rank in range(self.num_ranks):
                    self.command(rank, "stop")
                self._launch.stop()
            else:
                self._launch.kill()
            self._error = RunError("these workers were stopped; expected to be used inside their `with` block")
        self._launch.close()

    @property
    def generators(self) -> AbstractContextManager[Any]:
        """Keeps the random generators of this process from ranks that are threads of it."""
        return getattr(self._running, "lock", None) or nullcontext()

    def next_number(self) -> int:
        """Returns a number never returned before, to name a run or a pipeline."""
        return next(self._numbers)

    def command(self, rank: int, name: str, **arguments: Any) -> tuple[int, int]:
        """Gives a rank something to do after what it was given before; returns a ticket for `wait_replies`."""
        number = next(self._commands[rank])
        transport = self._running.transport
        way = transport.give if name == RUN else transport.send  # any other may hold a whole model
        self._deliver(way, rank, ("command", number), (name, arguments))
        return rank, number

    def give(self, rank: int, key: Key, value: Any) -> None:
        """Hands a value of a run to a rank."""
        self._deliver(self._running.transport.give, rank, key, value)

    def wait(self, key: Key) -> Any:
        """Waits for a value sent to the controller; raises what ended the workers, if something does."""
        return self._running.mailbox.wait(key)

    def wait_replies(
        self,
        tickets: list[tuple[int, int]],
        *,
        step: bool = False,
        progress: Callable[[float, float | None], None] | None = None,
    ) -> list[Any]:
        """Waits for replies; a step may take step_timeout, then StepTimeout says what every rank waits for.

        `progress` is called with what ranks report meanwhile, from any thread.
        """
        self._on_progress = progress or _nobody
        try:
            return self._replies(tickets, step)
        finally:
            self._on_progress = _nobody

    def _replies(self, tickets: list[tuple[int, int]], step: bool) -> list[Any]:
        limit = self._step_timeout if step else None
        deadline = None if limit is None else time.monotonic() + limit
        replies = []
        for ticket in tickets:
            if not self._running.mailbox.wait_for(("reply", *ticket), deadline):
                statuses = "; ".join(self._supervisor.statuses())
                self._supervisor.fail(
                    StepTimeout(f"no reply after step_timeout = {self._step_timeout:g} s: {statuses}")
                )
            replies.append(self._running.mailbox.wait(("reply", *ticket)))
        return replies

    def compare_clocks(self) -> None:
        """Compares the ranks' clocks with the controller's where they differ, at most once a second."""
        running = self._running
        self._reach(lambda: self._clocks.compare(running.transport.read_clock))

    def on_one_clock(self, spans: Iterable[Span]) -> tuple[list[Span], float]:
        """Returns ranks' spans by the controller's clock, and by how many seconds they may be off; see `Clocks`."""
        return self._clocks.shift(spans)

    def fail(self, error: ModelparError) -> None:
        """Ends all ranks; every wait raises the error."""
        self._supervisor.fail(error)

    @property
    def _running(self) -> Launch:
        """The started ranks. Raises the error that ended them, or RunError where they do not run."""
        if self._error is not None:
            raise self._error
        if self._launch is None:
            raise RunError("the workers do not run; expected to be used inside `with Workers(...) as workers:`")
        return self._launch

    def _deliver(self, way: Callable[[int, Key, Any], None], rank: int, key: Key, value: Any) -> None:
        """Sends something."""
        self._reach(lambda: way(rank, key, value))

    def _reach(self, call: Callable[[], None]) -> None:
        """Does what needs a rank, or raises why it cannot be reached: the supervisor is about to find out."""
        mailbox = self._running.mailbox
        try:
            call()
        except Unreachable as error:
            mailbox.wait(("never",))
            raise AssertionError from error

    def _on_error(self, error: ModelparError) -> None:
        self._error = error
        assert self._launch
        self._launch.mailbox.close(error)


def _nobody(done: float, total: float | None) -> None:
    """Is told of progress that nobody asked for."""
