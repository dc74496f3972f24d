"""``membound run``: a program under a limiter that all of it shares."""

from __future__ import annotations

import argparse
import atexit
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Protocol, cast

from membound_async import allocator
from membound_async.exceptions import MemboundError
from membound_async.limiter import MemoryLimiter
from membound_async.limits import Machine
from membound_async.settings import given, parse_switch
from membound_async.statistics import LimiterStatistics

from . import REPORTS, CannotStart
from .layout import columns_of
from .program import (
    async_function,
    from_program_on,
    is_target,
    module,
    put_first_on_path,
    script,
)
from .report import Ending, Report, peak_rss_bytes, version

__all__ = ["run"]

Execute = Callable[[MemoryLimiter], object]


def run(arguments: argparse.Namespace) -> None:
    """Run a program under a limiter of the process; the report follows when Python ends.

    Args:
        arguments: of ``membound run``.

    Raises:
        CannotStart: the limit makes no sense, or there is no such program.
        BaseException: what the program has raised.
    """
    if arguments.report not in REPORTS:
        raise CannotStart(f"--report {arguments.report}: use one of {', '.join(REPORTS)}")
    if arguments.report_file is not None:
        _check_writable(arguments.report_file)
    name, execute = _choose(arguments)
    beside = _beside(name, arguments)
    try:
        _track(arguments.track)
        limiter = MemoryLimiter(
            arguments.limit,
            slop_factor=arguments.slop,
            observe=arguments.observe,
            mode=arguments.mode,
        )
        limiter.install()
        for one in beside:
            one.start(limiter)
    except (MemboundError, CannotStart) as error:
        _stop(beside)
        raise CannotStart(str(error)) from None
    writer = None
    if arguments.report != "none":
        writer = _Writer(limiter, name, arguments)
        # Python calls it after the program's threads and own exit handlers have ended.
        atexit.register(writer.write)
    stop = partial(_stop, beside)
    atexit.register(stop)  # called before the report is written
    try:
        _unwrapping_interrupts(execute, limiter)
    except CannotStart:
        if writer is not None:
            atexit.unregister(writer.write)
        atexit.unregister(stop)
        stop()
        limiter.uninstall()
        raise
    except BaseException as error:
        if writer is not None:
            writer.ending = Ending.of(error)
        _show_from_program_on(error)
        raise


class _Beside(Protocol):
    """What runs in a thread beside the program."""

    def start(self, limiter: MemoryLimiter) -> None: ...

    def stop(self) -> None: ...


def _beside(program: str, arguments: argparse.Namespace) -> list[_Beside]:
    """Prepare what is to run beside the program; what cannot be is known before it starts."""
    chosen: list[_Beside] = []
    if arguments.serve is not None:
        from .serve import Server

        chosen.append(Server(arguments.serve, arguments.token))
    if arguments.progress:
        from .progress import Progress

        try:
            chosen.append(Progress(program))
        except CannotStart:
            _stop(chosen)
            raise
    return chosen


def _stop(beside: list[_Beside]) -> None:
    for one in reversed(beside):
        one.stop()


def _track(wanted: bool | None) -> None:
    """Have allocations counted; None: as MEMBOUND_TRACK says, else where that does no harm.

    That is where the extension was built and nothing limits what the process may map: there
    the tracker's tables would count as if they were full.
    """
    groups = given(None, "TRACK_GROUPS", "126")
    if groups not in ("126", "65535"):
        raise CannotStart(f"MEMBOUND_TRACK_GROUPS={groups}: use 126 or 65535")
    if wanted is None:
        rlimits = map(Machine().rlimit, ("RLIMIT_AS", "RLIMIT_DATA"))
        harmless = allocator.available and all(limit is None for limit in rlimits)
        wanted = parse_switch(given(None, "TRACK", harmless), "track")
    if wanted:
        allocator.install(65535 if groups == "65535" else 126)


class _Writer:
    """Writes the report when the program has ended."""

    def __init__(self, limiter: MemoryLimiter, program: str, arguments: argparse.Namespace) -> None:
        self.ending = Ending()
        self._limiter = limiter
        self._program = program
        self._arguments = arguments
        self._stream = sys.stderr  # whatever the program puts in its place
        path = arguments.report_file
        self._path = None if path is None else os.path.abspath(path)  # the program may chdir
        # At the end Python is to find what has interrupted the program, if that is so, and
        # it would not after the imports that this needs.
        self._version = version() if arguments.report == "json" else ""
        self._process = os.getpid()
        self._started = time.monotonic()
        self._stalled_before = _stalled_seconds(limiter.statistics())

    def write(self) -> None:
        """Write the report; not in processes that the program has forked."""
        if os.getpid() != self._process:
            return
        with suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()  # what the program has printed comes first
        text = self._text()
        if self._path is not None:
            try:
                with open(self._path, "w", encoding="utf-8") as file:
                    file.write(text)
            except OSError as error:
                text = f"membound: the report cannot be written: {error}\n{text}"
            else:
                return
        with suppress(OSError, ValueError, AttributeError):
            self._stream.write(text)
            self._stream.flush()

    def _text(self) -> str:
        statistics = self._limiter.statistics()
        stalled = _stalled_seconds(statistics)
        report = Report(
            program=self._program,
            ending=self.ending,
            seconds=time.monotonic() - self._started,
            statistics=statistics,
            membound_version=self._version,
            has_limit_option=self._arguments.limit is not None,
            peak_rss_bytes=peak_rss_bytes(),
            stalled_seconds=None if stalled is None else stalled - (self._stalled_before or 0.0),
        )
        if self._arguments.report == "json":
            return report.to_json() + "\n"
        return report.to_text(columns_of(self._stream)) + "\n"


def _check_writable(path: str) -> None:
    """Find out now, not when a program that ran for hours has ended."""
    try:
        with open(path, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise CannotStart(f"the report cannot be written: {error}") from None


def _stalled_seconds(statistics: LimiterStatistics) -> float | None:
    stall = statistics.pressure_stall
    return None if stall is None else stall.some_total_seconds


def _choose(arguments: argparse.Namespace) -> tuple[str, Execute]:
    """Give what the program is called, and what runs it."""
    words: list[str] = arguments.program
    if words[:1] == ["--"]:
        words = words[1:]
    if not words:
        raise CannotStart("what is to be run? See `membound run --help`")
    word, *rest = words
    is_function = not arguments.is_module and not os.path.exists(word) and is_target(word)
    if is_function:
        backend, options = _backend(arguments)
        return word, partial(_run_function, word, rest, backend, options)
    if arguments.backend or arguments.uvloop:
        raise CannotStart(
            "--backend and --uvloop are for MODULE:FUNC; scripts and modules choose their own "
            "event loop"
        )
    if arguments.is_module:
        return f"-m {word}", _ignoring_limiter(module(word, rest))
    return word, _ignoring_limiter(script(word, rest))


def _ignoring_limiter(execute: Callable[[], None]) -> Execute:
    return lambda _: execute()


def _backend(arguments: argparse.Namespace) -> tuple[str, dict[str, bool]]:
    backend = arguments.backend or "asyncio"
    if arguments.uvloop and backend != "asyncio":
        raise CannotStart("--uvloop is for asyncio; leave it or --backend out")
    extra = "uvloop" if arguments.uvloop else backend
    if extra != "asyncio" and importlib.util.find_spec(extra) is None:
        raise CannotStart(f"{extra} is not installed: pip install 'membound-async[{extra}]'")
    return backend, {"use_uvloop": True} if arguments.uvloop else {}


def _run_function(
    target: str,
    arguments: list[str],
    backend: str,
    options: dict[str, bool],
    limiter: MemoryLimiter,
) -> None:
    import anyio

    sys.argv = [target, *arguments]
    put_first_on_path(os.getcwd())
    function = async_function(target)
    try:
        limiter.install()  # again: what the module needs by itself belongs to the baseline
    except MemboundError as error:
        raise CannotStart(str(error)) from None
    anyio.run(function, backend=backend, backend_options=options)


def _unwrapping_interrupts(execute: Execute, limiter: MemoryLimiter) -> None:
    """Run a program; Ctrl-C that task groups have wrapped is an interrupt like any other."""
    try:
        execute(limiter)
    except BaseExceptionGroup as group:
        if _is_interrupt(group):
            raise KeyboardInterrupt from group
        raise


def _is_interrupt(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return all(map(_is_interrupt, group.exceptions))
    return isinstance(error, KeyboardInterrupt)


def _show_from_program_on(error: BaseException) -> None:
    """Have the traceback begin in the program, and none be shown for Ctrl-C.

    Everything else is left to Python, which calls ``sys.excepthook``, ends threads, runs
    exit handlers, and after a ``KeyboardInterrupt`` ends itself by SIGINT, so that a shell
    knows that it was interrupted.
    """
    show = sys.excepthook
    traceback = from_program_on(error)

    def hook(kind: type[BaseException], raised: BaseException, whole: TracebackType | None) -> None:
        if raised is not error:
            show(kind, raised, whole)
        elif show is not sys.__excepthook__ or not isinstance(error, KeyboardInterrupt):
            show(kind, error.with_traceback(traceback), traceback)

    sys.excepthook = hook
