"""Where a plan runs: devices, and what it costs to hand a value from one rank to another."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Link:
    """What a message of n bytes between two ranks costs, and what else a rank spends besides computing layers.

    ::

        sender    F ─send─┐                          send      send_seconds + n / send_bandwidth
        wire              └─ ─ ─ ─ ─ ─┐              wire      latency + n / bandwidth
        receiver                 wait ┴take─ F       take      take_seconds + n / take_bandwidth

    All is zero unless said otherwise, so that `Link(latency, bandwidth)` is a wire between ranks that do nothing else.
    """

    latency: float = 0.0
    """Seconds per message, from the end of its sending."""
    bandwidth: float = float("inf")
    """Bytes per second."""
    send_seconds: float = 0.0
    """Seconds per message that the sending rank is busy."""
    send_bandwidth: float = float("inf")
    take_seconds: float = 0.0
    """Seconds per message that the receiving rank is busy, once it has arrived."""
    take_bandwidth: float = float("inf")
    action_seconds: float = 0.0
    """Seconds that an action takes besides its layers' own work."""
    data_seconds: float = 0.0
    """Seconds from the start of a step until the first micro-batch has come from the controller."""
    end_seconds: float = 0.0
    """Seconds that a rank spends at the end of a step besides messages and its parameters' own update."""

    def seconds(self, num_bytes: float) -> float:
        """Returns how long one message is on its way."""
        return self.latency + num_bytes / self.bandwidth

    def send(self, num_bytes: float) -> float:
        """Returns how long a message keeps its sender busy."""
        return self.send_seconds + num_bytes / self.send_bandwidth

    def take(self, num_bytes: float) -> float:
        """Returns how long a message keeps its receiver busy."""
        return self.take_seconds + num_bytes / self.take_bandwidth

    def hand_off(self, num_bytes: float) -> float:
        """Returns the time from the end of what made a value to the start of what needs it: send, wire and take."""
        return self.send(num_bytes) + self.seconds(num_bytes) + self.take(num_bytes)

    def to_json(self) -> dict[str, Any]:
        """Returns plain data for json; an infinite bandwidth is written as null."""
        return {name: None if value == float("inf") else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Link:
        """Reads what `to_json` wrote."""
        return cls(**{name: float("inf") if value is None else value for name, value in data.items()})


@dataclass(frozen=True)
class Cluster:
    """One device per rank, and one link that stands for all connections between different ranks."""

    devices: tuple[str, ...]
    """The torch device of each rank, such as "cpu" or "cuda:1"."""
    speeds: tuple[float, ...] = ()
    """Relative speed of each rank's device; empty means all 1. A stage takes its profiled seconds / speed."""
    link: Link = Link()
    transport: str = "rpc"
    shared_memory: bool = True
    cuda_ipc: bool = False
    """How values travel between the ranks, all three as for `Workers`. Other workers run the plan too, with the same
    numbers; values then travel as those do it."""

    @property
    def num_ranks(self) -> int:
        """How many ranks there are."""
        return len(self.devices)

    def speed(self, rank: int) -> float:
        """Returns the relative speed of a rank's device."""
        return self.speeds[rank] if self.speeds else 1.0

    def to_json(self) -> dict[str, Any]:
        """Returns plain data for json."""
        return {**asdict(self), "link": self.link.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Cluster:
        """Reads what `to_json` wrote."""
        lists = {name: tuple(data[name]) for name in ("devices", "speeds")}
        return cls(**{**data, **lists, "link": Link.from_json(data["link"])})
