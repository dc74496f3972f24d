"""Drift, memory that nobody was granted: when it has risen so far that it is worth telling."""

from __future__ import annotations

__all__ = ["DriftWatch"]

PART = 10
"""It is told again when it has risen by this part of the effective limit."""


class DriftWatch:
    """Notices that drift has risen since it was last told, and not that it swings."""

    def __init__(self) -> None:
        self._told = 0

    def has_risen(self, drift: int, limit: int) -> bool:
        """Say whether drift is to be told of now; bytes.

        Once it has fallen to less than half of what was told, a rise is told from there.
        """
        risen = drift > self._told + limit // PART
        if risen or drift < self._told // 2:
            self._told = drift
        return risen
