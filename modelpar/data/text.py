"""Bytes of text, memory-mapped and split into train and held-out by document.

::

    documents   a.py  b.py  c.py …          in order of the hash of their path; the first tenth is held out
    cached      [ train bytes … | held-out bytes … ]
    windows     offset ├─ context ─┼─ context ─┼─ … one random offset per epoch, then the windows are permuted
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from modelpar.data.base import Batch, chunks, entropy, epoch_generator, spread
from modelpar.errors import ConfigError

CACHE_VERSION = 1

NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
"""Folders that `stdlib` leaves out: installed packages, test suites, and generated tables, which are no programs."""


@dataclass(frozen=True, eq=False)
class Text:
    """Windows of text: inputs and targets are int64 (batch, context), the targets one byte ahead."""

    train: NDArray[np.uint8]
    """All training bytes; a memory map."""
    held: NDArray[np.uint8]
    """All held-out bytes; a memory map."""
    context: int
    description: str

    @cached_property
    def baseline(self) -> tuple[str, float] | None:
        """The entropy of the held-out bytes: the loss of a model that knows their frequencies and nothing else."""
        if not len(self.held):
            return None
        counts = np.zeros(256, np.int64)
        for start in range(0, len(self.held), 2**24):  # bincount makes int64 of what it counts
            counts += np.bincount(self.held[start : start + 2**24], minlength=256)
        return "byte-unigram entropy", entropy(counts)

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yields training batches without end, every window once per epoch."""
        epoch = 0
        while True:
            generator = epoch_generator(seed, epoch)
            offset = int(generator.integers(min(self.context, len(self.train) - self.context)))
            num_windows = (len(self.train) - offset - 1) // self.context
            for windows in chunks(generator.permutation(num_windows), batch_size):
                yield self._windows(self.train, offset + windows * self.context)
            epoch += 1

    def heldout(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yields the held-out windows, or `limit` of them spread evenly; bytes after the last whole window are left."""
        num_windows = max(0, len(self.held) - 1) // self.context
        for windows in chunks(spread(num_windows, limit), batch_size):
            yield self._windows(self.held, windows * self.context)

    def _windows(self, data: NDArray[np.uint8], starts: NDArray[np.int64]) -> Batch:
        window = torch.from_numpy(np.asarray(data[starts[:, None] + np.arange(self.context + 1)], np.int64))
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def text(path: str, context: int, heldout: float = 0.1, pattern: str = "**/*") -> Text:
    """Returns the text of a file, or of all files in a folder that match a glob pattern; hidden ones are left out.

    Of a folder's files a share of `heldout` is held out, chosen by the hash of their path; of a single file, its end.
    Raises ConfigError for a path that cannot be read or holds less than a window of context + 1 bytes.
    """
    root = Path(path).expanduser()
    try:
        if root.is_file():
            return _single(root, context, heldout)
        if not root.is_dir():
            raise ConfigError(f"data.path is {path!r}, which does not exist; expected a file or a folder of text")
        found = (p for p in root.glob(pattern) if not any(part.startswith(".") for part in p.relative_to(root).parts))
        return _folder(root, found, context, heldout, f"text matching {pattern!r}")
    except (ValueError, NotImplementedError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"data.path={path!r} with data.pattern={pattern!r} cannot be read: {error}") from error


def stdlib(context: int, heldout: float = 0.1) -> Text:
    """Returns the source of the running Python's own standard library, without the folders in NOT_STDLIB.

    Raises ConfigError where Python was installed without it.
    """
    root = Path(sysconfig.get_path("stdlib"))
    try:
        return _folder(root, _stdlib_files(root), context, heldout, "Python source")
    except OSError as error:
        raise ConfigError(
            f"the standard library in {root} cannot be read: {error}; name a text by data=text"
        ) from error


def _stdlib_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_STDLIB]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _single(path: Path, context: int, heldout: float) -> Text:
    """Maps one file where it lies; its end is held out."""
    size = path.stat().st_size
    held = round(size * _share(heldout))
    _check_windows(str(path), size - held, held, context, heldout)
    data = np.memmap(path, np.uint8, mode="r")
    about = f"{size / 1e6:.1f} MB of text from {path.name}; the last {held / 1e6:.1f} MB held out"
    return Text(data[: size - held], data[size - held :], context, about)


def _folder(root: Path, found: Iterable[Path], context: int, heldout: float, kind: str) -> Text:
    names = {p.relative_to(root).as_posix(): p for p in found if p.is_file()}
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).digest())
    if not order:
        raise ConfigError(f"{root} has no {kind}; expected at least one file")
    if len(order) == 1:
        return _single(names[order[0]], context, heldout)
    # At least one document on either side, unless nothing is to be held out.
    num_held = min(max(1, round(_share(heldout) * len(order))), len(order) - 1) if heldout else 0
    documents = [(name, names[name].stat()) for name in order[num_held:] + order[:num_held]]
    sizes = [stat.st_size for _, stat in documents]
    total, train = sum(sizes), sum(sizes[: len(sizes) - num_held])
    _check_windows(str(root), train, total - train, context, heldout)
    identity = [CACHE_VERSION, str(root.resolve()), [(n, s.st_size, s.st_mtime_ns) for n, s in documents], num_held]
    cached = cache_folder() / "text" / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]}.bytes"
    if not cached.is_file() or cached.stat().st_size != total:
        _concatenate([(names[name], stat.st_size) for name, stat in documents], cached)
    data = np.memmap(cached, np.uint8, mode="r")
    about = f"{len(order)} files, {total / 1e6:.1f} MB of {kind}; {num_held} files held out"
    return Text(data[:train], data[train:], context, about)


def cache_folder() -> Path:
    """Returns modelpar's folder in the user's cache: $XDG_CACHE_HOME/modelpar or ~/.cache/modelpar."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelpar"


def _concatenate(documents: Iterable[tuple[Path, int]], target: Path) -> None:
    """Writes documents one after another; the file appears whole or not at all, also where two processes write it."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.NamedTemporaryFile(dir=target.parent, suffix=".tmp", delete=False)  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"the cache cannot be written: {error}; set XDG_CACHE_HOME to a folder that can") from error
    with temporary as file:
        try:
            for path, size in documents:
                content = path.read_bytes()
                if len(content) != size:
                    raise ConfigError(
                        f"{path} changed from {size} to {len(content)} bytes while it was read; try again"
                    )
                file.write(content)
            file.flush()
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise


def _share(heldout: float) -> float:
    if not 0 <= heldout < 1:
        raise ConfigError(f"data.heldout is {heldout}; expected a share of at least 0 and less than 1")
    return heldout


def _check_windows(what: str, train: int, held: int, context: int, heldout: float) -> None:
    if context < 1:
        raise ConfigError(f"data.context is {context}; expected at least 1")
    for part, size in (("training", train), *([("held-out", held)] if heldout else [])):
        if size < context + 1:
            raise ConfigError(
                f"the {part} part of {what} is {size} bytes; expected at least one window of {context + 1} bytes "
                f"(data.context={context} and the byte to predict)"
            )
