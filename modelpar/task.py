"""From a configuration to the things it names: Task, what train, simulate and compare have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from modelpar.capture.factory import construct
from modelpar.capture.objective import Batch, Objective
from modelpar.config import choice, cluster_of, make
from modelpar.data.base import Data
from modelpar.errors import ConfigError
from modelpar.planner import UNMEASURED_LINKS, place, plan
from modelpar.planning.cluster import Cluster
from modelpar.planning.doing import Doing, silent
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

    def plan(
        self,
        profile: str | Profile | None = None,
        workers: Callable[[], Workers] | None = None,
        doing: Doing = silent,
    ) -> Plan:
        """Decides how to split and schedule it.

        A profile of the same model and micro-batches saves measuring again. `workers` starts ranks to measure on, and
        is called only where that has to be. `doing` is told what goes on.
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
            cluster=self._cluster(),
            profile=profile or pipeline.profile,
            tied=pipeline.tied,
            optimizer=self.optimizer,
            max_norm=self.config.training.max_norm,
            transport=transport.kind,
            shared_memory=transport.shared_memory,
            cuda_ipc=transport.cuda_ipc,
            workers=workers,
            doing=doing,
            **{name: tuple(map(str, pipeline[name])) for name in ("leaf", "split_before", "keep_together")},
        )

    def _cluster(self) -> Cluster:
        """Returns the cluster that the configuration describes, its ranks on devices of this machine."""
        pipeline, transport = self.config.pipeline, self.config.transport
        usual = UNMEASURED_LINKS.get(transport.kind)
        return cluster_of(self.config, place(pipeline.num_ranks, pipeline.devices), usual)

    def workers(self, num_ranks: int, logs: Callable[[], Path] | None = None, doing: Doing = silent) -> Workers:
        """Returns workers as the configuration wants them, not yet started; `logs` and `doing` as for `Workers`."""
        transport = self.config.transport
        return Workers(
            num_ranks,
            transport=transport.kind,
            port=transport.port,
            heartbeat_timeout=transport.heartbeat_timeout,
            step_timeout=transport.step_timeout,
            shared_memory=transport.shared_memory,
            cuda_ipc=transport.cuda_ipc,
            logs=logs,
            doing=doing,
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
            check=self.config.pipeline.check,
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
    of_example = "example" in config.data and not {"factory", "config"}.isdisjoint(config.model)
    given = {"example": example, "shared": objective.shared} if of_example else {}
    data: Data = make(config.data, "data", **{name: value for name, value in given.items() if name in config.data})
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
    init, weights, shared = config.pipeline.init, config.pipeline.weights, tuple(config.pipeline.shared)
    if init is None and weights is None:
        model, example, loss = make(config.model, "model")
        return Objective(model, loss, shared=shared), example

    def factory() -> nn.Module:
        found: nn.Module = make(config.model, "model")[0]
        return found

    _, example, loss = construct(lambda: make(config.model, "model"), config.training.seed)
    return Objective(factory, loss, init=init, weights=weights, shared=shared), example


def model_name(config: DictConfig) -> str:
    """Returns a short name of the model: of its file, of its config's class or folder, or of the choice."""
    if "factory" in config.model:
        source = Path(config.model.factory.rpartition(":")[0])
        return source.stem if source.suffix == ".py" else source.name.rpartition(".")[2]
    return Path(config.model.config).name if "config" in config.model else choice(config, "model")


def run_name(config: DictConfig) -> str:
    """Returns what a run's folder is called by default, after the time."""
    return f"{model_name(config)}-{choice(config, 'schedule')}"
