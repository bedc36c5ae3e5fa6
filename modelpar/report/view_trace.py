"""One traced step as the Pipeline view shows it, as JSON: TRACE.

Units and what null means are as in view_runs.py. ::

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
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from modelpar.errors import PlanError
from modelpar.planning.analysis import without_microbatch
from modelpar.planning.explain import Explanation, explain
from modelpar.planning.flow import Flow, flow
from modelpar.planning.memory import memory_curves
from modelpar.planning.plan import Plan
from modelpar.planning.simulate import predict
from modelpar.planning.steadiness import StepTime
from modelpar.planning.timeline import COMPUTE, Span, Timeline
from modelpar.report import explanation
from modelpar.report.chrome import chrome_trace
from modelpar.report.palette import LOOKS, look, look_key
from modelpar.report.tensorboard.names import rank_names
from modelpar.report.text import stage_parameters
from modelpar.report.trace import Trace

Json = dict[str, Any]


def trace_json(run: str, trace: Trace, steps: Sequence[StepTime] = ()) -> Json:
    """Returns TRACE; `steps` are the settled ones of the run, for what can be said of them together."""
    plan, timeline = trace.plan, trace.timeline
    predicted = predict(plan)
    flowed = flow_of(trace, timeline)
    shown = predicted if trace.measured else Timeline(plan.num_ranks, ())
    headline, said = said_of(explained([trace], steps))
    names, places = rank_names(plan), _places(timeline)
    memory = [_curve(curve) for curve in memory_curves(plan, timeline)]
    predicted_memory = [_curve(curve) for curve in memory_curves(plan, shown)] if shown.spans else [[]] * plan.num_ranks
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
                "memory": memory[rank],
                "predicted_memory": predicted_memory[rank],
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
        "headline": headline,
        "sentences": list(said),
        "clock_error": timeline.clock_error,
        "ranks": ranks,
        "arrows": _arrows(flowed, places),
        "predicted_arrows": _arrows(flow_of(trace, shown), _places(shown)),
        "critical": [list(places[i]) for i in flowed.critical],
        "stages": _stages(trace, predicted, flowed),
        "looks": _looks((*timeline.spans, *shown.spans)),
    }


def chrome_json(trace: Trace) -> Json:
    """Returns a trace for Perfetto and chrome://tracing, with its prediction and what the ranks hold."""
    plan, timeline = trace.plan, trace.timeline
    predicted = predict(plan) if trace.measured else None
    memory = dict(enumerate(memory_curves(plan, timeline)))
    return chrome_trace(timeline, plan.stage_graph, plan.schedule.stage_to_rank, predicted, memory)


def flow_of(trace: Trace, timeline: Timeline) -> Flow:
    """Returns what waited for what in a timeline of the trace's plan."""
    return flow(timeline, trace.plan.stage_graph, trace.plan.schedule.stage_to_rank)


def explained(traces: Sequence[Trace], steps: Sequence[StepTime] = ()) -> Explanation | None:
    """Explains traces of one run; None where none is of a whole step, as that of a batch with few samples."""
    try:
        return explain(traces[-1].plan, [trace.timeline for trace in traces], steps)
    except PlanError:
        return None


def said_of(found: Explanation | None) -> tuple[str, tuple[str, ...]]:
    """Returns an explanation's headline, and what else there is to say: the changes, then its sentences."""
    if found is None:
        return "a step with fewer micro-batches than planned", ()
    return explanation.headline(found), (*explanation.changes(found), *explanation.sentences(found))


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


def _stages_of(plan: Plan, rank: int) -> list[int]:
    return [stage for stage, home in enumerate(plan.schedule.stage_to_rank) if home == rank]


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


def _curve(points: Sequence[tuple[float, int]]) -> list[list[float]]:
    return [[round(seconds, 9), held] for seconds, held in points]


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
