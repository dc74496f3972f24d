"""What your own tests need: memory, a limiter and a clock that do what the test says.

- `assert_bounded` runs a pipeline to its end and fails if it would have used more memory than
  there is; `watch_bounded` does the same in an async test.
- `FakeMemory` reads what is granted, times a factor, and what a test adds to that;
  `ScriptedProbe` reads the memory that a test wants it to read.
- `limiter` gives a `MemoryLimiter` whose numbers are round: no slop, no baseline, no
  delay, no reclaim but by the test's own reclaimers, and a scripted probe.
- `VirtualTimeLoop` is an asyncio event loop on which nobody waits for a timer; trio has
  the same in ``trio.testing.MockClock(autojump_threshold=0)``. `virtual_time` gives either.

Fixtures for pytest are in ``membound_async.pytest_plugin``.
"""

from __future__ import annotations

from .bounded import Watch, assert_bounded, watch_bounded
from .clock import VirtualTimeLoop, virtual_time
from .limiters import limiter
from .memory import Allocation, ComponentUsage, FakeMemory, MemoryUsage
from .probe import ScriptedProbe
from .report import BoundedReport, ComponentReport, NotBounded

__all__ = [
    "Allocation",
    "BoundedReport",
    "ComponentReport",
    "ComponentUsage",
    "FakeMemory",
    "MemoryUsage",
    "NotBounded",
    "ScriptedProbe",
    "VirtualTimeLoop",
    "Watch",
    "assert_bounded",
    "limiter",
    "virtual_time",
    "watch_bounded",
]
