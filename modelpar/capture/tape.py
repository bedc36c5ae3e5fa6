"""Records one real forward: Tape. It sees every torch function that the model's code calls, and calls leaves whole.

torch.fx replaces the model's values by proxies, torch.export the whole model by its operators; both fail on much code
that runs well. The tape lets the code run and writes down what it does. What it cannot follow raises Trap, naming the
module whose code did it: calling that module whole hides the trouble in a leaf.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from modelpar.capture import trees
from modelpar.capture.recording import (
    PLACEHOLDER,
    Apply,
    Attribute,
    Guard,
    Held,
    Node,
    Recording,
    Ref,
    Settings,
    State,
    Template,
    function_name,
)
from modelpar.planning.graph import BATCH

_PATCHING = threading.RLock()
"""nn.Module.__call__ and Function.apply are replaced while a tape runs: one at a time."""

# fmt: off
_DESCRIBES = frozenset((
    "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized",
    "is_nested", "is_mkldnn", "is_mps", "is_xpu", "requires_grad", "grad_fn", "is_leaf", "itemsize", "nbytes",
    "names", "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size",
    "is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_same_size", "get_device", "type", "len",
    "hash", "is_inference", "has_names", "is_pinned", "is_shared", "result_type", "promote_types", "can_cast",
    "is_tensor", "is_conj", "is_neg", "is_storage", "output_nr", "version", "retains_grad", "is_coalesced",
    "dense_dim", "sparse_dim", "dir", "repr", "str", "format",
))
# fmt: on
"""Functions that tell how a tensor is made, not what is in it."""

_SHAPED_BY_VALUES = frozenset(
    {
        "nonzero",
        "masked_select",
        "unique",
        "unique_consecutive",
        "unique_dim",
        "argwhere",
        "bincount",
        "repeat_interleave",
        "to_sparse",
    }
)
"""Functions that return as many values as the data say."""

_OWN = ("torch", "modelpar")
_SCALARS = (bool, int, float, complex, str, bytes, type(None))


class Trap(Exception):
    """Reports code that cannot be followed, and the module that it belongs to: "" is the model itself."""

    def __init__(self, module: str, line: str, what: str):
        super().__init__(f"{what} ({line})" if line else what)
        self.module, self.line, self.what = module, line, what


_INPUT, _BUFFER, _STATE = 1, 2, 4
"""What a value depends on, as bits: the batch, buffers, parameters or random numbers or what was written to."""


class Tape:
    """One recording under way. Use `record`."""

    def __init__(self, model: nn.Module, leaves: frozenset[str]):
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._model, self.leaves = model, leaves
        named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        self._states = {id(tensor): State(name) for name, tensor in reversed(named)}
        self._state_memory = {memory: self._states[id(t)] for _, t in reversed(named) if (memory := _memory(t))}
        self._parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)}
        self._refs: dict[int, Ref] = {}
        self._places: dict[int, list[Ref]] = {}
        """All Refs that each tensor has had: who writes to it, or hands it on as it is, gives it a new one."""
        self._trees: dict[int, tuple[int, list[int]]] = {}
        """Trees that hold more than tensors: the node that returned each, and the ids of its leaves."""
        self._alive: list[Any] = []
        """All objects with an entry by id, so that no other gets it."""
        self._known: list[Tensor] = []
        """All tensors with an entry, to find those that share memory."""
        self._flags: dict[int, int] = {BATCH: _INPUT}
        self._held: dict[int, int] = {}
        self._snapshots: list[Any] = []
        self._holders: dict[int, list[int]] = {}
        """The nodes that took each held object."""
        self._constants: set[int] = set()
        self.nodes: list[Node] = []
        self.guards: list[Guard] = []
        self.together: list[tuple[int, int, str]] = []
        self._path: list[str] = [""]
        self._inside = 0
        """How many calls deep in something that is one node."""
        self._thread = threading.get_ident()
        self._before = {id(o): o for o in gc.get_objects() if issubclass(type(o), Tensor)}
        """Tensors that were there before the forward: those that it uses, and that are no state, are constants."""
        self._draws: list[str] = []
        self._last_draw: int | None = None
        """The last node in which the model's own code drew."""
        self.trapped: Trap | None = None
        """The last trap, which the model's code may have caught."""
        self._failed: tuple[Any, list[Tensor]] = "", []

    def failure(self, error: Exception) -> str:
        """Says which layer, or that the model itself, failed on the batch."""
        name, tensors = self._failed
        if not name:
            return "the model failed on the example batch"
        shapes = ", ".join(str(list(t.shape)) for t in tensors) or "no tensors"
        kind = type(self._model.get_submodule(name)).__name__
        return f"layer {name} ({kind}) failed on the example batch, input {shapes}"

    def record(
        self,
        forward: Callable[[], Any],
        batch: dict[str, Tensor],
        num_samples: int,
        finish: Callable[[Any], Any],
        targets: Any = None,
    ) -> tuple[Recording, Any]:
        """Returns what a forward did, and its output; `batch` are the tensors it takes, `finish` picks what counts of
        its output, `targets` are what the loss takes as well. Raises Trap."""
        for i, tensor in enumerate(batch.values()):
            self._note(tensor, Ref(BATCH, i))
        attributes = _attributes(self._model, self.leaves)
        with self._recording():
            output = forward()
        if self.trapped:  # the model's code caught it
            raise self.trapped
        self._check_attributes(attributes)
        output = finish(output)
        taken = self._template(output, "")
        recording = Recording(
            nodes=tuple(self.nodes),
            output=taken,
            targets=None if targets is None else self._template(targets, ""),
            batch=tuple(batch),
            batch_bytes=tuple(t.numel() * t.element_size() for t in batch.values()),
            num_samples=num_samples,
            guards=tuple(self.guards),
            held=tuple(self._snapshots),
            together=tuple((i, j) for i, j, _ in self.together),
            why=tuple(why for _, _, why in self.together),
            leaves=self.leaves,
        )
        return recording, output

    # what runs

    @contextmanager
    def _recording(self) -> Iterator[None]:
        call, apply = nn.Module.__call__, torch.autograd.Function.__dict__["apply"]
        tape = self

        def patched_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if tape._elsewhere():
                return call(module, *args, **kwargs)
            return tape._call(lambda *a, **k: call(module, *a, **k), module, args, kwargs)

        def patched_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            bound = apply.__get__(None, cls)
            if tape._elsewhere():
                return bound(*args, **kwargs)
            return tape._custom(cls, bound, args, kwargs)

        with _PATCHING, _Watch(self), self._watch_draws():
            nn.Module.__call__ = patched_call  # type: ignore[method-assign]
            torch.autograd.Function.apply = classmethod(patched_apply)  # type: ignore[assignment, method-assign]
            try:
                yield
            finally:
                nn.Module.__call__ = call  # type: ignore[method-assign]
                torch.autograd.Function.apply = apply  # type: ignore[method-assign]

    def _elsewhere(self) -> bool:
        return bool(self._inside) or threading.get_ident() != self._thread

    def _call(self, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Calls a module of the model: a leaf as one node, any other by following its code."""
        name = self._modules.get(id(module))
        if name is None:
            if any(True for _ in module.parameters()):
                raise self._trap(f"calls a {type(module).__name__} with parameters that is no part of the model")
            return call(*args, **kwargs)
        if name not in self.leaves:
            self._path.append(name)
            try:
                return call(*args, **kwargs)
            finally:
                self._path.pop()
        return self._one(name, call, args, kwargs)

    def _custom(self, function: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Applies a custom autograd function as one node."""
        if any(isinstance(leaf, nn.Module) or callable(leaf) for leaf in trees.leaves_of((args, kwargs))):
            raise self._trap(f"hands code to {function.__name__}, as reentrant checkpoints do")
        return self._one(Apply(function), call, args, kwargs)

    def function(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls a torch function of the code that is followed."""
        name = function_name(function)
        tensors = trees.tensors_of((args, kwargs))
        if getattr(function, "__name__", "") in ("__set__", "__delete__"):
            raise self._trap(f"sets {getattr(function.__self__, '__name__', name)!r} of a tensor")  # type: ignore[attr-defined]
        if getattr(function, "__name__", "") == "__get__":
            return self._property(function, args, kwargs)
        if name in _DESCRIBES:
            return function(*args, **kwargs)
        if _takes_shape_from_values(name, args, kwargs):
            raise self._trap(f"{name} returns as many values as the data say")
        versions = [_version(t) for t in tensors]
        output = self._one(function, function, args, kwargs, versions)
        return output

    def _property(self, function: Any, args: Any, kwargs: Any) -> Any:
        name = function.__self__.__name__
        if name in _DESCRIBES or name in ("_version", "_grad_fn", "_backward_hooks", "_post_accumulate_grad_hooks"):
            return function(*args, **kwargs)
        if name in ("grad", "_grad"):
            raise self._trap("reads the gradient of a tensor")
        found = function(*args, **kwargs)
        if not isinstance(found, Tensor):
            raise self._trap(f"reads {name!r} of a tensor")
        return self._one(Attribute(name), lambda *a: found, args, kwargs)

    def _one(
        self,
        target: str | Callable[..., Any],
        call: Callable[..., Any],
        args: Any,
        kwargs: Any,
        versions: list[int] | None = None,
    ) -> Any:
        """Calls something as one node."""
        self._inside += 1
        try:
            return self._one_node(target, call, args, kwargs, versions, _line())
        finally:
            self._inside -= 1

    def _one_node(
        self,
        target: str | Callable[..., Any],
        call: Callable[..., Any],
        args: Any,
        kwargs: Any,
        versions: list[int] | None,
        line: str,
    ) -> Any:
        if torch.is_inference_mode_enabled():
            raise self._trap("computes in inference mode")
        is_module = isinstance(target, str)
        template = self._template((args, kwargs), line)
        tensors = trees.tensors_of((args, kwargs))
        versions = [_version(t) for t in tensors] if versions is None else versions
        settings = _settings()
        states, drawn = generator_states(), len(self._draws)
        fresh = self._fresh_run(target, call, template, args, kwargs) if template.held else None
        module = self._model.get_submodule(target) if isinstance(target, str) else None
        buffers = [(b, b._version) for b in module.buffers()] if module else []
        try:
            output = call(*args, **kwargs)
        except Exception:
            if module is not None:
                self._failed = target, tensors
            raise
        found = trees.leaves_of(output)
        given = [leaf for leaf in found if isinstance(leaf, Tensor)]
        written = [t for t, v in zip(tensors, versions, strict=True) if _version(t) != v]
        drew = not all(map(torch.equal, states, generator_states()))
        if not given and not is_module and not written:
            self._read(target, template, tensors, output, line)
            return output
        number = len(self.nodes)
        if drew and not is_module:
            self._draw(number)
        flags = self._flags_of(template)
        if drew or (module and _has_own_state(module)) or any(b._version != version for b, version in buffers):
            flags |= _STATE
        written = list({id(t): t for t in written}.values())
        memory = {_memory(t) for t in written} - {0}
        own = {id(t) for t in written}
        changed = [*written, *(t for t in self._known if id(t) not in own and memory and _memory(t) in memory)]
        for tensor in written:
            state = self._state_memory.get(_memory(tensor))
            if state and id(tensor) not in self._states:
                made = self._refs[id(tensor)].node if id(tensor) in self._refs else number
                self.together.append((made, number, f"{function_name(target)} writes to {state.name}"))
            flags |= _STATE if state else 0
        self.nodes.append(
            Node(
                target=target,
                args=template,
                inside=self._path[-1],
                line=line,
                writes=tuple(self._leaf_of(t, line) for t in changed),
                touches=tuple(ref for t in changed for ref in self._places.get(id(t), ())),
                written=tuple((t.requires_grad, t.numel() * t.element_size()) for t in changed),
                aliases=len(changed) - len(written),
                draws=tuple(dict.fromkeys(self._draws[drawn:])),
                settings=settings,
                plain=tuple(PLACEHOLDER if isinstance(leaf, Tensor) else leaf for leaf in found),
                needs_grad=tuple(isinstance(t, Tensor) and t.requires_grad for t in found),
                num_bytes=tuple(t.numel() * t.element_size() if isinstance(t, Tensor) else 0 for t in found),
            )
        )
        for k, tensor in enumerate(changed):
            if id(tensor) not in self._states:
                flags |= self._flags[self._refs[id(tensor)].node] if id(tensor) in self._refs else 0
                self._note(tensor, Ref(number, -1 - k))
        self._flags[number] = flags
        if not all(isinstance(leaf, (Tensor, type(None))) for leaf in found):
            self._trees[id(output)] = number, [id(leaf) for leaf in found]
            self._alive += [output, found]
        for held in template.held:
            self._holders.setdefault(held.number, []).append(number)
        for index, leaf in enumerate(found):
            if isinstance(leaf, Tensor):
                self._note(leaf, Ref(number, index))
        if fresh is not None:
            self._check_independent(number, template, fresh, output)
        if not flags & _STATE:
            self.nodes[-1] = dataclasses.replace(self.nodes[-1], free=True)
        return output

    # what is taken

    def _template(self, tree: Any, line: str) -> Template:
        """Returns a tree's template."""
        if (number := self._node_of(tree)) is not None:
            return Template((Ref(number, None),), trees.flatten(0)[1])
        leaves, spec = trees.flatten(self._with_whole_trees(tree))
        return Template(tuple(self._leaf(leaf, line) for leaf in leaves), spec)

    def _with_whole_trees(self, tree: Any) -> Any:
        """Puts a Ref where an argument is the very tree that a node returned."""
        if not self._trees or not (type(tree) is tuple and len(tree) == 2 and type(tree[0]) is tuple):
            return tree
        args, kwargs = tree

        def whole(value: Any) -> Any:
            number = self._node_of(value)
            return value if number is None else _Whole(Ref(number, None))

        return tuple(map(whole, args)), {key: whole(value) for key, value in kwargs.items()}

    def _node_of(self, tree: Any) -> int | None:
        """Returns the node that returned a tree as it is now, if it is one that holds more than tensors."""
        number, leaves = self._trees.get(id(tree), (None, []))
        return number if number is not None and [id(leaf) for leaf in trees.leaves_of(tree)] == leaves else None

    def _leaf(self, leaf: Any, line: str) -> Any:
        if isinstance(leaf, Tensor):
            return self._leaf_of(leaf, line)
        if isinstance(leaf, _Whole):
            return leaf.ref
        if isinstance(leaf, nn.Module):
            raise self._trap(f"hands a {type(leaf).__name__} to a call")
        if isinstance(leaf, _PLAIN) or callable(leaf):
            return leaf
        if isinstance(leaf, slice):
            if any(isinstance(end, Tensor) for end in (leaf.start, leaf.stop, leaf.step)):
                raise self._trap("cuts a tensor where the data say")
            return leaf
        if id(leaf) not in self._held:
            if _holds_tensors(leaf):
                raise self._trap(f"hands on a {type(leaf).__name__} that holds tensors")
            try:
                snapshot = copy.deepcopy(leaf)
            except Exception as error:
                raise self._trap(f"hands on a {type(leaf).__name__}, which cannot be copied: {error}") from error
            self._held[id(leaf)] = len(self._snapshots)
            self._snapshots.append(snapshot)
            self._alive.append(leaf)
        return Held(self._held[id(leaf)])

    def _leaf_of(self, tensor: Tensor, line: str) -> Any:
        ref = self._refs.get(id(tensor))
        if ref is None and id(tensor) in self._states:
            return self._states[id(tensor)]
        if ref is not None:
            if isinstance(tensor.grad_fn, BackwardCFunction) and ref.node != BATCH:
                node = self.nodes[ref.node]
                if not node.is_module and not isinstance(node.target, Apply) and ref.index is not None:
                    raise self._trap("uses a custom autograd function by a name bound before", node.inside, node.line)
            return ref
        if id(tensor) not in self._before or tensor.grad_fn is not None:
            raise self._trap("uses a tensor of unknown origin: made by code that torch does not see", line=line)
        if tensor.requires_grad:
            raise self._trap("uses a tensor that requires a gradient and is no parameter of the model", line=line)
        if id(tensor) not in self._constants:
            self._constants.add(id(tensor))
            self._alive.append(tensor)
        return tensor.detach()

    def _flags_of(self, template: Template) -> int:
        flags = 0
        for leaf in template.leaves:
            if type(leaf) is Ref:
                flags |= self._flags[leaf.node]
            elif type(leaf) is State:
                flags |= _STATE if leaf.name in self._parameters else _BUFFER
            elif type(leaf) is Held:
                flags |= _STATE
        return flags

    def _note(self, tensor: Tensor, ref: Ref) -> None:
        """Remembers where a tensor comes from."""
        if id(tensor) not in self._refs:
            self._known.append(tensor)
        self._places.setdefault(id(tensor), []).append(ref)
        self._refs[id(tensor)] = ref

    def _draw(self, number: int) -> None:
        """Notes that code that is followed drew random numbers: only the model's own may, since nobody calls others."""
        if self._path[-1]:
            raise self._trap("draws random numbers in its own forward")
        self._draws.append("")
        if self._last_draw is not None:
            self.together.append((self._last_draw, number, "the model's own forward draws random numbers in both"))
        self._last_draw = number

    # what it cannot follow

    def _read(self, target: Any, template: Template, tensors: list[Tensor], outcome: Any, line: str) -> None:
        """Notes that the code read something from tensors: fixed, a guard, or a trap."""
        flags = self._flags_of(template)
        if not tensors or flags == 0:
            return
        name = function_name(target)
        if not flags & (_STATE | _BUFFER) and _is_plain(outcome):
            self.guards.append(Guard(target, template, copy.deepcopy(outcome)))
            return
        raise self._trap(f"reads a value that depends on {'weights' if flags & _STATE else 'buffers'} ({name})")

    def _trap(self, what: str, inside: str | None = None, line: str | None = None) -> Trap:
        self.trapped = Trap(self._path[-1] if inside is None else inside, line if line is not None else _line(), what)
        return self.trapped

    def _check_attributes(self, before: dict[str, dict[str, Any]]) -> None:
        after = _attributes(self._model, self.leaves)
        for module, values in before.items():
            for name in values.keys() | after[module].keys():
                if values.get(name, _MISSING) != after[module].get(name, _MISSING):
                    raise Trap(module, "", f"sets its attribute {name!r} in forward")

    def _fresh_run(self, target: Any, call: Callable[..., Any], template: Template, args: Any, kwargs: Any) -> Any:
        """Runs a call with fresh copies of the held objects it takes that others took before; None where none did."""
        if not any(self._holders.get(held.number) for held in template.held):
            return None
        leaves, spec = trees.flatten((args, kwargs))
        fresh = [
            copy.deepcopy(self._snapshots[t.number]) if type(t) is Held else _clone(leaf)
            for leaf, t in zip(leaves, template.leaves, strict=True)
        ]
        args, kwargs = trees.unflatten(fresh, spec)
        states = generator_states()
        try:
            with torch.no_grad():
                return call(*args, **kwargs)
        except Exception as error:  # it needs what others left in the object
            return error
        finally:
            set_generator_states(states)

    def _check_independent(self, number: int, template: Template, fresh: Any, output: Any) -> None:
        """Keeps calls together where one uses what another left in an object that both take."""
        ours, theirs = trees.tensors_of(output), trees.tensors_of(fresh) if not isinstance(fresh, Exception) else []
        if len(ours) == len(theirs) and all(map(_same, ours, theirs)):
            return
        for held in template.held:
            for first in self._holders.get(held.number, [])[:1]:
                kind = type(self._snapshots[held.number]).__name__
                self.together.append((first, number, f"they hand values to each other in a {kind}"))

    @contextmanager
    def _watch_draws(self) -> Iterator[None]:
        """Collects the FQNs of modules whose own forward, not that of a child, moves a random generator."""
        stack: list[list[Tensor]] = []
        names: list[str] = []

        def note() -> None:
            if stack and not all(map(torch.equal, stack[-1], generator_states())):
                self._draws.append(names[-1])

        def before(module: nn.Module, _: Any) -> None:
            note()
            stack.append(generator_states())
            names.append(self._modules[id(module)])

        def after(*_: Any) -> None:
            note()
            stack.pop()
            names.pop()
            if stack:
                stack[-1] = generator_states()

        watched = {
            module
            for name in self.leaves
            for module in self._model.get_submodule(name).modules()
            if id(module) in self._modules
        }
        handles: list[Any] = []
        for module in watched:
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Watch(TorchFunctionMode):
    """Shows a tape all torch functions called on its thread."""

    def __init__(self, tape: Tape):
        super().__init__()
        self._tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._tape._elsewhere():
            return func(*args, **kwargs)
        return self._tape.function(func, args, kwargs)


class _Whole:
    """Stands for a tree that a node returned, while the arguments are taken apart."""

    def __init__(self, ref: Ref):
        self.ref = ref


_MISSING = object()
_PLAIN = (*_SCALARS, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, torch.Generator, range)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, _SCALARS)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0
    except (RuntimeError, NotImplementedError):
        return 0


def _holds_tensors(thing: Any) -> bool:
    """Tells whether a tensor can be reached from an object, other than through classes, modules and functions."""
    todo, seen = [thing], {id(thing)}
    while todo:
        found = todo.pop()
        if isinstance(found, Tensor):
            return True
        if isinstance(found, (type, ModuleType, FunctionType, nn.Module, *_SCALARS)):
            continue
        for inner in gc.get_referents(found):
            if id(inner) not in seen:
                seen.add(id(inner))
                todo.append(inner)
    return False


def _clone(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.detach(), b.detach())


def _has_own_state(module: nn.Module) -> bool:
    """Tells whether calling a module depends on more than its arguments and its buffers, or changes these."""
    return any(True for _ in module.parameters()) or any(
        isinstance(part, nn.modules.batchnorm._NormBase) for part in module.modules()
    )


def _settings() -> Settings | None:
    grad = torch.is_grad_enabled()
    casts = tuple(
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
        if torch.is_autocast_enabled(kind)
    )
    return None if grad and not casts else Settings(grad, casts)


def _takes_shape_from_values(name: str, args: Any, kwargs: Any) -> bool:
    if name in _SHAPED_BY_VALUES:
        if name == "repeat_interleave":
            repeats = args[1] if len(args) > 1 else kwargs.get("repeats", args[0] if args else None)
            return isinstance(repeats, Tensor) and "output_size" not in kwargs
        return True
    if name == "where":
        return len(args) + len(kwargs) == 1
    if name == "tensor_split":
        return any(isinstance(leaf, Tensor) for leaf in trees.leaves_of((args[1:], kwargs)))
    if name == "getitem":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) and i.dim() for i in index)
    return False


def generator_states() -> list[Tensor]:
    """Returns the states of the CPU generator and, where CUDA is in use, of the current device's."""
    with torch._C.DisableTorchFunction():
        states = [torch.default_generator.get_state()]
        return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else states


def set_generator_states(states: list[Tensor]) -> None:
    """Sets what `generator_states` returned."""
    torch.default_generator.set_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


def _attributes(model: nn.Module, leaves: frozenset[str]) -> dict[str, dict[str, Any]]:
    """Returns the plain attributes, and the identity of tensors, of all modules that are not inside leaves."""
    found = {}
    for name, module in model.named_modules():
        if any(name == leaf or name.startswith(f"{leaf}.") for leaf in leaves):
            continue
        own = {key: value for key, value in vars(module).items() if isinstance(value, _SCALARS)}
        tensors = {**module._parameters, **module._buffers}
        tensors |= {key: value for key, value in vars(module).items() if isinstance(value, Tensor)}
        found[name] = own | {key: id(value) for key, value in tensors.items()}
    return found


def _line() -> str:
    """Returns where the model's code is: the innermost frame that is neither torch's nor modelpar's."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] not in _OWN or module.startswith("modelpar.models"):
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
