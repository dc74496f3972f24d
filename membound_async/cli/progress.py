"""``membound run --progress``: what the program uses, while it runs."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, TextIO

from membound_async.limiter import MemoryLimiter

from .usage import Seen, in_one_line

if TYPE_CHECKING:
    from rich.console import Console

    from .panel import Panel

__all__ = ["Progress"]

DRAW_SECONDS = 0.5
LOOK_SECONDS = 0.05
"""How often its size is looked at; the signal that tells of it is the program's."""

SAY_SECONDS = 10.0
"""How often there is a line where nothing can be drawn."""


class Progress:
    """Shows a limiter beside the program, from a thread.

    On a terminal it draws a table in the last lines; otherwise it writes a line now and then.

    Args:
        program: what it is called.
        stream: where to; standard error.

    Raises:
        CannotStart: it is a terminal, and rich is not installed.
    """

    def __init__(self, program: str, stream: TextIO | None = None) -> None:
        import_module("membound_async.api.snapshot")  # now, as a part of the baseline
        from .screen import console_for, is_drawable

        self._program = program
        self._stream = sys.stderr if stream is None else stream
        self._console: Console | None = None
        self._panel: Panel | None = None
        if is_drawable(self._stream):
            from .panel import Panel

            self._console = console_for(self._stream, purpose="--progress")
            self._panel = Panel(os.dup(self._stream.fileno()))
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    def start(self, limiter: MemoryLimiter) -> None:
        """Show this limiter from now on."""
        self._thread = threading.Thread(
            target=self._show, args=(limiter,), name="membound progress", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Show nothing any more, and leave the terminal as it was; not in a forked process."""
        if os.getpid() != self._process:
            return
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._panel is not None:
            with suppress(OSError):
                self._panel.close()

    def _show(self, limiter: MemoryLimiter) -> None:
        try:
            while not self._is_over():
                self._once(limiter)
        except (OSError, ValueError):
            return  # the terminal is gone, or the stream was closed

    def _is_over(self) -> bool:
        """Wait for the next time, which is at once after the terminal has changed its size."""
        if self._panel is None:
            return self._ended.wait(SAY_SECONDS)
        for _ in range(round(DRAW_SECONDS / LOOK_SECONDS)):
            if self._ended.wait(LOOK_SECONDS):
                return True
            if self._panel.was_resized():
                break
        return False

    def _once(self, limiter: MemoryLimiter) -> None:
        from membound_async.api.snapshot import StatusSnapshot

        taken = StatusSnapshot.take(limiter)
        seen = Seen(
            title=self._program,
            statistics=taken.limiter,
            status=taken.status,
            reason=taken.reason,
        )
        if self._panel is None or self._console is None:
            self._stream.write(f"membound: {in_one_line(seen)}\n")
            self._stream.flush()
            return
        self._panel.draw(self._lines(seen))

    def _lines(self, seen: Seen) -> list[str]:
        from .screen import View, screen

        assert self._panel is not None
        assert self._console is not None
        width, room = self._panel.room()
        self._console.width = width
        with self._console.capture() as drawn:
            self._console.rule(style="dim")
            self._console.print(screen(self._console, seen, View(), height=room - 1), end="")
        return drawn.get().rstrip("\n").split("\n")[:room]
