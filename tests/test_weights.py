"""Weights in safetensors files, of which each rank reads its own."""

import json
import threading
from contextlib import contextmanager

import pytest
import torch
from layers import momentum
from safetensors.torch import save_file
from torch import nn
from unsplit import assert_same, make_plan

from modelpar.capture import weights
from modelpar.capture.deferred import materialize, streamed
from modelpar.capture.objective import Objective
from modelpar.errors import ConfigError
from modelpar.models import gpt
from modelpar.planning.graph import Tied
from modelpar.run.pipeline import Pipeline
from modelpar.run.workers import Workers
from modelpar.rundir import RunDir


def factory():
    return gpt.build(vocab_size=16, context=6, width=8, depth=2, heads=2)[0]


_, BATCH, LOSS = gpt.build(vocab_size=16, context=6, width=8, depth=2, heads=2)


@pytest.fixture
def state():
    torch.manual_seed(7)
    return dict(factory().state_dict())


def shards(folder, state, index=True):
    """Writes three files, and an index of them; the second name of the tied tensor is in none."""
    names = [name for name in state if name != "head.token.weight"]
    homes = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(names)}
    for home in set(homes.values()):
        save_file({name: state[name].contiguous() for name in names if homes[name] == home}, folder / home)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    return folder


def single(folder, state):
    path = folder / "one.safetensors"
    save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    return path


def of_a_run(folder, state):
    tied = (Tied(("embed.token.weight", "head.token.weight"), (0, 3), 0),)
    RunDir(folder).write_weights(state, tied)
    return folder


@pytest.mark.parametrize("write", [single, shards, lambda f, s: shards(f, s, index=False), of_a_run])
def test_training_starts_from_the_weights_in_files(tmp_path, shared_workers, state, write):
    objective = Objective(factory, LOSS, weights=write(tmp_path, state))
    whole = factory()
    whole.load_state_dict(state)
    assert_same(materialize(objective.build()).state_dict(), state)
    found = []
    for init in (objective, Objective(whole, LOSS)):
        plan = make_plan(init, BATCH, num_ranks=3, num_microbatches=2)
        with Pipeline(init, plan, workers=shared_workers["threads"].get(), optimizer=momentum) as pipeline:
            assert_same(pipeline.state_dict(), state)
            found.append((pipeline.step(BATCH).loss, pipeline.state_dict()))
    assert found[0][0] == found[1][0]
    assert_same(found[0][1], found[1][1])


def test_each_rank_reads_only_its_own_tensors(tmp_path, monkeypatch, state):
    read: dict[str, list[str]] = {}
    opened = weights._opened

    class Counted:
        def __init__(self, file):
            self._file = file

        def __getattr__(self, name):
            return getattr(self._file, name)

        def get_tensor(self, key):
            read.setdefault(threading.current_thread().name, []).append(key)
            return self._file.get_tensor(key)

    @contextmanager
    def counting(path):
        with opened(path) as file:
            yield Counted(file)

    objective = Objective(factory, LOSS, weights=shards(tmp_path, state))
    plan = make_plan(objective, BATCH, num_ranks=2, num_microbatches=2)
    monkeypatch.setattr(weights, "_opened", counting)
    with Workers(2, transport="threads") as workers, Pipeline(objective, plan, workers=workers):
        pass
    own = [{p.name for i in plan.partition.layers(s) for p in plan.graph.layers[i].parameters} for s in (0, 1)]
    own[1] = own[1] - {"head.token.weight"} | {"embed.token.weight"}  # in the file by its first name only
    assert len(read) == 2  # the controller read none
    assert sorted(map(sorted, read.values())) == sorted(map(sorted, own))


def test_weights_stream(tmp_path, state):
    model = Objective(factory, LOSS, weights=single(tmp_path, state)).build().eval()
    whole = factory().eval()
    whole.load_state_dict(state)
    with streamed(model), torch.no_grad():
        assert torch.equal(model(BATCH[0]), whole(BATCH[0]))


def test_large_tensors_are_read_row_by_row_and_converted(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_AT_ONCE", 700)
    state = {"weight": torch.randn(500, 300), "bias": torch.randn(500)}
    save_file({name: tensor.double() for name, tensor in state.items()}, tmp_path / "w.safetensors")
    model = Objective(lambda: nn.Linear(300, 500), weights=tmp_path / "w.safetensors").build()
    with streamed(model):
        assert torch.equal(model.weight, state["weight"])
        assert torch.equal(model.bias, state["bias"])
    assert_same(dict(materialize(model).state_dict()), state)


def test_buffers_that_are_saved_come_from_the_file_too(tmp_path):
    batch_norm = nn.BatchNorm1d(3)
    batch_norm(torch.randn(4, 3))
    save_file(batch_norm.state_dict(), tmp_path / "w.safetensors")
    model = Objective(lambda: nn.BatchNorm1d(3), weights=tmp_path).build()
    assert_same(dict(materialize(model).state_dict()), dict(batch_norm.state_dict()))


def missing(folder, state):
    return single(folder, {name: tensor for name, tensor in state.items() if name != "h1.up.bias"})


def misshapen(folder, state):
    return single(folder, {**state, "h1.up.bias": torch.zeros(3)})


def twice(folder, state):
    save_file({"h1.up.bias": state["h1.up.bias"]}, folder / "more.safetensors")
    return single(folder, state).parent


def damaged(folder, state):
    (folder / "bad.safetensors").write_bytes(b"no weights")
    return folder


def bad_index(folder, state):
    (folder / "model.safetensors.index.json").write_text("[]")
    return folder


def lost_shard(folder, state):
    path = shards(folder, state)
    (path / "model-1.safetensors").unlink()
    return path


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (missing, r"one.safetensors has no h1.up.bias of shape \[32\]; it has 28 tensors: "),
        (misshapen, r"one.safetensors has h1.up.bias of shape \[3\]; expected \[32\]"),
        (twice, r"h1.up.bias is in .*more.safetensors and in .*one.safetensors; expected it in one, or an index"),
        (damaged, r"bad.safetensors cannot be read: .*; expected a safetensors file"),
        (bad_index, r"index.json cannot be read: .*; expected a weight_map of names and files"),
        (lost_shard, r"model-1.safetensors cannot be read: "),
        (lambda folder, _: folder, r"weights .* has no file that ends in .safetensors; expected one or several"),
        (lambda folder, _: folder / "none", r"weights .*none does not exist; expected a safetensors file or a folder"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_starts(tmp_path, state, write, message):
    objective = Objective(factory, LOSS, weights=write(tmp_path, state))
    with pytest.raises(ConfigError, match=message) as caught:
        make_plan(objective, BATCH)
    assert len(str(caught.value).splitlines()) == 1


def test_weights_need_a_function_that_makes_the_model():
    with pytest.raises(ConfigError, match="weights is given with a Sequential, which is there as a whole"):
        Objective(factory(), LOSS, weights="w.safetensors")
