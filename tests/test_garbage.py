"""Tasks and generators that are garbage, and are closed by the collector wherever it runs.

Where it is started inside the limiter, its thread has the lock: what their blocks give back must
wait for that, and nothing may be lost or given back twice.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from membound_async import Component, MemoryLimiter, ResourceLimits
from membound_async.garbage import is_collecting
from membound_async.testing import limiter
from tests.left import assert_nothing_is_left

Block = Callable[[Component], Coroutine[Any, Any, None]]


@pytest.fixture
def limited() -> Iterator[MemoryLimiter]:
    """A limiter, while garbage is collected only on demand."""
    gc.collect()
    gc.disable()
    try:
        yield limiter("100MiB")
    finally:
        gc.enable()


def collect(limiter: MemoryLimiter, inside: bool) -> None:
    """Run the collector in a thread, so that one that hangs is seen."""

    def run() -> None:
        if inside:
            with limiter._lock:
                gc.collect()
        else:
            gc.collect()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "it waits for the lock that it has itself"


async def never() -> None:
    await asyncio.get_running_loop().create_future()


async def entered(part: Component) -> None:
    async with part, part.grant("1MiB"):
        await never()


async def alone(part: Component) -> None:
    async with part.grant("80MiB", oversize="alone"):
        await never()


async def shared(part: Component) -> None:
    async with part.grant("1MiB") as grant, grant.share():
        await never()


async def sent(part: Component) -> None:
    async with part.grant("1MiB", sender="s", also={"fds": 1}):
        await never()


async def reclaiming(part: Component) -> None:
    with part._limiter.add_reclaimer(int):
        async with part.grant("1MiB"):
            await never()


async def generator(part: Component) -> None:
    def block() -> Iterator[None]:
        with part.grant_nowait("1MiB"):
            yield

    running = block()
    next(running)
    cycle: list[object] = [running]
    cycle.append(cycle)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("block", [entered, alone, shared, sent, reclaiming, generator])
def test_what_blocks_hold_is_given_back_once(
    limited: MemoryLimiter, block: Block, inside: bool
) -> None:
    part = limited.component("part", minimum="4MiB", limits=ResourceLimits(fds=3))

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # "was destroyed"
        asyncio.create_task(block(part))  # noqa: RUF006
        for _ in range(20):
            await asyncio.sleep(0)
        assert limited.statistics().grants
        collect(limited, inside)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asyncio.run(main())
    assert_nothing_is_left(limited)
    assert limited.statistics().reclaimers == ()


def test_whether_it_is_the_collector_that_calls() -> None:
    seen: list[bool] = []

    class Closed:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            seen.append(is_collecting())

    Closed().itself = None  # type: ignore[assignment]
    Closed()
    gc.collect()
    assert seen == [False, True]
    assert not is_collecting()
