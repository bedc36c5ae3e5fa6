"""What was measured on this machine and need not be measured again: small JSON files in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def load(kind: str, key: Mapping[str, Any]) -> Any:
    """Returns what was saved under a key, or None. `kind` is part of the file's name, `key` plain data for json."""
    with suppress(OSError, ValueError, KeyError):
        return json.loads(_path(kind, key).read_text())["value"]
    return None


def save(kind: str, key: Mapping[str, Any], value: Any) -> None:
    """Saves a value under a key, all of it or nothing; where the folder cannot be written, nothing happens."""
    path = _path(kind, key)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"key": key, "value": value}, indent=1) + "\n")
        os.replace(temporary, path)


def folder() -> Path:
    """Returns the folder: $XDG_CACHE_HOME/modelpar, or ~/.cache/modelpar."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path(os.path.expanduser("~")) / ".cache"
    return base / "modelpar"


def _path(kind: str, key: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    return folder() / f"{kind}-{digest}.json"
