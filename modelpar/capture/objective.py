"""What is trained: Objective, a model and its loss; and how a batch meets them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modelpar.capture.deferred import deferred_in
from modelpar.capture.factory import construct
from modelpar.capture.microbatch import batch_size, microbatch_sizes, split_batch
from modelpar.capture.recipe import Drawn
from modelpar.capture.weights import read_from
from modelpar.errors import CaptureError, ConfigError

__all__ = ["Batch", "LossResult", "Objective", "batch_size", "microbatch_sizes", "split_batch"]

Batch = tuple[Any, Any]
"""(inputs, targets): inputs a tensor, a tuple (positional arguments) or a dict (keywords); targets any pytree."""


class LossResult(NamedTuple):
    """What a loss function may return instead of a scalar mean."""

    total: Tensor
    """Sum over what was counted; a scalar."""
    count: float
    """What the total sums over; 0 leaves the micro-batch out."""
    metrics: Mapping[str, float] = {}
    """More numbers to report, each a mean over `count`."""


@dataclass(frozen=True)
class Objective:
    """A model and its loss.

    `model` is a module, or a function without arguments that makes one. `loss(output, targets)` returns a scalar mean
    over samples, or a LossResult. With loss None the model returns its own loss: as attribute or key `loss`, as first
    item, or as its whole output; targets are then None.
    """

    model: nn.Module | Callable[[], nn.Module]
    loss: Callable[[Any, Any], Tensor | LossResult] | None = None
    batch_dim: int = field(default=0, kw_only=True)
    """The dimension of tensors in inputs and targets that counts samples."""
    shared: Sequence[str | int] = field(default=(), kw_only=True)
    """Inputs and targets that every micro-batch gets whole: a dict's key, an argument's place (0 is the first), or a
    full name such as "inputs.1.mask" or "targets.weights"."""
    cut: Callable[[Any, Any, int], Any] | None = field(default=None, kw_only=True)
    """`cut(inputs, targets, num_microbatches)` returns the micro-batches of a batch that is cut in a way of its own, at
    most so many: a list of (inputs, targets, number of samples). `predict` gives it None as targets."""
    join: Callable[[list[Any]], Any] | None = field(default=None, kw_only=True)
    """`join(outputs)` returns what `predict` does, from the outputs of the micro-batches."""
    init: str | None = field(default=None, kw_only=True)
    """"meta": nobody holds the whole model; parameters are made where they are needed, see `capture/factory.py`."""
    weights: str | Path | None = field(default=None, kw_only=True)
    """A safetensors file, or a folder of some, in which the parameters and buffers are found; implies init="meta"."""

    def __post_init__(self) -> None:
        """Raises ConfigError for options that do not fit the model."""
        one = isinstance(self.shared, (str, int))
        object.__setattr__(self, "shared", (self.shared,) if one else tuple(self.shared))  # type: ignore[arg-type]
        if self.init not in (None, "meta"):
            raise ConfigError(f"init is {self.init!r}; expected None or 'meta'")
        if isinstance(self.model, nn.Module) and (self.init or self.weights):
            option = "weights" if self.weights else "init='meta'"
            raise ConfigError(
                f"{option} is given with a {type(self.model).__name__}, which is there as a whole; expected a function "
                "that makes the model"
            )

    def build(self, seed: int = 0) -> nn.Module:
        """Returns the model; a factory is called with torch's generators seeded, and they are restored afterwards.

        With init="meta" or `weights` its parameters are on the meta device. Raises ConfigError, by FQN, for a tensor
        that the weights lack or have in another shape, and CaptureError for one that nothing initialises.
        """
        if isinstance(self.model, nn.Module):
            return self.model
        if self.init or self.weights:
            return self._deferred(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.model()
        if not isinstance(model, nn.Module):
            raise CaptureError(f"the model factory returned {type(model).__name__}; expected a torch.nn.Module")
        return model

    def _deferred(self, seed: int) -> nn.Module:
        assert not isinstance(self.model, nn.Module)
        model = construct(self.model, seed)
        if not isinstance(model, nn.Module):
            raise CaptureError(f"the model factory returned {type(model).__name__}; expected a torch.nn.Module")
        if self.weights is not None:
            read_from(model, self.weights)
        for name, (_, recipe) in deferred_in(model).items():
            if isinstance(recipe, Drawn) and not recipe.is_written:
                raise CaptureError(
                    f"{name} is never initialised; expected its module to do so, in reset_parameters or __init__, or "
                    "weights="
                )
        return model


def call(module: Callable[..., Any], inputs: Any) -> Any:
    """Calls a module with a batch's inputs: a tuple as positional arguments, a dict as keywords."""
    if isinstance(inputs, dict):
        return module(**inputs)
    return module(*inputs) if type(inputs) is tuple else module(inputs)


def run(model: nn.Module, inputs: Any) -> Any:
    """Runs a model on a batch's inputs; an nn.Sequential's first layer takes them as `call` says."""
    if type(model).forward is not nn.Sequential.forward or not isinstance(inputs, (tuple, dict)):
        return call(model, inputs)
    first, *others = model._modules.values()
    value = call(first, inputs)  # type: ignore[arg-type]
    for layer in others:
        value = layer(value)  # type: ignore[misc]
    return value


@contextmanager
def in_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Puts a model into eval mode unless it is to train, and back, as `eval()` and `train()` do.

    Modules may do more there than setting a flag, such as dropping what they computed from weights. Afterwards every
    flag is as it was: a user may have put some modules into eval mode.
    """
    before = [(module, module.training) for module in model.modules()]
    if mode != "train" and not _is_done(model, "eval"):
        _switch(model, False)
    try:
        yield
    finally:
        if mode != "train":
            _switch_back(model, dict(before))
        for module, training in before:
            module.training = training


def _switch(module: nn.Module, training: bool) -> None:
    """Does what `module.train(training)` does, and by hand where a module has a method `train` for something else."""
    if _is_done(module, "train", training):
        return
    module.training = training
    for child in module.children():
        _switch(child, training)


def _is_done(module: nn.Module, name: str, *mode: bool) -> bool:
    """Calls a module's own `train(mode)` or `eval()` where it has one; returns whether it did."""
    method = getattr(type(module), name, None)
    if method is getattr(nn.Module, name) or not callable(method):
        return False
    try:
        first, *_ = [*inspect.signature(getattr(module, name)).parameters.values(), None]
        if first is None or first.name == "mode" or isinstance(first.default, bool):
            getattr(module, name)(*mode)
            return True
    except Exception:  # its mode is that of the flags, then
        return False
    return False


def _switch_back(module: nn.Module, before: Mapping[nn.Module, bool]) -> None:
    """Puts the outermost modules that were in training mode back into it."""
    if before.get(module, True):
        _switch(module, True)
    else:
        for child in module.children():
            _switch_back(child, before)


def loss_of(loss: Callable[[Any, Any], Any] | None, output: Any, targets: Any, num_samples: int) -> LossResult:
    """Returns the loss of one micro-batch as a sum and a count; a plain scalar mean counts samples.

    A sum is in float32 at least, whatever the loss is in, so that sums over micro-batches are right to the last digits.
    Raises CaptureError where the loss is not a scalar tensor.
    """
    found = loss(output, targets) if loss is not None else own_loss(output)
    if isinstance(found, LossResult):
        count = found.count.item() if isinstance(found.count, Tensor) else found.count
        metrics = {name: float(value) for name, value in found.metrics.items()}
        found = found._replace(total=_summable(found.total), count=count, metrics=metrics)
        if not isinstance(found.total, Tensor) or found.total.dim():
            raise CaptureError(f"LossResult.total is {_describe(found.total)}; expected a scalar tensor")
        return found
    if not isinstance(found, Tensor) or found.dim():
        raise CaptureError(f"the loss is {_describe(found)}; expected a scalar tensor, the mean over samples")
    return LossResult(_summable(found) * num_samples, num_samples)


def own_loss(output: Any) -> Any:
    """Returns the loss that a model returned: as attribute or key `loss`, as first item, or as its whole output."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "loss" in output:
        return output["loss"]
    if hasattr(output, "loss"):
        return output.loss
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _summable(value: Any) -> Any:
    """Returns a loss of lower precision in float32; its gradient is the same to the bit."""
    low = isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < 4
    return value.float() if low else value


def _describe(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
