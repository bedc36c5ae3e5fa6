"""From a recording to what planning needs: layers, the values between them, legal cuts, ties.

::

    nodes     embed   blocks.0   blocks.1   mean   head          a layer begins with each module that is called whole,
    layers    [embed] [blocks.0] [blocks.1  mean]  [head]        and takes the functions behind it along
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from modelpar.capture.recording import PLACEHOLDER, Recording, Ref, State
from modelpar.capture.survey import matching
from modelpar.planning.graph import BATCH, Layer, ModelGraph, Parameter, Tied, Value


@dataclass(frozen=True)
class Layers:
    """A recording's nodes, sorted into layers."""

    recording: Recording

    @cached_property
    def nodes(self) -> tuple[tuple[int, ...], ...]:
        """The numbers of each layer's nodes, in order; free nodes belong to none."""
        found: list[list[int]] = []
        before: list[int] = []
        for number, node in enumerate(self.recording.nodes):
            if node.free:
                continue
            if node.is_module:
                found.append([])
            (found[-1] if found else before).append(number)
        if not found:
            return (tuple(before),)
        found[0] = before + found[0]
        return tuple(map(tuple, found))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The FQN of each layer's module; "#2" and so on behind it for a module's later calls."""
        names = []
        for numbers in self.nodes:
            first = next((self.recording.nodes[i] for i in numbers if self.recording.nodes[i].is_module), None)
            name = first.name if first else "model"
            names.append(name if first is None or first.nth == 1 else f"{name}#{first.nth}")
        return tuple(names)

    @cached_property
    def of_node(self) -> dict[int, int]:
        """The layer of each node that is not free."""
        return {number: layer for layer, numbers in enumerate(self.nodes) for number in numbers}

    def takes(self, layer: int) -> tuple[Ref, ...]:
        """Returns the values that a layer's nodes take, those of the free nodes it needs included."""
        nodes = self.recording.nodes
        refs = [ref for number in self.nodes[layer] for ref in nodes[number].takes]
        if layer == len(self.nodes) - 1:
            refs += self.recording.last_takes
        refs += [ref for number in self.recording.needed(tuple(refs)) for ref in nodes[number].takes]
        return tuple(dict.fromkeys(refs))

    @cached_property
    def consumers(self) -> dict[Ref, tuple[int, ...]]:
        """The layers that take each value that is not free, other than the one that makes it; in order of making."""
        found: defaultdict[Ref, list[int]] = defaultdict(list)
        for layer in range(len(self.nodes)):
            for ref in self.takes(layer):
                free = ref.node != BATCH and self.recording.nodes[ref.node].free
                if not free and self.of_node.get(ref.node) != layer:
                    found[ref].append(layer)
        return {ref: tuple(found[ref]) for ref in sorted(found, key=self._order)}

    def _order(self, ref: Ref) -> tuple[int, int]:
        """Sorts the batch's inputs before all else, its targets behind."""
        late = ref.node == BATCH and ref.index is not None and self.recording.batch[ref.index].startswith("targets")
        return len(self.recording.nodes) if late else ref.node, -1 if ref.index is None else abs(ref.index)

    @cached_property
    def value_names(self) -> dict[Ref, str]:
        """A name for each value between layers: that of the layer that makes it, where nothing else has that name."""
        taken = set(self.recording.batch) | {"inputs", "targets", "output"}
        names: dict[Ref, str] = {}
        for ref in self.consumers:
            if ref.node == BATCH:
                assert ref.index is not None
                names[ref] = self.recording.batch[ref.index]
                continue
            node, layer = self.recording.nodes[ref.node], self.names[self.of_node[ref.node]]
            name = layer if node.is_module else f"{layer}.{node.name}"
            if ref.index is not None and ref.index < 0:
                name = f"{name}.written"
            elif ref.index is not None and len(node.plain) > 1:
                name = f"{name}.{ref.index}"
            name = f"{name}.output" if name in ("inputs", "targets", "output") else name
            names[ref] = next(n for i in range(len(names) + 2) if (n := f"{name}~{i}" if i else name) not in taken)
            taken.add(names[ref])
        return names

    def original(self, ref: Ref | State) -> Ref | State:
        """Returns the value as it was before anything wrote to it: the same tensor."""
        while isinstance(ref, Ref) and ref.index is not None and ref.index < 0:
            ref = self.recording.nodes[ref.node].writes[-1 - ref.index]
        return ref

    def free_nodes(self, layer: int) -> list[int]:
        """Returns the free nodes that a layer needs."""
        refs = [ref for number in self.nodes[layer] for ref in self.recording.nodes[number].takes]
        refs += self.recording.last_takes if layer == len(self.nodes) - 1 else ()
        return self.recording.needed(tuple(refs))


def build_graph(recording: Recording, model: nn.Module, keep_together: Sequence[str] = ()) -> ModelGraph:
    """Returns the graph of a recorded model; no cut goes through the modules that `keep_together` names."""
    layers = Layers(recording)
    states = [_states_of(layers, layer, model) for layer in range(len(layers.nodes))]
    described, first = parameters_of(model), first_names(model)
    used = {first[name] for names in states for name in names if name in first}
    states[0] += [name for name in described if first[name] not in used]  # nobody uses them: they stay as they are
    found = []
    for layer, name in enumerate(layers.names):
        numbers = [*layers.nodes[layer], *layers.free_nodes(layer)]
        modules = [recording.nodes[i].name for i in numbers if recording.nodes[i].is_module]
        kind = type(model.get_submodule(modules[0])).__name__ if modules else type(model).__name__
        draws = dict.fromkeys(drawn for i in layers.nodes[layer] for drawn in recording.nodes[i].draws)
        parameters = tuple(described[name] for name in dict.fromkeys(states[layer]) if name in described)
        found.append(Layer(name, kind, parameters, tuple(draws), tuple(dict.fromkeys(modules))))
    names = layers.value_names
    values = []
    for ref, consumers in layers.consumers.items():
        if ref.node == BATCH:
            assert ref.index is not None
            values.append(Value(names[ref], BATCH, consumers, needs_grad=False))
        else:
            node = recording.nodes[ref.node]
            size, grad = node.bytes_at(ref.index) / recording.num_samples, node.needs_grad_at(ref.index)
            values.append(Value(names[ref], layers.of_node[ref.node], consumers, size, grad))
    return ModelGraph(
        layers=tuple(found),
        values=tuple(values),
        cuts=_cuts(layers, model, states, keep_together),
        tied=_ties(model, states),
        parameters=tuple(name for name, _ in model.named_parameters()),
        straight=recording.is_straight(model),
        obstacles=(*recording.closed, *dict.fromkeys(recording.why)),
    )


def _states_of(layers: Layers, layer: int, model: nn.Module) -> list[str]:
    """Returns the FQNs of the parameters and buffers that a layer uses, as the model first names them."""
    found: list[str] = []
    recording = layers.recording
    for number in [*layers.nodes[layer], *layers.free_nodes(layer)]:
        node = recording.nodes[number]
        if node.is_module:
            module = model.get_submodule(node.name)
            found += [f"{node.name}.{name}" for name, _ in module.named_parameters(remove_duplicate=False)]
            found += [f"{node.name}.{name}" for name, _ in module.named_buffers(remove_duplicate=False)]
        found += [state.name for state in node.args.states]
    return found


def parameters_of(model: nn.Module) -> dict[str, Parameter]:
    """Returns all parameters, then all buffers, by every name they have."""

    def describe(name: str, tensor: Tensor, buffer: bool) -> Parameter:
        trainable = tensor.requires_grad and not buffer
        return Parameter(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), trainable, buffer)

    found = {n: describe(n, p, False) for n, p in model.named_parameters(remove_duplicate=False)}
    return found | {n: describe(n, b, True) for n, b in model.named_buffers(remove_duplicate=False)}


def first_names(model: nn.Module) -> dict[str, str]:
    """Returns, for every name of a parameter or buffer, the first one that the model has for that tensor."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors}


def _cuts(layers: Layers, model: nn.Module, states: list[list[str]], keep_together: Sequence[str]) -> tuple[int, ...]:
    """Returns the positions where the layers may be cut without changing any number."""
    closed = {c for first, last in _spans(layers, model, states, keep_together) for c in range(first + 1, last + 1)}
    return tuple(c for c in range(1, len(layers.nodes)) if c not in closed)


def _spans(
    layers: Layers, model: nn.Module, states: list[list[str]], keep_together: Sequence[str]
) -> Iterator[tuple[int, int]]:
    """Yields first and last layers of runs that must stay together."""
    recording, of_node = layers.recording, layers.of_node
    for pair in recording.together:
        ends = [of_node[number] for number in pair if number in of_node]
        if len(ends) == 2:
            yield min(ends), max(ends)
    for name in matching(model, keep_together):
        nodes = [n for n in of_node if f"{_place(recording, n)}.".startswith(f"{name}.")]
        yield from _around(of_node[n] for n in nodes)
    for ref, consumers in layers.consumers.items():
        if ref.node != BATCH and not _can_travel(recording, ref):
            yield of_node[ref.node], max(consumers)
    for number, node in enumerate(recording.nodes):  # who writes must have all other views of that memory, too
        originals = {layers.original(ref) for ref in node.writes}
        made = [of_node[r.node] for r in originals if isinstance(r, Ref) and r.node in of_node]
        if number in of_node and len(originals) > 1 and made:
            yield min(made), of_node[number]
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    first = first_names(model)
    free = {state.name for node in recording.nodes if node.free for state in node.args.states}
    free |= {f"{n.name}.{b}" for n in recording.nodes if n.free and n.is_module for b in _buffers(model, n.name)}
    free = {first[name] for name in free} - {first[name] for node in recording.nodes for name in node.changes}
    uses: defaultdict[str, list[int]] = defaultdict(list)
    for layer, names in enumerate(states):
        for name in names:
            if name in buffers and first[name] not in free:  # both uses may write to it
                uses[first[name]].append(layer)
    for used in uses.values():
        yield from _around(used)
    yield from _known_by_other_names(layers)
    yield from _sharing_memory(model, states)


def _known_by_other_names(layers: Layers) -> Iterator[tuple[int, int]]:
    """Yields layers that call a module that draws, of which some have it by another name than its first: its key."""
    uses: defaultdict[str, list[int]] = defaultdict(list)
    renamed: set[str] = set()
    for number, layer in layers.of_node.items():
        node = layers.recording.nodes[number]
        for name, _ in node.calls:
            uses[name].append(layer)
            if not f"{name}.".startswith(f"{node.name}."):
                renamed.add(name)
    for name in renamed:
        yield from _around(uses[name])


def _buffers(model: nn.Module, name: str) -> list[str]:
    return [buffer for buffer, _ in model.get_submodule(name).named_buffers(remove_duplicate=False)]


def _around(found: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yields the first and last of some layers, where there are several."""
    ordered = sorted(set(found))
    if len(ordered) > 1:
        yield ordered[0], ordered[-1]


def _place(recording: Recording, number: int) -> str:
    node = recording.nodes[number]
    return node.name if node.is_module else node.inside


_CAN_TRAVEL = (bool, int, float, complex, str, bytes, type(None))
"""What may cross a cut beside tensors, in trees: other objects could hide one."""


def _can_travel(recording: Recording, ref: Ref) -> bool:
    plain = recording.nodes[ref.node].plain
    return ref.index is not None or all(leaf == PLACEHOLDER or isinstance(leaf, _CAN_TRAVEL) for leaf in plain)


def _sharing_memory(model: nn.Module, states: list[list[str]]) -> Iterator[tuple[int, int]]:
    """Yields layers whose different parameters are views of the same memory."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    places: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for layer, names in enumerate(states):
        for name in names:
            tensor = tensors.get(name)
            if tensor is not None and tensor.numel() and tensor.device.type != "meta":
                places[tensor.untyped_storage().data_ptr()].append((layer, id(tensor)))
    for found in places.values():
        if len({tensor for _, tensor in found}) > 1:
            yield from _around(layer for layer, _ in found)


def _ties(model: nn.Module, states: list[list[str]]) -> tuple[Tied, ...]:
    """Finds parameters that several layers use, or that have several names, in the model's order."""
    names: defaultdict[int, list[str]] = defaultdict(list)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in tensors.items():
        names[id(parameter)].append(name)
    uses: defaultdict[int, set[int]] = defaultdict(set)
    for layer, used in enumerate(states):
        for name in used:
            if name in tensors:
                uses[id(tensors[name])].add(layer)
    ties = []
    for number, found in names.items():
        parameter = tensors[found[0]]
        if len(found) > 1 or len(uses[number]) > 1:
            size = parameter.numel() * parameter.element_size()
            ties.append(Tied(tuple(found), tuple(sorted(uses[number])), size))
    return tuple(ties)
