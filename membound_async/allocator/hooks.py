"""The hooks in CPython's allocators: put in once for a process, switched on and off."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal

from membound_async.exceptions import TrackingError, TrackingUnavailable

__all__ = [
    "available",
    "disable",
    "displaced",
    "enable",
    "enabled",
    "get_include",
    "install",
    "installed",
    "trim",
    "unavailable_reason",
]

tracker: ModuleType | None = None
"""The extension, where there is one."""

unavailable_reason: str | None = None
"""Why nothing can be tracked here; None where it can."""

_asked = os.environ.get("MEMBOUND_EXTENSION", "").strip().lower()
try:
    if _asked == "no":
        raise ImportError("MEMBOUND_EXTENSION=no")
    tracker = import_module("._tracker", __package__)
except ImportError as error:
    if _asked == "yes":
        raise
    unavailable_reason = str(error)
    if isinstance(error, ModuleNotFoundError):
        unavailable_reason = (
            "the extension was not built; it needs Linux, CPython with a GIL and a C compiler"
        )

available: bool = tracker is not None
"""Whether allocations can be tracked here."""

_installed = False


def install(groups: Literal[126, 65535] = 126) -> None:
    """Put the hooks in, and count from now on; again, count again.

    The hooks stay until the process ends. What was allocated before is not counted, nor
    missed when it is freed.

    Args:
        groups: how many there may be at a time. With 65535 each small block takes 4 bytes
            more, not 2, and so do each 16 bytes where larger ones lie.

    Raises:
        TrackingUnavailable: there is no extension, and why.
        TrackingError: they were put in for another number of groups, or a tool has discarded
            them since.
        ValueError: another number than these two.
    """
    if groups not in (126, 65535):
        raise ValueError(f"groups={groups!r}: use 126 or 65535")
    global _installed
    state = _state()
    if not _installed:
        needed().install(groups == 65535)
        _installed = True
    elif state["groups"] != groups:
        raise TrackingError(
            f"the hooks are in already, for {state['groups']} groups; they stay until the "
            "process ends, so the first install() decides"
        )
    elif state["displaced"]:
        raise TrackingError(
            "the hooks are not called any more: a tool (tracemalloc, memray) that was started "
            "before them was stopped, or one was started while counting was off; start it "
            "after install(), while counting is on"
        )
    else:
        needed().switch(True)


def enable() -> None:
    """Count what is allocated from now on.

    Raises:
        TrackingError: the hooks are not in.
    """
    _switch(True)


def disable() -> None:
    """Count no more what is allocated; what was counted is still missed when it is freed.

    Raises:
        TrackingError: the hooks are not in.
    """
    _switch(False)


def _switch(on: bool) -> None:
    if not installed():
        raise TrackingError("nothing is tracked yet: call membound_async.allocator.install()")
    needed().switch(on)


def installed() -> bool:
    """Say whether the hooks are in."""
    return _installed


def enabled() -> bool:
    """Say whether what is allocated is counted now."""
    return available and bool(_state()["enabled"])


def displaced() -> bool:
    """Say whether another tool has discarded the hooks, so that counts stand still.

    A tool that was started before ``install()`` (tracemalloc, memray) does that when it is
    stopped; one that was started while counting was off hides it until it is stopped. Any
    other is no harm: what it allocates is counted, too.
    """
    return available and bool(_state()["displaced"])


def trim() -> int:
    """Give empty pages of the tracker's heap back to the system; give how many bytes.

    What was not wanted for a second goes back by itself, when memory is read or pages are
    freed.
    """
    trimmed: int = needed().trim() if available else 0
    return trimmed


def get_include() -> str:
    """Give the folder of ``membound_tracker.h``, for extensions that charge memory from C."""
    return str(Path(__file__).parent)


def needed() -> ModuleType:
    """Give the extension.

    Raises:
        TrackingUnavailable: there is none.
    """
    if tracker is None:
        raise TrackingUnavailable(unavailable_reason or "")
    return tracker


def _state() -> dict[str, int]:
    state: dict[str, int] = needed().state()
    return state
