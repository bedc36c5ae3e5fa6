"""What a plan keeps in memory: a prediction, in bytes, per stage, and in the course of a step."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from modelpar.planning.graph import BATCH, ModelGraph, Parameter
from modelpar.planning.intervals import Ints, Maxima, Overlaps
from modelpar.planning.plan import Plan
from modelpar.planning.profile import LayerCost, Profile
from modelpar.planning.schedule import Op, Schedule
from modelpar.planning.timeline import COMPUTE, Timeline

OPTIMIZER_MOMENTS = 2
"""Tensors that an optimizer that was not measured is taken to keep per trainable parameter, as Adam and AdamW do."""


@dataclass(frozen=True, eq=False)
class MemoryModel:
    """What any run of layers would hold as a stage: weights, gradients and optimizer once, activations per micro-batch.

    Sums over layers are differences of prefix sums. What does not add up, because a stage has it only once (a tied
    tensor that several of its layers use, a value that several of them take), is subtracted per pair of such layers.
    """

    weights: Ints
    """Before each position: weights, and in training their gradients and the optimizer's state."""
    shared_weights: Overlaps
    activations: Ints
    """Before each position: what is kept for one micro-batch, and what is taken from layers before the previous one."""
    entering: Ints
    """At each position: what the layer there takes from the one before it, for one micro-batch."""
    shared_activations: Overlaps
    temporary: Maxima

    @classmethod
    def of(cls, graph: ModelGraph, profile: Profile, kind: str = "train") -> MemoryModel:
        """Builds the model for the layers of a graph, under a schedule of that kind ("train" or "forward")."""
        train, n = kind == "train", len(graph.layers)
        costs = profile.layers
        canonical = {name: tie.names[0] for tie in graph.tied for name in tie.names}
        weights, pairs, seen = np.zeros(n, dtype=np.int64), [], dict[str, tuple[int, int]]()
        for i, (layer, cost) in enumerate(zip(graph.layers, costs, strict=True)):
            measured = train and cost.optimizer_bytes is not None
            weights[i] += cost.optimizer_bytes if measured and cost.optimizer_bytes else 0
            for name, tensor in {canonical.get(p.name, p.name): p for p in layer.parameters}.items():
                held = size = tensor_bytes(tensor)
                if train and tensor.trainable and not tensor.buffer:
                    held += size if measured else (1 + OPTIMIZER_MOMENTS) * size
                weights[i] += held
                if name in seen:
                    before, there = seen[name]
                    pairs.append((before, i, min(held, there)))
                seen[name] = i, held
        kept, entering, gaps = np.zeros(n, dtype=np.int64), np.zeros(n + 1, dtype=np.int64), []
        slack = 1.0 + profile.slack_share
        if train:
            kept += [round(cost.kept_bytes * slack) for cost in costs]
            for value in graph.values:
                ends = [value.producer, *(c for c in value.consumers if c != BATCH)]
                size = round(value.bytes_per_sample * profile.microbatch_size * slack)
                for before, after in itertools.pairwise(ends if value.producer != BATCH else []):
                    if after == before + 1:
                        entering[after] += size
                    else:
                        kept[after] += size
                        gaps.append((before, after, size))
        temporary = [round(cost.temporary_bytes * slack) if train else cost.output_bytes for cost in costs]
        return cls(
            weights=_before(weights),
            shared_weights=Overlaps.of(pairs),
            activations=_before(kept),
            entering=entering,
            shared_activations=Overlaps.of(gaps),
            temporary=Maxima.of(np.array(temporary, dtype=np.int64)),
        )

    def bytes(self, start: Ints | int, end: Ints | int, in_flight: int) -> Ints:
        """Returns what layers[start:end] hold at their peak as one stage; takes arrays."""
        fixed = self.weights[end] - self.weights[start] - self.shared_weights.within(start, end)
        flying = self.activations[end] - self.activations[start] + self.entering[start]
        flying = flying - self.shared_activations.within(start, end)
        found: Ints = fixed + in_flight * flying + self.temporary.over(start, end)
        return found


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
        slack         `profile.slack_share` of the activations, found by running all layers in a process of their own

    Activations are of micro-batches of `profile.microbatch_size` samples. The slack is mostly freed memory, in pieces
    that the next tensors do not fit into. Messages that wait in a mailbox are not counted, nor is the framework itself.
    """
    model = MemoryModel.of(plan.graph, plan.profile, plan.schedule.kind)
    in_flight, bounds = peak_microbatches_per_stage(plan.schedule), plan.partition.bounds
    return tuple(
        int(model.bytes(start, end, count)) for start, end, count in zip(bounds, bounds[1:], in_flight, strict=False)
    )


def memory_curves(plan: Plan, timeline: Timeline) -> tuple[tuple[tuple[float, int], ...], ...]:
    """Returns per rank what it holds in the course of a step: (seconds, bytes from then on), ascending, 0 s first.

    ::

        bytes            ┌F1┐      ┌B0┐
                 ┌F0┐┌──┘  └──────┘  │          weights + gradients + optimizer
              ───┘  └┘               └───       + activations of the micro-batches in flight + temporary values

    Counted, not measured: the spans say when, `stage_memory_bytes` says how much. A forward adds its stage's
    activations of a micro-batch when it begins, a B or W frees them when it ends; in between each action has its
    temporary values. With one stage per rank the highest point of a predicted step is `stage_memory_bytes`.
    """
    model, bounds = MemoryModel.of(plan.graph, plan.profile, plan.schedule.kind), plan.partition.bounds
    temporary, kept = [], []
    held = [0] * timeline.num_ranks
    for start, end, rank in zip(bounds, bounds[1:], plan.schedule.stage_to_rank, strict=False):
        least, more = (int(model.bytes(start, end, in_flight)) for in_flight in (0, 1))
        temporary.append(int(model.temporary.over(start, end)))
        kept.append(more - least)
        held[rank] += least - temporary[-1]
    changes: list[list[tuple[float, int]]] = [[(0.0, 0)] for _ in held]
    for span in timeline.spans:
        if span.kind in COMPUTE:
            taken, left = temporary[span.stage], temporary[span.stage]
            if span.kind == Op.FORWARD:
                taken += kept[span.stage]
            elif span.kind in (Op.BACKWARD, Op.WEIGHT_GRAD):
                left += kept[span.stage]
            changes[span.rank] += [(span.start, taken), (span.end, -left)]
    return tuple(_steps(fixed, sorted(of_rank)) for fixed, of_rank in zip(held, changes, strict=True))


def _steps(now: int, changes: Sequence[tuple[float, int]]) -> tuple[tuple[float, int], ...]:
    """Returns what is held from each time on; `changes` are in order of time."""
    points: list[tuple[float, int]] = []
    for time, at_once in itertools.groupby(changes, key=lambda change: change[0]):
        change = sum(num_bytes for _, num_bytes in at_once)
        now += change
        if change or not points:
            points.append((time, now))
    return tuple(points)


def activation_bytes(costs: Sequence[LayerCost], in_flight: int, received: int = 0) -> int:
    """Returns the bytes of activations that layers hold together at their peak, of so many micro-batches at once."""
    kept = received + sum(cost.kept_bytes for cost in costs)
    return in_flight * kept + max(cost.temporary_bytes for cost in costs)


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
    return _width(tensor.dtype) * math.prod(tensor.shape)


@cache
def _width(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)  # float32, torch.bfloat16, float8_e4m3fn; bool has none and takes a byte
    return max(1, int(bits[0]) // 8) if bits else 1


def _before(values: Ints) -> Ints:
    """Returns the sum before each position, and the sum of all."""
    return np.concatenate([[0], np.cumsum(values)])
