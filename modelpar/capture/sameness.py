"""Whether two forwards did the same: `difference`, which compares their recordings call by call."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from modelpar.capture.recording import Node, Recording, Template
from modelpar.capture.traps import Trap


def difference(a: Recording, b: Recording) -> int | None:
    """Returns the number of the first call that is another one, or has other constants; None where there is none.

    A difference in what is returned counts as one behind the last call.
    """
    for number, (x, y) in enumerate(zip_longest(a.nodes, b.nodes)):
        if x is None or y is None or not _same_call(x, y):
            return number
    return None if _same_template(a.output, b.output) else len(a.nodes)


def check_same(recording: Recording, other: Recording) -> None:
    """Raises Trap where another micro-batch, for which a recording should hold, made the code do something else."""
    number = difference(recording, other)
    if number is not None:
        node = recording.nodes[min(number, len(recording.nodes) - 1)]
        what = "does something else on another micro-batch of the same shapes, depending on what cannot be seen"
        raise Trap(node.inside, node.line, what)


def _same_call(a: Node, b: Node) -> bool:
    return (a.name, a.inside, a.settings) == (b.name, b.inside, b.settings) and _same_template(a.args, b.args)


def _same_template(a: Template, b: Template) -> bool:
    return a.spec == b.spec and len(a.leaves) == len(b.leaves) and all(map(_same, a.leaves, b.leaves))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return repr(a) == repr(b)
    try:
        return bool(a == b) or (callable(a) and getattr(a, "__code__", a) is getattr(b, "__code__", b))
    except Exception:  # such as of arrays
        return repr(a) == repr(b)
