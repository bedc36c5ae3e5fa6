"""`modelpar simulate`: what a plan would cost, drawn; starts no process."""

from __future__ import annotations

from omegaconf import DictConfig
from rich.console import Console

from modelpar.planning.simulate import predict
from modelpar.report.text import draw_timeline, partition_table, prediction_notes, simulation_summary
from modelpar.task import task_of


def simulate(config: DictConfig, console: Console) -> None:
    """Prints the partition, the predicted timeline and its numbers.

    With profile=measured it uses what this machine has measured before; where there is nothing, it times the layers in
    this process, one rank's worth, and says so.
    """
    profile = config.pipeline.profile
    plan = task_of(config).plan("alone" if profile == "measured" else profile)
    timeline = predict(plan)
    console.print(partition_table(plan))
    for note in prediction_notes(plan):
        console.print(note, style="yellow", highlight=False)
    console.print(draw_timeline(timeline, console.width))
    console.print()
    console.print(simulation_summary(plan, timeline))
