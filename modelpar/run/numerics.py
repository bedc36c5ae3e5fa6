"""Settings of torch that change the bits of results and that every process has for itself: Numerics."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch.backends import cudnn


class Numerics(NamedTuple):
    """The settings of the process that runs the user's code, which the ranks take over.

    Others, such as TF32 in convolutions, are left at torch's defaults on every rank.
    """

    deterministic: bool
    """Set by `torch.use_deterministic_algorithms`."""
    only_warn: bool
    matmul_precision: str
    """Set by `torch.set_float32_matmul_precision`."""
    cudnn_deterministic: bool
    cudnn_benchmark: bool

    @classmethod
    def current(cls) -> Self:
        """Returns those of this process."""
        return cls(
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.get_float32_matmul_precision(),
            cudnn.deterministic,
            cudnn.benchmark,
        )

    def apply(self) -> None:
        """Makes them those of this process."""
        if self == self.current():  # as between threads
            return
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.only_warn)
        torch.set_float32_matmul_precision(self.matmul_precision)
        cudnn.deterministic, cudnn.benchmark = self.cudnn_deterministic, self.cudnn_benchmark
