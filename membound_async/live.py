"""What the components of a limiter really have allocated, where that is tracked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import anyio

from . import allocator
from .bounds import ROOT
from .events import log
from .exceptions import TrackingError
from .stocks import Account

if TYPE_CHECKING:
    from .allocator import AllocationGroup, AllocationScope, AllocationStatsSnapshot
    from .component import Component

__all__ = ["LiveBytes", "Tracking", "enter_group"]

Tracking = Literal["on", "off", "unavailable", "displaced"]
"""Whether allocations are counted; displaced: another tool has discarded the hooks."""

OVERDRAFT_PART = 100
"""An overdraft is worth a word when it is more than this part of the effective limit."""

DISPLACED_LOOK_SECONDS = 1.0
"""How often it is looked whether the hooks are still there, at most."""

_refused: set[str] = set()
"""Components that there was no group for, as was said once."""


def enter_group(path: str) -> AllocationScope | None:
    """Have what this context allocates charged to a component's group; None if not tracked.

    From a task of an event loop.
    """
    if not allocator.installed():
        return None
    group = allocator.registry.get(path)
    if group is None:
        anyio.current_time()  # anyio imports a backend when it is first used: not for the group
        try:
            group = allocator.registry.register(path)
        except TrackingError as error:
            if path not in _refused:
                _refused.add(path)
                log().warning("membound.not_tracked", component=path, reason=str(error))
            return None
    scope = group.enter()
    scope.__enter__()
    return scope


_NOTHING = allocator.AllocationStatsSnapshot()


class LiveBytes:
    """Reads the groups of components; what was live at the baseline is part of that.

    A reading costs time in proportion to the number of components.
    """

    def __init__(self) -> None:
        self._before: dict[AllocationGroup, AllocationStatsSnapshot] = {}
        self._highest: dict[AllocationGroup, int] = {}
        self._overdrafts: dict[str, int] = {}
        self._displaced = False
        self._look_at = 0.0

    def start(self) -> None:
        """Take what is live now for a part of the baseline."""
        self._before = {group: group.statistics() for group in allocator.registry}
        self._highest.clear()
        self._overdrafts.clear()

    def read(
        self, components: Mapping[str, Component], now: float, limit_bytes: int
    ) -> list[tuple[Account, int]]:
        """Give what each tracked component has; log it once if one has more than it was granted.

        All have 0 once the hooks are displaced: what they had is not known any more.
        """
        if not allocator.installed():
            return []
        if now >= self._look_at:
            self._look_at = now + DISPLACED_LOOK_SECONDS
            self._look_for_displacement()
        found: list[tuple[Account, int]] = []
        for group in allocator.registry:
            component = components.get(group.path)
            if component is not None:
                live = max(0, group.live_bytes - self._of_baseline(group).live_bytes)
                self._highest[group] = max(live, self._highest.get(group, 0))
                account: Account = component._account
                found.append((account, 0 if self._displaced else live))
                self._note_overdraft(account, found[-1][1], limit_bytes)
        return found

    def peaks(self, path: str) -> tuple[int, int]:
        """Give the most that a component had, and its highest overdraft, since the baseline.

        Overdrafts are those of the readings; so is the peak, where the group had a higher one
        before the baseline.
        """
        group = allocator.registry.get(path)
        if group is None:
            return 0, 0
        peak = group.statistics().peak_live_bytes
        before = self._of_baseline(group)
        if peak > before.peak_live_bytes:
            highest = peak - before.live_bytes
        else:
            highest = self._highest.get(group, 0)
        return highest, self._overdrafts.get(path, 0)

    def tracking(self) -> Tracking:
        """Say whether allocations are counted now."""
        if not allocator.available:
            return "unavailable"
        if not allocator.installed() or not allocator.enabled():
            return "off"
        return "displaced" if allocator.displaced() else "on"

    def _of_baseline(self, group: AllocationGroup) -> AllocationStatsSnapshot:
        return self._before.get(group, _NOTHING)

    def _look_for_displacement(self) -> None:
        displaced = allocator.displaced()
        if displaced and not self._displaced:
            log().warning(
                "membound.tracking_displaced",
                remedy="start tools such as tracemalloc and memray after the tracker",
            )
        self._displaced = displaced

    def _note_overdraft(self, account: Account, live: int, limit_bytes: int) -> None:
        overdraft = live - max(account.granted, account.reserved)
        before = self._overdrafts.get(account.name, 0)
        if overdraft <= before:
            return
        self._overdrafts[account.name] = overdraft
        worth_a_word = limit_bytes // OVERDRAFT_PART
        if before <= worth_a_word < overdraft and account.name != ROOT:
            log().warning(
                "membound.overdraft",
                component=account.name,
                live_bytes=live,
                granted_bytes=account.granted,
                minimum_bytes=account.reserved,
            )
