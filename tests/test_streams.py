"""Streams: what passes is charged while anybody has it, and a cancellation loses nothing."""

from __future__ import annotations

import asyncio
import gc
import math
import sys
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from random import Random
from typing import Any, TypeVar, cast

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from membound_async import (
    Component,
    GrantTooLarge,
    InboxStatistics,
    MemoryLimiter,
    NoCurrentLimiter,
    QuotaExceeded,
    UnknownComponent,
    current_component,
    testing,
)
from membound_async import limiter as limiter_module
from membound_async.streams import (
    Batches,
    MemoryReceiveStream,
    MemorySendStream,
    bounded,
    create_memory_stream,
)

T = TypeVar("T")


def granted(*components: Component) -> int:
    """Give what these components are charged for now."""
    accounts = [component._account for component in components]
    return sum(account.granted + account.in_flight for account in accounts)


async def ask_and_cancel(items: AsyncIterator[object], after_steps: int = 5) -> None:
    """Wait for the next item so many steps, and give up."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anext, items)  # type: ignore[arg-type]
        await steps(after_steps)
        tasks.cancel_scope.cancel()


async def steps(count: int) -> None:
    """Let everybody else take so many steps."""
    for _ in range(count):
        await anyio.lowlevel.checkpoint()


class Source(AsyncIterator[T]):
    """Gives what it is fed, at once or when it comes; survives a cancellation.

    Attributes:
        reads: how often it was asked.
        cancelled: how often that was cancelled.
        closed: how often it was closed.
        contexts: the components in whose blocks it was asked.
    """

    def __init__(self, *items: T | Exception, end: bool = True) -> None:
        self._items: list[T | Exception] = [*items]
        self._end = end
        self._more = anyio.Event()
        self.reads = self.cancelled = self.closed = 0
        self.contexts: list[Component | None] = []

    def feed(self, *items: T | Exception, end: bool = False) -> None:
        self._items += items
        self._end = end
        self._more.set()
        self._more = anyio.Event()

    async def __anext__(self) -> T:
        self.reads += 1
        self.contexts.append(current_component())
        while not self._items and not self._end:
            try:
                await self._more.wait()
            except BaseException:
                self.cancelled += 1
                raise
        if not self._items:
            raise StopAsyncIteration
        item = self._items.pop(0)
        if isinstance(item, Exception):
            raise item
        return item

    async def aclose(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.closed += 1


class Late(Source[T]):
    """Takes two steps to give anything."""

    async def __anext__(self) -> T:
        await steps(2)
        return await super().__anext__()


# --- bounded


async def test_bounded_holds_one_item_until_the_next_is_asked_for() -> None:
    limiter = testing.limiter(100_000)
    a = limiter.component("a")
    text = "text"
    items = bounded(
        Source[object](bytes(300), bytearray(20), b"", memoryview(bytes(64)), text), component=a
    )
    held = []
    async for _ in items:
        held.append(granted(a))
        assert a.statistics().grants == 1
    assert held == [300, 20, 0, 64, sys.getsizeof(text)]
    assert granted(a) == 0
    assert limiter.statistics().grants == 0


async def test_bounded_gives_back_before_it_reads() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    source = Source(bytes(400), end=False)
    items = bounded(source, component=a)
    assert len(await anext(items)) == 400
    async with anyio.create_task_group() as tasks:

        async def read_on() -> None:
            assert len(await anext(items)) == 450

        tasks.start_soon(read_on)
        await steps(3)
        assert granted(a) == 0
        source.feed(bytes(450))
    assert granted(a) == 450
    await items.aclose()
    assert granted(a) == 0


@pytest.mark.parametrize("ahead", [0, 100])
async def test_bounded_gives_back_when_the_source_raises(ahead: int) -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    items = bounded(Source[bytes](b"x" * 10, OSError("gone"), b"yz"), ahead=ahead, component=a)
    assert await anext(items) == b"x" * 10
    with pytest.raises(OSError, match="gone"):
        await anext(items)
    assert granted(a) == 0
    assert await anext(items) == b"yz"  # this source goes on after an error
    assert granted(a) == 2
    with pytest.raises(StopAsyncIteration):
        await anext(items)
    assert limiter.statistics().grants == 0


async def test_bounded_closes_its_source() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    source = Source(b"abc", b"def")
    async with bounded(source, component=a) as items:
        assert await anext(items) == b"abc"
        assert granted(a) == 3
    assert source.closed == 1
    assert granted(a) == 0
    with pytest.raises(StopAsyncIteration):
        await anext(items)
    await items.aclose()
    assert source.closed == 2

    class Response:
        """An iterable that is not its own iterator."""

        closed = 0

        async def __aiter__(self) -> AsyncIterator[bytes]:
            try:
                yield b"abc"
                yield b"def"  # pragma: no cover
            finally:
                self.closed += 10

        async def aclose(self) -> None:
            self.closed += 1

    response = Response()
    async with bounded(response, component=a) as items:
        assert await anext(items) == b"abc"
    assert response.closed == 11

    class Endless:
        """One that cannot be closed."""

        def __aiter__(self) -> Endless:
            return self

        async def __anext__(self) -> bytes:
            return b"ab"

    async with bounded(Endless(), component=a) as items:
        assert await anext(items) == b"ab"
    assert granted(a) == 0


async def test_bounded_dropped_after_a_break_goes_without_a_word() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    with capture_logs() as logs:
        async for _ in bounded(Source(bytes(300), bytes(300)), component=a):
            assert granted(a) == 300
            break
        assert granted(a) == 0
        cycle: list[Any] = [bounded(Source(bytes(300)), component=a)]
        cycle.append(cycle)
        await anext(cycle[0])
        assert granted(a) == 300
        del cycle
        gc.collect()
        assert granted(a) == 0
        assert limiter.statistics().grants == 0
    assert logs == []


async def test_dropped_while_the_limiter_is_at_work_it_is_given_back_later() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    items = bounded(Source(bytes(300)), component=a)
    await anext(items)
    with limiter._lock, capture_logs():
        del items  # as the garbage collector may do at any moment
        assert granted(a) == 300
    assert limiter.statistics().grants == 0
    assert granted(a) == 0


async def test_bounded_gets_memory_ahead_of_the_read() -> None:
    limiter = testing.limiter(2000)
    a = limiter.component("a")
    seen: list[int] = []

    class Watched(Source[bytes]):
        async def __anext__(self) -> bytes:
            seen.append(granted(a))
            return await super().__anext__()

    source = Watched(bytes(1000), bytes(10), b"", bytes(100))
    held = [granted(a) async for _ in bounded(source, ahead=100, component=a)]
    assert seen == [100] * 5
    assert held == [1000, 10, 0, 100]
    assert granted(a) == 0


async def test_bounded_waits_to_grow_and_keeps_the_item_if_cancelled() -> None:
    limiter = testing.limiter(1000)
    a, b = limiter.component("a"), limiter.component("b")
    items = bounded(Source(bytes(400), bytes(1)), ahead=100, component=a)
    async with b.grant(450):
        with anyio.move_on_after(0):
            await anext(items)
        assert granted(a) in (0, 100)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anext, items)
            await steps(5)
            assert granted(a) == 100
            assert limiter.statistics().waiting == 1
            tasks.cancel_scope.cancel()
        assert limiter.statistics().waiting == 0
        assert granted(a) == 100  # the item is there, and so is what was paid for it
    assert len(await anext(items)) == 400
    assert granted(a) == 400
    assert len(await anext(items)) == 1
    await items.aclose()


async def test_bounded_leaves_out_what_can_never_be_granted() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    for ahead in (0, 100):
        items = bounded(Source(bytes(10), bytes(501), bytes(20)), ahead=ahead, component=a)
        assert len(await anext(items)) == 10
        with pytest.raises(GrantTooLarge) as caught:
            await anext(items)
        assert (caught.value.wanted_bytes, caught.value.most_bytes) == (501, 500)
        assert granted(a) == 0
        assert len(await anext(items)) == 20
        await items.aclose()


async def test_bounded_wants_to_know_sizes() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    items = bounded(Source[object]({"a": 1}, bytes(5)), component=a)
    with pytest.raises(TypeError, match="no size is known for a dict; pass size="):
        await anext(items)
    assert granted(a) == 0
    assert await anext(items) == bytes(5)
    await items.aclose()
    for size, error in (
        (-1, ValueError),
        (1.5, TypeError),
        (True, TypeError),
        (2**53 + 1, ValueError),
    ):
        items = bounded(Source[object]("x"), size=lambda _, size=size: size, component=a)  # type: ignore[misc]
        with pytest.raises(error, match=r"size\(item\)"):
            await anext(items)
        assert granted(a) == 0
    with pytest.raises(ValueError, match="ahead=-1"):
        bounded(Source(b""), ahead=-1)
    with pytest.raises(TypeError, match="async"):
        bounded([b""])  # type: ignore[arg-type]


async def test_one_task_at_a_time_iterates() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    source = Source[bytes](end=False)
    iterators: list[Any] = [bounded(source, component=a), a.batches(source)]
    for items in iterators:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anext, items)
            await steps(3)
            with pytest.raises(anyio.BusyResourceError):
                await anext(items)
            source.feed(b"x", end=True)
        source.feed(end=False)


async def test_bounded_belongs_to_who_makes_it() -> None:
    outside = bounded(Source(bytes(10)))
    async with testing.limiter(1000) as limiter:
        a, b = limiter.component("a"), limiter.component("b")
        source = Source(bytes(10), bytes(20))
        async with a:
            items = bounded(source)
        async with b:
            await anext(items)
            assert (granted(a), granted(b)) == (10, 0)
            await anext(items)
        assert source.contexts == [b, b]
        await items.aclose()
        named = bounded(Source(bytes(10)), component="a")
        async with b:
            await anext(outside)
            assert granted(b) == 10
            await anext(named)
            assert granted(a) == 10
        await outside.aclose()
        await named.aclose()
        with pytest.raises(UnknownComponent, match="'nobody'"):
            await anext(bounded(Source(b""), component="nobody"))
        assert current_component() is limiter.root


async def test_without_a_limiter_nothing_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limiter_module, "_warned_of_nobody", True)
    items = bounded(Source(bytes(10**9 // 1000), b"x"))
    assert [len(item) async for item in items] == [1_000_000, 1]
    a = Component("unattached")
    batches = a.batches(Source(*[bytes(100)] * 10), max_items=4)
    assert [len(batch) async for batch in batches] == [4, 4, 2]
    send, receive = create_memory_stream[bytes]()
    with send, receive:
        for _ in range(1000):
            send.send_nowait(bytes(1000))
        assert receive.statistics().charged_bytes == 1_000_000
        assert send.statistics() == receive.statistics()
    assert receive.statistics().charged_bytes == 0
    monkeypatch.setenv("MEMBOUND_REQUIRED", "1")
    with pytest.raises(NoCurrentLimiter):
        await anext(bounded(Source(b"")))


async def test_the_charge_of_a_memory_stream_is_taken_over() -> None:
    limiter = testing.limiter(1000)
    a, b = limiter.component("a"), limiter.component("b")
    for other, size, ahead, expected in (
        (a, None, 0, (200, 0)),
        (a, len, 50, (200, 0)),
        (b, None, 0, (0, 200)),
        (b, lambda item: len(item) // 2, 0, (0, 100)),
    ):
        send, receive = create_memory_stream[bytes](component=a)
        with send:
            send.send_nowait(bytes(200))
        async with bounded(receive, size=size, ahead=ahead, component=other) as items:
            assert len(await anext(items)) == 200
            assert (granted(a), granted(b)) == expected
            with pytest.raises(StopAsyncIteration):
                await anext(items)
            assert granted(a, b) == 0
        with pytest.raises(anyio.ClosedResourceError):
            receive.receive_nowait()


# --- batches


async def test_batches_are_charged_until_the_next_is_asked_for() -> None:
    limiter = testing.limiter(10_000)
    a = limiter.component("a")
    held, lengths = [], []
    async for batch in a.batches(Source(*[bytes(100)] * 7), max_items=3):
        lengths.append(len(batch))
        held.append(granted(a))
    assert lengths == [3, 3, 1]
    assert held == [300, 300, 100]
    assert granted(a) == 0
    assert limiter.statistics().grants == 0


async def test_a_batch_is_handed_over_rather_than_wait_for_memory() -> None:
    limiter = testing.limiter(1000)
    a, b = limiter.component("a"), limiter.component("b")
    lengths = [len(batch) async for batch in a.batches(Source(*[bytes(100)] * 12))]
    assert lengths == [5, 5, 2]  # half of 1000 bytes
    async with b.grant(400):
        lengths = [len(batch) async for batch in a.batches(Source(*[bytes(70)] * 9))]
        assert lengths == [4, 4, 1]  # half of the 600 that b leaves
    # An item that no batch has room for makes one of its own.
    sizes = [10, 20, 490, 480, 30, 0, 0, 500, 0, 1]
    batches = [
        [len(item) for item in batch]
        async for batch in a.batches(Source(*[bytes(size) for size in sizes]))
    ]
    assert batches == [[10, 20], [490], [480], [30, 0, 0], [500, 0], [1]]
    assert granted(a, b) == 0


async def test_a_batch_waits_for_the_memory_of_its_first_item() -> None:
    limiter = testing.limiter(1000)
    a, b = limiter.component("a"), limiter.component("b")
    batches = a.batches(Source(bytes(400), bytes(50)))
    async with anyio.create_task_group() as tasks, b.grant(450):
        tasks.start_soon(anext, batches)
        await steps(5)
        assert limiter.statistics().waiting == 1
        assert granted(a) == 0
        tasks.cancel_scope.cancel()
    assert limiter.statistics().waiting == 0
    assert [len(item) for item in await anext(batches)] == [400, 50]
    await batches.aclose()
    assert granted(a) == 0


async def test_a_batch_asks_in_steps_and_gives_the_rest_back() -> None:
    limiter = testing.limiter("64MiB")
    a = limiter.component("a")
    async for batch in a.batches(Source(*[bytes(100)] * 10_000)):
        assert len(batch) == 10_000
        assert granted(a) == 1_000_000
    assert a.statistics().admissions < 30  # doubling up to 64 KiB at a time
    assert a.statistics().peak_granted_bytes < 1_000_000 + 65536


@pytest.mark.parametrize("max_seconds", [None, 1.0])
async def test_what_was_read_before_an_error_comes_first(max_seconds: float | None) -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    source = Source[object](
        bytes(10), bytes(20), OSError("gone"), bytes(30), "x", {}, bytes(501), bytes(40)
    )
    size = lambda item: item.nbytes if isinstance(item, memoryview) else len(item) or -1  # noqa: E731
    batches = a.batches(source, size=size, max_seconds=max_seconds)
    assert await anext(batches) == [bytes(10), bytes(20)]
    assert granted(a) == 30
    with pytest.raises(OSError, match="gone"):
        await anext(batches)
    assert granted(a) == 0
    assert await anext(batches) == [bytes(30), "x"]
    with pytest.raises(ValueError, match=r"size\(item\)=-1 is negative"):
        await anext(batches)
    with pytest.raises(GrantTooLarge) as caught:
        await anext(batches)
    assert (caught.value.wanted_bytes, caught.value.most_bytes) == (501, 500)
    assert await anext(batches) == [bytes(40)]
    for _ in range(2):
        with pytest.raises(StopAsyncIteration):
            await anext(batches)
    assert granted(a) == 0
    await batches.aclose()
    assert source.closed == 1


@pytest.mark.parametrize("max_seconds", [None, 1.0])
async def test_zero_size_items_make_batches(max_seconds: float | None) -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    source = Source(b"", b"", bytes(3), b"")
    batches = a.batches(source, max_items=3, max_seconds=max_seconds)
    assert await anext(batches) == [b"", b"", bytes(3)]
    assert granted(a) == 3
    assert await anext(batches) == [b""]
    assert a.statistics().grants == 1
    await batches.aclose()
    assert granted(a) == 0
    assert a.statistics().grants == 0


def test_batches_check_their_arguments() -> None:
    a = testing.limiter(1000).component("a")
    for max_items in (0, -1, 1.5, math.nan, True, "3"):
        with pytest.raises(ValueError, match="max_items="):
            a.batches(Source(b""), max_items=max_items)  # type: ignore[arg-type]
    for max_seconds in (0, -1.0, math.inf, math.nan, True, "3"):
        with pytest.raises(ValueError, match="max_seconds="):
            a.batches(Source(b""), max_seconds=max_seconds)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="async"):
        a.batches([b""])  # type: ignore[arg-type]


async def test_batches_dropped_after_a_break_go_without_a_word() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    with capture_logs() as logs:
        async for _ in a.batches(Source(*[bytes(100)] * 9), max_items=2):
            assert granted(a) == 200
            break
        assert granted(a) == 0
    assert logs == []


@pytest.mark.virtual_time
async def test_what_dropped_batches_have_read_ahead_is_given_back_without_a_collection() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")

    holder = await limiter.component("holder").grant(500)

    async def take_one() -> None:
        batches = a.batches(Source(bytes(300)), max_seconds=10)
        with anyio.move_on_after(1):
            await anext(batches)  # which waits for memory, and its reader goes on with that
        holder.release()
        await anyio.sleep(1)
        assert granted(a) >= 300

    gc.disable()
    try:
        await take_one()
        await anyio.sleep(1)
        assert granted(a) == 0
    finally:
        gc.enable()


async def test_batches_in_observation_are_only_ended_by_their_source() -> None:
    limiter = testing.limiter(1000, observe=True)
    a = limiter.component("a")
    lengths = [len(batch) async for batch in a.batches(Source(*[bytes(100)] * 30))]
    assert lengths == [30]
    assert a.statistics().would_refuse > 0
    assert granted(a) == 0


@pytest.mark.virtual_time
async def test_a_batch_is_held_open_no_longer_than_max_seconds() -> None:
    limiter = testing.limiter(10_000)
    a = limiter.component("a")
    source = Source[bytes](end=False)
    batches = a.batches(source, max_seconds=5.0, max_items=4)
    async with anyio.create_task_group() as tasks:

        async def feed() -> None:
            for pause, count in ((7, 1), (3, 1), (1.5, 1), (1, 1), (10, 9)):
                await anyio.sleep(pause)
                source.feed(*[bytes(100)] * count)
            await anyio.sleep(1)
            source.feed(end=True)

        tasks.start_soon(feed)
        got = [(anyio.current_time(), len(batch), granted(a)) async for batch in batches]
    # 7: first item; 10, 11.5: two more; 12: over. 12.5: one, over at 17.5. 22.5: 4 + 4 + 1.
    assert got == [
        (12.0, 3, 300),
        (17.5, 1, 100),
        (22.5, 4, 400),
        (22.5, 4, 400),
        (23.5, 1, 100),
    ]
    assert source.cancelled == 0
    assert source.reads == 14


@pytest.mark.virtual_time
async def test_a_source_that_never_waits_cannot_hold_a_batch_open(
    anyio_backend_name: str,
) -> None:
    limiter = testing.limiter("1GiB")
    a = limiter.component("a")
    if anyio_backend_name == "asyncio":
        move_clock = cast("testing.VirtualTimeLoop", asyncio.get_running_loop()).advance
    else:
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, trio.testing.MockClock)
        move_clock = clock.jump

    class Fast(Source[bytes]):
        async def __anext__(self) -> bytes:
            move_clock(0.1)  # time passes, but nobody else has a turn
            return b"x"

    async with a.batches(Fast(), max_seconds=1.0) as batches:
        for _ in range(3):
            assert 10 <= len(await anext(batches)) <= 12


@pytest.mark.virtual_time
async def test_a_slow_consumer_finds_the_item_that_was_read_meanwhile() -> None:
    limiter = testing.limiter(10_000)
    a = limiter.component("a")
    source = Source(bytes(1), bytes(2), bytes(3), end=False)
    batches = a.batches(source, max_seconds=5.0)
    assert await anext(batches) == [bytes(1), bytes(2), bytes(3)]
    assert anyio.current_time() == 5
    source.feed(bytes(4), bytes(5), bytes(6))
    await anyio.sleep(100)
    assert source.reads == 4  # one ahead, not more
    assert granted(a) == 6
    assert await anext(batches) == [bytes(4), bytes(5), bytes(6)]
    assert anyio.current_time() == 110
    await batches.aclose()
    assert (source.closed, source.cancelled) == (1, 1)


@pytest.mark.virtual_time
async def test_a_cancelled_consumer_finds_everything_the_next_time() -> None:
    limiter = testing.limiter(10_000)
    a = limiter.component("a")
    source = Source(bytes(1), bytes(2), end=False)
    batches = a.batches(source, max_seconds=60.0)
    with anyio.move_on_after(10):
        await anext(batches)
    source.feed(bytes(3), bytes(4))
    await anyio.sleep(10)
    assert await anext(batches) == [bytes(1), bytes(2), bytes(3), bytes(4)]
    assert anyio.current_time() == 60
    with anyio.move_on_after(10):
        await anext(batches)
    source.feed(bytes(5))
    await anyio.sleep(1000)
    assert granted(a) == 0  # nobody waits for it, so it is not even charged
    source.feed(end=True)
    assert await anext(batches) == [bytes(5)]
    with pytest.raises(StopAsyncIteration):
        await anext(batches)
    assert source.cancelled == 0


@pytest.mark.virtual_time
async def test_a_batch_that_is_overdue_is_there_at_once() -> None:
    limiter = testing.limiter(10_000)
    a = limiter.component("a")
    source = Source(bytes(1), end=False)
    batches = a.batches(source, max_seconds=5.0)
    with anyio.move_on_after(1):
        await anext(batches)
    await anyio.sleep(100)
    with anyio.fail_after(0.5):
        assert await anext(batches) == [bytes(1)]
    await batches.aclose()


@pytest.mark.virtual_time
async def test_an_async_generator_survives_max_seconds() -> None:
    limiter = testing.limiter(10_000)
    a = limiter.component("a")
    closed = []

    async def slow() -> AsyncIterator[bytes]:
        try:
            with anyio.move_on_after(10_000):  # its scope needs one task for all of it
                for number in range(5):
                    await anyio.sleep(number)
                    yield bytes(number)
        finally:
            closed.append(anyio.current_time())

    got = [
        (anyio.current_time(), [len(item) for item in batch])
        async for batch in a.batches(slow(), max_seconds=1.5)
    ]
    assert got == [(1.5, [0, 1]), (4.5, [2]), (7.5, [3]), (10.0, [4])]
    assert closed == [10.0]
    async with a.batches(slow(), max_seconds=1.5) as batches:
        assert await anext(batches) == [bytes(0), bytes(1)]
    assert closed == [10.0, 11.5]  # closed by the task that has read it
    assert granted(a) == 0


@pytest.mark.virtual_time
async def test_a_quota_ends_a_timed_batch_too() -> None:
    limiter = testing.limiter(1000)
    a, b = limiter.component("a"), limiter.component("b")
    source = Source(*[bytes(100)] * 12, end=False)
    batches = a.batches(source, max_seconds=5.0)
    assert len(await anext(batches)) == 5
    assert anyio.current_time() == 0
    assert len(await anext(batches)) == 5
    assert len(await anext(batches)) == 2
    assert anyio.current_time() == 5
    async with b.grant(380), anyio.create_task_group() as tasks:
        source.feed(bytes(450))
        tasks.start_soon(anext, batches)
        await anyio.sleep(3)
        assert limiter.statistics().waiting == 1
        tasks.cancel_scope.cancel()
    await anyio.sleep(1)
    source.feed(bytes(20))
    assert [len(item) for item in await anext(batches)] == [450, 20]
    await batches.aclose()
    assert granted(a) == 0


@pytest.mark.parametrize("when", ["before it starts", "while it reads", "at the end"])
async def test_dropping_timed_batches_ends_their_task(when: str) -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    source = Source(bytes(10), bytes(10), bytes(10), end=False)
    batches = a.batches(source, max_seconds=60.0, max_items=2)
    if when == "before it starts":
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anext(batches)
    else:
        assert await anext(batches) == [bytes(10)] * 2
        source.feed(end=when == "at the end")
        await ask_and_cancel(batches)
    reader = weakref.ref(batches._reader)
    del batches
    gc.collect()  # a traceback may hold it still
    await steps(5)
    gc.collect()
    assert reader() is None
    assert granted(a) == 0
    assert limiter.statistics().grants == 0
    assert source.closed == 0
    if when == "while it reads":
        assert source.cancelled == 1
        source.feed(b"still usable")
        assert await anext(source) == b"still usable"


async def test_closing_timed_batches_ends_their_task() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    unused = a.batches(Source(b""), max_seconds=1.0)
    await unused.aclose()
    assert unused._batch._source.closed == 1  # type: ignore[attr-defined]
    for wait in (0, 1, 2, 3, 5):
        source = Source(bytes(10), end=False)
        batches = a.batches(source, max_seconds=60.0)
        ends: list[str] = []

        async def consume(batches: Batches[bytes], ends: list[str]) -> None:
            async for _ in batches:
                pytest.fail("unreachable")  # pragma: no cover
            ends.append("end")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(consume, batches, ends)
            await steps(wait)
            await batches.aclose()
            await batches.aclose()
            assert granted(a) == 0
        assert ends == ["end"]
        assert source.closed == 2
        assert limiter.statistics().grants == 0


async def test_an_error_of_closing_is_told() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")

    class Sticky(Source[bytes]):
        async def aclose(self) -> None:
            raise OSError("stuck")

    for max_seconds in (None, 60.0):
        batches = a.batches(Sticky(bytes(10)), max_items=1, max_seconds=max_seconds)
        await anext(batches)
        with pytest.raises(OSError, match="stuck"):
            await batches.aclose()
        assert granted(a) == 0


async def test_closing_while_another_task_waits_for_an_item() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    iterators: list[Callable[[Source[bytes]], Any]] = [
        lambda source: bounded(source, component=a),
        lambda source: a.batches(source, max_items=1),
    ]
    for make in iterators:
        source = Source[bytes](end=False)
        items = make(source)
        async with anyio.create_task_group() as tasks:

            async def consume(items: Any) -> None:
                with pytest.raises(StopAsyncIteration):
                    await anext(items)

            tasks.start_soon(consume, items)
            await steps(3)
            await items.aclose()
            source.feed(b"too late")
        assert granted(a) == 0


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # only it lets anybody cancel a task
async def test_a_reader_that_is_cancelled_from_outside_tells_its_consumer() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    batches = a.batches(Source(bytes(10), end=False), max_seconds=60.0)
    waits = asyncio.ensure_future(anext(batches))
    await steps(3)
    reader: Any = batches._reader
    reader._task.cancel()
    await steps(3)
    assert (await waits) == [bytes(10)]
    with pytest.raises(asyncio.CancelledError):
        await anext(batches)


async def test_the_source_of_timed_batches_runs_in_its_consumers_context() -> None:
    async with testing.limiter(1000) as limiter:
        a = limiter.component("a")
        source = Source(b"x")
        async with a, a.batches(source, max_seconds=1.0) as batches:
            await anext(batches)
        assert set(source.contexts) == {a}


# --- memory streams


async def test_a_memory_stream_charges_its_receiver() -> None:
    limiter = testing.limiter(10_000)
    a = limiter.component("a")
    send, receive = create_memory_stream[bytes](component=a)
    async with send, receive:
        await send.send(bytes(100))
        send.send_nowait(bytes(200))
        assert granted(a) == 300
        assert send.statistics() == InboxStatistics(2, math.inf, 1, 1, 0, 0, 300, 0)
        assert (a._account.granted, a._account.in_flight) == (0, 300)
        assert len(await receive.receive()) == 100
        assert (a._account.granted, a._account.in_flight) == (100, 200)  # the receiver's now
        assert len(receive.receive_nowait()) == 200
        assert granted(a) == 200
        with pytest.raises(anyio.WouldBlock):
            receive.receive_nowait()
        assert granted(a) == 0  # it wanted the next one
        await send.send(b"")
        assert await receive.receive() == b""
    assert granted(a) == 0
    assert limiter.statistics().grants == 0


async def test_what_is_in_flight_leaves_as_much_to_the_receiver() -> None:
    limiter = testing.limiter(6000)  # a alone may have 3000; a sender to it, half of that
    a = limiter.component("a")
    send, receive = create_memory_stream[bytes](component=a)
    async with send, receive:
        for _ in range(15):
            send.send_nowait(bytes(100))
        with pytest.raises(anyio.WouldBlock):
            send.send_nowait(bytes(100))
        assert send.statistics().charged_bytes == 1500
        async with a.grant(1500, timeout=0):  # so much it can still have at once
            with pytest.raises(QuotaExceeded, match="0 bytes now"):
                a.grant_nowait(1)
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(send.send, bytes(100))
                    await steps(5)
                    assert send.statistics().tasks_waiting_send == 1
                    scope.cancel()
            assert send.statistics().tasks_waiting_send == 0
        receive.receive_nowait()  # 4*100 + 2*1400 + 1500 of the 4500 that are free
        with pytest.raises(anyio.WouldBlock):
            send.send_nowait(bytes(100))
        assert send.statistics().charged_bytes == 1400
        receive.receive_nowait()
        send.send_nowait(bytes(100))
        assert (a._account.granted, a._account.in_flight) == (100, 1400)


async def test_a_receiver_gets_grants_of_its_own_whoever_waits_to_send() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    send, receive = create_memory_stream[bytes](component=a)
    done = []

    async def produce() -> None:
        async with send:
            for size in (125, 50, 50, 200, 5, 250, 249, 7):
                await send.send(bytes(size))

    async with anyio.create_task_group() as tasks, receive:
        tasks.start_soon(produce)
        async for item in receive:
            await steps(3)
            async with a.grant(100):
                await steps(1)
            done.append(len(item))
    assert done == [125, 50, 50, 200, 5, 250, 249, 7]
    assert granted(a) == 0


async def test_sending_waits_for_the_receivers_quota() -> None:
    limiter = testing.limiter(1000)
    a, b = limiter.component("a"), limiter.component("b")
    send, receive = create_memory_stream[bytes](component=a)
    order = []

    async def produce(size: int) -> None:
        await send.send(bytes(size))
        order.append(size)

    async with send, receive, anyio.create_task_group() as tasks:
        async with b.grant(400):
            tasks.start_soon(produce, 200)
            await steps(4)
            tasks.start_soon(produce, 1)
            await steps(4)
            tasks.start_soon(produce, 0)
            await steps(4)
            assert order == []
            assert send.statistics().tasks_waiting_send == 3
            assert limiter.statistics().waiting == 3
            with pytest.raises(anyio.WouldBlock):
                send.send_nowait(b"")  # others are before it
            async with a.grant(300):  # but not before the receiver's own
                assert order == []
        assert [len(await receive.receive()) for _ in range(3)] == [200, 1, 0]
        assert order == [200, 1, 0]


async def test_what_others_give_back_wakes_a_sender() -> None:
    limiter = testing.limiter(1000)
    a, b = limiter.component("a"), limiter.component("b")
    send, receive = create_memory_stream[bytes](component=a)
    async with send, receive, anyio.create_task_group() as tasks:
        async with b.grant(400):
            send.send_nowait(bytes(100))
            assert len(receive.receive_nowait()) == 100  # busy with that for an hour
            tasks.start_soon(send.send, bytes(101))  # 4*101 + 100 of the 500 that are free
            await steps(10)
            assert send.statistics().tasks_waiting_send == 1
            assert granted(a) == 100
        await steps(5)
        assert send.statistics().tasks_waiting_send == 0
        assert granted(a) == 201


async def test_what_can_never_be_granted_cannot_be_sent() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a", firm_limit=300)
    for component, most in ((limiter.component("b"), 250), (a, 150)):
        send, receive = create_memory_stream[bytes](component=component)
        async with send, receive:
            for first in (None, b"x"):
                if first is not None:
                    await send.send(first)
                with pytest.raises(GrantTooLarge) as caught:
                    await send.send(bytes(most + 1))
                assert caught.value.most_bytes == most
                with pytest.raises(GrantTooLarge):
                    send.send_nowait(bytes(most + 1))
                with pytest.raises(TypeError, match="pass size="):
                    await send.send({})  # type: ignore[arg-type]
                with pytest.raises(TypeError, match="pass size="):
                    send.send_nowait([])  # type: ignore[arg-type]
            await receive.receive()
            with pytest.raises(anyio.WouldBlock):
                receive.receive_nowait()
            await send.send(bytes(most))
        assert granted(component) == 0


async def test_a_memory_stream_may_be_bounded_in_items_too() -> None:
    limiter = testing.limiter(10_000)
    a = limiter.component("a")
    send, receive = create_memory_stream[bytes](component=a, max_items=2)
    async with send, receive, anyio.create_task_group() as tasks:
        send.send_nowait(b"1")
        send.send_nowait(b"2")
        with pytest.raises(anyio.WouldBlock):
            send.send_nowait(b"3")
        tasks.start_soon(send.send, b"3")
        await steps(4)
        tasks.start_soon(send.send, b"4")
        await steps(4)
        assert send.statistics() == InboxStatistics(2, 2, 1, 1, 2, 0, 2, 0)
        assert [await receive.receive() for _ in range(4)] == [b"1", b"2", b"3", b"4"]
    for max_items in (0, -1, 1.5, math.nan, -math.inf, True):
        with pytest.raises(ValueError, match="max_items="):
            create_memory_stream(component=a, max_items=max_items)


async def test_closing_is_told_as_anyio_does() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")

    async def outcomes(
        make: Callable[[], tuple[Any, Any]], *, send_to: int, close: str
    ) -> list[str]:
        """Have somebody wait at each end, close something, and tell what they get."""
        send, receive = make()
        told = []

        async def attempt(name: str, wait: Callable[[], Awaitable[Any]]) -> None:
            try:
                told.append(f"{name}: {await wait()!r}")
            except Exception as error:  # noqa: BLE001
                told.append(f"{name}: {type(error).__name__}")

        async with anyio.create_task_group() as tasks:
            if send_to == 1:
                tasks.start_soon(attempt, "receive", receive.receive)
            else:
                send.send_nowait(b"x")
                tasks.start_soon(attempt, "send", lambda: send.send(b"y"))
            await steps(5)
            for end in close:
                {"s": send, "r": receive}[end].close()
        for name, wait in (("send", lambda: send.send(b"z")), ("receive", receive.receive)):
            await attempt(name, wait)
        for name, nowait in (
            ("send_nowait", lambda: send.send_nowait(b"z")),
            ("receive_nowait", receive.receive_nowait),
            ("send.clone", send.clone),
            ("receive.clone", receive.clone),
        ):
            try:
                got = nowait()
                told.append(f"{name}: {got!r}" if isinstance(got, bytes) else name)
                if hasattr(got, "close"):
                    got.close()
            except Exception as error:  # noqa: BLE001
                told.append(f"{name}: {type(error).__name__}")
        send.close()
        receive.close()
        return told

    for send_to in (1, 2):
        for close in ("s", "r", "sr", "rs"):
            ours = await outcomes(
                lambda: create_memory_stream[bytes](component=a, max_items=1),
                send_to=send_to,
                close=close,
            )
            theirs = await outcomes(
                lambda: anyio.create_memory_object_stream[bytes](1), send_to=send_to, close=close
            )
            assert ours == theirs, (send_to, close)
            assert granted(a) == 0


async def test_a_sender_that_waits_for_memory_hears_of_closing() -> None:
    limiter = testing.limiter(1000)
    a, b = limiter.component("a"), limiter.component("b")
    for in_flight in (0, 100):
        for close in ("send", "receive"):
            send, receive = create_memory_stream[bytes](component=a)
            told: list[type[Exception]] = []

            async def attempt(send: MemorySendStream[bytes], told: list[type[Exception]]) -> None:
                try:
                    await send.send(bytes(200))
                except Exception as error:  # noqa: BLE001
                    told.append(type(error))

            async with b.grant(450), anyio.create_task_group() as tasks:
                if in_flight:
                    send.send_nowait(bytes(in_flight))
                tasks.start_soon(attempt, send, told)
                await steps(6)
                assert send.statistics().tasks_waiting_send == 1
                (send if close == "send" else receive).close()
            assert told == [
                anyio.ClosedResourceError if close == "send" else anyio.BrokenResourceError
            ]
            assert limiter.statistics().waiting == 0
            send.close()
            receive.close()
            assert granted(a) == 0


async def test_clones_share_a_stream() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    send, receive = create_memory_stream[bytes](component=a)
    with send, receive, send.clone() as send2, receive.clone() as receive2:
        assert receive.statistics()[2:4] == (2, 2)
        send.close()
        send2.send_nowait(b"x")
        send2.send_nowait(b"yy")
        assert receive.receive_nowait() == b"x"
        assert receive2.receive_nowait() == b"yy"
        assert granted(a) == 3
        receive.close()
        assert granted(a) == 2
        send2.send_nowait(b"zzz")
        send2.close()
        assert receive2.receive_nowait() == b"zzz"
        with pytest.raises(anyio.EndOfStream):
            await receive2.receive()
        assert [item async for item in receive2] == []
        assert receive.statistics()[2:4] == (0, 1)
    assert granted(a) == 0


async def test_two_tasks_at_one_receive_stream() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    send, receive = create_memory_stream[bytes](component=a)
    got = []

    async def consume() -> None:
        got.append(await receive.receive())

    async with send, receive:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(consume)
            await steps(3)
            tasks.start_soon(consume)
            await steps(3)
            assert receive.statistics().tasks_waiting_receive == 2
            send.send_nowait(b"x")
            send.send_nowait(b"yy")
        assert sorted(got) == [b"x", b"yy"]
        assert granted(a) == len(got[-1])  # of the last one
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(consume)
            await steps(3)
            send.send_nowait(b"zzz")
            receive.close()
        assert got[2:] == [b"zzz"]
        assert granted(a) == 0


async def test_what_is_left_in_a_stream_is_given_back() -> None:
    limiter = testing.limiter(10_000)
    a = limiter.component("a")
    send, receive = create_memory_stream[bytes](component=a)
    for _ in range(3):
        send.send_nowait(bytes(100))
    receive.receive_nowait()
    receive.close()
    assert granted(a) == 0
    with pytest.raises(anyio.BrokenResourceError):
        send.send_nowait(b"")
    send.close()
    send.close()
    receive.close()


async def test_a_stream_that_is_dropped_unclosed_warns_and_gives_back() -> None:
    limiter = testing.limiter(10_000)
    a = limiter.component("a")
    send, receive = create_memory_stream[bytes](component=a)
    for _ in range(5):
        send.send_nowait(bytes(100))
    receive.receive_nowait()
    told: list[str] = []

    async def attempt() -> None:
        try:
            await send.send(bytes(2400))
        except anyio.BrokenResourceError:
            told.append("broken")

    async with anyio.create_task_group() as tasks, limiter.component("b").grant(4000):
        tasks.start_soon(attempt)
        await steps(4)
        assert send.statistics().tasks_waiting_send == 1
        with pytest.warns(ResourceWarning, match="Unclosed <MemoryReceiveStream at"):
            del receive
        assert granted(a) == 0
        await steps(4)
        assert told == ["broken"]  # although there is still too little for it
    with pytest.warns(ResourceWarning, match="Unclosed <MemorySendStream at"):
        del send
    assert limiter.statistics().grants == 0
    send, receive = create_memory_stream[bytes](component=a)
    other = receive.clone()
    send.send_nowait(bytes(100))
    with pytest.warns(ResourceWarning, match="MemoryReceiveStream"):
        del receive
    assert other.receive_nowait() == bytes(100)
    other.close()
    send.close()


async def test_a_memory_stream_belongs_to_who_makes_it() -> None:
    outside_send, outside_receive = create_memory_stream[bytes]()
    async with testing.limiter(1000) as limiter:
        a, b = limiter.component("a"), limiter.component("b")
        async with a:
            send, receive = create_memory_stream[bytes]()
        named_send, named_receive = create_memory_stream[bytes](component="b")
        async with b:
            for stream in (outside_send, send, named_send):
                await stream.send(bytes(60))
            assert granted(limiter.root) == 60  # made outside of any component
            assert granted(a) == 60
            assert granted(b) == 60
            for end in (outside_receive, receive, named_receive):
                await end.receive()
            await outside_send.send(b"")
            for each in (outside_send, outside_receive, send, receive, named_send, named_receive):
                await each.aclose()
        with pytest.raises(UnknownComponent):
            create_memory_stream(component="nobody")


async def test_observation_never_makes_a_sender_wait() -> None:
    limiter = testing.limiter(1000, observe=True)
    a = limiter.component("a")
    send, receive = create_memory_stream[bytes](component=a)
    async with send, receive:
        for _ in range(10):
            await send.send(bytes(200))
            send.send_nowait(bytes(700))
        assert granted(a) == 9000
    assert granted(a) == 0


async def test_batches_of_a_memory_stream_never_wait_for_each_other() -> None:
    limiter = testing.limiter(8000)
    a = limiter.component("a")
    for other, max_seconds in ((a, None), (a, 60.0), (limiter.component("b"), None)):
        send, receive = create_memory_stream[bytes](component=a)
        lengths, held = [], []

        async def produce(send: MemorySendStream[bytes]) -> None:
            async with send:
                for _ in range(100):
                    await send.send(bytes(100))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(produce, send)
            async with other.batches(receive, max_seconds=max_seconds) as batches:
                async for batch in batches:
                    lengths.append(len(batch))
                    held.append(granted(other))
                    await steps(2)
        assert sum(lengths) == 100
        assert max(lengths) >= 15
        assert all(nbytes >= 100 * length for nbytes, length in zip(held, lengths, strict=True))
        assert granted(a, other) == 0
        with pytest.raises(anyio.ClosedResourceError):
            receive.receive_nowait()


@pytest.mark.virtual_time
async def test_a_batch_is_handed_over_at_once_if_a_sender_waits_already() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    send, receive = create_memory_stream[bytes](component=a)

    async def produce() -> None:
        async with send:
            for _ in range(10):
                await send.send(bytes(100))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(produce)
        await anyio.sleep(0.1)  # until the sender waits
        async with a.batches(receive) as batches:
            lengths = [len(batch) async for batch in batches]
    assert lengths == [4, 4, 2]
    assert anyio.current_time() == 0.1


@pytest.mark.virtual_time
async def test_a_batch_that_was_handed_over_lets_its_sender_wait() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    send, receive = create_memory_stream[bytes](component=a)
    async with send, a.batches(receive, max_seconds=1.0) as batches:
        await send.send(bytes(200))
        assert await anext(batches) == [bytes(200)]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send.send, bytes(201))  # 4*201 + 200 of the 800 that are free
            await anyio.sleep(100)
            assert send.statistics().tasks_waiting_send == 1  # the task still reads, in vain
            assert await anext(batches) == [bytes(201)]
        assert anyio.current_time() == 102


async def test_batches_of_large_messages() -> None:
    limiter = testing.limiter(1000)
    a, b = limiter.component("a"), limiter.component("b")
    for other, largest, size in ((a, 250, None), (a, 250, len), (b, 250, None), (b, 250, len)):
        send, receive = create_memory_stream[bytes](component=a)
        sizes = [largest, 1, largest, largest, 200, 200, largest]
        got = []

        async def produce(send: MemorySendStream[bytes], sizes: list[int]) -> None:
            async with send:
                for size in sizes:
                    await send.send(bytes(size))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(produce, send, sizes)
            async with other.batches(receive, size=size, max_items=3) as batches:
                async for batch in batches:
                    got += [len(item) for item in batch]
                    await steps(2)
        assert got == sizes
        assert granted(a, b) == 0


async def test_an_item_without_a_size_is_left_out_of_a_batch() -> None:
    limiter = testing.limiter(1000)
    a, b = limiter.component("a"), limiter.component("b")
    send, receive = create_memory_stream[bytes](component=a)
    async with send, b.batches(receive, size=lambda item: len(item) - 3, max_items=1) as batches:
        send.send_nowait(bytes(1))
        send.send_nowait(bytes(10))
        with pytest.raises(ValueError, match=r"size\(item\)=-2"):
            await anext(batches)
        assert await anext(batches) == [bytes(10)]
        assert (granted(a), granted(b)) == (0, 7)


# --- cancellation, at each step


async def gather(
    items: AsyncIterator[T], after_steps: int, *, native: bool
) -> tuple[list[T], bool]:
    """Take all items; cancel one time, after so many steps; tell whether that hit anything."""
    got: list[T] = []
    hit = False
    ended = False

    async def ask() -> None:
        nonlocal ended
        try:
            got.append(await anext(items))
        except StopAsyncIteration:
            ended = True

    count = after_steps
    while not ended:
        before = len(got)
        scope = anyio.CancelScope()
        task = asyncio.ensure_future(ask()) if native else None
        async with anyio.create_task_group() as tasks:

            async def ask_or_wait(
                scope: anyio.CancelScope = scope, task: asyncio.Future[None] | None = task
            ) -> None:
                if task is None:
                    with scope:
                        await ask()
                else:
                    await asyncio.wait([task])

            tasks.start_soon(ask_or_wait)
            while not hit and len(got) == before and not ended:
                if not count:
                    hit = True
                    (scope if task is None else task).cancel()
                else:
                    count -= 1
                    await anyio.lowlevel.checkpoint()
        if task is not None and not task.cancelled():
            task.result()
    return got, hit


def make_iterator(kind: str, limiter: MemoryLimiter) -> tuple[Any, list[int]]:
    """Give something that iterates under grants, and the sizes of what it should give."""
    a = limiter.component("a")
    sizes = [100, 0, 120, 450, 10, 10]
    source = Late(*[bytes(size) for size in sizes])
    match kind:
        case "bounded":
            return bounded(source, component=a), sizes
        case "bounded ahead":
            return bounded(source, ahead=110, component=a), sizes
        case "batches":
            return a.batches(source, max_items=3), sizes
        case "timed batches":
            return a.batches(source, max_items=3, max_seconds=60.0), sizes
        case _:
            raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["bounded", "bounded ahead", "batches", "timed batches"])
async def test_iterators_lose_nothing_wherever_they_are_cancelled(
    kind: str, anyio_backend_name: str
) -> None:
    for native in (False, True) if anyio_backend_name == "asyncio" else (False,):
        hit, after_steps = True, 0
        while hit:
            limiter = testing.limiter(1000)
            b = limiter.component("b")

            async def rival(b: Component = b) -> None:
                async with b.grant(400):
                    await steps(9)

            items, expected = make_iterator(kind, limiter)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(rival)
                got, hit = await gather(items, after_steps, native=native)
            flat = [each for item in got for each in (item if isinstance(item, list) else [item])]
            assert [len(each) for each in flat] == expected, after_steps
            statistics = limiter.statistics()
            assert (statistics.grants, statistics.waiting) == (0, 0), after_steps
            assert all(each.granted_bytes == 0 for each in statistics.components)
            after_steps += 1
        assert after_steps > 10


@pytest.mark.parametrize("who", ["sender", "receiver", "batches", "timed batches"])
async def test_a_memory_stream_loses_nothing_wherever_it_is_cancelled(
    who: str, anyio_backend_name: str
) -> None:
    for native in (False, True) if anyio_backend_name == "asyncio" else (False,):
        hit, after_steps = True, 0
        while hit:
            limiter = testing.limiter(1000)
            a, b = limiter.component("a"), limiter.component("b")
            send, receive = create_memory_stream[bytes](component=a, max_items=2)
            sizes = iter([100, 50, 0, 120, 240, 20])
            pending: list[int] = []
            sent: list[int] = []

            class Sending(AsyncIterator[int]):
                """Sends one thing each time it is asked; the same again if it was cancelled."""

                async def __anext__(
                    self,
                    sizes: Any = sizes,
                    pending: list[int] = pending,
                    sent: list[int] = sent,
                    send: MemorySendStream[bytes] = send,
                ) -> int:
                    if not pending:
                        pending.append(next(sizes, -1))
                    if pending[0] < 0:
                        send.close()
                        raise StopAsyncIteration
                    await send.send(bytes(pending[0]))
                    sent.append(pending[0])
                    return pending.pop()

            sending = Sending()
            receiving: AsyncIterator[Any] = receive
            if who == "batches":
                receiving = a.batches(receive, max_items=3)
            elif who == "timed batches":
                receiving = a.batches(receive, max_items=3, max_seconds=60.0)
            got: list[Any] = []

            async def other_side(
                items: AsyncIterator[Any] = receiving if who == "sender" else sending,
                got: list[Any] = got,
            ) -> None:
                async for item in items:
                    got.append(item)
                    await steps(2)

            async def rival(b: Component = b) -> None:
                async with b.grant(400):
                    await steps(9)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(rival)
                tasks.start_soon(other_side)
                cancelled = sending if who == "sender" else receiving
                taken, hit = await gather(cancelled, after_steps, native=native)
            received = got if who == "sender" else taken
            flat = [each for one in received for each in (one if isinstance(one, list) else [one])]
            assert [len(each) for each in flat] == sent, after_steps
            assert sent == [100, 50, 0, 120, 240, 20], after_steps
            receive.close()
            assert send.statistics().charged_bytes == 0
            statistics = limiter.statistics()
            assert (statistics.grants, statistics.waiting) == (0, 0), after_steps
            after_steps += 1
        assert after_steps > 10


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # trio cancels nobody it has woken
async def test_a_cancelled_receiver_leaves_its_item_to_others() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    for others in ("waiting", "none", "closed"):
        send, receive = create_memory_stream[bytes](component=a)
        other = receive.clone()
        first = asyncio.ensure_future(receive.receive())
        await steps(3)
        second = asyncio.ensure_future(other.receive()) if others == "waiting" else None
        await steps(3)
        send.send_nowait(b"precious")
        first.cancel()  # after it was handed the item, before it could take it
        if others == "closed":
            receive.close()
            other.close()
        await steps(3)
        assert first.cancelled()
        if second is not None:
            assert await second == b"precious"
        elif others == "none":
            assert other.receive_nowait() == b"precious"
        other.close()
        receive.close()
        send.close()
        assert granted(a) == 0


async def test_a_limiter_may_come_while_a_batch_is_gathered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limiter_module, "_warned_of_nobody", True)
    a = Component("a")
    send, receive = create_memory_stream[bytes]()
    async with send, a.batches(receive) as batches:
        send.send_nowait(b"from nobody")
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anext(batches)
        async with testing.limiter(1000) as limiter:
            send.send_nowait(b"from root")
            assert await anext(batches) == [b"from nobody"]
            assert granted(limiter.root) == 9
            send.close()
            assert await anext(batches) == [b"from root"]
            assert granted(limiter.root) == 0
            assert limiter.find("a").statistics().granted_bytes == 9
            await batches.aclose()


async def test_memory_that_is_found_gone_makes_senders_wait() -> None:
    probe = testing.ScriptedProbe(0)
    limiter = testing.limiter(1000, probe=probe)
    a = limiter.component("a")
    send, receive = create_memory_stream[bytes](component=a)
    async with send, receive, anyio.create_task_group() as tasks:
        probe.set(1000)
        with pytest.raises(anyio.WouldBlock):
            send.send_nowait(bytes(200))
        probe.set(0)
        await send.send(bytes(100))
        await receive.receive()
        with pytest.raises(anyio.WouldBlock):
            receive.receive_nowait()
        async with limiter.component("b").grant(1):  # else it would be let in nevertheless
            probe.set(1000)
            tasks.start_soon(send.send, bytes(200))
            await steps(10)
            assert send.statistics().tasks_waiting_send == 1
            probe.set(0)
        limiter.statistics()  # takes a reading
        assert await receive.receive() == bytes(200)


def test_a_stream_works_outside_an_event_loop() -> None:
    a = testing.limiter(1000).component("a")
    send, receive = create_memory_stream[bytes](component=a)
    send.send_nowait(b"x")
    send.send_nowait(b"y")
    assert receive.receive_nowait() == b"x"
    assert granted(a) == 2
    receive._inbox._buffer.clear()
    assert granted(a) == 1
    receive.close()
    send.close()
    assert granted(a) == 0


def test_the_ends_are_anyios_kinds() -> None:
    a = testing.limiter(1000).component("a")
    send, receive = create_memory_stream[bytes](component=a)
    assert isinstance(send, anyio.abc.ObjectSendStream)
    assert isinstance(receive, anyio.abc.ObjectReceiveStream)
    assert isinstance(receive, MemoryReceiveStream)
    send.close()
    receive.close()


# --- whole pipelines


@pytest.mark.virtual_time
@pytest.mark.parametrize("seed", range(30))
async def test_a_pipeline_of_moderate_items_never_stops(seed: int) -> None:
    random = Random(seed)
    limiter = testing.limiter(10_000)
    one = random.random() < 0.3
    reading, decoding, writing = (
        limiter.component("all" if one else name) for name in ("read", "decode", "write")
    )
    largest = random.choice([10, 300, 600])
    sizes = [random.randint(0, largest) for _ in range(random.randint(1, 60))]
    factor = random.choice([0.5, 1, 2])
    workers = random.choice([1, 1, 3])
    text_in, text_out = create_memory_stream[bytes](component=decoding)
    records_in, records_out = create_memory_stream[bytes](component=writing)
    written: list[int] = []

    async def sleep_perhaps(longest: float) -> None:
        if random.random() < 0.3:
            await anyio.sleep(random.random() * longest)

    async def source() -> AsyncIterator[bytes]:
        for size in sizes:
            await sleep_perhaps(1)
            yield bytes(size)

    async def read() -> None:
        async with text_in:
            ahead = random.choice([0, 50])
            async for item in bounded(source(), component=reading, ahead=ahead):
                await text_in.send(item)

    async def decode(source: MemoryReceiveStream[bytes], sink: MemorySendStream[bytes]) -> None:
        async with source, sink:
            async for item in source:
                async with decoding.grant(int(len(item) * factor)):
                    await sleep_perhaps(1)
                    await sink.send(item)

    async def write() -> None:
        batches = writing.batches(
            records_out,
            max_items=random.choice([None, 1, 4]),
            max_seconds=random.choice([None, None, 1.0]),
        )
        async with batches:
            async for batch in batches:
                await sleep_perhaps(3)
                written.extend(len(item) for item in batch)

    with anyio.fail_after(1000):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            for _ in range(workers - 1):
                tasks.start_soon(decode, text_out.clone(), records_in.clone())
            tasks.start_soon(decode, text_out, records_in)
            tasks.start_soon(write)
    assert sorted(written) == sorted(sizes)
    assert workers > 1 or written == sizes
    statistics = limiter.statistics()
    assert (statistics.grants, statistics.committed_bytes) == (0, 0)
    assert all(each.peak_granted_bytes <= 5000 for each in statistics.components)


async def test_charges_of_a_dropped_batch_let_senders_go_on() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    send, receive = create_memory_stream[bytes](component=a)
    async with send, receive, anyio.create_task_group() as tasks:
        send.send_nowait(bytes(200))
        batches = a.batches(receive, max_items=1)
        assert await anext(batches) == [bytes(200)]
        tasks.start_soon(send.send, bytes(201))
        await steps(4)
        assert send.statistics().tasks_waiting_send == 1
        del batches
        assert granted(a) == 201
        await steps(4)
        assert receive.receive_nowait() == bytes(201)
        assert granted(a) == 201
