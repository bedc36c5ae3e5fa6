"""Which layers form which stage: Partition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modelpar.errors import PartitionError


@dataclass(frozen=True)
class Partition:
    """Contiguous runs of layers: stage s has layers[bounds[s]:bounds[s + 1]].

    Raises PartitionError where a stage would be empty or a layer lost.
    """

    bounds: tuple[int, ...]
    """Ascending, from 0 to the number of layers."""
    method: str = "manual"
    bottleneck: float | None = None
    """The largest stage in the quantity that the method balances (seconds, bytes, FLOPs or layers)."""
    lower_bound: float | None = None
    """No partition into as many stages can have a smaller bottleneck than this, whatever the cuts: the largest run of
    layers between legal cuts, or an even share of all, each on the devices' speeds."""

    def __post_init__(self) -> None:
        if len(self.bounds) < 2 or self.bounds[0] != 0:
            raise PartitionError(f"partition bounds are {list(self.bounds)}; expected 0 first and at least one stage")
        for stage, (start, end) in enumerate(zip(self.bounds, self.bounds[1:], strict=False)):
            if end <= start:
                raise PartitionError(
                    f"stage {stage} would be empty: bounds are {list(self.bounds)}; expected ascending ones"
                )

    @classmethod
    def of_balance(cls, balance: Sequence[int], num_layers: int, method: str = "manual") -> Partition:
        """Builds a partition from the number of layers per stage, which must add up to `num_layers`."""
        if any(count < 1 for count in balance) or sum(balance) != num_layers:
            raise PartitionError(
                f"balance {list(balance)} adds up to {sum(balance)} layers with {len(balance)} stages; "
                f"expected positive counts that add up to {num_layers}"
            )
        bounds = [0]
        for count in balance:
            bounds.append(bounds[-1] + count)
        return cls(tuple(bounds), method)

    @property
    def num_stages(self) -> int:
        """How many stages there are."""
        return len(self.bounds) - 1

    @property
    def num_layers(self) -> int:
        """How many layers there are in all stages."""
        return self.bounds[-1]

    @property
    def balance(self) -> tuple[int, ...]:
        """The number of layers per stage."""
        return tuple(end - start for start, end in zip(self.bounds, self.bounds[1:], strict=False))

    def layers(self, stage: int) -> range:
        """Returns the indices of a stage's layers."""
        return range(self.bounds[stage], self.bounds[stage + 1])

    def to_json(self) -> dict[str, Any]:
        """Returns plain data for json."""
        return {
            "balance": list(self.balance),
            "method": self.method,
            "bottleneck": self.bottleneck,
            "lower_bound": self.lower_bound,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Partition:
        """Reads what `to_json` wrote."""
        bounds = cls.of_balance(data["balance"], sum(data["balance"])).bounds
        return cls(bounds, data["method"], data["bottleneck"], data["lower_bound"])


def together(names: Sequence[str]) -> str:
    """Returns what a message calls layers that no legal cut separates."""
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}, which stay together,"
