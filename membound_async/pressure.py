"""Pressure: from a reading of memory to a level, a delay and the time of the next look."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .exceptions import InvalidLimit

__all__ = ["PressurePolicy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PressurePolicy:
    """How measured memory near the effective limit ``L`` slows callers down.

    Saluki's curve: nothing up to the threshold; above it a delay that rises linearly from
    ``min_delay_seconds`` to ``max_delay_seconds`` at ``L``::

        level = clamp((M - threshold * L) / (L - threshold * L), 0, 1)
        delay = 0 if M <= threshold * L else min_delay + level * (max_delay - min_delay)

    Attributes:
        threshold: part of the effective limit above which callers are delayed,
            ``0 < threshold < 1``.
        min_delay_seconds: the delay just above the threshold.
        max_delay_seconds: the delay at the effective limit and beyond; 0 for none at all.
        max_interval_seconds: the longest time a reading counts as fresh.
        min_interval_seconds: the shortest, at the threshold and above.

    Raises:
        InvalidLimit: a value is not a finite number in its range.
    """

    threshold: float = 0.95
    min_delay_seconds: float = 0.001
    max_delay_seconds: float = 0.025
    max_interval_seconds: float = 0.25
    min_interval_seconds: float = 0.01

    def __post_init__(self) -> None:
        if not (_is_number(self.threshold) and 0 < self.threshold < 1):
            raise InvalidLimit(
                f"threshold={self.threshold!r} is no part of the limit; it must be above 0 and "
                "below 1, for example 0.95"
            )
        for low_name, high_name, least in (
            ("min_delay_seconds", "max_delay_seconds", 0.0),
            ("min_interval_seconds", "max_interval_seconds", 1e-6),
        ):
            low, high = getattr(self, low_name), getattr(self, high_name)
            if not (_is_number(low) and _is_number(high) and least <= low <= high):
                raise InvalidLimit(
                    f"{low_name}={low!r}, {high_name}={high!r}: both must be finite numbers of "
                    f"seconds with {least:g} <= {low_name} <= {high_name}"
                )

    def level(self, measured_bytes: int, effective_bytes: int) -> float:
        """Give the pressure level: 0 at the threshold and below, 1 at the limit and above."""
        start = self.threshold * effective_bytes
        return min(1.0, max(0.0, (measured_bytes - start) / (effective_bytes - start)))

    def delay_seconds(self, measured_bytes: int, effective_bytes: int) -> float:
        """Give how long a new grant out of the pool is held back."""
        if measured_bytes <= self.threshold * effective_bytes:
            return 0.0
        level = self.level(measured_bytes, effective_bytes)
        return self.min_delay_seconds + level * (self.max_delay_seconds - self.min_delay_seconds)

    def interval_seconds(self, measured_bytes: int, effective_bytes: int) -> float:
        """Give how long this reading counts as fresh.

        The longest interval up to half of the threshold; from there it shrinks linearly to
        the shortest at the threshold.
        """
        start = self.threshold * effective_bytes
        room = min(1.0, max(0.0, (start - measured_bytes) / (start / 2)))
        return max(self.min_interval_seconds, self.max_interval_seconds * room)

    def unsampled_bytes(self, measured_bytes: int, effective_bytes: int) -> int:
        """Give how much may be granted and released before memory is looked at again.

        A quarter of the headroom between the reading and the effective limit.
        """
        return max(0, effective_bytes - measured_bytes) // 4


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
