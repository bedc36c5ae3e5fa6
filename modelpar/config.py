"""Configurations: composed by Hydra from configs/ and the command line, and checked before anything starts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from modelpar.errors import ConfigError
from modelpar.paths import config_dir

GROUPS = ("model", "data", "partition", "schedule", "transport", "optimizer", "lr_schedule")
"""The config groups, in the order in which people ask for them."""


def load(name: str, overrides: Sequence[str]) -> DictConfig:
    """Returns the configuration of a command with overrides applied.

    Raises ConfigError, in one line, for an override that is unknown or misspelt (with the valid names), ambiguous,
    malformed, missing or of the wrong type.
    """
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            plain = compose(name, [override for override in overrides if _is_choice(override)])
            config = compose(name, list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, name, overrides)) from error
    _check_types(config, plain)
    return checked(config)


def checked(config: DictConfig) -> DictConfig:
    """Returns a configuration with all references resolved; raises ConfigError where a value is missing."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{missing[0]} has no value; expected {missing[0]}=… on the command line")
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from error
    return config


def choices(group: str) -> list[str]:
    """Returns the choices of a config group."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


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
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        return [
            [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
            if override.is_sweep_override()
            else [text]
            for text, override in zip(overrides, parsed, strict=True)
        ]
    except HydraException as error:
        raise ConfigError(_explain(error, "", overrides)) from error


def _is_choice(override: str) -> bool:
    return override.split("=")[0] in GROUPS and "," not in override


def _explain(error: Exception, name: str, overrides: Sequence[str]) -> str:
    """Says in one line what is wrong with the overrides."""
    text = str(error)
    if found := re.search(r"Could not find '(\w+)/([^']*)'", text):
        group, choice = found.groups()
        return f"{group}={choice} is unknown; {_expected(choice, choices(group))}"
    if found := re.search(r"(?:Could not override|Key) '([\w.@/-]+)'", text):
        key = _full_key(found[1], overrides)
        return f"{key} is unknown; {_expected(key, list(_keys_near(name, key)))}"
    if found := re.search(r"Ambiguous value for argument '([^']*)'", text):
        key, _, value = found[1].partition("=")
        return (
            f"{found[1]} gives several values; expected one, a list {key}=[{value}], or `modelpar compare` "
            "(or `modelpar train -m`) to try each"
        )
    return f"malformed override: {_first_line(error)}; expected key=value"


def _full_key(key: str, overrides: Sequence[str]) -> str:
    """Returns the override that an error is about: the error may name only its last part."""
    keys = [override.split("=")[0].lstrip("+~") for override in overrides]
    return next((k for k in keys if k == key or k.endswith(f".{key}")), key)


def _keys_near(name: str, key: str) -> Iterator[str]:
    """Yields the keys that would be valid where a key is not: at the deepest level of it that exists."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        node: Any = compose(name)
    prefix: list[str] = []
    for part in key.split(".")[:-1]:
        if not isinstance(node, DictConfig) or part not in node:
            break
        node = OmegaConf.select(node, part, throw_on_missing=False)
        prefix.append(part)
    if isinstance(node, DictConfig):
        yield from (".".join([*prefix, str(k)]) for k in node if not str(k).startswith("_"))


def _expected(wrong: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(wrong, valid, n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"{guess}expected one of {', '.join(valid)}"


_NULLABLE = ("training.max_norm",)
"""Keys with a default that may be null all the same."""


def _check_types(config: DictConfig, plain: DictConfig, prefix: str = "") -> None:
    """Raises ConfigError where a value has another type than the one it replaces, which null and references allow."""
    for name in plain:
        if OmegaConf.is_missing(plain, name) or OmegaConf.is_interpolation(plain, name):
            continue
        key, default, value = f"{prefix}{name}", plain[name], config._get_node(name)
        if isinstance(default, DictConfig):
            if not isinstance(value, DictConfig):
                raise ConfigError(f"{key} is {value}; expected {key}.… with one of {', '.join(map(str, default))}")
            _check_types(value, default, f"{key}.")
        elif default is not None and not OmegaConf.is_interpolation(config, name):
            found = config[name]
            kinds = (int, float) if type(default) is float else (type(default),)
            if type(found) not in kinds and not (found is None and key in _NULLABLE):
                shown = OmegaConf.to_container(found) if isinstance(found, DictConfig | ListConfig) else found
                shown = "null" if shown is None else repr(shown)
                raise ConfigError(f"{key} is {shown}; expected {_KINDS.get(type(default), type(default).__name__)}")


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", ListConfig: "a list"}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
