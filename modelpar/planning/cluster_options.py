"""A cluster as configurations write it: the group `cluster=`, see configs/cluster/."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from modelpar.errors import ConfigError
from modelpar.planning.cluster import UNKNOWN, Cluster, Link
from modelpar.planning.sizes import parse_bytes


def read_cluster(
    options: Mapping[str, Any], num_ranks: int, names: Sequence[str] = (), usual: Link | None = None
) -> Cluster:
    """Returns the cluster that options describe::

        devices: [{speed: 1, memory: 8GB}, {speed: 0.5, memory: 4GB}]     None: num_ranks equal ones
        memory: 6GB                                                       of devices that do not say theirs
        link: {latency: 1e-4, bandwidth: 10GB}
        links: [{ranks: [0, 1], latency: 1e-3, bandwidth: 1GB}]

    `names` are the torch devices of the ranks. Where the options leave both numbers of the link open it is `UNKNOWN`;
    where they leave one open, that of the `usual` link holds.

    Raises ConfigError where the number of devices is not `num_ranks`, or a number cannot be used.
    """
    devices = options["devices"]
    if devices is None:
        devices = [{}] * num_ranks
    if len(devices) != num_ranks:
        raise ConfigError(
            f"pipeline.num_ranks is {num_ranks}, but cluster.devices has {len(devices)}; expected as many ranks as "
            f"devices, such as pipeline.num_ranks={len(devices)}"
        )
    for rank, device in enumerate(devices):
        _check_names(device, ("speed", "memory"), f"cluster.devices[{rank}]")
    speeds = [
        _number(device.get("speed"), f"cluster.devices[{rank}].speed", 1.0) for rank, device in enumerate(devices)
    ]
    memory: list[int | None] = []
    for rank, device in enumerate(devices):
        own = device.get("memory")
        size, what = (options["memory"], "cluster.memory") if own is None else (own, f"cluster.devices[{rank}].memory")
        memory.append(None if size is None else int(parse_bytes(size, what)))
    for rank, speed in enumerate(speeds):
        if not speed > 0 or speed == math.inf:
            raise ConfigError(f"cluster.devices[{rank}].speed is {speed}; expected a number above 0")
    return Cluster(
        devices=tuple(names) or tuple(f"device {rank}" for rank in range(num_ranks)),
        speeds=() if all(speed == 1 for speed in speeds) else tuple(speeds),
        link=_link(options["link"], "cluster.link", usual or Link()),
        memory=() if all(size is None for size in memory) else tuple(memory),
        links=tuple(_pair(pair, f"cluster.links[{i}]") for i, pair in enumerate(options["links"] or ())),
    )


def _link(options: Mapping[str, Any], what: str, usual: Link) -> Link:
    latency, bandwidth = options.get("latency"), options.get("bandwidth")
    if latency is None and bandwidth is None:
        return UNKNOWN
    seconds = _number(latency, f"{what}.latency", usual.latency)
    if not 0 <= seconds < math.inf:
        raise ConfigError(f"{what}.latency is {latency}; expected seconds from 0 up")
    if bandwidth is None:
        return Link(seconds, usual.bandwidth)
    return Link(seconds, math.inf if bandwidth == "inf" else parse_bytes(bandwidth, f"{what}.bandwidth"))


def _pair(options: Mapping[str, Any], what: str) -> tuple[int, int, Link]:
    _check_names(options, ("ranks", "latency", "bandwidth"), what)
    ranks = options.get("ranks")
    if not (isinstance(ranks, Sequence) and len(ranks) == 2 and all(type(rank) is int for rank in ranks)):
        raise ConfigError(f"{what}.ranks is {ranks}; expected two ranks, such as [0, 1]")
    return ranks[0], ranks[1], _link(options, what, Link())


def _check_names(options: Any, valid: Sequence[str], what: str) -> None:
    if not isinstance(options, Mapping):
        raise ConfigError(f"{what} is {options}; expected {{{', '.join(f'{name}: …' for name in valid)}}}")
    for name in options:
        if name not in valid:
            raise ConfigError(f"{what}.{name} is unknown; expected one of {', '.join(valid)}")


def _number(value: Any, what: str, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{what} is {value!r}; expected a number")
    return float(value)
