"""Proves that a split model is the same model: trains it split and unsplit, side by side, and compares every number.

The unsplit side runs the user's untouched module in this process: per micro-batch forward, loss and backward, then the
division by the count, `clip_grad_norm_` and `optimizer.step`. It shares nothing with the pipeline but the random keys.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from modelpar.capture import trees
from modelpar.capture.capture import in_mode
from modelpar.capture.objective import (
    Batch,
    LossResult,
    Objective,
    batch_size,
    loss_of,
    microbatch_sizes,
    run,
    split_batch,
)
from modelpar.planning.plan import Plan
from modelpar.run.pipeline import Pipeline
from modelpar.run.rng import random_key
from modelpar.run.update import OptimizerFactory
from modelpar.run.workers import Workers


@dataclass(frozen=True)
class Check:
    """One thing that was compared."""

    what: str
    passed: bool
    detail: str
    """What was equal, or the largest difference and where it first appears."""


@dataclass(frozen=True)
class Verdict:
    """What `verify` found."""

    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()
    """What no split can preserve, and what to do about it."""

    @property
    def passed(self) -> bool:
        """Whether all checks hold."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Returns plain data for json."""
        return {"passed": self.passed, **asdict(self)}


def verify(
    objective: Objective,
    batch: Batch,
    plan: Plan,
    *,
    optimizer: OptimizerFactory,
    workers: Workers | None = None,
    max_norm: float | None = 1.0,
    seed: int = 0,
    steps: int = 3,
) -> Verdict:
    """Compares a plan's pipeline with the unsplit model over training steps on batches of different sizes.

    `batch` is cut and repeated to make full batches, and ones whose last micro-batches are smaller or missing. Whatever
    `plan.tied` says, gradients of tied weights are added as autograd does, so that all may be equal to the bit.
    """
    plan = replace(plan, tied="exact")
    model = objective.build(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.num_threads)  # sums over other numbers of threads differ in their last bits
    try:
        return _verify(objective, model, batch, plan, optimizer, workers, max_norm, seed, steps)
    finally:
        torch.set_num_threads(threads)


def _verify(
    objective: Objective,
    model: nn.Module,
    batch: Batch,
    plan: Plan,
    optimizer: OptimizerFactory,
    workers: Workers | None,
    max_norm: float | None,
    seed: int,
    steps: int,
) -> Verdict:
    batches = [*_sizes(objective, batch, plan, steps)]
    start = {name: _kept(value) for name, value in model.state_dict().items()}
    unsplit = _Unsplit(objective, model, plan, seed)
    checks: list[Check] = []
    options: dict[str, Any] = {"workers": workers, "seed": seed}
    with Pipeline(objective, plan, optimizer=_to_gradients, **options) as pipeline:
        checks.append(_same_keys(pipeline.state_dict(), start))
        for step, each in enumerate(batches):
            pipeline.load_state_dict(start)
            unsplit.restart()
            loss = pipeline.step(each).loss
            expected, gradients = unsplit.gradients(each, step)
            found = pipeline.state_dict()
            what = f"step {step}, {unsplit.size(each)} samples"
            checks.append(_equal(f"loss of {what}", {"loss": torch.tensor(loss)}, {"loss": torch.tensor(expected)}))
            trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            compared = {name: g for name, g in gradients.items() if name in trained}
            checks.append(_equal(f"gradients of {what}", found, compared))
            checks.append(_equal(f"buffers after {what}", found, unsplit.buffers()))
    unsplit.restart()
    with Pipeline(objective, plan, optimizer=optimizer, max_norm=max_norm, **options) as pipeline:
        results = [pipeline.step(each) for each in batches]
        losses, norms = zip(*unsplit.train(batches, optimizer, max_norm), strict=True)
        ours = {f"step {i}": torch.tensor(result.loss) for i, result in enumerate(results)}
        checks.append(_equal("losses", ours, {f"step {i}": torch.tensor(v) for i, v in enumerate(losses)}))
        ours = {f"step {i}": torch.tensor(result.grad_norm) for i, result in enumerate(results)}
        checks.append(_equal("gradient norms", ours, {f"step {i}": torch.tensor(v) for i, v in enumerate(norms)}))
        checks.append(_equal(f"weights and buffers after {steps} steps", pipeline.state_dict(), unsplit.state()))
        checks.append(_equal_copies(pipeline.stage_states(), unsplit.state()))
        evaluated = {"loss": torch.tensor(pipeline.evaluate([batch]).loss)}
        checks.append(_equal("evaluate", evaluated, {"loss": torch.tensor(unsplit.evaluate(batch))}))
        pieces = split_batch(batch[0], [1] * unsplit.size(batch), objective.batch_dim)[:4]
        checks.append(_equal_outputs(map(pipeline.predict, pieces), unsplit.predict(pieces)))
    unsplit.restart()
    return Verdict(tuple(checks), tuple(unsplit.notes(batch)))


class _Unsplit:
    """The untouched module, in one process; `restart` puts its weights and buffers back."""

    def __init__(self, objective: Objective, model: nn.Module, plan: Plan, seed: int):
        self._objective, self._plan, self._seed = objective, plan, seed
        values = (v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf)
        self._model = copy.deepcopy(model, {id(v): v.detach().clone() for v in values})  # what hooks compute anew
        self._start = {name: _kept(value) for name, value in model.state_dict().items()}
        self._fixed = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._draws = tuple(dict.fromkeys(name for layer in plan.graph.layers for name in layer.draws))

    def restart(self) -> None:
        self._model.load_state_dict(self._start)
        with torch.no_grad():
            for name, buffer in self._model.named_buffers():
                buffer.copy_(self._fixed[name])

    def size(self, batch: Batch) -> int:
        return batch_size(batch[0], self._objective.batch_dim)

    def state(self) -> dict[str, Any]:
        return dict(self._model.state_dict())

    def buffers(self) -> dict[str, Tensor]:
        known = self._model.state_dict()
        return {name: buffer for name, buffer in self._model.named_buffers() if name in known}

    def gradients(self, batch: Batch, step: int) -> tuple[float, dict[str, Tensor]]:
        """Returns the loss and the gradients, 0 where there is none."""
        loss = self._backward(batch, step)
        found = {n: _zero(p) if p.grad is None else p.grad.clone() for n, p in self._model.named_parameters()}
        self._model.zero_grad(set_to_none=True)
        return loss, found

    def train(
        self, batches: Sequence[Batch], factory: OptimizerFactory, max_norm: float | None
    ) -> Iterator[tuple[float, float]]:
        optimizer = factory([(n, p) for n, p in self._model.named_parameters() if p.requires_grad])
        for step, batch in enumerate(batches):
            loss = self._backward(batch, step)
            parameters = [p for p in self._model.parameters() if p.grad is not None]
            norms = [torch.linalg.vector_norm(p.grad) for p in parameters if p.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
            if max_norm is not None:
                nn.utils.clip_grad_norm_(parameters, max_norm)
            optimizer.step()
            optimizer.zero_grad()
            yield loss, float(norm)

    def evaluate(self, batch: Batch) -> float:
        with torch.no_grad(), in_mode(self._model, "evaluate"):
            parts = [self._loss(piece, size) for piece, size in self.microbatches(batch)]
        total = parts[0].total
        for part in parts[1:]:
            total = total + part.total
        return float(total) / sum(part.count for part in parts)

    def predict(self, pieces: list[Any]) -> list[Any]:
        with torch.no_grad(), in_mode(self._model, "predict"):
            return [run(self._model, inputs) for inputs in pieces]

    def notes(self, batch: Batch) -> Iterator[str]:
        """Says what micro-batches change whether or not the model is split."""
        names = [name for name, m in self._model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if names and self._plan.num_microbatches > 1:
            yield (
                f"{len(names)} batch normalisations ({names[0]}, …) see micro-batches, not batches, as with gradient "
                "accumulation; use GroupNorm or fewer, larger micro-batches where that matters"
            )
        with torch.no_grad(), in_mode(self._model, "evaluate"):
            whole = self._loss(batch, self.size(batch))
        parts, full = self.evaluate(batch), float(whole.total) / whole.count
        if abs(parts - full) > 1e-4 * max(abs(full), 1e-8):
            yield (
                f"the loss of the whole batch is {full:.6g}, of its micro-batches together {parts:.6g}: it mixes "
                "samples, or is a mean over something else than samples, such as tokens that are not ignored; give a "
                "loss that returns LossResult(total=sum, count=number of tokens)"
            )

    def _loss(self, batch: Batch, num_samples: int) -> LossResult:
        return loss_of(self._objective.loss, run(self._model, batch[0]), batch[1], num_samples)

    def microbatches(self, batch: Batch) -> list[tuple[Batch, int]]:
        dim = self._objective.batch_dim
        sizes = microbatch_sizes(batch_size(batch[0], dim), self._plan.num_microbatches)
        pieces = zip(*(split_batch(part, sizes, dim) for part in batch), strict=True)
        return [((inputs, targets), size) for (inputs, targets), size in zip(pieces, sizes, strict=True)]

    def _backward(self, batch: Batch, step: int) -> float:
        """Leaves the gradients of the mean loss in the parameters; returns that loss."""
        total, count = None, 0.0
        for i, (piece, size) in enumerate(self.microbatches(batch)):
            with _keyed(self._model, self._draws, self._seed, step, i):
                part = self._loss(piece, size)
            if part.count and part.total.requires_grad:
                part.total.backward()  # type: ignore[no-untyped-call]
            total = part.total.detach() if total is None else total + part.total.detach()
            count += part.count
        for parameter in self._model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(count)
        assert total is not None
        return float(total / count)


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


class _ToGradients(torch.optim.Optimizer):
    """Puts each parameter's gradient in its place, so that the pipeline's weights tell its gradients."""

    def __init__(self, parameters: Any):
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.copy_(_zero(parameter) if parameter.grad is None else parameter.grad)


def _to_gradients(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return _ToGradients(named)


def _sizes(objective: Objective, batch: Batch, plan: Plan, steps: int) -> Iterator[Batch]:
    """Yields batches: a full one, one whose micro-batches are of two sizes, and one with fewer samples than they."""
    size = batch_size(batch[0], objective.batch_dim)
    cycle = [size, max(1, size - 1), max(1, min(size, plan.num_microbatches) - 1)]
    for i in range(steps):
        wanted = cycle[i % len(cycle)]
        sizes = [wanted, size - wanted] if wanted < size else [size]
        inputs, targets = (split_batch(part, sizes, objective.batch_dim)[0] for part in batch)
        yield inputs, targets


def _zero(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter)


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _same_keys(found: dict[str, Tensor], expected: dict[str, Any]) -> Check:
    if list(found) == list(expected):
        return Check("keys of the state dict", True, f"{len(found)} keys, in the same order")
    missing, more = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    return Check("keys of the state dict", False, f"missing {missing[:3]}, unknown {more[:3]}")


def _equal(what: str, found: dict[str, Any], expected: dict[str, Any]) -> Check:
    """Compares tensors by name, in the order expected."""
    first, largest = "", 0.0
    for name, there in expected.items():
        here = found.get(name)
        if not isinstance(there, Tensor):
            continue
        difference = _difference(here, there)
        if difference:
            first = first or name
            largest = max(largest, difference)
    if not first:
        return Check(what, True, f"{len(expected)} equal to the bit" if len(expected) > 1 else "equal to the bit")
    return Check(what, False, f"first at {first}, largest difference {largest:.3g}")


def _difference(here: Any, there: Tensor) -> float:
    """Returns the largest absolute difference; inf where shapes, dtypes or what is finite differ."""
    if not isinstance(here, Tensor) or here.shape != there.shape or here.dtype != there.dtype:
        return float("inf")
    here, there = here.detach().cpu(), there.detach().cpu()
    if torch.equal(here, there) or bool(((here == there) | ((here != here) & (there != there))).all()):
        return 0.0
    if not here.is_floating_point():
        return float("inf")
    found = float((here.double() - there.double()).abs().max())
    return found if found == found else float("inf")


def _equal_copies(stages: list[dict[str, Tensor]], expected: dict[str, Any]) -> Check:
    """Compares every stage's own copy of everything with the unsplit model's."""
    for stage, state in enumerate(stages):
        check = _equal("", state, {name: expected[name] for name in state if name in expected})
        if not check.passed:
            return Check("copies of tied tensors", False, f"stage {stage}: {check.detail}")
    shared = Counter(name for state in stages for name in state)
    return Check("copies of tied tensors", True, f"{sum(n > 1 for n in shared.values())} tensors on several stages")


def _equal_outputs(found: Iterable[Any], expected: Iterable[Any]) -> Check:
    """Compares outputs, sample by sample."""
    count = 0
    for i, (here, there) in enumerate(zip(found, expected, strict=True)):
        ours, theirs = trees.tensors_of(here), trees.tensors_of(there)
        if len(ours) != len(theirs):
            return Check("predict", False, f"sample {i}: {len(ours)} tensors, expected {len(theirs)}")
        for position, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if difference := _difference(a, b):
                return Check("predict", False, f"sample {i}, tensor {position}: difference {difference:.3g}")
        count += len(ours)
    return Check("predict", count > 0, f"{count} tensors equal to the bit")
