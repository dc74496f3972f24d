"""What an uncontended grant costs, beside asyncio.Semaphore and anyio.CapacityLimiter.

Rounds of all candidates are interleaved, and a ratio is the median of the ratios within the
rounds, so that a noisy machine spoils single rounds and not the result.

    python tests/benchmarks/uncontended.py [--rounds 30] [--loops 20000]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable

import anyio

from membound_async import MemoryLimiter, fastpath, grant

Candidate = Callable[[int], Awaitable[None]]


def candidates(limiter: MemoryLimiter) -> dict[str, Candidate]:
    component = limiter.component("bench")
    semaphore = asyncio.Semaphore(10)
    capacity = anyio.CapacityLimiter(10)

    async def use_semaphore(loops: int) -> None:
        for _ in range(loops):
            async with semaphore:
                pass

    async def use_capacity(loops: int) -> None:
        for _ in range(loops // 10):
            async with capacity:
                pass

    async def use_component(loops: int) -> None:
        for _ in range(loops):
            async with component.grant(65536):
                pass

    async def use_function(loops: int) -> None:
        for _ in range(loops):
            async with grant(65536):
                pass

    return {
        "asyncio.Semaphore": use_semaphore,
        "anyio.CapacityLimiter": use_capacity,
        "component.grant(n)": use_component,
        "grant(n)": use_function,
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--loops", type=int, default=20_000)
    options = parser.parse_args()
    async with MemoryLimiter("8GiB") as limiter, limiter.component("bench"):
        rounds: dict[str, list[float]] = {}
        contestants = candidates(limiter)
        for _ in range(options.rounds):
            for name, run in contestants.items():
                started = time.perf_counter()
                await run(options.loops)
                took = time.perf_counter() - started
                done = options.loops // 10 if "Capacity" in name else options.loops
                rounds.setdefault(name, []).append(took / done)
    path = "the extension" if fastpath.EXTENSION else "pure Python"
    print(f"Python {sys.version.split()[0]}, asyncio, {path}, {options.rounds} rounds")
    for name, seconds in rounds.items():
        ratios = [
            statistics.median(a / b for a, b in zip(seconds, rounds[peer], strict=True))
            for peer in ("asyncio.Semaphore", "anyio.CapacityLimiter")
        ]
        print(
            f"{name:24} {statistics.median(seconds) * 1e9:7.0f} ns"
            f"   {ratios[0]:5.2f} x Semaphore   {ratios[1]:5.3f} x CapacityLimiter"
        )


asyncio.run(main())
