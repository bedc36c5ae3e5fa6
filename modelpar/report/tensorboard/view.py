"""Starts TensorBoard on runs: `view`."""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from tensorboard import program

from modelpar.errors import ConfigError
from modelpar.report.tensorboard.names import PLUGIN
from modelpar.report.tensorboard.plugin import PipelinePlugin


def view(paths: Sequence[str], port: int | None = None, host: str = "127.0.0.1") -> None:
    """Starts TensorBoard on a run, a folder of runs, or several of either; prints its URL and blocks until Ctrl-C.

    Port 0 or None picks a free one. Raises ConfigError where a path holds no event file, or the port is taken.
    """
    where = logdir_arguments(paths)
    from tensorboard import default  # imports all of TensorBoard's plugins, which takes a second

    plugins = default.get_plugins()
    if PipelinePlugin not in plugins:  # modelpar was not installed, or before it had the tab
        plugins.append(PipelinePlugin)
    server = program.TensorBoard(plugins)
    # One process, one thread for loading: the Rust data server would be a child to look after.
    options = [
        "--reload_multifile=true",
        "--load_fast=false",
        "--reload_interval=2",
        f"--samples_per_plugin={PLUGIN}=0",
    ]
    server.configure(argv=["tensorboard", *where, *options, f"--host={host}", f"--port={port or 0}"])
    try:
        url = server.launch()
    except program.TensorBoardServerException as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"TensorBoard cannot listen on {host}:{port or 0}: {message}") from error
    print(f"TensorBoard shows {', '.join(paths)} at {url}\nCtrl-C ends it", flush=True)
    wait_for_interrupt()


def wait_for_interrupt() -> None:
    """Blocks until Ctrl-C or SIGTERM; what is ignored, as Ctrl-C in a background job, stays so."""
    stop = threading.Event()
    heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in heard}
    try:
        stop.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def logdir_arguments(paths: Sequence[str]) -> list[str]:
    """Returns TensorBoard's arguments that name the runs: one logdir, or several with a name each.

    Raises ConfigError where there is no path, or one does not exist or holds no event file at any depth.
    """
    named = run_folders(paths)
    if len(named) == 1 and (named[0][0] is None or "," in named[0][1]):
        return [f"--logdir={named[0][1]}"]
    for _, folder in named:
        if "," in folder:
            raise ConfigError(f"{folder} has a comma in its name, which TensorBoard cannot take among several paths")
    return [f"--logdir_spec={','.join(f'{name}:{folder}' for name, folder in named)}"]


def run_folders(paths: Sequence[str]) -> list[tuple[str | None, str]]:
    """Returns each folder once, absolute, with the name that its runs go by: None where their own names are enough.

    Raises ConfigError as `logdir_arguments` does.
    """
    if not paths:
        raise ConfigError("no path to view; expected a run or a folder of runs")
    for path in paths:
        if not os.path.exists(path):
            raise ConfigError(f"{path} does not exist; expected a run or a folder of runs")
        if not os.path.isdir(path):
            raise ConfigError(f"{path} is a file; expected the folder of a run, or a folder of runs")
        if not _has_event_file(path):
            raise ConfigError(f"{path} holds no TensorBoard event file (events.out.tfevents.*) at any depth")
    folders = list(dict.fromkeys(os.path.abspath(path) for path in paths))
    common = Path(os.path.commonpath(folders))
    if len(folders) == 1:
        if not any("tfevents" in name for name in os.listdir(common)):
            return [(None, str(common))]
        common = common.parent  # a single run given without a name would be called "."
    named: list[tuple[str | None, str]] = []
    for folder in folders:
        # TensorBoard splits its list at commas and names at the first colon, so that names may hold neither
        relative = Path(folder).relative_to(common).as_posix()
        name = re.sub(r"[,:]", "_", common.name if relative == "." else relative)
        taken = {name for name, _ in named}
        named.append((next(free for free in _numbered(name) if free not in taken), folder))
    return named


def _numbered(name: str) -> Iterator[str]:
    """Yields a name, and then that with numbers behind it."""
    return itertools.chain([name], (f"{name}-{number}" for number in itertools.count(1)))


def _has_event_file(path: str) -> bool:
    return any("tfevents" in name for _, _, names in os.walk(path) for name in names)
