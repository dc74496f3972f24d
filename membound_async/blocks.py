"""The blocks that a waiting task is in, as far as its coroutines' frames tell.

``async with component.grant(n) as g`` leaves references to the grant in the frame of the
coroutine that has the block, and there are more in those that it awaits, if ``g`` is passed to
them. Any other reference (in a queue, an object, a closure, another task, an async generator)
may be how somebody else gives the grant back.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections import Counter
from collections.abc import Iterator
from types import BuiltinMethodType, CoroutineType, GeneratorType, MethodType
from typing import Any

from .fastpath import GrantState

__all__ = ["has_time_limit", "nobody_else_knows"]


def nobody_else_knows(grants: list[Any]) -> bool:
    """Tell whether these grants are referred to by the frames of their holders alone.

    "No" if in doubt. To be asked while none of the holders runs. Costs time in proportion to
    their frames.

    Args:
        grants: grants that tasks hold. The caller refers to them by this list alone.
    """
    counts = _references(grants)
    own: Counter[int] = Counter()
    for task in {grant._holder for grant in grants}:
        for each in _referents(task):
            if isinstance(each, GrantState):
                own[id(each)] += 1
    by_the_list = _references([object()])[0]
    return all(
        count == by_the_list + own[key] for count, key in zip(counts, map(id, grants), strict=True)
    )


def has_time_limit(task: Any) -> bool:
    """Tell whether a task waits inside of ``asyncio.timeout()`` or ``asyncio.wait_for()``."""
    return any(
        isinstance(each, asyncio.Timeout) and each.when() is not None for each in _referents(task)
    )


def _references(objects: list[Any]) -> list[int]:
    return [sys.getrefcount(each) for each in objects]


def _referents(task: Any) -> Iterator[object]:
    """Give what the frames in which a task waits refer to, once for each reference.

    For the end of a block, which is a method, its object.
    """
    coroutine: Any = task.get_coro() if hasattr(task, "get_coro") else task.coro  # trio's
    while isinstance(coroutine, (CoroutineType, GeneratorType)):
        for each in gc.get_referents(coroutine):
            is_end = isinstance(each, (MethodType, BuiltinMethodType))
            yield each.__self__ if is_end and each.__name__ == "__aexit__" else each
        awaited = "cr_await" if isinstance(coroutine, CoroutineType) else "gi_yieldfrom"
        coroutine = getattr(coroutine, awaited)
