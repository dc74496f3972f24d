"""Who holds which grants, and who waits for what: the details behind the statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import nlargest, nsmallest
from itertools import islice
from typing import TYPE_CHECKING

from .fastpath import ALONE
from .statistics import HeldGrant, WaitingRequest
from .waiters import Request

if TYPE_CHECKING:
    from .grant import MemoryGrant
    from .ledger import Ledger

__all__ = ["held_grants", "waiting_requests"]


def held_grants(
    grants: Iterable[MemoryGrant], now: float, most: int | None, skip: int
) -> list[HeldGrant]:
    """Describe grants that are held, the largest first and of equals the oldest."""

    def rank(grant: MemoryGrant) -> tuple[int, float]:
        return grant._size, -grant._since

    if most is None:
        ranked = sorted(grants, key=rank, reverse=True)
    else:
        ranked = nlargest(skip + most, grants, key=rank)
    return [_describe_grant(grant, now) for grant in ranked[skip:]]


def _describe_grant(grant: MemoryGrant, now: float) -> HeldGrant:
    sender = grant.sender
    return HeldGrant(
        component=grant._component.path,
        sender=None if sender is None else str(sender),
        size_bytes=grant._size,
        age_seconds=max(0.0, now - grant._since),
        also=dict(grant.also),
        is_alone=grant._state == ALONE,
    )


def waiting_requests(
    ledger: Ledger, now: float, most: int | None, skip: int
) -> list[WaitingRequest]:
    """Describe requests that wait, the oldest first."""
    everybody: Iterator[Request] = (
        request for account in ledger.accounts.values() for request in account.requests()
    )
    if most is None:
        ranked = sorted(everybody, key=_arrival)
    else:
        ranked = nsmallest(skip + most, everybody, key=_arrival)
    return [_describe_request(ledger, request, now) for request in islice(ranked, skip, None)]


def _arrival(request: Request) -> int:
    return request.arrival


def _describe_request(ledger: Ledger, request: Request, now: float) -> WaitingRequest:
    waits_for, missing = ledger.waits_for(request)
    return WaitingRequest(
        component=request.account.name,
        sender=None if request.sender is None else str(request.sender.name),
        kind="transfer" if request.source is not None else request.kind.value,
        wanted_bytes=request.nbytes,
        also=dict(request.also),
        waits_for=waits_for,
        threshold_bytes=ledger.threshold(request),
        missing=missing,
        waited_seconds=max(0.0, now - request.asked_at),
        bypassed_bytes=ledger.waiters.bypassed_by(request),
        is_barrier=request.barrier,
    )
