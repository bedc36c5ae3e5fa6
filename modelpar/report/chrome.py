"""A step as a Chrome trace, which Perfetto and chrome://tracing open: a process per stage, a lane per kind, arrows.

::

    stage 0 predicted
    stage 0   compute    F0 F1          B0 B1
              waits            ////////
              transfers    >  >╲             the arrow of a value leads from where it was sent to where it was used
    stage 1   compute           F0 B0 F1 B1

What belongs to a rank and to no stage (data, reduce, optimizer) is in the process of the rank's first stage.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from modelpar.errors import ConfigError
from modelpar.planning.flow import flow
from modelpar.planning.graph import StageGraph
from modelpar.planning.timeline import COMPUTE, Span, Timeline
from modelpar.report.palette import look, look_key

Event = dict[str, Any]
MemoryCurve = Sequence[tuple[float, float]]
"""Points of (seconds, bytes)."""

_LANES = {
    "compute": COMPUTE,
    "waits": {"wait"},
    "transfers": {"send", "receive"},
    "step": {"data", "reduce", "optimizer"},
}


def chrome_trace(
    timeline: Timeline,
    graph: StageGraph,
    stage_to_rank: Sequence[int],
    predicted: Timeline | None = None,
    memory: Mapping[int, MemoryCurve] | None = None,
) -> dict[str, Any]:
    """Returns a step in the Trace Event Format, as the object that is written as JSON; `memory` is by rank.

    Times are in µs, each a whole number of nanoseconds divided once. An arrow that its ends leave no room for, because
    one takes no time or ends before the other begins, is left out; `otherData` has their number.
    """
    parts = [_Part(timeline, tuple(stage_to_rank), "", 1)]
    if predicted is not None:
        parts.append(_Part(predicted, tuple(stage_to_rank), " predicted", 1 + len(stage_to_rank)))
    timed: list[tuple[int, int, Event]] = []
    arrows = left_out = 0
    for part in parts:
        timed += part.slices()
        for arrow in flow(part.timeline, graph, stage_to_rank).arrows:
            ends = part.arrow(arrow.source, arrow.target, arrows + 1)
            arrows, left_out = arrows + bool(ends), left_out + (not ends)
            timed += ends
    for rank, curve in (memory or {}).items():
        timed += parts[0].counters(rank, curve)
    timed.sort(key=lambda item: item[:2])  # by time; of the same time, slices before the arrows that are bound to them
    return {
        "traceEvents": [event for part in parts for event in part.names()] + [event for *_, event in timed],
        "displayTimeUnit": "ms",
        "otherData": {"writer": "modelpar", "arrows": arrows, "arrows_left_out": left_out},
    }


def write_trace(trace: Mapping[str, Any], path: str | Path) -> None:
    """Writes what `chrome_trace` returned, packed where the name ends in .gz.

    Raises ConfigError for a name that ends in neither .json nor .json.gz: viewers go by it.
    """
    path = Path(path)
    # no \\u escapes: Perfetto has versions that stop at them
    data = json.dumps(trace, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    if path.name.endswith(".json.gz"):
        data = gzip.compress(data, mtime=0)
    elif path.suffix != ".json":
        raise ConfigError(f"the trace file is {path}; expected a name that ends in .json or .json.gz")
    path.write_bytes(data)


class _Part(NamedTuple):
    """The measured or the predicted timeline, and which processes show it."""

    timeline: Timeline
    stage_to_rank: tuple[int, ...]
    suffix: str
    first_pid: int
    """Of stage 0. Process 0 is the idle process to viewers."""

    def names(self) -> Iterator[Event]:
        """Yields what processes and lanes are called and how they are ordered: the predicted above the measured."""
        used = {self._lane(span) for span in self.timeline.spans}
        for stage, rank in enumerate(self.stage_to_rank):
            pid = self.first_pid + stage
            yield _name("process_name", pid, 0, name=f"stage {stage}{self.suffix}")
            yield _name("process_labels", pid, 0, labels=f"rank {rank}")
            yield _name("process_sort_index", pid, 0, sort_index=2 * stage + (not self.suffix))
            for number, lane in enumerate((*_LANES, "other")):
                if (pid, number) in used:
                    yield _name("thread_name", pid, _tid(pid, number), name=lane)
                    yield _name("thread_sort_index", pid, _tid(pid, number), sort_index=number)

    def slices(self) -> Iterator[tuple[int, int, Event]]:
        """Yields each span as (ns, order, event)."""
        for span in self.timeline.spans:
            pid, lane = self._lane(span)
            start, end = _ns(span.start), _ns(span.end)
            args = {"rank": span.rank, "stage": span.stage, "microbatch": span.microbatch, "cause": span.cause}
            event = {
                "ph": "X",
                "name": _slice_name(span),
                "cat": "compute" if span.kind in COMPUTE else span.kind,
                "ts": _us(start),
                "dur": _us(end - start),
                "pid": pid,
                "tid": _tid(pid, lane),
                "args": {key: value for key, value in args.items() if value not in (-1, "")},
            }
            yield start, 0, event

    def arrow(self, source: int, target: int, number: int) -> list[tuple[int, int, Event]]:
        """Returns both ends of an arrow, each within its span and the second not before the first; none if that fails.

        It leads from a nanosecond before the end of its source to one after the beginning of its target: a viewer may
        take the edge between two slices for either. A target that began before, because what sent it went on or because
        of an error between two clocks, draws the beginning forward.
        """
        sent, used = self.timeline.spans[source], self.timeline.spans[target]
        begin, last = _ns(sent.start) + 1, _ns(sent.end) - 1
        arrival = max(_ns(used.start) + 1, begin)
        if last < begin or arrival > _ns(used.end) - 1:
            return []
        name = "activations" if used.kind == "F" else "gradients" if used.kind in COMPUTE else "step's end"
        common = {"cat": "value", "name": name, "id": number}
        ends = ((sent, min(last, arrival), 1, {"ph": "s"}), (used, arrival, 2, {"ph": "f", "bp": "e"}))
        found = []
        for span, ns, order, phase in ends:
            pid, lane = self._lane(span)
            found.append((ns, order, {**phase, **common, "ts": _us(ns), "pid": pid, "tid": _tid(pid, lane)}))
        return found

    def counters(self, rank: int, curve: MemoryCurve) -> Iterator[tuple[int, int, Event]]:
        """Yields a rank's memory."""
        pid = self.first_pid + self.stage_to_rank.index(rank)
        for seconds, num_bytes in curve:
            ns = _ns(seconds)
            args = {"MB": num_bytes / 1e6}
            yield ns, 0, {"ph": "C", "name": "memory", "ts": _us(ns), "pid": pid, "tid": _tid(pid, 0), "args": args}

    def _lane(self, span: Span) -> tuple[int, int]:
        """Returns the process that shows a span, and the number of the lane in it."""
        stage = span.stage if span.stage >= 0 else self.stage_to_rank.index(span.rank)
        number = next((i for i, kinds in enumerate(_LANES.values()) if span.kind in kinds), len(_LANES))
        return self.first_pid + stage, number


def _name(what: str, pid: int, tid: int, **args: str | int) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid or _tid(pid, 0), "args": args}


def _slice_name(span: Span) -> str:
    """Returns e.g. "F3", "send", "waits for gradients"."""
    chosen = look(look_key(span))
    if span.kind in COMPUTE:
        return f"{chosen.letter}{span.microbatch if span.microbatch >= 0 else ''}"
    return chosen.name


def _tid(pid: int, lane: int) -> int:
    """Returns a lane's number, which no other lane and no process has: Perfetto names a thread by its number alone."""
    return 10_000 * pid + lane


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _us(ns: int) -> float:
    """Returns nanoseconds in µs, so that times 1,000 it is not less: viewers that cut off would let slices overlap."""
    us = ns / 1000
    return us if int(us * 1000) == ns else math.nextafter(us, math.inf)
