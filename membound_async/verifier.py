"""Whether what components declare fits into the limit, and a report that says why not."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from textwrap import wrap
from typing import Protocol

from .bounds import ComponentBounds, UsageExpr
from .exceptions import FirmLimitExceedsAvailable, InsufficientMinimumMemory, InvalidLimit
from .sizes import format_size, human_size

__all__ = [
    "BoundsReport",
    "BoundsVerifier",
    "DeclaredBounds",
    "DeclaredComponent",
    "EffectiveLimit",
    "Row",
    "VerifiedBounds",
    "effective_limit_bytes",
    "render",
    "report_of",
    "smallest_limit_bytes",
]


class EffectiveLimit(Protocol):
    """A limit that knows what is held back of it, such as ``MemoryLimit``."""

    @property
    def effective_bytes(self) -> int:
        """The limit less its slop."""
        ...

    @property
    def slop_factor(self) -> float:
        """The part of the limit that is held back."""
        ...


class DeclaredComponent(Protocol):
    """One component and its own firm limit."""

    @property
    def path(self) -> str:
        """Where it is in the tree."""
        ...

    @property
    def firm_limit_bytes(self) -> int | None:
        """The most it may hold; None for no firm limit."""
        ...


class DeclaredBounds(Protocol):
    """What can be verified: a ``ComponentRegistry``, or a tree of ``ComponentBounds``."""

    @property
    def total_minimum_bytes(self) -> int:
        """All minimums."""
        ...

    @property
    def total_firm_limit_bytes(self) -> int:
        """All firm limits; a component without one counts its minimum."""
        ...

    @property
    def largest(self) -> DeclaredComponent:
        """The component with the largest firm limit of its own."""
        ...

    def tree(self) -> ComponentBounds:
        """Give all of it, to keep or to print."""
        ...


def effective_limit_bytes(limit_bytes: int, slop_factor: float) -> int:
    """Give ``int(limit_bytes * (1 - slop_factor))``, exactly.

    Raises:
        InvalidLimit: ``slop_factor`` is not a number with ``0 <= slop_factor < 1``.
    """
    return math.floor(limit_bytes * _kept_part(slop_factor))


def smallest_limit_bytes(effective_bytes: int, slop_factor: float) -> int:
    """Give the smallest limit whose effective limit is at least ``effective_bytes``.

    Raises:
        InvalidLimit: ``slop_factor`` is not a number with ``0 <= slop_factor < 1``.
    """
    return math.ceil(effective_bytes / _kept_part(slop_factor))


def _kept_part(slop_factor: float) -> Fraction:
    if not _is_number(slop_factor) or not 0 <= slop_factor < 1:
        raise InvalidLimit(
            f"slop_factor={slop_factor!r} is no part of the limit; it must be a number of at "
            "least 0 and below 1, for example 0.15"
        )
    # As it is written, not as binary has it: 0.1 of 100 bytes leaves 90 and not 89.
    return 1 - Fraction(str(slop_factor))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, slots=True)
class VerifiedBounds:
    """Bounds that fit, and what they fit into; all bytes.

    Attributes:
        bounds: the tree, as it was when it was verified.
        effective_bytes: the limit less its slop.
        baseline_bytes: what the process had before any component started.
        overcommit: how many times the available memory the firm limits may promise.
        smallest_limit_bytes: the smallest limit, slop included, that would have passed.
    """

    bounds: ComponentBounds = field(repr=False)
    effective_bytes: int
    baseline_bytes: int
    overcommit: float
    smallest_limit_bytes: int

    @property
    def available_bytes(self) -> int:
        """What there is for the components: the effective limit less the baseline."""
        return self.effective_bytes - self.baseline_bytes

    @property
    def total_minimum_bytes(self) -> int:
        """The minimums of all components."""
        return self.bounds.total_minimum_bytes

    @property
    def total_firm_limit_bytes(self) -> int:
        """The firm limits of all components; one without a firm limit counts its minimum."""
        return self.bounds.total_firm_limit_bytes

    def report(self, *, width: int = 80) -> str:
        """Give the tree of bounds as text; see ``render``."""
        return render(
            self.bounds,
            effective_bytes=self.effective_bytes,
            baseline_bytes=self.baseline_bytes,
            overcommit=self.overcommit,
            width=width,
        )


class BoundsVerifier:
    """Checks that the declared bounds fit into the memory there is (after Saluki).

    With ``A`` = effective limit - baseline: the minimums together may be ``A``, each firm
    limit may be ``A``, and the firm limits together ``overcommit * A``.

    Args:
        declared: a registry or a tree of bounds.
        effective_bytes: the limit less its slop.
        baseline_bytes: what the process has before any component starts.
        overcommit: a number of at least 1.
        slop_factor: the part of the limit that is held back already in ``effective_bytes``;
            a suggested limit has it on top.

    Raises:
        InvalidLimit: a number makes no sense.
    """

    def __init__(
        self,
        declared: DeclaredBounds,
        effective_bytes: int,
        baseline_bytes: int = 0,
        overcommit: float = 1.0,
        *,
        slop_factor: float = 0.0,
    ) -> None:
        if not _is_number(overcommit) or overcommit < 1:
            raise InvalidLimit(f"overcommit={overcommit!r} must be a finite number of at least 1")
        self._declared = declared
        self._effective_bytes = effective_bytes
        self._baseline_bytes = baseline_bytes
        self._overcommit = overcommit
        self._factor = Fraction(str(overcommit))
        self._slop_factor = slop_factor
        _kept_part(slop_factor)

    @property
    def smallest_limit_bytes(self) -> int:
        """The smallest limit, slop included, that passes all checks.

        Limits above 2**53 bytes are refused everywhere else; where this is above that, only
        lower bounds help.
        """
        declared = self._declared
        needed = max(
            1,  # nothing works without anything above the baseline
            declared.total_minimum_bytes,
            declared.largest.firm_limit_bytes or 0,
            math.ceil(declared.total_firm_limit_bytes / self._factor),
        )
        return smallest_limit_bytes(self._baseline_bytes + needed, self._slop_factor)

    def check(self) -> None:
        """Raise what ``verify()`` raises; it costs the same for any number of components."""
        declared = self._declared
        available = self._effective_bytes - self._baseline_bytes
        if available <= 0:
            raise InvalidLimit(
                f"the effective limit of {format_size(self._effective_bytes)} is not above the "
                f"baseline of {format_size(self._baseline_bytes)} that the process has already; "
                f"raise the limit to {format_size(self.smallest_limit_bytes)}"
            )
        if declared.total_minimum_bytes > available:
            raise InsufficientMinimumMemory(
                declared.total_minimum_bytes, available, self.smallest_limit_bytes, self._report()
            )
        largest = declared.largest
        allowed = math.floor(available * self._factor)
        for component, firm_limit, most in (
            (largest.path, largest.firm_limit_bytes or 0, available),
            (None, declared.total_firm_limit_bytes, allowed),
        ):
            if firm_limit > most:
                raise FirmLimitExceedsAvailable(
                    component,
                    firm_limit,
                    most,
                    float(self._overcommit),
                    self.smallest_limit_bytes,
                    self._report(),
                )

    def verify(self) -> VerifiedBounds:
        """Give the bounds as they are now, together with what they fit into.

        Raises:
            InvalidLimit: the effective limit is not above the baseline.
            InsufficientMinimumMemory: the minimums together do not fit.
            FirmLimitExceedsAvailable: one firm limit alone does not fit, or all together
                exceed what ``overcommit`` allows.
        """
        self.check()
        return VerifiedBounds(
            self._declared.tree(),
            self._effective_bytes,
            self._baseline_bytes,
            self._overcommit,
            self.smallest_limit_bytes,
        )

    def _report(self) -> str:
        return render(
            self._declared.tree(),
            effective_bytes=self._effective_bytes,
            baseline_bytes=self._baseline_bytes,
            overcommit=self._overcommit,
        )


@dataclass(slots=True)
class Row:
    """A line of the report; those below it add up to it."""

    label: str
    minimum_bytes: int
    firm_limit_bytes: int
    mark: str = ""
    is_component: bool = False
    below: list[Row] = field(default_factory=list["Row"])
    is_shown: bool = False

    def __lt__(self, other: Row) -> bool:
        """Largest first."""
        return (self.firm_limit_bytes, self.minimum_bytes) > (
            other.firm_limit_bytes,
            other.minimum_bytes,
        )


_NUMBER_WIDTH = len("-1023.9 KiB")
_NARROWEST_LABEL = 20
_NO_BREAK = "\N{NO-BREAK SPACE}"
_INSIDE_NUMBER = re.compile(r"(?<=\d) (?=\d|[KMGT]?i?B)")


@dataclass(frozen=True, slots=True)
class BoundsReport:
    """A tree of bounds, ready to be printed.

    Attributes:
        body: each line and how deep it is in the tree, the largest first.
        foot: what is available, and what is left of that.
        notes: what is to be said besides.
    """

    body: list[tuple[int, Row]]
    foot: list[Row]
    notes: list[str]

    def to_text(self, width: int) -> str:
        """Give it in lines of plain text for a terminal that is so wide."""
        body, foot = self.body, self.foot
        widest = max(2 * depth + len(row.label) for depth, row in body)
        room = min(width - 2 * (_NUMBER_WIDTH + 2) - len("*"), widest)
        room = max(room, _NARROWEST_LABEL)
        rule = "-" * (room + 2 * (_NUMBER_WIDTH + 2))
        text = [_columns("component", "minimum", "firm limit", room), rule]
        for depth, row in body:
            text += _table_lines(row, depth, room, nothing="-")
        if foot:
            text.append(rule)
            for row in foot:
                text += _table_lines(row, 0, room, nothing="0 B")
        for note in self.notes:
            text += wrap(note, max(width, _NARROWEST_LABEL), subsequent_indent="  ")
        return "\n".join(text)


def report_of(
    bounds: ComponentBounds,
    *,
    effective_bytes: int | None,
    baseline_bytes: int,
    overcommit: float,
    rows: int = 40,
) -> BoundsReport:
    """Give what ``render`` prints; the arguments are the same."""
    top = _component_row(bounds, bounds.path)
    _mark_largest(top, rows)
    body = list(_lines(top, 0))
    foot: list[Row] = []
    notes: list[str] = []
    if effective_bytes is not None:
        available = effective_bytes - baseline_bytes
        allowed = math.floor(available * Fraction(str(overcommit)))
        foot = [
            Row("available", available, allowed),
            Row(
                "left",
                available - bounds.total_minimum_bytes,
                allowed - bounds.total_firm_limit_bytes,
            ),
        ]
        notes = [
            f"available: effective limit {human_size(effective_bytes)}"
            + (f", less baseline {human_size(baseline_bytes)}" if baseline_bytes else "")
            + (f"; firm limits x {overcommit:g}" if overcommit != 1 else "")
        ]
    if any(row.mark for _, row in body):
        notes.append("* no firm limit of its own: bounded by the quota, counted with its minimum")
    silent = sum(not (sub.subcomponents or sub.is_declared) for sub in bounds.walk())
    if silent:
        notes.append(f"{silent} component{'s say' if silent > 1 else ' says'} nothing about bounds")
    return BoundsReport(body, foot, notes)


def render(
    bounds: ComponentBounds,
    *,
    effective_bytes: int | None = None,
    baseline_bytes: int = 0,
    overcommit: float = 1.0,
    width: int = 80,
    rows: int = 40,
) -> str:
    """Give a tree of bounds as text for a terminal, largest first.

    Each line is a component or an item that it declares, and is the sum of those below it.

    Args:
        bounds: the tree.
        effective_bytes: the limit less its slop; with it, the text ends with what is
            available and what is left of that.
        baseline_bytes: what the process has already.
        overcommit: how many times the available memory the firm limits may promise.
        width: columns of the terminal.
        rows: how many components and items to show, the largest; the rest is summed up.
    """
    report = report_of(
        bounds,
        effective_bytes=effective_bytes,
        baseline_bytes=baseline_bytes,
        overcommit=overcommit,
        rows=rows,
    )
    return report.to_text(width)


def _component_row(bounds: ComponentBounds, label: str) -> Row:
    """Give a component with its items and the components in it as rows."""
    row = Row(label, bounds.total_minimum_bytes, bounds.total_firm_limit_bytes, is_component=True)
    if bounds.minimum is not None and bounds.firm is None:
        row.mark = "*"
    own = Row("(itself)", 0, 0)
    for section, is_minimum in ((bounds.minimum, True), (bounds.firm, False)):
        for item in _items(section):
            size = item.evaluate()
            if item.name or item.children:
                row.below.append(Row(str(item), size if is_minimum else 0, size))
            else:
                own.minimum_bytes += size if is_minimum else 0
                own.firm_limit_bytes += size
    for sub in bounds.subcomponents:
        if sub.total_firm_limit_bytes:
            row.below.append(_sub_row(sub))
    if row.below and own.firm_limit_bytes:
        row.below.append(own)
    row.below.sort()
    return row


def _sub_row(bounds: ComponentBounds) -> Row:
    """Give a sub-component as a row, one for a chain such as ``a.b.c`` with nothing beside it."""
    label = bounds.path.rpartition(".")[2]
    while not bounds.is_declared and len(bounds.subcomponents) == 1:
        (bounds,) = bounds.subcomponents
        label += "." + bounds.path.rpartition(".")[2]
    return _component_row(bounds, label)


def _items(section: UsageExpr | None) -> tuple[UsageExpr, ...]:
    if section is None:
        return ()
    return section.children if section.kind == "sum" and not section.name else (section,)


def _mark_largest(top: Row, rows: int) -> None:
    """Mark as many rows to be shown. No row is larger than the one above it, so they connect."""
    largest = [top]
    for _ in range(max(rows, 1)):
        if not largest:
            break
        row = heapq.heappop(largest)
        row.is_shown = True
        for below in row.below:
            heapq.heappush(largest, below)


def _lines(row: Row, depth: int) -> Iterator[tuple[int, Row]]:
    yield depth, row
    hidden = [below for below in row.below if not below.is_shown]
    for below in row.below:
        if below.is_shown:
            yield from _lines(below, depth + 1)
    if hidden:
        rest = Row(
            f"... {len(hidden):,} more".replace(",", " "),
            sum(below.minimum_bytes for below in hidden),
            sum(below.firm_limit_bytes for below in hidden),
        )
        yield depth + 1, rest


def _table_lines(row: Row, depth: int, room: int, *, nothing: str) -> Iterator[str]:
    # Deep trees stop moving to the right when half of the room is used up.
    indent = " " * min(2 * depth, room // 2)
    label, *rest = (
        line.replace(_NO_BREAK, " ")
        for line in wrap(
            _INSIDE_NUMBER.sub(_NO_BREAK, row.label),
            room,
            initial_indent=indent,
            subsequent_indent=indent + "    ",
            break_on_hyphens=False,
        )
    )
    minimum, firm_limit = (
        human_size(size) if size else nothing for size in (row.minimum_bytes, row.firm_limit_bytes)
    )
    yield _columns(label, minimum, firm_limit, room) + row.mark
    yield from rest


def _columns(label: str, minimum: str, firm_limit: str, room: int) -> str:
    return f"{label:<{room}}  {minimum:>{_NUMBER_WIDTH}}  {firm_limit:>{_NUMBER_WIDTH}}"
