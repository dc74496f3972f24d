"""A process that forks while its limiter is in use: both sides go on, each with its own books."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
]

PRELUDE = """
import asyncio, faulthandler, multiprocessing, os, signal, sys, threading, warnings
from membound_async import MemoryLimiter, allocator

warnings.simplefilter("ignore")  # of a fork beside threads, as is wanted here
faulthandler.register(signal.SIGALRM, chain=True)
MIB = 2**20

def forked(work):
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # one that hangs says where, and dies
        try:
            work()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "the child has failed"
"""

IN_USE = """
if allocator.available:
    allocator.install()

async def main():
    async with MemoryLimiter("256MiB", share=1) as limiter, limiter.component("work") as work:
        kept = await work.grant("10MiB")
        dropped = work.grant_nowait("1MiB")
        everything = work.grant_nowait(MIB, up_to="256MiB")

        async def wait():
            async with work.grant("5MiB"):
                pass

        waiter = asyncio.create_task(wait())
        while not limiter.statistics().waiting:
            await asyncio.sleep(0)
        before = limiter.statistics()

        def in_child():
            signal.alarm(20)
            # What was granted is still charged here, and can be given back here.
            # Who waited does so in the parent.
            assert limiter.statistics().granted_bytes == before.granted_bytes
            assert limiter.statistics().waiting == 0
            everything.release()
            kept.release()

            async def of_its_own():
                async with work.grant("20MiB", timeout=10):
                    async with MemoryLimiter("200MiB") as inner, inner.grant("1MiB"):
                        await asyncio.sleep(0.01)

            asyncio.run(of_its_own())
            with work.grant("20MiB", timeout=10):
                pass

        forked(in_child)
        process = multiprocessing.get_context("fork").Process(target=in_child)
        process.start()
        await asyncio.to_thread(process.join)
        assert process.exitcode == 0

        # Here nothing was given back, and nobody has come in.
        after = limiter.statistics()
        assert after.granted_bytes == before.granted_bytes, after
        assert (after.grants, after.waiting) == (3, 1)
        everything.release()
        await waiter
        kept.release()
        dropped.release()
        assert limiter.statistics().granted_bytes == 0
        async with work.grant("100MiB"):
            pass

asyncio.run(main())
"""

ON_TRIO = """
import trio  # whose clock does not go on in the child

async def main():
    limiter = MemoryLimiter("256MiB", share=1)
    everything = limiter.grant_nowait(1, up_to="256MiB")

    async def wait():
        async with limiter.grant("5MiB"):
            pass

    def in_child():
        assert limiter.statistics().waiting == 0
        everything.release()
        limiter.grant_nowait("20MiB").release()
        waited = [one.total_wait_seconds for one in limiter.statistics().components]
        assert all(0 <= seconds < 20 for seconds in waited), waited

    async with trio.open_nursery() as tasks:
        tasks.start_soon(wait)
        while not limiter.statistics().waiting:
            await trio.lowlevel.checkpoint()
        forked(in_child)
        assert limiter.statistics().waiting == 1
        everything.release()

trio.run(main)
"""

BESIDE_THREADS = """
limiter = MemoryLimiter("256MiB")
stop = threading.Event()

def beside():
    while not stop.is_set():
        with limiter.grant(1000):
            limiter.statistics()

def in_child():
    for _ in range(10):
        with limiter.grant(1000, timeout=10):
            limiter.statistics()

threads = [threading.Thread(target=beside, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(50):
    forked(in_child)
stop.set()
for thread in threads:
    thread.join()
assert limiter.statistics().granted_bytes == 0
"""

ON_THEIR_WAY = """
from membound_async import LimiterSettings
from membound_async.testing import ScriptedProbe, limiter

async def main():
    probe = ScriptedProbe(0)
    limited = limiter("100MiB", probe=probe, share=1, settings=LimiterSettings())

    async def use(nbytes):
        async with limited.grant(nbytes):
            pass

    def in_child():
        assert limited.statistics().granted_bytes == 0
        probe.set(0)
        limited.grant_nowait("100MiB").release()

    everything = limited.grant_nowait("100MiB")
    admitted = asyncio.create_task(use("50MiB"))
    while not limited.statistics().waiting:
        await asyncio.sleep(0)
    everything.release()
    assert limited.statistics().granted_bytes == 50 * MIB  # its task has not run since
    forked(in_child)
    await admitted

    probe.set(97 * MIB)
    held_back = asyncio.create_task(use("2MiB"))
    while not limited.statistics().granted_bytes:
        await asyncio.sleep(0)
    forked(in_child)
    await held_back

    children = []

    def fork_once(event):
        if event.name.endswith("delayed") and not children:
            children.append(os.fork())

    def fork_in_hook():
        with limited.add_hook(fork_once), limited.grant("1MiB"):
            assert limited.statistics().granted_bytes == MIB
        assert limited.statistics().granted_bytes == 0
        if children == [0]:
            os._exit(0)
        assert os.waitpid(children[0], 0)[1] == 0

    await asyncio.to_thread(fork_in_hook)

asyncio.run(main())
"""

ALONE = """
limiter = MemoryLimiter("256MiB")
whole = limiter.component("whole")
other = limiter.component("other")

def in_child():
    other.grant_nowait("1MiB").release()

with whole.grant(limiter.statistics().free_bytes * 3 // 4, oversize="alone"):
    forked(in_child)
"""

WHO_WAITED_IS_GARBAGE = """
import gc

async def main():
    limiter = MemoryLimiter("256MiB", share=1)
    everything = limiter.grant_nowait(1, up_to="256MiB")

    async def wait():
        async with limiter.grant("5MiB"):
            pass

    tasks = {asyncio.create_task(wait()) for _ in range(3)}
    while limiter.statistics().waiting < 3:
        await asyncio.sleep(0)

    def in_child():
        tasks.clear()  # nobody refers to them now
        with limiter._lock:
            gc.collect()
        limiter.statistics()

    forked(in_child)
    everything.release()
    await asyncio.gather(*tasks)

asyncio.run(main())
"""

IN_A_SIGNAL_HANDLER = """
limiter = MemoryLimiter("256MiB")
kept = limiter.grant_nowait("10MiB")

def in_child():
    assert limiter.statistics().granted_bytes == 10 * MIB
    limiter.grant_nowait("1MiB").release()

signal.signal(signal.SIGUSR1, lambda *_: forked(in_child))
with limiter._lock:  # in the midst of something
    os.kill(os.getpid(), signal.SIGUSR1)
kept.release()
"""

PROGRAMS = {
    "in_use": IN_USE,
    "on_trio": ON_TRIO,
    "beside_threads": BESIDE_THREADS,
    "on_their_way": ON_THEIR_WAY,
    "alone": ALONE,
    "garbage": WHO_WAITED_IS_GARBAGE,
    "signal_handler": IN_A_SIGNAL_HANDLER,
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_parent_and_child_both_go_on(program):
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + program],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr, done.stderr
