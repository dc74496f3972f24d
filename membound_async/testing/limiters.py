"""A limiter whose numbers are round."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from membound_async.limiter import MemoryLimiter
from membound_async.pressure import PressurePolicy
from membound_async.settings import LimiterSettings

from .memory import FakeMemory
from .probe import ScriptedProbe

__all__ = ["limiter"]


def limiter(limit: int | str = "64MiB", **options: Any) -> MemoryLimiter:
    """Give a limiter for a test: its numbers follow from those in the test, and no others.

    No slop and no baseline are taken off ``limit``, a `ScriptedProbe` reads 0, and nothing
    is delayed; garbage is not collected when memory is short. The environment changes nothing.

    Args:
        limit: bytes, or a ``str`` such as ``"64MiB"``.
        options: any other argument of `MemoryLimiter`; they take the place of the above. A
            `FakeMemory` as ``probe=`` follows the limiter.

    Raises:
        InvalidLimit: ``limit`` or an option makes no sense.
    """
    undelayed = PressurePolicy(min_delay_seconds=0, max_delay_seconds=0)
    chosen: dict[str, Any] = {
        "slop_factor": 0,
        "share": Fraction(1, 2),
        "baseline": 0,
        "probe": ScriptedProbe(0),
        "observe": False,
        "mode": "strict",
        "processes": 1,
        "settings": LimiterSettings(pressure=undelayed, reclaim=False),
    }
    made = MemoryLimiter(limit, **(chosen | options))
    probe = options.get("probe")
    if isinstance(probe, FakeMemory):
        probe.follow(made)
    return made
