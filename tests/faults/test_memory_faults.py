"""Memory that goes where nobody planned: what the limiter makes of it, and what the kernel.

The service of ``service.py`` runs in a real memory cgroup of 192 MiB. It takes 24 MiB, and
16 workers with 6 MiB each; 15 % of the limit are slop.
"""

from __future__ import annotations

import signal
import time

import pytest

from tests.cgroups import MemoryCgroup, memory_cgroup, why_not
from tests.faults.running import RunningService

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        why_not() is not None, reason=f"runs without a real memory cgroup: {why_not()}"
    ),
]

MIB = 2**20
LIMIT_BYTES = 192 * MIB
WORKERS = 16
LEAK = 90
"""MiB; with what the workers use, more than there is."""

NEAR = 8 * MIB
"""A grant more or less, and what the kernel's numbers may be off by."""


@pytest.fixture
def cgroup():
    with memory_cgroup(LIMIT_BYTES) as made:
        yield made


def recovers(service: RunningService) -> None:
    """Wait until all workers hold a grant again, and there is no drift."""
    service.works()
    service.until(lambda now: now.drift_bytes < NEAR and now.quota_bytes > WORKERS * 6 * MIB)
    service.works()


@pytest.mark.parametrize("fault", ["leak", "child"])
def test_bare_it_is_killed(cgroup: MemoryCgroup, fault):
    with RunningService(cgroup, "--bare") as service:
        service.do("work", WORKERS)
        service.start(fault, LEAK)
        assert service.dies() == -signal.SIGKILL
    assert cgroup.oom_kills >= 1


def test_bare_a_burst_kills(cgroup: MemoryCgroup):
    with RunningService(cgroup, "--bare") as service:
        service.start("burst", 100)
        assert service.dies() == -signal.SIGKILL
    assert cgroup.oom_kills == 1


@pytest.mark.parametrize("fault", ["leak", "child"])
def test_what_leaks_or_a_child_takes_is_taken_off_the_quota_and_comes_back(
    cgroup: MemoryCgroup, fault
):
    with RunningService(cgroup) as service:
        service.do("work", WORKERS)
        calm = service.works()
        assert calm.drift_bytes < NEAR
        service.start(fault, LEAK)
        short = service.until(lambda now: now.drift_bytes > LEAK * MIB - NEAR)
        assert calm.quota_bytes - short.quota_bytes > LEAK * MIB - 2 * NEAR
        # It goes on, with fewer at a time.
        service.works()
        slow = service.until(lambda now: now.waiting)
        assert 0 < slow.committed_bytes < WORKERS * 6 * MIB
        service.do(fault, 0)
        recovers(service)
        service.end()
    assert cgroup.oom_kills == 0
    assert cgroup.peak_bytes is None or cgroup.peak_bytes < LIMIT_BYTES


def test_a_burst_gets_no_more_than_there_is(cgroup: MemoryCgroup):
    with RunningService(cgroup) as service:
        before = service.until(lambda _: True)
        after = service.do("burst", 100)
        assert after.done == 100
        assert after.peak_granted_bytes <= before.quota_bytes
        assert after.grants == after.waiting == 0
        service.end()
    assert cgroup.oom_kills == 0


def test_a_burst_after_a_leak_at_rest(cgroup: MemoryCgroup):
    """What was granted once and went back to the system does not hide a leak that came later."""
    with RunningService(cgroup) as service:
        service.do("burst", 30)
        service.until(lambda now: now.measured_bytes < now.baseline_bytes + NEAR)
        leaked = service.do("leak", 60)
        assert leaked.drift_bytes > 60 * MIB - NEAR
        assert service.do("burst", 100).done == 130
        service.end()
    assert cgroup.oom_kills == 0


def test_peaks_between_two_readings_are_what_the_slop_is_for(cgroup: MemoryCgroup):
    with RunningService(cgroup) as service:
        service.do("spike", 20)  # over and over, faster than anybody looks
        service.do("burst", 100)
        service.do("spike", 0)
        recovered = service.works(0)
        assert recovered.done == 100
        service.end()
    assert cgroup.oom_kills == 0


def test_a_heap_in_pieces_is_drift_when_memory_is_short_and_the_quota_never_0(
    cgroup: MemoryCgroup,
):
    with RunningService(cgroup) as service:
        kept = service.do("fragment", 70)
        # One object of a thousand is left, and nearly all of the memory.
        in_pieces = kept.measured_bytes - kept.baseline_bytes
        assert in_pieces > 40 * MIB
        assert kept.committed_bytes == 0
        # Said as it is: in use, but the next grant may use it again.
        assert kept.drift_bytes < NEAR
        service.do("work", WORKERS)
        short = service.until(lambda now: now.drift_bytes > in_pieces - 2 * NEAR)
        assert short.quota_bytes > 6 * MIB
        service.works()
        service.do("work", 0)
        service.do("fragment", 0)
        service.do("work", WORKERS)
        recovers(service)
        service.end()
    assert cgroup.oom_kills == 0


def test_a_frozen_event_loop_loses_nobody(cgroup: MemoryCgroup):
    with RunningService(cgroup) as service:
        thawed = service.do("freeze", 4)
        # Of 30 that waited, those with a second have given up, and the others were served.
        assert (thawed.done, thawed.timed_out) == (20, 10)
        assert thawed.grants == thawed.waiting == thawed.committed_bytes == 0
        assert thawed.measured_bytes > thawed.baseline_bytes + 20 * MIB - NEAR
        assert service.do("burst", 50).done == 70
        service.end()
    assert cgroup.oom_kills == 0


def test_a_limit_that_is_lowered_and_raised_while_it_works(cgroup: MemoryCgroup):
    def set_limit(mib: int) -> None:
        give_up = time.monotonic() + 60
        while True:  # version 1 refuses a limit below what is in use at that instant
            try:
                return cgroup.set_limit(mib * MIB)
            except OSError:
                if time.monotonic() > give_up:
                    raise

    with RunningService(cgroup) as service:
        service.do("work", 4)
        service.works()
        set_limit(96)
        low = service.until(lambda now: now.limit_bytes == 96 * MIB)
        quota = low.effective_limit_bytes - low.baseline_bytes
        service.do("work", WORKERS)
        for _ in range(20):
            now = service.works(5)
            assert now.committed_bytes <= quota
            assert now.limit_bytes == 96 * MIB
        service.do("work", 0)
        service.do("work", 1)
        # Hardly more than the service itself takes: room for one worker at a time.
        set_limit(36)
        lowest = service.until(lambda now: now.limit_bytes == 36 * MIB)
        service.do("work", WORKERS)
        assert lowest.effective_limit_bytes < lowest.baseline_bytes + 12 * MIB
        service.works(10)
        cgroup.set_limit(LIMIT_BYTES)
        service.until(lambda now: now.limit_bytes == LIMIT_BYTES)
        service.until(lambda now: now.committed_bytes > quota)
        recovers(service)
        service.end()
    assert cgroup.oom_kills == 0


def test_no_file_descriptors_left(cgroup: MemoryCgroup):
    with RunningService(cgroup) as service:
        service.do("work", WORKERS)
        service.works()
        # The files of the kernel are open already, so it goes on to see what there is.
        service.do("descriptors_used", 0)
        service.do("leak", 40)
        seen = service.works()
        assert seen.probe_failures == 0
        assert seen.measured_bytes > seen.baseline_bytes + 40 * MIB
        # Without these, it takes memory to be at the limit: work goes on, and no more of it.
        service.do("descriptors_freed", 0)
        service.do("descriptors_used", 1)
        blind = service.until(lambda now: now.free_bytes < 0)
        assert blind.probe_failures > 0
        assert service.works().committed_bytes <= blind.committed_bytes
        service.do("descriptors_freed", 0)
        service.do("leak", 0)
        recovers(service)
        # The limit is read again, too.
        cgroup.set_limit(LIMIT_BYTES + 16 * MIB)
        service.until(lambda now: now.limit_bytes == LIMIT_BYTES + 16 * MIB)
        errors = service.end()
    assert errors.count("membound.probe_failed") == errors.count("membound.probe_recovered") + 1
    assert cgroup.oom_kills == 0
