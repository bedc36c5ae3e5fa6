"""Parts of batches and outputs, by names such as "inputs.mask" and "output.0"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

ARRAYS = (Tensor, np.ndarray)


def leaf_names(inputs: Any, targets: Any = None) -> dict[str, Tensor]:
    """Returns the tensors of a batch by name: "inputs" or "inputs.<key>", and likewise of targets."""
    found: dict[str, Tensor] = {}
    for name, tree in (("inputs", inputs), ("targets", targets)):
        for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
            if isinstance(leaf, Tensor):
                found[".".join([name, *(str(_key(key)) for key in path)])] = leaf
    return found


def part_of(tree: Any, name: str, at: str = "output") -> Any:
    """Returns the part of an output that has a name."""
    if name == at:
        return tree
    parts = ((f"{at}.{key}", child) for key, child in children_of(tree)[0] or ())
    return next(part_of(child, name, path) for path, child in parts if name == path or name.startswith(f"{path}."))


def length_of(node: Any, dim: int = 0) -> int | None:
    """Returns how many samples a tensor, an array, a list or a tuple may count."""
    if isinstance(node, ARRAYS):
        return int(node.shape[dim]) if node.ndim > dim else None
    return len(node) if type(node) in (list, tuple) else None


def children_of(node: Any) -> tuple[list[tuple[str, Any]] | None, Any]:
    """Returns what a container holds, with keys, and how it is made again; None for what is no container."""
    if isinstance(node, ARRAYS):
        return None, None
    found, spec = pytree.tree_flatten_with_path(node, is_leaf=lambda each: each is not node)
    if any(not path for path, _ in found):
        return None, None
    return [(str(_key(path[0])), child) for path, child in found], spec


def _key(key: Any) -> Any:
    for name in ("key", "idx", "name"):
        if hasattr(key, name):
            return getattr(key, name)
    return key


def arrays_in(nodes: Sequence[Any]) -> list[Any]:
    """Returns the tensors and arrays in a list; a list of plain values is not looked through twice."""
    if all(isinstance(node, (int, float, str, bytes, type(None))) for node in nodes):
        return []
    return [leaf for leaf in pytree.tree_leaves(list(nodes)) if isinstance(leaf, ARRAYS)]


def brief(value: Any) -> str:
    """Returns a value as it prints, or its type where that is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"a {type(value).__name__}"
