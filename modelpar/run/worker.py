"""One rank: waits for commands, does them one after the other, replies. The same in a thread and in a process."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch

from modelpar.capture.cut import StageProgram
from modelpar.capture.deferred import materialize
from modelpar.planning.plan import Plan
from modelpar.run import cuda, wire
from modelpar.run.exchange import Exchange
from modelpar.run.executor import Executor
from modelpar.run.memory import PeakMemory, keep_freed_memory
from modelpar.run.numerics import Numerics
from modelpar.run.stage_runner import RunContext, StageRunner
from modelpar.run.sweep import SweepResult, SweepWork, sweep
from modelpar.run.transport import CONTROLLER, Mailbox, Transport, Unreachable
from modelpar.run.update import Settings, Update

RUN = "run"
"""The command to run a batch: it and its reply take the way of the values."""


_log = logging.getLogger(__name__)


class Closed(Exception):
    """Ends a rank's thread: its mailbox was closed."""


@dataclass(frozen=True)
class Failure:
    """What went wrong on a rank, as text: an exception may not survive the way to the controller."""

    rank: int
    what: str
    """One line."""
    where: str
    """Stage, layer, action and micro-batch, as far as known."""
    traceback: str
    secondary: bool
    """Whether it is likely only the echo of another rank's failure, such as a closed connection."""


class Worker:
    """One rank's state: the pipelines it has a part of."""

    def __init__(self, rank: int, mailbox: Mailbox, transport: Transport, lock: Any = None):
        self.rank = rank
        self._mailbox, self._transport = mailbox, transport
        self._random_lock = lock
        """A lock for the random generators where several ranks share this process and so them; else None."""
        self._executors: dict[int, Executor] = {}
        self._active: Executor | None = None
        if lock is None:
            keep_freed_memory()

    def serve(self) -> bool:
        """Does commands until told to stop, then returns True; reports a failure, then returns False."""
        commands: dict[str, Callable[..., Any]] = {
            "load": self._load,
            "unload": self._unload,
            "learn": self._learn,
            RUN: self._run,
            "sweep": self._sweep,
            "take_gradients": lambda pipeline: self._executors[pipeline].take_gradients(),
            "state_dict": lambda pipeline: self._executors[pipeline].state_dict(),
            "load_state_dict": lambda pipeline, state: self._executors[pipeline].load_state_dict(state),
        }
        number = 0
        try:
            while True:
                name, arguments = self._mailbox.wait(("command", number))
                if name != RUN:
                    _log.debug("is told to %s", name)
                if name == "stop":
                    return True
                reply = commands[name](**arguments)
                way = self._transport.give if name == RUN else self._transport.send
                way(CONTROLLER, ("reply", self.rank, number), reply)
                self._transport.flush()
                number += 1
        except Closed:
            return False
        except BaseException as error:
            with suppress(Unreachable):  # the controller is gone, and soon this process
                self._transport.send(CONTROLLER, ("failure", self.rank), self._describe(error))
            return False

    def status(self) -> str:
        """Says what the rank is doing, for messages to people."""
        action, key = self._active.doing if self._active else (None, None)
        if action is None:
            return "is between steps"
        return f"runs {action}" if key is None else f"has {action} pending and waits for {key}"

    def _load(self, pipeline: int, setup: wire.Parcel, programs: list[wire.Parcel]) -> None:
        plan, settings, numerics = cast(tuple[Plan, Settings, Numerics], wire.receive(setup))
        numerics.apply()
        devices = [cuda.resolve(name) for name in plan.cluster.devices]
        device = devices[self.rank]
        cuda.use(device)
        alone = self._random_lock is None or (device.type == "cuda" and devices.count(device) == 1)
        memory = _memory(device, alone, programs)
        runners = {}
        for parcel in programs:
            program: StageProgram = wire.receive(parcel)
            self._make(program)
            runners[program.stage] = StageRunner(program, settings.seed, device, self._random_lock)
            first, last = program.layers[0], program.layers[-1]
            _log.info("has stage %d, %s … %s, on %s", program.stage, first, last, device)
        exchange = Exchange(self.rank, plan.schedule.stage_to_rank, self._mailbox, self._transport, device)
        update = Update(plan, settings, runners, exchange)
        self._executors[pipeline] = Executor(plan, runners, exchange, update, memory)

    def _learn(self, pipeline: int, recording: wire.Parcel) -> None:
        self._executors[pipeline].learn(*wire.receive(recording))

    def _unload(self, pipeline: int) -> None:
        self._active = None
        del self._executors[pipeline]

    def _run(self, pipeline: int, run: int, context: RunContext, data_wait: float) -> dict[str, Any]:
        self._active = self._executors[pipeline]
        return self._active.run(run, context, data_wait)

    def _sweep(self, setup: wire.Parcel, programs: list[wire.Parcel], device: str) -> SweepResult:
        place = cuda.resolve(device)
        cuda.use(place)
        work: SweepWork = wire.receive(setup)
        received: list[StageProgram] = [wire.receive(parcel) for parcel in programs]
        for program in received:
            self._make(program)
        alone = self._random_lock is None
        _log.info("times %d runs of layers", len(received) - 1)
        progress = self._report_progress if self.rank == 0 else None
        return sweep(work, received, place, self._random_lock, lambda: _memory(place, alone, programs), progress)

    def _report_progress(self, done: float, total: float) -> None:
        self._transport.send(CONTROLLER, ("progress", self.rank), (done, total))

    def _make(self, program: StageProgram) -> None:
        """Makes what is not there of a stage: it may draw from the generators."""
        with self._random_lock or nullcontext():
            materialize(program.module)

    def _describe(self, error: BaseException) -> Failure:
        try:
            return self._failure(error)
        except Exception as second:  # such as an exception that cannot say what it is
            what = f"{type(error).__name__}, which could not be described ({type(second).__name__})"
            return Failure(self.rank, what, "", "".join(traceback.format_tb(error.__traceback__)), False)

    def _failure(self, error: BaseException) -> Failure:
        where = []
        executor = self._active
        action = executor.doing[0] if executor else None
        if executor and action:
            where.append(executor.describe(action, error))
        text = "".join(traceback.format_exception(error))
        secondary = isinstance(error, Unreachable)
        if self._random_lock is None:  # among threads the controller, which raises it, is the same process
            _log.info("failed: %s", text.rstrip())
        return Failure(self.rank, f"{type(error).__name__}: {error}", ", ".join(where), text, secondary)


def _memory(device: torch.device, alone: bool, parcels: list[wire.Parcel]) -> PeakMemory:
    tensors = [tensor for parcel in parcels for tensor in parcel.tensors if tensor is not None]
    received = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    return PeakMemory(device, alone, received)
