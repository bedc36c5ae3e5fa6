"""All contenders for one number of stages, started once: Fleet."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks import load
from benchmarks.contenders import Lap, Modelpar, Torch, Unsplit
from benchmarks.hosts import Host, call_together
from benchmarks.tasks import Task
from modelpar.planning.plan import Plan

TRANSPORTS = ("rpc", "threads")
_MOST_STEPS = 100


class Fleet:
    """modelpar over RPC and over threads, torch's pipelines, and the unsplit model, waiting for their turns."""

    def __init__(self, num_ranks: int, *, unsplit: bool = True):
        self.num_ranks = num_ranks
        self._with_unsplit = unsplit
        self._exits = ExitStack()
        self._plans: Mapping[str, Plan] = {}
        self._seconds: dict[str, float] = {}
        """About how long a step takes, by contender."""
        self.unsplit_pieces: dict[str, int] = {}
        """Into how many pieces the unsplit model's batch is cut, by contender: as is faster for it."""

    def __enter__(self) -> Self:
        with ExitStack() as exits:
            store = Path(exits.enter_context(tempfile.TemporaryDirectory()), "store")
            start = exits.enter_context
            self.modelpar = {name: start(Host(partial(Modelpar, name, self.num_ranks))) for name in TRANSPORTS}
            ranks = range(self.num_ranks)
            self.torch = [start(Host(partial(Torch, rank, self.num_ranks, str(store)))) for rank in ranks]
            threads = {"unsplit 1 thread": 1, "unsplit all threads": os.cpu_count() or 1} if self._with_unsplit else {}
            self.unsplit = {name: start(Host(partial(Unsplit, count))) for name, count in threads.items()}
            self._exits = exits.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            for host in self._hosts():
                host.stop()
        self._exits.__exit__(kind, error, trace)

    def load(self, task: Task, plans: Mapping[str, Plan]) -> None:
        """Loads a task in all contenders, in place of the one before; `plans` are by schedule."""
        call_together(self._hosts(), "unload")
        self._plans = plans
        self._seconds = {}
        for schedule, plan in plans.items():
            for name, host in self.modelpar.items():
                self._seconds[f"{name} {schedule}"] = host.call("load", schedule, task, plan)
            arguments = schedule, task, plan.partition.bounds, schedule, plan.num_microbatches
            self._seconds[f"torch {schedule}"] = max(call_together(self.torch, "load", *arguments))
        for name, host in self.unsplit.items():
            self._seconds[name], self.unsplit_pieces[name] = host.call("load", "", task, plan.num_microbatches)

    def turns(self, seconds: float) -> dict[str, Callable[[], Lap]]:
        """Returns what each contender does in a round, by name: "rpc gpipe", "torch 1f1b", "unsplit 1 thread", …

        A turn lasts about so many seconds, and has one step more, which does not count.
        """
        turns: dict[str, Callable[[int], Lap]] = {}
        for schedule in self._plans:
            for name, host in self.modelpar.items():
                turns[f"{name} {schedule}"] = partial(host.call, "steps", schedule)
            turns[f"torch {schedule}"] = partial(self._torch_steps, schedule)
        for name, host in self.unsplit.items():
            turns[name] = partial(host.call, "steps", "")
        counts = {name: max(1, min(_MOST_STEPS, round(seconds / self._seconds[name]))) for name in turns}
        return {name: partial(turn, counts[name]) for name, turn in turns.items()}

    def cpu_seconds(self) -> dict[str, float]:
        """Returns the CPU time that each contender's processes have used so far; what loading used included."""
        return {name: sum(load.cpu_seconds(pid) for pid in pids) for name, pids in self.pids().items()}

    def pids(self) -> dict[str, list[int]]:
        """Returns each contender's processes; over RPC the ranks and their controller are told apart."""
        found = {name: load.tree(host.pid) for name, host in self.modelpar.items()}
        controller, *ranks = found.pop("rpc")
        found = {"rpc ranks": ranks, "rpc controller": [controller]} | found
        found["torch ranks"] = [host.pid for host in self.torch]
        return found | {name: [host.pid] for name, host in self.unsplit.items()}

    def _torch_steps(self, schedule: str, count: int) -> Lap:
        laps = call_together(self.torch, "steps", schedule, count)
        return Lap(tuple(max(ends) for ends in zip(*(lap.ends for lap in laps), strict=True)))

    def _hosts(self) -> list[Host]:
        return [*self.modelpar.values(), *self.torch, *self.unsplit.values()]
