"""Probes: what is read, from where, and what happens when it cannot be."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import timeit
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from membound_async import probes
from membound_async.exceptions import InvalidLimit
from membound_async.probes import (
    CgroupProbe,
    KeptFile,
    PressureStall,
    ProcessProbe,
    check_reading,
    read_pressure,
)

MIB = 1024 * 1024
PAGE = mmap.PAGESIZE

linux = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")

# Linux 6.8, version 2, some lines left out
V2_STAT = """\
anon 50000000
file 900000000
kernel 7000000
kernel_stack 196608
pagetables 700416
sec_pagetables 0
percpu 144
sock 12288
vmalloc 0
shmem 3000000
zswap 0
file_mapped 1000000
inactive_anon 2000000
slab_reclaimable 4000000
slab_unreclaimable 900000
slab 4900000
pgfault 12345
"""
V1_STAT = """\
cache 900
rss 100
shmem 10
hierarchical_memory_limit 9223372036854771712
total_cache 9000000
total_rss 40000000
total_shmem 2000000
total_inactive_file 7000000
"""


def cgroup(path: Path, **files: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content)
    return path


def run(script: str) -> str:
    """Run a script in a fresh interpreter without other threads and give what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestCheckReading:
    @pytest.mark.parametrize("value", [0, 1, 2**53])
    def test_numbers_of_bytes_pass(self, value):
        assert check_reading(value, "scripted") == value

    @pytest.mark.parametrize("value", [True, 1.0, float("nan"), "1", None])
    def test_what_is_no_int_is_named(self, value):
        with pytest.raises(TypeError, match=r"probe 'scripted' read .*must return a number"):
            check_reading(value, "scripted")

    @pytest.mark.parametrize("value", [-1, 2**53 + 1])
    def test_what_no_machine_has_is_named(self, value):
        with pytest.raises(ValueError, match=rf"'scripted' read {value} bytes; .* 0 to 2\*\*53"):
            check_reading(value, "scripted")


class TestKeptFile:
    @pytest.fixture
    def kept(self, tmp_path):
        (tmp_path / "file").write_text("1")
        return KeptFile(str(tmp_path / "file"))

    def test_it_is_opened_once(self, kept, monkeypatch):
        assert kept.read(int) == 1
        monkeypatch.setattr(os, "open", None)
        Path(kept.path).write_text("22")
        assert kept.read(int) == 22

    def test_drop_opens_it_again_and_closes_the_old_one(self, kept):
        kept.read(int)
        number = kept._descriptor.number
        kept.drop()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)
        assert kept.read(int) == 1

    def test_a_descriptor_that_was_closed_from_outside(self, kept):
        kept.read(int)
        os.close(kept._descriptor.number)
        assert kept.read(int) == 1

    @pytest.mark.parametrize("theirs", ["not a number", "2"])
    def test_a_descriptor_of_another_file_now_is_not_read_and_left_alone(
        self, kept, tmp_path, theirs
    ):
        content = theirs.encode()
        (tmp_path / "theirs").write_bytes(content)
        kept.read(int)
        number = kept._descriptor.number
        other = os.open(tmp_path / "theirs", os.O_RDONLY)
        os.dup2(other, number)
        try:
            assert kept.read(int) == 1
            assert os.pread(number, 100, 0) == content
        finally:
            os.close(number)
            os.close(other)

    def test_statm_is_told_from_others_by_its_content(self, tmp_path):
        (tmp_path / "file").write_text("1")
        (tmp_path / "theirs").write_text("not a number")
        kept = KeptFile(str(tmp_path / "file"), unlike_others=True)
        kept.read(int)
        assert kept._descriptor is not None
        number = kept._descriptor.number
        other = os.open(tmp_path / "theirs", os.O_RDONLY)
        os.dup2(other, number)
        assert kept.read(int) == 1
        os.close(number)
        os.close(other)

    def test_a_file_that_is_gone_names_its_path_and_may_come_back(self, kept):
        os.unlink(kept.path)
        with pytest.raises(FileNotFoundError) as caught:
            kept.read(int)
        assert caught.value.filename == kept.path
        Path(kept.path).write_text("3")
        assert kept.read(int) == 3

    def test_an_error_while_reading_names_the_path_too(self, tmp_path):
        with pytest.raises(IsADirectoryError) as caught:
            KeptFile(str(tmp_path)).read(int)
        assert caught.value.filename == str(tmp_path)

    def test_what_it_does_not_understand_is_an_oserror_with_the_path(self, kept):
        kept.read(int)
        Path(kept.path).write_text("three")
        with pytest.raises(OSError, match=r"unexpected content .*three") as caught:
            kept.read(int)
        assert caught.value.filename == kept.path

    @linux
    def test_no_descriptor_leaks(self, kept):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            kept.read(int)
            kept.drop()
        assert len(os.listdir("/proc/self/fd")) == before


class TestProcessProbe:
    def test_the_names_say_what_is_measured(self):
        assert ProcessProbe().name == "RSS of this process"
        assert ProcessProbe("virtual").name == "virtual memory of this process"
        assert ProcessProbe("data").name == "data and stack of this process"
        assert ProcessProbe(children=True).name == "RSS of this process and its children"

    @linux
    @pytest.mark.parametrize(("field", "place"), [("virtual", 1000), ("rss", 2000), ("data", 6000)])
    def test_the_fields_of_statm(self, field, place, tmp_path, monkeypatch):
        (tmp_path / "statm").write_text("1000 2000 3000 4000 5000 6000 7000\n")
        monkeypatch.setattr(probes, "_STATM", KeptFile(str(tmp_path / "statm")))
        assert ProcessProbe(field).read() == place * PAGE

    @linux
    @pytest.mark.parametrize("field", ["rss", "virtual", "data"])
    def test_an_allocation_moves_every_field_by_as_much(self, field):
        probe = ProcessProbe(field)
        before = probe.read()
        with mmap.mmap(-1, 32 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            for offset in range(0, len(memory), PAGE):
                memory[offset] = 1
            grown = probe.read() - before
        assert abs(grown - 32 * MIB) < MIB
        assert abs(probe.read() - before) < MIB

    def test_it_agrees_with_psutil(self):
        assert abs(ProcessProbe().read() - psutil.Process().memory_info().rss) < MIB

    @pytest.mark.parametrize("field", ["rss", "virtual"])
    def test_without_proc_psutil_measures(self, field, monkeypatch, tmp_path):
        expected = ProcessProbe(field).read()
        monkeypatch.setattr(probes, "_STATM", KeptFile(str(tmp_path / "none")))
        assert abs(ProcessProbe(field).read() - expected) < MIB

    def test_a_field_that_psutil_does_not_have_here(self, monkeypatch, tmp_path):
        monkeypatch.setattr(probes, "_STATM", KeptFile(str(tmp_path / "none")))
        monkeypatch.setitem(probes._PROCESS_FIELDS, "data", ("data and stack", 5, "nothing"))
        with pytest.raises(
            InvalidLimit, match=r"cannot measure the data .*reports no 'nothing'.*pass probe="
        ):
            ProcessProbe("data")

    def test_psutil_that_fails_is_an_oserror(self, monkeypatch):
        probe = ProcessProbe(children=True)

        def denied(process):
            raise psutil.AccessDenied(1)

        monkeypatch.setattr(psutil.Process, "memory_info", denied)
        with pytest.raises(OSError, match="pid=1"):
            probe.read()

    def test_statm_that_is_nonsense_is_an_oserror(self, monkeypatch, tmp_path):
        (tmp_path / "statm").write_text("1 2 3\n")
        monkeypatch.setattr(probes, "_STATM", KeptFile(str(tmp_path / "statm")))
        with pytest.raises(InvalidLimit, match=r"RSS of this process.*unexpected content.*statm"):
            ProcessProbe()

    def test_an_unknown_field_is_named(self):
        with pytest.raises(InvalidLimit, match=r"field='pss' .*'rss', 'virtual', 'data'"):
            ProcessProbe("pss")  # type: ignore[arg-type]

    @linux
    def test_children_are_added(self):
        script = "print(len(bytearray(40 << 20))); input()"
        alone = ProcessProbe(children=True)
        before = alone.read()
        with subprocess.Popen(
            [sys.executable, "-c", f"x = bytearray(b'1') * (40 << 20); {script}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as child:
            assert child.stdout is not None
            child.stdout.readline()
            grown = alone.read() - before
            child.communicate(b"\n")
        assert 40 * MIB < grown < 120 * MIB

    def test_a_child_that_ended_meanwhile_counts_nothing(self, monkeypatch):
        class Ended(psutil.Process):
            def memory_info(self):
                raise psutil.NoSuchProcess(self.pid)

        expected = ProcessProbe().read()
        monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: [Ended()])
        assert abs(ProcessProbe(children=True).read() - expected) < MIB

    @linux
    def test_a_forked_child_measures_itself(self):
        # The open file shows the parent, which has 64 MiB more than the child in the end.
        child, own, parent = map(
            int,
            run(
                """
import mmap, os
from membound_async.probes import ProcessProbe
probe = ProcessProbe()
before = probe.read()
ours, theirs = os.pipe(), os.pipe()
if os.fork() == 0:
    os.read(theirs[0], 1)
    rss = int(open("/proc/self/statm").read().split()[1]) * mmap.PAGESIZE
    os.write(ours[1], f"{probe.read()} {rss}".encode())
    os._exit(0)
big = b"x" * (64 << 20)
os.write(theirs[1], b"1")
print(os.read(ours[0], 100).decode(), probe.read())
os.wait()
"""
            ).split(),
        )
        assert abs(child - own) < MIB
        assert parent - child > 60 * MIB

    @linux
    def test_a_daemon_that_closes_everything_still_measures(self):
        before, after = map(
            int,
            run(
                """
import os
from membound_async.probes import ProcessProbe
probe = ProcessProbe()
before = probe.read()
os.closerange(3, 100)
print(before, probe.read())
"""
            ).split(),
        )
        assert abs(after - before) < MIB

    @linux
    def test_it_costs_a_fraction_of_psutil(self, capsys):
        def microseconds(function):
            return min(timeit.repeat(function, number=200, repeat=7)) / 200 * 1e6

        kept = microseconds(ProcessProbe().read)
        psutils = microseconds(psutil.Process().memory_info)
        with capsys.disabled():
            print(f"\n  RSS: kept-open statm {kept:.2f} us, psutil {psutils:.2f} us")
        assert kept < psutils


class TestCgroupProbe:
    def test_version_2_leaves_out_page_cache_and_reclaimable_slab(self, tmp_path):
        probe = CgroupProbe(cgroup(tmp_path, memory__stat=V2_STAT), 2)
        assert probe.read() == 50_000_000 + 3_000_000 + (7_000_000 - 4_000_000) + 12_288
        assert probe.name == f"unreclaimable memory of cgroup v2 {tmp_path}"

    def test_version_2_before_linux_5_18_adds_up_kernel_memory(self, tmp_path):
        stat = V2_STAT.replace("kernel 7000000\n", "")
        probe = CgroupProbe(cgroup(tmp_path, memory__stat=stat), 2)
        kernel = 196_608 + 700_416 + 144 + 900_000
        assert probe.read() == 50_000_000 + 3_000_000 + kernel + 12_288

    def test_version_2_with_little_in_it(self, tmp_path):
        assert CgroupProbe(cgroup(tmp_path, memory__stat="anon 5\nfile 7\n"), 2).read() == 5

    def test_version_2_counts_hugetlb_where_it_is_accounted(self, tmp_path):
        stat = "anon 5\nhugetlb 2097152\n"
        assert CgroupProbe(cgroup(tmp_path, memory__stat=stat), 2).read() == 2_097_157

    def test_version_2_counters_of_different_instants_do_not_go_below_zero(self, tmp_path):
        stat = "anon 5\nkernel 100\nslab_reclaimable 164\n"
        assert CgroupProbe(cgroup(tmp_path, memory__stat=stat), 2).read() == 5

    def test_version_1_adds_all_kernel_memory(self, tmp_path):
        path = cgroup(tmp_path, memory__stat=V1_STAT, memory__kmem__usage_in_bytes="1500000\n")
        assert CgroupProbe(path, 1).read() == 40_000_000 + 2_000_000 + 1_500_000

    def test_version_1_without_kernel_accounting_or_shmem(self, tmp_path):
        stat = V1_STAT.replace("total_shmem 2000000\n", "")
        assert CgroupProbe(cgroup(tmp_path, memory__stat=stat), 1).read() == 40_000_000

    @pytest.mark.parametrize("version", [1, 2])
    def test_no_such_cgroup_names_path_and_remedy(self, tmp_path, version):
        with pytest.raises(InvalidLimit) as caught:
            CgroupProbe(tmp_path / "gone", version)
        message = str(caught.value)
        assert f"cannot measure cgroup v{version} {tmp_path}/gone" in message
        assert f"{tmp_path}/gone/memory.stat" in message
        assert "pass probe=" in message
        assert "MEMBOUND_LIMIT" in message

    def test_the_wrong_version_is_noticed(self, tmp_path):
        with pytest.raises(InvalidLimit, match=r"unexpected content .*total_rss"):
            CgroupProbe(cgroup(tmp_path, memory__stat=V2_STAT), 1)

    def test_half_a_line_is_noticed(self, tmp_path):
        with pytest.raises(InvalidLimit, match="unexpected content"):
            CgroupProbe(cgroup(tmp_path, memory__stat="anon 5\nfile"), 2)

    def test_a_cgroup_that_vanishes_is_an_oserror_and_may_come_back(self, tmp_path):
        probe = CgroupProbe(cgroup(tmp_path / "c", memory__stat=V2_STAT), 2)
        expected = probe.read()
        (tmp_path / "c" / "memory.stat").write_text("")
        (tmp_path / "c" / "memory.stat").unlink()
        with pytest.raises(FileNotFoundError) as caught:
            probe.read()
        assert caught.value.filename == f"{tmp_path}/c/memory.stat"
        cgroup(tmp_path / "c", memory__stat=V2_STAT)
        assert probe.read() == expected

    @given(
        st.dictionaries(
            st.sampled_from(
                ["shmem", "kernel", "kernel_stack", "percpu", "sock", "file", "slab_reclaimable"]
            ),
            st.integers(0, 2**48),
        ),
        st.integers(0, 2**48),
    )
    def test_page_cache_never_counts_and_all_else_is_added(self, stat, anon):
        text = "".join(f"{key} {value}\n" for key, value in (stat | {"anon": anon}).items())
        kernel = (
            max(0, stat["kernel"] - stat.get("slab_reclaimable", 0))
            if "kernel" in stat
            else stat.get("kernel_stack", 0) + stat.get("percpu", 0)
        )
        expected = anon + stat.get("shmem", 0) + stat.get("sock", 0) + kernel
        assert probes._decode_v2(text.encode()) == expected


class TestReadPressure:
    def test_the_numbers_and_their_units(self, tmp_path):
        (tmp_path / "memory.pressure").write_text(
            "some avg10=1.50 avg60=2.25 avg300=0.10 total=2500000\n"
            "full avg10=0.50 avg60=0.75 avg300=0.05 total=1250000\n"
        )
        assert read_pressure(tmp_path / "memory.pressure") == PressureStall(
            some_avg10=1.5,
            some_avg60=2.25,
            full_avg10=0.5,
            full_avg60=0.75,
            some_total_seconds=2.5,
            full_total_seconds=1.25,
        )

    @pytest.mark.parametrize(
        "content",
        ["", "some\n", "some avg10=x avg60=0 total=0\n", "some avg10=0 avg60=0 total=0\n", "\n"],
    )
    def test_none_where_it_says_nothing_of_use(self, tmp_path, content):
        (tmp_path / "memory.pressure").write_text(content)
        assert read_pressure(tmp_path / "memory.pressure") is None

    def test_none_where_there_is_none(self, tmp_path):
        assert read_pressure(tmp_path / "memory.pressure") is None

    @pytest.mark.skipif(not os.path.exists("/proc/pressure/memory"), reason="no PSI here")
    def test_of_this_machine(self):
        stall = read_pressure()
        assert stall is not None
        assert 0 <= stall.full_avg10 <= stall.some_avg10 <= 100
        assert 0 <= stall.full_total_seconds <= stall.some_total_seconds
