"""What each layer costs: LayerCost and Profile."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modelpar.errors import ConfigError
from modelpar.planning.cluster import Link

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class LayerCost:
    """The cost of one layer for one micro-batch.

    Seconds are the layer's own; a backward pass is `input_grad_seconds + weight_grad_seconds`. Bytes count one
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
    """What its backward needs, its input included where it needs that."""
    output_bytes: int = 0
    kept_bytes: int = 0
    """What it makes and its backward or the next layer's may need: saved values and output, without its input."""
    temporary_bytes: int = 0
    """The most that its forward or its backward holds besides, gradients of parameters left out."""
    cold_seconds: float = 0.0
    """How much longer its first forward of a step takes: the optimizer has been through the caches."""
    reduce_seconds: float = 0.0
    """Per step: dividing its gradients, taking their norms, clipping them."""
    update_seconds: float = 0.0
    """Per step: the optimizer, for its parameters."""
    optimizer_bytes: int | None = None
    """What the optimizer keeps for it; None where that was not measured."""

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
    num_ranks: int = 1
    """How many ranks were busy at once while it was measured; 0 where that is not known."""
    clips: bool = False
    """Whether gradients were clipped while it was measured."""
    measured_at: str = ""
    """ISO 8601, empty where nothing was measured."""
    slack_share: float = 0.0
    """What a process takes beyond the tensors that are alive, as a share of its activations: what the allocator cannot
    use again, and what operators need inside themselves."""
    link: Link | None = None
    """What a message costs between such ranks; None where that was not measured."""

    def check_fits(self, names: Sequence[str], microbatch_size: int, what: str = "the profile") -> None:
        """Raises ConfigError unless it is a profile of layers of these names and of micro-batches of this size."""
        ours = [layer.name for layer in self.layers]
        if ours != list(names):
            lacking = [name for name in names if name not in ours] + [name for name in ours if name not in names]
            reason = f"{len(ours)} layers, the model {len(names)}"
            if len(ours) == len(names):
                reason = f"other layers than the model: {', '.join(lacking[:4]) or 'their order'}"
            raise ConfigError(f"{what} is of {reason}; expected a profile of this model")
        if self.microbatch_size != microbatch_size:
            raise ConfigError(
                f"{what} is of micro-batches of {self.microbatch_size} samples; expected {microbatch_size} as here"
            )

    def to_json(self) -> dict[str, Any]:
        """Returns plain data for json."""
        return {
            "schema_version": SCHEMA_VERSION,
            **asdict(self),
            "link": None if self.link is None else self.link.to_json(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Profile:
        """Reads what `to_json` wrote, or an earlier version did."""
        fields = {key: value for key, value in data.items() if key not in ("schema_version", "slack_bytes")}
        link = fields.pop("link", None)
        layers = tuple(LayerCost(**layer) for layer in fields.pop("layers"))
        return cls(layers=layers, link=None if link is None else Link.from_json(link), **fields)

    def save(self, path: str | Path) -> None:
        """Writes profile.json."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Reads profile.json. Raises ConfigError where it cannot be read or is something else."""
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except OSError as error:
            raise ConfigError(f"the profile {path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is not a profile; expected what `modelpar profile` wrote") from error
