"""Leaves no trace of what planning runs: Untouched, a model and the world as they were before."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelpar.capture.watch import generator_states, set_generator_states


class Untouched:
    """A model's tensors, attributes and gradients, and the random generators, as they are when this is made.

    Of parameters it keeps which they are, not their values: a copy would take as much memory as the model.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._first = self._kept = attributes_of(model.modules())
        self._values = values_of(model)
        self._grads = [(p, p.grad, p.requires_grad) for p in model.parameters()]
        self._states = generator_states()
        self._others = random.getstate(), np.random.get_state()
        for parameter, *_ in self._grads:
            parameter.grad = None

    def restore(self) -> None:
        """Puts all of it back, so that a forward finds what the one before found."""
        put_back(self._kept)
        self._put_values()

    def keep_attributes(self) -> None:
        """From now on, `restore` leaves the attributes of modules as they are at this moment: a mode, a flag that the
        first forward sets."""
        self._kept = attributes_of(self._model.modules())

    def leave(self) -> None:
        """Puts everything back as it was in the beginning, gradients included."""
        put_back(self._first)
        self._put_values()
        for parameter, grad, trained in self._grads:
            parameter.requires_grad_(trained)
            parameter.grad = grad

    def _put_values(self) -> None:
        set_generator_states(self._states)
        random.setstate(self._others[0])
        np.random.set_state(self._others[1])
        put_back_values(self._values)


@contextmanager
def untouched(model: nn.Module) -> Iterator[Untouched]:
    """Puts a model and the random generators back on leaving: which tensors it holds, the values of
    those that are no parameters, gradients, attributes and what is in those that are lists, dicts or sets."""
    before = Untouched(model)
    with torch.random.fork_rng():
        try:
            yield before
        finally:
            before.leave()


_Contents = tuple[Any, Any]
"""A container, and a copy of it."""

_REFILL: dict[type, Callable[[Any, Any], None]] = {
    list: list.extend,
    deque: deque.extend,
    set: set.update,
    dict: dict.update,
    OrderedDict: OrderedDict.update,
    defaultdict: defaultdict.update,
    Counter: dict.update,
}
"""How what was in a container is put back into it."""


Attributes = list[tuple[dict[str, Any], dict[str, Any], list[_Contents]]]
"""The attributes of modules: where they are, what they were, and what was in the containers among them."""


def attributes_of(modules: Iterable[nn.Module]) -> Attributes:
    """Returns the attributes of every module, and what is in those that can be changed in place: torch keeps
    parameters, buffers, modules and hooks in such as well."""
    return [
        (vars(module), dict(vars(module)), [(v, v.copy()) for v in vars(module).values() if type(v) in _REFILL])
        for module in modules
    ]


def put_back(attributes: Attributes) -> None:
    """Puts attributes back, and into containers what was in them."""
    for own, before, containers in attributes:
        if own.keys() != before.keys() or any(own[name] is not value for name, value in before.items()):
            for name in own.keys() - before.keys():
                del own[name]
            own.update(before)
        for container, contents in containers:
            if (container or contents) and not _same_items(container, contents):
                container.clear()
                _REFILL[type(container)](container, contents)


def _same_items(now: Any, before: Any) -> bool:
    """Tells whether containers hold the very same objects in the same order; never compares values."""
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return all(a is b and now[a] is before[b] for a, b in zip(now, before, strict=True))
    return all(a is b for a, b in zip(now, before, strict=True))


def values_of(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Returns a model's tensors that are no parameters, each with a copy."""
    return [(tensor, _copy_of(tensor)) for tensor in _written_by_code(model)]


def put_back_values(values: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Gives tensors the values of their copies."""
    with torch.no_grad():
        for tensor, before in values:
            _write(tensor, before)


def _written_by_code(model: nn.Module) -> list[Tensor]:
    """Returns a model's tensors that are no parameters: buffers, and what is in attributes."""
    found: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers()}
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers"):
                inside = value.values() if isinstance(value, dict) else value if type(value) in _REFILL else (value,)
                found |= {id(leaf): leaf for leaf in inside if isinstance(leaf, Tensor)}
    parameters = {id(parameter) for parameter in model.parameters()}
    return [tensor for number, tensor in found.items() if number not in parameters]


def _copy_of(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.detach().clone()


def _write(tensor: Tensor, before: Tensor) -> None:
    """Gives a tensor its values back, and its shape where that was changed in place."""
    if tensor.is_meta:
        return
    if tensor.shape != before.shape or tensor.dtype != before.dtype:
        tensor.data = before.clone()
    elif tensor.layout is not torch.strided or not torch.equal(tensor, before):
        with torch.inference_mode(tensor.is_inference()):
            tensor.copy_(before)
