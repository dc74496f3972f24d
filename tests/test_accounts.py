"""Accounts: components that divide limits of their own among themselves."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from membound_async import (
    Account,
    AccountUsage,
    GrantTooLarge,
    Inbox,
    InvalidComponentBounds,
    QuotaExceeded,
    ResourceLimits,
    testing,
)


async def test_an_account_divides_its_limits_by_the_same_rule() -> None:
    limiter = testing.limiter(10_000, resources=ResourceLimits(fds=1000))
    account = limiter.account("tenant", ResourceLimits(800, fds=80, tickets=8))
    assert isinstance(account, Account)
    assert "'tenant'" in repr(account)
    a, b = account.component("a"), account.component("b")
    assert (account.component("a"), limiter.component("a")) == (a, a)
    outside = limiter.component("outside")
    with a.grant_nowait(400, also={"fds": 40, "tickets": 4}):
        assert account.usage() == {
            "bytes": AccountUsage(800, 400),
            "fds": AccountUsage(80, 40),
            "tickets": AccountUsage(8, 4),
        }
        for amounts, most in (({"bytes": 201}, 200), ({"fds": 21}, 20), ({"tickets": 3}, 2)):
            (resource,) = amounts
            also = {} if resource == "bytes" else amounts
            with pytest.raises(QuotaExceeded) as caught:
                b.grant_nowait(amounts.get("bytes", 0), also=also)
            assert (caught.value.resource, caught.value.available_bytes) == (resource, most)
        with b.grant_nowait(200, also={"fds": 20, "tickets": 2}):
            assert account.usage()["bytes"].free == 200
            with outside.grant_nowait(4700, also={"fds": 470}):  # half of what is free to all
                pass
        for amounts in ({"tickets": 5}, {"fds": 41}):
            with pytest.raises(GrantTooLarge):
                b.grant_nowait(0, also=amounts)
        with pytest.raises(GrantTooLarge, match="401 bytes"):
            b.grant_nowait(401)
    assert {each.limit - each.free for each in account.usage().values()} == {0}
    assert limiter._ledger.pools["fds"].free == 1000


async def test_the_limiters_rule_holds_besides() -> None:
    limiter = testing.limiter(1000, resources=ResourceLimits(fds=10))
    account = limiter.account("tenant", ResourceLimits(100_000, fds=1000))
    a = account.component("a")
    other = limiter.component("other").grant_nowait(400, also={"fds": 4})
    for nbytes, fds, resource, most in ((301, 0, "bytes", 300), (0, 4, "fds", 3)):
        with pytest.raises(QuotaExceeded) as caught:
            a.grant_nowait(nbytes, also={"fds": fds})
        assert (caught.value.resource, caught.value.available_bytes) == (resource, most)
    with a.grant_nowait(300, also={"fds": 3}):
        pass
    other.release()
    with pytest.raises(GrantTooLarge) as too_large:
        await a.grant(501)
    assert too_large.value.most_bytes == 500


async def test_components_of_an_account_wait_for_each_other() -> None:
    limiter = testing.limiter(10_000)
    account = limiter.account("tenant", ResourceLimits(800))
    a, b = account.component("a"), account.component("b")
    first = a.grant_nowait(400)
    order: list[str] = []

    async def take(component: str, nbytes: int) -> None:
        async with limiter.grant(nbytes, component=component):
            order.append(component)

    limiter.component("c")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take, "b", 300)
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        tasks.start_soon(take, "c", 4000)  # nobody else has to wait for them
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        assert (order, limiter.statistics().waiting) == (["c"], 1)
        first.release()
    assert order == ["c", "b"]
    assert (account.usage()["bytes"].free, b.statistics().granted_bytes) == (800, 0)


async def test_inboxes_of_an_account() -> None:
    limiter = testing.limiter(10_000)
    account = limiter.account("peer", ResourceLimits(800, slices=80))
    a, b = Inbox[bytes](account.component("a")), Inbox[bytes](account.component("b"))
    a.send_nowait(bytes(200), sender="x")  # half of a's half
    with pytest.raises(GrantTooLarge):
        a.send_nowait(bytes(201), sender="y")
    with pytest.raises(QuotaExceeded):
        a.send_nowait(b"z", sender="x")
    b.send_nowait(bytes(150), sender="x")  # a quarter of the 600 that a has left
    with pytest.raises(QuotaExceeded):
        b.send_nowait(b"z", sender="x")
    assert account.usage() == {"bytes": AccountUsage(800, 450), "slices": AccountUsage(80, 78)}
    a.close()
    b.close()
    assert account.usage() == {"bytes": AccountUsage(800, 800), "slices": AccountUsage(80, 80)}


async def test_who_can_be_one_of_an_account() -> None:
    limiter, elsewhere = testing.limiter(10_000), testing.limiter(10_000)
    account = limiter.account("tenant", ResourceLimits(800))
    second = limiter.account("second", ResourceLimits(800))
    a = limiter.component("a", minimum=10)
    assert account.add(a) is a
    assert account.add(a) is a
    with pytest.raises(ValueError, match=r"'a'.* is another account's already"):
        second.add(a)
    with pytest.raises(ValueError, match="belongs to another limiter"):
        account.add(elsewhere.component("x"))
    b = limiter.component("b")
    in_use = "in use; make it one of 'tenant' before it is used"
    async with b:
        with pytest.raises(ValueError, match=in_use):
            account.add(b)
    with b.grant_nowait(1), pytest.raises(ValueError, match=in_use):
        account.component("b")
    with b.grant_nowait(1, sender="x"), pytest.raises(ValueError, match=in_use):
        account.add(b)
    with limiter.component("c").grant_nowait(5000):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: b.grant(4000).__aenter__())
            for _ in range(5):
                await anyio.lowlevel.checkpoint()
            with pytest.raises(ValueError, match=in_use):
                account.add(b)
            tasks.cancel_scope.cancel()
    account.add(b)
    with pytest.raises(InvalidComponentBounds):
        account.component("a", minimum=11)
    async with a:
        assert account.usage()["bytes"] == AccountUsage(800, 790)
    assert account.usage()["bytes"] == AccountUsage(800, 800)
