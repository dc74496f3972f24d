"""Limits and probes in real memory cgroups, version 1 or 2, whatever this machine has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from membound_async.exceptions import InvalidLimit
from membound_async.probes import CgroupProbe
from tests.cgroups import MemoryCgroup, memory_cgroup, why_not

pytestmark = pytest.mark.skipif(
    why_not() is not None, reason=f"makes no real memory cgroup: {why_not()}"
)

MIB = 1024 * 1024
# The kernel's numbers may be that far off, see CgroupProbe; and a little is really used.
NEAR = MIB + (os.cpu_count() or 1) * 256 * 1024


@pytest.fixture
def cgroup():
    with memory_cgroup(64 * MIB) as made:
        yield made


def run(cgroup: MemoryCgroup, script: str, *args: str) -> Any:
    """Run a script in the cgroup and give what it prints, which is JSON."""
    done = cgroup.run([sys.executable, "-c", PRELUDE + script, *args])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PRELUDE = """
import json, mmap, os, sys
from membound_async.limits import detect, resolve
found = detect()
def say(*words):
    print(json.dumps(words), flush=True)
"""


def test_detect_names_the_cgroup_and_its_limit(cgroup):
    script = "say(found.limit_bytes, found.source, found.reread(), found.probe.name)"
    limit, source, reread, name = run(cgroup, script)
    assert limit == reread == 64 * MIB == cgroup.limit_bytes
    assert source == f"cgroup v{cgroup.version} {cgroup.path}"
    assert name == f"unreclaimable memory of cgroup v{cgroup.version} {cgroup.path}"


@pytest.mark.parametrize(("outer", "inner"), [(64, 128), (128, 64), (64, 64)])
def test_the_ancestor_with_the_smallest_limit_binds_and_is_measured(outer, inner):
    with (
        memory_cgroup(outer * MIB) as parent,
        memory_cgroup(inner * MIB, parent) as child,
        memory_cgroup(inner * MIB, parent) as sibling,
        subprocess.Popen(
            sibling.command(
                [sys.executable, "-c", "x = b'x' * (28 << 20); print(1, flush=True); input()"]
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as neighbour,
    ):
        assert neighbour.stdout is not None
        neighbour.stdout.readline()
        limit, source, reading = run(
            child, "say(found.limit_bytes, found.source, found.probe.read())"
        )
        neighbour.communicate(b"\n")
        binding = parent if outer <= inner else child
        assert limit == 64 * MIB
        assert source == f"cgroup v{binding.version} {binding.path}"
        # limit and measure are of one level: the neighbour counts where it can hurt
        assert (reading > 28 * MIB) == (binding is parent)


@pytest.mark.parametrize("kind", ["PRIVATE", "SHARED"])
def test_an_allocation_moves_the_reading_by_as_much(cgroup, kind):
    before, held, after = run(
        cgroup,
        f"""
before = found.probe.read()
memory = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_{kind} | mmap.MAP_ANONYMOUS)
for offset in range(0, len(memory), mmap.PAGESIZE):
    memory[offset] = 1
held = found.probe.read()
memory.close()
say(before, held, found.probe.read())
""",
    )
    assert abs(held - before - 32 * MIB) < NEAR
    assert abs(after - before) < NEAR
    assert cgroup.oom_kills == 0


def test_page_cache_does_not_move_it(cgroup, tmp_path):
    if _is_in_memory(tmp_path):
        pytest.skip(f"{tmp_path} is in memory (tmpfs), so its files are no page cache")
    for attempt in range(5):  # on a busy machine, some pages of a file may stay ours
        big = tmp_path / f"big{attempt}"
        with big.open("wb") as file:
            file.write(bytes(40 * MIB))
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # ours does not count
        before, after = run(
            cgroup,
            """
before = found.probe.read()
with open(sys.argv[1], "rb", buffering=0) as file:
    while file.read(64 << 10):
        pass
say(before, found.probe.read())
""",
            str(big),
        )
        assert abs(after - before) < NEAR
        # It stays charged to the cgroup of the process that read it first.
        if cgroup.page_cache_bytes > 40 * MIB - NEAR:
            return
        big.unlink()
    pytest.fail("no file's pages were charged to the cgroup that read it")


def test_kernel_memory_counts(cgroup):
    before, held = run(
        cgroup,
        """
import socket
before = found.probe.read()
pairs = [socket.socketpair() for _ in range(100)]
for ours, theirs in pairs:
    ours.setblocking(False)
    try:
        while True:
            ours.send(bytes(32 << 10))
    except BlockingIOError:
        pass
say(before, found.probe.read())
""",
    )
    assert held - before > 8 * MIB


def test_a_limit_above_the_containers_is_told(cgroup):
    exceeds, fits = run(
        cgroup, "say(resolve('128MiB', environ={}).exceeds, resolve('32MiB', environ={}).exceeds)"
    )
    assert exceeds == f"cgroup v{cgroup.version} {cgroup.path}: 67 108 864 bytes (64.0 MiB)"
    assert fits is None


def test_a_changed_limit_is_noticed(cgroup):
    with subprocess.Popen(
        cgroup.command(
            [sys.executable, "-c", PRELUDE + "say(found.reread()); input(); say(found.reread())"]
        ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        first = json.loads(child.stdout.readline())
        cgroup.set_limit(48 * MIB)
        second, _ = child.communicate("\n", timeout=60)
    assert (first, json.loads(second)) == ([64 * MIB], [48 * MIB])


def test_what_is_read_close_to_the_limit_is_what_kills(cgroup):
    script = """
held = []
while True:
    held.append(b"x" * (1 << 20))
    say(found.probe.read())
"""
    done = cgroup.run([sys.executable, "-c", PRELUDE + script])
    assert done.returncode == -9
    assert cgroup.oom_kills == 1
    last = json.loads(done.stdout.splitlines()[-1])[0]
    assert 64 * MIB - 1 * MIB - NEAR < last <= 64 * MIB + NEAR


def test_a_cgroup_that_is_removed(cgroup):
    probe = CgroupProbe(cgroup.path, 1 if cgroup.version == 1 else 2)
    assert 0 <= probe.read() < NEAR
    cgroup.remove()
    for _ in range(2):
        with pytest.raises(OSError, match=r"memory\.stat") as caught:
            probe.read()
        assert caught.value.filename == str(cgroup.path / "memory.stat")
    with pytest.raises(InvalidLimit, match=rf"{cgroup.path}.*pass probe="):
        CgroupProbe(cgroup.path, probe.version)


def test_a_cgroup_that_is_removed_and_made_again_is_found_again(cgroup):
    probe = CgroupProbe(cgroup.path, 1 if cgroup.version == 1 else 2)
    cgroup.remove()
    cgroup.path.mkdir()
    assert 0 <= probe.read() < NEAR


def test_in_a_cgroup_namespace_of_its_own(cgroup, tmp_path):
    """The container's view: its cgroup is mounted as the root, by a path with a space."""
    top = tmp_path / "c group"
    top.mkdir()
    kind, options = ("cgroup2", "rw") if cgroup.version == 2 else ("cgroup", "memory")
    enter = f'mount -t {kind} -o {options} none "$0" && exec "$@"'
    program = [sys.executable, "-c", PRELUDE + "say(found.limit_bytes, found.source)"]
    unshare = ["unshare", "--cgroup", "--mount", "sh", "-c", enter, str(top), *program]
    done = cgroup.run(unshare)
    if done.returncode != 0 and "Traceback" not in done.stderr:
        pytest.skip(f"makes no cgroup namespace: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [64 * MIB, f"cgroup v{cgroup.version} {top}"]


def test_the_cgroups_of_these_tests_go_away():
    with memory_cgroup(16 * MIB) as made:
        endless = made.command(["sh", "-c", "echo in; exec sleep 1000"])
        child = subprocess.Popen(endless, stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"in\n"
    with child:
        assert child.wait(10) == -9
    assert not made.path.exists()


def _is_in_memory(path: Path) -> bool:
    best = ("", "")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, file_system = line.partition(" - ")
        point = mount.split(" ")[4]
        if path.is_relative_to(point) and len(point) >= len(best[0]):
            best = point, file_system.split(" ")[0]
    return best[1] in {"tmpfs", "ramfs"}
