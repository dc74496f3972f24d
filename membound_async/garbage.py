"""Whether Python collects garbage just now, in this thread.

A task or generator that only refers to itself any more is closed by the collector, which is
started wherever something is allocated: perhaps inside a limiter, whose lock that thread has
then. What the blocks of the task give back at their end has to wait until the limiter is done.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from threading import get_ident

__all__ = ["is_collecting"]

_collector = 0
"""The thread in which the collector runs; 0 if it does not. There is never more than one."""


def is_collecting() -> bool:
    """Whether this is called, however indirectly, by the collector."""
    return _collector == get_ident()


def _note(phase: str, _: Mapping[str, int]) -> None:
    global _collector
    _collector = get_ident() if phase == "start" else 0


gc.callbacks.append(_note)
