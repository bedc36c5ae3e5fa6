"""What the writer and the readers of a run's event file call things."""

from __future__ import annotations

from modelpar.planning.plan import Plan

PLUGIN = "modelpar"
"""The plugin that traces belong to, and that shows them."""
TRACE = "pipeline/trace"
"""The tag of traced steps: a sequence of one blob, as `report.trace` encodes it."""
PARTITION = "partition"
"""The text that every run begins with."""
STEP_SECONDS = "step/seconds"
MAKESPAN = "step/makespan"
"""Of the step's timeline: `STEP_SECONDS` without what the controller does between two steps."""
BUBBLE = "pipeline/bubble"
UTILIZATION = "stage_utilization/"
"""With a rank's name behind it, as the next."""
MEMORY = "stage_memory_mb/"
RESULT = "result/"
"""With a metric's name behind it: what the run came to in the end, as in the hparams page."""


def rank_names(plan: Plan) -> list[str]:
    """Returns per rank what people call it: "stage 0", or "rank 0" where ranks hold several stages."""
    unit = "stage" if plan.num_stages == plan.num_ranks else "rank"
    return [f"{unit} {rank}" for rank in range(plan.num_ranks)]
