"""The fast path of a grant: nobody ahead, no pressure, and room.

Classes here are the parts of the account, the waiters, the ledger, the limiter and the grant
that the fast path touches. ``_fast.c`` says the same in C, and is used where it was built: it
makes an uncontended ``async with component.grant(n)`` several times as fast and changes
nothing else. ``MEMBOUND_EXTENSION=no`` leaves it out, ``MEMBOUND_EXTENSION=yes`` insists on it.

The C path takes no lock. So whoever changes any of this in Python does it with the limiter's
lock taken, which tells the C path to stay away.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from weakref import ref

from .sizes import MAX_BYTES, parse_size

if TYPE_CHECKING:
    from .component import Component
    from .grant import MemoryGrant, Options
    from .ledger import Ledger
    from .stocks import Account
    from .waiters import Queue

__all__ = [
    "EXTENSION",
    "AccountState",
    "GrantState",
    "Holders",
    "LedgerState",
    "LimiterState",
    "WaitersState",
]

_running_loop = asyncio._get_running_loop

NEW, ASKED, HELD, ALONE, RELEASED = range(5)
"""The life of a grant; ``ALONE`` is held, with the pool to itself."""

NO_LIMIT = (1 << 63) - 1
"""A number of bytes that nothing reaches: the largest that the C path knows."""


class Holders:
    """The grants that an account holds, for reports; it keeps none of them alive."""

    def __init__(self) -> None:
        self._references: set[ref[MemoryGrant]] = set()

    @property
    def count(self) -> int:
        """How many they are."""
        return len(self._references)

    def add(self, grant: MemoryGrant) -> None:
        """Note that a grant is held."""
        # Of one that is garbage in a cycle, the finaliser does not find this reference.
        self._references.add(ref(grant, self._references.discard))

    def discard(self, grant: MemoryGrant) -> None:
        """Note that it is not held any more."""
        self._references.discard(ref(grant))

    def snapshot(self) -> list[MemoryGrant]:
        """Give those that are held now."""
        found = [reference() for reference in list(self._references)]
        return [grant for grant in found if grant is not None]


class AccountState:
    """What an account has; see ``stocks.Account``."""

    __slots__ = (
        "admissions",
        "excess",
        "firm_limit",
        "granted",
        "grouped",
        "holders",
        "in_flight",
        "live",
        "peak",
        "queue",
        "reserved",
    )
    admissions: int
    excess: int
    firm_limit: int
    granted: int
    grouped: bool
    holders: Holders
    in_flight: int
    live: int
    peak: int
    queue: Queue | None
    reserved: int


class WaitersState:
    """How many wait; see ``waiters.Waiters``."""

    count: int


class LedgerState:
    """What is free, and the share of it that one account may have; see ``ledger.Ledger``."""

    free: int
    moved: int
    look_at: int
    _lowest_free: int
    _closed: bool
    _p: int | None
    _q: int


class LimiterState:
    """What the fast path asks of a limiter; see ``limiter.MemoryLimiter``."""

    _lock: threading.Lock
    _ledger: Ledger
    _loop_token: object
    _now: Callable[[], float]
    _calm_until: float

    if TYPE_CHECKING:  # what MemoryLimiter has

        def _admit(self, account: Account, nbytes: int) -> bool: ...


class GrantState:
    """What a grant holds, and how it gets and gives back that; see ``grant.MemoryGrant``."""

    __slots__ = (
        "__weakref__",
        "_component",
        "_holder",
        "_options",
        "_since",
        "_size",
        "_state",
        "_wanted",
    )
    _component: Component
    _holder: object
    """The task whose ``async with`` block it is; None if it is nobody's, and may be anywhere."""
    _options: Options | None
    _since: float
    _size: int
    _state: int
    _wanted: int

    def __init__(
        self,
        component: Component,
        nbytes: int | str,
        options: Options | None = None,
    ) -> None:
        self._state = NEW  # first, for the finaliser of one that is refused here
        self._component = component
        self._holder = None
        if type(nbytes) is not int or not 0 <= nbytes <= MAX_BYTES:
            nbytes = parse_size(nbytes, "nbytes")
        self._wanted = nbytes
        self._options = options
        self._size = 0

    async def __aenter__(self) -> Self:
        # Everything that is not the fast path is in _acquire.
        if self._take():
            self._holder = asyncio.current_task(self._component._limiter._loop_token)
            return self
        return await self._enter()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._release()

    def __await__(self) -> Generator[Any, Any, Self]:
        return self._get().__await__()

    async def _get(self) -> Self:
        return self if self._take() else await self._acquire()

    def _take(self) -> bool:
        """Get it at once; False says only that ``_acquire`` must decide."""
        component = self._component
        limiter = component._limiter
        if (
            self._state == NEW
            and self._options is None
            and limiter is not None
            and _running_loop() is limiter._loop_token
        ):
            now = limiter._now()
            if now < limiter._calm_until and limiter._admit(component._account, self._wanted):
                self._since = now
                self._size = self._wanted
                self._state = HELD
                component._account.holders.add(self)
                return True
        return False

    def __del__(self) -> None:
        if self._state == HELD or self._state == ALONE:
            self._component._account.holders.discard(self)
            self._lost()

    if TYPE_CHECKING:  # what MemoryGrant has

        def _acquire(self, holder: object = None) -> Coroutine[Any, Any, Self]: ...

        def _enter(self) -> Coroutine[Any, Any, Self]: ...

        def _release(self) -> None: ...

        def _lost(self) -> None: ...


EXTENSION = False
"""Whether the fast path is the one in C."""

_asked = os.environ.get("MEMBOUND_EXTENSION", "").strip().lower()
if not TYPE_CHECKING and _asked != "no":
    try:
        from ._fast import (
            AccountState,
            GrantState,
            Holders,
            LedgerState,
            LimiterState,
            WaitersState,
        )

        EXTENSION = True
    except ImportError:
        if _asked == "yes":
            raise
