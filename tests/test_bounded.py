"""Watching pipelines: what they would use, where it is too much, and how they end."""

import asyncio
import pickle
import threading

import anyio
import anyio.to_thread
import pytest

from membound_async import (
    GrantDeadlock,
    GrantTooLarge,
    LimiterSettings,
    MemoryLimiter,
    ResourceLimits,
    allocator,
    current_limiter,
    grant,
    grant_nowait,
    testing,
)
from membound_async.testing import (
    BoundedReport,
    FakeMemory,
    NotBounded,
    ScriptedProbe,
    assert_bounded,
    watch_bounded,
)
from tests.tracking import in_new_process

MIB = 2**20

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(params=["asyncio", "trio"])
def backend(request):
    return request.param


async def hold(nbytes, seconds=1.0, path="decode"):
    async with current_limiter().component(path).grant(nbytes):
        await anyio.sleep(seconds)


async def hold_many(count, nbytes, seconds=1.0):
    async with anyio.create_task_group() as tasks:
        for _ in range(count):
            tasks.start_soon(hold, nbytes, seconds)


def failure_of(pipeline, *args, **how) -> NotBounded:
    with pytest.raises(NotBounded) as raised:
        assert_bounded(pipeline, *args, **how)
    return raised.value


class TestBounded:
    def test_says_what_was_used(self, backend):
        report = assert_bounded(hold_many, 6, 10 * MIB, limit="64MiB", backend=backend)
        assert report.limit_bytes == 64 * MIB
        assert report.peak.in_use_bytes == 30 * MIB
        assert [one.size_bytes for one in report.peak_grants] == [10 * MIB] * 3
        assert (report.finished, report.exceeded, report.held) == (True, None, ())
        assert report.seconds == pytest.approx(2)
        assert report.waited_seconds == pytest.approx(3)  # three of them, for a second
        (decode,) = report.components
        assert (decode.path, decode.admissions, decode.beyond_grants_bytes) == ("decode", 6, 0)

    def test_all_there_is_may_be_used(self, backend):
        report = assert_bounded(hold, 10 * MIB, limit="10MiB", share=1, backend=backend)
        assert (report.peak.in_use_bytes, report.exceeded) == (10 * MIB, None)

    def test_takes_what_a_limiter_takes(self, backend):
        settings = LimiterSettings(reclaim=False)
        report = assert_bounded(
            hold, MIB, limit="10MiB", share=1, settings=settings, backend=backend
        )
        assert report.delayed_seconds == 0
        assert report.seconds == pytest.approx(1)

    def test_time_delayed_under_pressure_is_counted(self, backend):
        report = assert_bounded(
            hold,
            "10KiB",
            limit="100MiB",
            slop_factor=0.5,
            baseline="1MiB",
            memory=FakeMemory(others="49MiB", per_granted=0),
            settings=LimiterSettings(reclaim=False),
            backend=backend,
        )
        assert report.delayed_seconds == pytest.approx(0.0154)
        assert "delayed: 0.02 s" in str(report)

    def test_what_is_granted_and_given_back_at_once_is_seen(self, backend):
        async def pipeline():
            async with grant(5 * MIB):
                pass

        report = assert_bounded(pipeline, limit="64MiB", backend=backend)
        assert report.peak.in_use_bytes == 5 * MIB
        assert [one.size_bytes for one in report.peak_grants] == [5 * MIB]

    def test_an_event_loop_that_runs_is_refused(self):
        async def main():
            with pytest.raises(RuntimeError, match="async with watch_bounded"):
                assert_bounded(hold, MIB, limit="10MiB")

        asyncio.run(main())

    def test_a_function_that_is_not_async_is_refused(self, backend):
        with pytest.raises(TypeError, match="is no async function: it gave 3"):
            assert_bounded(lambda: 3, limit="10MiB", backend=backend)  # type: ignore[arg-type,return-value]

    def test_a_backend_that_there_is_not_is_refused(self):
        with pytest.raises(ValueError, match="curio"):
            assert_bounded(hold, MIB, limit="10MiB", backend="curio")  # type: ignore[arg-type]

    def test_a_pipeline_that_asks_for_nothing_shows_nothing(self, backend):
        failure = failure_of(anyio.sleep, 1, limit="64MiB", backend=backend)
        (problem,) = failure.problems
        assert problem.startswith("nothing was asked of this limiter")
        assert "nothing was in use at any time" in str(failure)


class TestExceeding:
    def test_more_than_was_granted_is_in_use(self, backend):
        memory = FakeMemory(per_granted={"decode": 3}, others="8MiB")

        async def pipeline():
            await anyio.sleep(2)
            await hold(25 * MIB)

        failure = failure_of(pipeline, limit="64MiB", memory=memory, backend=backend)
        assert (failure.limit_bytes, failure.peak_bytes) == (64 * MIB, 83 * MIB)
        assert failure.peak_at_seconds == pytest.approx(2, abs=0.01)
        exceeded = failure.report.exceeded
        assert exceeded is not None
        assert exceeded.in_use_bytes == 83 * MIB
        (decode,) = failure.report.peak.components
        assert (decode.granted_bytes, decode.in_use_bytes) == (25 * MIB, 75 * MIB)
        assert [one.size_bytes for one in failure.report.peak_grants] == [25 * MIB]
        assert str(failure).splitlines()[:7] == [
            "not bounded by 64.0 MiB:",
            "- 83.0 MiB in use after 2.00 s, 19.0 MiB too much; above the limit since 2.00 s",
            "",
            "in use at the peak, after 2.00 s:",
            "  component   granted    in use",
            "  decode     25.0 MiB  75.0 MiB",
            "  (others)              8.0 MiB",
        ]

    def test_a_leak_is_found_when_it_is_too_much(self, backend):
        memory = FakeMemory(leak_per_second="1MiB")
        failure = failure_of(hold, MIB, 20.0, limit="10MiB", memory=memory, backend=backend)
        assert failure.report.exceeded is not None
        assert failure.report.exceeded.at_seconds == pytest.approx(9.1, abs=0.11)
        assert failure.peak_at_seconds == pytest.approx(20)  # right before it is released
        assert failure.peak_bytes == pytest.approx(21 * MIB, rel=0.001)

    def test_a_burst_of_others_is_found_while_nothing_happens(self, backend):
        memory = FakeMemory(others=lambda seconds: 60 * MIB if 3 < seconds < 3.5 else 0)
        failure = failure_of(hold, 9 * MIB, 10.0, limit="64MiB", memory=memory, backend=backend)
        assert failure.peak_bytes == 69 * MIB

    def test_what_is_allocated_is_found_at_once(self, backend):
        memory = FakeMemory()

        async def pipeline():
            async with grant(MIB):
                with memory.allocate("10MiB"):
                    pass

        failure = failure_of(pipeline, limit="8MiB", memory=memory, backend=backend)
        assert failure.peak_bytes == 11 * MIB

    def test_what_is_beyond_grants_may_be_bounded_by_itself(self, backend):
        memory = FakeMemory()

        async def pipeline():
            async with grant(MIB):
                await anyio.sleep(3)
                memory.allocate("9MiB").free()

        how = {"limit": "64MiB", "memory": memory, "backend": backend}
        report = assert_bounded(pipeline, **how)
        (root,) = report.components
        assert root.beyond_grants_bytes == 9 * MIB
        assert root.beyond_grants_at_seconds == pytest.approx(3)
        assert_bounded(pipeline, max_beyond_grants="9MiB", **how)
        failure = failure_of(pipeline, max_beyond_grants="8MiB", **how)
        assert failure.problems == ("'root' had 9.0 MiB in use beyond its grants after 3.00 s",)

    def test_can_be_pickled(self):
        failure = failure_of(hold, MIB, limit="1MiB", memory=FakeMemory(others="9MiB"), share=1)
        again = pickle.loads(pickle.dumps(failure))
        assert (str(again), again.report) == (str(failure), failure.report)

    def test_a_function_of_the_test_that_fails_is_said(self, backend):
        def others(seconds):
            if seconds > 1:
                raise OSError("gone")
            return 0

        with pytest.raises(OSError, match="gone"):
            assert_bounded(
                hold, MIB, 5.0, limit="8MiB", memory=FakeMemory(others=others), backend=backend
            )


class TestNotReleased:
    def test_a_grant_that_is_kept(self, backend):
        kept = []

        async def pipeline():
            kept.append(grant_nowait(3 * MIB))
            await anyio.sleep(2)

        failure = failure_of(pipeline, limit="64MiB", backend=backend)
        assert failure.problems == ("never released: 'root' 3.0 MiB for 2.00 s",)
        assert [one.size_bytes for one in failure.report.held] == [3 * MIB]
        kept.clear()

    def test_a_grant_that_is_dropped(self, backend):
        async def pipeline():
            grant_nowait(3 * MIB)

        failure = failure_of(pipeline, limit="64MiB", backend=backend)
        assert failure.problems == ("dropped without release: 'root' 3.0 MiB",)


class TestHanging:
    def test_all_wait_for_one_who_waits_for_them(self, backend):
        async def pipeline():
            async with grant(20 * MIB):
                await hold_many(7, 25 * MIB)

        failure = failure_of(pipeline, limit="64MiB", backend=backend)
        assert failure.problems == ("not finished after 60.00 s: 7 requests wait for memory",)
        waiting = failure.report.waiting
        assert [(one.component, one.wanted_bytes) for one in waiting] == [("decode", 25 * MIB)] * 7
        assert [one.component for one in failure.report.held] == ["root"]
        assert (
            "  'decode' has waited 60.00 s for 25.0 MiB and lacks 6.0 MiB\n"
            "  and 2 more\n"
            "  held by 'root' 20.0 MiB for 60.00 s"
        ) in str(failure)

    def test_for_room_below_the_firm_limit(self, backend):
        async def pipeline():
            component = current_limiter().component("decode", firm_limit="5MiB")
            first = await component.grant("3MiB")
            try:
                await component.grant("3MiB")
            finally:
                first.release()

        failure = failure_of(pipeline, limit="64MiB", backend=backend, timeout=30)
        assert failure.report.seconds == pytest.approx(30)
        assert "for 3.0 MiB and lacks room below its firm limit" in str(failure)

    def test_for_another_resource(self, backend):
        async def pipeline():
            async with grant(MIB, also={"fds": 3}):
                await grant(MIB, also={"fds": 2})

        failure = failure_of(
            pipeline, limit="64MiB", resources=ResourceLimits(fds=4), share=1, backend=backend
        )
        assert failure.problems == ("not finished after 60.00 s: 1 request waits for memory",)
        assert "for 1.0 MiB and lacks 1 fds" in str(failure)

    def test_for_its_turn(self, backend):
        async def pipeline():
            async with grant(20 * MIB), anyio.create_task_group() as tasks:
                tasks.start_soon(hold, 25 * MIB)
                await anyio.sleep(1)
                tasks.start_soon(hold, MIB)

        failure = failure_of(pipeline, limit="64MiB", backend=backend)
        assert "for 1.0 MiB and lacks only its turn" in str(failure)

    def test_for_something_else(self, backend):
        async def pipeline():
            async with grant(MIB):
                await anyio.sleep_forever()

        failure = failure_of(pipeline, limit="64MiB", backend=backend)
        (problem,) = failure.problems
        assert problem.startswith("not finished after 60.00 s: it waits, but not for memory")
        assert failure.report.finished is False

    def test_one_who_takes_long_is_given_time(self, backend):
        assert_bounded(hold, MIB, 100.0, limit="8MiB", timeout=101, backend=backend)
        failure_of(hold, MIB, 100.0, limit="8MiB", timeout=99, backend=backend)

    def test_a_deadlock_is_what_the_pipeline_gets(self, backend):
        async def grow(first):
            async with grant(first) as held:
                await anyio.sleep(0.1)
                await held.grow("20MiB")

        async def pipeline():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(grow, "30MiB")
                tasks.start_soon(grow, "30MiB")

        with pytest.raises(ExceptionGroup) as raised:
            assert_bounded(pipeline, limit="64MiB", share=1, backend=backend)
        assert raised.group_contains(GrantDeadlock)


class TestErrorsOfThePipeline:
    def test_go_through(self, backend):
        with pytest.raises(GrantTooLarge) as raised:
            assert_bounded(hold, 33 * MIB, limit="64MiB", backend=backend)
        assert "nothing was asked" in "".join(getattr(raised.value, "__notes__", []))

    def test_have_a_note_of_what_else_was_found(self, backend):
        async def pipeline():
            await hold(MIB)
            raise LookupError("no such thing")

        with pytest.raises(LookupError) as raised:
            assert_bounded(
                pipeline, limit="8MiB", memory=FakeMemory(others="9MiB"), backend=backend
            )
        (note,) = raised.value.__notes__
        assert note.startswith("not bounded by 8.0 MiB:\n- 10.0 MiB in use after 0.00 s")

    def test_of_cancelling_one_that_hangs_are_the_cause(self, backend):
        async def pipeline():
            try:
                await anyio.sleep_forever()
            finally:
                raise LookupError("at its end")

        failure = failure_of(pipeline, limit="8MiB", backend=backend)
        assert isinstance(failure.__cause__, LookupError)


class TestWatching:
    async def test_in_a_test_that_is_async(self):
        limiter = testing.limiter("64MiB", probe=FakeMemory(per_granted=2))
        async with watch_bounded(limiter) as watch:
            assert watch.limiter is limiter is current_limiter()
            for _ in range(100):
                async with limiter.grant(10 * MIB):
                    pass
        assert isinstance(watch.report, BoundedReport)
        assert watch.report.peak.in_use_bytes == 20 * MIB
        (root,) = watch.report.components
        assert (root.admissions, root.beyond_grants_bytes) == (100, 10 * MIB)

    async def test_fails_at_its_end(self):
        kept = []
        limiter = testing.limiter("64MiB", probe=FakeMemory(per_granted=3))
        with pytest.raises(NotBounded) as raised:
            async with watch_bounded(limiter):
                kept.append(await limiter.grant(25 * MIB))
        assert raised.value.peak_bytes == 75 * MIB
        assert len(raised.value.problems) == 2
        kept.pop().release()

    @pytest.mark.virtual_time
    async def test_hangs_no_longer_than_it_may(self):
        limiter = testing.limiter("64MiB")
        held = await limiter.grant(20 * MIB)
        with pytest.raises(NotBounded) as raised:
            async with watch_bounded(limiter, timeout=5):
                await limiter.grant(30 * MIB)
        assert anyio.current_time() == pytest.approx(5)
        (waiting,) = raised.value.report.waiting
        assert waiting.missing == 36 * MIB
        assert raised.value.report.held == ()  # what was held before is somebody else's
        held.release()

    async def test_leaves_the_limiter_as_it_was(self):
        limiter = testing.limiter("64MiB")
        lock = limiter._lock
        async with limiter:
            async with watch_bounded(limiter) as first, limiter.grant(MIB):
                pass
            async with watch_bounded(limiter) as second, limiter.grant(2 * MIB):
                pass
            assert current_limiter() is limiter
        assert limiter._lock is lock
        (before,), (after,) = first.report.components, second.report.components
        assert (before.admissions, after.admissions) == (1, 1)
        assert [one.report.peak.in_use_bytes for one in (first, second)] == [MIB, 2 * MIB]

    async def test_any_limiter_and_any_probe(self):
        probe = ScriptedProbe(5 * MIB)
        limiter = MemoryLimiter("64MiB", probe=probe)
        async with watch_bounded(limiter) as watch, limiter.grant(MIB):
            probe.set(40 * MIB)
            limiter.statistics()
        assert watch.report.limit_bytes == 64 * MIB
        peak = watch.report.peak
        assert (peak.in_use_bytes, peak.others_bytes) == (40 * MIB, 39 * MIB)

    async def test_grants_of_threads(self):
        limiter = testing.limiter("64MiB")

        def work():
            with limiter.grant(7 * MIB):
                pass

        async with watch_bounded(limiter) as watch:
            await anyio.to_thread.run_sync(work)
        assert watch.report.peak.in_use_bytes == 7 * MIB

    async def test_messages_in_flight(self):
        limiter = testing.limiter("64MiB")
        inbox = limiter.component("inbox")
        async with watch_bounded(limiter) as watch, inbox.grant(3 * MIB, sender="somebody"):
            await anyio.lowlevel.checkpoint()
        (used,) = watch.report.peak.components
        assert (used.path, used.granted_bytes) == ("inbox", 3 * MIB)

    async def test_an_outer_cancellation_goes_through(self):
        with anyio.CancelScope() as scope:
            async with watch_bounded(testing.limiter("64MiB")):
                scope.cancel()
                await anyio.sleep_forever()
        assert scope.cancelled_caught


def test_a_watched_lock_is_a_lock():
    limiter = testing.limiter("64MiB")

    async def pipeline():
        async with watch_bounded(limiter), limiter.grant(MIB):
            lock = limiter._lock
            assert lock.acquire(blocking=False)
            taken = []
            other = threading.Thread(target=lambda: taken.append(lock.acquire(blocking=False)))
            other.start()
            other.join()
            assert taken == [False]
            lock.release()

    asyncio.run(pipeline())


@in_new_process()
def test_what_is_really_allocated_is_found():
    allocator.install()

    async def decode(nbytes):
        async with current_limiter().component("decode") as component, component.grant(MIB):
            bytes(nbytes)  # and gone again before anybody looks

    for backend in ("asyncio", "trio"):
        for nbytes in (20 * MIB, 10 * MIB):  # a higher peak before hides nothing
            report = assert_bounded(decode, nbytes, limit="64MiB", backend=backend)
            beyond = {one.path: one.beyond_grants_bytes for one in report.components}
            assert nbytes - MIB <= beyond["decode"] < nbytes - MIB + MIB // 10
            assert nbytes <= report.peak.in_use_bytes < nbytes + MIB
        with pytest.raises(NotBounded, match=r"'decode' had 9\.0 MiB in use beyond its grants"):
            assert_bounded(decode, 10 * MIB, limit="64MiB", max_beyond_grants=MIB, backend=backend)
        with pytest.raises(NotBounded, match=r"10\.\d MiB in use after 0.00 s"):
            assert_bounded(decode, 10 * MIB, limit="8MiB", backend=backend)
