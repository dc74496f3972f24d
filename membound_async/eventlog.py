"""The hook that every limiter has: writes events to the log, and never so many as to flood it."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from .events import log
from .hooks import Event, GrantLeaked, GrantRefused, Stalled

__all__ = ["BURST", "EventLog"]

BURST = 10
"""How many events of one kind are written within one interval, whatever they are about."""

_WARNINGS = (Stalled, GrantLeaked)


class EventLog:
    """Writes an event unless one of its kind about the same component was just written.

    What is left out is counted; ``suppressed`` is that number in the next one that is written.

    Args:
        interval_seconds: for how long the same is not written again.
        now: a clock that never goes back, in seconds.
    """

    def __init__(self, interval_seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._interval_seconds = interval_seconds
        self._now = now
        self._kinds: dict[type[Event], _Kind] = {}

    def __call__(self, event: Event) -> None:
        """Write an event, if it is due."""
        kind = self._kinds.get(type(event))
        if kind is None:
            kind = self._kinds[type(event)] = _Kind()
        about = str(getattr(event, "component", getattr(event, "reclaimer", "")))
        now = self._now()
        if not kind.is_due(about, now, self._interval_seconds):
            return
        values: dict[str, Any] = {}
        for field in fields(event):
            value = getattr(event, field.name)
            values[field.name] = round(value, 3) if isinstance(value, float) else value
        if isinstance(event, GrantRefused):
            values |= {"error": type(event.error).__name__, "reason": str(event.error)}
        if suppressed := kind.suppressed.pop(about, 0):
            values["suppressed"] = suppressed
        write = log().warning if isinstance(event, _WARNINGS) else log().info
        write(event.name, **values)


class _Kind:
    """When events of one kind were written."""

    def __init__(self) -> None:
        self.suppressed: Counter[str] = Counter()
        self._written_at: dict[str, float] = {}
        self._last = deque[float](maxlen=BURST)

    def is_due(self, about: str, now: float, interval_seconds: float) -> bool:
        """Whether another may be written; note it."""
        same = self._written_at.get(about, -math.inf)
        first = self._last[0] if len(self._last) == BURST else -math.inf
        if now - max(same, first) < interval_seconds:
            self.suppressed[about] += 1
            return False
        self._written_at[about] = now
        self._last.append(now)
        return True
