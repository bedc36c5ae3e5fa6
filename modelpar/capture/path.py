"""Which module's code runs while a forward is followed: Path, and the checkpoints that it has set."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn


class Own(NamedTuple):
    """A call of a module whose code is followed."""

    module: str
    """FQN; "" is the model itself."""
    number: int
    """Which of its calls."""


class Path:
    """The modules whose code is followed and runs, from the model itself to the innermost."""

    def __init__(self) -> None:
        self._calls = [Own("", 0)]
        self._hooks = [saved_tensors_hook()]
        """For each of them, the hook for saved tensors that was set when it was called."""
        self._entered: Counter[str] = Counter()

    @property
    def module(self) -> str:
        """The innermost module."""
        return self._calls[-1].module

    @property
    def call(self) -> Own:
        """The innermost call."""
        return self._calls[-1]

    @contextmanager
    def within(self, module: str) -> Iterator[None]:
        """Follows a call of a module."""
        self._calls.append(Own(module, self._entered[module]))
        self._hooks.append(saved_tensors_hook())
        self._entered[module] += 1
        try:
            yield
        finally:
            self._calls.pop()
            self._hooks.pop()

    @property
    def sets_hooks(self) -> bool:
        """Whether code that is followed has set a hook for saved tensors, which matters where there are gradients."""
        return torch.is_grad_enabled() and saved_tensors_hook() is not self._hooks[0]

    @property
    def who_sets_hooks(self) -> str:
        """The module whose code set the first of these hooks."""
        return self._calls[max(i for i, hook in enumerate(self._hooks) if hook is self._hooks[0])].module

    def is_checkpointed(self, module: nn.Module) -> bool:
        """Tells whether a module is called in a checkpoint of just that, which recomputes it in backward."""
        hook = saved_tensors_hook()
        if hook is self._hooks[-1]:
            return False
        return self.who_sets_hooks == "" or checkpointed(hook) is module


def saved_tensors_hook() -> Any:
    """Returns the innermost hook that packs what autograd saves, if there is one."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks[0] if hooks else None


@contextmanager
def ends_checkpoints() -> Iterator[None]:
    """Ends what code was in the middle of when it raised an exception: its frames hold checkpoints open, whose hooks
    would pack what this thread saves from then on, for as long as somebody keeps the exception."""
    try:
        yield
    except BaseException as error:
        found: BaseException | None = error
        while found is not None:
            traceback.clear_frames(found.__traceback__)
            found = found.__cause__ or found.__context__
        raise


def checkpointed(hook: Any) -> nn.Module | None:
    """Returns the module that a checkpoint calls, by the hook that it has set: directly, or by its `__call__`."""
    if getattr(hook, "__module__", "") != "torch.utils.checkpoint":
        return None
    frame = _captured(hook, "frame")
    called = _captured(frame.recompute_fn, "fn") if frame is not None else None
    while isinstance(called, partial):
        called = called.func
    called = getattr(called, "__self__", called)
    return called if isinstance(called, nn.Module) else None


def _captured(function: Any, name: str) -> Any:
    """Returns what a function has captured by a name, if it has."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return function.__closure__[names.index(name)].cell_contents if name in names else None
