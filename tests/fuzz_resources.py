"""Drives the ledger with several resources, senders and groups, and checks each step for itself.

    python -m tests.fuzz_resources --steps 1000000 --seed 1

Who goes first among waiters of different resources may depend on what came before, so nothing
is compared but legality. `tests.divisions` says what somebody has and whether a wish fits. The
ledger says what it admitted, one after the other, and whom it held for barriers then; that is
replayed, and after each operation it must be so that

- each admission was legal where it stood: first of its line (own line: grows before requests;
  first in, first out), everything fits at both levels and up to the firm limits, and in no pool
  of which it drew is the first barrier another's that lacks there what it needs;
- nobody is left who could go on (no lost wake-up): of each line the first, if everything fits
  and it would draw of no pool in which there is a barrier, except a request behind a grow of
  its own component, and a sender's request where its component itself waits for the firm limit
  of a resource that both want; and no barrier that is the first wherever it draws, if it fits;
- what cannot be met at all is refused, and nothing else is;
- nobody draws of a pool past a first of a line that waits for pools only, once more than the
  bypass limit of that pool was drawn past it, unless that is a barrier then;
- all numbers are those that the replay leads to, and in the end everything is free again.

On a failure it prints the shortest program found that still shows it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from random import Random
from typing import Any

from membound_async.exceptions import GrantTooLarge, QuotaExceeded
from membound_async.ledger import NO_LIMIT, Account, Ledger
from membound_async.rules import Polynomial
from membound_async.stocks import Pool, Stock
from membound_async.waiters import Kind, Request, State
from tests.divisions import BYTES, Amounts, Component, Place, Wish, World

__all__ = ["Broken", "Config", "Pair", "fuzz", "main", "replay"]

Operation = tuple[Any, ...]
MakeLedger = Callable[..., "Watched"]
SENDERS = ("x", "y", "z")
RESOURCES = (BYTES, "fds", "slices")
SHARES = (*map(Fraction, ("1/2", "1/2", "1/3", "2/3", "1", "3/7")), None, None)


class Broken(AssertionError):
    """The ledger did what it must not do."""


@dataclass(frozen=True, slots=True)
class Config:
    """What an episode starts from."""

    limit: int
    share: Fraction | None = Fraction(1, 2)
    baseline: int = 0
    bypass: int | None = None
    others: tuple[tuple[str, int], ...] = ()
    groups: tuple[tuple[tuple[str, int], ...], ...] = ()
    components: tuple[tuple[str, int, tuple[tuple[str, int], ...], int | None], ...] = (
        ("a", 0, (), None),
    )
    """Of each its name, minimum, firm limits and group."""


@dataclass(slots=True)
class Step:
    """An admission as the ledger says it, or a waiter that it dropped."""

    request: Request
    state: State
    in_turn: bool = True
    was_barrier: bool = False
    barriers: tuple[Request, ...] = ()


class Watched(Ledger):
    """A ledger that says what it does, and that does not go round in circles."""

    def watch(self) -> None:
        self.steps: list[Step] = []
        self.waiting: dict[Request, None] = {}
        self.turns = 0
        self._was_barrier = False

    def arrives(self, request: Request) -> None:
        """Nothing: whoever is let in has it at once here."""

    def _remove(self, request: Request, state: State) -> None:
        self._was_barrier = request.barrier
        super()._remove(request, state)
        self.waiting.pop(request, None)
        if state is State.IMPOSSIBLE:
            self.steps.append(Step(request, state))

    def _charge(self, request: Request, *, in_turn: bool = True) -> None:
        barriers = tuple([each for each in self.waiting if each.barrier])
        was_barrier, self._was_barrier = self._was_barrier, False
        super()._charge(request, in_turn=in_turn)
        self.steps.append(Step(request, State.ADMITTED, in_turn, was_barrier, barriers))

    def _rank(self, stock: Stock, lacking: tuple[Request, Pool] | None = None) -> None:
        self.turns += 1
        if self.turns > 20_000:
            raise Broken("it does not come to an end")
        super()._rank(stock, lacking)


@dataclass(eq=False, slots=True)
class Grant:
    """What somebody holds."""

    component: Component
    sender: str | None
    amounts: Amounts
    busy: bool = False
    """Whether something is waited for with it."""


class Pair:
    """A ledger, and the world as it must be."""

    def __init__(self, config: Config, make: MakeLedger = Watched) -> None:
        self.config = config
        groups = tuple(map(dict, config.groups))
        self.world = World(config.limit, config.share, config.baseline, dict(config.others), groups)
        self.ledger = make(
            config.limit,
            baseline=config.baseline,
            share=Polynomial() if config.share is None else config.share,
            bypass_limit=config.bypass,
            others=dict(config.others),
        )
        self.ledger.watch()
        self.pools: dict[Place, Pool] = {
            (None, name): pool for name, pool in self.ledger.pools.items()
        }
        made = [self.ledger.group(group) for group in groups]
        for number, group in enumerate(made):
            self.pools |= {(number, name): pool for name, pool in group.items()}
        for name, minimum, firm, group_number in config.components:
            limits = dict(firm)
            others = {r: n for r, n in limits.items() if r != BYTES}
            account = self.ledger.account(name, minimum, limits.get(BYTES, NO_LIMIT), others=others)
            if group_number is not None:
                self.ledger.join(account, made[group_number])
            self.world.components[name] = Component(name, minimum, limits, group_number)
        self.grants: dict[int, Grant] = {}
        self.waiting: dict[Request, Wish] = {}
        self.lines: dict[tuple[Component, str | None, bool], list[Request]] = {}
        self.passed: dict[Request, dict[Place, int]] = {}
        self.once_parked: set[Request] = set()
        """Senders' firsts that have waited for a firm limit: they count again in their turn."""
        self.of: dict[int, Grant] = {}
        """The grants that what waits belongs to, by its ticket."""

    # --- operations

    def is_meaningful(self, operation: Operation) -> bool:
        """Whether a caller that keeps to the rules could do this now."""
        match operation:
            case ("grow" | "grow_now", _, grant, _):
                return grant in self.grants and not self.grants[grant].busy
            case ("transfer" | "transfer_now", _, grant, name):
                held = self.grants.get(grant)
                return (
                    held is not None
                    and not held.busy
                    and held.sender is None
                    and held.component.name != name
                )
            case ("back", grant, amounts):
                held = self.grants.get(grant)
                return (
                    held is not None
                    and not held.busy
                    and all(held.amounts.get(r, 0) >= n for r, n in amounts)
                )
            case ("deliver", grant, over):
                held = self.grants.get(grant)
                return (
                    held is not None
                    and not held.busy
                    and held.sender is not None
                    and all(held.amounts.get(r, 0) >= n for r, n in over)
                )
            case ("cancel", ticket):
                return any(wish.ticket == ticket for wish in self.waiting.values())
            case ("leave", name):
                return self.world.components[name].entries > 0
            case ("lift", place):
                return self.first_barrier(place, self.waiting) is not None
            case _:
                return True

    def apply(self, operation: Operation) -> str:
        """Do one operation and check everything; give what came of it.

        Raises:
            Broken: something is not as it must be.
        """
        try:
            self.ledger.steps.clear()
            self.ledger.turns = 0
            what, *arguments = operation
            outcome: str = getattr(self, f"do_{what}")(*arguments)
            self.check()
        except Broken as broken:
            raise Broken(f"{operation}: {broken}") from broken
        except (AssertionError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise Broken(f"{operation}: {type(error).__name__}: {error}") from error
        return outcome

    def do_ask(
        self,
        ticket: int,
        name: str,
        sender: str | None,
        amounts: tuple[tuple[str, int], ...],
        up_to: int = 0,
    ) -> str:
        component = self.world.components[name]
        wish = Wish(ticket, "request", component, sender, dict(amounts), up_to)
        return self.ask(wish, Grant(component, sender, {}))

    def do_now(
        self, ticket: int, name: str, sender: str | None, amounts: tuple[tuple[str, int], ...]
    ) -> str:
        component = self.world.components[name]
        wish = Wish(ticket, "request", component, sender, dict(amounts))
        return self.ask_now(wish, Grant(component, sender, {}))

    def do_grow(self, ticket: int, grant: int, more: int) -> str:
        return self.ask(self.grow_wish(ticket, grant, more), self.grants[grant])

    def do_grow_now(self, ticket: int, grant: int, more: int) -> str:
        return self.ask_now(self.grow_wish(ticket, grant, more), self.grants[grant])

    def do_transfer(self, ticket: int, grant: int, name: str) -> str:
        return self.ask(self.transfer_wish(ticket, grant, name), self.grants[grant])

    def do_transfer_now(self, ticket: int, grant: int, name: str) -> str:
        return self.ask_now(self.transfer_wish(ticket, grant, name), self.grants[grant])

    def do_enter(self, ticket: int, name: str) -> str:
        component = self.world.components[name]
        if self.ledger.enter_again(self.ledger.accounts[name]):
            must(component.entries or not component.minimum, "entered without its minimum")
            component.entries += 1
            return "admitted"
        return self.ask(Wish(ticket, "enter", component, None, {}), Grant(component, None, {}))

    def do_back(self, grant: int, amounts: tuple[tuple[str, int], ...]) -> str:
        held = self.grants[grant]
        back = dict(amounts) or dict(held.amounts)
        if not amounts:
            del self.grants[grant]
        for resource, amount in back.items():
            held.amounts[resource] -= amount
            held.component.add(resource, -amount, held.sender)
        account = self.ledger.accounts[held.component.name]
        sender = None if held.sender is None else self.ledger.sender(account, held.sender)
        nbytes = back.pop(BYTES, 0)
        self.settled(self.ledger.give_back(account, nbytes, also=back, sender=sender))
        return "done"

    def do_deliver(self, grant: int, over: tuple[tuple[str, int], ...]) -> str:
        held = self.grants[grant]
        assert held.sender is not None
        account = self.ledger.accounts[held.component.name]
        before = {place: self.world.free(place) for place in self.pools}
        sender = self.ledger.sender(account, held.sender)
        nbytes = held.amounts.get(BYTES, 0)
        also = {r: n for r, n in held.amounts.items() if r != BYTES}
        for resource, amount in held.amounts.items():
            held.component.add(resource, -amount, held.sender)
            held.amounts[resource] = amount - dict(over).get(resource, 0)
            held.component.add(resource, held.amounts[resource], None)
        held.sender = None
        lower = [place for place in self.pools if self.world.free(place) < before[place]]
        must(not lower, f"delivered, there is less free of {lower}")
        self.settled(self.ledger.deliver(account, nbytes, also, sender, dict(over)))
        return "done"

    def do_cancel(self, ticket: int) -> str:
        request = next(r for r, wish in self.waiting.items() if wish.ticket == ticket)
        self.forget(request)
        self.settled(self.ledger.cancel(request))
        must(request.state is State.CANCELLED, "cancelled in vain")
        return "done"

    def do_leave(self, name: str) -> str:
        component = self.world.components[name]
        component.entries -= 1
        if not component.entries:
            component.reserved = 0
        self.settled(self.ledger.leave(self.ledger.accounts[name]))
        return "done"

    def do_observe(self, measured: int, live: tuple[tuple[str, int], ...] = ()) -> str:
        ledger = self.ledger
        pressed = 100 * measured > 95 * ledger.limit
        self.world.observe(measured, dict(live), pressed=pressed)
        self.settled(
            ledger.observe(
                measured,
                pressed=pressed,
                look_after=max(0, ledger.limit - measured) // 4,
                live=[(ledger.accounts[name], amount) for name, amount in live],
            )
        )
        return "done"

    def do_resize(self, limit: int) -> str:
        self.world.limit = limit
        self.settled(self.ledger.resize(limit))
        return "done"

    def do_declare(self, name: str, minimum: int, firm: tuple[tuple[str, int], ...]) -> str:
        """New bounds; a firm limit that is not named any more is gone."""
        component = self.world.components[name]
        limits = dict(firm)
        others = {r: limits.get(r, NO_LIMIT) for r in (*component.firm, *limits) if r != BYTES}
        component.minimum, component.firm = minimum, limits
        account = self.ledger.accounts[name]
        self.settled(self.ledger.declare(account, minimum, limits.get(BYTES, NO_LIMIT), others))
        return "done"

    def do_lift(self, place: Place) -> str:
        barrier = self.first_barrier(place, self.waiting)
        assert barrier is not None
        self.passed[barrier] = {}
        self.settled(self.ledger.lift(barrier))
        return "done"

    # --- how they are done

    def grow_wish(self, ticket: int, grant: int, more: int) -> Wish:
        held = self.grants[grant]
        nbytes = held.amounts.get(BYTES, 0)
        return Wish(ticket, "grow", held.component, held.sender, {BYTES: more}, held=nbytes)

    def transfer_wish(self, ticket: int, grant: int, name: str) -> Wish:
        held = self.grants[grant]
        target = self.world.components[name]
        return Wish(ticket, "transfer", target, None, dict(held.amounts), source=held.component)

    def request_for(self, wish: Wish) -> Request:
        account: Account = self.ledger.accounts[wish.component.name]
        sender = None if wish.sender is None else self.ledger.sender(account, wish.sender)
        kind = Kind.GRANT
        if wish.kind == "enter":
            kind = Kind.ENTER
        elif wish.kind == "grow" and sender is None:
            kind = Kind.GROW
        nbytes = account.minimum if wish.kind == "enter" else wish.amounts.get(BYTES, 0)
        return Request(
            account,
            nbytes,
            kind,
            also={r: n for r, n in wish.amounts.items() if r != BYTES},
            sender=sender,
            source=None if wish.source is None else self.ledger.accounts[wish.source.name],
            up_to=wish.up_to if wish.up_to > nbytes else None,
            held=wish.held,
            owner=wish,
        )

    def ask(self, wish: Wish, grant: Grant) -> str:
        request = self.request_for(wish)
        ledger = self.ledger
        is_plain = wish.kind == "request" and wish.sender is None and not wish.up_to
        if is_plain and not request.also and ledger.admit(request.account, request.nbytes):
            must(not self.waiting and self.world.fits(wish), "the fast path admitted it")
            self.world.admit(wish)
            grant.amounts = dict(wish.amounts)
            self.grants[wish.ticket] = grant
            return "admitted"
        self.of[wish.ticket] = grant
        self.waiting[request] = wish
        ledger.waiting[request] = None
        self.lines.setdefault(wish.line, []).append(request)
        self.passed[request] = {}
        grant.busy = wish.kind != "request"
        try:
            settled = ledger.request(request)
        except GrantTooLarge:
            ledger.waiting.pop(request)
            self.forget(request)
            must(not self.world.is_possible(wish), "it would be possible")
            return "too large"
        must(self.world.is_possible(wish), "it is not possible")
        self.settled(settled)
        return request.state.value

    def ask_now(self, wish: Wish, grant: Grant) -> str:
        request = self.request_for(wish)
        before = self.complete_state()
        try:
            settled = self.ledger.request_nowait(request)
        except (GrantTooLarge, QuotaExceeded) as error:
            must(self.complete_state() == before, "refused, it changed something")
            if isinstance(error, GrantTooLarge):
                must(not self.world.is_possible(wish), "it would be possible")
                return "too large"
            must(
                not self.world.fits(wish)
                or bool(self.line_of(wish))
                or self.is_closed_for(wish)
                or self.is_behind_what_is_in_flight(wish),
                f"refused without need: {error}",
            )
            return "refused"
        must(not self.line_of(wish), "others of its line wait")
        must(self.world.measured < self.world.limit or not self.bytes_of(wish), "M >= L")
        self.of[wish.ticket] = grant
        self.settled([request, *settled])
        return "admitted"

    def bytes_of(self, wish: Wish) -> bool:
        """Whether it draws bytes of the limiter's pool, its source left out."""
        before = self.world.free((None, BYTES))
        self.world.without_source(wish, -1)
        for resource, amount in wish.amounts.items():
            wish.component.add(resource, amount, wish.sender)
        after = self.world.free((None, BYTES))
        for resource, amount in wish.amounts.items():
            wish.component.add(resource, -amount, wish.sender)
        self.world.without_source(wish, +1)
        return after < before

    def line_of(self, wish: Wish) -> list[Request]:
        """Who is before it: of a component's own, grows and requests alike."""
        component, sender = wish.component, wish.sender
        lines = [self.lines.get((component, sender, grows), []) for grows in (True, False)]
        return lines[0] + lines[1]

    def is_closed_for(self, wish: Wish) -> bool:
        drawn = self.world.drawn(wish)
        full = self.world.measured >= self.world.limit and (None, BYTES) in drawn
        return full or any(self.first_barrier(place, self.waiting) for place in drawn)

    def forget(self, request: Request) -> None:
        """Take a waiter out of its line."""
        wish = self.waiting.pop(request)
        self.lines[wish.line].remove(request)
        if not self.lines[wish.line]:
            del self.lines[wish.line]
        self.passed.pop(request)
        self.of.pop(wish.ticket).busy = False

    # --- who is where

    def fronts(self) -> list[Request]:
        return [line[0] for line in self.lines.values()]

    def own_fronts(self, component: Component) -> list[Request]:
        lines = [self.lines.get((component, None, grows), []) for grows in (True, False)]
        return [line[0] for line in lines if line]

    def head(self, component: Component) -> Request | None:
        """Who is next of a component's own: the older barrier, a grow, a request."""
        fronts = self.own_fronts(component)
        barriers = [front for front in fronts if front.barrier]
        return (
            min(barriers, key=lambda each: each.arrival) if barriers else next(iter(fronts), None)
        )

    def first_barrier(self, place: Place, among: Iterable[Request]) -> Request | None:
        found = [each for each in among if each.barrier and self.pools[place].order in each.orders]
        return min(found, key=lambda each: each.arrival, default=None)

    def is_first_everywhere(self, barrier: Request) -> bool:
        """Whether it is the first barrier of all pools that it would draw on."""
        drawn = self.world.drawn(self.waiting[barrier])
        return all(self.first_barrier(place, self.waiting) is barrier for place in drawn)

    def is_parked(self, request: Request) -> bool:
        """Whether it waits for a firm limit, or behind a grow of its component that does."""
        wish = self.waiting[request]
        if self.world.parked_at(wish):
            return True
        if wish.sender is not None or wish.kind == "grow":
            return False
        grows = self.lines.get((wish.component, None, True), [])
        return bool(grows) and bool(self.world.parked_at(self.waiting[grows[0]]))

    # --- the replay

    def settled(self, settled: Iterable[Request]) -> None:
        """Replay what the ledger says it did."""
        must(
            [step.request for step in self.ledger.steps] == list(settled),
            "what it did is not what it says",
        )
        for step in self.ledger.steps:
            request = step.request
            must(request.state is step.state, f"{self.wish_of(request).ticket} is {request.state}")
            if step.state is State.IMPOSSIBLE:
                must(not self.world.is_possible(self.waiting[request]), "it was possible")
                self.forget(request)
            else:
                self.admitted(step)

    def admitted(self, step: Step) -> None:
        request = step.request
        wish = self.wish_of(request)
        world = self.world
        name = f"{wish.ticket} admitted"
        if request in self.waiting:
            must(self.lines[wish.line][0] is request, f"{name}: it is not the first of its line")
            if wish.line == (wish.component, None, False) and not step.was_barrier:
                must(
                    (wish.component, None, True) not in self.lines,
                    f"{name}: a grow goes first",
                )
        if wish.kind != "enter":
            wanted = wish.amounts.get(BYTES, 0)
            must(wanted <= request.nbytes <= max(wanted, wish.up_to), f"{name}: {request.nbytes}")
            if BYTES in wish.amounts:
                wish.amounts[BYTES] = request.nbytes
        must(not world.parked_at(wish), f"{name}: over {world.parked_at(wish)}")
        lacking = world.lacking(wish)
        if step.in_turn:
            must(not lacking, f"{name}: there is too little of {lacking}")
        else:
            must(lacking == {(None, BYTES)}, f"{name} out of turn: it lacks {lacking}")
            component = wish.component
            others = [each for each in world.held_anywhere() if each is not component]
            held = max(0, component.granted.get(BYTES, 0) - component.reserved)
            held += component.sent(BYTES)
            must(not others and held <= wish.held, f"{name} out of turn: others hold some")
        before = {place: world.free(place) for place in self.pools}
        needs = {each: world.drawn(each_wish) for each, each_wish in self.waiting.items()}
        drawn_by_it = world.drawn(wish)
        counting = self.counting(request, step)
        if request in self.waiting:
            grant = self.of[wish.ticket]
            self.forget(request)
        else:
            grant = self.of.pop(wish.ticket)
        world.admit(wish)
        drawn = {place: n - world.free(place) for place, n in before.items()}
        if not step.in_turn:
            must(world.free((None, BYTES)) + world.drift >= 0, f"{name} out of turn: no room")
        self.check_barriers(step, name, drawn, needs, drawn_by_it)
        for front, limits in counting.items():
            for place, limit in limits.items():
                count = self.passed[front].get(place, 0)
                more = max(0, drawn[place])
                if more and place in drawn_by_it:
                    must(
                        count <= limit or front in step.barriers,
                        f"{name}: {count} of {place} were drawn past {self.wish_of(front).ticket}",
                    )
                    self.passed[front][place] = count + more
        match wish.kind:
            case "enter":
                return
            case "transfer":
                grant.component = wish.component
            case "grow":
                grant.amounts[BYTES] = grant.amounts.get(BYTES, 0) + request.nbytes
            case "request":
                grant.amounts = dict(wish.amounts)
                self.grants[wish.ticket] = grant

    def wish_of(self, request: Request) -> Wish:
        """Give what a request wants, in the words of the world."""
        wish: Wish = request.owner
        return wish

    def place_among_barriers(self, step: Step, barrier: Request) -> int:
        """Say where a barrier stood among others at that step."""
        return barrier.arrival

    def counting(self, request: Request, step: Step) -> dict[Request, dict[Place, int]]:
        """The fronts that count what is admitted, and up to how much in each pool."""
        return {
            front: {place: self.bypass_limit(place) for place in self.world.concerned(wish)}
            for front in self.fronts()
            if front is not request
            and front not in step.barriers
            and not self.is_parked(front)
            and front not in self.once_parked
            for wish in [self.waiting[front]]
        }

    def bypass_limit(self, place: Place) -> int:
        if place != (None, BYTES):
            return self.world.limits[place]
        return self.world.limit if self.config.bypass is None else self.config.bypass

    def check_barriers(
        self,
        step: Step,
        name: str,
        drawn: dict[Place, int],
        needs: dict[Request, set[Place]],
        drawn_by_it: set[Place],
    ) -> None:
        """Check that it went before no barrier that lacks what it drew."""
        request = step.request
        for place, amount in drawn.items():
            if amount <= 0 or place not in drawn_by_it:
                continue
            barriers = [b for b in step.barriers if self.pools[place].order in b.orders]
            barriers += [request] if step.was_barrier else []
            first = min(barriers, key=partial(self.place_among_barriers, step), default=request)
            if first is request or place not in needs.get(first, ()):
                continue
            must(
                place not in self.world.lacking(self.waiting[first]),
                f"{name}: {self.wish_of(first).ticket} is a barrier that lacks {place}",
            )

    def is_behind_what_is_in_flight(self, wish: Wish) -> bool:
        """Whether messages of another sender to the component go first, as it was passed."""
        account = self.ledger.accounts[wish.component.name]
        stocks = [stock for stock in account.stocks() if wish.amounts.get(stock.resource)]
        barriers = [each.among.first_barrier() for each in stocks if each.among is not None]
        return wish.sender is not None and any(each is not None for each in barriers)

    def is_behind_another_sender(self, front: Request) -> bool:
        """Whether somebody else's messages to the same component go first, as it was passed."""
        stocks = [stock for stock, amount in self.ledger._demands(front) if amount]
        barriers = [each.among.first_barrier() for each in stocks if each.among is not None]
        must(all(each is None or each in self.waiting for each in barriers), "a barrier is gone")
        return front.sender is not None and any(each not in (None, front) for each in barriers)

    # --- what must be so after each operation

    def check(self) -> None:
        self.world.note()
        self.check_numbers()
        world = self.world
        closed = {place for place in self.pools if self.first_barrier(place, self.waiting)}
        for request, wish in self.waiting.items():
            must(world.is_possible(wish), f"{wish.ticket} waits for what cannot be")
            must(
                not request.barrier
                or not world.parked_at(wish)
                or (wish.sender is not None and not self.is_first_everywhere(request)),
                f"{wish.ticket} is a barrier, but waits for a firm limit",
            )
        for front in self.fronts():
            wish = self.waiting[front]
            if wish.sender is not None and world.parked_at(wish):
                self.once_parked.add(front)
            if not world.fits(wish):
                continue
            own = self.head(wish.component)
            if wish.sender is None:
                if front is not own:
                    continue
            elif own is not None:
                wanted = {need.resource for need in world.needs(wish) if need.draw}
                if world.parked_at(self.waiting[own]) & wanted:
                    continue
            if self.is_behind_another_sender(front):
                continue
            drawn = world.drawn(wish)
            must(
                bool(drawn & closed),
                f"{wish.ticket} could go on, but waits",
            )
            first = self.is_first_everywhere(front)
            must(not first, f"the barrier {wish.ticket} could go on, but waits")

    def check_numbers(self) -> None:
        world, ledger = self.world, self.ledger
        wanted = world.numbers()
        found: dict[str, object] = {
            f"free {place}": self.pools[place].free for place in world.all_places()
        }
        found |= {"drift": ledger.drift, "highest": ledger.highest_committed}
        for name, account in ledger.accounts.items():
            stocks = account.stocks()
            found[f"{name} reserved"] = account.reserved, account.entries, account.live
            found[f"{name} granted"] = {s.resource: s.granted for s in stocks if s.granted}
            found[f"{name} in flight"] = {
                stock.resource: senders
                for stock in stocks
                if (
                    senders := {
                        sender.name: sender.held[stock]
                        for sender in account.by_sender.values()
                        if stock in sender.held
                    }
                )
            }
            for stock in stocks:
                component = world.components[name]
                must(stock.in_flight == component.sent(stock.resource), f"{name}: in_flight")
                by_sender = component.in_flight.get(stock.resource, {})
                must(stock.senders == len(by_sender), f"{name}: senders")
            must(
                all(each.held or each.line for each in account.by_sender.values()),
                f"{name}: a sender without anything is remembered",
            )
        for key, value in wanted.items():
            must(found[key] == value, f"{key} is {found[key]}, should be {value}")
        if self.config.share is None:
            for place, pool in self.pools.items():
                holding = [each for each in world.members(place) if each.held(place[1]) > 0]
                must(pool.consumers == len(holding), f"consumers of {place}: {pool.consumers}")
        must(ledger.waiters.count == len(self.waiting), "count")

    def complete_state(self) -> object:
        """Everything that a refused request must leave as it is."""
        ledger = self.ledger
        return (
            [
                (
                    place,
                    pool.free,
                    pool.consumers,
                    pool._closed,
                    pool.order.passed,
                    dict(pool.order.heads),
                    dict(pool.order.counting),
                    dict(pool.order.barriers),
                    pool._lowest_free,
                )
                for place, pool in self.pools.items()
            ],
            [
                (
                    account.name,
                    account.reserved,
                    account.entries,
                    account.live,
                    [
                        (
                            s.granted,
                            s.in_flight,
                            s.excess,
                            s.senders,
                            s.own,
                            dict(s.ranked),
                            dict(s.fronts or {}),
                        )
                        for s in account.stocks()
                        if _is_used(s)
                    ],
                    [(name, dict(s.held), list(s.line)) for name, s in account.by_sender.items()],
                    list(account.incoming),
                    account.admissions,
                    account.peak,
                )
                for account in ledger.accounts.values()
            ],
            ledger.moved,
            ledger.look_at,
            ledger.waiters.count,
        )

    def check_available(self, name: str, sender: str | None) -> None:
        """Check that what is said to be available is, and no more."""
        component = self.world.components[name]
        account = self.ledger.accounts[name]
        known = (
            None
            if sender is None
            else account.by_sender.get(sender) or self.ledger.sender(account, sender)
        )
        found = self.ledger.available(account, known)
        wish = Wish(0, "request", component, sender, {BYTES: found})
        if self.line_of(wish):
            must(found == 0, f"{found} are available behind others")
            return
        must(found == 0 or self.world.fits(wish), f"{found} are not available to {name}, {sender}")
        wish.amounts[BYTES] += 1
        behind = self.is_closed_for(wish) or self.is_behind_what_is_in_flight(wish)
        more = self.world.fits(wish) and not behind
        must(not more, f"more than {found} are available to {name}, {sender}")

    def drain(self) -> None:
        """Give everything back.

        Raises:
            Broken: something is held in the end.
        """
        self.apply(("observe", 0, tuple([(name, 0) for name in self.world.components])))
        while self.waiting:
            self.apply(("cancel", next(iter(self.waiting.values())).ticket))
        for grant in list(self.grants):
            self.apply(("back", grant, ()))
        for name, component in self.world.components.items():
            while component.entries:
                self.apply(("leave", name))
        for place, pool in self.pools.items():
            must(pool.free == self.world.capacity(place), f"{pool.free} of {place} in the end")
            order = pool.order
            left = (order.heads, order.growing, order.counting, order.bypassed, order.barriers)
            must(not any(left) and not pool._closed, f"waiters are remembered in {place}")
            must(not pool.consumers, f"{pool.consumers} consumers of {place} in the end")
        for account in self.ledger.accounts.values():
            must(not account.by_sender and not account.incoming, "senders are remembered")
            for stock in account.stocks():
                must(not stock.fronts and not stock.own and not stock.ranked, "waiters are left")


def _is_used(stock: Stock) -> bool:
    return bool(stock.granted or stock.in_flight or stock.own or stock.fronts)


def must(condition: object, otherwise: str) -> None:
    """Check one thing.

    Raises:
        Broken: it is not so.
    """
    if not condition:
        raise Broken(otherwise)


class _Generator:
    """Chooses what is done next."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.tickets = 0
        self.with_groups = random.random() < 0.3
        self.with_resources = random.random() < 0.7
        self.with_senders = random.random() < 0.85
        self.with_firm = random.random() < 0.6
        self.with_minimums = random.random() < 0.5
        self.with_transfers = random.random() < 0.5
        self.with_world = random.random() < 0.4
        self.with_grows = random.random() < 0.5
        self.smallness = random.choice((0.3, 0.6, 0.9))

    def config(self) -> Config:
        random = self.random
        limit = random.choice((12, 40, 100, 100, 400)) + random.randrange(5)
        others: tuple[tuple[str, int], ...] = ()
        if self.with_resources:
            others = (("fds", random.choice((4, 12, 30))),)
            if random.random() < 0.5:
                others += (("slices", random.choice((8, 50))),)
        groups: tuple[tuple[tuple[str, int], ...], ...] = ()
        if self.with_groups:
            groups = tuple(
                tuple(
                    (resource, random.choice((8, 20, 60, 200)))
                    for resource in random.choice((RESOURCES[:1], RESOURCES[:2], RESOURCES[1:]))
                )
                for _ in range(random.choice((1, 2)))
            )
        components = tuple(
            (
                name,
                random.randrange(limit // 3) if self.with_minimums and random.random() < 0.6 else 0,
                self.firm(limit),
                random.randrange(len(groups)) if groups and random.random() < 0.8 else None,
            )
            for name in "abcd"[: random.choice((1, 2, 3, 3, 4))]
        )
        components = tuple(
            (name, minimum, tuple([(r, n + minimum * (r == BYTES)) for r, n in firm]), group)
            for name, minimum, firm, group in components
        )
        return Config(
            limit,
            random.choice(SHARES),
            random.choice((0, 0, limit // 5)),
            random.choice((None, 0, limit // 4, limit // 4)),
            others,
            groups,
            components,
        )

    def firm(self, limit: int) -> tuple[tuple[str, int], ...]:
        if not self.with_firm:
            return ()
        random = self.random
        found = [(BYTES, random.randint(1, limit))] if random.random() < 0.6 else []
        if self.with_resources:
            found += [
                (resource, random.randint(1, 20))
                for resource in RESOURCES[1:]
                if random.random() < 0.4
            ]
        return tuple(found)

    def ticket(self) -> int:
        self.tickets += 1
        return self.tickets

    def operation(self, pair: Pair) -> Operation:
        random, world = self.random, pair.world
        name = random.choice(list(world.components))
        waiting = [wish.ticket for wish in pair.waiting.values()]
        if waiting and random.random() * 50 < len(waiting):
            return ("cancel", random.choice(waiting))
        idle = [t for t, grant in pair.grants.items() if not grant.busy]
        dice = random.random()
        if idle and dice < 0.4:
            grant = random.choice(idle)
            held = pair.grants[grant]
            if held.sender is not None and random.random() < 0.4:
                over = tuple(
                    [
                        (r, random.randint(0, n))
                        for r, n in held.amounts.items()
                        if r != BYTES and random.random() < 0.5
                    ]
                )
                return ("deliver", grant, over)
            if self.with_grows and random.random() < 0.25:
                what = random.choice(("grow", "grow", "grow_now"))
                return (what, self.ticket(), grant, self.amount(pair, name, held.sender, BYTES))
            if self.with_transfers and held.sender is None and random.random() < 0.4:
                others = [each for each in world.components if each != held.component.name]
                if others:
                    what = random.choice(("transfer", "transfer", "transfer_now"))
                    return (what, self.ticket(), grant, random.choice(others))
            if random.random() < 0.2:
                part = tuple([(r, random.randint(0, n)) for r, n in held.amounts.items()])
                return ("back", grant, part)
            return ("back", grant, ())
        if dice < 0.48 and self.with_minimums:
            inside = [each.name for each in world.components.values() if each.entries]
            if inside and random.random() < 0.5:
                return ("leave", random.choice(inside))
            return ("enter", self.ticket(), name)
        if dice < 0.53 and self.with_world:
            return self.world_operation(pair, name)
        if dice < 0.55:
            closed = [place for place in pair.pools if pair.first_barrier(place, pair.waiting)]
            if closed:
                return ("lift", random.choice(closed))
        sender = random.choice(SENDERS) if self.with_senders and random.random() < 0.6 else None
        amounts = tuple(
            (resource, self.amount(pair, name, sender, resource)) for resource in self.wanted(pair)
        )
        if random.random() < 0.2:
            return ("now", self.ticket(), name, sender, amounts)
        if sender is None and random.random() < 0.1 and amounts[0][0] == BYTES:
            up_to = amounts[0][1] + random.randrange(30)
            return ("ask", self.ticket(), name, sender, amounts, up_to)
        return ("ask", self.ticket(), name, sender, amounts)

    def wanted(self, pair: Pair) -> list[str]:
        random = self.random
        known = [BYTES] * (random.random() < 0.9)
        if self.with_resources or self.with_groups:
            known += [each for each in RESOURCES[1:] if random.random() < 0.5]
        return known or [BYTES]

    def amount(self, pair: Pair, name: str, sender: str | None, resource: str) -> int:
        random, world = self.random, pair.world
        component = world.components[name]
        most = world.most(component, resource, sender)
        if most is None:
            most = 20
        if random.random() < 0.02:
            return random.choice((0, most + 1))
        if random.random() < self.smallness:
            return random.randint(1, 1 + max(0, most // 6))
        return random.randint(min(1, most), max(1, most))

    def world_operation(self, pair: Pair, name: str) -> Operation:
        random, world = self.random, pair.world
        dice = random.random()
        if dice < 0.3:
            return ("resize", max(world.baseline + 1, world.limit + random.randint(-25, 25)))
        if dice < 0.5:
            minimum = random.choice((0, random.randrange(1 + world.limit // 3)))
            firm = tuple([(r, n + minimum * (r == BYTES)) for r, n in self.firm(world.limit)])
            return ("declare", name, minimum, firm)
        explained = world.baseline + world.committed()
        measured = max(
            0,
            random.choice(
                (explained, explained + random.randint(-10, 20), random.randrange(world.limit + 9))
            ),
        )
        live: tuple[tuple[str, int], ...] = ()
        if random.random() < 0.5:
            live = ((name, random.choice((0, 0, random.randrange(1 + world.limit // 2)))),)
        return ("observe", measured, live)


def replay(config: Config, operations: Iterable[Operation], make: MakeLedger = Watched) -> Pair:
    """Run operations, leaving out those that make no sense.

    Raises:
        Broken: the ledger did what it must not do.
    """
    pair = Pair(config, make)
    for operation in operations:
        if pair.is_meaningful(operation):
            pair.apply(operation)
    pair.drain()
    return pair


def episode(
    seed: int, steps: int, make: MakeLedger, seen: Counter[str]
) -> tuple[Config, list[Operation], Broken | None]:
    """Run one episode; give what was done, and what was wrong in the end, if anything."""
    generator = _Generator(Random(seed))
    config = generator.config()
    pair = Pair(config, make)
    done: list[Operation] = []
    try:
        while len(done) < steps:
            operation = generator.operation(pair)
            if not pair.is_meaningful(operation):
                continue
            done.append(operation)
            seen[f"{operation[0]} {pair.apply(operation)}"] += 1
            for step in pair.ledger.steps:
                seen["  admitted after waiting"] += step.request.arrival > 0
                seen["  admitted out of turn"] += not step.in_turn
                seen["  admitted as a barrier"] += step.was_barrier
                seen["  admitted beside a barrier"] += bool(step.barriers) and step.request.pooled
            name = generator.random.choice(list(pair.world.components))
            try:
                pair.check_available(name, generator.random.choice((None, *SENDERS)))
            except Broken as broken:
                done.append(("available", name))
                return config, done, broken
        pair.drain()
    except Broken as broken:
        return config, done, broken
    return config, done, None


def _breaks(config: Config, operations: list[Operation], make: MakeLedger) -> bool:
    try:
        replay(config, operations, make)
    except Broken:
        return True
    return False


def shrink(config: Config, operations: list[Operation], make: MakeLedger) -> list[Operation]:
    """Take out what is not needed to show it, then make numbers smaller."""
    while True:
        before = operations
        size = max(1, len(operations) // 2)
        while size:
            start = 0
            while start < len(operations):
                fewer = operations[:start] + operations[start + size :]
                if _breaks(config, fewer, make):
                    operations = fewer
                else:
                    start += size
            size //= 2
        for index, operation in enumerate(operations):
            for smaller in _smaller(operation):
                attempt = [*operations[:index], smaller, *operations[index + 1 :]]
                if _breaks(config, attempt, make):
                    operations = attempt
                    break
        if operations == before:
            return operations


def _smaller(operation: Operation) -> Iterable[Operation]:
    """The operation with less in it."""
    last = operation[-1]
    if operation[0] in ("ask", "now") and isinstance(last, tuple):
        amounts: tuple[tuple[str, int], ...] = last
        for place, (resource, amount) in enumerate(amounts):
            if len(amounts) > 1:
                yield (*operation[:-1], amounts[:place] + amounts[place + 1 :])
            for less in sorted({1, amount // 2, amount - 1} - {0, amount, -1}):
                changed = (*amounts[:place], (resource, less), *amounts[place + 1 :])
                yield (*operation[:-1], changed)


def fuzz(
    steps: int,
    seed: int,
    make: MakeLedger = Watched,
    *,
    length: int = 250,
    report: bool = False,
) -> str | None:
    """Run so many steps; say what was wrong first, or None."""
    seen: Counter[str] = Counter()
    started = time.perf_counter()
    for number in range(-(-steps // length)):
        config, done, broken = episode(seed * 1_000_003 + number, length, make, seen)
        if broken is not None:
            if done and done[-1][0] == "available":
                shortest = done[:-1]
            else:
                shortest = shrink(config, done, make)
                try:
                    replay(config, shortest, make)
                except Broken as last:
                    broken = last
            lines = ",\n    ".join(map(repr, shortest))
            return (
                f"seed {seed}, episode {number}: {broken}\n"
                f"replay(\n  {config},\n  [\n    {lines},\n  ],\n)"
            )
    if report:
        seconds = time.perf_counter() - started
        print(f"{steps} steps, seed {seed}: nothing wrong; {steps / seconds:,.0f} steps/s")
        for what, count in sorted(seen.items()):
            print(f"  {what:<30}{count:>10}")
    return None


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; give its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_resources", description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    found = fuzz(options.steps, options.seed, report=True)
    if found is not None:
        print(found, file=sys.stderr)
    return 0 if found is None else 1


if __name__ == "__main__":
    raise SystemExit(main())
