"""How much of what nobody else holds a request may have: the two rules of bus1.

A rule says which part ``p/q`` of it that is, for so many consumers as there are.
"""

from __future__ import annotations

from fractions import Fraction

from .exceptions import InvalidLimit

__all__ = ["Polynomial", "Rule", "Share"]


class Share:
    """The same part of what nobody else holds for everybody: bus1's wiki says a half.

    Args:
        share: the part, above 0 and at most 1. 1 is first come, first served.

    Raises:
        InvalidLimit: it is no such part.
    """

    depends_on_consumers = False

    def __init__(self, share: Fraction = Fraction(1, 2)) -> None:
        if not 0 < share <= 1:
            raise InvalidLimit(
                f"share={share}: a request may have a part above 0 and at most 1 of what "
                "nobody else holds, for example Fraction(1, 2)"
            )
        self.share = share
        self.unit = share.numerator
        """What inner thresholds are counted in: parts of a unit of the resource."""

    def __repr__(self) -> str:
        return f"a share of {self.share}"

    def part(self, consumers: int) -> tuple[int, int]:  # noqa: ARG002
        """Give ``p`` and ``q`` of the part that one of so many consumers may have."""
        return self.share.numerator, self.share.denominator


class Polynomial:
    """``1/(n + 1)`` of what nobody else holds, for ``n`` consumers who hold any.

    Who asks is one of them. It is what the code of bus1 and of dbus-broker does: the first
    may have a half as well, but who comes later leaves more to the others, 1/6 of all after
    one that has a half. With every consumer that comes or goes, everybody's threshold
    changes, so a change costs time in proportion to the components that wait.
    """

    depends_on_consumers = True
    unit = 1

    def __repr__(self) -> str:
        return "a part of 1/(consumers + 1)"

    def part(self, consumers: int) -> tuple[int, int]:
        """Give ``p`` and ``q`` of the part that one of so many consumers may have."""
        return 1, consumers + 1


Rule = Share | Polynomial
