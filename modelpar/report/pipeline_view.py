"""What the Pipeline view shows, as JSON: RUNS and TRACE. All arithmetic is done here; JavaScript only draws.

The page is started with `startPipelineView(element, source)` of static/pipeline.js. `source` has three functions:
`runs()` gives a promise of RUNS, `trace(run, step)` one of TRACE, and `download(run, step)` a URL of the step's Chrome
trace, or null. In TensorBoard they fetch from the plugin, in an HTML report the same JSON is in the page. Times are
seconds from the start of the step, sizes bytes, shares 0 … 1; null is "not known". ::

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
    TRACE = {
      "run": …, "step": 99, "makespan": 0.171, "predicted_makespan": 0.174, "measured": true,
      "headline": "…", "sentences": ["…", …],
      "clock_error": 0.0,                               seconds by which the clocks of hosts may be off
      "ranks": [{
        "rank": 0, "name": "stage 0" | "rank 0", "stages": [0], "device": "cpu",
        "spans": [SPAN, …], "predicted": [SPAN, …],     in order of start; "predicted" is empty where "spans" are it
        "memory": [[seconds, bytes], …],                bytes from that time on: counted, not measured
        "predicted_memory": …, "memory_limit": null | bytes, "peak_bytes": null | measured,
        "utilization": 0.81,
        "fill": s, "stall": s, "drain": s               waits and idle time before, between and after computing
      }, …],
      "arrows": [[from_rank, from_span, to_rank, to_span], …],   positions in "spans": what sent a value, what used it
      "predicted_arrows": …,                            the same for "predicted"
      "critical": [[rank, span], …],                    the critical path, in order of time
      "stages": [{"stage": 0, "rank": 0, "layers": ["embed", "h0"], "parameters": 1400000,
                  "forward_seconds": mean, "backward_seconds": mean, "predicted_forward_seconds": …,
                  "predicted_backward_seconds": …, "waits": {"value h2 from stage 0": s, …},
                  "critical_share": 0.62, "peak_bytes": null | of its rank, where that holds no other stage}, …],
      "looks": {"F": {"name": "forward", "letter": "F", "colour": "#9ccbf0", "ink": "#0b2239"}, …}
    }
    SPAN = [look, start, end, stage, microbatch, cause]   look is a key of "looks"; −1, −1 and "" where there is none
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from modelpar.errors import ModelparError, PlanError
from modelpar.planning.analysis import analyse, without_microbatch
from modelpar.planning.breakdown import breakdown
from modelpar.planning.cluster import Cluster
from modelpar.planning.explain import Explanation, explain
from modelpar.planning.flow import Flow, flow
from modelpar.planning.memory import memory_curves, stage_memory_bytes
from modelpar.planning.plan import Plan
from modelpar.planning.simulate import StageCost, predict, simulate, stage_costs
from modelpar.planning.timeline import COMPUTE, Span, Timeline
from modelpar.report.explanation import headline, sentences
from modelpar.report.palette import LOOKS, look, look_key
from modelpar.report.runs import Run
from modelpar.report.tensorboard.names import rank_names
from modelpar.report.text import stage_parameters
from modelpar.report.trace import Trace, decode

FORMAT = 1

_NOT_WHOLE = "a step with fewer micro-batches than planned"

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
    found = _explain(traces)
    explained = [trace for trace in traces if found and trace.timeline.makespan == found.makespan]
    trace = explained[0] if explained else traces[-1]
    plan, timeline = trace.plan, trace.timeline
    parts = found.breakdown if found else breakdown(_flow(trace, timeline))
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
        "headline": headline(found) if found else _NOT_WHOLE,
    }


def trace_json(run: str, trace: Trace) -> Json:
    """Returns TRACE."""
    plan, timeline = trace.plan, trace.timeline
    predicted = predict(plan)
    flowed = _flow(trace, timeline)
    shown = predicted if trace.measured else Timeline(plan.num_ranks, ())
    found = _explain([trace])
    names, places = rank_names(plan), _places(timeline)
    memory, predicted_memory = memory_curves(plan, timeline), memory_curves(plan, shown)
    ranks = []
    for rank in range(plan.num_ranks):
        spans = timeline.of_rank(rank)
        fill, stall, drain = waiting(spans, timeline.makespan)
        ranks.append(
            {
                "rank": rank,
                "name": names[rank],
                "stages": _stages_of(plan, rank),
                "device": plan.cluster.devices[rank],
                "spans": [_span(span) for span in spans],
                "predicted": [_span(span) for span in shown.of_rank(rank)],
                "memory": [[round(seconds, 9), held] for seconds, held in memory[rank]],
                "predicted_memory": [[round(seconds, 9), held] for seconds, held in predicted_memory[rank]],
                "memory_limit": plan.cluster.memory_of(rank),
                "peak_bytes": trace.peak_bytes[rank] if rank < len(trace.peak_bytes) else None,
                "utilization": timeline.utilization(rank),
                "fill": fill,
                "stall": stall,
                "drain": drain,
            }
        )
    return {
        "run": run,
        "step": trace.step,
        "makespan": timeline.makespan,
        "predicted_makespan": predicted.makespan,
        "measured": trace.measured,
        "headline": headline(found) if found else _NOT_WHOLE,
        "sentences": list(sentences(found)) if found else [],
        "clock_error": getattr(timeline, "clock_error", 0.0),
        "ranks": ranks,
        "arrows": _arrows(flowed, places),
        "predicted_arrows": _arrows(_flow(trace, shown), _places(shown)),
        "critical": [list(places[i]) for i in flowed.critical],
        "stages": _stages(trace, predicted, flowed),
        "looks": _looks((*timeline.spans, *shown.spans)),
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


def waiting(spans: Sequence[Span], makespan: float) -> tuple[float, float, float]:
    """Returns the seconds a rank spent in waits and in no span: before its first computation, between, after its last.

    They add up to what `analyse` calls wait and idle.
    """
    computing = [(span.start, span.end) for span in spans if span.kind in COMPUTE]
    begin, end = (computing[0][0], computing[-1][1]) if computing else (makespan, makespan)
    found, covered = [0.0, 0.0, 0.0], 0.0
    ends = Span(0, "", makespan, makespan)
    for span in (*spans, ends):
        idle, wait = (covered, span.start), (span.start, span.end) if span.kind == "wait" else (0.0, 0.0)
        for start, stop in (idle, wait):
            found[0 if start < begin else 2 if start >= end else 1] += max(0.0, stop - start)
        covered = max(covered, span.end)
    return found[0], found[1], found[2]


def _run(run: Run, facts: Callable[[tuple[bytes, ...]], Json]) -> Json:
    row: Json = dict.fromkeys(_KEYS) | {"run": run.name, "problem": run.problem, "num_steps": run.num_steps}
    if run.problem:
        return row
    if not run.blobs:
        return row | {"problem": "its traces are gone: it was written anew meanwhile"}
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


def _explain(traces: Sequence[Trace]) -> Explanation | None:
    """Explains traces of one run; None where none is of a whole step, as that of a batch with few samples."""
    try:
        return explain(traces[-1].plan, [trace.timeline for trace in traces])
    except PlanError:
        return None


def _schedule_name(trace: Trace) -> str:
    return trace.schedule or getattr(trace.plan.generator, "__name__", "") or "an order of its own"


def _predicted_peaks(plan: Plan) -> list[int]:
    peaks = [0] * plan.num_ranks
    for rank, num_bytes in zip(plan.schedule.stage_to_rank, stage_memory_bytes(plan), strict=True):
        peaks[rank] += num_bytes
    return peaks


def _stages_of(plan: Plan, rank: int) -> list[int]:
    return [stage for stage, home in enumerate(plan.schedule.stage_to_rank) if home == rank]


def _flow(trace: Trace, timeline: Timeline) -> Flow:
    return flow(timeline, trace.plan.stage_graph, trace.plan.schedule.stage_to_rank)


def _places(timeline: Timeline) -> list[tuple[int, int]]:
    """Returns per span its rank, and its position among that rank's spans."""
    places, seen = [], [0] * timeline.num_ranks
    for span in timeline.spans:
        places.append((span.rank, seen[span.rank]))
        seen[span.rank] += 1
    return places


def _arrows(flowed: Flow, places: Sequence[tuple[int, int]]) -> list[list[int]]:
    return [[*places[arrow.source], *places[arrow.target]] for arrow in flowed.arrows]


def _span(span: Span) -> list[Any]:
    return [look_key(span), round(span.start, 9), round(span.end, 9), span.stage, span.microbatch, span.cause]


def _looks(spans: Sequence[Span]) -> Json:
    keys = dict.fromkeys((*LOOKS, *(look_key(span) for span in spans)))
    looks = {key: look(key) for key in keys}
    return {
        key: {"name": each.name, "letter": each.letter, "colour": each.colour, "ink": each.ink}
        for key, each in looks.items()
    }


def _stages(trace: Trace, predicted: Timeline, flowed: Flow) -> list[Json]:
    plan = trace.plan
    parameters, waits = stage_parameters(plan), _waits(trace)
    times, predicted_times = _mean_seconds(trace.timeline), _mean_seconds(predicted)
    rows = []
    for stage, rank in enumerate(plan.schedule.stage_to_rank):
        alone = len(_stages_of(plan, rank)) == 1 and rank < len(trace.peak_bytes)
        rows.append(
            {
                "stage": stage,
                "rank": rank,
                "layers": [plan.graph.layers[i].name for i in plan.partition.layers(stage)],
                "parameters": parameters[stage],
                "forward_seconds": times.get((stage, True)),
                "backward_seconds": times.get((stage, False)),
                "predicted_forward_seconds": predicted_times.get((stage, True)),
                "predicted_backward_seconds": predicted_times.get((stage, False)),
                "waits": waits[stage],
                "critical_share": flowed.critical_share(stage),
                "peak_bytes": trace.peak_bytes[rank] if alone else None,
            }
        )
    return rows


def _mean_seconds(timeline: Timeline) -> dict[tuple[int, bool], float]:
    """Returns per stage, for forward (True) and backward (False), the mean seconds for one micro-batch."""
    seconds: defaultdict[tuple[int, bool], defaultdict[int, float]] = defaultdict(lambda: defaultdict(float))
    for span in timeline.spans:
        if span.kind in COMPUTE:
            seconds[span.stage, span.kind == "F"][span.microbatch] += span.seconds
    return {key: fmean(of_microbatch.values()) for key, of_microbatch in seconds.items()}


def _waits(trace: Trace) -> list[dict[str, float]]:
    """Returns per stage the seconds by what was waited for, longest first; the first stage of a rank has its ends."""
    found: list[defaultdict[str, float]] = [defaultdict(float) for _ in range(trace.plan.num_stages)]
    for span in trace.timeline.spans:
        if span.kind == "wait":
            stage = span.stage if span.stage >= 0 else _stages_of(trace.plan, span.rank)[0]
            found[stage][without_microbatch(span.cause)] += span.seconds
    return [dict(sorted(each.items(), key=lambda item: -item[1])) for each in found]
