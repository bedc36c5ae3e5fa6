"""Pipeline-parallel training for PyTorch: split a model into stages, run them, see where the time goes.

::

    from modelpar import Objective, Pipeline, Workers, partitioners, plan, schedules

Names are loaded when first used, so that planning alone never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelpar.capture.objective import LossResult, Objective
    from modelpar.planner import plan
    from modelpar.planning import partitioners, schedules
    from modelpar.planning.plan import Plan
    from modelpar.planning.result import StepResult
    from modelpar.planning.verdict import Verdict
    from modelpar.proof import verify
    from modelpar.run.pipeline import EvalResult, Pipeline
    from modelpar.run.workers import Workers
    from modelpar.rundir import load_into

__all__ = [
    "EvalResult",
    "LossResult",
    "Objective",
    "Pipeline",
    "Plan",
    "StepResult",
    "Verdict",
    "Workers",
    "load_into",
    "partitioners",
    "plan",
    "schedules",
    "verify",
]

_HOMES = {
    "EvalResult": "modelpar.run.pipeline",
    "LossResult": "modelpar.capture.objective",
    "Objective": "modelpar.capture.objective",
    "Pipeline": "modelpar.run.pipeline",
    "Plan": "modelpar.planning.plan",
    "StepResult": "modelpar.planning.result",
    "Verdict": "modelpar.planning.verdict",
    "Workers": "modelpar.run.workers",
    "load_into": "modelpar.rundir",
    "partitioners": "modelpar.planning",
    "plan": "modelpar.planner",
    "schedules": "modelpar.planning",
    "verify": "modelpar.proof",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'modelpar' has no attribute {name!r}; it has {', '.join(__all__)}")
    module = import_module(_HOMES[name])
    return getattr(module, name) if hasattr(module, name) else import_module(f"{_HOMES[name]}.{name}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
