"""Who has how much of what: accounts, their stocks of each resource, and pools.

An `Account` is that of one component. Of each resource (bytes, and others that a limiter or
a component limits, such as file descriptors) it has a `Stock`; the account itself is its
stock of bytes. What is to be divided is in a `Pool` for each resource; the ledger itself is
that of bytes. A group of components has pools of its own, of which they have the same stocks.

This is the state that the ledger keeps; it decides nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from itertools import chain, islice

from .fastpath import NO_LIMIT, AccountState, Holders, LedgerState
from .waiters import Order, Ranking, Request

__all__ = ["BYTES", "NO_LIMIT", "Account", "Group", "Pool", "Sender", "Stock"]

BYTES = "bytes"
"""The resource that every limiter has."""


class Pool(LedgerState):
    """What there is of one resource, to be divided.

    Attributes:
        resource: of what.
        limit: how much there is of it.
        free: ``R``, what nobody has; negative when more is out than there is.
        consumers: how many stocks hold any of it, where the rule asks for that.
        order: who waits for it.
    """

    def __init__(self, resource: str, limit: int, order: Order) -> None:
        self.resource = resource
        self.limit = limit
        self.free = self._lowest_free = limit
        self.moved = 0
        self.look_at = NO_LIMIT
        self.order = order
        self.consumers = 0
        self._closed = False


Group = dict[str, Pool]
"""What the components of one group divide among themselves, by resource."""


class Stock(AccountState):
    """What one account has of one resource. Read it; only its ledger writes it.

    Attributes:
        account: whose it is.
        resource: of what.
        pools: what it is a part of: the group's pool if there is one, and the limiter's.
        firm_limit: the most it may be.
        granted: ``g``: granted to the component itself.
        in_flight: ``S``: granted to its senders.
        excess: ``d``: what the component itself has beyond what is reserved for it.
        senders: how many senders have any.
        own: who is next of the component's own line, if that waits here.
        among: those of the fronts that wait for what others have in flight to be received, by
            what was sent past them.
        fronts: who is next of the senders' lines, those that wait here; by what each needs.
        parked: those of them that wait for the firm limit, and count nothing; likewise.
        ranked: the first of all these, and for which pool it waits; seldom two.
    """

    __slots__ = (
        "account",
        "among",
        "fronts",
        "own",
        "parked",
        "pools",
        "ranked",
        "resource",
        "senders",
    )

    def __init__(self, account: Account, resource: str, firm_limit: int) -> None:
        self.account = account
        self.resource = resource
        self.pools: tuple[Pool, ...] = ()
        self.firm_limit = firm_limit
        self.reserved = 0
        self.granted = 0
        self.live = 0
        self.in_flight = 0
        self.excess = 0
        self.peak = 0
        self.senders = 0
        self.admissions = 0
        self.grouped = False
        self.queue = None
        self.own: Request | None = None
        self.among: Order | None = None
        self.fronts: Ranking | None = None
        self.parked: Ranking | None = None
        self.ranked: dict[Request, Pool] = {}

    @property
    def held(self) -> int:
        """``s``: what it holds of the pools."""
        return max(self.excess, 0) + self.in_flight

    def leave(self, request: Request) -> None:
        """Note that a request does not wait here any more."""
        if self.own is request:
            self.own = None
        elif self.fronts is not None:
            self.fronts.discard(request)
            if self.parked:
                self.parked.discard(request)
        self.unrank(request)
        request.stock = None

    def unrank(self, request: Request) -> None:
        """Leave who waits here out of the order between accounts."""
        pool = self.ranked.pop(request, None)
        if pool is not None:
            pool.order.unrank(request)


class Sender:
    """On whose behalf an account has something in flight, or is asked for it.

    Attributes:
        name: who it is.
        held: ``s_j``: how much of each stock is in flight from it; nothing that is 0.
        line: its requests that wait, in order.
    """

    __slots__ = ("held", "line", "name")

    def __init__(self, name: Hashable) -> None:
        self.name = name
        self.held: dict[Stock, int] = {}
        self.line: OrderedDict[Request, None] = OrderedDict()


class Account(Stock):
    """What one component has of the limit. Read it; only its ledger writes it.

    Of bytes these are the numbers here; of other resources those of ``others``.

    Attributes:
        name: the component's path.
        minimum: bytes reserved for it while it is entered.
        reserved: ``m``: the minimum while entered, else 0.
        live: what its code really has allocated; 0 if that is not tracked.
        excess: ``d = max(granted, live) - reserved``.
        peak: the most bytes that were granted at one time, in flight included.
        others: its stocks of other resources.
        entries: how often it is entered now.
        admissions: grants and grows given so far.
        refusals: grants and grows refused so far.
        group: what it divides with others of its group; None if it is in none.
        by_sender: who has something in flight to it, or waits for that.
        holders: its grants that are held.
        waiting: how many requests wait in it.
        waiting_bytes: how much they want together.
        queue: who waits for the component itself; None if nobody does.
        incoming: requests that wait to take over what this account has.
    """

    __slots__ = (
        "by_sender",
        "entries",
        "group",
        "incoming",
        "minimum",
        "name",
        "others",
        "refusals",
        "waiting",
        "waiting_bytes",
    )

    def __init__(self, name: str, minimum: int, firm_limit: int) -> None:
        super().__init__(self, BYTES, firm_limit)
        self.name = name
        self.minimum = minimum
        self.others: dict[str, Stock] = {}
        self.entries = 0
        self.refusals = 0
        self.group: Group | None = None
        self.by_sender: dict[Hashable, Sender] = {}
        self.incoming: dict[Request, None] = {}
        self.holders = Holders()
        self.waiting = self.waiting_bytes = 0

    def lines(self) -> list[Mapping[Request, None]]:
        """Give the lines in which anybody waits: its own two, and one for each sender."""
        if not self.waiting:
            return []
        queue = self.queue
        lines: list[Mapping[Request, None]] = [sender.line for sender in self.by_sender.values()]
        if queue is not None:
            lines += [queue.grows, queue.requests]
        return [line for line in lines if line]

    def requests(self) -> Iterator[Request]:
        """Give all requests that wait, in no order between its lines."""
        return chain.from_iterable(self.lines())

    def oldest(self) -> Request | None:
        """Give the request that has waited longest; None if there is none.

        It is the first of its line, or the second behind the grow of an exclusive grant.
        """
        firsts = (each for line in self.lines() for each in islice(line, 2))
        return min(firsts, key=lambda request: request.arrival, default=None)

    @property
    def is_waited_for(self) -> bool:
        """Whether anybody waits for it: the component itself, or one of its senders."""
        return any(stock.own is not None or stock.fronts for stock in self.stocks())

    def stocks(self) -> list[Stock]:
        """Give all its stocks, that of bytes first."""
        return [self, *self.others.values()]
