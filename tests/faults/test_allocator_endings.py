"""The tracker where a process is cut in two, and where it ends with much still going on.

Each runs a few times; ``ALLOCATOR_RUNS=20`` in the environment runs it twenty times.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from membound_async import allocator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not allocator.available, reason=f"nothing is tracked here: {allocator.unavailable_reason}"
    ),
]
runs = pytest.mark.parametrize("run", range(int(os.environ.get("ALLOCATOR_RUNS", "3"))))

FORK = """
import os, sys, threading, warnings
from membound_async import allocator

warnings.simplefilter("ignore")  # of a fork beside threads, as is wanted here
allocator.install()
a, b, c = map(allocator.registry.register, "abc")
stop = threading.Event()

def beside():
    with c.enter():
        while not stop.is_set():
            [bytes(1000) for _ in range(100)]

threads = [threading.Thread(target=beside, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()

def made(n):
    return [bytes(i + 2) for i in range(n)]

made(10)  # what the first time makes for good
for _ in range(5):
    with a.enter():
        mine = made(1000)
    size = sum(map(sys.getsizeof, mine)) + sys.getsizeof(mine)
    before = a.live_bytes
    assert abs(before - size) < 1000, (before, size)
    child = os.fork()
    if child == 0:
        try:
            assert a.live_bytes == before
            mine.clear()
            assert a.live_bytes < 1000, a.live_bytes
            with b.enter():
                more = made(2000)
            assert b.live_objects == 2001, b.live_objects
            live = c.statistics().allocated_objects
            def work():
                with c.enter():
                    kept.extend(made(500))
            kept = []
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            assert c.statistics().allocated_objects >= live + 500
            grandchild = os.fork()
            if grandchild == 0:
                del more
                os._exit(b.live_objects)
            assert os.waitpid(grandchild, 0)[1] == 0
            assert b.live_objects == 2001
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "the child has failed"
    assert a.live_bytes == before
    assert b.live_bytes == 0
    del mine
    assert a.live_bytes < 1000, a.live_bytes
stop.set()
for thread in threads:
    thread.join()
assert c.live_bytes < 5000, c.live_bytes
"""

SHUTDOWN = """
import atexit, contextvars, gc, sys, threading, time
from membound_async import allocator

class Late:
    def __del__(self):
        self.made = [bytes(100) for _ in range(100)]
        try:
            with group.enter():
                self.made += [bytes(100) for _ in range(100)]
        except Exception:  # the module is half gone
            pass

def allocate():
    with group.enter():
        return [Late() for _ in range(100)]

atexit.register(allocate)          # runs after the tracker's own
allocator.install()
group = allocator.registry.register("a")
atexit.register(allocate)          # runs before it
kept = allocate()
kept.append(kept)                  # a cycle, for the last collection
sys.late = allocate()              # for the end of sys
variable = contextvars.ContextVar("variable")
variable.set(allocate())           # for the end of the context
group.enter().__enter__()          # and it is never left

def daemon():
    with group.enter():
        while True:
            [bytes(1000) for _ in range(100)]
            allocator.current_group()

for _ in range(4):
    threading.Thread(target=daemon, daemon=True).start()
time.sleep(0.1)
print("ends", flush=True)
"""


def check(program: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-X", "faulthandler", "-c", program],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    assert "Error" not in done.stderr
    return done.stdout


@runs
def test_counts_of_child_and_parent_after_a_fork(run):
    check(FORK)


@runs
@pytest.mark.parametrize("below", ["default", "malloc", "debug"])
def test_the_end_with_daemon_threads_finalizers_and_exit_functions(run, below):
    assert check(SHUTDOWN, PYTHONMALLOC=below) == "ends\n"
