"""The report of ``membound run``: what a program used, as text or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from membound_async.advice import advise
from membound_async.bounds import ROOT
from membound_async.sizes import human_size
from membound_async.statistics import ComponentStatistics, LimiterStatistics

from .counsel import counsel
from .figures import NOTHING, count, duration, size
from .layout import paragraph, table

__all__ = ["Ending", "Report", "limit_source", "peak_rss_bytes", "version"]

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
        if isinstance(error, KeyboardInterrupt):
            return _INTERRUPTED
        return cls(1, type(error).__qualname__)


_INTERRUPTED = Ending(130, "KeyboardInterrupt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What is known of a program that has ended.

    Attributes:
        program: what was run.
        ending: how it ended.
        seconds: how long it ran.
        statistics: its limiter's numbers at the end.
        membound_version: of this package.
        has_limit_option: whether ``--limit`` was given.
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
    membound_version: str
    has_limit_option: bool
    peak_rss_bytes: int | None
    stalled_seconds: float | None

    def to_json(self) -> str:
        """Give it as one JSON document in one line."""
        return json.dumps(
            {
                "membound_version": self.membound_version,
                "program": self.program,
                "exit_code": self.ending.exit_code,
                "exception": self.ending.exception,
                "seconds": self.seconds,
                "peak_rss_bytes": self.peak_rss_bytes,
                "stalled_seconds": self.stalled_seconds,
                "limiter": self.statistics.to_dict(),
                "advice": advise(self.statistics).to_dict(),
            }
        )

    def to_text(self, columns: int = 80) -> str:
        """Give it as text for a terminal of that many columns."""
        text = paragraph(f"membound: {self.program} {self._ended()}", columns)
        for label, fact in self._facts():
            text += paragraph(fact, columns, label=f"{label:<10}", indent=10)
        text += _components(self.statistics, columns)
        return "\n".join([*text, *counsel(advise(self.statistics), columns)])

    def _ended(self) -> str:
        ending, after = self.ending, f"after {duration(self.seconds, '0 s')}"
        if ending == _INTERRUPTED:
            return f"was interrupted {after}"
        by = "" if ending.exception is None else f" by {ending.exception}"
        return f"ended{by} {after}, exit code {ending.exit_code}"

    def _facts(self) -> Iterator[tuple[str, str]]:
        numbers = self.statistics
        limit = human_size(numbers.limit_bytes)
        effective = human_size(numbers.effective_limit_bytes)
        source = limit_source(numbers.limit_source, is_option=self.has_limit_option)
        yield "limit", f"{limit} ({source}), {effective} effective (slop {numbers.slop_factor:g})"
        peak, name = human_size(numbers.peak_measured_bytes), numbers.measured_name
        yield "peak", f"{peak} {name}, the highest of {count(numbers.samples)} readings"
        if self.peak_rss_bytes is not None:
            above = ", above the limit" if self.peak_rss_bytes > numbers.limit_bytes else ""
            yield "", f"{human_size(self.peak_rss_bytes)} resident by the kernel's count{above}"
        yield "baseline", f"{human_size(numbers.baseline_bytes)} before anything was granted"
        if numbers.observe:
            waits = count(numbers.would_wait, "0")
            seconds = duration(numbers.would_wait_seconds, "0 s")
            refusals = count(numbers.would_refuse, "0")
            would = f"{waits} requests would have waited ({seconds} in all)"
            yield "observed", f"nobody was held up; {would}, {refusals} would have been refused"
        if numbers.probe_failures:
            yield "failed", f"{count(numbers.probe_failures)} readings of memory"
        if numbers.grants:
            granted = human_size(sum(component.granted_bytes for component in numbers.components))
            yield "leaked", f"{granted} in {count(numbers.grants)} grants never given back"
        if numbers.tracking == "displaced":
            yield "tracking", "stopped: a tool that was started earlier has discarded the hooks"
        if self.stalled_seconds:
            stalled = duration(self.stalled_seconds)
            yield "stalled", f"{stalled} for want of memory, by the kernel's count of all processes"


def limit_source(source: str, is_option: bool) -> str:
    """Say who set a limit; an explicit one comes from the command line here."""
    return source.replace("explicit", "--limit", 1) if is_option else source


# --- the components


@dataclass(frozen=True, slots=True)
class _Column:
    """One column of the table; it is left out where it says nothing of any component."""

    title: str
    cell: Callable[[ComponentStatistics], str]


_BOUNDS_AND_GRANTS = (
    _Column("minimum", lambda component: size(component.minimum_bytes)),
    _Column("firm limit", lambda component: size(component.firm_limit_bytes or 0)),
    _Column("peak", lambda component: size(component.peak_granted_bytes)),
    _Column("grants", lambda component: count(component.admissions)),
)
_ACTED = (
    _Column("refused", lambda component: count(component.refusals)),
    _Column("waited", lambda component: duration(component.total_wait_seconds)),
    _Column("delayed", lambda component: duration(component.total_delay_seconds)),
)
_TRACKED = (
    _Column("allocated", lambda component: size(component.peak_live_bytes)),
    _Column("overdraft", lambda component: size(component.peak_overdraft_bytes)),
)
_OBSERVED = (
    _Column("would wait", lambda component: count(component.would_wait)),
    _Column("for", lambda component: duration(component.would_wait_seconds)),
    _Column("would refuse", lambda component: count(component.would_refuse)),
)


def _components(numbers: LimiterStatistics, columns: int) -> list[str]:
    """Give the components that did or declared anything as lines, the largest first."""
    tracked = _TRACKED if numbers.tracking in ("on", "displaced") else ()
    parts = _BOUNDS_AND_GRANTS + tracked + (_OBSERVED if numbers.observe else _ACTED)
    rows = [
        (component, [part.cell(component) for part in parts])
        for component in sorted(
            numbers.components, key=lambda one: -max(one.peak_granted_bytes, one.peak_live_bytes)
        )
    ]
    rows = [(component, cells) for component, cells in rows if set(cells) != {NOTHING}]
    if not any(component.path != ROOT or component.admissions for component, _ in rows):
        return ["No memory was asked for: the program was only measured."]
    shown = [place for place in range(len(parts)) if any(c[place] != NOTHING for _, c in rows)]
    lines = [
        ("component", [parts[place].title for place in shown]),
        *((component.path, [cells[place] for place in shown]) for component, cells in rows[:ROWS]),
    ]
    text = list(table(lines, columns))
    if len(rows) > ROWS:
        text.append(f"... and {count(len(rows) - ROWS)} more")
    return text


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
