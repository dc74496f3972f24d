"""A service with more uploads than it has memory for: killed bare; it answers all of them bounded.

The memory cgroup and the OOM killer are real ones, and so are the uploads, which come from this
process. How much is got through meanwhile is measured by ``tests/benchmarks/overload.py``.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.cgroups import MemoryCgroup, memory_cgroup, why_not
from tests.uploads import Answer, Service, ask, document, serving, status

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        why_not() is not None, reason=f"runs without a real memory cgroup: {why_not()}"
    ),
]

LIMIT_BYTES = 256 * 1024 * 1024
ROWS = 40_000
DOCUMENT = document(ROWS)
CLIENTS = 240


@pytest.fixture
def cgroup() -> Iterator[MemoryCgroup]:
    with memory_cgroup(LIMIT_BYTES) as made:
        yield made


async def uploads(port: int) -> list[Answer]:
    """Have all clients upload at once, every other one without saying how much."""
    return await asyncio.gather(
        *(ask(port, "/count", DOCUMENT, chunked=number % 2 == 0) for number in range(CLIENTS))
    )


async def health(port: int) -> list[Answer]:
    """Ask for the health of the service until cancelled."""
    answers: list[Answer] = []
    try:
        while True:
            answers.append(await ask(port, "/healthz"))
            await asyncio.sleep(0.01)
    except asyncio.CancelledError:
        return answers


async def overload(service: Service) -> tuple[list[Answer], list[Answer]]:
    """Give what uploads were answered, and what was said of its health meanwhile."""
    asks = asyncio.create_task(health(service.port))
    answers = await uploads(service.port)
    asks.cancel()
    return answers, await asks


def test_bare_it_is_killed(cgroup: MemoryCgroup) -> None:
    with serving("--bare", inside=cgroup.command) as service:
        answers, _ = asyncio.run(overload(service))
        assert service.process.wait(60) == -signal.SIGKILL
    assert cgroup.oom_kills == 1
    assert Counter(answer.status for answer in answers)[0] > CLIENTS / 2


@pytest.mark.parametrize("wait", [0.5, 60.0], ids=["short of patience", "patient"])
def test_bounded_every_request_is_answered(cgroup: MemoryCgroup, wait: float) -> None:
    with serving(f"--wait={wait}", inside=cgroup.command) as service:
        answers, healths = asyncio.run(overload(service))
        numbers = asyncio.run(status(service.port))
        service.process.send_signal(signal.SIGINT)
        service.process.wait(60)
    assert cgroup.oom_kills == 0
    assert cgroup.peak_bytes is None or cgroup.peak_bytes < LIMIT_BYTES
    counts = Counter(answer.status for answer in answers)
    assert set(counts) <= {200, 503}
    assert counts.total() == CLIENTS
    assert counts[200]
    for answer in answers:
        if answer.status == 200:
            assert answer.body == b'{"values":%d}' % (3 * ROWS + 1)
        else:
            assert int(answer.headers["retry-after"]) > 0
    assert healths
    assert {answer.status for answer in healths} == {200}
    assert numbers["limit_bytes"] == LIMIT_BYTES
    assert 0 < numbers["peak_measured_bytes"] < LIMIT_BYTES
    assert numbers["grants"] == numbers["waiting"] == 0
