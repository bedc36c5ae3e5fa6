"""What a launch is: started ranks that can be reached, watched and stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from modelpar.run.transport import Mailbox, Transport


class Launch(Protocol):
    """Ranks that were started together."""

    transport: Transport
    """The controller's way to the ranks."""
    mailbox: Mailbox
    """What ranks send to the controller."""

    def lost(self) -> dict[int, str]:
        """Returns the ranks that have ended, each with how."""

    def status(self, rank: int) -> str | None:
        """Says what a rank is doing, where that can be seen from here."""

    def log(self, rank: int) -> Path | None:
        """Returns the file with what a rank logged and printed, where it has one of its own."""

    def stop(self) -> None:
        """Waits for ranks that were told to stop to end."""

    def kill(self) -> None:
        """Ends all ranks at once; the mailbox stays open, since somebody may be waiting."""

    def close(self) -> None:
        """Frees what is left, when nobody waits any more."""
