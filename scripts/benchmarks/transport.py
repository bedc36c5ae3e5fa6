"""The way from one process to another: modelpar's, raw RPC and gloo, from 1 KB to 64 MB."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import rpc

from benchmarks import stats, tasks
from benchmarks.contenders import Contender, Modelpar
from benchmarks.hosts import Host, call_together
from benchmarks.markdown import table
from benchmarks.options import Options
from benchmarks.rounds import interleave

SIZES = tuple(1024 * 4**i for i in range(6)) + tuple(2**20 * i for i in (2, 8, 32, 64))
QUICK_SIZES = (1024, 2**20, 2**23, 2**25)
PAUSE_SECONDS = 0.002
"""What a sender waits before each message, so that the receiver waits already."""

TEXT = """\
One way, in milliseconds, to a receiver that waits; in brackets quartiles, then GB/s of the median. *modelpar*: from the
end of the forward that makes the value to the beginning of the one that uses it, in a pipeline of two stages with
nothing else in it, over RPC. *raw RPC*: from the call of `rpc_async` (uv, cma) to the start of the function that
it calls. *gloo*: from the call of `send` to the return of `recv`."""


class RawRpc(Contender):
    """One of two processes that call each other over TensorPipe as modelpar sets it up, with nothing around it."""

    def __init__(self, rank: int, store: str):
        self._left = False
        options = rpc.TensorPipeRpcBackendOptions(
            num_worker_threads=4, init_method=f"file://{store}", _transports=["uv"], _channels=["cma", "basic"]
        )
        os.environ.update(TP_SOCKET_IFNAME="lo", GLOO_SOCKET_IFNAME="lo")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[Gg]loo.*")
            rpc.init_rpc(f"rank{rank}", rank=rank, world_size=2, rpc_backend_options=options)

    def one_way(self, num_bytes: int, count: int) -> list[float]:
        """Sends new tensors to rank 1; returns the seconds each took, without the first."""
        found = []
        for _ in range(1 + count):
            tensor = torch.ones(num_bytes // 4)
            sleep(PAUSE_SECONDS)
            start = perf_counter()
            found.append(rpc.rpc_async("rank1", _arrived, (tensor,)).wait() - start)
        return found[1:]

    def leave(self) -> None:
        """Leaves together with the other."""
        rpc.shutdown()
        self._left = True

    def close(self) -> None:
        """Leaves without waiting for the other, unless both have left."""
        if not self._left:
            rpc.shutdown(graceful=False)


def _arrived(_: torch.Tensor) -> float:
    return perf_counter()


class Gloo(Contender):
    """One of two processes that send and receive over gloo."""

    def __init__(self, rank: int, store: str):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        self._rank = rank
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=timedelta(seconds=120)
        )

    def one_way(self, num_bytes: int, count: int) -> list[float]:
        """Sends (rank 0, which returns when) or receives (rank 1, which returns when), without the first."""
        answer = torch.zeros(1)
        found = []
        for _ in range(1 + count):
            tensor = torch.ones(num_bytes // 4)
            if self._rank == 0:
                sleep(PAUSE_SECONDS)
                found.append(perf_counter())
                dist.send(tensor, 1)
                dist.recv(answer, 1)
            else:
                dist.recv(tensor, 0)
                found.append(perf_counter())
                dist.send(answer, 0)
        return found[1:]

    def close(self) -> None:
        """Leaves the group."""
        dist.destroy_process_group()


def run(options: Options) -> str:
    """Measures all sizes; returns a table."""
    rows = []
    with ExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory()))
        raw = [exits.enter_context(Host(partial(RawRpc, rank, str(folder / "rpc")))) for rank in range(2)]
        gloo = [exits.enter_context(Host(partial(Gloo, rank, str(folder / "gloo")))) for rank in range(2)]
        modelpar = exits.enter_context(Host(partial(Modelpar, "rpc", 2)))
        for num_bytes in QUICK_SIZES if options.quick else SIZES:
            options.say(f"transport: {_size(num_bytes)}")
            task = partial(tasks.hand_off, num_bytes)
            modelpar.call("unload")
            modelpar.call("load", "", task, tasks.plans(task, 2, 1, profile="flops")["gpipe"])
            turns: dict[str, Callable[[], float]] = {
                "modelpar": lambda: median(_modelpar_one_way(modelpar, 5)),
                "raw RPC": lambda num_bytes=num_bytes: median(raw[0].call("one_way", num_bytes, 5)),
                "gloo": lambda num_bytes=num_bytes: median(_gloo_one_way(gloo, num_bytes, 5)),
            }
            rounds = interleave(turns, options.rounds(full=30, quick=4), options.most_seconds)
            cells = [_cell(rounds.summary(lambda values, name=name: values[name]), num_bytes) for name in turns]
            versus = [
                stats.text(rounds.summary(lambda values, name=name: values["modelpar"] / values[name]))
                for name in ("raw RPC", "gloo")
            ]
            rows.append([_size(num_bytes), *cells, *versus, rounds.note])
        call_together(raw, "leave")
    head = ["size", "modelpar", "raw RPC", "gloo", "modelpar / raw RPC", "modelpar / gloo", "rounds"]
    return f"{TEXT}\n\n{table(head, rows)}"


def _modelpar_one_way(host: Host, count: int) -> list[float]:
    found = []
    for timeline in host.call("single_steps", "", count).timelines:
        made, used = (
            next(span for span in timeline.of_rank(rank) if span.kind == "F") for rank in range(timeline.num_ranks)
        )
        found.append(used.start - made.end)
    return found


def _gloo_one_way(hosts: list[Host], *arguments: Any) -> list[float]:
    sent, received = call_together(hosts, "one_way", *arguments)
    return [end - start for start, end in zip(sent, received, strict=True)]


def _cell(summary: stats.Summary | None, num_bytes: int) -> str:
    if summary is None:
        return "–"
    return f"{summary.text(2, 1e3)}, {num_bytes / summary.median / 1e9:.2f} GB/s"


def _size(num_bytes: int) -> str:
    return f"{num_bytes // 1024} KB" if num_bytes < 2**20 else f"{num_bytes // 2**20} MB"
