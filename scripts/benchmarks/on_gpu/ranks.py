"""Ranks on the devices there are: Ranks, which starts workers again after a failure; and where each rank is."""

from __future__ import annotations

import sys
from contextlib import ExitStack, suppress
from time import perf_counter
from typing import Any

import torch

from modelpar.errors import ModelparError
from modelpar.run.workers import Workers

WAYS: dict[str, dict[str, Any]] = {
    "threads": {"transport": "threads"},
    "rpc": {"transport": "rpc"},
    "cuda_ipc": {"transport": "rpc", "cuda_ipc": True},
}
"""How values go from rank to rank: between threads, through host memory, by CUDA's own sharing."""


def places(device: str, num_ranks: int) -> list[str]:
    """Returns a device per rank: all there are in turn, so that one may have several ranks."""
    if device == "cpu":
        return ["cpu"] * num_ranks
    return [f"cuda:{rank % torch.cuda.device_count()}" for rank in range(num_ranks)]


def synchronize(device: str) -> None:
    """Waits until a device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


_BEGUN = perf_counter()


def tell(what: str) -> None:
    """Prints what begins, and how long this process has run."""
    print(f"gpu_check:   + {perf_counter() - _BEGUN:5.1f} s  {what}", file=sys.stderr, flush=True)


class Told:
    """Prints what goes on while a plan is made, each thing once."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, what: str, done: float = 0, total: float | None = None) -> None:
        """Is told what goes on."""
        if what != self._last:
            tell(f"  {what}")
            self._last = what


def one_line(error: BaseException) -> str:
    """Returns what an exception says, in a line, and prints all of it."""
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


class Ranks:
    """Workers that are started when first asked for, and again after `drop`."""

    def __init__(self, way: str, num_ranks: int):
        self._num_ranks, self.how = num_ranks, WAYS[way]
        self._exits, self._workers = ExitStack(), None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()

    def get(self) -> Workers:
        """Returns running workers."""
        if self._workers is None:
            self._workers = self._exits.enter_context(Workers(self._num_ranks, **self.how))
        return self._workers

    def drop(self) -> None:
        """Ends them, in whatever state they are."""
        with suppress(ModelparError):
            self._exits.close()
        self._exits, self._workers = ExitStack(), None
