"""Whether everything was given back."""

from __future__ import annotations

from membound_async import MemoryLimiter

__all__ = ["assert_nothing_is_left"]


def assert_nothing_is_left(limiter: MemoryLimiter, when: object = None) -> None:
    """Check that nobody has, wants or is on the way to get anything of a limiter."""
    left = limiter.statistics()
    assert (left.granted_bytes, left.in_flight_bytes, left.grants, left.waiting) == (0, 0, 0, 0), (
        when
    )
    assert not any(component.entered for component in left.components), when
    assert (limiter._ledger.arriving, limiter._ledger.on_its_way) == (0, {}), when
    assert limiter._ledger._exclusive is None, when
