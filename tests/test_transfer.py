"""Grants that are divided, handed on, shared and delivered; with and without the extension."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from structlog.testing import capture_logs

from membound_async import (
    Component,
    GrantReleased,
    GrantTooLarge,
    LimiterSettings,
    MemoryGrant,
    MemoryLimiter,
    PressurePolicy,
    QuotaExceeded,
    ResourceLimits,
    testing,
)
from membound_async.fastpath import EXTENSION


def has(component: Component) -> tuple[int, int]:
    """Give what a component was granted, and what is in flight to it."""
    account = component._account
    return account.granted, account.in_flight


def state(limiter: MemoryLimiter) -> list[Any]:
    """Give everything that a refused request must leave alone."""
    ledger = limiter._ledger
    return [
        {name: (pool.free, pool.consumers) for name, pool in ledger.pools.items()},
        ledger.moved,
        ledger.waiters.count,
        [
            (
                account.name,
                [
                    (stock.resource, stock.granted, stock.in_flight, stock.senders)
                    for stock in account.stocks()
                    if stock.granted or stock.in_flight
                ],
                {name: dict(sender.held) for name, sender in account.by_sender.items()},
            )
            for account in ledger.accounts.values()
        ],
        len(limiter._held()),
    ]


async def steps(count: int) -> None:
    for _ in range(count):
        await anyio.lowlevel.checkpoint()


@pytest.mark.slow
@pytest.mark.skipif(not EXTENSION, reason="this is the run without it")
def test_all_this_without_the_extension() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))],
        env=os.environ | {"MEMBOUND_EXTENSION": "no"},
        cwd=Path(__file__).parent.parent,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert "1 skipped" in done.stdout


# --- split


async def test_split_gives_a_part_a_life_of_its_own() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    async with a.grant(300) as g:
        part = g.split(100)
        assert (g.size, part.size, part.component, has(a)) == (200, 100, a, (300, 0))
        assert limiter.statistics().grants == 2
        await part.grow(10)
        part.shrink(5)
        assert (g.size, part.size, has(a)) == (200, 105, (305, 0))
        async with part:
            assert has(a) == (305, 0)
        assert has(a) == (200, 0)
        nothing = g.split(0)
        everything = g.split("200B")
        assert (nothing.size, everything.size, g.size) == (0, 200, 0)
        nothing.release()
    assert has(a) == (200, 0)
    everything.release()
    everything.release()
    assert has(a) == (0, 0)
    assert limiter.statistics().grants == 0


async def test_split_refuses_without_effect() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    g = a.grant(10)
    with pytest.raises(RuntimeError, match="split: this grant is not held yet"):
        g.split(1)
    async with g:
        before = state(limiter)
        with pytest.raises(ValueError, match="cannot split a grant of 10 bytes by 11 bytes"):
            g.split(11)
        with pytest.raises(ValueError, match="nbytes=-1"):
            g.split(-1)
        assert (state(limiter), g.size) == (before, 10)
    with pytest.raises(GrantReleased, match="split"):
        g.split(0)


async def test_a_part_of_what_is_in_flight_is_in_flight() -> None:
    limiter = testing.limiter(1000, resources=ResourceLimits(fds=100))
    a = limiter.component("a")
    async with a.grant(100, sender="s", also={"fds": 4}) as g:
        part = g.split(40)
        assert (part.sender, dict(part.also), dict(g.also)) == ("s", {}, {"fds": 4})
        assert has(a) == (0, 100)
        part.deliver()
        assert (part.sender, has(a)) == (None, (40, 60))
        part.release()
        assert has(a) == (0, 60)
    assert has(a) == (0, 0)
    assert limiter._ledger.pools["fds"].free == 100


# --- transfer


async def test_transfer_is_decided_with_the_grant_taken_out_first() -> None:
    limiter = testing.limiter(1000)
    a, b = limiter.component("a"), limiter.component("b")
    g = await a.grant(500)
    with pytest.raises(QuotaExceeded):  # besides it, b could have 250
        b.grant_nowait(500)
    await g.transfer(b)
    assert (g.component, g.size, has(a), has(b)) == (b, 500, (0, 0), (500, 0))
    g.transfer_nowait("a")
    assert (g.component, g.size, has(a), has(b)) == (a, 500, (500, 0), (0, 0))
    assert limiter.statistics().free_bytes == 500
    async with g:
        pass
    assert (has(a), limiter.statistics().free_bytes) == ((0, 0), 1000)


async def test_transfer_takes_other_resources_along() -> None:
    limiter = testing.limiter(1000, resources=ResourceLimits(fds=10))
    a, b = limiter.component("a"), limiter.component("b")
    async with a.grant(100, also={"fds": 5}) as g:
        await g.transfer(b)
        assert (dict(g.also), b._account.others["fds"].granted) == ({"fds": 5}, 5)
        assert a._account.others["fds"].granted == 0
    assert limiter._ledger.pools["fds"].free == 10
    assert b._account.others["fds"].granted == 0


@pytest.mark.parametrize("how", ["served", "cancelled", "released", "left"])
async def test_transfer_waits(how: str) -> None:
    limiter = testing.limiter(1000)
    a, b, c = (limiter.component(name) for name in "abc")
    other = await c.grant(400)
    mine = await b.grant(100)
    g = await a.grant(250)  # 2*250 + 100 for b, and with it 250 + 250 are free
    outcome: list[str] = []

    async def hand_on() -> None:
        try:
            await g.transfer(b)
            outcome.append("b's")
        except GrantReleased as error:
            outcome.append(str(error).partition(":")[0])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(hand_on)
        await steps(10)
        assert limiter.statistics().waiting == 1
        assert (g.component, g.size, has(a), has(b)) == (a, 250, (250, 0), (100, 0))
        for change in (g.share, lambda: g.shrink(1), lambda: g.transfer_nowait(c)):
            with pytest.raises(RuntimeError, match="another task is waiting to change"):
                change()
        match how:
            case "served":
                other.release()
            case "cancelled":
                tasks.cancel_scope.cancel()
            case "released":
                g.release()
            case _:
                async with b:
                    pass
                mine.release()
    expected = {"served": ["b's"], "left": ["b's"], "released": ["transfer"], "cancelled": []}
    assert outcome == expected[how]
    assert limiter.statistics().waiting == 0
    assert g.component is (b if outcome == ["b's"] else a)
    assert g.size == (0 if how == "released" else 250)
    for grant in (g, other, mine):
        grant.release()
    assert (has(a), has(b), has(c)) == ((0, 0), (0, 0), (0, 0))
    assert limiter.statistics().free_bytes == 1000
    assert limiter.statistics().grants == 0


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("delay", [0, 0.0001])
@pytest.mark.parametrize("observe", [False, True])
async def test_transfer_cancelled_or_released_at_every_step(
    release: bool, delay: float, observe: bool
) -> None:
    settings = LimiterSettings(
        reclaim=False,
        pressure=PressurePolicy(threshold=0.01, min_delay_seconds=delay, max_delay_seconds=delay),
    )
    after, finished = 0, 0
    met: set[str] = set()
    while finished < 5:
        limiter = testing.limiter(
            1000,
            settings=settings,
            observe=observe,
            probe=testing.ScriptedProbe(20),
            resources=ResourceLimits(fds=100),
        )
        limiter._ledger._lowest_free = limiter._ledger.free - 1000
        a, b, c = (limiter.component(name) for name in "abc")
        other = await c.grant(400)
        mine = await b.grant(100)
        g = await a.grant(250, also={"fds": 2})
        limiter._yield_at = 0.0  # so that it yields first
        told: list[object] = []

        async def hand_on(g: MemoryGrant = g, b: Component = b, told: list[object] = told) -> None:
            try:
                await g.transfer(b)
                told.append(b)
            except GrantReleased:
                told.append("released")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hand_on)
            for step in range(after):
                if step == 6:
                    other.release()
                await anyio.lowlevel.checkpoint()
            hit = not told
            if hit:
                met.add("waits" if limiter.statistics().waiting else "runs")
            if release:
                g.release()
            else:
                tasks.cancel_scope.cancel()
            other.release()
        if hit and not release:
            assert (told, g.component) in (([], a), ([b], b)), after
        assert (has(a)[0], has(b)[0]) == (
            (0, 100) if release else (250, 100) if g.component is a else (0, 350)
        ), after
        fds = 0 if release else 2
        assert limiter._ledger.pools["fds"].free == 100 - fds, after
        g.release()
        mine.release()
        snapshot = limiter.statistics()
        assert (snapshot.grants, snapshot.waiting, snapshot.committed_bytes) == (0, 0, 0), after
        assert limiter._ledger.pools["fds"].free == 100, after
        after += 1
        finished = 0 if hit else finished + 1
        assert after < 1000
    assert met == ({"runs"} if observe else {"runs", "waits"})


async def test_transfer_nowait_refuses_without_effect() -> None:
    limiter = testing.limiter(1000, resources=ResourceLimits(fds=10))
    a, b = limiter.component("a"), limiter.component("b")
    small = limiter.component("small", firm_limit=200)
    few = limiter.component("few", limits=ResourceLimits(fds=1))
    async with b.grant(201, also={"fds": 2}), a.grant(300, also={"fds": 2}) as g:
        before = state(limiter)
        refusals: list[tuple[Component, type[QuotaExceeded | GrantTooLarge], str]] = [
            (b, QuotaExceeded, "bytes"),
            (small, GrantTooLarge, "bytes"),
            (few, GrantTooLarge, "fds"),
        ]
        for target, error, resource in refusals:
            with pytest.raises(error) as caught:
                g.transfer_nowait(target)
            refused: Any = caught.value
            assert refused.resource == resource
            assert state(limiter) == before
            assert (g.component, g.size, dict(g.also)) == (a, 300, {"fds": 2})
        for target in (small, few):
            with pytest.raises(GrantTooLarge):
                await g.transfer(target)
            assert state(limiter) == before
        g.shrink(100)  # and it can be changed still
    assert limiter.statistics().free_bytes == 1000


async def test_transfer_to_itself_changes_nothing() -> None:
    limiter = testing.limiter(1000)
    a, b = limiter.component("a"), limiter.component("b")
    g = await a.grant(500)
    async with b.grant(250):  # now a could not have them any more
        before = state(limiter)
        await g.transfer(a)
        g.transfer_nowait("a")
        assert state(limiter) == before
    g.release()
    with pytest.raises(GrantReleased):
        await g.transfer(a)
    assert limiter.statistics().free_bytes == 1000


async def test_what_cannot_be_transferred() -> None:
    limiter, elsewhere = testing.limiter(1000), testing.limiter(1000)
    a, b = limiter.component("a"), limiter.component("b")
    async with a.grant(10, sender="s") as g:
        with pytest.raises(ValueError, match=r"transfer: it is in flight; deliver\(\) it first"):
            await g.transfer(b)
        g.deliver()
        await g.transfer(b)
        with pytest.raises(ValueError, match="belongs to another limiter"):
            await g.transfer(elsewhere.component("a"))
        with pytest.raises(LookupError, match="'nobody'"):
            g.transfer_nowait("nobody")
        handle = g.share()
        with pytest.raises(ValueError, match="transfer_nowait: it is shared"):
            g.transfer_nowait(a)
        handle.release()
    with pytest.raises(GrantReleased, match="transfer"):
        await g.transfer(a)
    async with a.grant(900, oversize="alone") as g:
        for refused in (lambda: g.transfer_nowait(b), g.share):
            with pytest.raises(ValueError, match=r"holds the pool alone; shrink\(\) it first"):
                refused()
        g.shrink(500)
        g.transfer_nowait(b)
    assert limiter.statistics().free_bytes == 1000


async def test_where_nothing_is_limited_grants_are_changed_all_the_same() -> None:
    limiter = MemoryLimiter.noop()
    a, b = limiter.component("a"), limiter.component("b")
    async with a.grant("1TiB") as g:
        part = g.split(5)
        await part.transfer(b)
        assert (has(a)[0], has(b)[0]) == (2**40 - 5, 5)
        handle = part.share()
        part.release()
        assert has(b) == (5, 0)
        handle.release()
    assert limiter.statistics().committed_bytes == 0


# --- share


async def test_what_is_shared_is_given_back_with_its_last_handle() -> None:
    limiter = testing.limiter(1000, resources=ResourceLimits(fds=10))
    a = limiter.component("a")
    async with a.grant(300, also={"fds": 3}) as g:
        handles = [g.share() for _ in range(3)]
        handles.append(handles[0].share())
        assert (has(a), limiter.statistics().grants) == ((300, 0), 5)
        assert {(each.size, each.also["fds"]) for each in handles} == {(300, 3)}
        for change in (
            lambda: g.shrink(0),
            lambda: g.split(1),
            lambda: g.grow_nowait(1),
            lambda: handles[0].resize(1),
            handles[0].deliver,
        ):
            with pytest.raises(ValueError, match="it is shared"):
                change()
        with pytest.raises(ValueError, match="it is shared"):
            await g.grow(1)
    for handle in handles:
        assert (has(a), limiter._ledger.pools["fds"].free) == ((300, 0), 7)
        handle.release()
        handle.release()
    assert (has(a), limiter._ledger.pools["fds"].free) == ((0, 0), 10)
    with pytest.raises(GrantReleased, match="share"):
        g.share()


async def test_a_handle_that_is_dropped_is_given_back_and_warned_about() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    with capture_logs() as logs:
        async with a.grant(300) as g:
            with pytest.warns(ResourceWarning, match="'a': 300 bytes, held"):
                g.share()
            await steps(3)
            assert has(a) == (300, 0)
        assert limiter.statistics().free_bytes == 1000
    assert [entry["event"] for entry in logs] == ["membound.grant_leaked"]


async def test_what_is_shared_in_flight_stays_its_senders_until_the_last_handle() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    g = await a.grant(100, sender="s")
    handle = g.share()
    assert handle.sender == "s"
    g.release()
    assert (has(a), [*a._account.by_sender]) == ((0, 100), ["s"])
    handle.release()
    assert (has(a), [*a._account.by_sender]) == ((0, 0), [])


# --- deliver, also, sender


async def test_deliver_makes_it_the_components_own_and_settles() -> None:
    limiter = testing.limiter(1000, resources=ResourceLimits(handles=100, fds=100))
    a = limiter.component("a")
    pools = limiter._ledger.pools
    async with a.grant(100, sender="s", also={"handles": 9, "fds": 2}) as g:
        before = state(limiter)
        for settle in ({"handles": 10}, {"handles": -1}, {"slices": 1}):
            with pytest.raises(ValueError, match="deliver: cannot settle"):
                g.deliver(settle)
            assert state(limiter) == before
        g.deliver({"handles": 4, "fds": 0})
        assert (g.sender, g.size, dict(g.also)) == (None, 100, {"handles": 4})
        assert (has(a), a._account.by_sender) == ((100, 0), {})
        assert (pools["handles"].free, pools["fds"].free) == (96, 100)
        with pytest.raises(ValueError, match="deliver: it is not in flight"):
            g.deliver()
        await g.grow(5)
        assert has(a) == (105, 0)
    assert (pools["bytes"].free, pools["handles"].free, dict(g.also)) == (1000, 100, {})
    with pytest.raises(GrantReleased):
        g.deliver()


async def test_what_is_delivered_lets_the_sender_in_again() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    first = await a.grant(250, sender="s")
    async with anyio.create_task_group() as tasks:
        second = a.grant(110, sender="s")

        async def enter() -> None:
            await second

        tasks.start_soon(enter)
        await steps(5)
        assert (second.size, limiter.statistics().waiting) == (0, 1)
        first.deliver()  # 4*110 + 250 of the 750 that are free
    assert (second.size, has(a)) == (110, (250, 110))
    second.release()
    first.release()


async def test_what_is_in_flight_grows_in_its_senders_part() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    async with a.grant(100, sender="s") as g:
        await g.grow(100)
        g.grow_nowait(50)
        assert has(a) == (0, 250)
        with pytest.raises(GrantTooLarge) as caught:
            g.grow_nowait(1)
        assert (caught.value.wanted_bytes, caught.value.most_bytes) == (251, 250)
        g.shrink(150)
        assert (has(a), a._account.by_sender["s"].held[a._account]) == ((0, 100), 100)
    assert has(a) == (0, 0)


async def test_resources_are_granted_all_or_none() -> None:
    limiter = testing.limiter(1000, resources=ResourceLimits(fds=10, gpus=4))
    a = limiter.component("a")
    async with a.grant(0, also={"gpus": 2}):
        before = state(limiter)
        with pytest.raises(QuotaExceeded) as caught:
            a.grant_nowait(100, also={"fds": 2, "gpus": 1})
        assert (caught.value.resource, caught.value.wanted_bytes) == ("gpus", 1)
        assert caught.value.available_bytes == 0
        assert state(limiter) == before
        with pytest.raises(GrantTooLarge) as too_large:
            await a.grant(100, also={"fds": 6})
        assert (too_large.value.resource, too_large.value.most_bytes) == ("fds", 5)
        assert state(limiter) == before
    async with limiter.grant(10, also={"fds": 0}) as g:
        assert dict(g.also) == {}
        with pytest.raises(TypeError):
            g.also["fds"] = 1  # type: ignore[index]


async def test_what_nothing_limits_is_refused_with_the_remedy() -> None:
    limiter = testing.limiter(1000, resources=ResourceLimits(fds=10))
    a = limiter.component("a")
    with pytest.raises(
        ValueError,
        match=r"nothing limits 'slices' of 'a' \(limited: fds\); give the limiter or the "
        r"component a limit of it, ResourceLimits\(",
    ):
        a.grant(1, also={"slices": 1})
    with pytest.raises(ValueError, match="nothing limits 'bytes'"):
        a.grant(1, also={"bytes": 1})
    no_amounts: list[Any] = [-1, 1.5, True, "3", None, 2**53 + 1]
    for amount in no_amounts:
        with pytest.raises(ValueError, match=r"fds=.* must be a whole number, 0 or more"):
            a.grant(1, also={"fds": amount})
    with pytest.raises(TypeError, match="unhashable"):
        a.grant(1, sender=[])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="up_to= is for a component's own grants"):
        a.grant(1, up_to=2, sender="s")
    for options in [{"sender": "s"}, {"also": {"fds": 1}}]:
        with pytest.raises(ValueError, match='oversize="alone" is for bytes of a component'):
            a.grant(1, oversize="alone", **options)  # type: ignore[arg-type]
    noop = MemoryLimiter.noop()
    async with noop.grant(1, also={"anything": 3}) as g:
        assert dict(g.also) == {}
