"""The scripts and the package, for real and without a network.

The scripts run in a small project of their own: no dependencies, and a build backend that can break or wait. Its
commands (modelpar, ruff, mypy, pytest) print what they were called with.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from modelpar.paths import config_dir

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["scripts/setup", "scripts/train", "scripts/test", "scripts/gpu_check", ".ci/run"]

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""

BACKEND = """
import os, socket, zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    if os.path.exists("broken"):
        raise RuntimeError("the build broke")
    if os.path.exists("gate"):  # holds a port: waits here until the test closes the connection
        socket.create_connection(("127.0.0.1", int(open("gate").read()))).recv(1)
    commands = ["modelpar", "pytest", "mypy", "ruff"]
    files = {
        "tool.py": "import json, os, sys\\n"
                   "def main():\\n"
                   "    print(json.dumps([os.path.basename(sys.argv[0]), os.getcwd(), sys.argv[1:]]))\\n",
        "modelpar-1.dist-info/METADATA": "Metadata-Version: 2.1\\nName: modelpar\\nVersion: 1\\n"
                                         "Provides-Extra: test\\n",
        "modelpar-1.dist-info/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
        "modelpar-1.dist-info/entry_points.txt":
            "[console_scripts]\\n" + "".join(f"{name} = tool:main\\n" for name in commands),
    }
    files["modelpar-1.dist-info/RECORD"] = "".join(f"{name},,\\n" for name in files)
    with zipfile.ZipFile(os.path.join(folder, "modelpar-1-py3-none-any.whl"), "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return "modelpar-1-py3-none-any.whl"
"""


class Project:
    """A small project with the real scripts, at a path with a space in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.venv = root / ".venv"

    def start(self, script: str, *arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment |= {"PIP_NO_INDEX": "1", "PYTHON": sys.executable} | variables
        return subprocess.Popen(
            [str(self.root / script), *arguments],
            cwd=cwd or self.root.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *arguments: str, cwd: Path | None = None, **variables: str) -> tuple[int, str, str]:
        process = self.start(script, *arguments, cwd=cwd, **variables)
        output, errors = process.communicate()
        return process.returncode, output, errors

    def calls(self, script: str, *arguments: str, cwd: Path | None = None) -> list[tuple[str, Path, list[str]]]:
        """Runs a script; returns the name, folder and arguments of each command that it called."""
        code, output, errors = self.run(script, *arguments, cwd=cwd)
        assert code == 0, errors
        return [(name, Path(folder), rest) for name, folder, rest in map(json.loads, output.splitlines())]

    @contextmanager
    def building(self) -> Iterator[subprocess.Popen[str]]:
        """Starts a setup and yields when its build is under way; the build goes on at the end of the block."""
        gate = self.root / "gate"
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(60)
            gate.write_text(str(server.getsockname()[1]))
            process = self.start("scripts/setup")
            connection, _ = server.accept()
            gate.unlink()
            with connection:
                yield process

    def change_pins(self) -> None:
        with (self.root / "scripts" / "constraints.txt").open("a") as pins:
            pins.write("# changed\n")


def make_project(root: Path) -> Project:
    (root / "scripts").mkdir(parents=True)
    for name in ("setup", "install.py", "train", "test"):
        shutil.copy(ROOT / "scripts" / name, root / "scripts" / name)
    (root / "scripts" / "constraints.txt").touch()
    (root / "setup.cfg").touch()
    (root / "pyproject.toml").write_text(PYPROJECT)
    (root / "backend.py").write_text(BACKEND)
    return Project(root)


@pytest.fixture(scope="module")
def first_call(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, int, str, str]:
    """A project whose scripts/train was called from another folder, and what came of it."""
    project = make_project(tmp_path_factory.mktemp("scripts") / "a place")
    return project, *project.run(
        "scripts/train", "model=mlp", "data.path=a b", cwd=tmp_path_factory.mktemp("elsewhere")
    )


@pytest.fixture
def project(first_call: tuple[Project, int, str, str]) -> Iterator[Project]:
    """The project of the first call, up to date, with a file in .venv that only a new .venv loses."""
    project = first_call[0]
    code, _, errors = project.run("scripts/setup")
    assert code == 0, errors
    (project.venv / "kept").touch()
    yield project
    (project.root / "broken").unlink(missing_ok=True)
    (project.root / "gate").unlink(missing_ok=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_sound(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, ROOT / script], check=True)


def test_train_sets_up_and_passes_its_arguments_on(first_call: tuple[Project, int, str, str]) -> None:
    _, code, output, errors = first_call
    assert code == 0, errors
    name, folder, arguments = json.loads(output)
    assert (name, arguments) == ("modelpar", ["train", "model=mlp", "data.path=a b"])
    assert Path(folder).name.startswith("elsewhere")
    first, last = errors.splitlines()
    assert "making .venv" in first
    assert "done in" in last


def test_second_setup_does_nothing(project: Project) -> None:
    before = (project.venv / "modelpar-setup").stat()
    assert project.run("scripts/setup") == (0, "", "")
    assert project.run("scripts/setup", PYTHON="") == (0, "", "")
    assert (project.venv / "modelpar-setup").stat().st_mtime_ns == before.st_mtime_ns


def test_test_runs_every_check_in_the_root(project: Project) -> None:
    assert project.calls("scripts/test") == [
        ("ruff", project.root, ["check", "."]),
        ("ruff", project.root, ["format", "--check", "."]),
        ("mypy", project.root, []),
        ("pytest", project.root, []),
    ]


def test_test_with_arguments_runs_pytest_on_paths_seen_from_the_caller(project: Project, tmp_path: Path) -> None:
    (tmp_path / "test_x.py").touch()
    (tmp_path / "folder").mkdir()
    arguments = ["test_x.py::test_y", "./folder", str(tmp_path), "test_absent.py", "-k", "folder", "-x"]
    expected = [f"{tmp_path}/test_x.py::test_y", f"{tmp_path}/./folder", *arguments[2:]]
    assert project.calls("scripts/test", *arguments, cwd=tmp_path) == [("pytest", project.root, expected)]


def test_changed_pins_update_the_venv_in_place(project: Project) -> None:
    project.change_pins()
    code, _, errors = project.run("scripts/setup", PYTHON="")
    assert code == 0
    assert "bringing .venv up to date" in errors
    assert (project.venv / "kept").exists()


def test_failed_update_shows_the_log_and_is_tried_again(project: Project) -> None:
    project.change_pins()
    (project.root / "broken").touch()
    code, _, errors = project.run("scripts/train")
    assert code == 1
    assert "RuntimeError: the build broke" in errors
    assert errors.splitlines()[-1].startswith("setup: failed (exit code 1), the output is above: ")
    (project.root / "broken").unlink()
    code, _, errors = project.run("scripts/setup")
    assert code == 0
    assert "bringing .venv up to date" in errors
    assert (project.venv / "kept").exists()


def test_two_at_once_install_once(project: Project) -> None:
    project.change_pins()
    with project.building() as first:
        second = project.start("scripts/setup")
        assert second.stderr is not None
        assert second.stderr.readline() == "setup: waiting for another setup of this folder to finish\n"
    assert "done in" in first.communicate()[1]
    assert second.communicate() == ("", "")
    assert (first.returncode, second.returncode) == (0, 0)


def test_killed_setup_is_made_again(project: Project) -> None:
    project.change_pins()
    with project.building() as killed:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.communicate()
    code, _, errors = project.run("scripts/setup", PYTHON="")
    assert code == 0, errors
    assert "making .venv" in errors
    assert not (project.venv / "kept").exists()
    assert project.calls("scripts/train")[0][0] == "modelpar"


def test_copied_checkout_gets_its_own_venv(project: Project, tmp_path: Path) -> None:
    shutil.copytree(project.root, tmp_path / "copy", symlinks=True)
    copy = Project(tmp_path / "copy")
    code, _, errors = copy.run("scripts/setup")
    assert code == 0, errors
    assert "making .venv" in errors
    assert str(project.root) not in (copy.venv / "bin" / "modelpar").read_text()


def test_foreign_venv_is_left_alone(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    project.venv.mkdir()
    (project.venv / "precious").touch()
    code, _, errors = project.run("scripts/setup")
    assert code == 1
    advice = "move it away, or install modelpar there with pip yourself"
    assert errors == f"setup: {project.venv} was not made by scripts/setup: {advice}\n"
    assert (project.venv / "precious").exists()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo 'pyenv: python3: command not found'; echo more; exit 127", "pyenv: python3: command not found"),
        ("echo 'is Python 3.10' >&2; exit 1", "is Python 3.10"),
    ],
)
def test_unfit_interpreter_is_one_line(tmp_path: Path, body: str, reason: str) -> None:
    project = make_project(tmp_path / "project")
    shim = tmp_path / "python"
    shim.write_text(f"#!/bin/sh\n{body}\n")
    shim.chmod(0o755)
    code, output, errors = project.run("scripts/train", PYTHON=str(shim))
    assert (code, output) == (1, "")
    assert len(errors.splitlines()) == 1
    assert f"but {shim} {reason}; PYTHON=" in errors
    assert not project.venv.exists()


def test_setup_of_this_checkout_is_done() -> None:
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip(f"runs under {sys.prefix}, not under this checkout's .venv")
    done = subprocess.run([ROOT / "scripts" / "setup"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_configs_are_found_in_the_checkout() -> None:
    assert config_dir() == ROOT / "configs"


def test_wheel_holds_every_file_and_finds_its_configs(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    for folder in ("modelpar", "configs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    expected = {str(file.relative_to(source)) for file in (source / "modelpar").rglob("*") if file.is_file()}
    expected |= {f"modelpar/{file.relative_to(source)}" for file in (source / "configs").rglob("*.yaml")}

    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", tmp_path, "./"], cwd=source, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (listed,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
        points = archive.read(listed).decode()
    assert {name for name in names if name.startswith("modelpar/")} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "[tensorboard_plugins]\nmodelpar = modelpar.report.tensorboard.plugin:PipelinePlugin" in points

    subprocess.run([*pip, "install", *offline, "--target", site, wheel], check=True)
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from modelpar.paths import config_dir; print(config_dir())"
    found = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == site / "modelpar" / "configs"
