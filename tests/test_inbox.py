"""Inboxes: messages are charged to their receiver before they are sent, on behalf of senders."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from random import Random
from typing import Any

import anyio
import anyio.abc
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
from structlog.testing import capture_logs

from membound_async import (
    Component,
    GrantReleased,
    GrantTooLarge,
    Inbox,
    InboxStatistics,
    LimiterSettings,
    MemoryLimiter,
    PressurePolicy,
    QuotaExceeded,
    Received,
    ResourceLimits,
    UnknownComponent,
    testing,
)
from membound_async import limiter as limiter_module
from membound_async.streams import MemoryReceiveStream


def has(component: Component) -> tuple[int, int]:
    """Give what a component was granted, and what is in flight to it."""
    account = component._account
    return account.granted, account.in_flight


def held_by(component: Component, sender: str, resource: str = "bytes") -> int:
    """Give what is in flight from a sender."""
    account = component._account
    found = account.by_sender.get(sender)
    stock = account if resource == "bytes" else account.others[resource]
    return 0 if found is None else found.held.get(stock, 0)


def state(limiter: MemoryLimiter, *inboxes: Inbox[Any]) -> list[Any]:
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
        [inbox.statistics() for inbox in inboxes],
        [inbox._places._free for inbox in inboxes if inbox._places is not None],
    ]


def assert_nothing_is_held(limiter: MemoryLimiter, note: object = None) -> None:
    """Check that everything was given back, and that nobody waits."""
    ledger = limiter._ledger
    statistics = limiter.statistics()
    assert (statistics.grants, statistics.waiting, ledger.committed) == (0, 0, 0), note
    others = [pool for pool in ledger.pools.values() if pool is not ledger]
    assert all(pool.free == pool.limit for pool in others), note
    for account in ledger.accounts.values():
        assert account.by_sender == {}, note
        assert all((each.granted, each.in_flight) == (0, 0) for each in account.stocks()), note
    assert limiter._impatient == {}, note


async def steps(count: int) -> None:
    """Let everybody else take so many steps."""
    for _ in range(count):
        await anyio.lowlevel.checkpoint()


# --- sending, charging, receiving


async def test_a_message_is_charged_before_it_is_sent_and_delivered_when_received() -> None:
    limiter = testing.limiter(10_000)
    a = limiter.component("a")
    inbox = Inbox[bytes](a)
    await inbox.send(bytes(100), sender="x")
    inbox.send_nowait(bytes(200), sender="y")
    assert (has(a), held_by(a, "x"), held_by(a, "y")) == ((0, 300), 100, 200)
    assert inbox.statistics() == InboxStatistics(2, float("inf"), 0, 0, 0, 0, 300, 0)
    received = await inbox.receive()
    assert (received.message, received.sender) == (bytes(100), "x")
    assert (received.grant.size, received.grant.component, received.grant.sender) == (100, a, None)
    assert (has(a), held_by(a, "x")) == ((100, 200), 0)
    async with received:
        assert has(a) == (100, 200)
    assert has(a) == (0, 200)
    received.release()
    with inbox.receive_nowait() as second:
        assert (second.sender, has(a)) == ("y", (200, 0))
    with pytest.raises(anyio.WouldBlock):
        inbox.receive_nowait()
    assert_nothing_is_held(limiter)


async def test_every_resource_of_bus1() -> None:
    limiter = testing.limiter("1GiB")
    a = limiter.component("a", limits=ResourceLimits.bus1())
    inbox = Inbox[bytes](a, settle=lambda message: {"handles": message[0], "unknown": 3})
    await inbox.send(b"\x03", sender="x", bytes=100, handles=10, fds=4)
    assert {name: held_by(a, "x", name) for name in ("bytes", "slices", "handles", "fds")} == {
        "bytes": 100,
        "slices": 1,
        "handles": 10,
        "fds": 4,
    }
    async with await inbox.receive() as received:
        # The sender's part is free, handles are as many as there really are, fds given back.
        assert a._account.by_sender == {}
        assert dict(received.grant.also) == {"slices": 1, "handles": 3}
        own = {stock.resource: stock.granted for stock in a._account.stocks()}
        assert own == {"bytes": 100, "slices": 1, "handles": 3, "fds": 0}
    assert {stock.granted for stock in a._account.stocks()} == {0}
    await inbox.send(b"\xff", sender="x", bytes="1KiB", slices=3, handles=10)  # type: ignore[arg-type]
    async with await inbox.receive() as received:  # more than was paid for is not charged
        assert dict(received.grant.also) == {"slices": 3, "handles": 10}
        assert received.grant.size == 1024
    with pytest.raises(GrantTooLarge) as caught:  # half of half of 4096
        await inbox.send(b"x", sender="x", fds=2049)
    assert (caught.value.resource, caught.value.most_bytes) == ("fds", 2048)
    inbox.send_nowait(b"\x00", sender="x", bytes=8 * 2**20, fds=2048)
    with pytest.raises(QuotaExceeded, match="the sender's part of its firm limit"):
        inbox.send_nowait(b"\x00", sender="x", bytes=1)
    inbox.close()
    assert_nothing_is_held(limiter)


async def test_what_is_in_flight_only_is_up_to_the_inbox() -> None:
    limiter = testing.limiter(1000, resources=ResourceLimits(fds=10, tickets=10))
    a = limiter.component("a")
    inbox = Inbox[bytes](a, in_flight_only={"tickets", "slices"})
    for sender in ("x", "a"):  # what the component sends itself is in flight, too
        inbox.send_nowait(b"x", sender=sender, fds=2, tickets=2)
        with inbox.receive_nowait() as received:
            assert dict(received.grant.also) == {"fds": 2}
            assert limiter._ledger.pools["tickets"].free == 10
    assert_nothing_is_held(limiter)


@pytest.mark.parametrize("real", [{"handles": -1}, None, ZeroDivisionError()])
async def test_an_error_of_settling_loses_the_message_but_no_bytes(real: Any) -> None:
    limiter = testing.limiter(1000, resources=ResourceLimits(handles=100))
    a = limiter.component("a")

    def settle(message: bytes) -> Any:
        if isinstance(real, Exception):
            raise real
        return real

    inbox = Inbox[bytes](a, settle=settle, max_messages=1)
    inbox.send_nowait(b"x", sender="x", handles=3)
    with pytest.raises((ValueError, AttributeError, ZeroDivisionError)):
        await inbox.receive()
    assert_nothing_is_held(limiter)
    inbox.send_nowait(b"x", sender="x")
    inbox.receive_nowait().release()


async def test_a_senders_part_is_its_own() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    inbox = Inbox[bytes](a)
    got: dict[str, int] = {}
    for sender in ("flood", "b", "c"):
        while True:
            try:
                inbox.send_nowait(bytes(1), sender=sender)
            except QuotaExceeded:
                break
            got[sender] = got.get(sender, 0) + 1
        # s_j + c <= 1/2*(Q - (s - s_j)), Q = 1/2*(R + s), in whole bytes
        s, r = sum(got.values()), limiter.statistics().free_bytes
        assert 4 * got[sender] <= r + s - 2 * (s - got[sender])
        assert 4 * (got[sender] + 1) > r + s - 2 * (s - got[sender])
    assert got == {"flood": 250, "b": 125, "c": 62}
    assert has(a) == (0, 437)
    own = a.grant_nowait(63)  # what the component charges itself is not divided among senders
    with pytest.raises(QuotaExceeded):
        a.grant_nowait(1)
    own.release()
    inbox.close()
    assert_nothing_is_held(limiter)


async def test_what_a_component_sends_itself_is_its_own() -> None:
    limiter = testing.limiter(1000)
    a, b = limiter.component("a"), limiter.component("b")
    inbox = Inbox[bytes](a)
    for sender in (a, "a"):
        inbox.send_nowait(bytes(500), sender=sender)  # twice what a sender could have
        assert (has(a), a._account.by_sender) == ((500, 0), {})
        with inbox.receive_nowait() as received:
            assert (received.sender, has(a)) == (None, (500, 0))
    async with a:  # who does not say who sends sends for the component that runs
        await inbox.send(bytes(500))
        (await inbox.receive()).release()
    async with b:
        await inbox.send(bytes(10))
        with pytest.raises(GrantTooLarge):
            await inbox.send(bytes(251))
    inbox.send_nowait(bytes(10), sender=b)
    assert held_by(a, "b") == 20
    inbox.receive_nowait().release()
    with inbox.receive_nowait() as received:
        assert received.sender == "b"
    inbox.send_nowait(bytes(500))  # outside of any
    inbox.close()
    assert_nothing_is_held(limiter)


async def test_an_inbox_belongs_to_who_makes_it() -> None:
    outside = Inbox[bytes]()
    async with testing.limiter(1000) as limiter:
        a = limiter.component("a")
        async with a:
            inside = Inbox[bytes]()
        named = Inbox[bytes]("a")
        with pytest.raises(UnknownComponent, match="'nobody'"):
            Inbox[bytes]("nobody")
        for inbox, owner in ((outside, limiter.root), (inside, a), (named, a)):
            await inbox.send(b"xyz", sender="x")
            assert has(owner) == (0, 3)
            inbox.close()
        assert_nothing_is_held(limiter)


async def test_arguments_are_checked_and_nothing_changes() -> None:
    limiter = testing.limiter(1000, resources=ResourceLimits(fds=10))
    a = limiter.component("a")
    for count in (0, -1, 1.5, float("nan"), True, "3"):
        with pytest.raises(ValueError, match="max_messages="):
            Inbox[bytes](a, max_messages=count)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'overflow=.* must be "wait", "drop_oldest" or "raise"'):
        Inbox[bytes](a, overflow="perhaps")  # type: ignore[arg-type]
    inbox = Inbox[Any](a, max_messages=2)
    before = state(limiter, inbox)
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "pass size=", {"message": {}}),
        (ValueError, "nbytes=-1", {"bytes": -1}),
        (TypeError, "unhashable", {"sender": []}),
        (ValueError, r"nothing limits 'slices' of 'a' \(limited: fds\)", {"slices": 1}),
        (ValueError, "ResourceLimits", {"tickets": 1}),
        (ValueError, "fds=-1", {"fds": -1}),
        (GrantTooLarge, "wanted 3 fds, but can have 2 fds at the most", {"fds": 3}),
        (GrantTooLarge, "251 bytes", {"bytes": 251}),
    ]
    for error, match, arguments in wrong:
        arguments = {"message": b"x", "sender": "x", **arguments}
        with pytest.raises(error, match=match):
            inbox.send_nowait(**arguments)
        assert state(limiter, inbox) == before
        with pytest.raises(error, match=match):
            await inbox.send(**arguments)
        assert state(limiter, inbox) == before


@pytest.mark.parametrize("overflow", ["wait", "raise"])
async def test_send_nowait_fails_without_effect(overflow: Any) -> None:
    limiter = testing.limiter(1000, resources=ResourceLimits(fds=100, slices=100))
    a, b = limiter.component("a"), limiter.component("b")
    inbox = Inbox[bytes](a, overflow=overflow, max_messages=3)
    with b.grant_nowait(100, also={"fds": 50}):
        inbox.send_nowait(bytes(100), sender="x", fds=2)
        before = state(limiter, inbox)
        lacking: list[tuple[str, dict[str, Any]]] = [
            ("bytes", {"bytes": 150}),
            ("fds", {"bytes": 1, "fds": 12}),
            ("slices", {"bytes": 1, "slices": 25}),
        ]
        for resource, amounts in lacking:
            with pytest.raises(QuotaExceeded) as caught:
                inbox.send_nowait(b"", sender="x", **amounts)
            assert caught.value.resource == resource
            assert state(limiter, inbox) == before
            if overflow == "raise":
                with pytest.raises(QuotaExceeded):
                    await inbox.send(b"", sender="x", **amounts)
                assert state(limiter, inbox) == before
        inbox.send_nowait(b"", sender="x")
        inbox.send_nowait(b"", sender="x")
        before = state(limiter, inbox)
        with pytest.raises(QuotaExceeded, match="max_messages are there") as caught:
            inbox.send_nowait(b"", sender="y")
        assert caught.value.resource == "messages"
        assert state(limiter, inbox) == before
    inbox.close()
    with pytest.raises(anyio.BrokenResourceError):
        inbox.send_nowait(b"", sender="x")
    assert_nothing_is_held(limiter)


# --- waiting


async def test_senders_wait_for_their_own_part_in_order_and_for_nobody_else() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    inbox = Inbox[bytes](a, max_messages=50)
    order: list[tuple[str, int]] = []

    async def send(sender: str, size: int) -> None:
        await inbox.send(bytes(size), sender=sender)
        order.append((sender, size))

    async with anyio.create_task_group() as tasks:
        await inbox.send(bytes(250), sender="flood")
        for size in (40, 1, 0):
            tasks.start_soon(send, "flood", size)
            await steps(4)
        assert (order, inbox.statistics().tasks_waiting_send) == ([], 3)
        with pytest.raises(QuotaExceeded, match="others of the sender wait already"):
            inbox.send_nowait(b"", sender="flood")
        for _ in range(10):
            await inbox.send(bytes(10), sender="other")
        own = await a.grant(100)  # nor do they block the component itself
        for size in (250, *[10] * 10):
            with await inbox.receive() as received:
                assert len(received.message) == size
                own.release()
        sizes = set()
        for _ in range(3):
            with await inbox.receive() as received:
                sizes.add(len(received.message))
        assert sizes == {40, 1, 0}
    # They were let in in order; trio runs those that are woken together in an order of chance.
    assert sorted(order) == [("flood", 0), ("flood", 1), ("flood", 40)]
    assert_nothing_is_held(limiter)


async def test_senders_stay_in_order_when_the_loop_is_so_busy_that_each_yield_is_due() -> None:
    """Else what is behind in line may have the memory that the first of the line waits for."""
    settings = LimiterSettings(yield_after_seconds=1e-6)
    limiter = testing.limiter(10_000, share=1, settings=settings)
    inbox = Inbox[int](limiter.component("a", firm_limit=100), size=lambda _: 10)

    async def send(name: str) -> None:
        async with anyio.create_task_group() as tasks:
            for number in range(50):
                tasks.start_soon(partial(inbox.send, number, sender=name))

    received = Counter[str]()
    async with anyio.create_task_group() as tasks:
        for name in "xyz":
            tasks.start_soon(send, name)
        with anyio.fail_after(5):
            while received.total() < 150:
                async with await inbox.receive() as one:
                    received[str(one.sender)] += 1
                    await anyio.lowlevel.checkpoint()
    assert received == {"x": 50, "y": 50, "z": 50}
    assert_nothing_is_held(limiter)


async def test_who_waits_for_memory_keeps_no_place_from_others() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    unread, inbox = Inbox[bytes](a), Inbox[bytes](a, max_messages=1)
    async with anyio.create_task_group() as tasks:
        await unread.send(bytes(250), sender="flood")
        tasks.start_soon(lambda: inbox.send(bytes(100), sender="flood"))
        await steps(5)
        assert inbox.statistics().tasks_waiting_send == 1
        for _ in range(3):
            inbox.send_nowait(bytes(10), sender="other")
            inbox.receive_nowait().release()
        unread.close()
    assert len((await inbox.receive()).message) == 100


async def test_a_slow_receiver_pins_nothing_of_what_its_sender_sends_to_others() -> None:
    limiter = testing.limiter(10_000)
    slow, quick = limiter.component("slow"), limiter.component("quick")
    stuck, moving = Inbox[bytes](slow), Inbox[bytes](quick)
    async with anyio.create_task_group() as tasks:
        for _ in range(25):
            await stuck.send(bytes(100), sender="x")
        tasks.start_soon(lambda: stuck.send(bytes(100), sender="x"))
        await steps(5)
        assert stuck.statistics().tasks_waiting_send == 1
        for _ in range(9):  # the bypass limit is 10 000 bytes
            for _ in range(10):
                moving.send_nowait(bytes(100), sender="x")
            for _ in range(10):
                moving.receive_nowait().release()
        assert held_by(slow, "x") == 2500
        stuck.receive_nowait().release()
    assert len(stuck._buffer) == 25
    stuck.close()
    assert_nothing_is_held(limiter)


async def test_nobody_gets_more_than_its_part_in_flight_because_others_pass_it() -> None:
    limiter = testing.limiter(10_000)
    a = limiter.component("a")
    stuck, moving = Inbox[bytes](a), Inbox[bytes](limiter.component("b"))
    async with anyio.create_task_group() as tasks:
        await stuck.send(bytes(2500), sender="flood")
        tasks.start_soon(lambda: stuck.send(bytes(100), sender="flood"))
        await steps(5)
        for _ in range(300):
            with suppress(QuotaExceeded):
                moving.send_nowait(bytes(100), sender="x")
                moving.receive_nowait().release()
            assert has(a) == (0, 2500)
        tasks.cancel_scope.cancel()
    stuck.close()
    assert_nothing_is_held(limiter)


async def test_a_sender_that_waits_for_its_own_messages_stops_nobody_for_long() -> None:
    limiter = testing.limiter(10_000)
    stuck = Inbox[bytes](limiter.component("slow"))
    moving = Inbox[bytes](limiter.component("quick"))
    async with anyio.create_task_group() as tasks:
        for _ in range(25):
            await stuck.send(bytes(100), sender="flood")
        tasks.start_soon(lambda: stuck.send(bytes(100), sender="flood"))
        await steps(5)
        try:
            for _ in range(1000):
                moving.send_nowait(bytes(100), sender="x")
                moving.receive_nowait().release()
        finally:
            tasks.cancel_scope.cancel()


async def test_max_messages_are_waited_for_in_order() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    inbox = Inbox[bytes](a, max_messages=2)
    async with anyio.create_task_group() as tasks:
        for number in range(5):
            tasks.start_soon(partial(inbox.send, bytes([number]), sender=f"s{number}"))
            await steps(5)
        assert inbox.statistics() == InboxStatistics(2, 2, 0, 0, 3, 0, 2, 0)
        messages = []
        for _ in range(5):
            with await inbox.receive() as received:
                messages.append(received.message[0])
                await steps(5)  # trio wakes who has got a place meanwhile in any order
        assert messages == [0, 1, 2, 3, 4]
    assert_nothing_is_held(limiter)


@pytest.mark.virtual_time
async def test_pressure_delays_what_is_sent_but_not_what_is_received() -> None:
    probe = testing.ScriptedProbe(0)
    policy = PressurePolicy(threshold=0.5, min_delay_seconds=10, max_delay_seconds=10)
    limiter = testing.limiter(
        1000, probe=probe, settings=LimiterSettings(pressure=policy, reclaim=False)
    )
    a = limiter.component("a")
    inbox = Inbox[bytes](a)
    limiter._ledger._lowest_free = 0
    probe.set(600)
    limiter.statistics()
    began = anyio.current_time()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: inbox.send(bytes(10), sender="x"))
        await anyio.sleep(5)
        assert (has(a), inbox.statistics().current_buffer_used) == ((0, 10), 0)
    assert anyio.current_time() - began == pytest.approx(10)
    began = anyio.current_time()
    (await inbox.receive()).release()
    assert anyio.current_time() == began
    inbox.send_nowait(bytes(10), sender="x")
    assert anyio.current_time() == began
    inbox.close()


async def test_without_a_limiter_only_messages_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limiter_module, "_warned_of_nobody", True)
    nobody = limiter_module._nobody.root
    before = has(nobody)
    inbox = Inbox[bytes](max_messages=1000)
    for _ in range(1000):
        await inbox.send(bytes(1), sender="x", bytes=10**9, fds=10**6, slices=1)
    with pytest.raises(QuotaExceeded, match="max_messages"):
        inbox.send_nowait(b"", sender="x")
    assert inbox.statistics().charged_bytes == 10**12
    async with await inbox.receive() as received:
        assert dict(received.grant.also) == {}
    inbox.close()
    assert has(nobody) == before


async def test_observation_makes_nobody_wait() -> None:
    limiter = testing.limiter(1000, observe=True)
    a = limiter.component("a")
    inbox = Inbox[bytes](a, overflow="raise")
    for _ in range(5):
        await inbox.send(bytes(250), sender="x")
        inbox.send_nowait(bytes(1000), sender="x")
    assert has(a) == (0, 6250)
    assert a.statistics().would_wait + a.statistics().would_refuse > 5
    inbox.close()
    assert_nothing_is_held(limiter)


async def test_an_inbox_works_outside_an_event_loop_with_max_messages_too() -> None:
    def without_a_loop() -> None:
        limiter = testing.limiter(1000)
        inbox = Inbox[bytes](limiter.component("a"), max_messages=1)
        for _ in range(3):
            inbox.send_nowait(b"x", sender="x")
            with pytest.raises(QuotaExceeded):
                inbox.send_nowait(b"x", sender="x")
            inbox.receive_nowait().release()
        assert_nothing_is_held(limiter)

    thread = threading.Thread(target=without_a_loop)
    thread.start()
    await anyio.to_thread.run_sync(thread.join)


# --- overflow


async def test_drop_oldest_drops_only_what_the_same_sender_has_sent() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    inbox = Inbox[bytes](a, overflow="drop_oldest", max_messages=4)
    await inbox.send(b"b", sender="b")
    for number in range(10):
        await inbox.send(bytes([number] * 100), sender="x")
    # 4*100 + 3*100*k + 2*1 <= 1000 - 100*k - 1 up to k = 1, so it has two of them there
    assert [each.message[0] for each in inbox._buffer] == [ord("b"), 8, 9]
    assert inbox.statistics().dropped == 8
    assert has(a) == (0, 201)
    for sender in ("c", "x", "x", "x"):
        await inbox.send(b"y", sender=sender)
    assert [each.sender for each in inbox._buffer] == ["b", "c", "x", "x"]
    assert inbox.statistics().dropped == 11
    with pytest.raises(GrantTooLarge):
        await inbox.send(bytes(251), sender="x")
    assert inbox.statistics().dropped == 11  # nothing is dropped for what can never be sent
    with pytest.raises(QuotaExceeded):
        inbox.send_nowait(b"z", sender="x")  # this one never drops
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: inbox.send(b"d", sender="d"))  # has nothing to drop
        await steps(5)
        assert inbox.statistics().tasks_waiting_send == 1
        inbox.receive_nowait().release()
    assert [each.sender for each in inbox._buffer] == ["c", "x", "x", "d"]
    inbox.close()
    assert_nothing_is_held(limiter)


async def test_raise_raises_at_once() -> None:
    limiter = testing.limiter(1000)
    inbox = Inbox[bytes](limiter.component("a"), overflow="raise")
    await inbox.send(bytes(250), sender="x")
    before = state(limiter, inbox)
    with pytest.raises(QuotaExceeded):
        await inbox.send(bytes(10), sender="x")
    assert state(limiter, inbox) == before
    inbox.close()


# --- one message to many


async def test_what_is_shared_is_charged_once_and_freed_with_its_last_handle() -> None:
    limiter = testing.limiter(1000)
    publisher = limiter.component("publisher")
    inboxes = [Inbox[bytes](limiter.component(f"r{n}"), max_messages=1) for n in range(4)]
    dropping = Inbox[bytes](limiter.component("d"), max_messages=1, overflow="drop_oldest")

    async def publish(message: bytes) -> None:
        async with publisher.grant(len(message)) as grant:
            for inbox in (*inboxes, dropping):
                handle = grant.share()
                try:
                    await inbox.send(message, grant=handle)
                except anyio.BrokenResourceError:
                    handle.release()

    await publish(bytes(400))
    assert has(publisher) == (400, 0)
    assert [has(limiter.component(f"r{n}")) for n in range(4)] == [(0, 0)] * 4
    inboxes[0].close()
    with inboxes[1].receive_nowait() as received:
        assert (received.grant.size, received.grant.component) == (400, publisher)
        assert has(publisher) == (400, 0)
    inboxes[2].receive_nowait().release()
    inboxes[3].receive_nowait().release()
    assert has(publisher) == (400, 0)
    await publish(bytes(50))  # drops the last handle of the one before, and one is closed
    assert (has(publisher), dropping.statistics().dropped) == ((50, 0), 1)
    for inbox in (*inboxes, dropping):
        assert has(publisher) == (50, 0)
        inbox.close()
    assert_nothing_is_held(limiter)


async def test_a_grant_that_is_handed_in_is_the_senders_until_it_is_sent() -> None:
    limiter = testing.limiter(1000)
    a, b = limiter.component("a"), limiter.component("b")
    inbox = Inbox[bytes](a, max_messages=1)
    unasked, released = b.grant(10), b.grant_nowait(10)
    released.release()
    with pytest.raises(RuntimeError, match="send: this grant is not held yet"):
        await inbox.send(b"x", grant=unasked)
    with pytest.raises(GrantReleased, match="send"):
        inbox.send_nowait(b"x", grant=released)
    inbox.send_nowait(b"x", sender="x")
    mine = b.grant_nowait(100)
    with pytest.raises(QuotaExceeded, match="max_messages"):
        inbox.send_nowait(b"y", grant=mine)
    told: list[type[BaseException]] = []

    async def send() -> None:
        try:
            await inbox.send(b"y", grant=mine)
        except Exception as error:  # noqa: BLE001
            told.append(type(error))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send)
        await steps(4)
        tasks.cancel_scope.cancel()
    assert has(b) == (100, 0)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send)
        await steps(4)
        inbox.close()
    assert (told, has(b)) == ([anyio.BrokenResourceError], (100, 0))
    other = Inbox[bytes](a, max_messages=1)
    other.send_nowait(b"x", sender="x")

    async def send_to_other() -> None:
        with pytest.raises(GrantReleased, match="send"):
            await other.send(b"y", grant=mine)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send_to_other)
        await steps(4)
        mine.release()
        other.receive_nowait().release()
    sent = await b.grant(50, sender="x")
    await other.send(b"y", grant=sent)
    with other.receive_nowait() as received:
        assert (received.grant, received.sender, has(b)) == (sent, "x", (50, 0))
    assert_nothing_is_held(limiter)


# --- streams


async def test_streams_of_an_inbox_are_anyios() -> None:
    limiter = testing.limiter(10_000)
    a = limiter.component("a")
    inbox = Inbox[bytes](a)
    assert isinstance(inbox, anyio.abc.ObjectReceiveStream)
    x, y = inbox.send_stream("x"), inbox.send_stream("y")
    stream = inbox.receive_stream()
    assert isinstance(x, anyio.abc.ObjectSendStream)
    assert isinstance(stream, anyio.abc.ObjectReceiveStream)
    async with x, y:
        await x.send(bytes(10))
        y.send_nowait(bytes(20))
        await inbox.send(bytes(30), sender="z")
        held = {sender: held_by(a, sender) for sender in "xyz"}
        assert held == {"x": 10, "y": 20, "z": 30}
        assert inbox.statistics()[:4] == (3, float("inf"), 2, 1)
        with pytest.raises(anyio.WouldBlock):
            y.send_nowait(bytes(2500))
    async with stream:
        assert [len(item) async for item in stream] == [10, 20, 30]
        with pytest.raises(anyio.EndOfStream):
            stream.receive_nowait()
        with pytest.raises(anyio.EndOfStream):
            await inbox.receive()
        with inbox.send_stream("x") as again:  # and it goes on
            again.send_nowait(b"again")
            assert await stream.receive() == b"again"
    with pytest.raises(anyio.ClosedResourceError):
        await inbox.receive()
    with pytest.raises(anyio.BrokenResourceError):
        await inbox.send(b"x", sender="x")
    assert_nothing_is_held(limiter)


async def test_an_inbox_is_iterated() -> None:
    limiter = testing.limiter(1000)
    async with Inbox[bytes](limiter.component("a")) as inbox:
        with inbox.send_stream("x") as send:
            for size in (1, 2, 3):
                send.send_nowait(bytes(size))
        sizes = []
        async for received in inbox:
            with received:
                sizes.append(len(received.message))
        assert sizes == [1, 2, 3]
    with pytest.raises(anyio.ClosedResourceError), inbox:
        inbox.receive_nowait()


@pytest.mark.parametrize("which", ["inbox", "stream", "receivers"])
async def test_closing_gives_everything_back_and_wakes_everybody(which: str) -> None:
    limiter = testing.limiter(1000)
    a, b = limiter.component("a"), limiter.component("b")
    inbox = Inbox[bytes](a, max_messages=3)
    x, y, stream = inbox.send_stream("x"), inbox.send_stream("y"), inbox.receive_stream()
    told: dict[str, str] = {}

    async def attempt(name: str, wait: Callable[[], Awaitable[Any]]) -> None:
        try:
            await wait()
            told[name] = "done"
        except Exception as error:  # noqa: BLE001
            told[name] = type(error).__name__

    async with anyio.create_task_group() as tasks:
        inbox.send_nowait(bytes(1), sender="u")
        inbox.send_nowait(bytes(240), sender="v")
        other = b.grant_nowait(100)
        tasks.start_soon(attempt, "x for memory", lambda: x.send(bytes(190)))
        await steps(4)
        inbox.send_nowait(bytes(1), sender="w")
        tasks.start_soon(attempt, "y for a place", lambda: y.send(bytes(1)))
        tasks.start_soon(attempt, "z for a place", lambda: inbox.send(bytes(1), sender="z"))
        await steps(4)
        assert inbox.statistics()[4:7] == (3, 0, 242)
        ends: dict[str, Any] = {"inbox": inbox, "stream": x, "receivers": stream}
        ends[which].close()
        if which == "stream":
            await steps(4)
            assert told == {"x for memory": "ClosedResourceError"}
            tasks.cancel_scope.cancel()
    if which != "stream":
        assert told == dict.fromkeys(
            ("x for memory", "y for a place", "z for a place"), "BrokenResourceError"
        )
        with pytest.raises(anyio.BrokenResourceError):
            x.send_nowait(b"")
    other.release()
    inbox.close()
    inbox.close()
    assert_nothing_is_held(limiter)

    told.clear()
    inbox = Inbox[bytes](a)
    stream2 = inbox.receive_stream()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(attempt, "inbox", inbox.receive)
        tasks.start_soon(attempt, "stream", stream2.receive)
        await steps(4)
        assert inbox.statistics().tasks_waiting_receive == 2
        inbox.close()
    assert told == {"inbox": "ClosedResourceError", "stream": "ClosedResourceError"}
    for end in (x, y, stream, stream2):
        end.close()


async def test_an_inbox_that_is_dropped_gives_everything_back() -> None:
    limiter = testing.limiter(1000, resources=ResourceLimits(fds=10))
    a = limiter.component("a")
    with capture_logs() as logs:
        inbox: Any = Inbox[bytes](a)
        for _ in range(5):
            await inbox.send(bytes(10), sender="x")
        inbox.send_nowait(bytes(10), sender="y", fds=1)
        del inbox
        assert_nothing_is_held(limiter)
        cycle: list[Any] = [Inbox[bytes](a)]
        cycle[0].send_nowait(bytes(10), sender="x", fds=1)
        cycle.append(cycle)
        del cycle
        gc.collect()
        assert_nothing_is_held(limiter)
        inbox = Inbox[bytes](a)
        inbox.send_nowait(bytes(10), sender="x")
        with limiter._lock:
            del inbox
            assert has(a) == (0, 10)
        limiter.statistics()
    assert [entry["event"] for entry in logs] == ["membound.grant_leaked"]
    assert_nothing_is_held(limiter)


async def test_from_another_thread() -> None:
    limiter = testing.limiter(1000)
    inbox = Inbox[bytes](limiter.component("a"))
    got: list[bytes] = []

    async def receive() -> None:
        with await inbox.receive() as received:
            got.append(received.message)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        await steps(4)
        before = state(limiter, inbox)
        with pytest.raises(RuntimeError, match=r"use anyio\.from_thread\.run\(inbox\.send"):
            await anyio.to_thread.run_sync(inbox.send_nowait, b"x")
        with pytest.raises(RuntimeError, match="one event loop"):
            await anyio.to_thread.run_sync(inbox.receive_nowait)
        assert state(limiter, inbox) == before
        await anyio.to_thread.run_sync(lambda: anyio.from_thread.run(inbox.send, b"y"))
    assert got == [b"y"]
    assert_nothing_is_held(limiter)


async def test_a_receive_stream_that_is_dropped_wakes_who_waits_for_a_place() -> None:
    limiter = testing.limiter(1000)
    inbox = Inbox[bytes](limiter.component("a"), max_messages=1)
    stream: MemoryReceiveStream[bytes] | None = inbox.receive_stream()
    told: list[str] = []

    async def send() -> None:
        try:
            await inbox.send(b"y", sender="y")
        except anyio.BrokenResourceError:
            told.append("broken")

    async with anyio.create_task_group() as tasks:
        inbox.send_nowait(b"x", sender="x")
        tasks.start_soon(send)
        await steps(4)
        with pytest.warns(ResourceWarning, match="Unclosed <MemoryReceiveStream"):
            stream = None
        await steps(4)
        assert told == ["broken"]
    assert stream is None
    assert_nothing_is_held(limiter)


# --- the end, and who was cancelled


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # trio cancels nobody it has woken
async def test_the_end_is_not_told_while_a_message_may_come_back() -> None:
    limiter = testing.limiter(1000)
    inbox = Inbox[bytes](limiter.component("a"), max_messages=1)
    send = inbox.send_stream("x")
    first = asyncio.ensure_future(inbox.receive())
    await steps(2)
    second = asyncio.ensure_future(inbox.receive())
    third = asyncio.ensure_future(inbox.receive())
    await steps(2)
    send.send_nowait(b"precious")
    send.close()
    with pytest.raises(anyio.WouldBlock):
        inbox.receive_nowait()
    first.cancel()
    await steps(4)
    assert (await second).message == b"precious"
    with pytest.raises(anyio.EndOfStream):
        await third
    assert inbox._handed_over == 0
    inbox.send_nowait(b"x")


async def attempt_and_cancel(
    attempt: Callable[[], Awaitable[None]], after_steps: int, *, native: bool
) -> bool:
    """Run something, and cancel it after so many steps; tell whether it was cancelled."""
    done = False

    async def run() -> None:
        nonlocal done
        await attempt()
        done = True

    if native:
        task = asyncio.ensure_future(run())
        await steps(after_steps)
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()
    else:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            await steps(after_steps)
            tasks.cancel_scope.cancel()
    return not done


@pytest.mark.parametrize("delay", [0, 0.0001], ids=["no delay", "delay"])
@pytest.mark.parametrize("overflow", ["wait", "drop_oldest"])
@pytest.mark.parametrize("closing", [False, True])
@pytest.mark.parametrize("who", ["sender", "receiver"])
async def test_nothing_is_lost_wherever_it_is_cancelled(
    who: str, closing: bool, overflow: Any, delay: float, anyio_backend_name: str
) -> None:
    settings = LimiterSettings(
        reclaim=False,
        pressure=PressurePolicy(threshold=0.01, min_delay_seconds=delay, max_delay_seconds=delay),
    )
    for native in (False, True) if anyio_backend_name == "asyncio" else (False,):
        after = finished = 0
        met: set[str] = set()
        while finished < 3 and after < 60:  # who receives what drops is never finished
            limiter = testing.limiter(
                1000,
                probe=testing.ScriptedProbe(20),
                settings=settings,
                resources=ResourceLimits(fds=100),
            )
            limiter._ledger._lowest_free = limiter._ledger.free - 1000
            a, b = limiter.component("a"), limiter.component("b")
            inbox = Inbox[int](a, size=lambda _: 100, max_messages=2, overflow=overflow)
            sent: list[int] = []
            got: list[int] = []
            ended: list[type[Exception]] = []

            async def send_all(
                inbox: Inbox[int] = inbox, sent: list[int] = sent, ended: list[Any] = ended
            ) -> None:
                for number in range(len(sent), 6):
                    try:
                        await inbox.send(number, sender="x", fds=5)
                    except anyio.BrokenResourceError as error:
                        ended.append(type(error))
                        return
                    sent.append(number)

            async def receive_all(
                inbox: Inbox[int] = inbox, got: list[int] = got, ended: list[Any] = ended
            ) -> None:
                while len(got) < 6:
                    try:
                        received = await inbox.receive()
                    except anyio.ClosedResourceError as error:
                        ended.append(type(error))
                        return
                    with received:
                        got.append(received.message)
                        await steps(2)

            async def rival(b: Component = b) -> None:
                async with b.grant(450, also={"fds": 40}):
                    await steps(7)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(rival)
                await steps(1)
                other: Callable[[], Awaitable[None]] = receive_all
                mine: Callable[[], Awaitable[None]] = send_all
                if who == "receiver":
                    other, mine = send_all, receive_all
                others = anyio.CancelScope()

                async def go_on(
                    scope: anyio.CancelScope = others,
                    other: Callable[[], Awaitable[None]] = other,
                ) -> None:
                    with scope:
                        await other()

                tasks.start_soon(go_on)
                if closing:

                    async def close(inbox: Inbox[int] = inbox) -> None:
                        await steps(15)
                        inbox.close()

                    tasks.start_soon(close)
                hit = await attempt_and_cancel(mine, after, native=native)
                statistics = inbox.statistics()
                met |= {"waited"} if statistics.tasks_waiting_send else set()
                if not closing and overflow == "wait":
                    await mine()  # the rest, in order
                else:
                    inbox.close()
                    others.cancel()
            if not closing and overflow == "wait":
                assert got == sent == [*range(6)], after
                assert inbox.statistics() == InboxStatistics(0, 2, 0, 0, 0, 0, 0, 0), after
            else:
                assert got == sorted(set(got)), after
                assert set(got) <= set(range(6)), after
                assert inbox.statistics()[4:7] == (0, 0, 0), after
            assert inbox._places is not None
            assert inbox._places._free == 2, after
            assert inbox._handed_over == 0, after
            assert_nothing_is_held(limiter, after)
            after += 1
            finished = 0 if hit else finished + 1
        assert after > 5
        if closing or overflow == "wait" or who == "sender":
            assert finished == 3


@pytest.mark.parametrize("kind", ["send", "receive"])
async def test_woken_and_cancelled_in_the_same_turn(kind: str) -> None:
    limiter = testing.limiter(1000)
    a, b = limiter.component("a"), limiter.component("b")
    inbox = Inbox[bytes](a, max_messages=1)
    done: list[Received[bytes]] = []

    async def run(scope: anyio.CancelScope) -> None:
        with scope:
            if kind == "send":
                await inbox.send(bytes(200), sender="x")
            else:
                done.append(await inbox.receive())

    for order in ("wake first", "cancel first"):
        other = b.grant_nowait(400)
        scope = anyio.CancelScope()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run, scope)
            await steps(5)
            if order == "cancel first":
                scope.cancel()
            if kind == "send":
                other.release()
            else:
                inbox.send_nowait(bytes(100), sender="x")
            if order == "wake first":
                scope.cancel()
        there = inbox.statistics().current_buffer_used + len(done)
        assert there == (1 if kind == "receive" else there)
        assert has(a)[0] + has(a)[1] == there * (200 if kind == "send" else 100)
        other.release()
        if inbox.statistics().current_buffer_used:
            inbox.receive_nowait().release()
        while done:
            done.pop().release()
        assert inbox._places is not None
        assert inbox._places._free == 1
        assert_nothing_is_held(limiter)


@pytest.mark.virtual_time
@pytest.mark.parametrize("seed", range(10))
async def test_random_traffic_keeps_every_senders_part(seed: int) -> None:
    random = Random(seed)
    limits = ResourceLimits(4000, slices=40, handles=60, fds=30)
    limiter = testing.limiter(100_000)
    a = limiter.component("a", limits=limits)
    inbox = Inbox[int](a, size=lambda _: 0, settle=lambda n: {"handles": n % 3})
    sent: list[int] = []
    got: list[int] = []

    async def send(name: str) -> None:
        for _ in range(40):
            number = random.randrange(10**6)
            amounts: dict[str, Any] = {
                "handles": random.randrange(8),
                "fds": random.randrange(4),
            }
            with anyio.move_on_after(random.choice([0.1, 5, 100])):
                await inbox.send(number, sender=name, bytes=random.randrange(600), **amounts)
                sent.append(number)
            if random.random() < 0.3:
                await anyio.sleep(random.random())

    async def receive() -> None:
        async for received in inbox:
            with received:
                got.append(received.message)
                for stock in a._account.stocks():
                    assert stock.granted + stock.in_flight <= limits[stock.resource]
                    parts = [each.held.get(stock, 0) for each in a._account.by_sender.values()]
                    assert sum(parts) == stock.in_flight
                    assert all(2 * part <= limits[stock.resource] for part in parts)
                await anyio.sleep(random.random() / 10)

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(receive)
        async with anyio.create_task_group() as senders:
            for name in "xyz":
                senders.start_soon(send, name)
        await anyio.sleep(1000)
        tasks.cancel_scope.cancel()
    inbox.close()
    assert sorted(got) == sorted(sent)
    assert len(got) > 60
    assert_nothing_is_held(limiter)
