"""What each layer costs: LayerCost and Profile."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class LayerCost:
    """The cost of one layer for one micro-batch.

    Seconds are isolated compute times; a backward pass is `input_grad_seconds + weight_grad_seconds`. Bytes count one
    micro-batch of `Profile.microbatch_size` samples; `saved_bytes` is a union over storages, not a sum.
    """

    name: str
    forward_seconds: float
    input_grad_seconds: float
    weight_grad_seconds: float
    flops: float = 0.0
    """Floating-point operations of forward and backward together."""
    parameter_bytes: int = 0
    saved_bytes: int = 0
    output_bytes: int = 0

    @property
    def backward_seconds(self) -> float:
        """Seconds of a full backward pass."""
        return self.input_grad_seconds + self.weight_grad_seconds

    @property
    def seconds(self) -> float:
        """Seconds of forward and backward together."""
        return self.forward_seconds + self.backward_seconds


@dataclass(frozen=True)
class Profile:
    """The cost of every layer, and how it was found."""

    layers: tuple[LayerCost, ...]
    microbatch_size: int
    source: str
    """"measured" or "flops"."""
    device: str = "cpu"
    num_threads: int = 1
    measured_at: str = ""
    """ISO 8601, empty where nothing was measured."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain data for json."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Profile:
        """Reads what `to_json` wrote."""
        fields = {key: value for key, value in data.items() if key != "schema_version"}
        return cls(**{**fields, "layers": tuple(LayerCost(**layer) for layer in data["layers"])})
