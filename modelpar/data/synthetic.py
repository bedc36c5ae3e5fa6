"""Samples made up on the spot: for trying things out, and for models that bring nothing but an example."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelpar.capture.microbatch import Cutting
from modelpar.data.arrays import Arrays, of_arrays
from modelpar.data.base import Batch, chunks, epoch_generator, spread
from modelpar.errors import ConfigError

SEPARATION = 0.5
"""How far the teacher moves a class's inputs from 0, in standard deviations of their noise, per dimension."""


@dataclass(frozen=True, eq=False)
class Example:
    """Samples drawn with replacement from one batch, so that shapes, dtypes and labels fit any model."""

    batch: Batch
    """(inputs, targets), pytrees; what counts samples is drawn from, other values are repeated."""
    cutting: Cutting
    num_examples: int
    num_samples: int
    """Samples in an epoch."""
    description: str
    baseline: tuple[str, float] | None = None

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yields training batches without end."""
        epoch = 0
        while True:
            drawn = epoch_generator(seed, epoch).integers(self.num_examples, size=self.num_samples)
            for indices in chunks(drawn, batch_size):
                yield self._samples(indices)
            epoch += 1

    def heldout(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yields the example's own samples: there are no others to hold out."""
        for indices in chunks(spread(self.num_examples, limit), batch_size):
            yield self._samples(indices)

    def _samples(self, indices: NDArray[np.int64]) -> Batch:
        return self.cutting.take(self.batch, indices.tolist())


def synthetic(
    input_shape: Sequence[int] | int = 256,
    num_classes: int = 10,
    num_samples: int = 4096,
    seed: int = 0,
    example: Batch | None = None,
    shared: Sequence[str | int] | None = None,
) -> Arrays | Example:
    """Returns samples drawn from an example batch, or, without one, a task that can be learnt.

    The task: a fixed random teacher gives every class a centre; inputs, float32 (num_samples, *input_shape), are noise
    around the centre of their class, an int64 number. A tenth is held out. `shared` names parts of the example that all
    samples share. Raises ConfigError for sizes below 1 and for
    an example without a tensor of samples.
    """
    if num_samples < 1:
        raise ConfigError(f"data.num_samples is {num_samples}; expected at least 1")
    if example is not None:
        return _of_example(example, num_samples, shared or ())
    shape = [input_shape] if isinstance(input_shape, int) else list(input_shape)
    if num_classes < 1 or min(shape, default=1) < 1:
        raise ConfigError(f"data.num_classes is {num_classes} and data.input_shape {shape}; expected at least 1")
    generator = np.random.default_rng(seed)
    centres = SEPARATION * generator.standard_normal((num_classes, *shape), np.float32)
    labels = generator.integers(num_classes, size=num_samples)
    inputs = generator.standard_normal((num_samples, *shape), np.float32)
    inputs += centres[labels]
    return of_arrays(inputs, labels, 0.1, "a random teacher")


def _of_example(example: Batch, num_samples: int, shared: Sequence[str | int]) -> Example:
    try:
        cutting = Cutting(shared=tuple(map(str, shared))).read(example)
        num = cutting.size(*example)
    except ConfigError as error:
        raise ConfigError(f"the example batch cannot be drawn from: {error}") from error
    what = f"{num_samples} samples drawn from the model's example batch of {num}"
    return Example(example, cutting, num, num_samples, what)
