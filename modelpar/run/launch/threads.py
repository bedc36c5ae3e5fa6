"""Ranks as threads of this process: for tests, notebooks and debuggers, and for several devices in one process."""

from __future__ import annotations

from pathlib import Path
from threading import RLock, Thread

from modelpar.run.transport import Mailbox, Routes, ThreadTransport
from modelpar.run.worker import Closed, Worker


class ThreadLaunch:
    """Starts one thread per rank."""

    def __init__(self, num_ranks: int, routes: Routes):
        self.mailbox = Mailbox(routes)
        self._mailboxes = [Mailbox() for _ in range(num_ranks)]
        self.transport = ThreadTransport(self._mailboxes, self.mailbox)
        self.lock = lock = RLock()  # one for all devices: a layer on any of them may draw from the CPU's generator
        self._workers = [Worker(rank, box, self.transport, lock) for rank, box in enumerate(self._mailboxes)]
        self._threads = [
            Thread(target=worker.serve, name=f"modelpar-rank{worker.rank}", daemon=True) for worker in self._workers
        ]
        for thread in self._threads:
            thread.start()

    def lost(self) -> dict[int, str]:
        """Returns nothing: a thread reports its own failures."""
        return {}

    def status(self, rank: int) -> str:
        """Says what a rank is doing."""
        return self._workers[rank].status()

    def log(self, rank: int) -> Path | None:
        """Returns nothing: what a thread logs and prints is said by the process."""
        return None

    def stop(self) -> None:
        """Waits for the threads."""
        for thread in self._threads:
            thread.join()

    def kill(self) -> None:
        """Ends every thread at its next wait; one that computes goes on until its action is done."""
        for mailbox in self._mailboxes:
            mailbox.close(Closed())

    def close(self) -> None:
        """Does nothing: threads hold nothing."""
