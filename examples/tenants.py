"""One endpoint, many tenants, and one of them hostile: without quotas, and with them.

    python tenants.py
    python tenants.py --seconds 10 --tenants 20

A tenant sends documents over TCP, as many as it can, and gets each back compressed. The endpoint
needs 4 milliseconds for one. The hostile tenant has several connections, and never reads an
answer. The endpoint is a process of its own on this machine, and runs three times:

- bare, without the hostile tenant: what there is to be had;
- bare: a queue with so many places, and a worker that writes the answers. It waits for the
  hostile tenant to read. If it did not wait, answers would fill the memory;
- with quotas: an inbox with as many bytes, which the tenants divide, and one for the answers
  to each tenant. Whose answers find no room there, because it does not read, is disconnected.

Exits with 0 if the others keep their throughput with quotas, and lose it without.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import anyio
import psutil

from membound_async import GrantTooLarge, Inbox, MemoryLimiter, QuotaExceeded
from membound_async.sizes import human_size

DOCUMENT_BYTES = 16 * 1024
PLACES = 64
"""How many documents may wait to be worked off."""
ANSWERS_BYTES = 256 * 1024
"""How much of answers one tenant may have, those to all its connections together."""
WORK_SECONDS = 0.004
HOSTILE = "hostile"
HOSTILE_CONNECTIONS = 8


# --- the endpoint


class Connection:
    """One connection of a tenant: messages are their length in 4 bytes, and themselves."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.tenant = ""
        writer.transport.set_write_buffer_limits(high=0)  # the system's buffers are enough

    async def read_length(self) -> int:
        """Wait for the length of the next message."""
        return int.from_bytes(await self.reader.readexactly(4), "big")

    async def write(self, answer: bytes) -> None:
        """Send an answer, and wait until the system has taken all of it."""
        self.writer.write(len(answer).to_bytes(4, "big") + answer)
        await self.writer.drain()


class Compressor:
    """Takes its time for each document, and makes up for it if it was called late."""

    def __init__(self) -> None:
        self.free_at = 0.0

    async def work(self, document: bytes) -> bytes:
        """Give a document compressed."""
        now = asyncio.get_running_loop().time()
        self.free_at = max(self.free_at, now - 10 * WORK_SECONDS) + WORK_SECONDS
        await asyncio.sleep(self.free_at - now)
        return zlib.compress(document, 1)


class Endpoint(Protocol):
    """What takes documents in, and works them off."""

    worked_off: Counter[str]
    """How many documents of each tenant."""

    @property
    def in_flight_bytes(self) -> int:
        """How much was read, or is about to be, and not answered yet."""
        ...

    async def take_in(self, connection: Connection) -> None:
        """Read the documents of one connection, until it ends."""
        ...

    async def work_off(self) -> None:
        """Work off what was taken in, for ever."""
        ...


class Bare:
    """A bounded queue and a worker, as one writes it first."""

    def __init__(self) -> None:
        self.documents = asyncio.Queue[tuple[Connection, bytes]](PLACES)
        self.in_flight_bytes = 0
        self.compressor = Compressor()
        self.worked_off: Counter[str] = Counter()

    async def take_in(self, connection: Connection) -> None:
        """Read the documents of one connection, until it ends."""
        while True:
            document = await connection.reader.readexactly(await connection.read_length())
            self.in_flight_bytes += len(document)
            await self.documents.put((connection, document))

    async def work_off(self) -> None:
        """Work off what was taken in, for ever."""
        while True:
            connection, document = await self.documents.get()
            answer = await self.compressor.work(document)
            self.worked_off[connection.tenant] += 1
            with contextlib.suppress(ConnectionError):
                await connection.write(answer)
            self.in_flight_bytes -= len(document)


class Bounded:
    """The same with quotas: tenants divide the way in, and each has a way out of its own."""

    def __init__(self, limiter: MemoryLimiter) -> None:
        self.limiter = limiter
        self.ingest = limiter.component("ingest", firm_limit=PLACES * DOCUMENT_BYTES)
        self.documents = Inbox[tuple[Connection, Inbox[bytes], bytes]](self.ingest)
        self.compressor = Compressor()
        self.worked_off: Counter[str] = Counter()

    @property
    def in_flight_bytes(self) -> int:
        """How much was read, or is about to be, and not answered yet."""
        return self.limiter.statistics().committed_bytes

    async def take_in(self, connection: Connection) -> None:
        """Read the documents of one connection, until it ends."""
        # A real endpoint has the name from whoever has authenticated the tenant.
        tenant = self.limiter.component(f"answers.{connection.tenant}", firm_limit=ANSWERS_BYTES)
        with Inbox[bytes](tenant) as answers:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.write_answers(connection, answers))
                while True:
                    nbytes = await connection.read_length()
                    # The tenant waits until it may have that much more here; it is read then.
                    grant = await self.ingest.grant(nbytes, sender=connection.tenant)
                    try:
                        document = await connection.reader.readexactly(nbytes)
                        await self.documents.send((connection, answers, document), grant=grant)
                    except BaseException:
                        grant.release()
                        raise

    async def work_off(self) -> None:
        """Work off what was taken in, for ever."""
        async for received in self.documents:
            with received:
                connection, answers, document = received.message
                answer = await self.compressor.work(document)
                self.worked_off[connection.tenant] += 1
                try:
                    answers.send_nowait(answer, sender="endpoint")
                except QuotaExceeded:  # it does not read its answers, which is its own affair
                    connection.writer.transport.abort()
                except anyio.BrokenResourceError:  # it has gone
                    pass

    async def write_answers(self, connection: Connection, answers: Inbox[bytes]) -> None:
        """Send the answers to one connection, as fast as it reads them."""
        async for received in answers:
            with received:
                await connection.write(received.message)


class Usage(NamedTuple):
    """What the endpoint's process has needed at the most."""

    peak_memory_bytes: int
    peak_in_flight_bytes: int
    hostile: int
    """How many of the hostile tenant's documents were worked off."""


async def serve(endpoint: Endpoint) -> Usage:
    """Serve until standard input ends; says first on which port."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer)
        try:
            connection.tenant = (await reader.readline()).decode().strip()
            await endpoint.take_in(connection)
        except* (OSError, asyncio.IncompleteReadError, asyncio.CancelledError, GrantTooLarge):
            writer.close()

    listening = socket.create_server(("127.0.0.1", 0))
    # What the system buffers for a connection is memory too, and no quota of ours.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * DOCUMENT_BYTES)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * DOCUMENT_BYTES)
    memory_bytes = in_flight_bytes = 0
    server = await asyncio.start_server(talk, sock=listening)
    working = asyncio.create_task(endpoint.work_off())
    print(listening.getsockname()[1], flush=True)
    ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    while not ended.done():
        memory_bytes = max(memory_bytes, psutil.Process().memory_info().rss)
        in_flight_bytes = max(in_flight_bytes, endpoint.in_flight_bytes)
        await asyncio.wait((ended, working), timeout=0.02)
    working.cancel()
    server.close()
    return Usage(memory_bytes, in_flight_bytes, endpoint.worked_off[HOSTILE])


# --- the tenants


class Clients:
    """All tenants, in one process.

    Attributes:
        answers: how many answers each well-behaved tenant has had.
        disconnected: how often it was thrown out.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.answers: Counter[int] = Counter()
        self.disconnected = 0

    async def connect(
        self, tenant: str, receive_buffer_bytes: int
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect, and say who it is."""
        connecting = socket.socket()
        connecting.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        connecting.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connecting, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=connecting)
        writer.write(f"{tenant}\n".encode())
        return reader, writer

    async def behave(self, number: int) -> None:
        """Send documents and read the answers, both as fast as the endpoint allows."""
        reader, writer = await self.connect(f"tenant-{number}", 4 * DOCUMENT_BYTES)
        with contextlib.closing(writer):
            sending = asyncio.create_task(self.send(writer))
            try:
                while True:
                    await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
                    self.answers[number] += 1
            finally:
                sending.cancel()

    async def misbehave(self) -> None:
        """Send documents and read nothing; thrown out, come back."""
        while True:
            with contextlib.suppress(ConnectionError):
                _, writer = await self.connect(HOSTILE, DOCUMENT_BYTES)
                with contextlib.closing(writer):
                    assert isinstance(writer.transport, asyncio.Transport)
                    writer.transport.pause_reading()
                    await self.send(writer)
            self.disconnected += 1

    async def send(self, writer: asyncio.StreamWriter) -> None:
        """Send the same document for ever."""
        message = DOCUMENT_BYTES.to_bytes(4, "big") + os.urandom(DOCUMENT_BYTES)
        while True:
            writer.write(message)
            await writer.drain()


# --- a run


class Run(NamedTuple):
    """What came of it."""

    answers_per_second: list[float]
    """Of each well-behaved tenant."""
    usage: Usage
    hostile_disconnected: int

    @property
    def throughput(self) -> float:
        """Answers a second to all well-behaved tenants."""
        return sum(self.answers_per_second)

    @property
    def jain_index(self) -> float:
        """1 if all well-behaved tenants get the same, 1/n if one of n gets everything."""
        squares = sum(each * each for each in self.answers_per_second)
        return self.throughput**2 / (len(self.answers_per_second) * squares) if squares else 0.0


async def run(how: str, tenants: int, seconds: float, *, hostile: bool = True) -> Run:
    """Start an endpoint and its tenants, and stop them after so many seconds."""
    server = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        f"--serve={how}",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert server.stdout is not None
    clients = Clients(int(await server.stdout.readline()))
    jobs = [asyncio.create_task(clients.behave(number)) for number in range(tenants)]
    if hostile:
        jobs += [asyncio.create_task(clients.misbehave()) for _ in range(HOSTILE_CONNECTIONS)]
    await asyncio.sleep(seconds)
    for job in jobs:
        job.cancel()
    answers = [clients.answers[number] / seconds for number in range(tenants)]
    output, _ = await server.communicate(b"")  # an end of input, which None is not on Python 3.11
    await asyncio.gather(*jobs, return_exceptions=True)
    return Run(answers, Usage(*json.loads(output)), clients.disconnected)


def compare(runs: dict[str, Run]) -> list[str]:
    """Say side by side what became of them, as lines of text."""
    rows = {
        "": list(runs),
        "answers to the others": [f"{each.throughput:.0f}/s" for each in runs.values()],
        "the worst off of them": [
            f"{min(each.answers_per_second):.0f}/s" for each in runs.values()
        ],
        "Jain index": [f"{each.jain_index:.3f}" for each in runs.values()],
        "peak in flight": [human_size(each.usage.peak_in_flight_bytes) for each in runs.values()],
        "peak memory": [human_size(each.usage.peak_memory_bytes) for each in runs.values()],
        "hostile, worked off": [f"{each.usage.hostile}" for each in runs.values()],
        "hostile, thrown out": [f"{each.hostile_disconnected} times" for each in runs.values()],
    }
    return [
        f"{name:24}" + "".join(f"{cell:20}" for cell in cells).rstrip()
        for name, cells in rows.items()
    ]


def verdict(alone: Run, bare: Run, bounded: Run) -> int:
    """Say what that means; give the exit status."""
    lost = bare.throughput < 0.5 * alone.throughput
    kept = bounded.throughput > 0.7 * alone.throughput and bounded.jain_index > 0.9
    if lost and kept:
        print("\nThe others keep their throughput with quotas, and lose it without.")
    else:
        not_lost, not_kept = "" if lost else "not ", "" if kept else "not "
        print(f"\nNot shown: it was {not_lost}lost without quotas, and {not_kept}kept with them.")
    return 0 if lost and kept else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison, or an endpoint; give the exit status."""
    parser = argparse.ArgumentParser(
        prog="tenants.py", description=str(__doc__).partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--tenants", type=int, default=8, help="well-behaved ones; default: 8")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each run; default: 4")
    parser.add_argument("--serve", choices=("bare", "quotas"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve is not None:
        endpoint: Endpoint = (
            Bare() if arguments.serve == "bare" else Bounded(MemoryLimiter("256MiB"))
        )
        print(json.dumps(asyncio.run(serve(endpoint))))
        return 0

    def go(how: str, **options: bool) -> Run:
        return asyncio.run(run(how, arguments.tenants, arguments.seconds, **options))

    alone, bare, bounded = go("bare", hostile=False), go("bare"), go("quotas")
    print(f"{arguments.tenants} tenants and a hostile one, {arguments.seconds:g} s each:\n")
    print("\n".join(compare({"no hostile tenant": alone, "bare": bare, "with quotas": bounded})))
    return verdict(alone, bare, bounded)


if __name__ == "__main__":
    sys.exit(main())
