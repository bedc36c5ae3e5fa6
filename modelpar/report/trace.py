"""One traced step as bytes that a viewer needs nothing else for: Trace.

::

    gzip(JSON)   {"format": 1, "step": 99, "measured": true, "plan": what plan.json holds,
                  "num_ranks": 2, "spans": [[rank, kind, start, end, stage, micro-batch, cause], …]}

Times are whole nanoseconds. The plan is in every trace, so that a run that was killed shows everything; its schedule is
written as a function's name only where that is one of modelpar's own, so that reading a trace imports nobody's code.
"""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass, replace
from typing import Any

from modelpar.errors import ConfigError
from modelpar.planning import schedules
from modelpar.planning.plan import Plan
from modelpar.planning.timeline import Span, Timeline

FORMAT = 1

_SCHEDULES = f"{schedules.__name__}:"


@dataclass(frozen=True, eq=False)
class Trace:
    """One step of a plan: when what happened."""

    plan: Plan
    step: int
    timeline: Timeline
    measured: bool = True
    """False: nobody ran it, the timeline is a prediction."""


def encode(trace: Trace) -> bytes:
    """Returns a trace as bytes."""
    plan = trace.plan.to_json()
    if not plan["schedule"].get("generator", "").startswith(_SCHEDULES):
        plan = replace(trace.plan, generator=None).to_json()
    data = {
        "format": FORMAT,
        "step": trace.step,
        "measured": trace.measured,
        "plan": plan,
        "num_ranks": trace.timeline.num_ranks,
        "spans": [[s.rank, s.kind, _ns(s.start), _ns(s.end), s.stage, s.microbatch, s.cause] for s in trace.timeline.spans],
    }
    return gzip.compress(json.dumps(data, separators=(",", ":")).encode(), mtime=0)


def decode(data: bytes) -> Trace:
    """Reads what `encode` wrote.

    Raises ConfigError where the format is newer than this version of modelpar, or the bytes are not a trace.
    """
    try:
        content = json.loads(gzip.decompress(data))
        version = content["format"]
        if isinstance(version, int) and version > FORMAT:
            raise ConfigError(f"the trace has format {version}; this modelpar reads up to {FORMAT}, a newer one wrote it")
        return _read(content)
    except ConfigError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"the trace is broken ({type(error).__name__}); expected what modelpar wrote") from error


def _read(content: dict[str, Any]) -> Trace:
    plan = content["plan"]
    if not plan["schedule"].get("generator", _SCHEDULES).startswith(_SCHEDULES):
        raise ValueError(plan["schedule"]["generator"])
    spans = tuple(
        Span(rank, kind, start / 1e9, end / 1e9, stage, microbatch, cause)
        for rank, kind, start, end, stage, microbatch, cause in content["spans"]
    )
    return Trace(Plan.from_json(plan), content["step"], Timeline(content["num_ranks"], spans), content["measured"])


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
