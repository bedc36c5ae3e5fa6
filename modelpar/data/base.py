"""What every data set can do, and the two things that all of them compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Batch = tuple[Any, Any]
"""(inputs, targets); the leading dimension of tensors and arrays counts samples, and so do lists of them."""


class Data(Protocol):
    """What `modelpar train` asks of a data set."""

    @property
    def description(self) -> str:
        """One line for people."""

    @property
    def baseline(self) -> tuple[str, float] | None:
        """The name and the value in nats of a loss to compare the held-out loss with."""

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yields training batches without end, the same for the same seed; the ragged end of an epoch is one too."""

    def heldout(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yields the held-out samples, or `limit` of them spread evenly; always the same ones in the same order."""


def epoch_generator(seed: int, epoch: int) -> np.random.Generator:
    """Returns a private generator for one epoch, so that neither torch's nor numpy's global one matters."""
    return np.random.default_rng((seed, epoch))


def chunks(indices: NDArray[np.int64], batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Yields runs of `batch_size` indices; the last one may be shorter."""
    for start in range(0, len(indices), batch_size):
        yield indices[start : start + batch_size]


def spread(num: int, limit: int | None) -> NDArray[np.int64]:
    """Returns 0 … num − 1, or `limit` of these numbers spread evenly."""
    if limit is None or limit >= num:
        return np.arange(num)
    return np.arange(limit) * num // limit


def entropy(counts: NDArray[np.int64]) -> float:
    """Returns the entropy in nats of the distribution that counts describe: −Σ p·ln p (Shannon 1948)."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
