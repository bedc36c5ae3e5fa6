"""Where configurations lie: modelpar's own folder, and those that a user names by `hydra.searchpath`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from modelpar.errors import ConfigError
from modelpar.paths import config_dir

_KEY = "hydra.searchpath"


def own_folders(overrides: Sequence[str]) -> tuple[Path, ...]:
    """Returns the user's folders of configurations.

    Raises ConfigError for one that is not there, or holds a file by whose name modelpar's own would be taken.
    """
    folders = []
    for word in search_words(overrides):
        try:
            value = OverridesParser.create().parse_override(word).value()
        except HydraException as error:
            raise ConfigError(f"{word} is malformed; expected {_KEY}=[file://path/to/folder]") from error
        for text in value if isinstance(value, list) else [value]:
            scheme, colon, rest = str(text).rpartition("://")
            folder = Path(rest).expanduser()
            if colon and scheme != "file":
                continue  # pkg://, a package's own folder
            if not folder.is_dir():
                raise ConfigError(f"{_KEY} names {rest}, which is not a folder; expected one with your configurations")
            folders.append(folder)
    for folder in folders:
        same = [path for path in sorted(folder.glob("**/*.yaml")) if (config_dir() / path.relative_to(folder)).exists()]
        if same and folder.resolve() != config_dir():
            raise ConfigError(f"{same[0]} has the name of one of modelpar's own, which is taken; expected another name")
    return tuple(folders)


def search_words(overrides: Sequence[str]) -> list[str]:
    """Returns those overrides that name folders."""
    return [word for word in overrides if word.partition("=")[0].lstrip("+") == _KEY]


def searched(folders: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Returns overrides that also name folders which were given otherwise."""
    if not folders:
        return list(overrides)
    words = search_words(overrides)
    if words:
        raise ConfigError(f"--config-dir {folders[0]} and {words[0]} both name folders; expected one of the two")
    quoted = ("'file://" + str(Path(folder).expanduser().absolute()).replace("'", "\\'") + "'" for folder in folders)
    return [*overrides, f"{_KEY}=[{','.join(quoted)}]"]


def choices(group: str, folders: Sequence[Path] = ()) -> list[str]:
    """Returns the choices of a config group."""
    files = (path for folder in (config_dir(), *folders) for path in (folder / group).glob("*.yaml"))
    return sorted({path.stem for path in files})


def file_of(group: str, choice: str, folders: Sequence[Path] = ()) -> Path | None:
    """Returns the file of a choice."""
    files = (folder / group / f"{choice}.yaml" for folder in (config_dir(), *folders))
    return next((file for file in files if file.is_file()), None)


def own_groups(folders: Sequence[Path]) -> list[str]:
    """Returns the groups that only the user's folders have, such as experiment."""
    found = {path.parent.name for folder in folders for path in folder.glob("*/*.yaml")}
    return sorted(found - {path.parent.name for path in config_dir().glob("*/*.yaml")} - {"hydra"})
