"""Stalls: somebody waits, and nothing is granted or given back. One report, with names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .events import log

if TYPE_CHECKING:
    from .grant import MemoryGrant
    from .quota import Ledger
    from .stocks import Account

__all__ = ["REPORTED", "StallWatch", "describe_stall"]

REPORTED = 10
"""How many holders and waiters a report names, the largest and the oldest."""


class StallWatch:
    """Notices that nothing moves for a while, once, and that it moves again.

    Args:
        after_seconds: how long nothing must have moved.
    """

    def __init__(self, after_seconds: float) -> None:
        self._after_seconds = after_seconds
        self._moved = -1
        self.still_since = 0.0
        self.stalled = False

    def look(self, now: float, moved: int, waiting: int) -> bool:
        """Look at how much has moved by now; tell whether a stall is to be reported.

        The end of a stall is logged here.

        Args:
            now: the time in seconds.
            moved: anything that changes with every grant and every release.
            waiting: how many requests wait.
        """
        if moved != self._moved or not waiting:
            if self.stalled:
                self.stalled = False
                log().info("membound.stall_ended", after_seconds=round(now - self.still_since, 3))
            self._moved, self.still_since = moved, now
        elif not self.stalled and now - self.still_since >= self._after_seconds:
            self.stalled = True
            return True
        return False


def describe_stall(ledger: Ledger, grants: Iterable[MemoryGrant], now: float) -> dict[str, Any]:
    """Say who holds what since when, and who waits for what; bytes and seconds.

    Costs time in proportion to the number of grants and components.
    """
    since: dict[Account, float] = {}
    for grant in grants:
        account: Account = grant.component._account
        since[account] = min(since.get(account, now), grant._since)
    holders = [
        {
            "component": account.name,
            "granted_bytes": account.granted,
            "in_flight_bytes": account.in_flight,
            "reserved_bytes": account.reserved,
            "oldest_seconds": round(now - since.get(account, now), 3),
        }
        for account in sorted(
            (a for a in ledger.accounts.values() if a.granted or a.reserved or a.in_flight),
            key=lambda account: -max(account.granted, account.reserved) - account.in_flight,
        )[:REPORTED]
    ]
    heads = [
        (waiting[0] if account.queue is None else account.queue.head(), len(waiting))
        for account in ledger.accounts.values()
        if (waiting := list(account.waiting()))
    ]
    heads.sort(key=lambda entry: entry[0].asked_at)
    return {
        "free_bytes": ledger.free,
        "drift_bytes": ledger.drift,
        "measured_bytes": ledger.measured,
        "waiting": ledger.waiters.count,
        "holders": holders,
        "waiters": [
            {
                "component": head.account.name,
                "wanted_bytes": head.nbytes,
                "missing_bytes": ledger.missing(head),
                "waiting": waiting,
                "waited_seconds": round(now - head.asked_at, 3),
            }
            for head, waiting in heads[:REPORTED]
        ],
    }
