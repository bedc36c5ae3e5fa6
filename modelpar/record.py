"""What a training has measured so far, and the numbers it leaves: Record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from modelpar.planning.analysis import analyse
from modelpar.planning.explain import MOST_TIMELINES, Explanation, explain
from modelpar.planning.plan import Plan
from modelpar.planning.result import StepResult
from modelpar.planning.steadiness import StepTime, settled
from modelpar.planning.timeline import Timeline
from modelpar.report.text import stage_parameters

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class HeldOut:
    """What an evaluation on held-out data found."""

    steps: int
    """How many were done by then."""
    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The loss function's own, means over the samples."""


@dataclass
class Record:
    """The steps and held-out losses of a training that may still go on."""

    plan: Plan
    results: list[StepResult] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    """Wall-clock time from one finished step to the next."""
    traced: list[Timeline] = field(default_factory=list)
    """Of the steps that were traced."""
    heldout: list[HeldOut] = field(default_factory=list)

    @property
    def measured_step_seconds(self) -> float:
        """The median of the settled steps."""
        return median(settled(self.step_seconds))

    @property
    def bubble(self) -> float:
        """The mean over the settled steps."""
        return fmean(result.timeline.bubble for result in settled(self.results))

    def utilization(self) -> tuple[float, ...]:
        """Returns per stage the share of time in which its rank computed, a mean over the settled steps."""
        return tuple(stage["utilization"] for stage in self._stages())

    def explain(self) -> Explanation:
        """Returns where the time of the traced steps went, or of the last ones where none was traced.

        Raises PlanError where none of them is whole.
        """
        timelines = self.traced or [result.timeline for result in self.results]
        ranks = range(self.plan.num_ranks)
        steps = [
            StepTime(result.step, result.timeline.makespan, tuple(result.timeline.busy(rank) for rank in ranks))
            for result in settled(self.results)
        ]
        return explain(self.plan, timelines[-MOST_TIMELINES:], steps)

    def metrics(self) -> dict[str, float]:
        """Returns the numbers by which people compare runs."""
        metrics = {"loss": self.results[-1].loss, "step_seconds": self.measured_step_seconds, "bubble": self.bubble}
        for last in self.heldout[-1:]:
            metrics |= {f"heldout_{name}": value for name, value in last.metrics.items()} | {"heldout_loss": last.loss}
        return metrics

    def to_json(self, status: str, baseline: tuple[str, float] | None) -> dict[str, Any]:
        """Returns what result.json holds: times in seconds, memory in bytes, all else shares of 1 and losses.

        `status` is "done", "interrupted" or "failed".
        """
        prediction = self.plan.prediction
        return {
            "schema_version": SCHEMA_VERSION,
            "status": status,
            "steps": len(self.results),
            "losses": [result.loss for result in self.results],
            "heldout_losses": [
                {"steps": each.steps, "loss": each.loss, "metrics": dict(each.metrics)} for each in self.heldout
            ],
            "baseline": list(baseline) if baseline else None,
            "step_seconds": self.step_seconds,
            "measured_step_seconds": self.measured_step_seconds if self.results else None,
            "predicted_step_seconds": prediction.step_seconds if prediction else None,
            "bubble": self.bubble if self.results else None,
            "predicted_bubble": prediction.bubble if prediction else None,
            "num_threads": self.plan.num_threads,
            "stages": self._stages(),
        }

    def _stages(self) -> list[dict[str, Any]]:
        plan = self.plan
        analyses = [analyse(result.timeline) for result in settled(self.results)]
        peaks = self.results[-1].peak_bytes if self.results else ()
        parameters = stage_parameters(plan)
        stages = []
        for stage, rank in enumerate(plan.schedule.stage_to_rank):
            layers = [plan.graph.layers[i] for i in plan.partition.layers(stage)]
            times = [analysis.ranks[rank] for analysis in analyses]
            stages.append(
                {
                    "rank": rank,
                    "device": plan.cluster.devices[rank],
                    "balance": len(layers),
                    "layers": [layer.name for layer in layers],
                    "parameters": parameters[stage],
                    "utilization": fmean(time.utilization for time in times) if times else None,
                    "wait": fmean(time.wait / a.makespan for time, a in zip(times, analyses, strict=True))
                    if times
                    else None,
                    "peak_bytes": peaks[rank] if peaks else None,
                }
            )
        return stages
