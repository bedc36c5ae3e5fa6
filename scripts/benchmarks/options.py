"""What was asked for on the command line: Options."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from time import perf_counter


@dataclass(frozen=True)
class Options:
    """How much to measure."""

    quick: bool = False
    wanted_rounds: int | None = None
    """Overrides every section's own number of rounds."""
    begun: float = 0.0
    """When the benchmark began, by perf_counter."""

    def rounds(self, *, full: int, quick: int) -> int:
        """Returns how many undisturbed rounds a section should have."""
        return self.wanted_rounds or (quick if self.quick else full)

    @property
    def num_cores(self) -> int:
        """How many cores there are."""
        return os.cpu_count() or 1

    def say(self, text: str) -> None:
        """Tells on standard error what goes on, and when."""
        print(f"bench: {perf_counter() - self.begun:4.0f} s  {text}", file=sys.stderr, flush=True)
