"""The order among waiters: first in first out, smallest threshold first, and barriers.

Inside a component, grows of grants that are held go before new requests, because who holds
something must be able to finish; otherwise first in, first out. Between components the head
with the smallest threshold goes first. So that nobody starves, a request at the front of its
line counts the pool bytes that are granted past it; past a limit it becomes a *barrier*, and
nobody else gets anything out of the pool until it is served.

This module keeps that order and knows nothing else: numbers are handed to it.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any

from .fastpath import WaitersState

if TYPE_CHECKING:
    from .quota import Account

__all__ = ["Kind", "Queue", "Ranking", "Request", "State", "Waiters"]


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
    DEADLOCKED = "deadlocked"
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
        exclusive: was admitted so; of a grow that waits, belongs to a grant that is.
        owner: whatever the caller wants to find again when the outcome is there.
        task: the task that waits for it; None if that is not known.
        gives_up: whether it may give up by itself, because there is a time limit.
        is_checked: whether nobody but that task knows of the grants that it holds.
        holders: of one that is deadlocked, the components and what they hold.
    """

    __slots__ = (
        "account",
        "alone",
        "arrival",
        "asked_at",
        "barrier",
        "bypassed",
        "exclusive",
        "gives_up",
        "held",
        "holders",
        "is_checked",
        "kind",
        "nbytes",
        "out_of_turn",
        "owner",
        "pooled",
        "state",
        "task",
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
        self.task: Any = None
        self.gives_up = False
        self.is_checked = False
        self.holders: tuple[tuple[str, int], ...] = ()
        self.state = State.NEW
        self.pooled = False
        """Whether any of it came out of the pool; known once it is admitted."""
        self.out_of_turn = False
        """Whether it was admitted against the rule, because nobody else held anything."""
        self.arrival = 0
        self.bypassed = 0
        """Pool bytes granted past it, as of when it stopped counting."""
        self.barrier = False
        self.asked_at = 0.0
        """When it was made, by the clock of whoever made it."""


class Queue:
    """The waiters of one account; there is one only while anybody waits."""

    __slots__ = ("grows", "requests")

    def __init__(self) -> None:
        self.grows: OrderedDict[Request, None] = OrderedDict()
        self.requests: OrderedDict[Request, None] = OrderedDict()

    def line(self, request: Request) -> OrderedDict[Request, None]:
        """Give the line in which that request stands, or would."""
        return self.grows if request.kind is Kind.GROW else self.requests

    def fronts(self) -> list[Request]:
        """Give the first grow and the first of the others, those that there are."""
        return [next(iter(line)) for line in (self.grows, self.requests) if line]

    def head(self) -> Request:
        """Give who is next.

        The grow of a grant that holds the pool alone; else the older barrier; else the first
        grow; else the first of the others.
        """
        fronts = self.fronts()
        barriers = [front for front in fronts if front.barrier]
        if barriers and not fronts[0].exclusive:
            return min(barriers, key=lambda front: front.arrival)
        return fronts[0]

    def __iter__(self) -> Iterator[Request]:
        yield from self.grows
        yield from self.requests


class Ranking(dict["Request", int]):
    """Requests by a number, the smallest first and of equals the oldest. O(log n) per change.

    An entry that is out of date stays in the heap until it comes to the top; when such
    entries outnumber the others, the heap is built anew.
    """

    __slots__ = ("_heap",)

    def __init__(self) -> None:
        super().__init__()
        self._heap: list[tuple[int, int, Request]] = []

    def put(self, request: Request, number: int) -> None:
        """Rank a request by that number, whatever it was ranked by before."""
        if self.get(request) != number:
            self[request] = number
            heap = self._heap
            heappush(heap, (number, request.arrival, request))
            if len(heap) > 2 * len(self) + 64:
                self._rebuild()

    def discard(self, request: Request) -> None:
        """Take a request out, if it is there."""
        if self.pop(request, None) is not None and len(self._heap) > 2 * len(self) + 64:
            self._rebuild()

    def first(self) -> Request | None:
        """Give the first of all; None if there is nobody."""
        heap = self._heap
        while heap:
            number, _, request = heap[0]
            if self.get(request) == number:
                return request
            heappop(heap)
        return None

    def first_that(self, fits: Callable[[Request], bool]) -> Request | None:
        """Give the first of those that fit, by looking at all: O(n)."""
        return min(filter(fits, self), key=lambda each: (self[each], each.arrival), default=None)

    def _rebuild(self) -> None:
        self._heap = [(number, request.arrival, request) for request, number in self.items()]
        heapify(self._heap)


class Waiters(WaitersState):
    """All requests that wait, in order. O(log K) per change for K accounts that have any.

    Attributes:
        count: how many wait.
        alone: how many of them may have the pool alone.
        passed_bytes: pool bytes granted so far, at least while anybody waited; what fronts
            count by.
        heads: who is next in each account, unless it waits for its account, by the bytes
            that must be free for it.
        growing: those heads that are grows, by what their accounts hold of the pool, the most
            first.
        counting: fronts by where ``passed_bytes`` stood when they began to count.
        barriers: fronts that too much was granted past, by arrival.
    """

    def __init__(self) -> None:
        self.count = 0
        self.alone = 0
        self.passed_bytes = 0
        self.heads = Ranking()
        self.growing = Ranking()
        self.counting = Ranking()
        self.barriers = Ranking()
        self._arrivals = 0

    def add(self, request: Request) -> bool:
        """Put a request at the end of its line; of an exclusive grant, at its front.

        Returns:
            Whether it is the first of its line now.
        """
        queue = request.account.queue
        if queue is None:
            queue = request.account.queue = Queue()
        self._arrivals += 1
        request.arrival = self._arrivals
        request.state = State.WAITING
        line = queue.line(request)
        if request.exclusive and line:
            self._step_back(next(iter(line)))
        line[request] = None
        if request.exclusive:
            line.move_to_end(request, last=False)
        self.count += 1
        self.alone += request.alone
        return request.exclusive or len(line) == 1

    def remove(self, request: Request, state: State) -> None:
        """Take a request out, wherever it stands, with its outcome."""
        account = request.account
        queue = account.queue
        assert queue is not None
        del queue.line(request)[request]
        if not queue.grows and not queue.requests:
            account.queue = None
        self.count -= 1
        self.alone -= request.alone
        request.state = state
        self._step_back(request)

    def _step_back(self, request: Request) -> None:
        """Forget what a request was as the first of its line, but for its count."""
        self.unrank(request)
        self.stop_counting(request)

    # --- the order between components

    def rank(self, head: Request, needed_free_bytes: int, held_bytes: int) -> None:
        """Rank the head of a queue, whose account holds so much of the pool."""
        self.heads.put(head, needed_free_bytes)
        if head.kind is Kind.GROW:
            self.growing.put(head, -held_bytes)

    def unrank(self, request: Request) -> None:
        """Leave a request out of the order between components: it is not its turn."""
        if request in self.heads:
            self.heads.discard(request)
            if request.kind is Kind.GROW:
                self.growing.discard(request)

    # --- bytes granted past a front, and barriers

    def start_counting(self, front: Request) -> None:
        """Let a front that is no barrier count what is granted past it from now on."""
        if not front.barrier and front not in self.counting:
            self.counting.put(front, self.passed_bytes - front.bypassed)

    def stop_counting(self, front: Request) -> None:
        """Keep a front's count as it stands; it is no barrier while it does not count."""
        if front in self.counting:
            front.bypassed = self.passed_bytes - self.counting[front]
            self.counting.discard(front)
        elif front.barrier:
            front.barrier = False
            self.barriers.discard(front)

    def bar(self, front: Request) -> None:
        """Make a front that counts a barrier."""
        self.stop_counting(front)
        front.barrier = True
        self.barriers.put(front, front.arrival)

    def lift(self, barrier: Request) -> None:
        """Make a barrier an ordinary front again, which counts from 0."""
        self.stop_counting(barrier)
        barrier.bypassed = 0
        self.start_counting(barrier)

    def first_barrier(self) -> Request | None:
        """Give the barrier that arrived first."""
        return self.barriers.first()
