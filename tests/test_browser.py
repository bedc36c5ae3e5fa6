"""The Pipeline view in a real browser: as a tab of TensorBoard on real runs, and in the HTML report.

Every page ends with a look at what went wrong meanwhile: errors on the console, requests to other hosts.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import HANDLE, HEIGHT, WIDTH, Shown, chromium
from commands import MLP, THREADS, Command, call
from test_tensorboard import get, small_plan, started_view, wait_for_runs

from modelpar.planning import schedules
from modelpar.planning.simulate import predict
from modelpar.report.html import html_report
from modelpar.report.runs import Run
from modelpar.report.tensorboard.reader import Reader, provider_of
from modelpar.report.trace import Trace, decode, encode
from modelpar.report.view_runs import runs_json
from modelpar.report.view_trace import trace_json

pytestmark = pytest.mark.slow

TRAIN = [
    *MLP,
    *("model.width=128", "model.depth=6", "data.num_samples=256", "training.batch_size=64"),
    *("pipeline.num_microbatches=4", "pipeline.profile=flops", "pipeline.num_threads=1", "training.trace_every=3"),
]
LONG = "a-run-with-a-name-that-goes-on-and-on-and-says-more-than-anybody-could-want-to-know-of-it"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def folder(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs over threads and RPC, and one without traces."""
    folder = tmp_path_factory.mktemp("browser")
    rpc = ["transport=rpc", "training.steps=9", "schedule=gpipe", "pipeline.num_ranks=3", f"output.name={LONG}"]
    with Command(folder, "train", *TRAIN, *rpc) as command:
        assert command.outcome().code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in (["training.steps=7", "output.name=first"], ["training.trace_every=0", "training.steps=2"]):
            assert call("train", *TRAIN, *THREADS, *words).code == 0
    return folder / "runs"


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    process, url = started_view(folder)
    try:
        wait_for_runs(url, 3)
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=30)


def closed_quietly(shown: Shown, host: str) -> None:
    shown.close()
    assert shown.errors == []
    assert [url for url in shown.asked if not url.startswith((host, "blob:", "data:"))] == []


@pytest.fixture
def tab(browser: Any, url: str) -> Iterator[Shown]:
    shown = Shown(browser)
    yield shown.open(f"{url}#modelpar")
    closed_quietly(shown, url)


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[Run]:
    return Reader(provider_of([(None, str(folder))])[0]).runs()[0]


@pytest.fixture(scope="module")
def rows(runs: list[Run]) -> list[dict[str, Any]]:
    """What Python reads of the runs, as the table shows them."""
    return runs_json(runs, [])["runs"]


def expected_trace(runs: list[Run], name: str, step: int) -> Any:
    """Returns what Python reads of a traced step."""
    run = next(run for run in runs if run.name == name)
    traces = {trace.step: trace for trace in map(decode, run.blobs)}
    return json.loads(json.dumps(trace_json(name, traces[step])))


def widest(trace: dict[str, Any], look: str, rank: int = 0) -> int:
    """Returns the position of a rank's longest box of a kind."""
    spans = trace["ranks"][rank]["spans"]
    return max((i for i, span in enumerate(spans) if span[0] == look), key=lambda i: spans[i][2] - spans[i][1])


def rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)] + [255]


# --- what is shown ------------------------------------------------------------------------------------------------


def test_the_rows_are_those_of_the_runs(tab: Shown, rows: list[dict[str, Any]]) -> None:
    shown = tab.frame.locator(".strategies tbody tr")
    assert [shown.nth(i).get_attribute("data-run") for i in range(shown.count())] == [row["run"] for row in rows]
    assert len(rows) == 3
    for i, row in enumerate(rows[:2]):
        text = shown.nth(i).inner_text()
        assert row["schedule"] in text
        assert "-".join(map(str, row["balance"])) in text
        assert f"{row['relative']:.2f}" in text
        parts = shown.nth(i).locator("[data-part]")
        assert [parts.nth(k).get_attribute("data-part") for k in range(6)] == [part["name"] for part in row["parts"]]
        widths = [parts.nth(k).bounding_box()["width"] for k in range(6)]
        total = sum(part["seconds"] for part in row["parts"])
        for width, part in zip(widths, row["parts"], strict=True):
            assert width == pytest.approx(sum(widths) * max(part["seconds"], 0.0) / total, abs=1.5)
    assert "holds no traces" in shown.nth(2).inner_text()
    assert tab.frame.locator(".strategies tbody tr:nth-child(3) button:enabled").count() == 0
    assert tab.frame.evaluate("document.documentElement.scrollWidth") <= WIDTH, "a long name must not widen the page"


def test_the_lanes_are_those_of_the_traces(tab: Shown, runs: list[Run], rows: list[dict[str, Any]]) -> None:
    state = tab.state()
    for side, row in zip("AB", rows, strict=False):
        assert state["choice"][side] == {"run": row["run"], "step": row["parts_step"]}
        trace = expected_trace(runs, row["run"], row["parts_step"])
        assert tab.ask(f"view.trace('{side}')") == trace
        assert tab.frame.locator(f".panel[data-side={side}] .headline").inner_text() == trace["headline"]
        for look in "FB":
            index = widest(trace, look)
            x, y = tab.place(side, 0, index)
            half = tab.ask(f"view.where('{side}', 0, {index}).width") / 2
            beside = tab.colour(side, x - half + 3, y - 7)  # a corner of the box, where there is no label
            assert beside == rgb(trace["looks"][look]["colour"])


def test_the_stages_are_compared(tab: Shown, runs: list[Run], rows: list[dict[str, Any]]) -> None:
    a, b = (expected_trace(runs, row["run"], row["parts_step"])["stages"] for row in rows[:2])
    table = tab.frame.locator("table.stages")
    assert table.locator("tbody").count() == max(len(a), len(b))
    cells = table.locator("tbody[data-stage='0'] tr")
    seconds = [a[0]["forward_seconds"], b[0]["forward_seconds"]]
    for i, side in enumerate("AB"):
        assert cells.nth(i).get_attribute("data-side") == side
        assert float(cells.nth(i).locator("td").nth(3).inner_text()) == pytest.approx(seconds[i] * 1e3, rel=0.01)
    difference = cells.nth(2).locator("td").nth(3).inner_text().split()[-1].replace("−", "-")
    assert float(difference) == pytest.approx((seconds[1] - seconds[0]) * 1e3, abs=0.02)


def test_a_table_of_text_says_the_same(tab: Shown) -> None:
    for side in "AB":
        trace = tab.ask(f"view.trace('{side}')")
        spoken = tab.frame.locator(f".panel[data-side={side}] table.spoken tbody tr")
        assert spoken.count() == len(trace["ranks"])
        for i, rank in enumerate(trace["ranks"]):
            order = " ".join(f"{span[0]}{span[4]}" for span in rank["spans"] if span[0] in ("F", "B"))
            assert spoken.nth(i).locator("td").last.inner_text() == order
            assert spoken.nth(i).locator("th").inner_text() == rank["name"]
        label = tab.frame.locator(f".panel[data-side={side}] canvas.base").get_attribute("aria-label")
        assert trace["headline"] in label


# --- pointing -----------------------------------------------------------------------------------------------------


def test_hovering_follows_one_microbatch(tab: Shown) -> None:
    trace = tab.ask("view.trace('A')")
    index, other = widest(trace, "F"), widest(trace, "B", 1)
    microbatch = trace["ranks"][0]["spans"][index][4]
    x, y = tab.place("A", 1, other)
    assert tab.colour("A", x, y, "overlay")[3] == 0
    tab.point("A", 0, index)
    state = tab.state()
    assert state["followed"] == {"microbatch": microbatch, "locked": False, "lane": "spans"}
    assert state["hovered"] == {"side": "A", "rank": 0, "lane": "spans", "index": index}
    tooltip = tab.frame.locator(".tooltip").inner_text().splitlines()
    _, start, end = trace["ranks"][0]["spans"][index][:3]
    assert tooltip[0] == f"forward · stage 0 · micro-batch {microbatch}"
    assert tooltip[1] == f"{start * 1e3:.3f} ms to {end * 1e3:.3f} ms"
    for rank, row in enumerate(trace["ranks"]):  # boxes of this micro-batch are drawn again above the veil, others not
        for i in (widest(trace, "F", rank), widest(trace, "B", rank)):
            x, y = tab.place("A", rank, i)
            half = tab.ask(f"view.where('A', {rank}, {i}).width") / 2
            colour = tab.colour("A", x - half + 4, y - 7, "overlay")
            box = rgb(trace["looks"][row["spans"][i][0]]["colour"])
            assert (colour == box) == (row["spans"][i][4] == microbatch)
            assert colour[3] > 180
    tab.page.mouse.move(5, HEIGHT - 5)
    assert tab.state()["followed"] is None
    assert not tab.frame.locator(".tooltip").is_visible()


def test_a_click_locks_and_escape_unlocks(tab: Shown) -> None:
    trace = tab.ask("view.trace('B')")
    index = widest(trace, "B")
    microbatch = trace["ranks"][0]["spans"][index][4]
    tab.page.mouse.click(*tab.place("B", 0, index))
    others = [i for i, span in enumerate(trace["ranks"][0]["spans"]) if span[0] == "F" and span[4] != microbatch]
    tab.point("B", 0, others[0])
    assert tab.state()["followed"] == {"microbatch": microbatch, "locked": True, "lane": "spans"}
    assert tab.frame.locator("[role=status]").inner_text() == f"following micro-batch {microbatch}"
    assert tab.press("Escape")["followed"] is None
    assert tab.press(".", ".")["followed"]["microbatch"] == 1
    assert tab.press(",")["followed"]["microbatch"] == 0
    tab.press("Escape")
    x, y = tab.place("B", 0, index)
    tab.page.mouse.click(x, y)
    assert tab.state()["followed"]["locked"]
    tab.page.mouse.click(x, y)
    assert tab.state()["followed"] is None


def test_zooming_keeps_the_moment_under_the_pointer(tab: Shown) -> None:
    whole = tab.state()["view"]
    index = widest(tab.ask("view.trace('A')"), "B")
    x, y = tab.place("A", 0, index)
    tab.page.mouse.move(x, y)
    tab.page.mouse.wheel(0, -100)
    assert tab.state()["view"] == whole, "without Ctrl the page scrolls"
    tab.frame.evaluate("window.scrollTo(0, 0)")
    tab.page.keyboard.down("Control")
    tab.page.mouse.wheel(0, -300)
    tab.page.keyboard.up("Control")
    tab.wait(f"{HANDLE}.state.view.to < {whole['to']}")
    near = tab.state()["view"]
    assert near["to"] - near["from"] < 0.8 * (whole["to"] - whole["from"])
    assert tab.place("A", 0, index) == pytest.approx((x, y), abs=1.0)
    tab.page.mouse.move(x, y)
    tab.page.mouse.down()
    tab.page.mouse.move(x + 40, y, steps=4)
    tab.page.mouse.up()
    panned = tab.state()["view"]
    assert panned["from"] < near["from"]
    assert panned["to"] - panned["from"] == pytest.approx(near["to"] - near["from"])
    assert tab.place("A", 0, index)[0] == pytest.approx(x + 40, abs=6.0), "the first pixels tell a drag from a click"
    assert not tab.state()["followed"]["locked"]


def test_keys_zoom_pan_and_fit(tab: Shown) -> None:
    whole = tab.state()["view"]
    length = whole["to"]
    near = tab.press("+", "+")["view"]
    assert near["to"] - near["from"] == pytest.approx(length / 2.25)
    right = tab.press("ArrowRight")["view"]
    assert right["from"] == pytest.approx(near["from"] + 0.12 * length / 2.25)
    assert tab.press("ArrowLeft")["view"]["from"] == pytest.approx(near["from"])
    assert tab.press("-")["view"]["to"] - tab.state()["view"]["from"] == pytest.approx(length / 1.5)
    assert tab.press("0")["view"] == whole
    assert tab.press("-")["view"] == whole, "there is nothing beyond the step"


def test_shift_and_drag_measures(tab: Shown) -> None:
    trace = tab.ask("view.trace('A')")
    spans = trace["ranks"][0]["spans"]
    first, last = widest(trace, "F"), widest(trace, "B")
    (x0, y), (x1, _) = tab.place("A", 0, first), tab.place("A", 0, last)
    tab.page.keyboard.down("Shift")
    tab.page.mouse.move(x0, y)
    tab.page.mouse.down()
    tab.page.mouse.move(x1, y, steps=5)
    tab.page.mouse.up()
    tab.page.keyboard.up("Shift")
    measured = tab.state()["measure"]
    middles = sorted((spans[i][1] + spans[i][2]) / 2 for i in (first, last))
    pixel = tab.state()["view"]["to"] / 800
    assert [measured["from"], measured["to"]] == pytest.approx(middles, abs=2 * pixel)
    said = tab.frame.locator("[role=status]").inner_text()
    assert said == f"measured {(measured['to'] - measured['from']) * 1e3:.3f} ms"
    for side in "AB":  # the band lies over both timelines
        assert tab.colour(side, (x0 + x1) / 2, tab.place(side, 0, 0)[1], "overlay")[3] > 0
    assert tab.press("Escape")["measure"] is None


def test_the_critical_path_can_be_taken_away(tab: Shown) -> None:
    trace = tab.ask("view.trace('A')")
    boxes = [(rank, i) for rank, i in trace["critical"] if trace["ranks"][rank]["spans"][i][0] in "FB"]
    spans = {(rank, i): trace["ranks"][rank]["spans"][i] for rank, i in boxes}
    rank, index = max(spans, key=lambda at: spans[at][2] - spans[at][1])
    x, y = tab.place("A", rank, index)
    tab.page.mouse.move(5, HEIGHT - 5)
    button = tab.frame.get_by_role("button", name="critical path")
    black, box = [0, 0, 0, 255], rgb(trace["looks"][spans[rank, index][0]]["colour"])
    assert tab.colour("A", x, y + 11) == black
    assert tab.press("c")["critical"] is False
    assert tab.colour("A", x, y + 11) == box
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    assert tab.state()["critical"] is True
    assert tab.colour("A", x, y + 11) == black


# --- choosing -----------------------------------------------------------------------------------------------------


def test_traced_steps_are_stepped_through(tab: Shown, runs: list[Run], rows: list[dict[str, Any]]) -> None:
    steps = {side: row["steps"] for side, row in zip("AB", rows, strict=False)}
    assert all(len(each) >= 3 for each in steps.values())
    for side in "AB":
        tab.frame.get_by_label(f"step of {side}", exact=True).select_option(str(steps[side][0]))
    state = tab.state()
    assert [state["choice"][side]["step"] for side in "AB"] == [steps[side][0] for side in "AB"]
    assert tab.frame.get_by_label("earlier traced step of A").is_disabled()
    tab.frame.locator(".timelines").focus()
    state = tab.press("]")
    assert [state["choice"][side]["step"] for side in "AB"] == [steps[side][1] for side in "AB"]
    tab.frame.get_by_label("later traced step of A").click()
    state = tab.state()
    assert [state["choice"][side]["step"] for side in "AB"] == [steps["A"][2], steps["B"][1]]
    assert tab.ask("view.trace('A')") == expected_trace(runs, rows[0]["run"], steps["A"][2])
    assert tab.press("[")["choice"]["B"]["step"] == steps["B"][0]


def test_runs_are_chosen(tab: Shown, rows: list[dict[str, Any]]) -> None:
    first, second = rows[0]["run"], rows[1]["run"]
    tab.frame.get_by_label(f"show {second} as A", exact=True).click()
    assert tab.state()["choice"]["A"]["run"] == second
    assert tab.ask("view.trace('A')")["run"] == second
    tab.frame.get_by_label(f"show {second} as A", exact=True).focus()
    tab.page.keyboard.press("ArrowUp")
    state = tab.press("b")  # in the row above
    assert (state["choice"]["A"]["run"], state["choice"]["B"]["run"]) == (second, first)
    assert tab.frame.locator(".pick[aria-pressed=true]").count() == 2
    state = tab.press("x")
    assert (state["choice"]["A"]["run"], state["choice"]["B"]["run"]) == (first, second)
    tab.frame.get_by_label("run of B").select_option("")
    tab.state()
    assert tab.ask("view.trace('B')") is None
    assert not tab.frame.locator(".panel[data-side=B] .lanes").is_visible()
    assert tab.frame.locator("table.stages .difference").count() == 0
    tab.frame.get_by_label("run of B").select_option(second)
    assert tab.state()["choice"]["B"]["run"] == second


def test_the_trace_can_be_downloaded(tab: Shown) -> None:
    with tab.page.expect_download() as started:
        tab.frame.locator(".panel[data-side=A] .download").click()
    content = json.loads(Path(started.value.path()).read_text())
    assert sum(event["ph"] == "X" for event in content["traceEvents"]) >= len(
        tab.ask("view.trace('A')")["ranks"][0]["spans"]
    )
    assert started.value.suggested_filename.endswith(".json")


# --- light and dark, keys only ------------------------------------------------------------------------------------


def test_tensorboards_switch_makes_it_dark(tab: Shown) -> None:
    _, y = tab.place("A", 0, 0)
    assert tab.state()["dark"] is False
    assert tab.colour("A", WIDTH - 40, y + 30) == [255, 255, 255, 255]
    for name, dark in (("Dark", True), ("Light", False), ("Dark", True)):
        tab.page.locator("app-header-dark-mode-toggle button").click()
        tab.page.get_by_role("menuitem", name=name, exact=True).click()
        tab.wait(f"{HANDLE}.state.dark === {str(dark).lower()}")
        assert (max(tab.colour("A", WIDTH - 40, y + 30)[:3]) < 80) == dark, "the canvas is drawn anew"


def test_tensorboard_decides_over_the_system(browser: Any, url: str) -> None:
    shown = Shown(browser, scheme="dark").open(f"{url}#modelpar")
    assert shown.state()["dark"] is True
    shown.page.locator("app-header-dark-mode-toggle button").click()
    shown.page.get_by_role("menuitem", name="Light", exact=True).click()
    shown.wait(f"{HANDLE}.state.dark === false")
    closed_quietly(shown, url)


def test_the_keyboard_reaches_everything(tab: Shown) -> None:
    tab.frame.evaluate("document.querySelector('.strategies .pick').focus()")
    reached = []
    for _ in range(60):
        tab.page.keyboard.press("Tab")
        reached.append(
            tab.frame.evaluate(
                "(() => { const at = document.activeElement; const style = getComputedStyle(at);"
                " return [at.getAttribute('aria-label') || at.textContent, style.outlineStyle]; })()"
            )
        )
    names = {name for name, _ in reached}
    assert {"Timelines", "critical path", "run of A", "step of B", "Chrome trace", "zoom in (key +)"} <= names
    assert all(outline != "none" for name, outline in reached if name in ("critical path", "zoom in (key +)"))
    tab.page.keyboard.press("?")
    assert tab.frame.get_by_role("dialog").is_visible()
    assert "follow one micro-batch" in tab.frame.get_by_role("dialog").inner_text()
    tab.page.keyboard.press("Escape")
    assert not tab.frame.get_by_role("dialog").is_visible()


def test_a_run_that_goes_on_shows_new_steps(tab: Shown, url: str) -> None:
    """The page asks for the runs again, and keeps what is shown."""
    tab.press("+", ".")
    before = tab.state()
    asked = sum(each.endswith("/runs") for each in tab.asked)
    tab.frame.get_by_label("read the runs again (key r)").click()
    tab.frame.wait_for_timeout(200)
    assert sum(each.endswith("/plugin/modelpar/runs") for each in tab.asked) > 0
    assert sum(each.endswith("/runs") for each in tab.asked) > asked
    after = tab.state()
    assert {key: after[key] for key in ("choice", "view", "followed")} == {
        key: before[key] for key in ("choice", "view", "followed")
    }
    assert get(f"{url}data/plugin/modelpar/runs")["runs"], "the server still answers"


# --- the HTML report ----------------------------------------------------------------------------------------------


@pytest.fixture
def report(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens pages from disk; each is asked at the end what went wrong."""
    opened = []

    def open_file(text: str | Path, scheme: str = "light") -> Shown:
        path = tmp_path / f"report{len(opened)}.html" if isinstance(text, str) else text
        if isinstance(text, str):
            path.write_text(text, encoding="utf-8")
        shown = Shown(browser, scheme)
        opened.append(shown)
        return shown.open(path.as_uri())

    yield open_file
    for shown in opened:
        closed_quietly(shown, tmp_path.as_uri())


def test_the_report_opens_from_disk(report: Any, folder: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    assert call("report", str(folder), "--output", str(tmp_path / "report.html")).code == 0
    shown = report(tmp_path / "report.html", "dark")
    assert [urllib.parse.urlparse(url).scheme for url in shown.asked] == ["file"]
    assert shown.state()["dark"] is True
    names = shown.frame.locator(".strategies tbody tr")
    assert [names.nth(i).get_attribute("data-run") for i in range(names.count())] == [row["run"] for row in rows]
    trace = shown.ask("view.trace('A')")
    assert trace["run"] == rows[0]["run"]
    shown.point("A", 0, widest(trace, "F"))
    assert shown.state()["followed"] is not None
    shown.frame.get_by_label("step of A", exact=True).select_option(str(rows[0]["steps"][-1]))
    assert shown.state()["choice"]["A"]["step"] == rows[0]["steps"][-1]
    with shown.page.expect_download() as started:
        shown.frame.locator(".panel[data-side=A] .download").click()
    assert json.loads(Path(started.value.path()).read_text())["traceEvents"]


def made(name: str, schedule: Any, measured: bool = True) -> Run:
    """Returns a run of one step, as predicted."""
    plan = small_plan(schedule)
    trace = Trace(plan, 4, predict(plan), (1_000_000,) * plan.num_ranks, measured, schedule="made")
    return Run(name, steps=(4,), blobs=(encode(trace),), num_steps=5, step_seconds=trace.timeline.makespan)


def test_without_a_run_it_says_so(report: Any) -> None:
    shown = report(html_report([], ["2 runs hold nothing"], {}))
    assert "No run here yet" in shown.frame.locator(".strategies-section").inner_text()
    assert shown.frame.locator(".notes").inner_text() == "2 runs hold nothing"
    assert not shown.frame.locator(".timelines").is_visible()


def test_a_broken_run_says_so_in_its_row(report: Any) -> None:
    runs = [Run("broken", steps=(4,), blobs=(b"?",), num_steps=5), made("fine", schedules.gpipe(2, 2))]
    shown = report(html_report(runs, [], {}))
    assert shown.frame.locator("tr[data-run=broken] .problem").inner_text()
    assert shown.state()["choice"]["A"]["run"] == "fine"


def test_a_single_stage_stands_alone(report: Any) -> None:
    shown = report(html_report([made("one", schedules.gpipe(1, 3))], [], {}))
    assert shown.state()["choice"] == {"A": {"run": "one", "step": 4}, "B": {"run": None, "step": None}}
    assert not shown.frame.locator(".panel[data-side=B]").is_visible()
    assert shown.frame.locator("table.stages tbody tr").count() == 1


def test_a_prediction_alone_has_one_lane(report: Any) -> None:
    runs = [made("planned", schedules.one_f_one_b(4, 4), measured=False), made("run", schedules.gpipe(4, 4))]
    shown = report(html_report(runs, [], {}))
    sides = {shown.state()["choice"][side]["run"]: side for side in "AB"}
    heights = {
        name: shown.frame.locator(f".panel[data-side={side}] .lanes").bounding_box()["height"]
        for name, side in sides.items()
    }
    assert heights["planned"] < heights["run"]
    assert "predicted" in shown.frame.locator(f".panel[data-side={sides['planned']}] .makespan").inner_text()


def test_a_large_step_is_drawn_with_few_boxes(report: Any) -> None:
    """Boxes below a pixel are merged: what a frame costs depends on the width of the page, not on the step."""
    count = """(() => {
        const kind = CanvasRenderingContext2D.prototype, fill = kind.fillRect;
        let boxes = 0;
        kind.fillRect = function (...where) { boxes += 1; return fill.apply(this, where); };
        view.redraw();
        kind.fillRect = fill;
        return boxes;
    })()"""
    boxes = {}
    for microbatches in (32, 256, 1024):
        runs = [made(f"{microbatches}", schedules.one_f_one_b(16, microbatches))]
        boxes[microbatches] = report(html_report(runs, [], {})).ask(count)
    assert boxes[32] < boxes[1024]
    lanes, pixels = 2 * 16, 900
    assert boxes[256] < lanes * pixels
    assert boxes[1024] < lanes * pixels
