"""Reads runs through TensorBoard's data providers, so that both of its loaders will do: Reader, provider_of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.data.provider import DataProvider, RunTagFilter
from tensorboard.errors import NotFoundError

from modelpar.errors import ConfigError
from modelpar.report.runs import Run
from modelpar.report.tensorboard.names import BUBBLE, PLUGIN, RESULT, STEP_SECONDS, TRACE

_SETTLED = 3
"""Steps at the beginning that do not count, where there are enough others."""
_ALL = 1_000_000
_LAST = 5
"""How many traces a Run brings with it."""
_NO_TRACES = (
    "holds no traces: they come with the 5th step, with every training.trace_every-th and with the last one; "
    "runs of earlier versions have none"
)


class Reader:
    """Reads the runs of one data provider. Times and steps are read anew with each call."""

    def __init__(self, provider: DataProvider, context: RequestContext | None = None, experiment: str = "") -> None:
        self._provider = provider
        self._where: dict[str, Any] = {"ctx": context or RequestContext(), "experiment_id": experiment}

    def has_traces(self) -> bool:
        """Returns whether there is anything to show."""
        return bool(self._provider.list_blob_sequences(**self._where, plugin_name=PLUGIN))

    def runs(self) -> tuple[list[Run], list[str]]:
        """Returns all runs of modelpar, and a line for a reader about those that are not."""
        traces = self._traces(RunTagFilter(tags=[TRACE]))
        scalars = self._scalars()
        runs, others = [], []
        for listed in self._provider.list_runs(**self._where):
            name = listed.run_name
            if name in traces:
                runs.append(self._run(name, traces[name], scalars.get(name, {})))
            elif BUBBLE in scalars.get(name, {}):
                runs.append(Run(name, _NO_TRACES, num_steps=_num_steps(scalars[name])))
            else:
                others.append(name)
        return runs, [_not_ours(others)] if others else []

    def trace(self, run: str, step: int) -> bytes:
        """Returns the trace of a step; raises ConfigError where there is none."""
        steps = self._traces(RunTagFilter(runs=[run], tags=[TRACE])).get(run, {})
        if step not in steps:
            known = f"one of {', '.join(map(str, steps))}" if steps else "a run with traces"
            raise ConfigError(f"run {run!r} has no trace of step {step}; expected {known}")
        found = self._blob(steps[step])
        if found is None:
            raise ConfigError(f"the trace of step {step} of run {run!r} is gone; it was written anew meanwhile")
        return found

    def _run(self, name: str, traces: Mapping[int, str], scalars: Mapping[str, list[tuple[int, float]]]) -> Run:
        blobs = [self._blob(key) for _, key in list(traces.items())[-_LAST:]]
        return Run(
            name,
            steps=tuple(traces),
            blobs=tuple(blob for blob in blobs if blob is not None),
            num_steps=_num_steps(scalars),
            step_seconds=_summary(scalars, f"{RESULT}step_seconds", STEP_SECONDS, median),
            bubble=_summary(scalars, f"{RESULT}bubble", BUBBLE, fmean),
        )

    def _traces(self, which: RunTagFilter) -> dict[str, dict[int, str]]:
        """Returns per run the traced steps, ascending, and the keys of their blobs."""
        found = self._provider.read_blob_sequences(
            **self._where, plugin_name=PLUGIN, downsample=_ALL, run_tag_filter=which
        )
        return {
            run: {datum.step: datum.values[0].blob_key for datum in tags.get(TRACE, ()) if datum.values}
            for run, tags in found.items()
        }

    def _blob(self, key: str) -> bytes | None:
        try:
            return self._provider.read_blob(ctx=self._where["ctx"], blob_key=key)
        except NotFoundError:  # what a run wrote before it went on from an earlier step is forgotten
            return None

    def _scalars(self) -> dict[str, dict[str, list[tuple[int, float]]]]:
        """Returns per run and tag (step, value), ascending."""
        tags = [STEP_SECONDS, BUBBLE, f"{RESULT}step_seconds", f"{RESULT}bubble"]
        found = self._provider.read_scalars(
            **self._where, plugin_name="scalars", downsample=_ALL, run_tag_filter=RunTagFilter(tags=tags)
        )
        return {
            run: {tag: [(datum.step, float(datum.value)) for datum in data] for tag, data in tags.items()}
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
        multiplexer.AddRunsFromDirectory(folder, name)
    multiplexer.Reload()
    return MultiplexerDataProvider(multiplexer, ""), multiplexer.RunPaths()


def _summary(scalars: Mapping[str, list[tuple[int, float]]], result: str, curve: str, mean: Any) -> float | None:
    """Returns what the run itself came to in the end; before that, the mean over the steps that have settled."""
    if result in scalars:
        return scalars[result][-1][1]
    values = [value for _, value in scalars.get(curve, ())]
    settled = [value for step, value in scalars.get(curve, ()) if step >= _SETTLED]
    chosen = settled if len(values) > 2 * _SETTLED else values
    return float(mean(chosen)) if chosen else None


def _num_steps(scalars: Mapping[str, list[tuple[int, float]]]) -> int:
    return max((step + 1 for step, _ in scalars.get(STEP_SECONDS, ())), default=0)


def _not_ours(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return (
        f"1 run is not of modelpar: {shown}" if len(names) == 1 else f"{len(names)} runs are not of modelpar: {shown}"
    )
