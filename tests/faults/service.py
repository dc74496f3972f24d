"""A small service to which faults are done while it works.

    python tests/faults/service.py [--bare]

Workers take a grant, use as much memory, hold it for a moment and give it back. What is to
happen comes from standard input, a line for each command, as ``leak 40``: a method of
``Service`` and its number. Standard output has a sample as a line of JSON, several times a
second, until standard input ends. With ``--bare`` grants limit nothing.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass

import anyio
import anyio.lowlevel
import anyio.to_thread
from anyio.abc import TaskGroup

from membound_async import GrantTimeout, MemoryLimiter

MIB = 2**20
PIECE_BYTES = 6 * MIB
"""What a worker is granted and uses."""

HOLD_SECONDS = 0.05
SAMPLE_SECONDS = 0.1
STEP_SECONDS = 0.02
"""A leak, or a child, takes a MiB more that often."""

DESCRIPTORS = 64
"""How many files may be open when all descriptors are to be used."""

REMEMBERED_EACH = 1000
"""Of what fragments the heap, one object of so many stays; an arena takes some thousands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What the service and its limiter say of themselves at one moment."""

    limit_bytes: int
    effective_limit_bytes: int
    baseline_bytes: int
    measured_bytes: int
    drift_bytes: int
    free_bytes: int
    committed_bytes: int
    peak_granted_bytes: int
    grants: int
    waiting: int
    probe_failures: int
    #: work that was done, requests that have timed out, and commands that were carried out
    done: int
    timed_out: int
    commands: int

    @property
    def quota_bytes(self) -> int:
        """What all grants together may be."""
        return self.effective_limit_bytes - self.baseline_bytes - self.drift_bytes


def touched(nbytes: int) -> mmap.mmap:
    """Give memory that is in use, every page of it, and goes back to the system at its end."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, nbytes, mmap.PAGESIZE):
        memory[offset] = 1
    return memory


def grow(mib: int) -> Iterator[mmap.mmap]:
    """Use a MiB more every now and then."""
    for _ in range(mib):
        yield touched(MIB)
        time.sleep(STEP_SECONDS)


class Service:
    """The service, and what can be done to it."""

    def __init__(self, limiter: MemoryLimiter, tasks: TaskGroup) -> None:
        self.limiter = limiter
        self.tasks = tasks
        self.component = limiter.component("work")
        self.wanted_workers = self.workers = 0
        self.done = self.timed_out = self.commands = 0
        self.leaked: list[mmap.mmap] = []
        self.remembered: list[bytes] = []
        self.children: list[subprocess.Popen[bytes]] = []
        self.descriptors: list[int] = []
        self.spiking = False

    def sample(self) -> Sample:
        """Give what there is to know, with a reading of memory that is taken for it."""
        numbers = self.limiter.statistics()
        return Sample(
            limit_bytes=numbers.limit_bytes,
            effective_limit_bytes=numbers.effective_limit_bytes,
            baseline_bytes=numbers.baseline_bytes,
            measured_bytes=numbers.measured_bytes,
            drift_bytes=numbers.drift_bytes,
            free_bytes=numbers.free_bytes,
            committed_bytes=numbers.committed_bytes,
            peak_granted_bytes=self.component.statistics().peak_granted_bytes,
            grants=numbers.grants,
            waiting=numbers.waiting,
            probe_failures=numbers.probe_failures,
            done=self.done,
            timed_out=self.timed_out,
            commands=self.commands,
        )

    async def one(self, timeout: float | None = None) -> None:
        """Do one piece of work."""
        try:
            async with self.component.grant(PIECE_BYTES, timeout=timeout):
                memory = touched(PIECE_BYTES)
                await anyio.sleep(HOLD_SECONDS)
                memory.close()
                self.done += 1
        except GrantTimeout:
            self.timed_out += 1

    # --- what can be done to it; in the event loop

    async def work(self, workers: int) -> None:
        """Have so many workers from now on; 0 for none, and wait until all have ended."""
        self.wanted_workers = workers
        while self.workers > workers:
            await anyio.sleep(HOLD_SECONDS)

        async def go_on() -> None:
            while self.workers <= self.wanted_workers:
                await self.one()
            self.workers -= 1

        while self.workers < workers:
            self.workers += 1
            self.tasks.start_soon(go_on)

    async def burst(self, requests: int) -> None:
        """Make so many requests at once, and wait until all of them are done."""
        async with anyio.create_task_group() as tasks:
            for _ in range(requests):
                tasks.start_soon(self.one)

    async def leak(self, mib: int) -> None:
        """Use so much that nobody was granted, and keep it; 0 frees it."""
        if mib:
            await anyio.to_thread.run_sync(lambda: self.leaked.extend(grow(mib)))
        else:
            self.leaked.clear()

    async def spike(self, mib: int) -> None:
        """Use so much for an instant, over and over, without asking; 0 ends it."""
        self.spiking = mib > 0

        def spike() -> None:
            while self.spiking:
                touched(mib * MIB).close()

        if mib:
            threading.Thread(target=spike, daemon=True).start()

    async def fragment(self, mib: int) -> None:
        """Make so much of small objects under a grant, and forget nearly all; 0 for the rest."""
        if not mib:
            self.remembered.clear()
            return
        async with self.component.grant(mib * MIB):
            made = [bytes(400) for _ in range(mib * MIB // 448)]
            self.remembered.extend(made[::REMEMBERED_EACH])

    async def freeze(self, seconds: int) -> None:
        """Block the loop while one holds all there is, others wait, and a thread uses 20 MiB."""
        everything = self.component.grant(MIB, up_to=self.limiter.limit.limit_bytes)
        async with anyio.create_task_group() as tasks, everything:
            for timeout in (1.0, 600.0, None) * 10:
                tasks.start_soon(self.one, timeout)
            while self.limiter.statistics().waiting < 30:
                await anyio.lowlevel.checkpoint()
            leak = threading.Thread(target=lambda: self.leaked.extend(grow(20)))
            leak.start()
            time.sleep(seconds)  # noqa: ASYNC251
            leak.join()
            await anyio.sleep(HOLD_SECONDS)

    async def child(self, mib: int) -> None:
        """Start a child process that uses so much; 0 ends it."""
        if mib:
            argv = [sys.executable, __file__, "--child", str(mib)]
            self.children.append(subprocess.Popen(argv, stdin=subprocess.PIPE))  # noqa: ASYNC220
        else:
            child = self.children.pop()
            await anyio.to_thread.run_sync(child.communicate)

    async def descriptors_used(self, closing: int) -> None:
        """Use all file descriptors; with 1, close first those of the kernel's files."""
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
        for name in os.listdir("/proc/self/fd") if closing else ():
            with suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}").startswith(("/proc/", "/sys/")):
                    os.close(int(name))
        with suppress(OSError):
            while True:
                self.descriptors.append(os.dup(0))

    async def descriptors_freed(self, _: int) -> None:
        """Give them back."""
        while self.descriptors:
            os.close(self.descriptors.pop())

    # --- its life

    async def obey(self) -> None:
        """Carry out what standard input says, one command after the other, to its end."""
        while line := await anyio.to_thread.run_sync(sys.stdin.readline):
            name, number = line.split()
            await getattr(self, name)(int(number))
            self.commands += 1

    async def report(self) -> None:
        """Write a sample every now and then."""
        while True:
            print(json.dumps(asdict(self.sample())), flush=True)
            await anyio.sleep(SAMPLE_SECONDS)


async def serve(limiter: MemoryLimiter) -> None:
    """Run the service until standard input ends."""
    async with limiter, anyio.create_task_group() as tasks:
        service = Service(limiter, tasks)
        tasks.start_soon(service.report)
        await service.obey()
        await service.work(0)
        tasks.cancel_scope.cancel()


def main() -> None:
    """Run the program."""
    if sys.argv[1:2] == ["--child"]:
        _held = list(grow(int(sys.argv[2])))
        sys.stdin.read()
    else:
        bare = sys.argv[1:] == ["--bare"]
        anyio.run(serve, MemoryLimiter.noop() if bare else MemoryLimiter(share=1))


if __name__ == "__main__":
    main()
