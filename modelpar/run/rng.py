"""Random numbers that do not depend on the split: keys, and the hooks that set them.

A module that draws gets a seed made of (seed, step, micro-batch, its FQN, how often it was called for this
micro-batch). Neither rank nor stage enters, so the split model draws exactly what the unsplit one draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from modelpar.errors import RunError

EVALUATION = -1
"""The step number of evaluation and prediction, so that they share no key with training."""


def random_key(seed: int, step: int, microbatch: int, name: str, call: int) -> int:
    """Returns the seed of one call of one module, as 63 bits of a BLAKE2 hash."""
    text = f"{seed}/{step}/{microbatch}/{name}/{call}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


class KeyedRandom:
    """Seeds the given submodules of a module before each of their calls, and restores the generators afterwards.

    In a process of their own the ranks need no lock; ranks that are threads of one process share its generators, so a
    module that draws holds the lock while it runs. On CUDA a kernel takes its place in the generator's sequence when it
    is started, not when it runs.
    """

    def __init__(self, module: nn.Module, names: Iterable[str], seed: int, device: torch.device, lock: Any = None):
        self._seed = seed
        self._step = self._microbatch = 0
        self._calls: dict[str, int] = {}
        self._saved: list[list[Tensor]] = []
        self._forward = False
        self._lock = lock or RLock()
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            torch.cuda.init()
            self._generators.append(torch.cuda.default_generators[device.index or 0])
        self._module, self._names, self._handles = module, frozenset[str](), list[Any]()
        self.attach(frozenset(filter(None, names)))

    def attach(self, names: frozenset[str]) -> None:
        """Seeds these submodules from now on, and no others: a hook alone makes some of torch's compute otherwise."""
        if names == self._names:
            return
        while self._handles:
            self._handles.pop().remove()
        for name in names:
            drawing = self._module.get_submodule(name)
            self._handles.append(drawing.register_forward_pre_hook(self._before(name), prepend=True))
            self._handles.append(drawing.register_forward_hook(self._after, always_call=True))
        self._names = names

    @contextmanager
    def microbatch(
        self, step: int, microbatch: int, calls: Mapping[str, tuple[int, int]] = MappingProxyType({})
    ) -> Iterator[None]:
        """Keys what is drawn inside for a micro-batch, whose call numbers count from 0.

        `calls` are the modules that other stages call as well: how often those before this one do, and this one. Raises
        RunError where this one does not, since the others could not know.
        """
        self._step, self._microbatch, self._forward = step, microbatch, True
        self._calls = {name: before for name, (before, _) in calls.items()}
        try:
            yield
        finally:
            self._forward = False
        for name, (before, here) in calls.items():
            if self._calls[name] != before + here:
                raise RunError(
                    f"{name} was called {self._calls[name] - before} times, and {here} times when the model was "
                    "captured, but other stages call it too, and it draws random numbers; expected a module of its own "
                    "for each use"
                )

    @contextmanager
    def own(self, name: str, call: int, before: Sequence[Tensor] | None) -> Iterator[list[Tensor]]:
        """Lets code draw that no hook can see: a piece of a module's forward, in one of its calls.

        `before` is the state in which the piece before it left the generators; yields a list for that of this piece.
        """
        left: list[Tensor] = []
        with self._lock:
            outside = self.states()
            if before:
                self._set([state.cpu() for state in before])
            else:
                key = random_key(self._seed, self._step, self._microbatch, name, call)
                for generator in self._generators:
                    generator.manual_seed(key)
            try:
                yield left
            finally:
                left += self.states()
                self._set(outside)

    def states(self) -> list[Tensor]:
        """Returns the states of the generators."""
        return [generator.get_state() for generator in self._generators]

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, _: Any) -> None:
            if not self._forward:
                raise RunError(
                    f"{name} drew random numbers outside of forward, as recomputation in backward does (checkpoint); "
                    "they would not be those of forward; expected modules that draw not to be recomputed"
                )
            self._lock.acquire()
            call = self._calls.get(name, 0)
            self._calls[name] = call + 1
            self._saved.append(self.states())
            key = random_key(self._seed, self._step, self._microbatch, name, call)
            for generator in self._generators:
                generator.manual_seed(key)

        return hook

    def _after(self, *_: Any) -> None:
        if not self._saved:  # refused before it began
            return
        self._set(self._saved.pop())
        self._lock.release()

    def _set(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)
