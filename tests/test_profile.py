"""Measured profiles: who measures what how often, what is kept on disk, and `modelpar profile`."""

import os
import subprocess
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from commands import MLP, call, listing
from torch import nn

from modelpar import Objective, Plan, Workers, cache, partitioners, plan, schedules
from modelpar.errors import ConfigError
from modelpar.planning.profile import Profile


def blocks(count=6, width=8, **settings):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(width, width), nn.Dropout(0.1)) for _ in range(count)]
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(inplace=True), *layers, nn.Linear(width, 3))


BATCH = torch.randn(12, 8), torch.randint(3, (12,))
ADAM = partial(torch.optim.Adam, lr=1e-3)
THREADS = {"transport": "threads", "num_threads": 1, "num_microbatches": 2}


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "modelpar"


@pytest.fixture
def threads():
    with Workers(2, transport="threads") as workers:
        yield workers


@pytest.fixture
def commands(monkeypatch):
    """Collects what ranks are told to do."""
    told, real = [], Workers.command

    def command(workers, rank, name, **arguments):
        told.append((rank, name, arguments))
        return real(workers, rank, name, **arguments)

    monkeypatch.setattr(Workers, "command", command)
    return told


def never():
    raise AssertionError("something was started")


def test_all_ranks_time_all_layers_and_of_equal_ones_four(empty_cache, threads, commands):
    found = plan(Objective(blocks(), F.cross_entropy), BATCH, workers=threads, optimizer=ADAM, **THREADS).profile
    sweeps = [(rank, len(told["programs"])) for rank, name, told in commands if name == "sweep"]
    # calibrating: a layer per rank; then the model: 4 of 6 blocks, 3 others; and a stage that does nothing in each
    assert sweeps == [(0, 3), (1, 3), (0, 8), (1, 8)]
    assert (found.source, found.num_ranks, found.num_threads, found.clips) == ("measured", 2, 1, False)
    assert found.measured_at
    assert found.link is not None
    for cost in found.layers:
        assert cost.forward_seconds > 0
        assert cost.backward_seconds > 0
    assert found.layers[0].input_grad_seconds == 0  # the batch needs no gradient
    assert found.layers[1].weight_grad_seconds == 0  # it has no weights
    assert [cost.optimizer_bytes for cost in found.layers[:3]] == [2 * 72 * 4 + 8, 0, 2 * 72 * 4 + 8]
    assert len({replace(cost, name="") for cost in found.layers[2:8]}) == 1


def test_a_process_is_told_the_same_and_finds_its_slack(empty_cache, shared_workers):
    workers = shared_workers["rpc"].get()
    found = plan(
        Objective(blocks(), F.cross_entropy), BATCH, workers=workers, num_threads=1, num_microbatches=2
    ).profile
    assert found.source == "measured"
    assert 0 <= found.slack_share < 1000
    assert {cost.optimizer_bytes for cost in found.layers} == {0}  # there is no optimizer


def test_layers_that_no_cut_may_separate_share_their_time_by_flops(empty_cache, threads):
    norm = nn.BatchNorm1d(8)
    model = nn.Sequential(nn.Linear(8, 8), norm, nn.Linear(8, 8), norm, nn.Linear(8, 3))
    found = plan(Objective(model, F.cross_entropy), BATCH, workers=threads, **THREADS)
    assert found.graph.cuts == (1, 4)
    seconds = [cost.forward_seconds for cost in found.profile.layers]
    assert seconds[1] == seconds[3] == 0  # normalising counts as no operation
    assert seconds[2] > 0


def test_what_was_measured_is_not_measured_again(empty_cache, threads, commands):
    first = plan(Objective(blocks(), F.cross_entropy), BATCH, workers=threads, **THREADS)
    kinds = Counter(path.name.split("-")[0] for path in empty_cache.iterdir())
    assert kinds == {"link": 1, "profile": 1}
    commands.clear()
    again = plan(Objective(blocks(), F.cross_entropy), BATCH, workers=never, **THREADS)
    assert again.profile == first.profile
    assert again.prediction == first.prediction
    assert commands == []
    plan(Objective(blocks(), F.cross_entropy), BATCH, workers=threads, profile="anew", **THREADS)
    assert [name for _, name, _ in commands if name == "sweep"] == ["sweep"] * 4


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A cache with one profile in it."""
    with pytest.MonkeyPatch.context() as patch, Workers(2, transport="threads") as workers:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("measured")))
        yield plan(Objective(blocks(), F.cross_entropy), BATCH, workers=workers, **THREADS)


class Twice(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    "change",
    [
        {"num_microbatches": 3},
        {"num_threads": 2},
        {"optimizer": ADAM},
        {"optimizer": partial(ADAM, amsgrad=True)},
        {"max_norm": 1.0},
        {"shared_memory": False},
        {"model": blocks(width=9)},
        {"model": nn.Sequential(*list(blocks())[:-1], Twice(8, 3))},
        {"loss": lambda output, targets: F.cross_entropy(output, targets)},
    ],
    ids=["samples", "threads", "optimizer", "setting", "clipping", "messages", "shapes", "class", "loss"],
)
def test_what_would_change_the_times_is_measured(measured, change):
    objective = Objective(change.pop("model", blocks()), change.pop("loss", F.cross_entropy))
    with pytest.raises(AssertionError, match="something was started"):
        plan(objective, BATCH, workers=never, **{**THREADS, **change})


def test_weights_schedules_and_partitions_do_not_matter(measured):
    model = blocks()
    nn.init.ones_(model[0].weight)
    options = {"schedule": schedules.gpipe, "partitioner": partitioners.uniform, "tied": "exact"}
    assert plan(Objective(model, F.cross_entropy), BATCH, workers=never, **THREADS, **options).prediction


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cache.save("link", {"a": 1}, {"b": 2})
    assert cache.load("link", {"a": 1}) is None


def test_a_damaged_file_counts_as_none(empty_cache):
    cache.save("link", {"a": 1}, {"b": 2})
    assert cache.load("link", {"a": 1}) == {"b": 2}
    assert cache.load("link", {"a": 2}) is None
    [path] = empty_cache.iterdir()
    path.write_text(path.read_text()[:-9])
    assert cache.load("link", {"a": 1}) is None


def test_a_folder_that_is_not_absolute_is_not_used(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", os.sep + "nowhere")
    assert cache.folder().parts == (os.sep, "nowhere", ".cache", "modelpar")


def test_alone_it_starts_no_process_and_says_so(empty_cache, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    found = plan(Objective(blocks(), F.cross_entropy), BATCH, profile="alone", num_microbatches=2)
    assert (found.profile.num_ranks, found.profile.link) == (1, None)
    assert found.profile.layers[0].forward_seconds > 0
    assert not empty_cache.exists()


def test_a_saved_profile_is_used_and_one_that_does_not_fit_refused(tmp_path):
    objective, path = Objective(blocks(), F.cross_entropy), tmp_path / "profile.json"
    profile = plan(objective, BATCH, profile="flops", num_microbatches=2).profile
    profile.save(path)
    assert plan(objective, BATCH, profile=str(path), num_microbatches=2).profile == profile
    assert plan(objective, BATCH, profile=path, num_microbatches=2).profile == profile

    def refusal(model, num_microbatches=2):
        with pytest.raises(ConfigError) as raised:
            plan(Objective(model, F.cross_entropy), BATCH, profile=path, num_microbatches=num_microbatches)
        return str(raised.value).removeprefix(f"the profile {path} ")

    assert refusal(blocks(5)) == "is of 9 layers, the model 8; expected a profile of this model"
    assert refusal(blocks(), 4) == "is of micro-batches of 6 samples; expected 3 as here"
    named = nn.Sequential()
    for i, layer in enumerate(blocks()):
        named.add_module(f"layer{i}", layer)
    assert refusal(named).startswith("is of other layers than the model: layer0, layer1, layer2, layer3; expected")
    path.write_text("[]")
    with pytest.raises(ConfigError, match=r"profile.json is not a profile; expected what `modelpar profile` wrote"):
        Profile.load(path)
    with pytest.raises(ConfigError, match=r"the profile .*none.json cannot be read: No such file or directory"):
        Profile.load(tmp_path / "none.json")


@pytest.mark.parametrize("named", [{}, {"slack_share": 0.5, "num_ranks": 3}])
def test_a_profile_survives_its_file(tmp_path, named):
    profile = replace(plan(Objective(blocks(), F.cross_entropy), BATCH, profile="flops").profile, **named)
    profile.save(tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json") == profile


QUICK = [*MLP, "transport=threads", "training.batch_size=8", "pipeline.num_microbatches=4", "pipeline.num_threads=1"]


def test_the_command_prints_a_table_and_writes_what_others_read(empty_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    outcome = call("profile", *QUICK, "file=mine.json")
    assert (outcome.code, outcome.err) == (0, "")
    assert listing(tmp_path) == {"mine.json", "cache"}
    profile = Profile.load("mine.json")
    assert (profile.source, profile.num_ranks, profile.microbatch_size, profile.clips) == ("measured", 2, 2, True)
    rows = [line.split() for line in outcome.out.splitlines() if line.strip()]
    names = [cost.name for cost in profile.layers]
    assert [row[0] for row in rows if row[0] in names] == names
    assert outcome.out.splitlines()[-1] == "mine.json: pipeline.profile=mine.json plans with it"
    for command in (["simulate"], ["train", "training.steps=1", "output.name=run", "training.eval_samples=1"]):
        assert call(*command, *QUICK, "pipeline.profile=mine.json").code == 0
    assert Plan.load(tmp_path / "runs" / "run" / "plan.json").profile == profile
    refused = call("simulate", *QUICK, "pipeline.profile=mine.json", "training.batch_size=16")
    assert refused.err == "modelpar: the profile mine.json is of micro-batches of 2 samples; expected 4 as here\n"


def test_simulate_uses_what_was_measured_and_says_where_nothing_was(empty_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert "Layers were timed with 1 of 2 ranks busy" in call("simulate", *QUICK).out
    assert call("profile", *QUICK).code == 0
    assert "Layers were timed" not in call("simulate", *QUICK).out


@pytest.mark.parametrize("file", ["profile.txt", "nowhere/profile.json"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    outcome = call("profile", *MLP, f"file={file}")
    assert outcome.code == 2
    assert outcome.err == (f"modelpar: file is '{file}'; expected a name that ends in .json, in a folder that exists\n")


def test_train_and_compare_share_what_they_measure(empty_cache, tmp_path, monkeypatch, commands):
    monkeypatch.chdir(tmp_path)
    words = ["train", *QUICK, "training.steps=1", "training.eval_samples=1", "output.name=run"]
    assert call(*words).code == 0
    assert sum(name == "sweep" for _, name, _ in commands) == 4
    commands.clear()
    outcome = call("compare", *QUICK, "comparison.rounds=1", "comparison.steps=1", "schedule=gpipe,1f1b")
    assert outcome.code == 0
    assert "error" in outcome.out
    assert not any(name == "sweep" for _, name, _ in commands)
