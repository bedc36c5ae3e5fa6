"""The Pipeline tab of TensorBoard: PipelinePlugin, the entry point `tensorboard_plugins`.

::

    /index.js               what TensorBoard's page of the tab imports; its render() starts the view
    /static/<file>          the view itself, the same files as in an HTML report
    /runs                   RUNS of report/view_runs.py
    /trace?run=…&step=…     TRACE of report/view_trace.py
    /chrome?run=…&step=…    the step in Chrome's trace format

Nothing here needs torch. Errors are answered as {"error": "one line"}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from tensorboard import context as contexts
from tensorboard.backend import experiment_id, http_util
from tensorboard.plugins import base_plugin
from werkzeug import Request, Response

from modelpar.errors import ConfigError, ModelparError
from modelpar.report.assets import STATIC
from modelpar.report.tensorboard.names import PLUGIN
from modelpar.report.tensorboard.reader import Reader
from modelpar.report.trace import decode
from modelpar.report.view_runs import runs_json, trace_facts
from modelpar.report.view_trace import chrome_json, trace_json

_App = Callable[[Any, Any], Any]


_TYPES = {".js": "text/javascript", ".css": "text/css"}


class PipelinePlugin(base_plugin.TBPlugin):
    """Serves the tab. What it has computed of a trace it keeps, by the trace's bytes."""

    plugin_name = PLUGIN

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._provider = context.data_provider
        self._facts = lru_cache(maxsize=1000)(trace_facts)
        self._trace_json = lru_cache(maxsize=50)(lambda run, blob, steps: trace_json(run, decode(blob), steps))

    def get_plugin_apps(self) -> dict[str, _App]:
        """Returns what answers at which path."""
        return {
            "/index.js": self._app(self._static),
            "/static/*": self._app(self._static),
            "/runs": self._app(self._runs),
            "/trace": self._app(self._trace),
            "/chrome": self._app(self._chrome),
        }

    def is_active(self) -> bool:
        """Returns whether any run has traces."""
        return self._provider is not None and Reader(self._provider).has_traces()

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """Returns the tab's name and its JavaScript."""
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Pipeline")

    def _app(self, answer: Callable[[Request], Response]) -> _App:
        @Request.application
        def app(request: Request) -> Response:
            try:
                return answer(request)
            except ModelparError as error:
                message = {"error": " ".join(str(error).split())}
                return http_util.Respond(request, message, "application/json", code=404)

        return app

    def _static(self, request: Request) -> Response:
        name = request.path.rsplit("/", 1)[-1]
        files = {file.name: file for file in STATIC.iterdir() if file.suffix in _TYPES}
        if name not in files:
            raise ConfigError(f"there is no file {name!r}; expected one of {', '.join(sorted(files))}")
        return http_util.Respond(request, files[name].read_bytes(), _TYPES[files[name].suffix])

    def _runs(self, request: Request) -> Response:
        runs, notes = self._reader(request).runs()
        return http_util.Respond(request, runs_json(runs, notes, self._facts), "application/json")

    def _trace(self, request: Request) -> Response:
        run, blob = self._blob(request)
        steps = tuple(self._reader(request).step_times(run, decode(blob).plan))
        return http_util.Respond(request, self._trace_json(run, blob, steps), "application/json")

    def _chrome(self, request: Request) -> Response:
        run, blob = self._blob(request)
        trace = decode(blob)
        name = re.sub(r"[^\w.-]", "_", f"{run}-step-{trace.step}.json", flags=re.ASCII)
        headers = [("Content-Disposition", f'attachment; filename="{name}"')]
        data = json.dumps(chrome_json(trace), ensure_ascii=False, separators=(",", ":")).encode()
        return http_util.Respond(request, data, "application/json; charset=utf-8", headers=headers)

    def _blob(self, request: Request) -> tuple[str, bytes]:
        """Returns the run that a request names, and the bytes of the trace."""
        run, step = request.args.get("run"), request.args.get("step")
        if run is None or step is None or not step.isdecimal():
            raise ConfigError(
                f"run is {run!r} and step {step!r}; expected a run's name and the number of a traced step"
            )
        return run, self._reader(request).trace(run, int(step))

    def _reader(self, request: Request) -> Reader:
        if self._provider is None:
            raise ConfigError("this TensorBoard has no data provider; expected version 2.18 or later")
        context = contexts.from_environ(request.environ)
        return Reader(self._provider, context, request.environ.get(experiment_id.WSGI_ENVIRON_KEY, ""))
