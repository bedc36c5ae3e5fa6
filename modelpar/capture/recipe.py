"""How parameters are made that are not there yet: Recipe, and Drawn, which repeats what the model's factory did."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from modelpar.errors import CaptureError

_RECIPE = "modelpar_recipe"
"""The attribute of a parameter that says how it is made; it travels with it."""


class Recipe(Protocol):
    """How a tensor that is not there yet is made."""

    def make(self, briefly: bool = False) -> Tensor:
        """Returns it, on the CPU; `briefly` where it is freed soon, see `room`."""
        ...


def recipe_of(tensor: Tensor) -> Recipe | None:
    """Returns how a tensor is made that is not there yet, or None for any other."""
    found: Recipe | None = getattr(tensor, _RECIPE, None)
    return found if tensor.is_meta else None


def set_recipe(tensor: Tensor, recipe: Recipe) -> None:
    """Says how a tensor on the meta device is made."""
    setattr(tensor, _RECIPE, recipe)


def forget_recipe(tensor: Tensor) -> None:
    """Forgets how a tensor is made that is there now."""
    vars(tensor).pop(_RECIPE, None)


def draw_key(seed: int, number: int) -> int:
    """Returns the seed of one draw of a factory, as 63 bits of a BLAKE2 hash."""
    return int.from_bytes(hashlib.blake2b(f"init/{seed}/{number}".encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Piece:
    """A tensor as a part of some memory."""

    memory: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def range(self) -> tuple[int, int]:
        """The bytes that it spans."""
        if not all(self.shape):
            return 0, 0
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        return self.offset * self.dtype.itemsize, (last + 1) * self.dtype.itemsize

    def of(self, base: Tensor) -> Tensor:
        """Returns the part of a tensor's memory."""
        empty = torch.empty(0, dtype=self.dtype, device=base.device)
        return empty.set_(base.untyped_storage(), self.offset, self.shape, self.stride)


class Op(NamedTuple):
    """One operation of a factory."""

    number: int
    function: str
    """Such as "aten.uniform_.default", or "init.orthogonal_"."""
    args: Any
    """Of (positional, keyword) arguments, with a Piece for each tensor."""
    takes: tuple[int, ...]
    """The memory it reads or writes."""
    writes: tuple[int, ...]
    makes: tuple[int | None, ...]
    """For each tensor it returns, the memory it makes; None for a view."""
    key: int | None
    """What the generator is seeded with, where it draws."""


@dataclass(frozen=True)
class Drawn:
    """Makes a tensor by repeating what the factory did."""

    name: str
    ops: tuple[Op, ...]
    constants: Mapping[int, Tensor]
    """Memory that came from elsewhere, such as from a list of numbers or from numpy."""
    piece: Piece

    @property
    def is_written(self) -> bool:
        """Whether anything gives it values."""
        return bool(self.constants) or not all(makes_nothing(op.function) for op in self.ops)

    def make(self, briefly: bool = False) -> Tensor:
        """Returns it, on the CPU; raises CaptureError where some of its numbers were never given."""
        memory = {number: constant.clone() for number, constant in self.constants.items()}
        for op in self.ops:
            args, kwargs = pytree.tree_map_only(Piece, lambda piece: piece.of(memory[piece.memory]), op.args)
            if op.key is not None:
                torch.default_generator.manual_seed(op.key)
            nothing = makes_nothing(op.function)
            if nothing and briefly:
                kwargs = {**kwargs, "device": torch.device("meta")}
            outputs = tensors_in(function_of(op.function)(*args, **kwargs))
            for number, output in zip(op.makes, outputs, strict=True):
                if number is not None:
                    memory[number] = room(output) if nothing and briefly else output
                    if nothing and output.is_floating_point():
                        memory[number].fill_(torch.nan)
            del outputs
        found = self.piece.of(memory[self.piece.memory])
        if found.is_floating_point() and found.dtype.itemsize > 1 and bool(found.sum().isnan()):
            missing = int(found.isnan().sum())
            if missing:
                raise CaptureError(
                    f"{missing} of {found.numel()} numbers of {self.name} are never initialised; expected its module "
                    "to do so, in reset_parameters or __init__, or weights="
                )
        return found


def room(like: Tensor) -> Tensor:
    """Returns memory on the CPU for a tensor like another that lives briefly; when freed, the process has it no more.

    The C library would keep it, and could not use it for the next one: it asks for a little more than it needs in order
    to align it, so each would get new memory.
    """
    size = like.untyped_storage().nbytes()
    if size < _LARGE:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    memory = torch.frombuffer(mmap.mmap(-1, size, **_PRIVATE), dtype=torch.uint8).untyped_storage()
    empty = torch.empty(0, dtype=like.dtype)
    return empty.set_(memory, like.storage_offset(), like.shape, like.stride())  # type: ignore[call-overload]


_LARGE = 1 << 16
_PRIVATE: Any = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}


@contextmanager
def unseen() -> Iterator[None]:
    """Hides what torch does from all modes that watch it."""
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        yield


def tensors_in(tree: Any) -> list[Tensor]:
    """Returns the tensors in arguments."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def makes_nothing(function: str) -> bool:
    """Tells whether an operation only makes room for numbers."""
    return "empty" in function.split(".")[1]


def function_of(name: str) -> Any:
    """Returns an operation by its name."""
    if name.startswith("init."):
        return getattr(nn.init, name.removeprefix("init."))
    space, function, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, space), function), overload)
