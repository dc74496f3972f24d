"""The fixtures and markers for pytest, as a project of somebody else sees them."""

import pytest

pytest_plugins = ["pytester"]


@pytest.fixture
def project(pytester):
    """Give a project that has asked for the plugin."""
    pytester.makeconftest('pytest_plugins = ["membound_async.pytest_plugin"]')
    return pytester


def run(project, program: str, *arguments: str, **outcomes: int) -> pytest.RunResult:
    project.makepyfile(program)
    ended: pytest.RunResult = project.runpytest("--strict-markers", "-v", *arguments)
    ended.assert_outcomes(**outcomes)
    return ended


def test_nobody_gets_it_unasked(pytester):
    ended = run(pytester, "def test_it(memory_limiter): pass", errors=1)
    ended.stdout.fnmatch_lines(["*fixture 'memory_limiter' not found"])


def test_a_limiter_that_code_finds_by_itself(project):
    run(
        project,
        """
        import pytest
        from membound_async import current_limiter, grant

        @pytest.mark.anyio
        async def test_async(memory_limiter, memory_probe):
            assert current_limiter() is memory_limiter
            async with grant("32MiB"):
                assert memory_limiter.statistics().free_bytes == 32 * 2**20
            memory_probe.set(5)
            assert memory_limiter.statistics().measured_bytes == 5

        def test_sync(memory_limiter):
            assert current_limiter() is memory_limiter
            assert memory_limiter.limit.limit_bytes == 64 * 2**20

        def test_none():
            assert current_limiter().is_noop
        """,
        passed=4,
    )


def test_the_mark_says_which_limiter(project):
    run(
        project,
        """
        import pytest
        from membound_async.testing import FakeMemory

        pytestmark = pytest.mark.memory_limit("1MiB")

        def test_of_the_module(memory_limiter):
            assert memory_limiter.limit.limit_bytes == 2**20

        @pytest.mark.memory_limit("10MiB", share=1, probe=FakeMemory(per_granted=3))
        def test_of_the_test(memory_limiter, memory_probe):
            with memory_limiter.grant("10MiB"):
                assert memory_probe.read() == 30 * 2**20
        """,
        passed=2,
    )


def test_grants_that_are_out_fail_the_test(project):
    ended = run(
        project,
        """
        import pytest
        from membound_async import grant_nowait

        kept = []

        def test_kept(memory_limiter):
            kept.append(memory_limiter.component("cache").grant_nowait("3MiB"))

        @pytest.mark.filterwarnings("ignore::ResourceWarning")
        def test_dropped(memory_limiter):
            grant_nowait("2MiB")

        def test_released(memory_limiter):
            grant_nowait("2MiB").release()
            kept.pop().release()
        """,
        passed=3,
        errors=2,
    )
    ended.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_kept*",
            "grants that were never released: 'cache' 3.0 MiB for *",
            "*ERROR at teardown of test_dropped*",
            "grants that were never released: 'root' 2.0 MiB, dropped without release",
        ]
    )


def test_virtual_time_for_tests_that_are_marked(project):
    ended = run(
        project,
        """
        import time
        import anyio
        import pytest

        pytestmark = pytest.mark.anyio

        async def sleep():
            began = time.monotonic()
            await anyio.sleep(3600)
            assert anyio.current_time() == 3600
            assert time.monotonic() - began < 60

        @pytest.mark.virtual_time
        async def test_asyncio(memory_limiter):
            async with memory_limiter.grant("1MiB"):
                await sleep()

        @pytest.mark.virtual_time("trio", "asyncio")
        @pytest.mark.parametrize("number", [1, 2])
        async def test_both(number):
            await sleep()

        async def test_neither():
            assert anyio.current_time() > 0
            await anyio.sleep(0)
        """,
        passed=7,
    )
    for name in ("asyncio[asyncio]", "both[*trio*]", "both[*asyncio*]", "neither[*trio*]"):
        ended.stdout.fnmatch_lines([f"*::test_{name.replace('[', '[[]')} PASSED*"])


def test_virtual_time_is_for_tests_of_anyios_plugin(project):
    ended = run(
        project,
        """
        import pytest

        @pytest.mark.virtual_time
        def test_sync():
            pass
        """,
        errors=1,
    )
    ended.stdout.fnmatch_lines(["*test_sync: virtual_time is for tests that anyio's plugin runs*"])


def test_its_markers_are_told(project):
    ended = project.runpytest("--markers")
    ended.stdout.fnmatch_lines(["@pytest.mark.memory_limit*", "@pytest.mark.virtual_time*"])
