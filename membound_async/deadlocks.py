"""Deadlocks: all that could be given back is held by those who wait for it. Pure, sync.

A task that waits gives nothing back until it goes on. So when everything that waiters wait
for is held by ``async with`` blocks of tasks that wait themselves, in the same limiter, nobody
can go on but by being admitted out of order, or by being refused.

What waiters wait for: the pool, and where a component is at its firm limit, what it holds
itself. Minimums, drift and live bytes are in the way, but nobody can give them back; a grant
that is in nobody's block (in a stream, in a queue, of a thread) may be given back at any time.
"""

from __future__ import annotations

from collections.abc import Iterable

from .stocks import Account
from .waiters import Request

__all__ = ["waiting_holders"]


def waiting_holders(
    accounts: Iterable[Account],
    held: Iterable[tuple[Account, object, int, float]],
    waiting: Iterable[Request],
) -> dict[Request, dict[Account, int]]:
    """Give the requests of all who could give something back, if all of them wait.

    Costs time in proportion to what is given to it.

    Args:
        accounts: those there are.
        held: of each grant its account, the task whose block it is or None, its bytes, and since
            when it is held.
        waiting: all requests that wait, each with the task that made it.

    Returns:
        Their requests, with how many bytes of which account each task holds, those first whose
        tasks have held any of it the longest; none if anybody can give something back as it
        is, or if nobody has anything to give back.
    """
    out: dict[Account, int] = {}
    for account in accounts:
        if account.in_flight:  # a receiver takes it
            return {}
        if account.granted > account.reserved or (account.queue is not None and account.granted):
            out[account] = account.granted
    by_task: dict[object, Request] = {}
    for request in waiting:
        if request.also:  # others may give back what it lacks, and hold no bytes
            return {}
        if request.task is not None:
            by_task[request.task] = request
    holders: dict[Request, dict[Account, int]] = {}
    oldest: dict[Request, float] = {}
    for account, task, nbytes, since in held:
        if nbytes and account in out:
            request_or_none = by_task.get(task)
            if request_or_none is None:
                return {}
            out[account] -= nbytes
            mine = holders.setdefault(request_or_none, {})
            mine[account] = mine.get(account, 0) + nbytes
            oldest[request_or_none] = min(since, oldest.get(request_or_none, since))
    if any(out.values()):  # somebody is about to take over what was granted to him
        return {}
    order = sorted(holders, key=lambda request: (oldest[request], request.arrival))
    return {request: holders[request] for request in order}
