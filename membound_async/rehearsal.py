"""What an observe-only limiter would have done: who would have waited, and how long."""

from __future__ import annotations

from heapq import heappop, heappush

from .stocks import Account

__all__ = ["Rehearsal"]


class Rehearsal:
    """The waits that did not happen, by account. Pure: times are handed to it.

    Every request is granted at once. One that would have waited is charged all the same, so
    its wait would have ended when as much was free, its own bytes counted in, as its
    threshold asks for.
    """

    def __init__(self) -> None:
        self.waits: dict[Account, int] = {}
        self.wait_seconds: dict[Account, float] = {}
        self.refusals: dict[Account, int] = {}
        self._open: list[tuple[int, int, float, Account]] = []
        self._open_since: dict[Account, tuple[int, float]] = {}
        """How many waits of each account are open, and the sum of when they began."""
        self._arrivals = 0

    def refused(self, account: Account) -> None:
        """Note a request that would have been refused."""
        self.refusals[account] = self.refusals.get(account, 0) + 1

    def waited(self, account: Account, until_free_bytes: int, now: float) -> None:
        """Note a request that would have waited until that much is free."""
        self.waits[account] = self.waits.get(account, 0) + 1
        self._arrivals += 1
        heappush(self._open, (until_free_bytes, self._arrivals, now, account))
        self._count_open(account, 1, now)

    def settle(self, free_bytes: int, now: float) -> None:
        """End the waits that would be over with so much free."""
        while self._open and self._open[0][0] <= free_bytes:
            _, _, since, account = heappop(self._open)
            self.wait_seconds[account] = self.wait_seconds.get(account, 0.0) + now - since
            self._count_open(account, -1, -since)

    def seconds(self, now: float) -> dict[Account, float]:
        """Give how long each account would have waited so far, with the waits still open."""
        total = dict(self.wait_seconds)
        for account, (count, since) in self._open_since.items():
            total[account] = total.get(account, 0.0) + count * now - since
        return total

    def _count_open(self, account: Account, more: int, since: float) -> None:
        count, sum_of_since = self._open_since.get(account, (0, 0.0))
        self._open_since[account] = (count + more, sum_of_since + since)
        if not count + more:
            del self._open_since[account]
