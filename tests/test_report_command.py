"""`modelpar report`: one page that needs nothing else, or a Chrome trace."""

from __future__ import annotations

import gzip
import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest
from commands import MLP, THREADS, call
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_BLOB_SEQUENCE, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from test_tensorboard import small_plan, step
from torch.utils.tensorboard import SummaryWriter
from trace_format import check

from modelpar.report import html as page
from modelpar.report.assets import view_script
from modelpar.report.runs import Run
from modelpar.report.tensorboard.names import PLUGIN, TRACE
from modelpar.report.tensorboard.writer import RunWriter
from modelpar.report.trace import Trace, encode

TRAIN = [*MLP, *THREADS, "training.batch_size=8", "pipeline.num_microbatches=4", "training.trace_every=2"]
NASTY = "a</script><script>alert(1)</script><!--<b>&"


class Page(html.parser.HTMLParser):
    """Reads a page: the text of each element by its tag, and all addresses that it would load."""

    def __init__(self, text: str):
        super().__init__()
        self.texts: dict[str, list[str]] = {}
        self.addresses: list[str] = []
        self.policy = ""
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.addresses += [given[name] or "" for name in ("src", "href") if name in given]
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""
        if tag not in ("meta", "link", "br", "img"):
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open[-1]][-1] += data

    @property
    def data(self) -> dict[str, Any]:
        """What the page gives to the view."""
        return json.loads(self.texts["script"][0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trainings with different schedules."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for schedule in ("gpipe", "1f1b"):
            words = [f"output.name={schedule}", f"schedule={schedule}", "training.steps=13"]
            assert call("train", *TRAIN, *words).code == 0
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def test_the_page_holds_the_runs_and_their_last_traces(folder: Path) -> None:
    outcome = call("report", "runs")
    assert (outcome.code, outcome.out) == (0, "report.html\n")
    found = Page((folder / "report.html").read_text(encoding="utf-8"))
    runs = found.data["runs"]["runs"]
    assert {run["run"] for run in runs} == {"gpipe", "1f1b"}
    for run in runs:
        assert run["problem"] is None
        assert run["steps"] == [5, 7, 9, 11, 12]
        assert list(found.data["traces"][run["run"]]) == ["5", "7", "9", "11", "12"]
        for number, trace in found.data["traces"][run["run"]].items():
            assert (trace["run"], trace["step"]) == (run["run"], int(number))
            assert len(trace["ranks"]) == 2
            check(found.data["chrome"][run["run"]][number])
    assert found.texts["title"] == ["1f1b, gpipe"]
    assert found.texts["h3"] == ["1f1b", "gpipe"]
    texts = "\n".join(found.texts["pre"])
    for part in ("2 stages by optimal, 4 micro-batches", "schedule:", "0F0 0F1 0F2 0F3 0B0", "num_microbatches: 4"):
        assert part in texts


def test_the_page_loads_nothing(folder: Path) -> None:
    assert call("report", "runs").code == 0
    text = (folder / "report.html").read_text(encoding="utf-8")
    found = Page(text)
    assert found.addresses == []
    assert "default-src 'none'" in found.policy
    assert "startPipelineView" in found.texts["script"][1]
    assert not re.search(r"""@import|url\(\s*['"]?(?!data:|#)|^\s*import\b""", text, re.MULTILINE)


def test_one_run_by_its_folder(folder: Path) -> None:
    assert call("report", "runs/gpipe", "--output", "one.html").out == "one.html\n"
    (run,) = Page((folder / "one.html").read_text(encoding="utf-8")).data["runs"]["runs"]
    assert (run["run"], run["schedule"]) == ("gpipe", "gpipe")


def test_nothing_that_a_run_is_called_breaks_out_of_the_page() -> None:
    plan = small_plan()
    run = Run(NASTY, steps=(0,), blobs=(encode(Trace(plan, 0, step(0).timeline, schedule=NASTY)),))
    found = Page(page.html_report([run], [NASTY], {NASTY: [(NASTY, NASTY)]}))
    assert len(found.texts["script"]) == 2
    assert found.data["runs"]["runs"][0]["run"] == found.data["runs"]["notes"][0] == NASTY
    assert found.data["runs"]["runs"][0]["schedule"] == NASTY
    assert found.texts["title"] == found.texts["h3"] == found.texts["summary"] == found.texts["pre"] == [NASTY]


def test_a_script_cannot_end_its_element(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "view_script", lambda: 'const a = "</script><!--</SCRIPT>";')
    monkeypatch.setattr(page, "view_style", lambda: 'a::after { content: "</style>"; }')
    found = Page(page.html_report([], [], {}))
    assert len(found.texts["script"]) == len(found.texts["style"]) == 2
    assert 'const a = "\\x3c/script>\\x3c!--\\x3c/SCRIPT>";' in found.texts["script"][1]


def test_the_view_needs_no_imports() -> None:
    script = view_script()
    assert "function startPipelineView" in script
    assert not re.search(r"^\s*(import|export)\b", script, re.MULTILINE)


@pytest.mark.parametrize("name", ["step.json", "step.json.gz"])
def test_the_last_traced_step_as_a_chrome_trace(folder: Path, name: str) -> None:
    assert call("report", "runs/1f1b", "--output", name).out == f"{name}\n"
    data = (folder / name).read_bytes()
    trace = json.loads(gzip.decompress(data) if name.endswith(".gz") else data)
    check(trace)
    assert call("report", "runs/1f1b", "--output", "for_comparison.html").code == 0
    known = Page((folder / "for_comparison.html").read_text(encoding="utf-8")).data["chrome"]["1f1b"]["12"]
    assert trace == known


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("runs --output step.json", "a Chrome trace is of one run, and these are 2: 1f1b, gpipe; expected one run"),
        ("runs --output page.txt", "the output is 'page.txt'; expected a name that ends in .html, .json, .json.gz"),
        ("runs --output nowhere/page.html", "the output is 'nowhere/page.html'; expected a name that ends in"),
        ("nowhere", "nowhere does not exist; expected a run or a folder of runs"),
        ("foreign", "foreign holds no traces: 1 run is not of modelpar: foreign"),
        ("begun", "begun has done no step: it has just begun, or ended in its first one"),
        ("old", "old holds no traces: they come with the 5th step"),
        ("runs --output folder.html", "folder.html cannot be written: Is a directory"),
    ],
)
def test_bad_input_is_one_line(folder: Path, words: str, message: str) -> None:
    (folder / "folder.html").mkdir(exist_ok=True)
    with SummaryWriter("foreign") as other:
        other.add_scalar("loss", 1.0, 0)
    RunWriter("begun", small_plan()).close()
    with RunWriter("old", small_plan()) as writer:
        writer.step(step(0), 1.0, 8)
    outcome = call("report", *words.split())
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"modelpar: {message}")
    assert outcome.err.count("\n") == 1


def test_a_run_that_cannot_be_read_does_not_keep_the_others_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelpar.report import trace as traces

    with monkeypatch.context() as patch:
        patch.setattr(traces, "FORMAT", 99)
        with RunWriter("mixed/newer", small_plan()) as writer:
            writer.trace(0, step(0).timeline)
    with RunWriter("mixed/good", small_plan()) as writer:
        writer.trace(0, step(0).timeline)
    assert call("report", "mixed", "--output", "mixed.html").code == 0
    found = Page((folder / "mixed.html").read_text(encoding="utf-8"))
    problems = {run["run"]: run["problem"] for run in found.data["runs"]["runs"]}
    assert problems["good"] is None
    assert problems["newer"].startswith("the trace has format 99")


def test_the_help_has_two_examples() -> None:
    outcome = call("report", "--help")
    assert outcome.code == 0
    assert outcome.out.count("  modelpar report ") == 2
    assert call("report").code == 2


def test_a_run_whose_traces_are_gone_is_one_line(folder: Path) -> None:
    """A trace without a blob, as where the provider has forgotten it."""
    tensor = TensorProto(dtype=DT_STRING, tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=0)]))
    kind = SummaryMetadata.PluginData(plugin_name=PLUGIN)
    metadata = SummaryMetadata(plugin_data=kind, data_class=DATA_CLASS_BLOB_SEQUENCE)
    with SummaryWriter("gone") as writer:
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=TRACE, metadata=metadata, tensor=tensor)]), 0)
    outcome = call("report", "gone")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "modelpar: gone holds no traces: its traces are gone, it was written anew meanwhile\n"
