"""The model itself, by examples computed by hand, and the real ledger against it.

The examples follow the headings of the semantics page. All sizes are bytes, and unless an
example says otherwise there are 100 of them and the share is a half.
"""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.fuzz_ledger import (
    Config,
    CoreFactory,
    Difference,
    Operation,
    SideBySide,
    fuzz,
    is_growing,
    main,
    replay,
)
from tests.ledger_adapter import LedgerAdapter
from tests.model import Admission, Model, Outcome, Snapshot, Waiter
from tests.quota_cases import HALF_CASES, Case


class Bench:
    """A model whose tickets are given out by itself, so that examples read well."""

    def __init__(self, limit_bytes: int = 100, **options: Any) -> None:
        self.model = Model(limit_bytes, **options)
        self._tickets = itertools.count(1)

    def component(
        self, name: str, minimum: int = 0, firm: int | None = None, enter: bool = True
    ) -> None:
        self.model.add(name, minimum, firm)
        if enter:
            assert self.enter(name)[1].status == "admitted"

    def ask(self, method: str, *arguments: Any, **options: Any) -> tuple[int, Outcome]:
        ticket = next(self._tickets)
        return ticket, getattr(self.model, method)(ticket, *arguments, **options)

    def enter(self, name: str) -> tuple[int, Outcome]:
        return self.ask("enter", name)

    def held(self, name: str, nbytes: int) -> int:
        """A grant, which must be had at once."""
        ticket, outcome = self.ask("request", name, nbytes)
        assert outcome == Outcome("admitted", (Admission(ticket, nbytes),))
        return ticket

    def waiting(self, name: str, nbytes: int, **options: Any) -> int:
        """A request, which must have to wait."""
        ticket, outcome = self.ask("request", name, nbytes, **options)
        assert outcome == Outcome("waiting")
        return ticket

    def growing(self, grant: int, nbytes: int) -> int:
        """A grow, which must have to wait."""
        ticket, outcome = self.ask("grow", grant, nbytes)
        assert outcome == Outcome("waiting")
        return ticket

    def status(self, method: str, *arguments: Any, **options: Any) -> str:
        return self.ask(method, *arguments, **options)[1].status

    def waiter(self, ticket: int) -> Waiter:
        return next(waiter for waiter in self.model.waiters() if waiter.ticket == ticket)

    def live(self, name: str, nbytes: int) -> Outcome:
        """What a component has allocated, by a reading that shows nothing else new."""
        return self.model.observe(self.model.measured_bytes, ((name, nbytes),))

    @property
    def free(self) -> int:
        return self.model.free_bytes


def admitted(outcome: Outcome) -> list[tuple[int, int]]:
    return [(ticket, size_bytes) for ticket, size_bytes in outcome.admitted]


@pytest.mark.parametrize("case", HALF_CASES)
def test_the_rule_by_vectors(case: Case) -> None:
    model = Model(case.limit_bytes, share=case.share)
    for ticket, (what, name, nbytes, is_admitted) in enumerate(case.operations):
        if name not in model.components:
            model.add(name, 0, None)
        if what == "release":
            held = (
                ticket
                for ticket, grant in model.grants.items()
                if grant.component.name == name and grant.size_bytes == nbytes
            )
            model.release(next(held))
        else:
            status = model.request_nowait(ticket, name, nbytes).status
            assert (status == "admitted") == is_admitted


# The rule.


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
def test_thresholds(share: str, held: int, wanted: int, threshold: int) -> None:
    bench = Bench(1000, share=Fraction(share))
    bench.component("a")
    if held:
        bench.held("a", held)
    probe = Waiter(0, 0, "request", bench.model.components["a"], wanted)
    assert bench.model.threshold_bytes(probe) == threshold


def test_the_unused_minimum_is_used_first() -> None:
    bench = Bench()
    bench.component("a", minimum=20)
    assert bench.free == 80
    bench.held("a", 15)
    assert bench.free == 80
    probe = Waiter(0, 0, "request", bench.model.components["a"], 10)
    assert (probe.draw_bytes, bench.model.threshold_bytes(probe)) == (5, 10)
    bench.held("a", 10)
    assert bench.free == 75


def test_a_sole_component_has_its_minimum_and_half_of_the_rest() -> None:
    bench = Bench()
    bench.component("a", minimum=20)
    assert bench.status("request_nowait", "a", 61) == "too_large"
    assert bench.status("request_nowait", "a", 60) == "admitted"
    assert bench.free == 40


def test_live_bytes_count_as_held() -> None:
    bench = Bench()
    bench.component("a", minimum=20)
    bench.live("a", 30)
    assert bench.free == 70
    probe = Waiter(0, 0, "request", bench.model.components["a"], 5)
    assert (probe.draw_bytes, bench.model.threshold_bytes(probe)) == (5, 20)
    bench.live("a", 0)
    assert bench.free == 80


def test_the_baseline_is_nobodys() -> None:
    bench = Bench(baseline_bytes=40)
    bench.component("a")
    assert bench.free == 60
    assert bench.status("request_nowait", "a", 31) == "too_large"
    assert bench.status("request_nowait", "a", 30) == "admitted"


# Order.


def test_fifo_inside_a_component() -> None:
    bench = Bench()
    bench.component("a")
    first = bench.held("a", 50)
    second = bench.waiting("a", 40)
    third = bench.waiting("a", 1)
    outcome = bench.model.release(first)
    assert admitted(outcome) == [(second, 40), (third, 1)]


def test_a_grow_goes_before_requests() -> None:
    bench = Bench()
    bench.component("a")
    bench.component("b")
    ours = bench.held("a", 10)
    theirs = bench.held("b", 40)  # R = 50; a: T = 2c + 10
    request = bench.waiting("a", 25)
    grow = bench.growing(ours, 21)
    outcome = bench.model.release(theirs)  # R = 90; the grow needs 52, then R = 69, s = 31
    assert admitted(outcome) == [(grow, 21)]
    assert bench.model.grants[ours].size_bytes == 31
    assert bench.model.snapshot().waiting == (request,)


def test_the_smallest_threshold_is_first_and_ties_go_by_arrival() -> None:
    bench = Bench()
    for name in "abcd":
        bench.component(name)
    held = bench.held("a", 50)
    late = bench.waiting("b", 30)  # T = 60
    early = bench.waiting("c", 26)  # T = 52
    tie = bench.waiting("d", 30)  # T = 60
    outcome = bench.model.release(held)  # R = 100, 74, 44
    assert admitted(outcome) == [(early, 26), (late, 30)]
    assert bench.model.snapshot().waiting == (tie,)


def test_cancelling_lets_the_next_one_pass() -> None:
    bench = Bench()
    bench.component("a")
    bench.held("a", 40)  # R = 60, T = 2c + 40
    first = bench.waiting("a", 11)
    second = bench.waiting("a", 10)
    assert admitted(bench.model.cancel(first)) == [(second, 10)]


# What never will be.


def test_too_large_for_an_idle_limiter() -> None:
    bench = Bench()
    bench.component("a", minimum=20, firm=70)
    bench.component("b", firm=30)
    assert bench.status("request", "a", 61) == "too_large"  # 20 + (100 - 20) / 2
    assert bench.status("request", "b", 31) == "too_large"
    assert bench.status("request_nowait", "b", 31) == "too_large"
    assert bench.model.snapshot().waiting == ()


def test_the_minimum_can_be_had_though_the_limit_is_below_it() -> None:
    bench = Bench()
    bench.component("a", minimum=60)
    bench.model.resize(50)  # 60 + max(0, -5)
    assert bench.status("request", "a", 61) == "too_large"
    assert bench.status("request", "a", 60) == "admitted"
    assert bench.free == -10


def test_a_grow_is_too_large_with_what_it_holds() -> None:
    bench = Bench()
    bench.component("a")
    grant = bench.held("a", 20)
    assert bench.status("grow", grant, 31) == "too_large"
    assert bench.status("grow", grant, 30) == "admitted"


def test_waiters_that_become_impossible() -> None:
    bench = Bench()
    bench.component("a", minimum=20)
    bench.held("a", 60)
    large = bench.waiting("a", 51)
    small = bench.waiting("a", 50)
    # The first can be had with the minimum only: 20 + 40, but 50.
    outcome = bench.model.leave("a")
    assert (outcome.infeasible, outcome.admitted) == ((large,), ())
    outcome = bench.model.resize(99)
    assert outcome == Outcome("done", (), (small,))


def test_an_entry_that_can_never_be() -> None:
    bench = Bench(baseline_bytes=10)
    bench.component("a", minimum=91, enter=False)
    assert bench.status("enter", "a") == "too_large"
    bench.model.resize(101)
    assert bench.status("enter", "a") == "admitted"


# Firm limits.


def test_over_the_firm_limit_it_is_parked_and_others_pass() -> None:
    bench = Bench()
    bench.component("a", firm=10)
    bench.component("b")
    held = bench.held("a", 6)
    parked = bench.waiting("a", 5)
    behind = bench.waiting("a", 1)
    bench.held("b", 40)
    outcome = bench.model.shrink(held, 1)
    assert admitted(outcome) == [(parked, 5)]  # g = 10: the firm limit again
    assert admitted(bench.model.release(held)) == [(behind, 1)]


def test_what_waits_for_its_firm_limit_counts_nothing() -> None:
    bench = Bench(bypass_limit_bytes=10)
    bench.component("a", firm=10)
    bench.component("b")
    bench.held("a", 6)
    parked = bench.waiting("a", 5)
    bench.held("b", 20)
    assert bench.waiter(parked).bypassed_bytes == 0


def test_behind_a_grow_that_waits_for_the_firm_limit_it_counts_nothing() -> None:
    bench = Bench(bypass_limit_bytes=10)
    bench.component("a", firm=10)
    bench.component("b")
    bench.held("a", 4)
    ours = bench.held("a", 4)
    grow = bench.growing(ours, 3)
    request = bench.waiting("a", 3)
    bench.held("b", 11)
    counts = [bench.waiter(ticket).bypassed_bytes for ticket in (grow, request)]
    assert counts == [0, 0]
    assert bench.model.snapshot().barriers == ()


def test_a_barrier_stays_one_when_a_grow_comes_that_waits_for_the_firm_limit() -> None:
    bench = Bench(bypass_limit_bytes=10)
    bench.component("a", firm=40)
    bench.component("b")
    ours = bench.held("a", 15)
    bench.held("a", 5)
    theirs = bench.held("b", 30)  # R = 50
    barrier = bench.waiting("a", 18)  # T = 56
    bench.model.release(bench.held("b", 5))
    bench.model.release(bench.held("b", 6))
    assert bench.model.snapshot().barriers == (barrier,)
    grow = bench.growing(ours, 24)
    assert bench.model.snapshot().barriers == (barrier,)
    assert admitted(bench.model.shrink(theirs, 6)) == [(barrier, 18)]
    assert bench.model.snapshot().waiting == (grow,)


def test_a_barrier_over_its_firm_limit_is_none() -> None:
    bench = Bench(bypass_limit_bytes=10)
    for name in "abcd":
        bench.component(name, firm=30 if name == "a" else None)
    ours = bench.held("a", 20)
    bench.held("b", 40)
    theirs = bench.held("c", 10)  # R = 30
    grow = bench.growing(ours, 6)  # T = 32
    request = bench.waiting("a", 8)  # T = 36
    bench.model.release(bench.held("d", 11))
    assert bench.model.snapshot().barriers == (grow, request)
    assert admitted(bench.model.release(theirs)) == [(grow, 6)]  # g = 26, R = 34
    assert bench.model.snapshot().barriers == ()  # 26 + 8 > 30
    bench.held("d", 5)
    assert bench.waiter(request).bypassed_bytes == 11
    assert bench.model.shrink(ours, 4) == Outcome("done")  # g = 22, R = 33, T = 38
    assert bench.model.snapshot().barriers == (request,)


# Nobody starves.


def barrier_at_work() -> tuple[Bench, int, int, int]:
    """A holds 30, b waits for 40 of the pool (T = 80), and c has passed it by 11 of 10."""
    bench = Bench(bypass_limit_bytes=10)
    bench.component("a")
    bench.component("b", minimum=5)
    bench.component("c", minimum=5)
    held = bench.held("a", 30)  # R = 60
    barrier = bench.waiting("b", 45)
    passed = bench.held("c", 5 + 11)  # R = 49
    assert bench.model.snapshot().barriers == (barrier,)
    return bench, held, barrier, passed


def test_within_the_bypass_limit_others_pass() -> None:
    bench = Bench(bypass_limit_bytes=10)
    bench.component("a")
    bench.component("b")
    bench.held("a", 30)
    waiting = bench.waiting("b", 40)
    bench.held("a", 10)
    assert bench.waiter(waiting).bypassed_bytes == 10
    assert bench.model.snapshot().barriers == ()
    bench.held("a", 1)
    assert bench.model.snapshot().barriers == (waiting,)


def test_nothing_of_the_pool_passes_a_barrier() -> None:
    bench, held, barrier, passed = barrier_at_work()
    assert bench.status("request_nowait", "a", 1) == "refused"
    assert bench.status("grow_nowait", held, 1) == "refused"
    late = bench.waiting("a", 1)
    outcome = bench.model.release(held)  # R = 79 < 80
    assert outcome == Outcome("done")
    outcome = bench.model.shrink(passed, 1)  # R = 80
    assert admitted(outcome) == [(barrier, 45), (late, 1)]


def test_a_reserve_passes_the_barriers_of_others_only() -> None:
    bench, _, _, passed = barrier_at_work()
    bench.model.shrink(passed, 14)  # 3 of its minimum of 5 are unused, R = 60
    assert bench.status("request", "b", 1) == "waiting"
    assert bench.status("request_nowait", "b", 1) == "refused"
    assert bench.status("request_nowait", "c", 4) == "refused"
    assert bench.status("request_nowait", "c", 1) == "admitted"
    assert bench.status("request", "c", 2) == "admitted"


def test_up_to_takes_nothing_of_the_pool_past_a_barrier() -> None:
    bench, _, _, passed = barrier_at_work()
    bench.model.shrink(passed, 14)
    ticket, outcome = bench.ask("request", "c", 1, up_to=50)
    assert admitted(outcome) == [(ticket, 3)]


def test_lifted_it_counts_from_nothing() -> None:
    bench, _, barrier, _ = barrier_at_work()
    late = bench.waiting("a", 2)
    assert admitted(bench.model.lift_barrier()) == [(late, 2)]
    assert bench.waiter(barrier).bypassed_bytes == 2
    bench.held("c", 9)
    assert bench.model.snapshot().barriers == (barrier,)


def test_only_the_first_barrier_is_lifted() -> None:
    bench = Bench(bypass_limit_bytes=9)
    for name in "abc":
        bench.component(name)
    bench.held("c", 40)  # R = 60
    first = bench.waiting("a", 40)  # T = 80
    second = bench.waiting("b", 31)  # T = 62
    bench.held("c", 10)  # R = 50
    assert bench.model.snapshot().barriers == (first, second)
    assert bench.model.lift_barrier() == Outcome("done")
    assert bench.model.snapshot().barriers == (second,)
    assert bench.model.lift_barrier() == Outcome("done")
    assert bench.model.snapshot().barriers == ()
    assert bench.model.lift_barrier() == Outcome("done")


def test_barriers_go_by_arrival() -> None:
    bench = Bench(bypass_limit_bytes=10)
    for name in "abcd":
        bench.component(name)
    held = bench.held("c", 40)  # R = 60
    first = bench.waiting("a", 40)  # T = 80
    second = bench.waiting("b", 31)  # T = 62
    bench.held("c", 10)
    small = bench.held("d", 1)  # R = 49
    assert bench.model.snapshot().barriers == (first, second)
    assert bench.model.shrink(held, 20) == Outcome("done")  # R = 69
    bench.model.release(small)
    outcome = bench.model.shrink(held, 10)  # R = 80
    assert admitted(outcome) == [(first, 40)]


def test_the_bypass_limit_is_the_limit_and_follows_it() -> None:
    bench = Bench(1000)
    bench.component("a")
    bench.component("b")
    bench.held("a", 300)
    waiting = bench.waiting("b", 400)
    for _ in range(10):
        bench.model.release(bench.held("a", 100))
    assert bench.model.snapshot().barriers == ()
    bench.model.resize(999)
    assert bench.model.snapshot().barriers == (waiting,)


def test_the_fronts_of_both_queues_count() -> None:
    bench = Bench(bypass_limit_bytes=10)
    bench.component("a")
    bench.component("b")
    ours = bench.held("a", 10)
    bench.held("b", 20)  # R = 70
    request = bench.waiting("a", 40)
    grow = bench.growing(ours, 35)  # T = 80
    bench.held("b", 11)
    assert bench.model.snapshot().barriers == (request, grow)
    assert bench.model.components["a"].head() is bench.waiter(request)


# Entering.


def test_entering_waits_for_the_minimum() -> None:
    bench = Bench()
    bench.component("a", minimum=70)
    bench.component("b", minimum=40, enter=False)
    ticket, outcome = bench.enter("b")
    assert outcome.status == "waiting"
    assert bench.status("enter", "a") == "admitted"  # it is in already
    assert bench.model.leave("a") == Outcome("done")
    assert admitted(bench.model.leave("a")) == [(ticket, 0)]
    assert bench.free == 60


def test_entering_needs_only_what_is_not_held_yet() -> None:
    bench = Bench()
    bench.component("a", minimum=40, enter=False)
    bench.held("a", 30)
    bench.component("b", minimum=60)  # R = 10
    assert bench.status("enter", "a") == "admitted"
    assert bench.free == 0


def test_entering_again_waits_for_nobody() -> None:
    bench = Bench()
    bench.component("a", minimum=40, firm=50)
    bench.component("b", enter=False)
    bench.held("a", 50)
    bench.waiting("a", 1)
    bench.model.observe(1000)
    assert bench.status("enter", "a") == "admitted"
    assert bench.status("enter", "b") == "admitted"
    assert bench.model.components["a"].entered == 2
    bench.model.leave("a")
    assert bench.model.components["a"].minimum_bytes == 40
    bench.model.leave("a")
    assert bench.model.components["a"].minimum_bytes == 0


def test_bounds_change_for_those_who_wait_and_the_minimum_with_the_next_entry() -> None:
    bench = Bench()
    bench.component("a", minimum=10, firm=20)
    bench.held("a", 15)
    parked = bench.waiting("a", 10)
    assert admitted(bench.model.declare("a", 30, 40)) == [(parked, 10)]
    parked = bench.waiting("a", 20)
    assert bench.model.declare("a", 30, 19).infeasible == (parked,)
    assert bench.model.components["a"].minimum_bytes == 10
    bench.model.leave("a")
    bench.enter("a")
    assert (bench.model.components["a"].minimum_bytes, bench.free) == (30, 70)


def test_left_with_grants_out_they_stay_charged() -> None:
    bench = Bench()
    bench.component("a", minimum=40)
    grant = bench.held("a", 30)
    bench.model.leave("a")
    assert bench.free == 70
    bench.model.release(grant)
    assert bench.free == 100


def test_an_entry_counts_as_a_pool_admission() -> None:
    bench = Bench(bypass_limit_bytes=39)
    bench.component("a")
    bench.component("b", minimum=40, enter=False)
    bench.held("a", 30)
    waiting = bench.waiting("a", 21)
    assert bench.status("enter", "b") == "admitted"
    assert bench.model.snapshot().barriers == (waiting,)


# Ranges.


def test_up_to_takes_what_the_rule_allows() -> None:
    bench = Bench()
    bench.component("a", minimum=10)
    bench.component("b", firm=15)
    ticket, outcome = bench.ask("request", "a", 5, up_to=1000)
    assert admitted(outcome) == [(ticket, 55)]  # 10 + 90/2, R = 45
    ticket, outcome = bench.ask("request", "b", 5, up_to=1000)
    assert admitted(outcome) == [(ticket, 15)]
    bench.model.release(ticket)
    ticket, outcome = bench.ask("request", "b", 5, up_to=7)
    assert admitted(outcome) == [(ticket, 7)]


def test_all_that_it_takes_is_counted() -> None:
    bench = Bench(bypass_limit_bytes=10)
    bench.component("a", minimum=5)
    bench.component("b")
    bench.held("b", 40)  # R = 55
    waiting = bench.waiting("b", 10)  # T = 60
    bench.ask("request", "a", 1, up_to=15)
    assert bench.waiter(waiting).bypassed_bytes == 10
    bench.ask("request", "a", 1, up_to=2)  # R = 45, T = 12
    assert bench.model.snapshot().barriers == (waiting,)


def test_up_to_waits_for_the_least() -> None:
    bench = Bench()
    bench.component("a")
    held = bench.held("a", 50)
    ticket = bench.waiting("a", 10, up_to=20)
    assert admitted(bench.model.shrink(held, 20)) == [(ticket, 20)]  # (70 - 30) // 2


def test_up_to_has_all_of_the_reserve_though_nothing_is_free() -> None:
    bench = Bench()
    bench.component("a", minimum=10)
    bench.component("b")
    bench.live("b", 200)
    assert bench.free == -110
    ticket, outcome = bench.ask("request", "a", 2, up_to=50)
    assert admitted(outcome) == [(ticket, 10)]


@pytest.mark.parametrize("others", [0, 1])
def test_a_barrier_takes_up_to_what_the_rule_allows(others: int) -> None:
    bench = Bench(bypass_limit_bytes=10)
    for name in "abc":
        bench.component(name)
    held = bench.held("c", 45)  # R = 55
    ticket = bench.waiting("a", 30, up_to=50)  # T = 60
    if others:
        bench.waiting("b", 45)  # T = 90
    bench.model.release(bench.held("c", 5))
    bench.model.release(bench.held("c", 5))
    bench.model.release(bench.held("c", 1))
    assert len(bench.model.barriers()) == 1 + others
    assert admitted(bench.model.shrink(held, 25)) == [(ticket, 40)]  # R = 80


# Alone.


def test_alone_waits_for_the_pool_and_then_keeps_it() -> None:
    bench = Bench()
    bench.component("a", minimum=10)
    bench.component("b", minimum=10)
    held = bench.held("b", 15)
    assert bench.status("request", "a", 91, alone=True) == "too_large"
    alone = bench.waiting("a", 90, alone=True)
    assert admitted(bench.model.shrink(held, 10)) == [(alone, 90)]
    assert (bench.model.snapshot().exclusive, bench.free) == ((alone,), 0)
    bench.held("b", 5)  # its reserve
    bench.model.shrink(alone, 30)  # to 60, but the rule gives 10 + 90/2
    assert bench.status("request_nowait", "b", 1) == "refused"
    waiting = bench.waiting("b", 1)
    assert admitted(bench.model.release(alone)) == [(waiting, 1)]
    assert bench.model.snapshot().exclusive == ()


def test_it_is_not_alone_any_more_once_the_rule_would_give_as_much() -> None:
    bench = Bench()
    bench.component("a", minimum=10)
    bench.component("b")
    alone, _ = bench.ask("request", "a", 90, alone=True)
    assert bench.model.snapshot().exclusive == (alone,)
    waiting = bench.waiting("b", 1)
    assert bench.model.shrink(alone, 34) == Outcome("done")
    assert admitted(bench.model.shrink(alone, 1)) == [(waiting, 1)]  # 55 = 10 + 90/2
    assert bench.model.snapshot().exclusive == ()


def test_the_grow_of_the_grant_that_is_alone_goes_before_barriers() -> None:
    bench = Bench(bypass_limit_bytes=5)
    bench.component("a")
    bench.component("b")
    theirs = bench.held("b", 20)
    ours = bench.waiting("a", 60, alone=True)
    mate = bench.waiting("a", 30)
    assert admitted(bench.model.release(theirs)) == [(ours, 60)]
    _, outcome = bench.ask("grow", ours, 11)
    assert (outcome.status, bench.model.snapshot().barriers) == ("admitted", (mate,))
    bench.live("b", 30)  # R = -1
    grow = bench.growing(ours, 1)
    assert admitted(bench.live("b", 0)) == [(grow, 1)]
    assert bench.model.snapshot().waiting == (mate,)


def test_alone_has_at_least_what_the_rule_gives() -> None:
    bench = Bench()
    bench.component("a")
    bench.component("b", minimum=70)
    assert bench.status("request", "a", 51, alone=True) == "too_large"
    assert bench.status("request", "a", 50, alone=True) == "waiting"


def test_alone_but_small_is_like_any_other() -> None:
    bench = Bench()
    bench.component("a")
    assert bench.status("request", "a", 50, alone=True) == "admitted"
    assert bench.model.snapshot().exclusive == ()


def test_alone_is_impossible_beside_the_minimums_of_others() -> None:
    bench = Bench()
    bench.component("a")
    bench.component("b", minimum=10, enter=False)
    bench.held("a", 1)
    alone = bench.waiting("a", 95, alone=True)
    ticket, outcome = bench.enter("b")
    assert outcome == Outcome("admitted", (Admission(ticket, 0),), (alone,))


# Not waiting.


def test_nowait_stays_behind_waiters_of_its_own_component() -> None:
    bench = Bench()
    bench.component("a", minimum=20, firm=60)
    grant = bench.held("a", 15)
    assert bench.status("grow_nowait", grant, 5) == "admitted"
    bench.model.shrink(grant, 5)
    bench.waiting("a", 50)
    assert bench.status("request_nowait", "a", 1) == "refused"
    assert bench.status("grow_nowait", grant, 1) == "refused"


def test_nowait_is_refused_at_the_limit_but_for_the_reserve() -> None:
    bench = Bench()
    bench.component("a", minimum=20)
    grant = bench.held("a", 60)
    bench.model.observe(100)  # drift 40
    bench.model.release(grant)
    assert bench.free == 40
    assert bench.status("request_nowait", "a", 21) == "refused"
    assert bench.status("request_nowait", "a", 20) == "admitted"
    assert bench.status("request", "a", 1) == "admitted"


# Progress.


def test_memory_may_fall_only_by_working_on() -> None:
    bench = Bench()
    bench.component("a", minimum=20)
    bench.model.observe(90)  # explained 20: drift 70, R = 10
    assert (bench.model.drift_bytes, bench.free) == (70, 10)
    first, outcome = bench.ask("request", "a", 50)  # c = 30, T = 60; nothing is out
    assert admitted(outcome) == [(first, 50)]
    second = bench.waiting("a", 1)
    assert admitted(bench.model.release(first)) == [(second, 1)]


def test_whoever_fits_goes_on_though_the_first_in_order_does_not() -> None:
    bench = Bench()
    bench.component("a")
    bench.component("b", minimum=55, enter=False)
    bench.component("c")
    bench.component("d", minimum=50)
    held = bench.held("a", 1)
    entry, _ = bench.enter("b")  # T = 55
    large = bench.waiting("a", 40)  # T = 81
    middle = bench.waiting("c", 30)  # T = 60
    assert bench.free == 49
    outcome = bench.model.release(held)  # R = 50: 55 is too much, 30 is not
    assert admitted(outcome) == [(middle, 30)]
    assert bench.model.snapshot().waiting == (entry, large)


def test_a_barrier_is_the_only_one_that_may_go_on() -> None:
    bench = Bench(bypass_limit_bytes=10)
    bench.component("a", minimum=50)
    bench.component("b", minimum=51, enter=False)
    bench.component("c")
    entry, _ = bench.enter("b")
    assert bench.model.snapshot().waiting == (entry,)
    bench.model.release(bench.held("c", 11))
    assert bench.model.snapshot().barriers == (entry,)
    waiting = bench.waiting("c", 26)
    assert admitted(bench.model.lift_barrier()) == [(waiting, 26)]


def test_the_grow_of_the_only_grant_goes_on() -> None:
    bench = Bench()
    bench.component("a")
    bench.component("b")
    ours = bench.held("a", 10)
    theirs = bench.held("b", 10)
    bench.model.observe(100)  # drift 80: R = 0
    grow = bench.growing(ours, 10)
    assert admitted(bench.model.release(theirs)) == [(grow, 10)]  # R = -10 + 20


@pytest.mark.parametrize(("minimum", "goes_on"), [(5, True), (4, False)])
def test_beside_another_grant_of_its_component_out_of_the_pool_it_does_not(
    minimum: int, goes_on: bool
) -> None:
    bench = Bench()
    bench.component("a", minimum=minimum)
    ours = bench.held("a", 10)
    bench.held("a", 5)
    bench.model.observe(100)
    ticket, outcome = bench.ask("grow", ours, 10)
    assert admitted(outcome) == ([(ticket, 10)] if goes_on else [])


def test_live_bytes_are_nobodys_to_release() -> None:
    bench = Bench()
    bench.component("a")
    bench.component("b")
    bench.live("b", 60)  # R = 40
    ticket, outcome = bench.ask("request", "a", 30)
    assert admitted(outcome) == [(ticket, 30)]


# Drift.


def test_drift_is_what_nobody_was_granted() -> None:
    bench = Bench(baseline_bytes=10)
    bench.component("a")
    grant = bench.held("a", 40)
    bench.model.observe(60)
    assert (bench.model.high_water_bytes, bench.model.drift_bytes, bench.free) == (40, 10, 40)
    bench.model.release(grant)  # the heap kept what was granted: no drift
    bench.model.observe(60)
    assert (bench.model.high_water_bytes, bench.model.drift_bytes, bench.free) == (40, 10, 80)
    bench.model.observe(95)  # at the threshold, not above it
    assert (bench.model.high_water_bytes, bench.model.drift_bytes) == (40, 45)
    bench.model.observe(96)
    assert (bench.model.high_water_bytes, bench.model.drift_bytes, bench.free) == (0, 86, 4)


def test_what_was_granted_between_samples_is_no_drift() -> None:
    bench = Bench()
    bench.component("a")
    bench.model.release(bench.held("a", 40))
    bench.model.observe(50)
    assert (bench.model.high_water_bytes, bench.model.drift_bytes) == (40, 10)


def test_less_drift_admits() -> None:
    bench = Bench()
    bench.component("a")
    bench.held("a", 10)
    bench.model.observe(70)
    waiting = bench.waiting("a", 20)  # R = 30, T = 50
    assert admitted(bench.model.observe(50)) == [(waiting, 20)]


# Mistakes.


def test_what_is_not_there_cannot_be_given_back() -> None:
    bench = Bench()
    bench.component("a")
    grant = bench.held("a", 10)
    with pytest.raises(ValueError, match="11 of 10 bytes"):
        bench.model.shrink(grant, 11)
    bench.model.release(grant)
    with pytest.raises(KeyError):
        bench.model.release(grant)
    with pytest.raises(KeyError):
        bench.model.cancel(77)
    bench.model.leave("a")
    with pytest.raises(ValueError, match="nobody is in 'a'"):
        bench.model.leave("a")


# The two ledgers side by side.


SIZES = st.integers(0, 60)
INDICES = st.integers(0, 1_000_000)
NAMES = ("a", "b", "c")


class LedgerAgainstModel(RuleBasedStateMachine):
    """Any order of operations leads both ledgers to the same, and keeps what is promised.

    A subclass says which ledger is tried; here it is the model itself.
    """

    factory: ClassVar[CoreFactory] = Model

    def __init__(self) -> None:
        super().__init__()
        self.tickets = itertools.count(1)

    @initialize(
        limit=st.integers(1, 120),
        baseline=st.integers(0, 20),
        share=st.sampled_from([Fraction(1, 2), Fraction(1, 3), Fraction(3, 4), Fraction(1)]),
        bypass=st.none() | st.integers(0, 100),
        bounds=st.lists(
            st.tuples(st.integers(0, 40), st.none() | st.integers(1, 60)), min_size=3, max_size=3
        ),
    )
    def start(
        self,
        limit: int,
        baseline: int,
        share: Fraction,
        bypass: int | None,
        bounds: list[tuple[int, int | None]],
    ) -> None:
        config = Config(limit + baseline, baseline, share, bypass)
        self.pair = SideBySide(config, type(self).factory)
        for name, (minimum, more) in zip(NAMES, bounds, strict=True):
            self.apply("add", name, minimum, None if more is None else minimum + more)

    @property
    def model(self) -> Model:
        return self.pair.model

    def apply(self, *operation: Any) -> None:
        self.pair.apply(operation)

    @property
    def ticket(self) -> int:
        return next(self.tickets)

    def grant(self, index: int) -> int:
        grants = list(self.model.grants)
        return grants[index % len(grants)]

    def something_is_held(self) -> bool:
        return bool(self.model.grants)

    def somebody_waits(self) -> bool:
        return bool(self.model.waiters())

    @rule(
        name=st.sampled_from(NAMES),
        nbytes=SIZES,
        more=st.none() | st.integers(0, 40),
        alone=st.booleans(),
    )
    def request(self, name: str, nbytes: int, more: int | None, alone: bool) -> None:
        up_to = None if more is None else nbytes + more
        self.apply("request", self.ticket, name, nbytes, up_to, alone)

    @rule(name=st.sampled_from(NAMES), nbytes=SIZES)
    def request_nowait(self, name: str, nbytes: int) -> None:
        self.apply("request_nowait", self.ticket, name, nbytes)

    @precondition(something_is_held)
    @rule(index=INDICES, nbytes=SIZES, wait=st.booleans())
    def grow(self, index: int, nbytes: int, wait: bool) -> None:
        grant = self.grant(index)
        held = self.model.grants[grant]
        if not is_growing(held):
            self.apply("grow" if wait else "grow_nowait", self.ticket, grant, nbytes)

    @precondition(something_is_held)
    @rule(index=INDICES, nbytes=st.integers(0, 60))
    def shrink(self, index: int, nbytes: int) -> None:
        grant = self.grant(index)
        held = self.model.grants[grant]
        if not is_growing(held):
            self.apply("shrink", grant, min(nbytes, held.size_bytes))

    @precondition(something_is_held)
    @rule(index=INDICES)
    def release(self, index: int) -> None:
        grant = self.grant(index)
        if not is_growing(self.model.grants[grant]):
            self.apply("release", grant)

    @precondition(somebody_waits)
    @rule(index=INDICES)
    def cancel(self, index: int) -> None:
        waiters = self.model.waiters()
        self.apply("cancel", waiters[index % len(waiters)].ticket)

    @rule(name=st.sampled_from(NAMES))
    def enter(self, name: str) -> None:
        self.apply("enter", self.ticket, name)

    @rule(name=st.sampled_from(NAMES))
    def leave(self, name: str) -> None:
        if self.model.components[name].entered:
            self.apply("leave", name)

    @rule(
        name=st.sampled_from(NAMES),
        minimum=st.integers(0, 60),
        more=st.none() | st.integers(1, 60),
    )
    def declare(self, name: str, minimum: int, more: int | None) -> None:
        self.apply("declare", name, minimum, None if more is None else minimum + more)

    @rule(
        unexplained=st.integers(-40, 80),
        live=st.dictionaries(st.sampled_from(NAMES), st.just(0) | st.integers(0, 80)),
    )
    def observe(self, unexplained: int, live: dict[str, int]) -> None:
        explained = self.model.baseline_bytes + self.model.total_committed_bytes
        self.apply("observe", max(0, explained + unexplained), tuple(live.items()))

    @rule(change=st.integers(-30, 30))
    def resize(self, change: int) -> None:
        least = self.model.baseline_bytes + 1
        self.apply("resize", max(least, self.model.limit_bytes + change))

    @rule()
    def lift_barrier(self) -> None:
        self.apply("lift_barrier")

    def teardown(self) -> None:
        """Nothing is lost: once everybody has gone, all is free again."""
        if hasattr(self, "pair"):
            self.pair.drain()


SHORT = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


class RealLedgerAgainstModel(LedgerAgainstModel):
    factory = LedgerAdapter


TestLedgerAgainstModel = RealLedgerAgainstModel.TestCase
TestLedgerAgainstModel.settings = SHORT


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_ledger_does_as_the_model_for_many_steps(seed: int) -> None:
    assert fuzz(20_000, seed, LedgerAdapter) is None


# The driver: it must find what is wrong.


class Forgetful(Model):
    """Does not count what passes a waiter."""

    def _count(self, pool_bytes: int, but_for: Waiter) -> None:
        pass


class Generous(Model):
    """Rounds the wrong way."""

    def threshold_bytes(self, waiter: Waiter) -> int:
        return max(1, super().threshold_bytes(waiter) - 1)


class Raising(Model):
    """Cannot be resized."""

    def resize(self, limit_bytes: int) -> Outcome:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("core", "says"), [(Forgetful, "barriers"), (Generous, "found"), (Raising, "RuntimeError: no")]
)
def test_a_broken_ledger_is_found_and_the_operations_are_few(core: type[Model], says: str) -> None:
    found = fuzz(50_000, 1, core)
    assert found is not None
    assert says in found
    assert "seed 1, episode" in found
    lines = [line for line in found.splitlines() if line.startswith("    (")]
    assert 1 <= len(lines) <= 12
    namespace: dict[str, Any] = {"replay": replay, "Config": Config, "Fraction": Fraction}
    with pytest.raises(Difference):
        exec(found.partition("\n")[2], namespace | {"factory": core})
    exec(found.partition("\n")[2], namespace | {"factory": Model})


def test_a_ledger_need_not_keep_every_number() -> None:
    class Terse(Model):
        def snapshot(self) -> Snapshot:
            return Snapshot(free_bytes=self.free_bytes)

    assert fuzz(400, 1, Terse) is None


def test_operations_that_have_become_meaningless_are_left_out() -> None:
    operations: list[Operation] = [
        ("add", "a", 5, None),
        ("add", "a", 6, None),
        ("request", 1, "b", 10),
        ("observe", 5, (("a", 10), ("b", 10))),
        ("leave", "a"),
        ("cancel", 1),
        ("shrink", 1, 1),
        ("release", 1),
        ("grow", 2, 1, 5),
        ("grow_nowait", 2, 1, 5),
        ("resize", 50),
    ]
    pair = SideBySide(Config(100), Model)
    meant: list[str] = []
    for operation in operations:
        if pair.is_meaningful(operation):
            pair.apply(operation)
            meant.append(operation[0])
    assert meant == ["add", "resize"]


def test_the_driver_from_a_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--steps", "800", "--seed", "5", "--core", "tests.model:Model"]) == 0
    assert capsys.readouterr().out.startswith("800 steps, seed 5: no difference")
    assert main(["--steps", "50000", "--core", f"{__name__}:Raising"]) == 1
    assert "RuntimeError: no" in capsys.readouterr().err
