"""From a model to a plan: capture, profile, partition, schedule, predict."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from modelpar import cache
from modelpar.calibration import calibrate
from modelpar.capture import profiler
from modelpar.capture.capture import capture
from modelpar.capture.microbatch import Cutting, checked_batch
from modelpar.capture.objective import Batch, Objective
from modelpar.capture.survey import Grain
from modelpar.capture.whole import compare
from modelpar.errors import CaptureError, ConfigError, PartitionError
from modelpar.machine import Setting
from modelpar.planning import partitioners, schedules
from modelpar.planning.cluster import UNKNOWN, Cluster, Link
from modelpar.planning.decide import check_counts, decide
from modelpar.planning.doing import Doing, silent
from modelpar.planning.partitioners import Partitioner
from modelpar.planning.plan import Plan, ScheduleGenerator
from modelpar.planning.profile import Profile
from modelpar.planning.simulate import predict, prediction
from modelpar.profiling import Subject, swept, swept_alone
from modelpar.run.update import OptimizerFactory
from modelpar.run.workers import Workers

_log = logging.getLogger(__name__)

UNMEASURED_LINKS = {"rpc": Link(latency=0.5e-3, bandwidth=2e9), "threads": Link(latency=0.1e-3)}
"""What a message is taken to cost, by transport, where that was not measured."""


def plan(
    objective: Objective,
    example_batch: Batch,
    *,
    num_ranks: int | None = None,
    num_microbatches: int = 8,
    partitioner: Partitioner = partitioners.optimal,
    schedule: ScheduleGenerator = schedules.one_f_one_b,
    num_threads: int | None = None,
    devices: Sequence[str] | None = None,
    cluster: Cluster | None = None,
    link: Link | None = None,
    profile: str | Path | Profile = "measured",
    tied: str = "fast",
    seed: int = 0,
    optimizer: OptimizerFactory | None = None,
    max_norm: float | None = None,
    transport: str | None = None,
    shared_memory: bool | None = None,
    cuda_ipc: bool | None = None,
    workers: Callable[[], Workers] | Workers | None = None,
    doing: Doing = silent,
    leaf: Sequence[str] = (),
    split_before: Sequence[str] = (),
    keep_together: Sequence[str] = (),
) -> Plan:
    """Decides how to split, place and schedule an objective for batches like the example.

    `profile` is "measured" (by the ranks, all busy at once; what this machine has measured before is not measured
    again), "anew" (measured again), "alone" (as measured before, or else timed in this process), "flops" (counted, free
    of noise), the path of a profile.json, or a Profile. Where it has to measure it starts ranks for a few seconds;
    running `workers`, or a function that starts some, save that. `transport`, `shared_memory` and `cuda_ipc` are those
    of the workers; by default those of the cluster. With an `optimizer` and a `max_norm` a profile tells what these
    cost.
    `cluster` says what the ranks' devices can do and what connects them: `Cluster(("cpu", "cpu"), speeds=(1, 0.5),
    memory=(8 * 10**9, 4 * 10**9))`. By default there are `num_ranks` (2) equal ones without limits. The link is
    measured, unless `link` or the cluster says what a message costs.
    `num_threads` per rank is by default max(1, cores // ranks).
    `devices` are torch devices, one per rank; by default CUDA devices where there are any, else the CPU.
    `doing` is told what goes on, such as "timing the layers", and how much of it is done.
    `leaf`, `split_before` and `keep_together` say how finely the model may be cut, see `Grain`: by FQN, pattern of FQNs
    ("h.*") or class name.

    Raises ConfigError, CaptureError, PartitionError or ScheduleError for what cannot work, before it starts anything.
    """
    num_ranks = _num_ranks(num_ranks, cluster)
    check_counts(num_ranks, num_microbatches)
    if num_threads is not None and num_threads < 1:
        raise ConfigError(f"num_threads is {num_threads}; expected at least 1")
    num_threads = num_threads or max(1, (os.cpu_count() or 1) // num_ranks)
    described = cluster or Cluster(place(num_ranks, devices))
    how = (transport, shared_memory, cuda_ipc), (described.transport, described.shared_memory, described.cuda_ipc)
    transport, shared_memory, cuda_ipc = (own if given is None else given for given, own in zip(*how, strict=True))
    places = place(num_ranks, devices or described.devices)
    described = replace(described, devices=places, transport=transport, shared_memory=shared_memory, cuda_ipc=cuda_ipc)
    setting = Setting(places, num_threads, transport, shared_memory, cuda_ipc)
    order = schedule(num_ranks, num_microbatches)
    example_batch = checked_batch(example_batch)
    cutting = Cutting.of(objective).read(example_batch)
    microbatches = cutting.cut(example_batch, num_microbatches)
    inputs, targets, num_samples = microbatches[0]
    doing("making the model")
    model = objective.build(seed)
    grain = Grain(tuple(leaf), tuple(split_before), tuple(keep_together))
    doing("recording the model")
    begun = time.perf_counter()
    try:
        another = next((m for m in microbatches[1:] if m.size == num_samples), None)
        options = {"num_ranks": order.num_stages, "grain": grain, "num_samples": num_samples}
        options["other"] = another and (another.inputs, another.targets)
        captured = capture(objective, (inputs, targets), model, **options)
    except CaptureError:
        compare(objective, cutting, model, example_batch, num_microbatches)  # knows where the reading is what is wrong
        raise
    graph = captured.graph
    recorded = len(graph.layers), len(graph.cuts), time.perf_counter() - begun
    _log.debug("recorded the model: %d layers, %d places to cut, in %.2f s", *recorded)
    doing("comparing micro-batches with a batch")
    compared = compare(objective, cutting, model, example_batch, num_microbatches)
    for note in compared.notes:
        _log.warning(note)
    for line in filter(None, (*compared.known, compared.passed)):
        _log.debug(line)
    doing("counting operations")
    count = profiler.count(objective, captured, (inputs, targets), model)
    subject = Subject(objective, captured, model, (inputs, targets), count, len(microbatches), optimizer, max_norm)

    def decided(profile: Profile) -> Plan:
        doing("planning")
        known = link or (described.link if described.link is not UNKNOWN else profile.link)
        cluster = replace(described, link=known or UNMEASURED_LINKS[transport])
        more = {"num_threads": num_threads, "tied": tied, "captured": (objective.model, captured.recording)}
        return decide(graph, profile, cluster, partitioner, order, schedule, **more)

    try:  # finds out what cannot work, before anything is started
        decided(count.profile if profile == "flops" else _without_optimizer(count.profile))
    except PartitionError:
        decided(count.profile)  # a message with all that is expected to be held
        raise
    found = decided(_profile(profile, subject, setting, workers, doing))
    found = replace(found, batch=cutting.known, notes=(*compared.notes, *compared.known), whole=compared.passed)
    found = found.with_prediction(prediction(predict(found)))
    assert found.prediction
    balance = "-".join(map(str, found.partition.balance))
    _log.debug("planned %s: a step of %.4g s predicted", balance, found.prediction.step_seconds)
    return found


def _profile(
    wanted: str | Path | Profile,
    subject: Subject,
    setting: Setting,
    workers: Callable[[], Workers] | Workers | None,
    doing: Doing,
) -> Profile:
    """Returns the profile that `plan` was asked for."""
    if isinstance(wanted, Path) or (isinstance(wanted, str) and wanted.endswith(".json")):
        wanted, what = Profile.load(wanted), f"the profile {wanted}"
        wanted.check_fits([layer.name for layer in subject.graph.layers], subject.count.profile.microbatch_size, what)
    if isinstance(wanted, Profile):
        return wanted
    if wanted == "flops":
        return subject.count.profile
    if wanted not in ("measured", "anew", "alone"):
        raise ConfigError(f"profile is {wanted!r}; expected measured, anew, alone, flops, or the path of a .json file")
    known = known_profile(subject, setting)
    if known is not None and wanted != "anew":
        _log.debug("layers and messages were measured before, %s; reused from %s", known.measured_at, cache.folder())
        return known
    if wanted == "alone":
        return swept_alone(subject, setting, doing)
    if workers is None:
        how = {"shared_memory": setting.shared_memory, "cuda_ipc": setting.cuda_ipc}
        with Workers(setting.num_ranks, transport=setting.transport, doing=doing, **how) as started:
            return measured_profile(subject, setting, started, anew=wanted == "anew", doing=doing)
    running = workers if isinstance(workers, Workers) else workers()
    return measured_profile(subject, setting, running, anew=wanted == "anew", doing=doing)


def known_profile(subject: Subject, setting: Setting) -> Profile | None:
    """Returns what this machine has measured of a subject before, on such ranks; starts nothing."""
    link = cache.load("link", setting.key())
    found = cache.load("profile", {**subject.key(), **setting.key()})
    return Profile.from_json({**found, "link": link}) if found and link else None


def measured_profile(
    subject: Subject, setting: Setting, workers: Workers, *, anew: bool = False, doing: Doing = silent
) -> Profile:
    """Returns the profile that ranks measure, with what a message costs between them, and keeps both.

    The latter is measured where it is not known yet, or `anew`.
    """
    link = None if anew else cache.load("link", setting.key())
    begun = time.perf_counter()
    if link is None:
        link = calibrate(workers, setting, doing).to_json()
        cache.save("link", setting.key(), link)
        _log.debug("measured in %.1f s that a message takes %.3g s", time.perf_counter() - begun, link["latency"])
    else:
        _log.debug("what messages cost was measured before; reused from %s", cache.folder())
    begun = time.perf_counter()
    profile = swept(subject, setting, workers, doing=doing)
    _log.debug("timed the layers in %.1f s; kept in %s", time.perf_counter() - begun, cache.folder())
    cache.save("profile", {**subject.key(), **setting.key()}, profile.to_json())
    return replace(profile, link=Link.from_json(link))


def _without_optimizer(profile: Profile) -> Profile:
    """Returns a profile in which the optimizer keeps nothing, as some do: what does not fit then never does."""
    return replace(profile, layers=tuple(replace(layer, optimizer_bytes=0) for layer in profile.layers))


def _num_ranks(asked: int | None, cluster: Cluster | None) -> int:
    """Returns how many ranks there are to be; raises ConfigError where the cluster has another number of devices."""
    if cluster is not None and asked not in (None, cluster.num_ranks):
        raise ConfigError(f"num_ranks is {asked}, but the cluster has {cluster.num_ranks} devices; expected as many")
    return asked if asked is not None else cluster.num_ranks if cluster is not None else 2


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
