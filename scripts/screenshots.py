"""Takes pictures of the Pipeline tab, in TensorBoard, on real runs; scripts/screenshots runs this.

A GPT in 4 stages is trained with two partitions and two schedules (`modelpar compare`). The pictures compare the two
partitions with 1F1B.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Frame, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
SIZE = {"width": 1280, "height": 1020}
COMPARE = [
    *("model.depth=8", "pipeline.num_ranks=4", "pipeline.num_microbatches=8", "pipeline.num_threads=1"),
    *("partition=optimal,uniform", "schedule=1f1b,gpipe", "comparison.steps=6"),
]
A, B = "optimal_1f1b", "uniform_1f1b"
"""The runs that are compared, by the ends of their names."""
HANDLE = "document.querySelector('.modelpar-pipeline').pipelineView"


def main(words: Sequence[str] | None = None) -> int:
    """Makes the runs, unless told where they are, and takes the pictures; returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/screenshots", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="runs of an earlier call (default: makes them)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the runs are made (default: not kept)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", default=ROOT / "docs" / "images")
    parser.add_argument("--width", type=int, default=SIZE["width"], help="of the window, in pixels")
    arguments = parser.parse_args(words)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        print("screenshots: there is no chromium; expected the system's package", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        runs = arguments.runs or arguments.keep or Path(scratch)
        if arguments.runs is None:
            modelpar("compare", *COMPARE, f"output.folder={runs}", "output.name=gpt").wait()
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with tensorboard(runs) as url:
            for name, scheme, follow in (
                ("pipeline", "light", False),
                ("pipeline-dark", "dark", False),
                ("pipeline-follow", "light", True),
            ):
                page = browser.new_page(viewport=SIZE | {"width": arguments.width}, color_scheme=scheme)
                frame = opened(page, url)
                if follow:
                    point_at_a_forward(page, frame)
                save(page.screenshot(), arguments.output / f"{name}.png")
                page.close()
        browser.close()
    return 0


def modelpar(*words: str, **options: Any) -> subprocess.Popen[str]:
    """Starts a command of modelpar."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, "-m", "modelpar.cli", *words], env=environment, text=True, **options)


@contextmanager
def tensorboard(runs: Path) -> Iterator[str]:
    """Runs `modelpar view`; yields its URL."""
    with modelpar("view", str(runs), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split(" at ")[-1].strip()
        finally:
            process.terminate()


def opened(page: Page, url: str) -> Frame:
    """Opens the tab, waits for the runs, and chooses A and B."""
    page.goto(f"{url}#modelpar")
    page.wait_for_selector("iframe")
    frame = next(frame for frame in page.frames if "plugin_entry" in frame.url)
    for side, name in (("A", A), ("B", B)):
        frame.wait_for_selector(f"tr[data-run$='{name}']", timeout=60_000)
        frame.click(f"tr[data-run$='{name}'] .pick.side-{side}")
    page.mouse.move(SIZE["width"] / 2, 4)
    settle(frame)
    frame.evaluate("document.activeElement.blur()")
    return frame


def point_at_a_forward(page: Page, frame: Frame) -> None:
    """Moves the mouse onto the forward of micro-batch 3 of the last stage in A, below which there is room."""
    spans = frame.evaluate(f"{HANDLE}.trace('A').ranks[3].spans")
    index = next(i for i, span in enumerate(spans) if span[0] == "F" and span[4] == 3)
    at = frame.evaluate(f"{HANDLE}.where('A', 3, {index})")
    corner = frame.frame_element().bounding_box()
    assert corner is not None
    page.mouse.move(corner["x"] + at["x"], corner["y"] + at["y"])
    settle(frame)


def settle(frame: Frame) -> None:
    """Waits until all is fetched and drawn."""
    frame.wait_for_function(f"{HANDLE}.settled")
    frame.wait_for_timeout(300)


def save(picture: bytes, path: Path) -> None:
    """Writes a picture, as small as PNG gets."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.save(path, optimize=True)
    print(f"{path}: {image.width} × {image.height}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    sys.exit(main())
