"""Where the tensors of one forward come from: Origins, and what they depend on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modelpar.capture import trees
from modelpar.capture.recording import Held, Ref, State, Template
from modelpar.planning.graph import BATCH

INPUT, BUFFER, STATE, CHANCE = 1, 2, 4, 8
"""What a value depends on, as bits: the batch, buffers, parameters or what was written to, random numbers."""


class Inner(NamedTuple):
    """A tensor that a module inside a leaf returned: code outside may have got hold of it, by a hook for instance."""

    tensor: Tensor
    node: int
    module: str
    """FQN."""
    call: int
    """Which call of that module inside the leaf."""
    index: int
    """Which leaf of the tree that it returned."""
    version: int


class Earlier:
    """Tensors that earlier forwards used. One of them that is used again was there before this forward: a constant.

    No list of all objects tells that: making one fails other threads that make tuples meanwhile.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, int]] = {}
        """With how often each had been written to."""
        self.unsure = False
        """Whether this forward used some that no earlier one had: the next one tells whether they are made anew."""
        self._final = False

    def forward_begins(self, *, final: bool) -> None:
        """Takes nothing for known in a `final` forward but what is."""
        self.unsure, self._final = False, final

    def has(self, tensor: Tensor) -> bool:
        """Tells whether a tensor was there before and nobody writes to it; of a new one that is not known yet."""
        version = version_of(tensor)
        if id(tensor) not in self._known and not self._final:
            self.unsure = True
            self._known[id(tensor)] = tensor, version
        return self._known.get(id(tensor), (None, None))[1] == version

    def keep(self, made: Iterable[Tensor]) -> None:
        """Remembers constants that a forward made, which will be repeated: code that caches them uses them again."""
        self._known |= {id(tensor): (tensor, version_of(tensor)) for tensor in made}


class Origins:
    """Knows every tensor by its id: what made it, and what it depends on. Keeps them alive: no id comes twice."""

    def __init__(self, model: nn.Module, earlier: Earlier):
        named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        self.states = {id(tensor): State(name) for name, tensor in reversed(named)}
        self._state_memory = {memory: self.states[id(t)] for _, t in reversed(named) if (memory := memory_of(t))}
        first: dict[int, str] = {}
        self._first_names = {name: first.setdefault(id(tensor), name) for name, tensor in named}
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.refs: dict[int, Ref] = {}
        """The latest Ref of each tensor: who writes to it, or hands it on as it is, gives it a new one."""
        self._places: dict[int, list[Ref]] = {}
        """All Refs that each tensor has had."""
        self._trees: dict[int, tuple[int, list[int]]] = {}
        """Trees that hold more than tensors: the node that returned each, and the ids of its leaves."""
        self._alive: list[Any] = []
        self._known: list[Tensor] = []
        """All tensors with a Ref, to find those that share memory."""
        self.flags: dict[int, int] = {BATCH: INPUT}
        """What the values of each node depend on."""
        self._earlier = earlier
        self.inner: dict[int, Inner] = {}

    def first_name(self, name: str) -> str:
        """Returns the name that the model first has for a parameter or buffer."""
        return self._first_names.get(name, name)

    def is_known(self, tensor: Tensor) -> bool:
        """Tells whether a tensor is a value of this forward, or a parameter or buffer of the model."""
        return id(tensor) in self.refs or id(tensor) in self.states

    def note(self, tensor: Tensor, ref: Ref) -> None:
        """Remembers where a tensor comes from."""
        if id(tensor) not in self.refs:
            self._known.append(tensor)
        self._places.setdefault(id(tensor), []).append(ref)
        self.refs[id(tensor)] = ref

    def note_tree(self, tree: Any, number: int) -> None:
        """Remembers which node returned a tree, if it holds more than tensors."""
        leaves = trees.leaves_of(tree)
        if not all(isinstance(leaf, (Tensor, type(None))) for leaf in leaves):
            self._trees[id(tree)] = number, [id(leaf) for leaf in leaves]
            self._alive += [tree, leaves]

    def note_inner(self, module: str, call: int, output: Any, number: int) -> None:
        """Remembers what a module inside a leaf returned."""
        for index, leaf in enumerate(trees.leaves_of(output)):
            if isinstance(leaf, Tensor) and id(leaf) not in self.inner:
                self.inner[id(leaf)] = Inner(leaf, number, module, call, index, version_of(leaf))

    def node_of(self, tree: Any) -> int | None:
        """Returns the node that returned a tree as it is now, if it is one that holds more than tensors."""
        number, leaves = self._trees.get(id(tree), (None, []))
        return number if number is not None and [id(leaf) for leaf in trees.leaves_of(tree)] == leaves else None

    def was_before(self, tensor: Tensor) -> bool:
        """Tells whether a tensor was there before the forward, and is no result of an earlier computation."""
        return tensor.grad_fn is None and self._earlier.has(tensor)

    def made_of_nothing(self) -> list[Tensor]:
        """Returns the tensors that the forward made and that depend on nothing."""
        return [tensor for tensor in self._known if not self.flags.get(self.refs[id(tensor)].node, INPUT)]

    def is_constant(self, tensor: Tensor) -> bool:
        """Tells whether a tensor depends on nothing."""
        if id(tensor) in self.refs:
            return not self.flags[self.refs[id(tensor)].node]
        return id(tensor) not in self.states and not tensor.requires_grad and self.was_before(tensor)

    def state_under(self, tensor: Tensor) -> State | None:
        """Returns the parameter or buffer whose memory a tensor lies in."""
        return self._state_memory.get(memory_of(tensor))

    def sharing(self, written: list[Tensor]) -> list[Tensor]:
        """Returns the other known tensors that share memory with some."""
        memory, own = {memory_of(t) for t in written} - {0}, {id(t) for t in written}
        return [t for t in self._known if id(t) not in own and memory_of(t) in memory] if memory else []

    def places(self, tensor: Tensor) -> tuple[Ref, ...]:
        """Returns all Refs that a tensor has had."""
        return tuple(self._places.get(id(tensor), ()))

    def flags_of(self, template: Template) -> int:
        """Returns what a tree depends on."""
        flags = 0
        for leaf in template.leaves:
            if type(leaf) is Ref:
                flags |= self.flags[leaf.node]
            elif type(leaf) is State:
                flags |= STATE if leaf.name in self._parameters else BUFFER
            elif type(leaf) is Held:
                flags |= STATE
        return flags


def version_of(tensor: Tensor) -> int:
    """Returns how often a tensor's memory was written to."""
    return -1 if tensor.is_inference() else tensor._version


def memory_of(tensor: Tensor) -> int:
    """Returns where the memory is that a tensor lies in; 0 where it has none."""
    try:
        return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0
    except (RuntimeError, NotImplementedError):
        return 0
