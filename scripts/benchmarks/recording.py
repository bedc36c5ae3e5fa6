"""What recording costs: the time of one event, in a tight loop, times the events of a step."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from time import perf_counter
from timeit import repeat

import torch

from benchmarks import stats, tasks
from benchmarks.contenders import Lap, Modelpar
from benchmarks.hosts import Host
from benchmarks.markdown import table
from benchmarks.options import Options
from modelpar.planning.analysis import analyse
from modelpar.planning.plan import Plan
from modelpar.planning.schedule import Action, Op
from modelpar.planning.simulate import predict
from modelpar.planning.timeline import Span, Timeline
from modelpar.report.tensorboard.writer import RunWriter
from modelpar.run import wire
from modelpar.run.clocks import Clocks
from modelpar.run.exchange import Exchange
from modelpar.run.transport import Mailbox, ThreadTransport

_LOOPS = 20_000
NUM_RANKS = 2
NUM_MICROBATCHES = 8

TEXT = f"""\
A wall clock cannot tell so little from noise, so: (seconds of one event, in a tight loop) × (events in a step) ÷ step
time; {NUM_RANKS} stages over RPC, 1F1B, m = {NUM_MICROBATCHES}. *Recording* is reading the clock twice and noting a
span, on the rank with the most spans. *Sending* is pickling the spans of a rank and, in the controller, unpickling
those of all. *Tracing* is writing one step's timeline for TensorBoard, which the controller does for one step in
`training.trace_every`; the share is of that one step. *In no span* is what the timeline cannot say, of the rank with
the most of it, a median over steps."""


def run(options: Options) -> str:
    """Measures all; returns a table."""
    options.say("cost of recording")
    event = event_seconds()
    rows, shifts = [], []
    with Host(partial(Modelpar, "rpc", NUM_RANKS)) as host:
        for model in ("mlp",) if options.quick else tasks.MODELS:
            task = tasks.MODELS[model](NUM_MICROBATCHES)
            plan = tasks.plans(task, NUM_RANKS, NUM_MICROBATCHES)["1f1b"]
            host.call("load", model, task, plan)
            lap: Lap = host.call("steps", model, 10)
            step, last = stats.step_seconds(lap.ends), lap.timelines[-1]
            spans = max(len(last.of_rank(rank)) for rank in range(NUM_RANKS))
            sending = sending_seconds(last)
            tracing = trace_seconds(plan, lap.timelines)
            shifts.append(shift_seconds(last))
            rows.append(
                [
                    model,
                    f"{step * 1e3:.0f} ms",
                    str(spans),
                    f"{event * 1e6:.2f} µs each, {100 * event * spans / step:.3f} %",
                    f"{sending * 1e6:.0f} µs, {100 * sending / step:.3f} %",
                    f"{1e3 * tracing:.1f} ms, {100 * tracing / step:.1f} %",
                    f"{100 * median(max(idle_shares(timeline)) for timeline in lap.timelines):.1f} %",
                ]
            )
    head = ["model", "step", "spans of a rank", "recording", "sending", "tracing", "in no span"]
    note = f"Putting a span on another clock, which only ranks of other hosts need, takes {min(shifts) * 1e6:.1f} µs."
    return f"{TEXT}\n\n{table(head, rows)}\n\n{note}"


def event_seconds() -> float:
    """Returns the seconds that recording one span takes."""
    mailbox, action = Mailbox(), Action(0, Op.FORWARD, 1)
    exchange = Exchange(0, (0,), mailbox, ThreadTransport([mailbox], mailbox), torch.device("cpu"))
    return _seconds(lambda: exchange.note("F", perf_counter(), action))


def sending_seconds(timeline: Timeline) -> float:
    """Returns the seconds that the spans of a step take on their way: the longest pickling, and all unpickling."""
    spans = [timeline.of_rank(rank) for rank in range(timeline.num_ranks)]
    messages = [wire.dumps(of_rank) for of_rank in spans]
    packing = max(_seconds(partial(wire.dumps, of_rank), 200) for of_rank in spans)
    return packing + sum(_seconds(partial(wire.loads, *message), 200) for message in messages)


def shift_seconds(timeline: Timeline) -> float:
    """Returns the seconds that putting one span on another clock takes."""
    clocks = Clocks(1)
    clocks.compare(lambda rank: ("another clock", perf_counter()))
    spans: Sequence[Span] = timeline.of_rank(0)
    return _seconds(lambda: clocks.shift(spans), 200) / len(spans)


def trace_seconds(plan: Plan, timelines: Sequence[Timeline]) -> float:
    """Returns the seconds that writing a step's timeline for TensorBoard takes, as a picture and as data."""
    expected, seconds = predict(plan), []
    with tempfile.TemporaryDirectory() as folder, RunWriter(folder, plan) as writer:
        for number, timeline in enumerate(timelines):
            start = perf_counter()
            writer.timeline(number, timeline, expected)
            writer.trace(number, timeline)
            seconds.append(perf_counter() - start)
    return median(seconds)


def idle_shares(timeline: Timeline) -> list[float]:
    """Returns, per rank, the share of a step that is covered by no span."""
    return [rank.idle / timeline.makespan for rank in analyse(timeline).ranks]


def _seconds(call: Callable[[], object], loops: int = _LOOPS) -> float:
    """Returns the seconds that a call takes, the least of five loops: others can only slow it down."""
    return min(repeat(call, number=loops, repeat=5)) / loops
