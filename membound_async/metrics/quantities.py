"""What is exported of a limiter: each quantity with its unit, and where its value is.

Prometheus and OpenTelemetry have names of their own for a quantity, and get the same values.
Of a quantity there is one series for each item of its group: for the limiter, for each of a
bounded number of components, for each reclaimer. Senders are many and come and go, so none of
the series is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from membound_async.statistics import LimiterStatistics

from .snapshots import Snapshot

__all__ = ["GROUPS", "TRACKING_STATES", "WAIT_HELP", "WAIT_SECONDS", "Group", "Kind", "Quantity"]

Kind = Literal["gauge", "updown", "counter"]
"""A gauge is a value that no sum is made of, updown one that may be added up over components
and processes; a counter never falls."""

WAIT_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""The ends of the buckets of waiting times: from a short queue to a sink that is down."""

WAIT_HELP = "How long requests waited that were admitted after waiting."

TRACKING_STATES = ("on", "off", "unavailable", "displaced")


@dataclass(frozen=True, slots=True)
class Quantity:
    """One thing that is measured.

    Attributes:
        name: words with underscores, parts with dots; the unit is not in it.
        kind: how it may move.
        unit: as UCUM writes it: ``By``, ``s``, ``1``, ``{grant}``.
        help: what it is, in a sentence.
        value: gives it of an item of the group; None where the item has no such thing.
    """

    name: str
    kind: Kind
    unit: str
    help: str
    value: Callable[[Any], float | None]


Item = tuple[tuple[str, ...], Any]
"""The values of the labels, and what the quantities are of."""


@dataclass(frozen=True, slots=True)
class Group:
    """Quantities of the same items.

    Attributes:
        labels: what tells the items apart.
        items: gives them.
        quantities: what each of them has.
    """

    labels: tuple[str, ...]
    items: Callable[[Snapshot], Iterable[Item]]
    quantities: tuple[Quantity, ...]


def _sum_of(name: str) -> Callable[[LimiterStatistics], float]:
    value = attrgetter(name)
    return lambda statistics: sum(map(value, statistics.components))


_LIMITER = (
    Quantity("limit", "updown", "By", "The limit that is kept.", attrgetter("limit_bytes")),
    Quantity(
        "effective_limit",
        "updown",
        "By",
        "The limit less the slop: what measured memory is kept below.",
        attrgetter("effective_limit_bytes"),
    ),
    Quantity(
        "threshold",
        "updown",
        "By",
        "Measured memory above this is pressure: new grants are delayed.",
        attrgetter("threshold_bytes"),
    ),
    Quantity(
        "measured",
        "updown",
        "By",
        "Memory in use, as the limit counts it.",
        attrgetter("measured_bytes"),
    ),
    Quantity(
        "peak_measured",
        "gauge",
        "By",
        "The highest reading of memory so far.",
        attrgetter("peak_measured_bytes"),
    ),
    Quantity(
        "baseline",
        "updown",
        "By",
        "Memory in use before anything was granted.",
        attrgetter("baseline_bytes"),
    ),
    Quantity(
        "drift",
        "updown",
        "By",
        "Memory measured that was granted to nobody.",
        attrgetter("drift_bytes"),
    ),
    Quantity(
        "free",
        "updown",
        "By",
        "What is left to divide; negative if more is out than there is.",
        attrgetter("free_bytes"),
    ),
    Quantity(
        "committed",
        "updown",
        "By",
        "Reserved, granted or really used by components.",
        attrgetter("committed_bytes"),
    ),
    Quantity("granted", "updown", "By", "Granted to all components.", attrgetter("granted_bytes")),
    Quantity(
        "in_flight",
        "updown",
        "By",
        "In flight to all components, on behalf of senders.",
        attrgetter("in_flight_bytes"),
    ),
    Quantity(
        "waiting",
        "updown",
        "By",
        "What all waiting requests want together.",
        attrgetter("waiting_bytes"),
    ),
    Quantity("grants", "updown", "{grant}", "Grants held.", attrgetter("grants")),
    Quantity(
        "waiting_requests", "updown", "{request}", "Requests that wait.", attrgetter("waiting")
    ),
    Quantity(
        "oldest_wait",
        "gauge",
        "s",
        "How long the request has waited that has waited longest; 0 if none waits.",
        attrgetter("oldest_wait_seconds"),
    ),
    Quantity(
        "stalled",
        "gauge",
        "s",
        "How long nothing was granted or given back while requests wait; 0 if no stall goes on.",
        attrgetter("stalled_seconds"),
    ),
    Quantity(
        "pressure",
        "gauge",
        "1",
        "Pressure: 0 up to the threshold, 1 from the effective limit on.",
        attrgetter("level"),
    ),
    Quantity(
        "delay",
        "gauge",
        "s",
        "What a new grant is held back for at this pressure.",
        attrgetter("delay_seconds"),
    ),
    Quantity(
        "observe_only",
        "gauge",
        "",
        "1 if the limiter only observes: it makes nobody wait and refuses nothing.",
        attrgetter("observe"),
    ),
    Quantity("admissions", "counter", "{grant}", "Grants and grows given.", _sum_of("admissions")),
    Quantity(
        "waited",
        "counter",
        "s",
        "Time that requests have spent waiting for memory.",
        _sum_of("total_wait_seconds"),
    ),
    Quantity(
        "delayed",
        "counter",
        "s",
        "Time that new grants were held back under pressure.",
        _sum_of("total_delay_seconds"),
    ),
    Quantity("samples", "counter", "{reading}", "Readings of memory.", attrgetter("samples")),
    Quantity(
        "probe_failures",
        "counter",
        "{reading}",
        "Readings of memory that failed; the last good one is kept.",
        attrgetter("probe_failures"),
    ),
    Quantity(
        "would_waits",
        "counter",
        "{request}",
        "Requests that would have waited, had the limiter not only observed.",
        attrgetter("would_wait"),
    ),
    Quantity(
        "would_wait",
        "counter",
        "s",
        "How long requests would have waited, had the limiter not only observed.",
        attrgetter("would_wait_seconds"),
    ),
    Quantity(
        "would_refusals",
        "counter",
        "{request}",
        "Requests that would have been refused, had the limiter not only observed.",
        attrgetter("would_refuse"),
    ),
)

_COMPONENT = (
    Quantity(
        "component.granted",
        "updown",
        "By",
        "Granted to the component.",
        attrgetter("granted_bytes"),
    ),
    Quantity(
        "component.in_flight",
        "updown",
        "By",
        "In flight to the component, on behalf of its senders.",
        attrgetter("in_flight_bytes"),
    ),
    Quantity(
        "component.peak_granted",
        "gauge",
        "By",
        "The most that was granted to the component at one time, in flight included.",
        attrgetter("peak_granted_bytes"),
    ),
    Quantity(
        "component.minimum",
        "updown",
        "By",
        "Declared: what the component needs to work at all. Not there if that is 0.",
        lambda component: component.minimum_bytes or None,
    ),
    Quantity(
        "component.firm_limit",
        "updown",
        "By",
        "Declared: the most that the component may hold. Not there if only the quota bounds it.",
        attrgetter("firm_limit_bytes"),
    ),
    Quantity(
        "component.waiting_requests",
        "updown",
        "{request}",
        "Requests of the component that wait.",
        attrgetter("waiting"),
    ),
    Quantity(
        "component.oldest_wait",
        "gauge",
        "s",
        "How long the component's first waiting request has waited; 0 if none waits.",
        attrgetter("oldest_wait_seconds"),
    ),
    Quantity(
        "component.admissions",
        "counter",
        "{grant}",
        "Grants and grows given to the component.",
        attrgetter("admissions"),
    ),
    Quantity(
        "component.refusals",
        "counter",
        "{request}",
        "Grants and grows refused to the component.",
        attrgetter("refusals"),
    ),
    Quantity(
        "component.waited",
        "counter",
        "s",
        "Time that the component's requests have spent waiting for memory.",
        attrgetter("total_wait_seconds"),
    ),
    Quantity(
        "component.delayed",
        "counter",
        "s",
        "Time that the component's new grants were held back under pressure.",
        attrgetter("total_delay_seconds"),
    ),
)

_TRACKED_COMPONENT = (
    Quantity(
        "component.live",
        "updown",
        "By",
        "What the component's code has allocated and not freed. Not there if that is not tracked.",
        attrgetter("live_bytes"),
    ),
)

_RESOURCE = (
    Quantity(
        "resource.limit", "updown", "", "How much there is of the resource.", attrgetter("limit")
    ),
    Quantity(
        "resource.free",
        "updown",
        "",
        "What is left of the resource to divide; negative if more is out than there is.",
        attrgetter("free"),
    ),
)

_COMPONENT_RESOURCE = (
    Quantity(
        "component.resource",
        "updown",
        "",
        "What the component has of the resource, in flight included.",
        lambda amount: amount,
    ),
)

_RECLAIMER = (
    Quantity(
        "reclaimer.runs",
        "counter",
        "{run}",
        "How many times the reclaimer was asked for memory.",
        attrgetter("runs"),
    ),
    Quantity(
        "reclaimer.failures",
        "counter",
        "{run}",
        "How many times the reclaimer has raised an error.",
        attrgetter("failures"),
    ),
    Quantity(
        "reclaimer.freed",
        "counter",
        "By",
        "What measured memory has fallen by while the reclaimer ran.",
        attrgetter("freed_bytes"),
    ),
    Quantity(
        "reclaimer.run",
        "counter",
        "s",
        "How long the reclaimer has run.",
        attrgetter("total_seconds"),
    ),
    Quantity(
        "reclaimer.backed_off",
        "gauge",
        "s",
        "How long the reclaimer is left out from now, for it was of no use or is slow.",
        attrgetter("backed_off_seconds"),
    ),
)

_PRESSURE_STALL = (
    Quantity(
        "pressure_stall.some",
        "counter",
        "s",
        "The kernel's count of the time in which some task waited for memory.",
        attrgetter("some_total_seconds"),
    ),
    Quantity(
        "pressure_stall.full",
        "counter",
        "s",
        "The kernel's count of the time in which all tasks waited for memory.",
        attrgetter("full_total_seconds"),
    ),
)

_TRACKING = (
    Quantity(
        "tracking",
        "gauge",
        "",
        "Whether allocations are counted: 1 for the state that is, 0 for the others.",
        lambda holds: holds,
    ),
)

_INFO = (
    Quantity(
        "limiter_info",
        "gauge",
        "",
        "Always 1; who set the limit, and what is measured.",
        lambda _: 1,
    ),
)

_REFUSALS = (
    Quantity(
        "refusals",
        "counter",
        "{request}",
        "Requests refused, by the error that was raised.",
        lambda count: count,
    ),
)

_EVENTS = (
    Quantity(
        "stalls",
        "counter",
        "{stall}",
        "Stalls reported: somebody waited, and nothing was granted or given back for long.",
        attrgetter("stalls"),
    ),
    Quantity(
        "leaked_grants",
        "counter",
        "{grant}",
        "Grants garbage-collected that nobody had released.",
        attrgetter("leaked_grants"),
    ),
    Quantity(
        "leaked",
        "counter",
        "By",
        "Bytes of grants garbage-collected that nobody had released.",
        attrgetter("leaked_bytes"),
    ),
    Quantity(
        "limit_changes",
        "counter",
        "{change}",
        "How many times the limit has changed.",
        attrgetter("limit_changes"),
    ),
)


def _components(snapshot: Snapshot) -> Iterator[Item]:
    return (((one.path,), one) for one in snapshot.components)


def _tracked_components(snapshot: Snapshot) -> Iterator[Item]:
    return _components(snapshot) if snapshot.statistics.tracking == "on" else iter(())


def _resources_of_components(snapshot: Snapshot) -> Iterator[Item]:
    for component in snapshot.components:
        for name, amount in component.resources.items():
            yield (component.path, name), amount


def _pressure_stall(snapshot: Snapshot) -> list[Item]:
    stall = snapshot.statistics.pressure_stall
    return [] if stall is None else [((), stall)]


def _tracking(snapshot: Snapshot) -> list[Item]:
    return [((state,), state == snapshot.statistics.tracking) for state in TRACKING_STATES]


def _info(snapshot: Snapshot) -> list[Item]:
    return [((snapshot.statistics.limit_source, snapshot.statistics.measured_name), None)]


def _named(items: dict[str, Any]) -> list[Item]:
    return [((name,), item) for name, item in [*items.items()]]  # a thread may add to them


GROUPS = (
    Group((), lambda snapshot: [((), snapshot.statistics)], _LIMITER),
    Group(("limit_source", "measured"), _info, _INFO),
    Group(("state",), _tracking, _TRACKING),
    Group((), _pressure_stall, _PRESSURE_STALL),
    Group((), lambda snapshot: [((), snapshot.events)], _EVENTS),
    Group(("error",), lambda snapshot: _named(snapshot.events.refusals), _REFUSALS),
    Group(("resource",), lambda snapshot: _named(snapshot.statistics.resources), _RESOURCE),
    Group(("reclaimer",), lambda snapshot: _named(snapshot.reclaimers), _RECLAIMER),
    Group(("component",), _components, _COMPONENT),
    Group(("component",), _tracked_components, _TRACKED_COMPONENT),
    Group(("component", "resource"), _resources_of_components, _COMPONENT_RESOURCE),
)
"""All that is exported, but for the histogram of waiting times."""
