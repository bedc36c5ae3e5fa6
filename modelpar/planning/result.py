"""What one training step gave: StepResult."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from modelpar.planning.timeline import Timeline


@dataclass(frozen=True)
class StepResult:
    """The numbers of one training step, and its measured timeline."""

    step: int
    """Counts training steps from 0."""
    loss: float
    """Sum of the micro-batches' totals over the sum of their counts."""
    count: float
    """What the loss is a mean over: samples, unless the loss function counted otherwise."""
    grad_norm: float
    """2-norm of all gradients before clipping."""
    lr: float
    """Learning rate of the first parameter group in this step."""
    timeline: Timeline
    metrics: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: tuple[int, ...] = ()
    """Per rank, the most memory its stages have used so far, above what the process used before it built them."""
