"""A real browser for tests of the Pipeline view: headless Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTH, HEIGHT = 1280, 1000
HANDLE = "document.querySelector('.modelpar-pipeline').pipelineView"


@contextmanager
def chromium() -> Iterator[Any]:
    """Starts the browser; skips the test where Playwright or Chromium is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium; expected the system's package (Debian: apt install chromium)")
    with playwright.sync_playwright() as started:
        # without a sandbox, as root cannot have one
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Shown:
    """A page with the view in it, or in a frame of it; notes all that goes wrong and all that it asks for."""

    def __init__(self, browser: Any, scheme: str = "light") -> None:
        size = {"width": WIDTH, "height": HEIGHT}
        self.context = browser.new_context(viewport=size, color_scheme=scheme)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda said: said.type == "error" and self.errors.append(said.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("requestfailed", lambda request: self.errors.append(f"failed: {request.url}"))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.frame = self.page

    def open(self, url: str) -> Shown:
        """Opens a page with the view and waits until it is there."""
        self.page.goto(url)
        if url.startswith("http"):
            self.page.wait_for_selector("iframe", timeout=60_000)
            deadline = time.monotonic() + 60
            while not (found := [frame for frame in self.page.frames if "plugin_entry" in frame.url]):
                assert time.monotonic() < deadline, "the iframe has no address"
                self.page.wait_for_timeout(10)
            self.frame = found[0]
        self.wait("document.querySelector('.modelpar-pipeline')?.pipelineView")
        self.settle()
        return self

    def close(self) -> None:
        self.context.close()

    def ask(self, expression: str) -> Any:
        """Evaluates JavaScript; `view` is the handle that the view leaves for tests."""
        return self.frame.evaluate(f"() => {{ const view = {HANDLE}; return {expression}; }}")

    def wait(self, expression: str) -> None:
        """Waits until JavaScript is true; Playwright's own way is forbidden by the report's content policy."""
        deadline = time.monotonic() + 60
        while not self.frame.evaluate(f"() => Boolean({expression})"):
            assert time.monotonic() < deadline, expression
            self.page.wait_for_timeout(10)

    def settle(self) -> None:
        """Waits until what was asked for is fetched and drawn."""
        self.wait(f"{HANDLE}.settled")

    def state(self) -> dict[str, Any]:
        """Returns what is shown: choice, view (seconds), followed, hovered, measure, critical, dark."""
        self.settle()
        return self.ask("JSON.parse(JSON.stringify(view.state))")

    def place(self, side: str, rank: int, index: int, lane: str = "spans") -> tuple[float, float]:
        """Returns where the middle of a box is, from the corner of the whole page."""
        found = self.ask(f"view.where('{side}', {rank}, {index}, '{lane}')")
        left, top = self._corner()
        return found["x"] + left, found["y"] + top

    def point(self, side: str, rank: int, index: int, lane: str = "spans") -> None:
        """Moves the mouse onto a box."""
        self.page.mouse.move(*self.place(side, rank, index, lane))
        self.settle()

    def press(self, *keys: str) -> dict[str, Any]:
        """Presses keys, one after the other, with the pointer over the page; returns the state after them."""
        if not self.frame.evaluate("document.hasFocus()"):
            self.page.mouse.move(WIDTH / 2, HEIGHT - 2)
        for key in keys:
            self.page.keyboard.press(key)
            self.settle()
        return self.state()

    def colour(self, side: str, x: float, y: float, layer: str = "base") -> list[int]:
        """Returns the red, green, blue and alpha that a canvas has at a place given from the corner of the page."""
        self.settle()
        left, top = self._corner()
        return self.frame.evaluate(
            """([side, layer, x, y]) => {
                const canvas = document.querySelector(`.panel[data-side=${side}] canvas.${layer}`);
                const box = canvas.getBoundingClientRect();
                return [...canvas.getContext("2d").getImageData(x - box.left, y - box.top, 1, 1).data];
            }""",
            [side, layer, x - left, y - top],
        )

    def _corner(self) -> tuple[float, float]:
        if self.frame == self.page:
            return 0.0, 0.0
        box = self.frame.frame_element().bounding_box()
        return box["x"], box["y"]
