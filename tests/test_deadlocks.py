"""Deadlocks: order is suspended, then somebody is refused, and nobody who could go on."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from contextlib import AsyncExitStack
from fractions import Fraction
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import structlog
from structlog.testing import capture_logs

from membound_async import GrantDeadlock, GrantTimeout, LimiterSettings, MemoryLimiter, testing
from membound_async.deadlocks import waiting_holders
from membound_async.quota import Account, Ledger
from membound_async.testing import ScriptedProbe
from membound_async.waiters import Kind, Request, State
from tests.fuzz_deadlocks import run_program


@pytest.fixture(autouse=True)
def logs() -> Any:
    with capture_logs() as entries:
        structlog.configure()
        yield entries
    structlog.reset_defaults()


def events(logs: list[Any], name: str) -> list[Any]:
    return [entry for entry in logs if entry["event"] == f"membound.{name}"]


# --- the decision


def ledger_with(**granted: int) -> Ledger:
    ledger = Ledger(1000, share=Fraction(1))
    for name, nbytes in granted.items():
        ledger.force(Request(ledger.account(name), nbytes))
    return ledger


def asked(ledger: Ledger, name: str, nbytes: int, task: object, **options: Any) -> Request:
    request = Request(ledger.account(name), nbytes, **options)
    request.task = task
    ledger.request(request)
    assert request.state is State.WAITING
    return request


def test_who_holds_and_waits() -> None:
    ledger = ledger_with(a=500, b=400)
    a, b = ledger.accounts["a"], ledger.accounts["b"]
    second = asked(ledger, "c", 400, "second")
    first = asked(ledger, "c", 500, "first")
    outsider = asked(ledger, "c", 600, "outsider")
    waiting = ledger.waiting()
    assert waiting == [second, first, outsider]

    def find(*held: tuple[Account, object, int]) -> list[Request]:
        return waiting_holders(ledger.accounts.values(), held, waiting)

    everything = (a, "first", 300), (a, "second", 200), (b, "first", 400)
    assert find(*everything) == [second, first]
    assert find(*everything, (b, "runs", 0)) == [second, first]
    assert find(*everything[:2], (b, "runs", 400)) == []
    assert find(*everything[:2], (b, None, 400)) == []
    assert find(*everything[:2]) == []  # who was given b's bytes has not begun yet
    assert find() == []


def test_what_is_held_of_a_minimum_is_nobody_elses() -> None:
    ledger = Ledger(1000, share=Fraction(1))
    kept = ledger.account("kept", minimum=200)
    ledger.force(Request(kept, 200, Kind.ENTER))
    ledger.force(Request(kept, 150))
    a = ledger.account("a")
    ledger.force(Request(a, 700))
    held = (kept, "runs", 150), (a, "task", 700)
    mine = asked(ledger, "a", 200, "task")
    assert waiting_holders(ledger.accounts.values(), held, [mine]) == [mine]
    other = asked(ledger, "kept", 300, "other")
    assert waiting_holders(ledger.accounts.values(), held, [mine, other]) == []


def test_out_of_order_comes_who_fits_by_threshold_and_firm_limit() -> None:
    ledger = ledger_with(a=800)
    ledger.account("firm", firm_limit=100)
    ledger.force(Request(ledger.accounts["firm"], 60))
    first = asked(ledger, "b", 300, 1)
    behind = asked(ledger, "b", 100, 2)
    firm = asked(ledger, "firm", 50, 3)
    assert ledger.suspend_order([first, behind, firm]) == [behind]
    assert [r.state for r in (first, behind, firm)] == [
        State.WAITING,
        State.ADMITTED,
        State.WAITING,
    ]
    assert ledger.suspend_order([first, firm]) == []
    assert (ledger.free, ledger.waiters.count) == (40, 2)


def test_a_barrier_is_passed_and_stays_one() -> None:
    ledger = Ledger(1000, share=Fraction(1), bypass_limit=10)
    ledger.force(Request(ledger.account("a"), 800))
    barrier = asked(ledger, "b", 300, 1)
    ledger.request_nowait(Request(ledger.account("c"), 20))
    small = asked(ledger, "c", 20, 2)
    assert ledger.suspend_order([barrier, small]) == [small]
    assert barrier.barrier
    assert ledger._closed


def test_what_is_reserved_is_drawn_though_nothing_is_free() -> None:
    ledger = Ledger(1000, share=Fraction(1))
    kept = ledger.account("kept", minimum=100)
    ledger.force(Request(kept, 100, Kind.ENTER))
    ledger.force(Request(ledger.account("a"), 1000))
    assert ledger.free == -100
    ahead = asked(ledger, "kept", 200, 1)
    behind = asked(ledger, "kept", 100, 2)
    assert ledger.suspend_order([ahead, behind]) == [behind]


def test_who_could_fit_if_only_grants_were_held() -> None:
    ledger = ledger_with(a=500)
    kept = ledger.account("kept", minimum=100)
    ledger.force(Request(kept, 100, Kind.ENTER))
    ledger.observe(800, pressed=False, look_after=10_000, live=[(ledger.account("x"), 50)])
    assert ledger.free < 400
    fits = asked(ledger, "a", 400, 1)
    too_large = asked(ledger, "a", 401, 2)
    assert ledger.could_fit([fits], unreserved=False)
    assert not ledger.could_fit([too_large], unreserved=False)
    assert ledger.could_fit([too_large], unreserved=True)
    entering = Request(ledger.account("m", minimum=400), 400, Kind.ENTER)
    assert ledger.could_fit([entering], unreserved=False)
    ledger.accounts["m"].minimum = 401
    assert not ledger.could_fit([entering], unreserved=False)


# --- in programs


async def hold_and_grow(
    limiter: MemoryLimiter, name: str, first: int, more: int, into: list[Any]
) -> None:
    try:
        async with limiter.component(name).grant(first) as grant:
            await anyio.sleep(0.1)
            await grant.grow(more)
            into.append(name)
    except GrantDeadlock as error:
        into.append(error)


@pytest.mark.virtual_time
async def test_the_youngest_is_refused_and_the_other_goes_on(logs: list[Any]) -> None:
    limiter = testing.limiter(1000, share=1)
    ended: list[Any] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(hold_and_grow, limiter, "a", 400, 300, ended)
        await anyio.sleep(0.01)
        tasks.start_soon(hold_and_grow, limiter, "b", 450, 300, ended)
    error, other = ended
    assert other == "a"
    assert isinstance(error, GrantDeadlock)
    assert (error.component, error.wanted_bytes) == ("b", 300)
    assert error.holders == (("b", 450), ("a", 400))
    assert anyio.current_time() < 1
    assert limiter.statistics().free_bytes == 1000
    assert limiter.component("b").statistics().refusals == 1
    assert events(logs, "deadlock") == [
        {
            "event": "membound.deadlock",
            "log_level": "warning",
            "component": "b",
            "wanted_bytes": 300,
            "free_bytes": 150,
            "holders": [("b", 450), ("a", 400)],
        }
    ]


async def test_in_real_time_too() -> None:
    limiter = testing.limiter(1000, share=1)
    ended: list[Any] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(hold_and_grow, limiter, "a", 400, 300, ended)
        tasks.start_soon(hold_and_grow, limiter, "b", 400, 300, ended)
    assert sorted(type(each) for each in ended if not isinstance(each, str)) == [GrantDeadlock]


@pytest.mark.virtual_time
async def test_order_is_suspended_for_who_fits(logs: list[Any]) -> None:
    limiter = testing.limiter(1000, share=1)
    a, b = limiter.component("a"), limiter.component("b")
    order: list[str] = []

    async def large() -> None:
        async with a.grant(400) as grant:
            await anyio.sleep(0.1)
            await grant.grow(500)
            order.append("large")

    async def small() -> None:
        async with a.grant(300):
            await anyio.sleep(0.2)
            async with a.grant(200):  # behind the grow of its own component
                order.append("small")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(large)
        tasks.start_soon(small)
    assert order == ["small", "large"]
    assert anyio.current_time() < 1
    assert b.statistics().refusals == 0
    assert [each["admitted"] for each in events(logs, "order_suspended")] == [1]
    assert events(logs, "deadlock") == []


@pytest.mark.virtual_time
async def test_holders_come_before_others() -> None:
    limiter = testing.limiter(1000, share=1)
    a = limiter.component("a")
    order: list[str] = []

    async def ask(name: str, nbytes: int) -> None:
        async with a.grant(nbytes):
            order.append(name)
            await anyio.sleep(1)

    async def holder(name: str, first: int, more: int) -> None:
        async with a.grant(first):
            await anyio.sleep(0.1)
            await ask(name, more)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(holder, "too large", 400, 500)
        tasks.start_soon(ask, "first", 100)
        await anyio.sleep(0.01)
        tasks.start_soon(holder, "fits", 300, 150)
        await anyio.sleep(0.2)
        order.clear()
        tasks.start_soon(ask, "new", 210)
        await anyio.lowlevel.checkpoint()
    assert order.index("fits") < order.index("new")
    assert sorted(order) == ["fits", "new", "too large"]


@pytest.mark.virtual_time
async def test_one_that_waits_for_itself() -> None:
    limiter = testing.limiter(1000, share=1)
    firm = limiter.component("firm", firm_limit=100)
    async with firm.grant(80):
        with pytest.raises(GrantDeadlock, match=r"'firm' waited for 30 bytes.*'firm': 80 bytes"):
            async with firm.grant(30):
                pass
    async with limiter.grant(600):
        with pytest.raises(GrantDeadlock):
            async with limiter.component("m", minimum=500):
                pass
    assert limiter.statistics().free_bytes == 1000


@pytest.mark.virtual_time
async def test_one_that_has_the_pool_alone() -> None:
    limiter = testing.limiter(1000)
    async with limiter.component("a").grant(900, oversize="alone"):
        async with limiter.component("b").grant(50):  # T = 100
            pass
        with pytest.raises(GrantDeadlock):
            async with limiter.component("b").grant(51):
                pass


@pytest.mark.virtual_time
async def test_refused_it_may_ask_again() -> None:
    limiter = testing.limiter(1000, share=1)
    refused = 0
    async with limiter.grant(600) as grant:
        for _ in range(5):
            try:
                await grant.grow(400)
                async with limiter.grant(1):
                    pass
            except GrantDeadlock:
                refused += 1
                grant.shrink(grant.size - 600)
    assert refused == 5


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    "how", ["await", "nowait", "generator", "stack", "attribute", "closure", "entered by two"]
)
async def test_a_grant_that_others_may_give_back_rules_it_out(how: str) -> None:
    limiter = testing.limiter(1000, share=1)
    a = limiter.component("a")
    keep: list[Any] = []

    async def later(release: Any) -> None:
        await anyio.sleep(50)
        await release()

    async with anyio.create_task_group() as tasks, AsyncExitStack() as stack:
        if how == "await":
            grant = await a.grant(600)
        elif how == "nowait":
            grant = a.grant_nowait(600)
        elif how == "generator":

            async def items() -> Any:
                async with a.grant(600):
                    yield

            made = items()
            await anext(made)
            tasks.start_soon(later, made.aclose)
        elif how == "stack":
            await stack.enter_async_context(a.grant(600))
            tasks.start_soon(later, stack.pop_all().aclose)
        if how in {"await", "nowait"}:

            async def give_back() -> None:
                grant.release()

            tasks.start_soon(later, give_back)
        if how in {"await", "nowait", "generator", "stack"}:
            async with a.grant(600):
                pass
        else:

            async def blocks() -> None:
                async with a.grant(600) as held:
                    if how == "attribute":
                        keep.append(held)
                    elif how == "closure":
                        keep.append(lambda: held)
                    else:
                        tasks.start_soon(enter, held)
                        await anyio.sleep(0.1)
                    async with a.grant(600):
                        keep.append("in")

            async def enter(held: Any) -> None:
                async with held:
                    await anyio.sleep(50)

            async def release() -> None:
                held = keep.pop()
                (held() if callable(held) else held).release()

            if how != "entered by two":
                tasks.start_soon(later, release)
            await blocks()
            assert keep == ["in"]
    assert 50 <= anyio.current_time() < 51
    assert limiter.statistics().free_bytes == 1000


@pytest.mark.virtual_time
async def test_a_holder_that_does_not_wait_here_rules_it_out() -> None:
    limiter = testing.limiter(1000, share=1)

    async def child(into: list[Any]) -> None:
        async with limiter.grant(600):
            into.append("in")

    into: list[Any] = []
    with anyio.move_on_after(30) as scope:
        async with limiter.grant(600), anyio.create_task_group() as tasks:
            tasks.start_soon(child, into)  # waits for its parent, which waits for it
    assert scope.cancelled_caught
    assert into == []


@pytest.mark.virtual_time
async def test_who_gives_up_by_himself_rules_it_out() -> None:
    limiter = testing.limiter(1000, share=1)
    async with limiter.grant(600):
        with pytest.raises(GrantTimeout):
            async with limiter.grant(600, timeout=20):
                pass
        assert anyio.current_time() == pytest.approx(20)
        with anyio.move_on_after(20) as scope:
            async with limiter.grant(600):
                pass
        assert scope.cancelled_caught


@pytest.mark.virtual_time
@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_so_does_who_is_in_a_time_limit_of_asyncio() -> None:
    limiter = testing.limiter(1000, share=1)

    async def ask() -> None:
        async with limiter.grant(600):
            pass

    async with limiter.grant(600):
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(20):
                await ask()
        assert not isinstance(caught.value, GrantTimeout)
        async with asyncio.timeout(None):
            with pytest.raises(GrantDeadlock):
                await ask()


@pytest.mark.virtual_time
async def test_drift_may_go_away() -> None:
    probe = ScriptedProbe(lambda: 900 if 1 < anyio.current_time() < 30 else 0)
    limiter = testing.limiter(1000, share=1, probe=ScriptedProbe(0))
    limiter._gauge.probe = probe
    async with limiter.grant(300), limiter.component("b").grant(100):
        await anyio.sleep(2)
        async with limiter.component("c").grant(500):
            assert 30 <= anyio.current_time() < 31


@pytest.mark.virtual_time
async def test_a_minimum_may_be_given_up_until_it_is_a_stall() -> None:
    limiter = testing.limiter(1000, share=1)
    kept = limiter.component("kept", minimum=300)

    async def stay(seconds: float) -> None:
        async with kept:
            await anyio.sleep(seconds)

    for seconds in (9, 60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stay, seconds)
            await anyio.sleep(0.1)
            started = anyio.current_time()
            async with limiter.grant(600):
                if seconds == 9:
                    async with limiter.grant(200):
                        assert anyio.current_time() - started < 9
                else:
                    with pytest.raises(GrantDeadlock):
                        async with limiter.grant(200):
                            pass
                    assert 10 <= anyio.current_time() - started < 11


@pytest.mark.virtual_time
async def test_a_grant_passed_to_own_coroutines_is_not_handed_on() -> None:
    limiter = testing.limiter(1000, share=1)

    async def outer(grant: Any) -> None:
        same = grant
        await inner(same)

    async def inner(grant: Any) -> None:
        await grant.grow(100)

    async with limiter.component("a").grant(500), limiter.component("b").grant(450) as grant:
        with pytest.raises(GrantDeadlock):
            await outer(grant)


@pytest.mark.virtual_time
async def test_what_is_left_of_an_exception_does_not_hide_it() -> None:
    limiter = testing.limiter(1000, share=1)

    async def fail(grant: Any) -> None:
        try:
            raise ValueError
        except ValueError as error:
            error.__context__ = ValueError("itself")
            error.__context__.args = (error, grant)

    gc.disable()
    try:
        async with limiter.grant(600) as grant:
            await fail(grant)
            await grant.grow(400)
            with pytest.raises(GrantDeadlock):
                async with limiter.grant(1):
                    pass
    finally:
        gc.enable()


@pytest.mark.virtual_time
async def test_entering_a_grant_that_was_handed_on() -> None:
    limiter = testing.limiter(1000, share=1)
    send, receive = anyio.create_memory_object_stream[Any](1)

    async def take() -> None:
        async with await receive.receive():
            with pytest.raises(GrantDeadlock):
                async with limiter.grant(600):
                    pass

    async def give() -> None:
        await send.send(await limiter.grant(600))

    async with anyio.create_task_group() as tasks, send, receive:
        tasks.start_soon(take)
        await give()
        await anyio.sleep(5)
    assert limiter.statistics().free_bytes == 1000


@pytest.mark.virtual_time
async def test_a_cancelled_waiter_is_no_waiter() -> None:
    limiter = testing.limiter(1000, share=1)
    refused: list[Any] = []

    async def wait() -> None:
        async with limiter.component("a").grant(500):
            await anyio.sleep(0.1)
            await hold_and_grow(limiter, "b", 400, 500, refused)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.sleep(0.3)
        untangle = limiter._untangle
        looked: list[Any] = []

        def cancelled_first() -> Any:
            tasks.cancel_scope.cancel()
            looked.append(untangle())
            return looked[-1]

        limiter._untangle = cancelled_first  # type: ignore[method-assign]
        await anyio.sleep(10)
    assert looked == [([], False)]
    assert refused == []


@pytest.mark.virtual_time
@pytest.mark.parametrize(("share", "components"), [(1, 1), (1, 50), (Fraction(1, 2), 50)])
async def test_1000_tasks_growing_grants_finish(share: Any, components: int) -> None:
    limiter = testing.limiter(1_400_000, share=share, settings=LimiterSettings())
    ended: Counter[str] = Counter()

    async def work(number: int) -> None:
        component = limiter.component(f"c{number % components}")
        try:
            async with component.grant(1000 + number % 7) as grant:
                await anyio.sleep(0.01)
                for _ in range(1):
                    await grant.grow(500 + number % 11)
                    await anyio.sleep(0.01)
                ended["done"] += 1
        except GrantDeadlock:
            ended["refused"] += 1

    async with anyio.create_task_group() as tasks:
        for number in range(1000):
            tasks.start_soon(work, number)
    assert ended.total() == 1000
    assert ended["done"] > 500
    assert limiter.statistics().free_bytes == 1_400_000


@pytest.mark.parametrize("seed", ["suite 1", "suite 2", "suite 3"])
def test_no_false_alarm_in_random_programs(seed: str) -> None:
    logging.getLogger("membound_async").setLevel(logging.CRITICAL)
    total: Counter[str] = Counter()
    for number in range(100):
        total += run_program(seed, number)  # type: ignore[arg-type]
    assert total["break_deadlock"] > 20
    assert total["suspend_order"] > 10
    assert total["handing on"] > 30
