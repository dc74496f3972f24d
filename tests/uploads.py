"""Uploads to examples/upload_service.py: the service as a process, and clients that load it.

A client stops sending when it is answered, as curl does. Those of `in_turn` come again when they
were answered. Those of `at_rate` come whether earlier ones were answered or not (Poisson), which
is what an overload is: clients that wait let a service off as soon as it is slow.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SERVICE = [sys.executable, str(Path(__file__).parents[1] / "examples" / "upload_service.py")]
PIECE_BYTES = 256 * 1024
PATIENCE_SECONDS = 120.0
"""How long a client waits for its answer."""


def document(rows: int) -> bytes:
    """Give JSON of some 36 bytes a row, which takes nine times as much memory when decoded."""
    return json.dumps([{"n": n, "text": f"x{n}"} for n in range(rows)]).encode()


# --- the service


class Service(NamedTuple):
    """A service that runs."""

    process: subprocess.Popen[str]
    port: int


@contextlib.contextmanager
def serving(
    *options: str,
    inside: Callable[[Sequence[str]], Sequence[str]] = lambda command: command,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Service]:
    """Run the service, on a port that is free; it is killed at the end, if it still runs.

    Args:
        options: its command line.
        inside: makes of its command one that runs it somewhere, such as in a cgroup.
        environment: its environment variables; None for those of this process.
    """
    command = inside([*SERVICE, "--port=0", *options])
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            said = ""
            while (port := re.search(r"running on http://\S+:(\d+)", said)) is None:
                line = process.stderr.readline()
                assert line, said
                said += line
            yield Service(process, int(port[1]))
        finally:
            process.kill()


# --- one client


class Answer(NamedTuple):
    """What a client got."""

    status: int
    """0 if the connection was lost without an answer."""
    headers: Mapping[str, str]
    body: bytes
    began: float
    ended: float


LOST: tuple[int, dict[str, str], bytes] = (0, {}, b"")


async def ask(port: int, path: str, body: bytes = b"", *, chunked: bool = False) -> Answer:
    """Send a request on a connection of its own; the answer may come before all is sent."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            status, headers, answer = await _exchange(port, path, body, chunked)
    except (OSError, asyncio.IncompleteReadError, TimeoutError):
        status, headers, answer = LOST
    return Answer(status, headers, answer, began, time.monotonic())


async def _exchange(
    port: int, path: str, body: bytes, chunked: bool
) -> tuple[int, dict[str, str], bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    sender = asyncio.create_task(_send(writer, path, body, chunked))
    try:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        answer = await reader.readexactly(int(headers["content-length"]))
        return int(first.split()[1]), headers, answer
    finally:
        sender.cancel()
        await asyncio.wait([sender])
        writer.transport.abort()


async def _send(writer: asyncio.StreamWriter, path: str, body: bytes, chunked: bool) -> None:
    how = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    method = "POST" if body else "GET"
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: here\r\n{how}\r\n\r\n".encode())
    with contextlib.suppress(OSError):  # it was answered, and the connection closed
        for start in range(0, len(body), PIECE_BYTES):
            piece = body[start : start + PIECE_BYTES]
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            await writer.drain()
        if chunked:
            writer.write(b"0\r\n\r\n")


async def status(port: int) -> Any:
    """Give what the service's limiter says of itself."""
    return json.loads((await ask(port, "/ops/memory/status")).body)["limiter"]


# --- many clients


async def in_turn(port: int, body: bytes, clients: int, seconds: float) -> list[Answer]:
    """Have so many clients upload, each again and again until the time is over."""
    end = time.monotonic() + seconds
    answers: list[Answer] = []

    async def client() -> None:
        while time.monotonic() < end:
            answers.append(await ask(port, "/count", body))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(client())
    return answers


async def at_rate(port: int, body: bytes, per_second: float, seconds: float) -> list[Answer]:
    """Have clients come at a rate, by chance, and upload once; give what all of them got."""
    chance = random.Random(1)
    due = time.monotonic()
    end = due + seconds
    async with asyncio.TaskGroup() as tasks:
        uploads: list[asyncio.Task[Answer]] = []
        while (due := due + chance.expovariate(per_second)) < end:
            await asyncio.sleep(due - time.monotonic())
            uploads.append(tasks.create_task(ask(port, "/count", body)))
    return [upload.result() for upload in uploads]
