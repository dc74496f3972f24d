"""The order among waiters: first in first out, smallest threshold first, and barriers.

Inside a component, grows of grants that are held go before new requests, because who holds
something must be able to finish; otherwise first in, first out. Between components the head
with the smallest threshold goes first. So that nobody starves, a request at the front of its
queue counts the pool bytes that are granted past it; past a limit it becomes a *barrier*, and
nobody else gets anything out of the pool until it is served.

This module keeps that order and knows nothing else: thresholds are handed to it.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any

from .fastpath import WaitersState

if TYPE_CHECKING:
    from .quota import Account

__all__ = ["Kind", "Request", "State", "Waiters", "rank_of"]

READY = -1
"""The rank of a head that draws nothing from the pool: before every threshold."""


class Kind(enum.Enum):
    """What a request asks for."""

    GRANT = "grant"
    GROW = "grow"
    ENTER = "enter"


class State(enum.Enum):
    """What became of a request."""

    NEW = "new"
    WAITING = "waiting"
    ADMITTED = "admitted"
    IMPOSSIBLE = "impossible"
    CANCELLED = "cancelled"


class Request:
    """One wish for bytes of one account, from asking to its outcome.

    Attributes:
        account: whose account is charged.
        nbytes: how much is wanted; replaced by how much was given once it is admitted.
        kind: a new grant, a grow of one that is held, or a component's minimum.
        up_to: the most that is of use, at least ``nbytes``.
        held: of a grow, the bytes that the grant has already.
        alone: may exceed the quota, by holding the pool alone.
        exclusive: was admitted so; of a grow, belongs to a grant that was.
        owner: whatever the caller wants to find again when the outcome is there.
    """

    __slots__ = (
        "account",
        "alone",
        "arrival",
        "asked_at",
        "barrier",
        "bypassed",
        "exclusive",
        "held",
        "kind",
        "mark",
        "nbytes",
        "out_of_turn",
        "owner",
        "pooled",
        "rank",
        "state",
        "up_to",
    )

    def __init__(
        self,
        account: Account,
        nbytes: int,
        kind: Kind = Kind.GRANT,
        *,
        up_to: int | None = None,
        held: int = 0,
        alone: bool = False,
        exclusive: bool = False,
        owner: Any = None,
    ) -> None:
        self.account = account
        self.nbytes = nbytes
        self.kind = kind
        self.up_to = nbytes if up_to is None else up_to
        self.held = held
        self.alone = alone
        self.exclusive = exclusive
        self.owner = owner
        self.state = State.NEW
        self.pooled = False
        """Whether any of it came out of the pool; known once it is admitted."""
        self.out_of_turn = False
        """Whether it was admitted against the rule, because nobody else held anything."""
        self.arrival = 0
        self.mark: int | None = None
        """Where the count of pool bytes stood when this came to the front, less what it had
        counted before; None while it does not count."""
        self.bypassed = 0
        """Pool bytes granted past it, while it does not count."""
        self.barrier = False
        self.asked_at = 0.0
        """When it was made, by the clock of whoever made it."""
        self.rank: tuple[int, int, Request] | None = None


def rank_of(head: Request) -> tuple[int, int]:
    """Give what a ranked head is ordered by: its threshold, and when it came."""
    assert head.rank is not None
    return head.rank[:2]


class Queue:
    """The waiters of one account."""

    __slots__ = ("grows", "requests")

    def __init__(self) -> None:
        self.grows: OrderedDict[Request, None] = OrderedDict()
        self.requests: OrderedDict[Request, None] = OrderedDict()

    def line(self, request: Request) -> OrderedDict[Request, None]:
        return self.grows if request.kind is Kind.GROW else self.requests

    def fronts(self) -> list[Request]:
        """Give the first grow and the first of the others, those that there are."""
        return [next(iter(line)) for line in (self.grows, self.requests) if line]

    def head(self) -> Request | None:
        """Give who is next: the older barrier, else the first grow, else the first other."""
        fronts = self.fronts()
        barriers = [request for request in fronts if request.barrier]
        if barriers:
            return min(barriers, key=lambda request: request.arrival)
        return fronts[0] if fronts else None

    def __iter__(self) -> Iterator[Request]:
        yield from self.grows
        yield from self.requests


class Waiters(WaitersState):
    """All requests that wait, in order. O(log K) per change for K accounts that have any.

    Heaps hold entries that are out of date until they come to the top; they are rebuilt
    when such entries outnumber the others.

    Attributes:
        count: how many wait.
        alone: how many of them may have the pool alone.
        passed_bytes: pool bytes granted so far, to anybody; what fronts count by.
    """

    def __init__(self) -> None:
        self.count = 0
        self.alone = 0
        self.passed_bytes = 0
        self._arrivals = 0
        self._queues = 0
        self._ranks: list[tuple[int, int, Request]] = []
        self._growing: dict[Request, None] = {}
        self._ages: list[tuple[int, int, Request]] = []
        self._barriers: list[tuple[int, Request]] = []
        self._barrier_count = 0

    def add(self, request: Request) -> bool:
        """Put a request at the end of its line; of an exclusive grant, at its front.

        Returns:
            Whether it is the first of its line now.
        """
        queue = request.account.queue
        if queue is None:
            queue = request.account.queue = Queue()
            self._queues += 1
        self._arrivals += 1
        request.arrival = self._arrivals
        request.state = State.WAITING
        line = queue.line(request)
        line[request] = None
        if request.exclusive:
            line.move_to_end(request, last=False)
        if request.kind is Kind.GROW:
            self._growing[request] = None
        self.count += 1
        self.alone += request.alone
        return request.exclusive or len(line) == 1

    def remove(self, request: Request, state: State) -> None:
        """Take a request out, wherever it stands, with its outcome."""
        account = request.account
        queue = account.queue
        assert queue is not None
        del queue.line(request)[request]
        self._growing.pop(request, None)
        if not queue.grows and not queue.requests:
            account.queue = None
            self._queues -= 1
        self.count -= 1
        self.alone -= request.alone
        request.state = state
        request.rank = None
        request.mark = None
        self._unbar(request)

    # --- ranks: the order between components

    def rank(self, head: Request, threshold: int) -> None:
        """Rank the head of a queue; whoever of that queue was ranked before is not any more."""
        if head.rank is not None and head.rank[0] == threshold:
            return
        head.rank = (threshold, head.arrival, head)
        heappush(self._ranks, head.rank)
        if len(self._ranks) > 2 * self._queues + 64:
            self._ranks = [entry for entry in self._ranks if entry[2].rank is entry]
            heapify(self._ranks)

    def smallest(self) -> Request | None:
        """Give the ranked head with the smallest threshold, the oldest of equals."""
        ranks = self._ranks
        while ranks and ranks[0][2].rank is not ranks[0]:
            heappop(ranks)
        return ranks[0][2] if ranks else None

    def heads(self) -> Iterator[Request]:
        """Give all ranked heads, in no order."""
        return (entry[2] for entry in self._ranks if entry[2].rank is entry)

    def growing(self) -> Iterator[Request]:
        """Give the ranked heads that are grows, in the order in which they came first."""
        return (front for front in self._growing if front.rank is not None)

    # --- ages: bytes granted past a front

    def count_from_now(self, front: Request) -> None:
        """Let a front that does not count go on counting what is granted past it."""
        front.mark = self.passed_bytes - front.bypassed
        heappush(self._ages, (front.mark, front.arrival, front))
        if len(self._ages) > 4 * self._queues + 64:
            self._ages = [entry for entry in self._ages if entry[2].mark == entry[0]]
            heapify(self._ages)

    def stop_counting(self, front: Request) -> None:
        """Keep a front's count as it stands; it is no barrier while it does not count."""
        if front.mark is not None:
            front.bypassed = self.passed_bytes - front.mark
            front.mark = None
        self._unbar(front)

    def pop_overdue(self, bypass_limit_bytes: int) -> Request | None:
        """Give a front that has been passed by more than the limit, each but once."""
        ages = self._ages
        while ages:
            mark, _, front = ages[0]
            if front.mark == mark and not front.barrier:
                if self.passed_bytes - mark <= bypass_limit_bytes:
                    return None
                heappop(ages)
                return front
            heappop(ages)
        return None

    # --- barriers

    def bar(self, front: Request) -> None:
        """Make a front a barrier."""
        front.barrier = True
        self._barrier_count += 1
        heappush(self._barriers, (front.arrival, front))

    def lift(self, barrier: Request) -> None:
        """Make a barrier an ordinary front again, which counts from 0."""
        self._unbar(barrier)
        barrier.bypassed = 0
        self.count_from_now(barrier)

    def _unbar(self, request: Request) -> None:
        if request.barrier:
            request.barrier = False
            self._barrier_count -= 1

    @property
    def barred(self) -> bool:
        """Whether there is a barrier."""
        return self._barrier_count > 0

    def first_barrier(self) -> Request | None:
        """Give the barrier that arrived first."""
        barriers = self._barriers
        while barriers and not barriers[0][1].barrier:
            heappop(barriers)
        return barriers[0][1] if barriers else None
