"""What ``/memory/status`` says: one frozen snapshot, which its JSON Schema describes."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal, Self

from membound_async.limiter import MemoryLimiter
from membound_async.sizes import format_size
from membound_async.statistics import LimiterStatistics, plain

__all__ = ["ComponentUsage", "StatusSnapshot"]


def _version() -> str:
    try:
        return metadata.version("membound-async")
    except metadata.PackageNotFoundError:
        return "(not installed)"


VERSION = _version()


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentUsage:
    """What one component declares and uses, under the names that Saluki has for it."""

    #: its minimum
    minimum_required_bytes: int
    #: the most it may hold, minimum included; null if only the quota bounds it
    firm_limit_bytes: int | None
    #: what its code has allocated and not freed yet; 0 where that is not tracked
    actual_live_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusSnapshot:
    """A limiter and its process at one moment."""

    #: of membound-async
    membound_version: str
    #: the process's number
    pid: int
    #: when it was taken, in seconds since 1970
    unix_seconds: float
    #: whether memory is short: "over_limit" if measured memory is not below the effective limit,
    #: "stalled" if somebody waits and nothing is granted or given back for a while
    status: Literal["ok", "over_limit", "stalled"]
    #: why the status is not "ok", in words
    reason: str | None
    #: every component by its path
    components: dict[str, ComponentUsage]
    #: everything that the limiter knows
    limiter: LimiterStatistics

    @classmethod
    def take(cls, limiter: MemoryLimiter) -> Self:
        """Take a snapshot now; costs time in proportion to the number of components."""
        statistics = limiter.statistics()
        status, reason = _judge(statistics)
        return cls(
            membound_version=VERSION,
            pid=os.getpid(),
            unix_seconds=time.time(),
            status=status,
            reason=reason,
            components={
                component.path: ComponentUsage(
                    minimum_required_bytes=component.minimum_bytes,
                    firm_limit_bytes=component.firm_limit_bytes,
                    actual_live_bytes=component.live_bytes,
                )
                for component in statistics.components
            },
            limiter=statistics,
        )

    def to_dict(self) -> dict[str, Any]:
        """Give the same as plain dicts and lists, ready for ``json.dumps``."""
        values: dict[str, Any] = plain(self)
        return values

    def to_json(self) -> bytes:
        """Give the same as one line of JSON."""
        return json.dumps(self.to_dict(), separators=(",", ":")).encode()


def _judge(
    statistics: LimiterStatistics,
) -> tuple[Literal["ok", "over_limit", "stalled"], str | None]:
    """Say whether memory is short, and why."""
    measured, limit = statistics.measured_bytes, statistics.effective_limit_bytes
    if measured >= limit:
        return "over_limit", (
            f"{format_size(measured)} are in use ({statistics.measured_name}), and the limit less "
            f"its slop is {format_size(limit)}"
        )
    if statistics.stalled_seconds > 0:
        return "stalled", (
            f"nothing was granted or given back for {statistics.stalled_seconds:.0f} s, and "
            f"requests for memory wait: {statistics.waiting}"
        )
    return "ok", None
