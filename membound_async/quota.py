"""The quota: who may have how much of the limit, and who has to wait for how much.

What is free, in bytes (``k`` runs over the components)::

    g_k = granted        live_k = really allocated        m_k = minimum, while entered
    C_k = max(m_k, g_k, live_k)                           what k has of the limit
    R   = L - B - D - sum(C_k)                            what is free
    D   = max(0, M - B - W)                               measured, but granted to nobody

The rule, from bus1 (Linux, resource accounting): "for any given request, the resources
available to the consumer making the request is half the resources not currently consumed by
anybody else". With ``s = C - m``, what a component holds of the pool, a request that draws
``c`` from the pool fits iff ``s + c <= share * (R + s)``; with ``share = p/q``, in integers::

    q*(s + c) <= p*(R + s)    <=>    R >= T = ceil((q*c + (q - p)*s) / p)

The threshold T depends on nothing but the component itself, so a waiter is woken when R has
risen to its T, and the smallest T of all tells whether anybody is.

What is left of the component's own minimum is used first and is no draw on the pool: with
``d = max(g, live) - m`` (negative while some of it is left) a request of ``n`` draws
``c = n + min(d, 0)``, and ``s = max(d, 0)``. A request with ``c <= 0`` needs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

from .exceptions import GrantTooLarge, InvalidLimit, QuotaExceeded
from .fastpath import NO_LIMIT, AccountState, LedgerState
from .waiters import Kind, Queue, Request, State, Waiters

__all__ = ["NO_LIMIT", "Account", "Ledger"]

READY = -1
"""What must be free for a request that draws nothing from the pool: below every threshold."""


class Account(AccountState):
    """What one component has of the limit. Read it; only its ledger writes it.

    Attributes:
        name: the component's path.
        minimum: bytes reserved for it while it is entered.
        firm_limit: the most it may hold, minimum included.
        reserved: ``m``: the minimum while entered, else 0.
        granted: ``g``.
        live: what its code really has allocated; 0 if that is not tracked.
        excess: ``d = max(granted, live) - reserved``.
        peak: the most that was granted at one time.
        entries: how often it is entered now.
        admissions: grants and grows given so far.
        refusals: grants and grows refused so far.
        queue: who waits; None if nobody does.
    """

    __slots__ = ("entries", "minimum", "name", "refusals")

    def __init__(self, name: str, minimum: int, firm_limit: int) -> None:
        self.name = name
        self.minimum = minimum
        self.firm_limit = firm_limit
        self.reserved = 0
        self.granted = 0
        self.live = 0
        self.excess = 0
        self.peak = 0
        self.entries = 0
        self.admissions = 0
        self.refusals = 0
        self.queue = None


class Ledger(LedgerState):
    """Decides about every request, and remembers who has what. Pure: no clock, no I/O.

    Whatever can let waiters in returns the requests it has settled, in order: each is
    ``ADMITTED`` and charged already, or has become ``IMPOSSIBLE``. Amounts are bytes.

    Args:
        limit: ``L``, the effective limit.
        baseline: ``B``, what was in use before anything was granted.
        share: the part of what nobody else holds that a component may have.
        bypass_limit: how many pool bytes may be granted past a waiter; None for ``L``.

    Attributes:
        free: ``R``; negative when more is out than there is.
        drift: ``D``, as of the last reading.
        measured: ``M``, the last reading.
        moved: how much was granted and given back so far; grows with every change.
        look_at: the value of ``moved`` past which memory must be measured again.
    """

    def __init__(
        self,
        limit: int,
        *,
        baseline: int = 0,
        share: Fraction = Fraction(1, 2),
        bypass_limit: int | None = None,
    ) -> None:
        if not 0 < share <= 1:
            raise InvalidLimit(
                f"share={share}: a request may have a part above 0 and at most 1 of what "
                "nobody else holds, for example Fraction(1, 2)"
            )
        self.limit = limit
        self.baseline = baseline
        self.drift = 0
        self.measured = baseline
        self.free = limit - baseline
        self.moved = 0
        self.look_at = NO_LIMIT
        self.waiters = Waiters()
        self.accounts: dict[str, Account] = {}
        self._p, self._q = share.numerator, share.denominator
        self._bypass_limit = bypass_limit
        self._reserved = 0
        self._tracked = False
        self._holders: dict[Account, None] = {}
        self._lowest_free = self.free
        self._exclusive: Account | None = None
        self._closed = False

    # --- accounts

    def account(self, name: str, minimum: int = 0, firm_limit: int = NO_LIMIT) -> Account:
        """Give the account of that name; it is opened with these bounds if it is new."""
        account = self.accounts.get(name)
        if account is None:
            account = self.accounts[name] = Account(name, minimum, firm_limit)
        return account

    def declare(self, account: Account, minimum: int, firm_limit: int) -> list[Request]:
        """Set the bounds of an account. A minimum counts from the next time it is entered."""
        account.minimum = minimum
        account.firm_limit = firm_limit
        return self._bounds_changed(account)

    def enter_again(self, account: Account) -> bool:
        """Enter an account that needs no reservation; False if it has to be requested."""
        if account.entries == 0 and account.minimum > 0:
            return False
        account.entries += 1
        return True

    def leave(self, account: Account) -> list[Request]:
        """Leave an account; the last to leave gives up its minimum.

        What was granted out of it stays charged until it is given back.
        """
        account.entries = max(0, account.entries - 1)
        if account.entries or not account.reserved:
            return []
        self._update(account, account.granted, 0, account.live)
        return self._bounds_changed(account)

    # --- numbers

    @property
    def committed(self) -> int:
        """Sum of ``C_k``: reserved, granted or really used."""
        return self.limit - self.baseline - self.drift - self.free

    @property
    def highest_committed(self) -> int:
        """``W``: the highest sum of ``C_k``; heap up to there may be reused, so it is no drift."""
        return self.limit - self.baseline - self.drift - self._lowest_free

    @property
    def bypass_limit(self) -> int:
        """How many pool bytes may be granted past a waiter before it becomes a barrier."""
        return self.limit if self._bypass_limit is None else self._bypass_limit

    def draw(self, account: Account, nbytes: int) -> int:
        """``c``: what a request of ``nbytes`` takes from the pool; 0 or less if nothing."""
        return nbytes + min(account.excess, 0)

    def threshold(self, account: Account, draw: int) -> int:
        """``T``: how much must be free for the account to draw that much."""
        held = max(account.excess, 0)
        return -((-self._q * draw - (self._q - self._p) * held) // self._p)

    def available(self, account: Account) -> int:
        """The most that the account could have at once, now."""
        if account.queue is not None:
            return 0
        most = max(-account.excess, 0)
        if not self._closed and self.measured < self.limit:
            most += self._allowed(account)
        return max(0, min(most, account.firm_limit - account.granted))

    def most(self, account: Account) -> int:
        """The most that the account could have in one grant if nobody else had anything."""
        reserved = account.reserved
        pool = max(0, self._p * (self.limit - self.baseline - reserved) // self._q)
        return min(account.firm_limit, reserved + pool)

    def most_alone(self, account: Account) -> int:
        """The most that one grant could have with the pool to itself."""
        others = self._reserved - account.reserved
        return max(0, min(account.firm_limit, self.limit - self.baseline - others))

    # --- requests

    def admit(self, account: Account, nbytes: int) -> bool:
        """Charge a new grant if nobody is ahead, it fits, and no reading is due.

        The fast path, in one piece: False says only that ``request`` must decide.
        """
        moved = self.moved + nbytes
        granted = account.granted + nbytes
        if self.waiters.count or granted > account.firm_limit or moved > self.look_at:
            return False
        excess = account.excess
        if excess < 0:
            draw = nbytes + excess
            held = 0
        else:
            draw = nbytes
            held = excess
        if draw > 0:
            free = self.free
            if self._closed or self._q * (held + draw) > self._p * (free + held):
                return False
            excess = (granted if granted > account.live else account.live) - account.reserved
            self.free = free = free + held - (excess if excess > 0 else 0)
            if free < self._lowest_free:
                self._lowest_free = free
        else:
            excess = (granted if granted > account.live else account.live) - account.reserved
        account.excess = excess
        account.granted = granted
        if granted > account.peak:
            account.peak = granted
        account.admissions += 1
        self.moved = moved
        return True

    def request(self, request: Request) -> list[Request]:
        """Ask in order: it is settled at once, or waits.

        Raises:
            GrantTooLarge: not even an idle limiter could give that much; nothing changed.
        """
        error = self.refusal(request)
        if error is not None:
            request.account.refusals += 1
            raise error
        if self.waiters.add(request):
            return self._changed(request.account)
        return []

    def request_nowait(self, request: Request) -> list[Request]:
        """Ask for it now or not at all: on return it is admitted.

        Returns:
            Others that are settled, because so much has passed somebody now.

        Raises:
            GrantTooLarge: not even an idle limiter could give that much.
            QuotaExceeded: there is no room now, or somebody is ahead. Nothing changed.
        """
        account = request.account
        error = self.refusal(request) or self._obstacle(request)
        if error is not None:
            account.refusals += 1
            raise error
        self._charge(request)
        return self._dispatch() if self.waiters.count else []

    def force(self, request: Request) -> list[Request]:
        """Charge a request whatever the rules say of it; give others that are settled by it."""
        self._charge(request)
        return self._changed(request.account)

    def cancel(self, request: Request) -> list[Request]:
        """Take back a request that waits; those behind it may come in."""
        self.waiters.remove(request, State.CANCELLED)
        return self._changed(request.account)

    def give_back(
        self, account: Account, nbytes: int, *, exclusive: bool = False
    ) -> list[Request] | tuple[()]:
        """Return granted bytes; ``exclusive`` if the grant that held the pool alone is over."""
        granted = account.granted - nbytes
        assert granted >= 0, "more given back than granted"
        excess = account.excess
        account.granted = granted
        account.excess = now = (
            granted if granted > account.live else account.live
        ) - account.reserved
        self.free += (excess if excess > 0 else 0) - (now if now > 0 else 0)
        self.moved += nbytes
        if exclusive:
            self._exclusive = None
            self._closed = bool(self.waiters.barriers)
            if account.queue is not None:
                account.queue.head().exclusive = False  # the grant's grow, if that waits
        return self._changed(account) if self.waiters.count else ()

    def lift(self, barrier: Request) -> list[Request]:
        """Make a barrier an ordinary waiter again: what it waits for may be held for good.

        Lift the first one only. The others have only waited behind it, and would lose their
        turn each time, although there may be room for them.
        """
        self.waiters.lift(barrier)
        return self._changed(barrier.account)

    def waiting(self) -> list[Request]:
        """Give all requests that wait, the oldest first."""
        found = [each for account in self.accounts.values() for each in account.queue or ()]
        return sorted(found, key=lambda request: request.arrival)

    def suspend_order(self, requests: Iterable[Request]) -> list[Request]:
        """Admit, of requests that wait, each that fits by its own T and F, whoever is ahead.

        For the others everything is as it was, and order is kept again.
        """
        settled: list[Request] = []
        for request in requests:
            needed = self._needed_free(request)
            if (needed == READY or needed <= self.free) and not self._over_firm(request):
                self.waiters.remove(request, State.ADMITTED)
                self._charge(request)
                settled.append(request)
                self._place(request.account)
        if self.waiters.alone and any(request.kind is Kind.ENTER for request in settled):
            settled += self._drop_impossible(self.accounts.values())
        return settled + self._dispatch() if settled else settled

    def could_fit(self, requests: Iterable[Request], *, unreserved: bool) -> bool:
        """Whether any of these would fit if memory was free that no grant holds.

        That is drift and live bytes; with ``unreserved`` also the minimums of others, with the
        grants out of them.
        """
        free = self.limit - self.baseline
        for account in self.accounts.values():
            if not unreserved:
                free -= max(account.granted, account.reserved)
            elif account.granted > account.reserved or account.queue is not None:
                free -= account.granted
        return any(self._could_fit(request, free, unreserved=unreserved) for request in requests)

    def _could_fit(self, request: Request, free: int, *, unreserved: bool) -> bool:
        account = request.account
        excess = account.granted - account.reserved
        if request.kind is Kind.ENTER:
            return account.minimum - excess <= free
        if self._over_firm(request):
            return False
        draw, held = request.nbytes + min(excess, 0), max(excess, 0)
        if unreserved:
            free += min(excess, 0)  # but for its own
        return draw <= 0 or self._q * (held + draw) <= self._p * (free + held)

    def break_deadlock(self, request: Request) -> list[Request]:
        """Refuse a request that waits, so that its task gives back what it holds."""
        self.waiters.remove(request, State.DEADLOCKED)
        holders = [account for account in self.accounts.values() if account.granted]
        holders.sort(key=lambda account: -account.granted)
        request.holders = tuple((account.name, account.granted) for account in holders)
        request.account.refusals += 1
        return [request, *self._changed(request.account)]

    def refusal(self, request: Request) -> GrantTooLarge | None:
        """Say why a request could not even be met by an idle limiter; None if it could."""
        account = request.account
        name = account.name
        if request.kind is Kind.ENTER:
            if account.entries or account.minimum <= self.limit - self.baseline:
                return None
            return GrantTooLarge(
                name, account.minimum, self.limit - self.baseline, "limit less baseline"
            )
        total = request.nbytes + request.held
        most = self.most(account)
        if request.alone:
            most = max(most, self.most_alone(account))
        if total <= most:
            return None
        if most == account.firm_limit:
            reason = "its firm limit"
        elif most > self.most(account):
            reason = "limit less baseline and the others' minimums"
        else:
            reason = f"a share of {self._p}/{self._q} of limit less baseline"
        return GrantTooLarge(name, total, most, reason)

    # --- the world

    def observe(
        self,
        measured: int,
        *,
        pressed: bool,
        look_after: int,
        live: Iterable[tuple[Account, int]] = (),
    ) -> list[Request]:
        """Take a reading of memory: drift is what it shows beyond anything promised or live.

        Args:
            measured: ``M``.
            pressed: M is above the pressure threshold, so heap that was granted once and
                kept by the allocator counts as drift now: there is no room for it.
            look_after: how much may be granted and given back until the next reading.
            live: what components' code really has allocated at this reading; those that are
                not named have what they had.
        """
        highest = self.highest_committed  # what it passes through below is no sum of its own
        for account, nbytes in live:
            self._note_live(account, nbytes)
        committed = self.committed
        highest = committed if pressed else max(highest, committed)
        self.measured = measured
        self.look_at = self.moved + look_after
        drift = max(0, measured - self.baseline - highest)
        self._set_capacity(self.limit, drift, committed, highest)
        return self._dispatch()

    def rebase(self, baseline: int) -> None:
        """Set the baseline anew, before anything is granted."""
        committed, highest = self.committed, self.highest_committed
        self.baseline = baseline
        self._set_capacity(self.limit, self.drift, committed, highest)

    def missing(self, request: Request) -> int:
        """How much more would have to be free for the request by the rule; 0 or less if none."""
        return self._needed_free(request) - self.free if self._need(request) > 0 else 0

    def resize(self, limit: int) -> list[Request]:
        """Change the effective limit. Nothing is revoked: ``free`` may become negative."""
        self._set_capacity(limit, self.drift, self.committed, self.highest_committed)
        return self._drop_impossible(self.accounts.values()) + self._dispatch()

    # --- inside

    def _set_capacity(self, limit: int, drift: int, committed: int, highest: int) -> None:
        self.limit = limit
        self.drift = drift
        capacity = limit - self.baseline - drift
        self.free = capacity - committed
        self._lowest_free = capacity - highest

    def _note_live(self, account: Account, live: int) -> None:
        if live != account.live:
            self._tracked = True
            self._update(account, account.granted, account.reserved, live)
            self._place(account)

    def _allowed(self, account: Account) -> int:
        """What the rule lets the account draw from the pool now."""
        held = max(account.excess, 0)
        return max(0, (self._p * self.free - (self._q - self._p) * held) // self._q)

    def _update(self, account: Account, granted: int, reserved: int, live: int) -> None:
        """Set what the account has; everything that is derived from it follows."""
        before = account.reserved + max(account.excess, 0)
        self._reserved += reserved - account.reserved
        account.granted, account.reserved, account.live = granted, reserved, live
        account.excess = max(granted, live) - reserved
        self.free += before - reserved - max(account.excess, 0)
        self._lowest_free = min(self._lowest_free, self.free)
        if granted > reserved:
            self._holders[account] = None

    def _need(self, request: Request) -> int:
        """``c`` of a request: what it would draw from the pool."""
        account = request.account
        if request.kind is Kind.ENTER:
            return 0 if account.entries else max(0, account.minimum - account.excess)
        return self.draw(account, request.nbytes)

    def _needed_free(self, request: Request) -> int:
        """``T`` of a request; ``READY`` if it draws nothing."""
        account = request.account
        if request.kind is Kind.ENTER:
            return self._need(request) or READY
        excess = account.excess
        if excess > 0:
            held, draw = excess, request.nbytes
        else:
            held, draw = 0, request.nbytes + excess
        if draw <= 0:
            return READY
        return -((-self._q * draw - (self._q - self._p) * held) // self._p)

    def _over_firm(self, request: Request) -> bool:
        """Whether it waits for its own component to give something back."""
        account = request.account
        return (
            request.kind is not Kind.ENTER and account.granted + request.nbytes > account.firm_limit
        )

    def _oversize(self, request: Request) -> bool:
        """Whether it can be met only by letting it have the pool alone."""
        return request.alone and request.nbytes + request.held > self.most(request.account)

    def _obstacle(self, request: Request) -> QuotaExceeded | None:
        """Say why a request cannot be met without waiting; None if it can."""
        account = request.account
        draw = self.draw(account, request.nbytes)
        if account.queue is not None:
            reason = "others of the component wait already"
        elif self._over_firm(request):
            reason = "its firm limit"
        elif draw <= 0:
            return None
        elif self._exclusive is not None:
            reason = "one grant holds the pool alone"
        elif self._closed:
            reason = "a request that has waited long goes first"
        elif self.measured >= self.limit:
            reason = "measured memory is at the limit"
        elif self.threshold(account, draw) > self.free:
            reason = f"its share of what nobody else holds ({self.free} bytes are free)"
        else:
            return None
        return QuotaExceeded(account.name, request.nbytes, self.available(account), reason)

    def _charge(self, request: Request, *, in_turn: bool = True) -> None:
        """Admit a request with as much as the rule allows; ``in_turn`` if by the rule."""
        account = request.account
        draw = self._need(request)
        request.state = State.ADMITTED
        if request.kind is Kind.ENTER:
            if not account.entries:
                self._update(account, account.granted, account.minimum, account.live)
            account.entries += 1
        else:
            if request.up_to > request.nbytes:
                most = max(-account.excess, 0) + (0 if self._closed else self._allowed(account))
                most = min(request.up_to, most, account.firm_limit - account.granted)
                request.nbytes = max(request.nbytes, most)
                draw = self._need(request)
            if not in_turn and self._oversize(request):
                request.exclusive = True
                self._exclusive = account
            self._update(account, account.granted + request.nbytes, account.reserved, account.live)
            account.peak = max(account.peak, account.granted)
            account.admissions += 1
            self.moved += request.nbytes
        request.pooled = draw > 0
        request.out_of_turn = not in_turn
        if draw > 0:
            self.waiters.passed_bytes += draw

    def _changed(self, account: Account) -> list[Request]:
        """Look again at who waits after an account has changed."""
        self._place(account)
        return self._dispatch()

    def _bounds_changed(self, account: Account) -> list[Request]:
        """Likewise after its bounds have changed, which may make waiters impossible."""
        return self._drop_impossible((account,)) + self._changed(account)

    def _drop_impossible(self, accounts: Iterable[Account]) -> list[Request]:
        """Take out the waiters of these accounts that can never be met any more."""
        dropped = [
            request
            for account in accounts
            for request in account.queue or ()
            if self.refusal(request) is not None
        ]
        dropped.sort(key=lambda request: request.arrival)
        for request in dropped:
            self.waiters.remove(request, State.IMPOSSIBLE)
            request.account.refusals += 1
            self._place(request.account)
        return dropped

    def _place(self, account: Account) -> None:
        """Rank the head of an account's queue anew, and see who of it counts."""
        queue = account.queue
        if queue is None:
            return
        waiters = self.waiters
        if queue.grows and queue.requests:
            head = self._head_of_two(queue)
        else:
            head = next(iter(queue.grows or queue.requests))
        if self._over_firm(head):
            waiters.stop_counting(head)
            waiters.unrank(head)
        else:
            waiters.start_counting(head)
            waiters.rank(head, self._needed_free(head), account.granted - account.reserved)

    def _head_of_two(self, queue: Queue) -> Request:
        """Choose between a waiting grow and a request; the other is not ranked, but may count."""
        waiters = self.waiters
        grow, request = queue.fronts()
        for front in (grow, request):
            if front.barrier and self._over_firm(front):
                waiters.stop_counting(front)
        head = queue.head()
        other = request if head is grow else grow
        waiters.unrank(other)
        # Past a grow that waits for the firm limit it would only take what that needs.
        if not other.barrier and (self._over_firm(other) or self._over_firm(grow)):
            waiters.stop_counting(other)
        else:
            waiters.start_counting(other)
        return head

    def _bar_overdue(self) -> None:
        """Make barriers of the fronts that too much was granted past."""
        waiters = self.waiters
        counting = waiters.counting
        least = waiters.passed_bytes - self.bypass_limit
        while (front := counting.first()) is not None and counting[front] < least:
            waiters.bar(front)
            self._place(front.account)
        self._closed = self._exclusive is not None or bool(waiters.barriers)

    def _dispatch(self) -> list[Request]:
        """Admit everybody whose turn it is."""
        waiters = self.waiters
        settled: list[Request] = []
        self._bar_overdue()
        while waiters.count and (turn := self._next()) is not None:
            request, in_turn = turn
            if self._closed:  # but a barrier is not in its own way
                first = waiters.first_barrier()
                self._closed = self._exclusive is not None or first not in (None, request)
            waiters.remove(request, State.ADMITTED)
            self._charge(request, in_turn=in_turn)
            settled.append(request)
            self._place(request.account)
            if request.kind is Kind.ENTER and waiters.alone:
                settled += self._drop_impossible(self.accounts.values())
            self._bar_overdue()
        return settled

    def _next(self) -> tuple[Request, bool] | None:
        """Give who may come in next, and whether by the rule; None if nobody may.

        Whoever draws nothing from the pool; else the grow of the grant that holds the pool
        alone, if there is one; else the first barrier, if there is one; else the first in
        order. Memory may fall only by working on, so when no grant out of the pool is held,
        the first of these that fits into what is free without drift comes in against the
        rule; likewise the grow of the only such grant.
        """
        waiters = self.waiters
        first = waiters.heads.first()
        if first is not None and waiters.heads[first] == READY:
            return first, True
        if self._closed:
            first = self._first_when_closed()
        if first is None:
            return None
        if waiters.heads[first] <= self.free:
            return first, True
        if not self._closed:
            pooled = self._pool_is_held()
            first = waiters.growing.first() if pooled else waiters.heads.first_that(self._fits)
        if first is None or not self._fits(first):
            return None
        account = first.account
        is_only = account.granted - account.reserved <= first.held
        return (first, False) if is_only and not self._pool_is_held(but_for=account) else None

    def _first_when_closed(self) -> Request | None:
        """Give the only one who may draw on the pool: of the grant that has it, or a barrier."""
        if self._exclusive is None:
            return self.waiters.first_barrier()
        queue = self._exclusive.queue
        first = queue.head() if queue is not None else None
        return (
            first if first is not None and first.exclusive and first in self.waiters.heads else None
        )

    def _pool_is_held(self, *, but_for: Account | None = None) -> bool:
        """Whether grants hold any of the pool, those of one account aside.

        Live bytes beyond them are nobody's to release, so where there are any, somebody is
        looked for whose grants do: among all only when nobody is left of those found before
        or charged since.
        """
        if not self._tracked:
            own = max(0, but_for.excess) if but_for is not None else 0
            return self.committed - self._reserved > own
        holders = self._holders
        while holders:
            account, _ = holders.popitem()
            if account.granted > account.reserved and account is not but_for:
                holders[account] = None
                return True
        holders.update((a, None) for a in self.accounts.values() if a.granted > a.reserved)
        return any(account is not but_for for account in holders)

    def _fits(self, request: Request) -> bool:
        """Whether a head fits into what is free without drift, whatever its share."""
        return self._need(request) <= self.free + self.drift
