"""What the calls of a forward take: Takes, which makes templates of their arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from modelpar.capture import numbers, trees
from modelpar.capture.held import HeldObjects, tensors_in
from modelpar.capture.origins import Origins, version_of
from modelpar.capture.recording import PLACEHOLDER, Apply, Node, Ref, Template
from modelpar.capture.traps import SCALARS, Trap
from modelpar.planning.graph import BATCH

PLAIN = (*SCALARS, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, torch.Generator, range)
"""Leaves of arguments that are what they are."""


class Takes:
    """Knows where the leaves of arguments come from."""

    def __init__(
        self, origins: Origins, held: HeldObjects, nodes: list[Node], trap: Callable[[str, str | None, str], Trap]
    ):
        """`trap(what, inside, line)` makes the exception for what cannot be followed."""
        self._origins, self._held, self._nodes, self._trap = origins, held, nodes, trap

    def template(self, tree: Any, line: str) -> Template:
        """Returns a tree's template."""
        if (number := self._origins.node_of(tree)) is not None:
            return Template((Ref(number, None),), trees.flatten(0)[1])
        leaves, spec = trees.flatten(self._with_whole_trees(tree))
        return Template(tuple(self._leaf(leaf, line) for leaf in leaves), spec)

    def of_targets(self, targets: Any) -> Template:
        """Returns the template of what the loss takes besides the output: objects that are no trees, such as arrays, as
        they are."""
        leaves, spec = trees.flatten(targets)
        return Template(tuple(self.leaf_of(leaf, "") if isinstance(leaf, Tensor) else leaf for leaf in leaves), spec)

    def without_objects(self, output: Any) -> Any:
        """Puts None where the model's output holds an object that is no tree, such as a cache: it stays behind."""
        leaves, spec = trees.flatten(output)
        objects = [not isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves]
        if not any(objects) or self._origins.node_of(output) is not None:
            return output
        kept = [None if is_object else leaf for leaf, is_object in zip(leaves, objects, strict=True)]
        return trees.unflatten(kept, spec)

    def _with_whole_trees(self, tree: Any) -> Any:
        """Puts a Ref where an argument is the very tree that a node returned."""
        if not (type(tree) is tuple and len(tree) == 2 and type(tree[0]) is tuple):
            return tree
        args, kwargs = tree

        def whole(value: Any) -> Any:
            number = self._origins.node_of(value)
            return value if number is None else _Whole(Ref(number, None))

        return tuple(map(whole, args)), {key: whole(value) for key, value in kwargs.items()}

    def _leaf(self, leaf: Any, line: str) -> Any:
        if isinstance(leaf, Tensor):
            return self.leaf_of(leaf, line)
        if isinstance(leaf, _Whole):
            return leaf.ref
        if isinstance(leaf, (numbers.FloatNumber, numbers.IntNumber)):
            return leaf.ref
        if isinstance(leaf, nn.Module):
            raise self._trap(f"hands a {type(leaf).__name__} to a call", None, line)
        if isinstance(leaf, PLAIN) or callable(leaf):
            return leaf
        if isinstance(leaf, (np.ndarray, np.generic)):
            return leaf.copy()
        if isinstance(leaf, slice):
            return leaf
        if (held := self._held.find(leaf)) is not None:
            return held
        if not all(map(self._origins.is_constant, tensors_in(leaf))):
            raise self._trap(f"hands on a {type(leaf).__name__} that holds tensors", None, line)
        try:
            return self._held.add(leaf)
        except Exception as error:
            what = f"hands on a {type(leaf).__name__}, which cannot be copied: {error}"
            raise self._trap(what, None, line) from error

    def leaf_of(self, tensor: Tensor, line: str) -> Any:
        """Returns what stands for a tensor: a Ref, a State, or a constant. Raises Trap for one of unknown origin."""
        ref = self._origins.refs.get(id(tensor))
        if ref is None and id(tensor) in self._origins.states:
            return self._origins.states[id(tensor)]
        if ref is not None:
            if isinstance(tensor.grad_fn, BackwardCFunction) and ref.node != BATCH:
                node = self._nodes[ref.node]
                if not node.is_module and not isinstance(node.target, Apply) and ref.index is not None:
                    what = "uses a custom autograd function that was not called by its `apply`"
                    raise self._trap(what, node.inside, node.line)
            return ref
        if (inner := self._inner(tensor)) is not None:
            return inner
        if tensor.requires_grad and tensor.is_leaf:
            raise self._trap("uses a tensor that requires a gradient and is no parameter of the model", None, line)
        if not self._origins.was_before(tensor):
            raise self._trap("uses a tensor of unknown origin: made by code that torch does not see", None, line)
        return tensor.detach()

    def _inner(self, tensor: Tensor) -> Ref | None:
        """Returns the place of a tensor that a module inside a leaf returned, which the leaf's node returns as well."""
        found = self._origins.inner.get(id(tensor))
        if found is None or found.version != version_of(tensor):
            return None
        node = self._nodes[found.node]
        ref = Ref(found.node, len(node.plain))
        self._nodes[found.node] = dataclasses.replace(
            node,
            inner=(*node.inner, (found.module, found.call, found.index)),
            plain=(*node.plain, PLACEHOLDER),
            needs_grad=(*node.needs_grad, tensor.requires_grad),
            num_bytes=(*node.num_bytes, tensor.numel() * tensor.element_size()),
        )
        self._origins.note(tensor, ref)
        return ref


class _Whole:
    """Stands for a tree that a node returned, while the arguments are taken apart."""

    def __init__(self, ref: Ref):
        self.ref = ref
