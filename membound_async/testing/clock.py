"""A clock that waits for nobody: virtual time on asyncio, and on trio."""

from __future__ import annotations

import asyncio
import math
import selectors
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, Literal, TypeVar, TypeVarTuple, Unpack

__all__ = ["Backend", "VirtualTimeLoop", "virtual_time"]

_LOOK_AGAIN_SECONDS = 0.005

_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")

Backend = Literal["asyncio", "trio"]


def virtual_time(backend: Backend = "asyncio") -> tuple[str, dict[str, Any]]:
    """Give an event loop on virtual time, as anyio takes it: a backend and its options.

    For anyio's pytest plugin::

        @pytest.fixture(params=["asyncio", "trio"])
        def anyio_backend(request):
            return testing.virtual_time(request.param)

    and by hand::

        backend, options = testing.virtual_time()
        anyio.run(main, backend=backend, backend_options=options)

    Args:
        backend: ``"asyncio"``, with a `VirtualTimeLoop`, or ``"trio"``, with its ``MockClock``.

    Raises:
        ValueError: there is no such backend.
    """
    if backend == "asyncio":
        return "asyncio", {"loop_factory": VirtualTimeLoop}
    if backend == "trio":
        import trio.testing

        return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}
    raise ValueError(f'backend={backend!r}: use "asyncio" or "trio"')


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop whose clock jumps to the next timer when there is nothing to do.

    A test that sleeps an hour takes no time, and ``loop.time()`` says that an hour has
    passed. It starts at 0 and stands still while callbacks run.

    While a job runs in a thread (``run_in_executor``, ``asyncio.to_thread``,
    ``anyio.to_thread``), time passes as it really does, so no timeout fires before the job
    had its chance. Sockets, subprocesses and threads that the loop did not start work,
    but the loop cannot know that they are about to answer: give ``idle_seconds`` to wait
    for them.

    Use it as ``asyncio.Runner(loop_factory=VirtualTimeLoop)``, or for anyio's pytest
    plugin::

        @pytest.fixture
        def anyio_backend():
            return "asyncio", {"loop_factory": VirtualTimeLoop}

    Args:
        idle_seconds: how long, in real seconds, nothing must have happened before the
            clock jumps (trio's ``autojump_threshold``).
    """

    def __init__(self, *, idle_seconds: float = 0.0) -> None:
        self._virtual_seconds = 0.0
        self._thread_jobs = 0
        super().__init__(_JumpingSelector(self, idle_seconds))

    def time(self) -> float:
        """Give the virtual time in seconds since the loop was made."""
        return self._virtual_seconds

    def advance(self, seconds: float) -> None:
        """Move the clock forward; timers that fall due run at the loop's next turn.

        Raises:
            ValueError: ``seconds`` is negative or no number.
        """
        if not seconds >= 0:
            raise ValueError(f"seconds={seconds!r}: time does not run backwards")
        self._virtual_seconds += seconds

    def run_in_executor(
        self,
        executor: Executor | None,
        func: Callable[[Unpack[_Arguments]], _Result],
        *args: *_Arguments,
    ) -> asyncio.Future[_Result]:
        """Run ``func(*args)`` in a thread; real time passes until it is done."""
        job = super().run_in_executor(executor, func, *args)
        self._thread_jobs += 1
        job.add_done_callback(self._thread_job_done)
        return job

    def _thread_job_done(self, _job: asyncio.Future[Any]) -> None:
        self._thread_jobs -= 1

    async def shutdown_default_executor(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the executor's threads, in real time."""
        self._thread_jobs += 1
        try:
            await super().shutdown_default_executor(*args, **kwargs)
        finally:
            self._thread_jobs -= 1

    def has_thread_jobs(self) -> bool:
        """Tell whether a thread is at work for this loop or about to report to it."""
        # anyio's worker threads belong to a loop and take their jobs from a queue. A job
        # counts as finished there only once its result is on the way to the loop.
        return self._thread_jobs > 0 or any(
            getattr(getattr(thread, "queue", None), "unfinished_tasks", 0)
            for thread in threading.enumerate()
            if getattr(thread, "loop", None) is self
        )


class _JumpingSelector(selectors.DefaultSelector):
    """Looks for I/O like any selector, but waits for a timer by moving the clock.

    The loop says here how long it has nothing to do: None for ever, 0 not at all.
    """

    def __init__(self, loop: VirtualTimeLoop, idle_seconds: float) -> None:
        super().__init__()
        self._loop = loop
        self._idle_seconds = idle_seconds

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        seconds = math.inf if timeout is None else timeout
        # Asked before looking: a job that ends in between must not be overlooked.
        if seconds > 0 and self._loop.has_thread_jobs():
            started = time.monotonic()
            # Not for long, because a thread does not tell when it goes idle.
            events = super().select(min(seconds, _LOOK_AGAIN_SECONDS))
            self._loop.advance(time.monotonic() - started)
        elif 0 < seconds < math.inf:
            events = super().select(min(seconds, self._idle_seconds))
            if not events:
                self._loop.advance(seconds)
        else:
            events = super().select(timeout)
        return events
