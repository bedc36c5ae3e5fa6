"""Inputs and targets from one NumPy file."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from modelpar.data.base import Batch, chunks, entropy, epoch_generator, spread
from modelpar.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Arrays:
    """Samples in memory: the leading dimension of inputs and targets counts them."""

    inputs: NDArray[Any]
    targets: NDArray[Any]
    train: NDArray[np.int64]
    """Indices of the training samples."""
    held: NDArray[np.int64]
    """Indices of the held-out samples."""
    description: str

    @property
    def baseline(self) -> tuple[str, float] | None:
        """The entropy of the held-out classes, where targets are one class number per sample."""
        labels = self.targets[self.held]
        if labels.ndim != 1 or labels.dtype != np.int64 or not len(labels):
            return None
        return "entropy of the held-out targets", entropy(np.unique(labels, return_counts=True)[1])

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yields training batches without end, every sample once per epoch."""
        epoch = 0
        while True:
            for indices in chunks(epoch_generator(seed, epoch).permutation(self.train), batch_size):
                yield self._samples(indices)
            epoch += 1

    def heldout(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yields the held-out samples, or `limit` of them spread evenly."""
        for indices in chunks(self.held[spread(len(self.held), limit)], batch_size):
            yield self._samples(indices)

    def _samples(self, indices: NDArray[np.int64]) -> Batch:
        return torch.from_numpy(self.inputs[indices]), torch.from_numpy(self.targets[indices])


def arrays(path: str, heldout: float = 0.1) -> Arrays:
    """Returns the samples of an .npz file with arrays `inputs` and `targets`.

    float64 becomes float32, integers become int64. A share of `heldout`, drawn once and for all, is held out: files are
    often sorted by class. Raises ConfigError for a file that cannot be used.
    """
    if not 0 <= heldout < 1:
        raise ConfigError(f"data.heldout is {heldout}; expected a share of at least 0 and less than 1")
    file = Path(path).expanduser()
    try:
        with file.open("rb") as opened:
            if opened.read(2) not in (b"PK", b"\x93N"):  # numpy would take it for a pickle, and say so
                raise ConfigError(f"data.path={path!r} cannot be read as an .npz file: it is of another kind")
            opened.seek(0)
            loaded = np.load(opened, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise ConfigError(f"{path} holds a single array; expected an .npz file with inputs and targets")
            missing = [name for name in ("inputs", "targets") if name not in loaded.files]
            if missing:
                raise ConfigError(f"{path} has {loaded.files} and no {' and no '.join(missing)}")
            inputs, targets = (_converted(loaded[name], name, path) for name in ("inputs", "targets"))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"data.path={path!r} cannot be read as an .npz file: {error}") from error
    return of_arrays(inputs, targets, heldout, file.name)


def of_arrays(inputs: NDArray[Any], targets: NDArray[Any], heldout: float, name: str) -> Arrays:
    """Returns samples that are in memory already; raises ConfigError where lengths differ or there is none."""
    num = len(inputs)
    if num != len(targets):
        raise ConfigError(f"{name} has {num} inputs and {len(targets)} targets; expected as many of each")
    if not num:
        raise ConfigError(f"{name} has no samples; expected at least one")
    num_held = min(max(1, round(num * heldout)), num - 1) if heldout else 0
    order = np.random.default_rng(0).permutation(num)
    description = (
        f"{num} samples from {name}: inputs {inputs.dtype} {list(inputs.shape[1:])}, "
        f"targets {targets.dtype} {list(targets.shape[1:])}; {num_held} held out"
    )
    return Arrays(inputs, targets, np.sort(order[num_held:]), np.sort(order[:num_held]), description)


def _converted(array: NDArray[Any], name: str, path: str) -> NDArray[Any]:
    if array.dtype.kind not in "biuf":
        raise ConfigError(f"{name} in {path} has dtype {array.dtype}; expected numbers")
    if array.ndim == 0:
        raise ConfigError(f"{name} in {path} is a single number; expected one entry per sample")
    if array.dtype.kind in "iu":
        return array.astype(np.int64)
    return array.astype(np.float32) if array.dtype.kind == "f" and array.dtype.itemsize > 4 else array
