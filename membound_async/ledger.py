"""The ledger: who has what, who waits, and whose turn it is.

Who may come in at all, the rule says (`quota.Quota`). Of those, in this order: whoever draws
nothing from the pool; the grow of the grant that holds the pool alone; the oldest barrier, who
was passed by so much that it goes before all others; and else whoever has the smallest
threshold, within each line first in, first out.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from fractions import Fraction

from .fastpath import NO_LIMIT
from .quota import READY, Quota
from .rules import Rule
from .stocks import BYTES, Account, Group, Pool, Sender, Stock
from .waiters import NOTHING, Kind, Order, Queue, Ranking, Request, State

__all__ = ["NO_LIMIT", "Account", "Ledger"]


class Ledger(Quota):
    """Decides about every request, and remembers who has what. Pure: no clock, no I/O.

    Whatever can let waiters in returns the requests it has settled, in order: each is
    ``ADMITTED`` and charged already, or has become ``IMPOSSIBLE``. Amounts are bytes, those
    of ``also`` are numbers of other resources.

    Attributes:
        accounts: who has what, by name.
        moved: how much was granted and given back so far; grows with every change.
        look_at: the value of ``moved`` past which memory must be measured again.
        on_its_way: requests that were admitted, and whose callers have not got it yet.
    """

    def __init__(
        self,
        limit: int,
        *,
        baseline: int = 0,
        share: Fraction | Rule = Fraction(1, 2),
        bypass_limit: int | None = None,
        others: Mapping[str, int] = NOTHING,
    ) -> None:
        super().__init__(
            limit, baseline=baseline, share=share, bypass_limit=bypass_limit, others=others
        )
        self.accounts: dict[str, Account] = {}
        self.on_its_way: dict[Request, None] = {}
        self._tracked = False
        self._holders: dict[Account, None] = {}
        self._stirred: dict[Pool, None] = {}
        """The pools, but for that of bytes, in which somebody may have become the next."""

    # --- accounts

    def account(
        self,
        name: str,
        minimum: int = 0,
        firm_limit: int = NO_LIMIT,
        *,
        others: Mapping[str, int] = NOTHING,
    ) -> Account:
        """Give the account of that name; it is opened with these bounds if it is new."""
        account = self.accounts.get(name)
        if account is None:
            account = self.accounts[name] = Account(name, minimum, firm_limit)
            account.pools = (self,)
            for resource, firm in others.items():
                self._stock(account, resource).firm_limit = firm
        return account

    def group(self, limits: Mapping[str, int]) -> Group:
        """Make a group, whose components divide so much of each of these resources."""
        return {resource: Pool(resource, limit, Order()) for resource, limit in limits.items()}

    def join(self, account: Account, group: Group) -> None:
        """Put an account into a group. It must have nothing yet, and nobody may wait."""
        account.group = group
        account.grouped = BYTES in group
        for resource in group:
            self._stock(account, resource)
        for stock in account.stocks():
            stock.pools = self._pools_of(account, stock.resource)

    def declare(
        self,
        account: Account,
        minimum: int,
        firm_limit: int,
        others: Mapping[str, int] = NOTHING,
    ) -> list[Request]:
        """Set the bounds of an account. A minimum counts from the next time it is entered."""
        account.minimum = minimum
        account.firm_limit = firm_limit
        for resource, firm in others.items():
            self._stock(account, resource).firm_limit = firm
        return self._bounds_changed(account)

    def sender(self, account: Account, name: Hashable) -> Sender:
        """Give that sender to an account; it is kept while it holds or wants anything."""
        return account.by_sender.get(name) or Sender(name)

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

    # --- requests

    def admit(self, account: Account, nbytes: int) -> bool:
        """Charge a new grant if nobody is ahead, it fits, and no reading is due.

        The fast path, in one piece: False says only that ``request`` must decide.
        """
        moved = self.moved + nbytes
        granted = account.granted + nbytes
        if self.waiters.count or moved > self.look_at or account.grouped:
            return False
        in_flight = account.in_flight
        if granted + in_flight > account.firm_limit:
            return False
        excess = account.excess
        if excess < 0:
            draw = nbytes + excess
            held = in_flight
        else:
            draw = nbytes
            held = excess + in_flight
        now = (granted if granted > account.live else account.live) - account.reserved
        if draw > 0:
            free = self.free
            if self._closed or self._p is None or self._q * (held + draw) > self._p * (free + held):
                return False
            self.free = free = free + held - in_flight - (now if now > 0 else 0)
            if free < self._lowest_free:
                self._lowest_free = free
        account.excess = now
        account.granted = granted
        if granted + in_flight > account.peak:
            account.peak = granted + in_flight
        account.admissions += 1
        self.moved = moved
        return True

    def admit_sent(self, account: Account, name: Hashable, nbytes: int) -> bool:
        """Charge bytes in flight from a sender, as ``admit`` does for the account itself."""
        moved = self.moved + nbytes
        p = self._p
        if (
            self.waiters.count
            or moved > self.look_at
            or account.firm_limit != NO_LIMIT
            or account.grouped
            or self._closed
            or p is None
            or not nbytes
            or self.measured >= self.limit
        ):
            return False
        sender = account.by_sender.get(name)
        mine = 0 if sender is None else sender.held.get(account, 0)
        in_flight, excess, free, q = account.in_flight, account.excess, self.free, self._q
        held = excess + in_flight if excess > 0 else in_flight
        if q * (q * nbytes + (q - p) * mine) + p * (q - p) * held > p * p * free:
            return False
        if sender is None:
            sender = account.by_sender[name] = Sender(name)
        if not mine:
            account.senders += 1
        sender.held[account] = mine + nbytes
        account.in_flight = in_flight = in_flight + nbytes
        if account.granted + in_flight > account.peak:
            account.peak = account.granted + in_flight
        self.free = free = free - nbytes
        if free < self._lowest_free:
            self._lowest_free = free
        if self._tracked:
            self._holders[account] = None
        account.admissions += 1
        self.moved = moved
        return True

    def deliver_at_once(self, account: Account, name: Hashable, nbytes: int) -> bool:
        """Do as ``deliver``, of bytes, if nobody waits; else do nothing and give False."""
        if self.waiters.count or account.grouped or self._p is None or not nbytes:
            return False
        sender = account.by_sender[name]
        left = sender.held[account] - nbytes
        assert left >= 0, "more delivered than in flight"
        if left:
            sender.held[account] = left
        else:
            del sender.held[account]
            account.senders -= 1
            if not sender.held:
                del account.by_sender[name]
        account.in_flight -= nbytes
        account.granted = granted = account.granted + nbytes
        excess = account.excess
        account.excess = now = (
            granted if granted > account.live else account.live
        ) - account.reserved
        self.free += nbytes + (excess if excess > 0 else 0) - (now if now > 0 else 0)
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
        account = request.account
        if request.source is not None:
            request.source.incoming[request] = None
        if request.sender is not None:
            request.sender = account.by_sender.setdefault(request.sender.name, request.sender)
        orders = None
        if request.also or account.grouped:
            orders = tuple(
                pool.order for stock, _ in self._demands(request) for pool in stock.pools
            )
        if not self.waiters.add(request, orders):
            return []
        if request.sender is not None:
            self._put(request)
        return self._changed(account)

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
        return self.force(request)

    def request_at_once(self, request: Request) -> list[Request] | None:
        """Admit a request if nobody is ahead, it fits, and no reading is due, else do nothing.

        Returns:
            As ``request_nowait``; None if ``request`` must decide.
        """
        account, sender = request.account, request.sender
        line = account.queue if sender is None else sender.line
        if (
            line
            or self.moved + request.nbytes > self.look_at
            or self.measured >= self.limit
            or self._lacks(request) is not None
        ):
            return None
        return self.force(request)

    def force(self, request: Request) -> list[Request]:
        """Charge a request whatever the rules say of it; give others that are settled by it."""
        self._charge(request)
        if not self.waiters.count:
            return []
        account = request.account
        if request.source is not None:
            self._place(request.source)
        dropped = self._entered(account) if request.kind is Kind.ENTER else []
        return dropped + self._changed(account)

    def cancel(self, request: Request) -> list[Request]:
        """Take back a request that waits; those behind it may come in."""
        self._remove(request, State.CANCELLED)
        return self._changed(request.account)

    def give_back(
        self,
        account: Account,
        nbytes: int,
        *,
        also: Mapping[str, int] = NOTHING,
        sender: Sender | None = None,
        exclusive: bool = False,
    ) -> list[Request] | tuple[()]:
        """Return what was granted, or was in flight from a sender.

        Args:
            account: whose it was.
            nbytes: how many bytes.
            also: how much of other resources.
            sender: on whose behalf it was in flight; None if it was granted.
            exclusive: whether the grant that held the pool alone is over.
        """
        if sender is not None or also or len(account.pools) > 1 or self._p is None:
            for stock, amount in self._amounts(account, nbytes, also):
                self._add(stock, -amount, sender)
        else:
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
            self.reopen()
            if account.queue is not None:
                account.queue.head().exclusive = False  # the grant's grow, if that waits
        return self._changed(account) if self.waiters.count else ()

    def reopen(self) -> None:
        """Let others draw on the pool again, whether or not a grant had it alone."""
        self._exclusive = None
        self._closed = bool(self.waiters.barriers)

    def deliver(
        self,
        account: Account,
        nbytes: int,
        also: Mapping[str, int],
        sender: Sender,
        over: Mapping[str, int] = NOTHING,
    ) -> list[Request] | tuple[()]:
        """Make what was in flight from a sender the account's own.

        Nothing is drawn for it: what is left of the reserve takes up what it can, so there
        may be more free than before.

        Args:
            account: who receives it.
            nbytes: how many bytes were in flight.
            also: how much of other resources was.
            sender: on whose behalf.
            over: how much of these is given back.
        """
        for stock, amount in self._amounts(account, nbytes, also):
            self._add(stock, -amount, sender)
            self._add(stock, amount - over.get(stock.resource, 0), None)
        return self._changed(account) if self.waiters.count else ()

    def arrives(self, request: Request) -> None:
        """Note that what was charged cannot be in use yet: nobody has been given it.

        So it is with whoever waits until it is admitted. Not with a minimum: it is only reserved;
        and not with a transfer: that memory is in use already.
        """
        is_none = request.kind is Kind.ENTER or request.source is not None
        if request.state is State.ADMITTED and not is_none and request not in self.on_its_way:
            self.on_its_way[request] = None
            self.arriving += request.nbytes

    def arrived(self, request: Request) -> None:
        """Note that what was charged may be in use from now on, or was given back."""
        if request in self.on_its_way:
            del self.on_its_way[request]
            self.arriving -= request.nbytes

    def end_transfer(self, request: Request) -> Account:
        """Give up a transfer because the grant is released; say who has it now.

        Whoever waits for the request is to be woken.
        """
        source = request.source
        assert source is not None
        if request.state is State.WAITING:
            self._remove(request, State.CANCELLED)
            self._place(request.account)
        elif request.state is State.ADMITTED:
            self.arrived(request)
            request.state = State.CANCELLED
            return request.account
        request.state = State.CANCELLED
        return source

    def undo(self, request: Request) -> list[Request] | tuple[()]:
        """Take back what was charged for a request; of a transfer, charge the source again.

        Nobody comes in between: what is transferred is not free at any time.
        """
        self.arrived(request)
        account, source = request.account, request.source
        if source is None:
            return self.give_back(
                account,
                request.nbytes,
                also=request.also,
                sender=request.sender,
                exclusive=request.exclusive,
            )
        request.state = State.CANCELLED
        for owner, sign in ((account, -1), (source, 1)):
            for stock, amount in self._amounts(owner, request.nbytes, request.also):
                self._add(stock, sign * amount, None)
        self.moved += request.nbytes
        if not self.waiters.count:
            return ()
        self._place(source)
        return self._changed(account)

    def lift(self, barrier: Request) -> list[Request]:
        """Make a barrier an ordinary waiter again: what it waits for may be held for good.

        Lift the first one only. The others have only waited behind it, and would lose their
        turn each time, although there may be room for them.
        """
        self._stir_all(barrier)
        self.waiters.lift(barrier)
        return self._changed(barrier.account)

    # --- deadlocks

    def all_waiting(self) -> list[Request]:
        """Give all requests that wait, the oldest first."""
        found = [each for account in self.accounts.values() for each in account.requests()]
        return sorted(found, key=lambda request: request.arrival)

    def suspend_order(
        self, holders: Iterable[Request], others: Iterable[Request] = ()
    ) -> list[Request]:
        """Admit, of requests that wait, each that fits by its own T and F, whoever is ahead.

        If that lets anybody in, the holders that are left go before all who hold nothing.

        Args:
            holders: those whose tasks hold something, in the order in which they may come in.
            others: likewise those that come after them.
        """
        holders = [*holders]
        settled: list[Request] = []
        for request in (*holders, *others):
            if request.state is State.WAITING and self._would_fit(request, 0):
                settled += self._let_in(request)
        if not settled:
            return settled
        self._put_first(holders)
        return settled + self._dispatch()

    def break_deadlock(self, holders: Mapping[Request, Mapping[Account, int]]) -> list[Request]:
        """Refuse the youngest of those who wait and hold something, so that others fit.

        As few as will do: nobody, if one would fit with no drift. Of several, the oldest is
        left. Those who are left go before all who hold nothing.

        Args:
            holders: the requests, the oldest first, and how many bytes of which account the
                task of each holds.
        """
        left = [*holders]
        names = [account for account in self.accounts.values() if account.granted]
        names.sort(key=lambda account: -account.granted)
        named = tuple((account.name, account.granted) for account in names)
        refused = [left.pop() for _ in range(self._fewest_refused(holders))]
        if not refused:
            return []
        for request in refused:
            self._remove(request, State.DEADLOCKED)
            request.holders = named
            request.account.refusals += 1
            self._place(request.account)
        self._put_first(left)
        return refused + self._dispatch()

    def _put_first(self, requests: Iterable[Request]) -> None:
        """Have those of these that are next of their lines go before all others, in order."""
        for place, request in enumerate(requests):
            if request.barrier or request in self.waiters.counting:
                self.waiters.bar(request, place)
                self._stir_all(request)
                self._place(request.account)

    def _fewest_refused(self, holders: Mapping[Request, Mapping[Account, int]]) -> int:
        """How many of the youngest must give back what they hold for one of the others to fit.

        Tried from all but the oldest downwards, with what they hold taken out meanwhile. More
        to give back never hurts, so whoever does not fit is not looked at again: O(n).
        """
        requests = [*holders]
        count = len(requests)
        fewest = max(1, count - 1)
        out = count - 1
        """The youngest ones whose holdings are taken out."""
        for request in requests[1:]:
            self._take_out(holders[request], 1)
        for others, request in zip(range(count - 1, -1, -1), requests, strict=True):
            while out and out > min(fewest - 1, others):
                self._take_out(holders[requests[count - out]], -1)
                out -= 1
            while out < fewest and self._would_fit(request, self.drift):
                fewest = out
                if out:
                    self._take_out(holders[requests[count - out]], -1)
                    out -= 1
        return fewest

    @staticmethod
    def _take_out(held: Mapping[Account, int], sign: int) -> None:
        """Take out what was granted as if it was given back, or put it back: -1."""
        for account, nbytes in held.items():
            before = account.held
            account.granted -= sign * nbytes
            account.excess = max(account.granted, account.live) - account.reserved
            now = account.held
            for pool in account.pools:
                pool.free += before - now
                pool.consumers += bool(now) - bool(before)

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
            pressed: M and what arrives are above the pressure threshold, so heap that was
                granted once and kept by the allocator counts as drift now: there is no room
                for it. Below it, what M has fallen by was not kept.
            look_after: how much may be granted and given back until the next reading.
            live: what components' code really has allocated at this reading; those that are
                not named have what they had.
        """
        highest = self.highest_committed  # what it passes through below is no sum of its own
        for account, nbytes in live:
            self._note_live(account, nbytes)
        committed = self.committed
        if pressed:
            highest = committed
            in_use = measured + self.arriving
        else:
            kept = min(highest - max(0, self.measured - measured), measured - self.baseline)
            highest = max(committed, kept)
            in_use = measured
        self.measured = measured
        self.look_at = self.moved + look_after
        drift = max(0, in_use - self.baseline - highest)
        self._set_capacity(self.limit, drift, committed, highest)
        return self._dispatch()

    def rebase(self, baseline: int) -> None:
        """Set the baseline anew, before anything is granted."""
        committed, highest = self.committed, self.highest_committed
        self.baseline = baseline
        self._set_capacity(self.limit, self.drift, committed, highest)

    def resize(self, limit: int) -> list[Request]:
        """Change the effective limit. Nothing is revoked: ``free`` may become negative."""
        self._set_capacity(limit, self.drift, self.committed, self.highest_committed)
        dropped = self._drop_impossible(self.accounts.values())
        for account in self.accounts.values():
            if account.by_sender:
                self._place(account)
        return dropped + self._dispatch()

    # --- what changes

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

    def _add(self, stock: Stock, amount: int, sender: Sender | None) -> None:
        """Charge so much more or less of a stock, to the account or on behalf of a sender."""
        if sender is None:
            granted = stock.granted + amount
            assert granted >= 0, "more given back than granted"
            self._update(stock, granted, stock.reserved, stock.live)
            return
        before = sender.held.pop(stock, 0)
        now = before + amount
        assert now >= 0, "more given back than in flight"
        if now:
            sender.held[stock] = now
        stock.senders += bool(now) - bool(before)
        self._update(stock, stock.granted, stock.reserved, stock.live, stock.in_flight + amount)
        if self.rule.depends_on_consumers and bool(now) != bool(before) and stock.fronts:
            self._rank_senders_anew(stock)
        by_sender = stock.account.by_sender
        if now:
            by_sender.setdefault(sender.name, sender)
        if sender.line:
            front = next(iter(sender.line))
            if front.stock is not None:
                self._put(front)
        elif not sender.held and by_sender.get(sender.name) is sender:
            del by_sender[sender.name]

    def _update(
        self, stock: Stock, granted: int, reserved: int, live: int, in_flight: int | None = None
    ) -> None:
        """Set what is charged; everything that is derived from it follows."""
        if in_flight is None:
            in_flight = stock.in_flight
        excess = stock.excess
        held = (excess if excess > 0 else 0) + stock.in_flight
        excess = (granted if granted > live else live) - reserved
        now = (excess if excess > 0 else 0) + in_flight
        more = reserved + now - stock.reserved - held
        if stock.resource == BYTES:
            self._reserved += reserved - stock.reserved
            if granted > reserved or in_flight:
                self._holders[stock.account] = None
        stock.granted, stock.reserved, stock.live = granted, reserved, live
        stock.in_flight, stock.excess = in_flight, excess
        for pool in stock.pools:
            pool.free -= more
            if pool.free < pool._lowest_free:
                pool._lowest_free = pool.free
            if self._p is None and bool(now) != bool(held):
                pool.consumers += bool(now) - bool(held)
                self._rank_anew(pool)
            if pool is not self and self.waiters.count:
                self._stirred[pool] = None

    def _charge(self, request: Request, *, in_turn: bool = True) -> None:
        """Admit a request with as much as the rule allows; ``in_turn`` if by the rule."""
        account, sender = request.account, request.sender
        if sender is not None:
            sender = request.sender = account.by_sender.get(sender.name, sender)
        draw = self._need(request)
        request.state = State.ADMITTED
        if request.kind is Kind.ENTER:
            if not account.entries:
                self._update(account, account.granted, account.minimum, account.live)
            account.entries += 1
        else:
            if request.up_to > request.nbytes and sender is None:
                most = max(0, min(request.up_to, self._most_now(account)))
                request.nbytes = max(request.nbytes, most)
                draw = self._need(request)
            if not in_turn and self._oversize(request):
                request.exclusive = True
                self._exclusive = account
            if request.source is not None:
                for stock, amount in self._amounts(request.source, request.nbytes, request.also):
                    self._add(stock, -amount, None)
            for stock, amount in self._amounts(account, request.nbytes, request.also):
                self._add(stock, amount, sender)
                if sender is not None:
                    self._pass_senders(stock, amount)
                if stock is not account and self.waiters.count:
                    self._pass(stock, amount)
            account.peak = max(account.peak, account.granted + account.in_flight)
            account.admissions += 1
            self.moved += request.nbytes
        request.pooled = draw > 0
        request.out_of_turn = not in_turn
        if draw > 0:
            self._pass(account, draw)

    def _pass_senders(self, stock: Stock, amount: int) -> None:
        """Note that so much was sent past those who wait for others' messages to be received.

        Who was passed by as much as the component may have goes before all its other senders.
        """
        among = stock.among
        if among is None:
            return
        among.passed += amount
        least = among.passed - min([stock.firm_limit, *(pool.limit for pool in stock.pools)])
        while (front := among.counting.first()) is not None and among.counting[front] < least:
            among.counting.discard(front)
            among.barriers.put(front, front.arrival)

    def _pass(self, stock: Stock, amount: int) -> None:
        """Note that so much was drawn past all who wait."""
        for pool in stock.pools:
            pool.order.passed += amount

    def _remove(self, request: Request, state: State) -> None:
        """Take out a request that waits, with its outcome."""
        if request.barrier:
            self._stir_all(request)
        self.waiters.remove(request, state)
        if request.source is not None:
            request.source.incoming.pop(request, None)
        sender = request.sender
        if sender is not None:
            for stock, _ in self._demands(request):
                if stock.among is not None:
                    stock.among.forget(request)
            if sender.line:
                self._put(next(iter(sender.line)))
            elif not sender.held:
                request.account.by_sender.pop(sender.name, None)

    def _stir_all(self, request: Request) -> None:
        for stock, _ in self._demands(request):
            for pool in stock.pools:
                if pool is not self:
                    self._stirred[pool] = None

    # --- who is next

    def _changed(self, account: Account) -> list[Request]:
        """Look again at who waits after an account has changed."""
        self._place(account)
        return self._dispatch()

    def _bounds_changed(self, account: Account) -> list[Request]:
        """Likewise after its bounds have changed, which may make waiters impossible."""
        return self._drop_impossible((account,)) + self._changed(account)

    def _entered(self, account: Account) -> list[Request]:
        """Take out who has become impossible because what is reserved now is not left."""
        if self.waiters.alone:
            return self._drop_impossible(self.accounts.values())
        return self._drop_impossible((account,)) if account.by_sender else []

    def _drop_impossible(self, accounts: Iterable[Account]) -> list[Request]:
        """Take out the waiters of these accounts that can never be met any more."""
        dropped = [
            request
            for account in accounts
            for request in account.requests()
            if self.refusal(request) is not None
        ]
        dropped.sort(key=lambda request: request.arrival)
        for request in dropped:
            self._remove(request, State.IMPOSSIBLE)
            request.account.refusals += 1
            self._place(request.account)
        return dropped

    def _place(self, account: Account) -> None:
        """Rank those who are next in an account anew, and see who of them counts."""
        queue = account.queue
        if queue is not None:
            if queue.grows and queue.requests:
                head = self._head_of_two(queue)
            else:
                head = next(iter(queue.grows or queue.requests))
            self._put(head)
        if account.by_sender:
            for stock in account.stocks():
                self._rank(stock)
                if stock.parked:
                    self._look_at_parked(stock)
        for request in account.incoming:
            if request.stock is not None:
                self._rank(request.stock)

    def _put(self, front: Request) -> None:
        """Have the next of a line wait for what it lacks first, and count what passes it."""
        account = front.account
        if front.sender is None and not front.also:
            stock: Stock = account  # in any case
            amount = self._amount(front, account)
            parked = self._over_firm(front, account, amount)
            if not account.by_sender and not account.grouped:
                account.own, front.stock = front, account
                if parked:
                    self.waiters.stop_counting(front)
                    account.unrank(front)
                else:
                    self.waiters.start_counting(front)
                    account.ranked[front] = self
                    threshold = self._threshold(front, account, amount, self)
                    self.waiters.rank(front, threshold, account.granted - account.reserved)
                return
        else:
            lacks = self._lacks(front)
            stock = self._stock_of_next(front) if lacks is None else lacks[0]
            parked = lacks is not None and lacks[1] is None
        if parked:
            self._stir_all(front)
            self.waiters.stop_counting(front)
        else:
            self.waiters.start_counting(front)
        if front.stock is not stock:
            if front.stock is not None:
                before = front.stock
                before.leave(front)
                self._rank(before)
            front.stock = stock
        if front.sender is None:
            stock.own = front
        else:
            if stock.fronts is None:
                stock.fronts = Ranking()
                stock.parked = Ranking()
            needed = self._inner(front, stock, self._amount(front, stock))
            stock.fronts.put(front, needed)
            assert stock.parked is not None
            if parked:
                stock.parked.put(front, needed)
                if stock.among is None:
                    stock.among = Order()
                if self._waits_for_others(front, stock):
                    stock.among.begin(front)
                else:
                    stock.among.pause(front)
            else:
                stock.parked.discard(front)
        self._rank(stock)

    def _stock_of_next(self, front: Request) -> Stock:
        """Say where a front that lacks nothing waits for its turn, where it draws anything.

        Where its component itself waits for the firm limit, if there is such a one.
        """
        account = front.account
        if front.sender is None:
            return account
        drawn = [stock for stock, amount in self._demands(front) if amount and stock.pools]
        for stock in drawn:
            own = stock.own
            if own is not None and self._over_firm(own, stock, self._amount(own, stock)):
                return stock
        return drawn[0] if drawn else account

    def _look_at_parked(self, stock: Stock) -> None:
        """Have the first of the senders' requests at the firm limit count again, if it fits.

        One at a time, so that this costs the same however many they are; where there is no
        pool, all that fit, as none of them waits here any longer.
        """
        assert stock.parked is not None
        while (front := stock.parked.first()) is not None:
            if self._over_firm(front, stock, self._amount(front, stock)):
                break
            self._put(front)
            if stock.pools:
                break

    def _rank(self, stock: Stock, lacking: tuple[Request, Pool] | None = None) -> None:
        """Rank who is first in a stock among those of a pool that it lacks.

        Nobody while it is the firm limit that keeps the first one out.

        Args:
            stock: where they wait.
            lacking: one of them and the pool that it lacks, if that is known.
        """
        firsts, ranked, pools = self._firsts(stock), stock.ranked, [*stock.pools]
        for request in [*ranked]:
            if request not in firsts:
                stock.unrank(request)
        for first in firsts:
            amount = self._amount(first, stock)
            known = lacking[1] if lacking is not None and lacking[0] is first else None
            pool = known or ranked.get(first) or pools[-1]
            threshold = self._threshold(first, stock, amount, pool)
            if known is None and len(pools) > 1:
                for other in pools:
                    needed = self._threshold(first, stock, amount, other)
                    if needed != READY and needed > other.free:
                        pool, threshold = other, needed
                        break
            if ranked.get(first) is not pool:
                stock.unrank(first)
                ranked[first] = pool
            pool.order.rank(first, threshold, stock.granted - stock.reserved)
            if pool is not self:
                self._stirred[pool] = None

    def _firsts(self, stock: Stock) -> tuple[Request, ...]:
        """Give who is first in a stock.

        Whose next of its own line needs less than another for as much, as it enters or takes
        over what is held already, has it ranked beside the first of its senders'.
        """
        own, fronts = stock.own, stock.fronts
        front, least = None, READY
        if fronts:
            front = fronts.first()
            barrier = None if stock.among is None else stock.among.first_barrier()
            if barrier is not None:
                front = barrier if barrier.stock is stock else None
            if front is not None:
                least = fronts[front]
        if not stock.pools:
            return ()
        if own is not None and self._over_firm(own, stock, self._amount(own, stock)):
            # What its senders would take is what it waits for.
            return (front,) if front is not None and least == READY else ()
        if front is None:
            return () if own is None else (own,)
        if self._over_firm(front, stock, self._amount(front, stock)):
            return () if own is None else (own,)
        if own is None:
            return (front,)
        if own.kind is Kind.ENTER or own.source is not None:
            return own, front
        needed = self._inner(own, stock, self._amount(own, stock))
        return (min((least, front.arrival, front), (needed, own.arrival, own))[2],)

    def _rank_anew(self, pool: Pool) -> None:
        """Rank everybody in a pool anew: the number of its consumers has changed."""
        for request in [*pool.order.heads]:
            if request.stock is not None:
                self._rank(request.stock)

    def _rank_senders_anew(self, stock: Stock) -> None:
        """Rank all who wait in a stock anew: the number of its senders has changed."""
        for ranking in (stock.fronts, stock.parked):
            if ranking is not None:
                for front in [*ranking]:
                    ranking.put(front, self._inner(front, stock, self._amount(front, stock)))
        self._rank(stock)

    def _head_of_two(self, queue: Queue) -> Request:
        """Choose between a waiting grow and a request; the other is not ranked, but may count."""
        waiters = self.waiters
        grow, request = queue.fronts()
        grow_is_parked = self._is_parked(grow)
        request_is_parked = self._is_parked(request)
        for front, is_parked in ((grow, grow_is_parked), (request, request_is_parked)):
            if front.barrier and is_parked:
                self._stir_all(front)
                waiters.stop_counting(front)
        head = queue.head()
        other, other_is_parked = (
            (request, request_is_parked) if head is grow else (grow, grow_is_parked)
        )
        if other.stock is not None:
            other.stock.leave(other)
        # Past a grow that waits for the firm limit it would only take what that needs.
        if not other.barrier and (other_is_parked or grow_is_parked):
            waiters.stop_counting(other)
        else:
            waiters.start_counting(other)
        return head

    def _bar_overdue(self) -> None:
        """Make barriers of the fronts that too much was granted past."""
        pools = [self, *self._stirred]
        for pool in pools:
            order = pool.order
            least = order.passed - (self.bypass_limit if pool is self else pool.limit)
            while (front := order.counting.first()) is not None and order.counting[front] < least:
                if front.sender is not None and self._is_parked(front):
                    self._put(front)  # which stops its count
                    continue
                self.waiters.bar(front)
                if len(front.orders) > 1:  # it is a barrier in all that it draws on
                    self._stir_all(front)
                    pools += (self, *self._stirred)
                if front.sender is None:
                    self._place(front.account)
            pool._closed = bool(order.barriers) or (pool is self and self._exclusive is not None)

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
            settled += self._let_in(request, in_turn=in_turn)
            self._bar_overdue()
        return settled

    def _let_in(self, request: Request, *, in_turn: bool = True) -> list[Request]:
        """Admit a request that waits; give it, and those that have become impossible by it."""
        self._remove(request, State.ADMITTED)
        self._charge(request, in_turn=in_turn)
        self.arrives(request)
        self._place(request.account)
        if request.source is not None:
            self._place(request.source)
        dropped = self._entered(request.account) if request.kind is Kind.ENTER else []
        return [request, *dropped]

    def _next(self) -> tuple[Request, bool] | None:
        """Give who may come in next, and whether by the rule; None if nobody may.

        By the rule: whoever draws nothing from the pool; else the grow of the grant that
        holds the pool alone, if there is one; else the first barrier, if there is one; else
        the first in order.
        """
        while True:
            request = self._next_in(self)
            if request is not None:
                return request, True
            if not self._stirred:
                return self._next_against_the_rule()
            pool = next(iter(self._stirred))
            request = self._next_in(pool)
            if request is not None:
                return request, True
            del self._stirred[pool]

    def _next_against_the_rule(self) -> tuple[Request, bool] | None:
        """Memory may fall only by working on: see that somebody does.

        So when no grant out of the pool is held, the first in order that fits into what is
        free without drift comes in; likewise the grow of the only such grant.
        """
        waiters = self.waiters
        if self._closed:
            first = self._first_when_closed()
        else:
            is_held = self._pool_is_held()
            first = waiters.growing.first() if is_held else waiters.heads.first_that(self._fits)
        if first is None or not self._fits(first):
            return None
        account = first.account
        pooled = max(0, account.granted - account.reserved) + account.in_flight
        is_only = pooled <= first.held
        return (first, False) if is_only and not self._pool_is_held(but_for=account) else None

    def _next_in(self, pool: Pool) -> Request | None:
        """Give who may come in by the rule, of those who wait for a pool."""
        order = pool.order
        while (first := order.heads.first()) is not None:
            threshold = order.heads[first]
            if threshold != READY and pool._closed:
                barred = self._next_barred(pool)
                if barred is not None:
                    return barred
                if not pool._closed:
                    continue
                if pool is self and self._exclusive is not None:
                    return None
            if threshold != READY and threshold > pool.free:
                return None
            if (threshold == READY or not pool._closed) and self._is_plain(first):
                return first
            lacks = self._lacks(first)
            if lacks is None:
                return first
            stock, lacked = lacks
            if stock is first.stock and lacked is pool:
                return None
            if stock is not first.stock:
                self._put(first)
            else:
                self._rank(stock, None if lacked is None else (first, lacked))
        return self._next_barred(pool) if pool._closed else None

    def _next_barred(self, pool: Pool) -> Request | None:
        """Give who goes before all others in a closed pool, if it may come in."""
        while True:
            first = self._first_when_closed() if pool is self else pool.order.first_barrier()
            if first is None:
                return None
            lacks = self._lacks(first)
            if lacks is None:
                return first
            if lacks[1] is not None:
                break
            self._put(first)  # it is no barrier any more
            self._bar_overdue()
            if first.barrier:
                return None
        if lacks[0] is not first.stock:
            self._put(first)
        return None

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
            own = but_for.held if but_for is not None else 0
            return self.committed - self._reserved > own
        holders = self._holders
        while holders:
            account, _ = holders.popitem()
            if _holds(account) and account is not but_for:
                holders[account] = None
                return True
        holders.update((a, None) for a in self.accounts.values() if _holds(a))
        return any(account is not but_for for account in holders)


def _holds(account: Account) -> bool:
    """Whether grants of an account hold any of the pool."""
    return account.granted > account.reserved or account.in_flight > 0
