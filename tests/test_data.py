"""Data sets: what they yield, what they hold out, what they refuse; and the thread that prepares batches ahead."""

import inspect
import math
import os
import subprocess
import sys
import threading
import traceback
from collections import Counter
from itertools import count, islice
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from modelpar.data.arrays import arrays
from modelpar.data.prefetch import prefetch
from modelpar.data.synthetic import synthetic
from modelpar.data.text import _concatenate, stdlib, text
from modelpar.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Gives every test a cache folder of its own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def documents(tmp_path):
    """Twenty documents; each holds one byte value, by which its text can be told."""
    folder = tmp_path / "documents"
    (folder / "deep").mkdir(parents=True)
    for i in range(20):
        (folder / ("deep" if i % 2 else "") / f"{i}.txt").write_bytes(bytes([65 + i]) * (100 + i))
    return folder


def equal(one, other):
    one, other = list(one), list(other)
    return len(one) == len(other) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other, strict=True)
    )


# Text


def test_windows_are_next_byte_pairs_that_cover_each_epoch_once(tmp_path):
    (tmp_path / "numbers").write_bytes(bytes(range(200)))
    data = text(str(tmp_path / "numbers"), context=8, heldout=0.1)
    inputs, targets = next(data.batches(4, seed=0))
    assert inputs.shape == targets.shape == (4, 8)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    assert torch.equal(targets, inputs + 1)
    # 180 training bytes: 22 windows of 8 with offset 0 … 3, else 21; the ragged batch is yielded.
    epoch = list(islice(data.batches(4, seed=0), 6))
    sizes = [len(x) for x, _ in epoch]
    assert sizes in ([4, 4, 4, 4, 4, 2], [4, 4, 4, 4, 4, 1])
    starts = sorted(int(x) for inputs, _ in epoch for x in inputs[:, 0])
    assert np.all(np.diff(starts) == 8)
    assert starts[0] < 8
    assert starts[-1] + 8 < 180


def test_batches_depend_on_the_seed_alone(documents):
    data = text(str(documents), context=16)
    torch.manual_seed(0)
    np.random.seed(0)
    first = list(islice(data.batches(7, seed=3), 30))
    torch.manual_seed(1)
    np.random.seed(1)
    state = torch.get_rng_state()
    assert equal(first, islice(data.batches(7, seed=3), 30))
    assert torch.equal(torch.get_rng_state(), state)
    assert not equal(first, islice(data.batches(7, seed=4), 30))


def test_epochs_differ(documents):
    data = text(str(documents), context=16)
    batches = data.batches(10_000, seed=0)
    assert not equal([next(batches)], [next(batches)])


def test_no_document_is_both_trained_on_and_held_out(documents):
    data = text(str(documents), context=16, heldout=0.25)
    train, held = set(data.train.tolist()), set(data.held.tolist())
    assert len(held) == 5
    assert not train & held
    assert len(train | held) == 20
    again = text(str(documents), context=16, heldout=0.25)
    assert np.array_equal(again.held, data.held)


def test_a_new_document_moves_few_others(documents):
    before = set(text(str(documents), context=16, heldout=0.25).held.tolist())
    (documents / "new.txt").write_bytes(b"z" * 100)
    after = set(text(str(documents), context=16, heldout=0.25).held.tolist())
    assert len(before - after) <= 1


def test_heldout_is_always_the_same_and_a_limit_spreads_over_all_of_it(documents):
    data = text(str(documents), context=16)
    whole = list(data.heldout(5))
    assert equal(whole, data.heldout(5))
    num = (len(data.held) - 1) // 16
    assert [len(x) for x, _ in whole] == [5] * (num // 5) + [num % 5] * (num % 5 > 0)
    inputs = torch.cat([x for x, _ in whole])
    some = torch.cat([x for x, _ in data.heldout(2, limit=3)])
    assert torch.equal(some, inputs[[0, num // 3, 2 * num // 3]])
    assert equal(data.heldout(5, limit=10**6), whole)


def test_a_single_file_holds_out_its_end_where_it_lies(tmp_path, cache):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(250)))
    data = text(str(path), context=4)
    assert data.held.tolist() == list(range(225, 250))
    assert isinstance(data.train, np.memmap)
    assert Path(data.train.filename) == path
    assert not cache.exists()


def test_the_baseline_is_the_entropy_of_the_held_out_bytes(tmp_path):
    # Held out: 10 bytes, of which 5 a, 3 b, 2 c.
    (tmp_path / "text").write_bytes(b"z" * 90 + b"aaaaabbbcc")
    name, value = text(str(tmp_path / "text"), context=4).baseline
    assert name == "byte-unigram entropy"
    assert value == pytest.approx(-(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2)))


def test_nothing_held_out_has_no_baseline(documents):
    data = text(str(documents), context=16, heldout=0.0)
    assert data.baseline is None
    assert list(data.heldout(4)) == []
    assert len(set(data.train.tolist())) == 20


def test_the_cache_is_mapped_reused_and_renewed_when_a_document_changes(documents, cache):
    data = text(str(documents), context=16)
    assert isinstance(data.train, np.memmap)
    assert isinstance(data.held, np.memmap)
    (cached,) = (cache / "modelpar" / "text").iterdir()
    written = cached.stat().st_mtime_ns, cached.stat().st_ino
    text(str(documents), context=32)  # another context needs no other cache
    assert (cached.stat().st_mtime_ns, cached.stat().st_ino) == written
    (documents / "0.txt").write_bytes(b"!" * 300)
    assert ord("!") in {
        *text(str(documents), context=16).train.tolist(),
        *text(str(documents), context=16).held.tolist(),
    }
    assert len(list((cache / "modelpar" / "text").iterdir())) == 2


def test_a_damaged_cache_is_written_again(documents, cache):
    expected = text(str(documents), context=16).train.tobytes()
    (cached,) = (cache / "modelpar" / "text").iterdir()
    cached.write_bytes(b"torn")
    assert text(str(documents), context=16).train.tobytes() == expected


def test_a_cache_that_cannot_be_written_is_an_error_that_says_so(documents, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"the cache cannot be written: .*; set XDG_CACHE_HOME to a folder that can"):
        text(str(documents), context=16)


def test_a_document_that_changes_while_it_is_read_leaves_no_cache(documents, cache):
    with pytest.raises(ConfigError, match=r"0.txt changed from 99 to 100 bytes while it was read; try again"):
        _concatenate([(documents / "0.txt", 99)], cache / "text" / "some.bytes")
    assert list((cache / "text").iterdir()) == []


def test_two_processes_may_write_the_cache_at_once(documents, cache):
    script = (
        "import sys, hashlib; from modelpar.data.text import text; sys.stdin.read()\n"
        "data = text(sys.argv[1], context=16); print(hashlib.sha256(data.train.tobytes()).hexdigest())"
    )
    command = [sys.executable, "-c", script, str(documents)]
    root = str(Path(__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": root}
    both = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) for _ in range(2)
    ]
    for process in both:
        process.stdin.close()  # go
    outputs = [process.stdout.read() for process in both]
    for process in both:
        process.stdout.close()
    assert [process.wait() for process in both] == [0, 0]
    assert outputs[0] == outputs[1] != ""
    assert len(list((cache / "modelpar" / "text").iterdir())) == 1


def test_patterns_choose_and_hidden_files_are_left_out(documents):
    (documents / ".git").mkdir()
    (documents / ".git" / "config").write_bytes(b"?" * 500)
    assert "20 files" in text(str(documents), context=16).description
    assert "10 files" in text(str(documents), context=16, pattern="deep/*.txt").description


def test_stdlib_is_python_source_without_packages_and_tests():
    data = stdlib(context=64)
    assert 5e6 < len(data.train) + len(data.held) < 30e6
    _, entropy = data.baseline
    assert 2.8 < entropy < 3.4  # nats; English prose has about 3.1
    assert "Python source" in data.description
    assert bytes(data.train).count(b"def ") > 5000
    assert next(data.batches(3, seed=0))[0].shape == (3, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "missing"}, r"data.path is '\S*missing', which does not exist; expected a file or a folder"),
        ({"path": "empty"}, r"empty has no text matching '\*\*/\*'; expected at least one file"),
        ({"path": "documents", "pattern": "*.py"}, r"has no text matching '\*.py'"),
        ({"path": "documents", "pattern": "/abs/*"}, r"data.pattern='/abs/\*' cannot be read"),
        ({"path": "short"}, r"training part of \S*short is 9 bytes; expected at least one window of 17 bytes"),
        ({"path": "nothing"}, r"training part of \S*nothing is 0 bytes"),
        ({"path": "tail"}, r"held-out part of \S*tail is 10 bytes; expected at least one window of 17 bytes"),
        ({"path": "documents", "heldout": 1.0}, "data.heldout is 1.0; expected a share"),
        ({"path": "documents", "context": 0}, "data.context is 0; expected at least 1"),
    ],
)
def test_text_that_cannot_be_used_is_refused_in_one_line(documents, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    for name, size in {"short": 10, "nothing": 0, "tail": 100}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    arguments = {"context": 16, **arguments, "path": str(tmp_path / arguments["path"])}
    with pytest.raises(ConfigError, match=message) as caught:
        text(**arguments)
    assert "\n" not in str(caught.value)


def test_a_path_that_the_system_refuses_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"data.path='x{300}'"):
        text("x" * 300, context=16)


# Arrays


def saved(folder, **values):
    np.savez(folder / "samples.npz", **values)
    return str(folder / "samples.npz")


def test_arrays_cover_every_sample_once_per_epoch(tmp_path):
    numbers = np.arange(45)
    data = arrays(
        saved(tmp_path, inputs=numbers.astype(np.float64)[:, None] * [1, 2], targets=numbers.astype(np.uint8))
    )
    epoch = list(islice(data.batches(8, seed=0), 6))
    assert [len(y) for _, y in epoch] == [8, 8, 8, 8, 8, 1]  # 41 of 45: 4 are held out
    held = list(data.heldout(3))
    assert [len(y) for _, y in held] == [3, 1]
    assert Counter(int(y) for _, ys in epoch + held for y in ys) == Counter(range(45))
    x, y = epoch[0]
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert torch.equal(x, y[:, None] * torch.tensor([1.0, 2.0]))
    assert equal(epoch, islice(data.batches(8, seed=0), 6))
    assert not equal(epoch, islice(data.batches(8, seed=1), 6))
    assert "45 samples from samples.npz: inputs float32 [2], targets int64 []; 4 held out" in data.description
    assert data.baseline == ("entropy of the held-out targets", pytest.approx(math.log(4)))


def test_arrays_of_numbers_to_predict_have_no_baseline(tmp_path):
    assert arrays(saved(tmp_path, inputs=np.ones((9, 2)), targets=np.ones((9, 3)))).baseline is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inputs": np.ones(3)}, r"has \['inputs'\] and no targets"),
        ({"x": np.ones(3)}, r"has \['x'\] and no inputs and no targets"),
        ({"inputs": np.ones(3), "targets": np.ones(4)}, "samples.npz has 3 inputs and 4 targets; expected as many"),
        ({"inputs": np.ones((0, 2)), "targets": np.ones(0)}, "samples.npz has no samples"),
        (
            {"inputs": np.array([{}, None], object), "targets": np.ones(2)},
            "cannot be read as an .npz file: Object arrays",
        ),
        ({"inputs": np.array(["a", "b"]), "targets": np.ones(2)}, r"inputs in \S* has dtype <U1; expected numbers"),
        ({"inputs": np.ones(2), "targets": np.float32(1)}, r"targets in \S* is a single number"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused_in_one_line(tmp_path, values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        arrays(saved(tmp_path, **values))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_arrays_are_refused(tmp_path):
    (tmp_path / "text.npz").write_bytes(b"not a zip file")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "one.npy", np.ones(3))
    for name in ("text.npz", "torn.npz", "empty.npz", "missing.npz"):
        with pytest.raises(ConfigError, match=rf"data.path='\S*{name}' cannot be read as an .npz file: "):
            arrays(str(tmp_path / name))
    with pytest.raises(ConfigError, match=r"one.npy holds a single array; expected an .npz file with inputs and"):
        arrays(str(tmp_path / "one.npy"))
    with pytest.raises(ConfigError, match=r"data.heldout is -1"):
        arrays("any", heldout=-1)


# Synthetic


def test_the_synthetic_task_can_be_learnt():
    data = synthetic(input_shape=(4, 8), num_classes=3, num_samples=512)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(32, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in islice(data.batches(32, seed=0), 60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    ((x, y),) = data.heldout(100)
    assert torch.nn.functional.cross_entropy(model(x), y).item() < 0.5 * data.baseline[1]


def test_synthetic_samples_depend_on_the_seed_alone():
    one, same, other = (synthetic((3,), seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one.inputs, same.inputs)
    assert not np.array_equal(one.inputs, other.inputs)


def test_samples_of_an_example_are_its_own():
    inputs = {
        "ids": torch.arange(6).view(3, 2),
        "mask": torch.ones(3, dtype=torch.bool),
        "scale": 0.5,
        "table": torch.ones(7),
    }
    data = synthetic(num_samples=10, example=(inputs, torch.tensor([0.0, 1.0, 2.0])))
    epoch = list(islice(data.batches(4, seed=0), 3))
    assert [len(targets) for _, targets in epoch] == [4, 4, 2]
    for x, y in epoch:
        assert torch.equal(x["ids"], inputs["ids"][y.long()])
        assert x["mask"].dtype == torch.bool
        assert x["mask"].shape == y.shape
        assert x["scale"] == 0.5
        assert x["table"] is inputs["table"]
    again = list(islice(data.batches(4, seed=0), 3))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(epoch, again, strict=True))
    ((x, y),) = data.heldout(8)
    assert torch.equal(x["ids"], inputs["ids"])
    assert [len(y) for _, y in data.heldout(2)] == [2, 1]
    assert data.description == "10 samples drawn from the model's example batch of 3"


def test_an_example_may_have_no_targets():
    x, y = next(synthetic(example=((torch.ones(3, 2), torch.ones(3)), None)).batches(4, seed=0))
    assert y is None
    assert [tuple(part.shape) for part in x] == [(4, 2), (4,)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "data.num_samples is 0"),
        ({"num_classes": 0}, "data.num_classes is 0"),
        ({"input_shape": [3, 0]}, r"data.input_shape \[3, 0\]"),
        ({"example": (1, 2)}, "the example batch cannot be drawn from: the batch has no tensor with dimension 0"),
    ],
)
def test_synthetic_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        synthetic(**arguments)


# Prefetch


def threads() -> int:
    return threading.active_count()


def test_prefetch_yields_all_in_order_and_leaves_no_thread():
    before = threads()
    with prefetch(range(100)) as items:
        assert threads() == before + 1
        assert list(items) == list(range(100))
        assert next(items, "ended") == "ended"
    assert threads() == before


def test_prefetch_prepares_no_more_than_depth_ahead():
    made, reached = [], threading.Semaphore(0)

    def source():
        for i in range(100):
            made.append(i)
            reached.release()
            yield i

    with prefetch(source(), depth=3) as items:
        for _ in range(4):  # three are ready, the fourth waits for room
            assert reached.acquire(timeout=10)
        assert made == [0, 1, 2, 3]
        assert next(items) == 0
        assert reached.acquire(timeout=10)
        assert made == [0, 1, 2, 3, 4]
    assert len(made) == 5


def test_prefetch_raises_what_the_source_raised_where_it_would_have_been_an_item():
    def source():
        yield 1
        raise KeyError("broken sample")

    before = threads()
    with prefetch(source()) as items:
        assert next(items) == 1
        with pytest.raises(KeyError, match="broken sample") as caught:
            next(items)
        assert any(frame.name == "source" for frame in traceback.extract_tb(caught.value.__traceback__))
        assert next(items, "ended") == "ended"
    assert threads() == before


def test_closing_an_endless_source_stops_its_thread_and_ends_its_block():
    before = threads()
    items = prefetch(count())
    assert next(items) == 0
    items.close()
    items.close()
    assert threads() == before
    assert next(items, "closed") == "closed"


def test_closing_while_a_consumer_waits_lets_it_go():
    hold, waiting, got = threading.Event(), threading.Event(), []

    def source():
        waiting.set()
        hold.wait(10)
        yield 1

    items = prefetch(source())
    consumer = threading.Thread(target=lambda: got.extend(items))
    consumer.start()
    assert waiting.wait(10)
    closer = threading.Thread(target=items.close)
    closer.start()
    consumer.join(10)
    assert not consumer.is_alive()
    hold.set()
    closer.join(10)
    assert not closer.is_alive()
    assert got == []


def test_prefetch_needs_room_for_one():
    with pytest.raises(ValueError, match="depth is 0; expected at least 1"):
        prefetch([], depth=0)


# Configuration


CONFIGS = Path(__file__).parents[1] / "configs"


def instantiated(group, choice, values, model=None):
    config = OmegaConf.create(
        {group: OmegaConf.load(CONFIGS / group / f"{choice}.yaml"), **({"model": model} if model else {})}
    )
    config[group].pop("defaults", None)
    config[group].merge_with(values)
    OmegaConf.resolve(config)
    return hydra.utils.instantiate(config[group], _convert_="all")


def test_data_configurations_make_data_that_fit_the_model(tmp_path, documents):
    npz = saved(tmp_path, inputs=np.ones((20, 5)), targets=np.ones(20, int))
    assert instantiated("data", "stdlib", {}, {"context": 48}).context == 48
    assert instantiated("data", "stdlib", {}).context == 64
    assert instantiated("data", "text", {"path": str(documents)}, {"context": 24}).context == 24
    assert len(instantiated("data", "arrays", {"path": npz}).train) == 18
    fitted = instantiated("data", "synthetic", {}, {"input_shape": [2, 3], "num_classes": 4})
    assert fitted.inputs.shape == (4096, 2, 3)
    assert set(fitted.targets) == {0, 1, 2, 3}
    assert instantiated("data", "synthetic", {}).inputs.shape == (4096, 256)


@pytest.mark.parametrize("choice", ["stdlib", "text", "arrays", "synthetic"])
def test_data_configurations_spell_out_the_defaults(choice):
    config = OmegaConf.load(CONFIGS / "data" / f"{choice}.yaml")
    function = hydra.utils.get_method(config.pop("_target_"))
    parameters = inspect.signature(function).parameters
    assert list(config) == list(parameters)
    for name, parameter in parameters.items():
        if parameter.default is not parameter.empty:
            assert config[name] == parameter.default
        else:
            assert name == "context" or OmegaConf.is_missing(config, name)


@pytest.mark.parametrize("choice", ["gpt", "mlp", "convnet"])
def test_model_configurations_make_models_that_run(choice):
    model, (inputs, targets), loss = instantiated("model", choice, {})
    assert torch.isfinite(loss(model(inputs), targets))


def test_the_file_configuration_takes_a_factory(tmp_path):
    (tmp_path / "mine.py").write_text("import torch\ndef build():\n    return torch.nn.Linear(2, 1), (1, 2), None\n")
    assert instantiated("model", "file", {"factory": f"{tmp_path}/mine.py:build"})[0].in_features == 2


@pytest.mark.parametrize("choice", ["mlp", "convnet", "file"])
def test_models_that_are_not_for_text_bring_synthetic_data(choice):
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / "model" / f"{choice}.yaml"))
    assert config["defaults"] == [{"override /data@_global_.data": "synthetic"}]
