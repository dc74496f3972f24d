"""Send open files to another process, and never have more of them in flight than it may have.

    python send_descriptors.py
    python send_descriptors.py --files 2000 --at-most 16

Several tasks open files and send the descriptors over a Unix socket (``SCM_RIGHTS``) to a process
that takes its time with each. What was sent and is not read yet is an open file, and a
process may have only so many. So each is charged to its receiver before it is opened, as one
of ``fds``, on behalf of the task that sends it; and given back when the other process says that
it is done with it. Linux only: what is open is counted in ``/proc/self/fd``.

Exits with 0 if all files arrived, none is left open, and no more were ever in flight.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
import tempfile
import zlib
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import anyio
import anyio.abc

from membound_async import Inbox, MemoryLimiter, Received, ResourceLimits

SENDERS = 4
WORK_SECONDS = 0.002


class Outcome(NamedTuple):
    """What one process has to say."""

    files: int
    checksum: int
    peak_open: int
    """The most files that were open at one time."""
    left_open: int


class OpenFiles:
    """Counts what is open in this process beyond what was open at first."""

    def __init__(self) -> None:
        self.at_first = len(os.listdir("/proc/self/fd"))
        self.peak = 0

    def count(self) -> int:
        """Look now."""
        now = len(os.listdir("/proc/self/fd")) - self.at_first
        self.peak = max(self.peak, now)
        return now


# --- the sending process


class Sending:
    """Files that are on their way to the other process."""

    def __init__(
        self, limiter: MemoryLimiter, stream: anyio.abc.UNIXSocketStream, most: int
    ) -> None:
        self.stream = stream
        self.receiver = limiter.component("receiver", limits=ResourceLimits(fds=most))
        # By default, descriptors are given back when they come out of the inbox. These are open
        # until the other process has had them, so they stay charged until they are released.
        self.inbox = Inbox[int](self.receiver, in_flight_only=())
        self.unanswered: deque[Received[int]] = deque()
        self.open_files = OpenFiles()

    async def send_files(self, sender: str, paths: Sequence[Path]) -> int:
        """Send files, one after the other; give their checksum."""
        checksum = 0
        for path in paths:
            # Waits until there may be one more: before it is opened.
            grant = await self.receiver.grant(0, sender=sender, also={"fds": 1})
            checksum ^= zlib.crc32(path.read_bytes())
            await self.inbox.send(os.open(path, os.O_RDONLY), grant=grant)
            self.open_files.count()
        return checksum

    async def pass_on(self) -> None:
        """Give what is in the inbox to the socket."""
        async for received in self.inbox:
            self.unanswered.append(received)
            await self.stream.send_fds(b"f", [received.message])

    async def hear(self, files: int) -> None:
        """Close each file when the other process is done with it."""
        while files:
            for _ in await self.stream.receive():
                with self.unanswered.popleft() as received:
                    os.close(received.message)
                files -= 1


async def send(paths: Sequence[Path], most: int) -> tuple[Outcome, Outcome]:
    """Send files to a process that is started for it; give what both have to say."""
    ours, theirs = socket.socketpair()
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        f"--receive={theirs.fileno()}",
        pass_fds=[theirs.fileno()],
        stdout=asyncio.subprocess.PIPE,
    )
    theirs.close()
    async with await anyio.abc.UNIXSocketStream.from_socket(ours) as stream:
        sending = Sending(MemoryLimiter("256MiB"), stream, most)
        async with asyncio.TaskGroup() as tasks:
            passing_on = tasks.create_task(sending.pass_on())
            hearing = tasks.create_task(sending.hear(len(paths)))
            shares = [
                tasks.create_task(sending.send_files(f"sender {first}", paths[first::SENDERS]))
                for first in range(SENDERS)
            ]
            await hearing
            passing_on.cancel()
        sending.inbox.close()
        left_open = sending.open_files.count()
    output, _ = await child.communicate()
    checksum = 0
    for share in shares:
        checksum ^= share.result()
    sent = Outcome(len(paths), checksum, sending.open_files.peak, left_open)
    return sent, Outcome(*json.loads(output))


# --- the receiving process


async def receive(descriptor: int) -> Outcome:
    """Read files from a socket until it ends, slowly."""
    files = checksum = 0
    open_socket = socket.socket(fileno=descriptor)
    async with await anyio.abc.UNIXSocketStream.from_socket(open_socket) as stream:
        open_files = OpenFiles()
        while True:
            try:
                _, (received,) = await stream.receive_fds(1, 1)
            except (anyio.EndOfStream, ValueError):
                break
            open_files.count()
            with os.fdopen(received, "rb") as file:
                checksum ^= zlib.crc32(file.read())
            files += 1
            await anyio.sleep(WORK_SECONDS)
            await stream.send(b"d")
        return Outcome(files, checksum, open_files.peak, open_files.count())


# --- the outcome


def verdict(sent: Outcome, received: Outcome, most: int) -> int:
    """Say what that means; give the exit status."""
    print(f"{sent.files} files of {SENDERS} senders, at most {most} in flight\n")
    for name, outcome in (("sender", sent), ("receiver", received)):
        print(
            f"{name:9} {outcome.files} files, at most {outcome.peak_open} open at a time, "
            f"{outcome.left_open} left open"
        )
    arrived = received[:2] == sent[:2]
    closed = sent.left_open == received.left_open == 0
    bounded = sent.peak_open <= most
    print("\n" + ("All arrived as they were sent." if arrived else "Not all arrived!"))
    return 0 if arrived and closed and bounded else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Send files, or receive them; give the exit status."""
    parser = argparse.ArgumentParser(
        prog="send_descriptors.py", description=str(__doc__).partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--files", type=int, default=500, help="how many to send; default: 500")
    parser.add_argument("--at-most", type=int, default=32, help="in flight; default: 32")
    parser.add_argument("--receive", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.receive is not None:
        print(json.dumps(asyncio.run(receive(arguments.receive))))
        return 0
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory, f"{number}.txt") for number in range(arguments.files)]
        for number, path in enumerate(paths):
            path.write_text(f"letter {number}\n" * number)
        sent, received = asyncio.run(send(paths, arguments.at_most))
    return verdict(sent, received, arguments.at_most)


if __name__ == "__main__":
    sys.exit(main())
