"""The end of a training step on one rank: Update.

::

    count → tied gradients → divide → norms → clip → optimizer → tied weights

The order of operations is that of `clip_grad_norm_` and `optimizer.step` on the unsplit model, so the bits are too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from modelpar.errors import ConfigError
from modelpar.planning.plan import Plan
from modelpar.planning.schedule import Action, Op, ValueKey, gives, needs
from modelpar.run.exchange import Exchange
from modelpar.run.stage_runner import StageRunner

OptimizerFactory = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
"""Makes an optimizer of (FQN, parameter) pairs; every class in torch.optim takes them."""


@dataclass(frozen=True)
class Settings:
    """How a pipeline trains, the same on every rank."""

    optimizer: OptimizerFactory | None = None
    lr_schedule: Callable[[torch.optim.Optimizer], Any] | None = None
    max_norm: float | None = None
    seed: int = 0
    first_group: frozenset[str] = frozenset()
    """FQNs of the parameters in the first group of the unsplit model's optimizer, whose learning rate is reported."""
    writes: bool = False
    """Whether the optimizer's function writes to the parameters, which then are not those of the user's model."""


def make_optimizer(
    factory: OptimizerFactory, named: list[tuple[str, nn.Parameter]], *, may_be_none: bool = True
) -> torch.optim.Optimizer | None:
    """Returns the optimizer of some parameters, or None where the factory chooses none of them."""
    try:
        return factory(named)
    except ValueError as error:
        if may_be_none and "empty parameter list" in str(error):
            return None
        raise


def gradient_norms(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the 2-norm of each gradient as `clip_grad_norm_` computes it: on CUDA with other kernels.

    Of a sparse one, of which it computes none, that of the numbers it has.
    """
    found: dict[str, Tensor] = {}
    on_cuda: defaultdict[torch.dtype, list[str]] = defaultdict(list)
    for name, gradient in gradients.items():
        if gradient.is_sparse:
            found[name] = torch.linalg.vector_norm(gradient.coalesce().values())
        elif gradient.is_cuda:
            on_cuda[gradient.dtype].append(name)
        else:
            found[name] = torch.linalg.vector_norm(gradient)
    for names in on_cuda.values():
        found |= zip(names, torch._foreach_norm([gradients[name] for name in names], 2.0), strict=True)
    return found


def refuse_sparse(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises ConfigError where gradients that are to be clipped are sparse, of which torch computes no norm."""
    for name, parameter in parameters.items():
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise cannot_clip(name)


def cannot_clip(name: str) -> ConfigError:
    """Returns what to say where the gradient of a parameter is sparse."""
    return ConfigError(
        f"max_norm clips no sparse gradients, as torch's clip_grad_norm_ does not, and that of {name} is sparse; "
        "expected max_norm=None (training.max_norm=null), or layers without sparse=True"
    )


def _first_group(
    optimizer: torch.optim.Optimizer | None, named: dict[str, nn.Parameter], first: frozenset[str]
) -> dict[str, Any]:
    """Returns the part of the unsplit optimizer's first group that a rank's has; empty where it has none."""
    if optimizer is None:
        return {}
    wanted = {id(parameter) for name, parameter in named.items() if name in first}
    groups: list[dict[str, Any]] = optimizer.param_groups
    return next((group for group in groups if not first or any(id(p) in wanted for p in group["params"])), {})


class Update:
    """Applies the gradients of a rank's stages, together with the other ranks."""

    def __init__(self, plan: Plan, settings: Settings, runners: dict[int, StageRunner], exchange: Exchange):
        self._graph = replace(plan.stage_graph, clips=settings.max_norm is not None)
        self._max_norm = settings.max_norm
        self._runners, self._exchange = runners, exchange
        self._order = plan.graph.parameters
        """The FQNs of all parameters in the order of `model.parameters()`."""
        self._owned = {stage: runner.program.owned_parameters() for stage, runner in runners.items()}
        named = [pair for owned in self._owned.values() for pair in owned.items()]
        self._optimizer = make_optimizer(settings.optimizer, named) if settings.optimizer and named else None
        self._reported = _first_group(self._optimizer, dict(named), settings.first_group)
        self._lr_schedule = settings.lr_schedule(self._optimizer) if settings.lr_schedule and self._optimizer else None

    def apply(self, count: float | None) -> dict[str, Any] | None:
        """Updates the weights and returns the gradients' norm (on stage 0's rank) and the learning rate used.

        On the rank of the last stage `count` is what the loss is a mean over, or None where the loss is not finite:
        then no rank updates anything, and each returns None.
        """
        start = perf_counter()
        self._exchange.doing = (Action(next(iter(self._runners)), Op.UPDATE), None)
        if not self._agree_on_count(count):
            return None
        self._add_tied_gradients()
        gradients = {n: p for owned in self._owned.values() for n, p in owned.items() if p.grad is not None}
        for parameter in gradients.values():
            parameter.grad.div_(self._count)
        norm = self._norm(gradient_norms({name: p.grad for name, p in gradients.items() if p.grad is not None}))
        if self._max_norm is not None and gradients:
            assert norm is not None
            refuse_sparse(gradients)
            nn.utils.clip_grads_with_norm_(list(gradients.values()), self._max_norm, norm)
        self._exchange.note_around("reduce", start)
        mark = self._exchange.mark()
        lr = None
        if self._optimizer:
            lr = self._reported.get("lr")
            lr = None if lr is None else float(lr)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        if self._lr_schedule:
            self._lr_schedule.step()
        self._exchange.computed("optimizer", mark)
        self._copy_tied_weights()
        return {"lr": lr, "grad_norm": float(norm) if norm is not None and 0 in self._runners else None}

    def state_bytes(self) -> int:
        """Returns the bytes of the optimizer's own tensors."""
        states = self._optimizer.state.values() if self._optimizer else ()
        tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _agree_on_count(self, count: float | None) -> bool:
        """Hands on the last stage's count; returns whether there is one."""
        for stage in self._runners:
            self._give(stage, "count", lambda _: count)
        for stage in self._runners:
            for found in self._take(stage, "count").values():
                count = found
        self._count = count
        return count is not None

    def _add_tied_gradients(self) -> None:
        """Sends the gradients of tied tensors from the latest use to the owner, each stage adding its own."""
        for stage in sorted(self._runners, reverse=True):
            runner = self._runners[stage]
            for key, grads in self._take(stage, "tied_grad").items():
                runner.add_grad(key.name, grads)
            self._give(stage, "tied_grad", runner.take_grad)

    def _norm(self, norms: dict[str, Tensor]) -> Tensor | None:
        """Returns the 2-norm of all gradients: always on the rank of stage 0, on others where they clip."""
        total = None
        for stage in self._runners:
            names = [name for name in self._owned[stage] if name in norms]
            stacked = torch.stack([norms[name] for name in names]) if names else None  # one tensor, not one each
            self._give(stage, "norms", lambda _, own=(names, stacked): own)
        if 0 in self._runners:
            for names, stacked in self._take(0, "norms").values():
                norms |= dict(zip(names, stacked if names else (), strict=True))
            ordered = [norms[name] for name in self._order if name in norms]
            total = torch.linalg.vector_norm(torch.stack(ordered)) if ordered else torch.zeros(())
            self._give(0, "total_norm", lambda _: total)
        for stage in self._runners:
            for found in self._take(stage, "total_norm").values():
                total = found
        return total

    def _copy_tied_weights(self) -> None:
        """Sends owners' updated weights to the stages that hold copies."""
        for stage, runner in self._runners.items():
            self._give(stage, "weight", lambda name, runner=runner: runner.parameter(name).detach())
        for stage, runner in self._runners.items():
            for key, weight in self._take(stage, "weight").items():
                runner.parameter(key.name).detach().copy_(weight)

    def _take(self, stage: int, kind: str) -> dict[ValueKey, Any]:
        action = Action(stage, Op.UPDATE)
        return {key: self._exchange.take(key, action) for key in needs(self._graph, action) if key.kind == kind}

    def _give(self, stage: int, kind: str, value: Callable[[str], Any]) -> None:
        for key in gives(self._graph, Action(stage, Op.UPDATE)):
            if key.kind == kind:
                self._exchange.give(key, value(key.name))
