"""What inboxes, streams and iterators hold for the items that are theirs just now."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .grant import MemoryGrant
from .sizes import MAX_BYTES, parse_size

if TYPE_CHECKING:
    from .component import Component

__all__ = ["Charge", "available_to", "belongs_to", "check_count", "measure"]


class Charge(MemoryGrant):
    """A grant that an iterator or a stream holds: dropped with it, it goes without a word."""

    __slots__ = ()

    def _lost(self) -> None:
        limiter = self._component._limiter
        # This may be running in the midst of the limiter, in the thread that has its lock.
        if limiter._lock.acquire(blocking=False):
            limiter._lock.release()
            MemoryGrant._release(self)
        else:
            limiter._abandon(self)


def belongs_to(grant: MemoryGrant, component: Component) -> bool:
    """Whether a grant is held for that component."""
    mine: bool = grant._component._account is component._resolve()._account
    return mine


def available_to(component: Component) -> float:
    """Give the most bytes that a component could have now, without waiting."""
    node = component._resolve()
    limiter = node._limiter
    if limiter._observe:
        return math.inf
    available: int = limiter._ledger.available(node._account)
    return available


def measure(size: Callable[[Any], int], item: object) -> int:
    """Give the bytes of an item.

    Raises:
        TypeError, ValueError: what ``size`` gives is no number of bytes.
    """
    nbytes = size(item)
    if type(nbytes) is not int or not 0 <= nbytes <= MAX_BYTES:
        nbytes = parse_size(nbytes, "size(item)")
    return nbytes


def check_count(value: float, name: str) -> None:
    """Check a highest number of items, which may be ``math.inf``.

    Raises:
        ValueError: it is no such number.
    """
    if value != math.inf and (type(value) is not int or value < 1):
        raise ValueError(f"{name}={value!r} must be a whole number of items, 1 or more")
