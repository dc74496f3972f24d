"""The fast path: in C and in Python the same, exact beside other threads, and without leaks.

Run as a program, this file plays random operations and prints what came of them; the tests do
so with the extension and without, and compare.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import threading
import time
import tracemalloc
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from random import Random
from typing import Any

import pytest

from membound_async import (
    Component,
    GrantReleased,
    GrantTimeout,
    GrantTooLarge,
    LimiterSettings,
    MemoryGrant,
    MemoryLimiter,
    PressurePolicy,
    QuotaExceeded,
    fastpath,
    grant,
    testing,
)
from membound_async.ledger import Account, Ledger
from membound_async.waiters import Kind, Request

extension_only = pytest.mark.skipif(not fastpath.EXTENSION, reason="the extension is not built")

# Nothing but the operations decides what happens: no yield, no reading and no look
# for a deadlock in between, however long it takes.
UNTIMED = LimiterSettings(
    yield_after_seconds=1e6,
    pressure=PressurePolicy(min_interval_seconds=1e6, max_interval_seconds=1e6),
)


# --- the same operations, with the extension and without ------------------------------------


class _Wrong(Exception):
    pass


async def _play(seed: int) -> list[str]:
    """Let tasks do random things with one small limiter; give what is seen from time to time."""
    random = Random(seed)
    share = random.choice([Fraction(1, 2), Fraction(1, 3), Fraction(5, 7), 1])
    limiter = testing.limiter(10_000, share=share, settings=UNTIMED)
    components = [
        limiter.component("plain"),
        limiter.component("firm", firm_limit=2000),
        limiter.component("small", minimum=1500, firm_limit=1800),
        limiter.component("inner.most", minimum=100),
    ]
    seen: list[str] = []
    tasks: list[asyncio.Task[None]] = []

    def note(what: object) -> None:
        seen.append(str(what))

    def look() -> None:
        gc.collect()  # only here, for how much there is to collect differs
        statistics = limiter.statistics()
        note((statistics.free_bytes, statistics.committed_bytes, statistics.grants))
        for one in statistics.components:
            note(
                tuple(
                    getattr(one, field) for field in type(one).__slots__ if "seconds" not in field
                )
            )

    async def use(random: Random, component: Component, depth: int) -> None:
        nbytes = int(2 ** random.uniform(0, 12)) - 1
        match random.randrange(12):
            case 0:
                held = component.grant_nowait(nbytes)
                await _pause(random)
                held.release()
                held.release()
            case 1:
                held = await component.grant(nbytes, up_to=nbytes + 1000)
                note(held.size)
                await _pause(random)
                held.release()
            case 2:
                async with component, component.grant(nbytes):
                    await _pause(random)
            case 3:
                async with component.grant(nbytes, timeout=0):
                    await _pause(random)
            case 4:
                held = await component.grant(nbytes)
                del held  # given back by its finaliser
            case 5:
                async with component.grant(nbytes) as held:
                    held.shrink(nbytes // 2)
                    await _pause(random)
                    held.grow_nowait(100)
                    held.release()
            case 6:
                async with component.grant(nbytes):
                    raise _Wrong
            case 7 if tasks:
                random.choice(tasks).cancel()
            case 8:
                held = component.grant(nbytes)
                async with held, held:
                    await _pause(random)
                assert held.released
                async with held:
                    pytest.fail("it was released")
            case _:
                async with component.grant(nbytes) as held:
                    note((component.path, held.size))
                    await _pause(random)
                    if depth:
                        await use(random, random.choice(components), depth - 1)

    async def work(seed: float) -> None:
        random = Random(seed)
        for _ in range(30):
            try:
                await use(random, random.choice(components), depth=2)
            except (GrantTooLarge, QuotaExceeded, GrantTimeout, GrantReleased, _Wrong) as error:
                note(type(error).__name__)
                if not isinstance(error, GrantTimeout):  # which says how long
                    note(error)

    tasks += [asyncio.create_task(work(random.random())) for _ in range(6)]
    for turn in range(200):
        await asyncio.sleep(0)
        if turn % 20 == 19:
            look()
            ledger = limiter._ledger
            live = [(components[2]._account, random.randrange(1700))]
            ledger.observe(ledger.measured, pressed=False, look_after=ledger.limit, live=live)
            limiter.resize(random.choice([6000, 10_000, 20_000]))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0)
    look()
    note(limiter._ledger.moved)
    return seen


async def _pause(random: Random) -> None:
    for _ in range(random.randrange(3)):
        await asyncio.sleep(0)


def _program(*arguments: str, extension: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore::ResourceWarning", *arguments],
        env={**os.environ, "MEMBOUND_EXTENSION": extension},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    return ended.stdout


@pytest.mark.slow
@extension_only
def test_the_same_happens_without_the_extension() -> None:
    in_c = json.loads(_program(__file__, "0", "15", extension="yes"))
    in_python = json.loads(_program(__file__, "0", "15", extension="no"))
    assert (in_c.pop("extension"), in_python.pop("extension")) == (True, False)
    assert in_c == in_python
    assert sum(map(len, in_c.values())) > 1000  # something has happened


@extension_only
@pytest.mark.parametrize(
    ("setting", "missing", "shown"),
    [
        ("", False, "True"),
        ("no", False, "False"),
        ("", True, "False"),
        ("yes", True, "ImportError"),
    ],
)
def test_whether_it_is_used(setting: str, missing: bool, shown: str) -> None:
    program = (
        "import sys\n"
        f"if {missing}: sys.modules['membound_async._fast'] = None\n"
        "try: from membound_async.fastpath import EXTENSION as found\n"
        "except ImportError: found = 'ImportError'\n"
        "print(found)"
    )
    assert _program("-c", program, extension=setting).strip() == shown


# --- one step beside the same step of the ledger ------------------------------------------


class _Grant(fastpath.GrantState):
    """A grant that gives up where the fast path ends."""

    __slots__ = ()

    async def _acquire(self, holder: object = None) -> Any:
        return None

    def _release(self) -> None:
        raise _Wrong

    def _lost(self) -> None:
        raise _Wrong


def _grant(component: Any, nbytes: int = 10, *options: Any) -> Any:
    return _Grant(component, nbytes, *options)


class _Limiter(fastpath.LimiterState):
    """As much of a limiter as the fast path needs."""

    def __init__(self, ledger: Ledger) -> None:
        self._lock = threading.Lock()
        self._ledger = ledger
        self._loop_token = asyncio.get_running_loop()
        self._now = time.monotonic
        self._calm_until = float("inf")

    def _admit(self, account: Account, nbytes: int) -> bool:
        with self._lock:
            return self._ledger.admit(account, nbytes)


def _node(limiter: _Limiter, account: Account) -> Any:
    """Give as much of a component as the fast path needs."""
    return types.SimpleNamespace(_limiter=limiter, _account=account)


def _numbers(ledger: Ledger) -> tuple[Any, ...]:
    accounts = ledger.accounts.values()
    return (
        (ledger.free, ledger._lowest_free, ledger.moved, ledger._closed),
        [(a.granted, a.excess, a.reserved, a.live, a.peak, a.admissions) for a in accounts],
    )


def _held(ledger: Ledger) -> set[Any]:
    for account in ledger.accounts.values():
        assert account.holders.count == len(account.holders.snapshot())
    return {one for account in ledger.accounts.values() for one in account.holders.snapshot()}


SHARES = [Fraction(1, 2), Fraction(1), Fraction(1, 3), Fraction(2**61 - 1, 2**62 - 1)]
LIMITS = [30, 10**6, 2**53, 2**60]


@extension_only
@pytest.mark.parametrize("share", SHARES, ids=str)
@pytest.mark.parametrize("limit", LIMITS)
def test_a_step_is_that_of_the_ledger(share: Fraction, limit: int) -> None:
    random = Random(f"{share} {limit}")
    answers = Counter[bool]()

    async def episode() -> None:
        fast, slow = twins = [Ledger(limit, baseline=limit // 10, share=share) for _ in "12"]
        for ledger in twins:
            ledger.account("a")
            ledger.account("b", firm_limit=limit // 5)
            ledger.account("c", minimum=limit // 7)
            ledger.request(Request(ledger.account("c"), 0, Kind.ENTER))
        limiter = _Limiter(fast)
        held: list[tuple[Any, Account]] = []
        for _ in range(60):
            name = random.choice("abc")
            if random.random() < 0.1:
                live = random.randrange(limit // 3)
                for ledger in twins:
                    ledger.observe(
                        0, pressed=False, look_after=limit // 2, live=[(ledger.account(name), live)]
                    )
            if held and random.random() < 0.4:
                one, account = held.pop(random.randrange(len(held)))
                slow.give_back(account, one._size)
                await one.__aexit__(None, None, None)
            else:
                one = _grant(_node(limiter, fast.account(name)), 0)
                one._wanted = random.choice([0, 1, limit // 5, random.randrange(limit)])
                admitted = slow.admit(slow.account(name), one._wanted)
                assert (await one is one) == admitted
                answers[admitted] += 1
                if admitted:
                    held.append((one, slow.account(name)))
            assert _numbers(fast) == _numbers(slow)
            assert _held(fast) == {one for one, _ in held}
        for one, _ in held:
            await one.__aexit__(None, None, None)
        assert fast.committed == sum(max(a.live, a.reserved) for a in fast.accounts.values())

    for _ in range(20):
        asyncio.run(episode())
    assert min(answers.values()) > 100


def _run(function: Callable[[], Any]) -> Any:
    return asyncio.run(function())


@extension_only
def test_when_there_is_no_fast_path() -> None:
    async def main() -> None:
        def fresh() -> tuple[_Limiter, Account, Any]:
            limiter = _Limiter(Ledger(1000))
            account = limiter._ledger.account("a")
            return limiter, account, _node(limiter, account)

        async def is_fast(component: Any, *options: Any) -> bool:
            one = _grant(component, 10, *options)
            fast = await one is one
            if fast:
                await one.__aexit__(None, None, None)
            return fast

        _, _, component = fresh()
        assert await is_fast(component)
        assert not await is_fast(component, (None, 1.0, False))
        assert not await is_fast(types.SimpleNamespace(_limiter=None, _account=None))
        for name, value in [
            ("_calm_until", 0.0),
            ("_loop_token", None),
            ("_now", lambda: 0.0),
            ("_lock", threading.RLock()),
            ("_ledger", object()),
        ]:
            limiter, _, component = fresh()
            setattr(limiter, name, value)
            assert not await is_fast(component), name
        for name, value in [
            ("_closed", True),
            ("_p", 2**70),
            ("_q", 2**70),
            ("_q", True),
            ("look_at", 9),
            ("moved", 2**63),
            ("waiters", None),
        ]:
            limiter, _, component = fresh()
            setattr(limiter._ledger, name, value)
            assert not await is_fast(component), name
        limiter, account, component = fresh()
        account.queue = ()  # type: ignore[assignment]
        assert not await is_fast(component)
        limiter, account, component = fresh()
        del limiter._lock
        assert not await is_fast(component)
        limiter, account, component = fresh()
        with limiter._lock:
            assert not await is_fast(component)
        one = await _grant(component, 10)
        limiter._lock.acquire()
        with pytest.raises(_Wrong):  # _release() is called, and waits for the lock
            one.__aexit__(None, None, None)
        limiter._lock.release()
        one.__aexit__(None, None, None)
        with pytest.raises(AttributeError):
            await _grant(object())

    _run(main)


@extension_only
def test_what_the_ledger_says_of_waiters_counts() -> None:
    """While others wait, the ledger's own code is asked, with the lock taken."""

    async def main() -> None:
        limiter = _Limiter(Ledger(1000))
        ledger = limiter._ledger
        ledger.waiters.count = 1
        component = _node(limiter, ledger.account("a"))
        answers: list[bool | Exception] = [True, False, _Wrong()]

        def admit(account: Account, nbytes: int) -> bool:
            assert (account, nbytes, limiter._lock.locked()) == (ledger.account("a"), 7, True)
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        ledger.admit = admit  # type: ignore[method-assign]
        one = _grant(component, 7)
        assert await one is one
        assert await _grant(component, 7) is None
        with pytest.raises(_Wrong):
            await _grant(component, 7)
        ledger.account("a").granted = 7
        with pytest.raises(_Wrong):  # _release() is called
            one.__aexit__(None, None, None)
        ledger.waiters.count = 0
        one.__aexit__(None, None, None)
        assert not limiter._lock.locked()

    _run(main)


# --- threads ------------------------------------------------------------------------------


@pytest.fixture
def busy_switching() -> Iterator[None]:
    """Have threads interrupt each other all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("limit", [10**6, 3000])
def test_exact_beside_threads(busy_switching: None, limit: int) -> None:
    """Threads lose the GIL in the middle of the ledger, where the loop must not go on."""
    limiter = testing.limiter(limit, share=1, settings=LimiterSettings(yield_after_seconds=10))
    shared = limiter.component("shared", minimum=300)
    own = limiter.component("own")
    ended = threading.Event()
    turns = [0, 0]

    def work() -> None:
        while not ended.is_set():
            with shared.grant(700), own.grant(1):
                turns[0] += 1

    async def main() -> None:
        async with shared:
            until = time.monotonic() + 1
            while time.monotonic() < until:
                for _ in range(100):
                    async with shared.grant(100), own.grant(1):
                        turns[1] += 1
                with limiter._lock:
                    ledger = limiter._ledger
                    committed = sum(
                        max(account.reserved, account.granted)
                        for account in ledger.accounts.values()
                    )
                    assert ledger.free == limit - committed
                await asyncio.sleep(0)
            ended.set()
            while any(thread.is_alive() for thread in threads):
                await asyncio.sleep(0.001)
            assert limiter.statistics().free_bytes == limit - 300
            assert limiter.statistics().grants == 0

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        asyncio.run(main())
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert shared.statistics().admissions == sum(turns)
    assert own.statistics().admissions == sum(turns)
    assert limiter.statistics().free_bytes == limit


def test_released_by_other_threads() -> None:
    def release(held: list[MemoryGrant]) -> None:
        for one in held:
            one.release()

    limiter = testing.limiter(10_000)
    component = limiter.component("a")

    async def main() -> None:
        held = [await component.grant(10) for _ in range(100)]
        threads = [threading.Thread(target=release, args=(held,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        release(held)
        for thread in threads:
            thread.join()
        assert component.statistics().granted_bytes == 0

    _run(main)


# --- a grant's life ------------------------------------------------------------------------


async def _warm(limiter: MemoryLimiter) -> None:
    """Have the limiter bound to the loop, so that the next grant is one of the fast path."""
    async with limiter.grant(1):
        pass


def test_dropped_while_it_is_held() -> None:
    async def main() -> None:
        limiter = testing.limiter(10_000, settings=UNTIMED)
        component = limiter.component("a")
        await _warm(limiter)
        one = await component.grant(10)
        assert limiter._held() == [one]
        assert limiter.statistics().grants == 1
        with pytest.warns(ResourceWarning, match="10 bytes, held> was never released"):
            del one
        assert limiter._held() == []
        assert limiter.statistics().grants == 0
        await asyncio.sleep(0)
        assert limiter.statistics().free_bytes == 10_000

        # In a cycle, and with an exception on its way.
        one = await component.grant(20)
        cycle: list[Any] = [one]
        cycle.append(cycle)
        reference = weakref.ref(one)
        del one, cycle
        assert reference() is not None
        with pytest.warns(ResourceWarning, match="20 bytes"):
            gc.collect()
        assert reference() is None
        with pytest.warns(ResourceWarning, match="30 bytes"):
            await _drop_raising(component)
        await asyncio.sleep(0)
        assert limiter.statistics().free_bytes == 10_000
        assert limiter.statistics().grants == 0

    _run(main)


async def _drop_raising(component: Component) -> None:
    async def hold() -> None:
        one = await component.grant(30)
        assert one.size == 30
        raise _Wrong

    with pytest.raises(_Wrong):
        await hold()
    gc.collect()


def test_dropped_by_a_task_that_ends_with_its_loop() -> None:
    limiter = testing.limiter(10_000, settings=UNTIMED)

    async def hold() -> None:
        one = await limiter.component("a").grant(10)
        await asyncio.sleep(3600)
        one.release()

    async def main() -> None:
        await _warm(limiter)
        asyncio.create_task(hold())  # noqa: RUF006
        await asyncio.sleep(0)
        assert limiter.statistics().grants == 1

    def run() -> None:
        _run(main)
        gc.collect()

    with pytest.warns(ResourceWarning, match="never released"):
        run()
    assert limiter.statistics().free_bytes == 10_000


def test_used_again() -> None:
    async def main() -> None:
        limiter = testing.limiter(10_000, settings=UNTIMED)
        component = limiter.component("a")
        await _warm(limiter)
        one = component.grant(10)
        async with one, one:
            assert await one is one
        assert one.released
        with pytest.raises(GrantReleased):
            await one
        with pytest.raises(GrantReleased):
            async with one:
                pass
        one.release()
        await one.__aexit__(None, None, None)
        never = component.grant(5)
        await never.__aexit__(None, None, None)
        assert never.released
        with pytest.raises(GrantReleased):
            await never
        for wrong in (-1, 2**53 + 1, 2**70):
            with pytest.raises(ValueError, match="nbytes="):
                component.grant(wrong)
        for no_size in (1.5, None, True):
            with pytest.raises(TypeError, match="nbytes"):
                component.grant(no_size)  # type: ignore[arg-type]
        async with component.grant("1KiB") as one:
            assert one.size == 1024
        assert component.statistics().admissions == 2

    _run(main)


def test_raising_and_returning_out_of_a_block() -> None:
    async def main() -> None:
        limiter = testing.limiter(10_000, settings=UNTIMED)
        component = limiter.component("a")
        await _warm(limiter)

        async def leave() -> int:
            async with component.grant(10):
                return 7

        assert await leave() == 7
        with pytest.raises(_Wrong):
            async with component.grant(10):
                raise _Wrong
        assert component.statistics().granted_bytes == 0

    _run(main)


def test_under_a_tracer() -> None:
    """An interpreter that traces awaits in another way."""
    lines = []

    def trace(frame: Any, event: str, argument: Any) -> Any:
        lines.append(event)
        return trace

    async def main() -> None:
        limiter = testing.limiter(10_000, settings=UNTIMED)
        await _warm(limiter)
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            async with limiter.grant(10) as one, await limiter.grant(20) as two:
                assert (one.size, two.size) == (10, 20)
        finally:
            sys.settrace(before)
        assert limiter.statistics().free_bytes == 10_000

    _run(main)
    assert lines


async def test_the_current_component() -> None:
    limiter = testing.limiter(10_000)
    async with limiter, limiter.component("a") as a, grant(10) as one:
        assert one.component is a
        assert a.statistics().granted_bytes == 10


def test_a_grant_may_be_subclassed() -> None:
    class Named(MemoryGrant):
        def __init__(self, component: Component, nbytes: int, name: str = "?") -> None:
            super().__init__(component, nbytes)
            self.name = name

    async def main() -> None:
        limiter = testing.limiter(10_000, settings=UNTIMED)
        await _warm(limiter)
        async with Named(limiter.component("a"), 10, "it") as one:
            assert (one.name, one.size) == ("it", 10)

    _run(main)


# --- who holds ----------------------------------------------------------------------------


def test_holders_keep_nobody_alive() -> None:
    component = testing.limiter(10_000).component("a")
    holders = fastpath.Holders()
    grants = [component.grant(n) for n in range(5)]
    for one in grants:
        holders.add(one)
        holders.add(one)
    assert sorted(one._wanted for one in holders.snapshot()) == [0, 1, 2, 3, 4]
    holders.discard(grants[2])
    holders.discard(grants[2])
    del grants[0], one
    assert sorted(one._wanted for one in holders.snapshot()) == [1, 3, 4]
    with pytest.raises(TypeError):
        holders.add(1)  # type: ignore[arg-type]
    del holders
    del grants


def test_holders_do_not_give_what_is_being_freed() -> None:
    """What is nested deeply is freed late: nobody refers to it any more, but it is there.

    And a finaliser does not see its own grant.
    """
    component = testing.limiter(10_000).component("a")
    holders = fastpath.Holders()
    seen: list[int] = []

    class Look:
        def __del__(self) -> None:
            seen.append(len(holders.snapshot()))

    nest: Any = None
    inner: Any = None
    for _ in range(300):
        inner, nest = nest, component.grant(1)
        nest._options = (Look(), inner, False)
        holders.add(nest)
    del inner, nest
    gc.collect()
    assert len(seen) == 300
    assert holders.snapshot() == []

    found: list[Any] = [None]

    class Lost(_Grant):
        __slots__ = ()

        def _lost(self) -> None:
            found[:] = holders.snapshot()

    account = types.SimpleNamespace(holders=holders)
    lost = Lost(types.SimpleNamespace(_account=account), 1)  # type: ignore[arg-type]
    lost._state = fastpath.HELD
    holders.add(lost)  # type: ignore[arg-type]
    del lost
    assert found == []


# --- numbers ------------------------------------------------------------------------------


def test_numbers_without_an_end() -> None:
    ledger = Ledger(1000)
    account = ledger.account("a")
    ledger.moved = 2**63 - 10
    ledger.force(Request(account, 100))
    assert ledger.moved >= 2**63 - 1
    ledger.give_back(account, 100)
    assert (ledger.free, account.granted) == (1000, 0)
    assert ledger.admit(account, 1) is not None


@extension_only
def test_members_refuse_what_they_cannot_be() -> None:
    ledger = Ledger(1000)
    account = ledger.account("a")
    with pytest.raises(OverflowError):
        account.granted = 2**63
    for name in ("moved", "look_at"):
        with pytest.raises(TypeError):
            setattr(ledger, name, "x")
        with pytest.raises(AttributeError):
            delattr(ledger, name)
        setattr(ledger, name, 2**80)
        assert getattr(ledger, name) == 2**63 - 1
    with pytest.raises(TypeError):
        fastpath.GrantState(1)  # type: ignore[call-arg, arg-type]
    with pytest.raises(TypeError):
        _grant(None).__aexit__()


# --- leaks --------------------------------------------------------------------------------


def test_nothing_is_left_behind() -> None:
    async def use(limiter: MemoryLimiter, times: int) -> None:
        component = limiter.component("a")
        for turn in range(times):
            async with component.grant(10), limiter.grant(20):
                pass
            one = await component.grant(5)
            one.release()
            if turn % 10 == 0:
                limiter._calm_until = 0.0  # by the slow path
                async with component.grant("1KiB"):
                    pass
                with pytest.raises(ValueError, match="negative"):
                    component.grant(-1)

    async def main() -> None:
        limiter = testing.limiter(10_000)
        await use(limiter, 300)
        gc.collect()
        objects = len(gc.get_objects())
        tracemalloc.start()
        await use(limiter, 50)
        before, _ = tracemalloc.get_traced_memory()
        await use(limiter, 3000)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert after - before < 3000  # bytes; 1 for each grant would be more
        assert abs(len(gc.get_objects()) - objects) < 50

    _run(main)


def test_cycles_through_all_of_it_are_collected() -> None:
    class Owner(Component):
        grant_of_its_own: Any = None

    async def main() -> weakref.ref[MemoryLimiter]:
        limiter = testing.limiter(10_000, settings=UNTIMED)
        await _warm(limiter)
        owner = limiter.add(Owner("owner"))
        async with owner.grant(10) as one:
            owner.grant_of_its_own = one  # type: ignore[attr-defined]
        return weakref.ref(limiter)

    reference = _run(main)
    gc.collect()
    assert reference() is None


if __name__ == "__main__":
    first, count = map(int, sys.argv[1:])
    gc.disable()
    gc.freeze()  # what was imported is garbage in none of the many collections
    found: dict[str, Any] = {"extension": fastpath.EXTENSION}
    for number in range(first, first + count):
        found[str(number)] = asyncio.run(_play(number))
    json.dump(found, sys.stdout)
