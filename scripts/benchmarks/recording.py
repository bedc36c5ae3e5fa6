"""What recording costs: the time of one event, in a tight loop, times the events of a step."""

from __future__ import annotations

import tempfile
from functools import partial
from statistics import median
from time import perf_counter
from timeit import repeat

from benchmarks import stats, tasks
from benchmarks.contenders import Lap, Modelpar
from benchmarks.hosts import Host
from benchmarks.markdown import table
from benchmarks.options import Options
from modelpar.planning.simulate import predict
from modelpar.planning.timeline import Span
from modelpar.report.tensorboard.writer import RunWriter

_LOOPS = 20_000
NUM_RANKS = 2
NUM_MICROBATCHES = 8

TEXT = f"""\
A wall clock cannot tell so little from noise, so: (seconds of one event, in a tight loop) × (events of one rank in a
step) ÷ step time; {NUM_RANKS} stages over RPC, 1F1B, m = {NUM_MICROBATCHES}. An event is reading the clock twice and
appending a Span. Tracing is writing one step's timeline for TensorBoard, which the controller does for one step in
`training.trace_every`; the share is of that one step."""


def run(options: Options) -> str:
    """Measures the two; returns a table."""
    options.say("cost of recording")
    event = event_seconds()
    rows = []
    with Host(partial(Modelpar, "rpc", NUM_RANKS)) as host:
        for model in ("mlp",) if options.quick else tasks.MODELS:
            task = tasks.MODELS[model](NUM_MICROBATCHES)
            plan = tasks.plans(task, NUM_RANKS, NUM_MICROBATCHES)["1f1b"]
            host.call("load", model, task, plan)
            lap: Lap = host.call("steps", model, 10)
            step = stats.step_seconds(lap.ends)
            spans = max(len(lap.timelines[-1].of_rank(rank)) for rank in range(NUM_RANKS))
            with tempfile.TemporaryDirectory() as folder, RunWriter(folder, plan) as writer:
                trace = []
                expected = predict(plan)
                for number, timeline in enumerate(lap.timelines):
                    start = perf_counter()
                    writer.timeline(number, timeline, expected)
                    trace.append(perf_counter() - start)
            recorded = f"{100 * event * spans / step:.3f} %"
            traced = f"{1e3 * median(trace):.1f} ms, {100 * median(trace) / step:.1f} %"
            rows.append([model, f"{step * 1e3:.0f} ms", f"{event * 1e6:.2f} µs", str(spans), recorded, traced])
    return f"{TEXT}\n\n{table(['model', 'step', 'one event', 'events', 'recording', 'tracing'], rows)}"


def event_seconds() -> float:
    """Returns the seconds that recording one span takes, the least of five loops: others can only slow it down."""
    spans: list[Span] = []

    def record() -> None:
        start = perf_counter()
        spans.append(Span(0, "F", start, perf_counter(), 0, 1))

    return min(repeat(record, number=_LOOPS, repeat=5)) / _LOOPS
