"""One rank's traffic in a run of a batch: Exchange, which takes and gives values and notes what happened when."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch

from modelpar.planning.graph import BATCH
from modelpar.planning.schedule import Action, ValueKey
from modelpar.planning.timeline import Span
from modelpar.run import cuda, wire
from modelpar.run.clock import clock_of, merge
from modelpar.run.transport import CONTROLLER, Mailbox, Transport


class Exchange:
    """Moves values between a rank's mailbox, its computations and other ranks, for one run at a time."""

    def __init__(
        self, rank: int, placement: tuple[int, ...], mailbox: Mailbox, transport: Transport, device: torch.device
    ):
        self.rank = rank
        self.doing: tuple[Action | None, ValueKey | None] = (None, None)
        """The current action and the value it waits for, for messages to people."""
        self.spans: list[Span] = []
        """What the rank has done in this run, so far, by the host's clock."""
        self._clock = clock_of(device)
        self._computed: list[tuple[Any, Any, Span]] = []
        """What a CUDA device was given to do in this run: a mark before and one behind, and the span without times."""
        self._placement, self._device = placement, device
        self._mailbox, self._transport = mailbox, transport
        self._run = -1
        self._idle_since = perf_counter()

    def begin(self, run: int, data_wait: float = 0.0) -> None:
        """Starts a run.

        `data_wait` is how long (seconds) the controller waited for the batch, ending now; as far as this rank was idle
        meanwhile the timeline shows it.
        """
        self._run, self.spans, self._computed = run, [], []
        if self._clock:
            self._clock.begin()
        now = perf_counter()
        idle = min(data_wait, now - self._idle_since)
        if idle > 0:
            self.spans.append(Span(self.rank, "data", now - idle, now, cause="the next batch"))

    def take(self, key: ValueKey, action: Action) -> Any:
        """Takes a value that an action needs; a wait for it becomes a span, named by the value."""
        if not self._mailbox.has((self._run, key)):
            self.doing = (action, key)
            start = perf_counter()
            value = self._mailbox.wait((self._run, key))
            self.note("data" if key.source == BATCH else "wait", start, action, cause=str(key))
            self.doing = (action, None)
        else:
            value = self._mailbox.wait((self._run, key))
        if self._clock is None:
            return wire.unpack(value, self._device)
        kind, start = "wait" if cuda.waits_for_events(value) else "receive", self.mark()
        value = wire.unpack(value, self._device)
        self.computed(kind, start, action, cause=str(key))
        return value

    def give(self, key: ValueKey, value: Any) -> None:
        """Sends a value to the rank of the stage that needs it."""
        rank = CONTROLLER if key.target == BATCH else self._placement[key.target]
        if rank == self.rank:
            self._mailbox.put((self._run, key), wire.detach(value))
        else:
            self._transport.give(rank, (self._run, key), value)

    def mark(self) -> Any:
        """Marks where a computation begins, for `computed`."""
        return self._clock.mark() if self._clock else perf_counter()

    def computed(self, kind: str, start: Any, action: Action | None = None, cause: str = "") -> float:
        """Records a computation from a mark until here, on CUDA as the device does it; returns now."""
        if self._clock is None:
            return self.note(kind, start, action, cause)
        stage, microbatch = (action.stage, action.microbatch) if action else (-1, -1)
        span = Span(self.rank, kind, 0.0, 0.0, stage, microbatch, cause)
        self._computed.append((start, self._clock.mark(), span))
        return perf_counter()

    def timeline(self) -> list[Span]:
        """Returns the rank's spans of this run, none of which overlap; on CUDA waits for the device."""
        if self._clock is None:
            return self.spans
        seconds = self._clock.seconds
        on_device = [span._replace(start=seconds(start), end=seconds(end)) for start, end, span in self._computed]
        return merge(on_device, self.spans)

    def note(self, kind: str, start: float, action: Action | None = None, cause: str = "") -> float:
        """Records a span from start until now; returns now."""
        now = perf_counter()
        stage, microbatch = (action.stage, action.microbatch) if action else (-1, -1)
        self.spans.append(Span(self.rank, kind, start, now, stage, microbatch, cause))
        return now

    def note_around(self, kind: str, start: float) -> float:
        """Records as one kind what was done since start, in pieces between the waits noted meanwhile; returns now."""
        now = perf_counter()
        waits = [span for span in self.spans if span.start >= start]
        edges = [start, *(edge for span in waits for edge in (span.start, span.end)), now]
        pieces = zip(edges[::2], edges[1::2], strict=True)
        self.spans += [Span(self.rank, kind, begin, end) for begin, end in pieces if end > begin]
        return now

    def skip(self, run: int) -> None:
        """Drops what arrives for a run that will not take place."""
        self._mailbox.discard(run)

    def end(self) -> None:
        """Waits until everything sent has arrived, and checks that everything that arrived was taken."""
        self.doing = (None, None)
        self._transport.flush()
        self._idle_since = perf_counter()
        left = self._mailbox.left(self._run)
        assert not left, f"rank {self.rank} ended a run without taking {left}"
