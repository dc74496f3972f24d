"""Limits: how much memory the process may use, who says so, and what measures it."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from operator import itemgetter
from typing import Literal

import psutil

from .exceptions import InvalidLimit, LimitNotDetected
from .probes import CgroupProbe, KeptFile, MemoryProbe, ProcessProbe
from .sizes import MAX_BYTES, format_size, parse_size

__all__ = ["DetectedLimit", "LimitSource", "Machine", "MemoryLimit", "detect", "resolve"]

_REMEDY = 'pass limit=, for example MemoryLimiter("512MiB"), or set MEMBOUND_LIMIT'


@dataclass(frozen=True)
class MemoryLimit:
    """A limit and the part of it that is held back for what nobody can account.

    Attributes:
        limit_bytes: bytes that may be used, from 1 to 2**53.
        slop_factor: part of the limit to hold back, ``0 <= slop_factor < 1`` (Saluki).
        source: who set the limit, in words.

    Raises:
        InvalidLimit: one of the numbers is out of range.
    """

    limit_bytes: int
    slop_factor: float = 0.15
    source: str = "explicit"

    def __post_init__(self) -> None:
        limit, slop = self.limit_bytes, self.slop_factor
        if not (_is_a(int, limit) and 1 <= limit <= MAX_BYTES):
            raise InvalidLimit(
                f"limit_bytes={limit!r} is no limit; it must be an int from 1 to 2**53 bytes"
            )
        if not (_is_a((int, float), slop) and 0 <= slop < 1):  # false for NaN
            raise InvalidLimit(
                f"slop_factor={slop!r} is no part of the limit; it must be a number of at "
                "least 0 and below 1, for example 0.15"
            )

    @property
    def effective_bytes(self) -> int:
        """The limit less the slop, rounded down: ``int(limit * (1 - slop_factor))``.

        Exact: the factor is taken as it is written, so 1000 bytes with 0.9 leave 100 and
        not, as floats would have it, 99.
        """
        return int(self.limit_bytes * (1 - Fraction(str(self.slop_factor))))


@dataclass(frozen=True, slots=True)
class LimitSource:
    """One place that a limit may come from.

    Attributes:
        name: what it is and where, in words.
        read_limit: gives its limit now in bytes, None for no limit; raises ``OSError``.
        open_probe: makes the probe that measures what this limit counts.
        shared: the limit is on all processes together, not on each.
        pressure_path: where the kernel reports stalls at this level; None for nowhere.
    """

    name: str
    read_limit: Callable[[], int | None]
    open_probe: Callable[[], MemoryProbe]
    shared: bool = True
    pressure_path: str | None = None

    def read_share(self, processes: int) -> int | None:
        """Give one process's part of the limit now; raises ``OSError``."""
        limit = self.read_limit()
        return limit // processes if limit is not None and self.shared else limit


@dataclass(frozen=True, slots=True)
class DetectedLimit:
    """The limit to keep, and how to measure against it.

    Attributes:
        limit_bytes: for this process.
        source: who set it: ``"explicit"``, ``"MEMBOUND_LIMIT"``, ``"cgroup v2 /sys/..."``,
            ``"RLIMIT_DATA"``, ``"physical memory"``, with the number of processes that it
            was divided by.
        probe: measures what the limit counts.
        reread: gives what the system allows this process now, whichever level binds by
            then; raises ``OSError`` when that cannot be told. Some 2 microseconds for each
            level, 20 for version 1. None for a given limit, which does not change.
        exceeds: the detected limit that is lower than this one, which was given; None if
            there is none.
        pressure_path: the ``memory.pressure`` of the cgroup that binds; None for the whole
            machine's.
    """

    limit_bytes: int
    source: str
    probe: MemoryProbe
    reread: Callable[[], int] | None = None
    exceeds: str | None = None
    pressure_path: str | None = None


def _soft_rlimit(name: str) -> int | None:
    if sys.platform != "linux":
        return None  # elsewhere it is not enforced, or nothing says what it counts
    import resource

    limit: int = resource.getrlimit(getattr(resource, name))[0]
    return None if limit == resource.RLIM_INFINITY else _limited(limit)


def _physical_bytes() -> int | None:
    try:
        return int(psutil.virtual_memory().total)
    except (OSError, psutil.Error):
        return None


@dataclass(frozen=True, slots=True)
class Machine:
    """What the system says about itself; tests put another one in its place.

    Attributes:
        root: the directory that ``/proc`` and the cgroup mount points are looked for in.
        rlimit: gives the soft limit of that name in bytes, None for no limit.
        physical_bytes: gives the size of the memory, None if that is not known.
    """

    root: str = "/"
    rlimit: Callable[[str], int | None] = _soft_rlimit
    physical_bytes: Callable[[], int | None] = _physical_bytes

    def sources(self) -> Iterator[LimitSource]:
        """Give every place a limit may come from, containers first, outermost first."""
        yield from _cgroup_sources(self.root)
        yield LimitSource(
            "RLIMIT_AS",
            partial(self.rlimit, "RLIMIT_AS"),
            partial(ProcessProbe, "virtual"),
            shared=False,
        )
        yield LimitSource(
            "RLIMIT_DATA",
            partial(self.rlimit, "RLIMIT_DATA"),
            partial(ProcessProbe, "data"),
            shared=False,
        )
        physical = self.physical_bytes()
        yield LimitSource("physical memory", lambda: physical, ProcessProbe)


def detect(
    *,
    processes: int = 1,
    processes_from: str = "processes",
    probe: MemoryProbe | None = None,
    machine: Machine | None = None,
) -> DetectedLimit:
    """Give the smallest limit that the system sets for this process.

    Looked at are the memory cgroup of the process and all its visible ancestors (version 2
    and 1, hybrid too), ``RLIMIT_AS``, ``RLIMIT_DATA`` and the physical memory. What is
    measured belongs to the limit: the very cgroup that binds, the address space, the data
    segment, or the process's RSS. Of ancestors with equal limits the outermost binds, for
    it holds at least as much.

    ``memory.high`` (and version 1's soft limit) is no limit here: above it the kernel
    reclaims and slows the cgroup down, but kills nobody, and it is often set low on
    purpose, as a wish. How much it slows the program down is in the pressure stall
    information (``pressure_path``).

    Args:
        processes: how many processes share what the container allows. With more than one,
            each takes its part of a shared limit and measures its own RSS.
        processes_from: what set that number, for ``source``.
        probe: measure with this one instead; no other is opened then.
        machine: where to look.

    Raises:
        InvalidLimit: a limit cannot be read or makes no sense; names the path.
        LimitNotDetected: nothing sets any limit.
    """
    try:
        sources = _readable((machine or Machine()).sources())
        found = _smallest(sources, processes)
    except OSError as error:
        raise InvalidLimit(f"cannot read a memory limit: {error}; {_REMEDY}") from error
    if found is None:
        raise LimitNotDetected(tuple(source.name for source in sources))
    limit, binding = found
    if limit < 1:
        raise InvalidLimit(f"{binding.name} allows {limit} bytes to each process; {_REMEDY}")

    def reread() -> int:
        found = _smallest(sources, processes)  # another level may bind by now
        if found is None:
            raise OSError(errno.ENODATA, "no memory limit any more", binding.name)
        return max(1, found[0])

    divided = binding.shared and processes > 1
    if probe is None:
        probe = ProcessProbe() if divided else binding.open_probe()
    return DetectedLimit(
        limit_bytes=limit,
        source=binding.name + (f", divided by {processes_from}={processes}" if divided else ""),
        probe=probe,
        reread=reread,
        pressure_path=binding.pressure_path,
    )


def resolve(
    limit: int | str | None = None,
    *,
    processes: int | None = None,
    probe: MemoryProbe | None = None,
    environ: Mapping[str, str] | None = None,
    machine: Machine | None = None,
) -> DetectedLimit:
    """Give the limit to keep: the given one, else ``MEMBOUND_LIMIT``, else the detected one.

    A given limit is measured by the process's RSS.

    Args:
        limit: bytes, or ``"512MiB"``; None to detect.
        processes: how many processes share the limit; None for ``WEB_CONCURRENCY``, which
            web servers set, or 1. Each takes ``limit // processes`` and measures its own
            RSS. Limits on single processes (``RLIMIT_AS``, ``RLIMIT_DATA``) are not divided.
        probe: measure with this one instead; no other is opened then.
        environ: the environment variables; None for the process's own. Empty ones count as
            not set.
        machine: where to look.

    Raises:
        InvalidLimit: a value makes no sense; names it, or its variable, and the remedy.
        LimitNotDetected: there is none.
    """
    environ = os.environ if environ is None else environ
    count, counted_by = _count(processes, environ)
    source = "explicit"
    if limit is None:
        source = "MEMBOUND_LIMIT"
        limit = environ.get(source, "").strip() or None
    if limit is None:
        return detect(processes=count, processes_from=counted_by, probe=probe, machine=machine)
    name = "limit" if source == "explicit" else source
    try:
        given = parse_size(limit, name)
    except (TypeError, ValueError) as error:
        raise InvalidLimit(str(error)) from None
    share = given // count
    if share < 1:
        raise InvalidLimit(
            f"{name}={limit!r} leaves {share} bytes to each of {count} processes; give at "
            f"least {count} bytes, for example 512MiB, or none to have it detected"
        )
    return DetectedLimit(
        limit_bytes=share,
        source=source + (f", divided by {counted_by}={count}" if count > 1 else ""),
        probe=ProcessProbe() if probe is None else probe,
        exceeds=_lower_than(share, count, machine or Machine()),
    )


def _count(processes: int | None, environ: Mapping[str, str]) -> tuple[int, str]:
    """Give how many processes share the limit, and what says so."""
    name = "processes"
    value: object = processes
    if processes is None:
        name = "WEB_CONCURRENCY"
        text = environ.get(name, "").strip() or "1"
        value = int(text) if text.isascii() and text.isdecimal() else text
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidLimit(
            f"{name}={value!r} is no number of processes; it must be a whole number of at "
            "least 1, or not be set"
        )
    return value, name


def _lower_than(share: int, processes: int, machine: Machine) -> str | None:
    try:
        found = _smallest(_readable(machine.sources()), processes)
    except (OSError, InvalidLimit):
        return None  # it was given, so what cannot be detected is not needed
    if found is None or found[0] >= share:
        return None
    return f"{found[1].name}: {format_size(found[0])}"


def _readable(sources: Iterable[LimitSource]) -> list[LimitSource]:
    """Leave out levels without the memory controller, or not visible here."""
    readable: list[LimitSource] = []
    for source in sources:
        try:
            source.read_limit()
        except (FileNotFoundError, NotADirectoryError):
            continue
        readable.append(source)
    return readable


def _smallest(sources: Iterable[LimitSource], processes: int) -> tuple[int, LimitSource] | None:
    """Give the lowest limit there is now; of equal ones the first. Raises ``OSError``."""
    shares = ((source.read_share(processes), source) for source in sources)
    limited = [(share, source) for share, source in shares if share is not None]
    return min(limited, key=itemgetter(0), default=None)


def _is_a(kind: type | tuple[type, ...], value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _limited(limit: int) -> int | None:
    """None for numbers that stand for "no limit", such as version 1's 2**63 - 4096."""
    return limit if limit <= MAX_BYTES else None


def _cgroup_sources(root: str) -> Iterator[LimitSource]:
    """Give the memory cgroups that the process is in, outermost first."""
    own = _own_cgroups(root)
    above: list[LimitSource] = []
    for version, mount_root, mount_point in _cgroup_mounts(root):
        top = os.path.join(root, mount_point.lstrip("/"))
        levels = _visible_levels(mount_root, own.get(version))
        directories = [os.path.join(top, level).rstrip("/") for level in levels]
        yield from (_cgroup_source(directory, version) for directory in directories)
        if version == 1 and directories:
            above.append(_source_above(directories[0], directories[-1]))
    yield from above  # last, so that of equal limits the visible one binds


def _cgroup_source(directory: str, version: Literal[1, 2]) -> LimitSource:
    name = "memory.max" if version == 2 else "memory.limit_in_bytes"
    return LimitSource(
        f"cgroup v{version} {directory}",
        partial(KeptFile(os.path.join(directory, name)).read, _decode_limit),
        partial(CgroupProbe, directory, version),
        pressure_path=os.path.join(directory, "memory.pressure") if version == 2 else None,
    )


def _source_above(outermost: str, own: str) -> LimitSource:
    """Version 1 tells the limit of ancestors that are not visible in here.

    The best measure for such a one is the outermost cgroup that is visible.
    """
    return LimitSource(
        f"a cgroup above cgroup v1 {outermost}",
        partial(KeptFile(os.path.join(own, "memory.stat")).read, _decode_hierarchical_limit),
        partial(CgroupProbe, outermost, 1),
    )


def _decode_limit(content: bytes) -> int | None:
    text = content.strip()
    return None if text == b"max" else _limited(int(text))


def _decode_hierarchical_limit(memory_stat: bytes) -> int | None:
    words = memory_stat.split()
    return _limited(int(words[words.index(b"hierarchical_memory_limit") + 1]))


def _own_cgroups(root: str) -> dict[int, str]:
    """Give the cgroup path of the process by version, as ``/proc/self/cgroup`` has it."""
    own: dict[int, str] = {}
    for line in _lines(root, "proc/self/cgroup"):
        hierarchy, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            own[1] = path
        elif hierarchy == "0":
            own[2] = path
    return own


def _cgroup_mounts(root: str) -> Iterator[tuple[Literal[1, 2], str, str]]:
    """Give version, root and mount point of each mount of a memory cgroup hierarchy."""
    for line in _lines(root, "proc/self/mountinfo"):
        # 35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
        mount, _, file_system = line.partition(" - ")
        mount_root, mount_point = map(_unescaped, mount.split(" ")[3:5])
        kind, *_, options = file_system.split(" ")
        if kind == "cgroup2":
            yield 2, mount_root, mount_point
        elif kind == "cgroup" and "memory" in options.split(","):
            yield 1, mount_root, mount_point


def _unescaped(path: str) -> str:
    """Undo the octal escapes of mountinfo: a backslash and 040 are a space."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), path)


def _visible_levels(mount_root: str, own: str | None) -> list[str]:
    """Give the own cgroup and its ancestors below a mount point, outermost first.

    ``mount_root`` is the cgroup that is mounted there, ``own`` the process's; both are
    relative to the root of the cgroup namespace, so either may start with ``/..``. Where
    the mount is above the namespace, the levels in between have no name in here and only
    the mount point itself is sure to be an ancestor. A mount that is no ancestor is none
    of ours.
    """
    if own is None:
        return []
    mounted_up, mounted = _split(mount_root)
    own_up, names = _split(own)
    if mounted_up == own_up and names[: len(mounted)] == mounted:
        below = names[len(mounted) :]
        return ["/".join(below[:depth]) for depth in range(len(below) + 1)]
    return [""] if mounted_up > own_up and not mounted else []


def _split(path: str) -> tuple[int, list[str]]:
    """Give how many levels ``path`` goes up first, and the names that it then goes down."""
    parts = [part for part in path.split("/") if part]
    up = sum(part == ".." for part in parts)
    return up, parts[up:]


def _lines(root: str, name: str) -> list[str]:
    """Give the lines of a file in ``/proc``; none where there is no such file.

    Raises:
        InvalidLimit: it is there and cannot be read.
    """
    path = os.path.join(root, name)
    try:
        with open(path, "rb") as file:
            return os.fsdecode(file.read()).split("\n")[:-1]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InvalidLimit(f"cannot read a memory limit: {error}; {_REMEDY}") from error
