"""Imports only go down: planning < capture < run, and report beside run; assembly on top of all.

cli, train, compare …   modelpar/*.py: the only ones that import hydra
report/                 never imports run/ or capture/
run/                    may import capture/, never report/
capture/                never imports run/ or report/
planning/               numpy and the standard library, never torch
"""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import modelpar

ROOT = Path(modelpar.__file__).parent
RPC = "torch.distributed.rpc"


def imported(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """Yields (line, full dotted name) of every import in a file, also of those inside functions and type checks."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{origin}.{alias.name}"


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def broken_rule(floor: str, file: str, name: str) -> str | None:
    """Returns the rule that a file breaks by importing a name, or None. The floor of assembly is the empty one."""
    ours = within(name, "modelpar")
    if floor == "planning" and not (
        within(name, "modelpar.planning", "modelpar.errors") if ours else name.split(".")[0] in PLANNING
    ):
        return "planning/ imports only numpy, the standard library, modelpar.errors and modelpar.planning"
    if floor == "report" and within(name, "modelpar.run", "modelpar.capture"):
        return "report/ never imports run/ or capture/"
    if floor == "capture" and within(name, "modelpar.run", "modelpar.report"):
        return "capture/ never imports run/ or report/"
    if floor == "run" and within(name, "modelpar.report"):
        return "run/ never imports report/"
    if floor and within(name, "hydra"):
        return "only assembly, modelpar/*.py, imports hydra"
    if floor and ours and not (within(name, "modelpar.errors") or name.split(".")[1] in FOLDERS):
        return "imports only go down: no folder imports assembly, modelpar/*.py"
    if within(name, RPC) and file != "run/rpc.py":
        return f"only run/rpc.py imports {RPC}"
    return None


PLANNING = sys.stdlib_module_names | {"numpy"}
FOLDERS = {path.parent.name for path in ROOT.glob("*/__init__.py")}


def broken(root: Path) -> list[str]:
    """Returns "file:line imports name: rule" for every broken rule under a folder that holds the package."""
    found = []
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root)
        floor = file.parts[0] if len(file.parts) > 1 else ""
        module = ".".join(("modelpar", *file.with_suffix("").parts)).removesuffix(".__init__")
        for line, name in imported(path, module):
            rule = broken_rule(floor, file.as_posix(), name)
            if rule:
                found.append(f"{file.as_posix()}:{line} imports {name}: {rule}")
    return found


def test_imports_only_go_down():
    assert len(list(ROOT.rglob("*.py"))) > 20
    assert broken(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "rule"),
    [
        ("planning/x.py", "import torch", "planning/ imports only"),
        ("planning/x.py", "from torch import nn", "planning/ imports only"),
        ("planning/x.py", "def f():\n    import rich", "planning/ imports only"),
        ("planning/x.py", "from modelpar.capture.objective import Objective", "planning/ imports only"),
        ("planning/x.py", "from ..run import executor", "planning/ imports only"),
        ("report/x.py", "from modelpar.run.pipeline import Pipeline", "report/ never"),
        ("report/tensorboard/x.py", "from ...capture import cut", "report/ never"),
        ("report/__init__.py", "from ..run import worker", "report/ never"),
        ("capture/x.py", "import modelpar.run.executor", "capture/ never"),
        ("capture/x.py", "from modelpar import report", "capture/ never"),
        ("run/launch/x.py", "from modelpar.report import text", "run/ never"),
        ("models/x.py", "import hydra", "only assembly"),
        ("run/x.py", "from hydra.utils import instantiate", "only assembly"),
        ("data/x.py", "from modelpar.train import main", "imports only go down"),
        ("report/x.py", "from modelpar import Plan", "imports only go down"),
        ("run/x.py", "from torch.distributed import rpc", "only run/rpc.py"),
        ("train.py", "import torch.distributed.rpc as rpc", "only run/rpc.py"),
    ],
)
def test_a_broken_rule_is_found(tmp_path, file, line, rule):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line + "\n")
    [message] = broken(tmp_path)
    assert message.startswith(f"{file}:{2 if 'def' in line else 1} imports ")
    assert f": {rule}" in message


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("planning/x.py", "import json, numpy as np\nfrom modelpar.errors import PlanError\nfrom . import graph"),
        ("capture/x.py", "import torch\nfrom modelpar.planning.graph import ModelGraph\nfrom .cut import cut_stage"),
        ("run/x.py", "from modelpar.capture import cut\nfrom ..planning.plan import Plan"),
        ("run/rpc.py", "from torch.distributed import rpc"),
        ("report/x.py", "from modelpar.planning import timeline\nfrom rich.table import Table"),
        ("train.py", "import hydra\nfrom modelpar import config\nfrom modelpar.report import text"),
    ],
)
def test_what_is_allowed(tmp_path, file, line):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line + "\n")
    assert broken(tmp_path) == []


def test_planning_never_loads_torch():
    names = [module.name for module in pkgutil.iter_modules([str(ROOT / "planning")], "modelpar.planning.")]
    assert "modelpar.planning.partitioners" in names
    code = f"import sys, {', '.join(names)}; print([m for m in sys.modules if m.split('.')[0] in ('torch', 'hydra')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True)
    assert done.stdout.strip() == "[]"


def test_no_exported_name_is_a_submodule():
    """`modelpar.plan` is a function: importing a submodule of that name would replace it."""
    exported = getattr(modelpar, "__all__", None)
    if not exported:
        pytest.skip("modelpar exports nothing yet")
    submodules = {module.name for module in pkgutil.iter_modules([str(ROOT)])}
    assert "planning" in submodules
    assert submodules.isdisjoint(exported)
