"""Reclaim: when memory gets short, those are asked for it who can do without.

In this order, until enough has been freed:

1. the reclaimers of the program (``limiter.add_reclaimer()``), the highest priority first;
2. Python's garbage collector, ``gc.collect()``;
3. the heap, which returns to the system what is free in it: ``malloc_trim()`` of the GNU C
   library, and ``allocator.trim()``.

The last two are left out with ``MEMBOUND_RECLAIM=no``. All of it is left out by a limiter
that only observes.

**When.** A reading of memory above ``threshold * L`` starts a run, one at a time. It ends when
memory is down to ``threshold**2 * L`` (90 % of the effective limit where the threshold is
95 %), so that a cache is not asked for crumbs again and again. Memory is read anew after each
call, which lets in who waits. What a reclaimer says that it has freed and no reading shows yet
is not asked of the next one; it is for the heap to return.

**Where.** In a task of the limiter's event loop, which exists only during the run. No request
waits for it, none takes it along when it is cancelled, and a reclaimer that hangs holds up
nobody but the other reclaimers. Where no event loop has used the limiter, it is the thread
whose request has found memory short; async reclaimers are left out then.

**How often.** One that has freed less than 5 % of what was wanted, or has failed, is left out
for 1 s, then 2, 4 and so on up to 60 s, until it is of use again. What it frees is the fall of
measured memory, or what it says if the whole run shows something of it. One that is not async
holds up the event loop, so it is also left out nine times as long as it took: no more than a
tenth of the time goes into ``gc.collect()``, which takes seconds where there are many objects.
"""

from __future__ import annotations

import asyncio
import gc
import math
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextvars import Context
from functools import cache
from inspect import CORO_CLOSED, getcoroutinestate, iscoroutinefunction
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from . import allocator
from .context import current_call
from .eventloop import EventLoop, Handle, running_loop
from .events import log
from .exceptions import ReclaimReentry
from .hooks import Reclaimed
from .statistics import ReclaimerStatistics

if TYPE_CHECKING:
    from .limiter import MemoryLimiter
    from .stocks import Account

__all__ = ["Reclaimer"]

ReclaimFunction = Callable[[int], int | Awaitable[int]]

USEFUL_PART = 20
"""Who frees less than this part of what was wanted is backed off."""

FIRST_BACKOFF_SECONDS = 1.0
LONGEST_BACKOFF_SECONDS = 60.0

REST_FACTOR = 9
"""How many times as long as it took one that is not async is left out."""

SMALLEST_OBJECT_BYTES = 48
"""What the garbage collector frees with an object, at the least."""


class Reclaimer:
    """One that is asked for memory, until it is removed; made by ``limiter.add_reclaimer()``.

    Also a context manager, which removes it at its end.

    Attributes:
        name: what log events and statistics call it.
        priority: higher ones are asked first.
    """

    def __init__(self, reclaim: Any, function: ReclaimFunction, name: str, priority: float) -> None:
        self.name = name
        self.priority = priority
        self._reclaim: Reclaim = reclaim
        self._function = function
        self._is_async = iscoroutinefunction(function) or iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 -- an object with an async one
        )
        self._removed = False
        self._runs = self._failures = self._freed = self._reported = 0
        self._last_seconds = self._total_seconds = 0.0
        self._backoff_seconds = 0.0
        self._asked_from = -math.inf

    def remove(self) -> None:
        """Ask it no more; once or again, from any thread. A call under way goes on."""
        self._removed = True
        reclaim = self._reclaim
        limiter = reclaim.limiter
        if limiter._is_inside():
            limiter._do_later(self.remove)
            return
        with limiter._lock:
            reclaim.reclaimers = [one for one in reclaim.reclaimers if one is not self]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<Reclaimer {self.name!r}, priority {self.priority}>"

    def _note(self, call: Call) -> None:
        self._runs += 1
        self._failures += call.failed
        self._freed += call.freed_bytes
        self._reported += call.reported_bytes
        self._last_seconds = call.seconds
        self._total_seconds += call.seconds

    def _rest(self, now: float, seconds: float, *, useful: bool) -> None:
        longer = max(FIRST_BACKOFF_SECONDS, 2 * self._backoff_seconds)
        self._backoff_seconds = 0.0 if useful else min(longer, LONGEST_BACKOFF_SECONDS)
        rest = 0.0 if self._is_async else REST_FACTOR * seconds
        self._asked_from = now + max(self._backoff_seconds, rest)

    def _statistics(self, now: float) -> ReclaimerStatistics:
        return ReclaimerStatistics(
            name=self.name,
            runs=self._runs,
            failures=self._failures,
            freed_bytes=self._freed,
            reported_bytes=self._reported,
            last_seconds=self._last_seconds,
            total_seconds=self._total_seconds,
            backed_off_seconds=max(0.0, self._asked_from - now),
        )


class Call:
    """One call of a reclaimer: in its context, timed and measured. What it raises ends here.

    Attributes:
        reclaimer: who is asked.
        wanted_bytes: for how much.
        freed_bytes: how much measured memory has fallen by.
        reported_bytes: how much it says that it has freed.
        seconds: how long it took.
        failed: whether it has raised an error.
        over: whether it has ended.
    """

    def __init__(self, limiter: MemoryLimiter, reclaimer: Reclaimer, wanted_bytes: int) -> None:
        self.limiter = limiter
        self.reclaimer = reclaimer
        self.wanted_bytes = wanted_bytes
        self.freed_bytes = self.reported_bytes = 0
        self.seconds = 0.0
        self.failed = self.over = self.said_to_be_slow = False
        self._since = limiter._now()
        self._before = limiter._ledger.measured

    def __enter__(self) -> None:
        current_call.set(self)

    def report(self, freed: Any) -> None:
        """Take what the reclaimer says that it has freed.

        Raises:
            TypeError: it is no number of bytes.
        """
        if type(freed) is not int or freed < 0:
            raise TypeError(f"it gave {freed!r}; a reclaimer gives how many bytes it has freed")
        self.reported_bytes = freed

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        limiter = self.limiter
        self.over = True
        if exc_type is GeneratorExit:  # its loop is gone; this may be inside the limiter's lock
            return False
        now = limiter._now()
        self.seconds = max(0.0, now - self._since)
        limiter._sample(now)
        self.freed_bytes = max(0, self._before - limiter._ledger.measured)
        self.failed = isinstance(exc, Exception) or (
            isinstance(exc, asyncio.CancelledError) and not _is_cancelled()
        )
        self.reclaimer._note(self)
        if self.failed:
            log().warning(
                "membound.reclaimer_failed", reclaimer=self.reclaimer.name, error=repr(exc)
            )
        elif exc is None:
            limiter._hooks.tell(
                Reclaimed(
                    self.reclaimer.name,
                    self.wanted_bytes,
                    self.freed_bytes,
                    self.reported_bytes,
                    self.seconds,
                )
            )
        return self.failed

    def look(self, now: float) -> None:
        """Say so, once, if it takes long."""
        seconds = now - self._since
        if not self.said_to_be_slow and seconds >= self.limiter.settings.stall_after_seconds:
            self.said_to_be_slow = True
            log().warning(
                "membound.reclaimer_slow",
                reclaimer=self.reclaimer.name,
                wanted_bytes=self.wanted_bytes,
                seconds=round(seconds, 3),
            )


class Run:
    """One run: whom it asks, and what became of it.

    Args:
        reclaim: whose run it is.
        loop: the event loop that it runs in; None for this thread.
    """

    def __init__(self, reclaim: Reclaim, loop: EventLoop | None) -> None:
        self.loop = loop
        self._reclaim = reclaim
        self._calls: list[Call] = []
        self._before = reclaim.measured
        self._steps: Coroutine[Any, Any, None] | None = None
        self._task: Handle | None = None

    def spawn(self) -> None:
        """Begin in a task; in the event loop's thread."""
        assert self.loop is not None
        self._steps = steps = self._in_task()
        self._task = Context().run(self.loop.spawn, lambda: steps)

    async def _in_task(self) -> None:
        with self:
            for call in self._calls_to_make():
                with call:
                    freed = call.reclaimer._function(call.wanted_bytes)
                    call.report(await freed if isinstance(freed, Awaitable) else freed)

    def in_thread(self) -> None:
        """Do it all, in this thread."""
        with self:
            for call in self._calls_to_make():
                with call:
                    call.report(call.reclaimer._function(call.wanted_bytes))

    def _calls_to_make(self) -> Iterator[Call]:
        """Give the calls one by one, until there is enough."""
        reclaim = self._reclaim
        for reclaimer in reclaim.due(self.loop):
            wanted = reclaim.wanted_bytes()
            if reclaimer is not reclaim.heap:
                fallen = self._before - reclaim.measured
                wanted -= max(0, sum(call.reported_bytes for call in self._calls) - fallen)
            if wanted > 0 and not reclaimer._removed:
                call = Call(reclaim.limiter, reclaimer, wanted)
                self._calls.append(call)
                yield call

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        now = self._reclaim.limiter._now()
        fallen = self._before - self._reclaim.measured
        for call in self._calls:
            shown = min(call.reported_bytes, fallen)
            useful = USEFUL_PART * max(call.freed_bytes, shown) >= call.wanted_bytes
            call.reclaimer._rest(now, call.seconds, useful=useful and not call.failed)
        self._reclaim.end(self)

    def look(self, now: float) -> None:
        """Look whether it goes on as it should."""
        closed = self._steps is not None and getcoroutinestate(self._steps) == CORO_CLOSED
        if closed or (self.loop is not None and self.loop.ended):  # cancelled before it began
            self._reclaim.end(self)
        elif self._calls and not self._calls[-1].over:
            self._calls[-1].look(now)


class Reclaim:
    """The reclaimers of a limiter, and the run that is under way.

    Attributes:
        limiter: whose they are.
        reclaimers: those of the program, in the order in which they are asked.
        run: the run that is under way.
    """

    def __init__(self, limiter: MemoryLimiter) -> None:
        self.limiter = limiter
        self.reclaimers: list[Reclaimer] = []
        self.run: Run | None = None
        self.heap = Reclaimer(self, _return_free_heap, "heap", -math.inf)
        self._built_in = [Reclaimer(self, _collect_garbage, "gc", -math.inf), self.heap]
        self._clock = limiter._now

    def add(self, function: ReclaimFunction, name: str | None, priority: float) -> Reclaimer:
        """Ask that function, too; see ``MemoryLimiter.add_reclaimer``."""
        if not callable(function):
            raise TypeError(f"function={function!r} is no function of the bytes that are wanted")
        own_name: str = getattr(function, "__qualname__", type(function).__qualname__)
        made = Reclaimer(self, function, own_name if name is None else name, priority)
        with self.limiter._lock:
            self.reclaimers = sorted([*self.reclaimers, made], key=lambda one: -one.priority)
        return made

    @property
    def all(self) -> list[Reclaimer]:
        """All of them, the built-in ones too, in the order in which they are asked."""
        return self.reclaimers + (self._built_in if self.limiter.settings.reclaim else [])

    @property
    def measured(self) -> int:
        """The last reading."""
        return self.limiter._ledger.measured

    def wanted_bytes(self) -> int:
        """Give how much memory is above what a run brings it down to."""
        return self.measured - int(self._part(self.limiter.settings.pressure.threshold**2))

    def _part(self, part: float) -> float:
        return part * self.limiter._ledger.limit

    def due(self, loop: EventLoop | None) -> list[Reclaimer]:
        """Give those that may be asked now, in a task of that loop or in this thread."""
        now = self._time()
        return [
            reclaimer
            for reclaimer in self.all
            if now >= reclaimer._asked_from and not (loop is None and reclaimer._is_async)
        ]

    def _time(self) -> float:
        if self.limiter._now != self._clock:  # of another event loop: old times mean nothing
            self._clock = self.limiter._now
            for reclaimer in self.all:
                reclaimer._asked_from = -math.inf
        return self._clock()

    def look(self, now: float) -> None:
        """Start a run if the last reading calls for one; whoever has taken it calls this."""
        limiter = self.limiter
        run = self.run
        if run is not None:
            run.look(now)
            return
        threshold = limiter.settings.pressure.threshold
        if limiter._observe or self.measured <= self._part(threshold):
            return
        loop, here = limiter._loop, running_loop()
        if loop is not None and (loop.ended or (here is None and threading.get_ident() in loop)):
            loop = None  # it does not run any more, or not now
        if (loop is None and here is not None) or not self.due(loop):
            return
        run = Run(self, loop)
        with limiter._lock:
            if self.run is not None:
                return
            self.run = run
        limiter._calm()
        if loop is None:
            Context().run(run.in_thread)
        elif threading.get_ident() in loop:
            run.spawn()
        else:
            loop.call_soon(run.spawn)

    def end(self, run: Run) -> None:
        """Note that a run has ended."""
        if self.run is run:
            self.run = None
            self.limiter._calm()

    def refuse_reentry(self, account: Account, nbytes: int) -> None:
        """Refuse a request of a reclaimer.

        Raises:
            ReclaimReentry: this is one.
        """
        if self.run is not None:
            call: Call | None = current_call.get()
            if call is not None and not call.over and call.limiter is self.limiter:
                raise ReclaimReentry(call.reclaimer.name, account.name, nbytes)

    def statistics(self) -> tuple[ReclaimerStatistics, ...]:
        """Give what each of them has done so far."""
        now = self._time()
        return tuple(reclaimer._statistics(now) for reclaimer in self.all)


def _is_cancelled() -> bool:
    """Whether somebody has cancelled the task of asyncio that this is."""
    task = asyncio.current_task() if asyncio._get_running_loop() else None
    return task is not None and task.cancelling() > 0


def _collect_garbage(_: int) -> int:
    return gc.collect() * SMALLEST_OBJECT_BYTES


def _return_free_heap(_: int) -> int:
    trimmed = allocator.trim()
    malloc_trim = _malloc_trim()
    if malloc_trim is not None:
        malloc_trim(0)
    return trimmed


@cache
def _malloc_trim() -> Any:
    """Give the function of the GNU C library; None where there is another one."""
    import ctypes  # some milliseconds, for those who need it

    function = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if function is not None:
        function.argtypes = [ctypes.c_size_t]
    return function
