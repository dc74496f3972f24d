"""Probes: how much memory is in use now, measured as the limit counts it."""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import psutil

from .exceptions import InvalidLimit
from .sizes import MAX_BYTES

__all__ = [
    "CgroupProbe",
    "MemoryProbe",
    "PressureStall",
    "ProcessProbe",
    "check_reading",
    "read_pressure",
]

T = TypeVar("T")

_REMEDY = "pass probe=, or pass limit= or set MEMBOUND_LIMIT to have the process's RSS measured"


class MemoryProbe(Protocol):
    """Anything that says how many bytes are in use now.

    A probe is read on the event loop, so it should take microseconds and must not wait.
    """

    @property
    def name(self) -> str:
        """What is measured, in a few words for reports."""
        ...

    def read(self) -> int:
        """Give the bytes in use now, from 0 to 2**53.

        Raises:
            OSError: there is no reading at the moment.
        """
        ...


def check_reading(value: object, name: str) -> int:
    """Give ``value`` if it can be a number of bytes in use.

    Args:
        value: what a probe's ``read()`` returned.
        name: the probe's name, for the error message.

    Raises:
        TypeError: no ``int`` (a ``bool`` and a ``float`` are none).
        ValueError: negative, or above 2**53.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"probe {name!r} read {value!r} ({type(value).__name__}); read() must return a "
            "number of bytes as an int"
        )
    if not 0 <= value <= MAX_BYTES:
        raise ValueError(
            f"probe {name!r} read {value!r} bytes; read() must return from 0 to 2**53 bytes"
        )
    return value


class _Descriptor:
    """An open file that closes itself when nobody uses it any more, or at ``close()``.

    A program may close every descriptor it did not open (daemons do), and the number may
    then belong to another file: it is only closed while it still is the file opened here.
    """

    __slots__ = ("__weakref__", "_identity", "close", "number")

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)
        self._identity = _identity(self.number)
        self.close = weakref.finalize(self, _close, self.number, self._identity)  # once only
        self.close.atexit = False

    def is_ours(self) -> bool:
        return _identity(self.number) == self._identity


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _close(number: int, identity: tuple[int, int]) -> None:
    try:
        if _identity(number) == identity:
            os.close(number)
    except OSError:
        pass  # closed already, which is all that is wanted


class KeptFile:
    """A small file of the kernel's that is opened once and read with one ``pread`` each time.

    What reads wrong is opened anew, once: the descriptor was closed from outside, now
    belongs to another file, or its cgroup was removed and made again. Threads may read at
    the same time.

    Args:
        path: the file.
        size: bytes to read, more than the content. (A buffer of 8 KiB costs a statm 40 %.)
        unlike_others: no other file could be taken for this one, which saves a look
            whether the descriptor still is this file's.
    """

    __slots__ = ("_descriptor", "_size", "_unlike_others", "path")

    def __init__(self, path: str, size: int = 8192, *, unlike_others: bool = False) -> None:
        self.path = path
        self._size = size
        self._unlike_others = unlike_others
        self._descriptor: _Descriptor | None = None

    def drop(self) -> None:
        """Forget the open file; the next reading opens it again."""
        self._descriptor = None

    def read(self, decode: Callable[[bytes], T]) -> T:
        """Give what ``decode`` makes of the content.

        Raises:
            OSError: the file cannot be read, or ``decode`` does not understand it; carries
                the path.
        """
        descriptor = self._descriptor
        if descriptor is not None:
            try:
                if self._unlike_others or descriptor.is_ours():
                    return decode(os.pread(descriptor.number, self._size, 0))
            except (OSError, ValueError, LookupError):
                pass
            descriptor.close()  # now, for the file opened next may get the same number
            self._descriptor = None
        try:
            descriptor = _Descriptor(self.path)
            value = decode(os.pread(descriptor.number, self._size, 0))
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from error
        except (ValueError, LookupError) as error:
            raise OSError(errno.EBADMSG, f"unexpected content ({error!r})", self.path) from error
        self._descriptor = descriptor
        return value


# One for the whole process. An open /proc/self/statm shows the process that opened it, so
# a forked child must not go on with the parent's.
_STATM = KeptFile("/proc/self/statm", size=256, unlike_others=True)
if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has no fork
    os.register_at_fork(after_in_child=_STATM.drop)

ProcessField = Literal["rss", "virtual", "data"]

# what is measured, its place in statm, psutil's name for it
_PROCESS_FIELDS: dict[str, tuple[str, int, str]] = {
    "rss": ("RSS", 1, "rss"),
    "virtual": ("virtual memory", 0, "vms"),
    "data": ("data and stack", 5, "data"),
}


class ProcessProbe:
    """Measures this process.

    On Linux one ``pread`` of ``/proc/self/statm``, under 2 microseconds; elsewhere, and
    with ``children``, psutil. After a fork the child's probe measures the child.

    Args:
        field: ``"rss"``, the resident memory, shared pages included; ``"virtual"``, the
            address space, which ``RLIMIT_AS`` counts; ``"data"``, private writable memory,
            which ``RLIMIT_DATA`` counts (plus the main thread's stack, which it does not:
            some 100 KiB too much, on the safe side).
        children: add all descendants. Pages that they share are counted once for each, and
            one reading looks at every process of the machine: milliseconds, not
            microseconds.

    Raises:
        InvalidLimit: no such field, or this system does not say.
    """

    def __init__(self, field: ProcessField = "rss", *, children: bool = False) -> None:
        if field not in _PROCESS_FIELDS:
            raise InvalidLimit(
                f"field={field!r} is nothing a process is measured by; use one of "
                + ", ".join(map(repr, _PROCESS_FIELDS))
            )
        words, self._place, self._attribute = _PROCESS_FIELDS[field]
        self._children = children
        self._psutil = children or not os.path.exists(_STATM.path)
        self.name = f"{words} of this process" + (" and its children" if children else "")
        try:
            self.read()
        except OSError as error:
            raise InvalidLimit(f"cannot measure the {self.name}: {error}; pass probe=") from error

    def read(self) -> int:
        """Give the bytes in use now.

        Raises:
            OSError: the system does not say.
        """
        if self._psutil:
            return self._read_psutil()
        return _STATM.read(self._decode)

    def _decode(self, statm: bytes) -> int:
        pages = statm.split()
        if len(pages) != 7:
            raise ValueError(statm)
        return int(pages[self._place]) * mmap.PAGESIZE

    def _read_psutil(self) -> int:
        try:
            process = psutil.Process()
            total = self._of(process)
            for child in process.children(recursive=True) if self._children else ():
                try:
                    total += self._of(child)
                except psutil.NoSuchProcess:
                    continue  # ended meanwhile
        except psutil.Error as error:
            raise OSError(errno.ENODATA, str(error)) from error
        return total

    def _of(self, process: psutil.Process) -> int:
        memory = process.memory_info()
        try:
            return int(getattr(memory, self._attribute))
        except AttributeError:
            raise OSError(
                errno.ENOTSUP, f"psutil reports no {self._attribute!r} on this system"
            ) from None


class CgroupProbe:
    """Measures what a memory cgroup, children included, cannot give back.

    The kernel kills when a cgroup is at its limit and nothing in it can be reclaimed; page
    cache can be, so it is left out.

    - Version 2: anonymous + shared memory (tmpfs too) + kernel memory without reclaimable
      slab + sockets + hugetlb where it is accounted. Kernels before 5.18 have no ``kernel``
      line; then kernel stacks, page tables, per-CPU memory, vmalloc and unreclaimable slab
      are added up, which misses a little (pipe buffers, BPF, io_uring).
    - Version 1: ``total_rss`` + ``total_shmem`` + all kernel memory. It does not tell
      reclaimable slab (dentries, inodes) from the rest, so a program that walks millions
      of files reads high until the kernel reclaims; and kernels without ``total_shmem``
      count shared memory as page cache, so it is missed.

    Locked (``mlock``) file pages and dirty pages count as page cache in both. Memory in
    swap counts in neither. The kernel brings the numbers up to date when they are off by
    more than 256 KiB per CPU, and every two seconds.

    Args:
        path: the cgroup's directory.
        version: 1 or 2.

    Raises:
        InvalidLimit: the files cannot be read; names the path and the remedy.
    """

    def __init__(self, path: str | os.PathLike[str], version: Literal[1, 2]) -> None:
        self.path = os.fspath(path)
        self.version = version
        self.name = f"unreclaimable memory of cgroup v{version} {self.path}"
        self._stat = KeptFile(os.path.join(self.path, "memory.stat"))
        # absent where kernel memory is not accounted (booted with cgroup.memory=nokmem)
        kernel_memory = os.path.join(self.path, "memory.kmem.usage_in_bytes")
        counts_kernel = version == 1 and os.path.exists(kernel_memory)
        self._kernel_memory = KeptFile(kernel_memory) if counts_kernel else None
        self._decode = _decode_v1 if version == 1 else _decode_v2
        try:
            self.read()
        except OSError as error:
            raise InvalidLimit(
                f"cannot measure cgroup v{version} {self.path}: {error}; {_REMEDY}"
            ) from error

    def read(self) -> int:
        """Give the bytes in use now.

        Raises:
            OSError: the files cannot be read any more; carries the path. The cgroup was
                removed, or is not visible any more.
        """
        in_use = self._stat.read(self._decode)
        if self._kernel_memory is not None:
            in_use += self._kernel_memory.read(int)
        return in_use


_OTHER_KERNEL_MEMORY = (
    b"kernel_stack",
    b"pagetables",
    b"sec_pagetables",
    b"percpu",
    b"vmalloc",
    b"slab_unreclaimable",
)


def _decode_v2(memory_stat: bytes) -> int:
    stat = _pairs(memory_stat)
    if b"kernel" in stat:
        # the counters are not read in one instant, hence the max
        kernel = max(0, int(stat[b"kernel"]) - int(stat.get(b"slab_reclaimable", 0)))
    else:
        kernel = sum(int(stat.get(key, 0)) for key in _OTHER_KERNEL_MEMORY)
    others = sum(int(stat.get(key, 0)) for key in (b"shmem", b"sock", b"hugetlb"))
    return int(stat[b"anon"]) + others + kernel


def _decode_v1(memory_stat: bytes) -> int:
    stat = _pairs(memory_stat)
    return int(stat[b"total_rss"]) + int(stat.get(b"total_shmem", 0))


def _pairs(text: bytes) -> dict[bytes, bytes]:
    words = text.split()
    return dict(zip(words[::2], words[1::2], strict=True))


@dataclass(frozen=True, slots=True)
class PressureStall:
    """How much time went by waiting for memory: the kernel's pressure stall information.

    Reported, never decided on: it says that memory is short, not by how many bytes.
    """

    some_avg10: float  # percent of the last 10 s in which some task waited for memory
    some_avg60: float  # the same of the last 60 s
    full_avg10: float  # percent of the last 10 s in which every task that could run waited
    full_avg60: float  # the same of the last 60 s
    some_total_seconds: float  # time some task waited since the start
    full_total_seconds: float  # time all waited since the start


def read_pressure(path: str | os.PathLike[str] | None = None) -> PressureStall | None:
    """Give the pressure stall information, or None where the system reports none.

    Args:
        path: a cgroup's ``memory.pressure`` (version 2); None for the whole machine's
            ``/proc/pressure/memory``.

    About 10 microseconds; it waits for nothing and raises nothing.
    """
    try:
        with open("/proc/pressure/memory" if path is None else path, "rb") as file:
            lines = [line.split() for line in file]
        stall = {words[0]: dict(_percent(word) for word in words[1:]) for words in lines}
        some, full = stall[b"some"], stall[b"full"]
        return PressureStall(
            some_avg10=some[b"avg10"],
            some_avg60=some[b"avg60"],
            full_avg10=full[b"avg10"],
            full_avg60=full[b"avg60"],
            some_total_seconds=some[b"total"] / 1e6,
            full_total_seconds=full[b"total"] / 1e6,
        )
    except (OSError, ValueError, LookupError):
        return None


def _percent(word: bytes) -> tuple[bytes, float]:
    key, _, number = word.partition(b"=")
    return key, float(number)
