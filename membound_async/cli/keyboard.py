"""Keys as they are pressed, without Enter."""

from __future__ import annotations

import os
import re
from types import TracebackType
from typing import Any, Self

__all__ = ["Keyboard"]

_NAMES = {
    "\x1b[A": "up",
    "\x1bOA": "up",
    "\x1b[B": "down",
    "\x1bOB": "down",
    "\x1b[5~": "page up",
    "\x1b[6~": "page down",
    "\x1b[H": "home",
    "\x1b[1~": "home",
    "\x1bOH": "home",
}
_KEY = re.compile(r"\x1b\[[0-9;]*[A-Za-z~]|\x1bO[A-Z]|.", re.DOTALL)


class Keyboard:
    """A terminal that hands over each key; as it was before when the block ends.

    Args:
        descriptor: of the terminal.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._before: list[Any] = []

    def __enter__(self) -> Self:
        import termios
        import tty

        self._before = termios.tcgetattr(self.descriptor)
        tty.setcbreak(self.descriptor)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        import termios

        termios.tcsetattr(self.descriptor, termios.TCSADRAIN, self._before)

    def read(self) -> list[str]:
        """Give the keys that were pressed: characters, and names of those that are none.

        At the end of the input it is ``"q"``.
        """
        text = os.read(self.descriptor, 1024).decode(errors="replace")
        keys: list[str] = _KEY.findall(text)
        return [_NAMES.get(key, key) for key in keys] or ["q"]
