"""Configurations: composed by Hydra from configs/ and the command line, and checked before anything starts."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from modelpar.config_folders import choices, file_of, own_folders, own_groups, search_words
from modelpar.errors import ConfigError, ModelparError
from modelpar.paths import config_dir
from modelpar.planning.cluster import Cluster, Link
from modelpar.planning.cluster_options import read_cluster

GROUPS = ("model", "data", "partition", "schedule", "transport", "cluster", "optimizer", "lr_schedule")
"""The config groups, in the order in which people ask for them."""


def load(name: str, overrides: Sequence[str]) -> DictConfig:
    """Returns the configuration of a command with overrides applied.

    Raises ConfigError, in one line, for an override that is unknown or misspelt (with the valid names), ambiguous,
    malformed, missing or of the wrong type.
    """
    folders = own_folders(overrides)
    _refuse_several(overrides, folders)
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            config = compose(name, list(overrides), return_hydra_config=True)
            found = config.hydra.runtime.choices
            picked = [f"{group}={found[group] or 'null'}" for group in GROUPS if group in found]
            with open_dict(config):
                del config["hydra"]
            plain = compose(name, [*search_words(overrides), *picked])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, name, overrides, folders)) from error
    except YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f"{place.name}, line {place.line + 1}" if place else "a configuration"
        raise ConfigError(f"{where} is no YAML: {getattr(error, 'problem', None) or _first_line(error)}") from error
    except ValueError as error:  # Hydra's own, for an override without a name
        raise ConfigError(f"malformed override: {_first_line(error)}; expected key=value or group=choice") from error
    _check_sections(config, plain)
    _check_types(checked(config), plain)
    if config.verbose not in (0, 1, 2):
        raise ConfigError(f"verbose is {config.verbose}; expected 0 (quiet), 1, or 2 (says more)")
    cluster_of(config)
    return config


def checked(config: DictConfig) -> DictConfig:
    """Returns a configuration with all references resolved; raises ConfigError where a value is missing."""
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key} cannot be resolved: {_first_line(error)}") from error
    if missing:
        raise ConfigError(f"{missing[0]} has no value; expected {missing[0]}=… on the command line")
    return config


def cluster_of(config: DictConfig, devices: Sequence[str] = (), usual: Link | None = None) -> Cluster:
    """Returns the cluster that a configuration describes, as `read_cluster` does, with as many ranks as it has."""
    options: Any = OmegaConf.to_container(config.cluster, resolve=True)
    return read_cluster(options, config.pipeline.num_ranks, devices, usual)


def make(config: DictConfig, what: str, **arguments: Any) -> Any:
    """Calls a config's `_target_`; its own errors pass, all others become a ConfigError that names the group."""
    try:
        if arguments:  # Hydra would make lists of the tuples in them
            return instantiate(config, _convert_="all", _partial_=True)(**arguments)
        return instantiate(config, _convert_="all")
    except ModelparError:
        raise
    except Exception as error:
        if isinstance(error.__cause__, ModelparError):
            raise error.__cause__ from None
        cause = (error.__cause__ if isinstance(error, InstantiationException) else None) or error
        reason = " ".join(str(cause).split())
        raise ConfigError(f"{what} cannot be made: {type(cause).__name__}: {reason}") from error


def options_text(command: str) -> list[str]:
    """Returns the lines of a command's own options, with their defaults and comments, as they stand in its file."""
    names = ["train"] if command == "train" else ["train", command]
    blocks = [block for name in names for block in (config_dir() / f"{name}.yaml").read_text().split("\n\n")]
    shown = [block for block in blocks if not block.startswith(("#", "defaults:", "hydra:"))]
    return [line for block in shown for line in block.splitlines()]


def choice(config: DictConfig, group: str) -> str:
    """Returns which choice of a group a configuration holds, by its `_target_`."""
    target = config[group]._target_
    for name in choices(group):
        if OmegaConf.load(config_dir() / group / f"{name}.yaml")._target_ == target:
            return name
    return str(target).rpartition(".")[2]


def parse_lists(overrides: Sequence[str]) -> list[list[str]]:
    """Returns, per override, the single overrides that it stands for: `a=x,y` is `a=x` and `a=y`.

    Raises ConfigError where an override is malformed.
    """
    folders = own_folders(overrides)
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        return [
            [f"{override.get_key_element()}={value}" for value in _values(override, folders)]
            if override.is_sweep_override()
            else [text]
            for text, override in zip(overrides, parsed, strict=True)
        ]
    except HydraException as error:
        raise ConfigError(_explain(error, "", overrides, folders)) from error


def _values(override: Override, folders: Sequence[Path]) -> Sequence[str]:
    value = override.value()
    if isinstance(value, Glob):  # such as partition=glob(by_*)
        return value.filter(choices(override.key_or_group, folders))
    return list(override.sweep_string_iterator())


def _refuse_several(overrides: Sequence[str], folders: Sequence[Path]) -> None:
    """Raises ConfigError where a group gets a list: Hydra would merge the choices into one that nobody wants."""
    for override in _chosen(overrides, folders):
        group, _, value = override.partition("=")
        if value.startswith("["):
            raise ConfigError(f"{override} gives several choices; expected one of {', '.join(choices(group, folders))}")


def _chosen(overrides: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Returns those overrides that choose something from a group."""
    keys = {*GROUPS, *(f"+{group}" for group in own_groups(folders))}
    return [override for override in overrides if override.split("=")[0] in keys]


def _explain(error: Exception, name: str, overrides: Sequence[str], folders: Sequence[Path]) -> str:
    """Says in one line what is wrong with the overrides."""
    text = str(error)
    if found := re.search(r"Could not find '(\w+)/([^']*)'", text):
        group, choice = found.groups()
        return f"{group}={choice} is unknown; {_expected(choice, choices(group, folders))}"
    if found := re.search(r"(?:Could not override|Key) '([\w.@/-]+)'", text):
        key = _full_key(found[1], overrides)
        if key in own_groups(folders):
            return f"{key} is a group of yours that nothing is chosen from yet; expected +{key}=…"
        near = list(_keys_near(name, key, [*search_words(overrides), *_chosen(overrides, folders)]))
        return f"{key} is unknown; {_expected(key, near)}{_by_plus(key, overrides, folders)}"
    if found := re.search(r"Ambiguous value for argument '([^']*)'", text):
        key, _, value = found[1].partition("=")
        one = "one" if key in GROUPS else f"one, a list {key}=[{value}]"
        return f"{found[1]} gives several values; expected {one}, or `modelpar compare` or `train -m` to try each"
    if isinstance(error, OverrideParseException):
        return f"{error.override} is malformed; expected key=value"
    return f"malformed override: {_first_line(error)}; expected key=value"


def _full_key(key: str, overrides: Sequence[str]) -> str:
    """Returns the override that an error is about: the error may name only its last part."""
    keys = [override.split("=")[0].lstrip("+~") for override in overrides]
    return next((k for k in keys if k == key or k.endswith(f".{key}")), key)


def _keys_near(name: str, key: str, chosen: list[str]) -> Iterator[str]:
    """Yields the keys that would be valid where a key is not: at the deepest level of it that exists."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        node: Any = compose(name, chosen)
    prefix: list[str] = []
    for part in key.split(".")[:-1]:
        below = OmegaConf.select(node, part)
        if not isinstance(below, DictConfig):
            break
        node = below
        prefix.append(part)
    yield from (".".join([*prefix, str(k)]) for k in node if not str(k).startswith("_"))


def _by_plus(key: str, overrides: Sequence[str], folders: Sequence[Path]) -> str:
    """Returns what else is possible for a group whose function takes any option: a + adds it."""
    group = key.partition(".")[0]
    chosen = [override.partition("=")[2] for override in overrides if override.startswith(f"{group}=")]
    file = file_of(group, chosen[-1] if chosen else "", folders)
    if file is None:
        return ""
    try:
        takes = inspect.signature(get_method(OmegaConf.load(file)._target_)).parameters.values()
    except Exception:  # a function that cannot be found is another error than the one at hand
        return ""
    return (
        f"; +{key}=… passes an option that is not listed"
        if any(each.kind is each.VAR_KEYWORD for each in takes)
        else ""
    )


def _expected(wrong: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(wrong, valid, n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"{guess}expected one of {', '.join(valid)}"


class _Size:
    """A number of bytes, or text such as 8GB."""


_NULLABLE: dict[str, type] = {
    "training.max_norm": float,
    "pipeline.num_threads": int,
    "pipeline.devices": ListConfig,
    "pipeline.init": str,
    "pipeline.weights": str,
    "transport.step_timeout": float,
    "cluster.devices": ListConfig,
    "cluster.memory": _Size,
    "cluster.link.latency": float,
    "cluster.link.bandwidth": _Size,
    "cluster.links": ListConfig,
    "profile": str,
    "measure": int,
    "model.head": str,
    "model.image_size": int,
}
"""What may be null, and its type where it is not."""
_REQUIRED: dict[str, type] = {
    "partition.balance": ListConfig,
    "data.path": str,
    "model.factory": str,
    "model.config": str,
}
"""The types of what has no default."""


def _check_sections(config: DictConfig, plain: DictConfig, prefix: str = "") -> None:
    """Raises ConfigError where a value took the place of a section."""
    for name in plain:
        section = plain._get_node(name)
        if isinstance(section, DictConfig) and name in config:
            key, found = f"{prefix}{name}", config[name]
            if not isinstance(found, DictConfig):
                raise ConfigError(f"{key} is {found}; expected {key}.… with one of {', '.join(map(str, section))}")
            _check_sections(found, section, f"{key}.")


def _check_types(config: DictConfig, plain: DictConfig, prefix: str = "") -> None:
    """Raises ConfigError where a value has another type than the one it replaces, or is not there, or is one more.

    Only what is handed to a `_target_` may get more values, by `+`.
    """
    if "_target_" not in plain and (more := [str(name) for name in config if name not in plain]):
        valid = [f"{prefix}{name}" for name in plain]
        raise ConfigError(f"{prefix}{more[0]} is unknown; {_expected(prefix + more[0], valid)}")
    for name in plain:
        key = f"{prefix}{name}"
        if name not in config:
            raise ConfigError(f"{key} was taken away; expected a value")
        if OmegaConf.is_interpolation(plain, name):
            continue
        default, found = plain._get_node(name), config[name]
        if isinstance(default, DictConfig):
            _check_types(found, default, f"{key}.")
        else:
            wanted = _REQUIRED.get(key) if OmegaConf.is_missing(plain, name) else type(plain[name])
            _check_type(key, found, _NULLABLE.get(key) or wanted or type(found))


def _check_type(key: str, found: Any, wanted: type) -> None:
    kinds = {float: (int, float), _Size: (int, float, str), type(None): (type(found),)}.get(wanted, (wanted,))
    if type(found) in kinds or (found is None and key in _NULLABLE):
        return
    shown = OmegaConf.to_container(found) if isinstance(found, DictConfig | ListConfig) else found
    shown = "null" if shown is None else repr(shown)
    raise ConfigError(f"{key} is {shown}; expected {_KINDS.get(wanted, wanted.__name__)}")


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    ListConfig: "a list",
    _Size: "bytes, or such as 8GB",
}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
