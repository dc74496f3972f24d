"""The limiter: waiting, order, delays, sampling, drift, resize, stalls, errors."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
from fractions import Fraction
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import structlog
from structlog.testing import capture_logs

from membound_async import (
    FirmLimitExceedsAvailable,
    GrantTimeout,
    GrantTooLarge,
    InsufficientMinimumMemory,
    InvalidComponentBounds,
    InvalidLimit,
    LimitError,
    LimiterSettings,
    MemoryLimiter,
    PressurePolicy,
    QuotaExceeded,
    UnknownComponent,
    testing,
)
from membound_async.testing import ScriptedProbe

MIB = 2**20
GRADUAL = LimiterSettings()


@pytest.fixture(autouse=True)
def logs() -> Any:
    with capture_logs() as entries:
        structlog.configure()
        yield entries
    structlog.reset_defaults()


def events(logs: list[Any], name: str) -> list[Any]:
    return [entry for entry in logs if entry["event"] == f"membound.{name}"]


# --- waiting


@pytest.mark.virtual_time
async def test_a_request_waits_until_its_threshold_is_free() -> None:
    limiter = testing.limiter(1000)
    a, b = limiter.component("a"), limiter.component("b")
    order: list[str] = []

    async def second() -> None:
        async with b.grant(300) as grant:  # T = 600, but only 500 are free
            order.append(f"b has {grant.size} at {anyio.current_time():.0f}")

    async with anyio.create_task_group() as tasks, a.grant(500):
        tasks.start_soon(second)
        await anyio.sleep(5)
        assert limiter.statistics().waiting == 1
        assert b.statistics().waiting_bytes == 300
        order.append("a releases")
    assert order == ["a releases", "b has 300 at 5"]
    assert b.statistics().total_wait_seconds == pytest.approx(5)
    assert limiter.statistics().free_bytes == 1000


@pytest.mark.virtual_time
async def test_who_may_use_a_minimum_beyond_the_limit_is_woken_when_it_is_entered() -> None:
    limiter = testing.limiter(1000, mode="permissive")
    large = limiter.component("large", minimum=1200)
    got: list[float] = []

    async def use_it() -> None:
        async with large.grant(400):  # T = 800, but only 500 are free
            got.append(anyio.current_time() - began_at)

    began_at = anyio.current_time()
    async with anyio.create_task_group() as tasks, limiter.component("other").grant(500):
        tasks.start_soon(use_it)
        await anyio.sleep(1)
        async with large:
            await anyio.sleep(1)
    assert got == [pytest.approx(1)]


@pytest.mark.virtual_time
async def test_a_request_that_is_over_keeps_nothing_of_its_task() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    mine = a._account
    holder = await limiter.component("holder").grant(500)

    async def wait_in_vain() -> None:
        async with a.grant(300):
            pass

    async def wait_for_less() -> None:
        async with limiter.component("b").grant(255):
            pass

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait_for_less)
        async with anyio.create_task_group() as cancelled:
            cancelled.start_soon(wait_in_vain)
            await anyio.sleep(1)
            cancelled.cancel_scope.cancel()
        # A heap remembers it until it comes to the top, and a task remembers all it was doing.
        old = [each for _, _, each in limiter._ledger.waiters.heads._heap if each.account is mine]
        assert [request.task for request in old] == [None]
        holder.release()


@pytest.mark.virtual_time
async def test_inside_a_component_first_in_first_out_and_grows_first() -> None:
    limiter = testing.limiter(1000, share=1)
    a = limiter.component("a")
    order: list[str] = []

    async def take(name: str, nbytes: int) -> None:
        async with a.grant(nbytes):
            order.append(name)
            await anyio.sleep(1)

    async with anyio.create_task_group() as tasks:
        held = await a.grant(600)
        tasks.start_soon(take, "large", 900)
        await anyio.sleep(0.1)
        tasks.start_soon(take, "small", 200)
        await anyio.sleep(0.1)

        async def grow() -> None:
            await held.grow(450)
            order.append("grow")
            held.release()

        blocker = a.grant(400)
        tasks.start_soon(take, "last", 900)
        await anyio.sleep(0.1)
        held.shrink(100)
        tasks.start_soon(grow)
        await anyio.sleep(0.1)
        assert not blocker.released
    assert order == ["grow", "large", "small", "last"]


@pytest.mark.virtual_time
async def test_between_components_the_smallest_threshold_goes_first() -> None:
    limiter = testing.limiter(1000)
    holder = await limiter.component("holder").grant(500)
    order: list[str] = []

    async def take(name: str, nbytes: int) -> None:
        async with limiter.component(name).grant(nbytes):
            order.append(name)
            await anyio.sleep(1)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take, "large", 400)
        await anyio.sleep(0.1)
        tasks.start_soon(take, "small", 260)
        await anyio.sleep(0.1)
        holder.release()
    assert order == ["small", "large"]


@pytest.mark.virtual_time
async def test_a_timeout_gives_up_and_leaves_nothing_behind() -> None:
    limiter = testing.limiter(1000)
    a, b = limiter.component("a"), limiter.component("b")
    async with a.grant(500):
        with pytest.raises(GrantTimeout) as caught:
            async with b.grant(300, timeout=2.5):
                pass
        assert caught.value.waited_seconds == pytest.approx(2.5)
        assert caught.value.wanted_bytes == 300
        assert isinstance(caught.value, TimeoutError)
        assert limiter.statistics().waiting == 0
        async with b.grant(250, timeout=0):
            pass
    assert limiter.statistics().free_bytes == 1000


async def test_what_could_never_be_had_is_refused_at_once() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a", firm_limit=100)
    with pytest.raises(GrantTooLarge, match=r"501 bytes.*500 bytes at the most.*share of 1/2"):
        await limiter.grant(501)
    with pytest.raises(GrantTooLarge, match=r"101 bytes.*100 bytes at the most.*its firm limit"):
        await a.grant(101)
    async with a.grant(60) as grant:
        with pytest.raises(GrantTooLarge, match="110 bytes"):
            await grant.grow(50)
    assert limiter.statistics().free_bytes == 1000
    assert a.statistics().refusals == 2


@pytest.mark.virtual_time
async def test_oversize_alone_waits_for_the_pool_and_holds_it() -> None:
    limiter = testing.limiter(1000)
    a, b = limiter.component("a"), limiter.component("b")
    held = await a.grant(10)
    order: list[str] = []

    async def alone() -> None:
        async with b.grant(900, oversize="alone") as grant:
            order.append("alone")
            with pytest.raises(QuotaExceeded, match="holds the pool alone"):
                a.grant_nowait(1)
            await grant.grow(100)
            assert grant.size == 1000
            await anyio.sleep(1)

    async def after() -> None:
        await anyio.sleep(0.5)
        async with a.grant(1):
            order.append("after")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(alone)
        tasks.start_soon(after)
        await anyio.sleep(0.1)
        assert order == []
        held.release()
    assert order == ["alone", "after"]
    with pytest.raises(GrantTooLarge, match="others' minimums"):
        await b.grant(1001, oversize="alone")


async def test_up_to_takes_what_the_rule_allows() -> None:
    limiter = testing.limiter(1000)
    a, b = limiter.component("a", firm_limit=600), limiter.component("b")
    async with b.grant(100, up_to=10_000) as grant:
        assert grant.size == 500
        async with a.grant(10, up_to=200) as second:
            assert second.size == 200
    async with a.grant_nowait(10, up_to=10_000) as third:
        assert third.size == 500
    assert limiter.statistics().free_bytes == 1000


@pytest.mark.virtual_time
async def test_a_waiter_that_was_passed_too_often_becomes_a_barrier() -> None:
    settings = LimiterSettings(bypass_limit_bytes=1000)
    limiter = testing.limiter(1000, settings=settings)
    large, small = limiter.component("large"), limiter.component("small")
    served = anyio.Event()
    rounds = 0
    passed: list[int] = []

    async def take_large() -> None:
        came = rounds
        async with large.grant(450):  # T = 900
            passed.append(rounds - came)
            served.set()

    async def take_small() -> None:
        nonlocal rounds
        while not served.is_set():
            async with small.grant(200):
                rounds += 1
                await anyio.sleep(1)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take_small)
        await anyio.sleep(0.5)
        tasks.start_soon(take_small)
        tasks.start_soon(take_large)
        await served.wait()
    # 200 bytes at a time until that is more than 1000, and what came in while it asked.
    assert 6 <= passed[0] <= 8


@pytest.mark.virtual_time
async def test_a_barrier_that_waits_for_who_holds_for_good_is_lifted() -> None:
    settings = LimiterSettings(bypass_limit_bytes=100, stall_after_seconds=3)
    limiter = testing.limiter(1000, settings=settings)
    for_good = await limiter.component("for_good").grant(300)
    small = limiter.component("small")
    async with anyio.create_task_group() as tasks:

        async def take_large() -> None:
            async with limiter.component("large").grant(450):
                pass

        tasks.start_soon(take_large)
        await anyio.sleep(0.1)
        for _ in range(2):
            async with small.grant(60):
                pass
        with pytest.raises(QuotaExceeded, match="waited long goes first"):
            small.grant_nowait(60)
        started = anyio.current_time()
        async with small.grant(60):
            assert 3 <= anyio.current_time() - started <= 3.5
        for_good.release()


# --- pressure


def pressed(measured: int, **options: Any) -> MemoryLimiter:
    return MemoryLimiter(
        1000 * MIB,
        slop_factor=0,
        baseline=0,
        probe=ScriptedProbe(measured),
        settings=options.pop("settings", GRADUAL),
        **options,
    )


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("measured", "delay"), [(950, 0), (960, 0.0058), (975, 0.013), (990, 0.0202), (1100, 0.025)]
)
async def test_a_new_grant_out_of_the_pool_is_delayed(measured: int, delay: float) -> None:
    limiter = pressed(measured * MIB)
    a = limiter.component("a", minimum=5 * MIB)
    async with a:
        started = anyio.current_time()
        async with a.grant(1 * MIB):  # out of the minimum
            assert anyio.current_time() == started
        async with a.grant(5 * MIB), a.grant(1 * MIB, timeout=None):
            assert anyio.current_time() - started == pytest.approx(delay)
        assert a.statistics().total_delay_seconds == pytest.approx(delay)
    assert limiter.statistics().grants == 0


async def test_a_cancellation_during_the_delay_gives_everything_back() -> None:
    sixty = PressurePolicy(min_delay_seconds=60, max_delay_seconds=60)
    settings = LimiterSettings(pressure=sixty, reclaim=False)
    limiter = pressed(960 * MIB, settings=settings, share=1)
    limiter._ledger.baseline = 900 * MIB
    limiter.statistics()
    free = limiter._ledger.free
    with anyio.move_on_after(0.001) as scope:
        await limiter.grant(1 * MIB)
    assert scope.cancelled_caught
    assert limiter._ledger.free == free
    assert limiter.statistics().grants == 0


async def test_drift_is_what_nobody_was_granted() -> None:
    probe = ScriptedProbe(100)
    limiter = testing.limiter(1000, probe=probe, baseline=100)
    assert limiter.statistics().drift_bytes == 0
    probe.set(300)
    snapshot = limiter.statistics()
    assert (snapshot.drift_bytes, snapshot.free_bytes) == (200, 700)
    probe.set(100)
    assert limiter.statistics().drift_bytes == 0
    async with limiter.grant(400):
        pass
    # Heap that was granted once and kept is no drift...
    probe.set(500)
    assert limiter.statistics().drift_bytes == 0
    # ...until there is no room for it any more.
    probe.set(960)
    assert limiter.statistics().drift_bytes == 860
    probe.set(500)
    assert limiter.statistics().drift_bytes == 400


@pytest.mark.virtual_time
async def test_while_somebody_waits_memory_is_looked_at() -> None:
    probe = ScriptedProbe(lambda: 800 if anyio.current_time() < 7 else 0)
    limiter = testing.limiter(1000, probe=ScriptedProbe(0))
    limiter._gauge.probe = probe
    blocker = await limiter.component("blocker").grant(1)
    async with limiter.component("a").grant(400):  # T = 800; 199 are free while drift is 800
        assert 7 <= anyio.current_time() <= 7.25
    blocker.release()


@pytest.mark.virtual_time
async def test_progress_when_only_drift_is_in_the_way(logs: list[Any]) -> None:
    probe = ScriptedProbe(0)
    limiter = testing.limiter(1000, probe=probe)
    probe.set(900)
    limiter.statistics()
    async with limiter.grant(400):  # only 100 are free, but nobody holds anything
        assert anyio.current_time() == 0
        with pytest.raises(QuotaExceeded):
            limiter.grant_nowait(1)
    assert events(logs, "progress")[0]["wanted_bytes"] == 400


async def test_nowait_is_refused_at_the_limit() -> None:
    probe = ScriptedProbe(0)
    limiter = testing.limiter(1000, probe=probe, share=1)
    async with limiter.grant(600):
        probe.set(1000)
        limiter.statistics()
        with pytest.raises(QuotaExceeded, match="measured memory is at the limit"):
            limiter.grant_nowait(1)
        assert limiter.root.statistics().refusals == 1


def test_a_reading_is_taken_only_when_it_is_due() -> None:
    probe = ScriptedProbe(0)
    limiter = testing.limiter(1000, probe=probe)
    limiter.grant_nowait(1).release()
    before = probe.reads
    for _ in range(100):
        limiter.grant_nowait(1).release()  # 200 bytes moved
    assert probe.reads == before
    for _ in range(100):
        limiter.grant_nowait(1).release()  # 400: more than a quarter of the headroom
    assert probe.reads == before + 1


@pytest.mark.virtual_time
async def test_a_failing_probe_keeps_the_last_reading_and_then_means_pressure(
    logs: list[Any],
) -> None:
    reading: list[Any] = [100]

    def read() -> int:
        if isinstance(reading[0], Exception):
            raise reading[0]
        value: int = reading[0]
        return value

    limiter = testing.limiter(1000, probe=ScriptedProbe(read), baseline=50)
    limiter.grant_nowait(1).release()
    for lie in (OSError("gone"), -1, 2**60, 0, True, "many"):
        reading[0] = lie
        assert limiter.statistics().measured_bytes == 100
        reading[0] = 100
        limiter.statistics()
    assert len(events(logs, "probe_failed")) == len(events(logs, "probe_recovered")) == 6
    assert "gone" in events(logs, "probe_failed")[0]["error"]
    reading[0] = OSError("gone")
    limiter.statistics()
    await anyio.sleep(2)
    assert limiter.statistics().measured_bytes == 1000
    assert limiter.statistics().probe_failures == 9
    with pytest.raises(QuotaExceeded):
        limiter.grant_nowait(1)
    reading[0] = 100
    assert limiter.statistics().measured_bytes == 100


# --- the limit


@pytest.mark.virtual_time
async def test_resize_lets_waiters_in_and_refuses_the_impossible() -> None:
    limiter = testing.limiter(1000)
    outcome: list[Any] = []

    async def take(nbytes: int) -> None:
        try:
            async with limiter.component(f"takes {nbytes}".replace(" ", "_")).grant(nbytes):
                outcome.append(nbytes)
        except GrantTooLarge as error:
            outcome.append(error.most_bytes)

    async with anyio.create_task_group() as tasks, limiter.grant(500):
        tasks.start_soon(take, 400)
        await anyio.sleep(1)
        limiter.resize(600)
        assert limiter.statistics().free_bytes == 100
        await anyio.sleep(1)
        assert outcome == [300]
        tasks.start_soon(take, 290)
        await anyio.sleep(1)
        limiter.resize("2KiB")
        await anyio.sleep(1)
        assert outcome == [300, 290]
    assert limiter.limit.limit_bytes == 2048
    limiter.resize(800)
    with pytest.raises(InvalidLimit, match=r"makes no sense|no size|no limit"):
        limiter.resize("many")
    with pytest.raises(InvalidLimit):
        limiter.resize(0)
    assert limiter.limit.limit_bytes == 800


@pytest.mark.virtual_time
async def test_a_changed_container_limit_is_noticed(logs: list[Any]) -> None:
    limiter = testing.limiter(1000)
    present: list[Any] = [1000]

    def reread() -> int:
        if isinstance(present[0], Exception):
            raise present[0]
        limit: int = present[0]
        return limit

    limiter.grant_nowait(1).release()
    limiter._reread_limit = reread
    present[0] = 500
    await anyio.sleep(2)
    assert limiter.statistics().limit_bytes == 500
    assert events(logs, "limit_changed")[0]["before_bytes"] == 1000
    present[0] = OSError("vanished")
    for _ in range(3):
        await anyio.sleep(2)
        assert limiter.statistics().limit_bytes == 500
    assert ["vanished" in each["error"] for each in events(logs, "limit_not_read")] == [True]
    present[0] = 700
    await anyio.sleep(2)
    assert limiter.statistics().limit_bytes == 700


# --- what a reading cannot show


@pytest.mark.virtual_time
async def test_what_is_held_back_is_not_in_the_reading_and_hides_no_drift() -> None:
    limiter = pressed(960 * MIB, share=1)

    async def hold() -> None:
        async with limiter.grant(30 * MIB):
            await anyio.sleep(1)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(hold)
        await anyio.sleep(0.001)
        held_back = limiter.statistics()  # the 960 cannot be those 30
        assert (held_back.drift_bytes, held_back.free_bytes) == (960 * MIB, 10 * MIB)
        await anyio.sleep(0.5)
        arrived = limiter.statistics()
        assert (arrived.drift_bytes, arrived.free_bytes) == (930 * MIB, 40 * MIB)


@pytest.mark.virtual_time
async def test_memory_that_went_back_to_the_system_does_not_hide_drift_that_comes_later() -> None:
    probe = testing.ScriptedProbe(0)
    limiter = testing.limiter(1000, probe=probe, share=1)
    grant = limiter.grant_nowait(500)
    probe.set(500)
    limiter.statistics()
    grant.release()
    probe.set(0)
    limiter.statistics()
    probe.set(300)
    assert limiter.statistics().drift_bytes == 300


# --- stalls


@pytest.mark.virtual_time
async def test_a_stall_is_reported_once_and_so_is_its_end(logs: list[Any]) -> None:
    limiter = testing.limiter(1000)
    holder = await limiter.component("sink").grant(500)

    async def take() -> None:
        async with limiter.component("decode").grant(400):
            pass

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take)
        await anyio.sleep(35)
        (stalled,) = events(logs, "stalled")
        assert stalled["holders"] == [
            {
                "component": "sink",
                "granted_bytes": 500,
                "in_flight_bytes": 0,
                "reserved_bytes": 0,
                "oldest_seconds": pytest.approx(10, 0.05),
            }
        ]
        (waiter,) = stalled["waiters"]
        assert waiter["component"] == "decode"
        assert waiter["wanted_bytes"] == 400
        assert waiter["waited_seconds"] == pytest.approx(10, 0.05)
        assert not events(logs, "stall_ended")
        holder.release()
        await anyio.sleep(1)
    assert len(events(logs, "stalled")) == 1
    assert len(events(logs, "stall_ended")) == 1


# --- observe only


@pytest.mark.virtual_time
async def test_observe_only_never_acts_and_says_what_it_would_have_done() -> None:
    limiter = testing.limiter(1000, observe=True)
    a, b = limiter.component("a"), limiter.component("b")
    async with a.grant(500):
        async with b.grant(300):  # T = 600, 500 are free
            await anyio.sleep(4)
            assert b.statistics().would_wait_seconds == pytest.approx(4)
            async with b.grant(600):
                pass
        assert limiter.grant_nowait(5000).size == 5000
    gc.collect()
    await anyio.sleep(1)
    snapshot = limiter.statistics()
    assert snapshot.observe
    assert (snapshot.would_wait, snapshot.would_refuse) == (1, 2)
    assert b.statistics().would_wait == 1
    assert a.statistics().would_wait == 0
    assert anyio.current_time() == 5


test_observe_only_never_acts_and_says_what_it_would_have_done = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)(test_observe_only_never_acts_and_says_what_it_would_have_done)


async def test_noop_limits_nothing() -> None:
    limiter = MemoryLimiter.noop()
    assert limiter.is_noop
    async with limiter, limiter.component("a", minimum="1GiB", firm_limit="2GiB") as a:
        async with a.grant("1TiB"), a.grant("1TiB"):
            assert a.statistics().granted_bytes == 2 * 2**40
        a.grant_nowait(1).release()


# --- what it is made of


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": "many"}, "limit='many'"),
        ({"limit": 0}, "limit=0|limit_bytes=0"),
        ({"limit": -1}, "limit=-1"),
        ({"limit": math.nan}, "limit.*nan"),
        ({"limit": True}, "limit.*True"),
        ({"limit": 2**53 + 1}, "2\\*\\*53"),
        ({"slop_factor": 1}, "slop_factor=1"),
        ({"slop_factor": -0.1}, "slop_factor=-0.1"),
        ({"slop_factor": math.nan}, "slop_factor=nan"),
        ({"share": 0}, "share=0"),
        ({"share": 1.5}, "share=1.5"),
        ({"share": math.nan}, "share=nan"),
        ({"share": -Fraction(1, 2)}, "share="),
        ({"share": True}, "share=True"),
        ({"baseline": -1}, "baseline=-1"),
        ({"probe": ScriptedProbe(5), "baseline": 1000}, "in use before anything is granted"),
        ({"probe": ScriptedProbe(0), "baseline": 10}, "reads 0 bytes"),
        ({"mode": "lax"}, "mode='lax'"),
        ({"observe": "maybe"}, "observe='maybe'"),
        ({"processes": 0}, "processes=0"),
        ({"probe": ScriptedProbe(0), "baseline": None}, "reads 0 bytes"),
        ({"probe": ScriptedProbe(2000), "baseline": None}, "2 000 bytes"),
        ({"probe": ScriptedProbe(-5)}, "-5"),
        ({"probe": ScriptedProbe(2**60)}, str(2**60)),
        ({"probe": object()}, "cannot be read"),
    ],
)
def test_a_bad_argument_gives_one_clear_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidLimit, match=message):
        testing.limiter(**{"limit": 1000, **options})


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MEMBOUND_LIMIT", "lots"),
        ("MEMBOUND_SLOP_FACTOR", "some"),
        ("MEMBOUND_SLOP_FACTOR", "2"),
        ("MEMBOUND_SHARE", "0"),
        ("MEMBOUND_MODE", "lax"),
        ("MEMBOUND_OBSERVE", "maybe"),
        ("MEMBOUND_THRESHOLD", "nan"),
        ("WEB_CONCURRENCY", "-2"),
    ],
)
def test_a_bad_environment_variable_is_named(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidLimit) as caught:
        MemoryLimiter()
    assert variable in str(caught.value)
    assert value in str(caught.value)


def test_the_environment_sets_what_the_program_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in {
        "MEMBOUND_LIMIT": "1GiB",
        "MEMBOUND_SLOP_FACTOR": "0.5",
        "MEMBOUND_SHARE": "1/3",
        "MEMBOUND_OBSERVE": "yes",
        "MEMBOUND_STALL_AFTER_SECONDS": "3",
    }.items():
        monkeypatch.setenv(variable, value)
    limiter = MemoryLimiter()
    assert limiter.limit.limit_bytes == 2**30
    assert limiter.limit.effective_bytes == 2**29
    assert limiter.statistics().limit_source == "MEMBOUND_LIMIT"
    assert limiter.statistics().observe
    assert limiter.settings.stall_after_seconds == 3
    assert MemoryLimiter("2GiB", slop_factor=0.25).limit.effective_bytes == 3 * 2**29


def test_a_limit_above_what_there_is_is_kept_and_warned_about(logs: list[Any]) -> None:
    MemoryLimiter("4096TiB")
    assert events(logs, "limit_above_available")[0]["limit_source"] == "explicit"


def test_detected_without_arguments() -> None:
    limiter = MemoryLimiter()
    snapshot = limiter.statistics()
    assert snapshot.baseline_bytes > MIB
    assert snapshot.limit_bytes > snapshot.effective_limit_bytes > snapshot.baseline_bytes
    assert snapshot.measured_bytes > MIB
    assert str(snapshot.to_dict()["components"][0]["path"]) == "root"
    assert "free" in repr(limiter)


# --- components and bounds


async def test_the_same_path_is_the_same_component() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a.b", minimum=10, firm_limit=20)
    assert limiter.component("a.b") is a
    assert limiter.component("a").component("b") is a
    assert limiter.component("a.b", minimum=10, firm_limit=20) is a
    assert limiter.component("root") is limiter.root
    with pytest.raises(InvalidComponentBounds, match=r"a\.b"):
        limiter.component("a.b", minimum=11)
    with pytest.raises(InvalidComponentBounds, match="firm limit"):
        limiter.component("c", minimum=11, firm_limit=10)
    with pytest.raises(UnknownComponent, match="no component 'x'"):
        limiter.grant(1, component="x")
    async with limiter.grant(1, component="a.b"):
        assert a.statistics().granted_bytes == 1


async def test_bounds_that_do_not_fit_are_refused_before_anything_starts(
    logs: list[Any],
) -> None:
    limiter = testing.limiter(1000)
    small = limiter.component("small", minimum=10)
    limiter.component("large", minimum=1001)
    with pytest.raises(InsufficientMinimumMemory, match="large"):
        async with small:
            pass
    with pytest.raises(InsufficientMinimumMemory):
        async with limiter:
            pass
    limiter = testing.limiter(1000)
    limiter.component("large", firm_limit=1001)
    with pytest.raises(FirmLimitExceedsAvailable):
        limiter.install()

    limiter = testing.limiter(1000, mode="permissive")
    large = limiter.component("large", minimum=1001)
    async with large:
        assert limiter.statistics().free_bytes == -1
        async with large.grant(1001):
            pass
    assert "1 001 bytes" in events(logs, "bounds_do_not_fit")[0]["reason"]
    assert limiter.statistics().free_bytes == 1000

    logs.clear()
    limiter = testing.limiter(1000, mode="disabled")
    async with limiter.component("large", minimum=1001):
        pass
    assert not logs


@pytest.mark.virtual_time
async def test_entering_waits_for_the_minimum_and_counts() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a", minimum=600)
    entered = []

    async def enter() -> None:
        async with a:
            entered.append(anyio.current_time())
            await anyio.sleep(1)

    held = await limiter.component("b").grant(500)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(enter)
        tasks.start_soon(enter)
        await anyio.sleep(3)
        assert entered == []
        held.release()
        await anyio.sleep(0.5)
        assert limiter.statistics().free_bytes == 400
        assert a.statistics().entered == 2
    assert entered == [3, 3]
    assert limiter.statistics().free_bytes == 1000


@pytest.mark.virtual_time
async def test_cancelled_while_entering() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a", minimum=600)
    with limiter.component("b").grant_nowait(500):
        with anyio.move_on_after(1):
            async with a:
                pytest.fail("not entered")
    assert limiter.statistics().free_bytes == 1000
    assert a.statistics().entered == 0


async def test_left_with_grants_out(logs: list[Any]) -> None:
    limiter = testing.limiter(1000)
    async with limiter.component("a", minimum=100) as a:
        grant = a.grant_nowait(150)
    (left,) = events(logs, "left_with_grants_out")
    assert (left["component"], left["granted_bytes"], left["grants"]) == ("a", 150, 1)
    assert limiter.statistics().free_bytes == 850
    grant.release()
    assert limiter.statistics().free_bytes == 1000


# --- scope


async def test_leaks_are_reported_at_the_end_of_the_scope(logs: list[Any]) -> None:
    limiter = testing.limiter(1000)
    async with limiter, limiter:
        grant = limiter.grant_nowait(10)
        await limiter.__aexit__(None, None, None)
        with pytest.warns(ResourceWarning, match="root: 10 bytes"):
            await limiter.__aexit__(None, None, None)
        limiter._entered += 2
        grant.release()
    assert events(logs, "grants_leaked")[0]["granted_bytes"] == {"root": 10}


async def test_the_baseline_is_measured_anew_when_it_starts() -> None:
    probe = ScriptedProbe(100)
    limiter = MemoryLimiter(1000, slop_factor=0, probe=probe)
    assert limiter.statistics().baseline_bytes == 100
    probe.set(300)
    async with limiter:
        assert limiter.statistics().baseline_bytes == 300
        assert limiter.statistics().drift_bytes == 0
        limiter.grant_nowait(1).release()
        probe.set(400)
        limiter.install()
        assert limiter.statistics().baseline_bytes == 300
        limiter.uninstall()


# --- event loops and threads


async def test_a_second_loop_is_refused_while_grants_are_out() -> None:
    limiter = testing.limiter(1000)
    refused: list[BaseException] = []

    async def use() -> None:
        async with limiter.grant(1):
            pass

    def in_thread() -> None:
        try:
            anyio.run(use)
        except LimitError as error:
            refused.append(error)

    async with limiter.grant(1):
        await anyio.to_thread.run_sync(in_thread)
    assert "another event loop" in str(refused[0])
    await anyio.to_thread.run_sync(in_thread)
    assert len(refused) == 1
    await use()


async def test_a_thread_waits_for_what_the_loop_holds() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    sizes: list[int] = []

    def in_thread() -> None:
        with a.grant(300, timeout=10) as grant:
            sizes.append(grant.size)

    async with anyio.create_task_group() as tasks:
        grant = await limiter.component("b").grant(500)
        tasks.start_soon(anyio.to_thread.run_sync, in_thread)
        while not limiter.statistics().waiting:
            await anyio.sleep(0.001)
        grant.release()
    assert sizes == [300]
    assert limiter.statistics().free_bytes == 1000


async def test_the_loop_waits_for_what_a_thread_holds() -> None:
    limiter = testing.limiter(1000)
    waiting = threading.Event()
    held = threading.Event()

    def in_thread() -> None:
        with limiter.grant(500, component="a"):
            held.set()
            waiting.wait(10)

    limiter.component("a")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, in_thread)
        await anyio.to_thread.run_sync(held.wait)

        async def release() -> None:
            while not limiter.statistics().waiting:
                await anyio.sleep(0.001)
            waiting.set()

        tasks.start_soon(release)
        async with limiter.component("b").grant(300):
            pass
    assert limiter.statistics().free_bytes == 1000


def test_threads_without_any_loop() -> None:
    probe = ScriptedProbe(0)
    limiter = testing.limiter(1000, probe=probe)
    with limiter.grant(500, component=limiter.component("a")):
        with pytest.raises(GrantTimeout):
            limiter.grant(300, component=limiter.component("b"), timeout=0.01).__enter__()
        probe.set(940)
    assert limiter.statistics().drift_bytes == 440
    with limiter.grant(400):  # progress
        pass


async def test_blocking_the_loop_is_refused() -> None:
    limiter = testing.limiter(1000)
    with pytest.raises(RuntimeError, match="would block the event loop"):
        limiter.grant(1).__enter__()
    with limiter.grant_nowait(1) as grant:
        assert grant.size == 1


def test_no_loop_at_all() -> None:
    limiter = testing.limiter(1000)
    coroutine = limiter.grant(1).__aenter__()
    with pytest.raises(RuntimeError, match="no event loop"):
        coroutine.send(None)


async def test_a_tight_loop_lets_other_tasks_run() -> None:
    limiter = testing.limiter(1000)
    seen = 0

    async def other() -> None:
        nonlocal seen
        while True:
            seen += 1
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(other)
        while seen < 5:
            async with limiter.grant(1):
                pass
        tasks.cancel_scope.cancel()


def test_a_limit_that_is_set_while_it_is_read_again_is_kept() -> None:
    limiter = testing.limiter("100MiB")

    def read() -> int:
        limiter.resize("50MiB")  # as another thread may
        return 200 * MIB

    limiter._reread_limit = read
    assert limiter.statistics().limit_bytes == 50 * MIB
    assert limiter._reread_limit is None


def test_the_timer_of_a_loop_that_is_served_no_more_does_nothing() -> None:
    limiter = testing.limiter("100MiB", share=1)
    everything = limiter.grant_nowait("100MiB")

    async def wait() -> tuple[Any, Any]:
        with pytest.raises(GrantTimeout):
            await limiter.grant(1, timeout=0.01)
        return limiter._loop, limiter._timer

    first, _ = asyncio.run(wait())
    second, timer = asyncio.run(wait())
    readings = limiter.statistics().samples
    limiter._tick(first)
    assert (limiter._loop, limiter._timer) == (second, timer)
    everything.release()
    assert limiter.statistics().samples == readings + 1
