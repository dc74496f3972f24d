"""The tree of bounds, drawn for a terminal with rich."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from membound_async.verifier import BoundsReport, Row

from . import CannotStart
from .figures import size
from .screen import console_for, is_drawable

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["print_tree"]

_THROUGH, _LAST, _BESIDE, _NONE = "├─ ", "└─ ", "│  ", "   "
_THROUGH_ASCII, _LAST_ASCII, _BESIDE_ASCII = "|- ", "`- ", "|  "


def print_tree(report: BoundsReport) -> bool:
    """Draw a tree of bounds on standard output.

    Returns:
        Whether it could be drawn: standard output is a terminal, and rich is installed.
    """
    if not is_drawable(sys.stdout):
        return False
    try:
        console = console_for(sys.stdout, purpose="the tree")
    except CannotStart:
        return False
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(Text("COMPONENT", style="bold"), overflow="fold")
    for title in ("MINIMUM", "FIRM LIMIT"):
        table.add_column(Text(title, style="bold"), justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)  # the marks
    for (depth, row), guide in zip(
        report.body, _guides(report.body, ascii_only=console.options.ascii_only), strict=True
    ):
        style = "bold cyan" if row.is_component else ""
        table.add_row(
            Text().append(guide, "dim").append(row.label, "bold" if not depth else style),
            _size(row.minimum_bytes),
            _size(row.firm_limit_bytes),
            row.mark,
        )
    for place, row in enumerate(report.foot):
        if not place:
            table.add_row()
        table.add_row(
            Text(row.label, style="dim"),
            _size(row.minimum_bytes, "0 B"),
            _size(row.firm_limit_bytes, "0 B"),
        )
    console.print(table)
    for note in report.notes:
        console.print(Text(note, style="dim"))
    return True


def _size(nbytes: int, nothing: str = "-") -> Text:
    from rich.text import Text

    if nbytes < 0:
        return Text(size(nbytes), style="bold red")
    return Text(size(nbytes), style="") if nbytes else Text(nothing, style="dim")


def _guides(body: Sequence[tuple[int, Row]], *, ascii_only: bool) -> list[str]:
    """Give the lines that join each row to those above and below it."""
    through, last, beside = _THROUGH, _LAST, _BESIDE
    if ascii_only:
        through, last, beside = _THROUGH_ASCII, _LAST_ASCII, _BESIDE_ASCII
    guides: list[str] = []
    goes_on: set[int] = set()  # depths at which something follows below
    for depth, _ in reversed(body):
        guide = "".join(beside if above in goes_on else _NONE for above in range(1, depth))
        if depth:
            guide += through if depth in goes_on else last
        guides.append(guide)
        goes_on = {one for one in goes_on if one < depth} | {depth}
    return guides[::-1]
