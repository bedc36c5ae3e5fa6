"""From a configuration to the things it names: Task, what train, simulate and compare have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from modelpar.capture.factory import construct
from modelpar.capture.objective import Batch, Objective
from modelpar.data.base import Data
from modelpar.errors import ConfigError, ModelparError
from modelpar.planner import UNMEASURED_LINKS, plan
from modelpar.planning.cluster import Link
from modelpar.planning.plan import Plan
from modelpar.planning.profile import Profile
from modelpar.run.pipeline import Pipeline
from modelpar.run.workers import Workers


@dataclass(frozen=True)
class Task:
    """What a configuration asks for: a model, its loss, its data, and how it trains."""

    config: DictConfig
    objective: Objective
    data: Data
    example: Batch
    """A training batch of full size."""
    optimizer: Callable[..., torch.optim.Optimizer]
    lr_schedule: Callable[..., Any]

    def plan(self, profile: str | Profile | None = None, workers: Callable[[], Workers] | None = None) -> Plan:
        """Decides how to split and schedule it.

        A profile of the same model and micro-batches saves measuring again. `workers` starts ranks to measure on, and
        is called only where that has to be.
        """
        pipeline, transport = self.config.pipeline, self.config.transport
        return plan(
            self.objective,
            self.example,
            num_ranks=pipeline.num_ranks,
            num_microbatches=pipeline.num_microbatches,
            partitioner=make(self.config.partition, "partition"),
            schedule=make(self.config.schedule, "schedule"),
            num_threads=pipeline.num_threads,
            devices=pipeline.devices,
            link=self._link(),
            profile=profile or pipeline.profile,
            tied=pipeline.tied,
            optimizer=self.optimizer,
            max_norm=self.config.training.max_norm,
            transport=transport.kind,
            shared_memory=transport.shared_memory,
            cuda_ipc=transport.cuda_ipc,
            workers=workers,
        )

    def _link(self) -> Link | None:
        """Returns the link that the configuration gives, None where it leaves both numbers to be measured."""
        transport = self.config.transport
        if transport.latency is None and transport.bandwidth is None:
            return None
        usual = UNMEASURED_LINKS.get(transport.kind, Link())
        latency = usual.latency if transport.latency is None else transport.latency
        return Link(latency, usual.bandwidth if transport.bandwidth is None else transport.bandwidth)

    def workers(self, num_ranks: int) -> Workers:
        """Returns workers as the configuration wants them, not yet started."""
        transport = self.config.transport
        return Workers(
            num_ranks,
            transport=transport.kind,
            port=transport.port,
            heartbeat_timeout=transport.heartbeat_timeout,
            step_timeout=transport.step_timeout,
            shared_memory=transport.shared_memory,
            cuda_ipc=transport.cuda_ipc,
        )

    def pipeline(self, plan: Plan, workers: Workers | None = None) -> Pipeline:
        """Returns the pipeline that trains as a plan says, not yet loaded. Raises ConfigError where it cannot train."""
        if plan.schedule.kind != "train":
            raise ConfigError("the schedule has no backward; expected one that trains, such as schedule=1f1b")
        return Pipeline(
            self.objective,
            plan,
            workers=workers,
            optimizer=self.optimizer,
            lr_schedule=self.lr_schedule,
            max_norm=self.config.training.max_norm,
            seed=self.config.training.seed,
        )


_LEAST = {"steps": 1, "batch_size": 1, "seed": 0, "eval_every": 0, "eval_samples": 1, "trace_every": 0}


def task_of(config: DictConfig) -> Task:
    """Builds what a configuration names. Raises ConfigError for anything that cannot be used; starts no process."""
    training = config.training
    for name, least in _LEAST.items():
        if training[name] < least:
            raise ConfigError(f"training.{name} is {training[name]}; expected at least {least}")
    torch.manual_seed(training.seed)
    objective, example = _objective(config)
    from_file = "example" in config.data and "factory" in config.model
    data: Data = make(config.data, "data", **({"example": example} if from_file else {}))
    return Task(
        config=config,
        objective=objective,
        data=data,
        example=next(data.batches(training.batch_size, training.seed)),
        optimizer=make(config.optimizer, "optimizer"),
        lr_schedule=make(config.lr_schedule, "lr_schedule"),
    )


def _objective(config: DictConfig) -> tuple[Objective, Any]:
    """Returns the model with its loss, and the example batch that comes with it."""
    init, weights = config.pipeline.init, config.pipeline.weights
    if init is None and weights is None:
        model, example, loss = make(config.model, "model")
        return Objective(model, loss), example

    def factory() -> nn.Module:
        found: nn.Module = make(config.model, "model")[0]
        return found

    _, example, loss = construct(lambda: make(config.model, "model"), config.training.seed)
    return Objective(factory, loss, init=init, weights=weights), example


def make(config: DictConfig, what: str, **arguments: Any) -> Any:
    """Calls a config's `_target_`; its own errors pass, all others become a ConfigError that names the group."""
    try:
        return instantiate(config, _convert_="all", **arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, ModelparError):
            raise error.__cause__ from None
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())
        raise ConfigError(f"{what} cannot be made: {type(cause).__name__}: {reason}") from error
