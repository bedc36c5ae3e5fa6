"""Reads runs through TensorBoard's data providers, so that both of its loaders will do: Reader, provider_of."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.data.provider import DataProvider, RunTagFilter
from tensorboard.errors import NotFoundError

from modelpar.errors import ConfigError
from modelpar.planning.explain import MOST_TIMELINES
from modelpar.planning.plan import Plan
from modelpar.planning.steadiness import StepTime, settled
from modelpar.report.runs import Run
from modelpar.report.tensorboard.names import (
    BUBBLE,
    MAKESPAN,
    PARTITION,
    PLUGIN,
    RESULT,
    STEP_SECONDS,
    TRACE,
    UTILIZATION,
    rank_names,
)

_ALL = 1_000_000
_NO_TRACES = (
    "holds no traces: they come with the 5th step, with every training.trace_every-th and with the last one; "
    "runs of earlier versions have none"
)

_NO_STEP = "has done no step: it has just begun, or ended in its first one"

_Curves = Mapping[str, Mapping[str, list[tuple[int, float]]]]
"""Per run and tag (step, value), ascending."""


class Reader:
    """Reads the runs of one data provider. Each call reads what is there by then."""

    def __init__(self, provider: DataProvider, context: RequestContext | None = None, experiment: str = "") -> None:
        self._provider = provider
        self._where: dict[str, Any] = {"ctx": context or RequestContext(), "experiment_id": experiment}

    def has_traces(self) -> bool:
        """Returns whether there is anything to show."""
        return bool(self._provider.list_blob_sequences(**self._where, plugin_name=PLUGIN))

    def runs(self) -> tuple[list[Run], list[str]]:
        """Returns all runs of modelpar, and a line for a reader about those that are not."""
        traces, steps = self._traces(RunTagFilter(tags=[TRACE])), self._num_steps()
        results = self._scalars(RunTagFilter(tags=[f"{RESULT}step_seconds", f"{RESULT}bubble"]))
        unfinished = [name for run in traces if run in steps and not results.get(run) for name in _stored(run)]
        curves = self._scalars(RunTagFilter(runs=unfinished, tags=[STEP_SECONDS, BUBBLE])) if unfinished else {}
        begun = self._begun()
        runs, others = [], []
        for name in sorted(_shown(listed.run_name) for listed in self._provider.list_runs(**self._where)):
            if name in traces:
                runs.append(
                    Run(
                        name,
                        steps=tuple(traces[name]),
                        blobs=self._last(traces[name]),
                        num_steps=steps.get(name, 0),
                        step_seconds=_mean(median, curves, results, name, STEP_SECONDS, f"{RESULT}step_seconds"),
                        bubble=_mean(fmean, curves, results, name, BUBBLE, f"{RESULT}bubble"),
                    )
                )
            elif name in steps:
                runs.append(Run(name, _NO_TRACES, num_steps=steps[name]))
            elif name in begun:
                runs.append(Run(name, _NO_STEP))
            else:
                others.append(name)
        return runs, [_not_ours(others)] if others else []

    def step_times(self, run: str, plan: Plan) -> list[StepTime]:
        """Returns how long the settled steps of a run took, and how long each rank computed in them."""
        tags = [MAKESPAN, *(f"{UTILIZATION}{name}" for name in rank_names(plan))]
        curves = self._scalars(RunTagFilter(runs=_stored(run), tags=tags)).get(run, {})
        shares = [dict(curves.get(tag, [])) for tag in tags[1:]]
        return [
            StepTime(step, seconds, tuple(share.get(step, 0.0) * seconds for share in shares))
            for step, seconds in settled(curves.get(MAKESPAN, []))
        ]

    def trace(self, run: str, step: int) -> bytes:
        """Returns the trace of a step; raises ConfigError where there is none."""
        steps = self._traces(RunTagFilter(runs=_stored(run), tags=[TRACE])).get(run, {})
        if step not in steps:
            known = f"one of {', '.join(map(str, steps))}" if steps else "a run with traces"
            raise ConfigError(f"run {run!r} has no trace of step {step}; expected {known}")
        found = self._blob(steps[step])
        if found is None:
            raise ConfigError(f"the trace of step {step} of run {run!r} is gone; it was written anew meanwhile")
        return found

    def _traces(self, which: RunTagFilter) -> dict[str, dict[int, str]]:
        """Returns per run the traced steps, ascending, and the keys of their blobs."""
        found = self._provider.read_blob_sequences(
            **self._where, plugin_name=PLUGIN, downsample=_ALL, run_tag_filter=which
        )
        return {
            _shown(run): {datum.step: datum.values[0].blob_key for datum in tags.get(TRACE, ()) if datum.values}
            for run, tags in found.items()
        }

    def _last(self, traces: Mapping[int, str]) -> tuple[bytes, ...]:
        blobs = (self._blob(key) for _, key in list(traces.items())[-MOST_TIMELINES:])
        return tuple(blob for blob in blobs if blob is not None)

    def _blob(self, key: str) -> bytes | None:
        try:
            return self._provider.read_blob(ctx=self._where["ctx"], blob_key=key)
        except NotFoundError:  # what a run wrote before it went on from an earlier step is forgotten
            return None

    def _num_steps(self) -> dict[str, int]:
        """Returns how many steps each run of modelpar has done; only those have a bubble."""
        found = self._provider.list_scalars(
            **self._where, plugin_name="scalars", run_tag_filter=RunTagFilter(tags=[BUBBLE])
        )
        return {_shown(run): tags[BUBBLE].max_step + 1 for run, tags in found.items() if BUBBLE in tags}

    def _begun(self) -> set[str]:
        """Returns the runs that have noted their partition, which those of modelpar do first."""
        found = self._provider.list_tensors(
            **self._where, plugin_name="text", run_tag_filter=RunTagFilter(tags=[f"{PARTITION}/text_summary"])
        )
        return {_shown(run) for run, tags in found.items() if tags}

    def _scalars(self, which: RunTagFilter) -> _Curves:
        found = self._provider.read_scalars(**self._where, plugin_name="scalars", downsample=_ALL, run_tag_filter=which)
        return {
            _shown(run): {tag: [(datum.step, float(datum.value)) for datum in data] for tag, data in tags.items()}
            for run, tags in found.items()
        }


def provider_of(folders: Sequence[tuple[str | None, str]]) -> tuple[DataProvider, dict[str, str]]:
    """Reads folders of runs, each with the name that it goes by or None, without a server.

    Returns a data provider, and per run the folder that it is in.
    """
    multiplexer = EventMultiplexer(
        size_guidance={"tensors": 10},
        tensor_size_guidance={PLUGIN: 0, "scalars": 1000},
        event_file_active_filter=lambda _: True,  # reads all files of a run, as --reload_multifile=true does
    )
    for name, folder in folders:
        for path, _, files in os.walk(folder):
            if any("tfevents" in file for file in files):
                multiplexer.AddRun(path, (Path(name or "") / os.path.relpath(path, folder)).as_posix())
    multiplexer.Reload()
    return MultiplexerDataProvider(multiplexer, ""), multiplexer.RunPaths()


def _shown(run: str) -> str:
    """Returns a run's name without what TensorBoard puts behind that of a folder which is a run itself: "name/."."""
    return run.removesuffix("/.")


def _stored(run: str) -> list[str]:
    """Returns the names that a run may have in TensorBoard."""
    return [run, f"{run}/."]


def _mean(
    mean: Callable[[Sequence[float]], float], curves: _Curves, results: _Curves, run: str, curve: str, result: str
) -> float | None:
    """Returns what a run itself came to in the end; before that, the mean over the steps that have settled."""
    if known := results.get(run, {}).get(result):
        return known[-1][1]
    values = [value for _, value in settled(curves.get(run, {}).get(curve, []))]
    return mean(values) if values else None


def _not_ours(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return (
        f"1 run is not of modelpar: {shown}" if len(names) == 1 else f"{len(names)} runs are not of modelpar: {shown}"
    )
