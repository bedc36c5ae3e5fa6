"""Where a run's time goes and what would help most: `explain`, from its plan and timelines. Words are the report's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from modelpar.errors import PlanError
from modelpar.planning.advice import Advice, advise
from modelpar.planning.breakdown import Breakdown, breakdown
from modelpar.planning.fitted import fitted
from modelpar.planning.flow import flow
from modelpar.planning.plan import Plan
from modelpar.planning.steadiness import StepTime, Straggler, drift, stragglers
from modelpar.planning.timeline import Timeline, computations

MOST_TIMELINES = 5
"""How many of a run's last traced steps are enough to explain it."""
_WORTH_SAYING = 0.01
"""Share of a step below which a gain is none."""


@dataclass(frozen=True)
class Explanation:
    """Where the time of a step goes, why, and what to change; shares are of the step."""

    plan: Plan
    makespan: float
    """Seconds of the step that is explained: of those given, the one of median length."""
    breakdown: Breakdown
    critical: tuple[float, ...]
    """Per stage the share of the step in which the critical path runs through it."""
    slowness: tuple[float, ...]
    """Per rank, see `Fitted.slowness`."""
    pace: float
    """See `Fitted.pace`."""
    advice: tuple[Advice, ...]
    """What saves at least 1 %, best first; see `Advice.weight`."""
    error: float
    """What the simulation that the gains come from misses of the step, as a share of it; with a sign."""
    uncertainty: float
    """That, or how far apart the given steps lie, or equal computations within them, whichever is most: the median
    deviation over the median."""
    stragglers: tuple[Straggler, ...] = ()
    drift: float = 0.0
    """See `steadiness.drift`."""

    @property
    def largest_loss(self) -> tuple[str, float]:
        """What costs most besides useful work: one of `PARTS`, and its share."""
        losses = [(name, seconds / self.makespan) for name, seconds in self.breakdown.parts[1:] if self.makespan]
        return max(losses, key=lambda loss: loss[1], default=("overhead", 0.0))


def explain(plan: Plan, timelines: Sequence[Timeline], steps: Sequence[StepTime] = ()) -> Explanation:
    """Explains the given timelines of a plan, one or more, measured or simulated.

    `steps` are all settled steps of the run, for what can be said of them together. Raises PlanError where there is no
    timeline, or the timelines are of another plan or of fewer micro-batches.
    """
    for timeline in timelines:
        last = max((span.stage for span in timeline.spans), default=-1)
        if timeline.num_ranks != plan.num_ranks or last >= plan.num_stages:
            raise PlanError(
                f"a timeline has {timeline.num_ranks} ranks and stages up to {last}; expected one of this plan, "
                f"with {plan.num_ranks} ranks and {plan.num_stages} stages"
            )
    whole = whole_steps(plan, timelines)
    if not whole:
        raise PlanError(
            f"none of {len(timelines)} timelines holds every action of the plan; expected one of a step with all "
            f"{plan.num_microbatches} micro-batches"
        )
    whole.sort(key=lambda timeline: timeline.makespan)
    middle = whole[(len(whole) - 1) // 2]
    path = flow(middle, plan.stage_graph, plan.schedule.stage_to_rank)
    found = fitted(plan, whole)
    return Explanation(
        plan=plan,
        makespan=middle.makespan,
        breakdown=breakdown(path),
        critical=tuple(path.critical_share(stage) for stage in range(plan.num_stages)),
        slowness=found.slowness,
        pace=found.pace,
        advice=tuple(advice for advice in advise(found) if advice.gain >= _WORTH_SAYING),
        error=found.error,
        uncertainty=max(abs(found.error), _deviation([each.makespan for each in whole]), _jitter(whole)),
        stragglers=stragglers(steps),
        drift=drift([step.seconds for step in steps]),
    )


def _jitter(timelines: Sequence[Timeline]) -> float:
    """Returns how far computations of one kind and stage usually lie apart."""
    known = computations(timelines)
    return median(map(_deviation, known.values())) if known else 0.0


def _deviation(values: Sequence[float]) -> float:
    usual = median(values)
    return median(abs(value - usual) for value in values) / usual if usual else 0.0


def whole_steps(plan: Plan, timelines: Sequence[Timeline]) -> list[Timeline]:
    """Returns the timelines that hold every action of the plan, unlike those of a batch with few samples."""
    ranks = range(plan.num_ranks)
    expected = {(op, stage, number) for rank in ranks for stage, op, number in plan.schedule.actions(rank)}
    return [
        timeline
        for timeline in timelines
        if expected <= {(span.kind, span.stage, span.microbatch) for span in timeline.spans}
    ]
