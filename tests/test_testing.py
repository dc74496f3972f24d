"""The probe, the limiter and the clock that tests are written with."""

import asyncio
import socket
import threading
import time

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest

from membound_async import testing
from membound_async.exceptions import GrantTooLarge, InsufficientMinimumMemory, InvalidLimit
from membound_async.testing import ScriptedProbe, VirtualTimeLoop, virtual_time

HOUR = 3600.0
MIB = 2**20


class TestScriptedProbe:
    def test_a_number_is_read_each_time(self):
        probe = ScriptedProbe(5)
        assert [probe.read() for _ in range(3)] == [5, 5, 5]
        assert probe.reads == 3

    def test_reads_nothing_by_default(self):
        assert ScriptedProbe().read() == 0

    def test_a_sequence_is_read_in_order_and_its_last_one_repeats(self):
        probe = ScriptedProbe([1, 2, 3])
        assert [probe.read() for _ in range(5)] == [1, 2, 3, 3, 3]

    def test_a_sequence_is_the_one_of_the_moment_it_was_given(self):
        numbers = [1, 2]
        probe = ScriptedProbe(numbers)
        numbers.clear()
        assert [probe.read() for _ in range(3)] == [1, 2, 2]

    def test_a_function_is_called_at_each_reading(self):
        numbers = iter([7, 8])
        probe = ScriptedProbe(lambda: next(numbers))
        assert [probe.read(), probe.read()] == [7, 8]

    def test_a_function_may_fail_and_the_reading_counts(self):
        def fail() -> int:
            raise OSError("gone")

        probe = ScriptedProbe(fail)
        with pytest.raises(OSError, match="gone"):
            probe.read()
        assert probe.reads == 1

    def test_lies_are_passed_on(self):
        assert ScriptedProbe(-1).read() == -1
        assert ScriptedProbe([2**60]).read() == 2**60

    def test_set_starts_anew(self):
        probe = ScriptedProbe([1, 2])
        assert probe.read() == 1
        probe.set([1, 2])
        assert [probe.read(), probe.read()] == [1, 2]
        probe.set(9)
        assert probe.read() == 9
        assert probe.reads == 4

    @pytest.mark.parametrize("source", ["64MiB", b"1", None, 1.5])
    def test_anything_else_is_refused_by_name(self, source):
        probe = ScriptedProbe(3)
        with pytest.raises(TypeError, match=r"source is a number of bytes.*not " + repr(source)):
            probe.set(source)
        assert probe.read() == 3

    def test_an_empty_sequence_is_refused(self):
        with pytest.raises(ValueError, match="nothing to read"):
            ScriptedProbe([])


class TestLimiter:
    def test_its_numbers_are_round(self):
        statistics = testing.limiter().statistics()
        assert statistics.limit_bytes == statistics.effective_limit_bytes == 64 * MIB
        assert statistics.free_bytes == 64 * MIB
        assert (statistics.baseline_bytes, statistics.measured_bytes) == (0, 0)
        assert statistics.measured_name == "scripted"

    def test_half_of_what_nobody_holds_is_granted(self):
        limiter = testing.limiter("10MiB")
        with pytest.raises(GrantTooLarge) as refused:
            limiter.grant_nowait(5 * MIB + 1)
        assert refused.value.most_bytes == 5 * MIB
        with limiter.grant_nowait(5 * MIB):
            assert limiter.statistics().free_bytes == 5 * MIB

    def test_nothing_is_delayed(self):
        limiter = testing.limiter(1000, probe=ScriptedProbe(999))
        assert limiter.statistics().level == pytest.approx(0.98)
        assert limiter.statistics().delay_seconds == 0

    def test_takes_what_a_limiter_takes(self):
        limiter = testing.limiter(
            1000, share=1, slop_factor=0.25, baseline=100, probe=ScriptedProbe(100)
        )
        with limiter.grant_nowait(650):
            assert limiter.statistics().free_bytes == 0

    async def test_the_environment_changes_nothing(self, monkeypatch):
        for name, value in {
            "MEMBOUND_LIMIT": "1MiB",
            "MEMBOUND_MAX_DELAY_SECONDS": "1",
            "MEMBOUND_MODE": "disabled",
            "MEMBOUND_OBSERVE": "1",
            "MEMBOUND_SHARE": "1",
            "MEMBOUND_SLOP_FACTOR": "0.5",
            "WEB_CONCURRENCY": "4",
        }.items():
            monkeypatch.setenv(name, value)
        limiter = testing.limiter("10MiB")
        assert limiter.statistics().free_bytes == 10 * MIB
        with pytest.raises(GrantTooLarge):
            limiter.grant_nowait(5 * MIB + 1)
        greedy = limiter.component("greedy", minimum=10 * MIB + 1)
        with pytest.raises(InsufficientMinimumMemory):
            await greedy.__aenter__()

    def test_a_limit_that_makes_no_sense_is_refused(self):
        with pytest.raises(InvalidLimit, match="0"):
            testing.limiter(0)

    @pytest.mark.virtual_time
    async def test_waits_on_virtual_time(self):
        limiter = testing.limiter("10MiB", share=1)
        grant = await limiter.grant("10MiB")

        async def release():
            await anyio.sleep(5.0)
            grant.release()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(release)
            async with limiter.grant("10MiB"):
                assert anyio.current_time() == pytest.approx(5.0)


class TestVirtualTime:
    pytestmark = pytest.mark.virtual_time

    async def test_an_hour_takes_no_time(self):
        started = time.monotonic()
        assert anyio.current_time() == 0
        await anyio.sleep(HOUR)
        assert anyio.current_time() == HOUR
        assert time.monotonic() - started < 60

    async def test_timers_fire_in_order(self):
        fired = []

        async def sleep(seconds):
            await anyio.sleep(seconds)
            fired.append((seconds, anyio.current_time()))

        async with anyio.create_task_group() as tasks:
            for seconds in (30, 10, 20):
                tasks.start_soon(sleep, seconds)
        assert fired == [(10, 10), (20, 20), (30, 30)]

    async def test_the_clock_stands_still_while_there_is_something_to_do(self):
        for _ in range(100):
            await anyio.lowlevel.checkpoint()
        assert anyio.current_time() == 0

    async def test_a_timeout_fires_on_time(self):
        with anyio.move_on_after(HOUR) as scope:
            await anyio.sleep_forever()
        assert scope.cancelled_caught
        assert anyio.current_time() == HOUR


@pytest.mark.virtual_time
@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
class TestThreadsOnVirtualTime:
    async def test_no_timeout_fires_while_an_executor_works(self):
        started = threading.Event()

        def work():
            started.set()
            return time.sleep(0.05)

        with anyio.fail_after(HOUR):
            await asyncio.get_running_loop().run_in_executor(None, work)
        assert started.is_set()
        assert 0.04 < anyio.current_time() < 60

    @pytest.mark.parametrize("own_limiter", [False, True])
    async def test_no_timeout_fires_while_a_worker_thread_works(self, own_limiter):
        limiter = anyio.CapacityLimiter(1) if own_limiter else None
        with anyio.fail_after(HOUR):
            for _ in range(2):  # the second time in a thread that has idled
                await anyio.to_thread.run_sync(time.sleep, 0.05, limiter=limiter)
                await anyio.sleep(HOUR / 4)
        assert HOUR / 2 + 0.08 < anyio.current_time() < HOUR / 2 + 60

    async def test_a_timer_beside_a_thread_fires_in_real_time(self):
        finish = threading.Event()
        started = time.monotonic()

        async def let_it_finish():
            await anyio.sleep(0.05)
            assert time.monotonic() - started > 0.04
            finish.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(let_it_finish)
            assert await anyio.to_thread.run_sync(finish.wait, 60)

    async def test_a_thread_may_call_back_into_the_loop(self):
        def work():
            return anyio.from_thread.run(anyio.sleep, 0.01)

        with anyio.fail_after(HOUR):
            await anyio.to_thread.run_sync(work)
        assert 0.01 <= anyio.current_time() < 60

    async def test_an_abandoned_job_is_not_waited_for(self):
        loop = asyncio.get_running_loop()
        finish = threading.Event()
        job = loop.run_in_executor(None, finish.wait, 60)
        job.cancel()
        await anyio.sleep(HOUR)
        assert loop.time() == HOUR
        finish.set()


class TestVirtualTimeLoop:
    def test_needs_no_plugin(self):
        async def main():
            await asyncio.to_thread(time.sleep, 0.01)
            await asyncio.sleep(HOUR)
            return asyncio.get_running_loop().time()

        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            assert HOUR < runner.run(main()) < HOUR + 60

    def test_its_end_waits_for_threads(self):
        # From Python 3.12 on with a timeout that must not fire at once.
        ended = threading.Event()

        def work():
            time.sleep(0.05)
            ended.set()

        async def main():
            asyncio.get_running_loop().run_in_executor(None, work).cancel()
            await asyncio.sleep(HOUR)
            assert not ended.is_set()

        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            runner.run(main())
        assert ended.is_set()

    def test_advance_makes_timers_fall_due(self):
        async def main():
            loop = asyncio.get_running_loop()
            assert isinstance(loop, VirtualTimeLoop)
            fired = asyncio.Event()
            loop.call_later(5, fired.set)
            loop.advance(5)
            await fired.wait()
            return loop.time()

        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            assert runner.run(main()) == 5

    @pytest.mark.parametrize("seconds", [-1, float("nan")])
    def test_time_does_not_run_backwards(self, seconds):
        loop = VirtualTimeLoop()
        try:
            with pytest.raises(ValueError, match="does not run backwards"):
                loop.advance(seconds)
            assert loop.time() == 0
        finally:
            loop.close()

    def test_sockets_work(self):
        async def main():
            loop = asyncio.get_running_loop()
            here, there = socket.socketpair()
            with here, there:
                here.setblocking(False)
                there.setblocking(False)
                async with asyncio.timeout(HOUR):
                    await loop.sock_sendall(here, b"ping")
                    return await loop.sock_recv(there, 4)

        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            assert runner.run(main()) == b"ping"

    @pytest.mark.parametrize("idle_seconds", [0, 60])
    def test_idle_seconds_wait_for_threads_that_the_loop_did_not_start(self, idle_seconds):
        async def main():
            loop = asyncio.get_running_loop()
            answer = asyncio.Event()
            given_up = threading.Event()

            def work():
                # Without idle_seconds it would have to answer before the clock jumps.
                given_up.wait(0.02 if idle_seconds else 60)
                loop.call_soon_threadsafe(answer.set)

            thread = threading.Thread(target=work)
            thread.start()
            try:
                async with asyncio.timeout(HOUR):
                    return await answer.wait()
            except TimeoutError:
                return False
            finally:
                given_up.set()
                thread.join()

        with asyncio.Runner(
            loop_factory=lambda: VirtualTimeLoop(idle_seconds=idle_seconds)
        ) as runner:
            assert runner.run(main()) is bool(idle_seconds)


class TestVirtualTimeForAnyio:
    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    def test_by_hand(self, backend):
        async def main():
            await anyio.sleep(HOUR)
            return anyio.current_time()

        name, options = virtual_time(backend)
        assert name == backend
        assert anyio.run(main, backend=name, backend_options=options) == HOUR

    def test_asyncio_unless_another_is_named(self):
        assert virtual_time() == ("asyncio", {"loop_factory": VirtualTimeLoop})

    def test_another_backend_is_refused(self):
        with pytest.raises(ValueError, match="'curio'"):
            virtual_time("curio")  # type: ignore[arg-type]
