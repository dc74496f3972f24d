"""bus1's arithmetic and its promises: `tests.bus1` beside the ledger, and by property."""

from __future__ import annotations

from fractions import Fraction
from math import floor
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from membound_async.exceptions import GrantTooLarge, QuotaExceeded
from membound_async.ledger import Account, Ledger
from membound_async.waiters import Request
from tests import fuzz_bus1
from tests.bus1 import DEFAULTS, RESOURCES, Kernel, Receiver, Refused
from tests.fuzz_bus1 import Both, Unequal, fuzz

SHARES = st.sampled_from([Fraction(1, 2), Fraction(1, 3), Fraction(2, 3), Fraction(3, 7)])
FLOODS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 400)), max_size=40)
"""Which receiver, which sender, and how much of what it can have, in 1/400."""
EXAMPLES = settings(max_examples=60, deadline=None)


def send(ledger: Ledger, account: Account, name: object, nbytes: int, **also: int) -> bool:
    """Send at once, or find that it is refused."""
    sender = ledger.sender(account, name)
    try:
        ledger.request_nowait(Request(account, nbytes, also=also, sender=sender))
    except (GrantTooLarge, QuotaExceeded):
        return False
    return True


def room(ledger: Ledger, account: Account, name: object) -> int:
    return ledger.available(account, ledger.sender(account, name))


def flood(ledger: Ledger, accounts: list[Account], floods: list[tuple[int, int, int]]) -> int:
    """Have senders fill receivers; give how many receivers and senders took anything, at most."""
    for receiver, name, part in floods:
        account = accounts[receiver % len(accounts)]
        nbytes = room(ledger, account, name) * part // 400
        assert send(ledger, account, name, nbytes)
    return max([len(account.by_sender) for account in accounts], default=0)


# --- beside the kernel's own arithmetic


def test_the_ledger_does_as_bus1_in_hundreds_of_sequences():
    seen = fuzz(200, 1)
    assert {"admitted", "sent", "refused", "delivered", "released"} == set(seen)


def test_the_kernel_by_hand():
    kernel = Kernel({**DEFAULTS, "bytes": 1024})
    kernel.receivers = {"a": Receiver(), "b": Receiver(firm=dict.fromkeys(RESOURCES, 100))}
    with pytest.raises(Refused):
        kernel.charge("a", {"bytes": 257}, "x")
    kernel.charge("a", {"bytes": 256}, "x")  # half of half
    with pytest.raises(Refused):
        kernel.charge("a", {"bytes": 129}, "y")
    kernel.charge("a", {"bytes": 128}, "y")
    with pytest.raises(Refused):
        kernel.charge("b", {"bytes": 51}, "x")
    kernel.charge("b", {"bytes": 50, "fds": 1}, "x")
    kernel.deliver("b", {"bytes": 50, "fds": 1}, "x", {"bytes": 50, "fds": 0})
    assert kernel.free("bytes") == 1024 - 256 - 128 - 50
    assert (kernel.free("fds"), kernel.receivers["b"].granted["bytes"]) == (4096, 50)
    with pytest.raises(Refused):
        kernel.charge("b", {"bytes": 26}, "x")  # half of what is left up to the firm limit
    kernel.charge("b", {"bytes": 50}, None)
    kernel.release("b", {"bytes": 100}, None)


def test_the_driver_from_a_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert fuzz_bus1.main(["--sequences", "3", "--seed", "5"]) == 0
    assert capsys.readouterr().out.startswith("3 sequences, seed 5: no difference")
    monkeypatch.setattr(Kernel, "allows", lambda *_: True)
    assert fuzz_bus1.main(["--sequences", "3", "--seed", "5"]) == 1
    assert "is refused" in capsys.readouterr().err


def test_a_ledger_that_charges_in_part_is_found(monkeypatch: pytest.MonkeyPatch):
    def charge_in_part(self: Ledger, request: Request) -> list[Request]:
        try:
            return whole(self, request)
        except QuotaExceeded:
            if request.sender is not None and request.also:
                self._add(request.account, request.nbytes, request.sender)
                self._add(request.account, -request.nbytes, None)
            raise

    whole = Ledger.request_nowait
    monkeypatch.setattr(Ledger, "request_nowait", charge_in_part)
    with pytest.raises((Unequal, AssertionError)):
        fuzz(50, 1)


# --- what bus1 promises


@EXAMPLES
@given(st.integers(0, 1 << 30))
def test_what_was_sent_can_always_be_received(seed: int):
    """Delivery never fails, leaves no less free, and keeps every firm limit; in any order."""
    both = Both(Random(seed))
    for _ in range(25):
        both.send()
    for message in [each for each in both.messages if each.sender is not None]:
        both.deliver(message)  # checks all of that
    assert all(not account.by_sender for account in both.ledger.accounts.values())


@EXAMPLES
@given(SHARES, FLOODS, st.lists(st.integers(0, 60), max_size=20))
def test_what_is_in_flight_never_exceeds_what_the_receiver_may_have(
    share: Fraction, floods: list[tuple[int, int, int]], numbers: list[int]
):
    """The sum over the senders: ``S <= share*(R + s)`` in each resource, and ``g + S <= F``."""
    ledger = Ledger(1000, share=share, others={"fds": 64})
    account = ledger.account("receiver", 0, 300, others={"fds": 20})
    flood(ledger, [account], floods)
    for name, number in enumerate(numbers):
        send(ledger, account, name, 1, fds=number)
        for stock, pool in ((account, ledger), (account.others["fds"], ledger.pools["fds"])):
            assert stock.in_flight == sum(
                each.held.get(stock, 0) for each in account.by_sender.values()
            )
            assert stock.in_flight <= share * (pool.free + stock.held)
            assert stock.granted + stock.in_flight <= stock.firm_limit


@EXAMPLES
@given(SHARES, FLOODS, st.integers(0, 300))
def test_a_sender_that_floods_leaves_the_others_their_share(
    share: Fraction, floods: list[tuple[int, int, int]], others: int
):
    """With J senders that flood, each other one can still have ``share * (1 - share)**J * Q``.

    ``Q = share * (L - H)`` is the receiver's quota while others hold H. The last of the J to
    take anything had ``s_i <= share * (Q - S')``, S' being what the others of them have. So
    ``Q - S' - s_i >= (1 - share) * (Q - S')``; by induction at least ``(1 - share)**J * Q`` is
    left by all of them, in whatever order and however often they take, and of that a sender
    that has nothing may have its share: for 1/2, half of Q after none, 1/4 after one, 1/8.
    """
    ledger = Ledger(1000, share=share)
    ledger.force(Request(ledger.account("other"), others))
    receiver = ledger.account("receiver")
    flooding = flood(ledger, [receiver], floods)
    quota = share * (1000 - others)
    assert room(ledger, receiver, "quiet") >= floor(share * (1 - share) ** flooding * quota)


@EXAMPLES
@given(SHARES, FLOODS)
def test_a_receiver_that_never_dequeues_leaves_the_others_their_share(
    share: Fraction, floods: list[tuple[int, int, int]]
):
    """With M receivers that dequeue nothing, another's first sender can still have

    ``share**2 * (1 - share)**M * L``: what is in flight to one receiver is at most its quota
    ``share * (R + s)``, so it leaves ``(1 - share)`` of what the others do not hold; by
    induction ``R >= (1 - share)**M * L``, and of that a receiver that has nothing may have
    ``share``, and its first sender ``share`` of that. It holds for senders that flood others.
    """
    ledger = Ledger(1000, share=share)
    stuck = [ledger.account(name) for name in ("a", "b", "c")]
    flood(ledger, stuck, floods)
    filled = sum(account.in_flight > 0 for account in stuck)
    assert ledger.free >= (1 - share) ** filled * 1000
    least = floor(share * share * (1 - share) ** filled * 1000)
    assert all(room(ledger, ledger.account("quick"), name) >= least for name in range(4))


@pytest.mark.parametrize("lacking", RESOURCES)
@pytest.mark.parametrize("name", [None, "x", "new"])
def test_a_refused_request_changes_nothing_in_any_resource(lacking: str, name: str | None):
    """Whichever of the resources is refused, last or first, those before it are not charged."""
    ledger = Ledger(64, others=dict.fromkeys(RESOURCES[1:], 64))
    account = ledger.account("receiver")
    assert send(ledger, account, "x", 3, slices=3, handles=3, fds=3)
    wanted = 30 if name is None else 15
    amounts = {**dict.fromkeys(RESOURCES, 1), lacking: wanted}
    also = {resource: amount for resource, amount in amounts.items() if resource != "bytes"}
    sender = None if name is None else ledger.sender(account, name)

    def state() -> object:
        return (
            [(pool.free, pool._lowest_free, pool.order.passed) for pool in ledger.pools.values()],
            [
                (stock.resource, stock.granted, stock.in_flight, stock.excess, stock.senders)
                for stock in account.stocks()
            ],
            [(each.name, each.held.copy()) for each in account.by_sender.values()],
            (account.admissions, account.peak, ledger.moved, ledger.waiters.count),
        )

    before = state()
    with pytest.raises(QuotaExceeded) as caught:
        ledger.request_nowait(Request(account, amounts["bytes"], also=also, sender=sender))
    assert state() == before
    assert (caught.value.wanted_bytes, caught.value.resource) == (wanted, lacking)
