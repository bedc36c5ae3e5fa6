"""Whether micro-batches together give what the batch gives: `compare`, before anything is trained.

In evaluation mode, without gradients, the model runs on two micro-batches apart and on both as one. Where outputs or
losses then differ, training on micro-batches is another training than on batches, split or not: the loss is no mean
over samples, the model compares samples with each other, or a part of the batch was cut that all samples share.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from modelpar.capture import trees
from modelpar.capture.capture import untouched
from modelpar.capture.compiled import uncompiled
from modelpar.capture.deferred import deferred_in
from modelpar.capture.joining import counting_names, joined
from modelpar.capture.microbatch import Cutting, Microbatch, short_name
from modelpar.capture.objective import Batch, LossResult, Objective, in_mode, loss_of, run
from modelpar.capture.parts import part_of
from modelpar.capture.watch import generator_states, has_drawn
from modelpar.errors import ConfigError, describe
from modelpar.planning.reading import Reading

_TOLERANCE = 1e-4
"""By how much outputs may differ, as a share of their size, where all is computed in float32."""
_LOSS_TOLERANCE = 1e-5
"""By how much losses may, which are means over many numbers."""
_STEPS = 4
"""By how many steps of the coarsest numbers that are computed with results may differ, as a share of their size."""
_SMALL = 0.1
"""Losses below this are compared by their difference: they may be the difference of larger numbers."""
_IGNORED = -100
"""The class that PyTorch's losses leave out."""


class Compared(NamedTuple):
    """What `compare` found: lines for people."""

    notes: tuple[str, ...] = ()
    """What cutting changes, or why that is not known."""
    known: tuple[str, ...] = ()
    """What cutting changes as everybody knows."""
    passed: str = ""


class _Seen(NamedTuple):
    """What the model gave for a micro-batch."""

    output: Any
    loss: LossResult
    size: int
    draws: bool


class _Difference(NamedTuple):
    """By how much results of parts differ from those of the whole, as a share of their size."""

    output: float
    loss: float
    apart: float
    together: float
    seen: list[_Seen]


def compare(objective: Objective, cutting: Cutting, model: nn.Module, batch: Batch, num_microbatches: int) -> Compared:
    """Returns what cutting batches like this one changes. Leaves parameters, buffers and generators as they were.

    Raises ConfigError where a part of the batch was cut, or a list taken apart, and the model shows that to be wrong.
    """
    if len(cutting.cut(batch, num_microbatches)) < 2:
        return Compared()
    known = tuple(_batch_norms(model))
    if deferred_in(model):
        reason = "no process holds the whole model"
        return Compared((f"whether micro-batches give what batches give was not checked: {reason}",), known)
    with _evaluated(model) as restore, _Coarsest() as coarsest:
        look = partial(_look, objective, model, restore)
        try:
            found = _difference(cutting, batch, num_microbatches, look)
        except ConfigError:
            raise
        except Exception as error:
            _refuse_misread(cutting, batch, num_microbatches, look, coarsest)
            _refuse_cut(cutting, batch, num_microbatches, look, error)
            return Compared((), known, f"micro-batches were not compared with a batch: {describe(error)}")
        if found is None:
            return Compared(known=known)
        if any(seen.draws for seen in found.seen):
            reason = "the model draws random numbers in evaluation"
            return Compared((f"whether micro-batches give what batches give was not checked: {reason}",), known)
        if _same(found, coarsest):
            sizes = " and ".join(str(seen.size) for seen in found.seen[:2])
            return Compared((), known, f"micro-batches of {sizes} samples give apart what they give together")
        _refuse_misread(cutting, batch, num_microbatches, look, coarsest)
        return Compared((_note(objective, batch, found, coarsest),), known)


def _difference(
    cutting: Cutting, batch: Batch, num_microbatches: int, look: Callable[[Microbatch], _Seen]
) -> _Difference | None:
    """Runs micro-batches apart and together."""
    parts, together = _chosen(cutting, batch, num_microbatches)
    if together.size != sum(microbatch.size for microbatch in parts):
        return None
    seen = [look(microbatch) for microbatch in parts]
    whole = look(together)
    count = sum(part.loss.count for part in seen)
    apart = sum(float(part.loss.total) for part in seen) / count if count else math.nan
    of_whole = float(whole.loss.total) / whole.loss.count if whole.loss.count else math.nan
    names = counting_names(seen[0].output, seen[0].size, whole.output, whole.size, cutting.dim)
    outputs = [_output_difference(name, seen, whole, cutting.dim) for name in sorted(names)]
    loss = abs(apart - of_whole) / max(abs(of_whole), _SMALL)
    if not math.isfinite(of_whole):
        loss = 0.0
    return _Difference(max(outputs, default=0.0), math.inf if loss != loss else loss, apart, of_whole, [*seen, whole])


def _chosen(cutting: Cutting, batch: Batch, num_microbatches: int) -> tuple[list[Microbatch], Microbatch]:
    """Returns micro-batches and one of their samples: the two with the fewest and the most labels that are left out,
    else the first two. Where the user's own function cuts, it is all of them and the batch."""
    microbatches = cutting.cut(batch, num_microbatches)
    if cutting.own is not None:
        return microbatches, cutting.cut(batch, 1)[0]
    ignored = [sum(map(_num_ignored, trees.tensors_of(microbatch[:2]))) for microbatch in microbatches]
    few, many = ignored.index(min(ignored)), ignored.index(max(ignored))
    pair = sorted((few, many)) if few != many else [0, 1]
    starts = [0, *itertools.accumulate(microbatch.size for microbatch in microbatches)]
    indices = [index for i in pair for index in range(starts[i], starts[i + 1])]
    return [microbatches[i] for i in pair], Microbatch(*cutting.take(batch, indices), len(indices))


def _output_difference(name: str, parts: list[_Seen], whole: _Seen, dim: int) -> float:
    ours = trees.tensors_of(joined([part_of(seen.output, name) for seen in parts], dim))
    theirs = trees.tensors_of(part_of(whole.output, name))
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
        return math.inf
    return max(map(_distance, ours, theirs), default=0.0)


def _distance(a: Tensor, b: Tensor) -> float:
    """Returns the root mean square of the difference, as a share of that of the second."""
    if a.layout is not torch.strided or b.layout is not torch.strided or a.is_quantized:
        return 0.0
    a, b = (t.detach().to(torch.complex128 if t.is_complex() else torch.float64) for t in (a, b))
    finite = torch.isfinite(b)
    a, b = a[finite], b[finite]
    if not b.numel():
        return 0.0
    found = float((a - b).abs().square().mean().sqrt() / b.abs().square().mean().sqrt().clamp(min=1e-12))
    return math.inf if found != found else found


def _same(found: _Difference, coarsest: _Coarsest) -> bool:
    return found.output <= max(_TOLERANCE, coarsest.step) and found.loss <= max(_LOSS_TOLERANCE, coarsest.step)


def _refuse_misread(
    cutting: Cutting, batch: Batch, num_microbatches: int, look: Callable[[Microbatch], _Seen], coarsest: _Coarsest
) -> None:
    """Raises ConfigError where micro-batches give what the batch gives once another reading of a part is taken."""
    for name in cutting.known.samples:
        others = tuple(other for other in cutting.known.samples if other != name)
        if not any(other.startswith("inputs") for other in others):
            continue
        other = replace(cutting, known=Reading(others, (*cutting.known.shared, name)))
        try:
            found = _difference(other, batch, num_microbatches, look)
        except Exception:
            continue
        if found is not None and _same(found, coarsest):
            size = cutting.size(*batch)
            raise ConfigError(
                f"{name} is as long as the batch ({size}) and was cut with it, and micro-batches then do not give what "
                f"the batch gives; they do where each gets all of {name}: expected shared=[{short_name(name)!r}] "
                f"(Objective(…, shared=…) or pipeline.shared=…)"
            )


def _refuse_cut(
    cutting: Cutting, batch: Batch, num_microbatches: int, look: Callable[[Microbatch], _Seen], error: Exception
) -> None:
    """Raises ConfigError where the model runs on the whole batch and not on a micro-batch of it."""
    try:
        look(cutting.cut(batch, num_microbatches)[0])
        return
    except Exception as own:
        error = own
    try:
        look(cutting.cut(batch, 1)[0])
    except Exception:
        return  # the batch itself does not fit the model, and capture says so
    samples, shared = (", ".join(names) or "none" for names in (cutting.known.samples, cutting.known.shared))
    raise ConfigError(
        f"the model runs on the batch and not on the first micro-batch of it ({describe(error)}); read as one entry "
        f"per sample: {samples}; as shared: {shared}. Expected that, or shared=[…] with what else is shared, "
        "a list for what is one per sample and a tuple for what is not, or cut= for batches that are cut in another way"
    ) from error


def _note(objective: Objective, batch: Batch, found: _Difference, coarsest: _Coarsest) -> str:
    """Says what cutting changes, the likely cause, and what to write."""
    if found.output > max(_TOLERANCE, coarsest.step):
        return (
            "cutting batches changes the output: two micro-batches apart give another than together, by "
            f"{found.output:.2g} of its size. The model compares samples with each other, or pads to the longest of "
            "them, which it then does within each micro-batch; fewer and larger micro-batches change that least. An "
            "input that all samples share is "
            "named by shared=[…]"
        )
    told = (
        f"cutting batches changes the loss: two micro-batches apart give {found.apart:.6g}, together "
        f"{found.together:.6g}"
    )
    parts = found.seen[:-1]
    if all(seen.loss.count == seen.size for seen in found.seen):
        means = [float(seen.loss.total) / seen.size for seen in parts]
        if abs(sum(means) - found.together) <= max(_TOLERANCE, coarsest.step) * abs(found.together):
            return (
                f"{told}, because the loss is a sum over samples where a mean is expected; return "
                "LossResult(total=sum, count=number of samples)"
            )
        if any(map(_num_ignored, trees.tensors_of(batch))):
            why = f"labels of {_IGNORED} are left out, so that the loss is a mean over the others and not over samples"
            return f"{told}, because {why}; {_advice(objective)}"
    return (
        f"{told}: the loss compares samples with each other, or it is a mean over something else than samples, such as "
        f"tokens that are not ignored or weighted classes. For the latter, {_advice(objective)}"
    )


def _advice(objective: Objective) -> str:
    result = "returns LossResult(total=sum, count=number of what it is a mean over)"
    if objective.loss is None:
        return f"give the labels as targets instead of inputs, and a loss on the model's output that {result}"
    return f"give a loss that {result}"


def _num_ignored(tensor: Tensor) -> int:
    whole = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
    return int((tensor == _IGNORED).sum()) if whole and tensor.layout is torch.strided else 0


def _look(objective: Objective, model: nn.Module, restore: Callable[[], None], microbatch: Microbatch) -> _Seen:
    """Runs model and loss on a micro-batch."""
    restore()
    before = generator_states()
    inputs, targets = (trees.map_tensors(lambda t: t.detach().clone(), part) for part in microbatch[:2])
    output = run(model, inputs)
    loss = loss_of(objective.loss, output, targets, microbatch.size)
    return _Seen(output, loss, microbatch.size, has_drawn(before))


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Puts the model into evaluation mode, and back; yields what restores buffers and generators meanwhile."""
    with (
        untouched(model) as before,
        uncompiled(model),
        in_mode(model, "evaluate"),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        before.keep_attributes()  # the mode
        yield before.restore


def _batch_norms(model: nn.Module) -> Iterator[str]:
    kind = nn.modules.batchnorm._BatchNorm
    names = [name for name, module in model.named_modules() if isinstance(module, kind) and module.training]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield (
            f"batch normalisation ({names[0]}{more}) sees one micro-batch at a time, as it does with gradient "
            "accumulation; where that matters, use GroupNorm, or fewer and larger micro-batches"
        )


class _Coarsest(TorchDispatchMode):
    """Notes how coarse the numbers are that are computed with."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in trees.tensors_of(output):
            if tensor.is_floating_point():
                self.step = max(self.step, _STEPS * torch.finfo(tensor.dtype).eps)
        return output
