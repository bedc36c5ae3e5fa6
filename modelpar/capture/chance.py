"""Whether what code reads off random numbers is always the same: `always_same`, as `torch.rand([]) < layerdrop` where
layers are never dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from modelpar.capture import trees
from modelpar.capture.recording import Node, Ref, Template
from modelpar.capture.watch import generator_states, set_generator_states
from modelpar.planning.graph import BATCH

_TIMES = 100


def always_same(function: Callable[..., Any], args: Template, nodes: Sequence[Node], batch: Sequence[Tensor]) -> bool:
    """Tells whether a function of random numbers and the batch returned the same a hundred times."""

    def fill(template: Template) -> Any:
        return trees.unflatten([value(leaf) if type(leaf) is Ref else leaf for leaf in template.leaves], template.spec)

    def value(ref: Ref) -> Any:
        if ref.node == BATCH:
            assert ref.index is not None
            return batch[ref.index]
        node = nodes[ref.node]
        arguments, keywords = fill(node.args)
        output = node.target(*arguments, **keywords)  # type: ignore[operator]
        return output if ref.index is None else trees.leaves_of(output)[ref.index]

    before, found = generator_states(), set[Any]()
    try:
        for _ in range(_TIMES):
            arguments, keywords = fill(args)
            found.add(function(*arguments, **keywords))
    finally:
        set_generator_states(before)
    return len(found) == 1
