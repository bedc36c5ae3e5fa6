"""The models that modelpar brings, and those that users bring in a file."""

import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from modelpar.errors import ConfigError
from modelpar.models import convnet, file, gpt, imports, mlp

SMALL = {
    "gpt": lambda: gpt.build(context=16, width=32, depth=2, heads=4),
    "gpt untied": lambda: gpt.build(context=16, width=32, depth=2, heads=4, tied=False),
    "mlp": lambda: mlp.build(input_shape=(4, 6), width=32, depth=2),
    "convnet": lambda: convnet.build(input_shape=(3, 8, 8), width=8, depth=3),
}


@pytest.mark.parametrize("name", SMALL)
def test_every_model_is_a_list_of_layers_whose_loss_falls(name):
    torch.manual_seed(0)
    model, (inputs, targets), loss = SMALL[name]()
    assert isinstance(model, nn.Sequential)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        value = loss(model(inputs), targets)
        assert value.shape == ()
        losses.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", SMALL)
def test_every_cut_gives_the_same_output(name):
    model, (inputs, _), _ = SMALL[name]()
    model.eval()
    whole = model(inputs)
    for cut in range(1, len(model)):
        between = model[:cut](inputs)
        assert isinstance(between, torch.Tensor)
        kept = between.clone()
        assert torch.equal(model[cut:](between), whole)
        assert torch.equal(between, kept)  # no layer writes to what it is given


@pytest.mark.parametrize("name", SMALL)
def test_weights_follow_the_global_generator_and_the_example_leaves_it_alone(name):
    torch.manual_seed(7)
    first, example, _ = SMALL[name]()
    torch.manual_seed(7)
    again, same_example, _ = SMALL[name]()
    torch.manual_seed(8)
    other, other_seed, _ = SMALL[name]()
    states = [model.state_dict() for model in (first, again, other)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])
    for part, same, of_other_seed in zip(example, same_example, other_seed, strict=True):
        assert torch.equal(part, same)
        assert torch.equal(part, of_other_seed)


def test_gpt_names_and_sizes():
    model, (inputs, targets), _ = gpt.build()
    assert [name for name, _ in model.named_children()] == ["embed", "h0", "h1", "h2", "h3", "h4", "h5", "head"]
    assert {"embed.token.weight", "embed.position", "h0.attn.qkv.weight", "head.norm.weight"} <= set(model.state_dict())
    width, context = model.get_parameter("embed.position").shape[::-1]
    block = 12 * width**2 + 13 * width
    assert sum(p.numel() for p in model.parameters()) == 256 * width + context * width + 6 * block + 2 * width
    assert inputs.shape == targets.shape == (4, context)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert model(inputs).shape == (4, context, 256)


def test_gpt_head_is_the_embedding_unless_untied():
    tied, _, _ = gpt.build(depth=1)
    assert tied.get_parameter("head.token.weight") is tied.get_parameter("embed.token.weight")
    assert "head.token.weight" not in dict(tied.named_parameters())
    untied, _, _ = gpt.build(depth=1, tied=False)
    assert untied.get_parameter("head.token.weight") is not untied.get_parameter("embed.token.weight")


def test_gpt_sees_only_the_past():
    model, (inputs, _), _ = gpt.build(context=16, width=32, depth=2, heads=4)
    model.eval()
    changed = inputs.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    before, after = model(inputs), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


def test_gpt_begins_as_a_uniform_guess():
    torch.manual_seed(0)
    model, (inputs, targets), loss = gpt.build(dropout=0.0)
    assert loss(model(inputs), targets).item() == pytest.approx(torch.tensor(256.0).log().item(), abs=0.4)


def test_gpt_drops_attention_and_activations_only_while_training():
    model, (inputs, _), _ = gpt.build(context=16, width=32, depth=1, heads=4, dropout=0.5)
    assert not torch.equal(model(inputs), model(inputs))
    attention, x = model.get_submodule("h0.attn"), torch.randn(2, 16, 32)
    assert not torch.equal(attention(x), attention(x))
    model.eval()
    assert torch.equal(model(inputs), model(inputs))


def test_gpt_refuses_more_tokens_than_positions():
    model, _, _ = gpt.build(context=16, width=32, depth=1, heads=4)
    with pytest.raises(ValueError, match="the input has 17 tokens per sample; this model has 16 positions"):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_convnet_halves_the_image_and_doubles_the_channels_twice():
    model, (inputs, _), _ = convnet.build(width=4, depth=6)
    shapes, x = [], inputs
    for layer in model:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(4, 32, 32)] * 3 + [(8, 16, 16)] * 2 + [(16, 8, 8)] * 2 + [(10,)]
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: gpt.build(width=100, heads=6), "model.width is 100, which model.heads=6 does not divide"),
        (lambda: gpt.build(depth=0), "model.depth is 0; expected at least 1"),
        (lambda: gpt.build(dropout=1.5), "model.dropout is 1.5"),
        (lambda: mlp.build(input_shape=()), r"model.input_shape is \[\]"),
        (lambda: mlp.build(width=-1), "model.width is -1; expected at least 1"),
        (lambda: mlp.build(dropout=-0.1), "model.dropout is -0.1"),
        (lambda: convnet.build(input_shape=(3, 32)), r"model.input_shape is \[3, 32\]; expected \[channels, height"),
        (lambda: convnet.build(num_classes=0), "model.num_classes is 0; expected at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


GOOD = """
import torch
from torch import nn
from neighbour import scale

class Scaled(nn.Module):
    def forward(self, x):
        return scale(x)

def build():
    model = nn.Sequential(nn.Linear(3, 2), Scaled())
    return model, (torch.ones(5, 3), torch.zeros(5, 2)), nn.functional.mse_loss
"""


def user_file(folder: Path, text: str, name: str = "mine.py") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_model_from_a_file_reaches_processes_that_cannot_import_it(tmp_path):
    user_file(tmp_path, "def scale(x):\n    return 3 * x\n", "neighbour.py")
    path_before = list(sys.path)
    model, (inputs, targets), loss = file.load(user_file(tmp_path, GOOD) + ":build")
    assert sys.path == [*path_before, str(tmp_path)]  # last: it shadows nothing
    assert loss(model(inputs), targets).shape == ()
    sent = tmp_path / "model.pickle"
    sent.write_bytes(cloudpickle.dumps((model, inputs)))
    script = "import sys, pickle; model, x = pickle.load(open(sys.argv[1], 'rb')); print(model(x).sum().item())"
    elsewhere = {**os.environ, "PYTHONPATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", script, str(sent)], env=elsewhere, cwd="/", capture_output=True, text=True, check=True
    )
    assert float(run.stdout) == pytest.approx(model(inputs).sum().item())


def test_modules_that_workers_have_are_not_sent():
    before = cloudpickle.list_registry_pickle_by_value()
    imports.pickle_by_value(Path("/"), {"modelpar.models.gpt", "json", "torch", "sys", "not imported"})
    assert cloudpickle.list_registry_pickle_by_value() == before


def test_two_files_of_one_name_do_not_clash(tmp_path):
    factories = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        text = f"import torch\ndef build():\n    return torch.nn.Linear({number}, 1), (None, None), None\n"
        factories.append(user_file(folder, text) + ":build")
    first, second = (file.load(factory) for factory in factories)
    assert (first[0].in_features, second[0].in_features) == (1, 2)
    assert first[2] is None  # the model returns its own loss


def test_relative_paths_start_at_the_working_directory(tmp_path, monkeypatch):
    user_file(tmp_path, "import torch\ndef build():\n    return torch.nn.Linear(1, 1), [1, 2], None\n")
    monkeypatch.chdir(tmp_path)
    assert file.load("mine.py:build")[1] == (1, 2)


MODEL = "import torch\nmodel = torch.nn.Linear(1, 1)\ndef build():\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def build(:\n", r"mine.py cannot be imported: \S*mine.py:1: SyntaxError: "),
        ("x = 1\nimport no_such_module\n", r"mine.py:2: ModuleNotFoundError: No module named 'no_such_module'"),
        ("import sys\nsys.exit(3)\n", r"mine.py:2: SystemExit: 3"),
        ("def make():\n    pass\n", r"mine.py has no function 'build'; it has make"),
        ("build = 3\n", r"mine.py has no function 'build'; it defines none"),
        ("def build():\n    x = 1\n    return x / 0\n", r"build\(\) failed: \S*mine.py:3: ZeroDivisionError: division"),
        ("def build(size):\n    pass\n", r"build\(\) failed: \S*mine.py: TypeError: build\(\) missing 1 required"),
        ("def build():\n    raise ValueError('two\\nlines')\n", r"mine.py:2: ValueError: two lines$"),
        (MODEL + "    return model\n", r"returned a Linear; expected \(model, example_batch, loss\)"),
        (MODEL + "    return None\n", r"returned None; expected \(model"),
        (MODEL + "    return model, (1, 2)\n", r"returned a tuple of 2; expected \(model, example_batch, loss\)"),
        (MODEL + "    return torch.nn.Linear, (1, 2), None\n", r"the class Linear as the model; expected an nn.Module"),
        (MODEL + "    return 3, (1, 2), None\n", r"returned a int as the model; expected an nn.Module"),
        (
            MODEL + "    return model, torch.ones(2), None\n",
            r"returned a Tensor as the example batch; expected \(inputs",
        ),
        (
            MODEL + "    return model, (1, 2, 3), None\n",
            r"returned a tuple of 3 as the example batch; expected \(inputs",
        ),
        (MODEL + "    return model, (1, 2), 'mse'\n", r"returned a str as the loss; expected a function of \(output, "),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        file.load(user_file(tmp_path, text) + ":build")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("mine.py", "model.factory is 'mine.py'; expected path/to/file.py:function"),
        ("mine.py:", "expected path/to/file.py:function"),
        (":build", "expected path/to/file.py:function"),
        ("no/such.py:build", "model.factory names no/such.py, which is not a file"),
    ],
)
def test_a_factory_that_names_no_file_is_refused(factory, message):
    with pytest.raises(ConfigError, match=message):
        file.load(factory)


def test_a_file_that_is_not_python_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"mine.txt is not a Python file; expected a name that ends in .py"):
        file.load(user_file(tmp_path, "build = 1", "mine.txt") + ":build")


def test_losses_can_be_sent():
    for _, _, loss in (build() for build in SMALL.values()):
        assert pickle.loads(pickle.dumps(loss)) is loss


CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("choice", ["gpt", "mlp", "convnet"])
def test_the_configuration_spells_out_the_defaults(choice):
    module = {"gpt": gpt, "mlp": mlp, "convnet": convnet}[choice]
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / "model" / f"{choice}.yaml"))
    config.pop("defaults", None)
    assert config.pop("_target_") == f"modelpar.models.{choice}.build"
    parameters = inspect.signature(module.build).parameters
    assert config == {n: list(p.default) if isinstance(p.default, tuple) else p.default for n, p in parameters.items()}
