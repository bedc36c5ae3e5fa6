"""What each layer costs: measured on this machine, or counted in floating-point operations."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from modelpar.capture.objective import Batch, Objective, batch_size, call, loss_of
from modelpar.capture.sequential import untouched
from modelpar.planning.graph import ModelGraph
from modelpar.planning.profile import LayerCost, Profile

_NOMINAL_FLOPS = 2e10
"""FLOP/s by which FLOPs become seconds where nothing was measured. Only ratios between layers mean something then."""


def count_flops(objective: Objective, graph: ModelGraph, microbatch: Batch, model: nn.Module) -> Profile:
    """Returns a noise-free profile: each layer's FLOPs, forward and backward, at a nominal speed."""
    return _profile(objective, graph, microbatch, model, torch.device("cpu"), 0, 1)


def measure(
    objective: Objective,
    graph: ModelGraph,
    microbatch: Batch,
    model: nn.Module,
    *,
    num_threads: int = 1,
    device: torch.device | None = None,
    repeats: int = 5,
) -> Profile:
    """Returns a profile of isolated times of a micro-batch, on a device with as many threads as a rank has.

    Each layer runs alone, on what the layer before it gave; times are medians. With one thread it is the CPU time of
    this thread that counts, so that other processes on a shared host do not. Layers of equal description and shapes are
    measured once. The loss counts as part of the last layer.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return _profile(objective, graph, microbatch, model, device or torch.device("cpu"), repeats, num_threads)
    finally:
        torch.set_num_threads(before)


def _profile(
    objective: Objective,
    graph: ModelGraph,
    microbatch: Batch,
    model: nn.Module,
    device: torch.device,
    repeats: int,
    num_threads: int,
) -> Profile:
    inputs, targets = microbatch
    num_samples = batch_size(inputs, objective.batch_dim)
    costs: list[LayerCost] = []
    known: dict[Any, LayerCost] = {}
    value, targets = (pytree.tree_map_only(Tensor, lambda t: t.to(device), part) for part in (inputs, targets))
    children = list(model._modules.values())
    with torch.inference_mode(False), torch.enable_grad(), untouched(model):
        for i, (layer, child) in enumerate(zip(graph.layers, children, strict=True)):
            assert child is not None
            home = next((p.device for p in child.parameters()), device)
            child.to(device)
            last = i == len(children) - 1

            def forward(value: Any, child: nn.Module = child, first: bool = i == 0, last: bool = last) -> Any:
                output = call(child, value) if first else child(value)
                return loss_of(objective.loss, output, targets, num_samples).total if last else output

            key = (_description(child), tuple(p.shape for p in layer.parameters), _shapes(value), i == 0, last)
            if key not in known:
                known[key] = _layer_cost(layer.name, child, forward, value, device, repeats, num_threads)
            costs.append(replace(known[key], name=layer.name))
            if not last:
                with torch.no_grad():
                    value = forward(_fresh(value)[1])
                value = pytree.tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.is_floating_point()), value)
            child.to(home)
    return Profile(
        layers=tuple(costs),
        microbatch_size=num_samples,
        source="measured" if repeats else "flops",
        device=str(device),
        num_threads=num_threads,
        measured_at=datetime.now().astimezone().isoformat(timespec="seconds") if repeats else "",
    )


def _layer_cost(
    name: str,
    module: nn.Module,
    forward: Callable[[Any], Any],
    value: Any,
    device: torch.device,
    repeats: int,
    num_threads: int,
) -> LayerCost:
    """Measures one layer; with no repeats, only counts."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    saved: dict[int, int] = {}
    fixed = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = forward(_fresh(value)[1])
        given = [t for t in _tensors(output) if t.requires_grad]
        if given:  # not torch.autograd.grad, which the counter cannot follow
            torch.autograd.backward(given, [torch.ones_like(t) for t in given])
    flops = float(counter.get_total_flops())
    cost = LayerCost(
        name=name,
        forward_seconds=flops / 3 / _NOMINAL_FLOPS,
        input_grad_seconds=flops / 3 / _NOMINAL_FLOPS,
        weight_grad_seconds=flops / 3 / _NOMINAL_FLOPS,
        flops=flops,
        parameter_bytes=sum(p.numel() * p.element_size() for p in module.parameters()),
        saved_bytes=sum(saved.values()),
        output_bytes=sum(t.numel() * t.element_size() for t in _tensors(output)),
    )
    if not repeats:
        return cost
    clock = _clock(device, num_threads)
    times: list[tuple[float, float, float]] = []
    for _ in range(repeats + 1):
        received, working = _fresh(value)
        started = clock()
        output = forward(working)
        ran = clock()
        given = [t for t in _tensors(output) if t.requires_grad]
        inputs = [t for t in received if t.requires_grad]
        seeds = [torch.ones_like(t) for t in given]
        begun = clock()
        if given and inputs:
            torch.autograd.grad(given, inputs, seeds, retain_graph=True, allow_unused=True)
        between = clock()
        if given and inputs + parameters:
            torch.autograd.grad(given, inputs + parameters, seeds, allow_unused=True)
        ended = clock()
        times.append((ran - started, between - begun, ended - between))
    forward_seconds, input_seconds, full_seconds = (median(column) for column in zip(*times[1:], strict=True))
    input_seconds = min(input_seconds, full_seconds)
    return replace(
        cost,
        forward_seconds=forward_seconds,
        input_grad_seconds=input_seconds,
        weight_grad_seconds=full_seconds - input_seconds,
    )


def _clock(device: torch.device, num_threads: int) -> Callable[[], float]:
    if device.type == "cuda":

        def synchronized() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return synchronized
    return time.thread_time if num_threads == 1 else time.perf_counter


def _fresh(tree: Any) -> tuple[list[Tensor], Any]:
    """Returns leaves of a new graph, whose gradients can be asked for, and copies of them that a layer may write to."""
    leaves = pytree.tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), tree)
    return _tensors(leaves), pytree.tree_map_only(Tensor, Tensor.clone, leaves)


def _description(module: nn.Module) -> Any:
    """Returns what makes a layer's cost: its text and, since a text may leave them out, its modules' plain settings."""
    settings = [
        (name, value)
        for part in module.modules()
        for name, value in vars(part).items()
        if isinstance(value, (bool, int, float, str))
    ]
    return repr(module), tuple(settings)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _shapes(tree: Any) -> Any:
    return tuple((tuple(t.shape), t.dtype) for t in _tensors(tree))
