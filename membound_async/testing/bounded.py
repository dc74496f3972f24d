"""Watching a pipeline: would it have used more memory than there is, and does it end well?"""

from __future__ import annotations

import inspect
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any
from weakref import WeakSet

import anyio

from membound_async import allocator
from membound_async.eventloop import EventLoop, Handle, running_loop
from membound_async.grant import MemoryGrant
from membound_async.holdings import held_grants
from membound_async.hooks import Event, GrantLeaked
from membound_async.limiter import MemoryLimiter
from membound_async.sizes import parse_size
from membound_async.statistics import ComponentStatistics, HeldGrant, WaitingRequest

from .clock import Backend, virtual_time
from .limiters import limiter as limiter_for_tests
from .memory import FakeMemory, MemoryUsage, Tracked
from .report import NAMED, BoundedReport, ComponentReport, NotBounded

__all__ = ["Watch", "assert_bounded", "watch_bounded"]

LOOK_EVERY_SECONDS = 0.1
"""How often memory is looked at that changes by itself, as by a leak."""


def assert_bounded(
    pipeline: Callable[..., Awaitable[object]],
    *args: Any,
    limit: int | str,
    memory: FakeMemory | None = None,
    backend: Backend = "asyncio",
    timeout: float = 60.0,
    max_beyond_grants: int | str | None = None,
    **options: Any,
) -> BoundedReport:
    """Run a pipeline to its end on virtual time, and fail if it is not bounded.

    It has an event loop and a limiter of its own, which is the current one. For tests that are
    no ``async def``; in those, and where the limiter is there already, use `watch_bounded`.
    Real sockets and processes are too slow for virtual time: use it for these, too.

    Args:
        pipeline: an async function.
        args: what it is called with.
        limit: how much memory there is, or ``"64MiB"``; see ``testing.limiter``.
        memory: what is in use; None for what is granted, and what is really allocated where
            that is tracked.
        backend: ``"asyncio"`` or ``"trio"``.
        timeout: seconds of virtual time after which it counts as hung.
        max_beyond_grants: how much one component may have in use beyond what it was granted or
            has reserved, or ``"1MiB"``; None for any amount, as long as the limit holds.
        options: other arguments of ``testing.limiter``: ``share=``, ``slop_factor=``,
            ``settings=``, ...

    Returns:
        What the run has shown.

    Raises:
        NotBounded: more was in use than the limit or ``max_beyond_grants``, grants were never
            released, nothing was asked for at all, or it did not finish.
        RuntimeError: an event loop runs already.
    """
    if running_loop() is not None:
        raise RuntimeError("an event loop runs already; use `async with watch_bounded(limiter):`")
    limiter = limiter_for_tests(limit, **options, probe=memory or FakeMemory())

    async def run() -> BoundedReport:
        async with watch_bounded(
            limiter, timeout=timeout, max_beyond_grants=max_beyond_grants
        ) as watch:
            running = pipeline(*args)
            if not inspect.isawaitable(running):
                raise TypeError(f"{pipeline!r} is no async function: it gave {running!r}")
            await running
        return watch.report

    name, loop_options = virtual_time(backend)
    return anyio.run(run, backend=name, backend_options=loop_options)


@asynccontextmanager
async def watch_bounded(
    limiter: MemoryLimiter,
    *,
    timeout: float = 60.0,
    max_beyond_grants: int | str | None = None,
) -> AsyncGenerator[Watch, None]:
    """Watch what an ``async with`` block does with a limiter; fail at its end if it is not bounded.

    ::

        async with testing.watch_bounded(testing.limiter("64MiB")) as watch:
            await pipeline()
        assert watch.report.waited_seconds < 5

    The limiter is entered. In use is what its `FakeMemory` says, where that is its probe; with
    another probe, what is granted, or read if that is more. On any event loop, in its time. What
    the block raises itself goes through, with what is found beside it as a note.

    Args:
        limiter: of ``testing.limiter``, or any other.
        timeout: seconds after which the block counts as hung and is cancelled.
        max_beyond_grants: as of `assert_bounded`.

    Raises:
        NotBounded: as of `assert_bounded`, at the end of the block.
    """
    beyond = None if max_beyond_grants is None else parse_size(max_beyond_grants)
    watch = Watch(limiter)
    raised: Exception | None = None
    async with limiter:
        with anyio.CancelScope() as scope:
            watch._begin(timeout, scope)
            try:
                yield watch
            except Exception as error:  # noqa: BLE001  anybody's code
                raised = error
            finally:
                watch._end()
        problems = watch.report.problems(beyond)
        if problems and (raised is None or not watch.report.finished):
            raise NotBounded(problems, watch.report) from raised
        if raised is not None:
            if problems:
                raised.add_note(str(NotBounded(problems, watch.report)))
            raise raised


class Watch:
    """What is seen of a limiter while a block runs; its ``report`` is there at the end."""

    report: BoundedReport

    def __init__(self, limiter: MemoryLimiter) -> None:
        self.limiter = limiter
        probe = limiter._gauge.probe
        self._memory = probe if isinstance(probe, FakeMemory) else FakeMemory()
        self._only_granted = probe is not self._memory
        self._peak: MemoryUsage | None = None
        self._exceeded: MemoryUsage | None = None
        self._peak_grants: list[HeldGrant] = []
        self._beyond: dict[str, tuple[int, float]] = {}
        self._leaked: list[GrantLeaked] = []
        self._waiting: list[WaitingRequest] = []
        self._held: list[HeldGrant] = []
        self._hung = False
        self._peak_is_held = False
        self._looked_at = -math.inf
        self._failure: Exception | None = None

    def _begin(self, timeout: float, scope: anyio.CancelScope) -> None:
        limiter = self.limiter
        loop = running_loop()
        assert loop is not None
        self._loop: EventLoop = loop
        self._began = loop.now()
        self._memory.follow(limiter)
        self._tracked = Tracked()
        self._tracks = allocator.enabled()
        self._groups = {group.path for group in allocator.registry}
        self._before = {one.path: one for one in limiter.statistics().components}
        self._held_before: WeakSet[MemoryGrant] = WeakSet(limiter._held())
        self._hooked = limiter.add_hook(self._note)
        self._give_up = loop.call_later(timeout, lambda: self._hang(scope))
        # Whatever changes what is granted has the limiter's lock. With another one than its own,
        # the fast path in C, which needs none, stays away.
        self._lock = limiter._lock
        self._tick()
        limiter._lock = _WatchedLock(  # type: ignore[assignment]
            self._lock, self._look_again, self._look
        )

    def _end(self) -> None:
        limiter = self.limiter
        self._give_up.cancel()
        self._ticking.cancel()
        statistics = limiter.statistics()  # has what was dropped given back
        with limiter._lock:
            limiter._lock = self._lock
        self._hooked.remove()
        if not self._hung:
            self._held = self._never_released()
        paths = {one.path for one in statistics.components}
        for path in {group.path for group in allocator.registry} - self._groups:
            if path in paths:  # peaks of one test are nothing to the next
                allocator.registry.unregister(path)
        if self._failure is not None:
            raise self._failure
        assert self._peak is not None
        self.report = BoundedReport(
            limit_bytes=limiter.limit.limit_bytes,
            seconds=self._loop.now() - self._began,
            finished=not self._hung,
            peak=self._peak,
            peak_grants=tuple(self._peak_grants),
            exceeded=self._exceeded,
            components=tuple(
                self._summary(one)
                for one in statistics.components
                if one.admissions or one.total_wait_seconds or one.path in self._beyond
            ),
            held=tuple(self._held),
            leaked=tuple(self._leaked),
            waiting=tuple(self._waiting),
        )

    def _summary(self, now: ComponentStatistics) -> ComponentReport:
        before = self._before.get(now.path)
        beyond, at_seconds = self._beyond.get(now.path, (0, 0.0))
        return ComponentReport(
            path=now.path,
            admissions=now.admissions - (before.admissions if before else 0),
            waited_seconds=now.total_wait_seconds - (before.total_wait_seconds if before else 0),
            delayed_seconds=now.total_delay_seconds - (before.total_delay_seconds if before else 0),
            beyond_grants_bytes=beyond,
            beyond_grants_at_seconds=at_seconds,
        )

    # --- what is called while it runs

    def _look_again(self) -> None:
        """Look at what may have changed by itself since the last look."""
        if self._loop.now() != self._looked_at or self._tracks:
            self._look()

    def _look(self) -> None:
        """Look at memory; with the limiter's lock held, so nothing may be raised."""
        self._looked_at = self._loop.now()
        try:
            usage = self._memory.usage(self._tracked.highest)
        except Exception as error:  # noqa: BLE001  a function of the test's
            self._failure = self._failure or error
            return
        unknown = self.limiter._gauge.measured - usage.in_use_bytes
        if self._only_granted and unknown > 0:
            usage = replace(
                usage,
                in_use_bytes=usage.in_use_bytes + unknown,
                others_bytes=usage.others_bytes + unknown,
            )
        for one in usage.components:
            beyond = one.beyond_grants_bytes
            if beyond > self._beyond.get(one.path, (0, 0.0))[0]:
                self._beyond[one.path] = beyond, usage.at_seconds
        limit = self.limiter._limit.limit_bytes
        if self._exceeded is None and usage.in_use_bytes > limit:
            self._exceeded = usage
        peak = self._peak
        if peak is None or usage.in_use_bytes > peak.in_use_bytes:
            self._peak = usage
        elif self._peak_is_held or usage.in_use_bytes < peak.in_use_bytes:
            return
        # A grant is charged before it is held, so at first the newest is not among these.
        grants = self.limiter._held()
        granted = sum(one.granted_bytes for one in usage.components)
        self._peak_is_held = sum(grant.size for grant in grants) >= granted
        self._peak_grants = self._describe(grants, NAMED)

    def _describe(self, grants: Iterable[MemoryGrant], most: int | None = None) -> list[HeldGrant]:
        return held_grants(grants, self.limiter._now(), most, 0)

    def _never_released(self) -> list[HeldGrant]:
        return self._describe(set(self.limiter._held()).difference(self._held_before))

    def _tick(self) -> None:
        with self._lock:
            self._look()
        self._ticking: Handle = self._loop.call_later(LOOK_EVERY_SECONDS, self._tick)

    def _note(self, event: Event) -> None:
        if isinstance(event, GrantLeaked) and not self._hung:
            self._leaked.append(event)

    def _hang(self, scope: anyio.CancelScope) -> None:
        self._hung = True
        self._waiting = self.limiter.waiting_requests()
        self._held = self._never_released()
        scope.cancel()


class _WatchedLock:
    """The lock of a limiter, with a look at what it guards after taking and before letting go."""

    def __init__(
        self, lock: Any, taken: Callable[[], None], letting_go: Callable[[], None]
    ) -> None:
        self._lock = lock
        self._taken = taken
        self._letting_go = letting_go

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        taken: bool = self._lock.acquire(blocking, timeout)
        if taken:
            self._taken()
        return taken

    def release(self) -> None:
        self._letting_go()
        self._lock.release()

    def locked(self) -> bool:
        locked: bool = self._lock.locked()
        return locked

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
