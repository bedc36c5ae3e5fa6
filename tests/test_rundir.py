"""The folder of a run: its names, its files written whole or not at all, and the weights read back from it."""

import json
import shlex
import subprocess
from contextlib import ExitStack

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from torch import nn

from modelpar.errors import ConfigError
from modelpar.planning.graph import Tied
from modelpar.rundir import RunDir, load_into


def model(width: int = 4) -> nn.Sequential:
    """Returns two layers that share a weight, and one with buffers."""
    layers = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, width, bias=False))
    layers[2].weight = layers[0].weight
    return layers


TIED = (Tied(("0.weight", "2.weight"), (0, 2)),)


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(1)
    trained = model()
    trained[1].running_mean += 3
    found = RunDir.create(tmp_path, "run", "")
    found.write_weights(trained.state_dict(), TIED)
    return found, trained


def test_a_run_without_a_name_gets_one_of_its_own(tmp_path):
    runs = {RunDir.create(tmp_path / "new", None, "gpt-1f1b").path for _ in range(5)}
    assert len(runs) == 5
    assert all(path.is_dir() and path.parent == tmp_path / "new" and "-gpt-1f1b" in path.name for path in runs)


@pytest.mark.parametrize("name", ["first", "below/first", 2026])
def test_a_run_has_the_name_it_was_given_once(tmp_path, name):
    run = RunDir.create(tmp_path, name, "gpt")
    assert run.path == tmp_path / str(name)
    with pytest.raises(ConfigError) as error:
        RunDir.create(tmp_path, name, "gpt")
    assert str(error.value) == f"the run folder {run.path} exists already; expected a new output.name"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"the run folder .*/file/run cannot be made: Not a directory"):
        RunDir.create(tmp_path / "file", "run", "")


def test_a_folder_is_made_when_it_is_needed_and_goes_when_nothing_came_of_it(tmp_path):
    for name, logs in (("unused", False), ("made", False), ("used", True)):
        with ExitStack() as exits:
            folder = RunDir.when_needed(tmp_path / name, "run", "", exits)
            assert not (tmp_path / name).exists()
            if name != "unused":
                run = folder()
                assert folder() is run
                run.ranks.mkdir()
            if logs:
                (run.ranks / "rank0.log").write_text("started")
        assert (tmp_path / name / "run").exists() is logs


def test_only_an_empty_folder_is_removed(tmp_path):
    empty, used = (RunDir.create(tmp_path, name, "") for name in ("empty", "used"))
    used.write_result({})
    empty.remove_if_empty()
    used.remove_if_empty()
    assert [path.name for path in tmp_path.iterdir()] == ["used"]


def test_results_are_replaced_whole(tmp_path):
    run = RunDir.create(tmp_path, "run", "")
    run.write_result({"losses": [1.5]})
    run.write_result({"losses": [1.5, 1.25]})
    assert json.loads(run.result.read_text()) == {"losses": [1.5, 1.25]}
    with pytest.raises(TypeError):
        run.write_result({"losses": object()})
    assert json.loads(run.result.read_text()) == {"losses": [1.5, 1.25]}


def test_the_command_to_view_a_run_can_be_typed(tmp_path):
    command = shlex.split(RunDir.create(tmp_path, "my [bold] run", "").view_command())
    assert command[-2:] == ["view", str(tmp_path / "my [bold] run")]
    shown = subprocess.run([*command[:-1], "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "usage: modelpar view" in shown.stdout


def test_tied_weights_are_stored_once(run):
    with safe_open(run[0].weights, "pt") as file:
        assert "2.weight" not in file.keys()  # noqa: SIM118
        assert set(file.keys()) == set(run[1].state_dict()) - {"2.weight"}
        assert json.loads(file.metadata()["tied"]) == {"2.weight": "0.weight"}


@pytest.mark.parametrize("what", ["folder", "file"])
def test_the_weights_come_back_to_the_bit(run, what):
    folder, trained = run
    fresh = model()
    load_into(fresh, folder.path if what == "folder" else str(folder.weights))
    assert fresh[2].weight is fresh[0].weight
    for name, tensor in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_an_untied_copy_gets_the_shared_weight_twice(run):
    folder, trained = run
    untied = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))
    load_into(untied, folder.path)
    assert torch.equal(untied[2].weight, trained[0].weight)


def test_weights_that_do_not_fit_are_refused_in_one_line(run):
    with pytest.raises(ConfigError) as error:
        load_into(model(width=5), run[0].path)
    assert str(error.value).startswith(f"the weights in {run[0].weights} do not fit the model: ")
    assert "size mismatch for 0.weight" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"Missing key.*3\.weight"):
        load_into(nn.Sequential(*model(), nn.Linear(4, 4)), run[0].path)


def test_missing_and_broken_weights_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere does not exist; expected the folder of a run with weights"):
        load_into(model(), tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"weights.safetensors does not exist; expected the folder of a run"):
        load_into(model(), tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match=r"weights.safetensors cannot be read: "):
        load_into(model(), tmp_path)
