"""A model from any Python file: `model=file model.factory=path/to/file.py:build`."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
from torch import nn

from modelpar.errors import ConfigError


def load(factory: str) -> tuple[nn.Module, tuple[Any, Any], Callable[..., Any] | None]:
    """Returns what the function of a file returns: (model, example_batch, loss), checked.

    `factory` is "path/to/file.py:function". The file, and modules beside it that it imports, are pickled by value, so
    that processes which receive the model need neither. Raises ConfigError, one line that says what is wrong and where.
    """
    path_text, colon, function = str(factory).rpartition(":")
    if not colon or not path_text or not function:
        raise ConfigError(f"model.factory is {factory!r}; expected path/to/file.py:function")
    path = Path(path_text).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"model.factory names {path_text}, which is not a file")
    before = set(sys.modules)
    sys.path.insert(0, str(path.parent))  # as for a script that Python runs
    try:
        module = _import(path)
        build = getattr(module, function, None)
        if not callable(build):
            raise ConfigError(f"{path} has no function {function!r}; {_functions(module)}")
        try:
            built = build()
        except (Exception, SystemExit) as error:
            raise ConfigError(f"{function}() failed: {_where(error, path)}") from error
    finally:
        sys.path.remove(str(path.parent))
        _pickle_neighbours_by_value(path.parent, set(sys.modules) - before)
    return _checked(built, f"{function}() in {path}")


def _import(path: Path) -> ModuleType:
    """Runs a file under a module name of its own, so that neither its name nor a second load can clash."""
    name = f"modelpar_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file; expected a name that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(f"{path.name} cannot be imported: {_where(error, path)}") from error
    cloudpickle.register_pickle_by_value(module)
    return module


def _pickle_neighbours_by_value(folder: Path, names: set[str]) -> None:
    """Registers those of the modules that lie in the folder and that no worker could import by itself."""
    stdlib = sysconfig.get_path("stdlib")
    for name in names:
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if module is None or file is None:
            continue
        file = Path(file).resolve()
        installed = {"site-packages", "dist-packages"} & set(file.parts) or file.is_relative_to(stdlib)
        if file.is_relative_to(folder) and not installed and name.split(".")[0] != "modelpar":
            cloudpickle.register_pickle_by_value(module)


def _where(error: BaseException, path: Path) -> str:
    """Returns "file:line: Error: message" with the innermost line in the user's own file, where there is one."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    place = f"{path}:{lines[-1]}" if lines else str(path)
    message = " ".join(str(error).split())
    return f"{place}: {type(error).__name__}" + (f": {message}" if message else "")


def _functions(module: ModuleType) -> str:
    found = [k for k, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__ and callable(v)]
    return f"it has {', '.join(sorted(found))}" if found else "it defines none"


def _checked(built: Any, what: str) -> tuple[nn.Module, tuple[Any, Any], Callable[..., Any] | None]:
    expected = "expected (model, example_batch, loss)"
    if not isinstance(built, tuple):
        raise ConfigError(f"{what} returned {_kind(built)}; {expected}")
    if len(built) != 3:
        raise ConfigError(f"{what} returned a tuple of {len(built)}; {expected}")
    model, batch, loss = built
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{what} returned {_kind(model)} as the model; expected an nn.Module")
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        found = f"{_kind(batch)} of {len(batch)}" if isinstance(batch, tuple | list) else _kind(batch)
        raise ConfigError(f"{what} returned {found} as the example batch; expected (inputs, targets)")
    if loss is not None and not callable(loss):
        raise ConfigError(
            f"{what} returned {_kind(loss)} as the loss; expected a function of (output, targets), or None where the "
            f"model returns its own loss"
        )
    return model, (batch[0], batch[1]), loss


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    name = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    return name if isinstance(value, type) else f"a {name}"
