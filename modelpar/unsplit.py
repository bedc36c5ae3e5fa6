"""The unsplit side of `verify`: the user's untouched module, trained in this process on the same micro-batches.

Per micro-batch forward, loss and backward, then the division by the count, `clip_grad_norm_` and `optimizer.step`. What
it shares with the pipeline is how a batch is cut, how a loss is read off an output, and the random keys.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modelpar.capture import trees
from modelpar.capture.microbatch import Cutting, Microbatch
from modelpar.capture.objective import Batch, LossResult, Objective, in_mode, loss_of, run
from modelpar.errors import describe
from modelpar.planning.plan import Plan
from modelpar.run.rng import random_key
from modelpar.run.update import OptimizerFactory, gradient_norms


class Unsplit:
    """A copy of the module, on the device of the last stage; `restart` puts its weights and buffers back."""

    def __init__(self, objective: Objective, model: nn.Module, plan: Plan, seed: int):
        self._objective, self._plan, self._seed = objective, plan, seed
        self.cutting = Cutting.of(objective, plan.batch)
        self._device = torch.device(plan.cluster.devices[-1])
        values = (v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf)
        computed = {id(value): value.detach().clone() for value in values}  # by hooks, which will do so again
        self._model = _copy(model, computed).to(self._device)
        self._start = copy.deepcopy(model.state_dict())
        self._buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._draws = tuple(dict.fromkeys(name for layer in plan.graph.layers for name in layer.draws))

    def restart(self) -> None:
        """Puts weights and buffers, also those that no state dict has, back to where they began."""
        self._model.load_state_dict(self._start)
        with torch.no_grad():
            for name, buffer in self._model.named_buffers():
                buffer.copy_(self._buffers[name])

    def start(self) -> dict[str, Any]:
        """Returns the state dict that it begins with."""
        return dict(self._start)

    def state(self) -> dict[str, Any]:
        """Returns its state dict."""
        return dict(self._model.state_dict())

    def buffers(self) -> dict[str, Tensor]:
        """Returns the buffers that are in the state dict."""
        known = self._model.state_dict()
        return {name: buffer for name, buffer in self._model.named_buffers() if name in known}

    def first(self, batch: Batch, number: int) -> Batch:
        """Returns a batch of the first samples of another one."""
        inputs, targets, _ = self.cutting.first(batch, number)
        return inputs, targets

    def gradients(self, batch: Batch, step: int) -> tuple[float, dict[str, Tensor]]:
        """Returns the loss, and the gradient of each parameter that is trained: 0 where there is none."""
        loss = self._backward(batch, step)
        found = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense().clone()
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        }
        self._model.zero_grad(set_to_none=True)
        return loss, found

    def refuses(self, batch: Batch) -> str:
        """Returns why the module itself cannot train on a batch's micro-batches; empty where it can."""
        self.restart()
        try:
            self.gradients(batch, 0)
        except Exception as error:
            return " ".join(describe(error).split())
        finally:
            self._model.zero_grad(set_to_none=True)
            self.restart()
        return ""

    def train(
        self, batches: Sequence[Batch], factory: OptimizerFactory, max_norm: float | None
    ) -> Iterator[tuple[float, float]]:
        """Trains on the batches; yields each step's loss and gradient norm."""
        optimizer = factory([(n, p) for n, p in self._model.named_parameters() if p.requires_grad])
        for step, batch in enumerate(batches):
            loss = self._backward(batch, step)
            parameters = [p for p in self._model.parameters() if p.grad is not None]
            norm = _clipped(parameters, max_norm)
            optimizer.step()
            optimizer.zero_grad()
            yield loss, float(norm)

    def evaluate(self, batch: Batch) -> float:
        """Returns the loss in eval mode, summed over micro-batches."""
        with torch.no_grad(), in_mode(self._model, "evaluate"):
            parts = [self._loss(microbatch) for microbatch in self._microbatches(batch)]
        total = parts[0].total
        for part in parts[1:]:
            total = total + part.total
        return float(total) / sum(part.count for part in parts)

    def predict(self, pieces: list[Any]) -> list[Any]:
        """Returns the outputs in eval mode."""
        with torch.no_grad(), in_mode(self._model, "predict"):
            return [run(self._model, self._moved(inputs)) for inputs in pieces]

    def notes(self, batch: Batch) -> Iterator[str]:
        """Says what micro-batches change whether or not the model is split."""
        names = [name for name, m in self._model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if names and self._plan.num_microbatches > 1:
            yield (
                f"batch normalisation ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}) sees one "
                "micro-batch at a time, not the batch, as it does with gradient accumulation. Where that matters, use "
                "GroupNorm, or fewer and larger micro-batches"
            )
        with torch.no_grad(), in_mode(self._model, "evaluate"):
            whole = self._loss(self.cutting.first(batch, self.cutting.size(*batch)))
        parts, full = self.evaluate(batch), float(whole.total) / whole.count
        if abs(parts - full) > 1e-4 * max(abs(full), 1e-8):
            yield (
                f"the loss of a whole batch is {full:.6g}, that of its {self._plan.num_microbatches} micro-batches "
                f"together {parts:.6g}: it compares samples with each other, or it is a mean over something else than "
                "samples, such as tokens that are not ignored. For the latter, give a loss that returns "
                "LossResult(total=sum, count=number of tokens)"
            )

    def _loss(self, microbatch: Microbatch) -> LossResult:
        inputs, targets = map(self._moved, microbatch[:2])
        return loss_of(self._objective.loss, run(self._model, inputs), targets, microbatch.size)

    def _moved(self, tree: Any) -> Any:
        return trees.map_tensors(lambda tensor: tensor.to(self._device), tree)

    def _microbatches(self, batch: Batch) -> list[Microbatch]:
        return self.cutting.cut(batch, self._plan.num_microbatches)

    def _backward(self, batch: Batch, step: int) -> float:
        """Leaves the gradients of the mean loss in the parameters; returns that loss."""
        total, count = None, 0.0
        for i, microbatch in enumerate(self._microbatches(batch)):
            with _keyed(self._model, self._draws, self._seed, step, i):
                part = self._loss(microbatch)
            if part.count and part.total.requires_grad:
                part.total.backward()  # type: ignore[no-untyped-call]
            total = part.total.detach() if total is None else total + part.total.detach()
            count += part.count
        for parameter in self._model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(count)
        assert total is not None
        return float(total / count)


def _clipped(parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
    """Clips gradients; returns the norm they had. Of sparse ones torch has none, which matters only where they clip."""
    if max_norm is None and any(p.grad is not None and p.grad.is_sparse for p in parameters):
        norms = gradient_norms({str(i): p.grad for i, p in enumerate(parameters) if p.grad is not None})
        return torch.linalg.vector_norm(torch.stack([*norms.values()]))
    return nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm)


def _copy(model: nn.Module, known: dict[int, Any]) -> nn.Module:
    """Copies a model; its parameters keep their attributes, which deepcopy drops. `known` is deepcopy's memo."""
    copied = copy.deepcopy(model, known)
    for ours, theirs in zip(copied.parameters(), model.parameters(), strict=True):
        vars(ours).update(copy.deepcopy(vars(theirs), known))
    return copied


@contextmanager
def _keyed(model: nn.Module, draws: Sequence[str], seed: int, step: int, microbatch: int) -> Iterator[None]:
    """Seeds each call of the modules that draw, as the pipeline does, and restores the generators."""
    calls: Counter[str] = Counter()
    saved: list[list[Tensor]] = []
    generators = (torch.default_generator, *torch.cuda.default_generators)

    def before(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            saved.append([generator.get_state() for generator in generators])
            for generator in generators:
                generator.manual_seed(random_key(seed, step, microbatch, name, calls[name]))
            calls[name] += 1

        return hook

    def after(*_: Any) -> None:
        for generator, state in zip(generators, saved.pop(), strict=True):
            generator.set_state(state)

    handles: list[Any] = []
    for name in draws:
        module = model.get_submodule(name)
        handles += [module.register_forward_pre_hook(before(name), prepend=True), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
