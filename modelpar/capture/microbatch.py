"""How a batch is cut into micro-batches: Cutting.

::

    a batch of 4 samples              micro-batches
    x          [4, 8]                 x[:2]          x[2:]          as long as the batch: cut
    lengths    [3, 1, 2, 2]           [3, 1]         [2, 2]         a list of samples: cut
    bias       [9, 9]                 bias           bias           of another length: shared
    sizes      {"a": [4, 2], "b": 7}  {"a": …}       {"a": …}       a structure: each part by itself

A batch has as many samples as the first tensor or array among its inputs is long, or, where all are in lists, as the
first list. A list or tuple of that length is samples; any other is a structure, as is the tuple of positional
arguments. Where both fit, because the tensors in it are as long as well, a list is samples and a tuple a structure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from modelpar.capture.parts import ARRAYS, arrays_in, brief, children_of, length_of
from modelpar.errors import ConfigError
from modelpar.planning.reading import Reading

if TYPE_CHECKING:
    from modelpar.capture.objective import Objective

_SAMPLES, _SHARED, _STRUCTURE = "samples", "shared", "structure"


class Microbatch(NamedTuple):
    """A part of a batch."""

    inputs: Any
    targets: Any
    size: int
    """How many samples it has: the weight of a loss that is a mean."""


@dataclass(frozen=True)
class Cutting:
    """The way in which an objective's batches are cut."""

    dim: int = 0
    """The dimension of tensors and arrays that counts samples."""
    shared: tuple[str, ...] = ()
    """Names of parts that are not cut, as people give them."""
    own: Callable[[Any, Any, int], Any] | None = None
    """The user's own function, see `Objective.cut`."""
    known: Reading = field(default_factory=Reading)
    """How the example batch was read."""

    @classmethod
    def of(cls, objective: Objective, known: Reading | None = None) -> Cutting:
        """Returns the way of an objective; a plan knows how its example batch was read."""
        return cls(objective.batch_dim, tuple(map(str, objective.shared)), objective.cut, known or Reading())

    def read(self, batch: tuple[Any, Any]) -> Cutting:
        """Returns a Cutting that reads other batches as this one.

        Raises ConfigError for a shared name that the batch does not have, for one without samples, and for targets of
        another length than the inputs.
        """
        for name in self.shared:
            names = [found for found, _ in _nodes(batch) if found not in ("inputs", "targets")]
            if not any(_means(name, found) for found in names):
                raise ConfigError(
                    f"shared names {name!r}, which the batch does not have; expected one of {_few(names)}"
                )
        if self.own is not None:
            return self
        parts = [part for part in self._parts(batch, self._checked_size(batch)) if length_of(part[1], self.dim)]
        samples, shared = ([name for name, _, kind in parts if kind == each] for each in (_SAMPLES, _SHARED))
        return replace(self, known=Reading(tuple(samples), tuple(shared)))

    def size(self, inputs: Any, targets: Any = None) -> int:
        """Returns the number of samples. Raises ConfigError where nothing counts them."""
        if self.own is not None:
            return sum(microbatch.size for microbatch in self.cut((inputs, targets), 1))
        lists = []
        for name, node in self._outside_lists(inputs, "inputs"):
            if (length := length_of(node, self.dim)) is None:
                continue
            if self.known.samples and name not in self.known.samples:
                continue
            if name not in self.known.samples and not isinstance(node, ARRAYS):
                lists.append(node)
                continue
            return _not_empty(length, node)
        if self.known.samples:  # another structure than that of the example
            return replace(self, known=replace(self.known, samples=())).size(inputs, targets)
        if lists:
            return self._size_of_list(lists[0], [*lists[1:], targets])
        raise ConfigError(
            f"the batch has no tensor with dimension {self.dim} to cut; expected (inputs, targets) with tensors, "
            "arrays or lists of samples"
        )

    def cut(self, batch: tuple[Any, Any], num_microbatches: int) -> list[Microbatch]:
        """Returns micro-batches as equal as can be; with fewer samples than micro-batches, one sample each.

        Raises ConfigError where targets, or parts that counted samples in the example batch, have another length.
        """
        if self.own is not None:
            return _checked(self.own(*batch, num_microbatches), num_microbatches)
        size = self._checked_size(batch)
        sizes = microbatch_sizes(size, num_microbatches)
        inputs, targets = self._each(batch, size, lambda node: _slices(node, sizes, self.dim), len(sizes))
        return [Microbatch(*parts) for parts in zip(inputs, targets, sizes, strict=True)]

    def first(self, batch: tuple[Any, Any], number: int) -> Microbatch:
        """Returns the first samples of a batch, uncut; about as many where the user's own function cuts."""
        if self.own is not None:
            whole = self.cut(batch, 1)[0]
            return self.cut(batch, max(1, whole.size // number))[0] if number < whole.size else whole
        size = self._checked_size(batch)
        sizes = [number, size - number] if number < size else [size]
        inputs, targets = self._each(batch, size, lambda node: _slices(node, sizes, self.dim), len(sizes))
        return Microbatch(inputs[0], targets[0], sizes[0])

    def take(self, batch: tuple[Any, Any], indices: Sequence[int]) -> tuple[Any, Any]:
        """Returns a batch of some samples of another one, which may be repeated."""

        def taken(node: Any) -> list[Any]:
            if isinstance(node, Tensor):
                return [node.index_select(self.dim, torch.as_tensor(indices, device=node.device))]
            if isinstance(node, np.ndarray):
                return [node.take(indices, self.dim)]
            return [type(node)(node[i] for i in indices)]

        inputs, targets = self._each(batch, self.size(*batch), taken, 1)
        return inputs[0], targets[0]

    def _checked_size(self, batch: tuple[Any, Any]) -> int:
        """Returns the number of samples; raises ConfigError where targets could count, and none counts as many."""
        inputs, targets = batch
        size = self.size(inputs, targets)
        parts = [part for part in self._parts_of(targets, "targets", size) if not self._is_shared(part[0])]
        lengths = [n for _, node, _ in parts if (n := length_of(node, self.dim)) is not None]
        if lengths and not any(kind == _SAMPLES for _, _, kind in parts):
            raise ConfigError(
                f"the batch has {size} inputs and {lengths[0]} targets; expected as many of each, or shared=[…] with "
                "the inputs or targets that do not count samples, or cut= for batches that are cut in another way, "
                "such as graphs"
            )
        return size

    def _size_of_list(self, found: Any, others: list[Any]) -> int:
        """Returns how many samples a list, or the tensors in it, count: what more of the other parts agree with."""
        inside = _common_length(found, self.dim)
        if inside is None or inside == len(found):
            return _not_empty(len(found), found)

        def votes(size: int) -> int:
            return sum(
                length_of(node, self.dim) == size or _common_length(node, self.dim) == size
                for other in others
                for _, node in self._outside_lists(other, "")
            )

        of_list, of_tensors = votes(len(found)), votes(inside)
        if of_list == of_tensors:
            return len(found) if type(found) is list else inside
        return len(found) if of_list > of_tensors else inside

    def _outside_lists(self, node: Any, name: str) -> Iterator[tuple[str, Any]]:
        """Yields what is not shared of a tree, in order: lists whole, except those known to be structures."""
        if self._is_shared(name):
            return
        if _is_list(name, node) and not self._is_known_structure(name):
            yield name, node
            return
        children, _ = children_of(node)
        if children is None:
            yield name, node
        for key, child in children or ():
            yield from self._outside_lists(child, f"{name}.{key}")

    def _each(
        self, batch: tuple[Any, Any], size: int, cut: Callable[[Any], list[Any]], count: int
    ) -> tuple[list[Any], list[Any]]:
        """Returns inputs and targets `count` times, of what counts samples the parts that `cut` gives."""

        def each(node: Any, name: str) -> list[Any]:
            kind = self._kind(name, node, size)
            if kind == _SAMPLES:
                return cut(node)
            if kind == _SHARED:
                return [_own_array(node)] * count
            children, spec = children_of(node)
            columns = [each(child, f"{name}.{key}") for key, child in children or ()]
            return [pytree.tree_unflatten(list(row), spec) for row in zip(*columns, strict=True)]

        return each(batch[0], "inputs"), each(batch[1], "targets")

    def _parts(self, batch: tuple[Any, Any], size: int) -> Iterator[tuple[str, Any, str]]:
        yield from self._parts_of(batch[0], "inputs", size)
        yield from self._parts_of(batch[1], "targets", size)

    def _parts_of(self, node: Any, name: str, size: int) -> Iterator[tuple[str, Any, str]]:
        """Yields name, value and kind of what is cut or shared as a whole."""
        kind = self._kind(name, node, size)
        if kind != _STRUCTURE:
            yield name, node, kind
            return
        for key, child in children_of(node)[0] or ():
            yield from self._parts_of(child, f"{name}.{key}", size)

    def _kind(self, name: str, node: Any, size: int) -> str:
        """Tells whether a part counts samples, is shared, or is a structure of parts."""
        if self._is_shared(name):
            return _SHARED
        length = length_of(node, self.dim)
        if name in self.known.samples and length is not None:
            if length != size and name.startswith("targets"):
                raise ConfigError(
                    f"the batch has {size} inputs and {length} targets; expected as many of each, as {name} had in the "
                    "example batch"
                )
            if length != size:
                raise ConfigError(
                    f"{name} has {length} entries in a batch of {size} samples, and had one per sample in the example "
                    f"batch; expected {size}, or shared=[{short_name(name)!r}] if it never counts samples"
                )
            return _SAMPLES
        if isinstance(node, ARRAYS):
            return _SAMPLES if length == size else _SHARED
        if not _is_list(name, node):
            return _STRUCTURE if children_of(node)[0] else _SHARED
        if length == size and not self._is_known_structure(name):
            return _STRUCTURE if type(node) is tuple and _common_length(node, self.dim) == size else _SAMPLES
        return _STRUCTURE if arrays_in(node) else _SHARED

    def _is_shared(self, name: str) -> bool:
        return name in self.known.shared or any(_means(given, name) for given in self.shared)

    def _is_known_structure(self, name: str) -> bool:
        return any(part.startswith(f"{name}.") for part in (*self.known.samples, *self.known.shared))


def checked_batch(batch: Any) -> tuple[Any, Any]:
    """Returns a batch as a pair; raises ConfigError for what is none."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        what = f"a {type(batch).__name__}{f' of {len(batch)}' if isinstance(batch, (tuple, list)) else ''}"
        raise ConfigError(f"the batch is {what}; expected a pair (inputs, targets)")
    return batch[0], batch[1]


def batch_size(inputs: Any, batch_dim: int = 0) -> int:
    """Returns the number of samples that inputs have, see `Cutting.size`."""
    return Cutting(batch_dim).size(inputs)


def split_batch(tree: Any, sizes: Sequence[int], batch_dim: int = 0) -> list[Any]:
    """Cuts inputs or targets into parts of the sizes, see `Cutting`; all that is not of their length is repeated."""
    slices = lambda node: _slices(node, list(sizes), batch_dim)  # noqa: E731
    return Cutting(batch_dim)._each((tree, None), sum(sizes), slices, len(sizes))[0]


def microbatch_sizes(num_samples: int, num_microbatches: int) -> list[int]:
    """Returns the sizes that `torch.tensor_split` gives; with fewer samples than micro-batches, one sample each."""
    count = min(num_samples, num_microbatches)
    base, more = divmod(num_samples, count)
    return [base + 1] * more + [base] * (count - more)


def _is_list(name: str, node: Any) -> bool:
    """Tells whether a part is a list or tuple that may be samples: the tuple of positional arguments is none."""
    return type(node) is list or (type(node) is tuple and name != "inputs")


def _nodes(batch: tuple[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yields all parts of a batch, containers before what they hold; of lists without tensors only these."""
    todo = [("targets", batch[1]), ("inputs", batch[0])]
    while todo:
        name, node = todo.pop()
        yield name, node
        if type(node) not in (list, tuple) or arrays_in(node):
            todo += [(f"{name}.{key}", child) for key, child in reversed(children_of(node)[0] or [])]


def _common_length(node: Any, dim: int) -> int | None:
    """Returns the one length that all tensors and arrays in a list have; None where there is none."""
    if type(node) not in (list, tuple):
        return None
    lengths = {length_of(array, dim) for array in arrays_in(node)}
    return lengths.pop() if len(lengths) == 1 else None


def _slices(node: Any, sizes: list[int], dim: int) -> list[Any]:
    """Cuts what counts samples. Arrays are copied: a recording may keep them."""
    if isinstance(node, Tensor):
        return list(node.split(sizes, dim))
    ends = np.cumsum(sizes)
    if isinstance(node, np.ndarray):
        return [part.copy() for part in np.split(node, ends[:-1], dim)]
    return [node[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _own_array(node: Any) -> Any:
    return node.copy() if isinstance(node, np.ndarray) else node


def _not_empty(length: int, node: Any) -> int:
    if not length:
        what = f"inputs have shape {list(node.shape)}" if isinstance(node, ARRAYS) else "inputs are an empty list"
        raise ConfigError(f"the batch is empty: {what}; expected at least 1 sample")
    return length


def _means(given: str, name: str) -> bool:
    """Tells whether a name as people give it, "mask" or "inputs.mask", is that of a part."""
    return name == f"inputs.{given}" or (name == given and given not in ("inputs", "targets"))


def short_name(name: str) -> str:
    """Returns a name as people give it."""
    return name.removeprefix("inputs.")


def _few(names: list[str]) -> str:
    shown = ", ".join(map(short_name, names[:12])) or "none: its inputs are one tensor"
    return f"{shown}, …" if len(names) > 12 else shown


def _checked(found: Any, num_microbatches: int) -> list[Microbatch]:
    """Returns what the user's own function gave; raises ConfigError where these are no micro-batches."""
    expected = "expected a list of (inputs, targets, number of samples)"
    if not isinstance(found, (list, tuple)) or not found:
        raise ConfigError(f"cut returned {brief(found)}; {expected}")
    for each in found:
        if not isinstance(each, (list, tuple)) or len(each) != 3 or type(each[2]) is not int or each[2] < 1:
            raise ConfigError(f"cut returned a list with {brief(each)}; {expected}, of at least 1 sample each")
    if len(found) > num_microbatches:
        raise ConfigError(f"cut returned {len(found)} micro-batches; expected at most {num_microbatches}")
    return [Microbatch(*each) for each in found]
