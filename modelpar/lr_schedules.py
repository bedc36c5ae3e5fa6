"""Learning-rate schedules that torch.optim has no single class for."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from modelpar.errors import ConfigError


def warmup_cosine(optimizer: Optimizer, *, steps: int, warmup: float = 0.05, final: float = 0.0) -> LambdaLR:
    """Returns a schedule that rises linearly over the first steps and falls along a cosine over all others.

    `warmup` is a share of the steps, `final` the share of the learning rate that the last step has. Raises ConfigError
    where they cannot be.
    """
    if not 0 <= warmup <= 1 or final < 0:
        raise ConfigError(f"warmup is {warmup} and final {final}; expected a share from 0 to 1, and 0 or more")
    rising = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        progress = min(1.0, (step - rising + 1) / max(1, steps - rising))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
