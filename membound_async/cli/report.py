"""The report of ``membound run``: what a program used, as text or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from textwrap import wrap

from membound_async.sizes import human_size
from membound_async.statistics import ComponentStatistics, LimiterStatistics

__all__ = ["Ending", "Report", "peak_rss_bytes", "version"]

ROWS = 30
"""How many components the text shows, the largest; the JSON has them all."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a program ended.

    Attributes:
        exit_code: as a shell sees it.
        exception: the type of what it raised and nobody caught; None if nothing, or
            ``SystemExit``.
    """

    exit_code: int = 0
    exception: str | None = None

    @classmethod
    def of(cls, error: BaseException) -> Ending:
        """Give the ending that Python makes of an exception that nobody caught."""
        if isinstance(error, SystemExit):
            code = error.code
            if code is None:
                return cls()
            return cls(code & 0xFF if isinstance(code, int) else 1)
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        return cls(code, type(error).__qualname__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What is known of a program that has ended.

    Attributes:
        program: what was run.
        ending: how it ended.
        seconds: how long it ran.
        statistics: its limiter's numbers at the end.
        limit_option: what ``--limit`` said; None if it was not given.
        peak_rss_bytes: the most resident memory it ever had, as the kernel counts; None
            where it does not say.
        stalled_seconds: how long tasks of the machine, or of the container whose limit
            binds, waited for memory meanwhile, as the kernel counts; None where it does
            not say.
    """

    program: str
    ending: Ending
    seconds: float
    statistics: LimiterStatistics
    limit_option: str | None
    peak_rss_bytes: int | None
    stalled_seconds: float | None

    def to_json(self) -> str:
        """Give it as one JSON document in one line."""
        return json.dumps(
            {
                "membound_version": version(),
                "program": self.program,
                "exit_code": self.ending.exit_code,
                "exception": self.ending.exception,
                "seconds": self.seconds,
                "peak_rss_bytes": self.peak_rss_bytes,
                "stalled_seconds": self.stalled_seconds,
                "limiter": self.statistics.to_dict(),
            }
        )

    def to_text(self, width: int = 80) -> str:
        """Give it as text for a terminal of that many columns."""
        text = wrap(f"membound: {self.program} {self._ended()}", width, subsequent_indent="  ")
        for label, value in self._facts():
            text += wrap(value, width, initial_indent=f"{label:<10}", subsequent_indent=" " * 10)
        return "\n".join([*text, *_table(self.statistics, width)])

    def _ended(self) -> str:
        after = f"after {_duration(self.seconds)}"
        if self.ending.exit_code == 130 and self.ending.exception is not None:
            return f"was interrupted {after}"
        if self.ending.exception is not None:
            return f"ended by {self.ending.exception} {after}, exit code {self.ending.exit_code}"
        return f"ended {after}, exit code {self.ending.exit_code}"

    def _facts(self) -> Iterator[tuple[str, str]]:
        numbers = self.statistics
        source = numbers.limit_source
        if self.limit_option is not None:
            source = source.replace("explicit", f"--limit {self.limit_option}", 1)
        yield (
            "limit",
            f"{human_size(numbers.limit_bytes)} ({source}), of which a part of "
            f"{numbers.slop_factor:g} is held back: {human_size(numbers.effective_limit_bytes)}",
        )
        yield (
            "peak",
            f"{human_size(numbers.peak_measured_bytes)} {numbers.measured_name}, in "
            f"{_count(numbers.samples)} readings",
        )
        if self.peak_rss_bytes is not None:
            above = ", above the limit" if self.peak_rss_bytes > numbers.limit_bytes else ""
            yield "", f"{human_size(self.peak_rss_bytes)} resident, as the kernel counts{above}"
        yield "baseline", f"{human_size(numbers.baseline_bytes)}, before anything was granted"
        yield from self._troubles()

    def _troubles(self) -> Iterator[tuple[str, str]]:
        numbers = self.statistics
        if numbers.observe:
            yield (
                "observed",
                f"nobody was held up; {_count(numbers.would_wait)} requests would have waited, "
                f"{_duration(numbers.would_wait_seconds)} in all, and "
                f"{_count(numbers.would_refuse)} would have been refused",
            )
        if numbers.probe_failures:
            yield "failed", f"{_count(numbers.probe_failures)} readings of memory"
        if numbers.grants:
            granted = sum(component.granted_bytes for component in numbers.components)
            yield (
                "leaked",
                f"{human_size(granted)} in {_count(numbers.grants)} grants were never given back",
            )
        if self.stalled_seconds:
            yield (
                "stalled",
                f"{_duration(self.stalled_seconds)} for want of memory, as the kernel counts for "
                "the machine or container",
            )


# --- the components


@dataclass(frozen=True, slots=True)
class _Column:
    """One column of the table; it is left out where it says nothing of any component."""

    title: str
    cell: Callable[[ComponentStatistics], str]


_BOUNDS_AND_GRANTS = (
    _Column("minimum", lambda component: _size(component.minimum_bytes)),
    _Column("firm limit", lambda component: _size(component.firm_limit_bytes or 0)),
    _Column("peak", lambda component: _size(component.peak_granted_bytes)),
    _Column("grants", lambda component: _count(component.admissions)),
)
_ACTED = (
    _Column("refused", lambda component: _count(component.refusals)),
    _Column("waited", lambda component: _duration(component.total_wait_seconds)),
    _Column("delayed", lambda component: _duration(component.total_delay_seconds)),
)
_OBSERVED = (
    _Column("would wait", lambda component: _count(component.would_wait)),
    _Column("for", lambda component: _duration(component.would_wait_seconds)),
    _Column("would refuse", lambda component: _count(component.would_refuse)),
)
_NOTHING = "-"


def _table(numbers: LimiterStatistics, width: int) -> list[str]:
    """Give the components that did or declared anything as lines, the largest first."""
    columns = _BOUNDS_AND_GRANTS + (_OBSERVED if numbers.observe else _ACTED)
    rows = [
        (component, [column.cell(component) for column in columns])
        for component in sorted(numbers.components, key=lambda one: -one.peak_granted_bytes)
    ]
    rows = [(component, cells) for component, cells in rows if set(cells) != {_NOTHING}]
    if not rows:
        return ["No memory was asked for: the program was only measured."]
    shown = [place for place in range(len(columns)) if any(c[place] != _NOTHING for _, c in rows)]
    lines = [
        ("component", [columns[place].title for place in shown]),
        *((component.path, [cells[place] for place in shown]) for component, cells in rows[:ROWS]),
    ]
    text = list(_aligned(lines, width))
    text.insert(1, "-" * max(map(len, text)))
    if len(rows) > ROWS:
        text.append(f"... and {_count(len(rows) - ROWS)} more")
    return text


def _aligned(lines: Sequence[tuple[str, Sequence[str]]], width: int) -> Iterator[str]:
    """Give labels and right-aligned cells; a label that is too long has a line of its own."""
    sizes = [max(map(len, column)) for column in zip(*(cells for _, cells in lines), strict=True)]
    cells_width = sum(2 + size for size in sizes)
    room = min(max(len(label) for label, _ in lines), max(width - cells_width, len("component")))
    for label, cells in lines:
        if len(label) > room:
            yield label
            label = ""
        yield label.ljust(room) + "".join(
            "  " + cell.rjust(size) for cell, size in zip(cells, sizes, strict=True)
        )


# --- numbers for people


def _size(nbytes: int) -> str:
    return human_size(nbytes) if nbytes else _NOTHING


def _count(number: int) -> str:
    return f"{number:,}".replace(",", " ") if number else _NOTHING


def _duration(seconds: float) -> str:
    if seconds < 0.0005:
        return _NOTHING
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:,.1f} s".replace(",", " ")


# --- the rest of what is known


def peak_rss_bytes() -> int | None:
    """Give the most resident memory that this process ever had, as the kernel counts.

    Of this program only: ``ru_maxrss``, which is used where there is no ``/proc``, also
    counts what the process was before it became this program.
    """
    try:
        with open("/proc/self/status", "rb") as status:
            for line in status:
                if line.startswith(b"VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def version() -> str:
    """Give the version of the package that is installed."""
    from importlib import metadata

    try:
        return metadata.version("membound-async")
    except metadata.PackageNotFoundError:
        return "(not installed)"
