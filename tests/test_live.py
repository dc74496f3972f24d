"""What components really have allocated, as the limiter sees it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import pytest
import structlog.testing

from membound_async import Component, MemoryLimiter, QuotaExceeded, allocator
from membound_async.testing import ScriptedProbe
from membound_async.testing import limiter as make_limiter
from tests.tracking import in_new_process, need_tracker

MIB = 1 << 20


@pytest.fixture(autouse=True)
def tracked() -> Iterator[None]:
    need_tracker()
    allocator.install()
    yield
    for group in allocator.registry:
        if group.path != "root":
            allocator.registry.unregister(group.path)
    allocator.disable()


async def test_code_of_a_component_is_charged_to_it():
    limiter = make_limiter(100 * MIB)
    async with limiter, limiter.component("ingest.decode") as decode:
        assert allocator.current_group().path == "ingest.decode"
        kept = [bytes(MIB)]
        assert decode.statistics().live_bytes == 0  # as of the last reading
        limiter.statistics()
        assert MIB < decode.statistics().live_bytes < MIB + MIB // 5
        kept.clear()
    assert allocator.current_group().path == "root"
    limiter.statistics()
    assert decode.statistics().live_bytes < MIB // 5
    assert decode.statistics().peak_live_bytes > MIB


async def test_live_bytes_shrink_what_is_free_as_grants_do():
    limiter = make_limiter(100 * MIB)
    async with limiter:
        sink, decode = limiter.component("sink"), limiter.component("decode")
        async with decode, decode.grant(4 * MIB):
            before = limiter.statistics()
            kept = bytearray(20 * MIB)
            after = limiter.statistics()
            assert before.free_bytes - after.free_bytes == pytest.approx(16 * MIB, abs=MIB // 10)
            assert decode.statistics().overdraft_bytes == pytest.approx(16 * MIB, abs=MIB // 10)
        with pytest.raises(QuotaExceeded):  # half of the 80 MiB that are left
            sink.grant_nowait(41 * MIB)
        sink.grant_nowait(39 * MIB).release()
        del kept
        limiter.statistics()
        sink.grant_nowait(41 * MIB).release()


async def test_what_is_live_is_no_drift():
    probe = ScriptedProbe(10 * MIB)
    limiter = MemoryLimiter(100 * MIB, slop_factor=0, probe=probe)
    async with limiter, limiter.component("decode"):
        kept = bytearray(20 * MIB)
        probe.set(35 * MIB)
        numbers = limiter.statistics()
        assert numbers.drift_bytes == pytest.approx(5 * MIB, abs=MIB // 10)
        assert numbers.free_bytes == pytest.approx(65 * MIB, abs=MIB // 10)
        del kept


async def test_what_was_live_before_the_limiter_is_in_its_baseline():
    with allocator.registry.register("decode").enter():
        kept = bytearray(20 * MIB)
    async with make_limiter(100 * MIB) as limiter, limiter.component("decode") as decode:
        more = bytearray(MIB)
        limiter.statistics()
        assert decode.statistics().live_bytes == pytest.approx(MIB, abs=MIB // 5)
        assert decode.statistics().peak_live_bytes == pytest.approx(MIB, abs=MIB // 5)
        del more
    del kept


async def test_a_peak_from_before_the_limiter_is_not_its_own():
    with allocator.registry.register("decode").enter():
        kept = bytearray(20 * MIB)
        del kept
    async with make_limiter(100 * MIB) as limiter, limiter.component("decode") as decode:
        kept = bytearray(MIB)
        limiter.statistics()
        del kept
        assert decode.statistics().peak_live_bytes == pytest.approx(MIB, abs=MIB // 5)


async def test_an_overdraft_is_logged_once():
    limiter = make_limiter(100 * MIB)
    with structlog.testing.capture_logs() as logs:
        async with limiter, limiter.component("decode", minimum=MIB) as decode:
            for _ in range(3):
                kept = bytearray(5 * MIB)
                limiter.statistics()
                del kept
                limiter.statistics()
            assert decode.statistics().overdraft_bytes == 0
    assert decode.statistics().peak_overdraft_bytes == pytest.approx(4 * MIB, abs=MIB // 10)
    (event,) = [one for one in logs if one["event"] == "membound.overdraft"]
    assert event["component"] == "decode"
    assert event["live_bytes"] == pytest.approx(5 * MIB, abs=MIB // 10)
    assert (event["granted_bytes"], event["minimum_bytes"]) == (0, MIB)


async def test_a_component_without_a_limiter_is_tracked_too():
    async with Component("alone") as alone:
        assert allocator.current_group().path == "alone"
        assert alone.path == "alone"


async def test_one_that_is_inside_another_charges_its_own_group():
    async with make_limiter(MIB) as limiter, limiter.component("a"):
        async with limiter.component("b"):
            async with limiter.component("a"):
                assert allocator.current_group().path == "a"
            assert allocator.current_group().path == "b"
        assert allocator.current_group().path == "a"


async def test_tasks_and_threads_started_inside_belong_to_it():
    seen: list[str] = []

    async def look() -> None:
        seen.append(allocator.current_group().path)
        seen.append(await anyio.to_thread.run_sync(lambda: allocator.current_group().path))

    async with (
        make_limiter(MIB) as limiter,
        limiter.component("a"),
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(look)
    assert seen == ["a", "a"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_left_in_another_task_than_it_was_entered_in():
    async with AsyncExitStack() as stack:
        component = await stack.enter_async_context(Component("a"))
        await asyncio.create_task(component.__aexit__(None, None, None))
        assert allocator.current_group().path == "a"
        stack.pop_all()


@in_new_process()
def test_more_components_than_groups_are_not_tracked():
    allocator.install()

    async def main() -> None:
        async with make_limiter(MIB) as limiter:
            with structlog.testing.capture_logs() as logs:
                for number in [*range(130), 129]:
                    async with limiter.component(f"c{number}"):
                        path = allocator.current_group().path
                        assert path == (f"c{number}" if number < 126 else "root")
            refused = [one for one in logs if one["event"] == "membound.not_tracked"]
            assert [one["component"] for one in refused] == ["c126", "c127", "c128", "c129"]
            assert "all 126 are in use" in refused[0]["reason"]
            assert limiter.statistics().tracking == "on"

    asyncio.run(main())


@in_new_process()
def test_nothing_counts_any_more_once_the_hooks_are_gone():
    tracemalloc.start()
    allocator.install()

    async def main() -> None:
        async with make_limiter(100 * MIB) as limiter, limiter.component("a") as component:
            kept = bytearray(MIB // 2)
            limiter.statistics()
            assert component.statistics().live_bytes > MIB // 2
            tracemalloc.stop()
            limiter._live._look_at = 0  # it looks once a second
            with structlog.testing.capture_logs() as logs:
                numbers = limiter.statistics()
                limiter.statistics()
            assert numbers.tracking == "displaced"
            assert component.statistics().live_bytes == 0
            assert [one["event"] for one in logs] == ["membound.tracking_displaced"]
            del kept

    asyncio.run(main())


@in_new_process(MEMBOUND_EXTENSION="no")
def test_without_the_extension():
    async def main() -> None:
        async with make_limiter(MIB) as limiter, limiter.component("a") as component:
            numbers = limiter.statistics()
            assert (numbers.tracking, component.statistics().live_bytes) == ("unavailable", 0)

    asyncio.run(main())


@in_new_process()
def test_not_installed():
    async def main() -> None:
        async with make_limiter(MIB) as limiter, limiter.component("a") as component:
            numbers = limiter.statistics()
            assert (numbers.tracking, component.statistics().live_bytes) == ("off", 0)
            assert allocator.registry.get("a") is None

    asyncio.run(main())


PROGRAM = """
import asyncio
from membound_async import Component, allocator, current_limiter
print(current_limiter().statistics().tracking)

async def main():
    async with Component("decode") as decode, decode.grant("1MiB"):
        kept = bytearray(3 << 20)
        current_limiter().statistics()
asyncio.run(main())
"""


def run(tmp_path: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "membound_async.cli", "run", "--limit", "1GiB", *options]
    return subprocess.run(
        [*command, str(program)],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | variables,
    )


def test_membound_run_tracks_and_reports(tmp_path: Path):
    ended = run(tmp_path)
    assert ended.stdout == "on\n"
    title, row = [
        line.split() for line in ended.stderr.splitlines() if line.startswith(("comp", "decode"))
    ]
    assert title == ["component", "peak", "grants", "allocated", "overdraft"]
    assert row[:6] == ["decode", "1.0", "MiB", "1", "3.0", "MiB"]
    (component,) = [
        one
        for one in json.loads(run(tmp_path, "--report", "json").stderr.splitlines()[-1])["limiter"][
            "components"
        ]
        if one["path"] == "decode"
    ]
    assert component["peak_live_bytes"] == pytest.approx(3 * MIB, abs=MIB // 10)
    assert component["peak_overdraft_bytes"] == pytest.approx(2 * MIB, abs=MIB // 10)


def test_membound_run_without_tracking(tmp_path: Path):
    for ended in (run(tmp_path, "--no-track"), run(tmp_path, MEMBOUND_TRACK="0")):
        assert ended.stdout == "off\n"
        assert "allocated" not in ended.stderr
    assert run(tmp_path, MEMBOUND_EXTENSION="no").stdout == "unavailable\n"


def test_membound_run_with_as_many_groups_as_one_wants(tmp_path: Path):
    program = tmp_path / "groups.py"
    program.write_text("from membound_async import allocator; allocator.install(groups=65535)")
    command = [sys.executable, "-m", "membound_async.cli", "run", "--limit", "1GiB", str(program)]
    for groups, code in (("65535", 0), ("126", 1), ("7", 2)):
        environment = os.environ | {"MEMBOUND_TRACK_GROUPS": groups}
        ended = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=60, env=environment
        )
        assert ended.returncode == code, ended.stderr


def test_membound_run_does_not_track_by_itself_where_what_is_mapped_is_limited(tmp_path: Path):
    program = tmp_path / "state.py"
    program.write_text(
        "from membound_async import current_limiter as c; print(c().statistics().tracking)"
    )
    command = f"ulimit -d 200000; exec {sys.executable} -m membound_async.cli run"
    for options, state in (("", "off"), ("--track", "on")):
        ended = subprocess.run(
            ["bash", "-c", f"{command} {options} {program}"],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ended.stdout == state + "\n"


async def test_a_group_is_there_again_after_others_went():
    need_tracker()
    allocator.registry.register("a").charge(100)
    limiter = make_limiter(100 * MIB)  # 100 bytes of "a" are in its baseline
    allocator.registry.register("a").discharge(100)
    allocator.registry.unregister("a")
    async with limiter, limiter.component("a") as component:
        kept = bytearray(MIB)
        live = limiter.statistics().components[0].live_bytes
        group = allocator.registry.get("a")
        assert group is not None
        assert live == pytest.approx(group.live_bytes, abs=2000)
        assert component.statistics().live_bytes >= MIB
        del kept


async def test_the_first_use_of_anyio_is_not_the_component_s():
    async with make_limiter(100 * MIB) as limiter, limiter.component("a") as component:
        async with component.grant(100):
            pass
        limiter.statistics()
        assert component.statistics().peak_live_bytes < 100_000


def test_membound_run_says_that_it_cannot_track(tmp_path: Path):
    with pytest.raises(subprocess.CalledProcessError) as ended:
        run(tmp_path, "--track", MEMBOUND_EXTENSION="no")
    assert ended.value.returncode == 2
    assert ended.value.stderr.startswith("membound: allocations cannot be tracked")
