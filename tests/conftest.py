"""Workers shared by the whole session, and fresh Python processes for what kills its own."""

import logging
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from modelpar.run.workers import Workers

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)
# a test's TensorBoard goes on reading in a thread; what it says of that would be in what later commands print
logging.getLogger("tensorboard").setLevel(logging.WARNING)


@pytest.fixture(scope="session", autouse=True)
def cache_folder():
    """Keeps what is measured for this session only, also in processes that tests start."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", folder)
        yield Path(folder)


class Shared:
    """Four ranks for the session; started when first asked for, and again after a test has failed with them."""

    def __init__(self, transport):
        self._transport, self._exits, self._workers = transport, ExitStack(), None

    def get(self):
        if self._workers is None or self._workers._error is not None:
            self.close()
            self._workers = self._exits.enter_context(Workers(4, transport=self._transport))
        return self._workers

    def close(self):
        self._exits.close()
        self._workers = None


@pytest.fixture(scope="session")
def shared_workers():
    shared = {transport: Shared(transport) for transport in ("threads", "rpc")}
    yield shared
    for each in shared.values():
        each.close()


@pytest.fixture(params=["threads", "rpc"])
def workers(request, shared_workers):
    """Four ranks: as threads, then as processes."""
    return shared_workers[request.param].get()


@contextmanager
def interruptible():
    """Lets processes started inside hear Ctrl-C, also where the tests are a background job, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def start_script(tmp_path_factory):
    """Starts Python source as a script of its own, as a user would; warnings are errors in it. Ended with the tests."""
    folder, started = tmp_path_factory.mktemp("scripts"), []

    def start(source: str) -> subprocess.Popen:
        path = folder / f"script{len(started)}.py"
        path.write_text(dedent(source))
        paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        with interruptible():
            process = subprocess.Popen(
                [sys.executable, "-W", "error", str(path)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
