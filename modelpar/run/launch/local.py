"""Ranks as processes on this host, started by the controller and ended with it."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Event, Thread

import torch

from modelpar.errors import ConfigError, StartError
from modelpar.planning.doing import Doing, silent
from modelpar.run import cuda, rpc
from modelpar.run.channel import Channel, pair
from modelpar.run.notices import Notices, write_log
from modelpar.run.transport import CONTROLLER, Mailbox, Routes, Unreachable
from modelpar.run.worker import Worker

_START_SECONDS = 120
_LAST_WORDS_SECONDS = 1.0
"""How long ranks that were told to stop may take to say what they have not said yet."""

_log = logging.getLogger(__name__)


class ProcessLaunch:
    """Starts one fresh Python process per rank; they find each other over a loopback store.

    Fresh processes work from a notebook, from `__main__` and after CUDA was used; classes defined there travel by
    value. A worker's standard input is a pipe from the controller: when the controller ends, however it ends, so does
    the pipe, and the worker exits.

    With `logs`, a folder, each writes its standard output and error into a file of its own there; else they are those
    of the controller.
    """

    def __init__(
        self,
        num_ranks: int,
        routes: Routes,
        port: int,
        heartbeat_seconds: float,
        *,
        shared_memory: bool = True,
        cuda_ipc: bool = False,
        logs: Path | None = None,
        doing: Doing = silent,
    ):
        self._store, port = rpc.listen(port)
        rpc.require_no_group()
        self._logs = logs
        if logs is not None:
            _make(logs)
        ends = {rank: pair() for rank in (CONTROLLER, *range(num_ranks))} if shared_memory else {}
        ways = {rank: way for rank, (_, way) in ends.items()}
        self._channel = Channel(CONTROLLER, ends[CONTROLLER][0], ways) if shared_memory else None
        self.mailbox = Mailbox(routes, self._channel)
        group = secrets.token_hex(4)
        config = {"num_ranks": num_ranks, "group": group, "port": port, "path": sys.path}
        config |= {"heartbeat_seconds": heartbeat_seconds, "cuda_ipc": cuda_ipc}
        config |= {"log_level": logging.getLogger("modelpar").getEffectiveLevel()}
        with ExitStack() as files:
            paths = [self.log(rank) for rank in range(num_ranks)]
            outputs = [path and files.enter_context(path.open("ab")) for path in paths]
            # a new session, so that Ctrl-C reaches only the controller, which then ends the workers in order
            self._processes = [
                subprocess.Popen(
                    [sys.executable, "-c", "from modelpar.run.launch.local import main; main()"],
                    stdin=subprocess.PIPE,
                    stdout=outputs[rank],
                    stderr=outputs[rank],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                    start_new_session=True,
                    pass_fds=[end.fileno() for end in (*ways.values(), *ends.get(rank, ())[:1])],
                )
                for rank in range(num_ranks)
            ]
        try:
            for rank, process in enumerate(self._processes):
                receiving = ends[rank][0].detach() if shared_memory else None
                own = {"rank": rank, "receiving": receiving, "ways": {to: way.fileno() for to, way in ways.items()}}
                own |= {"log": str(paths[rank]) if logs else None}
                assert process.stdin
                process.stdin.write(json.dumps(config | own).encode() + b"\n")
                process.stdin.flush()
                if receiving is not None:
                    os.close(receiving)
            self._wait_until_ready(doing)
            self.transport = rpc.RpcTransport(CONTROLLER, num_ranks, group, port, self.mailbox, self._channel)
        except BaseException:
            self._end(signal.SIGKILL)
            self.close()
            raise

    def _wait_until_ready(self, doing: Doing) -> None:
        """Waits until all processes are about to join, watching them: the join itself could not be interrupted."""
        begun = time.monotonic()
        waiting = list(range(len(self._processes)))
        doing("starting the ranks", 0, len(waiting))
        while waiting:
            for rank in [rank for rank in waiting if self._store.check([f"ready/{rank}"])]:
                waiting.remove(rank)
                _log.debug("rank %d is ready, %.1f s after it was started", rank, time.monotonic() - begun)
                doing("starting the ranks", len(self._processes) - len(waiting), len(self._processes))
            if lost := self.lost():
                rank, how = next(iter(lost.items()))
                where = self.log(rank) or "its output above"
                raise StartError(f"rank {rank} {how} while starting; {where} says why")
            if time.monotonic() - begun > _START_SECONDS:
                raise StartError(f"the workers were not ready after {_START_SECONDS} s")
            time.sleep(0.01)

    def lost(self) -> dict[int, str]:
        """Returns the ranks whose process has ended."""
        codes = {rank: process.poll() for rank, process in enumerate(self._processes)}
        return {rank: _how(code) for rank, code in codes.items() if code is not None}

    def pid(self, rank: int) -> int:
        """Returns a rank's process id."""
        return self._processes[rank].pid

    def status(self, rank: int) -> None:
        """Returns nothing: a process says what it does in its heartbeats."""

    def log(self, rank: int) -> Path | None:
        """Returns the file with what a rank logged and printed, where there is a folder for them."""
        return self._logs / f"rank{rank}.log" if self._logs else None

    def stop(self) -> None:
        """Closes the pipes at whose end workers exit, waits until they have, and kills those that do not."""
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        for rank in range(len(self._processes)):
            self.mailbox.wait_for(("stopped", rank), deadline)
        for process in self._processes:
            assert process.stdin
            with suppress(OSError):
                process.stdin.close()
        deadline = time.monotonic() + 2
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.01, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """Kills all processes, and leaves the RPC group."""
        self._end(signal.SIGKILL)
        self.transport.close()

    def close(self) -> None:
        """Closes the channel."""
        if self._channel:
            self._channel.close()

    def _end(self, how: signal.Signals) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(how)
        for process in self._processes:
            process.wait()
            cuda.forget(process.pid)
            assert process.stdin
            with suppress(OSError):
                process.stdin.close()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"logs is {str(folder)!r}; the folder cannot be made: {error.strerror}") from error


def _how(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def main() -> None:
    """Runs one rank in a process of its own; `ProcessLaunch` starts it and tells it on standard input who it is."""
    config = json.loads(sys.stdin.readline())
    rank, num_ranks = config["rank"], config["num_ranks"]
    sys.path[:] = config["path"]
    write_log(config["log_level"], to_file=config["log"] is not None)
    faulthandler.enable()  # a crash in native code shows where Python was
    _log.info("rank %d of %d is process %d", rank, num_ranks, os.getpid())
    Thread(target=_exit_with_controller, daemon=True).start()
    ways = {int(to): socket.socket(fileno=number) for to, number in config["ways"].items()}
    channel = Channel(rank, socket.socket(fileno=config["receiving"]), ways) if ways else None
    mailbox = Mailbox(inbox=channel)
    rpc.connect(config["port"]).set(f"ready/{rank}", b"")
    group, port, cuda_ipc = config["group"], config["port"], config["cuda_ipc"]
    transport = rpc.RpcTransport(rank, num_ranks, group, port, mailbox, channel, cuda_ipc)
    notices = Notices(lambda level, text: transport.tell(("notice", rank), (level, text)), config["log"])
    logging.getLogger().addHandler(notices)
    worker = Worker(rank, mailbox, transport)
    _warm_up()
    beat = (transport, rank, worker.status, notices, config["heartbeat_seconds"])
    Thread(target=_beat, args=beat, daemon=True).start()
    if worker.serve():
        notices.finish()
        with suppress(Unreachable):
            transport.send(CONTROLLER, ("stopped", rank), None)
    Event().wait()  # for the pipe from the controller to be closed


def _exit_with_controller() -> None:
    """Ends this process when its pipe from the controller is closed, whatever it is doing."""
    while os.read(sys.stdin.fileno(), 4096):  # sys.stdin itself would be locked when the interpreter ends
        pass
    sys.stdout.flush()
    sys.stderr.flush()
    cuda.forget(os.getpid())
    os._exit(0)


def _warm_up() -> None:
    """Uses autograd and an optimizer once: the first use loads code (some 80 MB), for which no step should pay."""
    parameter = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = torch.optim.SGD([parameter])
    (parameter @ parameter).sum().backward()
    optimizer.step()


def _beat(transport: rpc.RpcTransport, rank: int, status: Callable[[], str], notices: Notices, every: float) -> None:
    """Tells the controller again and again that this rank lives, and what it is doing."""
    while True:
        with suppress(RuntimeError):
            transport.tell(("heartbeat", rank), status())
        notices.count(time.monotonic())
        time.sleep(every)
