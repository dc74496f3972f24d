"""Text for a terminal: paragraphs and tables that keep to its width."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import TextIO

__all__ = ["columns_of", "paragraph", "table"]

_NARROWEST = 40
_NO_BREAK = "\N{NO-BREAK SPACE}"
_INSIDE_NUMBER = re.compile(r"(?<=\d) (?=\d|[KMGT]?i?B\b|m?s\b)")


def columns_of(stream: TextIO | None) -> int:
    """Give how many columns the terminal has that ``stream`` goes to; 80 if it is none."""
    try:
        assert stream is not None
        return max(_NARROWEST, os.get_terminal_size(stream.fileno()).columns)
    except (OSError, ValueError, AttributeError, AssertionError):
        return 80


def paragraph(text: str, columns: int, *, label: str = "", indent: int = 2) -> list[str]:
    """Give a text in lines; ``label`` stands in the indentation of the first one."""
    lines = wrap(
        _INSIDE_NUMBER.sub(_NO_BREAK, text),
        columns,
        initial_indent=f"{label:<{indent}}" if label else "",
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
    )
    return [line.replace(_NO_BREAK, " ") for line in lines]


def table(lines: Sequence[tuple[str, Sequence[str]]], columns: int) -> Iterator[str]:
    """Give labels and right-aligned cells in lines, a rule below the first.

    A label that is too long for the terminal has a line of its own.
    """
    sizes = [max(map(len, column)) for column in zip(*(cells for _, cells in lines), strict=True)]
    cells_width = sum(2 + size for size in sizes)
    most = max(columns - cells_width, len(lines[0][0]))
    room = max(len(label) for label, _ in lines if len(label) <= most)
    for place, (label, cells) in enumerate(lines):
        if len(label) > room:
            yield label
            label = ""
        yield label.ljust(room) + "".join(
            "  " + cell.rjust(size) for cell, size in zip(cells, sizes, strict=True)
        )
        if place == 0:
            yield "-" * (room + cells_width)
