"""model=file: files in packages, with neighbours, and modules by name; what reaches ranks; what is refused."""

import os
import subprocess
import sys
from textwrap import dedent

import pytest
import torch
from commands import Command, call
from conftest import ROOT
from unsplit import check_equal

from modelpar.errors import ConfigError
from modelpar.models import file

BLOCKS = """
    from torch import nn
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
        def forward(self, x):
            return x + WORTH * self.linear(x).tanh()
    WORTH = 0.5
"""
NET = """
    import torch
    from torch import nn
    {imports}
    def loss(output, target):
        return nn.functional.mse_loss(output, target)
    def build():
        model = nn.Sequential(*(Block() for _ in range(4)))
        return model, (torch.ones(8, 4), torch.zeros(8, 4)), loss
"""
QUICK = ["pipeline.profile=flops", "pipeline.num_threads=1", "pipeline.num_microbatches=2", "training.batch_size=4"]


@pytest.fixture(autouse=True)
def as_before(monkeypatch, tmp_path):
    """Leaves the path as it was, without folders that commands of other tests put there, and no module of a folder that
    will be gone."""
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if str(tmp_path.parent) not in folder])
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or list(getattr(module, "__path__", [""]))).find(str(tmp_path)) >= 0:
            del sys.modules[name]


def write(folder, **files):
    """Writes Python files; "__" in a name is a folder's slash."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/').replace('INIT', '__init__')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))


def package(folder, *names):
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "__init__.py").write_text("")


def net(imports):
    return dedent(NET).replace("{imports}", imports)


def relative(folder):
    package(folder, "mine")
    write(folder, mine__net=net("from .blocks import Block"), mine__blocks=BLOCKS)
    return f"{folder}/mine/net.py:build"


def nested(folder):
    package(folder, "mine", "mine/parts", "mine/nets", "mine/nets/deep")
    write(folder, mine__parts__blocks=BLOCKS, mine__nets__deep__net=net("from ...parts.blocks import Block"))
    return f"{folder}/mine/nets/deep/net.py:build"


def without_init(folder):
    write(folder, mine__net=net("from .blocks import Block"), mine__blocks=BLOCKS)
    return f"{folder}/mine/net.py:build"


def by_own_name(folder):
    package(folder, "mine")
    write(folder, mine__net=net("from mine.blocks import Block\nfrom . import blocks"), mine__blocks=BLOCKS)
    return f"{folder}/mine/net.py:build"


def neighbours(folder):
    write(
        folder,
        net=net("import helpers.more as more\nBlock = more.Block"),
        helpers__more=net("from blocks import Block"),
    )
    write(folder, blocks=BLOCKS)
    return f"{folder}/net.py:build"


def neighbours_in_a_package(folder):
    package(folder, "mine")
    write(folder, mine__net=net("from blocks import Block"), mine__blocks=BLOCKS)
    return f"{folder}/mine/net.py:build"


def named_as_an_installed_package(folder):
    package(folder, "numpy")
    write(folder, numpy__net=net("from .blocks import Block"), numpy__blocks=BLOCKS)
    return f"{folder}/numpy/net.py:build"


def in_the_package_itself(folder):
    package(folder, "mine")
    write(folder, mine__INIT=net("from .blocks import Block"), mine__blocks=BLOCKS)
    return f"{folder}/mine/__init__.py:build"


KINDS = [
    relative, nested, without_init, by_own_name, neighbours, neighbours_in_a_package, named_as_an_installed_package,
    in_the_package_itself,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_ranks_that_were_started_before_get_all_that_belongs_to_a_model(shared_workers, tmp_path, kind):
    torch.manual_seed(0)
    model, batch, loss = file.load(kind(tmp_path))
    check_equal(shared_workers["rpc"].get(), model, loss, [batch])


@pytest.mark.parametrize("kind", [relative, neighbours, named_as_an_installed_package], ids=lambda kind: kind.__name__)
def test_two_folders_with_the_same_names_do_not_clash(tmp_path, kind):
    first, second = tmp_path / "first", tmp_path / "second"
    factories = [kind(first), kind(second)]
    for path in second.rglob("blocks.py"):
        path.write_text(path.read_text().replace("0.5", "0.25"))
    found = []
    for factory in factories:
        torch.manual_seed(0)
        model, (x, _), _ = file.load(factory)
        found.append((model(x) - x).detach())
    assert not torch.allclose(*found)
    torch.manual_seed(0)
    model, (x, _), _ = file.load(factories[0])
    assert torch.equal((model(x) - x).detach(), found[0])


def test_the_same_file_twice_is_two_models_of_one_kind(tmp_path):
    factory = relative(tmp_path)
    (first, _, _), (second, _, _) = file.load(factory), file.load(factory)
    assert first is not second
    assert type(first[0]) is type(second[0])


def test_what_is_imported_only_when_it_is_called_is_found(tmp_path):
    late = "class Block(nn.Module):\n    def forward(self, x):\n        import late\n        return late.f(x)"
    write(tmp_path, net=net(late), late="def f(x):\n    return 3 * x\n")
    model, (x, _), _ = file.load(f"{tmp_path}/net.py:build")
    assert torch.equal(model(x), 81 * x)


@pytest.mark.parametrize("name", ["mine.nets.net", "mine"])
def test_modules_of_the_current_folder_have_names(tmp_path, name):
    package(tmp_path, "mine", "mine/nets")
    write(tmp_path, mine__nets__net=net("from mine.blocks import Block"), mine__blocks=BLOCKS)
    write(tmp_path, mine__INIT="def build():\n    from .nets import net\n    return net.build()\n")
    command = Command(tmp_path, "verify", "model=file", f"model.factory={name}:build", *QUICK, "steps=1")
    code, out, err = command.outcome()
    assert (code, err) == (0, ""), out
    assert f"-{name.rpartition('.')[2]}-1f1b-verify" in "".join(path.name for path in (tmp_path / "runs").iterdir())


def test_modules_on_pythonpath_have_names(tmp_path):
    write(tmp_path, lib__own_net=net("from own_blocks import Block"), lib__own_blocks=BLOCKS)
    words = ["verify", "model=file", "model.factory=own_net:build", *QUICK, "steps=1"]
    path = os.pathsep.join([str(ROOT), str(tmp_path / "lib")])
    run = subprocess.run(
        [sys.executable, "-m", "modelpar.cli", *words],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, ""), run.stdout


@pytest.mark.parametrize(
    ("files", "factory", "message"),
    [
        (
            {},
            "no.such.module:build",
            "model.factory names no.such.module, which is neither a file nor a module that is .*",
        ),
        ({}, "json.nothing:build", r"json.nothing cannot be imported: json.nothing: ModuleNotFoundError: No module .*"),
        ({}, "json:build", r"json has no function 'build'; .*"),
        (
            {"mine": "x = 1\nimport nothing"},
            "mine:build",
            r"mine cannot be imported: .*mine.py:2: ModuleNotFoundError: .*",
        ),
        (
            {"torch": ""},
            "torch:build",
            r"model.factory names torch, and torch is both .*torch.py and .*; expected path/.*",
        ),
        (
            {"mine": "def build():\n    return 3"},
            "mine:build",
            r"build\(\) in mine returned a int; expected \(model, .*",
        ),
        (
            {"mine": ""},
            "mine.py",
            "model.factory is 'mine.py'; expected path/to/file.py:function or package.module:func.*",
        ),
        ({}, "some-folder/mine:build", "model.factory names some-folder/mine, which is not a file"),
        (
            {"mine": "import blocks", "blocks": "\n1 / 0"},
            "mine.py:build",
            r"mine.py cannot be .*/blocks.py:2: ZeroDiv.*",
        ),
        (
            {"mine": "import blocks", "blocks": "x = ("},
            "mine.py:build",
            r"mine.py cannot be .*/blocks.py:1: SyntaxError.*",
        ),
        (
            {"mine": "from .blocks import Block"},
            "mine.py:build",
            r"mine.py cannot be imported: .*mine.py:1: ModuleNotFo.*",
        ),
        (
            {"mine": "from . import nothing"},
            "mine.py:build",
            r"mine.py cannot be imported: .*mine.py:1: ImportError: .*",
        ),
        ({"mine": "from ................ import x"}, "mine.py:build", r"mine.py cannot be imported: .*mine.py:1: .*"),
        (
            {"mine": "\nimport yaml", "yaml": ""},
            "mine.py:build",
            r".*/mine.py:2 imports yaml, which is .*/yaml.py and also .*; expected a name for the former .*",
        ),
        (
            {"mine": "import blocks\ndef build():\n    pass", "blocks": "import queue", "queue": ""},
            "mine.py:build",
            r".*/blocks.py:1 imports queue, which is .*/queue.py and also .*queue.py; expected a name for .*",
        ),
    ],
)
def test_what_cannot_be_imported_is_refused_in_one_line(tmp_path, monkeypatch, files, factory, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, **files)
    with pytest.raises(ConfigError, match=f"^{message}$") as caught:
        file.load(factory)
    assert "\n" not in str(caught.value)
    assert "modelpar/models" not in str(caught.value)


def test_files_beside_it_that_a_model_does_not_import_may_have_any_name(tmp_path):
    write(tmp_path, net=net("from blocks import Block"), blocks=BLOCKS, yaml="1 / 0", queue="1 / 0")
    assert len(file.load(f"{tmp_path}/net.py:build")[0]) == 4


def test_the_command_line_says_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, net="import blocks\n", blocks="x = 1\nraise ValueError('two\\nlines')\n")
    outcome = call("train", "model=file", "model.factory=net.py:build")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"modelpar: net.py cannot be imported: {tmp_path}/blocks.py:2: ValueError: two lines\n"
