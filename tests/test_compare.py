"""`modelpar compare`: lists, one table with the best first, its files, and a TensorBoard run per combination."""

import csv
import json
import re
import subprocess
from dataclasses import replace

import pytest
from commands import GPT, MLP, TEXT, THREADS, call, listing
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

import modelpar.compare
from modelpar import Plan
from modelpar.report.comparison import Row, comparison_markdown

QUICK = [*THREADS, "training.batch_size=4", "pipeline.num_microbatches=2", "output.name=all"]
FILES = {"comparison.csv", "comparison.json", "comparison.md", "comparison.png"}
ROUNDS = ["comparison.rounds=2", "comparison.steps=2"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def rows_of(folder):
    return json.loads((folder / "runs" / "all" / "comparison.json").read_text())["rows"]


def table_of(out, count):
    """Returns the first lines of the table, split into words, without its head."""
    lines = out.splitlines()
    [rule] = [number for number, line in enumerate(lines) if set(line) == {"─"}]
    return [line.split() for line in lines[rule + 1 : rule + 1 + count]]


def hparams(events):
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    return plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams


def test_every_combination_is_measured_on_one_set_of_workers(folder, monkeypatch):
    sets, real = [], modelpar.compare.Task.workers

    def workers(task, num_ranks, *others):
        sets.append(num_ranks)
        return real(task, num_ranks, *others)

    monkeypatch.setattr(modelpar.compare.Task, "workers", workers)
    words = [*GPT, *QUICK, *ROUNDS, "partition=uniform,by_flops", "schedule=gpipe,1f1b"]
    outcome = call("compare", *words)
    assert (outcome.code, outcome.err) == (0, "")
    assert sets == [2]
    rows = rows_of(folder)
    pairs = [(row["partition"], row["schedule"]) for row in rows]
    assert sorted(pairs) == [
        (partition, schedule) for partition in ("by_flops", "uniform") for schedule in ("1f1b", "gpipe")
    ]
    measured = [row["measured_step_seconds"] for row in rows]
    assert measured == sorted(measured)
    assert measured[0] > 0
    for row in rows:
        assert row["name"] == f"{row['partition']} {row['schedule']}"
        assert row["error"] == pytest.approx(row["predicted_step_seconds"] / row["measured_step_seconds"] - 1)
        assert sum(row["balance"]) == 4
        assert 0 < row["bottleneck_seconds"] < row["predicted_step_seconds"]
        assert 0 < row["bubble"] < 1
        assert row["peak_bytes"] > 0
    assert [tuple(cells[:2]) for cells in table_of(outcome.out, 4)] == pairs, outcome.out
    assert outcome.out.splitlines()[-1].endswith(" view runs/all")


def test_the_files_and_the_runs_say_the_same(folder):
    assert call("compare", *MLP, *QUICK, *ROUNDS, "partition=uniform,by_flops").code == 0
    runs = {"uniform", "by_flops"}
    assert listing(folder / "runs" / "all") == {*FILES, *runs}
    rows = {row["name"]: row for row in rows_of(folder)}
    with open(folder / "runs" / "all" / "comparison.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == list(rows)
    assert [float(row["predicted_step_seconds"]) for row in table] == [
        r["predicted_step_seconds"] for r in rows.values()
    ]
    markdown = (folder / "runs" / "all" / "comparison.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in markdown[2:]] == list(rows)
    for name in runs:
        run = folder / "runs" / "all" / name
        assert rows[name]["run"] == f"runs/all/{name}"
        assert listing(run) == {"config.yaml", "plan.json", "events"}
        assert list(Plan.load(run / "plan.json").partition.balance) == rows[name]["balance"]
        events = EventAccumulator(str(run)).Reload()
        assert [point.step for point in events.Scalars("step/seconds")] == [0, 1, 2, 3]  # two rounds of two steps
        assert len(events.Images("pipeline/timeline")) == 1
        assert hparams(events)["partition"].string_value == name
        [point] = events.Scalars("result/step_seconds")
        assert point.value == pytest.approx(rows[name]["measured_step_seconds"])


def test_nothing_is_measured_with_measure_0(folder, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)  # no process can be started
    rpc = [word for word in QUICK if not word.startswith("transport")]
    outcome = call("compare", *MLP, *rpc, "measure=0", "partition=uniform,optimal", "schedule=gpipe,1f1b,fill_drain")
    assert outcome.code == 0
    rows = rows_of(folder)
    assert len(rows) == 6
    assert {row["measured_step_seconds"] for row in rows} == {None}
    predicted = [row["predicted_step_seconds"] for row in rows]
    assert predicted == sorted(predicted)
    events = EventAccumulator(str(folder / rows[0]["run"])).Reload()
    assert len(events.Images("pipeline/timeline")) == 1
    assert "result/step_seconds" not in events.Tags()["scalars"]


def test_the_best_predicted_is_measured_with_measure_1(folder):
    words = [*MLP, *QUICK, "comparison.rounds=1", "comparison.steps=1", "measure=1"]
    manual = ["partition=manual", "partition.balance=[1,3],[3,1],[2,2]"]
    assert call("compare", *words, *manual).code == 0
    first, *others = rows_of(folder)
    assert first["measured_step_seconds"] > 0
    assert all(row["measured_step_seconds"] is None for row in others)
    assert all(first["predicted_step_seconds"] <= row["predicted_step_seconds"] for row in others)
    assert {tuple(row["balance"]) for row in (first, *others)} == {(1, 3), (3, 1), (2, 2)}


def test_other_options_vary_too_and_the_table_tells_them_apart(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    words = [*MLP, *QUICK, "comparison.rounds=1", "comparison.steps=1", "pipeline.num_microbatches=2,4"]
    outcome = call("compare", *words, "pipeline.num_ranks=1,3")
    assert outcome.code == 0
    rows = rows_of(folder)
    assert {(row["num_ranks"], row["num_microbatches"]) for row in rows} == {(1, 2), (1, 4), (3, 2), (3, 4)}
    assert {row["name"] for row in rows} >= {"num_microbatches=2 num_ranks=1", "num_microbatches=4 num_ranks=3"}
    assert [int(cells[0]) for cells in table_of(outcome.out, 4)] == [row["num_microbatches"] for row in rows]


def test_rows_that_would_look_alike_get_their_names():
    row = Row("width=32", "optimal", "1f1b", 2, 8, (1, 3), 0.1, 0.2, 0.3)
    other = replace(row, name="width=64", balance=(2, 2))
    head, _, *lines = comparison_markdown([row, other]).splitlines()
    assert head.startswith("| name | partition |")
    assert [line.split("|")[1].strip() for line in lines] == ["width=32", "width=64"]
    head, *_ = comparison_markdown([row, replace(other, schedule="gpipe")]).splitlines()
    assert head.startswith("| partition |")


def test_plans_of_the_same_model_share_a_profile_and_others_do_not(folder):
    profiled = [word for word in QUICK if not word.startswith("pipeline")]
    varied = ["partition=uniform,optimal", "pipeline.num_microbatches=2,4", "pipeline.num_threads=1,2"]
    assert call("compare", *MLP, *profiled, *varied, "measure=0").code == 0
    plans = [Plan.load(folder / row["run"] / "plan.json") for row in rows_of(folder)]
    assert len(plans) == 8
    assert len({json.dumps(plan.profile.to_json()) for plan in plans}) == 4
    for plan in plans:
        profile = plan.profile
        assert (profile.source, profile.num_threads) == ("measured", plan.num_threads)
        assert profile.microbatch_size == 4 // plan.num_microbatches


def test_combinations_that_come_to_the_same_plan_share_their_numbers(folder):
    """Here both partitions are 2-2; another way to add gradients is another run."""
    assert (
        call("compare", *MLP, *QUICK, *ROUNDS, "partition=uniform,by_parameters", "pipeline.tied=fast,exact").code == 0
    )
    rows = rows_of(folder)
    assert len(rows) == 4
    assert {tuple(row["balance"]) for row in rows} == {(2, 2)}
    ways = {(row["name"].split("=")[-1], row["measured_step_seconds"], row["bubble"]) for row in rows}
    assert len(ways) == 2


def test_a_plan_that_several_rows_come_to_is_drawn_once(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    words = [*MLP, *QUICK, "partition=uniform,by_parameters", "schedule=gpipe,1f1b", "measure=1"]
    outcome = call("compare", *words, "comparison.rounds=1", "comparison.steps=1")
    assert (outcome.code, outcome.err) == (0, "")
    drawn = [line for line in outcome.out.splitlines() if " · 2-2 " in line]
    schedules = [line.split()[1] for line in drawn]
    assert sorted(schedules) == ["1f1b", "gpipe"]
    names = [re.split(r"  +", line)[0] for line in drawn]
    assert [set(name.removesuffix(" · 2-2").split(" = ")) for name in names] == [
        {f"uniform {schedule}", f"by_parameters {schedule}"} for schedule in schedules
    ]
    assert "(" in drawn[0]  # measured, with the prediction's error
    assert drawn[1].endswith(" predicted")
    with Image.open(folder / "runs" / "all" / "comparison.png") as picture:
        assert picture.size[0] == 1200


def test_a_narrow_terminal_gets_the_table_alone(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    outcome = call("compare", *MLP, *QUICK, "measure=0", "partition=uniform,optimal")
    assert outcome.code == 0
    assert "╌" not in outcome.out
    assert (folder / "runs" / "all" / "comparison.png").exists()


def test_the_same_combination_twice_is_one(folder):
    assert call("compare", *MLP, *QUICK, "measure=0", "partition=uniform,uniform").code == 0
    assert len(rows_of(folder)) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("-m partition=uniform,optimal", "compare takes lists as they are, partition=uniform,optimal; expected no -m"),
        ("partition=uniform,mpl", "partition=mpl is unknown; expected one of by_flops, by_memory, .*"),
        ("partition=uniform,", "partition=uniform, is malformed; expected key=value"),
        ("partition=[uniform,optimal]", r"partition=\[uniform,optimal\] gives several choices; expected one of .*"),
        ("transport=threads,rpc", "transport has several values; all combinations share one"),
        ("measure=0,1", "measure has several values; all combinations share one"),
        ("measure=-1", "measure is -1; expected how many combinations to run, 0 or more, or null for all"),
        ("measure=some", "measure is 'some'; expected a whole number"),
        ("comparison.rounds=0", "comparison.rounds is 0; expected at least 1"),
        ("comparison.round=1", r"comparison.round is unknown; did you mean comparison.rounds\? expected one of .*"),
        ("schedule=fill_drain,gpipe", "the schedule has no backward; expected one that trains, such as schedule=1f1b"),
        ("optimizer.lr=0.1,-1", "the optimizer or .* cannot be used: Invalid learning rate: -1"),
        ("pipeline.num_ranks=2,99", "99 stages, but the model has .* layers .*; expected at most .*"),
    ],
)
def test_bad_input_costs_one_line_and_no_folder(folder, words, message):
    outcome = call("compare", *MLP, *QUICK, *words.split())
    assert outcome.code == 2
    [line] = outcome.err.splitlines()
    assert re.fullmatch(f"modelpar: {message}", line), line
    assert listing(folder) == {"text.txt"}


def test_a_comparison_on_few_samples_ends_as_any_other(folder):
    """No step has all micro-batches, so that there is no verdict; all else was thrown away with it."""
    outcome = call("compare", *MLP, *QUICK, *ROUNDS, "training.batch_size=1", "schedule=gpipe,1f1b")
    assert (outcome.code, outcome.err) == (0, "")
    assert len(rows_of(folder)) == 2
    assert {path.name for path in (folder / "runs" / "all").iterdir()} >= FILES


def test_whole_steps_stand_for_a_combination_that_has_shorter_ones(folder):
    """Every other batch has one sample: of 6 one is held out."""
    words = ["data.num_samples=6", "comparison.rounds=3", "comparison.steps=3", "schedule=1f1b"]
    outcome = call("compare", *[word for word in MLP if "samples" not in word], *QUICK, *words)
    assert (outcome.code, outcome.err) == (0, "")
    told = call("explain", "runs/all")
    assert (told.code, told.err) == (0, "")


def test_what_was_measured_before_a_combination_failed_is_shown(folder):
    outcome = call("compare", *MLP, *QUICK, *ROUNDS, "optimizer.lr=0.01,1e30")
    assert outcome.code == 1
    assert outcome.err.startswith("modelpar: lr=1e+30: step ")
    assert len(outcome.err.splitlines()) == 1
    assert [(row["name"], row["measured_step_seconds"] is not None) for row in rows_of(folder)] == [
        ("lr=0.01", True),
        ("lr=1e+30", False),
    ]
    assert "lr=0.01: " in outcome.out
