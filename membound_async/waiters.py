"""The order among waiters: first in first out, smallest threshold first, and barriers.

A component has a line of its own, and one for each sender on whose behalf it is asked. In
its own, grows of grants that are held go before new requests, because who holds something
must be able to finish; otherwise first in, first out. Between lines, who is in front and has
the smallest threshold goes first. So that nobody starves, a request at the front of its line
counts what is granted past it, in each resource that it needs; past a limit it becomes a
*barrier*, and nobody gets what it lacks until it is served.

This module keeps that order and knows nothing else: numbers are handed to it.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable, Mapping
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any

from .fastpath import NO_LIMIT, WaitersState

if TYPE_CHECKING:
    from .stocks import Account, Sender, Stock

__all__ = ["Kind", "Order", "Queue", "Ranking", "Request", "State", "Waiters"]

NOTHING: Mapping[str, int] = {}


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
    """One wish for bytes, and for other resources, of one account; until its outcome.

    Attributes:
        account: whose account is charged.
        nbytes: how much is wanted; replaced by how much was given once it is admitted.
        kind: a new grant, a grow of one that is held, or a component's minimum.
        also: how much is wanted of other resources.
        sender: on whose behalf; None for the component itself.
        source: the account that gives up as much when it is admitted: it is a transfer.
        up_to: the most that is of use, at least ``nbytes``.
        held: of a grow, the bytes that the grant has already.
        alone: may exceed the quota, by holding the pool alone.
        exclusive: was admitted so; of a grow that waits, belongs to a grant that is.
        owner: whatever the caller wants to find again when the outcome is there.
        task: the task that waits for it; None if that is not known.
        gives_up: whether it may give up by itself, because there is a time limit.
        holders: of one that is deadlocked, the components and what they hold.
    """

    __slots__ = (
        "account",
        "alone",
        "also",
        "arrival",
        "asked_at",
        "barrier",
        "exclusive",
        "gives_up",
        "held",
        "holders",
        "kind",
        "nbytes",
        "orders",
        "out_of_turn",
        "owner",
        "pooled",
        "sender",
        "source",
        "state",
        "stock",
        "task",
        "up_to",
    )

    def __init__(
        self,
        account: Account,
        nbytes: int,
        kind: Kind = Kind.GRANT,
        *,
        also: Mapping[str, int] = NOTHING,
        sender: Sender | None = None,
        source: Account | None = None,
        up_to: int | None = None,
        held: int = 0,
        alone: bool = False,
        exclusive: bool = False,
        owner: Any = None,
    ) -> None:
        self.account = account
        self.nbytes = nbytes
        self.kind = kind
        self.also = also
        self.sender = sender
        self.source = source
        self.up_to = nbytes if up_to is None else up_to
        self.held = held
        self.alone = alone
        self.exclusive = exclusive
        self.owner = owner
        self.task: Any = None
        self.gives_up = False
        self.holders: tuple[tuple[str, int], ...] = ()
        self.state = State.NEW
        self.pooled = False
        """Whether any of its bytes came out of the pool; known once it is admitted."""
        self.out_of_turn = False
        """Whether it was admitted against the rule, because nobody else held anything."""
        self.arrival = 0
        self.barrier = False
        self.orders: tuple[Order, ...] = ()
        """Those of the pools that it draws on, once it waits."""
        self.stock: Stock | None = None
        """Where it waits, once it is the next of its line."""
        self.asked_at = 0.0
        """When it was made, by the clock of whoever made it."""


class Queue:
    """The waiters of an account's own line; there is one only while anybody waits."""

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

        The grow of a grant that holds the pool alone; else the first barrier; else the first
        grow; else the first of the others.
        """
        fronts = self.fronts()
        barriers = [front for front in fronts if front.barrier]
        if barriers and not fronts[0].exclusive:
            return min(barriers, key=lambda front: front.orders[0].barriers[front])
        return fronts[0]


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


class Order:
    """The order between those who wait for one pool. O(log K) per change for K that wait.

    Attributes:
        passed: how much of the pool was granted so far, at least while anybody waited; what
            fronts count by.
        heads: who is next in each stock of this pool, by how much must be free for it.
        growing: those heads that are grows, by what their accounts hold of the pool, the most
            first.
        counting: fronts by where ``passed`` stood when they began to count.
        bypassed: how much was granted past those fronts that have counted, but do not now.
        barriers: fronts that too much was granted past, by arrival; before them those who hold
            what others wait for.
    """

    def __init__(self) -> None:
        self.passed = 0
        self.heads = Ranking()
        self.growing = Ranking()
        self.counting = Ranking()
        self.bypassed: dict[Request, int] = {}
        self.barriers = Ranking()

    def rank(self, head: Request, needed_free: int, held: int) -> None:
        """Rank who is first in a stock that holds so much of the pool."""
        self.heads.put(head, needed_free)
        if head.kind is Kind.GROW:
            self.growing.put(head, -held)

    def unrank(self, request: Request) -> None:
        """Leave a request out of the order: it is not its turn."""
        if request in self.heads:
            self.heads.discard(request)
            if request.kind is Kind.GROW:
                self.growing.discard(request)

    def first_barrier(self) -> Request | None:
        """Give the barrier that goes before the others."""
        return self.barriers.first()

    def begin(self, front: Request) -> None:
        """Let a front that is no barrier here count what is granted past it from now on."""
        if front not in self.counting and front not in self.barriers:
            before = self.bypassed.pop(front, 0) if self.bypassed else 0
            self.counting.put(front, self.passed - before)

    def pause(self, front: Request) -> None:
        """Keep a front's count as it stands."""
        if front in self.counting:
            self.bypassed[front] = self.passed - self.counting[front]
            self.counting.discard(front)

    def forget(self, front: Request) -> None:
        """Forget what a front has counted, and that it is a barrier here."""
        self.counting.discard(front)
        self.barriers.discard(front)
        self.bypassed.pop(front, None)


class Waiters(WaitersState, Order):
    """All requests that wait, and the order between those that wait for bytes.

    Attributes:
        count: how many wait.
        alone: how many of them may have the pool alone.
    """

    def __init__(self) -> None:
        Order.__init__(self)
        self.count = 0
        self.alone = 0
        self._arrivals = 0
        self._of_bytes = (self,)  # one tuple for all who wait for nothing else

    @property
    def ended(self) -> int:
        """How many do not wait any more."""
        return self._arrivals - self.count

    def add(self, request: Request, orders: tuple[Order, ...] | None = None) -> bool:
        """Put a request at the end of its line; of an exclusive grant, at its front.

        Args:
            request: who will wait.
            orders: those of the pools that it draws on; None for that of bytes.

        Returns:
            Whether it is the first of its line now.
        """
        account = request.account
        if request.sender is not None:
            line = request.sender.line
        else:
            if account.queue is None:
                account.queue = Queue()
            line = account.queue.line(request)
        self._arrivals += 1
        request.arrival = self._arrivals
        request.state = State.WAITING
        request.orders = self._of_bytes if orders is None else orders
        if request.exclusive and line:
            self._step_back(next(iter(line)))
        line[request] = None
        if request.exclusive:
            line.move_to_end(request, last=False)
        account.waiting += 1
        account.waiting_bytes += request.nbytes
        self.count += 1
        self.alone += request.alone
        return request.exclusive or len(line) == 1

    def remove(self, request: Request, state: State) -> None:
        """Take a request out, wherever it stands, with its outcome."""
        account = request.account
        account.waiting -= 1
        account.waiting_bytes -= request.nbytes
        if request.sender is not None:
            del request.sender.line[request]
        else:
            queue = account.queue
            assert queue is not None
            del queue.line(request)[request]
            if not queue.grows and not queue.requests:
                account.queue = None
        self.count -= 1
        self.alone -= request.alone
        request.state = state
        self._step_back(request)
        for order in request.orders:
            order.bypassed.pop(request, None)

    def bypassed_by(self, request: Request) -> int:
        """Give how many bytes of the pool were granted past a request as the first of its line."""
        if request in self.counting:
            return self.passed - self.counting[request]
        return self.bypassed.get(request, 0)

    def _step_back(self, request: Request) -> None:
        """Forget what a request was as the first of its line, but for its count."""
        if request.stock is not None:
            request.stock.leave(request)
        self.stop_counting(request)

    # --- what is granted past a front, and barriers

    @staticmethod
    def start_counting(front: Request) -> None:
        """Let a front that is no barrier count what is granted past it from now on."""
        if not front.barrier:
            for order in front.orders:
                order.begin(front)

    @staticmethod
    def stop_counting(front: Request) -> None:
        """Keep a front's count as it stands; it is no barrier while it does not count."""
        for order in front.orders:
            order.pause(front)
            if front.barrier:
                order.barriers.discard(front)
        front.barrier = False

    def bar(self, front: Request, place: int | None = None) -> None:
        """Make a front that counts a barrier, or one that has a place before the others."""
        self.stop_counting(front)
        front.barrier = True
        for order in front.orders:
            order.barriers.put(front, front.arrival if place is None else place - NO_LIMIT)

    def lift(self, barrier: Request) -> None:
        """Make a barrier an ordinary front again, which counts from 0."""
        self.stop_counting(barrier)
        for order in barrier.orders:
            order.bypassed.pop(barrier, None)
        self.start_counting(barrier)
