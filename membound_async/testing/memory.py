"""Fake memory: what a program uses, made of what it was granted and what a test says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from membound_async import allocator
from membound_async.bounds import ROOT
from membound_async.context import current_component
from membound_async.eventloop import running_loop
from membound_async.sizes import parse_size
from membound_async.stocks import NO_LIMIT

if TYPE_CHECKING:
    from membound_async.allocator import AllocationGroup
    from membound_async.component import Component
    from membound_async.limiter import MemoryLimiter
    from membound_async.stocks import Account

__all__ = ["Allocation", "ComponentUsage", "FakeMemory", "MemoryUsage", "Tracked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentUsage:
    """What one component used at one moment, and what it was allowed to."""

    path: str
    #: reserved for it while it is entered, and the most it may hold; None for no such limit
    minimum_bytes: int
    firm_limit_bytes: int | None
    #: granted to it, in flight included
    granted_bytes: int
    #: what its code really had allocated, where that is tracked; else 0
    live_bytes: int
    #: what the test said with ``FakeMemory.allocate()``
    allocated_bytes: int
    #: all that, in memory: the most of what it was granted, times ``per_granted``, and what is
    #: live; and what is allocated
    in_use_bytes: int
    #: how much that is beyond its grants and its minimum
    beyond_grants_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUsage:
    """All memory that was in use at one moment, and by whom."""

    #: when, in seconds since the memory follows its limiter
    at_seconds: float
    in_use_bytes: int
    #: ``others=``, what has leaked, and what was freed and has not come back
    others_bytes: int
    leaked_bytes: int
    kept_bytes: int
    #: the components that use or hold anything, those with the most first
    components: tuple[ComponentUsage, ...]


class Tracked:
    """What components really have allocated since this was made, where that is tracked."""

    def __init__(self) -> None:
        self._before: dict[AllocationGroup, int] = {}
        self._peaks: dict[AllocationGroup, int] = {}
        if allocator.enabled():
            for group in allocator.registry:
                self._before[group] = group.live_bytes
                self._peaks[group] = group.statistics().peak_live_bytes

    def now(self, path: str) -> int:
        """Give what is live of a component."""
        group = self._group(path)
        return 0 if group is None else max(0, group.live_bytes - self._before.get(group, 0))

    def highest(self, path: str) -> int:
        """Give the most that was live of a component since this was asked the last time.

        A peak below an earlier one is not known; then it is what is live now.
        """
        group = self._group(path)
        if group is None:
            return 0
        peak = group.statistics().peak_live_bytes
        if peak <= self._peaks.get(group, 0):
            return self.now(path)
        self._peaks[group] = peak
        return max(0, peak - self._before.get(group, 0))

    @staticmethod
    def _group(path: str) -> AllocationGroup | None:
        return allocator.registry.get(path) if allocator.enabled() else None


class FakeMemory:
    """A memory probe that reads what a program would use, as far as a test says how much.

    ::

        memory = testing.FakeMemory(per_granted={"decode": 3}, leak_per_second="1MiB")
        limiter = testing.limiter("256MiB", probe=memory)

    In use are, added up:

    - of each component what it was granted, times ``per_granted``; or what its code really has
      allocated, where that is tracked (``allocator.install()``) and more;
    - what the test has allocated with `allocate()`;
    - what all others use, what has leaked, and what was freed and not given back.

    Seconds count from the first reading in an event loop.

    Args:
        others: what nobody was granted: bytes, or a function of the seconds that have passed,
            which gives bytes and must not ask the limiter for anything.
        per_granted: how many bytes are used for each that is granted: for all components, or
            for each path (what is below it has the same; others have 1).
        leak_per_second: bytes that are lost in each second.
        keeps_freed: whether memory that components have freed stays in use until they use it
            again, as RSS does when the heap is in pieces. (As of readings, unless
            ``watch_bounded`` watches.)

    Attributes:
        name: what reports say that the probe measures.
        reads: how many times it has been read.

    Raises:
        TypeError, ValueError: an argument makes no sense.
    """

    name = "fake memory"

    def __init__(
        self,
        *,
        others: int | str | Callable[[float], int] = 0,
        per_granted: float | Mapping[str, float] = 1,
        leak_per_second: int | str = 0,
        keeps_freed: bool = False,
    ) -> None:
        factors = per_granted if isinstance(per_granted, Mapping) else {"": per_granted}
        for path, factor in factors.items():
            if not factor >= 0:
                raise ValueError(f"per_granted: {factor!r} for {path!r} is no factor")
        self._factors: dict[str, float] = {"": 1, **factors}
        self._leak_per_second = parse_size(leak_per_second, "leak_per_second")
        self._keeps_freed = keeps_freed
        self._others: Callable[[float], int]
        if callable(others):
            self._others = others
        else:
            nbytes = parse_size(others, "others")
            self._others = lambda _seconds: nbytes
        self.reads = 0
        self._lock = threading.Lock()
        self._limiter: MemoryLimiter | None = None
        self._begin()

    def _begin(self) -> None:
        self._allocated: dict[str, int] = {}
        self._highest_heap = 0
        self._seconds = 0.0
        self._started = 0.0
        self._clock: object = None
        self._tracked = Tracked()

    def follow(self, limiter: MemoryLimiter) -> None:
        """Have in use what this limiter grants; of another one than before, from the beginning.

        ``testing.limiter()`` and ``watch_bounded()`` see to it themselves.
        """
        if limiter is not self._limiter:
            self._limiter = limiter
            self._begin()

    def allocate(self, nbytes: int | str, component: Component | str | None = None) -> Allocation:
        """Have so many bytes in use besides what is granted, until they are freed.

        ::

            with memory.allocate("10MiB"):
                ...

        Args:
            nbytes: how many, or ``"10MiB"``.
            component: who is to have them; None for the one whose code is running.

        Returns:
            What is allocated: ``free()``, or the end of a ``with`` block, ends it.
        """
        size = parse_size(nbytes, "nbytes")
        if component is None:
            component = current_component()
        path = component if isinstance(component, str) else ROOT
        if component is not None and not isinstance(component, str):
            path = component.path
        allocated = self._allocated
        self._change(allocated, path, size)
        return Allocation(lambda: self._change(allocated, path, -size))

    def _change(self, allocated: dict[str, int], path: str, nbytes: int) -> None:
        # With the limiter's lock, for who watches it looks before and after.
        with self._lock if self._limiter is None else self._limiter._lock:
            allocated[path] = allocated.get(path, 0) + nbytes

    def read(self) -> int:
        """Give the bytes in use now."""
        self.reads += 1
        return self.usage().in_use_bytes

    def usage(self, live: Callable[[str], int] | None = None) -> MemoryUsage:
        """Give what is in use now, and who uses it.

        Args:
            live: what is live of the component of a path; None for what is tracked.
        """
        live = live or self._tracked.now
        accounts = {} if self._limiter is None else dict(self._limiter._ledger.accounts)
        paths = [*accounts, *(path for path in [*self._allocated] if path not in accounts)]
        used = [self._used_by(path, accounts.get(path), live(path)) for path in paths]
        heap = sum(one.in_use_bytes for one in used)
        self._highest_heap = max(self._highest_heap, heap)
        kept = self._highest_heap - heap if self._keeps_freed else 0
        seconds = self._now()
        others = int(self._others(seconds))
        leaked = int(self._leak_per_second * seconds)
        shown = [one for one in used if one.in_use_bytes or one.minimum_bytes]
        return MemoryUsage(
            at_seconds=seconds,
            in_use_bytes=heap + kept + others + leaked,
            others_bytes=others,
            leaked_bytes=leaked,
            kept_bytes=kept,
            components=tuple(sorted(shown, key=lambda one: -one.in_use_bytes)),
        )

    def _used_by(self, path: str, account: Account | None, live: int) -> ComponentUsage:
        minimum = granted = 0
        firm_limit = None
        if account is not None:
            minimum, granted = account.reserved, account.granted + account.in_flight
            firm_limit = None if account.firm_limit == NO_LIMIT else account.firm_limit
        allocated = self._allocated.get(path, 0)
        in_use = max(int(granted * self._factor(path)), live) + allocated
        return ComponentUsage(
            path=path,
            minimum_bytes=minimum,
            firm_limit_bytes=firm_limit,
            granted_bytes=granted,
            live_bytes=live,
            allocated_bytes=allocated,
            in_use_bytes=in_use,
            beyond_grants_bytes=max(0, in_use - max(granted, minimum)),
        )

    def _factor(self, path: str) -> float:
        while path and path not in self._factors:
            path = path.rpartition(".")[0]
        return self._factors[path]

    def _now(self) -> float:
        """Give the seconds since the first reading in a loop; from elsewhere, those of the last."""
        loop = running_loop()
        if loop is not None:
            if loop.token is not self._clock:
                self._clock = loop.token
                self._started = loop.now() - self._seconds
            self._seconds = loop.now() - self._started
        return self._seconds


class Allocation(AbstractContextManager["Allocation"]):
    """What a test has allocated; ``free()``, or the end of a ``with`` block, ends it."""

    def __init__(self, free: Callable[[], None]) -> None:
        self._free: Callable[[], None] | None = free

    def free(self) -> None:
        """Have it in use no more; does nothing the second time."""
        if self._free is not None:
            self._free()
            self._free = None

    def __exit__(self, *_: object) -> None:
        self.free()
