"""Numbers with their units, for people."""

from __future__ import annotations


def ms(seconds: float) -> str:
    """Returns a duration in milliseconds with three significant digits, or in seconds from 10 s on."""
    if seconds >= 10.0:
        return f"{seconds:.1f} s"
    value = seconds * 1e3
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 10 else f"{value:.3g} ms"


def megabytes(num_bytes: float) -> str:
    """Returns an amount of memory in MB (10⁶ bytes), in GB from 10 GB on, in kB below 0.1 MB."""
    if num_bytes >= 10e9:
        return f"{num_bytes / 1e9:.1f} GB"
    if num_bytes < 0.1e6:
        return f"{num_bytes / 1e3:.1f} kB"
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes >= 100e6 else f"{num_bytes / 1e6:.1f} MB"


def count(number: int) -> str:
    """Returns a count in full up to 9,999, then in k, M or G with three significant digits."""
    if number < 10_000:
        return f"{number:,}"
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {unit}" if number < 999.5 * size else f"{number / size:,.0f} {unit}"
    return f"{number / 1e3:.3g} k"


def percent(share: float) -> str:
    """Returns a share of 1 as whole per cent, with one decimal below 10 %."""
    value = 100 * share
    return f"{value:.1f} %" if abs(value) < 9.95 else f"{value:.0f} %"


def error(share: float) -> str:
    """Returns a relative error in per cent with its sign."""
    return f"{100 * share:+.1f} %"
