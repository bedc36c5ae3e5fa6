"""From a model to a plan: capture, profile, partition, schedule, predict."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from modelpar.capture import profiler, sequential
from modelpar.capture.objective import Batch, Objective, batch_size, microbatch_sizes, split_batch
from modelpar.errors import ConfigError
from modelpar.planning import partitioners, schedules
from modelpar.planning.cluster import Cluster, Link
from modelpar.planning.partitioners import Partitioner
from modelpar.planning.plan import Plan, ScheduleGenerator
from modelpar.planning.profile import Profile
from modelpar.planning.simulate import predict, prediction

LOCAL_LINK = Link(latency=0.5e-3, bandwidth=2e9)
"""A message between two processes of one host, as measured for TensorPipe over uv and cma."""


def plan(
    objective: Objective,
    example_batch: Batch,
    *,
    num_ranks: int = 2,
    num_microbatches: int = 8,
    partitioner: Partitioner = partitioners.optimal,
    schedule: ScheduleGenerator = schedules.one_f_one_b,
    num_threads: int | None = None,
    devices: Sequence[str] | None = None,
    link: Link = LOCAL_LINK,
    profile: str | Profile = "measured",
    tied: str = "fast",
    seed: int = 0,
) -> Plan:
    """Decides how to split, place and schedule an objective for batches like the example.

    `profile` is "measured" (isolated times on this machine), "flops" (counted, free of noise) or a Profile.
    `num_threads` per rank is by default max(1, cores // ranks). `devices` are torch devices, one per rank; by default
    CUDA devices where there are any, else the CPU.

    Raises ConfigError, CaptureError, PartitionError or ScheduleError for what cannot work; starts no process.
    """
    if num_ranks < 1 or num_microbatches < 1:
        raise ConfigError(
            f"num_ranks is {num_ranks} and num_microbatches {num_microbatches}; expected at least 1 of both"
        )
    if num_threads is not None and num_threads < 1:
        raise ConfigError(f"num_threads is {num_threads}; expected at least 1")
    num_threads = num_threads or max(1, (os.cpu_count() or 1) // num_ranks)
    cluster = Cluster(place(num_ranks, devices), link=link)
    order = schedule(num_ranks, num_microbatches)
    model = objective.build(seed)
    size = batch_size(example_batch[0], objective.batch_dim)
    sizes = microbatch_sizes(size, num_microbatches)
    microbatch = tuple(split_batch(part, sizes, objective.batch_dim)[0] for part in example_batch)
    graph = sequential.capture(objective, (microbatch[0], microbatch[1]), model)
    if isinstance(profile, str):
        profile = make_profile(profile, objective, graph, (microbatch[0], microbatch[1]), model, cluster, num_threads)
    decided = Plan(
        graph=graph,
        profile=profile,
        cluster=cluster,
        partition=partitioner(graph, profile, cluster, order.num_stages),
        schedule=order,
        generator=schedule,
        num_threads=num_threads,
        tied=tied,
    )
    return decided.with_prediction(prediction(predict(decided)))


def make_profile(
    kind: str,
    objective: Objective,
    graph: sequential.ModelGraph,
    microbatch: Batch,
    model: torch.nn.Module,
    cluster: Cluster,
    num_threads: int,
) -> Profile:
    """Returns the profile of one micro-batch: "measured" or "flops"."""
    if kind == "flops":
        return profiler.count_flops(objective, graph, microbatch, model)
    if kind == "measured":
        device = torch.device(cluster.devices[0])
        return profiler.measure(objective, graph, microbatch, model, num_threads=num_threads, device=device)
    raise ConfigError(f'profile is {kind!r}; expected "measured" or "flops"')


def place(num_ranks: int, devices: Sequence[str] | None = None) -> tuple[str, ...]:
    """Returns the device of each rank; raises ConfigError where one is not there or the number is wrong."""
    if devices is None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return tuple(f"cuda:{rank % count}" if count else "cpu" for rank in range(num_ranks))
    if len(devices) != num_ranks:
        raise ConfigError(f"{len(devices)} devices {list(devices)} for {num_ranks} ranks; expected one per rank")
    for name in devices:
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return tuple(devices)
