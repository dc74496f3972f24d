"""What ``/memory/grants`` says: who holds what, and who waits for what, page by page."""

from __future__ import annotations

from typing import Any

from membound_async.limiter import MemoryLimiter
from membound_async.statistics import plain

from .queries import Query

__all__ = ["PAGE_NAMES", "describe_grants"]

PAGE_NAMES = ("held_skip", "held_limit", "waiting_skip", "waiting_limit")

PAGE_ITEMS = 100
"""How many of each there are on a page that nobody asked to be longer."""

MOST_ITEMS = 1000
"""How many there may be."""

MOST_SKIPPED = 1_000_000
"""How far back a page may be; all before it must be put in order for it."""


def describe_grants(limiter: MemoryLimiter, query: Query) -> dict[str, Any]:
    """Give a page of the grants that are held, and one of the requests that wait.

    Raises:
        BadQuery: a page makes no sense.
    """
    held_skip, held_limit = _page(query, "held")
    waiting_skip, waiting_limit = _page(query, "waiting")
    statistics = limiter.statistics()
    held = limiter.held_grants(held_limit, skip=held_skip)
    waiting = limiter.waiting_requests(waiting_limit, skip=waiting_skip)
    return {
        "held": {
            "total": statistics.grants,
            "total_bytes": statistics.granted_bytes + statistics.in_flight_bytes,
            "skip": held_skip,
            "limit": held_limit,
            "items": [plain(grant) for grant in held],
        },
        "waiting": {
            "total": statistics.waiting,
            "total_bytes": statistics.waiting_bytes,
            "oldest_wait_seconds": statistics.oldest_wait_seconds,
            "skip": waiting_skip,
            "limit": waiting_limit,
            "items": [plain(request) for request in waiting],
        },
    }


def _page(query: Query, which: str) -> tuple[int, int]:
    skip = query.whole(f"{which}_skip", 0, most=MOST_SKIPPED)
    return skip, query.whole(f"{which}_limit", PAGE_ITEMS, most=MOST_ITEMS)
