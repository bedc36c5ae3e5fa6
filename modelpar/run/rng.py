"""Random numbers that do not depend on the split: keys, and the hooks that set them.

A module that draws gets a seed made of (seed, step, micro-batch, its FQN, how often it was called for this
micro-batch). Neither rank nor stage enters, so the split model draws exactly what the unsplit one draws.

Code that backward runs once more, as `torch.utils.checkpoint` does, has to draw what it drew in forward. Such code puts
the generator back to the state it had before. So that state says where in which micro-batch it was: its initial seed,
which nothing is drawn from, is a mark.

::

    generator   │ mark 0 │  key of a, 0  │ mark 1 │  key of b, 0  │ mark 2 │  key of a, 1  │ mark 3
    forward     │        │ a draws       │        │ b draws       │        │ a draws       │
    backward                             │ put back to mark 1: b is call 0, then a is call 1
"""

from __future__ import annotations

import ctypes
import hashlib
import secrets
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from threading import RLock, get_ident
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from modelpar.errors import RunError

EVALUATION = -1
"""The step number of evaluation and prediction, so that they share no key with training."""

_PLACE_BITS = 20


def random_key(seed: int, step: int, microbatch: int, name: str, call: int) -> int:
    """Returns the seed of one call of one module, as 63 bits of a BLAKE2 hash."""
    text = f"{seed}/{step}/{microbatch}/{name}/{call}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


class _Calls:
    """The calls of modules that draw in one micro-batch's forward, in order, and the marks between them."""

    def __init__(self, step: int, microbatch: int, before: dict[str, int]):
        self.step, self.microbatch, self._before = step, microbatch, before
        self.number = secrets.randbits(62 - _PLACE_BITS)
        self._places: dict[str, list[int]] = {}
        self._length = 0

    def mark(self, place: int | None = None) -> int:
        """Returns the mark of a place between calls, at first of that behind the last one."""
        return self.number << _PLACE_BITS | (self._length if place is None else place)

    def add(self, name: str) -> None:
        """Notes a call behind the last one."""
        self._places.setdefault(name, []).append(self._length)
        self._length += 1

    def call(self, name: str, mark: int) -> int:
        """Returns how often a module was called before a place, also by other stages."""
        place = mark & (1 << _PLACE_BITS) - 1
        return self._before.get(name, 0) + bisect_left(self._places.get(name, ()), place)

    def is_end(self, mark: int) -> bool:
        """Tells whether a mark is that behind the last call."""
        return mark == self.mark()


class KeyedRandom:
    """Seeds the given submodules of a module before each of their calls, and restores the generators afterwards.

    In a process of their own the ranks need no lock. Ranks that are threads of one process share its generators, so a
    module that draws holds the lock while it runs; and where backward runs code once more, the stage holds it for all
    of a forward and of a backward, since marks are in the generator between calls as well. On CUDA a kernel takes its
    place in the generator's sequence when it is started, not when it runs.
    """

    def __init__(self, module: nn.Module, names: Iterable[str], seed: int, device: torch.device, lock: Any = None):
        self._seed = seed
        self._current: _Calls | None = None
        """Of the micro-batch whose forward runs."""
        self._known: dict[int, _Calls] = {}
        """Of the current step, by number."""
        self._saved: list[tuple[list[Tensor], _Calls, int] | None] = []
        """Of the calls under way: the states before, the micro-batch, and the mark behind where nothing is called."""
        self._lock, self._is_shared = lock or RLock(), lock is not None
        self._holds = False
        """Whether the generators are held: then they bear marks."""
        self.has_strayed = False
        """Whether something drew in the last micro-batch that has no key. Threads cannot know: others draw, too."""
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
        self,
        step: int,
        microbatch: int,
        calls: Mapping[str, tuple[int, int]] = MappingProxyType({}),
        recomputes: bool = True,
    ) -> Iterator[None]:
        """Keys what is drawn inside for a micro-batch, whose call numbers count from 0.

        `calls` are the modules that other stages call as well: how often those before this one do, and this one. Raises
        RunError where this one does not, since the others could not know. `recomputes` tells whether backward may run
        parts of it once more.
        """
        known = [of for of in self._known.values() if of.step == step and of.microbatch != microbatch]
        of = _Calls(step, microbatch, {name: before for name, (before, _) in calls.items()})
        self._known = {each.number: each for each in (*known, of)}
        self.has_strayed = False
        with self.held(recomputes):
            states = self.states() if self._holds else []
            if states:
                self._mark(self.states(), of.mark())
            self._current = of
            try:
                yield
            finally:
                self._current = None
                if states:
                    bare = self.states()
                    _write(bare[0], _read(states[0]))
                    self.has_strayed = not self._is_shared and not all(map(torch.equal, states, bare))
                    self._set(states)
        for name, (before, here) in calls.items():
            if (found := of.call(name, -1)) != before + here:
                raise RunError(
                    f"{name} was called {found - before} times, and {here} times when the model was captured, but "
                    "other stages call it too, and it draws random numbers; expected a module of its own for each use"
                )

    @contextmanager
    def held(self, recomputes: bool = True) -> Iterator[None]:
        """Keeps the generators of a process from its other ranks, for code that is run once more, or will be."""
        with self._lock if recomputes or not self._is_shared else nullcontext():
            self._holds = recomputes or not self._is_shared
            try:
                yield
            finally:
                self._holds = False

    @contextmanager
    def own(self, name: str, call: int, before: Sequence[Tensor] | None) -> Iterator[list[Tensor]]:
        """Lets code draw that no hook can see: a piece of a module's forward, in one of its calls.

        `before` is the state in which the piece before it left the generators; yields a list for that of this piece.
        """
        assert self._current
        left: list[Tensor] = []
        with self._lock:
            outside = self.states()
            if before:
                self._set([state.cpu() for state in before])
            else:
                key = random_key(self._seed, self._current.step, self._current.microbatch, name, call)
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
        def hook(*_: Any) -> None:
            self._saved.append(None)  # until the call may begin
            of, mark = self._place(name)
            if not self._holds:
                self._lock.acquire()
            self._saved[-1] = self.states(), of, mark + 1
            key = random_key(self._seed, of.step, of.microbatch, name, of.call(name, mark))
            if of is self._current and of.is_end(mark):
                of.add(name)
            for generator in self._generators:
                generator.manual_seed(key)
            if self._holds:
                self._mark(self.states(), mark + 1)

        return hook

    def _after(self, *_: Any) -> None:
        saved = self._saved.pop()
        if saved is None:  # refused before it began
            return
        states, of, behind = saved
        if not self._holds:
            self._set(states)
            self._lock.release()
            return
        mark = torch.default_generator.initial_seed()
        if mark >> _PLACE_BITS != of.number:  # the module has seeded it
            mark = of.mark() if of is self._current else behind
        self._mark(states, mark)

    def _place(self, name: str) -> tuple[_Calls, int]:
        """Returns the micro-batch that a module is called for, and the mark of the place in it."""
        mark = torch.default_generator.initial_seed()
        of = self._known.get(mark >> _PLACE_BITS) if self._holds else None
        if of is None and self._current:
            return self._current, self._current.mark()
        if of is None:
            raise RunError(
                f"{name} drew random numbers outside of forward, and not in a recomputation that began with the random "
                "state of forward; they would not be those of forward; expected checkpoints to keep "
                "preserve_rng_state=True, and modules that draw to be called in forward only"
            )
        return of, mark

    def _mark(self, states: list[Tensor], mark: int) -> None:
        """Sets states, the first of which bears a mark."""
        _write(states[0], mark)
        self._set(states)

    def _set(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)


def _write(state: Tensor, mark: int) -> None:
    """Writes the initial seed of the CPU's generator into a state of it: its first eight bytes."""
    ctypes.c_uint64.from_address(state.data_ptr()).value = mark


def _read(state: Tensor) -> int:
    return ctypes.c_uint64.from_address(state.data_ptr()).value


@contextmanager
def watched_for_recomputation() -> Iterator[list[bool]]:
    """Fills the list where this thread keeps the generator's state meanwhile, as code does that backward runs again.

    Checkpoints look `torch.get_rng_state` up when they run, so it is replaced: one thread at a time.
    """
    found: list[bool] = []
    read, thread = torch.get_rng_state, get_ident()

    def noting() -> Tensor:
        if get_ident() == thread:
            found.append(True)
        return read()

    torch.get_rng_state = noting
    try:
        yield found
    finally:
        torch.get_rng_state = read
