"""What one real forward did: Recording, the calls in order, with what each took from which other.

::

    def forward(self, ids):                   node 0    call embed        (batch.ids)
        x = self.embed(ids)                   node 1    call blocks.0     (node 0)
        for block in self.blocks:             node 2    call blocks.1     (node 1)
            x = block(x)                      node 3    torch.mean        (node 2, dim=1)
        return self.head(x.mean(dim=1))       node 4    call head         (node 3)

A node is a module that is called whole (a leaf), or a torch function that the code around the leaves called. Replaying
the nodes is the forward, as long as nothing that this code branches on changes: shapes and plain values of the batch
(the `signature`), and what it read from tensors (the `guards`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modelpar.capture import trees
from modelpar.capture.path import Own
from modelpar.capture.placed import Place, in_place
from modelpar.planning.graph import BATCH


class Ref(NamedTuple):
    """A value: what a node returned, a tensor of the batch (node BATCH), or what a node wrote to."""

    node: int
    index: int | None
    """Which leaf of the tree; None is the tree itself; −1 − k is the k-th of what the node wrote to."""


class State(NamedTuple):
    """A parameter or buffer, by its FQN."""

    name: str


class Held(NamedTuple):
    """An object that is no tree of tensors, such as a cache: each stage gets a fresh one for every micro-batch."""

    number: int


class Settings(NamedTuple):
    """What the code around a call had set."""

    grad: bool | None
    """Whether gradients were on, where that differs from how the model as a whole was run."""
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    """Device types whose autocast differs from off, with what it is."""


@contextmanager
def as_set(settings: Settings | None) -> Iterator[None]:
    """Sets grad mode and autocast as they were around a call."""
    if settings is None:
        yield
        return
    with ExitStack() as stack:
        if settings.grad is not None:
            stack.enter_context(torch.set_grad_enabled(settings.grad))
        for kind, enabled, dtype in settings.autocast:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
        yield


@dataclass(frozen=True)
class Template:
    """A tree of which some leaves are to be filled in: Ref, State, Held."""

    leaves: tuple[Any, ...]
    spec: trees.Spec

    @property
    def refs(self) -> tuple[Ref, ...]:
        """The values it takes."""
        return tuple(leaf for leaf in self.leaves if type(leaf) is Ref)

    @property
    def states(self) -> tuple[State, ...]:
        """The parameters and buffers it takes."""
        return tuple(leaf for leaf in self.leaves if type(leaf) is State)

    @property
    def held(self) -> tuple[Held, ...]:
        """The objects it takes."""
        return tuple(leaf for leaf in self.leaves if type(leaf) is Held)


class Attribute(NamedTuple):
    """A property of a tensor that is a tensor, such as `.T`: the function of a node."""

    name: str

    def __call__(self, tensor: Tensor) -> Any:
        """Reads it."""
        return getattr(tensor, self.name)


class Apply(NamedTuple):
    """A custom autograd function, called as one node, so that its own backward is used."""

    function: type[torch.autograd.Function]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Applies it."""
        return self.function.apply(*args, **kwargs)


@dataclass(frozen=True)
class Node:
    """One call."""

    target: str | Callable[..., Any]
    """The FQN of a module, or a function."""
    args: Template
    """Of (positional, keyword) arguments."""
    inside: str
    """FQN of the innermost module that was not called whole; "" is the model itself."""
    line: str
    """Where it was called: "file:line"."""
    nth: int = 1
    """Of a module: which of its calls, from 1."""
    placed: tuple[Place, ...] = ()
    """Of a module: where its first arguments are to be for the call, in the place of tensors of its own."""
    checkpoint: bool = False
    """Of a module: whether it is called in an activation checkpoint of the code around it."""
    check: bool = False
    """Whether it reads a number that must be what it was when recorded, as the code raises an exception otherwise."""
    lasting: bool = False
    """Whether it is done although nobody takes what it returns: it hooks into the backward."""
    writes: tuple[Ref | State, ...] = ()
    """What it changed in place: arguments, and other views of their memory."""
    aliases: int = 0
    """How many of these, the last ones, are no arguments: they changed because they share memory with one."""
    touches: tuple[Ref, ...] = ()
    """All values whose memory it changed, also those that nobody looks at again."""
    changes: tuple[str, ...] = ()
    """FQNs of the parameters and buffers that it changed, maybe through a view."""
    draws: tuple[str, ...] = ()
    """FQNs of the modules whose own forward drew random numbers meanwhile."""
    calls: tuple[tuple[str, int], ...] = ()
    """How often each module was called meanwhile, of those that drew anywhere."""
    own: Own | None = None
    """Of a function that draws: whose code calls it, by FQN, and in which call of that module."""
    after: Ref | None = None
    """Where that code drew before in the same call: the state in which it left the generators, its last value."""
    settings: Settings | None = None
    plain: tuple[Any, ...] = ()
    """The leaves of its output, a placeholder for each tensor: what the code around it may have looked at."""
    free: bool = False
    """Whether it depends on the batch and on buffers only and changes nothing: every stage that needs it does it."""
    inner: tuple[tuple[str, int, int], ...] = ()
    """What modules inside it returned that code outside took, as by a hook: the FQN, which call, which leaf. They count
    as leaves of its output, behind its own."""
    needs_grad: tuple[bool, ...] = ()
    """For each leaf of its output."""
    num_bytes: tuple[int, ...] = ()
    """For each leaf of its output."""
    written: tuple[tuple[bool, int], ...] = ()
    """For each of `writes` afterwards, whether it needs a gradient, and its bytes."""

    @property
    def is_module(self) -> bool:
        """Whether it is a module called whole."""
        return isinstance(self.target, str)

    @property
    def name(self) -> str:
        """The module's FQN, or the function's name."""
        return self.target if isinstance(self.target, str) else function_name(self.target)

    def call(self, model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, list[Any]]:
        """Does what it does; returns the output and all its leaves."""
        target = model.get_submodule(self.target) if isinstance(self.target, str) else self.target
        values, args = args[: len(self.placed)], args[len(self.placed) :]
        with ExitStack() as around:
            if isinstance(target, nn.Module) and values:
                around.enter_context(in_place(target, self.placed, values))
            found = around.enter_context(_returned_by(model, {name for name, _, _ in self.inner}))
            if self.checkpoint and torch.is_grad_enabled():
                output = checkpoint(target, *args, use_reentrant=False, **kwargs)
            else:
                output = target(*args, **kwargs)
        inner = [trees.leaves_of(found[name][call])[index] for name, call, index in self.inner]
        return output, [*([output] if isinstance(output, Tensor) else trees.leaves_of(output)), *inner]

    def needs_grad_at(self, index: int | None) -> bool:
        """Tells whether a value of this node, by its Ref's index, needs a gradient."""
        if index is None:
            return any(self.needs_grad)
        return self.needs_grad[index] if index >= 0 else self.written[-1 - index][0]

    def bytes_at(self, index: int | None) -> int:
        """Returns the bytes of a value of this node, by its Ref's index."""
        if index is None:
            return sum(self.num_bytes)
        return self.num_bytes[index] if index >= 0 else self.written[-1 - index][1]

    @property
    def takes(self) -> tuple[Ref, ...]:
        """All values it depends on."""
        return (*self.args.refs, *(r for r in self.writes if isinstance(r, Ref)), *([self.after] if self.after else ()))


@contextmanager
def _returned_by(model: nn.Module, names: set[str]) -> Iterator[dict[str, list[Any]]]:
    """Collects what each call of some modules returns."""
    found: dict[str, list[Any]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _module, _args, output, of=of: of.append(output))
        for name, of in found.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Guard:
    """Something that the model's code read from a value of the batch: another outcome means another recording."""

    function: Callable[..., Any]
    args: Template
    outcome: Any


class Read(NamedTuple):
    """A number that the code read off a value that depends on more than the batch."""

    node: int
    place: Any
    """Where in the code."""
    of: str
    """What it depends on, in a word."""
    outcome: Any


PLACEHOLDER = "<tensor>"


def signature(mode: str, inputs: Any, targets: Any, straight: bool) -> Any:
    """Returns what a recording holds for, apart from its guards: the mode, and the batch's structure, dtypes, shapes,
    and plain values. A `straight` model does the same whatever the shapes."""
    leaves, spec = trees.flatten((inputs, targets))
    described = [
        (str(leaf.dtype), leaf.dim() if straight else tuple(leaf.shape)) if isinstance(leaf, Tensor) else _plain(leaf)
        for leaf in leaves
    ]
    return mode, repr(spec), tuple(described)


def _plain(value: Any) -> Any:
    """Returns what tells a plain value from others: an array prints only some of its entries."""
    return (str(value.dtype), value.shape, repr(value.tolist())) if isinstance(value, np.ndarray) else repr(value)


@dataclass(frozen=True)
class Recording:
    """The calls of one forward and loss."""

    nodes: tuple[Node, ...]
    output: Template
    """What the loss is given, or the model's own loss, or what is predicted."""
    batch: tuple[str, ...]
    """Names of the batch's leaves: "inputs", "inputs.ids", "targets", …"""
    num_samples: int
    targets: Template | None = None
    """What the loss takes besides the output; None for a model that has its own."""
    guards: tuple[Guard, ...] = ()
    held: tuple[Any, ...] = field(default=(), compare=False)
    """The objects that nodes take, as they were when first seen."""
    together: tuple[tuple[int, int], ...] = ()
    """Pairs of nodes that no cut may separate."""
    why: tuple[str, ...] = ()
    """Why not, for each pair."""
    signature: Any = None
    """What micro-batches must have in common with the one recorded, see `signature`."""
    leaves: frozenset[str] = frozenset()
    """FQNs of the modules that were called whole."""
    reads: tuple[Read, ...] = ()
    """Numbers of which it is not settled yet what they change."""
    closed: tuple[str, ...] = ()
    """Which of them had to be, and others of their classes: what their code does that cannot be followed, and where."""

    def is_straight(self, model: nn.Module) -> bool:
        """Tells whether the model is an nn.Sequential and this its layers, one after the other."""
        if type(model).forward is not nn.Sequential.forward:
            return False
        return all(node.is_module and "." not in node.name for node in self.nodes)

    @property
    def ends(self) -> tuple[Template, ...]:
        """What is wanted of the nodes besides what they take from each other."""
        return (self.output, *([self.targets] if self.targets else []), *(guard.args for guard in self.guards))

    @property
    def last_takes(self) -> tuple[Ref, ...]:
        """What is taken behind the last node: the output, and the targets of the loss."""
        return (*self.output.refs, *(self.targets.refs if self.targets else ()))

    def needed(self, refs: tuple[Ref, ...]) -> list[int]:
        """Returns the free nodes that values depend on, in order."""
        found: set[int] = set()
        todo = [ref.node for ref in refs]
        while todo:
            number = todo.pop()
            if number != BATCH and number not in found and self.nodes[number].free:
                found.add(number)
                todo += [ref.node for ref in self.nodes[number].takes]
        return sorted(found)


def function_name(function: Callable[..., Any]) -> str:
    """Returns a short name of a torch function."""
    if isinstance(function, Attribute):
        return function.name
    if isinstance(function, Apply):
        return function.function.__name__
    return str(getattr(function, "__name__", type(function).__name__)).strip("_")
