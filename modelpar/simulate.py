"""`modelpar simulate`: what a plan would cost, drawn; starts no process."""

from __future__ import annotations

from omegaconf import DictConfig
from rich.console import Console

from modelpar.config import cluster_of, make
from modelpar.planning.cluster import UNKNOWN
from modelpar.planning.decide import check_counts, decide
from modelpar.planning.doing import Doing
from modelpar.planning.pipedream import read_pipedream
from modelpar.planning.plan import Plan
from modelpar.planning.simulate import predict
from modelpar.report.text import draw_timeline, partition_table, prediction_notes, simulation_summary
from modelpar.screen import screen


def simulate(config: DictConfig, console: Console) -> None:
    """Prints the partition, the predicted timeline and its numbers.

    With `profile` it plans with layers that were profiled elsewhere, and makes no model. Else, with
    pipeline.profile=measured, it uses what this machine has measured before; where there is nothing, it times the
    layers in this process, one rank's worth, and says so.
    """
    with screen(console, config.verbose) as doing:
        plan = _of_profile(config) if config.profile is not None else _of_model(config, doing)
    timeline = predict(plan)
    console.print(partition_table(plan))
    for note in prediction_notes(plan):
        console.print(note, style="yellow", highlight=False)
    if plan.cluster.link is UNKNOWN:
        console.print("Messages cost nothing here: cluster.link.bandwidth=10GB gives them a price.", style="yellow")
    console.print(draw_timeline(timeline, console.width))
    console.print()
    console.print(simulation_summary(plan, timeline))


def _of_model(config: DictConfig, doing: Doing) -> Plan:
    from modelpar.task import task_of

    profile = config.pipeline.profile
    return task_of(config).plan("alone" if profile == "measured" else profile, doing=doing)


def _of_profile(config: DictConfig) -> Plan:
    """Plans a pipeline of the layers of a profile; needs no torch."""
    num_ranks, num_microbatches = config.pipeline.num_ranks, config.pipeline.num_microbatches
    check_counts(num_ranks, num_microbatches)
    graph, profile = read_pipedream(config.profile)
    cluster = cluster_of(config, config.pipeline.devices or ())
    generator = make(config.schedule, "schedule")
    order = generator(num_ranks, num_microbatches)
    return decide(graph, profile, cluster, make(config.partition, "partition"), order, generator)
