"""Memory that follows what a limiter grants, and what a test adds to it."""

import anyio
import anyio.to_thread
import pytest

from membound_async import MemoryLimiter, allocator, testing
from membound_async.testing import FakeMemory
from tests.tracking import in_new_process

MIB = 2**20


def follow(**how) -> tuple[FakeMemory, MemoryLimiter]:
    memory = FakeMemory(**how)
    return memory, testing.limiter("100MiB", probe=memory, share=1)


class TestWhatIsGranted:
    def test_is_in_use(self):
        memory, limiter = follow()
        assert memory.read() == 0
        with limiter.grant_nowait("3MiB"):
            assert memory.read() == 3 * MIB
        assert memory.read() == 0

    def test_counts_its_readings(self):
        memory, limiter = follow()
        before = memory.reads
        memory.read()
        limiter.statistics()
        assert memory.reads == before + 2

    def test_is_in_use_several_times_over(self):
        memory, limiter = follow(per_granted=2.5)
        with limiter.grant_nowait("4MiB"):
            assert memory.read() == 10 * MIB
            numbers = limiter.statistics()
            assert (numbers.measured_bytes, numbers.drift_bytes) == (10 * MIB, 6 * MIB)

    def test_a_factor_is_for_a_component_and_what_is_below_it(self):
        memory, limiter = follow(per_granted={"decode": 3, "decode.json": 4})
        grants = [
            limiter.component(path).grant_nowait("1MiB")
            for path in ("decode", "decode.csv", "decode.json.strict", "decoder")
        ]
        usage = memory.usage()
        assert {one.path: one.in_use_bytes // MIB for one in usage.components} == {
            "decode": 3,
            "decode.csv": 3,
            "decode.json.strict": 4,
            "decoder": 1,
        }
        assert [one.in_use_bytes for one in usage.components] == [4 * MIB, 3 * MIB, 3 * MIB, MIB]
        for grant in grants:
            grant.release()

    async def test_in_flight_is_granted(self):
        memory, limiter = follow(per_granted=2)
        async with limiter.component("inbox").grant("2MiB", sender="somebody"):
            assert memory.read() == 4 * MIB

    async def test_a_minimum_that_is_not_used_is_not_in_use(self):
        memory, limiter = follow()
        async with limiter.component("decode", minimum="5MiB", firm_limit="20MiB") as decode:
            (used,) = memory.usage().components
            assert (used.minimum_bytes, used.firm_limit_bytes) == (5 * MIB, 20 * MIB)
            assert used.in_use_bytes == 0
            async with decode.grant("1MiB"):
                (used,) = memory.usage().components
                assert (used.in_use_bytes, used.beyond_grants_bytes) == (MIB, 0)
                with memory.allocate("4MiB"):
                    (used,) = memory.usage().components
                    assert (used.in_use_bytes, used.beyond_grants_bytes) == (5 * MIB, 0)

    @pytest.mark.parametrize("factor", [-1, float("nan")])
    def test_no_factor_is_negative(self, factor):
        with pytest.raises(ValueError, match="is no factor"):
            FakeMemory(per_granted=factor)


class TestWhatOthersUse:
    def test_is_added(self):
        memory, limiter = follow(others="7MiB")
        with limiter.grant_nowait("3MiB"):
            assert memory.read() == 10 * MIB
        assert memory.usage().others_bytes == 7 * MIB

    @pytest.mark.virtual_time
    async def test_may_be_a_function_of_time(self):
        await anyio.sleep(100)
        memory, limiter = follow(others=lambda seconds: 50 if 5 <= seconds < 10 else 0)
        read = []
        for _ in range(4):
            limiter.statistics()
            read.append(memory.read())
            await anyio.sleep(4)
        assert read == [0, 0, 50, 0]

    @pytest.mark.virtual_time
    async def test_a_leak_grows_from_the_first_reading_on(self):
        memory, _ = follow(leak_per_second="1MiB")
        await anyio.sleep(100)
        assert memory.read() == 0
        await anyio.sleep(2.5)
        assert memory.read() == int(2.5 * MIB)
        assert memory.usage().leaked_bytes == int(2.5 * MIB)
        # A thread knows no time of its own.
        assert await anyio.to_thread.run_sync(memory.read) == int(2.5 * MIB)

    def test_time_goes_on_in_another_loop(self):
        memory, _ = follow(leak_per_second=10)

        async def wait():
            memory.read()
            await anyio.sleep(5)
            return memory.read()

        loops = (testing.virtual_time("asyncio"), 50), (testing.virtual_time("trio"), 100)
        for (name, options), leaked in loops:
            assert anyio.run(wait, backend=name, backend_options=options) == leaked
            assert memory.read() == leaked  # outside of any loop time stands still

    def test_what_is_freed_may_stay(self):
        memory, limiter = follow(keeps_freed=True, others=5)
        with limiter.grant_nowait(100):
            assert memory.read() == 105
        assert memory.read() == 105
        assert memory.usage().kept_bytes == 100
        with limiter.grant_nowait(60):  # uses it again
            assert memory.read() == 105
            assert memory.usage().kept_bytes == 40
        with limiter.grant_nowait(130):
            assert memory.read() == 135


class TestWhatIsAllocated:
    def test_is_in_use_besides_what_is_granted(self):
        memory, limiter = follow(per_granted={"decode": 2})
        with limiter.component("decode").grant_nowait(10), memory.allocate(5, "decode"):
            (used,) = memory.usage().components
            assert (used.granted_bytes, used.allocated_bytes, used.in_use_bytes) == (10, 5, 25)
            assert used.beyond_grants_bytes == 15
        assert memory.read() == 0

    async def test_belongs_to_the_component_whose_code_runs(self):
        memory, limiter = follow()
        allocations = [memory.allocate("1KiB")]
        async with limiter.component("decode") as decode:
            allocations.append(memory.allocate("2KiB"))
        allocations.append(memory.allocate("4KiB", decode))
        used = {one.path: one.allocated_bytes for one in memory.usage().components}
        assert used == {"root": 1024, "decode": 6 * 1024}
        for allocation in allocations:
            allocation.free()
            allocation.free()  # which does nothing
        assert memory.read() == 0

    def test_a_component_that_the_limiter_does_not_know_is_as_good(self):
        memory, _ = follow()
        with memory.allocate(7, "cache"):
            assert [one.path for one in memory.usage().components] == ["cache"]
        alone = FakeMemory()
        with alone.allocate(7):
            assert alone.read() == 7

    def test_another_limiter_begins_anew(self):
        memory, limiter = follow(keeps_freed=True)
        before = memory.allocate(100)
        memory.follow(limiter)
        assert memory.read() == 100
        testing.limiter("1MiB", probe=memory)
        assert memory.read() == 0
        before.free()
        assert memory.read() == 0


@in_new_process()
def test_what_is_really_allocated_is_in_use_if_it_is_more_than_granted():
    allocator.install()
    memory, limiter = follow(per_granted={"decode": 2})
    kept = []

    async def decode():
        async with limiter.component("decode") as component, component.grant("1MiB"):
            kept.append(bytes(5 * MIB))
            (used,) = (one for one in memory.usage().components if one.path == "decode")
            assert 5 * MIB <= used.live_bytes < 5.1 * MIB
            assert used.in_use_bytes == used.live_bytes
            kept.clear()
            (used,) = (one for one in memory.usage().components if one.path == "decode")
            assert used.in_use_bytes == 2 * MIB

    anyio.run(decode)
