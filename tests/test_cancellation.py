"""A cancellation at any await loses no byte and no turn.

Every scenario is run again and again, cancelled after its first, second, third, ... step of
the event loop, until it is so late that nothing is cancelled any more. Some of the
cancellations must have met it waiting, and some with a grant. After each the ledger
must be as it was in the beginning.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from membound_async import (
    GrantTimeout,
    LimiterSettings,
    MemoryLimiter,
    PressurePolicy,
    bounded,
    create_memory_stream,
    testing,
)
from membound_async.testing import ScriptedProbe
from tests.left import assert_nothing_is_left

Scenario = Callable[[MemoryLimiter], Awaitable[None]]


async def work() -> None:
    for _ in range(3):
        await anyio.lowlevel.checkpoint()


async def contended(limiter: MemoryLimiter) -> None:
    async with limiter.component("a").grant(300) as grant:
        await work()
        await grant.grow(50)
        await work()


async def awaited(limiter: MemoryLimiter) -> None:
    grant = await limiter.component("a").grant(300, up_to=400)
    try:
        await work()
    finally:
        grant.release()


async def with_timeout(limiter: MemoryLimiter) -> None:
    try:
        async with limiter.component("a").grant(300, timeout=1000):
            await work()
    except GrantTimeout:  # pragma: no cover
        pytest.fail("it should have been served")


async def alone(limiter: MemoryLimiter) -> None:
    async with limiter.component("a").grant(900, oversize="alone"):
        await work()


async def entered(limiter: MemoryLimiter) -> None:
    async with limiter.component("m", minimum=600) as m, m.grant(600):
        await work()


async def nested(limiter: MemoryLimiter) -> None:
    async with limiter.component("a").grant(200):
        async with limiter.component("b").grant(200):
            await work()
        async with limiter.component("m", minimum=100) as m, m.grant(90):
            await work()


async def halves(item: bytes) -> AsyncIterator[bytes]:
    yield item[:120]
    yield item[120:]


async def streamed(limiter: MemoryLimiter) -> None:
    send, receive = create_memory_stream[bytes](component=limiter.component("a"))
    async with send, receive, anyio.create_task_group() as tasks:

        async def produce() -> None:
            for _ in range(3):
                await send.send(bytes(240))
            send.close()

        tasks.start_soon(produce)
        async for item in receive:
            async with bounded(halves(item), component=limiter.component("b")) as parts:
                async for part in parts:
                    assert len(part) == 120
                    await work()


SCENARIOS = [contended, awaited, with_timeout, alone, entered, nested, streamed]


async def rival(limiter: MemoryLimiter) -> None:
    """Hold so much that the scenario has to wait, and let go again and again."""
    for nbytes in (500, 400, 30):
        async with limiter.component("rival").grant(nbytes):
            for _ in range(10):
                await anyio.lowlevel.checkpoint()


def doing(limiter: MemoryLimiter) -> set[str]:
    snapshot = limiter.statistics()
    held = sum(each.granted_bytes for each in snapshot.components if each.path != "rival")
    return {name for name, number in (("waits", snapshot.waiting), ("holds", held)) if number}


async def cancelled_after(
    steps: int, scenario: Scenario, limiter: MemoryLimiter, met: set[str]
) -> bool:
    """Run the scenario, cancel it after so many steps; tell whether it was cancelled."""
    finished = False

    async def run() -> None:
        nonlocal finished
        await scenario(limiter)
        finished = True

    async with anyio.create_task_group() as outer:
        outer.start_soon(rival, limiter)
        await anyio.lowlevel.checkpoint()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            for _ in range(steps):
                await anyio.lowlevel.checkpoint()
            if not finished:
                met |= doing(limiter)
                tasks.cancel_scope.cancel()
    return not finished


@pytest.mark.parametrize("delay", [0, 0.0001], ids=["no delay", "delay"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_cancelled_at_every_step(scenario: Scenario, delay: float) -> None:
    settings = LimiterSettings(
        reclaim=False,
        pressure=PressurePolicy(threshold=0.01, min_delay_seconds=delay, max_delay_seconds=delay),
    )
    met: set[str] = set()
    steps = 0
    for _ in range(5):
        steps = finished = 0
        while finished < 10:  # in a row: trio runs its tasks in an order of chance
            probe: Any = ScriptedProbe(20)  # above the threshold, but no drift
            limiter = testing.limiter(1000, probe=probe, settings=settings)
            limiter._ledger._lowest_free = limiter._ledger.free - 1000
            cancelled = await cancelled_after(steps, scenario, limiter, met)
            snapshot = limiter.statistics()
            assert snapshot.free_bytes + snapshot.drift_bytes == 1000, steps
            assert_nothing_is_left(limiter, steps)
            async with limiter.component("after").grant(100):
                pass
            steps += 1
            finished = 0 if cancelled else finished + 1
            assert steps < 2000
        if met == {"waits", "holds"}:  # by chance, too
            break
    assert met == {"waits", "holds"}
    assert steps > 15


@pytest.mark.virtual_time
async def test_cancelled_after_it_was_admitted_and_before_it_ran() -> None:
    limiter = testing.limiter(1000)
    held = await limiter.component("held").grant(500)
    got: list[str] = []

    async def first(scope: anyio.CancelScope) -> None:
        with scope:
            async with limiter.component("a").grant(300):
                got.append("first")

    async def second() -> None:
        async with limiter.component("b").grant(400):
            got.append("second")

    scope = anyio.CancelScope()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(first, scope)
        tasks.start_soon(second)
        await anyio.sleep(1)
        assert limiter.statistics().waiting == 2
        held.release()  # admits the first; the second does not fit beside it
        assert limiter.statistics().waiting == 1
        scope.cancel()
        await anyio.sleep(1)
    assert got in (["second"], ["first", "second"])  # trio had delivered the wake-up
    assert limiter.statistics().free_bytes == 1000
