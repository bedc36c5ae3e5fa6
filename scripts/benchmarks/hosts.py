"""Processes that do what they are told: Host, which starts one, and what runs inside it.

A host makes one object and calls its methods on command, so that it is started once and then waits its turn. It ends
when its standard input is closed, so that nothing outlives the benchmark, however that ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, Self

SECONDS = 300.0
"""How long one command may take."""
_STOP_SECONDS = 10.0


class HostError(Exception):
    """Reports a host that failed, ended, or did not answer."""


class Host:
    """A process with one object in it, made by `make`, which is a context manager there.

    ::

        with Host(partial(Unsplit, 1)) as host:
            host.call("load", task)

    Entering starts the process; the first call waits for the object. So several hosts start at once. Whatever goes
    wrong in the process is raised here as HostError with its traceback.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]):
        self._make = make
        self._ready = False

    def __enter__(self) -> Self:
        self._connection, theirs = Pipe()
        # A session of its own, so that Ctrl-C reaches only this process, which then ends the others.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.hosts", str(theirs.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(search_path())},
            start_new_session=True,
        )
        theirs.close()
        self._connection.send(self._make)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.stop()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
        self._end()

    def stop(self) -> None:
        """Tells the process to end, without waiting, so that several can do so at once."""
        with suppress(OSError):
            self._connection.send(None)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the object and returns what it returned."""
        self.send(method, *arguments)
        return self.receive()

    def send(self, method: str, *arguments: Any) -> None:
        """Begins a call, for hosts that have to work together; `receive` ends it."""
        self._connection.send((method, arguments))

    def receive(self) -> Any:
        """Waits for the end of a call; raises HostError if it failed, or took longer than SECONDS."""
        if not self._ready:
            self._ready = True
            self.receive()
        if not self._connection.poll(SECONDS):
            raise HostError(f"a process of the benchmark did not answer for {SECONDS:g} s")
        try:
            failure, value = self._connection.recv()
        except (EOFError, OSError):
            code = self._process.wait()
            raise HostError(f"a process of the benchmark ended with exit code {code}; its output is above") from None
        if failure:
            raise HostError(f"a process of the benchmark failed:\n{failure}")
        return value

    def _end(self) -> None:
        assert self._process.stdin
        self._connection.close()
        self._process.stdin.close()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


def call_together(hosts: Sequence[Host], method: str, *arguments: Any) -> list[Any]:
    """Calls a method on several hosts at once and returns what each returned."""
    for host in hosts:
        host.send(method, *arguments)
    return [host.receive() for host in hosts]


def search_path() -> list[str]:
    """Returns where child processes find modelpar and these files: the checkout, before all else."""
    scripts = Path(__file__).resolve().parent.parent
    return [str(scripts), str(scripts.parent), *filter(None, [os.environ.get("PYTHONPATH")])]


def main() -> None:
    """Serves one host; the only argument is the number of the connection that it inherited."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_exit_with_parent, daemon=True).start()
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    try:
        with connection.recv()() as served:
            connection.send((None, None))
            while (command := connection.recv()) is not None:
                method, arguments = command
                connection.send((None, getattr(served, method)(*arguments)))
    except (EOFError, BrokenPipeError):
        pass
    except BaseException:
        with suppress(OSError):
            connection.send((traceback.format_exc(), None))
    sys.stderr.flush()
    os._exit(0)  # everything is closed, and taking torch apart takes long


def _exit_with_parent() -> None:
    while os.read(0, 1):  # past sys.stdin, whose lock would be held when the interpreter ends
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
