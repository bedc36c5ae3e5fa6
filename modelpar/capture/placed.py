"""Values that the model's code puts in the place of a module's own before it calls it: Places, and `in_place`.

`torch.func.functional_call` does so for one call, `self.lin.weight = f(raw)` for good. A module that is called whole
reads them as its attributes, so they are among what the call takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn


class Place(NamedTuple):
    """Where a module keeps a tensor."""

    module: str
    """FQN within the module that is called; "" is that one."""
    of: str
    """ "_parameters", "_buffers", or "" for a plain attribute."""
    name: str


class Places:
    """Knows which tensors a model's modules held when the forward began, and which modules are called whole."""

    def __init__(self, model: nn.Module, leaves: frozenset[str]):
        self.whole = {
            name
            for name, _ in model.named_modules()
            if name in leaves or any(name[:i] in leaves for i, letter in enumerate(name) if letter == ".")
        }
        """FQNs of the leaves and of all modules inside them."""
        self._own = {
            (id(module), place.of, place.name): tensor
            for module in model.modules()
            for place, tensor in _tensors_of(module, "")
        }

    def others(self, module: nn.Module, is_known: Callable[[Tensor], bool]) -> dict[Place, Tensor]:
        """Returns what is in the place of a module's own tensors, of those that are known to come from elsewhere."""
        return {
            place: tensor
            for name, part in module.named_modules()
            for place, tensor in _tensors_of(part, name)
            if self._own.get((id(part), place.of, place.name)) is not tensor and is_known(tensor)
        }


@contextmanager
def in_place(module: nn.Module, places: Sequence[Place], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Puts tensors in the place of a module's own, and these back."""
    before: list[tuple[dict[str, Any], str, bool, Any]] = []
    try:
        for (path, of, name), tensor in zip(places, tensors, strict=True):
            part = module.get_submodule(path)
            held = getattr(part, of) if of else vars(part)
            before.append((held, name, name in held, held.get(name)))
            held[name] = tensor
        yield
    finally:
        for held, name, there, value in reversed(before):
            if there:
                held[name] = value
            else:
                held.pop(name, None)


def _tensors_of(module: nn.Module, path: str) -> Iterator[tuple[Place, Tensor]]:
    for of in ("_parameters", "_buffers", ""):
        held = getattr(module, of, {}) if of else vars(module)
        for name, tensor in list(held.items()):
            if isinstance(tensor, Tensor):
                yield Place(path, of, name), tensor
