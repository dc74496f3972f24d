"""When memory truly runs out: the example dies bare and finishes bounded, every time.

Each comparison runs once; ``SURVIVE_RUNS=10`` in the environment runs it ten times, and
``--junit-xml=FILE -o junit_family=xunit1`` says how high memory was in each. The memory cgroup of
256 MiB and the limit of the data segment are real ones, so is the OOM killer.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cgroups import MemoryCgroup, memory_cgroup, why_not

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
DATA = ROOT / "examples" / "data"
MIB = 1024 * 1024
LIMIT_BYTES = 256 * MIB
PIPELINE = [
    str(ROOT / "examples" / "log_pipeline.py"),
    str(DATA / "flights.csv.gz"),
    f"--join=carrier={DATA / 'airlines.csv'}",
    f"--join=dest={DATA / 'airports.csv'}",
    "--report=json",
    "--rate=0",
]
RECORDS = 200_000
BARE = [sys.executable]
BOUNDED = [sys.executable, "-m", "membound_async.cli", "run", "--report=json"]

runs = pytest.mark.parametrize("run", range(int(os.environ.get("SURVIVE_RUNS", "1"))))
in_cgroup = pytest.mark.skipif(
    why_not() is not None, reason=f"runs without a real memory cgroup: {why_not()}"
)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """What the pipeline's steps give when they are taken one after the other."""
    done = subprocess.run(
        [*BARE, *PIPELINE, "--one-by-one"], capture_output=True, text=True, check=True
    )
    (expected,) = lines(done.stdout)
    assert expected["records"] == RECORDS
    return expected


def assert_all_arrived(done: subprocess.CompletedProcess[str], expected: dict[str, Any]) -> None:
    assert done.returncode == 0, done.stderr
    last = lines(done.stdout)[-1]
    for name in ("records", "rejected", "bytes", "checksum", "done"):
        assert last[name] == expected[name], name


def limiter_statistics(done: subprocess.CompletedProcess[str]) -> Any:
    report = json.loads(done.stderr.splitlines()[-1])
    assert report["exit_code"] == 0
    return report["limiter"]


@pytest.fixture
def cgroup():
    with memory_cgroup(LIMIT_BYTES) as made:
        yield made


@in_cgroup
@runs
def test_bare_it_is_killed(cgroup: MemoryCgroup, run):
    done = cgroup.run([*BARE, *PIPELINE, "--stall=100"])
    assert done.returncode == -signal.SIGKILL
    assert cgroup.oom_kills == 1
    assert 0 < lines(done.stdout)[-1]["records"] < RECORDS


@in_cgroup
@runs
def test_bounded_every_record_arrives(cgroup: MemoryCgroup, expected, run, record_property):
    done = cgroup.run([*BOUNDED, *PIPELINE, "--stall=3"])
    record_property("peak_bytes", cgroup.peak_bytes)
    assert_all_arrived(done, expected)
    assert cgroup.oom_kills == 0
    numbers = limiter_statistics(done)
    record_property("peak_measured_bytes", numbers["peak_measured_bytes"])
    assert numbers["limit_bytes"] == LIMIT_BYTES
    assert f"cgroup v{cgroup.version}" in numbers["limit_source"]
    assert numbers["peak_measured_bytes"] < LIMIT_BYTES
    assert numbers["grants"] == numbers["waiting"] == 0
    assert not any(part["granted_bytes"] for part in numbers["components"])
    # While the sink stalled, records piled up before it, as far as the quota lets them.
    peaks = {part["path"]: part["peak_granted_bytes"] for part in numbers["components"]}
    assert 30 * MIB < peaks["write"] < LIMIT_BYTES / 2


def under_data_limit(*argv: str) -> list[str]:
    return ["/bin/sh", "-c", f'ulimit -d {LIMIT_BYTES // 1024} && exec "$@"', "sh", *argv]


@pytest.mark.skipif(sys.platform != "linux", reason="no system but Linux enforces RLIMIT_DATA")
@runs
def test_bare_it_runs_out_of_memory_under_a_limit_of_the_data_segment(run):
    command = under_data_limit(*BARE, *PIPELINE, "--stall=100")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        try:
            output, errors = child.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            # Now and then even the end of a thread fails, and Python waits for it for ever.
            child.kill()
            output, errors = child.communicate()
    assert child.returncode != 0
    assert b"MemoryError" in errors
    assert 0 < lines(output.decode())[-1]["records"] < RECORDS


@pytest.mark.skipif(sys.platform != "linux", reason="no system but Linux enforces RLIMIT_DATA")
@runs
def test_bounded_every_record_arrives_under_a_limit_of_the_data_segment(expected, run):
    command = under_data_limit(*BOUNDED, *PIPELINE, "--stall=3")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert_all_arrived(done, expected)
    numbers = limiter_statistics(done)
    assert numbers["limit_bytes"] == LIMIT_BYTES
    assert "RLIMIT_DATA" in numbers["limit_source"]


@pytest.mark.skipif(sys.platform != "linux", reason="survive.py needs Linux")
def test_the_example_shows_both():
    survive = [*BARE, str(ROOT / "examples" / "survive.py")]
    done = subprocess.run(survive, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout
    assert "200,000 of 200,000" in done.stdout


def test_load_and_rest_do_not_pin_the_quota():
    """What the allocator keeps of a load is not taken for somebody else's memory."""
    cycles = str(ROOT / "tests" / "faults" / "cycles.py")
    done = subprocess.run(
        [*BARE, cycles, "--cycles=3", "--limit=128MiB", "--document=512KiB", "--report=json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == ""
    numbers = json.loads(done.stdout)
    assert numbers["cycles"] == 3
    assert numbers["documents"] == 3 * 24
    assert numbers["granted_bytes"] == 0
    assert numbers["peak_measured_bytes"] < numbers["limit_bytes"]
    assert numbers["free_bytes"] >= 0.8 * numbers["free_bytes_before"]
