"""Numbers for people: sizes, counts and times in a few characters."""

from __future__ import annotations

from membound_async.sizes import human_size

__all__ = ["NOTHING", "count", "duration", "size"]

NOTHING = "-"
"""What is shown in a table in place of 0."""


def size(nbytes: int) -> str:
    """Give ``"64.0 MiB"``, or a dash for 0."""
    return human_size(nbytes) if nbytes else NOTHING


def count(number: int, nothing: str = NOTHING) -> str:
    """Give ``"1 234"``, or what stands for 0."""
    return f"{number:,}".replace(",", " ") if number else nothing


def duration(seconds: float, nothing: str = NOTHING) -> str:
    """Give ``"250 ms"`` or ``"1 234.6 s"``, or what stands for no time at all."""
    if seconds < 0.0005:
        return nothing
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:,.1f} s".replace(",", " ")
