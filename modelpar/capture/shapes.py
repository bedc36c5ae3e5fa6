"""Shapes that depend on values: which functions make them, and ShapeOf, what they are on another micro-batch.

`h[labels != -100]` has as many rows as the labels say. Replaying it is no trouble; a number that the code read off its
shape would be. So such reads are guards: they hold only for micro-batches on which the shapes come out the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modelpar.capture import trees
from modelpar.capture.recording import Guard, Template

# fmt: off
_BY_ALL = frozenset((
    "nonzero", "unique", "unique_consecutive", "unique_dim", "argwhere", "bincount", "to_sparse", "combinations",
    "cartesian_prod", "one_hot",
))
"""Functions that return as many values as their arguments say."""

_SIZED = frozenset((
    "arange", "range", "linspace", "logspace", "zeros", "ones", "empty", "full", "rand", "randn", "randint", "randperm",
    "eye", "tri", "new_zeros", "new_ones", "new_empty", "new_full", "view", "reshape", "expand", "repeat", "tile",
    "unflatten", "broadcast_to", "split", "chunk", "tensor_split", "split_with_sizes", "unfold", "resize",
    "tril_indices", "triu_indices",
))
"""Functions that take sizes, which may be given as tensors."""

_READERS = frozenset((
    "shape", "size", "len", "numel", "nelement", "nbytes", "stride", "is_same_size", "repr", "str", "format", "unbind",
    "split", "chunk", "tensor_split", "split_with_sizes", "iter", "unsafe_split", "unsafe_chunk", "reversed", "dsplit",
    "hsplit", "vsplit", "storage_offset", "is_contiguous", "dim_order",
))
"""Functions that tell a shape, or return as many tensors as it says."""
# fmt: on


def tells_shape(name: str) -> bool:
    """Tells whether code learns a tensor's shape from a function."""
    return name in _READERS


def shaped_by(name: str, args: Any, kwargs: Any) -> list[Any]:
    """Returns the arguments on whose values the shape of what a function returns depends; nothing where it does not."""
    if name in _BY_ALL:
        fixed = name == "one_hot" and (len(args) > 1 or kwargs.get("num_classes", -1) != -1)
        return [] if fixed else [args, kwargs]
    if name == "masked_select":
        return [args[1:], kwargs.get("mask")]
    if name == "repeat_interleave":
        repeats = args[1] if len(args) > 1 else kwargs.get("repeats", args[0] if args else None)
        return [repeats] if isinstance(repeats, Tensor) and "output_size" not in kwargs else []
    if name == "pack_padded_sequence":
        return [args[1:], kwargs]
    if name == "where":
        return [args, kwargs] if len(args) + len(kwargs) == 1 else []
    if name == "getitem":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        masks = [i for i in index if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)]
        return masks
    if name in _SIZED:
        sizes = trees.leaves_of((args if args and not _is_tensor(args[0]) else args[1:], kwargs))
        made = name in ("arange", "range", "linspace", "logspace")
        return [s for s in (trees.leaves_of((args, kwargs)) if made else sizes) if _is_tensor(s) and not s.dim()]
    return []


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


@dataclass(frozen=True)
class ShapeOf:
    """Tells the shapes of what a function returns."""

    function: Callable[..., Any]
    index: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the shape of one leaf of what the function returns."""
        return tuple(trees.leaves_of(self.function(*args, **kwargs))[self.index].shape)


class Shaped:
    """Knows the tensors of a forward whose shapes depend on values of the batch."""

    def __init__(self) -> None:
        self._by: dict[int, tuple[Guard, ...]] = {}
        """By id, what a tensor's shape must be for the same code to run."""

    def note(self, function: Any, template: Template, taken: Iterable[Tensor], output: Any, *, makes: bool) -> None:
        """Remembers the shapes of what a function returned: made by values, where it `makes` them, or by its arguments.

        The values must depend on the batch only. Other arguments are replaced by zeros when the shape is asked for.
        """
        inherited = tuple(dict.fromkeys(guard for tensor in taken for guard in self.guards(tensor)))
        for index, leaf in enumerate(trees.leaves_of(output)):
            if isinstance(leaf, Tensor) and id(leaf) not in self._by:
                own = (Guard(ShapeOf(function, index), template, tuple(leaf.shape)),) if makes else ()
                if inherited or own:
                    self._by[id(leaf)] = (*inherited, *own)

    def guards(self, tensor: Tensor) -> tuple[Guard, ...]:
        """Returns what must hold for a tensor to have the shape it has."""
        return self._by.get(id(tensor), ())


def with_zeros(template: Template, leaves: list[Any], depends: Callable[[Any], bool]) -> Template:
    """Returns a template in which zeros stand for the tensors whose values are not known beforehand."""
    kept = [
        torch.zeros((), dtype=value.dtype).expand(value.shape) if isinstance(value, Tensor) and depends(leaf) else leaf
        for leaf, value in zip(template.leaves, leaves, strict=True)
    ]
    return Template(tuple(kept), template.spec)
