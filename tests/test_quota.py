"""The ledger: the design's cases, the rule by numbers, and a long random comparison."""

from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import pytest

from membound_async import GrantTooLarge, InvalidLimit, QuotaExceeded
from membound_async.quota import NO_LIMIT, Account, Ledger
from membound_async.waiters import Kind, Request, State
from tests.fuzz_ledger import fuzz
from tests.ledger_adapter import LedgerAdapter

HERE = Path(__file__).parent
CASES = [
    HERE / "vectors" / "quota.json",
    Path(os.environ.get("VECTORS", HERE.parent.parent / "shared" / "vectors")) / "quota.json",
]


def half_cases() -> list[Any]:
    return [
        pytest.param(case, id=f"{case['name']} [{'ours' if path == CASES[0] else 'design'}]")
        for path in CASES
        if path.exists()
        for case in json.loads(path.read_text(encoding="utf-8"))
        if case["rule"] == "half"
    ]


@pytest.mark.parametrize("case", half_cases())
@pytest.mark.parametrize("way", ["admit", "request_nowait"])
def test_the_cases_of_the_design(case: dict[str, Any], way: str) -> None:
    ledger = Ledger(case["limit"], share=Fraction(*case["share"]))
    for operation, name, nbytes, *outcome in case["ops"]:
        account = ledger.account(name)
        if operation == "release":
            ledger.give_back(account, nbytes)
        elif way == "admit":
            assert ledger.admit(account, nbytes) == (outcome == ["admit"])
        else:
            try:
                ledger.request_nowait(Request(account, nbytes))
            except (QuotaExceeded, GrantTooLarge):
                assert outcome == ["refuse"]
            else:
                assert outcome == ["admit"]


def test_there_are_cases() -> None:
    assert len(half_cases()) >= 13


@pytest.mark.parametrize("consumers", [1, 2, 3, 7, 20])
def test_equal_greedy_consumers_settle_at_equal_parts(consumers: int) -> None:
    """N that release and take again each have 1/(N+1) of the pool."""
    ledger = Ledger(1_000_000)
    accounts = [ledger.account(str(number)) for number in range(consumers)]
    for _ in range(40 * consumers):
        for account in accounts:
            ledger.give_back(account, account.granted)
            assert ledger.admit(account, ledger.available(account))
    for account in accounts:
        assert account.granted == pytest.approx(1_000_000 / (consumers + 1), rel=0.001)


def waiting(ledger: Ledger, account: Account, nbytes: int, **options: Any) -> Request:
    request = Request(account, nbytes, **options)
    assert ledger.request(request) == []
    assert request.state is State.WAITING
    return request


def test_the_threshold_by_numbers() -> None:
    ledger = Ledger(1000)
    a, b = ledger.account("a", minimum=100), ledger.account("b")
    assert ledger.request(Request(a, 0, Kind.ENTER)) != []
    assert (ledger.free, a.excess) == (900, -100)
    # Of 150 bytes, 100 come out of the minimum; T = 2 * 50.
    assert ledger.threshold(a, ledger.draw(a, 150)) == 100
    assert ledger.admit(a, 150)
    assert (ledger.free, a.excess, ledger.committed) == (850, 50, 150)
    # It holds 50 of the pool: T = 2 * 10 + 50.
    assert ledger.threshold(a, ledger.draw(a, 10)) == 70
    assert ledger.most(a) == 100 + 450
    assert ledger.available(b) == 425
    assert ledger.most_alone(b) == 900


def test_a_reserved_draw_needs_nothing_even_when_nothing_is_free() -> None:
    ledger = Ledger(1000)
    a = ledger.account("a", minimum=100)
    ledger.request(Request(a, 0, Kind.ENTER))
    ledger.observe(5000, pressed=True, look_after=NO_LIMIT >> 1)
    assert ledger.free == 1000 - 100 - 4900
    assert ledger.admit(a, 100)
    assert not ledger.admit(a, 1)


def test_drift_and_its_high_water_mark() -> None:
    ledger = Ledger(1000, baseline=100)
    a = ledger.account("a")
    assert ledger.admit(a, 300)
    ledger.give_back(a, 300)
    assert ledger.highest_committed == 300
    ledger.observe(450, pressed=False, look_after=100)
    assert (ledger.drift, ledger.free) == (50, 850)
    ledger.observe(960, pressed=True, look_after=100)
    assert (ledger.drift, ledger.free, ledger.highest_committed) == (860, 40, 0)


def test_a_reading_is_due_after_so_much_has_moved() -> None:
    ledger = Ledger(1000)
    a = ledger.account("a")
    ledger.observe(0, pressed=False, look_after=100)
    assert ledger.admit(a, 60)
    ledger.give_back(a, 30)
    assert not ledger.admit(a, 11)
    assert ledger.admit(a, 10)


def test_what_a_refusal_says() -> None:
    ledger = Ledger(1000)
    a, b = ledger.account("a", firm_limit=200), ledger.account("b")
    assert ledger.admit(a, 150)
    with pytest.raises(QuotaExceeded, match="its firm limit") as caught:
        ledger.request_nowait(Request(a, 60))
    assert caught.value.available_bytes == 50
    with pytest.raises(QuotaExceeded, match="its share of what nobody else holds") as caught:
        ledger.request_nowait(Request(b, 426))
    assert (caught.value.available_bytes, b.refusals) == (425, 1)
    waiter = waiting(ledger, a, 60)
    with pytest.raises(QuotaExceeded, match="others of the component wait"):
        ledger.request_nowait(Request(a, 1))
    assert ledger.cancel(waiter) == []
    assert ledger.admit(a, 1)
    with pytest.raises(GrantTooLarge, match="its firm limit"):
        ledger.request(Request(a, 201))
    with pytest.raises(GrantTooLarge, match="limit less baseline and the others' minimums"):
        ledger.request(Request(b, 1001, alone=True))
    with pytest.raises(GrantTooLarge, match="limit less baseline"):
        ledger.request(Request(ledger.account("c", minimum=1001), 0, Kind.ENTER))


def test_a_share_that_makes_no_sense() -> None:
    for share in (Fraction(0), Fraction(-1, 2), Fraction(3, 2)):
        with pytest.raises(InvalidLimit, match="share="):
            Ledger(1000, share=share)


def test_a_new_grant_that_makes_a_barrier_wakes_it() -> None:
    """Found by the comparison with the model: the fast path passed a barrier by."""
    ledger = Ledger(100, bypass_limit=0)
    b, c = ledger.account("b"), ledger.account("c")
    assert ledger.admit(b, 3)
    assert all(ledger.admit(c, nbytes) for nbytes in (13, 30, 4, 1))
    request = waiting(ledger, c, 1)
    grow = waiting(ledger, c, 14, kind=Kind.GROW, held=1)
    assert ledger.give_back(c, 13) == []
    assert not ledger.admit(b, 1)
    new = Request(b, 1)
    assert ledger.request(new) == [new, request]
    assert grow.state is State.WAITING


def test_a_barrier_that_became_impossible_leaves_the_pool_open() -> None:
    """Likewise: the pool stayed closed after its barrier was gone."""
    ledger = Ledger(8, share=Fraction(2, 3), bypass_limit=0)
    a, b, c = (ledger.account(name) for name in "abc")
    assert ledger.admit(a, 1)
    assert ledger.admit(c, 2)
    barrier = waiting(ledger, c, 3)
    ledger.request(Request(b, 1))
    assert barrier.barrier
    assert ledger.resize(1) == [barrier]
    assert barrier.state is State.IMPOSSIBLE
    ledger.resize(6)
    ledger.request_nowait(Request(b, 1))


def test_many_waiters_that_go_in_any_order_leave_nothing() -> None:
    ledger = Ledger(1000)
    holder = ledger.account("holder")
    assert ledger.admit(holder, 500)
    accounts = [ledger.account(str(number)) for number in range(100)]
    requests = [Request(accounts[number % 100], 400) for number in range(20_000)]
    for request in requests:
        ledger.request(request)
    assert ledger.waiters.count == 20_000
    Random(1).shuffle(requests)
    for request in requests:
        assert ledger.cancel(request) == []
    assert ledger.waiters.count == 0
    assert all(account.queue is None for account in accounts)
    # What is out of date in the heaps is swept out, however often heads come and go.
    assert len(ledger.waiters._ranks) <= 300
    assert len(ledger.waiters._ages) <= 500


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_ledger_decides_like_the_model(seed: int) -> None:
    """Longer: ``python -m tests.fuzz_ledger --steps 1000000``."""
    assert fuzz(12_000, seed, LedgerAdapter) is None
