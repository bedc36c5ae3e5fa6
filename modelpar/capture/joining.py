"""How the outputs of micro-batches are put together: what counts samples one after the other, all else once.

::

    micro-batches of 3 and of 2 samples       joined
    scores [3, 8]     scores [2, 8]           scores [5, 8]    as long as the micro-batch
    table  [3, 4]     table  [3, 4]           table  [3, 4]    of one length: the same in both, or refused
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from modelpar.capture.parts import ARRAYS, brief, children_of, length_of
from modelpar.errors import ConfigError


def counting_names(first: Any, size: int, second: Any, other: int, dim: int = 0, name: str = "output") -> set[str]:
    """Returns the names of those parts of two outputs that are as long as their numbers of samples.

    Where these numbers are the same, a part may be so by chance, and so may what is inside it, which is named as well.
    """
    found = {name} if (length_of(first, dim), length_of(second, dim)) == (size, other) else set()
    children, others = children_of(first)[0], children_of(second)[0]
    if (found and size != other) or not children or not others:
        return found
    if [key for key, _ in children] == [key for key, _ in others]:
        for (key, a), (_, b) in zip(children, others, strict=True):
            found |= counting_names(a, size, b, other, dim, f"{name}.{key}")
    return found


def join(outputs: list[Any], sizes: Sequence[int], counting: set[str], dim: int = 0, name: str = "output") -> Any:
    """Joins the outputs of micro-batches: what counts samples one after the other, all else once.

    Raises ConfigError for what counts no samples and is another in each micro-batch.
    """
    if name in counting:
        return joined(outputs, dim)
    levels = [children_of(output) for output in outputs]
    children = [level[0] for level in levels]
    if all(children) and len({tuple(key for key, _ in each or ()) for each in children}) == 1:
        columns = zip(*(each or () for each in children), strict=True)
        parts = [join([c for _, c in column], sizes, counting, dim, f"{name}.{column[0][0]}") for column in columns]
        return pytree.tree_unflatten(parts, levels[0][1])
    if not all(_same(outputs[0], output) for output in outputs[1:]):
        what = outputs[0]
        what = f"has shape {list(what.shape)}" if isinstance(what, ARRAYS) else f"is {brief(what)}"
        raise ConfigError(
            f"an output {what} for a micro-batch of {sizes[0]}, which cannot be joined: {name} does not count samples "
            f"and is another for each micro-batch; expected dimension {dim} to count samples, or "
            "Objective(…, join=function of the micro-batches' outputs)"
        )
    return outputs[0].detach() if isinstance(outputs[0], Tensor) else outputs[0]


def joined(parts: Sequence[Any], dim: int = 0) -> Any:
    """Puts tensors, arrays or lists one after the other."""
    if isinstance(parts[0], Tensor):
        return torch.cat(tuple(parts), dim).detach()
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts, dim)
    return type(parts[0])(entry for part in parts for entry in part)


def _same(a: Any, b: Any) -> bool:
    """Tells whether two outputs that count no samples are the same, NaN included."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype
        return same and (torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all()))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.tolist() == b.tolist()
    if isinstance(a, float) and isinstance(b, float) and a != a and b != b:
        return True
    return type(a) is type(b) and not isinstance(a, ARRAYS) and repr(a) == repr(b)
