"""What the contenders train: plain functions, so that a task travels to another process by its name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modelpar import Objective, plan, schedules
from modelpar.calibration import Sink
from modelpar.models import gpt as gpt_model
from modelpar.models import mlp as mlp_model
from modelpar.planning import partitioners
from modelpar.planning.plan import Plan

SCHEDULES = {"gpipe": schedules.gpipe, "1f1b": schedules.one_f_one_b}


class Built(NamedTuple):
    """A model with everything that a training step needs."""

    model: nn.Sequential
    batch: tuple[Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[Any], torch.optim.Optimizer]


Task = Callable[[], Built]
"""Makes the same model and batch in whichever process calls it."""


def gpt() -> Built:
    """Returns the default GPT, 16 × 64 tokens; its weights are not tied, which torch's pipelines cannot train."""
    with _seeded():
        model, _, loss = gpt_model.build(tied=False)
        tokens = torch.randint(256, (16, 65))
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return Built(_sequential(model), batch, loss, _adamw)


def mlp() -> Built:
    """Returns an MLP of width 1024 with 6.6 million parameters and 256 samples."""
    with _seeded():
        model, _, loss = mlp_model.build(width=1024, depth=6)
        batch = torch.randn(256, 256), torch.randint(10, (256,))
    return Built(_sequential(model), batch, loss, _adamw)


class SeparableBlock(nn.Module):
    """A depthwise and a pointwise convolution beside a shortcut: few operations per byte that it hands on."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.pointwise = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, channels, height, width) to the same shape."""
        return x + torch.relu(self.pointwise(self.depthwise(x)))


def convnet(num_samples: int) -> Built:
    """Returns a convnet that hands on 8.4 MB per sample (32 × 256 × 256 floats) at every cut."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with _seeded():
        layers["stem"] = nn.Conv2d(3, 32, 3, padding=1)
        for i in range(3):
            layers[f"b{i}"] = SeparableBlock(32)
        layers["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
        batch = torch.randn(num_samples, 3, 256, 256), torch.randint(10, (num_samples,))
    return Built(nn.Sequential(layers), batch, nn.functional.cross_entropy, _adamw)


def near_empty() -> Built:
    """Returns four layers with almost nothing to compute, and 32 samples: what is left is overhead."""
    with _seeded():
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
        batch = torch.randn(32, 4), torch.randn(32, 4)
    return Built(model, batch, nn.functional.mse_loss, partial(torch.optim.SGD, lr=1e-3))


MODELS: dict[str, Callable[[int], Task]] = {
    "gpt": lambda _: gpt,
    "mlp": lambda _: mlp,
    "convnet": lambda num_microbatches: partial(convnet, num_microbatches),
}
"""The models that train: a task by number of micro-batches. The convnet's have one sample, the others' batches stay."""


class Source(nn.Module):
    """Makes a tensor of any size of one number, so that nothing large has to arrive first."""

    def __init__(self, numel: int):
        super().__init__()
        self.numel = numel
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, 1) to (batch, numel) in new memory."""
        return (x * self.weight).expand(-1, self.numel).clone()


def hand_off(num_bytes: int) -> Built:
    """Returns two layers with one tensor of that many bytes between them, and one sample."""
    model = nn.Sequential(Source(num_bytes // 4), Sink())
    batch = torch.ones(1, 1), torch.zeros(1, 1)
    return Built(model, batch, nn.functional.mse_loss, partial(torch.optim.SGD, lr=1e-3))


def plans(
    task: Task,
    num_ranks: int,
    num_microbatches: int,
    *,
    partitioner: Any = partitioners.optimal,
    profile: Any = "measured",
) -> dict[str, Plan]:
    """Returns one plan per schedule, of one profile and so with the same stages; one thread per rank."""
    built = task()
    objective = Objective(built.model, built.loss)
    found: dict[str, Plan] = {}
    for name, schedule in SCHEDULES.items():
        found[name] = plan(
            objective,
            built.batch,
            num_ranks=num_ranks,
            num_microbatches=num_microbatches,
            partitioner=partitioner,
            schedule=schedule,
            num_threads=1,
            devices=["cpu"] * num_ranks,
            profile=profile,
            optimizer=built.optimizer,
        )
        profile = found[name].profile
    return found


def cut_bytes(plan: Plan) -> float:
    """Returns the fewest bytes that cross a cut of the plan per micro-batch; 0 with a single stage."""
    inner = plan.partition.bounds[1:-1]
    return min((plan.graph.crossing_bytes(cut) for cut in inner), default=0.0) * plan.profile.microbatch_size


_adamw = partial(torch.optim.AdamW, lr=1e-4)


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _sequential(model: nn.Module) -> nn.Sequential:
    assert isinstance(model, nn.Sequential)
    return model
