"""What a plan keeps in memory: a prediction, in bytes, per stage."""

from __future__ import annotations

import re

import numpy as np

from modelpar.planning.graph import Parameter
from modelpar.planning.plan import Plan
from modelpar.planning.schedule import Op, Schedule

OPTIMIZER_MOMENTS = 2
"""Tensors that the optimizer keeps per trainable parameter: 2 for Adam and AdamW; SGD needs fewer."""


def stage_memory_bytes(plan: Plan) -> tuple[int, ...]:
    """Returns the bytes that each stage holds at its peak in one step.

    ::

        train     trainable × (1 weight + 1 gradient + 2 moments) + frozen + buffers + saved × in-flight micro-batches
        forward   trainable + frozen + buffers + the largest output of one layer

    `saved` is what the stage's layers keep of one micro-batch of `profile.microbatch_size` samples for backward. A tied
    tensor counts once on every stage that holds a copy of it. Temporaries inside a layer, message buffers and the
    framework itself are not counted, so that a measured peak is somewhat larger.
    """
    in_flight = peak_microbatches_per_stage(plan.schedule)
    canonical = {name: tie.names[0] for tie in plan.graph.tied for name in tie.names}
    train = plan.schedule.kind == "train"
    total = []
    for stage in range(plan.num_stages):
        layers = plan.partition.layers(stage)
        tensors = {canonical.get(p.name, p.name): p for i in layers for p in plan.graph.layers[i].parameters}
        weights = 0
        for tensor in tensors.values():
            learned = train and tensor.trainable and not tensor.buffer
            weights += tensor_bytes(tensor) * ((2 + OPTIMIZER_MOMENTS) if learned else 1)
        costs = [plan.profile.layers[i] for i in layers]
        if train:
            activations = in_flight[stage] * sum(cost.saved_bytes for cost in costs)
        else:
            activations = max(cost.output_bytes for cost in costs)
        total.append(weights + activations)
    return tuple(total)


def peak_microbatches_per_stage(schedule: Schedule) -> tuple[int, ...]:
    """Returns per stage the most micro-batches whose activations live at once (from F to B or W; 1 if only F runs)."""
    ops = list(Op)
    frees = [ops.index(Op.BACKWARD), ops.index(Op.WEIGHT_GRAD)]
    peaks = []
    for stage, rank in enumerate(schedule.stage_to_rank):
        columns = schedule.columns[rank]
        op = columns.op[columns.stage == stage]
        change = (op == ops.index(Op.FORWARD)).astype(np.int64) - np.isin(op, frees)
        peaks.append(int(np.cumsum(change).max(initial=0)) if schedule.kind == "train" else 1)
    return tuple(peaks)


def tensor_bytes(tensor: Parameter) -> int:
    """Returns the bytes of one parameter or buffer; the width of its elements is read from its dtype's name."""
    bits = re.search(r"\d+", tensor.dtype)  # float32, torch.bfloat16, float8_e4m3fn; bool has none and takes a byte
    width = max(1, int(bits[0]) // 8) if bits else 1
    return width * int(np.prod(tensor.shape, dtype=np.int64))
