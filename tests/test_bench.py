"""scripts/bench: its statistics, what counts as a disturbed round, and one section for real."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from modelpar.planning.timeline import Span, Timeline

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.append(str(SCRIPTS))

from benchmarks import actions, load, recording, stats  # noqa: E402
from benchmarks.hosts import Host, HostError  # noqa: E402
from benchmarks.markdown import table  # noqa: E402
from benchmarks.rounds import QUIET, Round, interleave, keep_quiet  # noqa: E402


def test_a_summary_is_the_median_with_its_quartiles():
    assert stats.summarize([5, 1, 4, 2, 3]) == stats.Summary(3, 2, 4, 5)
    assert stats.summarize([1.0, 2.0]) == stats.Summary(1.5, 1.25, 1.75, 2)
    assert stats.summarize([]) is None


def test_a_summary_is_written_with_as_many_digits_as_asked_for():
    assert stats.text(stats.summarize([0.001, 0.002, 0.004]), digits=1, scale=1e3) == "2.0 (1.5–3.0)"
    assert stats.text(stats.summarize([0.5])) == "0.50"
    assert stats.text(None) == "–"


def test_the_first_step_of_a_turn_only_starts_the_clock():
    assert stats.step_seconds([10.0, 11.0, 14.0]) == 2.0


def test_the_ideal_step_counts_only_what_was_computed_while_all_ranks_did():
    """
    ::

        time    0 1 2 3 4 5 6 7 8 9
        rank 0  F F1F1      B0B0B0B1U        F0 and B1 run alone, and faster
        rank 1    F0F0F1B0B0B0B1B1B1U

    """
    spans = [
        *(Span(0, "F", 0, 1, 0, 0), Span(0, "F", 1, 3, 0, 1), Span(0, "B", 6, 9, 0, 0), Span(0, "B", 9, 10, 0, 1)),
        *(Span(1, "F", 1, 3, 1, 0), Span(1, "F", 3, 4, 1, 1), Span(1, "B", 4, 6, 1, 0), Span(1, "B", 6, 9, 1, 1)),
        *(Span(0, "optimizer", 10, 10.5), Span(1, "optimizer", 9, 9.25)),
    ]
    work = 2 * (2 + 3) + 0.5
    assert stats.ideal_seconds([Timeline.of(2, spans)], num_microbatches=2) == pytest.approx(work * 3 / 2)


def test_there_is_no_ideal_step_where_ranks_never_computed_together():
    spans = [Span(0, "F", 0, 1, 0, 0), Span(1, "F", 1, 2, 1, 0), Span(1, "B", 2, 3, 1, 0), Span(0, "B", 3, 4, 0, 0)]
    assert stats.ideal_seconds([Timeline.of(2, spans)], num_microbatches=1) is None


def test_the_parts_of_a_step_add_up_to_it():
    spans = [
        Span(0, "F", 0, 2),
        Span(0, "send", 2, 3),
        Span(1, "wait", 0, 4),
        Span(1, "B", 4, 6),
        Span(1, "reduce", 6, 8),
    ]
    found = actions.parts(Timeline.of(2, spans))
    assert found == {"compute": 2, "send": 0.5, "hand-off": 2, "end": 1, "bookkeeping": 2.5}
    assert sum(found.values()) == 8


def test_recording_is_measured_with_what_records():
    timeline = Timeline.of(2, [Span(0, "F", 0, 2), Span(0, "B", 3, 4), Span(1, "F", 1, 4)])
    assert recording.idle_shares(timeline) == [0.25, 0.25]
    assert recording.sending_seconds(timeline) > 0
    assert recording.shift_seconds(timeline) > 0
    assert recording.event_seconds() > 0


def test_foreign_load_is_what_the_machine_did_and_we_did_not():
    before = load.Mark(wall=10.0, machine=100.0, own=5.0)
    after = load.Mark(wall=12.0, machine=103.5, own=6.5)
    assert load.foreign_load(before, after) == pytest.approx(1.0)
    assert load.foreign_load(before, load.Mark(11.0, 100.5, 6.0)) == 0.0  # clocks that tick at different times
    assert load.foreign_load(None, after) is None


def test_what_children_used_before_they_ended_counts_as_ours():
    before = load.mark()
    subprocess.run([sys.executable, "-c", "while __import__('time').process_time() < 0.3: pass"], check=True)
    assert load.mark().own - before.own >= 0.25


def test_disturbed_rounds_are_dropped():
    rounds = [Round({"a": value}, foreign) for value, foreign in [(1.0, 0.0), (9.0, QUIET + 0.1), (2.0, None)]]
    kept = keep_quiet(rounds, count=3)
    assert (kept.kept, kept.dropped, kept.disturbed) == ([rounds[0], rounds[2]], 1, False)
    assert kept.summary(lambda values: values["a"]) == stats.Summary(1.5, 1.25, 1.75, 2)
    assert kept.note == "2, 1 dropped, others 0.00 cores"


def test_rounds_that_are_nearly_all_disturbed_count_and_are_marked():
    rounds = [Round({"a": 1.0}, 1.5), Round({"a": 2.0}, 0.0), Round({"a": 3.0}, 1.1)]
    kept = keep_quiet(rounds, count=3)
    assert (kept.kept, kept.dropped, kept.disturbed) == (rounds, 0, True)
    assert kept.note == "3, all kept: **disturbed**, others 1.10 cores"


def test_every_contender_has_one_turn_per_round_in_an_order_that_changes():
    turns = []
    contenders = {name: partial(turns.append, name) for name in "abcd"}
    found = interleave(contenders, count=8)
    orders = ["".join(turns[i : i + 4]) for i in range(0, len(turns), 4)]
    assert {"".join(sorted(order)) for order in orders} == {"abcd"}
    assert len(set(orders)) > 1
    assert 8 <= len(found.kept) + found.dropped == len(orders) <= 12


def test_no_further_round_begins_after_the_time_is_up():
    assert len(interleave({"a": lambda: 1.0}, count=100, most_seconds=0.0).kept) == 0


def test_a_table_aligns_numbers_to_the_right():
    assert table(["what", "ms"], [["a", "1.5"], ["b", "–"]]).splitlines()[1] == "| --- | ---: |"


def test_a_host_does_calls_in_a_process_of_its_own_and_reports_failures(tmp_path):
    file = tmp_path / "text"
    file.write_text("hello")
    with Host(partial(open, file)) as host:
        assert host.pid in load.tree(host.pid)
        assert host.call("read") == "hello"
        with pytest.raises(HostError, match="no attribute 'nothing'"):
            host.call("nothing")
    assert not Path(f"/proc/{host.pid}").exists()


def test_a_section_runs(tmp_path):
    output = tmp_path / "report.md"
    command = [sys.executable, str(SCRIPTS / "bench.py"), "--quick", "--rounds", "2", "--only", "actions"]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = output.read_text()
    assert re.search(r"^\* `scripts/bench --quick --rounds 2 --only actions", text, re.MULTILINE)
    rows = re.findall(r"^\| ((?:rpc|threads|torch) \S+) \| (\d+)", text, re.MULTILINE)
    assert [name for name, _ in rows] == [
        f"{name} {schedule}" for name in ("rpc", "threads", "torch") for schedule in ("gpipe", "1f1b")
    ]
    assert all(10 < int(step) < 1_000_000 for _, step in rows)
