"""Some lines at the bottom of a terminal, beside a program that prints what it likes.

The terminal itself keeps the two apart: what scrolls is limited to the lines above. So the
program's streams stay as they are, and what C code and child processes print is in its place
as well. That must be undone at the end, however it comes: a shell waits for that, which is
no child of the program.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

__all__ = ["Panel"]

_SAVE, _RESTORE = "\x1b7", "\x1b8"
_DOWN = "\x1bD"  # keeps the column, scrolls at the end
_ERASE_BELOW, _ERASE_LINE_END = "\x1b[J", "\x1b[K"
_FREE = f"{_SAVE}\x1b[r{_RESTORE}{_ERASE_BELOW}"

_WATCH = """\
(trap '' HUP INT QUIT TERM; read -r _ <&3 || printf '\\0337\\033[r\\0338\\033[J' >&2) </dev/null &
"""

LEAST_LEFT = 5
"""How many lines the program keeps at least."""


class Panel:
    """Lines at the bottom of a terminal.

    Args:
        terminal: the terminal's file descriptor, which is left open.
    """

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self._size: os.terminal_size = os.terminal_size((0, 0))
        self._lines = 0
        reader, self._watched = os.pipe()
        try:
            subprocess.run(  # noqa: S603  this text and a number
                ["/bin/sh", "-c", f"exec 3<&{reader}; {_WATCH}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=terminal,
                pass_fds=[reader],
                start_new_session=True,
                check=False,
            )
        except OSError:
            pass  # no shell: only a program that is killed leaves the terminal as it is
        finally:
            os.close(reader)
        os.register_at_fork(after_in_child=self._forget)

    def room(self) -> tuple[int, int]:
        """Give the columns of the terminal, and how many lines can be drawn."""
        size = os.get_terminal_size(self._terminal)
        return size.columns, max(0, size.lines - max(LEAST_LEFT, size.lines // 2))

    def was_resized(self) -> bool:
        """Tell whether the terminal has another size than when it was drawn on."""
        return bool(self._lines) and os.get_terminal_size(self._terminal) != self._size

    def draw(self, lines: Sequence[str]) -> None:
        """Draw these lines; they are shorter than the terminal is wide.

        Nothing is drawn while another program has the terminal.
        """
        if os.tcgetpgrp(self._terminal) != os.getpgrp():
            return
        size = os.get_terminal_size(self._terminal)
        text = ""
        if size != self._size and self._lines:  # the terminal has set itself to scroll whole
            text, self._lines = _FREE, 0
        self._size = size
        height = size.lines
        lines = lines[: max(0, height - 1)]
        more = len(lines) - self._lines
        if more > 0:
            text += _DOWN * more + f"\x1b[{more}A"
            text += f"{_SAVE}\x1b[1;{height - len(lines)}r{_RESTORE}"
            self._lines = len(lines)
        text += _SAVE
        blank = [""] * (self._lines - len(lines))
        for place, line in enumerate([*blank, *lines], height - self._lines + 1):
            text += f"\x1b[{place};1H{line}\x1b[0m{_ERASE_LINE_END}"
        self._write(text + _RESTORE)

    def close(self) -> None:
        """Give the lines back to the program."""
        if self._lines:
            self._write(_FREE)
            self._lines = 0
        if self._watched >= 0:
            os.write(self._watched, b"\n")  # nothing left to do
            os.close(self._watched)
            self._watched = -1

    def _write(self, text: str) -> None:
        # All in one: what the program prints meanwhile comes before it or after it.
        os.write(self._terminal, text.encode())

    def _forget(self) -> None:
        """In a child process: its end is not the program's."""
        if self._watched >= 0:
            os.close(self._watched)
            self._watched = -1
        self._lines = 0
