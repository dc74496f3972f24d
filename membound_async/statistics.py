"""What a limiter and its components have, need and wait for: frozen snapshots."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from .live import Tracking
    from .probes import PressureStall

__all__ = [
    "ComponentStatistics",
    "HeldGrant",
    "LimiterStatistics",
    "ReclaimerStatistics",
    "ResourceStatistics",
    "WaitingRequest",
    "plain",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentStatistics:
    """One component at one moment. Counts and totals are since the limiter was made."""

    path: str
    #: reserved for it while it is entered
    minimum_bytes: int
    #: the most it may hold, minimum included; None if only the quota bounds it
    firm_limit_bytes: int | None
    #: how many ``async with component:`` blocks are open
    entered: int
    #: granted now
    granted_bytes: int
    #: in flight to it now, on behalf of how many senders
    in_flight_bytes: int
    senders: int
    #: what it has of other resources, in flight included
    resources: dict[str, int]
    #: what its code has allocated since the baseline was measured and not freed yet; 0 where
    #: that is not tracked
    live_bytes: int
    #: the most that was live at one time
    peak_live_bytes: int
    #: live bytes beyond what is granted to it or reserved for it
    overdraft_bytes: int
    #: the most of that at one reading of memory
    peak_overdraft_bytes: int
    #: the most that was granted at one time, what was in flight included
    peak_granted_bytes: int
    #: grants that are held now, those in flight to it included
    grants: int
    #: requests that wait now, and what they want together
    waiting: int
    waiting_bytes: int
    #: how long the first of them has waited so far; 0 if there is none
    oldest_wait_seconds: float
    #: time that its requests have spent waiting for memory
    total_wait_seconds: float
    #: time that its grants were held back under pressure
    total_delay_seconds: float
    #: grants and grows given
    admissions: int
    #: grants and grows refused
    refusals: int
    #: what an observe-only limiter would have done
    would_wait: int
    would_wait_seconds: float
    would_refuse: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceStatistics:
    """What there is of one resource besides bytes, at one moment."""

    #: how much of it there is
    limit: int
    #: how much of it is left to divide; negative if more is out than there is
    free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReclaimerStatistics:
    """One reclaimer at one moment. Counts and totals are since it was registered."""

    name: str
    #: how many times it was asked, and how many of these have raised an error
    runs: int
    failures: int
    #: what measured memory has fallen by meanwhile
    freed_bytes: int
    #: what it says that it has freed
    reported_bytes: int
    #: how long the last call took, and all of them
    last_seconds: float
    total_seconds: float
    #: how long from now it is left out, because it was of no use or holds up the event loop
    backed_off_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LimiterStatistics:
    """A limiter at one moment, with a reading of memory that was taken for it."""

    limit_bytes: int
    #: who set the limit
    limit_source: str
    slop_factor: float
    #: the limit less the slop
    effective_limit_bytes: int
    #: where pressure begins: measured memory above that delays new grants
    threshold_bytes: int
    #: measured before anything was granted
    baseline_bytes: int
    #: the last reading of memory, and the highest there was
    measured_bytes: int
    peak_measured_bytes: int
    #: what it is a reading of
    measured_name: str
    #: measured, but granted to nobody
    drift_bytes: int
    #: what is left to divide; negative if more is out than there is
    free_bytes: int
    #: reserved, granted or really used by the components
    committed_bytes: int
    #: granted to all components, and in flight to them
    granted_bytes: int
    in_flight_bytes: int
    #: pressure, from 0 to 1, and what it holds a new grant back for
    level: float
    delay_seconds: float
    #: readings taken, and readings that failed
    samples: int
    probe_failures: int
    #: grants held and requests waiting, of all components; what these want, and how long the
    #: first of them has waited so far
    grants: int
    waiting: int
    waiting_bytes: int
    oldest_wait_seconds: float
    #: how long somebody has waited and nothing has moved, if that was reported; else 0
    stalled_seconds: float
    #: since the limiter was made
    age_seconds: float
    #: whether the limiter only observes; what it would have done then
    observe: bool
    would_wait: int
    would_wait_seconds: float
    would_refuse: int
    #: whether allocations are counted: "on", "off", "unavailable" (no extension), or
    #: "displaced" (another tool has discarded the hooks, and live bytes are not known any more)
    tracking: Tracking
    #: what the kernel says of stalls for want of memory; None where it says nothing
    pressure_stall: PressureStall | None
    #: the other resources that it limits
    resources: dict[str, ResourceStatistics]
    #: who is asked for memory when it is short, in that order
    reclaimers: tuple[ReclaimerStatistics, ...]
    #: every component, in the order of their paths
    components: tuple[ComponentStatistics, ...]

    def to_dict(self) -> dict[str, Any]:
        """Give the same as plain dicts and lists, ready for ``json.dumps``."""
        values: dict[str, Any] = plain(self)
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldGrant:
    """One grant that is held, at one moment."""

    component: str
    #: on whose behalf it is in flight; None if it is the component's own
    sender: str | None
    size_bytes: int
    #: what it holds of other resources
    also: dict[str, int]
    #: how long it has been held
    age_seconds: float
    #: whether it holds the pool alone
    is_alone: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingRequest:
    """One request that waits, at one moment."""

    component: str
    #: on whose behalf it is made; None if it is the component's own
    sender: str | None
    kind: Literal["grant", "grow", "enter", "transfer"]
    wanted_bytes: int
    #: what it wants of other resources
    also: dict[str, int]
    #: what it lacks: a resource such as "bytes", its component's "firm limit", or only its "turn"
    waits_for: str
    #: how many bytes must be free for it; None if it needs none of what is free
    threshold_bytes: int | None
    #: how much more of that there must be for it
    missing: int
    waited_seconds: float
    #: what was granted to others meanwhile
    bypassed_bytes: int
    #: whether that was so much that it goes before all others now
    is_barrier: bool


def plain(value: object) -> Any:
    """Give plain dicts and lists; in half the time of ``dataclasses.asdict``, which copies."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in cast("dict[str, object]", value).items()}
    if isinstance(value, tuple):
        return [plain(each) for each in cast("tuple[object, ...]", value)]
    if not is_dataclass(value):
        return value
    names, read = _reader(cast("Hashable", type(value)))
    return {
        name: each if type(each) in _ATOMS else plain(each)
        for name, each in zip(names, read(value), strict=True)
    }


_ATOMS = frozenset({int, float, str, bool, type(None)})


@cache
def _reader(kind: Any) -> tuple[tuple[str, ...], attrgetter[tuple[object, ...]]]:
    names = tuple(field.name for field in fields(kind))
    return names, attrgetter(*names)
