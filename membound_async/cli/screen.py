"""The live table for a terminal, in colours, with rich."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import IO, TYPE_CHECKING

from membound_async.advice import Advice
from membound_async.statistics import ComponentStatistics

from . import CannotStart
from .figures import NOTHING
from .usage import Column, Seen, age_and_limit, columns_for, headline, ordered

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

__all__ = ["View", "console_for", "is_drawable", "screen"]

_LABEL = 10
_CRITICAL = 0.9
"""Whoever has so much of its firm limit is shown in another colour."""


@dataclass(slots=True)
class View:
    """What a person has chosen to see.

    Attributes:
        sort: the name of a column, ``"component"`` or ``"urgency"``.
        is_reversed: the other way round.
        first: how many components are scrolled past.
    """

    sort: str = "urgency"
    is_reversed: bool = False
    first: int = 0


def is_drawable(stream: IO[str] | None) -> bool:
    """Tell whether a stream goes to a terminal that things can be drawn on."""
    try:
        is_terminal = stream is not None and os.isatty(stream.fileno())
    except (OSError, ValueError, AttributeError):
        is_terminal = False
    return is_terminal and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


def console_for(stream: IO[str], *, purpose: str) -> Console:
    """Give what draws on a terminal.

    Raises:
        CannotStart: rich is not installed.
    """
    try:
        for name in ("rich.table", "rich.text"):  # now, as a part of a program's baseline
            import_module(name)
        from rich.console import Console
    except ModuleNotFoundError:
        raise CannotStart(f"{purpose} needs rich: pip install 'membound-async[cli]'") from None
    return Console(file=stream, highlight=False, emoji=False, markup=False)


def screen(
    console: Console,
    seen: Seen,
    view: View,
    *,
    height: int,
    trouble: str = "",
    advice: Advice | None = None,
    keys: str = "",
) -> RenderableType:
    """Draw a limiter on so many lines.

    Args:
        console: where it will be shown.
        seen: the limiter.
        view: what to show of it.
        height: how many lines there are.
        trouble: why nothing newer is known, if that is so.
        advice: shown in place of the components.
        keys: what the keys do, in the last line.
    """
    from rich.console import Group
    from rich.text import Text

    width = console.width
    head = _head(console, seen, trouble)
    room = height - len(head) - (1 if keys else 0)
    if advice is None:
        body = _components(seen, view, width, room)
    else:
        body = _advice(advice, width, view, room)
    lines: list[RenderableType] = [*head, *body[0]]
    if keys:
        lines += [Text("")] * (room - body[1])
        lines.append(_cut(Text(keys, style="dim"), width))
    return Group(*lines)


def _head(console: Console, seen: Seen, trouble: str) -> list[Text]:
    from rich.text import Text

    numbers = seen.statistics
    title = Text().append(seen.title, style="bold")
    title.append(f"  {age_and_limit(numbers)}  ", style="dim")
    if trouble:
        title.append(f" {trouble} ", style="bold white on red")
    else:
        title.append(
            f" {seen.status.replace('_', ' ')} ",
            style="bold green" if seen.status == "ok" else "bold white on red",
        )
    lines = [title]
    for label, fact in headline(seen):
        line = Text().append(f"{label:<{_LABEL}}", style="dim")
        if label == "memory":
            length = min(console.width // 4, console.width - _LABEL - 2 - len(fact))
            line.append_text(_bar(console, seen, length)).append("  ")
        is_waiting = label == "waiting" and numbers.waiting
        lines.append(line.append(fact, style="yellow" if is_waiting else ""))
    return [_cut(line, console.width) for line in lines]


def _bar(console: Console, seen: Seen, length: int) -> Text:
    """Draw what is measured of the effective limit."""
    from rich.text import Text

    numbers = seen.statistics
    filled, empty = ("#", ".") if console.options.ascii_only else ("█", "░")
    part = numbers.measured_bytes / numbers.effective_limit_bytes
    many = max(0, min(length, round(part * length)))
    colour = "green"
    if numbers.measured_bytes > numbers.effective_limit_bytes:
        colour = "red"
    elif numbers.measured_bytes > numbers.threshold_bytes:
        colour = "yellow"
    return Text().append(filled * many, style=colour).append(empty * (length - many), style="dim")


def _components(seen: Seen, view: View, width: int, room: int) -> tuple[list[RenderableType], int]:
    """Give the components as a table, and how many lines it has."""
    from rich.text import Text

    components = ordered(seen.statistics, view.sort, is_reversed=view.is_reversed)
    if not components:
        return [Text("no component has asked for memory yet", style="dim")], 1
    rows = max(1, room - 1)
    if len(components) > rows:
        rows = max(1, rows - 1)
    view.first = max(0, min(view.first, len(components) - rows))
    shown = components[view.first : view.first + rows]
    columns = columns_for(width, seen.statistics, view.sort)
    body: list[RenderableType] = [_table(shown, columns, view, width)]
    lines = 1 + len(shown)
    above, below = view.first, len(components) - view.first - len(shown)
    if above or below:
        more = [f"{above} above"] * (above > 0) + [f"{below} more"] * (below > 0)
        body.append(Text(f"... {', '.join(more)}", style="dim"))
        lines += 1
    return body, lines


def _table(
    components: Sequence[ComponentStatistics], columns: Sequence[Column], view: View, width: int
) -> Table:
    from rich.table import Table
    from rich.text import Text

    def title(name: str, key: str) -> Text:
        text = Text(name.upper(), style="bold reverse" if name == view.sort else "bold")
        place = name.index(key)
        text.stylize("underline", place, place + 1)
        return text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, width=width, show_edge=False)
    table.add_column(title("component", "c"), ratio=1, no_wrap=True, overflow="ellipsis")
    for column in columns:
        table.add_column(
            title(column.name, column.key), justify="right", no_wrap=True, min_width=column.width
        )
    for one in components:
        style = _style(one)
        table.add_row(
            Text(one.path, style=style),
            *(
                Text(cell, style="dim" if cell == NOTHING else style)
                for cell in (column.cell(one) for column in columns)
            ),
        )
    return table


def _style(one: ComponentStatistics) -> str:
    held = max(one.granted_bytes + one.in_flight_bytes, one.live_bytes)
    firm = one.firm_limit_bytes
    if firm is not None and held > firm:
        return "red"
    if one.waiting or (firm is not None and held >= _CRITICAL * firm):
        return "yellow"
    return ""


def _advice(advice: Advice, width: int, view: View, room: int) -> tuple[list[RenderableType], int]:
    """Give what is to be said, and how many lines that takes."""
    from rich.text import Text

    from .counsel import counsel

    lines = counsel(advice, width, everything=True)
    rows = max(1, room - 1)
    view.first = max(0, min(view.first, len(lines) - rows))
    shown = lines[view.first : view.first + rows]
    body: list[RenderableType] = [Text("ADVICE", style="bold reverse")]
    body += [_cut(Text(line), width) for line in shown]
    return body, 1 + len(shown)


def _cut(line: Text, width: int) -> Text:
    line.truncate(width, overflow="ellipsis")
    line.no_wrap = True
    return line
