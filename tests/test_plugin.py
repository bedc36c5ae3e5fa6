"""The Pipeline tab's Python side on real event files: what it reads, with both of TensorBoard's loaders, and serves."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
from commands import MLP, THREADS, call
from conftest import ROOT
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from test_tensorboard import small_plan, step
from torch.utils.tensorboard import SummaryWriter
from werkzeug.test import Client

from modelpar.planning.analysis import analyse
from modelpar.planning.breakdown import PARTS
from modelpar.planning.timeline import COMPUTE
from modelpar.report import trace as traces
from modelpar.report.assets import STATIC
from modelpar.report.runs import Run
from modelpar.report.tensorboard.plugin import PipelinePlugin
from modelpar.report.tensorboard.reader import Reader, provider_of
from modelpar.report.tensorboard.writer import RunWriter
from modelpar.report.trace import decode
from modelpar.report.view_trace import trace_json

TRAIN = [*MLP, *THREADS, "training.batch_size=8", "pipeline.num_microbatches=4", "training.trace_every=5"]


def reader_of(*folders: Path) -> Reader:
    return Reader(provider_of([(None, str(folder)) for folder in folders])[0])


def runs_of(folder: Path) -> dict[str, Run]:
    return {run.name: run for run in reader_of(folder).runs()[0]}


def client_of(folder: Path) -> Client:
    """Returns a client of TensorBoard's own application, with nothing but the plugin in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # in what TensorBoard brings along
        from tensorboard.backend.application import TensorBoardWSGIApp
    provider = provider_of([(None, str(folder))])[0]
    flags = SimpleNamespace(samples_per_plugin={}, logdir=str(folder), path_prefix="", window_title="")
    return Client(TensorBoardWSGIApp(flags, [PipelinePlugin], data_provider=provider))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real runs: two trainings, one with a single stage, and a comparison with one plan measured of two."""
    folder = tmp_path_factory.mktemp("plugin")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, words in (
            ("long", ["training.steps=12"]),
            ("short", ["training.steps=3", "schedule=gpipe"]),
            ("single", ["training.steps=6", "pipeline.num_ranks=1"]),
            ("untraced", ["training.steps=2", "training.trace_every=0"]),
        ):
            assert call("train", *TRAIN, f"output.name={name}", *words).code == 0
        few = ["comparison.rounds=1", "comparison.steps=3", "measure=1", "output.name=compared"]
        assert call("compare", *TRAIN, *few, "schedule=gpipe,1f1b").code == 0
    return folder / "runs"


@pytest.fixture
def client(runs: Path) -> Client:
    return client_of(runs)


# --- what is written -------------------------------------------------------------------------------------------------


def test_training_traces_the_5th_step_every_nth_and_the_last(runs: Path) -> None:
    found = runs_of(runs)
    assert found["long"].steps == (4, 9, 11)
    assert found["short"].steps == (2,)
    assert found["single"].steps == (4, 5)
    assert (found["long"].num_steps, found["short"].num_steps) == (12, 3)
    for name in ("long", "short", "single"):
        result = json.loads((runs / name / "result.json").read_text())
        last = decode(found[name].blobs[-1])
        assert last.measured
        assert json.loads(json.dumps(last.plan.to_json())) == json.loads((runs / name / "plan.json").read_text())
        assert list(last.peak_bytes) == [stage["peak_bytes"] for stage in result["stages"]]
        assert found[name].step_seconds == pytest.approx(result["measured_step_seconds"])
        assert found[name].bubble == pytest.approx(result["bubble"])


def test_a_comparison_traces_the_steps_of_what_was_run_and_else_the_prediction(runs: Path) -> None:
    found = [run for run in runs_of(runs).values() if run.name.startswith("compared/")]
    assert {run.name for run in found} == {"compared/gpipe", "compared/1f1b"}
    of = {trace.measured: (run, trace) for run in found for trace in [decode(run.blobs[-1])]}
    (measured, trace), (predicted, guess) = of[True], of[False]
    kept = [decode(blob).timeline.makespan for blob in measured.blobs]
    assert len(kept) == 3
    assert measured.step_seconds == pytest.approx(median(kept), abs=1e-6)
    assert (predicted.steps, predicted.num_steps, predicted.step_seconds) == ((0,), 0, None)
    assert guess.timeline.makespan == pytest.approx(guess.plan.prediction.step_seconds, abs=1e-6)
    assert guess.peak_bytes == ()
    assert {run.name for run in found} == {f"compared/{each.schedule}" for each in (trace, guess)}


def test_a_run_that_goes_on_forgets_later_traces(tmp_path: Path) -> None:
    for start, purge in ((0, None), (2, 2)):
        with RunWriter(tmp_path / "run", small_plan(), purge) as writer:
            for number in range(start, start + 3):
                writer.step(step(number), 1.0 + start, 8)
                writer.trace(number, step(number).timeline, (start, start))
    run = runs_of(tmp_path)["run"]
    assert run.steps == (0, 1, 2, 3, 4)
    assert [decode(blob).peak_bytes[0] for blob in run.blobs] == [0, 0, 2, 2, 2]


# --- what is read ----------------------------------------------------------------------------------------------------


def test_a_run_without_its_end_shows_what_was_finished(tmp_path: Path, runs: Path) -> None:
    (events,) = (runs / "long").glob("events*")
    (tmp_path / "killed").mkdir()
    whole = events.read_bytes()
    for cut in (0.9, 0.55):
        (tmp_path / "killed" / events.name).write_bytes(whole[: int(len(whole) * cut)])
        run = runs_of(tmp_path)["killed"]
        assert run.problem is None
        assert run.steps in ((4,), (4, 9))
        assert run.num_steps in range(5, 13)
        assert run.step_seconds is not None
        assert trace_json("killed", decode(run.blobs[-1]))["makespan"] > 0
    (tmp_path / "killed" / events.name).write_bytes(whole[:300])
    assert runs_of(tmp_path) == {}


def test_the_first_steps_do_not_count_where_there_are_others(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run", small_plan()) as writer:
        writer.trace(0, step(0).timeline)
        for number, seconds in enumerate((9.0, 8.0, 7.0, 1.0, 2.0, 6.0)):
            writer.step(step(number), seconds, 8)
        assert runs_of(tmp_path)["run"].step_seconds == 6.5
        writer.step(step(6), 3.0, 8)
        assert runs_of(tmp_path)["run"].step_seconds == 2.5
        writer.hparams({"schedule": "gpipe"}, {"step_seconds": 5.5, "bubble": 0.5})
    found = runs_of(tmp_path)["run"]
    assert (found.step_seconds, found.bubble, found.num_steps) == (5.5, 0.5, 7)


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs with which something is the matter, and one without."""
    with RunWriter(tmp_path / "old", small_plan()) as writer:
        writer.step(step(0), 1.0, 8)
    for number in range(4):
        with SummaryWriter(str(tmp_path / f"foreign{number}")) as other:
            other.add_scalar("loss", 1.0, 0)
    monkeypatch.setattr(traces, "FORMAT", 99)
    with RunWriter(tmp_path / "newer", small_plan()) as writer:
        writer.trace(0, step(0).timeline)
    monkeypatch.undo()
    RunWriter(tmp_path / "begun", small_plan()).close()
    with RunWriter(tmp_path / "good", small_plan(), schedule="gpipe") as writer:
        writer.step(step(0), 1.0, 8)
        writer.trace(0, step(0).timeline)
    return tmp_path


def test_odd_runs_are_a_line_each(odd: Path) -> None:
    found = client_of(odd).get("/data/plugin/modelpar/runs").json
    assert found is not None
    assert found["notes"] == ["4 runs are not of modelpar: foreign0, foreign1, foreign2, …"]
    assert {row["run"]: row["problem"] and row["problem"].split(":")[0].split(",")[0] for row in found["runs"]} == {
        "good": None,
        "newer": "the trace has format 99",
        "begun": "has done no step",
        "old": "holds no traces",
    }
    assert found["runs"][0]["run"] == "good"
    assert all("\n" not in (row["problem"] or "") for row in found["runs"])


def test_untraced_runs_say_so(runs: Path) -> None:
    found = runs_of(runs)["untraced"]
    assert found.problem is not None
    assert found.problem.startswith("holds no traces: they come with the 5th step")
    assert (found.num_steps, found.blobs) == (2, ())


def test_a_folder_that_is_a_run_has_its_plain_name(runs: Path) -> None:
    """TensorBoard calls it "long/."."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(runs / "long"), "long")
    reader = Reader(MultiplexerDataProvider(multiplexer.Reload(), ""))
    assert list(multiplexer.Runs()) == ["long/."]
    (run,), _ = reader.runs()
    assert run == runs_of(runs)["long"]
    assert reader.trace("long", 9) == run.blobs[1]


LOADED = """
import json, sys, time
from tensorboard.data.server_ingester import SubprocessServerDataIngester, get_server_binary
from tensorboard.util.grpc_util import ChannelCredsType
from modelpar.report.tensorboard.reader import Reader

ingester = SubprocessServerDataIngester(
    get_server_binary(), sys.argv[1], reload_interval=1, channel_creds_type=ChannelCredsType.LOCAL,
    samples_per_plugin={"modelpar": 0},
)
ingester.start()
reader, deadline = Reader(ingester.data_provider), time.monotonic() + 60
while len([run for run in reader.runs()[0] if run.blobs]) < int(sys.argv[2]) and time.monotonic() < deadline:
    time.sleep(0.1)
time.sleep(2)  # the server publishes a run as it reads it
runs, notes = reader.runs()
print(json.dumps([{**vars(run), "blobs": [blob.hex() for blob in run.blobs]} for run in runs]))
print(json.dumps(notes))
"""


def test_both_loaders_of_tensorboard_give_the_same(runs: Path, odd: Path) -> None:
    from tensorboard.data.server_ingester import NoDataServerError, get_server_binary

    try:
        get_server_binary()
    except NoDataServerError as error:
        pytest.skip(f"TensorBoard's data server is not installed: {error}")
    with RunWriter(odd / "resumed", small_plan()) as writer:
        for number in range(30):
            writer.step(step(number), 1.0, 8)
            writer.trace(number, step(number).timeline)
    with RunWriter(odd / "resumed", small_plan(), purge_step=25) as writer:
        writer.step(step(25), 2.0, 8)
        writer.trace(25, step(25).timeline, (1, 2))
    shutil.copytree(runs, odd / "real")
    expected, expected_notes = reader_of(odd).runs()
    with_traces = sum(bool(run.blobs) for run in expected)
    assert with_traces == 8
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(odd), str(with_traces)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    lines = done.stdout.splitlines()
    found = {run["name"]: run for run in json.loads(lines[0])}
    assert json.loads(lines[1]) == expected_notes
    assert found.keys() == {run.name for run in expected}
    for run in expected:
        assert found[run.name]["steps"] == list(run.steps), run.name
        assert found[run.name]["blobs"] == [blob.hex() for blob in run.blobs], run.name
        assert found[run.name]["problem"] == run.problem
        assert found[run.name]["num_steps"] == run.num_steps
        assert found[run.name]["step_seconds"] == (run.step_seconds and pytest.approx(run.step_seconds))
        assert found[run.name]["bubble"] == (run.bubble and pytest.approx(run.bubble))
    resumed = next(run for run in expected if run.name == "resumed")
    assert resumed.steps == tuple(range(26))  # all of them, where TensorBoard keeps 10 by itself


# --- what is served --------------------------------------------------------------------------------------------------


def get(client: Client, path: str, **query: Any) -> Any:
    """Returns the JSON at a path of the plugin."""
    answer = client.get(f"/data/plugin/modelpar/{path}", query_string=query)
    assert answer.status_code == 200, answer.data
    assert answer.mimetype == "application/json"
    return answer.json


def test_tensorboard_lists_the_tab(client: Client) -> None:
    tab = client.get("/data/plugins_listing").json["modelpar"]  # type: ignore[index]
    assert (tab["enabled"], tab["tab_name"]) == (True, "Pipeline")
    assert tab["loading_mechanism"] == {"type": "IFRAME", "module_path": "/data/plugin/modelpar/index.js"}
    page = client.get("/data/plugin_entry.html?name=modelpar").text
    assert 'import("./index.js")' in page


def test_the_tab_is_inactive_without_traces(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "old", small_plan()) as writer:
        writer.step(step(0), 1.0, 8)
    assert not client_of(tmp_path).get("/data/plugins_listing").json["modelpar"]["enabled"]  # type: ignore[index]


def test_the_runs_are_those_of_the_folders(client: Client, runs: Path) -> None:
    found = get(client, "runs")
    rows = {row["run"]: row for row in found["runs"]}
    assert set(rows) == {"long", "short", "single", "untraced", "compared/gpipe", "compared/1f1b"}
    assert found["notes"] == []
    assert found["runs"][-1]["run"] == "untraced"
    measured = [row["step_seconds"] for row in found["runs"] if row["measured"]]
    assert measured == sorted(measured)
    assert len(measured) == 4
    result = json.loads((runs / "long" / "result.json").read_text())
    row = rows["long"]
    assert row["step_seconds"] == pytest.approx(result["measured_step_seconds"])
    assert row["predicted_seconds"] == pytest.approx(result["predicted_step_seconds"])
    assert (row["schedule"], rows["short"]["schedule"]) == ("1f1b", "gpipe")
    assert row["balance"] == [stage["balance"] for stage in result["stages"]]
    assert row["peak_bytes"] == max(stage["peak_bytes"] for stage in result["stages"])
    assert row["ideal_bubble"] == pytest.approx(1 / 5)
    assert rows["single"]["ideal_bubble"] == 0.0
    for each in found["runs"][:-1]:
        trace = get(client, "trace", run=each["run"], step=each["parts_step"])
        assert [part["name"] for part in each["parts"]] == list(PARTS)
        assert sum(part["seconds"] for part in each["parts"]) == pytest.approx(trace["makespan"])


def test_a_trace_is_that_of_the_step(client: Client, runs: Path) -> None:
    for number, blob in zip(runs_of(runs)["long"].steps, runs_of(runs)["long"].blobs, strict=True):
        timeline = decode(blob).timeline
        found = get(client, "trace", run="long", step=number)
        assert (found["run"], found["step"], found["makespan"]) == ("long", number, timeline.makespan)
        for rank, times in enumerate(analyse(timeline).ranks):
            spans = found["ranks"][rank]["spans"]
            busy = sum(end - start for kind, start, end, *_ in spans if kind in COMPUTE)
            assert busy == pytest.approx(times.busy)
            assert [span[4] for span in spans if span[0] == "F"] == [0, 1, 2, 3]
            assert all(before[2] <= after[1] for before, after in pairwise(spans))
        forwards = [way for way in found["arrows"] if found["ranks"][way[2]]["spans"][way[3]][0] == "F"]
        assert len(forwards) == 4


def test_the_chrome_trace_is_a_file(client: Client) -> None:
    answer = client.get("/data/plugin/modelpar/chrome", query_string={"run": "compared/gpipe", "step": 0})
    answer = answer if answer.status_code == 200 else client.get("/data/plugin/modelpar/chrome?run=long&step=4")
    assert answer.status_code == 200
    assert answer.headers["Content-Disposition"].startswith('attachment; filename="')
    assert "/" not in answer.headers["Content-Disposition"]
    assert {event["ph"] for event in answer.json["traceEvents"]} >= {"X", "M"}  # type: ignore[index]


def test_static_files_are_served_with_their_types(client: Client) -> None:
    for path, kind in (("index.js", "text/javascript"), ("static/pipeline.js", "text/javascript")):
        answer = client.get(f"/data/plugin/modelpar/{path}")
        assert (answer.status_code, answer.mimetype) == (200, kind)
        assert answer.data == (STATIC / path.rsplit("/", 1)[-1]).read_bytes()
    assert client.get("/data/plugin/modelpar/static/pipeline.css").mimetype == "text/css"
    assert re.search(rb"export (async )?function render\(", client.get("/data/plugin/modelpar/index.js").data)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("static/nothing.js", "there is no file 'nothing.js'"),
        ("static/../plugin.py", "there is no file 'plugin.py'"),
        ("static/..%2f..%2fplugin.py", "there is no file 'plugin.py'"),
        ("static/%2e%2e/trace.py", "there is no file 'trace.py'"),
        ("trace", "run is None and step None; expected a run's name and the number of a traced step"),
        ("trace?run=long&step=-1", "run is 'long' and step '-1'"),
        ("trace?run=long&step=5", "run 'long' has no trace of step 5; expected one of 4, 9, 11"),
        ("trace?run=nobody&step=4", "run 'nobody' has no trace of step 4; expected a run with traces"),
        ("chrome?run=untraced&step=0", "run 'untraced' has no trace of step 0; expected a run with traces"),
    ],
)
def test_what_is_not_there_is_one_line(client: Client, path: str, message: str) -> None:
    answer = client.get(f"/data/plugin/modelpar/{path}")
    assert (answer.status_code, answer.mimetype) == (404, "application/json")
    assert answer.json is not None
    assert answer.json["error"].startswith(message)
    assert "\n" not in answer.json["error"]


def test_a_broken_trace_is_one_line(odd: Path) -> None:
    answer = client_of(odd).get("/data/plugin/modelpar/trace?run=newer&step=0")
    assert answer.status_code == 404
    assert answer.json == {"error": f"the trace has format 99, of a newer modelpar; expected {traces.FORMAT} or less"}


def test_a_run_that_goes_on_is_read_again(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run", small_plan()) as writer:
        writer.trace(0, step(0).timeline)
        provider = provider_of([(None, str(tmp_path))])[0]
        reader = Reader(provider)
        assert reader.runs()[0][0].steps == (0,)
        writer.trace(1, step(1).timeline)
        provider._multiplexer.Reload()  # as TensorBoard does every few seconds
        assert reader.runs()[0][0].steps == (0, 1)


def test_nothing_of_it_needs_torch(runs: Path) -> None:
    code = (
        "import sys; from modelpar.report.tensorboard.plugin import PipelinePlugin; import modelpar.report.html;"
        "from modelpar.report.tensorboard.reader import Reader, provider_of;"
        "from modelpar.report.view_runs import runs_json;"
        f"runs, notes = Reader(provider_of([(None, {str(runs)!r})])[0]).runs();"
        "print(len(runs_json(runs, notes)['runs']), [m for m in sys.modules if m.split('.')[0] in ('torch', 'hydra')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "6 []"


def test_the_tab_is_installed_under_its_name() -> None:
    [plugin] = entry_points(group="tensorboard_plugins", name="modelpar") or [None]
    if plugin is None:
        pytest.skip("modelpar is not installed, or was before it had the tab")
    assert plugin.load() is PipelinePlugin
