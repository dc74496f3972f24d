"""Snapshots: what each grant and each request that waits says of itself, and what they cost."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict
from functools import partial
from typing import Any

import anyio
import pytest

from membound_async import HeldGrant, MemoryLimiter, ResourceLimits, WaitingRequest, testing
from tests.calls import counted


@pytest.mark.virtual_time
async def test_grants_that_are_held_the_largest_first() -> None:
    limiter = testing.limiter(10_000, resources=ResourceLimits(fds=10))
    a, b = limiter.component("a"), limiter.component("b")
    first = await a.grant(100)
    await anyio.sleep(2)
    second = await b.grant(300, sender="x", also={"fds": 2})
    third = await b.grant(100)
    await anyio.sleep(1)
    described = [
        HeldGrant(
            component="b",
            sender="x",
            size_bytes=300,
            also={"fds": 2},
            age_seconds=1,
            is_alone=False,
        ),
        HeldGrant(
            component="a", sender=None, size_bytes=100, also={}, age_seconds=3, is_alone=False
        ),
        HeldGrant(
            component="b", sender=None, size_bytes=100, also={}, age_seconds=1, is_alone=False
        ),
    ]
    assert limiter.held_grants() == described
    assert limiter.held_grants(1) == described[:1]
    assert limiter.held_grants(2, skip=1) == described[1:]
    assert limiter.held_grants(skip=3) == limiter.held_grants(0) == []
    first.release()
    second.deliver({"fds": 0})
    assert [(one.sender, one.also) for one in limiter.held_grants()] == [(None, {}), (None, {})]
    part = second.split(50)
    await third.transfer("a")
    assert [(one.component, one.size_bytes) for one in limiter.held_grants()] == [
        ("b", 250),
        ("a", 100),
        ("b", 50),
    ]
    counts = {one.path: one.grants for one in limiter.statistics().components}
    assert counts == {"a": 1, "b": 2, "root": 0}
    for grant in (second, part, third):
        grant.release()
    assert limiter.held_grants() == []
    async with limiter.grant(8000, oversize="alone"):
        assert [one.is_alone for one in limiter.held_grants()] == [True]


@pytest.mark.virtual_time
async def test_requests_that_wait_the_oldest_first() -> None:
    limiter = testing.limiter(1000, resources=ResourceLimits(fds=10))
    a = limiter.component("a", firm_limit=450)
    b, c = limiter.component("b"), limiter.component("c")
    held = await a.grant(400)
    files = await c.grant(0, also={"fds": 5})

    async def wait(component: Any, nbytes: int, **options: Any) -> None:
        async with component.grant(nbytes, **options):
            pass

    async with anyio.create_task_group() as tasks:
        requests: list[tuple[Any, int, dict[str, Any]]] = [
            (a, 100, {}),
            (a, 10, {}),
            (b, 310, {"timeout": 100}),
            (b, 200, {"sender": "x"}),
            (c, 0, {"also": {"fds": 4}}),
        ]
        for component, nbytes, options in requests:
            tasks.start_soon(partial(wait, component, nbytes, **options))
            await anyio.sleep(1)
        waiting = limiter.waiting_requests()
        assert waiting == limiter.waiting_requests(9)
        assert [
            (
                one.component,
                one.sender,
                one.wanted_bytes,
                one.waits_for,
                one.threshold_bytes,
                one.missing,
                one.waited_seconds,
            )
            for one in waiting
        ] == [
            ("a", None, 100, "firm limit", 600, 50, 5),
            ("a", None, 10, "turn", 420, 0, 4),
            ("b", None, 310, "bytes", 620, 20, 3),
            ("b", "x", 200, "bytes", 800, 200, 2),
            ("c", None, 0, "fds", None, 8, 1),
        ]
        assert all(isinstance(one, WaitingRequest) for one in waiting)
        tasks.cancel_scope.cancel()
    held.release()
    files.release()
    assert limiter.waiting_requests() == []


def test_pages_are_checked() -> None:
    limiter = testing.limiter(1000)
    for ask in (limiter.held_grants, limiter.waiting_requests):
        with pytest.raises(ValueError, match="most=-1, skip=0: neither may be negative"):
            ask(-1)
        with pytest.raises(ValueError, match="most=None, skip=-2"):
            ask(skip=-2)


def calls(function: Any) -> int:
    """Count what a function calls, in Python and in C."""
    gc.disable()
    try:
        with counted() as made:
            function()
    finally:
        gc.enable()
    return made.count


@pytest.mark.parametrize("observe", [False, True])
async def test_a_snapshot_costs_nothing_for_grants_and_waiters(observe: bool) -> None:
    limiter = testing.limiter(100_000, observe=observe)
    a, b = limiter.component("a"), limiter.component("b")

    def cost() -> int:
        return calls(lambda: limiter.statistics().to_dict())

    async def wait() -> None:
        async with b.grant(30_000):
            await anyio.sleep_forever()

    async with anyio.create_task_group() as tasks:
        held = [await a.grant(30_000), await b.grant(1), await b.grant(1, sender="x")]
        tasks.start_soon(wait)
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        cost()
        before = cost()
        for _ in range(200):
            held.append(await a.grant(1))
            tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        after = cost()
        statistics = limiter.statistics()
        tasks.cancel_scope.cancel()
    assert statistics.grants + statistics.waiting > 400
    assert abs(after - before) < 5  # of more than 100
    for each in held:
        each.release()


async def test_a_snapshot_as_plain_data() -> None:
    limiter: MemoryLimiter = testing.limiter(10_000, resources=ResourceLimits(fds=3))
    limiter.component("a", minimum=10, firm_limit=20)
    with limiter.add_reclaimer(lambda _: 0, name="cache"):
        async with limiter.grant(5, also={"fds": 1}):
            snapshot = limiter.statistics()
    plain = snapshot.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain == {
        **asdict(snapshot),
        "components": [asdict(one) for one in snapshot.components],
        "reclaimers": [asdict(one) for one in snapshot.reclaimers],
    }
    assert plain["resources"] == {"fds": {"limit": 3, "free": 2}}
    assert plain["components"][0]["firm_limit_bytes"] == 20
