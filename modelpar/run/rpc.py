"""The only file that imports torch.distributed.rpc: the transport between processes.

A message is one `rpc_async` of `_deliver`, which puts the value into the receiver's mailbox and returns None. It takes
half a millisecond of CPU time, whatever its size, so that the values of a run take a `Channel` where there is one.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch.distributed import TCPStore, rpc
from torch.distributed.rendezvous import register_rendezvous_handler

from modelpar.errors import ConfigError, RunError
from modelpar.run import cuda, wire
from modelpar.run.channel import Channel
from modelpar.run.clocks import read_clock
from modelpar.run.transport import CONTROLLER, Mailbox, Unreachable

HOST = "127.0.0.1"
_START_SECONDS = 300
_ERROR = 2
"""The C++ log level above warnings."""
_NEVER = 0.0
"""No time-out: a lost process is found by its supervisor, not by a slow message."""

_mailbox: Mailbox | None = None
"""The mailbox of this process. RPC calls plain functions, which must find it here; a process has one agent anyway."""


def _deliver(key: tuple[Any, ...], value: Any) -> None:
    if _mailbox is not None:
        _mailbox.put(key, value)


def require_no_group() -> None:
    """Raises RunError where this process already is part of a group: RPC allows one per process."""
    if _mailbox is not None:
        raise RunError(
            "this process already has workers over RPC; expected one `Workers` at a time: leave its block first"
        )


def listen(port: int) -> tuple[TCPStore, int]:
    """Opens the store through which processes find each other, on the loopback interface only.

    Returns the store and its port; port 0 picks a free one. Raises ConfigError where the port is in use.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"port {port} cannot be used: {error.strerror}; expected a free port, or 0 to pick one"
        ) from error
    port = listener.getsockname()[1]
    listener.listen()
    return _store(port, is_master=True, master_listen_fd=listener.detach()), port


def connect(port: int) -> TCPStore:
    """Joins the store that the controller opened."""
    return _store(port, is_master=False)


def _store(port: int, **options: Any) -> TCPStore:
    return TCPStore(HOST, port, timeout=timedelta(seconds=_START_SECONDS), wait_for_workers=False, **options)


def _rendezvous(url: str, **_: Any) -> Iterator[tuple[Any, int, int]]:
    """Serves `modelpar://host:port/number/size`: torch's own tcp:// handler would listen on all interfaces."""
    rank, size = (int(part) for part in urlparse(url).path.strip("/").split("/"))
    port = urlparse(url).port
    assert port is not None
    yield connect(port), rank, size


register_rendezvous_handler("modelpar", _rendezvous)


class RpcTransport:
    """Carries values between processes over TensorPipe; joins on creation, which waits for all other processes."""

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        group: str,
        port: int,
        mailbox: Mailbox,
        channel: Channel | None = None,
        cuda_ipc: bool = False,
    ):
        global _mailbox
        require_no_group()
        self._channel = channel
        self._shares = cuda_ipc and rank != CONTROLLER
        """Whether CUDA tensors stay on the device on their way to another rank."""
        self._group = group
        """Part of all names: RPC counts what was done under a name, which a new process would never catch up with."""
        self._log_level = _set_log_level(_ERROR)
        self._pending: deque[torch.futures.Future[None]] = deque()
        _mailbox = mailbox
        size, number = num_ranks + 1, rank + 1  # the controller is number 0
        options = rpc.TensorPipeRpcBackendOptions(
            num_worker_threads=4,
            rpc_timeout=_START_SECONDS,
            init_method=f"modelpar://{HOST}:{port}/{number}/{size}",
            _transports=["uv"],  # the shm transport polls: a core per idle process
            _channels=["cma", "basic"],
        )
        try:
            rpc._init_counter = 0  # type: ignore[attr-defined]  # a prefix of all keys: new processes start there too
            with _loopback(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*[Gg]loo.*")
                rpc.init_rpc(self._name(rank), rank=number, world_size=size, rpc_backend_options=options)
        except BaseException:
            _mailbox = None
            _set_log_level(self._log_level)
            raise

    def send(self, to: int, key: tuple[Any, ...], value: Any) -> None:
        """Starts sending; see `Transport.send`."""
        while self._pending and self._pending[0].done():
            self._check(self._pending.popleft())
        try:
            self._pending.append(rpc.rpc_async(self._name(to), _deliver, (key, value), timeout=_NEVER))
        except RuntimeError as error:
            raise Unreachable(f"cannot reach {self._name(to)}: {error}") from error

    def give(self, to: int, key: tuple[Any, ...], value: Any) -> None:
        """Hands over a value of a run; see `Transport.give`."""
        value = cuda.shared(value) if self._shares and to != CONTROLLER else cuda.staged(value)
        if self._channel:
            self._channel.send(to, key, value)
        else:
            self.send(to, key, wire.pack(value))

    def tell(self, key: tuple[Any, ...], value: Any) -> torch.futures.Future[None]:
        """Sends something to the controller from any thread, without looking after it; returns what ends with it."""
        return rpc.rpc_async(self._name(CONTROLLER), _deliver, (key, value), timeout=_NEVER)

    def flush(self) -> None:
        """Waits for all sends; see `Transport.flush`."""
        while self._pending:
            self._check(self._pending.popleft())
        if self._channel:
            self._channel.flush()

    def read_clock(self, rank: int) -> tuple[str, float]:
        """Asks a rank for its clock; see `Transport.read_clock`."""
        try:
            return rpc.rpc_sync(self._name(rank), read_clock, timeout=_NEVER)  # type: ignore[no-any-return]
        except RuntimeError as error:
            raise Unreachable(f"{self._name(rank)} did not say what its clock shows: {error}") from error

    @staticmethod
    def _check(future: torch.futures.Future[None]) -> None:
        try:
            future.wait()
        except RuntimeError as error:
            raise Unreachable(f"a message was not delivered: {error}") from error

    def _name(self, rank: int) -> str:
        return f"controller-{self._group}" if rank == CONTROLLER else f"rank{rank}-{self._group}"

    def close(self) -> None:
        """Leaves without waiting for the others, which should have ended.

        A graceful shutdown would wait for them under keys that it numbers per process, so that a second group of this
        process would never find its new workers.
        """
        global _mailbox
        _mailbox = None
        rpc.shutdown(graceful=False)
        _set_log_level(self._log_level)


def _set_log_level(level: int) -> int:
    """Sets torch's C++ log level and returns the one before.

    TensorPipe warns of every peer that goes, in a process that has done nothing wrong; the supervisor says why it went.
    Torch reads the level from TORCH_CPP_LOG_LEVEL when it is imported and has no other switch.
    """
    suffix = "dylib" if sys.platform == "darwin" else "so"
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libc10.{suffix}"))
        flag = ctypes.c_int.in_dll(library, "FLAGS_caffe2_log_level")
    except (OSError, ValueError):  # another build of torch: then it warns
        return level
    before, flag.value = flag.value, level
    return before


@contextmanager
def _loopback() -> Iterator[None]:
    """Binds TensorPipe and gloo to the loopback interface while they start."""
    names = ("TP_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "lo"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
