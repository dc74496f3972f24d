"""The quota: who may have how much of the limit, and who has to wait for how much.

What is free, in bytes (``k`` runs over the components)::

    g_k = granted        live_k = really allocated        m_k = minimum, while entered
    S_k = in flight to k, charged on behalf of its senders
    C_k = max(m_k, g_k, live_k) + S_k                     what k has of the limit
    R   = L - B - D - sum(C_k)                            what is free
    D   = max(0, M + A - B - W)                           measured, but granted to nobody

``W``, the high-water mark of what was had, and ``A``, what was admitted and cannot be in use yet,
follow from the readings; see ``Ledger.observe``.

The rule, from bus1 (Linux, resource accounting): "for any given request, the resources
available to the consumer making the request is half the resources not currently consumed by
anybody else". With ``s = C - m``, what a component holds of the pool, a request that draws
``c`` from the pool fits iff ``s + c <= share * (R + s)``; with ``share = p/q``, in integers::

    q*(s + c) <= p*(R + s)    <=>    R >= T = ceil((q*c + (q - p)*s) / p)

The threshold T depends on nothing but the component itself, so a waiter is woken when R has
risen to its T, and the smallest T of all tells whether anybody is.

What is left of the component's own minimum is used first and is no draw on the pool: with
``d = max(g, live) - m`` (negative while some of it is left) a request of ``n`` draws
``c = n + min(d, 0)``, and ``s = max(d, 0) + S``. A request with ``c <= 0`` needs nothing.

The senders of a component divide what it may have by the same rule. It may have
``H = share*(R + s) - s`` more, so a sender with ``s_j`` in flight may have ``c`` more iff
``s_j + c <= share * (H + s_j)``, that is iff H is at least::

    t = x / p    where    x = q*c + (q - p)*s_j    (x = p*c for the component itself)

    H >= t       <=>      R >= T = ceil((q*x + p*(q - p)*s) / (p*p))

The same ``t`` against what is left up to the firm limit divides that. So the requests of one
component are in the same order whatever they wait for, and a change of ``s`` moves them all
alike: those of its senders are ranked by x within the component, and the first of them by T
among all components.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from .exceptions import GrantTooLarge, QuotaExceeded
from .fastpath import NO_LIMIT
from .rules import Rule, Share
from .stocks import BYTES, Account, Pool, Sender, Stock
from .waiters import Kind, Order, Request, Waiters

__all__ = ["READY", "Quota"]

READY = -NO_LIMIT
"""What must be free for a request that draws nothing from the pool: below every threshold."""


class Quota(Pool):
    """What may be had by the rule, and what each request needs for that. It charges nothing.

    It is the pool of bytes, and has those of other resources beside it. `ledger.Ledger` says
    what is taken and by whom.

    Args:
        limit: ``L``, the effective limit.
        baseline: ``B``, what was in use before anything was granted.
        share: the part of what nobody else holds that a component may have, or a rule.
        bypass_limit: how many pool bytes may be granted past a waiter; None for ``L``.
        others: how much there is of other resources. Of those the bypass limit is the limit.

    Attributes:
        free: ``R``; negative when more is out than there is.
        drift: ``D``, as of the last reading.
        measured: ``M``, the last reading.
        pools: what is divided, by resource.
        waiters: who waits.
    """

    def __init__(
        self,
        limit: int,
        *,
        baseline: int,
        share: Fraction | Rule,
        bypass_limit: int | None,
        others: Mapping[str, int],
    ) -> None:
        self.waiters = Waiters()
        super().__init__(BYTES, limit, self.waiters)
        self.rule = Share(share) if isinstance(share, Fraction) else share
        self.baseline = baseline
        self.drift = 0
        self.measured = baseline
        self.arriving: int = 0
        """``A``: charged, but not handed over yet, so that no reading can show it."""
        self.free = self._lowest_free = limit - baseline
        self.pools: dict[str, Pool] = {BYTES: self}
        for resource, amount in others.items():
            self.pools[resource] = Pool(resource, amount, Order())
        self._unit = self.rule.unit
        self._idle_part = self.rule.part(1)
        # Where the part depends on others, the fast path leaves the decision to request().
        p, q = self.rule.part(0)
        self._p, self._q = None if self.rule.depends_on_consumers else p, q
        self._bypass_limit = bypass_limit
        self._reserved: int = 0
        self._exclusive: Account | None = None
        """Whose grant has the pool of bytes alone."""

    # --- numbers

    @property
    def committed(self) -> int:
        """Sum of ``C_k``: reserved, granted, in flight or really used."""
        return self.limit - self.baseline - self.drift - self.free

    @property
    def highest_committed(self) -> int:
        """``W``: heap up to there was had before and may be reused, so it is no drift."""
        return self.limit - self.baseline - self.drift - self._lowest_free

    @property
    def bypass_limit(self) -> int:
        """How many pool bytes may be granted past a waiter before it becomes a barrier."""
        return self.limit if self._bypass_limit is None else self._bypass_limit

    def knows(self, account: Account, resource: str) -> bool:
        """Whether anything limits that resource for the account."""
        return resource in self.pools or resource in account.others

    def available(self, account: Account, sender: Sender | None = None) -> int:
        """The most bytes that the account, or a sender to it, could have at once, now."""
        behind = account.queue is not None if sender is None else bool(sender.line)
        return 0 if behind else self._room(account, sender)

    def most(self, account: Account, sender: Sender | None = None) -> int:
        """The most bytes that it could have in one grant if nobody else had anything."""
        return self._most(account, sender)

    def most_alone(self, account: Account) -> int:
        """The most that one grant could have with the pool to itself."""
        others = self._reserved - account.reserved
        return max(0, min(account.firm_limit, self.limit - self.baseline - others))

    # --- requests

    def threshold(self, request: Request) -> int | None:
        """``T``: how many bytes must be free for a request by the rule; None if it needs none."""
        threshold = self._threshold(request, request.account, self._demands(request)[0][1], self)
        return None if threshold == READY else threshold

    def missing(self, request: Request) -> int:
        """How much more must be free for what it wants by the rule; 0 or less if no more.

        In bytes; if there are enough, of the resource that it lacks most.
        """
        missing = [
            threshold - pool.free
            for stock, amount in self._demands(request)
            for pool in stock.pools
            if (threshold := self._threshold(request, stock, amount, pool)) != READY
        ]
        return next((each for each in missing if each > 0), max(missing, default=0))

    def waits_for(self, request: Request) -> tuple[str, int]:
        """Say what a request that waits lacks, and how much of it.

        A resource, its component's ``"firm limit"``, or, if there is enough, its ``"turn"``.
        """
        lacks = self._lacks(request)
        if lacks is None:
            return "turn", 0
        stock, pool = lacks
        amount = self._amount(request, stock)
        if pool is not None:
            missing = self._threshold(request, stock, amount, pool) - pool.free
            return (pool.resource, missing) if missing > 0 else ("turn", 0)
        left = stock.firm_limit - stock.in_flight
        if request.sender is None:
            return "firm limit", stock.granted + amount - left
        needed = -(-self._inner(request, stock, amount) // self._unit)
        return "firm limit", max(0, needed + max(stock.granted, stock.reserved) - left)

    def refusal(self, request: Request) -> GrantTooLarge | None:
        """Say why a request could not even be met by an idle limiter; None if it could."""
        account = request.account
        name = account.name
        if request.kind is Kind.ENTER:
            most = min(self._capacity(pool) for pool in account.pools)
            if account.entries or account.minimum <= most:
                return None
            return GrantTooLarge(name, account.minimum, most, "limit less baseline")
        for stock, amount in self._amounts(account, request.nbytes, request.also):
            if stock is account:
                amount += request.held
            most = self._most(stock, request.sender)
            if amount <= most:
                continue
            alone = 0
            if request.alone and stock is account:
                alone = self.most_alone(account)
                if amount <= alone:
                    continue
            reason = self._bound(stock, request.sender, most)
            if alone > most:
                is_firm = alone == account.firm_limit
                reason = (
                    "its firm limit" if is_firm else "limit less baseline and the others' minimums"
                )
            return GrantTooLarge(name, amount, max(most, alone), reason, stock.resource)
        return None

    def _obstacle(self, request: Request) -> QuotaExceeded | None:
        """Say why a request cannot be met without waiting; None if it can."""
        account, sender = request.account, request.sender
        line = account.queue if sender is None else sender.line
        lacks = self._lacks(request)
        stock, pool = (account, self) if lacks is None else lacks
        if line:
            whose = "component" if sender is None else "sender"
            reason = f"others of the {whose} wait already"
        elif pool is None and sender is not None and _is_barred(stock):
            reason = "another sender that has waited long goes first"
        elif pool is None:
            reason = "its firm limit" if sender is None else "the sender's part of its firm limit"
        elif lacks is None and self._need(request) <= 0:
            return None
        elif pool is self and self._exclusive is not None:
            reason = "one grant holds the pool alone"
        elif pool._closed:
            reason = "a request that has waited long goes first"
        elif pool is self and self.measured >= self.limit:
            reason = "measured memory is at the limit"
        elif lacks is None:
            return None
        else:
            reason = f"its share of what nobody else holds ({pool.free} {pool.resource} are free)"
        wanted = dict(self._amounts(account, request.nbytes, request.also))[stock]
        room = 0 if line else self._room(stock, sender)
        return QuotaExceeded(account.name, wanted, room, reason, stock.resource)

    # --- what a request wants

    def _amounts(
        self, account: Account, nbytes: int, also: Mapping[str, int]
    ) -> Sequence[tuple[Stock, int]]:
        """Give the stocks that it concerns, bytes first, and how much of each."""
        if not also:
            return ((account, nbytes),)
        others = [(self._stock(account, name), amount) for name, amount in also.items()]
        return [(account, nbytes), *others]

    @staticmethod
    def _amount(request: Request, stock: Stock) -> int:
        """How much of a stock a request wants."""
        if request.kind is Kind.ENTER:
            account = request.account
            return 0 if account.entries else max(0, account.minimum - account.excess)
        return request.nbytes if stock is request.account else request.also[stock.resource]

    def _demands(self, request: Request) -> Sequence[tuple[Stock, int]]:
        """Give what a request would charge."""
        account = request.account
        if request.kind is Kind.ENTER:
            return [(account, 0 if account.entries else max(0, account.minimum - account.excess))]
        return self._amounts(account, request.nbytes, request.also)

    @staticmethod
    def _is_plain(request: Request) -> bool:
        """Whether it asks for bytes of the limiter's pool only, for the component itself."""
        return request.sender is None and not request.also and not request.account.grouped

    def _stock(self, account: Account, resource: str) -> Stock:
        """Give an account's stock of a resource, made now if it is the first of that."""
        if resource == BYTES:
            return account
        stock = account.others.get(resource)
        if stock is None:
            stock = account.others[resource] = Stock(account, resource, NO_LIMIT)
            stock.pools = self._pools_of(account, resource)
        return stock

    def _pools_of(self, account: Account, resource: str) -> tuple[Pool, ...]:
        pools = ((account.group or {}).get(resource), self.pools.get(resource))
        return tuple(pool for pool in pools if pool is not None)

    # --- what it needs for that

    def _inner(self, request: Request, stock: Stock, amount: int) -> int:
        """``x``: what a request needs of its component's part; ``READY`` if it draws nothing."""
        if request.kind is Kind.ENTER:
            return amount * self._unit or READY
        sender = request.sender
        if sender is None:
            excess = stock.excess
            draw = amount if excess > 0 else amount + excess
            return draw * self._unit if draw > 0 else READY
        if not amount:
            return READY
        held = sender.held.get(stock, 0)
        p, q = self.rule.part(stock.senders + (not held))
        return q * amount + (q - p) * held

    def _threshold(self, request: Request, stock: Stock, amount: int, pool: Pool) -> int:
        """``T`` of a request in a pool; ``READY`` if it draws nothing."""
        x = self._inner(request, stock, amount)
        if x == READY:
            return READY
        unit, held = self._unit, stock.in_flight
        if request.kind is Kind.ENTER:
            return x // unit
        if stock.excess > 0:
            held += stock.excess
        if request.source is None:
            p, q = self._part(stock, pool) if self._p is None else (self._p, self._q)
            return -((-q * x - unit * (q - p) * held) // (unit * p))
        credit, leaves = self._credit(request, pool)
        p, q = self._part(stock, pool, leaves)
        return -((-q * x - unit * (q - p) * held) // (unit * p)) - credit

    def _part(self, stock: Stock, pool: Pool, leaves: int = 0) -> tuple[int, int]:
        """``p`` and ``q`` of what nobody else holds that the stock may have."""
        return self.rule.part(pool.consumers + (stock.held <= 0) - leaves)

    def _credit(self, request: Request, pool: Pool) -> tuple[int, int]:
        """How much a transfer frees in a pool before it is charged there anew.

        And how many consumers there are less then.
        """
        source = request.source
        assert source is not None
        for stock, amount in self._amounts(source, request.nbytes, request.also):
            if pool in stock.pools:
                left = max(stock.granted - amount, stock.live) - stock.reserved
                freed = max(0, stock.excess) - max(0, left)
                return freed, int(0 < stock.held == freed)
        return 0, 0

    def _need(self, request: Request) -> int:
        """``c`` of a request: what it would draw from the pool of bytes."""
        if request.kind is Kind.ENTER:
            return self._demands(request)[0][1]
        if request.sender is not None:
            return request.nbytes
        draw = request.nbytes + min(request.account.excess, 0)
        return draw if request.source is None else draw - self._credit(request, self)[0]

    def _oversize(self, request: Request) -> bool:
        """Whether it can be met only by letting it have the pool alone."""
        return request.alone and request.nbytes + request.held > self.most(request.account)

    # --- what keeps it out

    def _lacks(
        self, request: Request, *, but_for: Pool | None = None
    ) -> tuple[Stock, Pool | None] | None:
        """Say what keeps a request out: a stock's firm limit or a pool; None if nothing does."""
        demands = self._demands(request)
        for stock, amount in demands:
            if self._over_firm(request, stock, amount):
                return stock, None
            if request.sender is not None and amount and stock.among is not None:
                barrier = stock.among.first_barrier()
                if barrier is not None and barrier is not request:
                    return stock, None
        for stock, amount in demands:
            for pool in stock.pools:
                threshold = self._threshold(request, stock, amount, pool)
                if threshold == READY or pool is but_for:
                    continue
                if threshold > pool.free or (
                    pool._closed and self._bars(pool, request, stock, amount)
                ):
                    return stock, pool
        return None

    def _bars(self, pool: Pool, request: Request, stock: Stock, amount: int) -> bool:
        """Whether somebody goes before a request in a closed pool.

        A barrier, unless it has there what it needs and will have it still.
        """
        if pool is self and self._exclusive is not None:
            return not request.exclusive
        barrier = pool.order.first_barrier()
        if barrier is None or barrier is request:
            return False
        if barrier.account is request.account:
            return True
        arrives = self.rule.depends_on_consumers and stock.held <= 0
        for theirs, wanted in self._demands(barrier):
            if pool in theirs.pools:
                pool.consumers += arrives  # as it will be
                threshold = self._threshold(barrier, theirs, wanted, pool)
                pool.consumers -= arrives
                return threshold > pool.free - amount
        return False

    def _over_firm(self, request: Request, stock: Stock, amount: int) -> bool:
        """Whether it waits for its own component to give something back, or to receive it.

        For a sender that is so, too, if it would not fit even with all others gone: so whoever
        fills an inbox that is never read holds up nobody who sends to others.
        """
        if request.kind is Kind.ENTER or (request.also and not amount):
            return False
        left = stock.firm_limit - stock.in_flight
        if request.sender is None:
            return stock.granted + amount > left
        x = self._inner(request, stock, amount)
        if x == READY:
            return False
        if stock.firm_limit != NO_LIMIT:
            left -= max(stock.granted, stock.reserved)
            if x > self._unit * left:
                return True
        p, q = self._idle_part
        held, reserved, most = stock.held, stock.reserved, x * q
        return any(
            most > self._unit * (p * (self._capacity(pool) - reserved) - q * held)
            for pool in stock.pools
        )

    def _waits_for_others(self, request: Request, stock: Stock) -> bool:
        """Whether a sender that is over waits for others' messages to be received and released.

        Else it is only what it has in flight itself that keeps it out.
        """
        assert request.sender is not None
        mine = request.sender.held.get(stock, 0)
        x = self._inner(request, stock, self._amount(request, stock))
        firm, reserved = stock.firm_limit, stock.reserved
        if x > self._unit * (firm - reserved - mine):
            return False
        p, q = self._idle_part
        return all(
            x * q <= self._unit * (p * (self._capacity(pool) - reserved) - q * mine)
            for pool in stock.pools
        )

    def _is_parked(self, request: Request) -> bool:
        """Whether it waits for a firm limit, of any resource."""
        return any(
            self._over_firm(request, stock, amount) for stock, amount in self._demands(request)
        )

    def _would_fit(self, request: Request, more: int) -> bool:
        """Whether a request fits by its own thresholds, if so many bytes more were free."""
        for stock, amount in self._demands(request):
            if self._over_firm(request, stock, amount):
                return False
            for pool in stock.pools:
                threshold = self._threshold(request, stock, amount, pool)
                if threshold != READY and threshold > pool.free + (more if pool is self else 0):
                    return False
        return True

    def _fits(self, request: Request) -> bool:
        """Whether a head fits into what is free without drift, whatever its share."""
        if self._need(request) > self.free + self.drift:
            return False
        return self._is_plain(request) or self._lacks(request, but_for=self) is None

    # --- how much there is

    def _room(self, stock: Stock, sender: Sender | None) -> int:
        """How much could be had of a stock now, whoever is before in the line."""
        left = stock.firm_limit - stock.in_flight
        if sender is None:
            reserve = max(-stock.excess, 0)
            rooms = [left - stock.granted]
            rooms += [reserve + self._allowed(stock, pool) for pool in stock.pools]
        else:
            if _is_barred(stock):
                return 0
            held = sender.held.get(stock, 0)
            p, q = self.rule.part(stock.senders + (not held))
            left -= max(stock.granted, stock.reserved)
            rooms = [(p * left - (q - p) * held) // q]
            for pool in stock.pools:
                outer_p, outer_q = self._part(stock, pool)
                more = outer_p * pool.free - (outer_q - outer_p) * stock.held  # outer_q * H
                room = (p * more - outer_q * (q - p) * held) // (outer_q * q)
                rooms.append(room if self._is_open(pool) else 0)
        return max(0, min(rooms))

    def _most_now(self, account: Account) -> int:
        """The most bytes that an admitted request may have, if it wants as much as it can."""
        reserve = max(-account.excess, 0)
        rooms = [account.firm_limit - account.in_flight - account.granted]
        for pool in account.pools:
            allowed = 0
            if not pool._closed:
                p, q = self._part(account, pool)
                allowed = max(0, (p * pool.free - (q - p) * account.held) // q)
            rooms.append(reserve + allowed)
        return min(rooms)

    def _allowed(self, stock: Stock, pool: Pool) -> int:
        """What the rule lets an account draw from a pool now."""
        if not self._is_open(pool):
            return 0
        p, q = self._part(stock, pool)
        return max(0, (p * pool.free - (q - p) * stock.held) // q)

    def _is_open(self, pool: Pool) -> bool:
        return not pool._closed and (pool is not self or self.measured < self.limit)

    def _capacity(self, pool: Pool) -> int:
        return self.limit - self.baseline if pool is self else pool.limit

    def _most(self, stock: Stock, sender: Sender | None) -> int:
        """How much of a stock could be had at once of an idle limiter."""
        p, q = self._idle_part
        reserved, most = stock.reserved, stock.firm_limit
        if sender is not None and most != NO_LIMIT:
            most = p * (most - reserved) // q
        for pool in stock.pools:
            most = min(most, self._most_of(pool, reserved, sender))
        return most

    def _most_of(self, pool: Pool, reserved: int, sender: Sender | None) -> int:
        p, q = self._idle_part
        left = self._capacity(pool) - reserved
        if sender is None:
            return reserved + max(0, p * left // q)
        return max(0, p * p * left // (q * q))

    def _bound(self, stock: Stock, sender: Sender | None, most: int) -> str:
        """Say what bounds how much of a stock could be had."""
        part = "" if sender is None else "a sender's part of "
        for pool in stock.pools:
            if self._most_of(pool, stock.reserved, sender) == most != stock.firm_limit:
                what = "limit less baseline" if pool is self else f"{pool.limit} {pool.resource}"
                return f"{part}{self.rule} of {what}"
        return f"{part}its firm limit"


def _is_barred(stock: Stock) -> bool:
    """Whether one of those who send to a component goes before all others."""
    return stock.among is not None and stock.among.first_barrier() is not None
