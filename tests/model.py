"""A second ledger, written from the semantics page alone, to hold the real one against.

It is meant to be obviously right rather than quick: plain lists, the share as a
``Fraction`` in the rule as the page states it, and everything found anew after each
event. Nothing of the package is imported, so that no mistake can be in both.

Bytes are its only kind, and nothing is ever in flight (``in_flight_bytes`` stays 0). Time
does not exist: the caller says when a sample of what is in use and live is taken
(:meth:`Model.observe`) and when the first barrier has stood too long
(:meth:`Model.lift_barrier`).

Whoever asks chooses a *ticket*, any integer not used before; it names the request while
it waits, and the grant once it is held. The ledger under test wears the same face, see
:class:`Core`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from math import ceil, floor
from typing import Literal, NamedTuple, Protocol

__all__ = ["Admission", "Core", "Grant", "Live", "Model", "Outcome", "Snapshot", "Waiter"]

Status = Literal["admitted", "waiting", "too_large", "refused", "done"]
Kind = Literal["request", "grow", "enter"]
Live = tuple[tuple[str, int], ...]
"""Components, and the bytes that their code really has allocated."""

THRESHOLD = Fraction(95, 100)
"""Part of the effective limit above which a sample sets the high-water mark back."""


class Admission(NamedTuple):
    """One admitted waiter.

    ``size_bytes`` is the size of the new grant, the bytes that a grow added, or 0 for an
    entry.
    """

    ticket: int
    size_bytes: int


class Outcome(NamedTuple):
    """What one operation led to.

    ``status`` is about the operation itself: a request, grow or entry is ``admitted``,
    ``waiting``, ``too_large`` or (only ``_nowait``) ``refused``; anything else is ``done``.
    ``admitted`` and ``infeasible`` are everybody whom it concerned, in order, the
    operation's own ticket included where it was admitted.
    """

    status: Status
    admitted: tuple[Admission, ...] = ()
    infeasible: tuple[int, ...] = ()


class Snapshot(NamedTuple):
    """The numbers to compare after each operation, in bytes.

    A ledger that does not keep one of them gives ``None``, which is compared to nothing.
    The tuples of bytes are in the order in which the components were added, those of
    tickets in order of arrival.
    """

    free_bytes: int | None = None
    drift_bytes: int | None = None
    high_water_bytes: int | None = None
    granted_bytes: tuple[int, ...] | None = None
    minimum_bytes: tuple[int, ...] | None = None
    committed_bytes: tuple[int, ...] | None = None
    waiting: tuple[int, ...] | None = None
    barriers: tuple[int, ...] | None = None
    exclusive: tuple[int, ...] | None = None
    """Ticket of the grant that holds the pool alone, or nothing."""
    available_bytes: tuple[int, ...] | None = None
    """The most that each component could have without waiting."""


class Core(Protocol):
    """The face of a ledger: that of :class:`Model`, and of an adapter over the real one.

    Made by ``factory(limit_bytes, baseline_bytes=, share=, bypass_limit_bytes=)``. None of
    these methods waits. Callers keep to a few rules: tickets are fresh; only grants that
    are held are grown, shrunk or released; only what waits is cancelled; only what was
    entered is left; a grant that waits to grow is neither grown, shrunk nor released.
    """

    def add(self, component: str, minimum_bytes: int, firm_limit_bytes: int | None) -> Outcome: ...
    def declare(
        self, component: str, minimum_bytes: int, firm_limit_bytes: int | None
    ) -> Outcome: ...
    def request(
        self,
        ticket: int,
        component: str,
        nbytes: int,
        up_to: int | None = None,
        alone: bool = False,
    ) -> Outcome: ...
    def request_nowait(self, ticket: int, component: str, nbytes: int) -> Outcome: ...
    def grow(self, ticket: int, grant: int, nbytes: int) -> Outcome: ...
    def grow_nowait(self, ticket: int, grant: int, nbytes: int) -> Outcome: ...
    def shrink(self, grant: int, nbytes: int) -> Outcome: ...
    def release(self, grant: int) -> Outcome: ...
    def cancel(self, ticket: int) -> Outcome: ...
    def enter(self, ticket: int, component: str) -> Outcome: ...
    def leave(self, component: str) -> Outcome: ...
    def observe(self, measured_bytes: int, live: Live = ()) -> Outcome: ...
    def resize(self, limit_bytes: int) -> Outcome: ...
    def lift_barrier(self) -> Outcome: ...
    def snapshot(self) -> Snapshot: ...


@dataclass(eq=False, slots=True)
class Grant:
    """Bytes that somebody holds."""

    component: Component
    size_bytes: int
    alone: bool
    is_exclusive: bool = False
    """Whether it holds the pool alone."""

    @property
    def is_only_pool_grant_of_component(self) -> bool:
        """Whether without it, its component would hold nothing of the pool."""
        component = self.component
        return component.granted_bytes - self.size_bytes <= component.minimum_bytes


@dataclass(eq=False, slots=True)
class Waiter:
    """A request, a grow or an entry that has not been admitted yet."""

    ticket: int
    arrival: int
    kind: Kind
    component: Component
    nbytes: int = 0
    up_to_bytes: int | None = None
    alone: bool = False
    grant: Grant | None = None
    bypassed_bytes: int | None = None
    """Pool bytes admitted past it since it came to the front; None before that."""
    is_barrier: bool = False

    @property
    def draw_bytes(self) -> int:
        """``c``: what it needs of the pool; nothing if that is 0 or less."""
        component = self.component
        if self.kind == "enter":
            used_bytes = max(component.granted_bytes, component.live_bytes)
            missing_bytes = component.declared_minimum_bytes - used_bytes
            return 0 if component.entered else max(0, missing_bytes)
        return self.nbytes - component.unused_minimum_bytes

    @property
    def is_firm_blocked(self) -> bool:
        """Whether only its own component can make room for it."""
        return self.kind != "enter" and not self.component.fits_firm_limit(self.nbytes)

    @property
    def is_parked(self) -> bool:
        """Whether a firm limit is in its way: its own, or that of the grow in front of it."""
        if self.is_firm_blocked:
            return True
        grow_is_blocked = any(grow.is_firm_blocked for grow in self.component.grows[:1])
        return grow_is_blocked and not self.is_barrier

    @property
    def is_of_exclusive_grant(self) -> bool:
        """Whether it is a grow of the grant that holds the pool alone."""
        return self.grant is not None and self.grant.is_exclusive

    @property
    def total_bytes(self) -> int:
        """What its grant would be in the end."""
        return self.nbytes + (self.grant.size_bytes if self.grant else 0)


@dataclass(eq=False, slots=True)
class Component:
    """One consumer, and those who wait in it."""

    name: str
    declared_minimum_bytes: int
    firm_limit_bytes: int | None
    entered: int = 0
    minimum_bytes: int = 0
    """``m``: what was declared when it was entered, while anybody is inside."""
    granted_bytes: int = 0
    live_bytes: int = 0
    in_flight_bytes: int = 0
    grows: list[Waiter] = field(default_factory=list[Waiter])
    queue: list[Waiter] = field(default_factory=list[Waiter])

    @property
    def committed_bytes(self) -> int:
        """``C``: what it has of the limit."""
        used_bytes = max(self.minimum_bytes, self.granted_bytes, self.live_bytes)
        return used_bytes + self.in_flight_bytes

    @property
    def beyond_minimum_bytes(self) -> int:
        """``d``: negative while some of the minimum is unused."""
        return max(self.granted_bytes, self.live_bytes) - self.minimum_bytes

    @property
    def held_bytes(self) -> int:
        """``s``: what it holds of the pool."""
        return max(self.beyond_minimum_bytes, 0) + self.in_flight_bytes

    @property
    def unused_minimum_bytes(self) -> int:
        """What it may draw without asking the pool."""
        return max(-self.beyond_minimum_bytes, 0)

    def fits_firm_limit(self, nbytes: int) -> bool:
        """Whether it may hold that much more."""
        limit_bytes = self.firm_limit_bytes
        return limit_bytes is None or self.granted_bytes + nbytes <= limit_bytes

    def fronts(self) -> list[Waiter]:
        """The first of each queue, grows before others: those who count what passes them."""
        return self.grows[:1] + self.queue[:1]

    def head(self) -> Waiter | None:
        """Who is to be served next.

        The exclusive grant's grow, else a barrier, else a grow, else the longest waiting.
        """
        fronts = self.fronts()
        if fronts and fronts[0].is_of_exclusive_grant:
            return fronts[0]
        barriers = [waiter for waiter in fronts if waiter.is_barrier]
        if barriers:
            return min(barriers, key=by_arrival)
        return fronts[0] if fronts else None


def by_arrival(waiter: Waiter) -> int:
    """The key of the order in which requests were made."""
    return waiter.arrival


@lru_cache(maxsize=1 << 16)
def least_free_bytes(p: int, q: int, draw_bytes: int, held_bytes: int) -> int:
    """``T``: the least R for which s + c <= share * (R + s)."""
    return ceil((held_bytes + draw_bytes) / Fraction(p, q) - held_bytes)


@lru_cache(maxsize=1 << 16)
def most_draw_bytes(p: int, q: int, free_bytes: int, held_bytes: int) -> int:
    """The largest c for which s + c <= share * (R + s)."""
    return floor(Fraction(p, q) * (free_bytes + held_bytes) - held_bytes)


class Model:
    """The decision core again, from scratch after each event.

    Args:
        limit_bytes: the effective limit ``L``.
        baseline_bytes: ``B``, what was in use at the start.
        share: the part of what nobody else has that one component may have.
        bypass_limit_bytes: pool bytes that may pass a waiter at the front before it becomes
            a barrier; None is the effective limit, whatever it is at the time.
    """

    def __init__(
        self,
        limit_bytes: int,
        *,
        baseline_bytes: int = 0,
        share: Fraction = Fraction(1, 2),
        bypass_limit_bytes: int | None = None,
    ) -> None:
        self.limit_bytes = limit_bytes
        self.baseline_bytes = baseline_bytes
        self.share = share
        self.measured_bytes = baseline_bytes
        self.drift_bytes = 0
        self.high_water_bytes = 0
        self.components: dict[str, Component] = {}
        self.grants: dict[int, Grant] = {}
        self._given_bypass_limit_bytes = bypass_limit_bytes
        self._arrivals = 0
        self._admitted: list[Admission] = []
        self._infeasible: list[int] = []

    # What is so at this moment.

    @property
    def bypass_limit_bytes(self) -> int:
        """Pool bytes that may pass a waiter at the front of its queue."""
        given_bytes = self._given_bypass_limit_bytes
        return self.limit_bytes if given_bytes is None else given_bytes

    @property
    def exclusive(self) -> Grant | None:
        """The grant that holds the pool alone."""
        return next((grant for grant in self.grants.values() if grant.is_exclusive), None)

    @property
    def total_committed_bytes(self) -> int:
        """The sum of all C."""
        return sum([component.committed_bytes for component in self.components.values()])

    @property
    def free_bytes(self) -> int:
        """``R``: what is left to divide; may be negative."""
        available_bytes = self.limit_bytes - self.baseline_bytes - self.drift_bytes
        return available_bytes - self.total_committed_bytes

    def waiters(self) -> list[Waiter]:
        """Everybody who waits, by arrival."""
        everybody: list[Waiter] = []
        for component in self.components.values():
            everybody += component.grows
            everybody += component.queue
        everybody.sort(key=by_arrival)
        return everybody

    def barriers(self) -> list[Waiter]:
        """The waiters that nobody may draw from the pool past, by arrival."""
        return [waiter for waiter in self.waiters() if waiter.is_barrier]

    def threshold_bytes(self, waiter: Waiter) -> int:
        """``T``: the free bytes at which a waiter can be admitted."""
        if waiter.kind == "enter":
            return waiter.draw_bytes
        p, q = self.share.numerator, self.share.denominator
        return least_free_bytes(p, q, waiter.draw_bytes, waiter.component.held_bytes)

    def normal_cap_bytes(self, component: Component) -> int:
        """The largest grant that an idle limiter could give under the rule."""
        minimum_bytes = component.minimum_bytes
        pool_bytes = self.limit_bytes - self.baseline_bytes - minimum_bytes
        p, q = self.share.numerator, self.share.denominator
        cap_bytes = minimum_bytes + max(0, most_draw_bytes(p, q, pool_bytes, 0))
        firm_bytes = component.firm_limit_bytes
        return cap_bytes if firm_bytes is None else min(firm_bytes, cap_bytes)

    def alone_cap_bytes(self, component: Component) -> int:
        """The largest grant that could be held with nothing else out of the pool."""
        others_bytes = sum(
            other.minimum_bytes for other in self.components.values() if other is not component
        )
        cap_bytes = self.limit_bytes - self.baseline_bytes - others_bytes
        firm_bytes = component.firm_limit_bytes
        return cap_bytes if firm_bytes is None else min(firm_bytes, cap_bytes)

    def is_oversize(self, waiter: Waiter) -> bool:
        """Whether it can only be served by holding the pool alone."""
        return waiter.alone and waiter.total_bytes > self.normal_cap_bytes(waiter.component)

    def is_infeasible(self, waiter: Waiter) -> bool:
        """Whether waiting is no use to it."""
        component = waiter.component
        if waiter.kind == "enter":
            most_bytes = self.limit_bytes - self.baseline_bytes
            return not component.entered and component.declared_minimum_bytes > most_bytes
        if waiter.total_bytes <= self.normal_cap_bytes(component):
            return False
        return not waiter.alone or waiter.total_bytes > self.alone_cap_bytes(component)

    @property
    def pool_is_open(self) -> bool:
        """Whether somebody who does not wait may draw from the pool."""
        nobody_is_first = self.exclusive is None and not self.barriers()
        return nobody_is_first and self.measured_bytes < self.limit_bytes

    def available_bytes(self, component: Component, pool_is_open: bool) -> int:
        """The most that a component could have without waiting."""
        if component.fronts():
            return 0
        most_bytes = component.unused_minimum_bytes
        if pool_is_open:
            p, q = self.share.numerator, self.share.denominator
            most_bytes += max(0, most_draw_bytes(p, q, self.free_bytes, component.held_bytes))
        if component.firm_limit_bytes is not None:
            most_bytes = min(most_bytes, component.firm_limit_bytes - component.granted_bytes)
        return max(0, most_bytes)

    def pool_is_unused(self, but_for: Component | None = None) -> bool:
        """Whether no pool grant is out, of components other than ``but_for``."""
        return all(
            component.granted_bytes <= component.minimum_bytes
            for component in self.components.values()
            if component is not but_for
        )

    # Requests.

    def add(self, component: str, minimum_bytes: int, firm_limit_bytes: int | None) -> Outcome:
        """Declare a component; it is not entered."""
        self.components[component] = Component(component, minimum_bytes, firm_limit_bytes)
        return self._done()

    def declare(self, component: str, minimum_bytes: int, firm_limit_bytes: int | None) -> Outcome:
        """Change the bounds of a component; the minimum counts once all have left."""
        node = self.components[component]
        node.declared_minimum_bytes = minimum_bytes
        node.firm_limit_bytes = firm_limit_bytes
        self._refuse_infeasible()
        return self._done()

    def request(
        self,
        ticket: int,
        component: str,
        nbytes: int,
        up_to: int | None = None,
        alone: bool = False,
    ) -> Outcome:
        """Ask for a new grant, and wait if need be."""
        node = self.components[component]
        waiter = self._waiter(ticket, "request", node, nbytes, up_to_bytes=up_to, alone=alone)
        return self._enqueue(waiter, node.queue)

    def request_nowait(self, ticket: int, component: str, nbytes: int) -> Outcome:
        """Ask for a new grant now or never."""
        return self._now_or_never(
            self._waiter(ticket, "request", self.components[component], nbytes)
        )

    def grow(self, ticket: int, grant: int, nbytes: int) -> Outcome:
        """Ask for more in a grant that is held, and wait if need be."""
        held = self.grants[grant]
        waiter = self._waiter(ticket, "grow", held.component, nbytes, grant=held, alone=held.alone)
        return self._enqueue(waiter, held.component.grows, first=held.is_exclusive)

    def grow_nowait(self, ticket: int, grant: int, nbytes: int) -> Outcome:
        """Ask for more in a grant that is held, now or never."""
        held = self.grants[grant]
        return self._now_or_never(
            self._waiter(ticket, "grow", held.component, nbytes, grant=held, alone=held.alone)
        )

    def enter(self, ticket: int, component: str) -> Outcome:
        """Ask for a component's minimum to be reserved, and wait if need be.

        If it is reserved already, or there is none, nothing need be waited for.
        """
        node = self.components[component]
        if node.entered or not node.declared_minimum_bytes:
            node.entered += 1
            return Outcome("admitted", (Admission(ticket, 0),))
        return self._enqueue(self._waiter(ticket, "enter", node), node.queue)

    def cancel(self, ticket: int) -> Outcome:
        """Forget a request that waits.

        Raises:
            KeyError: nothing of that ticket waits.
        """
        for waiter in self.waiters():
            if waiter.ticket == ticket:
                self._remove(waiter)
                return self._done()
        raise KeyError(ticket)

    # What is given back, and what the world says.

    def shrink(self, grant: int, nbytes: int) -> Outcome:
        """Give back a part of a grant.

        Raises:
            ValueError: it does not hold that much.
        """
        held = self.grants[grant]
        if nbytes > held.size_bytes:
            raise ValueError(f"{nbytes} of {held.size_bytes} bytes cannot be given back")
        held.size_bytes -= nbytes
        held.component.granted_bytes -= nbytes
        if held.size_bytes <= self.normal_cap_bytes(held.component):
            held.is_exclusive = False
        return self._done()

    def release(self, grant: int) -> Outcome:
        """Give back a grant."""
        held = self.grants.pop(grant)
        held.component.granted_bytes -= held.size_bytes
        return self._done()

    def leave(self, component: str) -> Outcome:
        """Undo one entry; the last one ends the reservation, grants stay charged.

        Raises:
            ValueError: nobody is inside.
        """
        node = self.components[component]
        if not node.entered:
            raise ValueError(f"nobody is in {component!r}")
        node.entered -= 1
        if not node.entered:
            node.minimum_bytes = 0
        self._refuse_infeasible()
        return self._done()

    def observe(self, measured_bytes: int, live: Live = ()) -> Outcome:
        """Take a sample of the memory in use, and of what some components have allocated."""
        fallen_bytes = max(0, self.measured_bytes - measured_bytes)
        self.measured_bytes = measured_bytes
        for component, live_bytes in live:
            self.components[component].live_bytes = live_bytes
        committed_bytes = self.total_committed_bytes
        if measured_bytes > THRESHOLD * self.limit_bytes:
            self.high_water_bytes = committed_bytes
        else:
            self.high_water_bytes = max(
                committed_bytes,
                min(self.high_water_bytes - fallen_bytes, measured_bytes - self.baseline_bytes),
            )
        unexplained_bytes = measured_bytes - self.baseline_bytes - self.high_water_bytes
        self.drift_bytes = max(0, unexplained_bytes)
        return self._done()

    def resize(self, limit_bytes: int) -> Outcome:
        """Set another effective limit."""
        self.limit_bytes = limit_bytes
        self._refuse_infeasible()
        return self._done()

    def lift_barrier(self) -> Outcome:
        """Let everybody pass the first barrier, which counts from 0 again."""
        for waiter in self.barriers()[:1]:
            waiter.is_barrier = False
            waiter.bypassed_bytes = 0
        return self._done()

    def snapshot(self) -> Snapshot:
        """The present numbers."""
        nodes = self.components.values()
        waiters = self.waiters()
        is_open = self.pool_is_open
        return Snapshot(
            free_bytes=self.free_bytes,
            drift_bytes=self.drift_bytes,
            high_water_bytes=self.high_water_bytes,
            granted_bytes=tuple([node.granted_bytes for node in nodes]),
            minimum_bytes=tuple([node.minimum_bytes for node in nodes]),
            committed_bytes=tuple([node.committed_bytes for node in nodes]),
            waiting=tuple([waiter.ticket for waiter in waiters]),
            barriers=tuple([waiter.ticket for waiter in waiters if waiter.is_barrier]),
            exclusive=tuple([t for t, grant in self.grants.items() if grant.is_exclusive]),
            available_bytes=tuple([self.available_bytes(node, is_open) for node in nodes]),
        )

    # How it is decided.

    def _waiter(
        self,
        ticket: int,
        kind: Kind,
        component: Component,
        nbytes: int = 0,
        *,
        up_to_bytes: int | None = None,
        alone: bool = False,
        grant: Grant | None = None,
    ) -> Waiter:
        self._arrivals += 1
        return Waiter(ticket, self._arrivals, kind, component, nbytes, up_to_bytes, alone, grant)

    def _enqueue(self, waiter: Waiter, queue: list[Waiter], first: bool = False) -> Outcome:
        if self.is_infeasible(waiter):
            return Outcome("too_large")
        queue.insert(0 if first else len(queue), waiter)
        return self._done(waiter)

    def _now_or_never(self, waiter: Waiter) -> Outcome:
        if self.is_infeasible(waiter):
            return Outcome("too_large")
        if waiter.component.fronts() or waiter.is_firm_blocked:
            return Outcome("refused")
        if waiter.draw_bytes > 0:
            is_free = self.threshold_bytes(waiter) <= self.free_bytes
            if not (self.pool_is_open and is_free):
                return Outcome("refused")
        self._admit(waiter, waiter.nbytes)
        return self._done(waiter)

    def _done(self, waiter: Waiter | None = None) -> Outcome:
        """Admit whom the change allows, and report."""
        self._settle()
        while (choice := self._next()) is not None:
            self._admit(*choice)
        admitted, self._admitted = tuple(self._admitted), []
        infeasible, self._infeasible = tuple(self._infeasible), []
        status: Status = "done"
        if waiter is not None:
            status = "waiting"
            if any(admission.ticket == waiter.ticket for admission in admitted):
                status = "admitted"
            elif waiter.ticket in infeasible:
                status = "too_large"
        return Outcome(status, admitted, infeasible)

    def _next(self) -> tuple[Waiter, int] | None:
        """Who is to be admitted now, with how many bytes; None if nobody can be."""
        heads = [
            head
            for component in self.components.values()
            if (head := component.head()) is not None and not head.is_firm_blocked
        ]
        reserved = [head for head in heads if head.draw_bytes <= 0]
        if reserved:
            first = min(reserved, key=by_arrival)
            return first, self._size_bytes(first)

        if self.exclusive is not None:
            in_order = [head for head in heads if head.is_of_exclusive_grant]
        elif barriers := self.barriers():
            in_order = barriers[:1]
        else:
            in_order = sorted(heads, key=lambda head: (self.threshold_bytes(head), head.arrival))
        free_bytes = self.free_bytes
        for waiter in in_order[:1]:
            if self.threshold_bytes(waiter) <= free_bytes and not self.is_oversize(waiter):
                return waiter, self._size_bytes(waiter)
        for waiter in in_order:
            fits_without_drift = waiter.draw_bytes <= free_bytes + self.drift_bytes
            if fits_without_drift and self.is_idle_for(waiter):
                return waiter, waiter.nbytes
        return None

    def is_idle_for(self, waiter: Waiter) -> bool:
        """Whether no pool grant is out, but for the one that is to grow."""
        if waiter.grant is None or not waiter.grant.is_only_pool_grant_of_component:
            return self.pool_is_unused()
        return self.pool_is_unused(but_for=waiter.component)

    def _size_bytes(self, waiter: Waiter) -> int:
        """What an admitted request gets: more than it asked for if it would take it."""
        if waiter.up_to_bytes is None:
            return waiter.nbytes
        component = waiter.component
        most_bytes = component.unused_minimum_bytes
        if self.exclusive is None and self.barriers()[:1] in ([], [waiter]):
            p, q = self.share.numerator, self.share.denominator
            most_bytes += max(0, most_draw_bytes(p, q, self.free_bytes, component.held_bytes))
        most_bytes = min(most_bytes, waiter.up_to_bytes)
        if component.firm_limit_bytes is not None:
            most_bytes = min(most_bytes, component.firm_limit_bytes - component.granted_bytes)
        return max(waiter.nbytes, most_bytes)

    def _admit(self, waiter: Waiter, size_bytes: int) -> None:
        component = waiter.component
        beyond_wanted_bytes = size_bytes - waiter.nbytes
        self._count(max(0, waiter.draw_bytes + beyond_wanted_bytes), but_for=waiter)
        oversize = self.is_oversize(waiter) and waiter.draw_bytes > 0
        self._remove(waiter)
        if waiter.kind == "enter":
            if not component.entered:
                component.minimum_bytes = component.declared_minimum_bytes
            component.entered += 1
        else:
            component.granted_bytes += size_bytes
            if waiter.grant is None:
                waiter.grant = Grant(component, 0, waiter.alone)
                self.grants[waiter.ticket] = waiter.grant
            waiter.grant.size_bytes += size_bytes
            waiter.grant.is_exclusive |= oversize
        self._admitted.append(Admission(waiter.ticket, size_bytes))
        if waiter.kind == "enter":
            self._refuse_infeasible()
        self._settle()

    def _count(self, pool_bytes: int, but_for: Waiter) -> None:
        """Tell all at the front of a queue that so much has passed them."""
        for component in self.components.values():
            for waiter in component.fronts():
                if waiter is not but_for and not waiter.is_parked and not waiter.is_barrier:
                    waiter.bypassed_bytes = (waiter.bypassed_bytes or 0) + pool_bytes

    def _settle(self) -> None:
        """Bring up to date what follows from a change: fronts, barriers, high-water mark."""
        self.high_water_bytes = max(self.high_water_bytes, self.total_committed_bytes)
        for component in self.components.values():
            fronts = component.fronts()
            for waiter in component.grows[1:2]:
                waiter.is_barrier = False  # the exclusive grant's grow has come before it
            for waiter in fronts:
                if waiter.bypassed_bytes is None:
                    waiter.bypassed_bytes = 0
                if waiter.is_parked:
                    waiter.is_barrier = False
                elif waiter.bypassed_bytes > self.bypass_limit_bytes:
                    waiter.is_barrier = True

    def _remove(self, waiter: Waiter) -> None:
        for queue in (waiter.component.grows, waiter.component.queue):
            if waiter in queue:
                queue.remove(waiter)

    def _refuse_infeasible(self) -> None:
        for waiter in self.waiters():
            if self.is_infeasible(waiter):
                self._remove(waiter)
                self._infeasible.append(waiter.ticket)
