"""What the documentation shows is true: its code runs, its commands, links and pictures exist."""

import argparse
import doctest
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from modelpar import cli
from modelpar import config as configs

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def files_in(page: Path) -> dict[str, str]:
    """Returns the blocks that stand under a line with a file's name, by that name."""
    return dict(re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))


def commands(page: Path) -> list[list[str]]:
    """Returns every command that a console block shows, split into words."""
    lines = [line for block in blocks(page, "console") for line in block.splitlines()]
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if line.startswith("$ ")]


def run_python(arguments: list[str], folder: Path, **variables: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments} in {folder}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


# --- the README ---------------------------------------------------------------------------------------------------


def test_the_ten_lines_run(tmp_path):
    program, *_ = blocks(ROOT / "README.md", "python")
    (tmp_path / "ten.py").write_text(program)
    shown = run_python(["-W", "error", "ten.py"], tmp_path)
    loss, before = (float(word) for word in shown.split()[:2])
    assert 0 < loss < before


def test_the_code_that_loads_weights_runs(tmp_path, monkeypatch):
    _, load = blocks(ROOT / "README.md", "python")
    monkeypatch.chdir(tmp_path)
    small = ["model=mlp", "model.width=8", "model.depth=2", "pipeline.profile=flops", "training.eval_samples=1"]
    cli.main(["train", "transport=threads", "training.steps=1", *small, "output.name=my_run"])
    loaded = {}
    exec(load.replace("mlp.build()", "mlp.build(width=8, depth=2)"), loaded)
    saved = load_file(tmp_path / "runs" / "my_run" / "weights.safetensors")
    assert saved
    assert all(torch.equal(loaded["model"].state_dict()[name], value) for name, value in saved.items())


def test_the_commands_of_the_readme_are_real():
    shown = commands(ROOT / "README.md")
    assert {words[1] for words in shown if words[0] == "modelpar"} == {
        "train",
        "simulate",
        "compare",
        "profile",
        "verify",
        "explain",
        "view",
        "report",
    }
    for words in shown:
        check_command(words)


def test_a_command_that_does_not_exist_is_found():
    wrong = ["modelpar trane", "modelpar train model=mpl", "scripts/tests", "modelpar compare partition=a,b", "ls"]
    for line in [*wrong, "modelpar train -m model=gpt,mpl", "modelpar train training.stepz=3", "modelpar view"]:
        with pytest.raises((ValueError, AssertionError, argparse.ArgumentError, SystemExit)):
            check_command(line.split())


def check_command(words: list[str]) -> None:
    """Raises unless a script or a command with such overrides exists; starts nothing."""
    if words == [".", ".venv/bin/activate"]:
        return
    if words[0].startswith("scripts/"):
        assert os.access(ROOT / words[0], os.X_OK), words
        return
    assert words[0] == "modelpar", words
    command, *rest = words[1:]
    if command in ("view", "report", "explain"):
        parser = argparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("paths", nargs="+")
        if command != "explain":
            parser.add_argument(*(["--port"] if command == "view" else ["--output"]))
        parser.parse_args(rest)
    elif command == "compare" or rest[:1] == ["-m"]:
        lists = configs.parse_lists([word for word in rest if word != "-m"])
        for overrides in zip_longest(*lists):  # every choice once; together they are many
            configs.load(command, [override for override in overrides if override])
    else:
        assert command in ("train", "simulate", "profile", "verify"), words
        configs.load(command, rest)


# --- docs/extending.md --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the package with the files of docs/extending.md in it."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("modelpar", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in files_in(ROOT / "docs" / "extending.md").items():
        assert not (folder / name).exists(), f"{name} exists already"
        (folder / name).write_text(text)
    return folder


def test_every_block_of_extending_belongs_to_a_file():
    page = ROOT / "docs" / "extending.md"
    assert len(files_in(page)) == len(blocks(page, "python")) + len(blocks(page, "yaml"))


RUN_ALL = """
import runpy, sys
from modelpar import cli
for file in FILES:
    runpy.run_path(file)
for words in COMMANDS:
    print("$", *words, flush=True)
    cli.main(words)
"""


def test_the_files_and_commands_of_extending_run(extended):
    """All in one process: a fresh one per command would import torch a dozen times."""
    page = ROOT / "docs" / "extending.md"
    files = [name for name in files_in(page) if name.endswith(".py")]
    words = [words[1:] for words in commands(page)]
    (extended / "run_all.py").write_text(RUN_ALL.replace("FILES", repr(files)).replace("COMMANDS", repr(words)))
    shown = run_python(["-W", "error", "run_all.py"], extended, PYTHONPATH=str(extended))
    assert len(files) >= 5
    for printed in shown.split("\n$ "):
        assert re.search(r"modelpar view|bubble", printed), printed


# --- the other pages ----------------------------------------------------------------------------------------------


def test_how_a_step_runs_shows_what_python_prints():
    failed, tried = doctest.testfile(str(ROOT / "docs" / "how-a-step-runs.md"), module_relative=False)
    assert (failed, tried > 5) == (0, True)


def test_the_split_model_of_the_example_has_the_same_bits(tmp_path):
    shown = run_python(["-W", "error", str(ROOT / "docs" / "examples" / "same_bits.py")], tmp_path)
    assert shown.endswith("the weights are equal to the bit\n")


def test_the_what_if_example_runs(capsys):
    runpy.run_path(str(ROOT / "docs" / "examples" / "what_if.py"))
    shown = capsys.readouterr().out
    assert "one_f_one_b  8 micro-batches" in shown
    assert "rank 3 │" in shown


def test_the_model_of_the_example_can_be_planned(capsys):
    factory = ROOT / "docs" / "examples" / "my_model.py"
    cli.main(["simulate", "model=file", f"model.factory={factory}:build", "pipeline.num_ranks=3"])
    assert "3 stages" in capsys.readouterr().out


def test_every_example_is_run_here():
    here = Path(__file__).read_text()
    assert EXAMPLES
    assert [path.name for path in EXAMPLES if f'"{path.name}"' not in here] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    for target in targets:
        if not re.match(r"https?://", target):
            path, _, anchor = target.partition("#")
            found = (page.parent / path).resolve() if path else page
            assert found.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(found), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_pictures_are_small_and_used():
    text = "".join(page.read_text() for page in PAGES)
    pictures = sorted((ROOT / "docs" / "images").glob("*.png"))
    assert pictures
    for picture in pictures:
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert picture.stat().st_size < 300_000, picture.name
        assert picture.name in text, f"no page shows {picture.name}"


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLES], ids=lambda page: page.name)
def test_no_path_of_one_machine(page):
    assert re.findall(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|mnt|opt|usr)\b\S*", page.read_text()) == []
