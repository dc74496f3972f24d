"""Reclaim: who is asked for memory, for how much, when, and how often; and that it is freed."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import math
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import structlog
from structlog.testing import capture_logs

import membound_async
from membound_async import (
    LimiterSettings,
    LimiterStatistics,
    MemoryLimiter,
    PressurePolicy,
    Reclaimer,
    ReclaimReentry,
    current_component,
    testing,
)
from membound_async.statistics import ReclaimerStatistics
from membound_async.testing import ScriptedProbe

PACKAGE = Path(membound_async.__file__).parent
MIB = 2**20
UNDELAYED = PressurePolicy(min_delay_seconds=0, max_delay_seconds=0)

# Of a limit of 1000 bytes: above 950 a run begins, which wants it down to 902.
LIMIT, THRESHOLD, TARGET = 1000, 950, 902


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[Any]]:
    with capture_logs() as entries:
        structlog.configure()
        yield entries
    structlog.reset_defaults()


def events(logs: list[Any], name: str) -> list[Any]:
    return [entry for entry in logs if entry["event"] == f"membound.{name}"]


class Memory:
    """Measured memory, and what it consists of."""

    def __init__(self, **parts: int) -> None:
        self.parts = dict(parts)

    def __call__(self) -> int:
        return sum(self.parts.values())

    def free(self, part: str, wanted: int) -> int:
        freed = min(self.parts[part], wanted)
        self.parts[part] -= freed
        return freed

    def limiter(self, **options: Any) -> MemoryLimiter:
        return testing.limiter(LIMIT, probe=ScriptedProbe(self), **options)


async def run_of(limiter: MemoryLimiter) -> LimiterStatistics:
    """Have memory read, and wait for the end of the run that this starts, if any."""
    async with limiter.grant(0):
        pass
    limiter.statistics()
    while limiter._reclaim.run is not None:
        await anyio.lowlevel.checkpoint()
    return limiter.statistics()


def named(limiter: MemoryLimiter, name: str) -> ReclaimerStatistics:
    (found,) = [one for one in limiter.statistics().reclaimers if one.name == name]
    return found


# --- before anybody waits long


@pytest.mark.virtual_time
@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
async def test_a_cache_shrinks_under_pressure_before_anyone_is_delayed_long(
    is_async: bool,
) -> None:
    cache: list[int] = []
    probe = ScriptedProbe(lambda: 750 * MIB + sum(cache))
    limiter = testing.limiter("1000MiB", probe=probe, settings=LimiterSettings(reclaim=False))

    def shrink(wanted: int) -> int:
        freed = 0
        while cache and freed < wanted:
            freed += cache.pop(0)
        return freed

    async def shrink_slowly(wanted: int) -> int:
        await anyio.sleep(0.001)
        return shrink(wanted)

    limiter.add_reclaimer(shrink_slowly if is_async else shrink, name="cache")
    delays: list[float] = []
    for _ in range(600):
        before = limiter.root.statistics().total_delay_seconds
        async with limiter.grant(1 * MIB):
            cache.append(1 * MIB)
            await anyio.sleep(0.01)
        delays.append(limiter.root.statistics().total_delay_seconds - before)
    # 200 MiB of cache fit below the threshold; at 201 it is asked for 48.5 MiB, and gives 49.
    assert max(delays) == pytest.approx(0.001 + 0.024 * 1 / 50)
    snapshot = limiter.statistics()
    assert snapshot.peak_measured_bytes == 951 * MIB
    assert 152 * MIB <= sum(cache) <= 200 * MIB
    cached = named(limiter, "cache")
    assert cached.runs == 1 + (600 - 201) // 49
    assert cached.freed_bytes == cached.reported_bytes == cached.runs * 49 * MIB
    assert sum(delay > 0 for delay in delays) == cached.runs
    assert cached.backed_off_seconds == cached.failures == 0


@pytest.mark.virtual_time
async def test_who_waits_is_let_in_when_memory_has_been_freed() -> None:
    memory = Memory(cache=800, rest=160)
    limiter = memory.limiter()
    limiter.add_reclaimer(lambda wanted: memory.free("cache", 10 * wanted))
    async with limiter.component("for_good").grant(1):
        async with limiter.component("a").grant(200):
            assert anyio.current_time() == 0
        assert memory() == 960 - 580


@pytest.mark.virtual_time
async def test_no_run_at_the_threshold_and_below() -> None:
    memory = Memory(cache=THRESHOLD)
    limiter = memory.limiter()
    limiter.add_reclaimer(lambda wanted: memory.free("cache", wanted))
    assert (await run_of(limiter)).reclaimers[0].runs == 0
    memory.parts["cache"] += 1
    snapshot = await run_of(limiter)
    assert snapshot.reclaimers[0].runs == 1
    assert snapshot.measured_bytes == TARGET


# --- in which order, and for how much


@pytest.fixture
def built_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have the built-in reclaimers only note that they were asked."""
    asked: list[str] = []

    def noted(name: str) -> Callable[[], int]:
        def free() -> int:
            asked.append(name)
            return 0

        return free

    monkeypatch.setattr(gc, "collect", noted("gc"))
    monkeypatch.setattr("membound_async.allocator.trim", noted("heap"))
    monkeypatch.setattr("membound_async.reclaim._malloc_trim", lambda: None)
    return asked


def asking(memory: Memory, asked: list[Any], part: str) -> Callable[[int], int]:
    def free(wanted: int) -> int:
        asked.append((part, wanted))
        return memory.free(part, wanted)

    return free


WITH_BUILT_IN = LimiterSettings(pressure=UNDELAYED)


async def test_higher_priorities_first_then_garbage_then_the_heap(built_in: list[Any]) -> None:
    memory = Memory(low=10, first=5, second=6, high=7, rest=960)
    limiter = memory.limiter(settings=WITH_BUILT_IN)
    for part, priority in (("low", -1), ("first", 0), ("high", 5), ("second", 0)):
        limiter.add_reclaimer(asking(memory, built_in, part), name=part, priority=priority)
    snapshot = await run_of(limiter)
    wanted = 988 - TARGET
    assert built_in == [
        ("high", wanted),
        ("first", wanted - 7),
        ("second", wanted - 12),
        ("low", wanted - 18),
        "gc",
        "heap",
    ]
    assert [one.name for one in snapshot.reclaimers] == [
        *("high", "first", "second", "low"),
        *("gc", "heap"),
    ]


async def test_it_stops_when_there_is_enough(built_in: list[Any]) -> None:
    memory = Memory(a=50, b=500, c=500)
    limiter = memory.limiter(settings=WITH_BUILT_IN)
    for part in "abc":
        limiter.add_reclaimer(asking(memory, built_in, part))
    assert (await run_of(limiter)).measured_bytes == TARGET
    assert built_in == [("a", 1050 - TARGET), ("b", 1000 - TARGET)]


@pytest.mark.virtual_time
async def test_what_the_heap_has_yet_to_return_is_not_asked_of_the_next(
    built_in: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(a=60, b=500, heap=0, rest=440)
    limiter = memory.limiter(settings=WITH_BUILT_IN)

    def into_the_heap(part: str) -> Callable[[int], int]:
        def free(wanted: int) -> int:
            freed = asking(memory, built_in, part)(wanted)
            memory.parts["heap"] += freed
            return freed

        return free

    monkeypatch.setattr("membound_async.allocator.trim", lambda: memory.free("heap", 1000))
    for part in "abc":
        memory.parts.setdefault(part, 0)
        limiter.add_reclaimer(into_the_heap(part), name=part)
    assert (await run_of(limiter)).measured_bytes == TARGET
    assert built_in == [("a", 98), ("b", 38)]  # neither c nor the garbage collector
    a, heap = named(limiter, "a"), named(limiter, "heap")
    assert (a.freed_bytes, a.reported_bytes, a.backed_off_seconds) == (0, 60, 0)
    assert (heap.freed_bytes, heap.reported_bytes, heap.backed_off_seconds) == (98, 98, 0)


async def test_the_built_in_ones_can_be_switched_off(built_in: list[Any]) -> None:
    memory = Memory(rest=960)
    limiter = memory.limiter(settings=LimiterSettings(pressure=UNDELAYED, reclaim=False))
    assert (await run_of(limiter)).reclaimers == ()
    limiter.add_reclaimer(asking(memory, built_in, "rest"))
    await run_of(limiter)
    assert built_in == [("rest", 58)]


# --- how often


@pytest.mark.virtual_time
async def test_a_useless_one_is_backed_off_until_it_is_of_use() -> None:
    memory = Memory(cache=1000, rest=0)
    limiter = memory.limiter()
    runs = 0
    asked: list[float] = []
    freed = 4  # of 98 that are wanted: 5 % would be 4.9

    async def reclaim(_wanted: int) -> int:
        asked.append(anyio.current_time())
        return memory.free("cache", freed)

    limiter.add_reclaimer(reclaim, name="cache")

    async def go_on_until(seconds: float) -> None:
        while anyio.current_time() < seconds:
            memory.parts["cache"] = 1000
            await run_of(limiter)
            await anyio.sleep(0.25)

    await go_on_until(0.5)
    assert named(limiter, "cache").backed_off_seconds == 0.5
    await go_on_until(200)
    assert asked == [0, 1, 3, 7, 15, 31, 63, 123, 183]
    runs += len(asked)
    asked.clear()
    freed = 5
    await go_on_until(244)
    assert sorted({*asked}) == [243, 243.25, 243.5, 243.75]
    assert named(limiter, "cache").backed_off_seconds == 0
    runs += len(asked)
    asked.clear()
    freed = 0
    await go_on_until(250)
    assert asked == [244, 245, 247]
    assert named(limiter, "cache").runs == runs + 3


@pytest.mark.virtual_time
async def test_who_only_says_so_is_backed_off_too() -> None:
    memory = Memory(rest=1000)
    limiter = memory.limiter()
    limiter.add_reclaimer(lambda wanted: wanted, name="liar")
    asked: list[Any] = []
    limiter.add_reclaimer(asking(memory, asked, "rest"), name="honest", priority=-1)
    await run_of(limiter)
    assert asked == []
    liar = named(limiter, "liar")
    assert (liar.freed_bytes, liar.reported_bytes, liar.backed_off_seconds) == (0, 98, 1)
    await run_of(limiter)
    assert asked == [("rest", 98)]


@pytest.mark.virtual_time
async def test_one_that_holds_up_the_event_loop_rests_nine_times_as_long() -> None:
    memory = Memory(cache=2000)
    limiter = memory.limiter()
    now = 0.0
    limiter._bind()
    limiter._now = lambda: now

    def reclaim(wanted: int) -> int:
        nonlocal now
        now += 0.5
        return memory.free("cache", wanted)

    limiter.add_reclaimer(reclaim, name="cache")
    await run_of(limiter)
    cached = named(limiter, "cache")
    assert (cached.last_seconds, cached.total_seconds) == (0.5, 0.5)
    assert cached.backed_off_seconds == 4.5
    memory.parts["cache"] = 2000
    now += 4.4
    await run_of(limiter)
    assert named(limiter, "cache").runs == 1
    now += 0.1
    await run_of(limiter)
    assert named(limiter, "cache").runs == 2
    assert named(limiter, "cache").total_seconds == 1.0


# --- what must not happen in one


async def test_it_is_refused_any_grant(logs: list[Any]) -> None:
    memory = Memory(cache=0)
    limiter = memory.limiter()
    a, b = limiter.component("a"), limiter.component("b", minimum=10)
    held = a.grant_nowait(100)
    memory.parts["cache"] = 1000
    refused: list[str] = []
    later = anyio.Event()

    async def in_background() -> None:
        await later.wait()
        async with a.grant(1):  # the call is over
            refused.append("no more")

    async def attempt(what: str, function: Callable[[], Any]) -> None:
        async def ask() -> None:
            outcome = function()
            if what == "enter":
                await outcome.__aenter__()
            elif outcome is not None:
                await outcome

        with pytest.raises(ReclaimReentry, match="reclaimer 'cache' asked for") as caught:
            await ask()
        assert caught.value.reclaimer == "cache"
        refused.append(f"{what} {caught.value.component} {caught.value.wanted_bytes}")

    def blocking() -> None:
        with a.grant(6):
            pytest.fail("granted")

    async def reclaim(_wanted: int) -> int:
        assert current_component() is None
        freed = memory.free("cache", 1000)
        assert limiter.statistics().level == 0
        limiter._has_yielded(limiter._now())
        await attempt("enter", lambda: a.grant(1))
        await attempt("await", lambda: a.grant(2).__aenter__())
        await attempt("nowait", lambda: a.grant_nowait(3))
        await attempt("grow", lambda: held.grow(4))
        await attempt("grow_nowait", lambda: held.grow_nowait(5))
        await attempt("thread", lambda: anyio.to_thread.run_sync(blocking))
        await attempt("enter", lambda: b)
        await attempt("enter", lambda: c)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(attempt, "task", lambda: a.grant(7).__aenter__())
        background.start_soon(in_background)
        held.shrink(60)
        held.release()
        return freed

    async with anyio.create_task_group() as background, limiter.component("c") as c:
        limiter.add_reclaimer(reclaim, name="cache")
        await run_of(limiter)
        later.set()
    assert refused == [
        "enter a 1",
        "await a 2",
        "nowait a 3",
        "grow a 4",
        "grow_nowait a 5",
        "thread a 6",
        "enter b 10",
        "enter c 0",
        "task a 7",
        "no more",
    ]
    assert not events(logs, "reclaimer_failed")
    snapshot = limiter.statistics()
    assert (snapshot.grants, snapshot.free_bytes) == (0, 1000)


async def test_what_it_has_started_may_ask_when_the_call_is_over() -> None:
    memory = Memory(rest=1000)
    limiter = memory.limiter()
    over, granted = anyio.Event(), anyio.Event()

    async def ask() -> None:
        await over.wait()
        async with limiter.grant(1):
            granted.set()

    async def first(_wanted: int) -> int:
        background.start_soon(ask)
        return 0

    async def second(_wanted: int) -> int:
        over.set()
        await granted.wait()
        return 0

    limiter.add_reclaimer(first)
    limiter.add_reclaimer(second)
    async with anyio.create_task_group() as background:
        await run_of(limiter)
    assert [one.runs for one in limiter.statistics().reclaimers] == [1, 1]


async def test_it_may_ask_another_limiter() -> None:
    here, there = Memory(rest=1000).limiter(), Memory(rest=1000).limiter()
    done = anyio.Event()

    async def ask(_wanted: int) -> int:
        assert there._reclaim.run is not None
        async with there.grant(1):
            done.set()
        return 0

    async def wait(_wanted: int) -> int:
        await done.wait()
        return 0

    there.add_reclaimer(wait)
    here.add_reclaimer(ask)
    async with there.grant(0):
        pass
    for limiter in (here, there):
        assert [one.failures for one in (await run_of(limiter)).reclaimers] == [0]
    assert done.is_set()


async def test_the_fast_path_is_open_again_after_it() -> None:
    memory = Memory(cache=1000)
    limiter = memory.limiter()
    until: list[float] = []

    def reclaim(wanted: int) -> int:
        until.append(limiter._calm_until)
        freed = memory.free("cache", wanted)
        limiter.statistics()
        until.append(limiter._calm_until)
        return freed

    limiter.add_reclaimer(reclaim)
    async with limiter.grant(0):
        while limiter._reclaim.run is not None:
            await anyio.lowlevel.checkpoint()
    assert until == [-math.inf, -math.inf]
    assert limiter._calm_until > 0


class Odd:
    """An object that frees memory, in its own time."""

    async def __call__(self, wanted: int) -> int:
        await anyio.lowlevel.checkpoint()
        return 0


@pytest.mark.virtual_time
async def test_one_that_fails_is_logged_counted_and_backed_off(logs: list[Any]) -> None:
    memory = Memory(cache=1000)
    limiter = memory.limiter()

    def fail(_wanted: int) -> int:
        raise OSError("disk full")

    def cancel(_wanted: int) -> int:
        raise asyncio.CancelledError("of somebody else's")

    async def group(_wanted: int) -> int:
        async with anyio.create_task_group():
            fail(1)
        return 0

    def half(wanted: int) -> int:
        memory.free("cache", wanted // 2)
        raise OSError("after half of it")

    failing: list[Any] = [fail, cancel, group, lambda _: None, lambda _: -1, lambda _: 1.5, half]
    for number, function in enumerate(failing):
        limiter.add_reclaimer(function, name=f"number {number}")
    limiter.add_reclaimer(Odd())
    limiter.add_reclaimer(lambda wanted: memory.free("cache", wanted), name="good")
    async with limiter.grant(100):
        pass
    snapshot = await run_of(limiter)
    assert snapshot.measured_bytes == TARGET
    *failed, odd, good = snapshot.reclaimers
    assert [(one.runs, one.failures, one.backed_off_seconds) for one in failed] == [(1, 1, 1)] * 7
    assert [one.freed_bytes for one in failed] == [0] * 6 + [49]
    assert (odd.name, odd.runs, odd.failures) == ("Odd", 1, 0)
    assert (good.runs, good.failures, good.freed_bytes) == (1, 0, 49)
    errors = events(logs, "reclaimer_failed")
    assert [one["reclaimer"] for one in errors] == [f"number {number}" for number in range(7)]
    assert "disk full" in errors[0]["error"]
    assert "it gave None; a reclaimer gives how many bytes" in errors[3]["error"]
    assert {key: events(logs, "reclaimed")[-1][key] for key in ("reclaimer", "seconds")} == {
        "reclaimer": "good",
        "seconds": 0,
    }
    assert events(logs, "reclaimed")[-1]["wanted_bytes"] == 49
    assert events(logs, "reclaimed")[-1]["freed_bytes"] == 49


@pytest.mark.virtual_time
async def test_one_that_hangs_holds_up_nobody_but_the_others(logs: list[Any]) -> None:
    memory = Memory(rest=960, nothing=0)
    limiter = memory.limiter(share=1)
    never = anyio.Event()
    asked: list[Any] = []

    async def hang(_wanted: int) -> int:
        await never.wait()
        return 0

    limiter.add_reclaimer(hang, name="hangs", priority=1)
    limiter.add_reclaimer(asking(memory, asked, "nothing"), name="other")
    for _ in range(40):
        async with limiter.grant(10):
            await anyio.sleep(0.5)
    assert anyio.current_time() == 20
    assert asked == []
    (slow,) = events(logs, "reclaimer_slow")
    assert (slow["reclaimer"], slow["wanted_bytes"], slow["seconds"]) == ("hangs", 58, 10)
    assert named(limiter, "hangs").runs == 0
    never.set()
    await run_of(limiter)
    assert asked == [("nothing", 58)]
    assert named(limiter, "hangs").total_seconds == 20


@pytest.mark.virtual_time
async def test_a_requester_that_is_cancelled_does_not_take_it_along() -> None:
    memory = Memory(cache=1000)
    limiter = memory.limiter(settings=LimiterSettings(reclaim=False))
    done: list[float] = []

    async def reclaim(wanted: int) -> int:
        await anyio.sleep(5)
        done.append(anyio.current_time())
        return memory.free("cache", wanted)

    limiter.add_reclaimer(reclaim)
    with anyio.move_on_after(0.01) as scope:  # in the midst of the delay, which is 25 ms
        await limiter.grant(10)
    assert scope.cancelled_caught
    assert limiter._reclaim.run is not None
    await anyio.sleep(10)
    assert done == [5]
    assert limiter.statistics().reclaimers[0].backed_off_seconds == 0  # it has held up nobody
    assert limiter.statistics().measured_bytes == TARGET
    assert limiter.statistics().grants == 0


# --- the end of an event loop


def on_each_backend(function: Callable[[], Any]) -> None:
    for backend in ("asyncio", "trio"):
        with suppress(TimeoutError):
            anyio.run(function, backend=backend)


def test_the_end_of_its_event_loop_ends_it() -> None:
    memory = Memory(cache=1000)
    limiter = memory.limiter()
    began: list[int] = []
    ended: list[BaseException] = []

    async def hang(wanted: int) -> int:
        began.append(wanted)
        try:
            await anyio.sleep_forever()
        except BaseException as error:
            ended.append(error)
            raise
        return 0

    limiter.add_reclaimer(hang, name="hangs")

    async def use() -> None:
        async with limiter.grant(0):
            while limiter._reclaim.run is None or not began:
                limiter.statistics()
                await anyio.lowlevel.checkpoint()
        assert len(began) == 1
        began.clear()

    for times in (1, 2):
        on_each_backend(use)
        assert len(ended) == 2 * times
        assert limiter._reclaim.run is None
    assert [type(error).__name__ for error in ended] == ["CancelledError", "Cancelled"] * 2
    assert named(limiter, "hangs").failures == 0


async def hang_asyncio(_wanted: int) -> int:
    await asyncio.Event().wait()
    return 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_event_loop_that_was_closed_in_its_midst_is_no_obstacle(
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory = Memory(cache=1000)
    limiter = memory.limiter()
    limiter.add_reclaimer(hang_asyncio)
    loop = asyncio.new_event_loop()

    async def use() -> None:
        async with limiter.grant(0):
            await asyncio.sleep(0.01)

    loop.run_until_complete(use())
    loop.close()
    assert limiter._reclaim.run is not None
    abandoned = weakref.ref(limiter._reclaim.run)
    limiter.statistics()
    assert limiter._reclaim.run is None
    limiter.add_reclaimer(lambda wanted: memory.free("cache", wanted))
    with limiter.grant(0):
        pass
    assert limiter.statistics().measured_bytes == TARGET

    def collect() -> None:
        with limiter._lock:  # as it may happen anywhere
            gc.collect()

    del loop
    collector = threading.Thread(target=collect, daemon=True)
    collector.start()
    collector.join(10)
    assert not collector.is_alive()
    assert abandoned() is None


def test_a_task_that_is_cancelled_before_it_begins_is_no_obstacle() -> None:
    memory = Memory(cache=1000)
    limiter = memory.limiter()
    limiter.add_reclaimer(lambda wanted: memory.free("cache", wanted), name="cache")

    async def use() -> None:
        limiter._bind()
        limiter.statistics()
        assert limiter._reclaim.run is not None
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert named(limiter, "cache").runs == 0
        assert (await run_of(limiter)).measured_bytes == TARGET

    asyncio.run(use())


@pytest.mark.skipif(sys.version_info < (3, 12), reason="has no eager tasks")
def test_with_eager_tasks() -> None:
    memory = Memory(cache=1000)
    limiter = memory.limiter()
    limiter.add_reclaimer(lambda wanted: memory.free("cache", wanted))

    async def use() -> None:
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined, unused-ignore]
        assert (await run_of(limiter)).measured_bytes == TARGET

    asyncio.run(use())


# --- threads


def test_without_any_event_loop_it_is_the_thread_that_asks() -> None:
    memory = Memory(cache=1000)
    limiter = memory.limiter()
    threads: list[int] = []

    def reclaim(wanted: int) -> int:
        threads.append(threading.get_ident())
        with pytest.raises(ReclaimReentry), limiter.grant(1):
            pass
        with pytest.raises(ReclaimReentry):
            limiter.grant_nowait(1)
        return memory.free("cache", wanted)

    async def not_in_threads(_wanted: int) -> int:
        raise NotImplementedError

    limiter.add_reclaimer(not_in_threads, name="async", priority=1)
    limiter.add_reclaimer(Odd(), name="async object", priority=1)
    limiter.add_reclaimer(reclaim, name="cache")
    with limiter.grant(1):
        assert limiter.statistics().measured_bytes == TARGET
    assert threads == [threading.get_ident()]
    memory.parts["cache"] = 1000
    limiter._reclaim._time = lambda: 1e9  # type: ignore[method-assign]
    limiter._sample_at = 0
    limiter.grant_nowait(1).release()
    assert threads == [threading.get_ident()] * 2
    assert named(limiter, "async").runs == named(limiter, "async object").runs == 0
    assert limiter.statistics().grants == 0


async def test_a_thread_beside_an_event_loop_has_it_done_there() -> None:
    memory = Memory(cache=800)
    limiter = memory.limiter()
    threads: list[int] = []
    loop_thread = threading.get_ident()

    async def reclaim(wanted: int) -> int:
        threads.append(threading.get_ident())
        await anyio.lowlevel.checkpoint()
        return memory.free("cache", wanted)

    limiter.add_reclaimer(reclaim)

    def in_thread() -> None:
        limiter._sample_at = 0
        with limiter.grant(1):
            pass

    async with limiter.grant(0):
        memory.parts["cache"] = 1000
        await anyio.to_thread.run_sync(in_thread)
        while memory() > TARGET:
            await anyio.sleep(0.001)
    assert threads == [loop_thread]


async def test_an_event_loop_that_the_limiter_does_not_serve_yet_is_not_blocked() -> None:
    memory = Memory(cache=1000)
    limiter = memory.limiter()
    limiter.add_reclaimer(lambda wanted: memory.free("cache", wanted))
    assert limiter.statistics().measured_bytes == 1000
    assert (await run_of(limiter)).measured_bytes == TARGET


def test_two_threads_that_find_memory_short_at_once_start_one_run() -> None:
    memory = Memory(cache=1000)
    limiter = memory.limiter()
    both, one_is_through = threading.Barrier(2), threading.Event()
    find_due, runs = limiter._reclaim.due, 0

    def due(loop: Any) -> list[Reclaimer]:
        if limiter._reclaim.run is None:
            both.wait(10)
        return find_due(loop)

    def reclaim(wanted: int) -> int:
        nonlocal runs
        runs += 1
        one_is_through.wait(5)
        return memory.free("cache", wanted)

    def look() -> None:
        limiter.statistics()
        one_is_through.set()

    limiter.add_reclaimer(reclaim)
    limiter._reclaim.due = due  # type: ignore[method-assign]
    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert runs == 1


def test_one_run_at_a_time_of_many_threads() -> None:
    memory = Memory(cache=0)
    limiter = memory.limiter(share=1)
    inside = most = runs = 0

    def reclaim(wanted: int) -> int:
        nonlocal inside, most, runs
        inside += 1
        runs += 1
        most = max(most, inside)
        freed = memory.free("cache", wanted)
        inside -= 1
        return freed

    limiter.add_reclaimer(reclaim)
    limiter._reclaim._time = lambda: 1e9  # type: ignore[method-assign]

    def use() -> None:
        for _ in range(200):
            memory.parts["cache"] = 1000
            limiter.statistics()

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert runs > 10  # as threads take turns


def test_an_event_loop_that_does_not_run_now_is_not_waited_for() -> None:
    memory = Memory(cache=0)
    limiter = memory.limiter()
    limiter.add_reclaimer(lambda wanted: memory.free("cache", wanted))

    async def use() -> None:
        async with limiter.grant(0):
            pass

    with asyncio.Runner() as runner:
        runner.run(use())
        memory.parts["cache"] = 1000
        limiter._sample_at = 0
        limiter.grant_nowait(0).release()
        assert memory() == TARGET


def test_an_event_loop_of_another_thread_that_has_ended_is_not_waited_for() -> None:
    memory = Memory(cache=0)
    limiter = memory.limiter()
    limiter.add_reclaimer(lambda wanted: memory.free("cache", wanted))

    async def use() -> None:
        async with limiter.grant(0):
            pass

    thread = threading.Thread(target=asyncio.run, args=(use(),))
    thread.start()
    thread.join()
    memory.parts["cache"] = 1000
    assert limiter.statistics().measured_bytes == TARGET


# --- registering


async def test_removed_it_is_asked_no_more() -> None:
    memory = Memory(a=500, b=500)
    limiter = memory.limiter()
    asked: list[Any] = []
    second: Reclaimer

    def first(_wanted: int) -> int:
        second.remove()
        return 0

    with limiter.add_reclaimer(first, name="first") as reclaimer:
        assert repr(reclaimer) == "<Reclaimer 'first', priority 0>"
        second = limiter.add_reclaimer(asking(memory, asked, "a"))
        await run_of(limiter)
        second.remove()
        assert asked == []
    reclaimer.remove()
    assert limiter.statistics().reclaimers == ()
    await run_of(limiter)
    assert limiter.statistics().measured_bytes == 1000
    with pytest.raises(TypeError, match="function=5 is no function"):
        limiter.add_reclaimer(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", ["observe", "noop"])
async def test_who_only_observes_asks_nobody(make: str) -> None:
    memory = Memory(cache=1000)
    limiter = MemoryLimiter.noop() if make == "noop" else memory.limiter(observe=True)
    asked: list[Any] = []
    limiter.add_reclaimer(asking(memory, asked, "cache"))
    await run_of(limiter)
    assert asked == []


async def test_statistics_are_ready_for_json() -> None:
    memory = Memory(cache=1000)
    limiter = memory.limiter()
    limiter.add_reclaimer(lambda wanted: memory.free("cache", wanted), name="cache")
    plain = json.loads(json.dumps((await run_of(limiter)).to_dict()))
    (cached,) = plain["reclaimers"]
    assert cached.pop("last_seconds") == cached.pop("total_seconds") < 1
    assert cached.pop("backed_off_seconds") < 9
    assert cached == {
        "name": "cache",
        "runs": 1,
        "failures": 0,
        "freed_bytes": 98,
        "reported_bytes": 98,
    }


# --- what is built in


class Cycle:
    def __init__(self) -> None:
        self.me = self


async def test_garbage_is_collected(logs: list[Any]) -> None:
    limiter = Memory(rest=1000).limiter(settings=WITH_BUILT_IN)
    gc.collect()
    gc.disable()
    try:
        dead = [weakref.ref(Cycle()) for _ in range(100)]
        assert all(one() is not None for one in dead)
        await run_of(limiter)
        assert all(one() is None for one in dead)
    finally:
        gc.enable()
    collected = named(limiter, "gc")
    assert (collected.runs, collected.freed_bytes) == (1, 0)
    assert collected.reported_bytes >= 100 * 48
    assert sys.getsizeof([]) >= sys.getsizeof(()) >= 40
    assert [one["reclaimer"] for one in events(logs, "reclaimed")] == ["gc", "heap"]


HEAP = """
import asyncio, gc, json
from membound_async import LimiterSettings, MemoryLimiter, PressurePolicy
from membound_async.probes import ProcessProbe

MIB = 2**20
policy = PressurePolicy(threshold=0.9)
before = ProcessProbe().read()
limiter = MemoryLimiter(before + 280 * MIB, slop_factor=0, baseline=before,
                        settings=LimiterSettings(pressure=policy))
blocks = [bytearray(b"x" * 60_000) for _ in range(300 * MIB // 60_000)]
blocks = blocks[::50]  # what stays keeps the heap from becoming smaller by itself
kept = ProcessProbe().read()

async def main():
    async with limiter.grant(0):
        pass
    while limiter._reclaim.run is not None:
        await asyncio.sleep(0)

asyncio.run(main())
print(json.dumps([kept - before, ProcessProbe().read() - before, limiter.statistics().to_dict()]))
"""


def test_the_heap_returns_to_the_system_what_is_free_in_it() -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("NOT TESTED: this C library has no malloc_trim()")
    ended = subprocess.run(
        [sys.executable, "-P", "-c", HEAP],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    kept, after, statistics = json.loads(ended.stdout)
    assert kept > 250 * MIB
    assert after < 40 * MIB
    heap = {one["name"]: one for one in statistics["reclaimers"]}["heap"]
    assert heap["runs"] == 1
    assert heap["freed_bytes"] > 200 * MIB
