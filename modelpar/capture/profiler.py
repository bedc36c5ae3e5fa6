"""Counts what each layer costs: operations and bytes. Times are measured by the ranks, see run/sweep.py."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from modelpar.capture.objective import Batch, Objective, batch_size, call, loss_of
from modelpar.capture.sequential import untouched
from modelpar.planning.graph import ModelGraph
from modelpar.planning.profile import LayerCost, Profile

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


def count(objective: Objective, graph: ModelGraph, microbatch: Batch, model: nn.Module) -> Count:
    """Counts the layers on a micro-batch, on the CPU; the loss counts as part of the last layer.

    Parameters, buffers and random generators are as before afterwards.
    """
    value, targets = microbatch
    num_samples = batch_size(value, objective.batch_dim)
    costs: list[LayerCost] = []
    keys: list[Any] = []
    known: dict[Any, tuple[LayerCost, Any]] = {}
    children = list(model._modules.values())
    with torch.inference_mode(False), torch.enable_grad(), untouched(model):
        for i, (layer, child) in enumerate(zip(graph.layers, children, strict=True)):
            assert child is not None
            home = next((p.device for p in child.parameters()), torch.device("cpu"))
            child.to("cpu")
            last = i == len(children) - 1

            def forward(value: Any, child: nn.Module = child, first: bool = i == 0, last: bool = last) -> Any:
                output = call(child, value) if first else child(value)
                return loss_of(objective.loss, output, targets, num_samples).total if last else output

            where = ("first" if i == 0 else "") + ("last" if last else "")
            key = (_description(child), tuple(p.shape for p in layer.parameters), _shapes(value), where)
            if key not in known:
                known[key] = _count_layer(layer.name, child, forward, value)
            cost, value = known[key]
            costs.append(replace(cost, name=layer.name))
            keys.append(key)
            child.to(home)
    return Count(Profile(tuple(costs), num_samples, "flops"), tuple(keys))


def _count_layer(name: str, module: nn.Module, forward: Callable[[Any], Any], value: Any) -> tuple[LayerCost, Any]:
    """Returns a layer's cost, and its output for the next one."""
    parameters = list(module.parameters())
    saved: dict[int, int] = {}
    fixed = {t.untyped_storage().data_ptr() for t in (*parameters, *module.buffers())}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    received = _fresh(value)
    with FlopCounterMode(display=False) as counter, _Allocations(parameters) as allocations:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = forward(received)
        given = [t for t in _tensors(output) if t.requires_grad]
        kept = saved | {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(output)}
        for tensor in _tensors(received):
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        if given:  # not torch.autograd.grad, which the counter cannot follow
            torch.autograd.backward(given, [torch.ones_like(t) for t in given])
    for parameter in parameters:
        parameter.grad = None
    flops, kept_bytes = float(counter.get_total_flops()), sum(kept.values())
    cost = LayerCost(
        name=name,
        forward_seconds=flops / 3 / _NOMINAL_FLOPS,
        input_grad_seconds=flops / 3 / _NOMINAL_FLOPS,
        weight_grad_seconds=flops / 3 / _NOMINAL_FLOPS,
        flops=flops,
        parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
        saved_bytes=sum(saved.values()),
        output_bytes=sum(t.numel() * t.element_size() for t in _tensors(output)),
        kept_bytes=kept_bytes,
        temporary_bytes=max(0, allocations.peak - kept_bytes),
    )
    return cost, pytree.tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.is_floating_point()), output)


class _Allocations(TorchDispatchMode):
    """Watches the memory that operators make: `peak` is the most bytes alive at once, gradients left out.

    It looks after every operator; what one needs inside itself, and frees again, is not seen.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        super().__init__()
        self.peak = 0
        self._parameters = parameters
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in inputs:  # a view makes nothing
                self._alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {pointer: entry for pointer, entry in self._alive.items() if not entry[0].expired()}
        grads = {p.grad.untyped_storage().data_ptr() for p in self._parameters if p.grad is not None}
        self.peak = max(self.peak, sum(size for pointer, (_, size) in self._alive.items() if pointer not in grads))
        return output


def _fresh(tree: Any) -> Any:
    """Returns copies that a layer may write to, of leaves of a new graph."""
    leaves = pytree.tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), tree)
    return pytree.tree_map_only(Tensor, Tensor.clone, leaves)


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
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # such as a class of a notebook cell that is gone
        return kind.__qualname__


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _shapes(tree: Any) -> Any:
    return tuple((tuple(t.shape), t.dtype) for t in _tensors(tree))
