"""Where a plan runs: devices, and the links between ranks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Link:
    """A connection between two ranks: a message of n bytes takes latency + n / bandwidth seconds."""

    latency: float = 0.0
    """Seconds per message."""
    bandwidth: float = float("inf")
    """Bytes per second."""

    def seconds(self, num_bytes: float) -> float:
        """Returns the time one message takes."""
        return self.latency + num_bytes / self.bandwidth


@dataclass(frozen=True)
class Cluster:
    """One device per rank, and one link that stands for all connections between different ranks."""

    devices: tuple[str, ...]
    """The torch device of each rank, such as "cpu" or "cuda:1"."""
    speeds: tuple[float, ...] = ()
    """Relative speed of each rank's device; empty means all 1. A stage takes its profiled seconds / speed."""
    link: Link = Link()

    @property
    def num_ranks(self) -> int:
        """How many ranks there are."""
        return len(self.devices)

    def speed(self, rank: int) -> float:
        """Returns the relative speed of a rank's device."""
        return self.speeds[rank] if self.speeds else 1.0

    def to_json(self) -> dict[str, Any]:
        """Returns plain data for json; an infinite bandwidth is written as null."""
        data = asdict(self)
        if data["link"]["bandwidth"] == float("inf"):
            data["link"]["bandwidth"] = None
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Cluster:
        """Reads what `to_json` wrote."""
        bandwidth = data["link"]["bandwidth"]
        link = Link(data["link"]["latency"], float("inf") if bandwidth is None else bandwidth)
        return cls(tuple(data["devices"]), tuple(data["speeds"]), link)
