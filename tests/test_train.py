"""`modelpar train` from end to end: what is in a run's folder, that it is true, and what is left after a failure."""

import io
import json
import math
import signal
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from commands import GPT, MLP, TEXT, THREADS, Command, call, listing
from omegaconf import OmegaConf
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from modelpar import Plan, load_into
from modelpar import config as configs
from modelpar.capture.capture import capture
from modelpar.capture.objective import Objective
from modelpar.data.arrays import arrays
from modelpar.errors import PlanMismatch
from modelpar.models import convnet, file, gpt
from modelpar.task import task_of
from modelpar.train import _stop_between_steps, train

FILES = {"config.yaml", "plan.json", "result.json", "weights.safetensors", "events"}
FILES_OF_PROCESSES = FILES | {"ranks"}
FEW = ["training.batch_size=4", "training.eval_samples=6", "pipeline.num_microbatches=2", "output.name=run"]
SHORT = [*FEW, "training.steps=5", "training.eval_every=2", "training.trace_every=2"]


def result_of(folder: Path, name: str = "run"):
    return json.loads((folder / "runs" / name / "result.json").read_text())


def scalars(folder: Path, tag: str, name: str = "run"):
    """Returns (step, value) of every point of a curve."""
    events = EventAccumulator(str(folder / "runs" / name)).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def heldout_loss(model, config) -> float:
    """Returns the held-out loss in plain PyTorch: one process, one batch at a time."""
    task = task_of(config)
    total = count = 0.0
    model.eval()
    with torch.no_grad():
        for inputs, targets in task.data.heldout(config.training.batch_size, config.training.eval_samples):
            total += task.objective.loss(model(inputs), targets).item() * len(inputs)
            count += len(inputs)
    return total / count


# --- a run that ends as it should ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small GPT trained for five steps, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder, call("train", *GPT, *THREADS, *SHORT)


def test_a_run_leaves_exactly_its_files(trained):
    folder, outcome = trained
    assert (outcome.code, outcome.err) == (0, "")
    assert listing(folder) == {"text.txt", "runs"}
    assert listing(folder / "runs") == {"run"}
    assert listing(folder / "runs" / "run") == FILES
    assert len(list((folder / "runs" / "run").iterdir())) == len(FILES)


def test_the_screen_says_what_happened(trained):
    folder, outcome = trained
    result = result_of(folder)
    lines = outcome.out.splitlines()
    assert lines[0].endswith("held out")  # what the data are
    assert any(line.split()[:2] == ["stage", "layers"] for line in lines)
    assert [line.split()[1] for line in lines if line.startswith("step ") and "/5 " in line] == [
        f"{step}/5" for step in (1, 2, 3, 4, 5)
    ]
    losses = result["losses"]
    assert f"{losses[0]:.4f} → {losses[-1]:.4f}" in outcome.out
    [heldout] = [line for line in lines if line.startswith("held-out loss") and "byte-unigram entropy" in line]
    assert f"{result['heldout_losses'][-1]['loss']:.4f}" in heldout
    assert f"{result['baseline'][1]:.4f}" in heldout
    assert any(line.startswith("utilization") and "stage 1" in line for line in lines)
    assert any(line.startswith("step time") and "measured" in line and "predicted" in line for line in lines)
    assert lines[-1].endswith(" view runs/run")


NUMBER = (int, float)
RESULT = {
    "schema_version": int,
    "status": str,
    "steps": int,
    "losses": list,
    "heldout_losses": list,
    "baseline": list,
    "step_seconds": list,
    "measured_step_seconds": float,
    "predicted_step_seconds": float,
    "bubble": float,
    "predicted_bubble": float,
    "num_threads": int,
    "stages": list,
}
STAGE = {
    "rank": int,
    "device": str,
    "balance": int,
    "layers": list,
    "parameters": int,
    "utilization": float,
    "wait": NUMBER,
    "peak_bytes": int,
}


def test_the_result_has_every_number(trained):
    result = result_of(trained[0])
    assert set(result) == set(RESULT)
    assert {name: value for name, value in result.items() if not isinstance(value, RESULT[name])} == {}
    assert (result["schema_version"], result["status"], result["steps"], result["num_threads"]) == (1, "done", 5, 1)
    assert len(result["losses"]) == len(result["step_seconds"]) == 5
    assert all(math.isfinite(loss) for loss in result["losses"])
    assert all(seconds > 0 for seconds in result["step_seconds"])
    assert [point["steps"] for point in result["heldout_losses"]] == [2, 4, 5]
    assert min(result["step_seconds"]) <= result["measured_step_seconds"] <= max(result["step_seconds"])
    assert 0 < result["bubble"] < 1
    assert 0 < result["predicted_bubble"] < 1


def test_the_result_adds_up_over_the_stages(trained):
    result = result_of(trained[0])
    model, _, _ = gpt.build(context=8, width=16, depth=2, heads=2)
    for stage in result["stages"]:
        assert set(stage) == set(STAGE)
        assert {name: value for name, value in stage.items() if not isinstance(value, STAGE[name])} == {}
        assert stage["balance"] == len(stage["layers"])
        assert 0 < stage["utilization"] <= 1
        assert 0 <= stage["wait"] < 1
        assert stage["peak_bytes"] > 0
    assert [name for stage in result["stages"] for name in stage["layers"]] == [
        name for name, _ in model.named_children()
    ]
    assert sum(stage["parameters"] for stage in result["stages"]) == sum(p.numel() for p in model.parameters())


def graph_of(width):
    model, batch, loss = gpt.build(context=8, width=width, depth=2, heads=2)
    return capture(Objective(model, loss), batch, model).graph


def test_the_plan_is_that_of_the_model(trained):
    result, plan = result_of(trained[0]), Plan.load(trained[0] / "runs" / "run" / "plan.json")
    assert list(plan.partition.balance) == [stage["balance"] for stage in result["stages"]]
    assert plan.prediction.step_seconds == result["predicted_step_seconds"]
    assert plan.generator is not None  # saved as a name, not as a long list
    plan.check_model(graph_of(width=16))
    with pytest.raises(PlanMismatch, match="embed changed"):
        plan.check_model(graph_of(width=32))


def test_the_configuration_trains_the_same_again(trained):
    folder, _ = trained
    config = OmegaConf.load(folder / "runs" / "run" / "config.yaml")
    assert config == configs.load("train", [*GPT, *THREADS, *SHORT])
    config.output.name = "again"
    run = train(configs.checked(config), Console(file=io.StringIO()))
    assert result_of(folder, "again")["losses"] == result_of(folder)["losses"]
    first, second = (load_file(folder / "runs" / name / "weights.safetensors") for name in ("run", "again"))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    for path in run.path.iterdir():
        path.unlink()
    run.remove_if_empty()


def test_the_weights_have_the_loss_that_the_result_says(trained):
    folder, _ = trained
    with safe_open(folder / "runs" / "run" / "weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["tied"]) == {"head.token.weight": "embed.token.weight"}
        assert "head.token.weight" not in file.keys()  # noqa: SIM118
    torch.manual_seed(7)
    model, _, _ = gpt.build(context=8, width=16, depth=2, heads=2)
    config = configs.load("train", [*GPT, *THREADS, *SHORT])
    before = heldout_loss(model, config)
    load_into(model, folder / "runs" / "run")
    expected = result_of(folder)["heldout_losses"][-1]["loss"]
    assert heldout_loss(model, config) == pytest.approx(expected, rel=1e-6)
    assert before != pytest.approx(expected, rel=1e-6)


def test_the_event_file_has_every_step(trained):
    folder, _ = trained
    result = result_of(folder)
    events = EventAccumulator(str(folder / "runs" / "run"), size_guidance={"images": 0}).Reload()
    stages = [
        f"{kind}/stage {stage}" for kind in ("stage_utilization", "stage_wait", "stage_memory_mb") for stage in (0, 1)
    ]
    tags = {"train/loss", "train/lr", "train/grad_norm", "train/samples_per_second", "step/seconds", "pipeline/bubble"}
    for tag in {*tags, "step/predicted_seconds", *stages}:
        points = events.Scalars(tag)
        assert [point.step for point in points] == [0, 1, 2, 3, 4], tag
        assert all(math.isfinite(point.value) for point in points), tag
    assert [point.value for point in events.Scalars("train/loss")] == pytest.approx(result["losses"])
    assert [point.value for point in events.Scalars("step/seconds")] == pytest.approx(result["step_seconds"])
    heldout = [(point.step + 1, pytest.approx(point.value)) for point in events.Scalars("train/heldout_loss")]
    assert heldout == [(point["steps"], point["loss"]) for point in result["heldout_losses"]]
    assert [image.step for image in events.Images("pipeline/timeline")] == [1, 3]
    assert b"| stage | layers |" in events.Tensors("partition/text_summary")[0].tensor_proto.string_val[0]


def test_the_event_file_has_the_layout_and_the_hparams(trained):
    folder, _ = trained
    events = EventAccumulator(str(folder / "runs" / "run")).Reload()
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    titles = {chart.title for category in layout.category for chart in category.chart}
    assert {"utilization per stage", "wait per stage (share of the step)", "peak memory per stage (MB)"} <= titles
    metadata = {tag: events.SummaryMetadata(tag) for tag in ("_hparams_/session_start_info",)}
    start = plugin_data_pb2.HParamsPluginData.FromString(
        metadata["_hparams_/session_start_info"].plugin_data.content
    ).session_start_info.hparams
    assert start["model"].string_value == "gpt"
    assert start["schedule"].string_value == "1f1b"
    assert start["num_microbatches"].number_value == 2
    assert start["lr"].number_value == pytest.approx(0.002)
    assert scalars(folder, "result/loss") == [(0, pytest.approx(result_of(folder)["losses"][-1]))]
    assert scalars(folder, "result/heldout_loss")


# --- other models, other data, other options ----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_network_with_buffers_on_arrays(folder):
    rng = np.random.default_rng(0)
    np.savez("images.npz", inputs=rng.random((30, 3, 8, 8)), targets=np.arange(30) % 10)
    model = ["model=convnet", "model.width=4", "model.depth=2", "model.input_shape=[3,8,8]"]
    words = [*model, *THREADS, *SHORT, "data=arrays", "data.path=images.npz", "schedule=gpipe", "optimizer=sgd"]
    assert call("train", *words).code == 0
    plain, _, _ = convnet.build(input_shape=[3, 8, 8], width=4, depth=2)
    load_into(plain, "runs/run")
    assert any(int(value) > 0 for name, value in plain.state_dict().items() if "num_batches_tracked" in name)
    expected = result_of(folder)["heldout_losses"][-1]["loss"]
    assert heldout_loss(plain, configs.load("train", words)) == pytest.approx(expected, rel=1e-6)
    assert result_of(folder)["baseline"][0] == "entropy of the held-out targets"


def test_a_folder_of_text(folder, monkeypatch):
    for number in range(5):
        (folder / "books" / f"part{number % 2}").mkdir(parents=True, exist_ok=True)
        (folder / "books" / f"part{number % 2}" / f"{number}.txt").write_text(TEXT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    outcome = call("train", *GPT, *THREADS, *FEW, "data.path=books", "data.pattern=**/*.txt", "training.steps=1")
    assert outcome.code == 0
    assert outcome.out.startswith("5 files, ")
    assert listing(folder) == {"books", "cache", "runs"}


def test_what_is_asked_for_is_what_runs(folder):
    manual = ["partition=manual", "partition.balance=[1,1,2]", "pipeline.num_ranks=3", "lr_schedule=constant"]
    outcome = call(
        "train", *MLP, *THREADS, *FEW, *manual, "training.steps=3", "training.eval_every=0", "optimizer.lr=0.01"
    )
    assert outcome.code == 0
    result = result_of(folder)
    assert [stage["balance"] for stage in result["stages"]] == [1, 1, 2]
    assert [point["steps"] for point in result["heldout_losses"]] == [3]
    assert scalars(folder, "train/lr") == [(step, pytest.approx(0.01)) for step in range(3)]


def test_without_held_out_samples_there_is_no_held_out_loss(folder):
    (folder / "text.txt").write_text(TEXT)
    outcome = call("train", *GPT, *THREADS, *FEW, "training.steps=2", "data.heldout=0")
    assert (outcome.code, outcome.err) == (0, "")
    assert "held-out loss" not in outcome.out
    assert result_of(folder)["heldout_losses"] == []
    assert listing(folder / "runs" / "run") == FILES


def test_two_runs_at_once_get_folders_of_their_own(folder):
    words = [*MLP, *THREADS, *FEW[:-1], "training.steps=1", "training.eval_samples=1"]
    assert call("train", *words).code == call("train", *words).code == 0
    assert len(list((folder / "runs").iterdir())) == 2


def test_weights_are_not_lost_on_a_folder_with_odd_letters(folder):
    outcome = call("train", *MLP, *THREADS, *FEW[:-1], "training.steps=1", "output.name='my [bold] run'")
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1].endswith(" view 'runs/my [bold] run'")
    assert listing(folder / "runs" / "my [bold] run") == FILES


# --- what goes wrong ----------------------------------------------------------------------------------------------

BAD_STEP = 3
"""The step that sees the poisoned sample; steps count from 0."""
MODEL_PY = """
import os
import signal
from collections import OrderedDict
from threading import Event

import torch
from helper import WIDTH
from torch import nn


class Trip(nn.Module):
    '''Does something when it sees a value that only the poisoned sample has.'''

    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, x):
        return self.act(x) if bool((x.abs() > 1e5).any()) else x * 1


def divide(x):
    raise ZeroDivisionError("this layer divides by zero")

def kill(x):
    print("killed now")
    os.kill(os.getpid(), signal.SIGKILL)

def hang(x):
    print("hanging")
    Event().wait()

def make(act):
    first = nn.Linear(WIDTH, WIDTH, bias=False)
    nn.init.eye_(first.weight)
    layers = [("first", first), ("trip", Trip(act)), ("act", nn.Tanh()), ("last", nn.Linear(WIDTH, 3))]
    batch = torch.randn(6, WIDTH), torch.randint(3, (6,))
    return nn.Sequential(OrderedDict(layers)), batch, nn.functional.cross_entropy

def dividing(): return make(divide)
def killing(): return make(kill)
def hanging(): return make(hang)
def to_nan(): return make(lambda x: x * float("nan"))
"""
POISONED = [
    "data=arrays",
    "data.path=samples.npz",
    "partition=manual",
    "partition.balance=[1,3]",
    "lr_schedule=constant",
    "optimizer=sgd",
    "pipeline.profile=flops",
    "training.eval_every=2",
    *FEW,
]


@pytest.fixture
def poisoned(folder):
    """A folder with a model and samples, one of which makes the model trip at BAD_STEP."""
    (folder / "model.py").write_text(MODEL_PY)
    (folder / "helper.py").write_text("WIDTH = 8\n")
    rng = np.random.default_rng(0)
    inputs, targets = rng.standard_normal((30, 8)), np.arange(30) % 3
    inputs[:, 7] = np.arange(30) / 30
    np.savez("samples.npz", inputs=inputs, targets=targets)
    batches = arrays("samples.npz").batches(4, 0)
    *_, (bad, _) = (next(batches) for _ in range(BAD_STEP + 1))
    inputs[round(bad[2, 7].item() * 30), 0] = 1e6  # in the second of two micro-batches
    np.savez("samples.npz", inputs=inputs, targets=targets)
    return folder


def check_kept(folder, status, steps=BAD_STEP):
    """Checks that the steps that were finished are in the result and in the event file."""
    result = result_of(folder)
    assert (result["status"], result["steps"]) == (status, steps)
    assert len(result["losses"]) == len(result["step_seconds"]) == steps
    assert scalars(folder, "train/loss") == [(i, pytest.approx(loss)) for i, loss in enumerate(result["losses"])]
    assert {path.name for path in (folder / "runs" / "run").glob("*.tmp")} == set()
    return result


def test_an_exception_in_a_layer(poisoned):
    outcome = call("train", "model=file", "model.factory=model.py:dividing", *THREADS, *POISONED)
    assert outcome.code == 1
    first, *rest = outcome.err.splitlines()
    assert first.startswith("modelpar: rank 1 failed (stage 1, layer trip")
    assert "micro-batch 1" in first or "1F1" in first
    assert first.endswith("ZeroDivisionError: this layer divides by zero")
    assert any("in divide" in line for line in rest)  # the user's own line, in the traceback of the rank
    check_kept(poisoned, "failed")
    assert listing(poisoned / "runs" / "run") == FILES  # the weights are those of the last held-out loss


def test_a_loss_that_is_not_finite(poisoned):
    words = ["train", "model=file", "model.factory=model.py:to_nan", *THREADS, *POISONED]
    outcome = call(*words)
    assert outcome.code == 1
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith(
        f"modelpar: step {BAD_STEP}: the loss of micro-batch 1 is not finite; the first to go wrong is trip"
    )
    assert "on stage 1" in outcome.err
    check_kept(poisoned, "failed")
    kept = load_file("runs/run/weights.safetensors")
    assert call(*words, f"training.steps={BAD_STEP}", "output.name=before").code == 0
    before = load_file("runs/before/weights.safetensors")
    assert set(kept) == set(before)
    assert all(torch.equal(kept[name], tensor) and tensor.isfinite().all() for name, tensor in before.items())


def test_a_worker_that_is_killed(poisoned):
    command = Command(poisoned, "train", "model=file", "model.factory=model.py:killing", "transport=rpc", *POISONED)
    outcome = command.outcome()
    assert outcome.code == 1
    assert outcome.err.startswith("modelpar: the process of rank 1 was ended by SIGKILL; it last said that it ")
    assert outcome.err.endswith("; its log is runs/run/ranks/rank1.log\n")
    assert outcome.err.count("\n") == 1
    assert command.left() == []
    result = check_kept(poisoned, "failed", result_of(poisoned)["steps"])
    assert result["steps"] in (BAD_STEP - 1, BAD_STEP)  # a step's result may be lost with the process
    assert listing(poisoned / "runs" / "run") == FILES_OF_PROCESSES
    assert (poisoned / "runs" / "run" / "ranks" / "rank1.log").read_text().endswith("killed now\n")


def test_ctrl_c_ends_after_the_step_and_saves_everything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    words = [*GPT, *FEW, "pipeline.profile=flops", "training.steps=1000000", "training.eval_every=3"]
    command = Command(tmp_path, "train", *words)
    command.wait_line("held-out loss")
    command.wait_line("held-out loss")
    command.send_signal(signal.SIGINT)
    outcome = command.outcome()
    assert outcome.code == 130
    assert outcome.err == "modelpar: stopping after the step under way; once more ends it at once\n"
    assert outcome.out.splitlines()[-1].endswith(" view runs/run")
    assert command.left() == []
    steps = result_of(tmp_path)["steps"]
    assert 6 <= steps < 1000000
    result = check_kept(tmp_path, "interrupted", steps)
    assert listing(tmp_path / "runs" / "run") == FILES_OF_PROCESSES
    assert result["heldout_losses"][-1]["steps"] == steps
    model, _, _ = gpt.build(context=8, width=16, depth=2, heads=2)
    load_into(model, "runs/run")
    expected = result["heldout_losses"][-1]["loss"]
    assert heldout_loss(model, configs.load("train", words)) == pytest.approx(expected, rel=1e-6)


def wait_text(path: Path, text: str, command: Command) -> None:
    """Waits until a command has written a text to a file."""
    idle = Event()
    while command.poll() is None and not (path.exists() and text in path.read_text()):
        idle.wait(0.02)
    assert text in path.read_text()


def test_ctrl_c_twice_ends_at_once(poisoned):
    command = Command(poisoned, "train", "model=file", "model.factory=model.py:hanging", "transport=rpc", *POISONED)
    wait_text(poisoned / "runs" / "run" / "ranks" / "rank1.log", "hanging\n", command)
    command.send_signal(signal.SIGINT)
    assert "stopping after the step under way" in command.stderr.readline()
    command.send_signal(signal.SIGINT)
    outcome = command.outcome()
    assert (outcome.code, outcome.err) == (130, "")
    assert command.left() == []
    check_kept(poisoned, "interrupted", result_of(poisoned)["steps"])


def test_what_a_background_job_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with _stop_between_steps() as asked:
            signal.raise_signal(signal.SIGINT)
            assert asked == []
            signal.raise_signal(signal.SIGTERM)
            assert asked == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_file_with_its_own_layers_over_rpc(poisoned):
    """Its classes and the module beside it reach the workers; without data of its own, the example's are drawn."""
    words = ["model=file", "model.factory=model.py:dividing", "transport=rpc", "pipeline.profile=flops"]
    command = Command(poisoned, "train", *words, *FEW, "training.steps=3", "data.num_samples=12")
    outcome = command.outcome()
    assert (outcome.code, outcome.err) == (0, "")
    assert command.left() == []
    assert "12 samples drawn from the model's example batch of 6" in outcome.out
    assert listing(poisoned / "runs" / "run") == FILES_OF_PROCESSES
    assert result_of(poisoned)["status"] == "done"
    assert set(load_file("runs/run/weights.safetensors")) == {"first.weight", "last.weight", "last.bias"}


METRICS = """
import torch
from torch import nn
from modelpar import LossResult

def loss(output, targets):
    right = (output.argmax(1) == targets).float().mean()
    total = nn.functional.cross_entropy(output, targets, reduction="sum")
    return LossResult(total, len(targets), {"accuracy": right, "large": output.detach().abs().max()})

def build():
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    return model, (torch.randn(64, 8), torch.randint(3, (64,))), loss
"""


def test_a_loss_functions_own_metrics_of_held_out_data_are_kept_and_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(METRICS)
    rng = np.random.default_rng(0)
    inputs, targets = rng.standard_normal((80, 8)).astype(np.float32), rng.integers(3, size=80)
    np.savez("samples.npz", inputs=inputs, targets=targets)
    words = ["model=file", "model.factory=mine.py:build", "data=arrays", "data.path=samples.npz", "data.heldout=0.25"]
    words += [*THREADS, "training.steps=4", "training.eval_every=2", "training.batch_size=8", "output.name=run"]
    outcome = call("train", *words)
    assert (outcome.code, outcome.err) == (0, "")
    found = result_of(tmp_path)["heldout_losses"]
    assert [(point["steps"], set(point["metrics"])) for point in found] == [
        (steps, {"accuracy", "large"}) for steps in (2, 4)
    ]
    model = file.load("mine.py:build")[0].eval()
    load_into(model, "runs/run")
    task = task_of(configs.load("train", words))
    held = list(task.data.heldout(8, 256))
    right = sum((model(x).argmax(1) == y).sum().item() for x, y in held) / sum(len(y) for _, y in held)
    assert found[-1]["metrics"]["accuracy"] == pytest.approx(right)
    assert [value for _, value in scalars(tmp_path, "train/heldout_accuracy")] == pytest.approx(
        [point["metrics"]["accuracy"] for point in found]
    )
    assert [step for step, _ in scalars(tmp_path, "train/accuracy")] == [0, 1, 2, 3]
    assert scalars(tmp_path, "result/heldout_accuracy")
    lines = outcome.out.splitlines()
    assert f"held-out accuracy  {right:.4f}" in [line.rstrip() for line in lines]
    large = f"{found[-1]['metrics']['large']:.4f}"
    assert any(line.startswith("held-out loss ") and line.endswith(large) for line in lines)
