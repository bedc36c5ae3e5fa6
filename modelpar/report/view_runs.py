"""The runs that the Pipeline view shows, as JSON: RUNS. All arithmetic is done here; JavaScript only draws.

The page is started with `startPipelineView(element, source)` of static/pipeline.js. `source` has three functions:
`runs()` gives a promise of RUNS, `trace(run, step)` one of TRACE (view_trace.py), and `download(run, step)` a URL of
the step's Chrome trace, or null. In TensorBoard they fetch from the plugin, in an HTML report the same JSON is in the
page. Times are seconds from the start of the step, sizes bytes, shares 0 … 1; null is "not known". ::

    RUNS = {
      "format": 1,
      "runs": [RUN, …],               fastest first: measured ones, then those only predicted, then broken ones
      "notes": ["…", …]               lines to show above the table
    }
    RUN = {
      "run": "2026-11-25_13-21-02-gpt-1f1b",            unique
      "problem": null | "holds no traces: …",           if not null, all below but "run" and "num_steps" may be null
      "schedule": "1f1b", "partition": "optimal", "balance": [4, 4],
      "num_ranks": 2, "num_stages": 2, "num_microbatches": 8,
      "steps": [4, 99, 199],                            traced, ascending
      "num_steps": 400,                                 how many are done so far
      "measured": true,                                 false: nobody ran it, all numbers are predictions
      "step_seconds": 0.174,                            median of the settled steps
      "relative": 1.0,                                  × of the fastest measured run, or of the fastest predicted one
      "predicted_seconds": 0.174, "error": -0.004,      predicted / measured − 1
      "parts": [{"name": "useful work", "seconds": 0.140}, …],   breakdown.PARTS, which add up to the makespan of
      "parts_step": 399,                                this step: of the last traced ones, that of median length
      "utilization": 0.81, "bubble": 0.19,              means of the settled steps
      "ideal_bubble": 0.111,                            what the schedule has with equal stages and free messages
      "imbalance": 1.02,                                of that traced step
      "peak_bytes": 52.3e6, "memory_limit": null | bytes,   of the fullest rank
      "headline": "stage 1 is on 62 % of the critical path; moving h3 to stage 0 saves 6 %"
    }
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from modelpar.errors import ModelparError
from modelpar.planning.analysis import analyse
from modelpar.planning.breakdown import breakdown
from modelpar.planning.cluster import Cluster
from modelpar.planning.memory import stage_memory_bytes
from modelpar.planning.plan import Plan
from modelpar.planning.simulate import StageCost, predict, simulate, stage_costs
from modelpar.report.runs import GONE, Run
from modelpar.report.trace import Trace, decode
from modelpar.report.view_trace import explained, flow_of, said_of

FORMAT = 1

Json = dict[str, Any]


def runs_json(
    runs: Sequence[Run], notes: Sequence[str], facts: Callable[[tuple[bytes, ...]], Json] | None = None
) -> Json:
    """Returns RUNS. `facts` may be a version of `trace_facts` that remembers."""
    rows = [_run(run, facts or trace_facts) for run in runs]
    for measured in (True, False):
        of_kind = [row for row in rows if not row["problem"] and row["measured"] is measured]
        best = min((row["step_seconds"] for row in of_kind), default=0.0)
        for row in of_kind:
            row["relative"] = row["step_seconds"] / best if best else 1.0

    def place(row: Json) -> tuple[bool, bool, float, str]:
        return bool(row["problem"]), not row["measured"], row["step_seconds"] or 0.0, row["run"]

    return {"format": FORMAT, "runs": sorted(rows, key=place), "notes": list(notes)}


def trace_facts(blobs: tuple[bytes, ...]) -> Json:
    """Returns what RUN says of a run's traces; of those given, the step of median length stands for all.

    Raises ConfigError where one cannot be read.
    """
    traces = [decode(blob) for blob in blobs]
    found = explained(traces)
    typical = [trace for trace in traces if found and trace.timeline.makespan == found.makespan]
    trace = typical[0] if typical else traces[-1]
    plan, timeline = trace.plan, trace.timeline
    parts = found.breakdown if found else breakdown(flow_of(trace, timeline))
    peaks = list(traces[-1].peak_bytes) or _predicted_peaks(plan)
    fullest = peaks.index(max(peaks))
    return {
        "schedule": _schedule_name(trace),
        "partition": plan.partition.method,
        "balance": list(plan.partition.balance),
        "num_ranks": plan.num_ranks,
        "num_stages": plan.num_stages,
        "num_microbatches": plan.num_microbatches,
        "measured": trace.measured,
        "makespan": timeline.makespan,
        "predicted_seconds": plan.prediction.step_seconds if plan.prediction else predict(plan).makespan,
        "parts": [{"name": name, "seconds": seconds} for name, seconds in parts.parts],
        "parts_step": trace.step,
        "bubble": timeline.bubble,
        "ideal_bubble": ideal_bubble(plan),
        "imbalance": analyse(timeline).imbalance,
        "peak_bytes": peaks[fullest],
        "memory_limit": plan.cluster.memory_of(fullest),
        "headline": said_of(found)[0],
    }


def ideal_bubble(plan: Plan) -> float:
    """Returns the bubble of a plan's schedule if its stages were equal, messages free and steps without an end."""
    costs = stage_costs(plan.profile, plan.partition)
    names = ("forward_seconds", "input_grad_seconds", "weight_grad_seconds")
    mean = StageCost(*(fmean(getattr(cost, name) for cost in costs) for name in names))
    if not mean.forward_seconds:  # a profile without times: what is usual for linear layers
        mean = StageCost(1.0, 1.0, 1.0)
    cluster = Cluster(("cpu",) * plan.num_ranks)
    return simulate(plan.schedule, [mean] * plan.num_stages, plan.stage_graph, cluster).bubble


def _run(run: Run, facts: Callable[[tuple[bytes, ...]], Json]) -> Json:
    row: Json = dict.fromkeys(_KEYS) | {"run": run.name, "problem": run.problem, "num_steps": run.num_steps}
    if run.problem:
        return row
    if not run.blobs:
        return row | {"problem": GONE}
    try:
        row |= facts(run.blobs)
    except ModelparError as error:
        return row | {"problem": " ".join(str(error).split())}
    makespan = row.pop("makespan")
    row["steps"] = list(run.steps)
    row["step_seconds"] = makespan if run.step_seconds is None or not row["measured"] else run.step_seconds
    if run.bubble is not None and row["measured"]:
        row["bubble"] = run.bubble
    row["utilization"] = 1.0 - row["bubble"]
    if row["measured"] and row["step_seconds"]:
        row["error"] = row["predicted_seconds"] / row["step_seconds"] - 1.0
    return row


_KEYS = (
    *("run", "problem", "schedule", "partition", "balance", "num_ranks", "num_stages", "num_microbatches", "steps"),
    *("num_steps", "measured", "step_seconds", "relative", "predicted_seconds", "error", "parts", "parts_step"),
    *("utilization", "bubble", "ideal_bubble", "imbalance", "peak_bytes", "memory_limit", "headline"),
)


def _schedule_name(trace: Trace) -> str:
    return trace.schedule or getattr(trace.plan.generator, "__name__", "") or "an order of its own"


def _predicted_peaks(plan: Plan) -> list[int]:
    peaks = [0] * plan.num_ranks
    for rank, num_bytes in zip(plan.schedule.stage_to_rank, stage_memory_bytes(plan), strict=True):
        peaks[rank] += num_bytes
    return peaks
