"""Who computes what in which order: Action, Schedule, and the data flow that follows from it.

A schedule is order and placement only; it knows no times and no messages. One text form serves people, files and tests:
an action is `2F0` (stage 2, forward, micro-batch 0), a rank is a line of actions::

    0F0 0F1 0B0 0B1        rank 0
    1F0 1B0 1F1 1B1        rank 1

`needs` and `gives` are the only description of which values travel: the simulator, the executor and every message to
people call them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from modelpar.errors import DeadlockError, ScheduleError
from modelpar.planning.graph import BATCH, StageGraph


class Op(StrEnum):
    """What an action computes."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRAD = "I"
    WEIGHT_GRAD = "W"
    UPDATE = "U"


_OPS = tuple(Op)
_CODE = {op: code for code, op in enumerate(_OPS)}
_ACTION = re.compile(r"(\d+)([FBIW])(\d+)")


class Action(NamedTuple):
    """One computation: of a stage, on a micro-batch (−1 for an update, which belongs to the whole step)."""

    stage: int
    op: Op
    microbatch: int = -1

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{self.microbatch if self.microbatch >= 0 else ''}"


class ValueKey(NamedTuple):
    """One value on its way from one stage to another; BATCH stands for the controller.

    Kinds: "value" and "grad" of a micro-batch; "tied_grad", the gradient of a tied tensor's copy, of a micro-batch or
    of the whole step; at the step's end "count" (N, from the last stage), "norms" (to stage 0), "total_norm" (from
    stage 0) and "weight" (the owner's updated tensor).
    """

    kind: str
    name: str
    microbatch: int
    source: int
    target: int

    def __str__(self) -> str:
        which = f" of micro-batch {self.microbatch}" if self.microbatch >= 0 else ""
        origin = "the controller" if self.source == BATCH else f"stage {self.source}"
        return f"{self.kind} {self.name}{which} from {origin}"


def needs(graph: StageGraph, action: Action) -> list[ValueKey]:
    """Returns the values that must have arrived before an action can run.

    A gradient travels as a chain, latest consumer → next earlier consumer → producer, because that is the order in
    which autograd adds in the unsplit model. So does that of a tied tensor: latest use → … → owner.
    """
    stage, op, microbatch = action
    keys: list[ValueKey] = []
    if op is Op.FORWARD:
        keys += [ValueKey("value", v.name, microbatch, v.producer, stage) for v in graph.values if stage in v.consumers]
    if op in (Op.BACKWARD, Op.INPUT_GRAD):
        keys += [
            ValueKey("grad", name, microbatch, chain[chain.index(stage) + 1], stage)
            for name, chain in _gradient_chains(graph)
            if stage in chain[:-1]
        ]
    if op in _tied_ops(graph):
        keys += [
            ValueKey("tied_grad", tie.names[0], microbatch, tie.layers[tie.layers.index(stage) + 1], stage)
            for tie in graph.tied
            if stage in tie.layers[:-1]
        ]
    if op is Op.UPDATE:
        last = graph.num_stages - 1
        if stage != last:
            keys.append(ValueKey("count", "samples", -1, last, stage))
        if stage == 0:
            keys += [ValueKey("norms", "gradients", -1, other, 0) for other in range(1, graph.num_stages)]
        elif graph.clips:
            keys.append(ValueKey("total_norm", "gradients", -1, 0, stage))
        keys += [
            ValueKey("weight", tie.names[0], -1, tie.layers[0], stage) for tie in graph.tied if stage in tie.layers[1:]
        ]
    return keys


def gives(graph: StageGraph, action: Action) -> list[ValueKey]:
    """Returns the values that an action hands to other stages; the mirror image of `needs`."""
    stage, op, microbatch = action
    keys: list[ValueKey] = []
    if op is Op.FORWARD:
        keys += [
            ValueKey("value", v.name, microbatch, stage, consumer)
            for v in graph.values
            if v.producer == stage
            for consumer in v.consumers
        ]
    if op in (Op.BACKWARD, Op.INPUT_GRAD):
        keys += [
            ValueKey("grad", name, microbatch, stage, chain[chain.index(stage) - 1])
            for name, chain in _gradient_chains(graph)
            if stage in chain[1:]
        ]
    if op in _tied_ops(graph):
        keys += [
            ValueKey("tied_grad", tie.names[0], microbatch, stage, tie.layers[tie.layers.index(stage) - 1])
            for tie in graph.tied
            if stage in tie.layers[1:]
        ]
    if op is Op.UPDATE:
        others = [other for other in range(graph.num_stages) if other != stage]
        if stage == graph.num_stages - 1:
            keys += [ValueKey("count", "samples", -1, stage, other) for other in others]
        if stage == 0:
            keys += [ValueKey("total_norm", "gradients", -1, 0, other) for other in others if graph.clips]
        else:
            keys.append(ValueKey("norms", "gradients", -1, stage, 0))
        keys += [
            ValueKey("weight", tie.names[0], -1, stage, copy)
            for tie in graph.tied
            if stage == tie.layers[0]
            for copy in tie.layers[1:]
        ]
    return keys


def _tied_ops(graph: StageGraph) -> tuple[Op, ...]:
    """Returns the ops that move gradients of tied tensors: each weight gradient, or the update that ends the step."""
    return (Op.BACKWARD, Op.WEIGHT_GRAD) if graph.tied_exact else (Op.UPDATE,)


def _gradient_chains(graph: StageGraph) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields, per value that carries a gradient, its name and the stages on its way: producer, then consumers."""
    for value in graph.values:
        if value.needs_grad and value.producer != BATCH and BATCH not in value.consumers:
            yield value.name, (value.producer, *value.consumers)


class Columns(NamedTuple):
    """One rank's actions as columns of equal length: 9 bytes an action, where a tuple takes about 100."""

    stage: NDArray[np.int32]
    op: NDArray[np.uint8]
    """Position in `Op`."""
    microbatch: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Schedule:
    """The order of actions on every rank. An illegal one cannot be built.

    Raises ScheduleError where an action is missing, doubled or misplaced, and DeadlockError naming the first action
    that can never run and what it waits for.
    """

    columns: tuple[Columns, ...]
    kind: str = "train"
    """"train", or "forward" for a schedule without backward."""

    @classmethod
    def of(cls, ranks: Sequence[Sequence[Action] | str], kind: str = "train") -> Schedule:
        """Builds a schedule from one list of actions, or one line of text, per rank."""
        return cls(tuple(_columns(_parse(rank) if isinstance(rank, str) else rank) for rank in ranks), kind)

    def __post_init__(self) -> None:
        if self.kind not in ("train", "forward"):
            raise ScheduleError(f'schedule kind is {self.kind!r}; expected "train" or "forward"')
        self._check_actions()
        self._check_order()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self.kind == other.kind and self.lines() == other.lines()

    def __hash__(self) -> int:
        return hash((self.kind, tuple(self.lines())))

    @property
    def num_ranks(self) -> int:
        """How many ranks there are."""
        return len(self.columns)

    @cached_property
    def num_stages(self) -> int:
        """How many stages there are."""
        return len(self.stage_to_rank)

    @cached_property
    def num_microbatches(self) -> int:
        """How many micro-batches each stage works on."""
        return 1 + max((int(rank.microbatch.max()) for rank in self.columns if len(rank.microbatch)), default=-1)

    @cached_property
    def stage_to_rank(self) -> tuple[int, ...]:
        """The rank of each stage."""
        home: dict[int, int] = {}
        for rank, columns in enumerate(self.columns):
            for stage in np.unique(columns.stage).tolist():
                if stage in home:
                    raise ScheduleError(f"stage {stage} is on rank {home[stage]} and on rank {rank}; expected one rank")
                home[stage] = rank
        missing = [stage for stage in range(max(home, default=-1) + 1) if stage not in home]
        if missing or not home:
            raise ScheduleError(f"no rank has an action of stage {missing[0] if missing else 0}")
        return tuple(home[stage] for stage in range(len(home)))

    @cached_property
    def exact(self) -> bool:
        """Whether every stage takes the micro-batches of each op in ascending order, as the unsplit model does."""
        for columns in self.columns:
            for code in range(len(_OPS)):
                for stage in np.unique(columns.stage):
                    order = columns.microbatch[(columns.stage == stage) & (columns.op == code)]
                    if (np.diff(order) < 0).any():
                        return False
        return True

    def actions(self, rank: int) -> Iterator[Action]:
        """Yields a rank's actions in order."""
        columns = self.columns[rank]
        lists = (columns.stage.tolist(), columns.op.tolist(), columns.microbatch.tolist())
        return (Action(stage, _OPS[code], microbatch) for stage, code, microbatch in zip(*lists, strict=True))

    def lines(self) -> list[str]:
        """Returns the text form, one line per rank."""
        return [" ".join(map(str, self.actions(rank))) for rank in range(self.num_ranks)]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def peak_microbatches(self) -> tuple[int, ...]:
        """Returns per rank the most (stage, micro-batch) pairs whose activations live at once (freed at B or W)."""
        peaks = []
        for columns in self.columns:
            change = np.zeros(len(columns.op), dtype=np.int64)
            change[columns.op == _CODE[Op.FORWARD]] = 1
            change[np.isin(columns.op, [_CODE[Op.BACKWARD], _CODE[Op.WEIGHT_GRAD]])] = -1
            peaks.append(int(np.cumsum(change).max(initial=0)) if self.kind == "train" else 1)
        return tuple(peaks)

    def _check_actions(self) -> None:
        """Checks that each stage does each micro-batch once: F, and in a train schedule B or both I and W."""
        for rank, columns in enumerate(self.columns):
            wrong = (columns.stage < 0) | (columns.microbatch < 0) | (columns.op >= _CODE[Op.UPDATE])
            if wrong.any():
                at = int(np.argmax(wrong))
                action = next(islice(self.actions(rank), at, None))
                raise ScheduleError(f"rank {rank} has {action}; expected F, B, I or W of a stage and a micro-batch")
        shape = (len(_OPS), self.num_stages, self.num_microbatches)
        if self.num_microbatches < 1:
            raise ScheduleError("the schedule has no actions; expected at least one micro-batch")
        count = np.zeros(shape, dtype=np.int64)
        for columns in self.columns:
            np.add.at(count, (columns.op, columns.stage, columns.microbatch), 1)
        forward, backward, input_grad, weight_grad = (count[_CODE[op]] for op in _OPS[:4])
        full = (backward == 1) & (input_grad == 0) & (weight_grad == 0)
        split = (backward == 0) & (input_grad == 1) & (weight_grad == 1)
        none = (backward == 0) & (input_grad == 0) & (weight_grad == 0)
        for what, wrong in (
            ("F once", forward != 1),
            ("B once, or I and W once", ~(full | split))
            if self.kind == "train"
            else ("no B, I or W in a forward schedule", ~none),
        ):
            if wrong.any():
                stage, microbatch = (int(i) for i in np.argwhere(wrong)[0])
                found = ", ".join(f"{n} × {op}" for op in _OPS[:4] if (n := int(count[_CODE[op], stage, microbatch])))
                raise ScheduleError(
                    f"stage {stage}, micro-batch {microbatch} has {found or 'no action'}; expected {what}"
                )

    def _check_order(self) -> None:
        """Runs the schedule without times, and raises DeadlockError where no rank can go on.

        In each round every rank takes at most one action, so that a round is a few numpy calls over all ranks.

        A chain of stages is enough for any StageGraph: F after the previous stage's F, B or I after its own F and the
        next stage's B or I, W after its own I. Values that skip stages only lead where the chain leads already.
        """
        stage, op, microbatch = (np.concatenate(column) for column in zip(*self.columns, strict=True))
        ends = np.cumsum([len(rank.op) for rank in self.columns])
        # done[what, stage, micro-batch]: what is 0 for F, 1 for B or I, 2 for W. The stage beyond the last is always
        # done, and the one before stage 0 is the same one.
        done = np.zeros((3, self.num_stages + 1, self.num_microbatches), dtype=np.bool_)
        done[:, -1] = True
        flat = done.reshape(-1)
        is_forward, is_weight_grad = op == _CODE[Op.FORWARD], op == _CODE[Op.WEIGHT_GRAD]
        what = np.where(is_forward, 0, np.where(is_weight_grad, 2, 1))
        event = np.ravel_multi_index((what, stage, microbatch), done.shape)
        previous = (stage - is_forward) % (self.num_stages + 1)
        first = np.ravel_multi_index((np.where(is_weight_grad, 1, 0), previous, microbatch), done.shape)
        next_backward = np.ravel_multi_index((np.ones_like(what), stage + 1, microbatch), done.shape)
        second = np.where(is_forward | is_weight_grad, first, next_backward)

        position = ends - [len(rank.op) for rank in self.columns]
        while True:
            ranks = np.flatnonzero(position < ends)
            at = position[ranks]
            can = flat[first[at]] & flat[second[at]]
            if not can.any():
                break
            flat[event[at[can]]] = True
            position[ranks[can]] += 1
        if len(ranks):
            rank, stuck = int(ranks[0]), int(at[0])
            lacking = int(np.flatnonzero(event == (second[stuck] if flat[first[stuck]] else first[stuck]))[0])
            action, needed = (Action(int(stage[i]), _OPS[op[i]], int(microbatch[i])) for i in (stuck, lacking))
            raise DeadlockError(
                f"rank {rank} can never run {action}: it waits for {needed} "
                f"on rank {self.stage_to_rank[needed.stage]}, which never comes"
            )


def _columns(actions: Sequence[Action]) -> Columns:
    stage, op, microbatch = zip(*actions, strict=True) if actions else ((), (), ())
    return Columns(
        np.array(stage, dtype=np.int32),
        np.array([_CODE[Op(o)] for o in op], dtype=np.uint8),
        np.array(microbatch, dtype=np.int32),
    )


def _parse(line: str) -> list[Action]:
    actions = []
    for word in line.split():
        match = _ACTION.fullmatch(word)
        if not match:
            raise ScheduleError(
                f"{word!r} is not an action; expected a form such as 2F0: stage, one of F B I W, micro-batch"
            )
        actions.append(Action(int(match[1]), Op(match[2]), int(match[3])))
    return actions
