"""Python files of the user, imported as Python itself would: as scripts, or as parts of the packages they lie in."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import itertools
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import cloudpickle

from modelpar.errors import ConfigError


def place(path: Path) -> tuple[Path, list[str]]:
    """Returns the folder from which a file's absolute imports start, and the names that lead from there to the file.

    A file with relative imports, or that imports its own package by name, is a part of that; any other is a script: its
    imports start beside it, and no names lead to it.
    """
    found = list(_imports(path))
    depth = sum(1 for _ in itertools.takewhile(lambda folder: (folder / "__init__.py").is_file(), path.parents))
    above = max((level for _, level, _ in found), default=0)
    of_package = depth and path.parents[depth - 1].name in {name for name, level, _ in found if not level}
    if not above and not of_package and path.stem != "__init__":
        return path.parent, []
    depth = min(max(depth, above), len(path.parents) - 1)
    names = [folder.name for folder in path.parents[:depth]][::-1]
    return path.parents[depth], names if path.stem == "__init__" else [*names, path.stem]


def run(path: Path, root: Path, names: list[str]) -> ModuleType:
    """Runs a file at its place, within `own_code(root)`; whatever is wrong with it is raised as it comes.

    A script, and a package whose name is also that of another module, get a name that nothing else has.
    """
    if names and not elsewhere(names[0], root / names[0]):
        return importlib.import_module(".".join(names))
    first = root / names[0] if names else path
    top = f"modelpar_file_{first.stem}_{hashlib.sha256(str(first).encode()).hexdigest()[:8]}"
    inside = [str(first)] if names else None
    file = first / "__init__.py" if names else path
    if file.is_file():
        spec = importlib.util.spec_from_file_location(top, file, submodule_search_locations=inside)
    else:  # a folder without __init__.py is a package, too
        spec = ModuleSpec(top, None, is_package=True)
        spec.submodule_search_locations = inside
    if spec is None:
        raise ConfigError(f"{path} is not a Python file; expected a name that ends in .py")
    module = sys.modules[top] = importlib.util.module_from_spec(spec)
    try:
        if file.is_file() and spec.loader:
            spec.loader.exec_module(module)
        return importlib.import_module(".".join([top, *names[1:]]))
    except BaseException:
        sys.modules.pop(top, None)
        raise


@contextmanager
def own_code(root: Path) -> Iterator[None]:
    """Lets code import what lies in a folder, before all else, as Python lets a script.

    What it imports from there is pickled by value, so that processes which receive it need not have it. Afterwards the
    folder stays on the path as the last one, for what is imported only when the code is called. Raises ConfigError, in
    one line, where the code imports something that is in the folder and got another module of that name.
    """
    of_users = cloudpickle.list_registry_pickle_by_value()
    for name, module in list(sys.modules.items()):
        top = name.partition(".")[0]
        here = beside(root, top) or (root / top).is_dir()
        if name in of_users and here and not _is_own(module, root):  # of a file loaded before
            del sys.modules[name]
    before = set(sys.modules)
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))
        keep_on_path(root)
        pickle_by_value(root, set(sys.modules) - before)
        _refuse_clashes(root)


def keep_on_path(folder: Path) -> None:
    """Lets modules in a folder be imported, after all others, here and by ranks that are started from now on."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def pickle_by_value(root: Path, names: set[str]) -> None:
    """Registers those of the modules that lie in the folder and that no worker could import by itself."""
    for name in names:
        module = sys.modules.get(name)
        if module is not None and _is_own(module, root):
            cloudpickle.register_pickle_by_value(module)


def beside(root: Path, name: str) -> Path | None:
    """Returns the file or the folder with an `__init__.py` that an absolute import of a name finds in a folder."""
    if (root / f"{name}.py").is_file():
        return root / f"{name}.py"
    return root / name if (root / name / "__init__.py").is_file() else None


def elsewhere(name: str, here: Path) -> str:
    """Says where the module of this name is, if it is not `here`; nothing where it is, or where there is none."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # ValueError: of a module that was not imported, such as __main__
        return ""
    if spec is None:
        return ""
    places = [spec.origin] if spec.has_location and spec.origin else list(spec.submodule_search_locations or [])
    if any(Path(place).resolve().is_relative_to(here) for place in places):
        return ""
    return places[0] if places else "a module of Python's own"


def where(error: BaseException, root: Path, source: str) -> str:
    """Returns "file:line: Error: message" with the innermost line of the user's own files; without one, the source."""
    message = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    text = type(error).__name__ + (f": {message}" if message else "")
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f"{error.filename}:{error.lineno}: {text}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f"{frame.filename}:{frame.lineno}" for frame in frames if _lies_in(Path(frame.filename), root)]
    return f"{lines[-1] if lines else source}: {text}"


def _refuse_clashes(root: Path) -> None:
    of_users = cloudpickle.list_registry_pickle_by_value()
    for module in [module for name, module in sys.modules.items() if name in of_users and _is_own(module, root)]:
        file = Path(str(module.__file__))
        for name, level, line in _imports(file) if file.suffix == ".py" else ():
            here = None if level else beside(root, name)
            if here and (other := elsewhere(name, here)):
                raise ConfigError(
                    f"{file}:{line} imports {name}, which is {here} and also {other}; expected a name for the former "
                    "that nothing else has"
                )


def _imports(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yields what a file imports: the first name, how many folders up it starts (0: it is absolute), and the line."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError):  # running it says so
        return
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], 0, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0], node.level, node.lineno


def _is_own(module: ModuleType, root: Path) -> bool:
    """Tells whether a module is the user's: in the folder, and neither installed there nor modelpar's own."""
    file = getattr(module, "__file__", None)
    places = [file] if file else list(getattr(module, "__path__", ()))
    return any(_lies_in(Path(place), root) for place in places) and module.__name__.split(".")[0] != "modelpar"


def _lies_in(place: Path, root: Path) -> bool:
    if not place.exists():  # such as <string>
        return False
    place = place.resolve()
    installed = {"site-packages", "dist-packages"} & set(place.parts)
    return place.is_relative_to(root) and not installed and not place.is_relative_to(sysconfig.get_path("stdlib"))
