"""From a profile to a plan: a split and an order put together, and checked."""

from __future__ import annotations

from typing import Any

from modelpar.errors import ConfigError
from modelpar.planning.cluster import Cluster
from modelpar.planning.fitting import check_memory
from modelpar.planning.graph import ModelGraph
from modelpar.planning.partitioners import Partitioner, with_schedule
from modelpar.planning.plan import Plan, ScheduleGenerator
from modelpar.planning.profile import Profile
from modelpar.planning.schedule import Schedule


def decide(
    graph: ModelGraph,
    profile: Profile,
    cluster: Cluster,
    partitioner: Partitioner,
    order: Schedule,
    generator: ScheduleGenerator,
    **more: Any,
) -> Plan:
    """Splits a model for an order that a generator made; `more` are other fields of the plan.

    Raises PartitionError where the partitioner does, and where the stages do not fit into the devices' memory.
    """

    def order_for(num_ranks: int) -> Schedule:
        return order if num_ranks == order.num_ranks else generator(num_ranks, order.num_microbatches)

    partition = with_schedule(partitioner, order_for)(graph, profile, cluster, order.num_stages)
    plan = Plan(graph, profile, cluster, partition, order, generator, **more)
    check_memory(plan)
    return plan


def check_counts(num_ranks: int, num_microbatches: int) -> None:
    """Raises ConfigError unless there is at least one of both."""
    if num_ranks < 1 or num_microbatches < 1:
        raise ConfigError(
            f"num_ranks is {num_ranks} and num_microbatches {num_microbatches}; expected at least 1 of both"
        )
