"""Several resources, senders and groups: the fuzzer of them, and what it has found."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from membound_async.ledger import Ledger
from membound_async.waiters import Kind, Request, State
from tests.divisions import World
from tests.fuzz_resources import Broken, Config, Operation, Watched, fuzz, main, replay

HALF = Fraction(1, 2)
TWO = (("a", 0, (), None), ("b", 0, (), None))

PROGRAMS: dict[str, tuple[Config, list[Operation]]] = {
    "a barrier closes all pools that it draws on, that of fds": (
        Config(100, bypass=0, others=(("fds", 8),), components=(*TWO, ("c", 0, (), None))),
        [
            ("ask", 1, "a", None, (("bytes", 50),)),
            ("ask", 2, "b", None, (("bytes", 30), ("fds", 4))),
            ("ask", 3, "c", None, (("bytes", 1),)),  # makes a barrier of 2
            ("ask", 4, "c", None, (("fds", 1),)),
            ("now", 5, "c", None, (("fds", 2),)),
        ],
    ),
    "a barrier closes all pools that it draws on, that of bytes": (
        Config(100, bypass=None, others=(("fds", 8),), components=(*TWO, ("c", 0, (), None))),
        [
            ("ask", 1, "a", None, (("fds", 4), ("bytes", 40))),
            ("ask", 2, "b", None, (("bytes", 30), ("fds", 3))),
            *[("ask", 10 + n, "c", None, (("fds", 1),)) for n in range(2)],
            *[
                operation
                for n in range(20, 30)
                for operation in (
                    ("ask", n, "c", None, (("bytes", 1), ("fds", 1))),
                    ("back", n, ()),
                )
            ],
        ],
    ),
    "with Polynomial, a barrier will have less with one more consumer": (
        Config(102, None, bypass=25, others=(("fds", 12),), components=TWO),
        [
            ("ask", 35, "b", None, (("bytes", 25),)),
            ("ask", 36, "b", "x", (("bytes", 12),)),
            ("ask", 38, "a", "y", (("bytes", 11),)),
            ("ask", 40, "b", "x", (("bytes", 9), ("fds", 2))),
            ("back", 35, ()),
            ("ask", 42, "a", "y", (("bytes", 3),)),
            ("ask", 43, "b", "z", (("bytes", 4),)),
            ("deliver", 36, ()),
            ("grow", 45, 36, 5),
            ("back", 36, ()),
            ("ask", 47, "b", "z", (("bytes", 3),)),
            ("ask", 53, "a", "x", (("fds", 1),)),
        ],
    ),
    "with Polynomial, one sender less is more for the others": (
        Config(400, None, 80, groups=((("bytes", 200),),), components=(("a", 68, (), 0),)),
        [
            ("ask", 7, "a", "z", (("bytes", 1),)),
            ("now", 10, "a", "y", (("bytes", 0),)),
            ("enter", 11, "a"),
            ("grow", 12, 10, 23),
            ("ask", 15, "a", None, (("bytes", 18),)),
            ("ask", 17, "a", None, (("bytes", 25),)),
            ("ask", 38, "a", None, (("bytes", 92),)),
            ("back", 7, ()),
        ],
    ),
    "what is in flight is held of the pool": (
        Config(44, HALF, 8, bypass=0, others=(("fds", 12),)),
        [
            ("ask", 1, "a", "x", (("fds", 1),)),
            ("ask", 3, "a", "z", (("bytes", 6), ("fds", 3))),
            ("ask", 5, "a", "x", (("bytes", 7),)),
            ("back", 1, ()),
        ],
    ),
    "an entry is ranked beside the component's senders": (
        Config(12, Fraction(2, 3), components=(("c", 0, (), None), ("d", 3, (), None))),
        [
            ("observe", 7, ()),
            ("ask", 44, "c", "z", (("bytes", 1),)),
            ("ask", 45, "d", "x", (("bytes", 1),)),
            ("ask", 52, "c", None, (("bytes", 1),)),
            ("enter", 53, "d"),
            ("grow", 59, 45, 1),
            ("ask", 60, "d", "x", (("bytes", 1),)),
        ],
    ),
    "an entry makes senders impossible": (
        Config(12, Fraction(2, 3), components=(("c", 3, (("bytes", 4),), None),)),
        [
            ("observe", 14, ()),
            ("ask", 61, "c", "x", (("bytes", 1),)),
            ("ask", 65, "c", "x", (("bytes", 1),)),
            ("enter", 79, "c"),
        ],
    ),
    "with Polynomial, a transfer is decided with its source taken out": (
        Config(13, None, 2, components=TWO),
        [("ask", 1, "a", None, (("bytes", 4),)), ("transfer", 5, 1, "b")],
    ),
    "a transfer leaves room at its source's firm limit": (
        Config(100, HALF, components=(("a", 0, (), None), ("b", 0, (("bytes", 20),), None))),
        [
            ("ask", 1, "b", None, (("bytes", 15),)),
            ("ask", 2, "b", None, (("bytes", 10),)),
            ("ask", 3, "b", "x", (("bytes", 1),)),
            ("transfer_now", 4, 1, "a"),
            ("ask", 5, "b", None, (("bytes", 15),)),
            ("transfer", 6, 2, "a"),
        ],
    ),
    "a threshold of -1 is one": (
        Config(20, Fraction(1), components=(("a", 0, (), None), ("b", 1, (), None))),
        [
            ("enter", 9, "b"),
            ("ask", 1, "a", None, (("bytes", 5),)),
            ("ask", 2, "a", None, (("bytes", 14),)),
            ("resize", 17),
            ("transfer_now", 3, 1, "b"),
            ("transfer", 4, 1, "b"),
        ],
    ),
    "a firm limit of what nothing else limits": (
        Config(103, Fraction(1), components=(("b", 0, (("slices", 8),), None),)),
        [
            ("ask", 6, "b", None, (("slices", 6),)),
            ("ask", 42, "b", "z", (("slices", 3),)),
            ("ask", 43, "b", "y", (("bytes", 1), ("slices", 4))),
            ("back", 6, ()),
        ],
    ),
    "who wants no bytes does not wait for them": (
        Config(42, None, others=(("fds", 30),)),
        [
            ("ask", 10, "a", "y", (("bytes", 2),)),
            ("declare", "a", 0, (("bytes", 1),)),
            ("ask", 39, "a", None, (("fds", 1),)),
            ("ask", 40, "a", None, (("bytes", 1),)),
            ("ask", 41, "a", "z", (("slices", 1),)),
            ("ask", 43, "a", "z", (("fds", 1),)),
            ("ask", 44, "a", "z", (("bytes", 0),)),
        ],
    ),
    "what a transfer frees changes with its source": (
        Config(
            100,
            components=(("a", 10, (), None), *((name, 0, (), None) for name in "bcde")),
        ),
        [
            ("enter", 9, "a"),
            ("ask", 1, "a", None, (("bytes", 10),)),
            ("ask", 2, "c", None, (("bytes", 45),)),
            ("ask", 3, "d", None, (("bytes", 22),)),
            ("ask", 4, "e", None, (("bytes", 9),)),
            ("transfer", 5, 1, "b"),  # needs 20 of 14, and 10 once it is out of a's reserve
            ("leave", "a"),
        ],
    ),
    "what is reserved is not left for senders up to the firm limit": (
        Config(100, components=(("b", 10, (("bytes", 20),), None),)),
        [
            ("enter", 9, "b"),
            ("now", 1, "b", "x", (("bytes", 5),)),
            ("now", 2, "b", "y", (("bytes", 3),)),
            ("ask", 3, "b", "y", (("bytes", 3),)),
        ],
    ),
    "two ranked in one stock wait each for its pool": (
        Config(
            101,
            Fraction(1, 3),
            20,
            bypass=0,
            groups=((("bytes", 200),),),
            components=(("a", 32, (), 0),),
        ),
        [
            ("ask", 25, "a", None, (("bytes", 13),)),
            ("ask", 26, "a", "x", (("bytes", 5),)),
            ("now", 27, "a", None, (("bytes", 1),)),
            ("enter", 28, "a"),
            ("ask", 34, "a", "y", (("bytes", 1),)),
        ],
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_was_wrong_once(name: str):
    replay(*PROGRAMS[name])


@pytest.mark.parametrize("seed", [1, 2])
def test_many_steps_are_legal_and_leave_nobody_behind(seed: int):
    assert fuzz(2_000, seed) is None


# --- by hand


def asked(
    ledger: Ledger, name: str, nbytes: int, sender: str | None = None, **also: int
) -> Request:
    account = ledger.account(name)
    who = None if sender is None else ledger.sender(account, sender)
    request = Request(account, nbytes, also=also, sender=who)
    ledger.request(request)
    return request


def test_a_sender_s_request_that_waited_for_the_firm_limit_counts_again():
    ledger = Ledger(100, bypass_limit=10)
    receiver = ledger.account("a", 0, 20)
    first = asked(ledger, "a", 8, "y")
    for name, nbytes in (("b", 46), ("c", 23), ("e", 4)):
        assert asked(ledger, name, nbytes).state is State.ADMITTED
    waiting = asked(ledger, "a", 7, "x")  # may have 6 of the 12 that are left
    for _ in range(2):
        assert asked(ledger, "d", 9).state is State.ADMITTED
        ledger.give_back(ledger.account("d"), 9)
    assert (waiting.state, waiting.barrier, waiting in ledger.waiters.counting) == (
        State.WAITING,
        False,
        False,
    )
    assert ledger.give_back(receiver, 8, sender=first.sender) == []
    assert (ledger.free, ledger.missing(waiting)) == (27, 4 * 7 - 27)
    for _ in range(2):
        assert not waiting.barrier
        asked(ledger, "d", 6)
        ledger.give_back(ledger.account("d"), 6)
    assert waiting.barrier


def test_of_many_at_the_firm_limit_each_counts_again_in_turn():
    ledger = Ledger(1000)
    receiver = ledger.account("a", 0, 20)
    first = asked(ledger, "a", 8, "y")
    waiting = [asked(ledger, "a", 7, name) for name in ("x", "z", "w")]
    for name, nbytes in (
        ("b", 496),
        ("c", 248),
        ("d", 124),
        ("e", 62),
        ("f", 31),
        ("g", 9),
        ("h", 3),
    ):
        assert asked(ledger, name, nbytes).state is State.ADMITTED
    assert not ledger.waiters.counting
    assert ledger.give_back(receiver, 6, sender=first.sender) == []
    counting = [1]
    for _ in range(2):
        assert ledger.give_back(receiver, 1, sender=first.sender) == []
        counting.append(len(ledger.waiters.counting))
    assert counting == [1, 2, 3]
    assert all(each.state is State.WAITING for each in waiting)


def test_a_transfer_undone_is_never_free_in_between():
    ledger = Ledger(20, share=Fraction(1), others={"fds": 4})
    grant = asked(ledger, "a", 10, fds=3)
    transfer = Request(ledger.account("b"), 10, also={"fds": 3}, source=grant.account)
    assert ledger.request(transfer) == [transfer]
    assert ledger.undo(transfer) == ()
    assert (grant.account.granted, transfer.account.granted, ledger.free) == (10, 0, 10)
    again = Request(ledger.account("b"), 10, also={"fds": 3}, source=grant.account)
    assert ledger.request_nowait(again) == []
    waiting = asked(ledger, "c", 15)
    assert ledger.undo(again) == []
    assert (waiting.state, ledger.free, ledger.pools["fds"].free) == (State.WAITING, 10, 1)
    assert ledger.give_back(grant.account, 10, also={"fds": 3}) == [waiting]


# --- the checker must find what is wrong


class Forgetful(Watched):
    """Does not look again at those at the firm limit."""

    def _place(self, account: Any) -> None:
        if not account.by_sender:
            super()._place(account)


class Generous(Watched):
    """Gives senders what the component may have."""

    def _inner(self, request: Request, stock: Any, amount: int) -> int:
        if request.sender is None or request.kind is Kind.ENTER or not amount:
            return super()._inner(request, stock, amount)
        return amount * self._unit


@pytest.mark.parametrize(
    ("make", "says"), [(Forgetful, "could go on"), (Generous, "admitted: over")]
)
def test_a_broken_ledger_is_found_and_the_operations_are_few(make: type[Watched], says: str):
    found = fuzz(20_000, 3, make)
    assert found is not None
    assert says in found
    lines = [line for line in found.splitlines() if line.startswith("    (")]
    assert 1 <= len(lines) <= 12
    program, names = found.partition("\n")[2], {"Config": Config, "Fraction": Fraction}
    exec(program, names | {"replay": replay})
    with pytest.raises(Broken):
        exec(program, names | {"replay": lambda config, done: replay(config, done, make)})


def test_the_driver_from_a_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert main(["--steps", "200", "--seed", "5"]) == 0
    assert capsys.readouterr().out.startswith("200 steps, seed 5: nothing wrong")
    monkeypatch.setattr(World, "fits", lambda *_: True)
    assert main(["--steps", "2000", "--seed", "5"]) == 1
    assert "are available to" in capsys.readouterr().err
