"""What measured times depend on besides the model: Setting, the ranks and the machine they run on."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Setting:
    """The ranks that something is measured on."""

    devices: tuple[str, ...]
    num_threads: int
    transport: str
    shared_memory: bool = True
    cuda_ipc: bool = False
    """As for `Workers`, all three."""

    @property
    def num_ranks(self) -> int:
        """How many ranks are busy at once."""
        return len(self.devices)

    def key(self) -> dict[str, Any]:
        """Returns, as plain data, the setting and what it runs on: processor, cores, torch, and our own code."""
        return {
            "devices": [_device_name(device) for device in self.devices],
            "num_threads": self.num_threads,
            "transport": [self.transport, self.shared_memory, self.cuda_ipc],
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "code": _code_hash(("capture", "run")),
        }


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"{device} {_processor()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _code_hash(folders: Sequence[str]) -> str:
    """Returns a hash of the code that decides how fast things go, so that another version of it measures again."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in (_PACKAGE / folder).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
