"""Records one real forward: Tape. It sees every torch function that the model's code calls, and calls leaves whole.

torch.fx replaces the model's values by proxies, torch.export the whole model by its operators; both fail on much code
that runs well. The tape lets the code run and writes down what it does. What it cannot follow raises Trap, naming the
module whose code did it: calling that module whole hides the trouble in a leaf.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from modelpar.capture import trees
from modelpar.capture.held import HeldObjects, tensors_in
from modelpar.capture.origins import BUFFER, STATE, Origins, version_of
from modelpar.capture.recording import (
    PLACEHOLDER,
    Apply,
    Attribute,
    Guard,
    Node,
    Recording,
    Ref,
    Settings,
    Template,
    function_name,
)
from modelpar.capture.traps import (
    DESCRIBES,
    SCALARS,
    Trap,
    attributes_of,
    changed_attribute,
    code_line,
    is_plain,
    takes_shape_from_values,
)
from modelpar.capture.watch import Functions, custom_calls, generator_states, has_drawn, module_calls
from modelpar.planning.graph import BATCH

_PLAIN = (*SCALARS, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, torch.Generator, range)


class Tape:
    """One recording under way. Use `record`."""

    def __init__(self, model: nn.Module, leaves: frozenset[str]):
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._model, self.leaves = model, leaves
        self._origins, self._held = Origins(model), HeldObjects()
        self.nodes: list[Node] = []
        self.guards: list[Guard] = []
        self.together: list[tuple[int, int, str]] = []
        self._path: list[str] = [""]
        self._inside = 0
        """How many calls deep in something that is one node."""
        self._functions = Functions(self._function)
        self._grad = torch.is_grad_enabled()
        self._draws: list[str] = []
        self._calling: list[tuple[str, list[Tensor]]] = []
        """The modules inside a leaf that are running, and the generators as their own code last left them."""
        self._calls: Counter[str] = Counter()
        """How often each module was called inside the leaf that is running."""
        self._leaf_calls: Counter[Any] = Counter()
        """How often each leaf was called."""
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
            self._origins.note(tensor, Ref(BATCH, i))
        attributes = attributes_of(self._model, self.leaves)
        with module_calls(self._call), custom_calls(self._custom), self._functions:
            output = forward()
        if self.trapped:  # the model's code caught it
            raise self.trapped
        if changed := changed_attribute(attributes, attributes_of(self._model, self.leaves)):
            raise Trap(changed[0], "", f"sets its attribute {changed[1]!r} in forward")
        self.together += self._held.bound()
        output = finish(output)
        taken = self._template(self._without_objects(output), "")
        recording = Recording(
            nodes=tuple(self._with_calls_that_count()),
            output=taken,
            targets=None if targets is None else self._of_targets(targets),
            batch=tuple(batch),
            num_samples=num_samples,
            guards=tuple(self.guards),
            held=tuple(self._held.snapshots),
            together=tuple((i, j) for i, j, _ in self.together),
            why=tuple(why for _, _, why in self.together),
            leaves=self.leaves,
        )
        return recording, output

    def _with_calls_that_count(self) -> Iterator[Node]:
        """Yields the nodes, with the calls of such modules only as drew random numbers, here or elsewhere."""
        drew = {name for node in self.nodes for name in node.draws}
        for node in self.nodes:
            yield dataclasses.replace(node, calls=tuple((name, n) for name, n in node.calls if name in drew))

    # what runs

    def _call(self, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Calls a module of the model: a leaf as one node, any other by following its code."""
        name = self._modules.get(id(module))
        if self._inside:
            return call(*args, **kwargs) if name is None else self._call_inside(name, call, *args, **kwargs)
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
        with self._functions.away():
            self._calls.clear()
            return self._one(name, partial(self._call_inside, name, call), args, kwargs)

    def _call_inside(self, name: str, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Calls a leaf or a module inside one; notes whether its own forward draws, and what it returns."""
        self._note_draws()
        self._calling.append((name, generator_states()))
        try:
            output = call(*args, **kwargs)
        finally:
            self._note_draws()
            self._calling.pop()
            if self._calling:
                self._calling[-1] = self._calling[-1][0], generator_states()
        self._origins.note_inner(name, self._calls[name], output, len(self.nodes))
        self._calls[name] += 1
        return output

    def _note_draws(self) -> None:
        if self._calling and has_drawn(self._calling[-1][1]):
            self._draws.append(self._calling[-1][0])

    def _custom(self, function: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Applies a custom autograd function as one node."""
        if self._inside:
            return call(*args, **kwargs)
        if any(isinstance(leaf, nn.Module) or callable(leaf) for leaf in trees.leaves_of((args, kwargs))):
            raise self._trap(f"hands code to {function.__name__}, as reentrant checkpoints do")
        with self._functions.away():
            return self._one(Apply(function), call, args, kwargs)

    def _function(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls a torch function of the code that is followed."""
        if self._inside:
            return function(*args, **kwargs)
        name, short = function_name(function), getattr(function, "__name__", "")
        if short in ("__set__", "__delete__"):
            raise self._trap(f"sets {getattr(function.__self__, '__name__', name)!r} of a tensor")  # type: ignore[attr-defined]
        if short == "__get__":
            return self._property(function, args, kwargs)
        if name in DESCRIBES:
            return function(*args, **kwargs)
        if takes_shape_from_values(name, args, kwargs):
            raise self._trap(f"calls {name}, which returns as many values as the data say")
        return self._one(function, function, args, kwargs)

    def _property(self, function: Any, args: Any, kwargs: Any) -> Any:
        name = function.__self__.__name__
        if name in DESCRIBES or name in ("_version", "_grad_fn", "_backward_hooks", "_post_accumulate_grad_hooks"):
            return function(*args, **kwargs)
        if name in ("grad", "_grad"):
            raise self._trap("reads the gradient of a tensor")
        found = function(*args, **kwargs)
        if not isinstance(found, Tensor):
            raise self._trap(f"reads {name!r} of a tensor")
        return self._one(Attribute(name), lambda *a: found, args, kwargs)

    def _one(self, target: str | Callable[..., Any], call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls something as one node."""
        self._inside += 1
        try:
            return self._one_node(target, call, args, kwargs, code_line())
        finally:
            self._inside -= 1

    def _one_node(
        self, target: str | Callable[..., Any], call: Callable[..., Any], args: Any, kwargs: Any, line: str
    ) -> Any:
        if torch.is_inference_mode_enabled():
            raise self._trap("computes in inference mode")
        template = self._template((args, kwargs), line)
        tensors = trees.tensors_of((args, kwargs))
        module = self._model.get_submodule(target) if isinstance(target, str) else None
        versions = [version_of(t) for t in tensors]
        buffers = [(b, b._version) for b in module.buffers()] if module else []
        settings, states, drawn = self._settings(), generator_states(), len(self._draws)
        trial = self._held.trial(call, template, settings, args, kwargs)
        try:
            output = call(*args, **kwargs)
        except Exception:
            if module is not None:
                self._failed = target, tensors
            raise
        found = trees.leaves_of(output)
        written = [t for t, v in zip(tensors, versions, strict=True) if version_of(t) != v]
        if module is None and not written and not any(isinstance(leaf, Tensor) for leaf in found):
            self._read(target, template, tensors, output)
            return output
        number, drew = len(self.nodes), has_drawn(states)
        if drew and module is None:
            self._draw(number)
        flags = self._origins.flags_of(template)
        if drew or (module and _stays_put(module)):
            flags |= STATE
        written = list({id(t): t for t in written}.values())
        changed = [*written, *self._origins.sharing(written)]
        states_changed = self._written_states(written, target, number)
        states_changed |= dict.fromkeys(self._origins.states[id(b)].name for b, v in buffers if b._version != v)
        flags |= STATE if states_changed else 0
        if module is not None:
            self._leaf_calls[target] += 1
        self.nodes.append(
            Node(
                target=target,
                args=template,
                inside=self._path[-1],
                line=line,
                nth=self._leaf_calls[target] if module else 1,
                writes=tuple(self._leaf_of(t, line) for t in changed),
                touches=tuple(ref for t in changed for ref in self._origins.places(t)),
                written=tuple((t.requires_grad, t.numel() * t.element_size()) for t in changed),
                aliases=len(changed) - len(written),
                changes=tuple(states_changed),
                draws=tuple(dict.fromkeys(self._draws[drawn:])),
                calls=tuple(self._calls.items()) if module else (),
                settings=settings,
                plain=tuple(PLACEHOLDER if isinstance(leaf, Tensor) else leaf for leaf in found),
                needs_grad=tuple(isinstance(t, Tensor) and t.requires_grad for t in found),
                num_bytes=tuple(t.numel() * t.element_size() if isinstance(t, Tensor) else 0 for t in found),
            )
        )
        self._note(number, changed, output, flags)
        self._held.taken(number, template, trial, output)
        return output

    def _note(self, number: int, changed: list[Tensor], output: Any, flags: int) -> None:
        """Remembers what a node made and changed."""
        origins = self._origins
        for k, tensor in enumerate(changed):
            if id(tensor) not in origins.states:
                flags |= origins.flags[origins.refs[id(tensor)].node] if id(tensor) in origins.refs else 0
                origins.note(tensor, Ref(number, -1 - k))
        origins.flags[number] = flags
        origins.note_tree(output, number)
        for index, leaf in enumerate(trees.leaves_of(output)):
            if isinstance(leaf, Tensor):
                origins.note(leaf, Ref(number, index))
        if not flags & STATE:
            self.nodes[-1] = dataclasses.replace(self.nodes[-1], free=True)

    def _written_states(self, written: list[Tensor], target: Any, number: int) -> dict[str, None]:
        """Returns the parameters and buffers whose memory was written to; who does stays with who made the view."""
        found, origins = dict[str, None](), self._origins
        for tensor in written:
            if (state := origins.state_under(tensor)) is None:
                continue
            found[state.name] = None
            if id(tensor) not in origins.states:
                made = origins.refs[id(tensor)].node if id(tensor) in origins.refs else number
                self.together.append((made, number, f"{function_name(target)} writes to {state.name}"))
        return found

    def _settings(self) -> Settings | None:
        grad = torch.is_grad_enabled()
        casts = tuple(
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
            if torch.is_autocast_enabled(kind)
        )
        if grad == self._grad:
            return Settings(None, casts) if casts else None
        return Settings(grad, casts)

    # what is taken

    def _template(self, tree: Any, line: str) -> Template:
        """Returns a tree's template."""
        if (number := self._origins.node_of(tree)) is not None:
            return Template((Ref(number, None),), trees.flatten(0)[1])
        leaves, spec = trees.flatten(self._with_whole_trees(tree))
        return Template(tuple(self._leaf(leaf, line) for leaf in leaves), spec)

    def _of_targets(self, targets: Any) -> Template:
        """Returns the template of what the loss takes besides the output: objects that are no trees, such as arrays, as
        they are."""
        leaves, spec = trees.flatten(targets)
        return Template(tuple(self._leaf_of(leaf, "") if isinstance(leaf, Tensor) else leaf for leaf in leaves), spec)

    def _without_objects(self, output: Any) -> Any:
        """Puts None where the model's output holds an object that is no tree, such as a cache: it stays behind."""
        leaves, spec = trees.flatten(output)
        objects = [not isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves]
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
            return self._leaf_of(leaf, line)
        if isinstance(leaf, _Whole):
            return leaf.ref
        if isinstance(leaf, nn.Module):
            raise self._trap(f"hands a {type(leaf).__name__} to a call", line=line)
        if isinstance(leaf, _PLAIN) or callable(leaf):
            return leaf
        if isinstance(leaf, slice):
            if any(isinstance(end, Tensor) for end in (leaf.start, leaf.stop, leaf.step)):
                raise self._trap("cuts a tensor where the data say", line=line)
            return leaf
        if (held := self._held.find(leaf)) is not None:
            return held
        if not all(map(self._origins.is_constant, tensors_in(leaf))):
            raise self._trap(f"hands on a {type(leaf).__name__} that holds tensors", line=line)
        try:
            return self._held.add(leaf)
        except Exception as error:
            what = f"hands on a {type(leaf).__name__}, which cannot be copied: {error}"
            raise self._trap(what, line=line) from error

    def _leaf_of(self, tensor: Tensor, line: str) -> Any:
        ref = self._origins.refs.get(id(tensor))
        if ref is None and id(tensor) in self._origins.states:
            return self._origins.states[id(tensor)]
        if ref is not None:
            if isinstance(tensor.grad_fn, BackwardCFunction) and ref.node != BATCH:
                node = self.nodes[ref.node]
                if not node.is_module and not isinstance(node.target, Apply) and ref.index is not None:
                    what = "uses a custom autograd function that was not called by its `apply`"
                    raise self._trap(what, node.inside, node.line)
            return ref
        if (inner := self._inner(tensor)) is not None:
            return inner
        if not self._origins.was_before(tensor):
            raise self._trap("uses a tensor of unknown origin: made by code that torch does not see", line=line)
        if tensor.requires_grad:
            raise self._trap("uses a tensor that requires a gradient and is no parameter of the model", line=line)
        return tensor.detach()

    def _inner(self, tensor: Tensor) -> Ref | None:
        """Returns the place of a tensor that a module inside a leaf returned, which the leaf's node returns as well."""
        found = self._origins.inner.get(id(tensor))
        if found is None or found.version != version_of(tensor):
            return None
        node = self.nodes[found.node]
        ref = Ref(found.node, len(node.plain))
        self.nodes[found.node] = dataclasses.replace(
            node,
            inner=(*node.inner, (found.module, found.call, found.index)),
            plain=(*node.plain, PLACEHOLDER),
            needs_grad=(*node.needs_grad, tensor.requires_grad),
            num_bytes=(*node.num_bytes, tensor.numel() * tensor.element_size()),
        )
        self._origins.note(tensor, ref)
        return ref

    # what it cannot follow

    def _draw(self, number: int) -> None:
        """Notes that code that is followed drew random numbers: only the model's own may, since nobody calls others."""
        if self._path[-1]:
            raise self._trap("draws random numbers in its own forward")
        self._draws.append("")
        if self._last_draw is not None:
            self.together.append((self._last_draw, number, "the model's own forward draws random numbers in both"))
        self._last_draw = number

    def _read(self, target: Any, template: Template, tensors: list[Tensor], outcome: Any) -> None:
        """Notes that the code read something from tensors: fixed, a guard, or a trap."""
        flags = self._origins.flags_of(template)
        if not tensors or flags == 0:
            return
        if not flags & (STATE | BUFFER) and is_plain(outcome):
            self.guards.append(Guard(target, template, copy.deepcopy(outcome)))
            return
        what = "weights" if flags & STATE else "buffers"
        raise self._trap(f"reads a value that depends on {what} ({function_name(target)})")

    def _trap(self, what: str, inside: str | None = None, line: str | None = None) -> Trap:
        line = line if line is not None else code_line()
        self.trapped = Trap(self._path[-1] if inside is None else inside, line, what)
        return self.trapped


class _Whole:
    """Stands for a tree that a node returned, while the arguments are taken apart."""

    def __init__(self, ref: Ref):
        self.ref = ref


def _stays_put(module: nn.Module) -> bool:
    """Tells whether one stage only may call a module: not one that makes something of buffers alone, such as angles.

    One with nothing of its own may draw in training, such as dropout, and is to be on the same stage in evaluation.
    """
    return (
        any(True for _ in module.parameters())
        or not any(True for _ in module.buffers())
        or any(isinstance(part, nn.modules.batchnorm._NormBase) for part in module.modules())
    )
