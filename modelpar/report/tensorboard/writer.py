"""Writes what TensorBoard shows of one run: RunWriter.

::

    train/            loss, heldout_loss, lr, grad_norm, samples_per_second, and the loss function's own metrics, those
                      of held-out data as heldout_…
    step/             seconds, predicted_seconds; makespan, which is seconds without what lies between two steps
    pipeline/         bubble; the timelines of traced steps, as images and as data for the Pipeline tab
    stage_utilization/, stage_wait/, stage_memory_mb/      one curve per stage, "stage 0", "stage 1", …
    partition         the partition as a table            result/      the numbers of the hparams page
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_BLOB_SEQUENCE, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summaries

from modelpar.errors import written
from modelpar.planning.analysis import analyse
from modelpar.planning.plan import Plan
from modelpar.planning.result import StepResult
from modelpar.planning.timeline import Timeline
from modelpar.report.image import timeline_image
from modelpar.report.tensorboard.names import (
    BUBBLE,
    MAKESPAN,
    MEMORY,
    PARTITION,
    PLUGIN,
    RESULT,
    STEP_SECONDS,
    TRACE,
    UTILIZATION,
    rank_names,
)
from modelpar.report.text import cost_unit, stage_rows, tied_note
from modelpar.report.trace import Trace, encode
from modelpar.report.units import megabytes, percent


class RunWriter:
    """Writes one run into one event file, through one SummaryWriter.

    Every call flushes, so that the file holds all finished steps even if the process dies at once. One RunWriter at a
    time may write into a directory; one that goes on with a run after `purge_step` adds a second file, and TensorBoard
    then forgets what the first one says from that step on. Every call raises WriteError where the file cannot be
    written.
    """

    def __init__(self, directory: str | Path, plan: Plan, purge_step: int | None = None, schedule: str = "") -> None:
        """`schedule` is what people call the plan's schedule, such as "1f1b"."""
        self._plan, self._schedule = plan, schedule
        self._curves = rank_names(plan)
        # TensorBoard takes the first start that a run notes for its beginning, and only later ones for going on
        self._writing = partial(written, f"the event file in {directory}")
        with self._writing():
            self._writer = SummaryWriter(str(directory), purge_step=purge_step or 0, flush_secs=1)
            self._writer.add_custom_scalars(_LAYOUT)
            self._writer.add_text(PARTITION, partition_markdown(plan), purge_step or 0)
            self._writer.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the event file."""
        with self._writing():
            self._writer.close()

    def step(self, result: StepResult, step_seconds: float, samples: int) -> None:
        """Writes one training step: `step_seconds` is its wall-clock time, `samples` how many it took."""
        analysis = analyse(result.timeline)
        values = {
            "train/loss": result.loss,
            "train/lr": result.lr,
            "train/grad_norm": result.grad_norm,
            "train/samples_per_second": samples / step_seconds if step_seconds else 0.0,
            STEP_SECONDS: step_seconds,
            MAKESPAN: analysis.makespan,
            BUBBLE: analysis.bubble,
        }
        values |= {f"train/{name}": value for name, value in result.metrics.items()}
        if self._plan.prediction is not None:
            values["step/predicted_seconds"] = self._plan.prediction.step_seconds
        for curve, times in zip(self._curves, analysis.ranks, strict=True):
            values[f"{UTILIZATION}{curve}"] = times.utilization
            values[f"stage_wait/{curve}"] = times.wait / analysis.makespan if analysis.makespan else 0.0
        for curve, num_bytes in zip(self._curves, result.peak_bytes, strict=False):
            values[f"{MEMORY}{curve}"] = num_bytes / 1e6
        self._scalars(values, result.step)

    def heldout(self, step: int, loss: float, metrics: Mapping[str, float] | None = None) -> None:
        """Writes the loss on held-out data after a step, and the loss function's own metrics."""
        values = {f"train/heldout_{name}": value for name, value in (metrics or {}).items()}
        self._scalars(values | {"train/heldout_loss": loss}, step)

    def timeline(self, step: int, timeline: Timeline, predicted: Timeline | None = None) -> None:
        """Writes the timeline of one traced step as an image, under the predicted one where that is given."""
        picture = np.asarray(timeline_image(timeline, f"step {step}", predicted))
        with self._writing():
            self._writer.add_image("pipeline/timeline", picture, step, dataformats="HWC")
            self._writer.flush()

    def trace(self, step: int, timeline: Timeline, peak_bytes: tuple[int, ...] = (), measured: bool = True) -> None:
        """Writes the timeline of one step for the Pipeline tab, with the plan; `measured` is False for a prediction."""
        blob = encode(Trace(self._plan, step, timeline, peak_bytes, measured, self._schedule))
        metadata = SummaryMetadata(
            plugin_data=SummaryMetadata.PluginData(plugin_name=PLUGIN), data_class=DATA_CLASS_BLOB_SEQUENCE
        )
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype=DT_STRING, tensor_shape=shape, string_val=[blob])
        summary = Summary(value=[Summary.Value(tag=TRACE, metadata=metadata, tensor=tensor)])
        with self._writing():
            self._writer.file_writer.add_summary(summary, step)
            self._writer.flush()

    def hparams(self, values: Mapping[str, Any], metrics: Mapping[str, float], step: int = 0) -> None:
        """Writes the run's row on the hparams page: what was chosen, and what came of it, as `result/<metric>`.

        Values other than bool, int, float and str are written as text. Call it once, at the end.
        """
        plain = {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in values.items()}
        results = {f"{RESULT}{name}": float(value) for name, value in metrics.items()}
        with self._writing():
            for summary in hparams_summaries(plain, results):
                self._writer.file_writer.add_summary(summary)
        self._scalars(results, step)

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        with self._writing():
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)
            self._writer.flush()


def partition_markdown(plan: Plan) -> str:
    """Returns the partition as a Markdown table, the same columns as in the terminal."""
    header = ("stage", "layers", "parameters", f"share of {cost_unit(plan)}", "memory", "device")
    lines = [header, ("--:", ":--", "--:", "--:", "--:", ":--")]
    for row in stage_rows(plan):
        parameters = row.parameters.replace("*", "\\*")
        lines.append((str(row.stage), row.layers, parameters, percent(row.cost), megabytes(row.memory), row.device))
    note = tied_note(plan).replace("*", "\\*", 1)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + (f"\n{note}\n" if note else "")


def _multiline(*tags: str) -> list[Any]:
    # TensorBoard matches each entry as a regular expression against the beginning of a tag
    return ["Multiline", [f"{tag}$" for tag in tags]]


_LAYOUT = {
    "pipeline": {
        "utilization per stage": _multiline(r"stage_utilization/.*"),
        "wait per stage (share of the step)": _multiline(r"stage_wait/.*"),
        "peak memory per stage (MB)": _multiline(r"stage_memory_mb/.*"),
        "step time: measured and predicted (s)": _multiline("step/seconds", "step/predicted_seconds"),
    },
    "training": {"loss": _multiline("train/loss", "train/heldout_loss")},
}
"""The Custom Scalars page."""
