"""Pytrees of tensors: torch's own, and instances of dataclasses that torch does not know."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Spec(NamedTuple):
    """The shape of a tree, without its leaves."""

    spec: pytree.TreeSpec
    inner: tuple[tuple[int, Any, tuple[str, ...], Any], ...] = ()
    """Leaves that are dataclasses: position, an empty instance, fields, the Spec of their values, and how many."""

    def __reduce__(self) -> Any:
        """Pickles what torch's own spec is made of, which warns when it is unpickled itself."""
        return _spec_of, (_parts(self.spec), self.inner)


def flatten(tree: Any) -> tuple[list[Any], Spec]:
    """Returns a tree's leaves, those in dataclasses included, and what is left without them."""
    leaves, spec = pytree.tree_flatten(tree)
    if not any(_is_record(leaf) for leaf in leaves):
        return leaves, Spec(spec)
    found: list[Any] = []
    inner = []
    for i, leaf in enumerate(leaves):
        if not _is_record(leaf):
            found.append(leaf)
            continue
        names = tuple(field.name for field in dataclasses.fields(leaf))
        values, below = flatten([getattr(leaf, name) for name in names])
        empty = copy.copy(leaf)
        for name in names:
            object.__setattr__(empty, name, None)
        inner.append((i, empty, names, (below, len(values))))
        found += values
    return found, Spec(spec, tuple(inner))


_LEAF = pytree.tree_flatten(0)[1]


def _parts(spec: pytree.TreeSpec) -> Any:
    """Returns a spec's kind of node, its context and its children, as plain data; None for a leaf."""
    return None if spec == _LEAF else (spec.type, spec.context, [_parts(child) for child in spec._children])


def _whole(parts: Any) -> pytree.TreeSpec:
    if parts is None:
        return _LEAF
    kind, context, children = parts
    return pytree.TreeSpec(kind, context, [_whole(child) for child in children])


def _spec_of(parts: Any, inner: Any) -> Spec:
    return Spec(_whole(parts), inner)


def unflatten(leaves: list[Any], spec: Spec) -> Any:
    """Puts leaves back into their tree."""
    if not spec.inner:
        return pytree.tree_unflatten(leaves, spec.spec)
    records = {i: rest for i, *rest in spec.inner}
    source = iter(leaves)
    outer = []
    for i in range(spec.spec.num_leaves):
        if i not in records:
            outer.append(next(source))
            continue
        empty, names, (below, count) = records[i]
        record = copy.copy(empty)
        for name, value in zip(names, unflatten([next(source) for _ in range(count)], below), strict=True):
            object.__setattr__(record, name, value)
        outer.append(record)
    return pytree.tree_unflatten(outer, spec.spec)


def leaves_of(tree: Any) -> list[Any]:
    """Returns a tree's leaves."""
    return [tree] if isinstance(tree, Tensor) else flatten(tree)[0]


def tensors_of(tree: Any) -> list[Tensor]:
    """Returns a tree's tensors."""
    return [leaf for leaf in leaves_of(tree) if isinstance(leaf, Tensor)]


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Returns the tree with a function applied to its tensors."""
    if isinstance(tree, Tensor):
        return function(tree)
    leaves, spec = flatten(tree)
    return unflatten([function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def same_values(a: Tensor, b: Tensor) -> bool:
    """Tells whether two strided tensors are the same in shape, type and values; NaN is the same as NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.detach(), b.detach()
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def _is_record(leaf: Any) -> bool:
    return dataclasses.is_dataclass(leaf) and not isinstance(leaf, (type, Tensor))
