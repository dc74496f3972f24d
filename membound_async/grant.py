"""Grants: bytes that a component may use from now until they are given back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Coroutine
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from .context import current_component, current_scope
from .eventloop import current_task
from .exceptions import GrantReleased
from .fastpath import ALONE, ASKED, HELD, NEW, RELEASED, GrantState
from .sizes import format_size, parse_size
from .waiters import Kind, Request

if TYPE_CHECKING:
    from .component import Component

__all__ = ["MemoryGrant", "grant", "grant_nowait"]

SEVERAL = object()
"""The holder of a grant that several tasks have entered: each of them may give it back."""


class MemoryGrant(GrantState):
    """Bytes that a component may use, from ``async with`` until its end.

    Made by ``grant()`` of a component, a limiter or this package. Three ways to hold it::

        async with component.grant(65536) as g: ...      # waits; given back on every path
        g = await component.grant(65536)                 # waits; given back by g.release()
        with component.grant(65536) as g: ...            # in a thread, which is blocked

    Getting it may raise ``GrantTooLarge`` (at once), ``GrantTimeout`` and, in a task that holds
    others in ``async with`` blocks, ``GrantDeadlock``. Cancelled while it
    waits or is delayed, it leaves nothing behind. Giving back never waits and cannot fail.
    """

    __slots__ = ("_growing",)

    @property
    def size(self) -> int:
        """How many bytes it holds now; 0 before and after."""
        return self._size

    @property
    def component(self) -> Component:
        """Whose it is."""
        return self._component

    @property
    def released(self) -> bool:
        """Whether it has been given back."""
        return self._state == RELEASED

    def __repr__(self) -> str:
        state = ("not asked for", "asked for", "held", "held alone", "released")[self._state]
        nbytes = self._size or self._wanted
        return f"<MemoryGrant {self._component.path!r}: {format_size(nbytes)}, {state}>"

    # --- getting it

    def __enter__(self) -> Self:
        if self._begin():
            request = self._request()
            try:
                self._component._limiter._acquire_blocking(request, self._timeout)
            except BaseException:
                self._state = NEW
                raise
            self._hold(request)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._release()

    def _enter(self) -> Coroutine[Any, Any, Self]:
        return self._acquire(current_task())

    def _acquire(self, holder: object = None) -> Coroutine[Any, Any, Self]:
        if self._begin():
            self._holder = holder
            limiter = self._component._limiter
            acquiring: Coroutine[Any, Any, Self] = limiter._acquire(
                self._request(), self._timeout, self
            )
            return acquiring
        if holder is not None:
            self._holder = holder if self._holder in (None, holder) else SEVERAL
        return self._held_already()

    async def _held_already(self) -> Self:
        return self

    def _acquire_nowait(self) -> Self:
        self._begin()
        request = self._request()
        try:
            self._component._limiter._acquire_nowait(request)
        except BaseException:
            self._state = NEW
            raise
        self._hold(request)
        return self

    def _begin(self) -> bool:
        """Note that it is being asked for; False if it is held already."""
        if self._state in (HELD, ALONE):
            return False
        if self._state == RELEASED:
            raise GrantReleased(self._component.path, "entering it again")
        if self._state == ASKED:
            raise RuntimeError("another task is asking for this grant; give each task its own")
        self._component = self._component._resolve()
        self._state = ASKED
        return True

    @property
    def _timeout(self) -> float | None:
        return self._options[1] if self._options else None

    def _request(self, kind: Kind = Kind.GRANT, nbytes: int | None = None) -> Request:
        up_to, _, alone = self._options or (None, None, False)
        grow = kind is Kind.GROW
        return Request(
            self._component._account,
            self._wanted if nbytes is None else nbytes,
            kind,
            up_to=None if grow else up_to,
            held=self._size,
            alone=alone,
            exclusive=self._state == ALONE,
        )

    def _hold(self, request: Request) -> None:
        """Take over what was charged for the request."""
        limiter = self._component._limiter
        with limiter._lock:
            if self._state != RELEASED:
                if self._state == ASKED:
                    self._since = limiter._now()
                    limiter._grants.add(self)
                self._size += request.nbytes
                self._state = ALONE if request.exclusive else HELD
                return
        limiter._give_back(request.account, request.nbytes, exclusive=request.exclusive)
        raise GrantReleased(self._component.path, "grow")

    # --- changing it

    async def grow(self, nbytes: int | str) -> None:
        """Wait for more bytes and add them.

        Goes before new requests of the component, and is never delayed by pressure. Holding
        while waiting can block for good if others do the same: prefer ``up_to=`` or batches.

        Args:
            nbytes: how many more, or ``"64KiB"``.

        Raises:
            GrantReleased: it is not held (any more).
            GrantTooLarge: together with what it holds, it could never be had.
            GrantDeadlock: all who hold memory wait for more, and this is the youngest request.
        """
        request = self._grow_request(nbytes, "grow")
        self._growing = True
        try:
            await self._component._limiter._acquire(request, None)
        finally:
            self._growing = False
        self._hold(request)

    def grow_nowait(self, nbytes: int | str) -> None:
        """Add more bytes if there is room for them now.

        Raises:
            GrantReleased: it is not held (any more).
            GrantTooLarge: together with what it holds, it could never be had.
            QuotaExceeded: there is no room now. Nothing has changed.
        """
        request = self._grow_request(nbytes, "grow_nowait")
        self._component._limiter._acquire_nowait(request)
        self._hold(request)

    def shrink(self, nbytes: int | str) -> None:
        """Give so many bytes back; never waits.

        Raises:
            GrantReleased: it is not held (any more).
            ValueError: it does not hold that much.
        """
        nbytes = parse_size(nbytes, "nbytes")
        limiter = self._changeable_by("shrink")
        account = self._component._account
        with limiter._lock:
            self._held_by("shrink")
            if nbytes > self._size:
                raise ValueError(
                    f"cannot shrink a grant of {format_size(self._size)} by {format_size(nbytes)}"
                )
            self._size -= nbytes
            ordinary = self._state == ALONE and self._size <= limiter._ledger.most(account)
            if ordinary:  # it would have been given so much by the rule: the pool is open again
                self._state = HELD
        limiter._give_back(account, nbytes, exclusive=ordinary)

    def resize(self, nbytes: int | str) -> None:
        """Make it hold so many bytes in all: ``shrink``, or ``grow_nowait`` with its errors."""
        more = parse_size(nbytes, "nbytes") - self._size
        if more > 0:
            self.grow_nowait(more)
        else:
            self.shrink(-more)

    def release(self) -> None:
        """Give everything back, exactly once; from any thread, without waiting.

        Raises:
            GrantReleased: only with ``LimiterSettings(debug=True)``, if it was given back
                before; otherwise that is ignored.
        """
        if self._state == RELEASED:
            limiter = self._component._limiter
            if limiter is not None and limiter.settings.debug:
                raise GrantReleased(self._component.path, "release")
        else:
            self._release()

    def _release(self) -> None:
        state = self._state
        if state == HELD or state == ALONE:
            component = self._component
            limiter = component._limiter
            with limiter._lock:
                if self._state == RELEASED:  # another thread was faster
                    return
                self._state = RELEASED
                size = self._size
                self._size = 0
                self._holder = None
                limiter._grants.discard(self)
                settled = limiter._ledger.give_back(
                    component._account, size, exclusive=state == ALONE
                )
            if settled:
                limiter._wake(settled)
        elif state == NEW:
            self._state = RELEASED

    def _held_by(self, operation: str) -> Any:
        """Give the limiter that it is held from."""
        if self._state == RELEASED:
            raise GrantReleased(self._component.path, operation)
        if self._state < HELD:
            raise RuntimeError(f"{operation}: this grant is not held yet; use `async with` first")
        return self._component._limiter

    def _changeable_by(self, operation: str) -> Any:
        """Give the limiter that it is held from, if no other change of it is under way."""
        limiter = self._held_by(operation)
        if getattr(self, "_growing", False):
            raise RuntimeError(f"{operation}: another task is waiting to grow this grant already")
        return limiter

    def _grow_request(self, nbytes: int | str, operation: str) -> Request:
        self._changeable_by(operation)
        return self._request(Kind.GROW, parse_size(nbytes, "nbytes"))

    def _lost(self) -> None:
        # From the finaliser: in any thread, and inside the limiter's own lock. It only queues.
        self._component._limiter._abandon(
            self._component._account, self._size, self._state == ALONE
        )
        warnings.warn(
            f"{self!r} was never released; it is given back now. Use `async with`, or "
            "release() in a finally block",
            ResourceWarning,
            source=self,
            stacklevel=2,
        )


def make_grant(
    component: Component,
    nbytes: int | str,
    up_to: int | str | None,
    timeout: float | None,
    oversize: Literal["raise", "alone"],
) -> MemoryGrant:
    """Check the options of a grant and make it; nothing is asked for yet."""
    if up_to is None and timeout is None and oversize == "raise":
        return MemoryGrant(component, nbytes)
    nbytes = parse_size(nbytes, "nbytes")
    if up_to is not None:
        up_to = parse_size(up_to, "up_to")
        if up_to < nbytes:
            raise ValueError(
                f"up_to={up_to} is below nbytes={nbytes}; it is the most that is of use"
            )
    if timeout is not None and not (
        isinstance(timeout, (int, float)) and math.isfinite(timeout) and timeout >= 0
    ):
        raise ValueError(f"timeout={timeout!r} must be a finite number of seconds, 0 or more")
    if oversize not in ("raise", "alone"):
        raise ValueError(f'oversize={oversize!r} must be "raise" or "alone"')
    return MemoryGrant(component, nbytes, (up_to, timeout, oversize == "alone"))


def grant(
    nbytes: int | str,
    *,
    up_to: int | str | None = None,
    component: Component | str | None = None,
    timeout: float | None = None,
    oversize: Literal["raise", "alone"] = "raise",
) -> MemoryGrant:
    """Give a grant for the component whose code is running.

    ::

        async with grant(65536): ...


    The component is the one named; else the one whose ``async with`` block this is; else
    ``root`` of the one limiter that the process has entered. With no limiter at all it
    limits nothing and warns once, so that libraries may use grants unconditionally.

    Args:
        nbytes: how much to wait for, or ``"64KiB"``.
        up_to: take as much as the rule allows at that moment, at most this; ``size`` says
            how much it became.
        component: whose it is: a component or its path.
        timeout: the longest time to wait, in seconds.
        oversize: what if it is more than the quota could ever allow: ``"raise"`` raises
            ``GrantTooLarge``; ``"alone"`` waits until no other grant out of the pool is
            held, and then holds the pool alone.

    Raises:
        NoCurrentLimiter: several limiters are entered and none in this context, or none at
            all with ``MEMBOUND_REQUIRED=1``.
        UnknownComponent: there is no component of that path.
        TypeError, ValueError: an argument makes no sense.
    """
    if up_to is None and component is None and timeout is None and oversize == "raise":
        scope = current_scope.get()
        if scope is not None and scope.component._limiter is not None:
            return MemoryGrant(scope.component, nbytes)
    return make_grant(find_component(component), nbytes, up_to, timeout, oversize)


def grant_nowait(
    nbytes: int | str,
    *,
    up_to: int | str | None = None,
    component: Component | str | None = None,
) -> MemoryGrant:
    """Give a grant that is held already, for the component whose code is running.

    Arguments and lookup as in ``grant``. Use it in ``with`` or ``async with``, or
    ``release()`` it.

    Raises:
        QuotaExceeded: there is no room now, or somebody waits already. Nothing has changed.
        GrantTooLarge: it could never be had.
        NoCurrentLimiter, UnknownComponent, TypeError, ValueError: as for ``grant``.
    """
    return make_grant(find_component(component), nbytes, up_to, None, "raise")._acquire_nowait()


def find_component(component: Component | str | None) -> Component:
    """Give the component that a grant is for; see ``grant`` for the lookup and the errors."""
    from .limiter import current_limiter

    if component is None:
        component = current_component()
        if component is not None:
            return component._resolve()
    elif not isinstance(component, str):
        return component._resolve()
    limiter = current_limiter()
    return limiter.root if component is None or limiter.is_noop else limiter.find(component)
