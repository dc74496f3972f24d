"""What several resources, senders and groups may have, from the semantics page alone.

A plain account of who has what, and the rule as the page states it, with fractions: whether a
wish fits, and what is in its way. Everything is found anew each time it is asked for, and
nothing of the package is imported, so that no mistake can be in both. Who is *next* is not
decided here: `tests/fuzz_resources.py` asks whether what the ledger did was legal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor
from typing import Literal, NamedTuple

__all__ = ["BYTES", "Amounts", "Component", "Place", "Wish", "World"]

BYTES = "bytes"
Amounts = dict[str, int]
Place = tuple[int | None, str]
"""A pool: the number of a group or None for the limiter's own, and the resource."""
WishKind = Literal["request", "grow", "enter", "transfer"]


@dataclass(eq=False, slots=True)
class Component:
    """What one component has."""

    name: str
    minimum: int = 0
    firm: dict[str, int] = field(default_factory=dict[str, int])
    group: int | None = None
    entries: int = 0
    reserved: int = 0
    live: int = 0
    granted: Amounts = field(default_factory=Amounts)
    in_flight: dict[str, Amounts] = field(default_factory=dict[str, Amounts])
    """By resource, of each sender that has any."""

    def reserve(self, resource: str) -> int:
        return self.reserved if resource == BYTES else 0

    def own(self, resource: str) -> int:
        """What it has itself, used or only reserved."""
        return max(self.reserve(resource), self.used(resource))

    def used(self, resource: str) -> int:
        granted = self.granted.get(resource, 0)
        return max(granted, self.live) if resource == BYTES else granted

    def sent(self, resource: str) -> int:
        by_sender = self.in_flight.get(resource)
        return sum(by_sender.values()) if by_sender else 0

    def sent_by(self, resource: str, sender: str) -> int:
        return self.in_flight.get(resource, {}).get(sender, 0)

    def committed(self, resource: str) -> int:
        """``C``."""
        by_sender = self.in_flight.get(resource)
        sent = sum(by_sender.values()) if by_sender else 0
        granted = self.granted.get(resource, 0)
        if resource == BYTES:
            return max(self.reserved, granted, self.live) + sent
        return granted + sent

    def held(self, resource: str) -> int:
        """``s``."""
        return self.committed(resource) - self.reserve(resource)

    def add(self, resource: str, amount: int, sender: str | None) -> None:
        """Charge so much more or less.

        Raises:
            ValueError: there is not so much to give back.
        """
        if sender is None:
            have = self.granted.get(resource, 0) + amount
            self.granted[resource] = have
        else:
            by_sender = self.in_flight.setdefault(resource, {})
            have = by_sender.get(sender, 0) + amount
            by_sender[sender] = have
            if not have:
                del by_sender[sender]
        if have < 0:
            raise ValueError(f"{resource} of {self.name}, {sender}: {have}")


@dataclass(eq=False, slots=True)
class Wish:
    """What somebody asks for."""

    ticket: int
    kind: WishKind
    component: Component
    sender: str | None
    amounts: Amounts
    up_to: int = 0
    source: Component | None = None
    held: int = 0
    """Of a grow, the bytes of its grant."""

    @property
    def line(self) -> tuple[Component, str | None, bool]:
        return self.component, self.sender, self.kind == "grow" and self.sender is None


class Need(NamedTuple):
    """What one wish needs of one resource."""

    resource: str
    draw: int
    """``c``; nothing of the pools if that is 0."""
    over_firm: bool


class World:
    """Who has what, and what there is.

    Args:
        limit: ``L`` in bytes.
        share: the part of what nobody else has; None is 1/(consumers + 1).
        baseline: ``B``.
        others: how much there is of other resources.
        groups: what each group has.
    """

    def __init__(
        self,
        limit: int,
        share: Fraction | None,
        baseline: int = 0,
        others: Amounts | None = None,
        groups: tuple[Amounts, ...] = (),
    ) -> None:
        self.limit = limit
        self.share = share
        self.baseline = baseline
        self.measured = baseline
        self.drift = 0
        self.highest = 0
        self.limits: dict[Place, int] = {(None, r): n for r, n in (others or {}).items()}
        for number, group in enumerate(groups):
            self.limits |= {(number, resource): amount for resource, amount in group.items()}
        self.components: dict[str, Component] = {}

    # What there is.

    def places(self, component: Component, resource: str) -> list[Place]:
        """The pools that a component draws on for a resource."""
        found: list[Place] = []
        if component.group is not None and (component.group, resource) in self.limits:
            found.append((component.group, resource))
        if resource == BYTES or (None, resource) in self.limits:
            found.append((None, resource))
        return found

    def all_places(self) -> list[Place]:
        return [(None, BYTES), *self.limits]

    def members(self, place: Place) -> list[Component]:
        return [c for c in self.components.values() if place[0] in (None, c.group)]

    def capacity(self, place: Place) -> int:
        """What an idle limiter has."""
        return self.limit - self.baseline if place == (None, BYTES) else self.limits[place]

    def committed(self) -> int:
        """The sum of all ``C``, in bytes."""
        return sum([component.committed(BYTES) for component in self.components.values()])

    def free(self, place: Place) -> int:
        """``R``."""
        there = self.capacity(place) - (self.drift if place == (None, BYTES) else 0)
        return there - sum([each.committed(place[1]) for each in self.members(place)])

    def part(self, place: Place, component: Component) -> Fraction:
        """What part one of the components may have of what the others do not hold."""
        if self.share is not None:
            return self.share
        others = [each for each in self.members(place) if each is not component]
        return Fraction(1, 2 + sum([each.held(place[1]) > 0 for each in others]))

    def part_of_sender(self, component: Component, resource: str, sender: str) -> Fraction:
        if self.share is not None:
            return self.share
        others = [each for each in component.in_flight.get(resource, {}) if each != sender]
        return Fraction(1, 2 + len(others))

    # Whether a wish fits.

    def without_source(self, wish: Wish, sign: int) -> None:
        """Take what is to be transferred out of its source (-1), or put it back (+1)."""
        if wish.source is not None:
            for resource, amount in wish.amounts.items():
                wish.source.add(resource, sign * amount, None)

    def needs(self, wish: Wish) -> list[Need]:
        """What it needs of each resource, its source left out."""
        component = wish.component
        if wish.kind == "enter":
            missing = 0 if component.entries else component.minimum - component.used(BYTES)
            return [Need(BYTES, max(0, missing), False)]
        found: list[Need] = []
        for resource, amount in wish.amounts.items():
            firm = component.firm.get(resource)
            if wish.sender is None:
                unused = component.own(resource) - component.used(resource)
                wanted = amount or wish.amounts == {BYTES: 0}
                over = (
                    firm is not None
                    and bool(wanted)
                    and (
                        component.granted.get(resource, 0) + component.sent(resource) + amount
                        > firm
                    )
                )
                found.append(Need(resource, max(0, amount - unused), over))
                continue
            over = False
            if amount:
                have = component.sent_by(resource, wish.sender)
                part = self.part_of_sender(component, resource, wish.sender)
                granted = max(component.granted.get(resource, 0), component.reserve(resource))
                if firm is not None:
                    left = firm - granted - (component.sent(resource) - have)
                    over = have + amount > part * left
                # Not even with all other components gone would there be enough.
                alone = Fraction(1, 2) if self.share is None else self.share
                for place in self.places(component, resource):
                    quota = alone * (self.capacity(place) - component.reserve(resource))
                    left_of_it = quota - (component.held(resource) - have)
                    over = over or have + amount > part * left_of_it
            found.append(Need(resource, amount, over))
        return found

    def fits_pool(self, wish: Wish, need: Need, place: Place) -> bool:
        """Whether so much may be drawn of a pool; the source is left out by the caller."""
        component, resource = wish.component, need.resource
        free = self.free(place)
        if not need.draw:
            return True
        if wish.kind == "enter":
            return need.draw <= free
        held = component.held(resource)
        quota = self.part(place, component) * (free + held)
        if wish.sender is None:
            return held + need.draw <= quota
        have = component.sent_by(resource, wish.sender)
        part = self.part_of_sender(component, resource, wish.sender)
        return have + need.draw <= part * (quota - (held - have))

    def parked_at(self, wish: Wish) -> set[str]:
        """The resources whose firm limit is in its way."""
        return {need.resource for need in self.needs(wish) if need.over_firm}

    def lacking(self, wish: Wish) -> set[Place]:
        """The pools that do not have enough for it."""
        self.without_source(wish, -1)
        try:
            return {
                place
                for need in self.needs(wish)
                for place in self.places(wish.component, need.resource)
                if not self.fits_pool(wish, need, place)
            }
        finally:
            self.without_source(wish, +1)

    def fits(self, wish: Wish) -> bool:
        return not self.parked_at(wish) and not self.lacking(wish)

    def drawn(self, wish: Wish) -> set[Place]:
        """The pools of which it would draw anything."""
        self.without_source(wish, -1)
        try:
            return {
                place
                for need in self.needs(wish)
                if need.draw > 0
                for place in self.places(wish.component, need.resource)
            }
        finally:
            self.without_source(wish, +1)

    def concerned(self, wish: Wish) -> set[Place]:
        """The pools of all that it asks for."""
        resources = [need.resource for need in self.needs(wish)]
        return {place for each in resources for place in self.places(wish.component, each)}

    def most(self, component: Component, resource: str, sender: str | None) -> int | None:
        """The most that could be had if nobody had anything; None if nothing bounds that."""
        part = Fraction(1, 2) if self.share is None else self.share
        reserve, firm = component.reserve(resource), component.firm.get(resource)
        places = self.places(component, resource)
        if sender is None:
            bounds = [
                reserve + max(0, floor(part * (self.capacity(each) - reserve))) for each in places
            ]
            bounds += [] if firm is None else [firm]
        else:
            bounds = [
                max(0, floor(part * part * (self.capacity(each) - reserve))) for each in places
            ]
            bounds += [] if firm is None else [floor(part * (firm - reserve))]
        return min(bounds, default=None)

    def is_possible(self, wish: Wish) -> bool:
        """Whether an idle limiter could admit it."""
        component = wish.component
        if wish.kind == "enter":
            most = min([self.capacity(each) for each in self.places(component, BYTES)])
            return component.entries > 0 or component.minimum <= most
        for resource, amount in wish.amounts.items():
            total = amount + (wish.held if resource == BYTES else 0)
            bound = self.most(component, resource, wish.sender)
            if bound is not None and total > bound:
                return False
        return True

    # What changes.

    def note(self) -> None:
        """Remember the highest sum."""
        self.highest = max(self.highest, self.committed())

    def admit(self, wish: Wish) -> None:
        component = wish.component
        if wish.kind == "enter":
            if not component.entries:
                component.reserved = component.minimum
            component.entries += 1
        else:
            self.without_source(wish, -1)
            for resource, amount in wish.amounts.items():
                component.add(resource, amount, wish.sender)
        self.note()

    def observe(
        self, measured: int, live: dict[str, int], *, pressed: bool, arriving: int = 0
    ) -> None:
        for name, amount in live.items():
            self.components[name].live = amount
        committed = self.committed()
        if pressed:
            self.highest = committed
        else:
            gone = max(0, self.measured - measured)
            self.highest = max(committed, min(self.highest - gone, measured - self.baseline))
        self.measured = measured
        in_use = measured + (arriving if pressed else 0)
        self.drift = max(0, in_use - self.baseline - self.highest)

    def numbers(self) -> dict[str, object]:
        """Everything that anybody has, to compare."""
        found: dict[str, object] = {
            f"free {place}": self.free(place) for place in self.all_places()
        }
        found |= {"drift": self.drift, "highest": self.highest}
        for name, each in self.components.items():
            found[f"{name} reserved"] = each.reserved, each.entries, each.live
            found[f"{name} granted"] = {r: n for r, n in each.granted.items() if n}
            found[f"{name} in flight"] = {r: dict(s) for r, s in each.in_flight.items() if s}
        return found

    def held_anywhere(self) -> Iterator[Component]:
        """The components whose grants hold any bytes of the pool."""
        for each in self.components.values():
            if each.granted.get(BYTES, 0) > each.reserved or each.sent(BYTES):
                yield each
