"""What components use at the moment: the columns of the live table, its order, its headline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from membound_async.advice import time_in_words
from membound_async.bounds import ROOT
from membound_async.sizes import human_size
from membound_async.statistics import ComponentStatistics, LimiterStatistics

from .figures import count, duration, size
from .layout import table

__all__ = [
    "COLUMNS",
    "Column",
    "Seen",
    "age_and_limit",
    "columns_for",
    "headline",
    "in_one_line",
    "ordered",
    "to_text",
    "waiting_in_words",
]

NARROWEST_NAME = 18
"""What the components' names have of the width, at least; on a wide terminal a fifth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What is shown: a limiter at one moment.

    Attributes:
        title: where it is.
        statistics: its numbers.
        status: ``"ok"``, ``"over_limit"`` or ``"stalled"``.
        reason: why it is not ``"ok"``.
    """

    title: str
    statistics: LimiterStatistics
    status: str = "ok"
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        name: what it is called for ``--sort``, and its title.
        key: the key that sorts by it, a letter of its name.
        rank: by what it is sorted, the largest first.
        cell: what is shown.
        width: how many characters that usually takes.
        importance: columns with a lower number are kept longer when the terminal is narrow.
    """

    name: str
    key: str
    rank: Callable[[ComponentStatistics], float]
    cell: Callable[[ComponentStatistics], str]
    width: int
    importance: int


def _held(one: ComponentStatistics) -> int:
    return one.granted_bytes + one.in_flight_bytes


def _sizes(
    name: str, key: str, nbytes: Callable[[ComponentStatistics], int], importance: int
) -> Column:
    return Column(name, key, nbytes, lambda one: size(nbytes(one)), 9, importance)


def _counts(
    name: str, key: str, number: Callable[[ComponentStatistics], int], importance: int
) -> Column:
    return Column(name, key, number, lambda one: count(number(one)), 7, importance)


def _times(
    name: str, key: str, seconds: Callable[[ComponentStatistics], float], importance: int
) -> Column:
    return Column(name, key, seconds, lambda one: duration(seconds(one)), 7, importance)


COLUMNS = {
    column.name: column
    for column in (
        _sizes("granted", "g", _held, 0),
        _sizes("live", "l", lambda one: one.live_bytes, 3),
        _sizes("peak", "p", lambda one: one.peak_granted_bytes, 5),
        _sizes("minimum", "m", lambda one: one.minimum_bytes, 6),
        _sizes("firm", "f", lambda one: one.firm_limit_bytes or 0, 2),
        _counts("waiting", "w", lambda one: one.waiting, 1),
        _sizes("wanted", "d", lambda one: one.waiting_bytes, 8),
        _times("oldest", "o", lambda one: one.oldest_wait_seconds, 4),
        _times("waited", "t", lambda one: one.total_wait_seconds, 7),
        _counts("refused", "r", lambda one: one.refusals, 9),
        _counts("grants", "s", lambda one: one.grants, 10),
    )
}

Order = Callable[[ComponentStatistics], tuple[float | str, ...]]


def _urgency(one: ComponentStatistics) -> tuple[float | str, ...]:
    """Who waits comes first, the longest first; then the largest."""
    return (-one.oldest_wait_seconds, -one.waiting, -max(_held(one), one.live_bytes), one.path)


def ordered(
    statistics: LimiterStatistics, sort: str, *, is_reversed: bool = False
) -> list[ComponentStatistics]:
    """Give the components that have or did anything, in an order.

    Args:
        statistics: of the limiter.
        sort: the name of a column, ``"component"``, or ``"urgency"``.
        is_reversed: the other way round.
    """
    order: Order = _urgency
    if sort == "component":
        order = lambda one: (one.path,)  # noqa: E731
    elif sort != "urgency":
        rank = COLUMNS[sort].rank
        order = lambda one: (-rank(one), *_urgency(one))  # noqa: E731
    shown = [
        one
        for one in statistics.components
        if one.path != ROOT or _held(one) or one.waiting or one.live_bytes or one.admissions
    ]
    return sorted(shown, key=order, reverse=is_reversed)


def columns_for(width: int, statistics: LimiterStatistics, sort: str = "urgency") -> list[Column]:
    """Give the columns that find room beside the names, in their order."""
    columns = [
        column
        for column in COLUMNS.values()
        if column.name != "live" or statistics.tracking in ("on", "displaced")
    ]
    left = width - max(NARROWEST_NAME, width // 5)
    chosen: list[Column] = []
    for column in sorted(columns, key=lambda one: (one.name != sort, one.importance)):
        left -= column.width + 2
        if left >= 0:
            chosen.append(column)
    return [column for column in columns if column in chosen]


def age_and_limit(numbers: LimiterStatistics) -> str:
    """Say how long a limiter has been there, and what it limits to."""
    return f"for {time_in_words(numbers.age_seconds)}, limit {human_size(numbers.limit_bytes)}"


def headline(seen: Seen) -> Iterator[tuple[str, str]]:
    """Give what is to be said of the limiter as a whole, as labels and facts."""
    numbers = seen.statistics
    if seen.status != "ok":
        yield "trouble", seen.reason or ""
    measured, effective = numbers.measured_bytes, numbers.effective_limit_bytes
    used = f"{human_size(measured)} of {human_size(effective)} ({_percent(numbers)} %)"
    yield "memory", f"{used}, peak {human_size(numbers.peak_measured_bytes)}"
    held = numbers.granted_bytes + numbers.in_flight_bytes
    grants = f" in {count(numbers.grants)} grant" if numbers.grants else ""
    grants += "s" * (numbers.grants > 1)
    free, drift = human_size(numbers.free_bytes), human_size(numbers.drift_bytes)
    yield "granted", f"{human_size(held)}{grants}, free {free}, drift {drift}"
    yield "waiting", waiting_in_words(numbers)


def waiting_in_words(numbers: LimiterStatistics) -> str:
    """Say who waits for what, and since when."""
    if not numbers.waiting:
        waiting = "nobody"
    else:
        waiting = (
            f"{count(numbers.waiting)} for {human_size(numbers.waiting_bytes)}, "
            f"the oldest for {duration(numbers.oldest_wait_seconds, '0 s')}"
        )
    if numbers.delay_seconds:
        waiting += f"; grants are delayed by {duration(numbers.delay_seconds)}"
    return waiting


def in_one_line(seen: Seen) -> str:
    """Give the state of a limiter in one line, for a log."""
    numbers = seen.statistics
    held = numbers.granted_bytes + numbers.in_flight_bytes
    return (
        f"{human_size(numbers.measured_bytes)} of {human_size(numbers.effective_limit_bytes)} "
        f"({_percent(numbers)} %), granted {human_size(held)}, "
        f"waiting {waiting_in_words(numbers)}"
    )


def to_text(seen: Seen, sort: str, width: int) -> list[str]:
    """Give the headline and the whole table in lines of plain text."""
    text = [f"{seen.title}, {age_and_limit(seen.statistics)}: {seen.status.replace('_', ' ')}"]
    text += [f"{label:<10}{fact}" for label, fact in headline(seen)]
    rows = ordered(seen.statistics, sort)
    if not rows:
        return [*text, "no component has asked for memory yet"]
    columns = columns_for(width, seen.statistics, sort)
    lines: list[tuple[str, Sequence[str]]] = [("component", [column.name for column in columns])]
    lines += [(one.path, [column.cell(one) for column in columns]) for one in rows]
    return [*text, *table(lines, width)]


def _percent(numbers: LimiterStatistics) -> int:
    return round(100 * numbers.measured_bytes / numbers.effective_limit_bytes)
