"""The unsplit side of `verify`: the user's untouched module, trained in this process on the same micro-batches.

Per micro-batch forward, loss and backward, then the division by the count, `clip_grad_norm_` and `optimizer.step`. What
it shares with the pipeline is how a batch is cut, how a loss is read off an output, and the random keys.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modelpar.capture import trees
from modelpar.capture.microbatch import Cutting, Microbatch
from modelpar.capture.objective import Batch, LossResult, Objective, in_mode, loss_of, run
from modelpar.errors import CaptureError, describe
from modelpar.planning.plan import Plan
from modelpar.run import wire
from modelpar.run.kept import Kept
from modelpar.run.rng import EVALUATION, KeyedRandom
from modelpar.run.update import OptimizerFactory, gradient_norms
from modelpar.run.variants import Variants


class Unsplit:
    """A copy of the module, on the device of the last stage; `restart` puts its weights and buffers back."""

    def __init__(self, objective: Objective, model: nn.Module, plan: Plan, seed: int):
        self._objective, self._plan = objective, plan
        self.cutting = Cutting.of(objective, plan.batch)
        self._device = torch.device(plan.cluster.devices[-1])
        self._model = _copy(model).to(self._device)
        self._start = copy.deepcopy(model.state_dict())
        self._kept = Kept(self._model)
        self._variants = Variants(objective, plan, lambda: model)
        self._random = KeyedRandom(self._model, (), seed, self._device)

    def restart(self) -> None:
        """Puts weights and buffers, also those that no state dict has, and attributes back to where they began."""
        self._random.attach(frozenset())
        self._kept.restore()
        self._model.load_state_dict(self._start)

    def reload(self) -> None:
        """Puts weights and buffers back, as a pipeline does that loads a state dict; attributes stay."""
        now = self._keep(buffers=False)
        self.restart()
        now.restore()

    def _keep(self, *, buffers: bool = True) -> Kept:
        self._random.attach(frozenset())  # hooks are attributes as well
        return Kept(self._model, buffers=buffers)

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
        now = self._keep()
        self.restart()
        try:
            with torch.random.fork_rng():
                for microbatch in self._microbatches(batch):
                    part = self._loss(microbatch)
                    if part.count and part.total.requires_grad:
                        part.total.backward()  # type: ignore[no-untyped-call]
        except Exception as error:
            return " ".join(describe(error).split())
        finally:
            self._model.zero_grad(set_to_none=True)
            now.restore()
        return ""

    def cannot_be_split(self, batch: Batch) -> str:
        """Returns why what the module does with a batch's micro-batches cannot be split; empty where it can."""
        try:
            for microbatch in self._microbatches(batch):
                self._draws("train", microbatch)
        except CaptureError as error:
            return " ".join(str(error).split())
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
            parts = [
                self._keyed_loss("evaluate", microbatch, EVALUATION, i)
                for i, microbatch in enumerate(self._microbatches(batch))
            ]
        total = parts[0].total
        for part in parts[1:]:
            total = total + part.total
        return float(total) / sum(part.count for part in parts)

    def predict(self, inputs: Any) -> Any:
        """Returns the output for a micro-batch in eval mode."""
        draws = self._draws("predict", (inputs, None))
        with torch.no_grad(), in_mode(self._model, "predict"):
            self._random.attach(draws)
            with self._random.microbatch(EVALUATION, 0):
                return run(self._model, self._moved(inputs))

    def notes(self, batch: Batch) -> Iterator[str]:
        """Says what micro-batches change whether or not the model is split."""
        names = [name for name, m in self._model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if names and self._plan.num_microbatches > 1:
            yield (
                f"batch normalisation ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}) sees one "
                "micro-batch at a time, not the batch, as it does with gradient accumulation. Where that matters, use "
                "GroupNorm, or fewer and larger micro-batches"
            )
        try:
            microbatches = self._microbatches(batch)
            if any(self._draws("evaluate", microbatch) for microbatch in microbatches):  # others for a whole batch
                return
            self._random.attach(frozenset())
            with torch.no_grad(), in_mode(self._model, "evaluate"):
                whole = self._loss(self.cutting.first(batch, self.cutting.size(*batch)))
            parts, full = self.evaluate(batch), float(whole.total) / whole.count
        except Exception:  # the verdict says that it cannot be evaluated
            return
        if abs(parts - full) > 1e-4 * max(abs(full), 1e-8):
            yield (
                f"the loss of a whole batch is {full:.6g}, that of its {self._plan.num_microbatches} micro-batches "
                f"together {parts:.6g}: it compares samples with each other, or it is a mean over something else than "
                "samples, such as tokens that are not ignored. For the latter, give a loss that returns "
                "LossResult(total=sum, count=number of tokens)"
            )

    def _draws(self, mode: str, microbatch: Microbatch) -> frozenset[str]:
        """Returns the modules that draw in a micro-batch, as the pipeline finds them: by recording the model."""
        parts = microbatch[:2]
        variant = self._variants.find(mode, parts) or self._variants.add(mode, parts)
        return variant.draws

    def _keyed_loss(self, mode: str, microbatch: Microbatch, step: int, number: int) -> LossResult:
        """Returns the loss of a micro-batch, with the random numbers that the pipeline draws for it."""
        self._random.attach(self._draws(mode, microbatch))
        with self._random.microbatch(step, number):
            return self._loss(microbatch)

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
            part = self._keyed_loss("train", microbatch, step, i)
            if part.count and part.total.requires_grad:
                with self._random.held():
                    part.total.backward()  # type: ignore[no-untyped-call]
            total = part.total.detach() if total is None else total + part.total.detach()
            count += part.count
        for parameter in self._model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(count)
        assert total is not None
        return float(total / count)


def _copy(model: nn.Module) -> nn.Module:
    """Copies a model as stages are copied; one with hooks of a library by deepcopy, which keeps functions as they are.

    A library's hooks may read variables of its modules, as those of transformers that collect outputs do; functions
    that are pickled get variables of their own.
    """
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    if all(getattr(hook, "__module__", "__main__") in ("__main__", None) for hook in hooks):
        found: nn.Module = wire.receive(wire.ship_as("the model", model))
        return found
    values = (v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf)
    computed: dict[int, Any] = {id(value): value.detach().clone() for value in values}  # by hooks, which do so again
    copied = copy.deepcopy(model, computed)
    for ours, theirs in zip(copied.parameters(), model.parameters(), strict=True):
        vars(ours).update(copy.deepcopy(vars(theirs), computed))
    return copied


def _clipped(parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
    """Clips gradients; returns the norm they had. Of sparse ones torch has none, which matters only where they clip."""
    if max_norm is None and any(p.grad is not None and p.grad.is_sparse for p in parameters):
        norms = gradient_norms({str(i): p.grad for i, p in enumerate(parameters) if p.grad is not None})
        return torch.linalg.vector_norm(torch.stack([*norms.values()]))
    return nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm)
