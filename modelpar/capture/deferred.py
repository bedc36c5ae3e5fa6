"""Modules whose parameters are not there yet: made for good, for a while, or call by call.

Whatever is made takes the place of a tensor on the meta device, which stays the same object: names, ties and lists of
parameters remain right.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from modelpar.capture.recipe import Recipe, forget_recipe, recipe_of, unseen

_PATCHING = threading.RLock()
"""nn.Module.__call__ and __getattr__ are replaced while a model streams: one at a time."""


def put(tensor: Tensor, value: Tensor) -> Tensor:
    """Puts a value in a tensor's place, which stays the same object; returns what was there, as another one."""
    other = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    torch._C._swap_tensor_impl(tensor, other)
    return other


def take_back(tensor: Tensor, meta: Tensor) -> None:
    """Undoes `put`: frees the value, unless somebody uses its memory."""
    tensor.grad = None
    torch._C._swap_tensor_impl(tensor, meta)
    meta.data = torch.empty(0, dtype=meta.dtype)  # a graph may still hold it


@contextmanager
def aside() -> Iterator[None]:
    """Lets tensors be made in the middle of anything: no mode sees it, and the generators are as before."""
    state = torch.default_generator.get_state()
    try:
        with unseen(), torch.no_grad(), torch._C._DisableAutocast():
            yield
    finally:
        torch.default_generator.set_state(state)


def deferred_in(module: nn.Module) -> dict[str, tuple[Tensor, Recipe]]:
    """Returns a module's parameters and buffers that are not there yet, by the first name of each."""
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: (tensor, recipe) for name, tensor in named if (recipe := recipe_of(tensor)) is not None}


def materialize(module: nn.Module) -> nn.Module:
    """Makes all of a module's tensors that are not there yet, in place; returns the module."""
    for tensor, recipe in deferred_in(module).values():
        with aside():
            put(tensor, recipe.make())
        forget_recipe(tensor)
    return module


@contextmanager
def made(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Lets tensors be there for a while, and frees them, and their gradients, afterwards."""
    placed: list[tuple[Tensor, Tensor]] = []
    try:
        for tensor in {id(t): t for t in tensors}.values():
            if (recipe := recipe_of(tensor)) is not None:
                with aside():
                    placed.append((tensor, put(tensor, recipe.make(briefly=True))))
        yield
    finally:
        for tensor, meta in placed:
            take_back(tensor, meta)


@contextmanager
def streamed(model: nn.Module) -> Iterator[None]:
    """Lets a model run whose parameters are not there: each is made when it is looked at, or when its module is called,
    and freed when the innermost call under way then has returned.

    A graph that is made meanwhile keeps no parameter alive.
    """
    waiting = {id(tensor): found for found in deferred_in(model).values() for tensor in found[:1]}
    if not waiting:
        yield
        return
    stream = _Stream(waiting)
    call, look_up = nn.Module.__call__, nn.Module.__getattr__

    def streaming_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if stream.is_elsewhere():
            return call(module, *args, **kwargs)
        with stream.frame():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                stream.need(tensor)
            return call(module, *args, **kwargs)

    def streaming_look_up(module: nn.Module, name: str) -> Any:
        found = look_up(module, name)
        if isinstance(found, Tensor) and not stream.is_elsewhere():
            stream.need(found)
        return found

    with _PATCHING, stream.frame(), saved_tensors_hooks(stream.pack, stream.unpack):
        nn.Module.__call__ = streaming_call  # type: ignore[method-assign]
        nn.Module.__getattr__ = streaming_look_up  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = call  # type: ignore[method-assign]
            nn.Module.__getattr__ = look_up  # type: ignore[method-assign]


class _Again:
    """Stands in a graph for a view of a parameter."""

    def __init__(self, tensor: Tensor, view: Tensor):
        self.tensor = tensor
        self.place = tuple(view.shape), tuple(view.stride()), view.storage_offset()


class _Stream:
    """What is there of a model that streams."""

    def __init__(self, waiting: dict[int, tuple[Tensor, Recipe]]):
        self._waiting = waiting
        self._frames: list[list[tuple[Tensor, Tensor]]] = []
        self._here: dict[int, Tensor] = {}
        """By the address of their storage."""
        self._thread = threading.get_ident()

    def is_elsewhere(self) -> bool:
        return threading.get_ident() != self._thread

    @contextmanager
    def frame(self) -> Iterator[None]:
        """Frees on leaving what was made inside."""
        self._frames.append([])
        try:
            yield
        finally:
            for tensor, meta in self._frames.pop():
                with unseen():
                    self._here.pop(tensor.untyped_storage()._cdata, None)
                    take_back(tensor, meta)

    def need(self, tensor: Tensor | None) -> None:
        """Makes a tensor that is not there."""
        if tensor is None or id(tensor) not in self._waiting:
            return
        with aside():
            if not tensor.is_meta:
                return
            meta = put(tensor, self._waiting[id(tensor)][1].make(briefly=True))
            self._frames[-1].append((tensor, meta))
            self._here[tensor.untyped_storage()._cdata] = tensor

    def pack(self, saved: Tensor) -> Any:
        with unseen():
            strided = saved.layout is torch.strided
            tensor = self._here.get(saved.untyped_storage()._cdata) if strided else None
            return saved if tensor is None or tensor.dtype != saved.dtype else _Again(tensor, saved)

    def unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _Again):
            return packed
        self.need(packed.tensor)
        return packed.tensor.detach().as_strided(*packed.place)
