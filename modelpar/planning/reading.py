"""How an example batch was read: Reading, which of its parts count samples and which are one for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """Parts of a batch by name, such as "inputs.0", "inputs.mask", "targets".

    Later batches are read in the same way, so that a part whose length happens to be that of a batch is not cut.
    """

    samples: tuple[str, ...] = ()
    """Those with one entry per sample."""
    shared: tuple[str, ...] = ()
    """Those that every micro-batch gets whole."""

    def to_json(self) -> dict[str, list[str]]:
        """Returns plain data for json."""
        return {"samples": list(self.samples), "shared": list(self.shared)}

    @classmethod
    def from_json(cls, data: Mapping[str, Sequence[str]]) -> Reading:
        """Reads what `to_json` wrote."""
        return cls(tuple(data.get("samples", ())), tuple(data.get("shared", ())))
