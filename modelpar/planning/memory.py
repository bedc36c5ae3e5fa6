"""What a plan keeps in memory: a prediction, in bytes, per stage."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from modelpar.planning.graph import BATCH, Parameter
from modelpar.planning.plan import Plan
from modelpar.planning.profile import LayerCost
from modelpar.planning.schedule import Op, Schedule

OPTIMIZER_MOMENTS = 2
"""Tensors that an optimizer that was not measured is taken to keep per trainable parameter, as Adam and AdamW do."""


def stage_memory_bytes(plan: Plan) -> tuple[int, ...]:
    """Returns the bytes that each stage holds at its peak in one step.

    ::

        train     weights + gradients + optimizer + activations + slack
        forward   weights + the largest output of one layer

        weights       parameters and buffers; a tied tensor counts once on every stage that holds a copy of it
        gradients     as large as the trainable parameters
        optimizer     as measured; unmeasured, 2 moments per trainable parameter
        activations   in-flight micro-batches × (value received + Σ kept_bytes of its layers)
                      + the largest temporary_bytes of one layer
        slack         `profile.slack_bytes`, found by running all layers in a process of their own

    Activations are of micro-batches of `profile.microbatch_size` samples. The slack is much the same for all stages of
    a model: it is mostly freed memory, in pieces that the next tensors do not fit into. Messages that wait in a mailbox
    are not counted, nor is the framework itself.
    """
    in_flight = peak_microbatches_per_stage(plan.schedule)
    canonical = {name: tie.names[0] for tie in plan.graph.tied for name in tie.names}
    train = plan.schedule.kind == "train"
    received = _received_bytes(plan)
    total = []
    for stage in range(plan.num_stages):
        layers = plan.partition.layers(stage)
        tensors = {canonical.get(p.name, p.name): p for i in layers for p in plan.graph.layers[i].parameters}
        learned = sum(tensor_bytes(t) for t in tensors.values() if t.trainable and not t.buffer)
        held = sum(map(tensor_bytes, tensors.values()))
        costs = [plan.profile.layers[i] for i in layers]
        if train:
            measured = [cost.optimizer_bytes for cost in costs if cost.optimizer_bytes is not None]
            held += learned + (sum(measured) if measured else OPTIMIZER_MOMENTS * learned)
            held += activation_bytes(costs, in_flight[stage], received[stage]) + plan.profile.slack_bytes
        else:
            held += max(cost.output_bytes for cost in costs)
        total.append(held)
    return tuple(total)


def activation_bytes(costs: Sequence[LayerCost], in_flight: int, received: int = 0) -> int:
    """Returns the bytes of activations that layers hold together at their peak, of so many micro-batches at once."""
    kept = received + sum(cost.kept_bytes for cost in costs)
    return in_flight * kept + max(cost.temporary_bytes for cost in costs)


def _received_bytes(plan: Plan) -> list[int]:
    """Returns per stage the bytes of what other stages hand to it for one micro-batch."""
    received = [0.0] * plan.num_stages
    for value in plan.stage_graph.values:
        for stage in value.consumers:
            if value.producer != BATCH and stage != BATCH:
                received[stage] += value.bytes_per_sample * plan.profile.microbatch_size
    return [int(size) for size in received]


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
