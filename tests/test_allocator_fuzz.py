"""The tracker's counts beside a model's, tracemalloc's and the threads' own; its cache.

Each of these has a process for itself, for the hooks stay where they are once they are in, and
what else the process allocates is counted, too. Long runs: ``python -m tests.fuzz_allocator``.
"""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import gc
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from random import Random
from typing import Any

import anyio
import anyio.lowlevel
import pytest

import membound_async
from membound_async import allocator
from tests import native

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not allocator.available, reason=f"nothing is tracked here: {allocator.unavailable_reason}"
    ),
]
needs_compiler = pytest.mark.skipif(
    native.compiler() is None, reason="NOT FUZZED: there is no C compiler to build tests/native"
)

HOMES = (Path(membound_async.__file__).parent.parent, Path(__file__).parent.parent)


def alone(*command: str, **variables: str) -> str:
    """Run Python in a process of its own, and give what it has printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, HOMES)), **variables}
    done = subprocess.run(
        [sys.executable, "-P", *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    return done.stdout


def alone_in(function: Callable[[], None], **variables: str) -> str:
    code = f"from {__name__} import {function.__name__} as f; f()"
    return alone("-c", code, **variables)


# ------------------------------------------------------------------------------- the counts


@needs_compiler
@pytest.mark.parametrize(
    ("below", "options"),
    [
        ("pymalloc", ["--no-stage"]),
        ("pymalloc", ["--no-stage", "--groups=65535"]),
        ("pymalloc", []),
        ("malloc", ["--groups=65535"]),
        ("debug", []),
    ],
)
def test_counts_owners_and_sizes_are_as_in_the_model(below, options):
    command = ("-m", "tests.fuzz_allocator", "--operations=60000", *options)
    assert "as the model says" in alone(*command, PYTHONMALLOC=below)


@needs_compiler
def test_counts_are_exact_with_eight_threads_that_free_each_others_blocks():
    printed = alone("-m", "tests.fuzz_allocator", "--threads=0.5")
    assert printed.count("counters exact") == 4


def _work() -> list[Any]:
    made: list[Any] = [
        {"id": i, "name": f"x{i}", "list": [i] * (i % 7), "bytes": b"z" * (i % 900)}
        for i in range(10_000)
    ]
    made[::2] = [None] * 5_000
    return made


def _grown(live: Callable[[], int]) -> None:
    """Print by how much that grows while `_work` is done."""
    del _work()[:]  # what free lists keep of it
    gc.collect()
    before = live()
    made = _work()
    print(live() - before, len(made))


def _traced() -> None:
    tracemalloc.start(1)
    _grown(lambda: tracemalloc.get_traced_memory()[0])


def _tracked() -> None:
    allocator.install()
    with allocator.registry.register("a").enter() as group:
        _grown(lambda: group.live_bytes)


def test_live_bytes_are_those_of_tracemalloc():
    """Each in a process of its own: below the hooks, tracemalloc sees a granule at least."""
    tracked, made = map(int, alone_in(_tracked).split())
    traced, as_many = map(int, alone_in(_traced).split())
    assert made == as_many
    assert traced > 3_000_000
    assert abs(tracked - traced) < traced / 10_000


def _entering_is_free() -> None:
    allocator.install()
    group, other = allocator.registry.register("a"), allocator.registry.register("b")
    variables = [contextvars.ContextVar[int](f"v{i}") for i in range(100)]
    for variable in variables:
        variable.set(1)  # so that setting another one allocates
    for _ in range(1000):
        with group.enter(), other.enter():
            pass
    assert group.live_bytes == group.live_objects == 0
    assert other.statistics().allocated_objects == 0


def test_what_entering_allocates_is_not_the_groups():
    alone_in(_entering_is_free)


# --------------------------------------------------------- the cached group is the variable's


def _check() -> None:
    from membound_async.allocator import _tracker

    found, wanted = _tracker._hook_group(), allocator.current_group()._index
    assert found == wanted, f"the hooks charge group {found}, and the variable has {wanted}"


def _scope(random: Random) -> AbstractContextManager[Any]:
    names = ["root", "a", "b", "c", None]
    name = random.choice(names)
    return nullcontext() if name is None else allocator.registry.register(name).enter()


def _play(random: Random, context: contextvars.Context, depth: int = 0) -> None:
    """Enter groups and contexts, one in another."""
    _check()
    with _scope(random):
        _check()
        contextvars.ContextVar[int]("other").set(depth)
        _check()
        if depth < 4:
            copy = contextvars.copy_context()
            _check()
            copy.run(_play, random, copy, depth + 1)
            _check()
            _play(random, context, depth + 1)
        _check()
    _check()


async def _play_in_tasks(random: Random, depth: int = 0) -> None:
    for _ in range(8):
        with _scope(random):
            _check()
            await anyio.lowlevel.checkpoint()
            _check()
            here = contextvars.copy_context()
            here.run(_play, random, here, 3)
            _check()
            if depth < 2:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(_play_in_tasks, random, depth + 1)
                    _check()
                await anyio.to_thread.run_sync(_check)
            _check()
        _check()


def _cache_is_right() -> None:
    allocator.install()
    failed: list[BaseException] = []

    def in_thread(seed: int) -> None:
        random = Random(seed)
        try:
            for _ in range(10):
                _play(random, contextvars.copy_context())
            anyio.run(_play_in_tasks, random, backend="trio" if seed % 2 else "asyncio")
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=in_thread, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed

    async def leave_it_entered() -> None:
        allocator.registry.register("a").enter().__enter__()
        _check()

    async def ends() -> None:
        await asyncio.create_task(leave_it_entered())
        _check()
        assert allocator.current_group().path == "root"

    for _ in range(20):
        asyncio.run(ends())


def test_the_hooks_charge_the_group_in_the_variable():
    alone_in(_cache_is_right)


def _new_thread_states() -> None:
    from membound_async.allocator import _tracker

    allocator.install()
    helper = native.load("allocator_fuzzer")
    group, root = allocator.registry.register("a"), allocator.registry.root
    states: set[int] = set()
    api = ctypes.pythonapi
    api.PyThreadState_Get.restype = ctypes.c_void_p

    def enter_and_end() -> None:
        states.add(api.PyThreadState_Get())
        assert _tracker._hook_group() == root._index
        group.enter().__enter__()
        _check()
        assert _tracker._hook_group() == group._index

    helper.in_foreign_thread(enter_and_end, 300)
    assert len(states) < 300, "no thread state was at the address of an earlier one"
    for _ in range(100):
        thread = threading.Thread(target=enter_and_end)
        thread.start()
        thread.join()
    _check()
    assert group.live_bytes < 10_000


@needs_compiler
def test_a_thread_state_at_the_address_of_another_has_its_own_group():
    alone_in(_new_thread_states)


def _pending_error() -> None:
    from membound_async.allocator import _tracker

    allocator.install()
    helper = native.load("allocator_fuzzer")
    group = allocator.registry.register("a")
    with group.enter():
        inside = contextvars.copy_context()
    for context, index in ((inside, group._index), (contextvars.Context(), 1)) * 100:
        error = ValueError("pending")
        assert helper.while_raising(_tracker, context, error) == (True, (index, 100))
        assert helper.charged_in(_tracker, context) == index


@needs_compiler
def test_a_pending_error_stays_as_it_is():
    alone_in(_pending_error)


def _at_the_limit() -> None:
    allocator.install()
    helper = native.load("allocator_fuzzer")
    group = allocator.registry.register("a")
    variables = [contextvars.ContextVar[int](f"v{i}") for i in range(2000)]
    for k in range(100):
        context = contextvars.Context()
        for variable in variables[k * 20 : k * 20 + 20]:
            context.run(variable.set, 1)
        assert helper.at_the_limit(context), "an error is left behind"
        with group.enter():
            inside = contextvars.copy_context()
        assert helper.at_the_limit(inside), "an error is left behind"
        _check()
    # Each of them would have failed where it had been looked up without care.
    assert allocator.hooks._state()["failed_lookups"] > 0


@needs_compiler
def test_an_allocation_at_the_recursion_limit_raises_nothing():
    alone_in(_at_the_limit)
