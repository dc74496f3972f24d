"""Real memory cgroups for tests: make one with a limit, run a child in it, see what happened."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CgroupUnavailable", "MemoryCgroup", "memory_cgroup", "why_not"]

_numbers = itertools.count(1)


class CgroupUnavailable(Exception):
    """No memory cgroup can be made here; the message says why."""


@dataclass(frozen=True)
class MemoryCgroup:
    """A memory cgroup of our own.

    Attributes:
        path: its directory.
        version: 1 or 2.
    """

    path: Path
    version: int

    def command(self, argv: Sequence[str | os.PathLike[str]]) -> list[str]:
        """Give a command that runs ``argv`` in here.

        A shell puts itself into the cgroup and then becomes the program, so that all the
        program's memory is charged to it, from the first page on. The process id and the
        exit status are the program's.
        """
        enter = 'echo 0 > "$0" && exec "$@"'
        return ["/bin/sh", "-c", enter, str(self.path / "cgroup.procs"), *map(str, argv)]

    def run(
        self, argv: Sequence[str | os.PathLike[str]], **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run ``argv`` in here to its end, with its output captured as text.

        Args:
            argv: the program and its arguments.
            options: what else ``subprocess.run`` takes; ``timeout`` is 120 s by default.
        """
        settings = {"capture_output": True, "text": True, "timeout": 120}
        return subprocess.run(self.command(argv), check=False, **(settings | options))

    @property
    def limit_bytes(self) -> int:
        """The limit in force."""
        return int((self.path / _limit_file(self.version)).read_text())

    def set_limit(self, limit_bytes: int) -> None:
        """Change the limit, swap included where the kernel counts it."""
        swap, most = (
            ("memory.swap.max", 0)
            if self.version == 2
            else ("memory.memsw.limit_in_bytes", limit_bytes)
        )
        # Version 1 keeps the limit with swap at the other one or above: first to raise it, last to
        # lower it. No such file where swap is not counted.
        with contextlib.suppress(OSError):
            (self.path / swap).write_text(str(most))
        (self.path / _limit_file(self.version)).write_text(str(limit_bytes))
        with contextlib.suppress(OSError):
            (self.path / swap).write_text(str(most))

    @property
    def oom_kills(self) -> int:
        """How many processes the OOM killer has killed in here."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        return self._number(name, "oom_kill")

    @property
    def peak_bytes(self) -> int | None:
        """The most that was charged at any time, page cache too; None where not recorded."""
        name = "memory.peak" if self.version == 2 else "memory.max_usage_in_bytes"
        try:
            return int((self.path / name).read_text())
        except FileNotFoundError:
            return None  # version 2 before Linux 5.19

    @property
    def page_cache_bytes(self) -> int:
        """How much page cache is charged now, shared memory left out."""
        prefix, cache = ("", "file") if self.version == 2 else ("total_", "cache")
        stat = "memory.stat"
        return self._number(stat, prefix + cache) - self._number(stat, prefix + "shmem")

    def _number(self, name: str, key: str) -> int:
        words = (self.path / name).read_text().split()
        return int(words[words.index(key) + 1])

    def remove(self) -> None:
        """Kill what still runs in here and remove the cgroup; may take some milliseconds.

        Raises:
            OSError: it could not be removed within 10 s.
        """
        give_up = time.monotonic() + 10
        while self.path.exists():
            for pid in (self.path / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            try:
                self.path.rmdir()
            except OSError:
                # a killed process is in here until its memory is given back
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.01)


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int, parent: MemoryCgroup | None = None) -> Iterator[MemoryCgroup]:
    """Make a memory cgroup with that limit; at the end kill what is in it and remove it.

    Args:
        limit_bytes: the limit; the kernel rounds it down to whole pages.
        parent: make it in there instead of beside or below this process's cgroup.

    Raises:
        CgroupUnavailable: that is not possible here; says why.
    """
    if parent is None:
        directory, version = _parent()
    else:
        directory, version = parent.path, parent.version
    cgroup = MemoryCgroup(directory / f"membound-test-{os.getpid()}-{next(_numbers)}", version)
    try:
        if parent is not None and version == 2:
            (directory / "cgroup.subtree_control").write_text("+memory")
        cgroup.path.mkdir()
    except OSError as error:
        raise CgroupUnavailable(f"cannot make a memory cgroup: {error}") from error
    try:
        try:
            cgroup.set_limit(limit_bytes)
        except OSError as error:
            raise CgroupUnavailable(f"cannot limit a memory cgroup: {error}") from error
        yield cgroup
    finally:
        cgroup.remove()


@functools.cache
def why_not() -> str | None:
    """Say why no memory cgroup can be made and used here; None when it can.

    Tries it once. For ``pytest.mark.skipif(why_not() is not None, reason=str(why_not()))``.
    """
    try:
        with memory_cgroup(64 * 1024 * 1024) as cgroup:
            outcome = cgroup.run(["true"])
    except CgroupUnavailable as error:
        return str(error)
    if outcome.returncode != 0:
        return f"cannot put a process into a memory cgroup: {outcome.stderr.strip()}"
    return None


def _limit_file(version: int) -> str:
    return "memory.max" if version == 2 else "memory.limit_in_bytes"


def _parent() -> tuple[Path, int]:
    """Give a directory in which a memory cgroup may be made, and its version."""
    try:
        own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError as error:
        raise CgroupUnavailable(f"this system has no cgroups: {error}") from error
    version_1 = _directory(
        mounts, "cgroup", "memory", [p for _, names, p in own if "memory" in names.split(",")]
    )
    if version_1 is not None:
        return version_1, 1
    version_2 = _directory(mounts, "cgroup2", None, [p for number, _, p in own if number == "0"])
    if version_2 is None:
        raise CgroupUnavailable("no memory cgroup hierarchy is mounted")
    # The own cgroup has processes, so its children may not have the controller, unless it
    # is the root; but an ancestor that has no processes may have been delegated to us.
    for directory in (version_2, *version_2.parents):
        with contextlib.suppress(OSError):
            if "memory" in (directory / "cgroup.subtree_control").read_text().split():
                return directory, 2
    raise CgroupUnavailable(
        f"no cgroup from {version_2} upwards has the memory controller enabled for its children"
    )


def _directory(mounts: list[str], kind: str, option: str | None, paths: list[str]) -> Path | None:
    for line in mounts:
        mount, _, file_system = line.partition(" - ")
        this_kind, *_, options = file_system.split(" ")
        if this_kind == kind and paths and (option is None or option in options.split(",")):
            root, top = mount.split(" ")[3:5]
            below = paths[0].removeprefix(root).strip("/")
            directory = Path(top) / below
            return directory if directory.is_dir() else Path(top)
    return None
