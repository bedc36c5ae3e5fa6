"""Values between processes of one host: Channel. Their bytes lie in shared memory, a datagram says where.

A message of torch's RPC takes half a millisecond of CPU time, a datagram a few hundredths; and the executor that waits
for it is woken by the kernel itself, not by another thread of its process::

    sender      tensor ──copy──▶ slot of its pool
                datagram (key, slot, the receiver's slots that are free again) ──▶ the receiver's socket
    receiver    datagram ──▶ tensor in the sender's slot, no copy; the slot is free again when the tensor is gone

Every process has one socket on which it receives; all others hold the other end. They are inherited, and have no name.
"""

from __future__ import annotations

import array
import pickle
import select
import socket
import struct
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from modelpar.planning.edges import in_datagram
from modelpar.run import wire
from modelpar.run.layout import ALIGNMENT
from modelpar.run.pool import Bytes, Pool, Slot, Views
from modelpar.run.transport import Key, Unreachable

_MOST_BYTES = 32 * 1024
"""The longest message that travels in a datagram."""
_MOST_RELEASED = 512
"""How many slots one message releases; the rest waits for the next one."""
_MOST_HELD = 8
"""How many of another process's free slots are kept back for the next value that goes there."""
_RING = b"!"
_HEAD = struct.Struct("iiii")
"""How a datagram begins: the sender, whether its message lies in shared memory, the slabs whose descriptors it has."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Returns the two ends of a process's way in: where it receives, and what all others send to."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)


class Channel:
    """This process's inbox, and its ways to the other processes of this host.

    `put` may be called from any thread, all else only from the one that takes values.
    """

    def __init__(self, number: int, receiving: socket.socket, ways: Mapping[int, socket.socket]):
        """Takes this process's address, its socket, and what to send to by address, its own included."""
        self._number, self._receiving, self._ways = number, receiving, ways
        self._pool = Pool()
        self._known = {to: set[int]() for to in ways}
        """The slabs of this process that each of the others has mapped."""
        self._freed = {sender: deque[Slot]() for sender in ways}
        """Slots of the others that they do not know to be free yet."""
        self._views = {sender: Views(freed.append) for sender, freed in self._freed.items()}
        self._arrived: SimpleQueue[tuple[Key, Any]] = SimpleQueue()
        """What other threads of this process put, and what arrived while this one was sending."""
        self._buffer = memoryview(bytearray(_HEAD.size + _MOST_BYTES))
        self._ancillary = socket.CMSG_SPACE(2 * array.array("i").itemsize)
        for way in ways.values():
            way.setblocking(False)

    def put(self, key: Key, value: Any) -> None:
        """Adds an arrival from a thread of this process; see `Inbox.put`."""
        self._arrived.put((key, value))
        try:
            self._ways[self._number].send(_RING)
        except BlockingIOError:  # so full that the taker will not sleep
            return

    def get(self, timeout: float | None) -> tuple[Key, Any] | None:
        """Returns the next arrival; see `Inbox.get`."""
        while True:
            try:
                return self._arrived.get_nowait()
            except Empty:
                pass
            if timeout and not select.select([self._receiving], [], [], timeout)[0]:
                return None
            try:
                self._receive(0 if timeout is None else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None

    def send(self, to: int, key: Key, value: Any) -> None:
        """Sends a value; raises Unreachable where the process is gone."""
        data, windows = wire.dumps((key, value))
        bounds, end = [], 0
        for window in windows:
            begin = -(-end // ALIGNMENT) * ALIGNMENT
            end = begin + window.nbytes
            bounds.append((begin, end))
        slot, memory = (None, np.empty(end, np.uint8)) if in_datagram(end) else self._take(end)
        for (begin, stop), window in zip(bounds, windows, strict=True):
            memory[begin:stop] = window
        self._post(to, data, bounds, slot or memory.tobytes())

    def flush(self) -> None:
        """Tells the others which of their slots are free again."""
        for to, freed in self._freed.items():
            while freed:
                self._post(to, b"", [], b"")

    def close(self) -> None:
        """Closes the sockets and the pool."""
        for end in (self._receiving, *self._ways.values()):
            end.close()
        self._pool.close()

    def _take(self, num_bytes: int) -> tuple[Slot, Bytes]:
        """Returns a slot of the pool, which grows only where none has been released, as far as was told yet."""
        with suppress(BlockingIOError):
            while not self._pool.has_free(num_bytes):
                self._receive(socket.MSG_DONTWAIT, sending=True)
        return self._pool.take(num_bytes)

    def _post(self, to: int, data: bytes, bounds: list[tuple[int, int]], place: Slot | bytes) -> None:
        freed = self._freed[to]
        released = [freed.popleft() for _ in range(min(len(freed), _MOST_RELEASED))]
        slots = [place] if isinstance(place, Slot) else []
        message = pickle.dumps((data, bounds, place, released), 5)
        long = len(message) > _MOST_BYTES
        if long:  # it lies in shared memory itself
            slot, memory = self._take(len(message))
            memory[:] = np.frombuffer(message, np.uint8)
            message = pickle.dumps((slot, [(0, len(message))]), 5)
            slots.append(slot)
        new = list({slot.slab for slot in slots} - self._known[to])
        self._known[to].update(new)
        rights = []
        if new:
            descriptors = array.array("i", [self._pool.descriptor(slab) for slab in new])
            rights.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors))
        self._put(to, [_HEAD.pack(self._number, long, *[*new, -1, -1][:2]), message], rights)

    def _put(self, to: int, datagram: list[bytes], rights: list[Any]) -> None:
        way = self._ways[to]
        while True:
            try:
                way.sendmsg(datagram, rights)
                return
            except BlockingIOError:  # its socket is full; it may be waiting for this process to take something, too
                if select.select([self._receiving], [way], [])[0]:
                    self._receive(0, sending=True)
            except OSError as error:
                raise Unreachable(f"a value was not delivered: {error}") from error

    def _receive(self, flags: int, sending: bool = False) -> None:
        """Takes the next datagram from the socket, and queues the value that came with it."""
        length, ancillary, _, _ = self._receiving.recvmsg_into([self._buffer], self._ancillary, flags)
        if length == len(_RING):
            return
        sender, long, *new = _HEAD.unpack_from(self._buffer)
        message = self._buffer[_HEAD.size : length]
        views = self._views[sender]
        for _, _, descriptors in ancillary:
            for slab, descriptor in zip(new, array.array("i", descriptors), strict=False):
                views.open(slab, descriptor)
        if long:
            message = views.windows(*pickle.loads(message))[0].data
        data, bounds, place, released = pickle.loads(message)
        for slot in released:
            self._pool.give_back(slot)
        if isinstance(place, Slot):
            windows: list[Bytes] = views.windows(place, bounds)
        else:
            memory = wire.aligned(place)
            windows = [memory[begin:end] for begin, end in bounds]
        if data:
            self._arrived.put(wire.loads(data, windows))
        if len(self._freed[sender]) > _MOST_HELD and not sending:
            self._post(sender, b"", [], b"")
