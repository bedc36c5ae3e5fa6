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
    cases: tuple[str, ...] = ()
    """Rows of the steps section to measure, "gpt,2,8"; all where there are none."""
    begun: float = 0.0
    """When the benchmark began, by perf_counter."""

    def rounds(self, *, full: int, quick: int) -> int:
        """Returns how many undisturbed rounds a section should have."""
        return self.wanted_rounds or (quick if self.quick else full)

    @property
    def slice_seconds(self) -> float:
        """How long a contender's turn should last, besides its first step, which does not count."""
        return 0.15 if self.quick else 0.4

    @property
    def most_seconds(self) -> float:
        """After how long a case begins no more rounds, so that a busy machine makes no quick run a long one."""
        return 5.0 if self.quick else 600.0

    @property
    def num_cores(self) -> int:
        """How many cores there are."""
        return os.cpu_count() or 1

    def say(self, text: str) -> None:
        """Tells on standard error what goes on, and when."""
        print(f"bench: {perf_counter() - self.begun:4.0f} s  {text}", file=sys.stderr, flush=True)
