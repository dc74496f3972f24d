"""What a watched run has shown: the numbers, and what they say in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from membound_async.hooks import GrantLeaked
from membound_async.sizes import human_size
from membound_async.statistics import HeldGrant, WaitingRequest

from .memory import MemoryUsage

__all__ = ["BoundedReport", "ComponentReport", "NotBounded"]

NAMED = 5
"""How many grants and requests are named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentReport:
    """What one component did in a run."""

    path: str
    #: grants and grows that it was given
    admissions: int
    #: time that its requests have spent waiting for memory, and delayed under pressure
    waited_seconds: float
    delayed_seconds: float
    #: the most it had in use beyond what it was granted or had reserved, and when
    beyond_grants_bytes: int
    beyond_grants_at_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundedReport:
    """What a run has shown of a pipeline's use of memory. Times are seconds since its start."""

    limit_bytes: int
    #: how long it took
    seconds: float
    #: whether it came to an end in time
    finished: bool
    #: the moment when the most memory was in use, and the largest grants that were held then
    peak: MemoryUsage
    peak_grants: tuple[HeldGrant, ...]
    #: the first moment when more was in use than the limit; None if there was none
    exceeded: MemoryUsage | None
    #: the components that have done anything, in the order of their paths
    components: tuple[ComponentReport, ...]
    #: grants that were out at its end, the largest first
    held: tuple[HeldGrant, ...]
    #: grants that were garbage-collected and that nobody had released
    leaked: tuple[GrantLeaked, ...]
    #: the requests that waited at its end, the oldest first; none if it finished by itself
    waiting: tuple[WaitingRequest, ...]

    @property
    def waited_seconds(self) -> float:
        """Time that all requests have spent waiting, added up."""
        return sum(one.waited_seconds for one in self.components)

    @property
    def delayed_seconds(self) -> float:
        """Time that all grants were delayed under pressure, added up."""
        return sum(one.delayed_seconds for one in self.components)

    def problems(self, max_beyond_grants_bytes: int | None = None) -> list[str]:
        """Say in a few words each why it is not bounded; nothing if it is.

        Args:
            max_beyond_grants_bytes: how much a component may have in use beyond its grants;
                None for any amount.
        """
        found: list[str] = []
        over = self.peak.in_use_bytes - self.limit_bytes
        if self.exceeded is not None:
            found.append(
                f"{human_size(self.peak.in_use_bytes)} in use after {self.peak.at_seconds:.2f} s, "
                f"{human_size(over)} too much; above the limit since "
                f"{self.exceeded.at_seconds:.2f} s"
            )
        if max_beyond_grants_bytes is not None:
            found += [
                f"{one.path!r} had {human_size(one.beyond_grants_bytes)} in use beyond its grants "
                f"after {one.beyond_grants_at_seconds:.2f} s"
                for one in self.components
                if one.beyond_grants_bytes > max_beyond_grants_bytes
            ]
        if not self.finished:
            count = len(self.waiting)
            waiting = f"{count} request{'s wait' if count > 1 else ' waits'} for memory"
            others = "it waits, but not for memory, or takes longer than timeout="
            found.append(
                f"not finished after {self.seconds:.2f} s: {waiting if self.waiting else others}"
            )
        elif self.held:
            found.append(f"never released: {_named(map(_held, self.held), len(self.held))}")
        if self.leaked:
            leaked = (f"{one.component!r} {human_size(one.granted_bytes)}" for one in self.leaked)
            found.append(f"dropped without release: {_named(leaked, len(self.leaked))}")
        if self.finished and not any(
            one.admissions or one.beyond_grants_bytes for one in self.components
        ):
            found.append(
                "nothing was asked of this limiter, so nothing was shown; does the pipeline use "
                "one of its own?"
            )
        return found

    def __str__(self) -> str:
        """Say who used what at the peak, and who waits for what."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        peak = self.peak
        if not peak.in_use_bytes:
            yield "nothing was in use at any time"
            return
        yield f"in use at the peak, after {peak.at_seconds:.2f} s:"
        rows = [
            (
                one.path,
                human_size(one.minimum_bytes),
                human_size(one.granted_bytes),
                human_size(one.live_bytes),
                human_size(one.allocated_bytes),
                human_size(one.in_use_bytes),
            )
            for one in peak.components
        ]
        rows += [
            (f"({name})", "", "", "", "", human_size(nbytes))
            for name, nbytes in (
                ("others", peak.others_bytes),
                ("leaked", peak.leaked_bytes),
                ("freed and kept", peak.kept_bytes),
            )
            if nbytes
        ]
        head = ("component", "minimum", "granted", "live", "allocated", "in use")
        rows.append(("all", "", "", "", "", human_size(peak.in_use_bytes)))
        yield from _table([head, *rows])
        if self.peak_grants:
            yield "largest grants then: " + ", ".join(map(_held, self.peak_grants))
        if self.waiting or self.held:
            yield "at the end:"
            for one in self.waiting[:NAMED]:
                yield (
                    f"  {one.component!r} has waited {one.waited_seconds:.2f} s for "
                    f"{human_size(one.wanted_bytes)} and lacks {_lack(one)}"
                )
            if len(self.waiting) > NAMED:
                yield f"  and {len(self.waiting) - NAMED} more"
            if self.held:
                yield f"  held by {_named(map(_held, self.held), len(self.held))}"
        waited, delayed = self.waited_seconds, self.delayed_seconds
        if waited or delayed:
            yield f"waited for memory: {waited:.2f} s, delayed: {delayed:.2f} s, of all requests"


class NotBounded(AssertionError):
    """A pipeline used, or would have used, more memory than there is, or did not end well.

    Attributes:
        problems: what is wrong, in a few words each.
        report: all numbers.
        limit_bytes: what there was.
        peak_bytes: the most that was in use.
        peak_at_seconds: when that was.
    """

    def __init__(self, problems: Sequence[str], report: BoundedReport) -> None:
        self.problems = tuple(problems)
        self.report = report
        self.limit_bytes = report.limit_bytes
        self.peak_bytes = report.peak.in_use_bytes
        self.peak_at_seconds = report.peak.at_seconds
        listed = "".join(f"\n- {problem}" for problem in problems)
        super().__init__(f"not bounded by {human_size(report.limit_bytes)}:{listed}\n\n{report}")

    def __reduce__(self) -> tuple[type[NotBounded], tuple[object, ...]]:
        return NotBounded, (self.problems, self.report)


def _held(grant: HeldGrant) -> str:
    return f"{grant.component!r} {human_size(grant.size_bytes)} for {grant.age_seconds:.2f} s"


def _lack(request: WaitingRequest) -> str:
    match request.waits_for:
        case "bytes":
            return human_size(request.missing)
        case "turn":
            return "only its turn"
        case "firm limit":
            return "room below its firm limit"
        case resource:
            return f"{request.missing} {resource}"


def _named(words: Iterable[str], count: int) -> str:
    shown = ", ".join(islice(words, NAMED))
    return shown if count <= NAMED else f"{shown} and {count - NAMED} more"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Give rows in lines, the first column to the left, the others to the right."""
    used = [
        place
        for place in range(len(rows[0]))
        if any(row[place] not in ("", "0 B") for row in rows[1:])
    ]
    sizes = [max(len(row[place]) for row in rows) for place in used]
    for row in rows:
        cells = [
            row[place].rjust(size) if place else row[place].ljust(size)
            for place, size in zip(used, sizes, strict=True)
        ]
        yield "  " + "  ".join(cells).rstrip()
