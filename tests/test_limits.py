"""Limits: which one binds, on fake machines and, for the resource limits, on this one."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path

import psutil
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from membound_async import limits
from membound_async.exceptions import InvalidLimit, LimitNotDetected
from membound_async.limits import Machine, MemoryLimit, detect, resolve
from membound_async.probes import CgroupProbe, ProcessProbe
from membound_async.sizes import MAX_BYTES

MIB = 1024 * 1024
GIB = 1024 * MIB
V1_NONE = 9223372036854771712

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces them")


class FakeMachine:
    """A tree of files that looks like a machine's ``/proc`` and cgroups."""

    def __init__(self, root: Path, physical: int | None = 16 * GIB, **rlimits: int) -> None:
        self.root = root
        self.rlimits = rlimits
        self.machine = Machine(str(root), rlimits.get, lambda: physical)
        self.proc(cgroup="", mountinfo="")

    def proc(self, **files: str) -> None:
        for name, content in files.items():
            (self.root / "proc/self").mkdir(parents=True, exist_ok=True)
            (self.root / "proc/self" / name).write_text(content)

    def at(self, directory: str) -> Path:
        return self.root / directory.lstrip("/")

    def v2(self, directory: str, limit: int | str | None, anon: int = 1) -> Path:
        path = self.at(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / "memory.stat").write_text(f"anon {anon}\nfile 1000000\n")
        if limit is not None:
            (path / "memory.max").write_text(f"{limit}\n")
        return path

    def v1(
        self, directory: str, limit: int | str = V1_NONE, anon: int = 1, above: int = V1_NONE
    ) -> Path:
        path = self.at(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / "memory.stat").write_text(
            f"hierarchical_memory_limit {above}\ntotal_rss {anon}\ntotal_shmem 0\n"
        )
        (path / "memory.limit_in_bytes").write_text(f"{limit}\n")
        return path


@pytest.fixture
def fake(tmp_path):
    return FakeMachine(tmp_path)


def mount(point: str, kind: str, options: str, root: str = "/", number: int = 30) -> str:
    tags = "shared:9 master:1 " if number % 2 else ""
    return f"{number} 24 0:{number} {root} {point} rw,nosuid {tags}- {kind} {kind} {options}\n"


V2_MOUNT = mount("/sys/fs/cgroup", "cgroup2", "rw,nsdelegate")
V1_MOUNT = mount("/sys/fs/cgroup/memory", "cgroup", "rw,memory", number=31)


class TestMemoryLimit:
    @pytest.mark.parametrize(
        ("limit", "slop", "effective"),
        [
            (100, 0.15, 85),
            (1000, 0.9, 100),  # 99 with floats
            (100, 0.0, 100),
            (100, 0, 100),
            (64 * MIB, 0.15, 57_042_534),
            (1, 0.15, 0),
            (1000, 0.1, 900),
            (10, 1e-20, 9),
            (2**53, 0.15, 7_656_119_366_529_843),
            (1_000_003, 0.999999, 1),
        ],
    )
    def test_the_effective_limit_is_exact(self, limit, slop, effective):
        assert MemoryLimit(limit, slop).effective_bytes == effective

    @given(st.integers(1, MAX_BYTES), st.decimals(0, "0.9999", places=4))
    @example(1000, Decimal("0.9"))
    def test_it_is_the_decimal_calculation_rounded_down(self, limit, slop):
        exact = limit * (1 - slop)
        effective = MemoryLimit(limit, float(slop)).effective_bytes
        assert effective == int(exact.to_integral_value(ROUND_FLOOR))
        assert 0 <= effective <= limit

    def test_defaults_and_value_semantics(self):
        assert MemoryLimit(5) == MemoryLimit(5, 0.15, "explicit")
        assert len({MemoryLimit(5), MemoryLimit(5)}) == 1
        with pytest.raises(AttributeError):
            MemoryLimit(5).limit_bytes = 6  # type: ignore[misc]

    @pytest.mark.parametrize("limit", [0, -1, 2**53 + 1, True, 1.0, "64MiB", None, float("nan")])
    def test_a_limit_that_is_none_is_named(self, limit):
        with pytest.raises(InvalidLimit, match=rf"limit_bytes={limit!r} .* 1 to 2\*\*53"):
            MemoryLimit(limit)

    @pytest.mark.parametrize(
        "slop", [1, 1.0, 1.5, -0.1, float("nan"), float("inf"), True, "0.15", None]
    )
    def test_a_slop_that_is_none_is_named(self, slop):
        with pytest.raises(InvalidLimit, match=rf"slop_factor={slop!r} .*for example 0\.15"):
            MemoryLimit(100, slop)


class TestCgroupV2:
    def test_the_own_cgroup(self, fake):
        fake.proc(cgroup="0::/app\n", mountinfo=V2_MOUNT)
        fake.v2("/sys/fs/cgroup", None)
        app = fake.v2("/sys/fs/cgroup/app", 512 * MIB, anon=77)
        found = detect(machine=fake.machine)
        assert found.limit_bytes == 512 * MIB
        assert found.source == f"cgroup v2 {app}"
        assert isinstance(found.probe, CgroupProbe)
        assert (found.probe.path, found.probe.read()) == (str(app), 77)
        assert found.pressure_path == str(app / "memory.pressure")
        assert found.exceeds is None

    @pytest.mark.parametrize("smallest", [0, 1, 2, 3])
    def test_the_smallest_of_all_ancestors_binds_and_is_measured(self, fake, smallest):
        fake.proc(cgroup="0::/a/b/c\n", mountinfo=V2_MOUNT)
        paths = [
            fake.v2(f"/sys/fs/cgroup{below}", 256 * MIB if level == smallest else GIB, anon=level)
            for level, below in enumerate(["", "/a", "/a/b", "/a/b/c"])
        ]
        found = detect(machine=fake.machine)
        assert (found.limit_bytes, found.source) == (256 * MIB, f"cgroup v2 {paths[smallest]}")
        assert found.probe.read() == smallest

    def test_of_equal_limits_the_outermost_binds(self, fake):
        fake.proc(cgroup="0::/a/b\n", mountinfo=V2_MOUNT)
        fake.v2("/sys/fs/cgroup", "max")
        outer = fake.v2("/sys/fs/cgroup/a", GIB)
        fake.v2("/sys/fs/cgroup/a/b", GIB)
        assert detect(machine=fake.machine).source == f"cgroup v2 {outer}"

    def test_max_is_no_limit(self, fake):
        fake.proc(cgroup="0::/app\n", mountinfo=V2_MOUNT)
        fake.v2("/sys/fs/cgroup/app", "max")
        found = detect(machine=fake.machine)
        assert (found.limit_bytes, found.source) == (16 * GIB, "physical memory")
        assert found.probe.name == ProcessProbe().name
        assert found.pressure_path is None

    def test_memory_high_is_no_limit(self, fake):
        fake.proc(cgroup="0::/app\n", mountinfo=V2_MOUNT)
        (fake.v2("/sys/fs/cgroup/app", GIB) / "memory.high").write_text("1048576\n")
        assert detect(machine=fake.machine).limit_bytes == GIB

    def test_a_level_without_the_memory_controller_is_passed_over(self, fake):
        fake.proc(cgroup="0::/a/b\n", mountinfo=V2_MOUNT)
        outer = fake.v2("/sys/fs/cgroup/a", GIB)
        fake.v2("/sys/fs/cgroup/a/b", None)
        assert detect(machine=fake.machine).source == f"cgroup v2 {outer}"

    def test_in_a_namespace_the_own_cgroup_is_the_root(self, fake):
        fake.proc(cgroup="0::/\n", mountinfo=V2_MOUNT)
        own = fake.v2("/sys/fs/cgroup", GIB)
        assert detect(machine=fake.machine).source == f"cgroup v2 {own}"

    def test_of_a_removed_cgroup_the_ancestors_count(self, fake):
        fake.proc(cgroup="0::/a/b (deleted)\n", mountinfo=V2_MOUNT)
        outer = fake.v2("/sys/fs/cgroup/a", GIB)
        assert detect(machine=fake.machine).source == f"cgroup v2 {outer}"

    def test_more_than_the_machine_has_does_not_bind(self, fake):
        fake.proc(cgroup="0::/\n", mountinfo=V2_MOUNT)
        fake.v2("/sys/fs/cgroup", 32 * GIB)
        assert detect(machine=fake.machine).source == "physical memory"


class TestCgroupV1:
    def test_the_own_cgroup(self, fake):
        fake.proc(cgroup="5:cpu:/x\n4:hugetlb,memory:/app\n1:name=systemd:/\n", mountinfo=V1_MOUNT)
        fake.v1("/sys/fs/cgroup/memory")
        app = fake.v1("/sys/fs/cgroup/memory/app", 512 * MIB, anon=77, above=512 * MIB)
        found = detect(machine=fake.machine)
        assert (found.limit_bytes, found.source) == (512 * MIB, f"cgroup v1 {app}")
        assert found.probe.read() == 77
        assert found.pressure_path is None

    @pytest.mark.parametrize("none", [V1_NONE, 9223372036854710272, 2**63 - 1])
    def test_numbers_that_stand_for_no_limit(self, fake, none):
        fake.proc(cgroup="4:memory:/app\n", mountinfo=V1_MOUNT)
        fake.v1("/sys/fs/cgroup/memory", none)
        fake.v1("/sys/fs/cgroup/memory/app", none)
        assert detect(machine=fake.machine).source == "physical memory"
        unknown = Machine(str(fake.root), fake.rlimits.get, lambda: None)
        with pytest.raises(LimitNotDetected, match=r"cgroup v1 .*memory/app"):
            detect(machine=unknown)

    def test_an_ancestor_binds(self, fake):
        fake.proc(cgroup="4:memory:/pod/app\n", mountinfo=V1_MOUNT)
        fake.v1("/sys/fs/cgroup/memory")
        pod = fake.v1("/sys/fs/cgroup/memory/pod", GIB, anon=3, above=GIB)
        fake.v1("/sys/fs/cgroup/memory/pod/app", 2 * GIB, above=GIB)
        found = detect(machine=fake.machine)
        assert (found.limit_bytes, found.source) == (GIB, f"cgroup v1 {pod}")
        assert found.probe.read() == 3

    def test_an_ancestor_that_is_not_visible_binds(self, fake):
        # a container of a pod: only the container's own cgroup is mounted
        fake.proc(
            cgroup="4:memory:/pod/app\n",
            mountinfo=mount("/sys/fs/cgroup/memory", "cgroup", "rw,memory", "/pod/app"),
        )
        own = fake.v1("/sys/fs/cgroup/memory", 2 * GIB, anon=5, above=GIB)
        found = detect(machine=fake.machine)
        assert (found.limit_bytes, found.source) == (GIB, f"a cgroup above cgroup v1 {own}")
        assert found.probe.read() == 5
        assert found.reread is not None
        fake.v1("/sys/fs/cgroup/memory", 2 * GIB, above=3 * GIB)
        assert found.reread() == 2 * GIB

    def test_soft_limits_are_none(self, fake):
        fake.proc(cgroup="4:memory:/app\n", mountinfo=V1_MOUNT)
        app = fake.v1("/sys/fs/cgroup/memory/app", GIB)
        (app / "memory.soft_limit_in_bytes").write_text("1048576\n")
        assert detect(machine=fake.machine).limit_bytes == GIB


class TestHybrid:
    # as systemd sets it up: memory on version 1, an empty version 2 beside it
    CGROUP = "4:memory:/app\n0::/app\n"
    MOUNTS = (
        mount("/sys/fs/cgroup", "tmpfs", "rw,mode=755")
        + V1_MOUNT
        + mount("/sys/fs/cgroup/unified", "cgroup2", "rw")
    )

    def test_memory_on_version_1(self, fake):
        fake.proc(cgroup=self.CGROUP, mountinfo=self.MOUNTS)
        fake.v1("/sys/fs/cgroup/memory")
        app = fake.v1("/sys/fs/cgroup/memory/app", GIB)
        fake.at("/sys/fs/cgroup/unified/app").mkdir(parents=True)
        assert detect(machine=fake.machine).source == f"cgroup v1 {app}"

    def test_memory_on_version_2(self, fake):
        fake.proc(cgroup="3:cpu:/\n0::/app\n", mountinfo=self.MOUNTS)
        app = fake.v2("/sys/fs/cgroup/unified/app", GIB)
        assert detect(machine=fake.machine).source == f"cgroup v2 {app}"


class TestMounts:
    def test_a_bind_mounted_root_is_cut_off_the_path(self, fake):
        fake.proc(
            cgroup="0::/docker/123/web\n",
            mountinfo=mount("/sys/fs/cgroup", "cgroup2", "rw", "/docker/123"),
        )
        fake.v2("/sys/fs/cgroup", GIB)
        web = fake.v2("/sys/fs/cgroup/web", 512 * MIB)
        fake.v2("/sys/fs/cgroup/docker/123/web", MIB)  # another container's, not ours
        assert detect(machine=fake.machine).source == f"cgroup v2 {web}"

    @pytest.mark.parametrize("root", ["/docker/12", "/docker/999", "/docker/123/web/deeper"])
    def test_the_mount_of_somebody_else_is_none_of_ours(self, fake, root):
        fake.proc(
            cgroup="0::/docker/123/web\n",
            mountinfo=mount("/sys/fs/cgroup", "cgroup2", "rw", root),
        )
        fake.v2("/sys/fs/cgroup", MIB)
        assert detect(machine=fake.machine).source == "physical memory"

    def test_any_mount_that_shows_the_cgroup_will_do(self, fake):
        fake.proc(
            cgroup="0::/docker/123\n",
            mountinfo=mount("/sys/fs/cgroup", "cgroup2", "rw", "/docker/999")
            + mount("/host/cgroup", "cgroup2", "rw"),
        )
        fake.v2("/sys/fs/cgroup", MIB)
        own = fake.v2("/host/cgroup/docker/123", GIB)
        assert detect(machine=fake.machine).source == f"cgroup v2 {own}"

    def test_a_mount_from_above_the_namespace_is_an_ancestor(self, fake):
        # `unshare --cgroup` without mounting anew: the names in between are not told
        fake.proc(cgroup="0::/\n", mountinfo=mount("/sys/fs/cgroup", "cgroup2", "rw", "/../../.."))
        top = fake.v2("/sys/fs/cgroup", GIB)
        assert detect(machine=fake.machine).source == f"cgroup v2 {top}"

    def test_a_process_outside_of_its_namespace_sees_no_cgroup_of_its_own(self, fake):
        fake.proc(cgroup="0::/../other\n", mountinfo=V2_MOUNT)
        fake.v2("/sys/fs/cgroup", MIB)
        fake.v2("/sys/fs/other", MIB)
        assert detect(machine=fake.machine).source == "physical memory"

    def test_escaped_paths(self, fake):
        fake.proc(
            cgroup="0::/my pod/a\\b\n",
            mountinfo=mount("/sys/fs/cg\\040roup\\134x", "cgroup2", "rw", "/my\\040pod"),
        )
        own = fake.v2("/sys/fs/cg roup\\x/a\\b", GIB)
        assert detect(machine=fake.machine).source == f"cgroup v2 {own}"

    def test_names_that_are_not_utf_8(self, fake):
        name = b"caf\xe9"
        fake.proc(mountinfo=V2_MOUNT)
        (fake.root / "proc/self/cgroup").write_bytes(b"0::/" + name + b"\n")
        own = fake.v2("/sys/fs/cgroup/" + os.fsdecode(name), GIB)
        assert detect(machine=fake.machine).source == f"cgroup v2 {own}"

    def test_a_colon_in_a_name(self, fake):
        fake.proc(cgroup="0::/a:b\n", mountinfo=V2_MOUNT)
        own = fake.v2("/sys/fs/cgroup/a:b", GIB)
        assert detect(machine=fake.machine).source == f"cgroup v2 {own}"

    @given(st.text(st.characters(exclude_characters="\x00"), min_size=1))
    def test_unescaping_undoes_the_kernels_escaping(self, path):
        escaped = "".join(f"\\{ord(c):03o}" if c in " \t\n\\" else c for c in path)
        assert limits._unescaped(escaped) == path

    names = st.lists(st.sampled_from("abc"), max_size=4)

    @given(own=names, namespace_depth=st.integers(0, 4), mounted=names)
    def test_levels_seen_from_any_namespace_are_real_ancestors(self, own, namespace_depth, mounted):
        def seen(path):
            """The kernel's way to show a path, relative to the namespace's root."""
            root = own[:namespace_depth]
            common = sum(1 for _ in itertools.takewhile(bool, map(str.__eq__, root, path)))
            return "/" + "/".join([".."] * (len(root) - common) + path[common:])

        levels = limits._visible_levels(seen(mounted), seen(own))
        is_ancestor = own[: len(mounted)] == mounted
        within_namespace = len(mounted) >= len(own[:namespace_depth])
        if not is_ancestor:
            assert levels == []
        elif within_namespace:
            assert [[*mounted, *filter(None, level.split("/"))] for level in levels] == [
                own[:depth] for depth in range(len(mounted), len(own) + 1)
            ]
        else:
            assert levels == [""]


class TestOtherLimits:
    def test_the_address_space(self, tmp_path):
        fake = FakeMachine(tmp_path, RLIMIT_AS=2 * GIB, RLIMIT_DATA=3 * GIB)
        found = detect(machine=fake.machine)
        assert (found.limit_bytes, found.source) == (2 * GIB, "RLIMIT_AS")
        assert found.probe.name == "virtual memory of this process"

    def test_the_data_segment(self, tmp_path):
        fake = FakeMachine(tmp_path, RLIMIT_AS=3 * GIB, RLIMIT_DATA=2 * GIB)
        found = detect(machine=fake.machine)
        assert (found.limit_bytes, found.source) == (2 * GIB, "RLIMIT_DATA")
        assert found.probe.name == "data and stack of this process"

    def test_of_all_the_smallest(self, tmp_path):
        fake = FakeMachine(tmp_path, RLIMIT_AS=3 * GIB, RLIMIT_DATA=2 * GIB)
        fake.proc(cgroup="0::/\n", mountinfo=V2_MOUNT)
        own = fake.v2("/sys/fs/cgroup", GIB)
        assert detect(machine=fake.machine).source == f"cgroup v2 {own}"

    def test_without_proc_there_is_the_physical_memory(self, fake):
        for name in ("cgroup", "mountinfo"):
            (fake.root / "proc/self" / name).unlink()
        assert detect(machine=fake.machine).source == "physical memory"

    def test_nothing_at_all(self, tmp_path):
        fake = FakeMachine(tmp_path, physical=None)
        with pytest.raises(LimitNotDetected) as caught:
            detect(machine=fake.machine)
        assert caught.value.tried == ("RLIMIT_AS", "RLIMIT_DATA", "physical memory")

    def test_this_machine(self):
        found = detect()
        assert 0 < found.limit_bytes <= psutil.virtual_memory().total
        assert found.reread is not None
        assert found.reread() == found.limit_bytes
        assert 0 < found.probe.read() <= found.limit_bytes

    @pytest.mark.parametrize("error", [OSError(), psutil.Error()])
    def test_a_machine_that_does_not_tell_its_memory(self, monkeypatch, error):
        def fail():
            raise error

        monkeypatch.setattr(psutil, "virtual_memory", fail)
        assert Machine().physical_bytes() is None

    def test_resource_limits_are_for_linux(self, monkeypatch):
        monkeypatch.setattr(sys, "platform", "darwin")
        assert Machine().rlimit("RLIMIT_AS") is None

    @linux
    @pytest.mark.parametrize("name", ["RLIMIT_AS", "RLIMIT_DATA"])
    def test_a_real_resource_limit_and_what_it_counts(self, name):
        script = f"""
import json, mmap, resource
from membound_async.limits import detect
from membound_async.probes import ProcessProbe
resource.setrlimit(resource.{name}, (700 << 20, 800 << 20))
found = detect()
before, rss = found.probe.read(), ProcessProbe().read()
# written to or not: private memory counts from the moment it is there
memory = mmap.mmap(-1, 100 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
grown = found.probe.read() - before, ProcessProbe().read() - rss
refused = []
for size in range((800 << 20) - before, 0, -(1 << 20)):
    try:
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        refused.append(size)
    else:
        break
left = found.limit_bytes - found.probe.read()
resource.setrlimit(resource.{name}, (750 << 20, 800 << 20))
print(json.dumps([found.limit_bytes, found.source, *grown, left, size, found.reread()]))
"""
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        limit, source, grown, rss, left, most, reread = json.loads(done.stdout)
        assert (limit, source, reread) == (700 * MIB, name, 750 * MIB)
        assert grown == 100 * MIB
        assert rss < MIB
        # what the probe says is left is what the kernel gives, and never less
        assert -MIB < most - left < 3 * MIB


class TestReread:
    def test_a_changed_limit(self, fake):
        fake.proc(cgroup="0::/app\n", mountinfo=V2_MOUNT)
        fake.v2("/sys/fs/cgroup/app", GIB)
        reread = detect(machine=fake.machine).reread
        assert reread is not None
        assert reread() == GIB
        fake.v2("/sys/fs/cgroup/app", 512 * MIB)
        assert reread() == 512 * MIB

    def test_a_limit_that_was_lifted_leaves_the_next_one(self, fake):
        fake.proc(cgroup="0::/a/b\n", mountinfo=V2_MOUNT)
        fake.v2("/sys/fs/cgroup/a", 2 * GIB)
        fake.v2("/sys/fs/cgroup/a/b", GIB)
        reread = detect(machine=fake.machine).reread
        assert reread is not None
        fake.v2("/sys/fs/cgroup/a/b", "max")
        assert reread() == 2 * GIB
        fake.v2("/sys/fs/cgroup/a", "max")
        assert reread() == 16 * GIB

    def test_one_process_of_several(self, fake):
        fake.proc(cgroup="0::/app\n", mountinfo=V2_MOUNT)
        fake.v2("/sys/fs/cgroup/app", GIB)
        reread = detect(processes=4, machine=fake.machine).reread
        assert reread is not None
        fake.v2("/sys/fs/cgroup/app", 512 * MIB)
        assert reread() == 128 * MIB

    def test_a_limit_of_0_leaves_one_byte(self, fake):
        fake.proc(cgroup="0::/app\n", mountinfo=V2_MOUNT)
        fake.v2("/sys/fs/cgroup/app", GIB)
        reread = detect(machine=fake.machine).reread
        assert reread is not None
        fake.v2("/sys/fs/cgroup/app", 0)
        assert reread() == 1

    @pytest.mark.parametrize("content", [None, "", "many\n", "-\n"])
    def test_a_limit_that_cannot_be_read_is_not_lifted(self, fake, content):
        fake.proc(cgroup="0::/app\n", mountinfo=V2_MOUNT)
        app = fake.v2("/sys/fs/cgroup/app", GIB)
        reread = detect(machine=fake.machine).reread
        assert reread is not None
        # An open file of a plain file system outlives its name, a cgroup's does not: empty it.
        (app / "memory.max").write_text(content or "")
        if content is None:
            (app / "memory.max").unlink()
        with pytest.raises(OSError, match=r"memory\.max") as caught:
            reread()
        assert caught.value.filename == str(app / "memory.max")

    def test_no_limit_any_more(self, tmp_path):
        fake = FakeMachine(tmp_path, physical=None)
        fake.proc(cgroup="0::/app\n", mountinfo=V2_MOUNT)
        app = fake.v2("/sys/fs/cgroup/app", GIB)
        reread = detect(machine=fake.machine).reread
        assert reread is not None
        fake.v2("/sys/fs/cgroup/app", "max")
        with pytest.raises(OSError, match=rf"no memory limit any more.*{app}"):
            reread()


class TestBadCgroups:
    @pytest.mark.parametrize("content", ["", "many\n", "1 2\n", "max 5\n"])
    def test_a_limit_that_is_no_number_names_path_and_remedy(self, fake, content):
        fake.proc(cgroup="0::/app\n", mountinfo=V2_MOUNT)
        app = fake.v2("/sys/fs/cgroup/app", content)
        with pytest.raises(InvalidLimit) as caught:
            detect(machine=fake.machine)
        message = str(caught.value)
        assert f"{app}/memory.max" in message
        assert "pass limit=" in message

    def test_a_limit_of_0_is_named(self, fake):
        fake.proc(cgroup="0::/app\n", mountinfo=V2_MOUNT)
        app = fake.v2("/sys/fs/cgroup/app", 0)
        with pytest.raises(InvalidLimit, match=rf"cgroup v2 {app} allows 0 bytes .*pass limit="):
            detect(machine=fake.machine)

    def test_a_cgroup_that_limits_but_cannot_be_measured(self, fake):
        fake.proc(cgroup="0::/app\n", mountinfo=V2_MOUNT)
        app = fake.v2("/sys/fs/cgroup/app", GIB)
        (app / "memory.stat").unlink()
        with pytest.raises(InvalidLimit, match=rf"{app}/memory\.stat.*pass probe="):
            detect(machine=fake.machine)

    def test_with_a_probe_of_ones_own_none_is_opened(self, fake, monkeypatch):
        class Own:
            name = "own"

            def read(self) -> int:
                return 5

        own = Own()
        fake.proc(cgroup="0::/app\n", mountinfo=V2_MOUNT)
        (fake.v2("/sys/fs/cgroup/app", GIB) / "memory.stat").unlink()
        monkeypatch.setattr(limits, "ProcessProbe", pytest.fail)
        for limit, processes in [(None, 1), (None, 2), ("64MiB", 1)]:
            found = resolve(limit, processes=processes, probe=own, environ={}, machine=fake.machine)
            assert found.probe is own

    def test_a_proc_file_that_cannot_be_read(self, fake):
        (fake.root / "proc/self/cgroup").unlink()
        (fake.root / "proc/self/cgroup").mkdir()
        with pytest.raises(InvalidLimit, match=r"proc/self/cgroup.*pass limit="):
            detect(machine=fake.machine)

    def test_a_given_limit_does_without(self, fake):
        fake.proc(cgroup="0::/app\n", mountinfo=V2_MOUNT)
        fake.v2("/sys/fs/cgroup/app", "many")
        found = resolve("64MiB", environ={}, machine=fake.machine)
        assert (found.limit_bytes, found.exceeds) == (64 * MIB, None)


class TestResolve:
    def test_given(self, fake):
        found = resolve("64MiB", environ={"MEMBOUND_LIMIT": "1GiB"}, machine=fake.machine)
        assert (found.limit_bytes, found.source) == (64 * MIB, "explicit")
        assert found.probe.name == "RSS of this process"
        assert found.reread is None
        assert found.exceeds is None

    def test_from_the_environment(self, fake):
        found = resolve(environ={"MEMBOUND_LIMIT": " 1.5GiB "}, machine=fake.machine)
        assert (found.limit_bytes, found.source) == (3 * GIB // 2, "MEMBOUND_LIMIT")
        assert found.probe.name == "RSS of this process"

    def test_of_this_process(self, monkeypatch):
        monkeypatch.setenv("MEMBOUND_LIMIT", "123456")
        assert resolve().limit_bytes == 123_456
        monkeypatch.setenv("MEMBOUND_LIMIT", "")
        assert resolve().source == detect().source

    def test_detected(self, fake):
        fake.proc(cgroup="0::/\n", mountinfo=V2_MOUNT)
        own = fake.v2("/sys/fs/cgroup", GIB)
        assert resolve(environ={}, machine=fake.machine).source == f"cgroup v2 {own}"

    def test_above_what_the_container_allows_it_is_obeyed_and_told(self, fake):
        fake.proc(cgroup="0::/\n", mountinfo=V2_MOUNT)
        own = fake.v2("/sys/fs/cgroup", GIB)
        found = resolve(2 * GIB, environ={}, machine=fake.machine)
        assert found.limit_bytes == 2 * GIB
        assert found.exceeds == f"cgroup v2 {own}: 1 073 741 824 bytes (1.0 GiB)"
        assert resolve(GIB, environ={}, machine=fake.machine).exceeds is None

    def test_above_nothing(self, tmp_path):
        fake = FakeMachine(tmp_path, physical=None)
        assert resolve(GIB, environ={}, machine=fake.machine).exceeds is None

    @pytest.mark.parametrize("limit", ["", "many", "-1", "1.5", -1, 0, "0", True, 1.5, 2**53 + 1])
    def test_a_limit_that_makes_no_sense_is_named(self, limit):
        with pytest.raises(InvalidLimit, match="limit") as caught:
            resolve(limit, environ={})
        assert repr(limit) in str(caught.value)

    @pytest.mark.parametrize("text", ["many", "-1", "0", "12XB", "1e9", "0.5", "2PiBs"])
    def test_a_variable_that_makes_no_sense_is_named(self, text):
        with pytest.raises(InvalidLimit, match=f"MEMBOUND_LIMIT='{text}'"):
            resolve(environ={"MEMBOUND_LIMIT": text})


class TestProcesses:
    def test_each_takes_its_part_and_measures_itself(self, fake):
        fake.proc(cgroup="0::/\n", mountinfo=V2_MOUNT)
        own = fake.v2("/sys/fs/cgroup", 1000)
        found = resolve(processes=3, environ={}, machine=fake.machine)
        assert found.limit_bytes == 333
        assert found.source == f"cgroup v2 {own}, divided by processes=3"
        assert found.probe.name == "RSS of this process"
        assert found.pressure_path == str(own / "memory.pressure")

    def test_a_given_limit_is_divided_too(self, fake):
        found = resolve("64MiB", processes=4, environ={}, machine=fake.machine)
        assert (found.limit_bytes, found.source) == (16 * MIB, "explicit, divided by processes=4")

    def test_web_concurrency(self, fake):
        found = resolve("64MiB", environ={"WEB_CONCURRENCY": " 4 "}, machine=fake.machine)
        assert found.limit_bytes == 16 * MIB
        assert found.source == "explicit, divided by WEB_CONCURRENCY=4"
        found = resolve(environ={"WEB_CONCURRENCY": "2"}, machine=fake.machine)
        assert found.limit_bytes == 8 * GIB
        assert found.source == "physical memory, divided by WEB_CONCURRENCY=2"

    @pytest.mark.parametrize("environ", [{}, {"WEB_CONCURRENCY": "1"}, {"WEB_CONCURRENCY": " "}])
    def test_one_process_measures_the_container(self, fake, environ):
        fake.proc(cgroup="0::/\n", mountinfo=V2_MOUNT)
        fake.v2("/sys/fs/cgroup", GIB)
        found = resolve(environ=environ, machine=fake.machine)
        assert found.limit_bytes == GIB
        assert isinstance(found.probe, CgroupProbe)

    def test_the_argument_wins(self, fake):
        environ = {"WEB_CONCURRENCY": "8"}
        found = resolve(800, processes=2, environ=environ, machine=fake.machine)
        assert found.limit_bytes == 400
        found = resolve(800, processes=1, environ=environ, machine=fake.machine)
        assert (found.limit_bytes, found.source) == (800, "explicit")

    def test_what_limits_each_process_is_not_divided(self, tmp_path):
        fake = FakeMachine(tmp_path, physical=16 * GIB, RLIMIT_DATA=3 * GIB)
        found = resolve(processes=4, environ={}, machine=fake.machine)
        assert (found.limit_bytes, found.source) == (3 * GIB, "RLIMIT_DATA")
        assert found.probe.name == "data and stack of this process"
        found = resolve(processes=8, environ={}, machine=fake.machine)
        assert (found.limit_bytes, found.source) == (
            2 * GIB,
            "physical memory, divided by processes=8",
        )

    def test_parts_are_compared_with_parts(self, fake):
        fake.proc(cgroup="0::/\n", mountinfo=V2_MOUNT)
        own = fake.v2("/sys/fs/cgroup", GIB)
        found = resolve(2 * GIB, processes=4, environ={}, machine=fake.machine)
        assert found.exceeds == f"cgroup v2 {own}: 268 435 456 bytes (256.0 MiB)"
        assert resolve(GIB, processes=4, environ={}, machine=fake.machine).exceeds is None

    @pytest.mark.parametrize("processes", [0, -1, True, 1.5, "4", float("nan")])
    def test_a_number_that_makes_no_sense_is_named(self, processes):
        with pytest.raises(InvalidLimit, match=f"processes={processes!r} .*at least 1"):
            resolve(800, processes=processes, environ={})

    @pytest.mark.parametrize("text", ["0", "-1", "auto", "1.5", "²", "4 workers"])
    def test_a_variable_that_makes_no_sense_is_named(self, text):
        with pytest.raises(InvalidLimit, match="WEB_CONCURRENCY=") as caught:
            resolve(800, environ={"WEB_CONCURRENCY": text})
        assert text in str(caught.value)
        assert "at least 1" in str(caught.value)

    def test_more_processes_than_bytes(self, fake):
        with pytest.raises(InvalidLimit, match=r"limit=3 leaves 0 bytes .*4 processes.*at least 4"):
            resolve(3, processes=4, environ={}, machine=fake.machine)
        fake.proc(cgroup="0::/\n", mountinfo=V2_MOUNT)
        fake.v2("/sys/fs/cgroup", 3)
        with pytest.raises(InvalidLimit, match="allows 0 bytes to each process"):
            resolve(processes=4, environ={}, machine=fake.machine)


def test_threads_may_read_at_the_same_time(fake):
    fake.proc(cgroup="0::/app\n", mountinfo=V2_MOUNT)
    fake.v2("/sys/fs/cgroup/app", GIB, anon=5)
    found = detect(machine=fake.machine)
    assert found.reread is not None
    seen: set[tuple[int, int]] = set()

    def read() -> None:
        for _ in range(200):
            seen.add((found.probe.read(), found.reread()))  # type: ignore[misc]

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {(5, GIB)}
