"""Weights in safetensors files: which file has which tensor, without reading it; and Stored, which reads one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from modelpar.capture.recipe import room, set_recipe
from modelpar.errors import ConfigError

_AT_ONCE = 1 << 16
"""How many numbers are read at once into memory that is used briefly."""
_INDEX = "*.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """Reads a tensor, and no other, from a safetensors file."""

    path: str
    key: str
    dtype: torch.dtype

    def make(self, briefly: bool = False) -> Tensor:
        """Returns it, on the CPU; raises ConfigError where the file is gone or damaged."""
        with _opened(self.path) as file:
            if not briefly:
                found: Tensor = file.get_tensor(self.key)
                return found.to(self.dtype)
            rows = file.get_slice(self.key)
            shape = rows.get_shape()
            into = room(torch.empty(shape, dtype=self.dtype, device="meta"))
            if not shape:
                return into.copy_(file.get_tensor(self.key))
            step = max(1, _AT_ONCE // max(1, into[:1].numel()))
            for start in range(0, shape[0], step):
                into[start : start + step] = rows[start : start + step]
            return into


def read_from(model: nn.Module, path: str | Path) -> None:
    """Says of each parameter of a model on the meta device where it is stored; reads the persistent buffers.

    `path` is a safetensors file, or a folder with an index or with one or several of them. Only the files' headers are
    read. Raises ConfigError, by FQN, for a tensor that is missing, in two files, or of another shape.
    """
    path = Path(path)
    places, aliases = _places(path)
    shapes = _shapes(places)
    names: dict[int, list[str]] = {}
    for name, tensor in _lasting(model):
        names.setdefault(id(tensor), []).append(name)
    tensors = {id(tensor): tensor for _, tensor in _lasting(model)}
    for number, known in names.items():
        tensor, wanted = tensors[number], list(tensors[number].shape)
        key = next((key for name in known for key in (name, aliases.get(name)) if key in places), None)
        if key is None:
            some = ", ".join(list(places)[:4])
            raise ConfigError(f"{path} has no {known[0]} of shape {wanted}; it has {len(places)} tensors: {some}, …")
        if shapes[key] != wanted:
            raise ConfigError(f"{path} has {key} of shape {shapes[key]}; expected {wanted}")
        stored = Stored(str(places[key].resolve()), key, tensor.dtype)
        if tensor.is_meta:
            set_recipe(tensor, stored)
        else:
            with torch.no_grad():
                tensor.copy_(stored.make())


def _lasting(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields parameters and the buffers that are saved with them, by every name."""
    yield from model.named_parameters(remove_duplicate=False)
    for place, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{place}.{name}" if place else name, buffer


def _places(path: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Returns the file that holds each tensor, and other names of tensors that files mention."""
    if not path.exists():
        raise ConfigError(f"weights {path} does not exist; expected a safetensors file or a folder of some")
    index = next(iter(sorted(path.glob(_INDEX))), None) if path.is_dir() else None
    listed = _listed(index) if index else {}
    files = sorted(set(listed.values())) if index else sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"weights {path} has no file that ends in .safetensors; expected one or several")
    places: dict[str, Path] = {}
    aliases: dict[str, str] = {}
    for file in files:
        with _opened(file) as opened:
            for key in opened.keys():  # noqa: SIM118  (not a dict)
                if listed.get(key, file) != file:
                    continue
                if key in places:
                    raise ConfigError(f"{key} is in {places[key]} and in {file}; expected it in one, or an index")
                places[key] = file
            aliases |= json.loads((opened.metadata() or {}).get("tied", "{}"))
    return places, aliases


def _listed(index: Path) -> dict[str, Path]:
    try:
        found = json.loads(index.read_text())["weight_map"]
        return {key: index.parent / name for key, name in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} cannot be read: {error}; expected a weight_map of names and files") from error


def _shapes(places: dict[str, Path]) -> dict[str, list[int]]:
    found = {}
    for file in dict.fromkeys(places.values()):
        with _opened(file) as opened:
            found |= {key: list(opened.get_slice(key).get_shape()) for key, home in places.items() if home == file}
    return found


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """Opens a safetensors file; its header is read, and of its tensors those that are asked for."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; expected a safetensors file") from error
