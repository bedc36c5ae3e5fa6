"""Whether a recording holds for a micro-batch: its guards, evaluated on what depends on the batch only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from modelpar.capture.cut import cut_guard, skeleton
from modelpar.capture.objective import Batch
from modelpar.capture.parts import leaf_names
from modelpar.capture.recording import Guard, Recording
from modelpar.capture.replay import Replay


class Watched(NamedTuple):
    """A guard, and what gives its arguments."""

    guard: Guard
    replay: Replay


def watch(recording: Recording, model: nn.Module) -> list[Watched]:
    """Returns a recording's guards, ready to be evaluated; of the model they keep only the modules that they call."""
    found = []
    for guard in recording.guards:
        routine = cut_guard(recording, guard)
        modules = [step.node.name for step in routine.steps if step.node.is_module]
        found.append(Watched(guard, Replay(routine, skeleton(model, modules, []))))
    return found


def hold(guards: Sequence[Watched], microbatch: Batch) -> bool:
    """Tells whether guards come out on a micro-batch as they did when they were recorded."""
    if not guards:
        return True
    values = leaf_names(*microbatch)
    with torch.no_grad():
        for guard, replay in guards:
            args, kwargs = replay(values)["output"]
            if guard.function(*args, **kwargs) != guard.outcome:
                return False
    return True
