"""What `send` and `receive` of 1 KiB through an inbox cost, beside anyio's memory object stream.

With 1, 100 and 10 000 senders in turn, each of which finds room, and with 10 000 senders most of
whom wait. Rounds of all candidates are interleaved, and a ratio is the median of the ratios
within the rounds.

    python tests/benchmarks/inbox.py [--rounds 20] [--messages 10000]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable

import anyio

from membound_async import Inbox, MemoryLimiter, create_memory_stream, fastpath
from membound_async.testing import ScriptedProbe

MESSAGE = bytes(1024)
IN_FLIGHT = 100
"""How many messages are under way where senders wait."""

Candidate = Callable[[int], Awaitable[float]]


def an_inbox(limiter: MemoryLimiter) -> Inbox[bytes]:
    return Inbox[bytes](limiter.component("bench"))


async def one_by_one(messages: int) -> float:
    sending, receiving = anyio.create_memory_object_stream[bytes](IN_FLIGHT)
    with sending, receiving:
        started = time.perf_counter()
        for _ in range(messages):
            await sending.send(MESSAGE)
            await receiving.receive()
        return time.perf_counter() - started


def through_inbox(limiter: MemoryLimiter, senders: int) -> Candidate:
    names = [f"sender {number}" for number in range(senders)]

    async def run(messages: int) -> float:
        with an_inbox(limiter) as inbox:
            started = time.perf_counter()
            for number in range(messages):
                await inbox.send(MESSAGE, sender=names[number % senders])
                (await inbox.receive()).release()
            return time.perf_counter() - started

    return run


def through_memory_stream(limiter: MemoryLimiter) -> Candidate:
    async def run(messages: int) -> float:
        sending, receiving = create_memory_stream[bytes](component=limiter.component("bench"))
        with sending, receiving:
            started = time.perf_counter()
            for _ in range(messages):
                await sending.send(MESSAGE)
                await receiving.receive()
            return time.perf_counter() - started

    return run


async def with_waiters(messages: int) -> float:
    """As many tasks send one message each as there are messages; there is room for some."""
    sending, receiving = anyio.create_memory_object_stream[bytes](IN_FLIGHT)
    with sending, receiving:
        started = time.perf_counter()
        tasks = [asyncio.create_task(sending.send(MESSAGE)) for _ in range(messages)]
        for _ in range(messages):
            await receiving.receive()
        await asyncio.gather(*tasks)
        return time.perf_counter() - started


async def with_waiters_at_inbox(messages: int) -> float:
    # Alone in the limiter, the inbox may have half of it.
    limit = 2 * IN_FLIGHT * len(MESSAGE)
    limiter = MemoryLimiter(limit, slop_factor=0, baseline=0, probe=ScriptedProbe(0))
    with an_inbox(limiter) as inbox:
        started = time.perf_counter()
        tasks = [
            asyncio.create_task(inbox.send(MESSAGE, sender=number)) for number in range(messages)
        ]
        for _ in range(messages):
            (await inbox.receive()).release()
        await asyncio.gather(*tasks)
        return time.perf_counter() - started


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--messages", type=int, default=10_000)
    options = parser.parse_args()
    async with MemoryLimiter("8GiB") as limiter:
        candidates: dict[str, tuple[str, Candidate]] = {
            "memory object stream": ("memory object stream", one_by_one),
            "create_memory_stream": ("memory object stream", through_memory_stream(limiter)),
        }
        for senders in (1, 100, 10_000):
            name = f"inbox, {senders} sender{'s' * (senders > 1)}"
            candidates[name] = ("memory object stream", through_inbox(limiter, senders))
        waiting = f"{options.messages} at once"
        candidates[f"stream, {waiting}"] = (f"stream, {waiting}", with_waiters)
        candidates[f"inbox, {waiting}"] = (f"stream, {waiting}", with_waiters_at_inbox)
        rounds: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(options.rounds):
            for name, (_, run) in candidates.items():
                rounds[name].append(await run(options.messages) / options.messages)
    path = "the extension" if fastpath.EXTENSION else "pure Python"
    print(f"Python {sys.version.split()[0]}, asyncio, {path}, {options.rounds} rounds")
    for name, seconds in rounds.items():
        peer = candidates[name][0]
        ratio = statistics.median(a / b for a, b in zip(seconds, rounds[peer], strict=True))
        print(f"{name:24} {statistics.median(seconds) * 1e6:7.2f} us {ratio:6.2f} x {peer}")


asyncio.run(main())
