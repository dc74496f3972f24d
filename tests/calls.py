"""What code costs, whatever else the machine does: the number of calls that it makes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Calls", "counted"]


class Calls:
    """Calls of any function, in Python and in C."""

    count = 0


@contextmanager
def counted() -> Iterator[Calls]:
    """Count the calls in a ``with`` block, in this thread."""
    calls = Calls()

    def count(_frame: FrameType, event: str, _arg: Any) -> None:
        calls.count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(before)
