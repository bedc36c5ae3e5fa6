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

import numpy as np
import torch
from torch import Tensor, nn

from modelpar.capture import attributes, numbers, trees
from modelpar.capture.chance import always_same
from modelpar.capture.compiled import is_compiled
from modelpar.capture.foreign import foreign_calls
from modelpar.capture.held import HeldObjects
from modelpar.capture.origins import BUFFER, CHANCE, STATE, Earlier, Origins, version_of
from modelpar.capture.path import Own, Path, checkpointed, saved_tensors_hook
from modelpar.capture.placed import Place as PlaceOfWeight
from modelpar.capture.placed import Places, in_place
from modelpar.capture.reads import AsList, Endless, Trial, other, place_of
from modelpar.capture.recording import (
    PLACEHOLDER,
    Apply,
    Attribute,
    Guard,
    Node,
    Read,
    Recording,
    Ref,
    Settings,
    Template,
    function_name,
)
from modelpar.capture.shapes import Shaped, shaped_by, tells_shape, with_zeros
from modelpar.capture.takes import Takes
from modelpar.capture.traps import (
    DESCRIBES,
    SCALARS,
    Trap,
    code_line,
    is_plain,
)
from modelpar.capture.watch import (
    Functions,
    attribute_sets,
    custom_calls,
    generator_states,
    has_drawn,
    may_draw,
    module_calls,
)
from modelpar.planning.graph import BATCH

_MORE = BUFFER | STATE | CHANCE
"""What is not known before a stage computes."""


class Tape:
    """One recording under way. Use `record`."""

    def __init__(
        self,
        model: nn.Module,
        leaves: frozenset[str],
        earlier: Earlier | None = None,
        tried: Trial | None = None,
        most_nodes: int = 0,
    ):
        """`earlier` knows what earlier forwards used. Where the code reads numbers at a place that is `tried`, it is
        given others; see `reads`. Of more nodes than `most_nodes`, if given, the forward is not expected to end."""
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._model, self.leaves = model, leaves
        self._places = Places(model, leaves)
        self._followed = [m for n, m in model.named_modules() if n not in self._places.whole]
        self._put_back: dict[tuple[int, str], tuple[str, str]] = {}
        """Attributes of leaves that the code has set to what they were, and where it did."""
        self._earlier = earlier or Earlier()
        self._origins, self._held = Origins(model, self._earlier), HeldObjects()
        self._attributes = attributes.Calls()
        self._tried, self._most_nodes, self._done = tried, most_nodes, False
        self._shaped = Shaped()
        self.reads: list[Read] = []
        self.nodes: list[Node] = []
        self.guards: list[Guard] = []
        self.together: list[tuple[int, int, str]] = []
        self._path = Path()
        self._takes = Takes(self._origins, self._held, self.nodes, self._trap)
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
        self._last_draws: dict[Own, Ref] = {}
        """By module and call, the state in which its code left the generators."""
        self.trapped: Trap | None = None
        """The last trap, which the model's code may have caught."""
        self._failed: tuple[Any, list[Tensor]] = "", []

    def failure(self, which: str) -> str:
        """Says which layer, or that the model itself, failed on a batch."""
        name, tensors = self._failed
        if not name:
            return f"the model failed on {which}"
        shapes = ", ".join(str(list(t.shape)) for t in tensors) or "no tensors"
        kind = type(self._model.get_submodule(name)).__name__
        return f"layer {name} ({kind}) failed on {which}, input {shapes}"

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
        self._batch = tuple(batch.values())
        for i, tensor in enumerate(batch.values()):
            self._origins.note(tensor, Ref(BATCH, i))
        before = attributes.fingerprint(self._followed)
        try:
            calls = module_calls(self._call, self._model), custom_calls(self._custom), attribute_sets(self._set)
            with calls[0], calls[1], calls[2], foreign_calls(self._foreign, self._origins.is_known), self._functions:
                output = forward()
        finally:
            self._done = True
            self._earlier.keep(self._origins.made_of_nothing())
        if self.trapped:  # the model's code caught it
            raise self.trapped
        if changed := attributes.changed(before, attributes.fingerprint(self._followed)):
            name = min((self._modules[number], name) for number, name in changed)
            raise Trap(name[0], "", f"sets its attribute {name[1]!r} in forward")
        self.together += [*self._held.bound(), *self._attributes.bound()]
        output = finish(output)
        taken = self._takes.template(self._takes.without_objects(output), "")
        recording = Recording(
            nodes=tuple(self._with_calls_that_count()),
            output=taken,
            targets=None if targets is None else self._takes.of_targets(targets),
            batch=tuple(batch),
            num_samples=num_samples,
            guards=tuple(self.guards),
            held=tuple(self._held.snapshots),
            together=tuple((i, j) for i, j, _ in self.together),
            why=tuple(why for _, _, why in self.together),
            leaves=self.leaves,
            reads=tuple(self.reads),
        )
        return recording, output

    def _with_calls_that_count(self) -> Iterator[Node]:
        """Yields the nodes, with the calls of such modules only as drew random numbers, here or elsewhere."""
        nodes = [self._with_draws_by_chance(node) for node in self.nodes]
        drew = {name for node in nodes for name in node.draws}
        for node in nodes:
            yield dataclasses.replace(node, calls=tuple((name, n) for name, n in node.calls if name in drew))

    def _with_draws_by_chance(self, node: Node) -> Node:
        """Adds to what drew in a leaf the modules that may draw another time: chance left them out, as LayerDrop does.

        What a module that draws calls depends on chance, so all inside it count that could draw if they were called.
        """
        if not node.draws or not node.is_module:
            return node
        called, kinds = {name for name, _ in node.calls}, {type(self._model.get_submodule(n)) for n in node.draws}
        more = [
            name
            for drawing in node.draws
            if not is_compiled(self._model.get_submodule(drawing))
            for part, module in self._model.get_submodule(drawing).named_modules()
            if (name := f"{drawing}.{part}") not in called and part and may_draw(module, kinds)
        ]
        return dataclasses.replace(node, draws=tuple(dict.fromkeys([*node.draws, *more])))

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
            if checkpointed(saved_tensors_hook()) is module:
                raise self._trap("is called in a checkpoint of the code around it", inside=name)
            with self._path.within(name):
                return call(*args, **kwargs)
        placed = self._places.others(module, self._origins.is_known)
        with self._functions.away():
            self._calls.clear()
            whole = partial(self._call_leaf, name, call, tuple(placed))
            return self._one(name, whole, (*placed.values(), *args), kwargs, tuple(placed))

    def _call_leaf(
        self, name: str, call: Callable[..., Any], placed: tuple[PlaceOfWeight, ...], /, *args: Any, **kwargs: Any
    ) -> Any:
        values, args = args[: len(placed)], args[len(placed) :]
        with in_place(self._model.get_submodule(name), placed, values):
            return self._call_inside(name, call, *args, **kwargs)

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        """Sees to it that the code that is followed sets nothing of a leaf, which no replay would set, but tensors."""
        path = self._modules.get(id(module))
        if self._inside or path is None or path not in self._places.whole:
            return
        if isinstance(value, Tensor) and self._origins.is_known(value):
            return
        now = vars(module).get(name, module)
        if now is value or (isinstance(value, SCALARS) and type(now) is type(value) and now == value):
            self._put_back[id(module), name] = self._path.module, code_line()  # unless a call of the leaf changes it
            return
        raise self._sets(name, path, self._path.module, code_line())

    def _sets(self, name: str, leaf: Any, inside: str, line: str) -> Trap:
        return self._trap(f"sets the attribute {name!r} of {leaf}, which is called whole", inside, line)

    def _call_inside(self, name: str, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Calls a leaf or a module inside one; notes whether its own forward draws, and what it returns.

        A compiled one draws as a whole: what is inside it is not called.
        """
        if self._calling and is_compiled(self._model.get_submodule(self._calling[-1][0])):
            return call(*args, **kwargs)
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

    def _foreign(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls what the mode does not see; see `foreign`."""
        if self._inside:
            return function(*args, **kwargs)
        with self._functions.away():
            return self._one(function, function, args, kwargs)

    def _function(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls a torch function of the code that is followed."""
        if self._inside:
            return function(*args, **kwargs)
        name, short = function_name(function), getattr(function, "__name__", "")
        if short in ("__set__", "__delete__"):
            raise self._trap(f"sets {getattr(function.__self__, '__name__', name)!r} of a tensor")  # type: ignore[attr-defined]
        if short in ("requires_grad_", "grad", "backward"):  # of a graph of its own, which a cut would go through
            raise self._trap(f"calls {short} in its own forward")
        if short == "__get__":
            return self._property(function, args, kwargs)
        if tells_shape(name):
            self._tell_shape(args, kwargs)
        if name in DESCRIBES and not (name == "type" and len(args) + len(kwargs) > 1):
            return function(*args, **kwargs)
        if name == "register_hook":
            return self._hook(function, args, kwargs)
        if name == "getitem":
            args = args[0], self._with_plain_ends(args[1])
        by = shaped_by(name, args, kwargs)
        if by and self._origins.flags_of(self._takes.template(by, "")) & _MORE:
            raise self._trap(f"calls {name}, which returns as many values as the data say")
        return self._one(function, function, args, kwargs, shaped=bool(by))

    def _with_plain_ends(self, index: Any) -> Any:
        """Returns an index whose slices end at numbers: those that are tensors are read."""
        if isinstance(index, tuple):
            return tuple(map(self._with_plain_ends, index))
        if not isinstance(index, slice):
            return index
        ends = (index.start, index.stop, index.step)
        return slice(*(self._function(Tensor.__int__, (e,), {}) if isinstance(e, Tensor) else e for e in ends))

    def _tell_shape(self, args: Any, kwargs: Any) -> None:
        """Notes that the code learns the shapes of tensors: those that depend on values must come out the same."""
        for tensor in trees.tensors_of((args, kwargs)):
            self.guards += [guard for guard in self._shaped.guards(tensor) if guard not in self.guards]

    def _hook(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Notes that the code hooks into the backward of a tensor; the stage that makes the tensor does so, too."""
        template, number = self._takes.template((args, kwargs), code_line()), len(self.nodes)
        self.together += [(ref.node, number, "one hooks into the other's backward") for ref in template.refs]
        self.nodes.append(Node(function, template, self._path.module, code_line(), lasting=True, plain=(None,)))
        self._origins.flags[number] = STATE
        return function(*args, **kwargs)

    def _property(self, function: Any, args: Any, kwargs: Any) -> Any:
        name = function.__self__.__name__
        if tells_shape(name):
            self._tell_shape(args, kwargs)
        if name in DESCRIBES or name in ("_version", "_grad_fn", "_backward_hooks", "_post_accumulate_grad_hooks"):
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
        placed: tuple[PlaceOfWeight, ...] = (),
        shaped: bool = False,
    ) -> Any:
        """Calls something as one node; `shaped` says that the shape of what it returns depends on values."""
        self._inside += 1
        try:
            return self._one_node(target, call, args, kwargs, placed, shaped, code_line())
        finally:
            self._inside -= 1

    def _one_node(
        self,
        target: str | Callable[..., Any],
        call: Callable[..., Any],
        args: Any,
        kwargs: Any,
        placed: tuple[PlaceOfWeight, ...],
        shaped: bool,
        line: str,
    ) -> Any:
        if self._most_nodes and len(self.nodes) > self._most_nodes:
            raise Endless
        if torch.is_inference_mode_enabled():
            raise self._trap("computes in inference mode")
        hooked = self._path.sets_hooks
        if hooked and not (isinstance(target, str) and self._path.is_checkpointed(self._model.get_submodule(target))):
            what = "sets hooks for saved tensors, as checkpoints do, around more than a call of a module"
            raise self._trap(what, inside=self._path.who_sets_hooks)
        template = self._takes.template((args, kwargs), line)
        tensors = trees.tensors_of((args, kwargs))
        module = self._model.get_submodule(target) if isinstance(target, str) else None
        versions = [version_of(t) for t in tensors]
        buffers = [(n, b, b._version) for n, b in module.named_buffers()] if module is not None else []
        settings, states, drawn = self._settings(), generator_states(), len(self._draws)
        trial = self._held.trial(call, template, settings, args, kwargs)
        before, again = attributes.Fingerprint(), None
        if module is not None:
            before = self._attributes.begin(module)
            again = self._attributes.trial(module, call, template, settings, (args, kwargs))
        try:
            output = call(*args, **kwargs)
        except Exception:
            if module is not None:
                self._failed = target, tensors
            raise
        found = trees.leaves_of(output)
        written = [t for t, v in zip(tensors, versions, strict=True) if version_of(t) != v]
        if module is None and not written and not any(isinstance(leaf, Tensor) for leaf in found):
            return self._read(target, template, tensors, output, line)
        number, drew = len(self.nodes), has_drawn(states)
        own = self._path.call if drew and module is None else None
        if own and own.module in self._places.whole:  # a part of a leaf, called directly: hooks count its calls there
            raise self._trap("draws random numbers in its own forward")
        flags = self._origins.flags_of(template)
        if module is not None and (drew or _stays_put(module)):
            flags |= STATE
        flags |= CHANCE if own else 0
        written = list({id(t): t for t in written}.values())
        changed = [*written, *self._origins.sharing(written)]
        states_changed = self._written_states(written, target, number)
        now = dict(module.named_buffers()) if module is not None else {}
        changes = [f"{target}.{n}" for n, b, v in buffers if now.get(n) is not b or b._version != v]
        states_changed |= dict.fromkeys(self._origins.first_name(name) for name in changes)
        flags |= STATE if states_changed else 0
        if module is not None:
            self._leaf_calls[target] += 1
        plain = [PLACEHOLDER if isinstance(leaf, Tensor) else leaf for leaf in found]
        needs_grad = [isinstance(t, Tensor) and t.requires_grad for t in found]
        num_bytes = [t.numel() * t.element_size() if isinstance(t, Tensor) else 0 for t in found]
        if own:  # the state in which it leaves the generators is its last value
            plain, needs_grad, num_bytes = [*plain, PLACEHOLDER], [*needs_grad, False], [*num_bytes, states[0].numel()]
        self.nodes.append(
            Node(
                target=target,
                own=own,
                after=self._last_draws.get(own) if own else None,
                args=template,
                inside=self._path.module,
                line=line,
                nth=self._leaf_calls[target] if module is not None else 1,
                placed=placed,
                checkpoint=hooked,
                writes=tuple(self._takes.leaf_of(t, line) for t in changed),
                touches=tuple(ref for t in changed for ref in self._origins.places(t)),
                written=tuple((t.requires_grad, t.numel() * t.element_size()) for t in changed),
                aliases=len(changed) - len(written),
                changes=tuple(states_changed),
                draws=(own.module,) if own else tuple(dict.fromkeys(self._draws[drawn:])),
                calls=tuple(self._calls.items()) if module is not None else (),
                settings=settings,
                plain=tuple(plain),
                needs_grad=tuple(needs_grad),
                num_bytes=tuple(num_bytes),
            )
        )
        if own:
            self._last_draws[own] = Ref(number, len(found))
        self._note(number, changed, output, flags)
        zeros = template
        if shaped:
            zeros = with_zeros(template, trees.leaves_of((args, kwargs)), self._depends_on_more)
        self._shaped.note(target, zeros, tensors, output, makes=shaped)
        self._held.taken(number, template, trial, output)
        if module is not None:
            for key in self._attributes.end(number, module, before, again, output):
                if key in self._put_back:
                    raise self._sets(key[1], target, *self._put_back[key])
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
            if isinstance(leaf, Tensor) and (id(leaf) not in origins.states or self.nodes[number].is_module):
                origins.note(leaf, Ref(number, index))  # a buffer that a function wrote to stays the buffer
        if not flags & (STATE | CHANCE):
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

    # what it cannot follow

    def _depends_on_more(self, leaf: Any) -> bool:
        """Tells whether a leaf of a template depends on more than the batch."""
        return bool(self._origins.flags_of(Template((leaf,), trees.flatten(0)[1])) & _MORE)

    def _read(self, target: Any, template: Template, tensors: list[Tensor], outcome: Any, line: str) -> Any:
        """Notes that the code read something from tensors: fixed, a guard, to be tried, or a trap; returns it."""
        flags = self._origins.flags_of(template)
        if not tensors or flags == 0:
            return outcome
        if not flags & _MORE:
            listed = isinstance(outcome, np.ndarray)
            if is_plain(outcome) or listed:
                function = AsList(target) if listed else target
                found = outcome.tolist() if listed else copy.deepcopy(outcome)
                self.guards.append(Guard(function, template, found))
                return outcome
        of = "weights" if flags & STATE else "buffers" if flags & BUFFER else "random numbers"
        if not isinstance(outcome, (bool, int, float, complex)):
            raise self._trap(f"reads a value that depends on {of} ({function_name(target)})")
        if self._most_nodes and len(self.nodes) > self._most_nodes:
            raise Endless
        place = place_of(self._path.module, line, target)
        if self._tried and self._tried.place == place:
            outcome = other(outcome, self._tried)
        if not flags & (STATE | BUFFER) and isinstance(outcome, bool):
            if not always_same(target, template, self.nodes, self._batch):
                raise self._trap(f"reads a value that depends on {of} ({function_name(target)})")
            check = True
        else:
            check = False
            self.reads.append(Read(len(self.nodes), place, of, outcome))
        return self._number(target, template, outcome, line, check)

    def _number(
        self, target: Callable[..., Any], template: Template, value: Any, line: str, check: bool = False
    ) -> Any:
        """Returns a number as what a node returned."""
        number, inside = len(self.nodes), self._path.module
        node = Node(target, template, inside, line, plain=(value,), needs_grad=(False,), num_bytes=(0,), check=check)
        self.nodes.append(node)
        self._origins.flags[number] = STATE
        if function_name(target) in ("int", "float", "index", "complex"):  # Python wants just these types
            return value
        return numbers.number(value, Ref(number, 0), self._operate)

    def _operate(self, function: Callable[..., Any], operands: tuple[Any, ...]) -> Any:
        """Computes with numbers that were read."""
        value = function(*map(numbers.plain, operands))
        if self._inside or self._done:
            return value
        return self._number(function, self._takes.template((operands, {}), ""), value, code_line())

    def _trap(self, what: str, inside: str | None = None, line: str | None = None) -> Trap:
        line = line if line is not None else code_line()
        self.trapped = Trap(self._path.module if inside is None else inside, line, what)
        return self.trapped


def _stays_put(module: nn.Module) -> bool:
    """Tells whether one stage only may call a module: not one that makes something of buffers alone, such as angles.

    One with nothing of its own may draw in training, such as dropout, and is to be on the same stage in evaluation.
    """
    return (
        any(True for _ in module.parameters())
        or not any(True for _ in module.buffers())
        or any(isinstance(part, nn.modules.batchnorm._NormBase) for part in module.modules())
    )
