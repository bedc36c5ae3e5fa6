"""Where a run keeps what it made: RunDir, every file name of a run in one place; and the weights in it."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from modelpar.errors import ConfigError, WriteError, written
from modelpar.planning.graph import Tied


@dataclass(frozen=True)
class RunDir:
    """The folder of one run."""

    path: Path

    @classmethod
    def create(cls, folder: str | Path, name: str | None, default: str) -> RunDir:
        """Makes a new folder for a run; without a name, one of the time and a default that nobody else has.

        Raises ConfigError where the folder exists already or cannot be made.
        """
        stem = str(name or "") or f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{default}"
        for suffix in itertools.count():
            path = Path(folder) / (f"{stem}-{suffix}" if suffix else stem)
            try:
                path.mkdir(parents=True)
                return cls(path)
            except FileExistsError as error:
                if name:
                    raise ConfigError(f"the run folder {path} exists already; expected a new output.name") from error
            except OSError as error:
                raise ConfigError(f"the run folder {path} cannot be made: {error.strerror}") from error
        raise AssertionError

    @classmethod
    def when_needed(cls, folder: str | Path, name: str | None, default: str, exits: ExitStack) -> Callable[[], RunDir]:
        """Returns a function that makes the folder when first called, and removes it with `exits` if still empty then.

        Ranks that measure for a plan write their logs into it, and bad input that a plan would find costs no folder.
        """

        @cache
        def make() -> RunDir:
            run = cls.create(folder, name, default)
            exits.callback(run.remove_if_empty)
            return run

        return make

    def remove_if_empty(self) -> None:
        """Removes the folder where nothing was written into it: what it was for did not start."""
        for path in (self.ranks, self.path):
            with suppress(OSError):
                path.rmdir()

    @property
    def config(self) -> Path:
        """The configuration, with everything resolved."""
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        """The plan."""
        return self.path / "plan.json"

    @property
    def result(self) -> Path:
        """The numbers."""
        return self.path / "result.json"

    @property
    def verdict(self) -> Path:
        """What `modelpar verify` found."""
        return self.path / "verify.json"

    @property
    def weights(self) -> Path:
        """The trained weights."""
        return self.path / "weights.safetensors"

    @property
    def ranks(self) -> Path:
        """The folder with what each rank logged and printed, where ranks are processes."""
        return self.path / "ranks"

    def view_command(self) -> str:
        """Returns what to type to see the run in TensorBoard: this installation's command, if need be with its path."""
        command = "modelpar"
        if not shutil.which(command):
            installed = Path(sys.executable).parent / command
            command = os.path.relpath(installed) if installed.exists() else f"{sys.executable} -m modelpar.cli"
        return f"{command} view {shlex.quote(str(self.path))}"

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes result.json, all of it or nothing."""
        _write_json(self.result, result)

    def write_verdict(self, verdict: Mapping[str, Any]) -> None:
        """Writes verify.json, all of it or nothing."""
        _write_json(self.verdict, verdict)

    def write_weights(self, state: Mapping[str, Tensor], tied: tuple[Tied, ...]) -> None:
        """Writes weights.safetensors, all of it or nothing: tied tensors once, their other names in the metadata."""
        aliases = {name: tie.names[0] for tie in tied for name in tie.names[1:]}
        once = {name: tensor.contiguous() for name, tensor in state.items() if name not in aliases}
        with _whole(self.weights) as temporary:
            try:
                save_file(once, temporary, {"format": "pt", "tied": json.dumps(aliases)})
            except SafetensorError as error:  # also of a full disk
                raise WriteError(f"{self.weights} cannot be written: {error}") from error


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with _whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Yields where to write what then becomes the file: all of it, or nothing. Raises WriteError."""
    temporary = path.with_suffix(".tmp")
    try:
        with written(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # half a file would fill a full disk for nothing


def load_into(model: nn.Module, run: str | Path) -> None:
    """Loads the weights of a run into a plain PyTorch model of the same kind, not split, not changed otherwise.

    `run` is a run's folder, or a weights file. Raises ConfigError where there are no weights, or they do not fit.
    """
    path = Path(run)
    path = RunDir(path).weights if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; expected the folder of a run with weights.safetensors in it")
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            aliases = json.loads((file.metadata() or {}).get("tied", "{}"))
    except SafetensorError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    state |= {name: state[owner] for name, owner in aliases.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"the weights in {path} do not fit the model: {' '.join(str(error).split())}") from error
