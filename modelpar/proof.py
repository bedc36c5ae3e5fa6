"""Proves that a split model is the same model: trains it split and unsplit, side by side, and compares every number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from modelpar.capture.deferred import materialize
from modelpar.capture.objective import Batch, Objective
from modelpar.compared import compare_outputs, compare_states, compare_values
from modelpar.errors import ModelparError, StageError, describe
from modelpar.planning.doing import Doing, silent
from modelpar.planning.plan import Plan
from modelpar.planning.verdict import Check, Verdict
from modelpar.run.pipeline import Pipeline
from modelpar.run.update import OptimizerFactory
from modelpar.run.workers import Workers
from modelpar.unsplit import Unsplit


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
    doing: Doing = silent,
) -> Verdict:
    """Compares a plan's pipeline with the unsplit model over training steps on batches of different sizes.

    From the same weights each step's loss, gradients and buffers are compared; then losses, gradient norms, weights and
    buffers of a training; then evaluation and prediction. `batch` is cut to make batches whose last micro-batches are
    smaller or missing. Whatever `plan.tied` says, gradients of tied weights are added as autograd does, so that all may
    be equal to the bit. `doing` is told what goes on.
    """
    exact = replace(plan, tied="exact")
    model = materialize(objective.build(seed))
    order = [parameter.name for layer in plan.graph.layers for parameter in layer.parameters]
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.num_threads)  # sums over other numbers of threads differ in their last bits
    try:
        unsplit = Unsplit(objective, model, exact, seed)
        batches, left_out = _cut(unsplit, batch, plan.num_microbatches, steps)
        doing("comparing single steps", 0, len(batches))
        with Pipeline(objective, exact, workers=workers, optimizer=_to_gradients, seed=seed, check=False) as pipeline:
            checks = [*_single_steps(pipeline, unsplit, batches, plan.num_microbatches, order, doing)]
        doing("comparing a training")
        unsplit.restart()
        options: dict[str, Any] = {"optimizer": optimizer, "max_norm": max_norm, "seed": seed, "check": False}
        with Pipeline(objective, exact, workers=workers, **options) as pipeline:
            evaluated = _evaluation("evaluate at first", pipeline, unsplit, batch)
            checks += [evaluated, *_training(pipeline, unsplit, batches, order, optimizer, max_norm)]
            doing("comparing evaluation and prediction")
            if evaluated.compared:  # again, with other weights: what the model kept of the old ones must be gone
                checks.append(_evaluation("evaluate", pipeline, unsplit, batch))
            checks.append(_prediction(pipeline, unsplit, objective, batch))
        unsplit.restart()
        return Verdict(tuple(checks), (*left_out, *unsplit.notes(batch), *_tied_notes(plan)))
    finally:
        torch.set_num_threads(threads)


def _single_steps(
    pipeline: Pipeline,
    unsplit: Unsplit,
    batches: list[Batch],
    most: int,
    order: list[str],
    doing: Doing,
) -> Iterator[Check]:
    """Compares loss, gradients and buffers of steps that all begin with the same weights."""
    found, expected = list(pipeline.state_dict()), list(unsplit.start())
    missing, more = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    detail = f"missing {missing[:3]}, unknown {more[:3]}" if missing or more else "in another order"
    same = f"{len(found)}, the same in the same order"
    yield Check("names in the state dict", found == expected, same if found == expected else detail)
    checks: list[Check] = []
    for step, batch in enumerate(batches):
        doing("comparing single steps", step, len(batches))
        name = f"step {step}, {unsplit.cutting.size(*batch)} samples"
        checks += _single_step(pipeline, unsplit, batch, step, name, order)
    passed = all(check.passed for check in checks)
    place = "" if passed else _first_microbatch(pipeline, unsplit, batches, most, order)
    yield from (check if check.passed else replace(check, detail=check.detail + place) for check in checks)


def _single_step(
    pipeline: Pipeline, unsplit: Unsplit, batch: Batch, step: int, name: str, order: list[str]
) -> list[Check]:
    pipeline.load_state_dict(unsplit.start())
    unsplit.reload()
    loss = pipeline.step(batch).loss
    expected, gradients = unsplit.gradients(batch, step)
    found, buffers = pipeline.state_dict(), unsplit.buffers()
    checks = [compare_values(f"loss, {name}", [loss], [expected])]
    checks.append(compare_states(f"gradients, {name}", found, gradients, order[::-1]))
    return checks + ([compare_states(f"buffers, {name}", found, buffers)] if buffers else [])


def _first_microbatch(pipeline: Pipeline, unsplit: Unsplit, batches: list[Batch], most: int, order: list[str]) -> str:
    """Says in which micro-batch a difference begins, where batches with one sample per micro-batch show it."""
    most = min(most, unsplit.cutting.size(*batches[0]))
    for number in range(1, most + 1):
        batch, step = unsplit.first(batches[0], number), len(batches) + number - 1
        if unsplit.refuses(batch):
            break
        if not all(check.passed for check in _single_step(pipeline, unsplit, batch, step, "", order)):
            return f"; with one sample each it begins in micro-batch {number - 1}"
    return ""


def _training(
    pipeline: Pipeline,
    unsplit: Unsplit,
    batches: list[Batch],
    order: list[str],
    optimizer: OptimizerFactory,
    max_norm: float | None,
) -> Iterator[Check]:
    """Compares a training with optimizer and clipping."""
    results = [pipeline.step(batch) for batch in batches]
    losses, norms = zip(*unsplit.train(batches, optimizer, max_norm), strict=True)
    name = f"{len(batches)} training step{'s' if len(batches) > 1 else ''}"
    yield compare_values(f"losses, {name}", [result.loss for result in results], losses)
    yield compare_values(f"gradient norms, {name}", [result.grad_norm for result in results], norms)
    yield compare_states("weights and buffers after these", pipeline.state_dict(), unsplit.state(), order[::-1])
    states, expected = pipeline.stage_states(), unsplit.state()
    own = {f"rank {rank}: {key}": value for rank, state in enumerate(states) for key, value in state.items()}
    copies = {key: expected.get(key.partition(": ")[2]) for key in own}
    yield compare_states("each rank's weights and buffers", own, copies)


def _evaluation(what: str, pipeline: Pipeline, unsplit: Unsplit, batch: Batch) -> Check:
    """Compares evaluation on a batch, where both can do it."""
    try:
        expected = unsplit.evaluate(batch)
        return compare_values(what, [pipeline.evaluate([batch]).loss], [expected])
    except StageError:  # only the split model failed
        raise
    except Exception as error:
        return _not_compared(what, error)


def _prediction(pipeline: Pipeline, unsplit: Unsplit, objective: Objective, batch: Batch) -> Check:
    """Compares prediction, sample by sample, on samples where both can do it."""
    size = unsplit.cutting.size(*batch)
    pieces = [microbatch.inputs for microbatch in unsplit.cutting.cut((batch[0], None), size)[:4]]
    found, expected, failed = [], [], list[Exception]()
    for piece in pieces:
        try:
            there = unsplit.predict(piece)
            there = there if objective.join is None else objective.join([there])
            found.append(pipeline.predict(piece))
            expected.append(there)
        except StageError:
            raise
        except Exception as error:
            failed.append(error)
    if not found:
        return _not_compared("predict", failed[0])
    check = compare_outputs("predict", found, expected)
    return replace(check, detail=f"{check.detail}; {len(failed)} left out: {_said(failed[0])}") if failed else check


def _not_compared(what: str, error: Exception) -> Check:
    return Check(what, False, f"not compared: {_said(error)}", compared=False)


def _said(error: Exception) -> str:
    """Returns an error in one line."""
    return " ".join((str(error) if isinstance(error, ModelparError) else describe(error)).split())


def _cut(unsplit: Unsplit, batch: Batch, most: int, steps: int) -> tuple[list[Batch], tuple[str, ...]]:
    """Returns batches: full ones, ones whose micro-batches are of two sizes, and ones with fewer samples than these.

    Sizes on which the unsplit model itself fails are left out, with a note.
    """
    size = unsplit.cutting.size(*batch)
    notes = []
    kept = [batch]
    for number in dict.fromkeys((max(1, size - 1), max(1, min(size, most) - 1))):
        first = unsplit.first(batch, number)
        if reason := unsplit.refuses(first):
            notes.append(
                f"batches of {number} samples were left out: the unsplit model cannot train on them in "
                f"{min(number, most)} micro-batches ({reason})"
            )
        elif reason := unsplit.cannot_be_split(first):
            notes.append(f"batches of {number} samples were left out: {reason}")
        else:
            kept.append(first)
    return [kept[step % len(kept)] for step in range(steps)], tuple(notes)


def _tied_notes(plan: Plan) -> Iterator[str]:
    if plan.tied == "fast" and plan.graph.tied:
        yield (
            f"the gradients of {plan.graph.tied[0].names[0]}, which is used in several places, were added as autograd "
            "adds them. Training with pipeline.tied=fast adds them once per step, which is quicker and differs in the "
            "last bits; pipeline.tied=exact trains as was checked here"
        )


class _ToGradients(torch.optim.Optimizer):
    """Puts each parameter's gradient in its place, so that the pipeline's weights tell its gradients."""

    def __init__(self, parameters: Any):
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.copy_(
                        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()
                    )


def _to_gradients(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return _ToGradients(named)
