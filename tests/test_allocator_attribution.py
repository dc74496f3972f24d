"""Whose allocations they are: in tasks, threads, greenlets, contexts, forks and subinterpreters.

What is charged is always the group that the context variable holds: `charged_path` compares.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import sys
import threading
import tracemalloc
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from importlib import import_module
from random import Random
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest

from membound_async import allocator
from membound_async.allocator import AllocationGroup, registry
from tests.tracking import charged_path, in_new_process, new_group

asyncio_only = pytest.mark.parametrize(
    "anyio_backend", ["asyncio", "asyncio+uvloop"], indirect=True
)


# --- tasks ----------------------------------------------------------------------------------


async def test_tasks_begin_in_the_group_that_starts_them(
    group: AllocationGroup, other: AllocationGroup
) -> None:
    seen: list[str] = []

    async def child(entered: AllocationGroup | None = None) -> None:
        seen.append(charged_path())
        if entered is not None:
            with entered.enter():
                await anyio.lowlevel.checkpoint()
                seen.append(charged_path())
            await anyio.lowlevel.checkpoint()
            seen.append(charged_path())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(child)
        with group.enter():
            tasks.start_soon(child, other)
        assert charged_path() == "root"
    assert sorted(seen) == ["root", "tests.mine", "tests.mine", "tests.other"]
    assert charged_path() == "root"


async def test_tasks_that_take_turns(group: AllocationGroup, other: AllocationGroup) -> None:
    """Random scopes in tasks, copied contexts and threads' loops never mix."""
    groups = [registry.root, group, other]

    async def wander(random: Random, depth: int) -> None:
        path = charged_path()
        for _ in range(10):
            chosen = random.choice(groups)
            with chosen.enter():
                assert charged_path() == chosen.path
                await anyio.lowlevel.checkpoint()
                assert charged_path() == chosen.path
                context = contextvars.copy_context()
                assert context.run(charged_path) == chosen.path
                inner = random.choice(groups)
                context.run(inner.enter().__enter__)
                assert charged_path() == chosen.path
                assert context.run(charged_path) == inner.path
                if depth < 2 and random.random() < 0.3:
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(wander, random, depth + 1)
            assert charged_path() == path

    async with anyio.create_task_group() as tasks:
        for seed in range(5):
            tasks.start_soon(wander, Random(seed), 0)


@asyncio_only
async def test_asyncio_tasks(group: AllocationGroup, other: AllocationGroup) -> None:
    async def child() -> str:
        await asyncio.sleep(0)
        return charged_path()

    with group.enter():
        gathered = asyncio.gather(child(), other.track(child()))
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(child())
            with other.enter():
                second = tasks.create_task(child())
                third = tasks.create_task(child(), context=contextvars.Context())
        called = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(lambda: called.set_result(charged_path()))
    assert list(await gathered) == ["tests.mine", "tests.other"]
    assert await first == "tests.mine"
    assert await second == "tests.other"
    assert await third == "root"
    assert await called == "tests.mine"
    assert charged_path() == "root"


async def test_what_a_consumer_frees_was_its_producers(
    group: AllocationGroup, other: AllocationGroup
) -> None:
    kept: list[bytes] = []
    payload = sys.getsizeof(bytes(10_000))
    send, receive = anyio.create_memory_object_stream[bytes](5)

    async def produce() -> None:
        with group.enter(), send:
            for _ in range(100):
                await send.send(bytes(10_000))

    async def consume() -> None:
        async with receive:
            async for item in receive:
                with other.enter():
                    copy = bytearray(item)
                    del copy
                    if len(kept) < 10:
                        kept.append(item)
                del item

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(produce)
        tasks.start_soon(consume)
    assert group.statistics().allocated_bytes >= 100 * payload
    assert 10 * payload <= group.live_bytes < 11 * payload
    assert other.statistics().allocated_bytes >= 100 * 10_000
    assert other.live_bytes < 10_000
    kept.clear()
    assert group.live_bytes < payload


async def test_async_generators(group: AllocationGroup, other: AllocationGroup) -> None:
    """A scope that is open at a yield is open for whoever iterates, as contextvars are."""

    async def steps() -> AsyncGenerator[str, None]:
        yield charged_path()
        with group.enter():
            yield charged_path()
        yield charged_path()

    async with aclosing(steps()) as generator:
        seen = [(path, charged_path()) async for path in generator]
    assert seen == [("root", "root"), ("tests.mine", "tests.mine"), ("root", "root")]
    with other.enter():
        generator = steps()
    assert await anext(generator) == "root"  # it runs in the context of who iterates
    with other.enter():
        async for _ in generator:
            pass
        assert charged_path() == "tests.other"
    assert charged_path() == "root"

    generator = steps()
    await anext(generator)
    await anext(generator)
    assert charged_path() == "tests.mine"
    await generator.aclose()
    assert charged_path() == "root"


def test_generators(group: AllocationGroup) -> None:
    def steps() -> Iterator[str]:
        with group.enter():
            yield charged_path()

    generator = steps()
    assert next(generator) == "tests.mine"
    assert charged_path() == "tests.mine"
    del generator
    assert charged_path() == "root"


# --- threads --------------------------------------------------------------------------------


async def test_anyio_threads_carry_the_group(
    group: AllocationGroup, other: AllocationGroup
) -> None:
    def work() -> tuple[str, str]:
        path = charged_path()
        with other.enter():
            assert charged_path() == "tests.other"
            back = anyio.from_thread.run(in_the_loop)
        assert charged_path() == path
        return path, back

    async def in_the_loop() -> str:
        await anyio.lowlevel.checkpoint()
        return charged_path()

    for _ in range(3):  # the same worker thread
        with group.enter():
            assert await anyio.to_thread.run_sync(work) == ("tests.mine", "tests.other")
        assert await anyio.to_thread.run_sync(charged_path) == "root"
        assert charged_path() == "root"


@asyncio_only
async def test_asyncio_threads(group: AllocationGroup) -> None:
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as pool:  # one thread: what it did before must not matter
        loop.set_default_executor(pool)
        for _ in range(3):
            with group.enter():
                assert await asyncio.to_thread(charged_path) == "tests.mine"
                assert await loop.run_in_executor(None, charged_path) == "root"
                context = contextvars.copy_context()
            assert await loop.run_in_executor(pool, context.run, charged_path) == "tests.mine"
            assert await asyncio.to_thread(charged_path) == "root"


def test_threads_begin_in_root(group: AllocationGroup) -> None:
    def work() -> None:
        seen.append(charged_path())
        scope = group.enter()
        scope.__enter__()  # and ends in it
        seen.append(charged_path())
        blocks.append(bytes(100_000))

    blocks: list[bytes] = []
    seen: list[str] = []
    with group.enter():
        live = group.live_bytes
        for _ in range(50):  # new threads get the thread states of those that have ended
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        assert charged_path() == "tests.mine"
    assert seen == ["root", "tests.mine"] * 50
    assert group.live_bytes >= live + 50 * 100_000
    blocks.clear()  # in another thread than made them
    assert group.live_bytes < live + 100_000


def test_threads_free_what_others_made() -> None:
    """What is live at the end is what was kept, however threads have mixed."""

    def work(number: int, group: AllocationGroup) -> None:
        random = Random(number)
        with group.enter():
            for _ in range(20_000):
                shared[random.randrange(500)] = bytes(random.randrange(2, 3_000))
            assert charged_path() == group.path

    with (
        new_group("tests.a") as a,
        new_group("tests.b") as b,
        new_group("tests.c") as c,
    ):
        groups = (a, b, c)
        shared: list[bytes | None] = [None] * 500
        threads = [threading.Thread(target=work, args=each) for each in enumerate(groups)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        kept = sum(map(sys.getsizeof, filter(None, shared)))
        live = sum(each.live_bytes for each in groups)
        assert kept <= live < kept + 30_000
        shared.clear()
        assert sum(each.live_bytes for each in groups) == live - kept
        assert all(0 <= each.live_bytes < 30_000 for each in groups)


# --- contexts -------------------------------------------------------------------------------


def test_contexts(group: AllocationGroup, other: AllocationGroup) -> None:
    with group.enter():
        inside = contextvars.copy_context()
        assert contextvars.Context().run(charged_path) == "root"
        assert charged_path() == "tests.mine"
    outside = contextvars.copy_context()
    with other.enter():
        assert inside.run(charged_path) == "tests.mine"
        assert outside.run(charged_path) == "root"
        assert inside.run(lambda: outside.run(charged_path)) == "root"
        assert charged_path() == "tests.other"
    inside.run(other.enter().__enter__)
    assert inside.run(charged_path) == "tests.other"
    assert charged_path() == "root"


def test_other_variables_do_not_matter(group: AllocationGroup) -> None:
    variable = contextvars.ContextVar("variable", default="missing")

    def work() -> None:
        token = variable.set("set")
        with group.enter():
            inner = variable.set("inner")
            assert charged_path() == "tests.mine"
            variable.reset(inner)
            assert charged_path() == "tests.mine"
            assert variable.get() == "set"
        variable.reset(token)
        assert variable.get() == "missing"
        assert charged_path() == "root"

    contextvars.Context().run(work)
    work()


def test_greenlets(group: AllocationGroup, other: AllocationGroup) -> None:
    greenlet = pytest.importorskip("greenlet", reason="greenlet is not installed").greenlet

    def run(entered: AllocationGroup, following: Callable[[], object]) -> str:
        assert charged_path() == "root"
        with entered.enter():
            for _ in range(20):
                following()
                assert charged_path() == entered.path
        assert charged_path() == "root"
        return entered.path

    first = greenlet(lambda: run(group, lambda: second.switch()))  # noqa: PLW0108
    second = greenlet(lambda: run(other, first.switch))
    with registry.root.enter():
        assert first.switch() == "tests.mine"
        assert charged_path() == "root"
    assert second.switch() == "tests.other"
    assert charged_path() == "root"

    inherited = greenlet(charged_path)
    with group.enter():
        inherited.gr_context = contextvars.copy_context()
        assert greenlet(charged_path).switch() == "root"
        assert charged_path() == "tests.mine"
    assert inherited.switch() == "tests.mine"
    assert charged_path() == "root"


# --- other tools, interpreters and processes ------------------------------------------------


def work(blocks: list[object]) -> None:
    for i in range(len(blocks)):
        blocks[i] = {"id": i, "text": f"x{i}", "list": [i] * (i % 7), "bytes": b"z" * (i % 900)}
    blocks[::2] = [None] * len(blocks[::2])


def compare_with_tracemalloc(*, tracemalloc_is_above: bool) -> None:
    blocks: list[object] = [None] * 5_000
    group = registry.register("group")
    before = tracemalloc.get_traced_memory()[0]
    with group.enter():
        work(blocks)
    traced = tracemalloc.get_traced_memory()[0] - before
    if tracemalloc_is_above:
        tracemalloc.stop()  # which frees what it has needed itself
    assert traced > 2_000_000
    assert abs(traced - group.live_bytes) < 4_096
    blocks.clear()
    assert group.live_bytes < 50_000  # in free lists


@in_new_process()
def test_tracemalloc_below() -> None:
    tracemalloc.start(1)
    allocator.install()
    compare_with_tracemalloc(tracemalloc_is_above=False)


@in_new_process()
def test_tracemalloc_above() -> None:
    allocator.install()
    tracemalloc.start(1)
    compare_with_tracemalloc(tracemalloc_is_above=True)


@in_new_process()
def test_fork() -> None:
    allocator.install()
    mine, childs = registry.register("mine"), registry.register("childs")
    with mine.enter():
        blocks = [bytes(1_000) for _ in range(100)]
    live = mine.live_bytes
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert mine.live_bytes == live
            blocks.clear()
            assert mine.live_bytes < 2_000
            with childs.enter():
                thread = threading.Thread(target=lambda: blocks.append(bytes(100_000)))
                thread.start()
                thread.join()
                own = bytes(50_000)
            assert 50_000 < childs.live_bytes < 70_000
            with mine.enter():
                assert charged_path() == "mine"
            del own
            assert childs.live_bytes < 20_000
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert mine.live_bytes == live
    assert childs.statistics().allocated_bytes == 0
    blocks.clear()
    assert mine.live_bytes < 2_000


REFUSED = """
import importlib.util, sys
from importlib.machinery import ExtensionFileLoader

name = "membound_async.allocator._tracker"
spec = importlib.util.spec_from_loader(name, ExtensionFileLoader(name, {path!r}))
try:
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
except ImportError as error:
    assert "interpreter" in str(error), error
else:
    raise SystemError("it was imported")
"""
BLOCKS = "blocks = [bytes(1_000) for _ in range(10_000)]"


def use_subinterpreter(*, isolated: bool) -> None:
    from membound_async.allocator import _tracker

    if sys.version_info >= (3, 13):
        interpreters: Any = import_module("_interpreters")
        made = interpreters.create("isolated" if isolated else "legacy")
    else:
        interpreters = import_module("_xxsubinterpreters")
        made = interpreters.create(isolated=isolated)

    def run(code: str) -> None:
        # What fails is raised up to 3.12, and returned from 3.13.
        failed = interpreters.run_string(made, code)
        assert failed is None, failed

    allocator.install()
    group = registry.register("group")
    with group.enter():
        live = group.live_bytes
        run(REFUSED.format(path=_tracker.__file__))
        assert charged_path() == "group"
        root = registry.root.live_bytes
        run(BLOCKS)
        # Up to 3.11 it has the main interpreter's GIL, and is root's.
        counted = registry.root.live_bytes - root > 10_000_000
        assert counted == (sys.version_info < (3, 12))
        assert charged_path() == "group"
    assert group.live_bytes < live + 200_000  # of 10 MB
    objects = group.live_objects
    run("blocks.clear()")
    assert objects - 500 < group.live_objects <= objects
    interpreters.destroy(made)
    with group.enter():
        assert charged_path() == "group"
    assert 0 <= group.live_bytes < live + 200_000


@in_new_process()
def test_subinterpreter() -> None:
    use_subinterpreter(isolated=True)


@in_new_process()
def test_subinterpreter_that_shares_the_gil() -> None:
    use_subinterpreter(isolated=False)
