"""What the terminal shows: the partition, a timeline, and the summaries of a simulation and of a training.

::

    rank 0 │F0──F1──F2──F3──········B0══════B1══════B2══════B3══════│  75 %
    rank 1 │····F0──F1──F2──F3──B0══════B1══════B2══════B3══════····│  75 %
           0         10        20        30        40        50   ms

Every function returns something for `rich.console.Console.print`; nothing here prints.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from modelpar.planning.balance import imbalance
from modelpar.planning.explain import Explanation
from modelpar.planning.memory import peak_microbatches_per_stage, stage_memory_bytes
from modelpar.planning.plan import Plan
from modelpar.planning.profile import LayerCost, Profile
from modelpar.planning.timeline import Timeline
from modelpar.report.boxes import axis_text, box_text, boxes_of, legend_text, numbered_kinds
from modelpar.report.explanation import headline, helping_most, parts_text, steadiness_sentences
from modelpar.report.units import count, error, megabytes, ms, percent


@dataclass(frozen=True)
class StageRow:
    """One stage of a plan in words; `memory` is the prediction of `stage_memory_bytes`, `cost` a share of 1."""

    stage: int
    layers: str
    parameters: str
    cost: float
    memory: int
    device: str


def stage_rows(plan: Plan) -> list[StageRow]:
    """Returns one row per stage, as the partition table shows them; a tied tensor counts in its owner's stage only."""
    measured = any(cost.seconds > 0 for cost in plan.profile.layers)
    costs = [cost.seconds if measured else cost.flops for cost in plan.profile.layers]
    total = sum(costs) or 1.0
    tied = {name for tie in plan.graph.tied for name in tie.names}
    rows = []
    for stage, (memory, number) in enumerate(zip(stage_memory_bytes(plan), stage_parameters(plan), strict=True)):
        layers = plan.partition.layers(stage)
        marked = any(parameter.name in tied for i in layers for parameter in plan.graph.layers[i].parameters)
        rows.append(
            StageRow(
                stage=stage,
                layers=_run_of([plan.graph.layers[i].name for i in layers]),
                parameters=count(number) + (" *" if marked else ""),
                cost=sum(costs[i] for i in layers) / total,
                memory=memory,
                device=plan.cluster.devices[plan.schedule.stage_to_rank[stage]],
            )
        )
    return rows


def stage_parameters(plan: Plan) -> list[int]:
    """Returns per stage how many trainable parameters it has; a tied tensor counts in its owner's stage only."""
    owner = {name: tie.names[0] for tie in plan.graph.tied for name in tie.names}
    seen: set[str] = set()
    numbers = []
    for stage in range(plan.num_stages):
        numbers.append(0)
        for parameter in (p for i in plan.partition.layers(stage) for p in plan.graph.layers[i].parameters):
            name = owner.get(parameter.name, parameter.name)
            if parameter.trainable and not parameter.buffer and name not in seen:
                numbers[-1] += math.prod(parameter.shape)
            seen.add(name)
    return numbers


def cost_unit(plan: Plan) -> str:
    """Returns what the shares of cost in the partition table are shares of: "time" or "FLOPs"."""
    return "time" if plan.profile.source == "measured" else "FLOPs"


def tied_note(plan: Plan) -> str:
    """Returns the note under a partition table that explains its mark for tied tensors; empty where there are none."""
    notes = [f"{' = '.join(tie.names)} (counted with {tie.names[0]})" for tie in plan.graph.tied]
    return f"* tied: {'; '.join(notes)}" if notes else ""


def partition_table(plan: Plan) -> Table:
    """Returns the partition: per stage its layers, trainable parameters, share of cost, predicted memory and device."""
    title = f"{plan.num_stages} stages by {plan.partition.method}, {plan.num_microbatches} micro-batches"
    table = _table(title, caption=tied_note(plan))
    table.add_column("stage", justify="right")
    table.add_column("layers", overflow="fold")  # long names take several lines rather than the other columns' room
    for name in ("parameters", f"share of\n{cost_unit(plan)}", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("device")
    for row in stage_rows(plan):
        values = (str(row.stage), row.layers, row.parameters, percent(row.cost), megabytes(row.memory), row.device)
        table.add_row(*map(Text, values))
    return table


def prediction_notes(plan: Plan) -> list[str]:
    """Returns what a reader of the plan's predicted times must know: a line each, none where all is as it should be."""
    notes = []
    if plan.profile.source == "flops":
        notes.append("Times are counted FLOPs at a nominal speed: only their ratios mean something.")
    elif 0 < plan.profile.num_ranks < plan.num_ranks:
        notes.append(
            f"Layers were timed with {plan.profile.num_ranks} of {plan.num_ranks} ranks busy, and messages not at all: "
            "steps take longer. `modelpar profile` with these options measures both, once."
        )
    if sentence := imbalance(plan):
        notes.append(sentence)
    threads = plan.num_ranks * plan.num_threads
    cores = os.cpu_count() or threads
    if threads > cores and all(device == "cpu" for device in plan.cluster.devices):
        notes.append(
            f"{plan.num_ranks} ranks × {plan.num_threads} threads share {cores} cores; predictions give each its own."
        )
    return notes


def profile_table(profile: Profile) -> Table:
    """Returns what each layer costs per micro-batch, and what the optimizer's update of it costs per step."""
    what = f"{profile.num_ranks} ranks busy" if profile.source == "measured" else "counted FLOPs at a nominal speed"
    table = _table(f"{profile.microbatch_size} samples per micro-batch, {what}; times in ms, sizes in MB")
    table.add_column("layer", no_wrap=True)
    names = ("F", "I", "W", "update", "GFLOP", "params", "saved", "output")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for cost in profile.layers:
        table.add_row(cost.name, *_cost_cells(cost))
    sums = {name: sum(getattr(cost, name) for cost in profile.layers) for name in _ADDED}
    table.add_section()
    table.add_row("all", *_cost_cells(LayerCost("all", **sums)))
    return table


_ADDED = ("forward_seconds", "input_grad_seconds", "weight_grad_seconds", "flops", "parameter_bytes", "saved_bytes")
_ADDED += ("output_bytes", "reduce_seconds", "update_seconds")


def _cost_cells(cost: LayerCost) -> list[str]:
    seconds = (cost.forward_seconds, cost.input_grad_seconds, cost.weight_grad_seconds)
    times = [1e3 * value for value in (*seconds, cost.reduce_seconds + cost.update_seconds)]
    sizes = [value / 1e6 for value in (cost.parameter_bytes, cost.saved_bytes, cost.output_bytes)]
    return [f"{value:.3g}" for value in (*times, cost.flops / 1e9, *sizes)]


def profile_summary(plan: Plan, path: str) -> Text:
    """Returns what a message costs, what a step of this plan then takes, and where the profile is."""
    lines = []
    link = plan.profile.link
    if link is not None:
        small, large = (f"{size} {ms(link.hand_off(num_bytes))}" for size, num_bytes in (("1 KB", 1e3), ("8 MB", 8e6)))
        lines.append(f"hand-off between ranks: {small}, {large}")
    if plan.prediction is not None:
        lines.append(
            f"a step of {plan.num_microbatches} micro-batches in {plan.num_stages} stages: "
            f"{ms(plan.prediction.step_seconds)} predicted"
        )
    lines.append(f"{path}: pipeline.profile={path} plans with it")
    return Text("\n".join(lines))


def draw_timeline(timeline: Timeline, width: int = 80) -> Text:
    """Returns a timeline as coloured text, `width` cells wide: a row per rank, a time axis in ms, a legend.

    A cell shows what filled most of it. A box begins with its letter and, where most boxes of its kind have room, its
    micro-batch; the rest is filled with ─ for forward and ═ for backward, so that both are told apart without colour.
    Dots are idle time and waits: one for activations, two for gradients. Where ranks have clocks of their own a line
    says by how much these may be off.
    """
    label = len(f"rank {timeline.num_ranks - 1}")
    cells = max(width - label - len(" ││ 100 %"), 10)
    end = timeline.makespan
    boxes = [boxes_of(timeline.of_rank(rank), end, cells) for rank in range(timeline.num_ranks)]
    numbered = numbered_kinds([one for row in boxes for one in row])
    text = Text(no_wrap=True, overflow="ignore", end="")
    for rank, row in enumerate(boxes):
        text.append(f"rank {rank}".ljust(label) + " │")
        for span, length in row:
            text.append_text(box_text(span, length, numbered))
        text.append(f"│{100 * timeline.utilization(rank):4.0f} %\n")
    text.append_text(Text(" " * (label + 2) + axis_text(end, cells) + " ms\n", style="dim"))
    text.append_text(legend_text(timeline.spans, label + 2, width))
    if timeline.clock_error:
        text.append(f"\n{' ' * (label + 2)}clocks ± {ms(timeline.clock_error)}", style="dim")
    return text


def simulation_summary(plan: Plan, timeline: Timeline) -> RenderableType:
    """Returns a simulated step in numbers: makespan, bubble, and per stage utilization, micro-batches and memory."""
    head = Text.assemble(
        ("step ", "dim"), (ms(timeline.makespan), "bold"), ("   bubble ", "dim"), (percent(timeline.bubble), "bold")
    )
    table = _table()
    for name in ("stage", "rank", "utilization", "peak micro-batches", "memory"):
        table.add_column(name, justify="right")
    peaks, memory = peak_microbatches_per_stage(plan.schedule), stage_memory_bytes(plan)
    for stage, rank in enumerate(plan.schedule.stage_to_rank):
        values = (stage, rank, percent(timeline.utilization(rank)), peaks[stage], megabytes(memory[stage]))
        table.add_row(*map(str, values))
    return Group(head, table)


@dataclass(frozen=True)
class TrainingSummary:
    """What the end of a training shows. Losses are in nats, times in seconds; None leaves a line out."""

    first_loss: float
    last_loss: float
    step_seconds: float
    """Median over the measured steps."""
    utilization: tuple[float, ...]
    """Per stage, a mean over the measured steps."""
    view_command: str
    """What the user types to see it all."""
    heldout_loss: float | None = None
    heldout_metrics: Mapping[str, float] = field(default_factory=dict)
    baseline: tuple[str, float] | None = None
    """A name and a loss to compare with, such as ("byte-unigram entropy", 3.21)."""
    predicted_step_seconds: float | None = None
    explanation: Explanation | str | None = None
    """Or why there is none."""


def training_summary(summary: TrainingSummary) -> RenderableType:
    """Returns a training in numbers; the last line is the command that shows all of it.

    Print it with `soft_wrap=True`, so that a command longer than the terminal is wide stays one line to copy.
    """
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    grid.add_row("loss", f"{summary.first_loss:.4f} → {summary.last_loss:.4f}")
    if summary.heldout_loss is not None:
        text = f"{summary.heldout_loss:.4f}"
        if summary.baseline is not None:
            name, value = summary.baseline
            difference = summary.heldout_loss - value
            text += f"   {name} {value:.4f} ({abs(difference):.2f} {'below' if difference <= 0 else 'above'} it)"
        grid.add_row("held-out loss", text)
    for name, value in summary.heldout_metrics.items():
        grid.add_row(Text(f"held-out {name}"), f"{value:.4f}")
    shares = (f"stage {stage} {percent(share)}" for stage, share in enumerate(summary.utilization))
    grid.add_row("utilization", "   ".join(shares))
    text = ms(summary.step_seconds)
    if summary.predicted_step_seconds is not None:
        off = error(summary.predicted_step_seconds / summary.step_seconds - 1) if summary.step_seconds else "–"
        text += f" measured   {ms(summary.predicted_step_seconds)} predicted ({off})"
    grid.add_row("step time", text)
    if isinstance(summary.explanation, str):
        grid.add_row("verdict", summary.explanation)
    elif summary.explanation is not None:
        grid.add_row("made of", parts_text(summary.explanation))
        grid.add_row("verdict", headline(summary.explanation))
        if (best := helping_most(summary.explanation)) and best.options:
            grid.add_row("to try", best.options)
        for sentence in steadiness_sentences(summary.explanation):
            grid.add_row("", sentence)
    return Group(grid, Text(summary.view_command, style="bold", no_wrap=True, overflow="ignore"))


def _table(title: str = "", caption: str = "") -> Table:
    return Table(
        title=title or None,
        caption=caption or None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
    )


def _run_of(names: Sequence[str]) -> str:
    """Returns e.g. "embed … h2 (4)"; up to two names in full."""
    return f"{', '.join(names)} ({len(names)})" if len(names) <= 2 else f"{names[0]} … {names[-1]} ({len(names)})"
