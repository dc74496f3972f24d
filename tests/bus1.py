"""The resource accounting of bus1, without waiting: the rule of its wiki for each resource.

    For any given request, the resources available to the consumer making the request is half
    the resources not currently consumed by anybody else.

Receivers divide what there is, and the senders of each divide what it may have. A message is
charged before it is sent, in all resources or in none, on behalf of its sender; delivered it
is the receiver's own. Written from that rule and from the semantics page, with fractions, each
sum found anew; nothing of the package is imported, so that `tests.test_bus1` can hold the
ledger against it.

bus1's own code charges one resource after the other and, if a later one is refused, gives
back what was charged before, but not in the sums of the sender. Here nothing is charged
before all is known to fit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

__all__ = ["DEFAULTS", "RESOURCES", "Kernel", "Receiver", "Refused"]

RESOURCES = ("bytes", "slices", "handles", "fds")
DEFAULTS = {"bytes": 16 << 20, "slices": 16384, "handles": 65536, "fds": 4096}

Amounts = dict[str, int]


class Refused(Exception):
    """There is not so much of a resource for who asks."""


@dataclass(eq=False, slots=True)
class Receiver:
    """What one receiver has, and what is in flight to it, by resource."""

    minimum: int = 0
    """Bytes that are its own, whether it uses them or not."""
    firm: Amounts = field(default_factory=Amounts)
    group: int | None = None
    granted: Amounts = field(default_factory=lambda: dict.fromkeys(RESOURCES, 0))
    in_flight: dict[str, Amounts] = field(
        default_factory=lambda: {resource: {} for resource in RESOURCES}
    )

    def reserve(self, resource: str) -> int:
        return self.minimum if resource == "bytes" else 0

    def sent(self, resource: str) -> int:
        """``S``."""
        return sum(self.in_flight[resource].values())

    def used(self, resource: str) -> int:
        """What it takes from everybody else."""
        return max(self.granted[resource], self.reserve(resource)) + self.sent(resource)

    def held(self, resource: str) -> int:
        """``s``: what it has of what is divided."""
        return self.used(resource) - self.reserve(resource)


class Kernel:
    """Who has what.

    Args:
        limits: how much there is of each resource, for all.
        groups: how much there is for the receivers of each group.
        share: the part of what nobody else has.
    """

    def __init__(
        self,
        limits: Amounts,
        groups: tuple[Amounts, ...] = (),
        share: Fraction = Fraction(1, 2),
    ) -> None:
        self.limits = limits
        self.groups = groups
        self.share = share
        self.receivers: dict[str, Receiver] = {}

    def pools(self, receiver: Receiver, resource: str) -> list[int]:
        """``R`` of each pool that a receiver has a part of."""
        found = [self.free(resource)]
        if receiver.group is not None and resource in self.groups[receiver.group]:
            found.append(self.free(resource, receiver.group))
        return found

    def free(self, resource: str, group: int | None = None) -> int:
        """What nobody has, of all or of a group's."""
        limit = self.limits[resource] if group is None else self.groups[group][resource]
        members = [each for each in self.receivers.values() if group in (None, each.group)]
        return limit - sum([each.used(resource) for each in members])

    def allows(self, receiver: Receiver, resource: str, amount: int, sender: str | None) -> bool:
        """Whether so much more may be charged."""
        granted, sent = receiver.granted[resource], receiver.sent(resource)
        reserve, firm = receiver.reserve(resource), receiver.firm.get(resource)
        if sender is None:
            if firm is not None and granted + sent + amount > firm:
                return False
            draw = amount - max(0, reserve - granted)
            if draw <= 0:
                return True
            held = receiver.held(resource)
            return all(
                held + draw <= self.share * (free + held) for free in self.pools(receiver, resource)
            )
        if not amount:
            return True
        from_it = receiver.in_flight[resource].get(sender, 0)
        held = receiver.held(resource)
        # What the receiver may have, less what is there that is not this sender's.
        left = [
            self.share * (free + held) - (held - from_it) for free in self.pools(receiver, resource)
        ]
        if firm is not None:
            left.append(Fraction(firm - max(granted, reserve) - (sent - from_it)))
        return all(from_it + amount <= self.share * each for each in left)

    def charge(self, name: str, amounts: Amounts, sender: str | None) -> None:
        """Charge all of it or nothing.

        Raises:
            Refused: one of the resources is not there; nothing has changed.
        """
        receiver = self.receivers[name]
        for resource, amount in amounts.items():
            if not self.allows(receiver, resource, amount, sender):
                raise Refused(resource)
        for resource, amount in amounts.items():
            self._add(receiver, resource, amount, sender)

    def deliver(self, name: str, amounts: Amounts, sender: str, real: Amounts) -> None:
        """Make what is in flight the receiver's own; of some resources less, as it turns out."""
        receiver = self.receivers[name]
        for resource, amount in amounts.items():
            self._add(receiver, resource, -amount, sender)
            self._add(receiver, resource, real[resource], None)

    def release(self, name: str, amounts: Amounts, sender: str | None) -> None:
        for resource, amount in amounts.items():
            self._add(self.receivers[name], resource, -amount, sender)

    @staticmethod
    def _add(receiver: Receiver, resource: str, amount: int, sender: str | None) -> None:
        if sender is None:
            receiver.granted[resource] += amount
            assert receiver.granted[resource] >= 0
            return
        by_sender = receiver.in_flight[resource]
        now = by_sender.pop(sender, 0) + amount
        assert now >= 0
        if now:
            by_sender[sender] = now
