"""Every error that modelpar raises on purpose.

    ModelparError
    ├── ConfigError          an option, file or value that cannot be used       (also a ValueError)
    ├── PlanError            a plan that cannot exist                           (also a ValueError)
    │   ├── PartitionError       layers that cannot be cut as asked
    │   ├── ScheduleError        an order of actions that is not legal
    │   ├── DeadlockError        a schedule in which some action can never run
    │   └── PlanMismatch         a plan made for another model
    ├── CaptureError         a model that modelpar cannot read or split         (also a ValueError)
    └── RunError             something that went wrong while running            (also a RuntimeError)
        ├── WriteError           a file of a run that cannot be written
        ├── StartError           the workers could not be started
        ├── StageError           an exception inside a stage, with its traceback
        ├── NonFiniteLoss        the loss became inf or nan
        ├── SplitMismatch        gradients of the first micro-batch that are not those of the unsplit model
        ├── WorkerLost           a worker process ended or fell silent
        └── StepTimeout          a step took longer than allowed

A message says what was found, with the values, what was expected, and where. The command line prints it as one line;
Python users get the exception.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ModelparError(Exception):
    """Base of every error that modelpar raises on purpose."""


class ConfigError(ModelparError, ValueError):
    """Reports an option, a file or a value that cannot be used."""


class PlanError(ModelparError, ValueError):
    """Reports a plan that cannot exist."""


class PartitionError(PlanError):
    """Reports layers that cannot be cut as asked."""


class ScheduleError(PlanError):
    """Reports an order of actions that is not legal."""


class DeadlockError(PlanError):
    """Reports a schedule in which some action can never run."""


class PlanMismatch(PlanError):
    """Reports a plan that was made for another model than the one at hand."""


class CaptureError(ModelparError, ValueError):
    """Reports a model that modelpar cannot read or split."""


class RunError(ModelparError, RuntimeError):
    """Reports something that went wrong while running."""


class WriteError(RunError):
    """Reports a file of a run that cannot be written, such as on a full disk."""


class StartError(RunError):
    """Reports workers that could not be started."""


class StageError(RunError):
    """Reports an exception inside a stage; the message ends with the traceback of the rank that raised it."""


class NonFiniteLoss(RunError):
    """Reports a loss that became inf or nan, and the first layer whose output did."""


class SplitMismatch(RunError):
    """Reports a first micro-batch with another loss or gradient than in the unsplit model; nothing was trained."""


class WorkerLost(RunError):
    """Reports a worker process that ended or fell silent."""


class StepTimeout(RunError):
    """Reports a step that took longer than allowed, with what every rank was waiting for."""


@contextmanager
def written(path: str | Path) -> Iterator[None]:
    """Turns an OSError of the block, which writes the file or folder, into a WriteError that names it."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror or error}") from error


def describe(error: BaseException) -> str:
    """Returns an exception as "Type: message"; one that cannot say what it is, by its type alone."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception as second:
        return f"{type(error).__name__}, which could not be described ({type(second).__name__})"
