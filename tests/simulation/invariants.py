"""What must be so after every step of a program, whatever the program is.

The ledger of the limiter is a `FollowedLedger`: it does what a ledger does, and after each of its
public operations the `Books` check it, as `tests.fuzz_resources` does: who was admitted could be
by the rule and the order, nobody is left who could go on, and all numbers are those that follow
from `tests.divisions`, the independent statement of the rule. What is here besides is what a
ledger alone does not show: that what grants say they hold is what the accounts say, that whoever
was admitted was woken, and that everything is back in the end.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from membound_async.exceptions import GrantTooLarge, QuotaExceeded
from membound_async.fastpath import ALONE, EXTENSION, HELD
from membound_async.grant import MemoryGrant, Options
from membound_async.inbox import Inbox
from membound_async.ledger import Ledger
from membound_async.limiter import MemoryLimiter
from membound_async.limits import DetectedLimit
from membound_async.rules import Polynomial, Rule
from membound_async.stocks import NO_LIMIT, Account, Sender
from membound_async.waiters import Kind, Request, State
from tests.divisions import BYTES, Component, Need, Place, Wish, World
from tests.fuzz_resources import Broken, Config, Grant, Pair, Step, Watched, must

__all__ = ["Books", "Broken", "FollowedLedger", "books_for", "follow", "must"]

BYTES_PLACE: Place = (None, BYTES)


@dataclass(eq=False, slots=True)
class Asked(Wish):
    """What somebody asks for, who may be ready to have the pool alone."""

    alone: bool = False
    exclusive: bool = False
    """Whether it is a grow of a grant that has the pool alone."""


class Whole(World):
    """Who has what, with the grants that have the pool alone."""

    def is_possible(self, wish: Wish) -> bool:
        if super().is_possible(wish):
            return True
        if not isinstance(wish, Asked) or not wish.alone:
            return False
        component = wish.component
        others = sum(each.reserved for each in self.components.values()) - component.reserved
        most = self.limit - self.baseline - others
        firm = component.firm.get(BYTES)
        total = wish.amounts.get(BYTES, 0) + wish.held
        return total <= (most if firm is None else min(most, firm))


@dataclass(slots=True)
class Followed(Step):
    """A step with the places that barriers had then, the one that was admitted included."""

    ranks: dict[Request, int] = field(default_factory=dict[Request, int])


class FollowedLedger(Watched):
    """A ledger whose every operation is checked, once there are books."""

    books: Books | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.watch()
        self.suspended = 0
        """How many of the steps were out of order, to get out of a deadlock."""
        self._rank_was = 0

    # --- what is noted inside

    def arrives(self, request: Request) -> None:
        Ledger.arrives(self, request)

    def _remove(self, request: Request, state: State) -> None:
        self._rank_was = rank(request)
        super()._remove(request, state)

    def _charge(self, request: Request, *, in_turn: bool = True) -> None:
        ranks = {each: rank(each) for each in self.waiting if each.barrier}
        ranks[request] = self._rank_was
        super()._charge(request, in_turn=in_turn)
        step = self.steps[-1]
        self.steps[-1] = Followed(
            step.request, step.state, in_turn, step.was_barrier, step.barriers, ranks
        )

    def _put_first(self, requests: Iterable[Request]) -> None:
        self.suspended = len(self.steps)
        super()._put_first(requests)

    # --- operations

    def _catch_up(self) -> None:
        if self.books is not None:
            self.books.catch_up()

    def request(self, request: Request) -> list[Request]:
        if self.books is None:
            return super().request(request)
        return self.books.request(request, super().request)

    def request_nowait(self, request: Request) -> list[Request]:
        if self.books is None:
            return super().request_nowait(request)
        return self.books.request_nowait(request, super().request_nowait)

    def request_at_once(self, request: Request) -> list[Request] | None:
        if self.books is None:
            return super().request_at_once(request)
        return self.books.request_at_once(request, super().request_at_once)

    def force(self, request: Request) -> list[Request]:
        if self.books is None or self.books.busy:
            return super().force(request)
        return self.books.force(request, super().force)

    def admit(self, account: Account, nbytes: int) -> bool:
        self._catch_up()
        admitted = super().admit(account, nbytes)
        if self.books is not None and admitted:
            self.books.admitted_at_once(account, nbytes, None)
        return admitted

    def admit_sent(self, account: Account, name: Hashable, nbytes: int) -> bool:
        self._catch_up()
        admitted = super().admit_sent(account, name, nbytes)
        if self.books is not None and admitted:
            self.books.admitted_at_once(account, nbytes, name)
        return admitted

    def deliver_at_once(self, account: Account, name: Hashable, nbytes: int) -> bool:
        self._catch_up()
        delivered = super().deliver_at_once(account, name, nbytes)
        if self.books is not None and delivered:
            self.books.delivered(account, {BYTES: nbytes}, name, {})
        return delivered

    def deliver(
        self,
        account: Account,
        nbytes: int,
        also: Mapping[str, int],
        sender: Sender,
        over: Mapping[str, int] = {},
    ) -> Any:
        if self.books is None:
            return super().deliver(account, nbytes, also, sender, over)
        with self.books.operation("deliver"):
            settled = super().deliver(account, nbytes, also, sender, over)
            self.books.deliver(account, {BYTES: nbytes, **also}, sender.name, over, settled)
        return settled

    def give_back(
        self,
        account: Account,
        nbytes: int,
        *,
        also: Mapping[str, int] = {},
        sender: Sender | None = None,
        exclusive: bool = False,
    ) -> Any:
        back = super().give_back
        if self.books is None or self.books.busy:
            return back(account, nbytes, also=also, sender=sender, exclusive=exclusive)
        with self.books.operation("give_back"):
            settled = back(account, nbytes, also=also, sender=sender, exclusive=exclusive)
            amounts = {BYTES: nbytes, **also}
            self.books.given_back(account, amounts, sender and sender.name, settled)
        return settled

    def undo(self, request: Request) -> Any:
        if self.books is None:
            return super().undo(request)
        with self.books.operation("undo"):
            settled = super().undo(request)
            self.books.undone(request, settled)
        return settled

    def cancel(self, request: Request) -> list[Request]:
        if self.books is None:
            return super().cancel(request)
        with self.books.operation("cancel"):
            self.books.forget(request)
            settled = super().cancel(request)
            self.books.settled(settled)
        return settled

    def enter_again(self, account: Account) -> bool:
        self._catch_up()
        entered = super().enter_again(account)
        if self.books is not None and entered:
            self.books.entered_again(account)
        return entered

    def leave(self, account: Account) -> list[Request]:
        if self.books is None:
            return super().leave(account)
        with self.books.operation("leave"):
            settled = super().leave(account)
            self.books.left(account, settled)
        return settled

    def declare(self, account: Account, *arguments: Any, **options: Any) -> list[Request]:
        # Only before a program begins.
        must(self.books is None, "bounds have changed")
        return super().declare(account, *arguments, **options)

    def resize(self, limit: int) -> list[Request]:
        if self.books is None:
            return super().resize(limit)
        with self.books.operation("resize"):
            settled = super().resize(limit)
            self.books.world.limit = limit
            self.books.settled(settled)
        return settled

    def observe(
        self,
        measured: int,
        *,
        pressed: bool,
        look_after: int,
        live: Iterable[tuple[Account, int]] = (),
    ) -> list[Request]:
        observe = super().observe
        live = [*live]
        if self.books is None:
            return observe(measured, pressed=pressed, look_after=look_after, live=live)
        with self.books.operation("observe"):
            arriving = self.books.arriving()
            must(pressed == (measured + arriving > 0.95 * self.limit), "pressed or not")
            settled = observe(measured, pressed=pressed, look_after=look_after, live=live)
            by_name = {account.name: nbytes for account, nbytes in live}
            self.books.world.observe(measured, by_name, pressed=pressed, arriving=arriving)
            self.books.settled(settled)
        return settled

    def lift(self, barrier: Request) -> list[Request]:
        if self.books is None:
            return super().lift(barrier)
        with self.books.operation("lift"):
            settled = super().lift(barrier)
            self.books.passed[barrier] = {}
            self.books.settled(settled)
        return settled

    def end_transfer(self, request: Request) -> Account:
        if self.books is None:
            return super().end_transfer(request)
        if request.state is State.WAITING:
            self.books.forget(request)
        self.books.limbo.pop(request, None)
        return super().end_transfer(request)

    def suspend_order(self, holders: Iterable[Request], others: Iterable[Request] = ()) -> Any:
        if self.books is None:
            return super().suspend_order(holders, others)
        with self.books.operation("suspend_order"):
            self.suspended = 0
            settled = super().suspend_order(holders, others)
            self.books.untangled(settled)
        return settled

    def break_deadlock(self, holders: Mapping[Request, Mapping[Account, int]]) -> Any:
        if self.books is None:
            return super().break_deadlock(holders)
        with self.books.operation("break_deadlock"):
            self.suspended = 0
            settled = super().break_deadlock(holders)
            self.books.untangled(settled)
        return settled


def rank(request: Request) -> int:
    """Say where a barrier stands among others; by arrival if it was not put first."""
    for order in request.orders:
        if request in order.barriers:
            return order.barriers[request]
    return request.arrival


class Books(Pair):
    """The world as it must be, beside the ledger of a limiter.

    Attributes:
        broken: what was wrong first.
        limbo: requests that were admitted, and whose task has not run since.
        busy: whether an operation is under way.
        seen: how often what has happened.
    """

    def __init__(self, limiter: MemoryLimiter, seen: Counter[str], *, in_c: bool) -> None:
        ledger: Any = limiter._ledger
        self.limiter = limiter
        self.ledger: FollowedLedger = ledger
        rule: Rule = ledger.rule
        share = None if isinstance(rule, Polynomial) else rule.share
        others = {name: pool.limit for name, pool in ledger.pools.items() if name != BYTES}
        self.config = Config(
            ledger.limit, share, ledger.baseline, ledger._bypass_limit, tuple(others.items())
        )
        self.world = Whole(ledger.limit, share, ledger.baseline, others)
        self.pools = {(None, name): pool for name, pool in ledger.pools.items()}
        for name, account in ledger.accounts.items():
            firm = {
                stock.resource: stock.firm_limit
                for stock in account.stocks()
                if stock.firm_limit != NO_LIMIT
            }
            self.world.components[name] = Component(name, account.minimum, firm)
        self.world.measured = ledger.measured
        self.world.drift = ledger.drift
        self.grants: dict[int, Grant] = {}
        self.waiting: dict[Request, Wish] = {}
        self.lines: dict[tuple[Component, str | None, bool], list[Request]] = {}
        self.passed: dict[Request, dict[Place, int]] = {}
        self.once_parked: set[Request] = set()
        self.of: dict[int, Grant] = {}
        self.limbo: dict[Request, Asked] = {}
        self.wishes: dict[Request, Asked] = {}
        self.inboxes: list[Inbox[Any]] = []
        self.seen = seen
        self.observes = limiter._observe
        self.in_c = in_c and EXTENSION
        self.busy = False
        self.moved = False
        self.broken: Broken | None = None
        self._tickets = 0
        ledger.books = self

    # --- the frame of an operation

    @contextmanager
    def operation(self, name: str, *, is_done: bool = False) -> Iterator[None]:
        """Do one operation of the ledger, or note one, and check everything after it."""
        self.busy = True
        self.moved = True
        ledger = self.ledger
        ledger.steps.clear()
        ledger.turns = 0
        if not is_done:
            self.catch_up()
        try:
            yield
            self.check()
        except Broken as broken:
            self.fail(f"{name}: {broken}", broken)
            raise
        except (GrantTooLarge, QuotaExceeded):
            raise
        except Exception as error:
            self.fail(f"{name}: {type(error).__name__}: {error}", error)
            raise
        finally:
            self.busy = False

    def fail(self, reason: str, cause: BaseException | None = None) -> None:
        """Note what is wrong; whoever runs the program asks for it at the end of the turn."""
        if self.broken is None:
            self.broken = Broken(reason)
            self.broken.__cause__ = cause

    def catch_up(self) -> None:
        """Take over what the fast path in C has done, which nobody is told of."""
        if not self.in_c:
            return
        for name, account in self.ledger.accounts.items():
            self.world.components[name].granted[BYTES] = account.granted
        self.world.note()
        self.world.highest = max(self.world.highest, self.ledger.highest_committed)

    # --- operations

    def asked(self, request: Request) -> Asked:
        """Put a request in the words of the world."""
        self._tickets += 1
        sender: Any = None if request.sender is None else request.sender.name
        kind: Any = "request"
        amounts = {BYTES: request.nbytes, **request.also}
        if request.kind is Kind.ENTER:
            kind, amounts = "enter", {}
        elif request.source is not None:
            kind = "transfer"
        elif request.kind is Kind.GROW or request.held:
            kind = "grow"
        components = self.world.components
        wish = Asked(
            self._tickets,
            kind,
            components[request.account.name],
            sender,
            amounts,
            request.up_to if request.up_to > request.nbytes else 0,
            None if request.source is None else components[request.source.name],
            request.held,
            request.alone,
            request.exclusive,
        )
        self.of[wish.ticket] = Grant(wish.component, sender, {})
        self.wishes[request] = wish
        return wish

    def wish_of(self, request: Request) -> Asked:
        return self.wishes[request]

    def request(self, request: Request, ask: Callable[[Request], list[Request]]) -> list[Request]:
        with self.operation(f"request {request.kind.value}"):
            wish = self.asked(request)
            line = self.lines.setdefault(wish.line, [])
            line.insert(0 if request.exclusive else len(line), request)
            self.waiting[request] = wish
            self.ledger.waiting[request] = None
            self.passed[request] = {}
            try:
                settled = ask(request)
            except GrantTooLarge:
                del self.ledger.waiting[request]
                self.forget(request)
                must(not self.world.is_possible(wish), "it would be possible")
                raise
            must(self.world.is_possible(wish), "it is not possible")
            self.settled(settled)
        self.seen["waits"] += request.state is State.WAITING
        return settled

    def request_nowait(
        self, request: Request, ask: Callable[[Request], list[Request]]
    ) -> list[Request]:
        with self.operation("request_nowait"):
            wish = self.asked(request)
            try:
                settled = ask(request)
            except GrantTooLarge:
                must(not self.world.is_possible(wish), "it would be possible")
                raise
            except QuotaExceeded as error:
                needed = not self.world.fits(wish) or self.line_of(wish) or self.is_closed_for(wish)
                must(
                    needed or self.is_behind_what_is_in_flight(wish),
                    f"refused without need: {error}",
                )
                raise
            self.had_at_once(request, wish, settled)
        return settled

    def request_at_once(
        self, request: Request, ask: Callable[[Request], list[Request] | None]
    ) -> list[Request] | None:
        with self.operation("request_at_once"):
            wish = self.asked(request)
            settled = ask(request)
            if settled is not None:
                self.had_at_once(request, wish, settled)
        return settled

    def had_at_once(self, request: Request, wish: Asked, settled: list[Request]) -> None:
        must(not self.line_of(wish), "others of its line wait")
        must(self.world.measured < self.world.limit or not self.bytes_of(wish), "M >= L")
        self.settled([request, *settled])
        del self.limbo[request]

    def force(self, request: Request, force: Callable[[Request], list[Request]]) -> list[Request]:
        with self.operation("force"):
            wish = self.asked(request)
            settled = force(request)
            del self.ledger.steps[0]
            if BYTES in wish.amounts:
                must(wish.amounts[BYTES] <= request.nbytes, "less than what was wanted")
                wish.amounts[BYTES] = request.nbytes
            self.of.pop(wish.ticket)
            self.world.admit(wish)
            if request.kind is not Kind.ENTER:
                self.limbo[request] = wish
            self.once_parked |= {*self.fronts()}
            self.settled(settled)
        return settled

    def admitted_at_once(self, account: Account, nbytes: int, sender: Any) -> None:
        with self.operation("admit", is_done=True):
            component = self.world.components[account.name]
            wish = Asked(0, "request", component, sender, {BYTES: nbytes})
            must(not self.waiting, "the fast path admitted it, and others wait")
            must(self.world.fits(wish), "the fast path admitted what does not fit")
            self.world.admit(wish)
            self.seen["admissions"] += 1

    def entered_again(self, account: Account) -> None:
        with self.operation("enter_again", is_done=True):
            component = self.world.components[account.name]
            must(component.entries or not component.minimum, "entered without its minimum")
            component.entries += 1

    def left(self, account: Account, settled: list[Request]) -> None:
        component = self.world.components[account.name]
        must(component.entries, "left more often than it was entered")
        component.entries -= 1
        if not component.entries:
            component.reserved = 0
        self.settled(settled)

    def given_back(
        self, account: Account, amounts: Mapping[str, int], sender: Any, settled: Iterable[Request]
    ) -> None:
        component = self.world.components[account.name]
        for resource, amount in amounts.items():
            self.add(component, resource, -amount, sender)
        self.settled(settled)

    def delivered(
        self, account: Account, amounts: Mapping[str, int], sender: Any, over: Mapping[str, int]
    ) -> None:
        with self.operation("deliver_at_once", is_done=True):
            self.deliver(account, amounts, sender, over, ())

    def deliver(
        self,
        account: Account,
        amounts: Mapping[str, int],
        sender: Any,
        over: Mapping[str, int],
        settled: Iterable[Request],
    ) -> None:
        component, world = self.world.components[account.name], self.world
        before = {place: world.free(place) for place in self.pools}
        for resource, amount in amounts.items():
            self.add(component, resource, -amount, sender)
            self.add(component, resource, amount - over.get(resource, 0), None)
        lower = [place for place in self.pools if world.free(place) < before[place]]
        must(not lower, f"delivered, there is less free of {lower}")
        self.settled(settled)

    def undone(self, request: Request, settled: Iterable[Request]) -> None:
        wish = self.limbo.pop(request)
        for resource, amount in wish.amounts.items():
            self.add(wish.component, resource, -amount, wish.sender)
            if wish.source is not None:
                self.add(wish.source, resource, amount, None)
        self.settled(settled)

    def add(self, component: Component, resource: str, amount: int, sender: Any) -> None:
        try:
            component.add(resource, amount, sender)
        except ValueError as error:
            raise Broken(f"more is given back than there is: {error}") from None

    def untangled(self, settled: Iterable[Request]) -> None:
        """Take note of what was done about a deadlock.

        Whether there was one, and whether these were the right ones, is what
        `tests.fuzz_deadlocks` judges.
        """
        ledger, world = self.ledger, self.world
        self.once_parked |= {*self.fronts()}
        settled = [*settled]
        refused = [request for request in settled if request.state is State.DEADLOCKED]
        for request in refused:
            self.seen["deadlocks"] += 1
            self.forget(request)
        for step in ledger.steps[: ledger.suspended]:
            if step.state is State.ADMITTED:
                wish = self.wish_of(step.request)
                must(world.fits(wish), f"{wish.ticket} was let in, but does not fit")
                if BYTES in wish.amounts:
                    wish.amounts[BYTES] = step.request.nbytes
                self.forget(step.request)
                world.admit(wish)
                if wish.kind != "enter":
                    self.limbo[step.request] = wish
                self.seen["order suspended"] += 1
            else:
                self.forget(step.request)
        del ledger.steps[: ledger.suspended]
        self.settled(settled[len(refused) + ledger.suspended :])

    # --- the replay

    def admitted(self, step: Step) -> None:
        request = step.request
        wish = self.wish_of(request)
        if request.kind is not Kind.ENTER:
            self.limbo[request] = wish
        super().admitted(step)
        self.seen["admissions"] += 1
        self.seen["admissions out of turn"] += not step.in_turn
        self.seen["admissions of a barrier"] += step.was_barrier
        self.seen["admissions of one that is alone"] += request.exclusive
        if step.in_turn and request.pooled:
            must(self.world.free(BYTES_PLACE) >= 0, f"{wish.ticket}: more than there is")

    def place_among_barriers(self, step: Step, barrier: Request) -> int:
        assert isinstance(step, Followed)
        return step.ranks.get(barrier, barrier.arrival)

    def check_barriers(self, step: Step, *arguments: Any) -> None:
        if not self.wish_of(step.request).exclusive:  # who has the pool alone goes first
            super().check_barriers(step, *arguments)

    def head(self, component: Component) -> Request | None:
        fronts = self.own_fronts(component)
        if fronts and fronts[0].exclusive:
            return fronts[0]
        barriers = [front for front in fronts if front.barrier]
        return min(barriers, key=rank) if barriers else next(iter(fronts), None)

    def first_barrier(self, place: Place, among: Iterable[Request]) -> Request | None:
        if place == BYTES_PLACE and self.ledger._exclusive is not None:
            return ALONE_HAS_IT
        order = self.pools[place].order
        found = [each for each in among if each.barrier and order in each.orders]
        return min(found, key=rank, default=None)

    # --- what must be so after each operation

    def check(self) -> None:
        if self.observes:
            self.world.note()
            self.check_numbers()
            return
        super().check()
        if self.waiting:
            self.check_progress()

    def check_numbers(self) -> None:
        """Check all numbers, as the inherited one does, which takes its time to say them all."""
        world, ledger = self.world, self.ledger
        if ledger.drift != world.drift:
            must(False, f"drift is {ledger.drift}, should be {world.drift}")
        if ledger.highest_committed != world.highest:
            must(False, f"highest: {ledger.highest_committed}, should be {world.highest}")
        must(ledger.waiters.count == len(self.waiting), "count")
        for place, pool in self.pools.items():
            free = world.free(place)
            if pool.free != free:
                must(False, f"free of {place} is {pool.free}, should be {free}")
            if self.config.share is None:
                holding = [each for each in world.members(place) if each.held(place[1]) > 0]
                must(pool.consumers == len(holding), f"consumers of {place}: {pool.consumers}")
        for name, account in ledger.accounts.items():
            component = world.components[name]
            found = account.reserved, account.entries, account.live
            known = component.reserved, component.entries, component.live
            if found != known:
                must(False, f"reserved, entered, live of {name} is {found}, should be {known}")
            for stock in (account, *account.others.values()):
                resource = stock.resource
                granted = component.granted.get(resource, 0)
                if stock.granted != granted:
                    must(False, f"{resource} of {name}: {stock.granted}, should be {granted}")
                by_sender = component.in_flight.get(resource)
                if by_sender is None:
                    must(not stock.in_flight and not stock.senders, f"{resource} in flight: {name}")
                    continue
                must(stock.senders == len(by_sender), f"{name}: senders")
                must(stock.in_flight == sum(by_sender.values()), f"{name}: in flight")
                for sender, amount in by_sender.items():
                    held = account.by_sender[sender].held[stock]
                    must(held == amount, f"{name} from {sender}: {held}, should be {amount}")
            for each in account.by_sender.values():
                must(each.held or each.line, f"{name}: a sender without anything is remembered")

    def check_progress(self) -> None:
        """Check that somebody goes on if nothing is held of the pool, whatever the drift."""
        world = self.world
        if self.ledger._exclusive is not None or any(world.held_anywhere()):
            return
        free = world.free(BYTES_PLACE) + world.drift
        first = self.first_barrier(BYTES_PLACE, self.waiting)
        fronts = [first] if first is not None else self.fronts()
        for front in fronts:
            wish = self.wish_of(front)
            component = wish.component
            if (
                wish.sender is not None
                or len(wish.amounts) > 1
                or self.head(component) is not front
            ):
                continue
            if any(line[0] is component and line[1] is not None for line in self.lines):
                continue
            need: Need = world.needs(wish)[0]
            must(
                need.over_firm or need.draw > free or wish.kind == "transfer",
                f"{wish.ticket} waits, although nobody holds anything",
            )

    def check_holdings(self) -> None:
        """Check that accounts have what grants hold, at the end of a turn."""
        limiter = self.limiter
        found: Counter[tuple[str, str, Any]] = Counter()
        shares: set[object] = set()
        alone = 0
        for account in self.ledger.accounts.values():
            for grant in account.holders.snapshot():
                if grant._state not in (HELD, ALONE):
                    must(False, f"{grant} is said to be held")
                alone += grant._state == ALONE
                self.count(found, grant._component.path, grant._size, grant._options, shares)
        for late in limiter._late:
            account, nbytes, exclusive, options = late.args  # type: ignore[attr-defined]
            alone += exclusive
            self.count(found, account.name, nbytes, options, shares)
        for request, wish in self.limbo.items():
            alone += request.exclusive and not wish.exclusive
            for resource, amount in wish.amounts.items():
                found[wish.component.name, resource, wish.sender] += amount
                if wish.source is not None:
                    found[wish.source.name, resource, None] -= amount
            place, loop = request.owner, limiter._loop
            if place is not None and loop is not None and loop.is_occupied(place):
                must(False, f"{wish.ticket} was admitted and not woken")
        if self.ledger.waiters.count and limiter._timer is None:
            must(False, "somebody waits, and nobody will look at memory")
        has_it = self.ledger._exclusive is not None
        if alone != has_it:
            must(False, f"{alone} grants have the pool alone, {has_it}")
        for name, account in self.ledger.accounts.items():
            for stock in account.stocks():
                held = found.pop((name, stock.resource, None), 0)
                if held != stock.granted:
                    must(False, f"grants of {name}: {held} {stock.resource}, not {stock.granted}")
            for sender in account.by_sender.values():
                for stock, amount in sender.held.items():
                    held = found.pop((name, stock.resource, sender.name), 0)
                    if held != amount:
                        must(False, f"grants from {sender.name} to {name}: {held}, not {amount}")
        left = {key: amount for key, amount in found.items() if amount}
        must(not left, f"grants hold what no account has: {left}")

    def arriving(self) -> int:
        """Give the bytes that were admitted, and cannot be in use: nobody has got them yet."""
        wishes = [wish for wish in self.limbo.values() if wish.source is None]
        return sum(wish.amounts.get(BYTES, 0) for wish in wishes)

    @staticmethod
    def check_inbox(inbox: Inbox[Any]) -> None:
        """Check that nobody waits at an inbox for what is there."""
        places = inbox._places
        if places is not None:
            must(not places._waiting or not places._free, "a place is free, and somebody waits")
        if inbox._receiving:
            must(not inbox._buffer, "a message is there, and somebody waits for it")
            over = inbox._closed or (inbox._ended and not inbox._handed_over)
            must(not over, "no message will come, and somebody waits for one")
        for line in inbox._lines.values():
            must(next(iter(line)).is_next.is_set(), "the first of a line is not told that it is")

    @staticmethod
    def count(
        found: Counter[tuple[str, str, Any]],
        path: str,
        nbytes: int,
        options: Options | None,
        shares: set[object],
    ) -> None:
        """Count what a grant holds, of one that is shared once."""
        if options is None:
            found[path, BYTES, None] += nbytes
            return
        if options.shares is not None:
            if options.shares in shares:
                return
            shares.add(options.shares)
        found[path, BYTES, options.sender] += nbytes
        for resource, amount in options.also.items():
            found[path, resource, options.sender] += amount

    def after_turn(self) -> None:
        """Check what must be so whenever tasks may run.

        Raises:
            Broken: it is not so, or something was wrong before.
        """
        if self.broken is None and self.moved:
            self.moved = False
            try:
                self.check_holdings()
                for inbox in self.inboxes:
                    self.check_inbox(inbox)
            except Broken as broken:
                self.fail(str(broken))
        if self.broken is not None:
            raise self.broken

    def check_end(self) -> None:
        """Check that everything is back.

        Raises:
            Broken: it is not.
        """
        ledger, limiter = self.ledger, self.limiter
        self.after_turn()
        must(not self.waiting and ledger.waiters.count == 0, "somebody waits in the end")
        must(not self.limbo, f"{len(self.limbo)} requests were admitted, and never ended")
        must(not limiter._late, "something was left for later")
        must(not limiter._impatient, "somebody is to be told of waiters in the end")
        must(ledger._exclusive is None, "the pool is somebody's alone in the end")
        must(ledger.arriving == 0, f"{ledger.arriving} bytes are still arriving in the end")
        must(ledger.committed == sum(each.live for each in ledger.accounts.values()), "committed")
        for place, pool in self.pools.items():
            order = pool.order
            left = (order.heads, order.growing, order.counting, order.bypassed, order.barriers)
            must(not any(left) and not pool._closed, f"waiters are remembered in {place}")
        for account in ledger.accounts.values():
            name = account.name
            must(not account.granted and not account.in_flight, f"{name} has something in the end")
            must(not account.entries and not account.reserved, f"{name} is entered in the end")
            must(not account.by_sender and not account.incoming, f"{name}: senders are remembered")
            must(account.holders.count == 0, f"{name}: grants are remembered")
            for stock in account.stocks():
                must(
                    not stock.fronts and not stock.own and not stock.ranked and not stock.parked,
                    f"{name}: waiters are left",
                )
        must(limiter._timer is None, "the timer goes on in the end")
        must(limiter._reclaim.run is None, "reclaim goes on in the end")


ALONE_HAS_IT = Request.__new__(Request)
"""Stands for the grant that has the pool alone: nobody else gets anything of it."""


class _Lock:
    """A lock that tells of who takes it twice; the path in C wants a real one, and stays away."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if not self._lock.acquire(blocking=False):
            must(not blocking, "the limiter's lock is taken twice")
            return False
        return True

    def release(self) -> None:
        self._lock.release()

    def locked(self) -> bool:
        return self._lock.locked()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@contextmanager
def follow() -> Iterator[None]:
    """Have limiters made, and grants taken over, so that books can be kept."""
    hold, moved_to = MemoryGrant._hold, MemoryGrant._moved_to

    def held(grant: MemoryGrant, request: Request) -> None:
        if not grant.released:  # else what was admitted is undone
            taken(grant, request)
        hold(grant, request)

    def moved(grant: MemoryGrant, target: Any) -> None:
        changing: Any = grant._changing
        taken(grant, changing)
        moved_to(grant, target)

    def resolve(limit: Any, *, probe: Any, **_: Any) -> DetectedLimit:
        return DetectedLimit(limit, "explicit", probe)  # which of this machine's binds is not asked

    with (
        patch.object(MemoryGrant, "_hold", held),
        patch.object(MemoryGrant, "_moved_to", moved),
        patch("membound_async.limiter.Ledger", FollowedLedger),
        patch("membound_async.limiter.resolve", resolve),
    ):
        yield


def taken(grant: MemoryGrant, request: Request) -> None:
    """Note that a grant takes over what a request was given."""
    ledger = grant._component._limiter._ledger
    if isinstance(ledger, FollowedLedger) and ledger.books is not None:
        ledger.books.limbo.pop(request, None)
        ledger.books.moved = True


def books_for(limiter: MemoryLimiter, seen: Counter[str], *, in_c: bool) -> Books:
    """Keep books of a limiter from now on."""
    if not in_c:
        limiter._lock = _Lock()  # type: ignore[assignment]
    return Books(limiter, seen, in_c=in_c)
