"""The decision core, by examples computed by hand, and what has been wrong with it.

`tests/test_model.py` drives it beside a second ledger. All sizes are bytes; unless a test says
otherwise there are 100 of them, and the share is a half.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import partial
from random import Random
from typing import Any

import pytest

from membound_async.exceptions import GrantTooLarge, InvalidLimit, QuotaExceeded
from membound_async.ledger import NO_LIMIT, Account, Ledger
from membound_async.rules import Polynomial, Rule
from membound_async.waiters import Kind, Request, State
from tests.calls import counted
from tests.fuzz_resources import Config, Pair
from tests.quota_cases import CASES, DESIGN, OURS, Case


class Bench(Ledger):
    """A ledger with short words for what examples do."""

    def __init__(self, limit: int = 100, **options: Any) -> None:
        super().__init__(limit, **options)

    def arrives(self, request: Request) -> None:
        """Nothing: whoever is let in has it at once."""

    def open(self, name: str, minimum: int = 0, firm: int = NO_LIMIT) -> Account:
        """An account that is entered."""
        account = self.account(name, minimum, firm)
        if not self.enter_again(account):
            self.entering(account, now=True)
        return account

    def open_all(self, names: str) -> list[Account]:
        return [self.open(name) for name in names]

    def entering(self, account: Account, *, now: bool = False) -> Request:
        return self._asked(Request(account, account.minimum, Kind.ENTER), now)

    def held(self, account: Account, nbytes: int, **options: Any) -> Request:
        """A grant that must be had at once."""
        return self._asked(Request(account, nbytes, **options), True)

    def waiting(self, account: Account, nbytes: int, **options: Any) -> Request:
        """A request that must have to wait."""
        return self._asked(Request(account, nbytes, **options), False)

    def growing(self, grant: Request, nbytes: int, *, now: bool = False) -> Request:
        """A grow that must have to wait, or must be had at once."""
        return self._asked(self.grow(grant, nbytes), now)

    def grow(self, grant: Request, nbytes: int) -> Request:
        return Request(
            grant.account,
            nbytes,
            Kind.GROW,
            held=grant.nbytes,
            alone=grant.alone,
            exclusive=grant.exclusive,
        )

    def _asked(self, request: Request, now: bool) -> Request:
        settled = self.request(request)
        assert settled == ([request] if now else [])
        assert request.state is (State.ADMITTED if now else State.WAITING)
        return request

    def back(self, grant: Request, nbytes: int | None = None) -> list[Request]:
        """Give a grant back, or a part of it."""
        nbytes = grant.nbytes if nbytes is None else nbytes
        grant.nbytes -= nbytes
        ends = grant.exclusive and grant.nbytes <= self.most(grant.account)
        grant.exclusive = grant.exclusive and not ends
        return list(self.give_back(grant.account, nbytes, exclusive=ends))

    def pass_by(self, account: Account, nbytes: int) -> None:
        """Let so much of the pool go past everybody who waits."""
        self.back(self.held(account, nbytes))

    def reading(self, measured: int, look_after: int = 0, **live: int) -> list[Request]:
        """A reading, and what components have allocated at it, by name."""
        return self.observe(
            measured,
            pressed=100 * measured > 95 * self.limit,
            look_after=look_after,
            live=[(self.accounts[name], nbytes) for name, nbytes in live.items()],
        )

    def refused(self, account: Account, nbytes: int, reason: str = "", **options: Any) -> None:
        """Ask for it now, in vain, and see that nothing has changed."""
        before = (self.free, account.granted, account.refusals, self.moved)
        with pytest.raises(QuotaExceeded, match=reason) as caught:
            self.request_nowait(Request(account, nbytes, **options))
        assert caught.value.wanted_bytes == nbytes
        assert caught.value.available_bytes == self.available(account)
        assert (self.free, account.granted, account.refusals - 1, self.moved) == before

    def live(self, account: Account, nbytes: int) -> list[Request]:
        """What a component has allocated, by a reading that shows nothing else new."""
        look_after = self.look_at - self.moved
        live = [(account, nbytes)]
        return self.observe(self.measured, pressed=False, look_after=look_after, live=live)

    def too_large(self, request: Request, most: int, reason: str) -> None:
        for ask in (self.request, self.request_nowait):
            before = (self.free, request.account.granted, self.waiters.count)
            with pytest.raises(GrantTooLarge, match=reason) as caught:
                ask(request)
            assert caught.value.most_bytes == most
            assert (self.free, request.account.granted, self.waiters.count) == before
            assert request.state is State.NEW

    def barriers(self) -> list[Request]:
        return [request for request in self.all_waiting() if request.barrier]


# --- the rule


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fast", [True, False])
def test_the_design_s_cases(case: Case, fast: bool):
    ledger = Ledger(case.limit_bytes, share=case.rule)
    for what, name, nbytes, is_admitted in case.operations:
        account = ledger.account(name)
        if what == "release":
            assert list(ledger.give_back(account, nbytes)) == []
        elif fast and not ledger.rule.depends_on_consumers:
            assert ledger.admit(account, nbytes) == is_admitted
        elif is_admitted:
            assert not (fast and ledger.admit(account, nbytes))  # it leaves that to the request
            assert ledger.request_nowait(Request(account, nbytes)) == []
        else:
            assert not (fast and ledger.admit(account, nbytes))
            with pytest.raises((QuotaExceeded, GrantTooLarge)):
                ledger.request_nowait(Request(account, nbytes))


@pytest.mark.skipif(not DESIGN.exists(), reason="the design is not here")
def test_our_copy_of_the_cases_is_the_design_s():
    assert OURS.read_bytes() == DESIGN.read_bytes()


@pytest.mark.parametrize(
    ("share", "held", "wanted", "threshold"),
    [
        ("1/2", 0, 10, 20),  # 2*10
        ("1/2", 7, 10, 27),  # 2*10 + 7
        ("1/3", 7, 10, 44),  # 3*10 + 2*7
        ("2/3", 7, 10, 19),  # (30 + 7) / 2 = 18.5
        ("1", 7, 10, 10),
    ],
)
def test_thresholds(share: str, held: int, wanted: int, threshold: int):
    ledger = Bench(1000, share=Fraction(share))
    account = ledger.open("a")
    ledger.held(account, held)
    # At the threshold it fits, one byte below it does not.
    ledger.account("b")
    for free, fits in ((threshold, True), (threshold - 1, False)):
        ledger.resize(held + free)
        assert ledger.free == free
        assert ledger.missing(Request(account, wanted)) == threshold - free
        assert (ledger.available(account) >= wanted) == fits


@pytest.mark.parametrize("share", [Fraction(0), Fraction(-1, 2), Fraction(3, 2)])
def test_a_share_that_makes_no_sense(share: Fraction):
    with pytest.raises(InvalidLimit, match=f"share={share}"):
        Ledger(100, share=share)


def test_the_minimum_is_used_first_and_needs_nothing():
    ledger = Bench()
    account = ledger.open("a", minimum=20)
    assert (ledger.free, ledger.committed, account.excess) == (80, 20, -20)
    first = ledger.held(account, 15)
    assert (ledger.free, account.excess, first.pooled) == (80, -5, False)
    assert ledger.missing(Request(account, 10)) == 10 - 80
    second = ledger.held(account, 10)
    assert (ledger.free, account.excess, second.pooled) == (75, 5, True)
    ledger.back(first)
    assert (ledger.free, account.excess) == (80, -10)


@pytest.mark.parametrize("fast", [True, False])
def test_the_fast_path_charges_as_the_other_does(fast: bool):
    ledger = Bench(1000)
    account = ledger.open("a", minimum=20)
    for nbytes in (5, 0, 20, 40, 4):
        if fast:
            assert ledger.admit(account, nbytes)
        else:
            ledger.request_nowait(Request(account, nbytes))
    assert (account.granted, account.excess, account.peak, account.admissions) == (69, 49, 69, 5)
    assert (ledger.free, ledger.moved, ledger.highest_committed) == (931, 69, 69)


def test_where_the_fast_path_asks_for_the_slow_one():
    ledger = Bench()
    a, b, c = ledger.open("a", firm=30), ledger.open("b", minimum=10), ledger.open("c")
    assert not ledger.admit(a, 31)  # its firm limit
    ledger.reading(0, look_after=20)
    assert ledger.admit(a, 20)
    assert not ledger.admit(a, 1)  # memory must be looked at again
    ledger.reading(0, look_after=1000)
    assert not ledger.admit(c, 36)  # 36 of 70 free
    waiting = ledger.waiting(c, 36)
    before = (ledger.free, ledger.moved, a.granted, b.granted, a.admissions)
    assert not ledger.admit(a, 1)  # somebody is ahead
    assert not ledger.admit(b, 0)
    assert (ledger.free, ledger.moved, a.granted, b.granted, a.admissions) == before
    ledger.cancel(waiting)
    assert ledger.admit(a, 1)


class Hasty:
    """Two ledgers that are asked for the same; one by its fast paths first, where there are any."""

    def __init__(self, random: Random) -> None:
        self.random = random
        share = random.choice([Fraction(1, 2), Fraction(1, 3), Fraction(3, 4), Fraction(1)])
        self.fast, self.slow = ledgers = [Bench(1000, share=share) for _ in range(2)]
        for ledger in ledgers:
            for name, minimum, firm in (("a", 0, NO_LIMIT), ("b", 90, 400), ("c", 150, NO_LIMIT)):
                ledger.account(name, minimum, firm)
        self.out: list[tuple[str, str | None, int]] = []
        self.hits = 0

    def step(self) -> None:
        """Ask for something, give something back, or let the world change; compare."""
        random, name = self.random, self.random.choice("abc")
        what = random.choices(("ask", "back", "deliver", "world"), (6, 2, 3, 1))[0]
        if what == "ask":
            sender = random.choice([None, None, "x", "y"])
            self.ask(name, random.randrange(random.choice([12, 60, 500])), sender)
        elif what == "world":
            self.change(name)
        elif self.out:
            name, sender, nbytes = taken = random.choice(self.out)
            self.out.remove(taken)
            if what == "deliver" and sender is not None:
                self.deliver(name, sender, nbytes)
                self.out.append((name, None, nbytes))
            else:
                for ledger in (self.fast, self.slow):
                    account = ledger.accounts[name]
                    of = None if sender is None else ledger.sender(account, sender)
                    ledger.give_back(account, nbytes, sender=of)
        assert self.numbers(self.fast) == self.numbers(self.slow)

    def ask(self, name: str, nbytes: int, sender: str | None) -> None:
        before, account = self.numbers(self.fast), self.fast.accounts[name]
        if self.random.randrange(3) == 0:
            of = None if sender is None else self.fast.sender(account, sender)
            done = self.fast.request_at_once(Request(account, nbytes, sender=of)) is not None
        elif sender is None:
            done = self.fast.admit(account, nbytes)
        else:
            done = self.fast.admit_sent(account, sender, nbytes)
        self.hits += done
        assert done or self.numbers(self.fast) == before
        admitted = done or self.now(self.fast, name, nbytes, sender)
        assert admitted == self.now(self.slow, name, nbytes, sender)
        if admitted:
            self.out.append((name, sender, nbytes))

    @staticmethod
    def now(ledger: Bench, name: str, nbytes: int, sender: str | None) -> bool:
        account = ledger.accounts[name]
        of = None if sender is None else ledger.sender(account, sender)
        try:
            return not ledger.request_nowait(Request(account, nbytes, sender=of))
        except (GrantTooLarge, QuotaExceeded):
            return False

    def deliver(self, name: str, sender: str, nbytes: int) -> None:
        account = self.slow.accounts[name]
        self.slow.deliver(account, nbytes, {}, self.slow.sender(account, sender))
        account = self.fast.accounts[name]
        if not self.fast.deliver_at_once(account, sender, nbytes):
            self.fast.deliver(account, nbytes, {}, self.fast.sender(account, sender))

    def change(self, name: str) -> None:
        kind, number = self.random.randrange(4), self.random.randrange(1200)
        for ledger in (self.fast, self.slow):
            account = ledger.accounts[name]
            if kind == 0 and account.entries:
                ledger.leave(account)
            elif kind == 0 and not ledger.enter_again(account):
                with contextlib.suppress(GrantTooLarge, QuotaExceeded):
                    ledger.request_nowait(Request(account, account.minimum, Kind.ENTER))
            elif kind == 1:
                ledger.resize(500 + number)
                self.read(ledger, ledger.measured)
            else:
                self.read(ledger, number, **{name: number % 300})

    @staticmethod
    def read(ledger: Bench, measured: int, **live: int) -> None:
        """At the limit each request is to look at memory first, as the limiter has it."""
        ledger.reading(measured, look_after=max(-1, ledger.limit - measured), **live)

    @staticmethod
    def numbers(ledger: Bench) -> list[Any]:
        """Everything that is charged, and what follows from it; not how often it was refused."""
        found: list[Any] = [ledger.free, ledger.drift, ledger.highest_committed, ledger.moved]
        for account in ledger.accounts.values():
            found += [account.granted, account.in_flight, account.excess, account.reserved]
            found += [account.peak, account.senders, account.admissions]
            found += [{name: [*by.held.values()] for name, by in account.by_sender.items()}]
        return found


def test_a_fast_path_gives_what_the_other_would_and_nothing_else():
    hits = 0
    for seed in range(60):
        both = Hasty(Random(seed))
        for _ in range(100):
            both.step()
        hits += both.hits
    assert hits > 600


def test_a_larger_limit_lets_in_who_waited_for_others_of_the_component_to_be_received():
    ledger = Bench()
    account = ledger.open("a")
    ledger.held(account, 20, sender=ledger.sender(account, "x"))
    request = ledger.waiting(account, 20, sender=ledger.sender(account, "y"))
    assert ledger.waits_for(request)[0] == "firm limit"  # 4*20 + 20 of 100, even with all back
    assert ledger.resize(119) == []
    assert ledger.resize(120) == [request]


def test_a_barrier_behind_a_grow_lets_others_past_once_its_firm_limit_keeps_it_out():
    ledger = Bench(others={"fds": 20})
    a, b, c = ledger.open_all("abc")
    ours = ledger.held(a, 10)
    ledger.held(b, 45, also={"fds": 10})
    ledger.held(c, 15)
    grow = ledger.growing(ours, 15)  # T = 40 of 30
    barrier = ledger.waiting(a, 20, also={"fds": 8})
    for _ in range(21):
        ledger.held(c, 0, also={"fds": 1})
        ledger.give_back(c, 0, also={"fds": 1})
    assert ledger.barriers() == [barrier]
    other = ledger.waiting(c, 0, also={"fds": 1})
    assert ledger.declare(a, 0, 25) == [other]
    assert ledger.barriers() == []
    assert ledger.give_back(c, 10) == [grow]


def test_giving_back_nothing_leaves_another_sender_of_that_name_alone():
    ledger = Bench()
    account = ledger.open("a")
    nothing = ledger.held(account, 0, sender=ledger.sender(account, "x"))
    ledger.held(account, 20, sender=ledger.sender(account, "x"))
    waiting = ledger.waiting(account, 20, sender=ledger.sender(account, "x"))
    assert ledger.undo(nothing) == []
    assert ledger.all_waiting() == [waiting]
    assert ledger.give_back(account, 20, sender=ledger.sender(account, "x")) == [waiting]


def test_what_is_transferred_is_in_use_while_it_is_on_its_way():
    ledger = Ledger(100, share=Fraction(1))
    a, b = ledger.account("a"), ledger.account("b", firm_limit=41)
    for account, nbytes in ((a, 40), (b, 2)):
        assert ledger.admit(account, nbytes)
    transfer = Request(b, 40, source=a)
    assert ledger.request(transfer) == []
    assert ledger.give_back(b, 2) == [transfer]
    assert (ledger.arriving, ledger.on_its_way) == (0, {})
    ledger.observe(96, pressed=True, look_after=0)
    assert ledger.drift == 56
    grant = Request(a, 4)
    ledger.observe(40, pressed=False, look_after=0)
    assert ledger.request(grant) == [grant]
    assert (ledger.arriving, [*ledger.on_its_way]) == (4, [grant])
    ledger.observe(96, pressed=True, look_after=0)
    assert ledger.drift == 96 + 4 - 44


def test_a_reserve_is_had_past_everybody():
    ledger = Bench(bypass_limit=0)
    a, b, c = ledger.open("a"), ledger.open("b", minimum=10), ledger.open("c")
    ledger.held(a, 30)
    barrier = ledger.waiting(a, 20)
    ledger.pass_by(c, 1)
    assert ledger.barriers() == [barrier]
    ledger.live(c, 500)
    assert ledger.free == -440
    ledger.held(b, 4)
    assert ledger.request_nowait(Request(b, 3)) == []
    assert (ledger.available(b), ledger.available(c), ledger.available(a)) == (3, 0, 0)
    ledger.held(b, 3)
    ledger.refused(b, 1, "waited long")


def test_what_each_of_n_has_in_the_end():
    for count in (1, 2, 3, 9):
        ledger = Bench(10_000)
        accounts = [ledger.open(f"c{number}") for number in range(count)]
        for _ in range(100):
            for account in accounts:
                ledger.give_back(account, account.granted)
                assert ledger.admit(account, ledger.available(account))
        # Each settles at 1/(n + 1) of the pool, rounded down a little.
        assert all(0 <= 10_000 // (count + 1) - a.granted <= count for a in accounts)


def test_a_sole_component_has_its_minimum_and_half_of_the_rest():
    ledger = Bench()
    account = ledger.open("a", minimum=20)
    assert (ledger.available(account), ledger.most(account)) == (60, 60)
    ledger.held(account, 60)
    assert (ledger.free, ledger.available(account)) == (40, 0)


def test_beyond_what_a_float_can_tell():
    limit = (1 << 62) + 1
    ledger = Bench(limit, share=Fraction(2, 3))
    account = ledger.open("a")
    assert ledger.most(account) == 2 * limit // 3
    assert not ledger.admit(account, 2 * limit // 3 + 1)
    assert ledger.admit(account, 2 * limit // 3)


def test_live_bytes_count_as_held():
    ledger = Bench()
    account = ledger.open("a", minimum=20)
    ledger.live(account, 30)
    assert (ledger.free, account.excess, ledger.committed) == (70, 10, 30)
    assert ledger.missing(Request(account, 5)) == 20 - 70
    ledger.held(account, 5)  # 30 are in use all the same
    assert (ledger.free, account.granted) == (70, 5)
    ledger.live(account, 0)
    assert (ledger.free, account.excess) == (80, -15)


def test_of_a_reserve_in_use_without_grants_the_fast_path_takes_nothing():
    # Regression: it took what was left of the reserve for bytes given back.
    ledger = Bench()
    account = ledger.open("a", minimum=20)
    ledger.live(account, 15)
    assert ledger.admit(account, 10)  # 5 of the reserve and 5 of the pool, by the rule
    assert (account.excess, ledger.free, ledger.committed) == (-5, 80, 20)


def test_peaks_and_counts():
    ledger = Bench()
    account = ledger.open("a")
    first = ledger.held(account, 30)
    ledger.held(account, 10)
    ledger.back(first)
    ledger.held(account, 20)
    assert (account.granted, account.peak, account.admissions) == (30, 40, 3)
    assert ledger.moved == 90


def test_the_same_name_is_the_same_account():
    ledger = Bench()
    account = ledger.account("a", 5, 10)
    assert ledger.account("a", 6, 7) is account
    assert (account.minimum, account.firm_limit) == (5, 10)


# --- order


def test_fifo_inside_a_component():
    ledger = Bench()
    account = ledger.open("a")
    held = ledger.held(account, 50)
    first, second = ledger.waiting(account, 40), ledger.waiting(account, 1)
    assert ledger.back(held) == [first, second]


def test_the_smallest_threshold_is_first_and_ties_go_by_arrival():
    ledger = Bench()
    a, b, c, d = ledger.open_all("abcd")
    held = ledger.held(a, 50)
    late = ledger.waiting(b, 30)  # T = 60
    early = ledger.waiting(c, 26)  # T = 52
    tie = ledger.waiting(d, 30)  # T = 60
    assert ledger.back(held) == [early, late]  # R = 100, 74, 44
    assert tie.state is State.WAITING


def test_a_grow_goes_before_requests():
    ledger = Bench()
    a, b = ledger.open_all("ab")
    ours, theirs = ledger.held(a, 10), ledger.held(b, 40)
    request = ledger.waiting(a, 25)
    grow = ledger.growing(ours, 21)
    assert ledger.back(theirs) == [grow]
    assert request.state is State.WAITING


def test_who_needs_nothing_goes_before_every_threshold():
    ledger = Bench()
    a, b, c = ledger.account("a", 20), ledger.account("b", 21), ledger.open("c", minimum=90)
    first, second = ledger.entering(a), ledger.waiting(a, 20)
    third = ledger.entering(b)
    late = ledger.entering(a)
    assert ledger.leave(c) == [first, second, late, third]


def test_cancelling_lets_those_behind_in():
    ledger = Bench()
    account = ledger.open("a")
    ledger.held(account, 40)  # R = 60, T = 2c + 40
    first, second = ledger.waiting(account, 11), ledger.waiting(account, 10)
    third = ledger.waiting(account, 7)
    assert ledger.cancel(third) == []
    assert third.state is State.CANCELLED
    assert ledger.cancel(first) == [second]


# --- refusals


def test_what_could_never_be():
    ledger = Bench(baseline=10)
    a, b = ledger.open("a", minimum=20, firm=70), ledger.open("b", firm=30)
    ledger.too_large(Request(a, 56), 55, "a share of 1/2 of limit less baseline")
    ledger.too_large(Request(b, 31), 30, "its firm limit")
    ledger.too_large(Request(b, 31, alone=True), 30, "its firm limit")
    ledger.too_large(Request(a, 71, alone=True), 70, "its firm limit")
    large = ledger.open("large", minimum=5)
    ledger.too_large(Request(large, 71, alone=True), 70, "the others' minimums")
    assert (a.refusals, b.refusals, large.refusals) == (4, 4, 2)
    grant = ledger.held(a, 30)
    ledger.too_large(ledger.grow(grant, 26), 55, "a share")
    assert ledger.growing(grant, 25, now=True).state is State.ADMITTED
    ledger.too_large(Request(ledger.open("none", firm=0), 1), 0, "its firm limit")


def test_what_could_never_be_had_alone():
    ledger = Bench(share=Fraction(1), others={"fds": 10})
    account = ledger.open("a")
    ledger.too_large(Request(account, 101, alone=True), 100, "a share of 1 of limit")
    ledger = Bench(others={"fds": 10})
    request = Request(ledger.open("a"), 60, alone=True, also={"fds": 9})
    ledger.too_large(request, 5, "a share of 1/2 of 10 fds")


def test_below_its_minimum_the_minimum_can_be_had():
    ledger = Bench()
    account = ledger.open("a", minimum=60)
    ledger.resize(50)
    assert ledger.most(account) == 60
    ledger.held(account, 60)
    assert (ledger.free, ledger.available(account)) == (-10, 0)


def test_alone_has_at_least_what_the_rule_gives():
    ledger = Bench()
    a, _ = ledger.open("a"), ledger.open("b", minimum=70)
    assert (ledger.most(a), ledger.most_alone(a)) == (50, 30)
    ledger.too_large(Request(a, 51, alone=True), 50, "a share of 1/2")
    ledger.waiting(a, 50, alone=True)
    ledger.resize(60)
    assert (ledger.most(a), ledger.most_alone(a)) == (30, 0)


def test_why_not_now():
    ledger = Bench(bypass_limit=10)
    a, b, c = ledger.open("a", firm=40), ledger.open("b", minimum=10), ledger.open("c")
    ours = ledger.held(a, 30)
    ledger.refused(a, 11, "its firm limit")
    ledger.refused(b, 41, "its share of what nobody else holds .60 bytes are free.")
    assert ledger.available(b) == 40
    ledger.reading(100)  # drift 60
    ledger.reading(0)
    ledger.measured = 100
    ledger.refused(b, 11, "at the limit")
    assert ledger.available(b) == 10
    ledger.measured = 99
    assert ledger.available(b) == 40
    ledger.waiting(a, 11)
    ledger.refused(a, 1, "others of the component wait already")
    ledger.refused(a, 0, "others of the component wait already")
    assert ledger.available(a) == 0
    ledger.held(c, 25)
    waiting = ledger.waiting(c, 10)  # T = 45
    ledger.held(b, 10 + 11)
    assert ledger.barriers() == [waiting]
    ledger.refused(b, 1, "waited long")
    ledger.request_nowait(Request(b, 0))
    del ours


def test_why_a_sender_s_is_not_given_now():
    ledger = Bench()
    account = ledger.open("a", firm=40)
    ledger.held(account, 30)
    sender = ledger.sender(account, "x")
    reason = "the sender's part of its firm limit"
    with pytest.raises(QuotaExceeded, match=reason) as caught:
        ledger.request_nowait(Request(account, 6, sender=sender))
    assert (caught.value.available_bytes, ledger.available(account, sender)) == (5, 5)


# --- firm limits


def test_over_its_firm_limit_it_is_parked_and_others_pass():
    ledger = Bench(bypass_limit=10)
    a, b = ledger.open("a", firm=10), ledger.open("b")
    held = ledger.held(a, 6)
    parked, behind = ledger.waiting(a, 5), ledger.waiting(a, 1)
    ledger.held(b, 40)
    assert ledger.barriers() == []  # it counts nothing
    assert ledger.back(held, 1) == [parked]
    assert ledger.back(held) == [behind]


def test_a_barrier_over_its_firm_limit_is_none_until_there_is_room():
    ledger = Bench(bypass_limit=10)
    a, b, c, d = ledger.open("a", firm=30), *ledger.open_all("bcd")
    ours = ledger.held(a, 20)
    ledger.held(b, 40)
    theirs = ledger.held(c, 10)  # R = 30
    grow = ledger.growing(ours, 6)  # T = 32
    request = ledger.waiting(a, 8)  # T = 36
    ledger.pass_by(d, 11)
    assert ledger.barriers() == [grow, request]
    assert ledger.back(theirs) == [grow]  # g = 26, R = 34
    assert ledger.barriers() == []  # 26 + 8 > 30
    ledger.held(d, 5)
    assert ledger.back(ours, 4) == []  # g = 22, R = 33, T = 38
    assert (ledger.barriers(), ledger.waiters.bypassed[request]) == ([request], 11)


def test_behind_a_grow_that_waits_for_the_firm_limit_nobody_becomes_a_barrier():
    ledger = Bench(bypass_limit=10)
    a, b = ledger.open("a", firm=10), ledger.open("b")
    other, ours = ledger.held(a, 4), ledger.held(a, 4)
    grow, request = ledger.growing(ours, 3), ledger.waiting(a, 3)
    ledger.pass_by(b, 40)
    assert ledger.barriers() == []
    assert not any(ledger.waiters.bypassed.values())
    assert ledger.back(other, 2) == [grow]
    assert ledger.back(other, 2) == [request]


def test_a_barrier_stays_one_when_a_grow_comes_that_waits_for_the_firm_limit():
    ledger = Bench(bypass_limit=10)
    a, b = ledger.open("a", firm=40), ledger.open("b")
    ours, _ = ledger.held(a, 15), ledger.held(a, 5)
    theirs = ledger.held(b, 30)  # R = 50
    barrier = ledger.waiting(a, 18)  # T = 56
    ledger.pass_by(b, 5)
    ledger.pass_by(b, 6)
    grow = ledger.growing(ours, 24)
    assert ledger.barriers() == [barrier]
    assert ledger.back(theirs, 6) == [barrier]
    assert grow.state is State.WAITING


# --- barriers


def barrier_at_work() -> tuple[Bench, Request, Request, Request]:
    """A holds 30, b waits for 40 of the pool (T = 80), and c has passed it by 11 of 10."""
    ledger = Bench(bypass_limit=10)
    a, b, c = ledger.open("a"), ledger.open("b", minimum=5), ledger.open("c", minimum=5)
    held = ledger.held(a, 30)  # R = 60
    barrier = ledger.waiting(b, 45)
    passed = ledger.held(c, 5 + 11)  # R = 49
    assert ledger.barriers() == [barrier]
    return ledger, held, barrier, passed


def test_within_the_bypass_limit_others_pass():
    ledger = Bench(bypass_limit=10)
    a, b = ledger.open_all("ab")
    ledger.held(a, 30)
    waiting = ledger.waiting(b, 40)
    ledger.held(a, 10)
    assert ledger.barriers() == []
    ledger.held(a, 1)
    assert ledger.barriers() == [waiting]


def test_nothing_of_the_pool_passes_a_barrier():
    ledger, held, barrier, passed = barrier_at_work()
    ledger.refused(held.account, 1, "waited long")
    late = ledger.waiting(held.account, 1)
    assert ledger.back(held) == []  # R = 79 < 80
    assert ledger.back(passed, 1) == [barrier, late]
    assert barrier.pooled
    assert not barrier.out_of_turn


def test_a_barrier_keeps_its_component_s_reserve():
    ledger, _, barrier, passed = barrier_at_work()
    ledger.back(passed, 14)
    ledger.waiting(barrier.account, 1)
    ledger.refused(barrier.account, 1, "wait already")
    assert ledger.available(passed.account) == 3
    ledger.held(passed.account, 3)


def test_lifted_it_counts_from_nothing():
    ledger, held, barrier, passed = barrier_at_work()
    late = ledger.waiting(held.account, 2)
    assert ledger.lift(barrier) == [late]
    ledger.held(passed.account, 8)
    assert ledger.barriers() == []
    ledger.held(passed.account, 1)
    assert ledger.barriers() == [barrier]


def test_barriers_go_by_arrival():
    ledger = Bench(bypass_limit=10)
    a, b, c, d = ledger.open_all("abcd")
    held = ledger.held(c, 40)  # R = 60
    first, second = ledger.waiting(a, 40), ledger.waiting(b, 31)  # T = 80 and 62
    ledger.held(c, 10)
    small = ledger.held(d, 1)  # R = 49
    assert ledger.barriers() == [first, second]
    assert ledger.waiters.first_barrier() is first
    assert ledger.back(held, 20) == []  # R = 69
    ledger.back(small)
    assert ledger.back(held, 10) == [first]  # R = 80


def test_the_bypass_limit_is_the_limit_and_follows_it():
    ledger = Bench(1000)
    a, b = ledger.open_all("ab")
    assert ledger.bypass_limit == 1000
    ledger.held(a, 300)
    waiting = ledger.waiting(b, 400)
    for _ in range(10):
        ledger.pass_by(a, 100)
    assert ledger.barriers() == []
    ledger.resize(999)
    assert ledger.barriers() == [waiting]
    assert Ledger(1000, bypass_limit=0).bypass_limit == 0


def test_the_fronts_of_both_lines_count():
    ledger = Bench(bypass_limit=10)
    a, b = ledger.open_all("ab")
    ours = ledger.held(a, 10)
    ledger.held(b, 20)  # R = 70
    request = ledger.waiting(a, 40)
    grow = ledger.growing(ours, 35)  # T = 80
    ledger.held(b, 11)
    assert ledger.barriers() == [request, grow]
    assert a.queue is not None
    assert a.queue.head() is request


def test_when_the_last_barrier_is_cancelled_the_pool_is_open():
    # Regression: it stayed closed if nobody else waited.
    ledger, held, barrier, _ = barrier_at_work()
    assert ledger.cancel(barrier) == []
    assert ledger.available(held.account) == 9  # (49 - 30) // 2
    ledger.request_nowait(Request(held.account, 9))
    assert ledger.admit(ledger.open("d"), 5)


def test_when_the_last_barrier_becomes_impossible_the_pool_is_open():
    # Regression: likewise.
    ledger, held, barrier, _ = barrier_at_work()
    assert ledger.declare(barrier.account, 5, 40) == [barrier]
    assert ledger.available(held.account) == 9


def test_a_barrier_that_an_entry_makes_impossible_does_not_keep_the_pool_closed():
    # Regression: the pool stayed closed, for nobody.
    ledger = Bench(bypass_limit=0)
    a, b, c = ledger.account("a", 20), *ledger.open_all("bc")
    ledger.held(c, 1)
    alone = ledger.waiting(b, 90, alone=True)
    entry = Request(a, 20, Kind.ENTER)
    assert ledger.request(entry) == [entry, alone]
    assert (alone.state, ledger.barriers()) == (State.IMPOSSIBLE, [])
    assert ledger.available(c) == 39  # (79 - 1) // 2
    ledger.request_nowait(Request(c, 39))


def behind_a_grow(from_reserve: bool) -> tuple[Bench, Account, Request, Request]:
    """A request that would fit, behind a grow that does not; b may have 11 of the pool."""
    ledger = Bench(bypass_limit=10)
    a, b = ledger.open("a", minimum=10 if from_reserve else 0), ledger.open("b")
    c, d = ledger.open_all("cd")
    ours = ledger.held(a, 10)
    ledger.held(b, 30)
    if from_reserve:
        ledger.live(d, 55)  # R = 5
        request, grow = ledger.waiting(a, 5), ledger.growing(ours, 40)
        ledger.live(d, 0)
        ledger.back(ours, 5)  # R = 60; the grow draws 35, T = 70
    else:
        others = ledger.held(c, 24), ledger.held(d, 15)  # R = 21
        request, grow = ledger.waiting(a, 10), ledger.growing(ours, 30)  # T = 30 and 70
        for other in others:
            ledger.back(other)  # R = 60
    return ledger, b, request, grow


@pytest.mark.parametrize("from_reserve", [True, False])
@pytest.mark.parametrize("way", ["request", "nowait", "force"])
def test_who_can_come_in_as_a_barrier_comes_in_at_once(way: str, from_reserve: bool):
    # Regression: a barrier goes before the grow that it stood behind, and may fit where that
    # does not: from the reserve, or by its threshold. Nobody looked.
    ledger, b, request, grow = behind_a_grow(from_reserve)
    assert not ledger.admit(b, 11)  # it cannot tell who has come in by that
    assert ledger.barriers() == []
    new = Request(b, 11)
    match way:
        case "request":
            assert ledger.request(new) == [new, request]
        case "nowait":
            assert ledger.request_nowait(new) == [request]
        case "force":
            assert ledger.force(new) == [request]
    assert (request.state, grow.state) == (State.ADMITTED, State.WAITING)
    assert ledger.barriers() == [grow]


# --- entering


def test_entering_waits_for_the_minimum():
    ledger = Bench()
    a, b = ledger.open("a", minimum=70), ledger.account("b", 40)
    assert not ledger.enter_again(b)
    entry = ledger.entering(b)
    assert ledger.enter_again(a)
    assert ledger.leave(a) == []
    assert ledger.leave(a) == [entry]
    assert (ledger.free, b.entries, b.reserved, entry.pooled) == (60, 1, 40, True)
    assert ledger.leave(a) == []
    assert a.entries == 0
    # An entry is no grant.
    assert (b.admissions, b.granted, b.peak, ledger.moved) == (0, 0, 0, 0)


def test_entering_what_has_no_minimum_or_is_entered_waits_for_nobody():
    ledger = Bench()
    a, b = ledger.open("a", minimum=40, firm=50), ledger.account("b")
    ledger.held(a, 50)
    ledger.waiting(a, 1)
    assert ledger.enter_again(a)
    assert ledger.enter_again(b)
    assert (a.entries, b.entries, a.reserved, b.reserved) == (2, 1, 40, 0)
    assert ledger.leave(b) == []


def test_entering_needs_only_what_is_not_held_yet():
    ledger = Bench()
    a = ledger.account("a", 40)
    ledger.held(a, 30)
    ledger.open("b", minimum=60)  # R = 10
    entry = ledger.entering(a, now=True)
    assert (ledger.free, entry.pooled, a.excess) == (0, True, -10)
    b = ledger.account("c", 5)
    ledger.live(b, 7)
    assert not ledger.entering(b, now=True).pooled


def test_an_entry_is_asked_for_in_order_and_counts():
    ledger = Bench(bypass_limit=39)
    a, b = ledger.open("a"), ledger.account("b", 40)
    ledger.held(a, 30)
    waiting = ledger.waiting(a, 21)
    ledger.entering(b, now=True)
    assert ledger.barriers() == [waiting]


def test_two_that_wait_to_enter_are_in_with_one_reserve():
    ledger = Bench()
    a, b = ledger.open("a", minimum=70), ledger.account("b", 40)
    entries = [ledger.entering(b) for _ in range(2)]
    assert ledger.leave(a) == entries
    assert (b.entries, b.reserved, ledger.free) == (2, 40, 60)
    assert (entries[0].pooled, entries[1].pooled) == (True, False)


def test_the_second_of_two_who_wait_to_enter_needs_nothing_more():
    ledger = Bench()
    a, b = ledger.account("a", minimum=100), ledger.open("b")
    held = ledger.held(b, 50)
    entries = [ledger.entering(a), ledger.entering(a)]
    assert ledger.back(held) == entries
    assert (ledger.free, a.entries) == (0, 2)


def test_entering_draws_nothing_though_more_is_out_than_there_is():
    ledger = Bench()
    a, b = ledger.open("a", minimum=10), ledger.account("b", minimum=10)
    ledger.held(b, 30)  # more than the minimum already
    ledger.resize(20)
    for account in (a, b):
        ledger.entering(account, now=True)
    assert (ledger.free, a.entries, b.entries) == (-20, 2, 1)


def test_a_minimum_must_fit_into_the_smallest_pool():
    ledger = Bench()
    account = ledger.account("a", minimum=41)
    ledger.join(account, ledger.group({"bytes": 40}))
    ledger.too_large(Request(account, 41, Kind.ENTER), 40, "limit less baseline")


def test_an_entry_that_can_never_be():
    ledger = Bench(baseline=10)
    account = ledger.account("a", 91)
    ledger.too_large(Request(account, 91, Kind.ENTER), 90, "limit less baseline")
    assert ledger.resize(101) == []
    ledger.entering(account, now=True)
    ledger.resize(50)
    # Who is in may come in again: it takes nothing.
    assert ledger.refusal(Request(account, 91, Kind.ENTER)) is None


def test_left_with_grants_out_they_stay_charged():
    ledger = Bench()
    account = ledger.open("a", minimum=40)
    grant = ledger.held(account, 30)
    ledger.leave(account)
    assert (ledger.free, account.reserved, account.excess) == (70, 0, 30)
    ledger.back(grant)
    assert ledger.free == 100


# --- bounds that change


def test_leaving_makes_impossible_what_needs_the_minimum():
    ledger = Bench()
    account = ledger.open("a", minimum=20)
    ledger.held(account, 60)
    large, small = ledger.waiting(account, 51), ledger.waiting(account, 50)
    assert ledger.leave(account) == [large]  # 20 + 40, but 50
    assert (large.state, account.refusals) == (State.IMPOSSIBLE, 1)
    assert ledger.resize(99) == [small]
    assert (small.state, ledger.waiters.count) == (State.IMPOSSIBLE, 0)


def test_new_bounds_count_for_those_who_wait():
    ledger = Bench()
    account = ledger.open("a", minimum=10, firm=20)
    ledger.held(account, 15)
    parked = ledger.waiting(account, 10)
    assert ledger.declare(account, 30, 40) == [parked]
    assert account.reserved == 10
    parked = ledger.waiting(account, 20)
    assert ledger.declare(account, 30, 19) == [parked]
    ledger.leave(account)
    ledger.entering(account, now=True)
    assert (account.reserved, ledger.free) == (30, 70)


def test_a_minimum_declared_while_it_is_entered_counts_once_all_have_left():
    # Regression: an entry that had waited took the new one although it was entered.
    ledger = Bench()
    account = ledger.open("a", minimum=10, firm=10)
    ledger.held(account, 10)
    ledger.waiting(account, 1)
    late = Request(account, 10, Kind.ENTER)
    assert ledger.request(late) == []
    ledger.declare(account, 20, 11)
    assert late.state is State.ADMITTED
    assert (account.entries, account.reserved) == (2, 10)


def test_resized_below_what_is_out_and_back():
    ledger = Bench()
    a, b = ledger.open_all("ab")
    ledger.held(a, 40)
    assert ledger.resize(30) == []
    assert (ledger.free, ledger.limit, ledger.committed) == (-10, 30, 40)
    waiting = ledger.waiting(b, 15)
    assert ledger.resize(69) == []
    assert ledger.resize(70) == [waiting]


# --- ranges


def test_up_to_takes_what_the_rule_allows():
    ledger = Bench()
    a, b = ledger.open("a", minimum=10), ledger.open("b", firm=15)
    assert ledger.held(a, 5, up_to=1000).nbytes == 55  # 10 + 90/2, R = 45
    grant = ledger.held(b, 5, up_to=1000)
    assert grant.nbytes == 15
    ledger.back(grant)
    assert ledger.held(b, 5, up_to=7).nbytes == 7
    assert ledger.held(a, 0, up_to=0).nbytes == 0
    assert (a.granted, a.peak, ledger.free) == (55, 55, 38)


def test_up_to_waits_for_the_least_and_then_takes_more():
    ledger = Bench()
    account = ledger.open("a")
    held = ledger.held(account, 50)
    request = ledger.waiting(account, 10, up_to=20)
    assert ledger.back(held, 20) == [request]
    assert request.nbytes == 20  # (70 - 30) // 2


def test_up_to_now():
    ledger = Bench()
    account = ledger.open("a")
    request = Request(account, 10, up_to=80)
    ledger.request_nowait(request)
    assert (request.nbytes, account.granted) == (50, 50)


def test_all_that_up_to_takes_is_counted():
    ledger = Bench(bypass_limit=10)
    a, b = ledger.open("a", minimum=5), ledger.open("b")
    ledger.held(b, 40)  # R = 55
    waiting = ledger.waiting(b, 10)  # T = 60
    assert ledger.held(a, 1, up_to=15).pooled
    assert ledger.barriers() == []
    ledger.held(a, 1, up_to=2)
    assert ledger.barriers() == [waiting]


def test_up_to_takes_nothing_of_the_pool_past_a_barrier():
    ledger, _, _, passed = barrier_at_work()
    ledger.back(passed, 14)
    assert ledger.held(passed.account, 1, up_to=50).nbytes == 3


@pytest.mark.parametrize("others", [0, 1])
def test_a_barrier_takes_up_to_what_the_rule_allows(others: int):
    # Regression: it had the least, as if it were in its own way.
    ledger = Bench(bypass_limit=10)
    a, b, c = ledger.open_all("abc")
    held = ledger.held(c, 45)  # R = 55
    request = ledger.waiting(a, 30, up_to=50)  # T = 60
    if others:
        ledger.waiting(b, 45)  # T = 90
    for nbytes in (5, 5, 1):
        ledger.pass_by(c, nbytes)
    assert len(ledger.barriers()) == 1 + others
    assert ledger.back(held, 25) == [request]  # R = 80
    assert request.nbytes == 40


def test_out_of_turn_it_takes_the_least():
    ledger = Bench()
    account = ledger.open("a", minimum=20)
    ledger.reading(95)  # drift 75, R = 5
    request = ledger.held(account, 40, up_to=60)
    assert (request.nbytes, request.out_of_turn) == (40, True)


# --- alone


def test_alone_waits_for_the_pool_and_then_keeps_it():
    ledger = Bench()
    a, b = ledger.open("a", minimum=10), ledger.open("b", minimum=10)
    held = ledger.held(b, 15)
    alone = ledger.waiting(a, 90, alone=True)
    assert ledger.back(held, 5) == [alone]
    assert (ledger.free, alone.exclusive, alone.out_of_turn) == (0, True, True)
    ledger.back(alone, 30)  # to 60, but the rule gives 10 + 90/2
    ledger.back(held, 5)
    ledger.held(b, 5)  # its reserve
    ledger.refused(b, 1, "holds the pool alone")
    assert (ledger.available(b), ledger.available(a)) == (0, 0)
    waiting = ledger.waiting(b, 1)
    assert not ledger.admit(a, 1)
    grow = ledger.growing(alone, 30, now=True)
    assert (grow.exclusive, ledger.free) == (True, 0)
    alone.nbytes += 30
    assert ledger.back(alone) == [waiting]
    assert ledger.admit(b, 1)


def test_it_is_not_alone_any_more_once_the_rule_would_give_as_much():
    ledger = Bench()
    a, b = ledger.open("a", minimum=10), ledger.open("b")
    alone = ledger.held(a, 90, alone=True)
    waiting = ledger.waiting(b, 1)
    assert ledger.back(alone, 34) == []
    assert ledger.back(alone, 1) == [waiting]  # 55 = 10 + 90/2
    assert not alone.exclusive


def test_with_nobody_waiting_the_pool_is_open_after_it():
    ledger = Bench()
    a, b = ledger.open_all("ab")
    alone = ledger.held(a, 90, alone=True)
    assert not ledger.admit(b, 1)
    assert ledger.back(alone) == []
    assert ledger.admit(b, 1)


def test_alone_but_small_is_like_any_other():
    ledger = Bench()
    a, b = ledger.open_all("ab")
    assert not ledger.held(a, 50, alone=True).exclusive
    ledger.request_nowait(Request(b, 25, alone=True))
    ledger.refused(b, 1, "its share", alone=True)


def test_a_grant_that_grows_beyond_the_rule_has_the_pool_alone():
    ledger = Bench()
    a, b = ledger.open_all("ab")
    grant, held = ledger.held(a, 40, alone=True), ledger.held(b, 10)
    grow = ledger.growing(grant, 20)
    assert ledger.back(held) == [grow]
    assert grow.exclusive
    grant.nbytes, grant.exclusive = 60, True
    ledger.waiting(b, 1)
    assert ledger.growing(grant, 40, now=True).exclusive


def test_its_grow_goes_before_everything_in_its_component():
    ledger = Bench(bypass_limit=5)
    a, b = ledger.open_all("ab")
    theirs = ledger.held(b, 20)
    alone, mate = ledger.waiting(a, 60, alone=True), ledger.waiting(a, 30)
    assert ledger.back(theirs) == [alone]
    ledger.growing(alone, 11, now=True)
    alone.nbytes += 11
    assert ledger.barriers() == [mate]
    ledger.live(b, 30)  # R = -1
    grow = ledger.growing(alone, 1)
    assert ledger.live(b, 0) == [grow]


def test_its_grow_waits_for_the_firm_limit_as_any_other():
    # Regression: once the limit had been raised, it was admitted over its firm limit.
    ledger = Bench()
    account = ledger.open("a", minimum=10, firm=75)
    mate, alone = ledger.held(account, 10), ledger.held(account, 60, alone=True)
    assert alone.exclusive
    grow = ledger.growing(alone, 10)  # 70 + 10 > 75
    assert ledger.resize(1000) == []
    assert ledger.back(mate, 5) == [grow]
    assert account.granted == 75


def test_another_s_grow_waits_behind_it():
    # Regression: the grow that it came before kept its rank, and became a barrier behind it.
    ledger = Bench(bypass_limit=10)
    a, b = ledger.open_all("ab")
    mate, alone = ledger.held(a, 0), ledger.held(a, 60, alone=True)
    first = ledger.growing(mate, 40)
    ledger.growing(alone, 11, now=True)
    alone.nbytes += 11
    assert ledger.barriers() == []
    ledger.live(b, 50)
    own = ledger.growing(alone, 10)
    assert a.queue is not None
    assert a.queue.fronts() == [own]
    assert first not in ledger.waiters.heads
    assert ledger.live(b, 0) == [own]
    alone.nbytes += 10
    assert ledger.back(alone) == [first]


def test_the_grow_of_a_grant_that_is_not_alone_any_more_is_an_ordinary_one():
    # Regression: it was taken for one of a grant that is alone, which closes the pool for it.
    ledger = Bench()
    a, b = ledger.open_all("ab")
    alone = ledger.held(a, 60, alone=True)
    ledger.live(b, 60)  # R = -20
    grow = ledger.growing(alone, 25)
    grow.held = 20
    assert ledger.back(alone, 40) == []  # R = 20, T = 70
    assert not grow.exclusive
    assert ledger.live(b, 10) == [grow]
    assert not grow.exclusive
    assert ledger.admit(b, 10)


def test_an_entry_makes_impossible_who_would_be_alone():
    ledger = Bench()
    a, b = ledger.open("a"), ledger.account("b", 10)
    ledger.held(a, 1)
    alone, small = ledger.waiting(a, 95, alone=True), ledger.waiting(a, 50)
    entry = Request(b, 10, Kind.ENTER)
    assert ledger.request(entry) == [entry, alone]
    assert (alone.state, small.state) == (State.IMPOSSIBLE, State.WAITING)


# --- progress


def test_memory_may_fall_only_by_working_on():
    ledger = Bench()
    account = ledger.open("a", minimum=20)
    ledger.reading(90)  # explained 20: drift 70, R = 10
    first = ledger.held(account, 50)  # c = 30, T = 60; nothing is out
    assert (first.out_of_turn, first.exclusive) == (True, False)
    second = ledger.waiting(account, 1)
    assert ledger.back(first) == [second]


def test_it_must_fit_without_drift():
    ledger = Bench()
    a, b = ledger.open("a"), ledger.open("b", minimum=60)
    held = ledger.held(a, 1)
    large = ledger.waiting(a, 41)
    assert ledger.back(held) == []  # R = 40
    assert ledger.leave(b) == [large]


def test_whoever_fits_goes_on_though_the_first_in_order_does_not():
    ledger = Bench()
    a, c, _ = ledger.open("a"), ledger.open("c"), ledger.open("d", minimum=50)
    held = ledger.held(a, 1)
    entry = ledger.entering(ledger.account("b", 55))  # T = 55
    large, middle = ledger.waiting(a, 40), ledger.waiting(c, 30)  # T = 81 and 60
    assert ledger.back(held) == [middle]  # R = 50: 55 is too much, 30 is not
    assert (entry.state, large.state) == (State.WAITING, State.WAITING)


def test_of_those_who_fit_the_first_in_order_goes_on():
    ledger = Bench()
    a, b, c, _ = *ledger.open_all("abc"), ledger.open("d", minimum=50)
    held = ledger.held(a, 1)
    later, first, tie = ledger.waiting(a, 40), ledger.waiting(b, 30), ledger.waiting(c, 30)
    assert ledger.back(held) == [first]
    assert ledger.back(first) == [tie]
    assert ledger.back(tie) == [later]


def test_past_a_barrier_nobody_goes_on_but_itself():
    ledger = Bench(bypass_limit=10)
    a, b, c = ledger.open("a", minimum=50), ledger.account("b", 51), ledger.open("c")
    barrier = ledger.entering(b)
    ledger.pass_by(c, 11)
    assert ledger.barriers() == [barrier]
    waiting = ledger.waiting(c, 26)
    assert ledger.lift(barrier) == [waiting]
    assert ledger.barriers() == [barrier]  # again
    late = ledger.waiting(c, 2)
    ledger.back(waiting, 15)
    assert ledger.leave(a) == [barrier, late]


def test_the_barrier_itself_goes_on():
    ledger = Bench(bypass_limit=0)
    a, b, _ = *ledger.open_all("ab"), ledger.open("c", minimum=50)
    held = ledger.held(b, 2)
    barrier = ledger.waiting(a, 40)  # T = 80
    ledger.pass_by(b, 1)
    assert ledger.barriers() == [barrier]
    small = ledger.waiting(b, 6)
    assert ledger.back(held) == [barrier]
    assert barrier.out_of_turn
    assert small.state is State.WAITING  # R = 10, T = 12


def test_the_grow_of_the_only_grant_goes_on():
    ledger = Bench()
    a, b = ledger.open_all("ab")
    ours, theirs = ledger.held(a, 10), ledger.held(b, 10)
    ledger.reading(100)  # drift 80: R = 0
    grow = ledger.growing(ours, 10)
    other = ledger.waiting(b, 6)
    assert ledger.back(theirs) == [grow]  # R = -10 + 20
    assert grow.out_of_turn
    assert other.state is State.WAITING


@pytest.mark.parametrize(("minimum", "goes_on"), [(5, True), (4, False)])
def test_beside_another_grant_of_its_component_out_of_the_pool_it_does_not(
    minimum: int, goes_on: bool
):
    ledger = Bench()
    account = ledger.open("a", minimum=minimum)
    ours = ledger.held(account, 10)
    ledger.held(account, 5)
    ledger.reading(100)
    ledger.growing(ours, 10, now=goes_on)


def test_the_grow_of_the_one_who_holds_most_is_looked_at():
    ledger = Bench()
    a, b, c = ledger.open("a", minimum=10), ledger.open_all("b")[0], ledger.open_all("c")[0]
    within, ours = ledger.held(a, 10), ledger.held(b, 20)
    theirs = ledger.held(c, 1)
    ledger.reading(100)  # drift 69: R = 0
    first, second = ledger.growing(within, 5), ledger.growing(ours, 5)
    assert ledger.back(theirs) == [second]
    assert ledger.back(ours) == [first]


@pytest.mark.parametrize("waits", [False, True])
def test_live_bytes_are_nobody_s_to_release(waits: bool):
    # Regression: with another's live bytes nobody went on, though nothing was out.
    ledger = Bench()
    a, b = ledger.open_all("ab")
    if waits:
        held = ledger.held(a, 20)
        ledger.live(b, 60)  # R = 20
        request = ledger.waiting(a, 30)
        assert ledger.back(held) == [request]
    else:
        ledger.live(b, 60)  # R = 40
        assert ledger.held(a, 30).out_of_turn
    ledger.growing(Request(a, 30), 5, now=True)
    ledger.live(b, 0)


# --- readings


def test_drift_is_what_nobody_was_granted():
    ledger = Bench(baseline=10)
    account = ledger.open("a")
    grant = ledger.held(account, 40)
    ledger.reading(60)
    assert (ledger.highest_committed, ledger.drift, ledger.free) == (40, 10, 40)
    ledger.back(grant)  # the heap kept what was granted: no drift
    ledger.reading(60)
    assert (ledger.highest_committed, ledger.drift, ledger.free) == (40, 10, 80)
    ledger.reading(95)  # at the threshold, not above it
    assert (ledger.highest_committed, ledger.drift) == (40, 45)
    ledger.reading(96)
    assert (ledger.highest_committed, ledger.drift, ledger.free) == (0, 86, 4)
    ledger.reading(0)
    assert (ledger.measured, ledger.drift, ledger.free) == (0, 0, 90)


def test_a_reading_that_shows_less_drift_lets_in():
    ledger = Bench()
    account = ledger.open("a")
    ledger.held(account, 10)
    ledger.reading(70)
    waiting = ledger.waiting(account, 20)  # R = 30, T = 50
    assert ledger.reading(50) == [waiting]


def test_how_much_may_move_until_the_next_reading():
    ledger = Bench()
    account = ledger.open("a")
    ledger.reading(0, look_after=20)
    assert ledger.look_at == 20
    assert ledger.admit(account, 10)
    ledger.give_back(account, 5)
    assert (ledger.moved, ledger.admit(account, 6), ledger.admit(account, 5)) == (15, False, True)
    ledger.reading(0, look_after=3)
    assert ledger.look_at == 23


@pytest.mark.parametrize(
    ("minimum", "granted", "live", "committed"),
    [(20, 0, 10, 20), (20, 0, 30, 30), (20, 25, 10, 25), (20, 25, 40, 40), (0, 15, 15, 15)],
)
def test_a_component_has_the_most_of_minimum_grants_and_live(
    minimum: int, granted: int, live: int, committed: int
):
    ledger = Bench()
    account = ledger.open("a", minimum=minimum)
    ledger.held(account, granted)
    assert ledger.reading(0, a=live) == []
    assert (ledger.committed, ledger.free) == (committed, 100 - committed)
    assert (account.live, account.excess) == (live, max(granted, live) - minimum)


def test_what_is_live_is_no_drift():
    ledger = Bench(baseline=10)
    account = ledger.open("a")
    ledger.held(account, 20)
    ledger.reading(60)
    assert (ledger.highest_committed, ledger.drift, ledger.free) == (20, 30, 40)
    ledger.reading(60, a=50)  # the same bytes, of somebody now
    assert (ledger.highest_committed, ledger.drift, ledger.free) == (50, 0, 40)
    ledger.reading(60)  # who is not named has what it had
    assert (account.live, ledger.free) == (50, 40)
    ledger.reading(60, a=5)  # the heap has kept them
    assert (ledger.highest_committed, ledger.drift, ledger.free) == (50, 0, 70)
    ledger.reading(96, a=40)  # above the threshold W is what there is now: 40
    assert (ledger.highest_committed, ledger.drift, ledger.free) == (40, 46, 4)


def test_the_live_bytes_of_one_reading_count_together():
    ledger = Bench(200)
    ledger.open_all("ab")
    ledger.reading(60, a=60)
    ledger.reading(100, b=60, a=10)
    assert ledger.highest_committed == 70  # and never 120
    assert (ledger.drift, ledger.free) == (30, 100)


def test_nobody_comes_in_between_the_live_bytes_of_one_reading():
    ledger = Bench()
    _, b, c = ledger.open_all("abc")
    ledger.held(b, 10)
    ledger.reading(0, a=60)  # R = 30
    waiting = ledger.waiting(c, 20)  # T = 40
    assert ledger.reading(0, a=0, b=80) == []  # R = 90, 20
    assert ledger.reading(0, b=60) == [waiting]


def test_given_back_under_what_is_live_it_is_not_free():
    ledger = Bench()
    a, b, c = ledger.open_all("abc")
    grant, _ = ledger.held(a, 30), ledger.held(c, 10)
    ledger.reading(60, a=50)  # R = 40
    waiting = ledger.waiting(b, 25)  # T = 50
    assert ledger.back(grant) == []
    assert (a.granted, a.excess, ledger.free) == (0, 50, 40)
    assert ledger.reading(60, a=41) == []
    assert ledger.reading(60, a=40) == [waiting]


def test_a_waiter_waits_for_more_as_its_component_has_more_live():
    ledger = Bench()
    a, b, c, d = ledger.open_all("abcd")
    ledger.held(a, 45)
    grant, _ = ledger.held(c, 20), ledger.held(d, 1)  # R = 34
    waiting = ledger.waiting(b, 20)  # T = 40
    ledger.reading(0, b=8)  # R = 26, T = 48
    other = ledger.waiting(d, 20)  # T = 41
    assert ledger.missing(waiting) == 22
    assert ledger.back(grant) == [other]  # R = 46, 26
    assert ledger.reading(0, b=0) == []  # R = 34
    assert ledger.back(other, 6) == [waiting]


def test_what_is_left_with_live_bytes_keeps_those():
    ledger = Bench()
    account = ledger.open("a", minimum=20)
    ledger.reading(0, a=30)
    ledger.leave(account)
    assert (account.reserved, account.excess, ledger.free) == (0, 30, 70)
    ledger.reading(0, a=12)
    assert ledger.free == 88
    ledger.entering(account, now=True)
    assert (account.excess, ledger.free) == (-8, 80)
    ledger.leave(account)
    assert ledger.free == 88
    ledger.reading(0, a=0)
    assert ledger.free == 100


def test_rebased_before_anything_is_granted():
    ledger = Bench(baseline=10)
    account = ledger.open("a", minimum=20)
    ledger.rebase(30)
    assert (ledger.free, ledger.committed, ledger.highest_committed) == (50, 20, 20)
    assert ledger.most(account) == 45


# --- whatever the rules say


def test_forced_it_is_charged():
    ledger = Bench()
    account = ledger.open("a", firm=10)
    assert ledger.force(Request(account, 500)) == []
    assert (account.granted, ledger.free, ledger.highest_committed) == (500, -400, 500)
    big = ledger.account("b", 1000)
    assert ledger.force(Request(big, 1000, Kind.ENTER)) == []
    assert (big.reserved, big.entries, ledger.free) == (1000, 1, -1400)


def test_forced_into_a_component_those_who_wait_there_have_its_reserve():
    # Regression: they were looked at only when something else happened.
    ledger = Bench()
    account, other = ledger.account("a", 150), ledger.open("b")
    ledger.held(other, 40)
    waiting = ledger.waiting(account, 50)
    entry = Request(account, 150, Kind.ENTER)
    assert ledger.force(entry) == [waiting]
    assert (account.reserved, account.granted, waiting.pooled) == (150, 50, False)


@pytest.mark.parametrize(("wanted", "missing"), [(5, 0), (20, -40), (40, 0), (41, 2)])
def test_how_much_is_missing(wanted: int, missing: int):
    ledger = Bench()
    account = ledger.open("a", minimum=10)
    ledger.resize(70)  # R = 60
    assert ledger.missing(Request(account, wanted)) == missing


def test_of_several_resources_the_first_that_is_short_is_missing_else_the_shortest():
    for limit, nbytes, fds, missing in (
        (100, 10, 2, -6),  # 20 - 100, 4 - 10
        (100, 10, 5, 0),  # 20 - 100, 10 - 10
        (100, 50, 6, 2),  # 100 - 100, 12 - 10
        (99, 50, 6, 1),  # 100 - 99, 12 - 10
    ):
        ledger = Bench(limit, others={"fds": 10})
        request = Request(ledger.open("a"), nbytes, also={"fds": fds})
        assert (ledger.missing(request), ledger.threshold(request)) == (missing, 2 * nbytes)


def test_what_a_request_waits_for():
    ledger = Bench(bypass_limit=10)
    a, b, c = ledger.open_all("abc")
    ledger.held(a, 30)
    ledger.waiting(c, 36)  # T = 72
    ledger.held(b, 11)  # R = 59, T = 2n + 11
    for nbytes, waits_for in ((23, ("turn", 0)), (24, ("turn", 0)), (25, ("bytes", 2))):
        assert ledger.waits_for(Request(b, nbytes)) == waits_for
    ledger = Bench(99)
    assert ledger.waits_for(Request(ledger.open("a"), 50)) == ("bytes", 1)


def test_how_much_is_missing_up_to_the_firm_limit():
    ledger = Bench(1000, share=Fraction(2, 3))
    a = ledger.open("a", firm=40)
    ledger.held(a, 10)
    ledger.held(a, 5, sender=ledger.sender(a, "x"))
    assert ledger.waits_for(Request(a, 26)) == ("firm limit", 1)
    for nbytes, missing in ((17, 1), (18, 2)):  # half of 3 * n, rounded up, of 40 - 10 - 5
        request = Request(a, nbytes, sender=ledger.sender(a, "y"))
        assert ledger.waits_for(request) == ("firm limit", missing)


def test_what_is_limited_is_known():
    ledger = Bench(others={"fds": 10})
    a, b = ledger.account("a", others={"slots": 3}), ledger.account("b")
    assert [ledger.knows(a, each) for each in ("bytes", "fds", "slots", "?")] == [True] * 3 + [
        False
    ]
    assert not ledger.knows(b, "slots")


def test_how_much_is_missing_to_enter():
    ledger = Bench()
    account = ledger.account("a", 130)
    assert ledger.missing(Request(account, 130, Kind.ENTER)) == 30


def test_more_than_was_granted_cannot_come_back():
    ledger = Bench()
    account = ledger.open("a")
    ledger.held(account, 10)
    with pytest.raises(AssertionError, match="more given back than granted"):
        ledger.give_back(account, 11)


# --- senders, by numbers


@pytest.mark.parametrize(
    ("share", "firm", "own", "of_x", "of_y"),
    [
        # a has 30 itself and 20 from x in flight, so H = share * (950 + 50) - 50, and up to
        # the firm limit there are firm - 50. Of that y may have share, and x share less 20.
        (Fraction(1, 2), 400, 350, 165, 175),
        (Fraction(1, 2), NO_LIMIT, 450, 215, 225),
        (Fraction(2, 3), 399, 349, 226, 232),
        (Fraction(2, 3), NO_LIMIT, 616, 404, 411),
        (Polynomial(), 400, 350, 165, 116),  # y would be the second: 1/3
        (Polynomial(), NO_LIMIT, 450, 215, 150),
    ],
)
def test_what_each_may_have_of_what_its_component_may(
    share: Fraction | Rule, firm: int, own: int, of_x: int, of_y: int
):
    for name, most in ((None, own), ("x", of_x), ("y", of_y)):
        ledger = Bench(1000, share=share)
        account = ledger.open("a", firm=firm)
        ledger.held(account, 30)
        ledger.held(account, 20, sender=ledger.sender(account, "x"))
        sender = None if name is None else ledger.sender(account, name)
        assert ledger.available(account, sender) == most
        assert ledger.request_at_once(Request(account, most + 1, sender=sender)) is None
        assert ledger.request_at_once(Request(account, most, sender=sender)) == []


def test_what_a_sender_could_ever_have():
    ledger = Bench(1000, share=Fraction(2, 3))
    account = ledger.open("a", minimum=10, firm=40)
    sender = ledger.sender(account, "x")
    ledger.too_large(Request(account, 21, sender=sender), 20, "a sender's part of its firm limit")
    ledger.too_large(Request(account, 41), 40, r"most \(its firm limit")
    ledger.declare(account, 10, NO_LIMIT)
    assert ledger.most(account, sender) == 440  # 4/9 of 990
    ledger.resize(5)
    assert ledger.most(account, sender) == 0
    ledger = Bench(share=Polynomial())
    assert ledger.most(ledger.open("a")) == 50


def test_who_would_not_fit_with_all_others_gone_waits_for_what_is_in_flight():
    ledger = Bench()
    account = ledger.open("a", minimum=20)
    ledger.held(account, 4, sender=ledger.sender(account, "x"))
    sender = ledger.sender(account, "y")
    # 4n against 100 - 20 - 2 * 4
    for nbytes, waits_for in ((18, ("turn", 0)), (19, ("firm limit", 0))):
        assert ledger.waits_for(Request(account, nbytes, sender=sender)) == waits_for


@pytest.mark.parametrize(
    ("share", "minimum", "firm", "of_x", "of_y", "wanted", "counts"),
    [
        (Fraction(2, 3), 10, 100, 30, 20, 30, True),  # 3n + 30 against 2 * (100 - 10 - 30)
        (Fraction(2, 3), 10, 100, 30, 20, 31, False),
        (Fraction(2, 3), 20, NO_LIMIT, 20, 10, 60, True),  # 9n + 60 against 4 * 180 - 6 * 20
        (Fraction(2, 3), 20, NO_LIMIT, 20, 10, 61, False),
        (Polynomial(), 10, 100, 0, 20, 30, True),  # 3n against 100 - 10
        (Polynomial(), 11, 100, 0, 20, 30, False),
    ],
)
def test_only_who_waits_for_other_senders_counts_what_is_sent_past_him(
    share: Fraction | Rule, minimum: int, firm: int, of_x: int, of_y: int, wanted: int, counts: bool
):
    ledger = Bench(1000, share=share)
    account = ledger.account("a", minimum, firm)
    ledger.join(account, ledger.group({"bytes": 200}))
    ledger.entering(account, now=True)
    ledger.held(account, of_y, sender=ledger.sender(account, "y"))
    if of_x:
        ledger.held(account, of_x, sender=ledger.sender(account, "x"))
    request = ledger.waiting(account, wanted, sender=ledger.sender(account, "x"))
    assert account.among is not None
    assert (request in account.among.counting) == counts


# --- transfers, by numbers


@pytest.mark.parametrize(
    ("share", "minimum", "source", "live", "own", "wanted", "threshold"),
    [
        (Fraction(1, 2), 0, 30, 0, 7, 10, 20 + 7 - 10),
        (Fraction(1, 2), 25, 30, 0, 7, 10, 20 + 7 - 5),
        (Fraction(1, 2), 40, 30, 0, 7, 10, 20 + 7),  # all out of the reserve
        (Fraction(1, 2), 0, 30, 25, 7, 10, 20 + 7 - 5),
        (Fraction(1, 3), 0, 30, 0, 7, 10, 30 + 2 * 7 - 10),
        (Polynomial(), 0, 10, 0, 0, 10, 20 - 10),  # the source has nothing left: 1/2
        (Polynomial(), 0, 1, 0, 0, 1, 2 - 1),
        (Polynomial(), 0, 30, 0, 0, 10, 30 - 10),  # 1/3
        (Polynomial(), 0, 30, 0, 1, 10, 30 + 2 * 1 - 10),
        (Polynomial(), 40, 30, 0, 0, 10, 20),  # the source is no consumer
    ],
)
def test_what_must_be_free_for_a_transfer(
    share: Fraction | Rule, minimum: int, source: int, live: int, own: int, wanted: int,
    threshold: int,
):  # fmt: skip
    ledger = Bench(1000, share=share)
    a, b = ledger.open("a", minimum), ledger.open("b")
    ledger.held(a, source)
    ledger.live(a, live)
    ledger.held(b, own)
    request = Request(b, wanted, source=a)
    assert ledger.threshold(request) == threshold
    assert ledger.missing(request) == threshold - ledger.free


@pytest.mark.parametrize(("share", "missing"), [(Fraction(1, 2), 2), (Polynomial(), 2)])
def test_a_transfer_frees_nothing_in_a_group_that_its_source_is_not_in(
    share: Fraction | Rule, missing: int
):
    ledger = Bench(1000, share=share)
    a, b = ledger.open("a"), ledger.account("b")
    ledger.join(b, ledger.group({"bytes": 50}))
    ledger.held(a, 30)
    assert ledger.missing(Request(b, 26, source=a)) == missing


def test_a_transfer_that_draws_nothing_needs_no_memory():
    ledger = Bench()
    a, b = ledger.open_all("ab")
    ledger.held(a, 30)
    ledger.measured = 100
    ledger.refused(b, 10, "measured memory is at the limit")
    assert ledger.request_nowait(Request(b, 10, source=a)) == []


# --- boundaries


def test_up_to_stops_at_the_firm_limit_and_at_the_reserve():
    ledger = Bench()
    a, b = ledger.open("a", firm=30), ledger.open("b", minimum=20)
    ledger.held(a, 10)
    ledger.held(a, 5, sender=ledger.sender(a, "x"))
    assert ledger.held(a, 1, up_to=100).nbytes == 15
    ledger.force(Request(ledger.open("c"), 100))
    assert ledger.free < 0
    assert ledger.available(b) == 20
    assert ledger.held(b, 5, up_to=100).nbytes == 20
    ledger.declare(a, 0, 10)
    assert ledger.available(a) == 0


def test_to_enter_what_is_entered_or_held_needs_nothing():
    ledger = Bench()
    entered, held = ledger.open("a", minimum=10), ledger.account("b", 10)
    ledger.held(held, 30)
    for account in (entered, held):
        assert ledger.threshold(Request(account, 10, Kind.ENTER)) is None


def test_nobody_passes_the_grant_that_holds_the_pool_alone():
    ledger = Bench()
    a, b = ledger.open_all("ab")
    grant = ledger.held(a, 60, alone=True)
    assert grant.exclusive
    assert ledger.request_at_once(Request(b, 1)) is None


@pytest.mark.parametrize(("wanted", "measured"), [(50, 40), (10, 90)])
def test_what_the_rule_would_give_holds_the_pool_alone_at_no_time(wanted: int, measured: int):
    ledger = Bench()
    ledger.reading(measured)
    request = ledger.held(ledger.open("a"), wanted, alone=True)
    assert (request.out_of_turn, request.exclusive) == (True, False)


@pytest.mark.parametrize(
    ("held", "most"),
    [
        (0, 200),  # it would be the one consumer: the barrier needs 3 * 100 of 500
        (1, 199),
        (50, 150),
    ],
)
def test_a_barrier_that_waits_for_another_resource_keeps_what_it_will_need(held: int, most: int):
    ledger = Bench(500, share=Polynomial(), bypass_limit=50, others={"fds": 10})
    other, waits, asks = ledger.open_all("abc")
    ledger.held(other, 0, also={"fds": 5})
    barrier = ledger.waiting(waits, 100, also={"fds": 3})  # 3 * 3 of 5
    ledger.pass_by(other, 60)
    if held:
        ledger.held(asks, held)
    assert ledger.barriers() == [barrier]
    for wanted, settled in ((most + 1, None), (most, [])):
        assert ledger.request_at_once(Request(asks, wanted)) == settled
        assert ledger.consumers == (held > 0 or settled is not None)


def test_behind_a_grow_that_waits_for_one_firm_limit_of_two_nobody_becomes_a_barrier():
    ledger = Bench(bypass_limit=10, others={"fds": 10})
    a, b = ledger.account("a", others={"fds": 5}), ledger.open("b")
    ledger.held(a, 5, also={"fds": 4})
    ledger.waiting(a, 1, kind=Kind.GROW, also={"fds": 2})
    ledger.waiting(a, 20)
    ledger.held(b, 40)
    ledger.pass_by(b, 1)
    assert ledger.barriers() == []


@pytest.mark.parametrize(("fds", "comes_in"), [(3, False), (2, True)])
def test_against_the_rule_it_has_to_fit_in_all_other_resources(fds: int, comes_in: bool):
    ledger = Bench(others={"fds": 10})
    a, b = ledger.open_all("ab")
    ledger.held(a, 0, also={"fds": 5})
    ledger.reading(99)
    request = Request(b, 20, also={"fds": fds})
    assert ledger.request(request) == ([request] if comes_in else [])


def test_against_the_rule_it_has_to_fit_in_its_group():
    ledger = Bench()
    other, mate, account = ledger.open("z"), ledger.account("b", 30), ledger.account("a")
    group = ledger.group({"bytes": 40})
    for each in (mate, account):
        ledger.join(each, group)
    held = ledger.held(other, 10)
    ledger.reading(98)
    request = ledger.waiting(account, 6)
    ledger.force(Request(mate, 30, Kind.ENTER))
    assert ledger.back(held) == []
    assert request.state is State.WAITING


@pytest.mark.parametrize(
    ("firm", "wanted", "fds", "of", "fits"),
    [
        (NO_LIMIT, 15, 0, 4, True),  # 2 * 15 + 10 of 40
        (NO_LIMIT, 16, 0, 4, False),
        (24, 15, 0, 4, False),
        (NO_LIMIT, 15, 2, 4, True),  # 2 * 2
        (NO_LIMIT, 15, 3, 5, False),  # 2 * 3
    ],
)
def test_out_of_order_it_has_to_fit(firm: int, wanted: int, fds: int, of: int, fits: bool):
    ledger = Bench(others={"fds": 8})
    a, b = ledger.open("a", firm=firm), ledger.open("b")
    ledger.held(a, 10)
    ledger.held(b, 25, also={"fds": 8 - of})
    ledger.held(ledger.open("c"), 25)
    ledger.waiting(a, 16)
    request = ledger.waiting(a, wanted, also={"fds": fds} if fds else {})
    assert ledger.suspend_order([request]) == ([request] if fits else [])


@pytest.mark.parametrize(("wanted", "refused"), [(5, 0), (6, 1)])
def test_nobody_is_refused_if_one_would_fit_with_no_drift(wanted: int, refused: int):
    ledger = Bench()
    a, b = ledger.open_all("ab")
    ledger.held(a, 30)
    ledger.held(b, 30)
    ledger.reading(80)
    assert (ledger.drift, ledger.free) == (20, 20)
    # 2 * 5 + 30 of 40
    waits = {ledger.waiting(each, wanted): {each: 30} for each in (a, b)}
    settled = ledger.break_deadlock(waits)
    assert sum(each.state is State.DEADLOCKED for each in settled) == refused


# --- what it costs


class Cost:
    """Counts what the core does: calls of any function, and entries put in order anew."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.rebuilt = 0

        def heapify(heap: list[Any]) -> None:
            self.rebuilt += len(heap)
            heapq.heapify(heap)

        monkeypatch.setattr("membound_async.waiters.heapify", heapify)

    def of(self, work: Callable[[], object]) -> int:
        """How many calls that piece of work made."""
        with counted() as calls:
            work()
        return calls.count


def arrange(requests: list[Request], order: str) -> Iterable[Request]:
    match order:
        case "oldest first":
            return requests
        case "youngest first":
            return reversed(requests)
        case _:
            return Random(1).sample(requests, len(requests))


def many(
    ledger: Bench, count: int, components: int, kind: Kind, barrier: bool
) -> Iterator[Request]:
    """So many waiters over so many components, none of which can come in."""
    accounts = [ledger.open(f"c{number}") for number in range(components)]
    blocker, passer = ledger.open("blocker"), ledger.open("passer")
    ledger.held(blocker, ledger.available(blocker))
    for account in accounts if kind is Kind.GROW else []:
        ledger.held(account, 1)
    for number in range(count):
        account = accounts[number % components]
        request = Request(account, ledger.limit // 2 - 1, kind, held=kind is Kind.GROW)
        assert ledger.request(request) == []
        yield request
    if barrier:
        ledger.pass_by(passer, 10)
        ledger.pass_by(passer, 10)
        assert len(ledger.barriers()) == components


@pytest.mark.parametrize(
    ("count", "components", "kind", "barrier", "order"),
    [
        (100_000, 1000, Kind.GROW, False, "any"),
        (10_000, 1, Kind.GRANT, False, "any"),
        (10_000, 1, Kind.GRANT, True, "youngest first"),
        (10_000, 1, Kind.GROW, True, "oldest first"),
        (10_000, 5000, Kind.GRANT, True, "oldest first"),
    ],
)
def test_each_of_many_waiters_is_cancelled_at_the_same_small_cost(
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    components: int,
    kind: Kind,
    barrier: bool,
    order: str,
):
    cost = Cost(monkeypatch)
    ledger = Bench(10**9, bypass_limit=15 if barrier else None)
    requests = list(many(ledger, count, components, kind, barrier))
    free = ledger.free
    dearest = 0
    for number, request in enumerate(arrange(requests, order)):
        if number % 100:
            assert ledger.cancel(request) == []
        else:
            dearest = max(dearest, cost.of(partial(ledger.cancel, request)))
    assert dearest < 250
    assert cost.rebuilt < 4 * len(requests)
    assert (ledger.waiters.count, ledger.free, bool(ledger.waiters.barriers)) == (0, free, False)
    assert all(account.queue is None for account in ledger.accounts.values())
    assert_forgotten(ledger)


class Watched(dict[str, Account]):
    """Accounts; counts how often all of them are looked at."""

    looks = 0

    def values(self) -> Any:
        self.looks += 1
        return super().values()


@pytest.mark.parametrize("tracked", [False, True])
def test_each_of_many_waiters_comes_in_at_the_same_small_cost(
    monkeypatch: pytest.MonkeyPatch, tracked: bool
):
    cost = Cost(monkeypatch)
    ledger = Bench(1010, share=Fraction(1))
    ledger.accounts = watched = Watched()
    ledger.live(ledger.open("cache", minimum=10), 5 if tracked else 0)
    accounts = [ledger.open(f"c{number}") for number in range(1000)]
    grant = ledger.held(accounts[0], 1000)
    queue = [Request(account, 1000) for _ in range(10) for account in accounts]
    for request in queue:
        assert ledger.request(request) == []
    dearest = 0
    for number, request in enumerate(queue):
        if number % 100:
            assert ledger.back(grant) == [request]
        else:
            dearest = max(dearest, cost.of(partial(ledger.back, grant)))
        grant = request
    assert dearest < 250
    assert cost.rebuilt < 4 * len(queue)
    assert grant.state is State.ADMITTED
    assert watched.looks == 0
    assert_forgotten(ledger)


@pytest.mark.parametrize("order", ["oldest first", "youngest first", "any"])
def test_who_holds_any_of_the_pool_is_seldom_looked_for(order: str):
    ledger = Bench(2000)
    ledger.accounts = watched = Watched()
    accounts = [ledger.open(f"c{number}") for number in range(1000)]
    cache, other = ledger.open_all("co")
    for account in accounts:
        assert ledger.admit(account, 1)
    ledger.live(cache, 1990)
    ledger.waiting(other, 11)  # in the end R = 10
    for request in arrange([Request(account, 1) for account in accounts], order):
        assert ledger.back(request) == []
    assert watched.looks == 2  # at first, and when nobody was left


def assert_forgotten(ledger: Ledger, at_most: int = 64) -> None:
    """See that hardly anything is remembered of those who do not wait any more."""
    waiters = ledger.waiters
    for ranking in (waiters.heads, waiters.growing, waiters.counting, waiters.barriers):
        assert len(ranking._heap) <= at_most


def churn_of_thresholds(ledger: Bench, account: Account, other: Account, number: int) -> None:
    # The head's threshold is another each time, and it is never served.
    ledger.pass_by(other, 1 + number % 3)
    ledger.live(account, 50 + number % 7)


def churn_of_firm_limits(ledger: Bench, account: Account, other: Account, number: int) -> None:
    # The head waits for the firm limit, and does not, in turns; past it goes something or not.
    ledger.declare(account, 0, 400 if number % 2 else 390)
    if number % 4 == 3:
        ledger.pass_by(other, 1)


def churn_of_barriers(ledger: Bench, account: Account, other: Account, number: int) -> None:
    # The heads become barriers and are lifted.
    ledger.pass_by(other, 60)
    for _ in range(2):
        barrier = ledger.waiters.first_barrier()
        assert barrier is not None
        assert ledger.lift(barrier) == []


def churn_of_heads(ledger: Bench, account: Account, other: Account, number: int) -> None:
    # Those who wait come and go.
    newcomers = [Request(account, 380, kind, held=1) for kind in (Kind.GROW, Kind.GRANT)]
    for request in newcomers:
        assert ledger.request(request) == []
    for request in newcomers:
        assert ledger.cancel(request) == []


@pytest.mark.parametrize(
    ("churn", "bypass_limit"),
    [
        (churn_of_thresholds, 10**9),
        (churn_of_firm_limits, 10**9),
        (churn_of_barriers, 50),
        (churn_of_heads, 10**9),
    ],
)
def test_whatever_comes_and_goes_little_is_remembered(
    churn: Callable[[Bench, Account, Account, int], None], bypass_limit: int
):
    # Regression: what stood behind somebody who is never served was kept for ever.
    ledger = Bench(1000, bypass_limit=bypass_limit)
    blocker, account, other = ledger.open("b"), ledger.open("a", firm=400), ledger.open("o")
    ledger.held(blocker, 300)
    ledger.held(account, 10)
    ledger.waiting(blocker, 350)
    ledger.waiting(account, 390)
    for number in range(5_000):
        churn(ledger, account, other, number)
        if number % 100 == 0:
            assert_forgotten(ledger, 80)
    assert ledger.waiters.count == 2
    assert_forgotten(ledger, 80)


def test_nothing_is_said_to_be_available_while_another_sender_goes_first() -> None:
    config = Config(limit=42, share=Fraction(1), bypass=10)
    ledger = replay_up_to(
        config,
        ("ask", 1, "a", "x", (("bytes", 30),)),
        ("ask", 2, "a", "x", (("bytes", 33),)),
        ("ask", 3, "a", None, (("bytes", 13),)),
        ("ask", 4, "a", None, (("bytes", 30),)),
        ("ask", 5, "a", "z", (("bytes", 33),)),
        ("back", 1, ()),
        ("back", 3, ()),
        ("back", 2, ()),
        ("ask", 6, "a", "y", (("bytes", 10),)),
    )
    a = ledger.accounts["a"]
    y = ledger.sender(a, "y")
    assert ledger.available(a, y) == 0
    with pytest.raises(QuotaExceeded, match="another sender that has waited long") as caught:
        ledger.request_nowait(Request(a, 1, sender=y))
    assert caught.value.available_bytes == 0
    assert ledger.waits_for(Request(a, 1, sender=y)) == ("firm limit", 0)


def replay_up_to(config: Config, *operations: tuple[Any, ...]) -> Ledger:
    """Do these, and leave everything as it is."""
    pair = Pair(config)
    for operation in operations:
        pair.apply(operation)
    return pair.ledger
