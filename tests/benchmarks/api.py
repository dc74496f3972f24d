"""What the status API costs a program under heavy load, with all who look at it.

A program takes and gives back 10 000 grants a second or more, in 200 components, and does some
work under each. Without the API, and with it while 10 clients read /memory/events and a scraper
asks for /metrics every second, by turns; the clients are a process of their own. A ratio is the
median of those of the rounds.

    python tests/benchmarks/api.py [--rounds 10] [--seconds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import AsyncIterator
from typing import Any

import uvicorn

from membound_async import Component, MemoryLimiter
from membound_async.api import MemoryAPI

COMPONENTS = 200
READERS = 10
WORKERS = 50
WORK = bytes(range(256)) * 16
"""What is compressed under a grant: about as long a step as makes 10 000 a second."""


async def work(components: list[Component], done: list[int]) -> None:
    turn = done[0]
    while True:
        async with components[turn % len(components)].grant(4096):
            zlib.compress(WORK, 1)
        turn += 1
        done[0] += 1
        await asyncio.sleep(0)


async def rate(components: list[Component], seconds: float) -> float:
    """Give how many grants there are in a second."""
    done = [0]
    workers = [asyncio.create_task(work(components, done)) for _ in range(WORKERS)]
    started, before = time.process_time(), time.perf_counter()
    await asyncio.sleep(seconds)
    grants, took = done[0], time.perf_counter() - before
    busy = (time.process_time() - started) / took
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    # Of the processor's time that it had, because other programs have some of it as well.
    return grants / took / busy


@contextlib.asynccontextmanager
async def watched(api: MemoryAPI) -> AsyncIterator[None]:
    """Serve the API, and have it watched by clients in another process."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(api, log_level="error", lifespan="off"))
    serving = asyncio.create_task(server.serve([listening]))
    clients = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--watch", str(listening.getsockname()[1]), stdout=subprocess.PIPE
    )
    assert clients.stdout is not None
    assert await clients.stdout.readline() == b"all read\n"
    try:
        yield
    finally:
        clients.terminate()
        await clients.wait()
        server.should_exit = True
        await serving


async def watch(port: int) -> None:
    """Read events, as 10 clients, and scrape, as one; say so when all do."""
    sockets = [await ask(port, "/memory/events") for _ in range(READERS)]
    for reader, _ in sockets:
        await reader.readuntil(b"data: ")
    print("all read", flush=True)
    await asyncio.gather(scrape(port), *(read(reader) for reader, _ in sockets))


async def ask(port: int, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
    return reader, writer


async def read(reader: asyncio.StreamReader) -> None:
    while await reader.read(65536):
        pass


async def scrape(port: int) -> None:
    while True:
        reader, writer = await ask(port, "/metrics")
        assert b" 200 OK" in await reader.readline()
        await read(reader)
        writer.close()
        await asyncio.sleep(1)


async def cost(limiter: MemoryLimiter, seconds: float) -> float:
    """Give the part of a processor that the API takes, of a program that does nothing else."""
    async with watched(MemoryAPI(limiter)):
        started, before = time.process_time(), time.perf_counter()
        await asyncio.sleep(seconds)
        return (time.process_time() - started) / (time.perf_counter() - before)


async def main(options: Any) -> None:
    ratios: list[float] = []
    rates: list[float] = []
    async with MemoryLimiter("8GiB") as limiter:
        components = [
            limiter.component(f"part{number}", firm_limit="1GiB") for number in range(COMPONENTS)
        ]
        await rate(components, 1.0)
        for turn in range(options.rounds):
            found = [0.0, 0.0]
            for watches in (turn % 2, 1 - turn % 2):  # so that neither is always the first
                api = watched(MemoryAPI(limiter)) if watches else contextlib.nullcontext()
                async with api:
                    found[watches] = await rate(components, options.seconds)
            ratios.append(found[1] / found[0])
            rates.append(found[0])
        alone = await cost(limiter, 2 * options.seconds)
    print(
        f"Python {sys.version.split()[0]}, {COMPONENTS} components, {READERS} readers of events, "
        f"a scraper each second, {options.rounds} rounds of {options.seconds:g} s\n"
        f"{statistics.median(rates):.0f} grants per second of processor time without the API; "
        f"with it {statistics.median(ratios):.3f} x as many "
        f"(from {min(ratios):.3f} to {max(ratios):.3f})\n"
        f"beside no load, the API takes {alone:.1%} of a processor"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--watch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.watch is None:
        asyncio.run(main(options))
    else:
        asyncio.run(watch(options.watch))
