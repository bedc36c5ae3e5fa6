"""Counts what each layer costs: operations and bytes. Times are measured by the ranks, see run/sweep.py."""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from modelpar.capture import trees
from modelpar.capture.capture import Captured, leaf_names
from modelpar.capture.compiled import uncompiled
from modelpar.capture.cut import Routine, cut_routine
from modelpar.capture.deferred import made
from modelpar.capture.flops import Flops
from modelpar.capture.graph import Layers
from modelpar.capture.objective import Batch, Objective, loss_of
from modelpar.capture.recording import Node
from modelpar.capture.replay import Replay
from modelpar.capture.untouched import untouched
from modelpar.planning.profile import LayerCost, Profile

_log = logging.getLogger(__name__)

_NOMINAL_FLOPS = 2e10
"""FLOP/s by which FLOPs become seconds where nothing was measured. Only ratios between layers mean something then."""


@dataclass(frozen=True)
class Count:
    """What was counted."""

    profile: Profile
    """Each layer's FLOPs, forward and backward, at a nominal speed; and its bytes."""
    keys: tuple[Any, ...]
    """Per layer what its cost depends on, as text: its classes, their settings, shapes. Layers of equal keys cost the
    same, and are counted once."""


def count(objective: Objective, captured: Captured, microbatch: Batch, model: nn.Module) -> Count:
    """Counts the layers of a recorded model on a micro-batch; the loss counts as part of the last layer.

    Parameters, buffers and random generators are as before afterwards.
    """
    recording, graph = captured.recording, captured.graph
    layers = Layers(recording)
    bounds = tuple(range(len(graph.layers) + 1))
    num_samples = recording.num_samples
    values: dict[str, Any] = dict(leaf_names(*microbatch))
    costs: list[LayerCost] = []
    keys: list[Any] = []
    known: dict[Any, tuple[LayerCost, list[Any]]] = {}
    with torch.inference_mode(False), torch.enable_grad(), uncompiled(model), untouched(model):
        for i, layer in enumerate(graph.layers):
            routine = cut_routine(recording, bounds, i, layers)
            last = i == len(graph.layers) - 1

            def forward(received: dict[str, Any], routine: Routine = routine, last: bool = last) -> list[Any]:
                found = Replay(routine, model)(received)
                given = [found[name] for name in routine.gives]
                if last:
                    given.append(loss_of(objective.loss, found["output"], found["targets"], num_samples).total)
                return given

            received = {name: values[name] for name in routine.takes}
            where = ("first" if i == 0 else "") + ("last" if last else "")
            key = (
                tuple(_description(model.get_submodule(name)) for name in layer.modules),
                tuple(_call(step.node) for step in routine.steps),
                tuple(p.shape for p in layer.parameters),
                _shapes(list(received.values())),
                _given(routine),
                where,
            )
            if key not in known:
                states = {id(t): t for m in layer.modules for t in model.get_submodule(m).parameters()}
                states |= {id(t): t for p in layer.parameters if not p.buffer for t in [model.get_parameter(p.name)]}
                with made(states.values()):
                    parameters = list(states.values())
                    try:
                        known[key] = _count_layer(layer.name, parameters, [*model.buffers()], forward, received)
                    except Exception as error:  # it does not stand being watched
                        _log.debug("the operations of %s cannot be counted: %s", layer.name, error)
                        known[key] = _guess_layer(layer.name, parameters, forward, received, num_samples)
            cost, given = known[key]
            values |= zip(routine.gives, given, strict=False)
            costs.append(replace(cost, name=layer.name))
            keys.append(key)
    return Count(Profile(tuple(costs), num_samples, "flops"), tuple(keys))


def _given(routine: Routine) -> Any:
    """Returns which values of which of its calls a layer gives to others."""
    places = {step.number: place for place, step in enumerate(routine.steps)}
    return tuple((places[ref.node], ref.index) for ref in routine.gives.values())


def _call(node: Node) -> Any:
    """Returns what a call depends on besides the values it takes, and besides names."""
    plain = [leaf for leaf in node.args.leaves if isinstance(leaf, (bool, int, float, str, torch.dtype))]
    return "" if node.is_module else node.name, repr(plain), node.settings, len(node.inner)


def _count_layer(
    name: str,
    parameters: list[nn.Parameter],
    buffers: list[Tensor],
    forward: Callable[[Any], list[Any]],
    value: Any,
) -> tuple[LayerCost, list[Any]]:
    """Returns a layer's cost, and what it gives for the next ones."""
    saved: dict[int, int] = {}
    fixed = _memory_of([*parameters, *buffers])

    def note(tensor: Tensor) -> Tensor:
        saved.update((place, size) for place, size in _memory_of([tensor]).items() if place not in fixed)
        return tensor

    received = _fresh(value)
    with Flops() as counter, _Allocations(parameters) as allocations:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = forward(received)
        given = [t for t in trees.tensors_of(output) if t.requires_grad]
        kept = saved | _memory_of(trees.tensors_of(output))
        for place in _memory_of(trees.tensors_of(received)):
            kept.pop(place, None)
        if given:
            torch.autograd.backward(given, [torch.ones_like(t) for t in given])
    for parameter in parameters:
        parameter.grad = None
    kept_bytes = sum(kept.values())
    cost = replace(
        _cost(name, parameters, output, float(counter.total)),
        saved_bytes=sum(saved.values()),
        kept_bytes=kept_bytes,
        temporary_bytes=max(0, allocations.peak - kept_bytes),
    )
    return cost, _detached(output)


def _guess_layer(
    name: str, parameters: list[nn.Parameter], forward: Callable[[Any], list[Any]], value: Any, num_samples: int
) -> tuple[LayerCost, list[Any]]:
    """Returns likewise, of a layer that cannot be counted: as if each parameter was used once per sample."""
    output = forward(_fresh(value))
    size = sum(_memory_of(trees.tensors_of(output)).values())
    cost = _cost(name, parameters, output, 6.0 * num_samples * sum(p.numel() for p in parameters))
    return replace(cost, saved_bytes=size, kept_bytes=size), _detached(output)


def _cost(name: str, parameters: list[nn.Parameter], output: list[Any], flops: float) -> LayerCost:
    return LayerCost(
        name=name,
        forward_seconds=flops / 3 / _NOMINAL_FLOPS,
        input_grad_seconds=flops / 3 / _NOMINAL_FLOPS,
        weight_grad_seconds=flops / 3 / _NOMINAL_FLOPS,
        flops=flops,
        parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
        output_bytes=sum(t.numel() * t.element_size() for t in trees.tensors_of(output)),
    )


def _detached(output: list[Any]) -> list[Any]:
    return trees.map_tensors(lambda t: t.detach().requires_grad_(t.requires_grad), output)


class _Allocations(TorchDispatchMode):
    """Watches the memory that operators make: `peak` is the most bytes alive at once, gradients left out.

    It looks after every operator; what one needs inside itself, and frees again, is not seen.
    """

    supports_higher_order_operators = True

    def __init__(self, parameters: list[nn.Parameter]):
        super().__init__()
        self.peak = 0
        self._parameters = parameters
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, HigherOrderOperator):
            return NotImplemented
        output = func(*args, **(kwargs or {}))
        inputs = _memory_of(trees.tensors_of((args, kwargs)))
        for tensor in trees.tensors_of(output):
            for place, size in _memory_of([tensor]).items():
                if size and place not in inputs:  # a view makes nothing
                    self._alive[place] = StorageWeakRef(tensor.untyped_storage()), size
        self._alive = {place: entry for place, entry in self._alive.items() if not entry[0].expired()}
        grads = _memory_of([p.grad for p in self._parameters if p.grad is not None])
        self.peak = max(self.peak, sum(size for place, (_, size) in self._alive.items() if place not in grads))
        return output


def _memory_of(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Returns where memory begins in which tensors lie, and its bytes; some, such as sparse ones, have none."""
    found = {}
    for tensor in tensors:
        with suppress(RuntimeError, NotImplementedError):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def _fresh(tree: Any) -> Any:
    """Returns copies that a layer may write to, of leaves of a new graph."""
    return trees.map_tensors(lambda t: t.detach().requires_grad_(t.requires_grad).clone(), tree)


def _description(module: nn.Module) -> Any:
    """Returns what makes a layer's cost: its text, its modules' plain settings, which a text may leave out, and the
    source of their classes where these are not torch's."""
    settings = [
        (name, value)
        for part in module.modules()
        for name, value in vars(part).items()
        if isinstance(value, (bool, int, float, str))
    ]
    return repr(module), tuple(settings), tuple(_source(kind) for kind in {type(part): 0 for part in module.modules()})


def _source(kind: type) -> str:
    if kind.__module__.startswith("torch."):
        return kind.__qualname__
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file and os.path.isfile(file):  # all of it: to find one class in it takes far longer
        return f"{kind.__qualname__} {hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]}"
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # such as a class of a notebook cell that is gone
        return kind.__qualname__


def _shapes(tree: Any) -> Any:
    return tuple((tuple(t.shape), t.dtype) for t in trees.tensors_of(tree))
