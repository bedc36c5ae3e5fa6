"""Sizes in bytes, as people write them: "8GB", "512 MiB"."""

from __future__ import annotations

import math
import re

from modelpar.errors import ConfigError

_UNITS = {"": 1.0, "B": 1.0} | {
    f"{letter}{i}B": float((1024 if i else 1000) ** power)
    for power, letter in enumerate("KMGT", start=1)
    for i in ("", "i")
}
_SIZE = re.compile(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)", re.IGNORECASE)


def parse_bytes(size: float | str, what: str) -> float:
    """Returns a number of bytes: 8e9 for 8000000000, "8GB" or "8 gb"; "8GiB" counts in steps of 1024.

    Raises ConfigError, which begins with `what` is given, for anything else, and for what is not above 0.
    """
    number, unit = size, ""
    if isinstance(size, str):
        found = _SIZE.fullmatch(size.strip())
        number, unit = (found[1], found[2]) if found else (size, "")
    try:
        scale = {name.lower(): scale for name, scale in _UNITS.items()}[unit.lower()]
        num_bytes = math.nan if isinstance(number, bool) else float(number) * scale
    except (KeyError, TypeError, ValueError):
        num_bytes = math.nan
    if not num_bytes > 0:
        raise ConfigError(f"{what} is {size!r}; expected bytes above 0, as a number or such as 8GB or 512MiB")
    return num_bytes


def show_bytes(num_bytes: float, digits: int = 3) -> str:
    """Returns a size with so many digits: "4.25 GB", "0 B"."""
    for unit in ("TB", "GB", "MB", "KB"):
        if num_bytes >= _UNITS[unit]:
            return f"{num_bytes / _UNITS[unit]:.{digits}g} {unit}"
    return f"{num_bytes:.0f} B"


def show_apart(first: float, second: float) -> tuple[str, str]:
    """Returns two different sizes, with as many digits as tell them apart."""
    shown = ((show_bytes(first, digits), show_bytes(second, digits)) for digits in range(3, 18))
    return next((pair for pair in shown if pair[0] != pair[1]), (show_bytes(first), show_bytes(second)))
