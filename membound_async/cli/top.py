"""``membound top``: the live table of a service, over HTTP."""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from membound_async.advice import advise

from . import CannotStart
from .counsel import counsel
from .keyboard import Keyboard
from .layout import columns_of
from .screen import View, console_for, is_drawable, screen
from .service import Service, ServiceError
from .usage import COLUMNS, Seen, to_text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["top"]

KEYS = {"u": "urgency", "c": "component", **{one.key: name for name, one in COLUMNS.items()}}
SCROLLS = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -10, "page down": 10, "home": -(10**9)}

TABLE_KEYS = "q quit  a advice  u urgent first  arrows scroll  underlined letters sort"
ADVICE_KEYS = "q quit  a table  arrows scroll"

LEAST_SECONDS = 0.1


def top(arguments: argparse.Namespace) -> int:
    """Show what a service uses, until it is told to quit.

    Args:
        arguments: of ``membound top``.

    Returns:
        0, or 1 if the service was not reached or gives no status, or 130 after Ctrl-C.

    Raises:
        CannotStart: an argument makes no sense.
    """
    if not arguments.interval >= LEAST_SECONDS:
        raise CannotStart(f"--interval {arguments.interval:g}: at least {LEAST_SECONDS:g} s")
    service = Service(arguments.url, arguments.token)
    view = View(sort=arguments.sort)
    try:
        if arguments.once or arguments.json:
            return _print(service, view, arguments)
        if is_drawable(sys.stdout) and is_drawable(sys.stdin):
            try:
                console = console_for(sys.stdout, purpose="the live view")
            except CannotStart as error:
                print(f"membound: {error}", file=sys.stderr)
            else:
                return _Live(service, view, arguments, console).run()
        return _print(service, view, arguments)
    except ServiceError as error:
        print(f"membound: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `| head` has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for what Python flushes at its end
        return 128 + signal.SIGPIPE


def _print(service: Service, view: View, arguments: argparse.Namespace) -> int:
    """Print the status now and then, or once; away for a while is no error but at first."""
    is_away, is_first = False, True
    while True:
        try:
            text = _printed(service, view, arguments)
        except ServiceError as error:
            if is_first:
                raise
            if not is_away:
                print(f"membound: {error}; trying again", file=sys.stderr, flush=True)
            is_away = True
        else:
            blank = "" if is_first or arguments.json else "\n"
            print(blank + text, flush=True)
            is_away = is_first = False
        if arguments.once:
            return 0
        time.sleep(arguments.interval)


def _printed(service: Service, view: View, arguments: argparse.Namespace) -> str:
    document = service.status()
    if arguments.json and not arguments.advise:
        return json.dumps(document)
    seen = service.seen(document)
    if arguments.json:
        return json.dumps({**document, "advice": advise(seen.statistics).to_dict()})
    width = columns_of(sys.stdout)
    text = to_text(seen, view.sort, width)
    if arguments.advise:
        text += ["advice", *counsel(advise(seen.statistics), width, everything=True)]
    return "\n".join(text)


class _Live:
    """The whole terminal, until somebody presses q."""

    def __init__(
        self, service: Service, view: View, arguments: argparse.Namespace, console: Console
    ) -> None:
        self._service = service
        self._view = view
        self._interval: float = arguments.interval
        self._shows_advice: bool = arguments.advise
        self._console = console
        self._seen: Seen | None = None
        self._trouble = ""
        self._ended = threading.Event()
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)

    def run(self) -> int:
        """Show it.

        Raises:
            ServiceError: it cannot be shown even once.
        """
        from rich.live import Live

        self._ask()  # in sight of the shell if that fails
        if self._seen is None:
            raise ServiceError(self._trouble)
        # Who waits below is woken by any signal, also by one that comes just before it waits.
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGWINCH, _note)
        for ending in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(ending, _end)
        asker = threading.Thread(target=self._ask_again, name="membound top", daemon=True)
        with (
            Keyboard(sys.stdin.fileno()) as keyboard,
            Live(console=self._console, screen=True, auto_refresh=False) as live,
        ):
            asker.start()
            try:
                while True:
                    live.update(self._drawn(), refresh=True)
                    ready, _, _ = select.select([keyboard.descriptor, self._woken], [], [])
                    if self._woken in ready:
                        os.read(self._woken, 1024)
                    if keyboard.descriptor in ready and self._press(keyboard.read()):
                        return 0
            finally:
                self._ended.set()

    def _drawn(self) -> RenderableType:
        assert self._seen is not None
        advice = advise(self._seen.statistics) if self._shows_advice else None
        return screen(
            self._console,
            self._seen,
            self._view,
            height=self._console.height,
            trouble=self._trouble and f"reconnecting: {self._trouble}",
            advice=advice,
            keys=ADVICE_KEYS if self._shows_advice else TABLE_KEYS,
        )

    def _press(self, keys: list[str]) -> bool:
        """Do what the keys say; whether to quit."""
        view = self._view
        for key in keys:
            if key == "q":
                return True
            if key == "a":
                self._shows_advice = not self._shows_advice
                view.first = 0
            elif key in KEYS:
                is_same = view.sort == KEYS[key]
                view.is_reversed = is_same and not view.is_reversed
                view.sort, view.first = KEYS[key], 0
            elif key in SCROLLS:
                view.first = max(0, view.first + SCROLLS[key])
        return False

    def _ask_again(self) -> None:
        while not self._ended.wait(self._interval):
            self._ask()
            self._tell()

    def _ask(self) -> None:
        try:
            self._seen = self._service.seen(self._service.status())
        except ServiceError as error:
            self._trouble = str(error)
        else:
            self._trouble = ""

    def _tell(self) -> None:
        """Have it drawn anew."""
        with suppress(BlockingIOError):  # it has been told already
            os.write(self._wake, b"\n")


def _note(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: that there was a signal is enough to have it drawn anew."""


def _end(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
