"""Reads an nn.Sequential: its layers become the ModelGraph, one real forward tells what crosses each cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from modelpar.capture.objective import Batch, Objective, batch_size, call, loss_of
from modelpar.errors import CaptureError
from modelpar.planning.graph import BATCH, Layer, ModelGraph, Parameter, Tied, Value


def structure(model: nn.Module) -> ModelGraph:
    """Returns the graph of an nn.Sequential without running it: layers, parameters, ties and legal cuts.

    Cuts that would separate two uses of one module that has buffers are not legal: both uses write to them.

    Raises CaptureError unless the model is an nn.Sequential with its own forward, and where a parameter has what a
    stage in another process would lose: hooks, or memory shared with a parameter of another layer.
    """
    if not isinstance(model, nn.Sequential) or type(model).forward is not nn.Sequential.forward:
        raise CaptureError(
            f"the model is a {type(model).__name__}; expected an nn.Sequential whose children are the layers to split"
        )
    if not len(model):
        raise CaptureError("the model is an empty nn.Sequential; expected at least one layer")
    children = list(model._modules.items())  # named_children() leaves out a module's second use
    _refuse_what_would_be_lost(children)
    layers = tuple(Layer(name, type(child).__name__, _tensors(name, child)) for name, child in children)
    together = [
        (i, j)
        for i, (_, first) in enumerate(children)
        for j, (_, second) in enumerate(children)
        if i < j and any(True for _ in first.buffers()) and {*first.buffers()} & {*second.buffers()}
    ]
    cuts = tuple(c for c in range(1, len(layers)) if not any(i < c <= j for i, j in together))
    values = [Value("inputs", BATCH, (0,), needs_grad=False)]
    values += [Value(_value_name(layer), i, (i + 1,)) for i, layer in enumerate(layers[:-1])]
    values += [Value("targets", BATCH, (len(layers) - 1,), needs_grad=False)]
    return ModelGraph(layers, tuple(values), cuts, _ties(model, children))


def capture(objective: Objective, batch: Batch, model: nn.Module | None = None) -> ModelGraph:
    """Returns the graph of an objective's model, an nn.Sequential, from one real forward of a small batch.

    The forward finds the bytes that each layer hands on, the modules that draw random numbers, and the layers that
    write to their input. Buffers and random generators are as before afterwards.

    Raises CaptureError where a layer or the loss fails on the batch, naming the layer, and for a loss that trains
    parameters of its own or draws random numbers.
    """
    if isinstance(objective.loss, nn.Module) and any(p.requires_grad for p in objective.loss.parameters()):
        raise CaptureError("the loss has parameters of its own, which nobody would train; expected them in the model")
    model = objective.build() if model is None else model
    graph = structure(model)
    inputs, targets = batch
    num_samples = batch_size(inputs, objective.batch_dim)
    layers, sizes, grads, passes, opaque = [], [], [], [], set()
    loss_draws = False
    value: Any = inputs
    with torch.inference_mode(False), torch.enable_grad(), untouched(model), _draws(model) as draws:
        for i, (layer, child) in enumerate(zip(graph.layers, model._modules.values(), strict=True)):
            value = pytree.tree_map_only(Tensor, _fresh, value)
            versions = [t._version for t in _leaves(value)]
            received = _leaves(value)
            seen = len(draws)
            try:
                value = call(child, value) if i == 0 else child(value)
                if i == len(graph.layers) - 1:
                    states = _generator_states()
                    loss_of(objective.loss, value, targets, num_samples)
                    loss_draws = not all(map(torch.equal, states, _generator_states()))
            except Exception as error:
                shapes = ", ".join(str(list(t.shape)) for t in received) or "no tensors"
                what = f"layer {layer.name} ({layer.kind}) failed on the example batch, input {shapes}"
                raise CaptureError(f"{what}: {type(error).__name__}: {error}") from error
            writes = [t._version for t in received] != versions
            layers.append(
                Layer(layer.name, layer.kind, layer.parameters, tuple(dict.fromkeys(draws[seen:])), writes_input=writes)
            )
            if not all(isinstance(leaf, _CAN_TRAVEL) for leaf in pytree.tree_leaves(value)):
                opaque.add(i + 1)
            passes.append(bool(_storages(received) & _storages(_leaves(value))))
            sizes.append(sum(t.numel() * t.element_size() for t in _leaves(value)) / num_samples)
            grads.append(any(t.requires_grad for t in _leaves(value)))
    if loss_draws:
        raise CaptureError("the loss draws random numbers; expected only modules of the model to draw")
    for i in reversed(range(len(layers) - 1)):  # a view of what it received, or that itself, may be written to later on
        layers[i] = replace(
            layers[i], writes_input=layers[i].writes_input or (passes[i] and layers[i + 1].writes_input)
        )
    values = tuple(
        Value(v.name, v.producer, v.consumers, sizes[v.producer], grads[v.producer]) if v.producer != BATCH else v
        for v in graph.values
    )
    cuts = tuple(cut for cut in _keep_together(graph.cuts, layers) if cut not in opaque)
    return ModelGraph(tuple(layers), values, cuts, graph.tied)


_CAN_TRAVEL = (Tensor, bool, int, float, complex, str, bytes, type(None))
"""What may cross a cut, in tuples, lists, dicts and what else pytrees know: other objects could hide a tensor."""


def _refuse_what_would_be_lost(children: list[tuple[str, nn.Module]]) -> None:
    owners: dict[int, tuple[str, Tensor]] = {}
    for name, child in children:
        for tail, parameter in child.named_parameters():
            fqn = f"{name}.{tail}"
            if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
                raise CaptureError(f"{fqn} has a hook, which its stage would not have; expected hooks on modules only")
            if parameter.numel() and parameter.device.type != "meta":
                address = parameter.untyped_storage().data_ptr()
                other, shared = owners.setdefault(address, (fqn, parameter))
                if shared is not parameter and other.split(".")[0] != name:
                    raise CaptureError(f"{fqn} shares memory with {other}; expected one parameter to tie them")


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restores buffers, gradients and random generators on leaving."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in grads:
        parameter.grad = None
    with torch.random.fork_rng():
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(buffers[name])
            for parameter, grad in grads:
                parameter.grad = grad


@contextmanager
def _draws(model: nn.Module) -> Iterator[list[str]]:
    """Collects the FQNs of the modules whose own forward, not that of a child, moves a random generator."""
    names = {module: name for name, module in model.named_modules()}
    found: list[str] = []
    stack: list[tuple[nn.Module, Any]] = []

    def note() -> None:
        now = _generator_states()
        if stack and not all(torch.equal(a, b) for a, b in zip(stack[-1][1], now, strict=True)):
            found.append(names[stack[-1][0]])

    def before(module: nn.Module, _: Any) -> None:
        note()
        stack.append((module, _generator_states()))

    def after(*_: Any) -> None:
        note()
        stack.pop()
        if stack:
            stack[-1] = (stack[-1][0], _generator_states())

    handles = [hook for module in names for hook in _hook(module, before, after)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _hook(module: nn.Module, before: Any, after: Any) -> tuple[Any, Any]:
    return module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)


def _generator_states() -> list[Tensor]:
    """Returns the states of the CPU generator and, where CUDA is in use, of the current device's."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else states


def _keep_together(cuts: tuple[int, ...], layers: list[Layer]) -> tuple[int, ...]:
    """Removes cuts between two uses of one module that draws: its call number would start anew on the second stage."""
    uses: dict[str, list[int]] = {}
    for i, layer in enumerate(layers):
        for name in layer.draws:
            uses.setdefault(name, []).append(i)
    return tuple(c for c in cuts if not any(used[0] < c <= used[-1] for used in uses.values()))


def _fresh(tensor: Tensor) -> Tensor:
    """Returns a copy that a layer may write to, and that starts a graph of its own."""
    return tensor.detach().requires_grad_(tensor.requires_grad).clone()


def _value_name(layer: Layer) -> str:
    """Returns the name of what a layer gives: its own, unless that is a name of the batch's values."""
    return f"{layer.name}.output" if layer.name in ("inputs", "targets") else layer.name


def _storages(tensors: list[Tensor]) -> set[int]:
    """Returns the memory that tensors lie in, by address."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.layout is torch.strided}


def _leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _tensors(prefix: str, module: nn.Module) -> tuple[Parameter, ...]:
    def describe(name: str, tensor: Tensor, buffer: bool) -> Parameter:
        trainable = tensor.requires_grad and not buffer
        return Parameter(
            f"{prefix}.{name}", tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), trainable, buffer
        )

    parameters = [describe(n, p, False) for n, p in module.named_parameters(remove_duplicate=False)]
    return tuple(parameters + [describe(n, b, True) for n, b in module.named_buffers(remove_duplicate=False)])


def _ties(model: nn.Module, children: list[tuple[str, nn.Module]]) -> tuple[Tied, ...]:
    """Finds parameters with several names, in the order in which the model names them."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    position = {name: i for i, (name, _) in enumerate(children)}
    return tuple(
        Tied(tuple(found), tuple(sorted({position[n.split(".")[0]] for n in found})), p.numel() * p.element_size())
        for p, found in names.items()
        if len(found) > 1
    )
