"""Forks: a child process has its limiters unlocked, and for itself.

Only the thread that forks lives on in the child. So all limiters are locked while it forks, or
one that another thread was about to change would stay locked, and half changed, for ever. Code
that the program has registered with ``os.register_at_fork()`` before it imported this package
runs while they are locked, and must not use them.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING

from .eventloop import current_task

if TYPE_CHECKING:
    from .limiter import MemoryLimiter

__all__ = ["see_through_forks"]

_limiters: weakref.WeakValueDictionary[int, MemoryLimiter] = weakref.WeakValueDictionary()
_locked: list[MemoryLimiter] = []
_task: object = None
"""The task that forks, and goes on in the child; there, it could not be asked for."""

PATIENCE_SECONDS = 1.0
"""How long a fork waits for a limiter: for ever, if a signal handler forks in the midst of it."""


def see_through_forks(limiter: MemoryLimiter) -> None:
    """Have a limiter usable in the child processes that are forked from now on."""
    _limiters[id(limiter)] = limiter


def _before() -> None:
    global _task
    _task = current_task()
    # Two threads that fork lock them in the same order.
    found = sorted([*_limiters.values()], key=id)
    _locked.extend(one for one in found if one._lock.acquire(timeout=PATIENCE_SECONDS))


def _after() -> None:
    while _locked:
        _locked.pop()._lock.release()


def _after_in_child() -> None:
    _after()
    for limiter in [*_limiters.values()]:
        if limiter._lock.locked():
            limiter._lock = threading.Lock()
        limiter._forked(_task)


if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has no fork
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after_in_child)
