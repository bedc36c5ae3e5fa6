"""A model from a function of the user's: `model=file model.factory=path/to/file.py:build`, or package.module:build."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from modelpar.errors import ConfigError
from modelpar.models.imports import beside, elsewhere, keep_on_path, own_code, place, run, where


def load(factory: str) -> tuple[nn.Module, tuple[Any, Any], Callable[..., Any] | None]:
    """Returns what a function of the user's returns: (model, example_batch, loss), checked.

    `factory` is "path/to/file.py:function", or "package.module:function" for a module that is installed, on PYTHONPATH
    or in the current folder. Raises ConfigError, one line that says what is wrong and where.
    """
    source, colon, function = str(factory).rpartition(":")
    if not colon or not source or not function:
        raise ConfigError(f"model.factory is {factory!r}; expected path/to/file.py:function or package.module:function")
    path = Path(source).expanduser().resolve()
    if path.is_file():
        root, names = place(path)
        return _call(lambda: run(path, root, names), own_code(root), function, path.name, root, str(path))
    if not all(part.isidentifier() for part in source.split(".")) or source.endswith(".py"):
        raise ConfigError(f"model.factory names {source}, which is not a file")
    folder, top = Path.cwd(), source.partition(".")[0]
    keep_on_path(folder)
    here = beside(folder, top)
    if here and (other := elsewhere(top, here)):
        raise ConfigError(
            f"model.factory names {source}, and {top} is both {here} and {other}; expected path/to/file.py:function"
        )
    spec = importlib.util.find_spec(top)
    if spec is None:
        raise ConfigError(
            f"model.factory names {source}, which is neither a file nor a module that is installed, on PYTHONPATH or "
            f"in {folder}; expected path/to/file.py:function or package.module:function"
        )
    root = Path(spec.origin).parent if spec.has_location and spec.origin else folder
    return _call(lambda: importlib.import_module(source), nullcontext(), function, source, root, source)


def _call(
    imported: Callable[[], ModuleType],
    within: AbstractContextManager[None],
    function: str,
    shown: str,
    root: Path,
    source: str,
) -> tuple[nn.Module, tuple[Any, Any], Callable[..., Any] | None]:
    """Imports a module and calls its function; says in which of the files in `root` it failed."""
    with within:
        try:
            module = imported()
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:
            raise ConfigError(f"{shown} cannot be imported: {where(error, root, source)}") from error
        build = getattr(module, function, None)
        if not callable(build):
            raise ConfigError(f"{source} has no function {function!r}; {_functions(module)}")
        try:
            built = build()
        except (Exception, SystemExit) as error:
            raise ConfigError(f"{function}() failed: {where(error, root, source)}") from error
    return _checked(built, f"{function}() in {source}")


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
