"""Many waiters: the time to serve them and the memory they take, beside asyncio.Semaphore.

So many tasks wait at once, over 1, 100 and 10 000 components; then all are served. The time
is from the first task's start to the last one's end; a ratio is the median of the ratios
within the rounds. With a tenth of the waiters, the same ratio says whether the cost grows
with their number.

    python tests/benchmarks/waiters.py [--waiters 100000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import subprocess
import sys
import time
import tracemalloc

from membound_async import MemoryGrant, MemoryLimiter, fastpath
from membound_async.testing import ScriptedProbe

PARALLEL = 100
"""How many hold something at a time."""


async def with_semaphore(waiters: int) -> float:
    semaphore = asyncio.Semaphore(PARALLEL)

    async def use() -> None:
        async with semaphore:
            await asyncio.sleep(0)

    started = time.perf_counter()
    await asyncio.gather(*[use() for _ in range(waiters)])
    return time.perf_counter() - started


async def with_limiter(waiters: int, components: int) -> float:
    # The pool allows as many grants at a time as the semaphore: s + c <= R + s.
    limiter = MemoryLimiter(
        PARALLEL * 1000, slop_factor=0, baseline=0, probe=ScriptedProbe(0), share=1
    )
    parts = [limiter.component(f"c{number}") for number in range(components)]

    async def use(number: int) -> None:
        async with parts[number % components].grant(1000):
            await asyncio.sleep(0)

    started = time.perf_counter()
    await asyncio.gather(*[use(number) for number in range(waiters)])
    return time.perf_counter() - started


async def measure(waiters: int, components: int) -> int:
    """Give the bytes of so many tasks that wait; for 0 components, on a bare future each."""
    loop = asyncio.get_running_loop()
    tracemalloc.start()

    async def idle() -> None:
        await loop.create_future()

    async def wait(number: int) -> None:
        async with parts[number % components].grant(1000):
            pass

    blocker: MemoryGrant | None = None
    if components:
        limiter = MemoryLimiter(10**9, slop_factor=0, baseline=0, probe=ScriptedProbe(0), share=1)
        blocker = await limiter.component("blocker").grant(10**9)
        parts = [limiter.component(f"c{number}") for number in range(components)]
        tasks = [asyncio.create_task(wait(number)) for number in range(waiters)]
    else:
        tasks = [asyncio.create_task(idle()) for _ in range(waiters)]
    for _ in range(3):
        await asyncio.sleep(0)
    gc.collect()
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if blocker is not None:
        blocker.release()
    return size


def memory(waiters: int, components: int) -> int:
    """The same in a process of its own, so that nothing is left from before."""
    command = [sys.executable, __file__, f"--waiters={waiters}", f"--measure={components}"]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--waiters", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(await measure(options.waiters, options.measure))
        return
    path = "the extension" if fastpath.EXTENSION else "pure Python"
    print(f"Python {sys.version.split()[0]}, asyncio, {path}, {options.rounds} rounds")
    for waiters in (options.waiters // 10, options.waiters):
        for components in (1, 100, 10_000):
            seconds, ratios = [], []
            for _ in range(options.rounds):
                peer = await with_semaphore(waiters)
                seconds.append(await with_limiter(waiters, components))
                ratios.append(seconds[-1] / peer)
            print(
                f"{waiters:7} waiters over {components:6} components: "
                f"{statistics.median(seconds) / waiters * 1e6:6.1f} us each, "
                f"{statistics.median(ratios):5.2f} x asyncio.Semaphore"
            )
    tasks_alone = memory(options.waiters, 0)
    for components in (1, 10_000):
        beside = memory(options.waiters, components) - tasks_alone
        print(
            f"{options.waiters:7} waiters over {components:6} components: "
            f"{beside / 1e6:5.1f} MB beside the tasks, "
            f"{beside / options.waiters:4.0f} bytes a waiter"
        )


asyncio.run(main())
