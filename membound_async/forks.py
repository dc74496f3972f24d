"""Forks: a child process has its limiters unlocked, and for itself.

Only the thread that forks lives on in the child. So all limiters are locked while it forks, or
one that another thread was about to change would stay locked, and half changed, for ever.
"""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .limiter import MemoryLimiter

__all__ = ["see_through_forks"]

_limiters: weakref.WeakValueDictionary[int, MemoryLimiter] = weakref.WeakValueDictionary()
_locked: list[MemoryLimiter] = []


def see_through_forks(limiter: MemoryLimiter) -> None:
    """Have a limiter usable in the child processes that are forked from now on."""
    _limiters[id(limiter)] = limiter


def _before() -> None:
    global _locked
    found = [limiter for one in _limiters.valuerefs() if (limiter := one()) is not None]
    found.sort(key=id)  # two threads that fork lock them in the same order
    for limiter in found:
        limiter._lock.acquire()
    _locked = found


def _after() -> list[MemoryLimiter]:
    global _locked
    locked, _locked = _locked, []
    for limiter in locked:
        limiter._lock.release()
    return locked


def _after_in_child() -> None:
    for limiter in _after():
        limiter._forked()


if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has no fork
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after_in_child)
