"""Drives the allocation tracker's hooks and a model through the same random operations.

    python -m tests.fuzz_allocator --operations 10000000 --seed 1

allocates, resizes and frees blocks in all of CPython's allocators, enters and leaves groups and
contexts, registers and unregisters groups, switches counting off and on, charges, and has
allocations fail; after each operation the counters of every group that was touched, the owner
and the size of the block and its content are what the model in tests/native/ says.

    python -m tests.fuzz_allocator --threads 120

has 8 threads free each other's blocks for that many seconds: in Python, in C with the GIL, in
the raw domain without it, and in both at a time. The counters at the end are those of the
threads themselves.
"""

from __future__ import annotations

import argparse
import gc
import sys
import threading
import time
from collections.abc import Callable
from random import Random
from types import ModuleType
from typing import Any

from membound_async import allocator
from membound_async.exceptions import TrackingError
from tests import native

__all__ = ["fuzz", "main", "stress", "stress_in_python"]

THREADS = 8
CHUNK = 100_000


def fuzz(operations: int, seed: int, groups: int, stage: bool = True) -> int:
    """Run the operations; give how many blocks are live in the end.

    Once in a process, and with nothing else in it. Where pymalloc is used, ``stage=False`` tests
    the tracker's own heap; with it, the hooks do not know what they are above.

    Raises:
        AssertionError: a counter, a block's owner, its size or its content is not as expected.
    """
    from membound_async.allocator import _tracker

    helper = native.load("allocator_fuzzer")
    gc.disable()
    helper.begin(_tracker, allocator.registry.root, groups > 126, stage, TrackingError)
    helper.register_groups(groups - groups // 8 if groups > 126 else 100)
    for done in range(0, operations, CHUNK):
        helper.fuzz(min(CHUNK, operations - done), seed * 1_000_003 + done)
    live: int = helper.finish()
    return live


def _in_threads(work: Callable[[int], Any]) -> list[Any]:
    results: list[Any] = [None] * THREADS

    def run(k: int) -> None:
        results[k] = work(k)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in results, "a thread has failed"
    return results


def stress(helper: ModuleType, seconds: float, is_raw: Callable[[int], bool]) -> int:
    """Have threads, two in a group, free and resize each other's blocks, in C.

    Give how many operations there were. All counters must be the threads' own tallies, to the
    byte, and all blocks be gone when they are freed.
    """
    groups = [allocator.registry.register(f"stress.t{k}") for k in range(THREADS // 2)]
    before = [group._counts()[:4] for group in groups]
    tallies = [helper.stress_tally(k) for k in range(len(groups))]
    done = _in_threads(
        lambda k: helper.stress(groups[k // 2].enter(), k // 2, is_raw(k), k, seconds)
    )
    for drained in (False, True):
        if drained:
            helper.stress_drain()
        for k, group in enumerate(groups):
            counted = [a - b for a, b in zip(group._counts(), before[k], strict=False)]
            wanted = [a - b for a, b in zip(helper.stress_tally(k), tallies[k], strict=True)]
            assert counted == wanted, f"group {k}: {counted} was counted, not {wanted}"
            assert group.statistics().peak_live_bytes >= group.live_bytes
    assert not any(group.live_bytes or group.live_objects for group in groups)
    return sum(done)


def stress_in_python(seconds: float) -> int:
    """Have threads free each other's objects, by the interpreter.

    What is live in the end is what the objects that are left say of their own sizes.
    """
    groups = [allocator.registry.register(f"stress.p{k}") for k in range(THREADS)]
    tags = [bytes([k]) for k in range(THREADS)]
    shared: list[bytes | bytearray | None] = [None] * 5000
    end = time.monotonic() + seconds

    def work(k: int) -> int:
        group, tag, array, random = groups[k], tags[k], bytearray(tags[k]), Random(k)
        n = 0
        while time.monotonic() < end:
            steps = [
                (random.randrange(5000), random.randrange(3), random.randrange(2, 5000))
                for _ in range(200)
            ]
            kind = place = size = None
            with group.enter():
                for place, kind, size in steps:
                    if kind == 0:
                        shared[place] = tag * size
                    elif kind == 1:
                        shared[place] = array * size
                    else:
                        shared[place] = None
            n += len(steps)
        return n

    done = _in_threads(work)
    for left in (True, False):
        if not left:
            shared[:] = [None] * len(shared)
        wanted = [0] * THREADS
        for x in shared:
            if x is not None:
                wanted[x[0]] += sys.getsizeof(x)
        for k, group in enumerate(groups):
            assert group.live_bytes == wanted[k], (
                f"thread {k}: {group.live_bytes} B are live, and of objects {wanted[k]} B"
            )
    return sum(done)


def stress_all(seconds: float) -> None:
    """Run each stress for that long, and say what it has done."""
    allocator.install()
    helper = native.load("allocator_fuzzer")
    runs: list[tuple[str, Callable[[], int]]] = [
        ("in Python", lambda: stress_in_python(seconds)),
        ("in C, with the GIL", lambda: stress(helper, seconds, lambda k: False)),
        ("in C, without the GIL", lambda: stress(helper, seconds, lambda k: True)),
        ("in C, every third without", lambda: stress(helper, seconds, lambda k: k % 3 == 0)),
    ]
    for name, run in runs:
        print(f"{THREADS} threads {name}: {run():,} operations, counters exact", flush=True)
    state = allocator.hooks._state()
    assert state["lost_blocks"] == state["freed_unseen"] == 0, state


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--groups", type=int, choices=[126, 65535], default=126)
    parser.add_argument("--no-stage", action="store_true", help="test the tracker's own heap")
    parser.add_argument("--threads", type=float, metavar="SECONDS", help="stress threads instead")
    options = parser.parse_args()
    if options.threads is not None:
        stress_all(options.threads)
        return
    start = time.monotonic()
    live = fuzz(options.operations, options.seed, options.groups, not options.no_stage)
    print(
        f"{options.operations:,} operations, seed {options.seed}, {options.groups} groups: "
        f"as the model says; {live:,} blocks of the interpreter are live; "
        f"{time.monotonic() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
