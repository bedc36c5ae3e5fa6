"""The end of a training step on one rank: Update.

::

    count → tied gradients → divide → norms → clip → optimizer → tied weights

The order of operations is that of `clip_grad_norm_` and `optimizer.step` on the unsplit model, so the bits are too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from modelpar.errors import ConfigError
from modelpar.planning.graph import ModelGraph
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


def check_settings(settings: Settings, graph: ModelGraph) -> None:
    """Refuses what cannot work on ranks that each hold a part of the parameters, before anything starts.

    Raises ConfigError. It takes one step of an optimizer that has nothing to do: some schedules find out only then that
    their arguments are impossible.
    """
    if settings.max_norm is not None and not settings.max_norm > 0:
        raise ConfigError(f"max_norm is {settings.max_norm}; expected a number above 0, or None")
    if settings.optimizer is None or not any(p.trainable for layer in graph.layers for p in layer.parameters):
        return
    try:
        tensors = [p for layer in graph.layers for p in layer.parameters if p.trainable]
        probes = [(p.name, torch.zeros([1] * len(p.shape), dtype=getattr(torch, p.dtype))) for p in tensors]
        made = settings.optimizer([(name, nn.Parameter(probe)) for name, probe in probes])
        schedule = settings.lr_schedule(made) if settings.lr_schedule else None
        if not isinstance(made, torch.optim.Optimizer):
            raise ConfigError(
                f"optimizer(named_parameters) returned {type(made).__name__}; expected a torch.optim.Optimizer"
            )
        if isinstance(made, torch.optim.LBFGS):
            raise ConfigError(
                "LBFGS mixes the parameters of all stages; expected an optimizer that treats each one by itself"
            )
        if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ConfigError("ReduceLROnPlateau needs a metric; expected a schedule that depends on the step only")
        made.step()
        if schedule is not None:
            schedule.step()
    except ConfigError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"the optimizer or its learning-rate schedule cannot be used: {error}") from error


def _make(factory: OptimizerFactory, named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer | None:
    """Returns the optimizer of one rank, or None where the factory chooses none of its parameters."""
    try:
        return factory(named)
    except ValueError as error:
        if "empty parameter list" in str(error):
            return None
        raise


def gradient_norms(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the 2-norm of each gradient as `clip_grad_norm_` computes it: on CUDA with other kernels."""
    found: dict[str, Tensor] = {}
    on_cuda: defaultdict[torch.dtype, list[str]] = defaultdict(list)
    for name, gradient in gradients.items():
        if gradient.is_cuda:
            on_cuda[gradient.dtype].append(name)
        else:
            found[name] = torch.linalg.vector_norm(gradient)
    for names in on_cuda.values():
        found |= zip(names, torch._foreach_norm([gradients[name] for name in names], 2.0), strict=True)
    return found


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
        self._optimizer = _make(settings.optimizer, named) if settings.optimizer and named else None
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
            nn.utils.clip_grads_with_norm_(list(gradients.values()), self._max_norm, norm)
        self._exchange.note_around("reduce", start)
        mark = self._exchange.mark()
        lr = None
        if self._optimizer:
            lr = float(self._optimizer.param_groups[0]["lr"])
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
