"""Hooks: what they are told, when, and that nothing they do matters."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from structlog.testing import capture_logs

from membound_async import (
    GrantTimeout,
    GrantTooLarge,
    LimiterSettings,
    MemoryLimiter,
    QuotaExceeded,
    testing,
)
from membound_async.eventlog import BURST, EventLog
from membound_async.hooks import (
    DriftRose,
    Event,
    GrantDelayed,
    GrantLeaked,
    GrantRefused,
    GrantWaited,
    LimitChanged,
    Reclaimed,
    Stalled,
    StallEnded,
)
from membound_async.testing import ScriptedProbe


class Ears:
    """A hook that keeps what it is told, and checks that the limiter's lock is free meanwhile."""

    def __init__(self, limiter: MemoryLimiter) -> None:
        self.limiter = limiter
        self.heard: list[Event] = []
        limiter.add_hook(self)

    def __call__(self, event: Event) -> None:
        assert not self.limiter._lock.locked()
        self.heard.append(event)

    def take(self) -> list[Event]:
        """Give what was heard since the last time."""
        heard, self.heard = self.heard, []
        return heard


@pytest.mark.virtual_time
async def test_a_wait_is_told_when_it_is_over() -> None:
    limiter = testing.limiter(1000)
    ears = Ears(limiter)
    a = limiter.component("a")
    held = await a.grant(400)
    assert ears.take() == []  # had at once, it is no event
    async with anyio.create_task_group() as tasks:

        async def wait() -> None:
            async with a.grant(300):
                pass

        tasks.start_soon(wait)
        await anyio.sleep(2)
        assert ears.take() == []
        held.release()
    assert ears.take() == [GrantWaited("a", 300, 2.0)]


@pytest.mark.virtual_time
async def test_refusals_are_told_with_their_errors() -> None:
    limiter = testing.limiter(1000)
    ears = Ears(limiter)
    a = limiter.component("a")
    held = await a.grant(400)
    with pytest.raises(QuotaExceeded) as exceeded:
        a.grant_nowait(200)
    assert ears.take() == [GrantRefused("a", 200, exceeded.value)]
    with pytest.raises(GrantTimeout) as timed_out:
        await a.grant(300, timeout=1)
    assert ears.take() == [GrantRefused("a", 300, timed_out.value)]
    with pytest.raises(GrantTooLarge) as too_large:
        await a.grant(501)
    assert ears.take() == [GrantRefused("a", 501, too_large.value)]
    with anyio.move_on_after(1):
        await a.grant(300)
    assert ears.take() == []  # it was not refused, but called off
    held.release()


async def test_a_refusal_in_a_thread_is_told_there() -> None:
    limiter = testing.limiter(1000)
    ears = Ears(limiter)
    threads: list[int] = []
    limiter.add_hook(lambda _: threads.append(threading.get_ident()))

    def work() -> int:
        with pytest.raises(GrantTooLarge), limiter.grant(501):
            pass
        return threading.get_ident()

    assert await anyio.to_thread.run_sync(work) == threads[0]
    assert [type(event) for event in ears.take()] == [GrantRefused]


@pytest.mark.virtual_time
async def test_delays_drift_and_a_changed_limit_are_told() -> None:
    probe = ScriptedProbe(0)
    limiter = testing.limiter(1000, probe=probe)
    ears = Ears(limiter)
    probe.set(1000)
    limiter.statistics()
    assert ears.take() == [DriftRose(1000, 1000, 0)]
    probe.set(970)
    limiter.statistics()
    probe.set(1000)
    limiter.statistics()
    assert ears.take() == []  # no more than was told
    probe.set(100)
    limiter.statistics()
    assert ears.take() == []
    probe.set(300)
    limiter.statistics()
    assert ears.take() == [DriftRose(300, 300, 700)]
    limiter.resize(2000)
    assert ears.take() == [LimitChanged(2000, 1000, "resize()")]


@pytest.mark.virtual_time
async def test_a_delay_is_told() -> None:
    probe = ScriptedProbe(0)
    limiter = testing.limiter(1000, probe=probe, settings=LimiterSettings(reclaim=False))
    a = limiter.component("a")
    ears = Ears(limiter)
    async with a.grant(500):
        probe.set(975)
        limiter.statistics()
        held = await limiter.component("b").grant(10, timeout=1)
        held.release()
    delayed = [event for event in ears.take() if not isinstance(event, DriftRose)]
    assert delayed == [GrantDelayed("b", 10, limiter.settings.pressure.delay_seconds(975, 1000))]


@pytest.mark.virtual_time
async def test_a_stall_is_told_once_with_its_end() -> None:
    limiter = testing.limiter(1000)
    ears = Ears(limiter)
    a = limiter.component("a")
    held = await a.grant(400)
    async with anyio.create_task_group() as tasks:

        async def wait() -> None:
            async with a.grant(300):
                pass

        tasks.start_soon(wait)
        await anyio.sleep(25)
        (stalled,) = ears.take()
        assert isinstance(stalled, Stalled)
        assert (stalled.free_bytes, stalled.waiting) == (600, 1)
        assert [each["granted_bytes"] for each in stalled.holders] == [400]
        assert 24 < limiter.statistics().stalled_seconds <= 25
        held.release()
        assert limiter.statistics().stalled_seconds == 0
        await anyio.sleep(1)
    assert {type(event) for event in ears.take()} == {GrantWaited, StallEnded}


async def test_a_leak_is_told() -> None:
    limiter = testing.limiter(1000)
    ears = Ears(limiter)
    held = await limiter.component("a").grant(300)
    with pytest.warns(ResourceWarning):
        del held
    await anyio.lowlevel.checkpoint()
    await anyio.lowlevel.checkpoint()
    assert ears.take() == [GrantLeaked("a", 300)]


@pytest.mark.virtual_time
async def test_what_was_reclaimed_is_told() -> None:
    probe = ScriptedProbe(0)
    limiter = testing.limiter(1000, probe=probe)
    ears = Ears(limiter)

    def shrink(wanted: int) -> int:
        probe.set(probe.read() - wanted)
        return wanted

    with limiter.add_reclaimer(shrink, name="cache"):
        async with limiter.grant(1):
            probe.set(980)
            limiter.statistics()
            await anyio.sleep(1)
    assert Reclaimed("cache", 980 - 902, 980 - 902, 980 - 902, 0.0) in ears.take()


async def test_a_hook_that_fails_harms_nobody_and_is_named_once() -> None:
    limiter = testing.limiter(1000)

    def broken(event: Event) -> None:
        raise ZeroDivisionError(event.name)

    failing = limiter.add_hook(broken)
    ears = Ears(limiter)
    with capture_logs() as logs:
        for _ in range(3):
            with pytest.raises(GrantTooLarge):
                await limiter.grant(501)
    assert len(ears.take()) == 3
    failures = [each for each in logs if each["event"] == "membound.hook_failed"]
    assert [(each["error"], each["on"]) for each in failures] == [
        ("ZeroDivisionError('membound.grant_refused')", "membound.grant_refused")
    ]
    assert "broken" in failures[0]["hook"]
    failing.remove()


async def test_a_hook_is_removed_once_and_by_a_block() -> None:
    limiter = testing.limiter(1000)
    told: list[Event] = []

    async def refuse() -> int:
        told.clear()
        with pytest.raises(GrantTooLarge):
            await limiter.grant(501)
        return len(told)

    first, second = limiter.add_hook(told.append), limiter.add_hook(told.append)
    assert await refuse() == 2
    first.remove()
    first.remove()
    assert await refuse() == 1
    with second, limiter.add_hook(told.append):
        assert await refuse() == 2
    assert await refuse() == 0
    with pytest.raises(TypeError, match="hook=None is no function"):
        limiter.add_hook(None)  # type: ignore[arg-type]


# --- the log


def written(log: EventLog, *events: Event) -> list[dict[str, Any]]:
    """Give what is written of some events."""
    with capture_logs() as logs:
        for event in events:
            log(event)
    return [dict(each) for each in logs]


def test_pressure_floods_no_log() -> None:
    now = [0.0]
    log = EventLog(10.0, lambda: now[0])
    flood = [GrantWaited(f"c{number % 50}", 1, 0.12345) for number in range(1000)]
    first = written(log, *flood)
    assert [each["component"] for each in first] == [f"c{number}" for number in range(BURST)]
    assert first[0]["waited_seconds"] == 0.123
    now[0] = 9.9
    assert written(log, *flood) == []
    assert len(written(log, GrantDelayed("c1", 1, 0.01))) == 1  # of another kind
    now[0] = 10.0
    again = written(log, *flood)
    assert len(again) == BURST
    assert again[0]["suppressed"] == 19 + 20
    now[0] = 20.0
    assert written(log, GrantWaited("c40", 1, 1.0))[0]["suppressed"] == 60


@pytest.mark.parametrize(("interval_seconds", "written"), [(3600.0, 1), (1e-6, 4)])
async def test_a_limiter_logs_what_happens(interval_seconds: float, written: int) -> None:
    settings = LimiterSettings(log_interval_seconds=interval_seconds)
    limiter = testing.limiter(1000, settings=settings)
    a = limiter.component("a")
    with capture_logs() as logs:
        for _ in range(4):
            with pytest.raises(GrantTooLarge):
                await a.grant(501)
    assert [each["event"] for each in logs] == ["membound.grant_refused"] * written
    assert logs[0]["log_level"] == "info"
    assert logs[0]["error"] == "GrantTooLarge"
    assert "501 bytes" in logs[0]["reason"]
