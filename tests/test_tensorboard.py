"""What is in a run's event file, and the server that shows it."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from conftest import interruptible
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from modelpar.errors import ConfigError
from modelpar.planning import schedules
from modelpar.planning.cluster import Cluster
from modelpar.planning.graph import Layer, ModelGraph, Parameter
from modelpar.planning.partition import Partition
from modelpar.planning.plan import Plan, Prediction
from modelpar.planning.profile import LayerCost, Profile
from modelpar.planning.result import StepResult
from modelpar.planning.schedule import Schedule
from modelpar.planning.timeline import Span, Timeline
from modelpar.report.tensorboard.view import logdir_arguments, run_folders, view
from modelpar.report.tensorboard.writer import RunWriter

ROOT = Path(__file__).parent.parent


def small_plan(schedule: Schedule | None = None, predicted: bool = True) -> Plan:
    """Returns a plan of two layers on two stages, or of one layer a stage of the schedule given."""
    schedule = schedule or schedules.gpipe(2, 1)
    size = schedule.num_stages
    layers = tuple(Layer(f"h{i}", "Linear", (Parameter(f"h{i}.weight", (4, 4), "float32", True),)) for i in range(size))
    costs = tuple(LayerCost(layer.name, 1.0, 1.0, 1.0) for layer in layers)
    return Plan(
        graph=ModelGraph(layers, (), tuple(range(1, size))),
        profile=Profile(costs, 1, "measured"),
        cluster=Cluster(("cpu",) * schedule.num_ranks),
        partition=Partition(tuple(range(size + 1))),
        schedule=schedule,
        prediction=Prediction(0.25, 0.5, (0.5, 0.5)) if predicted else None,
    )


def step(number: int) -> StepResult:
    """Returns the result of a step of 1 s: rank 0 computes for 0.75 s, rank 1 for 0.5 s after a wait of 0.25 s."""
    spans = [
        Span(0, "F", 0.0, 0.25, 0, 0),
        Span(0, "B", 0.5, 1.0, 0, 0),
        Span(1, "wait", 0.0, 0.25, 1, 0, "value v of micro-batch 0 from stage 0"),
        Span(1, "F", 0.25, 0.5, 1, 0),
        Span(1, "B", 0.5, 0.75, 1, 0),
    ]
    return StepResult(
        step=number,
        loss=4.0 - number,
        count=8,
        grad_norm=1.5,
        lr=0.125,
        timeline=Timeline.of(2, spans),
        metrics={"accuracy": 0.5},
        peak_bytes=(3_000_000, 2_000_000),
    )


def read(directory: Path) -> EventAccumulator:
    """Reads a run as TensorBoard does."""
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def values(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    """Returns a curve as (step, value)."""
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_step_becomes_one_point_on_every_curve(tmp_path: Path) -> None:
    with RunWriter(tmp_path, small_plan()) as writer:
        writer.step(step(0), step_seconds=2.0, samples=8)
        writer.step(step(1), step_seconds=1.0, samples=8)
        writer.heldout(1, 3.5, {"accuracy": 0.25, "loss": 9.0})
    events = read(tmp_path)
    curves = {
        "train/loss": [4.0, 3.0],
        "train/lr": [0.125, 0.125],
        "train/grad_norm": [1.5, 1.5],
        "train/accuracy": [0.5, 0.5],
        "train/samples_per_second": [4.0, 8.0],
        "step/seconds": [2.0, 1.0],
        "step/predicted_seconds": [0.25, 0.25],
        "step/makespan": [1.0, 1.0],
        "pipeline/bubble": [0.375, 0.375],
        "stage_utilization/stage 0": [0.75, 0.75],
        "stage_utilization/stage 1": [0.5, 0.5],
        "stage_wait/stage 0": [0.0, 0.0],
        "stage_wait/stage 1": [0.25, 0.25],
        "stage_memory_mb/stage 0": [3.0, 3.0],
        "stage_memory_mb/stage 1": [2.0, 2.0],
    }
    for tag, expected in curves.items():
        assert values(events, tag) == list(enumerate(expected)), tag
    assert values(events, "train/heldout_loss") == [(1, 3.5)]
    assert values(events, "train/heldout_accuracy") == [(1, 0.25)]
    assert set(events.Tags()["scalars"]) == {*curves, "train/heldout_loss", "train/heldout_accuracy"}


def test_a_run_without_prediction_has_no_curve_for_it(tmp_path: Path) -> None:
    with RunWriter(tmp_path, small_plan(predicted=False)) as writer:
        writer.step(step(0), 1.0, 8)
    assert "step/predicted_seconds" not in read(tmp_path).Tags()["scalars"]


def test_curves_are_named_by_rank_where_a_rank_holds_several_stages(tmp_path: Path) -> None:
    schedule = Schedule.of(["0F0 2F0 2B0 0B0", "1F0 3F0 3B0 1B0"])
    with RunWriter(tmp_path, small_plan(schedule)) as writer:
        writer.step(step(0), 1.0, 8)
    assert values(read(tmp_path), "stage_utilization/rank 1") == [(0, 0.5)]


def test_all_of_a_run_is_in_one_event_file(tmp_path: Path) -> None:
    with RunWriter(tmp_path, small_plan()) as writer:
        writer.step(step(0), 1.0, 8)
        writer.timeline(0, step(0).timeline)
        writer.hparams({"schedule": "gpipe"}, {"step_seconds": 1.0})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 1
    assert "tfevents" in files[0].name


def test_the_partition_is_a_markdown_table(tmp_path: Path) -> None:
    with RunWriter(tmp_path, small_plan()):
        pass
    text = read(tmp_path).Tensors("partition/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.splitlines() == [
        "| stage | layers | parameters | share of time | memory | device |",
        "| --: | :-- | --: | --: | --: | :-- |",
        "| 0 | h0 (1) | 16 | 50 % | 0.3 kB | cpu |",
        "| 1 | h1 (1) | 16 | 50 % | 0.3 kB | cpu |",
    ]


def test_the_timeline_of_a_traced_step_is_an_image(tmp_path: Path) -> None:
    with RunWriter(tmp_path, small_plan()) as writer:
        writer.timeline(7, step(7).timeline, predicted=step(7).timeline)
    (image,) = read(tmp_path).Images("pipeline/timeline")
    assert image.step == 7
    assert Image.open(io.BytesIO(image.encoded_image_string)).size == (image.width, image.height) == (1200, 224)


def test_the_custom_scalars_overlay_all_stages(tmp_path: Path) -> None:
    with RunWriter(tmp_path, small_plan()):
        pass
    (stored,) = read(tmp_path).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(stored.tensor_proto.string_val[0])
    tags = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert tags["utilization per stage"] == ["stage_utilization/.*$"]
    assert tags["step time: measured and predicted (s)"] == ["step/seconds$", "step/predicted_seconds$"]


def test_hparams_are_in_the_run_itself_with_their_results(tmp_path: Path) -> None:
    with RunWriter(tmp_path, small_plan()) as writer:
        writer.hparams({"schedule": "gpipe", "lr": 0.5, "clip": None, "layers": [1, 1]}, {"step_seconds": 0.25}, step=9)
    events = read(tmp_path)
    stored = plugin_data_pb2.HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    )
    found = stored.session_start_info.hparams
    assert found["schedule"].string_value == "gpipe"
    assert found["lr"].number_value == 0.5
    assert found["clip"].string_value == "None"
    assert found["layers"].string_value == "[1, 1]"
    assert values(events, "result/step_seconds") == [(9, 0.25)]


def test_a_run_that_goes_on_forgets_what_was_written_after_the_step_it_goes_on_from(tmp_path: Path) -> None:
    for start, purge in ((0, None), (2, 2)):
        with RunWriter(tmp_path, small_plan(), purge) as writer:
            for number in range(start, start + 4):
                writer.step(step(number), float(1 + start), 8)
    assert values(read(tmp_path), "step/seconds") == [(0, 1.0), (1, 1.0), (2, 3.0), (3, 3.0), (4, 3.0), (5, 3.0)]


def test_a_crash_keeps_all_finished_steps(tmp_path: Path) -> None:
    script = """
        import os, sys
        from pathlib import Path
        from test_tensorboard import RunWriter, small_plan, step

        writer = RunWriter(sys.argv[1], small_plan())
        for number in range(25):
            writer.step(step(number), 1.0, 8)
        writer.heldout(24, 2.0)
        os._exit(7)
    """
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    assert subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, timeout=120).returncode == 7
    events = read(tmp_path)
    for tag in ("train/loss", "stage_memory_mb/stage 1"):
        assert [number for number, _ in values(events, tag)] == list(range(25))
    assert values(events, "train/heldout_loss") == [(24, 2.0)]


def get(url: str) -> Any:
    """Returns the JSON at a URL on this host, past any proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=60) as answer:
        return json.load(answer)


def started_view(*paths: Path) -> tuple[subprocess.Popen[str], str]:
    """Starts `view` in a process of its own, and returns it with the URL that it printed."""
    script = "import sys; from modelpar.report.tensorboard.view import view; view(sys.argv[1:], 0)"
    with interruptible():
        process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, paths)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    return process, line.split(" at ")[-1].strip()


def wait_for_runs(url: str, number: int) -> list[str]:
    """Asks for the runs until that many have been read, for at most a minute."""
    deadline = time.monotonic() + 60
    while len(runs := get(f"{url}data/runs")) < number and time.monotonic() < deadline:
        pass
    return sorted(runs)


def test_view_serves_a_folder_of_runs_until_it_is_interrupted(tmp_path: Path) -> None:
    for name in ("gpipe", "1f1b"):
        with RunWriter(tmp_path / "runs" / name, small_plan()) as writer:
            writer.step(step(0), 1.0, 8)
            for number in range(12):
                writer.trace(number, step(number).timeline)
    process, url = started_view(tmp_path / "runs")
    try:
        assert url.startswith("http://127.0.0.1:")
        assert wait_for_runs(url, 2) == ["1f1b", "gpipe"]
        tags = get(f"{url}data/plugin/scalars/tags")
        assert "stage_utilization/stage 1" in tags["gpipe"]
        query = urllib.parse.urlencode({"run": "gpipe", "tag": "train/loss"})
        assert [point[1:] for point in get(f"{url}data/plugin/scalars/scalars?{query}")] == [[0, 4.0]]
        assert get(f"{url}data/plugins_listing")["modelpar"]["tab_name"] == "Pipeline"
        shown = get(f"{url}data/plugin/modelpar/runs")["runs"]
        assert [run["steps"] for run in shown] == [list(range(12))] * 2  # by itself TensorBoard keeps 10
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
        with pytest.raises(OSError, match="refused"):
            get(f"{url}data/runs")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated:DeprecationWarning")  # in TensorBoard's server
def test_view_refuses_a_port_that_is_taken(tmp_path: Path) -> None:
    with RunWriter(tmp_path, small_plan()):
        pass
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}") as raised:
            view([str(tmp_path)], port)
    assert "\n" not in str(raised.value)


def test_view_names_each_of_several_paths(tmp_path: Path) -> None:
    for name in ("a/x", "b/x"):
        with RunWriter(tmp_path / name, small_plan()):
            pass
    both = [str(tmp_path / "a" / "x"), str(tmp_path / "b" / "x")]
    assert logdir_arguments(both) == [f"--logdir_spec=a/x:{both[0]},b/x:{both[1]}"]
    assert logdir_arguments(both[:1]) == [f"--logdir_spec=x:{both[0]}"]
    inside = [str(tmp_path / "a"), both[0]]
    assert logdir_arguments(inside) == [f"--logdir_spec=a:{inside[0]},x:{both[0]}"]
    assert logdir_arguments([str(tmp_path)]) == [f"--logdir={tmp_path}"]


def test_paths_whose_names_would_be_the_same_get_numbers(tmp_path: Path) -> None:
    """Of two runs with one name TensorBoard shows the later."""
    folders = [str(tmp_path / name) for name in ("x_1", "x:1", "x,1")]
    for folder in folders:
        with RunWriter(folder, small_plan()):
            pass
    assert run_folders(folders) == [("x_1", folders[0]), ("x_1-1", folders[1]), ("x_1-2", folders[2])]


def test_view_refuses_paths_without_runs(tmp_path: Path) -> None:
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for path, message in (("missing", "does not exist"), ("file", "is a file"), ("empty", "no TensorBoard event file")):
        with pytest.raises(ConfigError, match=message) as raised:
            logdir_arguments([str(tmp_path / path)])
        assert str(tmp_path / path) in str(raised.value)
        assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match="no path"):
        logdir_arguments([])
