"""Whose code is running: the context variable, and the limiters the process has entered."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .allocator import AllocationScope
    from .component import Component
    from .limiter import MemoryLimiter
    from .reclaim import Call

__all__ = [
    "Scope",
    "current_call",
    "current_component",
    "current_scope",
    "entered_limiters",
    "installed_limiters",
]


class Scope(NamedTuple):
    """One ``async with component:``, and the one around it."""

    component: Component
    outer: Scope | None
    #: what charges its allocations to it, where they are tracked
    allocations: AllocationScope | None = None


current_scope: ContextVar[Scope | None] = ContextVar("membound_scope", default=None)

current_call: ContextVar[Call | None] = ContextVar("membound_call", default=None)
"""The call of a reclaimer that this code belongs to, be it over or not."""

entered_limiters: list[MemoryLimiter] = []
"""The limiters that the process has entered, each once."""

installed_limiters: list[MemoryLimiter] = []
"""The limiters that are installed, each once; asked when none is entered."""


def current_component() -> Component | None:
    """Give the component whose ``async with`` block this code runs in; None outside any."""
    scope = current_scope.get()
    return None if scope is None else scope.component
