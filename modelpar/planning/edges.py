"""How each value gets from one stage to another: Edge. The choice is made here, per edge; run/ does as it says.

::

    between processes of one host    up to INLINE_BYTES in the datagram itself, else in shared memory
    over RPC                         as a message
    between threads, or on one rank  as it is: nothing is copied
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from modelpar.planning.cluster import Cluster
from modelpar.planning.graph import BATCH, StageGraph

INLINE_BYTES = 2048
"""Up to how many bytes a value is copied into its datagram: below, a slot of shared memory costs more than it saves."""

Carrier = Literal["memory", "datagram", "shared memory", "message", "cuda ipc"]


@dataclass(frozen=True)
class Edge:
    """One value on its way from the stage that makes it to one that takes it; its gradient goes back the same way."""

    value: str
    producer: int
    """A stage."""
    consumer: int
    """A stage."""
    num_bytes: int
    """Per micro-batch of the profiled size."""
    carrier: Carrier


def edges(graph: StageGraph, stage_to_rank: tuple[int, ...], cluster: Cluster, samples: int) -> tuple[Edge, ...]:
    """Returns the edges between stages, for micro-batches of so many samples; what the batch brings is left out."""
    found = []
    for value in graph.values:
        for consumer in value.consumers:
            if BATCH in (value.producer, consumer):
                continue
            num_bytes = round(value.bytes_per_sample * samples)
            ranks = stage_to_rank[value.producer], stage_to_rank[consumer]
            found.append(Edge(value.name, value.producer, consumer, num_bytes, carrier(cluster, *ranks, num_bytes)))
    return tuple(found)


def carrier(cluster: Cluster, source: int, target: int, num_bytes: int) -> Carrier:
    """Returns what carries a value of so many bytes from one rank to another."""
    if source == target or cluster.transport == "threads":
        return "memory"
    if cluster.cuda_ipc and cluster.devices[source].startswith("cuda"):
        return "cuda ipc"
    if not cluster.shared_memory:
        return "message"
    return "datagram" if in_datagram(num_bytes) else "shared memory"


def in_datagram(num_bytes: int) -> bool:
    """Tells whether a value of so many bytes travels in its datagram."""
    return num_bytes <= INLINE_BYTES
