"""One clock for the spans of all ranks: the arithmetic, and a rank whose clock really shows something else."""

import json
import math
import subprocess
import sys
from time import perf_counter

import pytest
import torch
import torch.nn.functional as F
from accounts import assert_accounted
from hypothesis import given
from hypothesis import strategies as st
from layers import momentum
from torch import nn
from unsplit import check_equal

from modelpar.capture.objective import Objective
from modelpar.planning.timeline import COMPUTE, Span, Timeline
from modelpar.run.clocks import Clocks, read_clock
from modelpar.run.offset import DRIFT, Offset, RoundTrip, estimate, interpolate
from modelpar.run.pipeline import Pipeline
from modelpar.run.workers import Workers

AHEAD = 1000
"""Seconds, by which the clock of one rank is ahead below."""
EXACT = 1e-8
"""What floating point may add, in seconds, to times of up to some 10^6."""


class Drifting:
    """A rank's clock: ahead by `base` seconds, and by a drift that turns and never exceeds DRIFT."""

    def __init__(self, base: float, period: float, phase: float):
        self._base, self._period, self._phase = base, period, phase

    def ahead(self, at: float) -> float:
        """Returns by how much it is ahead when it shows `at`."""
        return self._base + DRIFT * self._period * math.sin(at / self._period + self._phase)

    def trip(self, at: float, there: float, back: float) -> RoundTrip:
        """Returns a round trip that reaches the rank when its clock shows `at`."""
        now = at - self.ahead(at)
        return RoundTrip(now - there, at, now + back)


delays = st.floats(0, 1e-6) | st.floats(0, 0.01)
clocks = st.builds(Drifting, st.floats(-1e6, 1e6), st.floats(0.1, 10), st.floats(0, 7))
bursts = st.lists(st.tuples(st.floats(0, 0.1), delays, delays), min_size=1, max_size=4)


def burst(clock: Drifting, start: float, trips: list[tuple[float, float, float]]) -> Offset:
    return estimate([clock.trip(start + later, there, back) for later, there, back in trips])


@given(clocks, bursts)
def test_the_true_offset_is_within_the_error(clock: Drifting, trips: list[tuple[float, float, float]]) -> None:
    found = burst(clock, 5.0, trips)
    assert abs(found.seconds - clock.ahead(found.at)) <= found.error + EXACT
    quickest = min(there + back for _, there, back in trips)
    assert found.error <= quickest / 2 + EXACT


@given(clocks, st.lists(bursts, min_size=1, max_size=4), st.floats(0, 10), st.floats(-20, 60))
def test_so_it_is_between_comparisons_and_outside(
    clock: Drifting, comparisons: list[list[tuple[float, float, float]]], apart: float, at: float
) -> None:
    known = [burst(clock, i * (apart + 0.2), trips) for i, trips in enumerate(comparisons)]
    found = interpolate(known, at)
    assert found.at == at
    assert abs(found.seconds - clock.ahead(at)) <= found.error + EXACT


def test_trips_that_are_slow_in_different_ways_together_say_more() -> None:
    there, back = RoundTrip(9.0, 110.0, 10.0), RoundTrip(20.0, 120.0, 21.1)  # offsets 100 … 101 and 98.9 … 100
    half = 10 * DRIFT / 2  # for the ten seconds between them
    assert estimate([there, back]) == Offset(110.0, pytest.approx(100 + half), pytest.approx(half))


def test_where_trips_contradict_each_other_the_quickest_counts() -> None:
    assert estimate([RoundTrip(0, 100, 2), RoundTrip(2, 300, 3)]) == Offset(300, 297.5, 0.5)


def test_the_line_between_two_comparisons() -> None:
    known = [Offset(100, 50, 0.1), Offset(104, 52, 0.3)]
    assert interpolate(known, 101) == Offset(101, 50.5, pytest.approx(0.15 + 2 * DRIFT * 1 * 3 / 4))
    assert interpolate(known, 98) == Offset(98, 50, 0.1 + 2 * DRIFT)
    assert interpolate(known, 107) == Offset(107, 52, 0.3 + 3 * DRIFT)


def test_a_rank_with_the_same_clock_is_asked_once_and_not_shifted() -> None:
    asked, spans = [], [Span(0, "F", 1.0, 2.0)]

    def read(rank: int) -> tuple[str, float]:
        asked.append(rank)
        return read_clock()

    shared = Clocks(2)
    for _ in range(3):
        shared.compare(read)
    assert asked == [0, 1]
    assert shared.shift(spans) == (spans, 0.0)


@pytest.mark.parametrize("name", [read_clock()[0], "another boot"])
def test_a_rank_whose_clock_has_the_same_name_but_shows_something_else_is_shifted(name: str) -> None:
    ahead = AHEAD if name == read_clock()[0] else 0  # and one that happens to show the same under another name
    other = Clocks(2)
    other.compare(lambda rank: (name, read_clock()[1] + ahead) if rank else read_clock())
    now = read_clock()[1]
    (first, second), error = other.shift([Span(0, "F", now, now + 1), Span(1, "F", now + ahead, now + ahead + 1)])
    assert first == Span(0, "F", now, now + 1)
    assert 0 < error < 1
    assert abs(second.start - now) <= error
    assert abs(second.end - now - 1) <= error


def test_times_of_clocks_without_error_are_read_from_old_files() -> None:
    timeline = Timeline.of(1, [Span(0, "F", 3.0, 4.0)], clock_error=0.25)
    written = json.loads(json.dumps(timeline.to_json()))
    assert Timeline.from_json(written) == timeline
    del written["clock_error"]
    assert Timeline.from_json(written).clock_error == 0


def ahead(*words: str) -> list[str]:
    """Returns a command that runs another in a time namespace of its own."""
    return ["unshare", "--time", "--monotonic", str(AHEAD), *words]


def why_not() -> str:
    """Says why no process can be given another clock here; empty where one can."""
    try:
        done = subprocess.run(
            ahead(sys.executable, "-c", "import time; print(time.perf_counter())"), capture_output=True, text=True
        )
    except OSError as error:
        return f"unshare: {error}"
    if done.returncode:
        return done.stderr.strip() or f"unshare ended with {done.returncode}"
    # until Linux 6.3 only children of the process enter the namespace
    return "" if float(done.stdout) - read_clock()[1] > AHEAD / 2 else "unshare leaves the clock as it is"


@pytest.fixture
def a_rank_ahead(shared_workers, tmp_path, monkeypatch):
    """Starts workers of which one, whichever comes first, has a clock that is ahead; compares clocks at every step."""
    if reason := why_not():
        pytest.skip(f"needs a process with another clock: {reason}")
    shared_workers["rpc"].close()  # one group of processes at a time
    script, python = tmp_path / "python", f'{sys.executable} "$@"'
    script.write_text(f'#!/bin/sh\nmkdir "$0.taken" 2>&- && exec {" ".join(ahead(python))}\nexec {python}\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr("modelpar.run.clocks._EVERY_SECONDS", 0.0)
    with Workers(2) as workers:
        yield workers


def test_a_rank_in_a_time_namespace_trains_and_is_shown_on_the_clock_of_the_others(a_rank_ahead):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 3))
    batches = [(torch.randn(16, 64), torch.randint(3, (16,))) for _ in range(3)]
    plan = check_equal(a_rank_ahead, model, F.cross_entropy, batches)
    objective = Objective(model, F.cross_entropy)
    with Pipeline(objective, plan, workers=a_rank_ahead, optimizer=momentum) as pipeline:
        for batch in batches:
            start = perf_counter()
            timeline = pipeline.step(batch).timeline
            took = perf_counter() - start
            assert 0 < timeline.clock_error < 1
            assert timeline.makespan <= took + 2 * timeline.clock_error
            assert_accounted(timeline)
            assert_causal(timeline)
    ((_, known),) = a_rank_ahead._clocks._offsets.items()  # the other has our clock
    assert len(known) > 3
    for offset in known:
        assert abs(offset.seconds - AHEAD) <= offset.error


def assert_causal(timeline: Timeline) -> None:
    """Checks that no stage computes with what has not been computed yet, up to the error of both its clocks."""
    spans = {(span.kind, span.stage, span.microbatch): span for span in timeline.spans if span.kind in COMPUTE}
    assert len(spans) == 2 * 2 * 4
    for (kind, stage, microbatch), span in spans.items():
        before = spans.get((kind, stage - 1 if kind == "F" else stage + 1, microbatch))
        assert before is None or before.end <= span.start + 2 * timeline.clock_error
