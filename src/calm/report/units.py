"""Figures as people read them, with their units: of tables here and of every command."""

from __future__ import annotations


def seconds(value: float) -> str:
    """1.9 ms, 0.42 s, 12.3 s, 3 min 20 s."""
    if value == 0:
        return "0 s"
    if value < 0.01:
        return f"{value * 1000:.1f} ms"
    if value < 10:
        return f"{value:.2f} s"
    if value < 120:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


def joules(value: float) -> str:
    return f"{value:.3g} J" if value < 1000 else f"{value:,.0f} J"


def size(value: float) -> str:
    """98.4 MB: powers of ten, as on a disk's label and in a download's progress."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value:.0f} B"
