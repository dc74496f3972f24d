"""The allocation tracker as a program uses it: hooks, groups, scopes, statistics, charges."""

from __future__ import annotations

import asyncio
import atexit
import copy
import dataclasses
import gc
import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import copy_context
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from membound_async import (
    InvalidComponentBounds,
    MemboundError,
    TrackingError,
    TrackingUnavailable,
    allocator,
)
from membound_async.allocator import (
    AllocationGroup,
    AllocationScope,
    AllocationStatsSnapshot,
    current_group,
    registry,
)
from tests.tracking import charged_path, in_new_process, need_tracker

BLOCK = sys.getsizeof(bytes(100_000))


def refused(call: Callable[[], object], words: str) -> None:
    """Check that a call is refused in these words."""
    with pytest.raises(TrackingError, match=words):
        call()


# --- the hooks ------------------------------------------------------------------------------


@in_new_process()
def test_install_counts_from_then_on() -> None:
    before = bytes(100_000)
    assert not allocator.installed()
    assert not allocator.enabled()
    assert not allocator.displaced()
    assert registry.root.live_bytes == 0

    allocator.install()
    assert allocator.installed()
    assert allocator.enabled()
    assert not allocator.displaced()
    counted = registry.root.statistics()
    del before
    assert registry.root.statistics().deallocated_bytes < counted.deallocated_bytes + BLOCK
    after = bytes(100_000)
    assert registry.root.statistics().allocated_bytes >= counted.allocated_bytes + BLOCK
    del after
    assert registry.root.statistics().deallocated_bytes >= counted.deallocated_bytes + BLOCK


@in_new_process()
def test_what_can_be_done_before_install() -> None:
    group = registry.register("early")
    with group.enter():
        assert current_group() is group
        early = bytes(100_000)
    group.charge(10)
    assert (group.live_bytes, group.live_objects) == (10, 0)
    refused(allocator.enable, r"call membound_async.allocator.install\(\)")
    refused(allocator.disable, r"call membound_async.allocator.install\(\)")
    assert not allocator.installed()
    allocator.install()
    del early
    group.discharge(10)
    with group.enter():
        late = bytes(100_000)
    assert (group.live_bytes, group.live_objects) == (BLOCK, 1)
    del late
    assert (group.live_bytes, group.live_objects) == (0, 0)


@in_new_process()
def test_install_again() -> None:
    for groups in (0, 127, 65_536, -1):
        with pytest.raises(ValueError, match=f"groups={groups}: use 126 or 65535"):
            allocator.install(groups)  # type: ignore[arg-type]
    assert not allocator.installed()
    allocator.install()
    group = registry.register("kept")
    with group.enter():
        block = bytes(100_000)
    allocator.install()
    allocator.disable()
    refused(lambda: allocator.install(65_535), "in already, for 126 groups")
    assert not allocator.enabled()
    allocator.install(126)
    assert allocator.enabled()
    assert group.live_bytes == BLOCK
    del block
    assert group.live_bytes == 0


@in_new_process()
def test_with_65535_groups() -> None:
    early = [registry.register(f"early.g{i}") for i in range(126)]
    refused(lambda: registry.register("one.more"), r"all 126 are in use.*install\(groups=65535\)")
    allocator.install(65_535)
    refused(allocator.install, "in already, for 65535 groups")
    groups = early + [registry.register(f"g{i}") for i in range(65_535 - 126)]
    assert len(registry) == 65_536
    with pytest.raises(TrackingError) as error:
        registry.register("one.more")
    assert "all 65535 are in use" in str(error.value)
    assert "install(" not in str(error.value)

    sizes = [2, 511, 512, 32_767, 32_768, 1_000_000]
    blocks: list[bytes | None] = [None] * len(sizes)
    for group in (groups[0], groups[127], groups[-1]):
        with group.enter():
            for place, size in enumerate(sizes):
                blocks[place] = bytes(size)
        assert (group.live_bytes, group.live_objects) == (sum(map(sys.getsizeof, blocks)), 6)
        blocks[:] = [None] * len(sizes)
        size = -1
        assert (group.live_bytes, group.live_objects) == (0, 0)


def test_counts_are_exact(group: AllocationGroup) -> None:
    n = 50_000
    with group.enter():  # by calloc and by malloc, large and small
        block = bytes(100_000)
        others = bytes(100)
        more = b"z" * n
    size = sum(map(sys.getsizeof, [block, others, more]))
    counted = group.statistics()
    assert counted == AllocationStatsSnapshot(
        allocated_bytes=size, allocated_objects=3, peak_live_bytes=size
    )
    assert (group.live_bytes, group.live_objects) == (size, 3)
    del block
    assert group.statistics() == dataclasses.replace(
        counted, deallocated_bytes=BLOCK, deallocated_objects=1
    )
    assert group.live_bytes == size - BLOCK


def test_a_resized_block_is_freed_and_made_again(
    group: AllocationGroup, other: AllocationGroup
) -> None:
    with group.enter():
        grows = bytearray(50_000)
    live = group.live_bytes
    with other.enter():
        grows.extend(bytes(1_000_000))
    assert group.live_objects == 1  # the object; its bytes are another's
    assert group.live_bytes < live - 50_000
    assert other.live_objects == 1
    assert other.live_bytes >= 1_050_000
    del grows
    assert group.live_bytes == other.live_bytes == 0


def test_switched_off_what_is_freed_still_counts(group: AllocationGroup) -> None:
    with group.enter():
        first, second = bytes(100_000), bytes(100_001)
    allocator.disable()
    assert allocator.installed()
    assert not allocator.enabled()
    with group.enter():
        uncounted = bytes(100_000)
    assert (group.live_bytes, group.live_objects) == (2 * BLOCK + 1, 2)
    del first
    assert (group.live_bytes, group.live_objects) == (BLOCK + 1, 1)
    allocator.enable()
    assert allocator.enabled()
    del uncounted
    assert (group.live_bytes, group.live_objects) == (BLOCK + 1, 1)
    del second
    assert (group.live_bytes, group.live_objects) == (0, 0)
    with group.enter():
        again = bytes(100_000)
    assert group.live_bytes == BLOCK
    del again


def test_tracemalloc_that_starts_later_does_no_harm(group: AllocationGroup) -> None:
    tracemalloc.start()
    try:
        assert not allocator.displaced()
        with group.enter():
            block = bytes(100_000)
        assert group.live_bytes >= BLOCK  # and what tracemalloc needs itself
        allocator.install()
        allocator.disable()
        allocator.enable()
        assert allocator.enabled()
        assert not allocator.displaced()
    finally:
        tracemalloc.stop()
    assert not allocator.displaced()
    assert BLOCK <= group.live_bytes < BLOCK + 1_000
    del block
    assert group.live_bytes < 1_000


def test_switched_on_while_tracemalloc_runs_that_started_while_off(group: AllocationGroup) -> None:
    allocator.disable()
    tracemalloc.start()
    try:
        allocator.enable()
        assert allocator.displaced()  # what tracemalloc calls does not count, and that shows
    finally:
        tracemalloc.stop()
    assert allocator.enabled()
    assert not allocator.displaced()
    with group.enter():
        block = bytes(100_000)
    assert group.live_bytes == BLOCK
    del block


@in_new_process()
def test_tracemalloc_that_is_stopped_below_discards_the_hooks() -> None:
    group = registry.register("group")
    tracemalloc.start()
    allocator.install()
    with group.enter():
        block = bytes(100_000)
    assert group.live_bytes == BLOCK
    assert not allocator.displaced()
    tracemalloc.stop()
    assert allocator.displaced()
    assert allocator.installed()
    with group.enter():
        other = bytes(100_000)
    del block, other
    assert group.live_bytes == BLOCK  # it stands still
    refused(allocator.install, "the hooks are not called any more")
    allocator.disable()
    assert allocator.displaced()


@in_new_process()
def test_the_interpreter_ends_in_whatever_state_groups_are() -> None:
    allocator.install()
    group = registry.register("group")

    class Last:
        def __del__(self) -> None:
            with group.enter():
                self.blocks = [bytes(1_000) for _ in range(100)]

    def work() -> None:
        with group.enter():
            while True:
                [bytes(1_000) for _ in range(100)]

    for _ in range(3):
        threading.Thread(target=work, daemon=True).start()
    cycle: Any = Last()
    cycle.cycle = cycle
    sys.modules["last"] = cycle
    atexit.register(lambda: [bytes(100) for _ in range(100)])
    group.enter().__enter__()


def test_the_header_is_where_get_include_says() -> None:
    assert Path(allocator.get_include(), "membound_tracker.h").is_file()


# --- without the extension ------------------------------------------------------------------


def nothing_is_tracked() -> None:
    """Check what a program meets where `available` is False."""
    assert not allocator.available
    assert not allocator.installed()
    assert not allocator.enabled()
    assert not allocator.displaced()
    assert list(registry) == []
    assert len(registry) == 0
    assert registry.snapshot() == {}
    assert registry.get("root") is None
    for call in (
        allocator.install,
        current_group,
        lambda: registry.root,
        lambda: registry.register("a.b"),
        lambda: AllocationGroup("a.b"),
    ):
        with pytest.raises(TrackingUnavailable) as error:
            call()
        assert error.value.reason == allocator.unavailable_reason
        assert allocator.unavailable_reason in str(error.value)
    refused(allocator.enable, "nothing is tracked")
    refused(allocator.disable, "nothing is tracked")


@in_new_process(MEMBOUND_EXTENSION="no")
def test_the_extension_can_be_refused() -> None:
    assert allocator.unavailable_reason == "MEMBOUND_EXTENSION=no"
    nothing_is_tracked()


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "the extension was not built; it needs Linux,"), (b"nothing", "too short|invalid ELF")],
    ids=["missing", "broken"],
)
def test_the_package_works_without_the_extension(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    package = Path(allocator.get_include()).parent
    shutil.copytree(
        package, tmp_path / package.name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    if content is not None:
        name = "_tracker" + sysconfig.get_config_var("EXT_SUFFIX")
        (tmp_path / package.name / "allocator" / name).write_bytes(content)
    program = f"""
import asyncio, re, sys
sys.path[:0] = [{str(tmp_path)!r}, {str(Path(__file__).parents[1])!r}]
import membound_async
from membound_async import allocator
assert membound_async.__file__.startswith({str(tmp_path)!r})
assert re.search({reason!r}, allocator.unavailable_reason), allocator.unavailable_reason
from tests.test_allocator import nothing_is_tracked
nothing_is_tracked()

async def main():
    async with membound_async.MemoryLimiter("1GiB") as limiter:
        async with limiter.component("a", minimum="1KiB") as component:
            async with component.grant("10KiB"):
                assert limiter.statistics().components

asyncio.run(main())
"""
    ended = subprocess.run(
        [sys.executable, "-P", "-c", program],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"MEMBOUND_EXTENSION": ""},
    )
    assert (ended.returncode, ended.stderr) == (0, "")


# --- the registry ---------------------------------------------------------------------------


def test_a_path_has_one_group(group: AllocationGroup) -> None:
    assert registry.register("tests.mine") is group
    assert registry.get("tests.mine") is group
    assert group.path == "tests.mine"
    assert repr(group) == "<AllocationGroup 'tests.mine'>"
    assert registry.get("tests.nobody") is None
    assert registry.root is registry.register("root") is registry.get("root")
    assert registry.root.path == "root"
    with pytest.raises(AttributeError):
        group.path = "another"


@pytest.mark.parametrize("path", ["", ".", "a..b", "a.", " "])
def test_a_path_that_no_component_can_have(group: AllocationGroup, path: str) -> None:
    registered = len(registry)
    with pytest.raises(InvalidComponentBounds):
        registry.register(path)
    assert len(registry) == registered


def test_all_groups_are_visited(group: AllocationGroup, other: AllocationGroup) -> None:
    group.charge(5)
    seen: dict[str, AllocationStatsSnapshot] = {}
    registry.visit(lambda visited, counted: seen.update({visited.path: counted}))
    assert list(seen) == [each.path for each in registry] == list(registry.snapshot())
    assert seen["tests.mine"].live_bytes == 5
    assert registry.snapshot()["tests.mine"] == seen["tests.mine"]
    assert registry.snapshot()["root"].allocated_bytes > 0
    assert {group, other, registry.root} <= set(registry)
    for each in registry:  # which may change meanwhile
        if each is other:
            registry.unregister("tests.other")
    assert len(registry) == len(seen) - 1
    group.discharge(5)


def test_unregistering(group: AllocationGroup) -> None:
    with group.enter():
        block = bytes(100_000)
        registry.unregister("tests.mine")
        assert registry.get("tests.mine") is None
        assert group not in set(registry)
        assert current_group() is group  # goes on where it is entered
        refused(group.enter().__enter__, "'tests.mine' is not registered any more")
    assert group.live_bytes >= BLOCK
    del block
    assert group.live_bytes < BLOCK
    refused(group.enter().__enter__, "'tests.mine' is not registered any more")
    assert charged_path() == "root"
    refused(lambda: registry.unregister("tests.mine"), "no allocation group is registered as")
    new = registry.register("tests.mine")
    assert new is not group
    assert new.statistics() == AllocationStatsSnapshot()


def test_what_cannot_be_unregistered(group: AllocationGroup) -> None:
    registered = set(registry)
    refused(lambda: registry.unregister("root"), "the root group cannot be unregistered")
    refused(lambda: registry.unregister("tests.nobody"), "registered as 'tests.nobody'")
    assert set(registry) == registered
    with registry.root.enter():
        assert charged_path() == "root"


@in_new_process()
def test_a_slot_is_used_again_once_it_is_drained() -> None:
    allocator.install()
    groups = [registry.register(f"g{i}") for i in range(126)]
    first = groups[0]
    message = "no group for 'new': all 126 are in use"

    refused(lambda: registry.register("new"), message)
    assert registry.get("new") is None
    assert len(registry) == 127

    kept = None
    scope = first.enter()
    with scope:
        kept = bytes(1_000_000)
    context = copy_context()
    context.run(first.enter().__enter__)
    first.charge(10)
    scope.__enter__()
    registry.unregister("g0")
    refused(lambda: registry.register("new"), message)  # everything is in the way
    del kept
    refused(lambda: registry.register("new"), message)  # a charge, a context and a scope are
    first.discharge(10)
    refused(lambda: registry.register("new"), message)  # a context and a scope are
    scope.__exit__()
    assert context.run(charged_path) == "g0"
    gc.collect()
    freed = first.statistics()
    assert freed.live_bytes == freed.live_objects == 0
    refused(lambda: registry.register("new"), message)  # a context is
    del context
    assert freed.allocated_bytes >= BLOCK + 10

    new = registry.register("new")
    assert new._index == first._index
    assert new.statistics() == AllocationStatsSnapshot()
    for call in (
        first.statistics,
        lambda: first.live_bytes,
        lambda: first.live_objects,
        lambda: first.charge(1),
        lambda: first.discharge(1),
    ):
        refused(call, "group 'g0' was unregistered, and its slot has another group now")
    refused(first.enter().__enter__, "'g0' is not registered any more")
    assert first.path == "g0"
    with new.enter():
        assert charged_path() == "new"
        block = bytes(1_000)
    assert new.statistics().peak_live_bytes < 1_000_000  # its own
    assert new.live_bytes == sys.getsizeof(block)
    refused(lambda: registry.register("another"), "all 126 are in use")

    registry.unregister("g125")
    last = registry.register("last")
    assert last._index == groups[125]._index


@in_new_process()
def test_groups_come_and_go() -> None:
    allocator.install()
    kept = dict.fromkeys(range(50))
    for turn in range(2_000):
        group = registry.register(f"connection.n{turn}")
        with group.enter():
            kept[turn % 50] = bytes(1_000 + turn)
        assert group.live_objects == 1
        assert group.live_bytes == sys.getsizeof(kept[turn % 50])
        registry.unregister(group.path)
    assert len(registry) == 1


# --- groups and scopes ----------------------------------------------------------------------


def test_groups_and_scopes_cannot_be_copied(group: AllocationGroup) -> None:
    for thing in (group, group.enter()):
        for copied in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError):
                copied(thing)


def test_scopes_nest(group: AllocationGroup, other: AllocationGroup) -> None:
    assert charged_path() == "root"
    with group.enter() as entered:
        assert entered is group
        assert charged_path() == "tests.mine"
        with other.enter():
            assert charged_path() == "tests.other"
            with group.enter(), group.enter():
                assert charged_path() == "tests.mine"
            with registry.root.enter():
                assert charged_path() == "root"
            assert charged_path() == "tests.other"
        assert charged_path() == "tests.mine"
        with pytest.raises(ZeroDivisionError), other.enter():
            raise ZeroDivisionError
        assert charged_path() == "tests.mine"
    assert charged_path() == "root"
    assert current_group() is registry.root


def test_a_scope_is_entered_once_at_a_time(group: AllocationGroup) -> None:
    scope = group.enter()
    assert scope.group is group
    refused(scope.__exit__, "the scope of group 'tests.mine' is not entered")
    with scope:
        refused(scope.__enter__, "the scope of group 'tests.mine' is entered already")
        assert charged_path() == "tests.mine"
    assert charged_path() == "root"
    refused(scope.__exit__, "the scope of group 'tests.mine' is not entered")
    assert charged_path() == "root"
    with scope:
        assert charged_path() == "tests.mine"
    assert charged_path() == "root"


def test_scopes_left_out_of_order(group: AllocationGroup, other: AllocationGroup) -> None:
    outer, inner = group.enter(), other.enter()
    outer.__enter__()
    inner.__enter__()
    refused(outer.__exit__, "group 'tests.mine' is left where another is current")
    assert charged_path() == "tests.other"
    outer.__exit__(KeyError, KeyError(), None)  # does not hide what is being raised
    assert charged_path() == "tests.other"
    inner.__exit__()
    assert charged_path() == "tests.mine"
    outer.__exit__()
    assert charged_path() == "root"


def test_a_scope_left_in_another_context(group: AllocationGroup, other: AllocationGroup) -> None:
    scope = group.enter()
    outside = copy_context()
    scope.__enter__()
    inside = copy_context()
    for context, path in ((outside, "root"), (inside, "tests.mine")):
        context.run(refused, scope.__exit__, "in the task that has entered them")
        assert context.run(charged_path) == path
    assert charged_path() == "tests.mine"
    scope.__exit__()
    assert charged_path() == "root"


async def test_a_scope_left_in_another_task(group: AllocationGroup) -> None:
    scope = group.enter()

    async def leave(path: str) -> None:
        refused(scope.__exit__, "in the task that has entered them")
        assert charged_path() == path

    async with anyio.create_task_group() as before:
        scope.__enter__()
        before.start_soon(leave, "tests.mine")
        await anyio.wait_all_tasks_blocked()
        assert charged_path() == "tests.mine"
        thread = threading.Thread(target=refused, args=(scope.__exit__, "in the task"))
        thread.start()
        thread.join()
    assert charged_path() == "tests.mine"
    scope.__exit__()
    assert charged_path() == "root"


def test_scopes_take_groups_alone(group: AllocationGroup) -> None:
    for arguments in ((), ("tests.mine",), (group, group)):
        with pytest.raises(TypeError):
            AllocationScope(*arguments)
    with pytest.raises(TypeError):
        AllocationGroup(5)  # type: ignore[arg-type]


def test_a_scope_keeps_the_pending_exception(group: AllocationGroup) -> None:
    def fail(depth: int) -> None:
        with group.enter():
            fail(depth + 1)

    with pytest.raises(RecursionError):
        fail(0)
    assert charged_path() == "root"


def test_functions_are_decorated(group: AllocationGroup) -> None:
    @group.enter()
    def build(n: int, *, factor: int = 1) -> tuple[str, bytes]:
        """Build it."""
        return charged_path(), bytes(n * factor)

    assert (build.__name__, build.__doc__) == ("build", "Build it.")
    path, block = build(1_000, factor=100)
    assert path == "tests.mine"
    assert group.live_bytes >= BLOCK
    assert build(5) == ("tests.mine", bytes(5))
    assert charged_path() == "root"
    del block
    assert group.live_bytes < BLOCK

    @group.enter()
    def recursive(depth: int) -> int:
        assert charged_path() == "tests.mine"
        return recursive(depth - 1) + 1 if depth else 1 // depth

    with pytest.raises(ZeroDivisionError):
        recursive(3)
    assert charged_path() == "root"
    registry.unregister("tests.mine")
    refused(lambda: build(1), "not registered any more")


async def test_coroutine_functions_are_decorated(
    group: AllocationGroup, other: AllocationGroup
) -> None:
    @group.enter()
    async def build(n: int) -> bytes:
        assert charged_path() == "tests.mine"
        await anyio.lowlevel.checkpoint()
        assert charged_path() == "tests.mine"
        return bytes(n)

    coroutine = build(100_000)
    assert group.live_bytes == 0  # it has not begun
    with other.enter():
        block = await coroutine
        assert charged_path() == "tests.other"
    assert group.live_bytes >= BLOCK
    del block
    async with anyio.create_task_group() as tasks:  # the same function in several tasks
        for _ in range(5):
            tasks.start_soon(build, 1)
    assert charged_path() == "root"


def test_generator_functions_are_not_decorated(group: AllocationGroup) -> None:
    def items() -> Iterator[int]:
        yield 1

    async def items_async() -> AsyncIterator[int]:
        yield 1

    for function in (items, items_async):
        with pytest.raises(TypeError, match="is a generator: its caller would"):
            group.enter()(function)


async def test_tracking_an_awaitable(group: AllocationGroup) -> None:
    async def build(error: BaseException | None = None) -> bytes:
        await anyio.lowlevel.checkpoint()
        assert charged_path() == "tests.mine"
        if error is not None:
            raise error
        return bytes(100_000)

    tracked = group.track(build())
    assert charged_path() == "root"
    block = await tracked
    assert charged_path() == "root"
    assert group.live_bytes >= BLOCK
    del block
    with pytest.raises(KeyError, match="mine"):
        await group.track(build(KeyError("mine")))
    assert charged_path() == "root"

    with anyio.move_on_after(0.01) as cancelled:
        await group.track(anyio.sleep_forever())
    assert cancelled.cancelled_caught
    assert charged_path() == "root"
    registry.unregister("tests.mine")
    unstarted = build()
    with pytest.raises(TrackingError, match="not registered any more"):
        await group.track(unstarted)
    unstarted.close()


@pytest.mark.parametrize("anyio_backend", ["asyncio", "asyncio+uvloop"], indirect=True)
async def test_tracking_a_task_that_runs(group: AllocationGroup, other: AllocationGroup) -> None:
    async def build() -> str:
        await asyncio.sleep(0)
        return charged_path()

    with other.enter():
        task = asyncio.create_task(build())
    assert await group.track(task) == "tests.other"
    task = asyncio.create_task(asyncio.sleep(60, ""))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(group.track(task), 0.01)
    assert task.cancelled()


# --- statistics -----------------------------------------------------------------------------


def test_delta_and_merge() -> None:
    first = AllocationStatsSnapshot(allocated_bytes=100, allocated_objects=3, peak_live_bytes=80)
    second = AllocationStatsSnapshot(
        allocated_bytes=150,
        allocated_objects=5,
        deallocated_bytes=120,
        deallocated_objects=4,
        peak_live_bytes=90,
    )
    assert (second.live_bytes, second.live_objects) == (30, 1)
    grown = second.delta(first)
    assert grown == AllocationStatsSnapshot(
        allocated_bytes=50,
        allocated_objects=2,
        deallocated_bytes=120,
        deallocated_objects=4,
        peak_live_bytes=90,
    )
    assert (grown.live_bytes, grown.live_objects) == (-70, -2)
    assert second.merge(first) == AllocationStatsSnapshot(
        allocated_bytes=250,
        allocated_objects=8,
        deallocated_bytes=120,
        deallocated_objects=4,
        peak_live_bytes=170,
    )
    nothing = AllocationStatsSnapshot()
    assert second.merge(nothing) == second.delta(nothing) == second


def test_a_snapshot_stays_as_it_is(group: AllocationGroup) -> None:
    counted = group.statistics()
    group.charge(7)
    assert counted.live_bytes == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        counted.allocated_bytes = 1  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(group.statistics())) == group.statistics()
    assert {counted: 1}[AllocationStatsSnapshot()] == 1
    group.discharge(7)


def test_the_peak_stays(group: AllocationGroup) -> None:
    with group.enter():
        block = bytes(100_000)
        del block
        bytes(50_000)
    assert group.statistics().peak_live_bytes == BLOCK
    group.charge(2 * BLOCK)
    group.discharge(2 * BLOCK)
    assert group.live_bytes == 0
    assert group.statistics().peak_live_bytes == 2 * BLOCK


# --- charges --------------------------------------------------------------------------------


def test_charging(group: AllocationGroup, other: AllocationGroup) -> None:
    group.charge(1_000)
    group.charge(0)
    other.charge(10)
    assert (group.live_bytes, group.live_objects) == (1_000, 0)
    group.discharge(400)
    assert group.live_bytes == 600
    with group.enter():
        block = bytes(100_000)
    refused(lambda: group.discharge(601), "601 bytes cannot be .* 'tests.mine': only 600 are")
    for call in (group.charge, group.discharge):
        with pytest.raises(ValueError, match="nbytes is -1; it cannot be negative"):
            call(-1)
        with pytest.raises(OverflowError):
            call(1 << 63)
        with pytest.raises(TypeError):
            call(1.5)  # type: ignore[arg-type]
    assert group.live_bytes == 600 + BLOCK
    del block
    group.discharge(600)
    other.discharge(10)
    assert group.statistics() == AllocationStatsSnapshot(
        allocated_bytes=1_000 + BLOCK,
        allocated_objects=1,
        deallocated_bytes=1_000 + BLOCK,
        deallocated_objects=1,
        peak_live_bytes=600 + BLOCK,
    )


def test_charges_while_counting_is_off(group: AllocationGroup) -> None:
    group.charge(5)
    allocator.disable()
    group.charge(2)
    group.discharge(6)
    assert group.live_bytes == 1
    group.discharge(1)


def test_charging_from_threads(group: AllocationGroup) -> None:
    def work() -> None:
        for _ in range(2_000):
            group.charge(3)
            group.discharge(2)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert group.live_bytes == 8_000
    group.discharge(8_000)


CHARGER = """
#include "membound_tracker.h"

static membound_tracker_api *tracker;

static PyObject *
current(PyObject *module, PyObject *unused)
{
    return PyLong_FromUnsignedLongLong(tracker->current());
}

/* change(group, nbytes): charges without the GIL, or discharges if nbytes is negative. */
static PyObject *
change(PyObject *module, PyObject *args)
{
    unsigned long long group;
    long long n;
    int failed;
    if (!PyArg_ParseTuple(args, "KL", &group, &n))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    failed = n < 0 ? tracker->discharge(group, -n) : tracker->charge(group, n);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(failed);
}

static PyMethodDef methods[] = {
    {"current", current, METH_NOARGS}, {"change", change, METH_VARARGS}, {NULL},
};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "charger", .m_size = -1, .m_methods = methods,
};

PyMODINIT_FUNC
PyInit_charger(void)
{
    tracker = membound_tracker_import();
    return tracker == NULL ? NULL : PyModule_Create(&definition);
}
"""


@pytest.fixture(scope="module")
def charger_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A module that charges from C, built against the header."""
    need_tracker()
    compiler = shutil.which("cc") or shutil.which("gcc")
    include = sysconfig.get_path("include")
    if compiler is None or not Path(include, "Python.h").exists():
        pytest.skip(f"nothing to compile with: cc is {compiler}, Python.h wanted in {include}")
    source = tmp_path_factory.mktemp("charger") / "charger.c"
    source.write_text(CHARGER)
    built = source.with_suffix(".so")
    flags = ["-shared", "-fPIC", "-std=c99", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"]
    flags += ["-Wno-missing-field-initializers", f"-I{include}", f"-I{allocator.get_include()}"]
    subprocess.run([compiler, *flags, "-o", built, source], check=True)
    return built


def load(built: Path) -> Any:
    spec = importlib.util.spec_from_file_location("charger", built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_charging_from_c(charger_path: Path, group: AllocationGroup) -> None:
    charger = load(charger_path)
    with group.enter():
        mine = charger.current()
    assert charger.current() != mine
    mine = int(str(mine))  # which was its own first object
    assert charger.change(mine, 1_000) == 0
    assert (group.live_bytes, group.live_objects) == (1_000, 0)
    assert charger.change(mine, -1_001) == -1
    assert charger.change(mine, -400) == 0
    group.discharge(100)
    assert group.live_bytes == 500
    assert charger.change(mine, -500) == 0
    assert group.statistics().live_objects == 0
    for nobody in (0, 126, 1 << 32, mine + (1 << 32), 70_000, (1 << 64) - 1):
        assert charger.change(nobody, 1) == -1
        assert charger.change(nobody, -1) == -1
    root = registry.root.live_bytes
    assert charger.change(charger.current(), 1 << 30) == 0
    assert registry.root.live_bytes >= root + (1 << 29)
    assert charger.change(charger.current(), -(1 << 30)) == 0


def test_a_handle_of_c_ends_with_its_group(charger_path: Path) -> None:
    program = f"""
import sys
sys.path.append({str(Path(__file__).parents[1])!r})
from pathlib import Path
from tests.test_allocator import handle_ends
handle_ends(Path({str(charger_path)!r}))
"""
    subprocess.run([sys.executable, "-P", "-c", program], check=True, timeout=120)


def handle_ends(built: Path) -> None:
    charger = load(built)
    groups = [registry.register(f"g{i}") for i in range(126)]
    with groups[0].enter():
        old = charger.current()
    charger.change(old, 10)
    registry.unregister("g0")
    refused(lambda: registry.register("new"), "all 126 are in use")
    assert charger.change(old, -10) == 0
    new = registry.register("new")
    assert new._index == groups[0]._index
    assert charger.change(old, 10) == charger.change(old, -10) == -1
    assert new.statistics() == AllocationStatsSnapshot()


def test_without_the_tracker_c_gets_an_error(charger_path: Path) -> None:
    program = f"""
import sys
sys.path.append({str(Path(__file__).parents[1])!r})
sys.modules["membound_async.allocator._tracker"] = None
from pathlib import Path
from tests.test_allocator import load
try:
    load(Path({str(charger_path)!r}))
except ImportError:
    sys.exit(42)
"""
    ended = subprocess.run([sys.executable, "-P", "-c", program], check=False, timeout=120)
    assert ended.returncode == 42


def test_errors_of_tracking_are_of_the_package() -> None:
    assert issubclass(TrackingUnavailable, TrackingError)
    assert issubclass(TrackingError, MemboundError)
    again = pickle.loads(pickle.dumps(TrackingUnavailable("no compiler")))
    assert again.reason == "no compiler"
    assert "no compiler" in str(again)


@in_new_process()
def test_pages_of_the_heap_are_used_again_and_given_back() -> None:
    allocator.install()

    def heap_bytes() -> int:
        return allocator.hooks._state()["heap_bytes"]

    before = heap_bytes()
    blocks = [bytes(200 + i % 8) for i in range(100_000)]
    full = heap_bytes()
    assert full - before == pytest.approx(100_000 * 240, rel=0.05)
    del blocks[::2]  # each page was full, and has room again
    more = [bytes(200) for _ in range(50_000)]
    assert heap_bytes() - full < 1 << 20
    del blocks, more
    assert heap_bytes() == pytest.approx(full, rel=0.1)  # empty pages are kept for a while
    assert full - before == pytest.approx(allocator.trim(), rel=0.2)
    assert heap_bytes() - before < 3 << 20
    assert allocator.trim() == 0
    blocks = [bytes(200) for _ in range(100_000)]  # also of pages that the system had again
    assert heap_bytes() == pytest.approx(full, rel=0.05)
    del blocks
