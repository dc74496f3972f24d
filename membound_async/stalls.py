"""Stalls: somebody waits, and nothing is granted or given back. One report, with names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .hooks import Event, Stalled, StallEnded

if TYPE_CHECKING:
    from .ledger import Ledger
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

    def look(
        self, now: float, moved: int, waiting: int, describe: Callable[[], Stalled]
    ) -> Event | None:
        """Look at how much has moved by now; give what there is to report, once.

        Args:
            now: the time in seconds.
            moved: anything that changes with every grant and every release.
            waiting: how many requests wait.
            describe: says who holds what and who waits.
        """
        if moved != self._moved or not waiting:
            ended = StallEnded(now - self.still_since) if self.stalled else None
            self.stalled = False
            self._moved, self.still_since = moved, now
            return ended
        if not self.stalled and now - self.still_since >= self._after_seconds:
            self.stalled = True
            return describe()
        return None

    def seconds(self, now: float, moved: int, waiting: int) -> float:
        """Give how long a stall that was reported has lasted; 0 if there is none."""
        return now - self.still_since if self.stalled and waiting and moved == self._moved else 0.0


def describe_stall(ledger: Ledger, now: float) -> Stalled:
    """Say who holds what since when, and who waits for what; bytes and seconds.

    Costs time in proportion to the number of grants and components.
    """
    holders = [
        {
            "component": account.name,
            "granted_bytes": account.granted,
            "in_flight_bytes": account.in_flight,
            "reserved_bytes": account.reserved,
            "oldest_seconds": round(_age_of_oldest(account, now), 3),
        }
        for account in sorted(
            (a for a in ledger.accounts.values() if a.granted or a.reserved or a.in_flight),
            key=lambda account: -max(account.granted, account.reserved) - account.in_flight,
        )[:REPORTED]
    ]
    heads = [
        head
        for account in ledger.accounts.values()
        if (head := account.oldest() if account.queue is None else account.queue.head())
    ]
    heads.sort(key=lambda head: head.asked_at)
    return Stalled(
        free_bytes=ledger.free,
        drift_bytes=ledger.drift,
        measured_bytes=ledger.measured,
        waiting=ledger.waiters.count,
        holders=holders,
        waiters=[
            {
                "component": head.account.name,
                "wanted_bytes": head.nbytes,
                "missing_bytes": ledger.missing(head),
                "waiting": head.account.waiting,
                "waited_seconds": round(now - head.asked_at, 3),
            }
            for head in heads[:REPORTED]
        ],
    )


def _age_of_oldest(account: Account, now: float) -> float:
    return now - min((grant._since for grant in account.holders.snapshot()), default=now)
