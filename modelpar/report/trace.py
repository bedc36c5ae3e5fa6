"""One traced step as bytes that a viewer needs nothing else for: Trace.

::

    gzip(JSON)   {"format": 2, "step": 99, "measured": true, "plan": what plan.json holds, "schedule": "1f1b",
                  "peak_bytes": [52_300_000, 44_500_000], "clock_error": 0.0, "causes": ["", "value h3 …", …],
                  "ranks": [{"kind": […], "gap": […], "length": […], "stage": […], "microbatch": […], "cause": […]}, …]}

A rank's spans are columns: `gap` is the time since the end of the span before, `length` their own, both in whole
nanoseconds; `cause` is a position in `causes`. That takes 0.6 of what rows took, 43 kB for 16 stages × 128
micro-batches. Format 1 had rows [rank, kind, start, end, stage, micro-batch, cause], and neither peaks nor clocks nor
the schedule's name.

The plan is in every trace, so that a run that was killed shows everything. Its schedule is written as a function's name
only where that is one of modelpar's own, so that reading a trace imports nobody's code.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from modelpar.errors import ConfigError, PlanError
from modelpar.planning import schedules
from modelpar.planning.plan import Plan
from modelpar.planning.timeline import COMPUTE, Span, Timeline

FORMAT = 2

_SCHEDULES = f"{schedules.__name__}:"
_BROKEN = (
    *(OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(RecursionError, MemoryError),
)
"""What reading bytes that somebody else wrote may raise."""


@dataclass(frozen=True, eq=False)
class Trace:
    """One step of a plan: when what happened."""

    plan: Plan
    step: int
    timeline: Timeline
    peak_bytes: tuple[int, ...] = ()
    """Measured, per rank; empty where that is not known."""
    measured: bool = True
    """False: nobody ran it, the timeline is a prediction."""
    schedule: str = ""
    """What people call the schedule, such as "1f1b"; empty where only its function is known."""


def encode(trace: Trace) -> bytes:
    """Returns a trace as bytes."""
    plan = trace.plan.to_json()
    if not plan["schedule"].get("generator", "").startswith(_SCHEDULES):
        plan = replace(trace.plan, generator=None).to_json()
    timeline = trace.timeline
    causes = {cause: i for i, cause in enumerate(dict.fromkeys(span.cause for span in timeline.spans))}
    data = {
        "format": FORMAT,
        "step": trace.step,
        "measured": trace.measured,
        "plan": plan,
        "schedule": trace.schedule,
        "peak_bytes": trace.peak_bytes,
        "clock_error": timeline.clock_error,
        "causes": list(causes),
        "ranks": [_columns(timeline.of_rank(rank), causes) for rank in range(timeline.num_ranks)],
    }
    return gzip.compress(json.dumps(data, separators=(",", ":")).encode(), mtime=0)


def decode(data: bytes) -> Trace:
    """Reads what `encode` wrote, or an earlier version did.

    Raises ConfigError where the format is newer than this version of modelpar, or the bytes are not a trace.
    """
    try:
        content = json.loads(gzip.decompress(data))
        version = content["format"]
        if version > FORMAT:
            raise ConfigError(f"the trace has format {version}, of a newer modelpar; expected {FORMAT} or less")
        name = content["plan"]["schedule"].get("generator", _SCHEDULES)
        if not name.startswith(_SCHEDULES):
            raise ConfigError(f"the trace names the schedule {name}; expected one of modelpar's own")
        if version == 1:
            timeline = Timeline(content["num_ranks"], tuple(_spans_of_rows(content["spans"])))
        else:
            spans = tuple(_spans_of_columns(content["ranks"], content["causes"]))
            timeline = Timeline(len(content["ranks"]), spans, content.get("clock_error", 0.0))
        plan = Plan.from_json(content["plan"])
        if timeline.num_ranks != plan.num_ranks:
            raise ValueError("its timeline is not of its plan")
        trace = Trace(
            plan=plan,
            step=int(content["step"]),
            timeline=timeline,
            peak_bytes=tuple(map(int, content.get("peak_bytes", ()))),
            measured=bool(content["measured"]),
            schedule=str(content.get("schedule", "")),
        )
        _check(trace)
        return trace
    except ConfigError:
        raise
    except PlanError as error:  # such as of a newer modelpar
        raise ConfigError(f"the trace is broken: {error}") from error
    except _BROKEN as error:
        raise ConfigError(f"the trace is broken ({type(error).__name__}); expected what modelpar wrote") from error


def _check(trace: Trace) -> None:
    """Raises ValueError where numbers are none that a step can have: whoever shows it would fall over them."""
    plan, timeline = trace.plan, trace.timeline
    for previous, span in pairwise((None, *timeline.spans)):
        begin = previous.start if previous and previous.rank == span.rank else 0.0
        if not (begin <= span.start <= span.end < math.inf and -1 <= span.stage < plan.num_stages):
            raise ValueError(f"{span} is no span of the plan")
        if not isinstance(span.kind, str) or (span.kind in COMPUTE and not (span.stage >= 0 and span.microbatch >= 0)):
            raise ValueError(f"{span} is nothing that a rank does")
    if len(trace.peak_bytes) not in (0, plan.num_ranks) or trace.step < 0 or not 0 <= timeline.clock_error < math.inf:
        raise ValueError("its peaks, step or clock error are none")


def _columns(spans: tuple[Span, ...], causes: dict[str, int]) -> dict[str, list[Any]]:
    times = [(round(span.start * 1e9), round(span.end * 1e9)) for span in spans]
    return {
        "kind": [span.kind for span in spans],
        "gap": [start - end for (start, _), end in zip(times, [0, *(end for _, end in times)], strict=False)],
        "length": [end - start for start, end in times],
        "stage": [span.stage for span in spans],
        "microbatch": [span.microbatch for span in spans],
        "cause": [causes[span.cause] for span in spans],
    }


def _spans_of_columns(ranks: list[dict[str, list[Any]]], causes: list[str]) -> Iterator[Span]:
    for rank, columns in enumerate(ranks):
        now = 0
        names = ("kind", "gap", "length", "stage", "microbatch", "cause")
        for kind, gap, length, stage, microbatch, cause in zip(*(columns[name] for name in names), strict=True):
            start = now + gap
            now = start + length
            yield Span(rank, kind, start / 1e9, now / 1e9, stage, microbatch, causes[cause])


def _spans_of_rows(rows: list[list[Any]]) -> Iterator[Span]:
    for rank, kind, start, end, stage, microbatch, cause in rows:
        yield Span(rank, kind, start / 1e9, end / 1e9, stage, microbatch, cause)
