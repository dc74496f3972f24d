"""What metrics are made of: the statistics of a limiter, and a bounded part of its components."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from threading import RLock
from typing import Any

from membound_async.hooks import Event, GrantLeaked, GrantRefused, LimitChanged, Stalled
from membound_async.limiter import MemoryLimiter
from membound_async.statistics import ComponentStatistics, LimiterStatistics, ReclaimerStatistics

__all__ = [
    "DEFAULT_MAX_COMPONENTS",
    "OTHERS",
    "EventCounts",
    "MeteredLimiter",
    "Snapshot",
    "metered",
]

OTHERS = "(others)"
"""The component that stands for all that have no series of their own; no path can be that."""

DEFAULT_MAX_COMPONENTS = 100


class EventCounts:
    """A hook that counts what is in no statistics. In any thread.

    Attributes:
        refusals: requests refused, by the name of the error. The usual ones are there from the
            start, so that the first one is a rise.
        stalls: stalls reported.
        leaked_grants: grants that were garbage-collected and nobody had released.
        leaked_bytes: their bytes.
        limit_changes: how many times the limit has changed.
    """

    def __init__(self) -> None:
        self.refusals: dict[str, int] = {
            "GrantDeadlock": 0,
            "GrantTimeout": 0,
            "GrantTooLarge": 0,
            "QuotaExceeded": 0,
        }
        self.stalls = self.leaked_grants = self.leaked_bytes = self.limit_changes = 0
        # A finaliser that runs meanwhile in this very thread may ask for a grant.
        self._lock = RLock()

    def __call__(self, event: Event) -> None:
        """Count an event."""
        with self._lock:
            match event:
                case GrantRefused(error=error):
                    name = type(error).__name__
                    self.refusals[name] = self.refusals.get(name, 0) + 1
                case Stalled():
                    self.stalls += 1
                case GrantLeaked(granted_bytes=nbytes):
                    self.leaked_grants += 1
                    self.leaked_bytes += nbytes
                case LimitChanged():
                    self.limit_changes += 1
                case _:
                    pass  # the statistics have it, or a histogram


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One limiter at one moment.

    Attributes:
        statistics: of the limiter.
        components: those that have series.
        reclaimers: by their names, which are all different here.
        events: what was counted so far.
    """

    statistics: LimiterStatistics
    components: list[ComponentStatistics]
    reclaimers: dict[str, ReclaimerStatistics]
    events: EventCounts


class MeteredLimiter:
    """A limiter that is exported, its events counted until ``close()``.

    Which components have series does not change once it is decided: as long as there is room
    each new one gets them, those first that have been granted the most. The rest are one
    component, `OTHERS`, so that sums over the components are right, and counters never fall.

    Args:
        limiter: the limiter.
        name: what tells it from others; ``""`` if there is only one.
        max_components: how many components have series of their own.

    Raises:
        ValueError: ``max_components`` is no number from 0 on.
    """

    def __init__(self, limiter: MemoryLimiter, name: str, max_components: int) -> None:
        if (
            isinstance(max_components, bool)
            or not isinstance(max_components, int)
            or max_components < 0
        ):
            raise ValueError(f"max_components={max_components!r} must be an int, 0 or more")
        self.limiter = limiter
        self.name = name
        self._max_components = max_components
        self._chosen: set[str] = set()
        self._lock = RLock()
        self._events = EventCounts()
        self._hooked = limiter.add_hook(self._events)

    def snapshot(self) -> Snapshot:
        """Take one, with a reading of memory. In any thread."""
        statistics = self.limiter.statistics()
        return Snapshot(
            statistics,
            self._select(statistics.components),
            _by_name(statistics.reclaimers),
            self._events,
        )

    def labels(self, names: tuple[str, ...], values: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        """Give the labels of a series, the limiter's own among them if it has a name."""
        if self.name:
            yield "limiter", self.name
        yield from zip(names, values, strict=True)

    def close(self) -> None:
        """Count no more events; does nothing the second time."""
        self._hooked.remove()

    def _select(self, components: tuple[ComponentStatistics, ...]) -> list[ComponentStatistics]:
        with self._lock:  # two scrapes must not both fill the same room
            room = self._max_components - len(self._chosen)
            if room > 0:
                new = [one for one in components if one.path not in self._chosen]
                new.sort(key=attrgetter("peak_granted_bytes"), reverse=True)
                self._chosen.update(one.path for one in new[:room])
        selected = [one for one in components if one.path in self._chosen]
        rest = [one for one in components if one.path not in self._chosen]
        return [*selected, replace(_total(rest), path=OTHERS)] if rest else selected


def metered(
    limiter: MemoryLimiter | Mapping[str, MemoryLimiter], max_components: int
) -> list[MeteredLimiter]:
    """Give the limiter, or each of several by its name, ready to be exported."""
    named = limiter if isinstance(limiter, Mapping) else {"": limiter}
    return [MeteredLimiter(one, name, max_components) for name, one in named.items()]


def _by_name(reclaimers: tuple[ReclaimerStatistics, ...]) -> dict[str, ReclaimerStatistics]:
    """Add those up that have the same name: one series must not be there twice."""
    found: dict[str, ReclaimerStatistics] = {}
    for one in reclaimers:
        found[one.name] = _total([found[one.name], one]) if one.name in found else one
    return found


_LONGEST = {"oldest_wait_seconds", "last_seconds", "backed_off_seconds"}
"""What of several is the longest, not the sum."""


def _total(items: list[Any]) -> Any:
    """Give the statistics of several as those of one: sums, and None where one has none."""
    totals: dict[str, Any] = {}
    for name in (one.name for one in fields(items[0])):
        values = [getattr(item, name) for item in items]
        if name in _LONGEST:
            totals[name] = max(values)
        elif isinstance(values[0], dict):
            keys = sorted({key for value in values for key in value})
            totals[name] = {key: sum(value.get(key, 0) for value in values) for key in keys}
        elif None in values:
            totals[name] = None
        elif not isinstance(values[0], str):
            totals[name] = sum(values)
    return replace(items[0], **totals)
