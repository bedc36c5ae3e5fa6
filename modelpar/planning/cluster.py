"""Where a plan runs: devices, and what it costs to hand a value from one rank to another."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from modelpar.errors import ConfigError


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


UNKNOWN = Link()
"""The link of a cluster that says nothing about it. It costs nothing; `modelpar.plan` puts a measured one in its place,
and tells it by identity from another `Link()`."""


@dataclass(frozen=True)
class Cluster:
    """One device per rank, and what connects them: `link` between any two ranks for which `links` names no other.

    Raises ConfigError where the parts are not of the same number of ranks, or a device has no memory.
    """

    devices: tuple[str, ...]
    """The torch device of each rank, such as "cpu" or "cuda:1"."""
    speeds: tuple[float, ...] = ()
    """Relative speed of each rank's device; empty means all 1. A stage takes its profiled seconds / speed."""
    link: Link = UNKNOWN
    transport: str = "rpc"
    shared_memory: bool = True
    cuda_ipc: bool = False
    """How values travel between the ranks, all three as for `Workers`. Other workers run the plan too, with the same
    numbers; values then travel as those do it."""
    memory: tuple[int | None, ...] = ()
    """Bytes on each rank's device for what `memory.stage_memory_bytes` counts; None, or no entry at all: no limit."""
    links: tuple[tuple[int, int, Link], ...] = ()
    """Two ranks and the link between them, which serves both directions. Its actions, data and ends are not read."""

    def __post_init__(self) -> None:
        for what, values in (("speeds", self.speeds), ("sizes of memory", self.memory)):
            if values and len(values) != self.num_ranks:
                raise ConfigError(f"the cluster has {self.num_ranks} devices and {len(values)} {what}; expected equal")
        for rank, size in enumerate(self.memory):
            if size is not None and not size > 0:
                raise ConfigError(f"rank {rank} has {size} bytes of memory; expected more than 0, or None for no limit")
        for first, second, _ in self.links:
            if first == second or not {first, second} <= set(range(self.num_ranks)):
                raise ConfigError(f"a link joins ranks {first} and {second}; expected two of 0 … {self.num_ranks - 1}")

    @property
    def num_ranks(self) -> int:
        """How many ranks there are."""
        return len(self.devices)

    def speed(self, rank: int) -> float:
        """Returns the relative speed of a rank's device."""
        return self.speeds[rank] if self.speeds else 1.0

    def memory_of(self, rank: int) -> int | None:
        """Returns the bytes on a rank's device, None where there is no limit."""
        return self.memory[rank] if self.memory else None

    @property
    def limited(self) -> bool:
        """Whether any device's memory has a limit."""
        return any(size is not None for size in self.memory)

    def link_between(self, first: int, second: int) -> Link:
        """Returns what connects two different ranks."""
        return self._pairs.get((min(first, second), max(first, second)), self.link)

    @cached_property
    def _pairs(self) -> dict[tuple[int, int], Link]:
        return {(min(first, second), max(first, second)): link for first, second, link in self.links}

    def to_json(self) -> dict[str, Any]:
        """Returns plain data for json."""
        links = [{"ranks": [first, second], "link": link.to_json()} for first, second, link in self.links]
        return {**asdict(self), "link": self.link.to_json(), "links": links}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Cluster:
        """Reads what `to_json` wrote, or an earlier version did."""
        lists = {name: tuple(data.get(name, ())) for name in ("devices", "speeds", "memory")}
        links = tuple((*pair["ranks"], Link.from_json(pair["link"])) for pair in data.get("links", ()))
        return cls(**{**data, **lists, "link": Link.from_json(data["link"]), "links": links})
