"""The check before a training's first step, split = unsplit: UnsplitModel, the user's own module, and the comparison.

The first micro-batch is run forward and backward by the ranks and, here, by the module that nobody touched, with the
same random numbers. Its loss and every gradient must be the same, or nothing is trained.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modelpar.capture import trees
from modelpar.capture.microbatch import Microbatch
from modelpar.capture.objective import Objective, loss_of, run
from modelpar.capture.untouched import untouched
from modelpar.errors import SplitMismatch
from modelpar.planning.plan import Plan
from modelpar.planning.verdict import Check
from modelpar.run import wire
from modelpar.run.kept import Kept
from modelpar.run.rng import KeyedRandom

NAME = "split = unsplit"
_TIED_FAST = 1e-6
"""What gradients that are added once per step may differ by, of the largest."""
_ANY_ORDER = 1e-4
"""What they may differ by on CUDA, whose kernels need not add in the same order twice, and in scripted code, which
torch compiles again as it runs."""
_ROUNDING = 1e-3
"""By how much the unsplit model differs from itself at most, of the largest value, by the order of additions."""
_REPEATS = 2
"""How often the unsplit model is run again where it differs, to find out whether it equals itself."""


class Gradients(NamedTuple):
    """What a forward and a backward made: the sum of the losses, and the gradients that there are, by FQN."""

    total: float
    of: Mapping[str, Tensor]
    exact: bool = True
    """Whether they come out the same to the bit in another run."""


class UnsplitModel:
    """The user's module as it was handed out to the ranks, held until the first step."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._training = [(module, module.training) for module in model.modules()]
        self._handed_out = Kept(model)
        self._versions = self._now()

    def _now(self) -> list[int]:
        return [parameter._version for parameter in self.model.parameters()]

    @property
    def has_changed(self) -> bool:
        """Whether its weights were written to since, which the ranks' were not."""
        return self._versions != self._now()

    def gradients(
        self,
        objective: Objective,
        plan: Plan,
        microbatch: Microbatch,
        draws: frozenset[str],
        seed: int,
        state: Mapping[str, Tensor],
    ) -> Gradients:
        """Runs a micro-batch of step 0 as the ranks do, with the weights and buffers of a state dict where it has them.

        The module is as before afterwards.
        """
        now = Kept(self.model)
        flags = [(module, module.training) for module, _ in self._training]
        try:
            self._handed_out.restore()
            for module, training in self._training:
                module.training = training
            with self._with_weights(state):
                return self._run(objective, plan, microbatch, draws, seed)
        finally:
            now.restore()
            for module, training in flags:
                module.training = training

    def _run(
        self, objective: Objective, plan: Plan, microbatch: Microbatch, draws: frozenset[str], seed: int
    ) -> Gradients:
        device = torch.device(plan.cluster.devices[-1])
        model = self.model if device.type == "cpu" else wire.receive(wire.ship_as("the model", self.model)).to(device)
        inputs, targets = (trees.map_tensors(lambda t: t.detach().clone().to(device), part) for part in microbatch[:2])
        random = KeyedRandom(model, (), seed, device)
        with untouched(model), torch.inference_mode(False), torch.enable_grad():
            try:
                random.attach(draws)
                with random.microbatch(0, 0):
                    loss = loss_of(objective.loss, run(model, inputs), targets, microbatch.size)
                if loss.count and loss.total.requires_grad:
                    with random.held():
                        loss.total.backward()  # type: ignore[no-untyped-call]
                found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
            finally:
                random.attach(frozenset())
        return Gradients(float(loss.total.detach()), found, device.type == "cpu" and not _has_scripts(model))

    @contextmanager
    def _with_weights(self, state: Mapping[str, Tensor]) -> Iterator[None]:
        """Has the module compute with other weights and buffers meanwhile."""
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        before = [(tensor, tensor.data) for tensor in tensors.values()]
        try:
            for name, tensor in tensors.items():
                if isinstance(state.get(name), Tensor):
                    tensor.data = state[name].to(tensor.device)
            yield
        finally:
            for tensor, data in before:
                tensor.data = data


def _has_scripts(model: nn.Module) -> bool:
    """Tells whether a model has scripted modules, or its code calls scripted functions, as far as its files say."""
    kinds = {type(module) for module in model.modules()}
    functions = (value for kind in kinds for value in vars(sys.modules.get(kind.__module__, math)).values())
    scripted = torch.jit.ScriptModule, torch.jit.ScriptFunction
    return any(issubclass(kind, torch.jit.ScriptModule) for kind in kinds) or any(
        isinstance(value, scripted) for value in functions
    )


@contextmanager
def num_threads(number: int) -> Iterator[None]:
    """Computes with a number of threads meanwhile: sums over other numbers differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def joined(parts: list[dict[int, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Returns the gradients that stages have; those of a tied tensor are added, latest use first, as autograd does."""
    found: dict[str, Tensor] = {}
    stages = {stage: own for part in parts for stage, own in part.items()}
    for stage in sorted(stages, reverse=True):
        for name, gradient in stages[stage].items():
            found[name] = found[name] + gradient if name in found else gradient
    return found


def compare(found: Gradients, expected: Gradients, plan: Plan, again: Iterator[Gradients]) -> Check:
    """Returns what holds; raises SplitMismatch, naming the first parameter in the order of backward.

    `again` runs the unsplit model once more. Where it does not equal itself by rounding, as with kernels that add in
    any order, the split one may differ by ten times as much; by more, as with numbers from Python's own generators,
    nothing can be said.
    """
    differing = _differing(found, expected, plan, 0.0)
    if not differing:
        equal = "equal to the bit" if expected.exact else f"equal within {_ANY_ORDER:g}"
        return Check(NAME, True, f"loss and {len(expected.of)} gradients of the first micro-batch are {equal}")
    own = max(_distance(next(again), expected) for _ in range(_REPEATS))
    if own > _ROUNDING or (own and not _differing(found, expected, plan, 10 * own)):
        detail = f"not compared to the bit: the unsplit model does not equal itself in two runs, by up to {own:.2g}"
        return Check(NAME, False, f"{detail} of the largest value", compared=False)
    raise SplitMismatch(
        f"{NAME}: {differing[0]}"
        + (f" ({len(differing)} differ in all)" if len(differing) > 1 else "")
        + "; the split model would train other numbers than the unsplit one, so nothing was trained. `modelpar verify` "
        "compares more; check=False (pipeline.check=false) trains all the same"
    )


def _differing(found: Gradients, expected: Gradients, plan: Plan, more: float) -> list[str]:
    """Returns where gradients, and then the loss, differ by more than they may, in the order of backward."""
    layers = {p.name: (i, layer.name) for i, layer in enumerate(plan.graph.layers) for p in layer.parameters}
    names = [p.name for layer in reversed(plan.graph.layers) for p in reversed(layer.parameters)]
    names += [name for name in (*found.of, *expected.of) if name not in layers]
    fast = {tie.names[0] for tie in plan.graph.tied} if plan.tied == "fast" else set()
    usual = more if expected.exact else max(more, _ANY_ORDER)
    unequal = [name for name in dict.fromkeys(names) if not _is_same(found.of.get(name), expected.of.get(name))]
    scale = max((_largest(gradient) for gradient in expected.of.values()), default=0.0) if unequal else 0.0
    differ = []
    for name in unequal:
        bound = max(usual, _TIED_FAST if name in fast else 0.0)
        if words := _difference(found.of.get(name), expected.of.get(name), bound, scale):
            index, layer = layers.get(name, (-1, ""))
            stage = next((s for s in range(plan.num_stages) if index in plan.partition.layers(s)), -1)
            differ.append(f"the gradient of {name} (layer {layer}, stage {stage}) {words}")
    here, there = found.total, expected.total
    same = here == there or (math.isnan(here) and math.isnan(there))
    if not same and not abs(here - there) <= usual * abs(there):
        differ.append(f"the loss of the first micro-batch is {here!r}, unsplit {there!r}")
    return differ


def _difference(here: Tensor | None, there: Tensor | None, bound: float, scale: float) -> str:
    if here is None or there is None:
        missing = "only the unsplit model has one" if here is None else "the unsplit model has none"
        return f"is on one side only: {missing}"
    if here.shape != there.shape or here.dtype != there.dtype:
        return f"is {here.dtype} {list(here.shape)}, unsplit {there.dtype} {list(there.shape)}"
    distance, largest = _largest(_double(here) - _double(there)), _largest(there)
    eps = 4 * torch.finfo(there.dtype).eps
    if bound and distance <= max(bound, eps) * (largest + 0.1 * scale):
        return ""
    return f"differs by at most {distance:.3g} where values are up to {largest:.3g}"


def _distance(one: Gradients, other: Gradients) -> float:
    """Returns how far the gradients of two runs of the unsplit model are apart, of the largest value; 0 where equal."""
    if set(one.of) != set(other.of):
        return float("inf")
    scale = max((_largest(gradient) for gradient in other.of.values()), default=0.0) or 1.0
    apart = [abs(one.total - other.total) / (abs(other.total) or 1.0)]
    apart += [_largest(_double(one.of[name]) - _double(g)) / scale for name, g in other.of.items()]
    return max(value for value in apart if value == value)


def _is_same(here: Tensor | None, there: Tensor | None) -> bool:
    if here is None or there is None:
        return here is there
    here, there = (t.to_dense() if t.layout is not torch.strided else t for t in (here, there))
    return trees.same_values(here, there)


def _double(tensor: Tensor) -> Tensor:
    dense = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    return dense.to(torch.complex128 if dense.is_complex() else torch.float64)


def _largest(tensor: Tensor) -> float:
    dense = _double(tensor)
    return float(dense.abs().nan_to_num(float("inf")).max()) if dense.numel() else 0.0
