"""Runs as one HTML file that loads nothing else: `html_report`."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from string import Template
from types import MappingProxyType

from modelpar.errors import ModelparError
from modelpar.planning.steadiness import StepTime
from modelpar.report.assets import view_script, view_style
from modelpar.report.runs import Run
from modelpar.report.trace import Trace, decode
from modelpar.report.view_runs import runs_json
from modelpar.report.view_trace import chrome_json, trace_json

_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:">
<meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
$style
</style>
<style>
body { margin: 0; background: #ffffff; color: #1a1f26; }
.plans { padding: 0 16px 32px; font: 12.5px/1.35 Roboto, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
.plans h2 { font-size: 14px; font-weight: 600; }
.plans h3 { font-size: 12.5px; margin: 12px 0 4px; }
.plans summary { cursor: pointer; padding: 2px 0; }
.plans pre { overflow-x: auto; font: 12px/1.4 ui-monospace, "DejaVu Sans Mono", monospace; margin: 4px 0 12px 16px; }
@media (prefers-color-scheme: dark) { body { background: #1d2025; color: #e6e9ed; } }
</style>
</head>
<body>
<main><div id="view"></div></main>
<section class="plans">
<h2>Plans</h2>
$plans
</section>
<script type="application/json" id="data">$data</script>
<script>
(() => {
$script
const data = JSON.parse(document.getElementById("data").textContent);
const files = new Map();
const file = (trace) => {
  if (!files.has(trace)) {
    files.set(trace, URL.createObjectURL(new Blob([JSON.stringify(trace)], {type: "application/json"})));
  }
  return files.get(trace);
};
startPipelineView(document.getElementById("view"), {
  runs: async () => data.runs,
  trace: async (run, step) => data.traces[run][step],
  download: (run, step) => file(data.chrome[run][step]),
});
})();
</script>
</body>
</html>
""")


def html_report(
    runs: Sequence[Run],
    notes: Sequence[str],
    texts: Mapping[str, Sequence[tuple[str, str]]],
    steps: Mapping[str, Sequence[StepTime]] = MappingProxyType({}),
) -> str:
    """Returns the page: strategies, the timelines of each run's last traces, and what `texts` says of each run.

    `texts` holds per run (title, plain text), `steps` its settled steps, as far as they are known. The page may not
    load anything: its policy forbids it.
    """
    traces = {run.name: _traces(run) for run in runs}
    shown = [replace(run, steps=tuple(trace.step for trace in traces[run.name])) for run in runs]
    data = {
        "runs": runs_json(shown, notes),
        "traces": {
            name: {trace.step: trace_json(name, trace, steps.get(name, ())) for trace in each}
            for name, each in traces.items()
        },
        "chrome": {name: {trace.step: chrome_json(trace) for trace in each} for name, each in traces.items()},
    }
    return _PAGE.substitute(
        title=html.escape(", ".join(run.name for run in runs[:3]) + (", …" if len(runs) > 3 else "")),
        style=re.sub("(?i)</(?=style)", r"<\\/", view_style()),
        plans="\n".join(_plan(name, parts) for name, parts in texts.items()),
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        script=re.sub("(?i)<(?=/script|!--)", r"\\x3c", view_script()),
    )


def _traces(run: Run) -> list[Trace]:
    """Returns the traces of a run; none where one cannot be read, as then its row says."""
    try:
        return [decode(blob) for blob in run.blobs]
    except ModelparError:
        return []


def _plan(name: str, parts: Sequence[tuple[str, str]]) -> str:
    texts = "\n".join(
        f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"
        for title, text in parts
    )
    return f"<h3>{html.escape(name)}</h3>\n{texts}"
