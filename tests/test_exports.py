"""What `import modelpar` gives: exactly the documented names, loaded when first used."""

import subprocess
import sys

import pytest
from conftest import ROOT

import modelpar

NAMES = {
    "EvalResult",
    "LossResult",
    "Objective",
    "Pipeline",
    "Plan",
    "StepResult",
    "Verdict",
    "Workers",
    "load_into",
    "partitioners",
    "plan",
    "schedules",
    "verify",
}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.strip()


def test_the_exported_names_are_the_documented_ones():
    assert set(modelpar.__all__) == NAMES
    assert modelpar.__all__ == sorted(modelpar.__all__)
    assert set(dir(modelpar)) >= NAMES


def test_every_name_is_what_it_says():
    for name in NAMES:
        value = getattr(modelpar, name)
        assert value.__name__.rpartition(".")[2] == name
        assert value.__doc__
    assert callable(modelpar.plan)  # not a submodule


def test_star_imports_all_of_them():
    namespace: dict[str, object] = {}
    exec("from modelpar import *", namespace)
    assert set(namespace) - {"__builtins__"} == NAMES


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(AttributeError, match=r"module 'modelpar' has no attribute 'Pipelin'; it has EvalResult, .*"):
        _ = modelpar.Pipelin
    with pytest.raises(ImportError, match="cannot import name 'Pipelin'"):
        exec("from modelpar import Pipelin")


def test_importing_it_and_planning_with_it_leaves_torch_alone():
    code = "import sys, modelpar; modelpar.schedules.gpipe(2, 4); modelpar.partitioners, modelpar.Plan;"
    assert python(code + " print('torch' in sys.modules, 'hydra' in sys.modules)") == "False False"


def test_importing_it_imports_little():
    """`import modelpar` is quick: it loads none of its own modules, and nothing outside the standard library."""
    code = "import sys; before = set(sys.modules); import modelpar; print(*(set(sys.modules) - before))"
    loaded = set(python(code).split())
    assert {name for name in loaded if name.split(".")[0] not in sys.stdlib_module_names} == {"modelpar"}
    assert len(loaded) < 50
