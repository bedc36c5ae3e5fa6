"""What waited for what in a step: Flow, found in any timeline, measured or simulated.

::

    rank 0   0F0 s 0F1 s ................ 0B0        s sends, ... waits
                  ╲         ╲          ╱
    rank 1   ..... 1F0 1B0 s 1F1 1B1 s               arrows: s → 1F0, s → 1F1, s → 0B0

The critical path is the chain of spans that made the step as long as it was. It is walked from the span that ended
last: before a wait comes what sent the value, before anything else what its rank did until then.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import NamedTuple

from modelpar.planning.graph import BATCH, StageGraph
from modelpar.planning.schedule import Action, Op, ValueKey, needs
from modelpar.planning.timeline import COMPUTE, Span, Timeline

_CAUSE = re.compile(r"(\w+) (.+?)(?: of micro-batch (\d+))? from stage (\d+)")
_PRODUCERS = {"value": ("F",), "grad": ("I", "B"), "tied_grad": ("W", "B")}
"""The ops that give a value of a micro-batch, by its kind."""


Pair = tuple[int, int]
"""Two ranks, the smaller first."""


class Arrow(NamedTuple):
    """A value's way from one rank to another."""

    source: int
    """Index of the span that sent it: a send, or the computation where nothing else was recorded."""
    target: int
    """Index of the span that used it; the wait itself where its rank recorded nothing after it."""
    wait: int
    """Index of the span in which it was waited for, −1 where it was there before it was needed."""


@dataclass(frozen=True)
class Flow:
    """A timeline with what its spans had to wait for; all indices are into `timeline.spans`."""

    timeline: Timeline
    arrows: tuple[Arrow, ...]
    """Values between ranks, in the order of their targets."""
    previous: tuple[int, ...]
    """Per span the one before it on its rank, −1 for the first."""

    @cached_property
    def critical(self) -> tuple[int, ...]:
        """The spans on the critical path in order of time.

        Of a wait among them only what follows the end of the span before it lies on the path: the value's transfer.
        """
        spans = self.timeline.spans
        sent_by = {arrow.wait: arrow.source for arrow in self.arrows if arrow.wait >= 0}
        path: list[int] = []
        at = max(range(len(spans)), key=lambda i: (spans[i].end, i), default=-1)
        while at >= 0:
            path.append(at)
            at = sent_by.get(at, self.previous[at])
        return tuple(reversed(path))

    def critical_share(self, stage: int) -> float:
        """Returns the share of the step in which the critical path runs through a stage: it computes or sends."""
        spans = (self.timeline.spans[i] for i in self.critical)
        seconds = sum(span.seconds for span in spans if span.stage == stage and span.kind in COMPUTE | {"send"})
        return seconds / self.timeline.makespan if self.timeline.makespan else 0.0


def flow(timeline: Timeline, graph: StageGraph, stage_to_rank: Sequence[int]) -> Flow:
    """Returns what the spans of a step waited for.

    `graph` and `stage_to_rank` are those of its plan. Values that stay on one rank have no arrow, and at the end of the
    step only those that were waited for.
    """
    spans = timeline.spans
    previous = tuple(i - 1 if i and spans[i - 1].rank == spans[i].rank else -1 for i in range(len(spans)))
    return Flow(timeline, tuple(_arrows(spans, graph, stage_to_rank)), previous)


def ways(flows: Sequence[Flow]) -> dict[Pair, float]:
    """Returns per pair of ranks how long the values of micro-batches usually are on their way, once they are sent.

    Only those that were waited for tell; nobody knows when the others were there.
    """
    found: defaultdict[Pair, list[float]] = defaultdict(list)
    for each in flows:
        spans = each.timeline.spans
        for arrow in each.arrows:
            source, target = spans[arrow.source], spans[arrow.target]
            if arrow.wait >= 0 and target.kind in COMPUTE:
                found[pair(source, target)].append(max(0.0, spans[arrow.wait].end - source.end))
    return {ends: median(seconds) for ends, seconds in found.items()}


def pair(source: Span, target: Span) -> Pair:
    """Returns the ranks of two spans."""
    return min(source.rank, target.rank), max(source.rank, target.rank)


def _arrows(spans: Sequence[Span], graph: StageGraph, stage_to_rank: Sequence[int]) -> Iterator[Arrow]:
    computed = {(s.kind, s.stage, s.microbatch): i for i, s in enumerate(spans) if s.kind in COMPUTE}
    working: defaultdict[int, list[int]] = defaultdict(list)
    """Per rank the spans that are no waits."""
    for i, span in enumerate(spans):
        if span.kind != "wait":
            working[span.rank].append(i)
    wanted: dict[tuple[int, str], list[ValueKey]] = {}
    """What stages need for an op of micro-batch 0, from other ranks."""
    waits: dict[str, int] = {}
    """The rank's waits for values that have not been used yet, by what was waited for. On a GPU a value is received
    between the wait for it and its use."""
    for i, span in enumerate(spans):
        last = i + 1 == len(spans) or spans[i + 1].rank != span.rank
        if span.kind == "wait":
            waits[span.cause] = i
        if span.kind in COMPUTE and (span.stage, span.kind) not in wanted:
            keys = needs(graph, Action(span.stage, Op(span.kind), 0)) if span.kind in set(Op) else []
            wanted[span.stage, span.kind] = [
                k for k in keys if k.source != BATCH and stage_to_rank[k.source] != span.rank
            ]
        for key in wanted.get((span.stage, span.kind), ()):
            wait = waits.pop(str(key._replace(microbatch=span.microbatch)), -1)
            ops = _PRODUCERS[key.kind]
            sources = (computed.get((op, key.source, span.microbatch)) for op in ops)
            source = next((found for found in sources if found is not None), None)
            if source is not None:
                yield Arrow(_send_of(spans, source), i, wait)
        if last or span.kind not in ("wait", "receive"):
            for wait in waits.values():
                source = _sender_at_end(spans, working, stage_to_rank, spans[wait])
                if source is not None:
                    yield Arrow(source, i, wait)
            waits.clear()


def _send_of(spans: Sequence[Span], computation: int) -> int:
    """Returns the span in which the results of a computation were sent, or the computation itself."""
    following = spans[computation + 1] if computation + 1 < len(spans) else None
    here = spans[computation]
    sends = following is not None and following.kind == "send"
    same = following is not None and (following.rank, following[4:6]) == (here.rank, here[4:6])
    return computation + 1 if sends and same else computation


def _sender_at_end(
    spans: Sequence[Span], working: dict[int, list[int]], stage_to_rank: Sequence[int], wait: Span
) -> int | None:
    """Returns what sent a value of the step's end: the last span of its kind that began before the value arrived."""
    found = _CAUSE.fullmatch(wait.cause)
    if found is None or found[3] is not None or int(found[4]) >= len(stage_to_rank):
        return None
    begun = [i for i in working[stage_to_rank[int(found[4])]] if spans[i].start < wait.end]
    kind = "optimizer" if found[1] == "weight" else "reduce"
    return next((i for i in reversed(begun) if spans[i].kind == kind), begun[-1] if begun else None)
