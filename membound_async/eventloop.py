"""The running event loop, asyncio's or trio's: what anyio does not offer of it.

A task that is parked costs one future, and is woken by whoever has admitted it, from any
thread; a callback after a while needs no task on asyncio. Blocking threads park too.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import trio

__all__ = ["EventLoop", "Handle", "ThreadPlace", "current_task", "running_loop"]


class Handle(ABC):
    """Something that was started and can be called off."""

    @abstractmethod
    def cancel(self) -> None:
        """Call it off, if it is not over yet. From the loop's own thread only."""


class EventLoop(ABC):
    """One running event loop.

    Attributes:
        token: what identifies the loop while it runs.
        now: its clock, in seconds.
    """

    token: object
    now: Callable[[], float]

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def __contains__(self, thread: int) -> bool:
        """Whether the loop runs in that thread."""
        return thread == self._thread

    @abstractmethod
    def place(self) -> Awaitable[Any]:
        """Give a place to wait at: await it once, in the task that asked for it."""

    @abstractmethod
    def wake(self, place: Any) -> None:
        """End the wait at a place. In the loop's thread; a wait that is over is left alone."""

    @abstractmethod
    def is_occupied(self, place: Any) -> bool:
        """Whether somebody waits at a place, who was neither woken nor cancelled yet."""

    @abstractmethod
    def call_soon(self, callback: Callable[[], object]) -> None:
        """Call ``callback`` in the loop, from any thread; nothing if the loop has ended."""

    @abstractmethod
    def call_later(self, seconds: float, callback: Callable[[], object]) -> Handle:
        """Call ``callback`` in the loop after that time."""

    @abstractmethod
    def spawn(self, function: Callable[[], Coroutine[Any, Any, None]]) -> Handle:
        """Run an async function, which must not raise, in a task with a copy of this context."""

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether the loop will run nothing any more."""


class _AsyncioLoop(EventLoop):
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.token = self._loop = loop
        # The clock of a loop in real time is this one; calling it costs a third.
        real = type(loop).time is asyncio.BaseEventLoop.time or type(loop).__module__ == "uvloop"
        self.now = time.monotonic if real else loop.time
        self.place = loop.create_future  # type: ignore[method-assign]

    def place(self) -> asyncio.Future[None]:  # pragma: no cover
        raise NotImplementedError  # replaced in the instance: one call less for each wait

    def wake(self, place: asyncio.Future[None]) -> None:
        if not place.done() and not self._loop.is_closed():
            place.set_result(None)

    def is_occupied(self, place: asyncio.Future[None]) -> bool:
        return not place.done()

    def call_soon(self, callback: Callable[[], object]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Handle:
        return self._loop.call_later(seconds, callback)  # type: ignore[return-value]

    def spawn(self, function: Callable[[], Coroutine[Any, Any, None]]) -> Handle:
        return self._loop.create_task(function())  # type: ignore[return-value]

    @property
    def ended(self) -> bool:
        return self._loop.is_closed()


Handle.register(asyncio.Handle)
Handle.register(asyncio.Future)


class _TrioPlace:
    """Where one trio task waits."""

    __slots__ = ("task", "woken")

    def __init__(self) -> None:
        self.task: trio.lowlevel.Task | None = None
        self.woken = False

    def __await__(self) -> Generator[Any, Any, None]:
        import trio

        if self.woken:
            return
        self.task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self.woken = True
            return trio.lowlevel.Abort.SUCCEEDED

        yield from trio.lowlevel.wait_task_rescheduled(abort).__await__()  # noqa: ASYNC105


class _TrioHandle(Handle):
    def __init__(self) -> None:
        import trio

        self.scope = trio.CancelScope()

    def cancel(self) -> None:
        self.scope.cancel()


class _TrioLoop(EventLoop):
    def __init__(self) -> None:
        import trio

        super().__init__()
        self._trio = trio
        self.token = self._token = trio.lowlevel.current_trio_token()
        self.now = trio.lowlevel.current_clock().current_time  # from any thread
        self._over = False

    def place(self) -> _TrioPlace:
        return _TrioPlace()

    def wake(self, place: _TrioPlace) -> None:
        if not place.woken:
            place.woken = True
            if place.task is not None:
                self._trio.lowlevel.reschedule(place.task)

    def is_occupied(self, place: _TrioPlace) -> bool:
        return not place.woken

    def call_soon(self, callback: Callable[[], object]) -> None:
        try:
            self._token.run_sync_soon(callback)
        except self._trio.RunFinishedError:
            self._over = True

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Handle:
        async def wait_and_call() -> None:
            await self._trio.sleep(seconds)
            callback()

        return self.spawn(wait_and_call)

    def spawn(self, function: Callable[[], Coroutine[Any, Any, None]]) -> Handle:
        handle = _TrioHandle()

        async def run() -> None:
            with handle.scope:
                await function()

        self._trio.lowlevel.spawn_system_task(run, context=copy_context())
        return handle

    @property
    def ended(self) -> bool:
        self.call_soon(int)
        return self._over


class ThreadPlace:
    """Where one thread waits; the same ``wake`` from any thread."""

    __slots__ = ("_lock", "thread")

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self._lock = threading.Lock()
        self._lock.acquire()

    def wait(self, seconds: float) -> bool:
        """Block the thread until it is woken, at most that long; False if it was not."""
        return self._lock.acquire(timeout=seconds)

    def wake(self) -> None:
        """End the wait."""
        self._lock.release()


def running_loop() -> EventLoop | None:
    """Give the event loop that runs in this thread; None if none does."""
    loop = asyncio._get_running_loop()
    if loop is not None:
        return _AsyncioLoop(loop)
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        return _TrioLoop()
    return None


def current_task() -> Any:
    """Give the task of asyncio or trio that is running in this thread; None if none is."""
    loop = asyncio._get_running_loop()
    if loop is not None:
        return asyncio.current_task(loop)
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_task():
        return trio.lowlevel.current_task()
    return None
