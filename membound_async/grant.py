"""Grants: bytes that a component may use from now until they are given back."""

from __future__ import annotations

import asyncio
import math
import warnings
from collections.abc import Coroutine, Hashable, Iterable, Mapping
from functools import partial
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from .context import current_component, current_scope
from .eventloop import current_task
from .exceptions import GrantReleased
from .fastpath import ALONE, ASKED, HELD, NEW, RELEASED, GrantState
from .sizes import MAX_BYTES, format_size, parse_size
from .stocks import BYTES
from .waiters import NOTHING, Kind, Request

if TYPE_CHECKING:
    from .component import Component

__all__ = ["MemoryGrant", "Options", "grant", "grant_nowait"]


class Options(NamedTuple):
    """What is asked for besides bytes, and how; a plain grant has None in its place.

    The fast path leaves alone what has any.
    """

    up_to: int | None = None
    timeout: float | None = None
    alone: bool = False
    also: Mapping[str, int] = NOTHING
    sender: Hashable | None = None
    shares: Shares | None = None


class Shares:
    """How many handles of one grant there are that were not released yet."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 1


PLAIN = Options()

SEVERAL = object()
"""The holder of a grant that is shared, or that several tasks have entered: any of them may
give it back."""


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

    __slots__ = ("_changing",)

    @property
    def size(self) -> int:
        """How many bytes it holds now; 0 before and after."""
        return self._size

    @property
    def component(self) -> Component:
        """Whose it is."""
        return self._component

    @property
    def also(self) -> Mapping[str, int]:
        """How much of other resources it holds now."""
        options = self._options
        held = options is not None and self._state in (HELD, ALONE)
        return MappingProxyType(options.also if held and options is not None else NOTHING)

    @property
    def sender(self) -> Hashable | None:
        """On whose behalf it is in flight; None if it is the component's own."""
        return self._options.sender if self._options else None

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

    def _acquire(
        self, holder: object = None, *, has_yielded: bool = False
    ) -> Coroutine[Any, Any, Self]:
        if self._begin():
            self._holder = holder
            limiter = self._component._limiter
            acquiring: Coroutine[Any, Any, Self] = limiter._acquire(
                self._request(), self._timeout, self, has_yielded=has_yielded
            )
            return acquiring
        if holder is not None:
            is_shared = self._options is not None and self._options.shares is not None
            is_its = self._holder in (None, holder) and not is_shared
            self._holder = holder if is_its else SEVERAL
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

    def _acquire_at_once(self) -> bool:
        """Get it if there is nothing to wait for, not even delay."""
        if self._state != NEW or self._component._limiter is None:
            self._begin()
            self._state = NEW
        limiter: Any = self._component._limiter
        if asyncio._get_running_loop() is limiter._loop_token:
            now = limiter._now()
            if now < limiter._calm_until:
                options, settled = self._options or PLAIN, None
                with limiter._lock:
                    ledger, account = limiter._ledger, self._component._account
                    if (
                        options.sender is not None
                        and not options.also
                        and ledger.admit_sent(account, options.sender, self._wanted)
                    ):
                        settled = ()
                    else:
                        settled = ledger.request_at_once(self._request())
                    if settled is not None:
                        self._since, self._size, self._state = now, self._wanted, HELD
                        account.holders.add(self)
                if settled is not None:
                    if settled:
                        limiter._wake(settled)
                    return True
        return False

    def _is_held(self) -> bool:
        return self._state == HELD or self._state == ALONE

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
        return self._options.timeout if self._options else None

    def _request(self) -> Request:
        options = self._options or PLAIN
        component = self._component
        return Request(
            component._account,
            self._wanted,
            also=options.also,
            sender=component._limiter._sender(component._account, options.sender),
            up_to=options.up_to,
            alone=options.alone,
        )

    def _hold(self, request: Request) -> None:
        """Take over what was charged for the request."""
        limiter = self._component._limiter
        with limiter._lock:
            if self._state != RELEASED:
                if self._state == ASKED:
                    self._since = limiter._now()
                    self._component._account.holders.add(self)
                if request.source is None:
                    self._size += request.nbytes
                self._state = ALONE if request.exclusive else HELD
                return
        limiter._give_back(request)
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
            GrantDeadlock: all who hold memory wait for more, none of them can be given any, and
                this task is one of those who have held theirs for the shortest time.
        """
        request = self._grow_request(nbytes, "grow")
        self._changing: Request | None = request
        try:
            await self._component._limiter._acquire(request, None)
        finally:
            self._changing = None
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
            ValueError: it does not hold that much, or it is shared.
        """
        nbytes = parse_size(nbytes, "nbytes")
        limiter = self._changeable_by("shrink")
        with limiter._lock:
            self._part("shrink", nbytes)
            settled = self._shrink(nbytes)
        limiter._wake(settled)

    def _part(self, operation: str, nbytes: int) -> None:
        """Check that so much can be taken out of it; with the lock held."""
        self._held_by(operation)
        if nbytes > self._size:
            raise ValueError(
                f"cannot {operation} a grant of {format_size(self._size)} by {format_size(nbytes)}"
            )

    def _shrink(self, nbytes: int) -> Iterable[Request]:
        limiter, account = self._component._limiter, self._component._account
        self._size -= nbytes
        ordinary = self._state == ALONE and self._size <= limiter._ledger.most(account)
        if ordinary:  # it would have been given so much by the rule: the pool is open again
            self._state = HELD
        sender = limiter._sender(account, self.sender)
        settled: Iterable[Request] = limiter._ledger.give_back(
            account, nbytes, sender=sender, exclusive=ordinary
        )
        return settled

    def resize(self, nbytes: int | str) -> None:
        """Make it hold so many bytes in all: ``shrink``, or ``grow_nowait`` with its errors."""
        more = parse_size(nbytes, "nbytes") - self._size
        if more > 0:
            self.grow_nowait(more)
        else:
            self.shrink(-more)

    def split(self, nbytes: int | str) -> MemoryGrant:
        """Give so many of its bytes as a grant of their own, of the same component.

        Both are to be released. Other resources stay with this one. Nothing is charged or
        given back, and it never waits.

        Raises:
            GrantReleased: it is not held (any more).
            ValueError: it does not hold that much, or it is shared.
        """
        nbytes = parse_size(nbytes, "nbytes")
        limiter = self._changeable_by("split")
        options = None if self.sender is None else Options(sender=self.sender)
        part = MemoryGrant(self._component, nbytes, options)
        with limiter._lock:
            self._part("split", nbytes)
            self._size -= nbytes
            part._become_held(nbytes)
        return part

    def _become_held(self, nbytes: int) -> None:
        """Hold what is charged already; with the lock held."""
        limiter = self._component._limiter
        self._size = nbytes
        self._since = limiter._now()
        self._state = HELD
        self._component._account.holders.add(self)

    async def transfer(self, component: Component | str) -> None:
        """Wait until another component may have what this grant holds, and make it its grant.

        Decided with this grant taken out first, so a component can take over what it could
        not have besides it; meanwhile it stays where it is. Not delayed by pressure. To its
        own component nothing changes, at once. Cancelled, nothing has changed.

        Args:
            component: whose it will be, of the same limiter, or its path.

        Raises:
            GrantReleased: it is not held (any more).
            GrantTooLarge: the other component could never have that much.
            GrantDeadlock: as for ``grow()``.
            ValueError: it is in flight or shared or holds the pool alone.
        """
        target = self._target(component)
        request = self._transfer_request(target, "transfer")
        if target._account is self._component._account:
            return
        if target is self._component:
            return
        self._changing = request
        try:
            await self._component._limiter._acquire(request, None)
        except BaseException:
            self._changing = None
            raise
        self._moved_to(target)

    def transfer_nowait(self, component: Component | str) -> None:
        """Make it the grant of another component, if that may have it now; see ``transfer``.

        Raises:
            GrantReleased: it is not held (any more).
            GrantTooLarge: the other component could never have that much.
            QuotaExceeded: it cannot have that much now. Nothing has changed.
            ValueError: it is in flight or shared or holds the pool alone.
        """
        target = self._target(component)
        request = self._transfer_request(target, "transfer_nowait")
        if target._account is self._component._account:
            return
        if target is self._component:
            return
        self._changing = request
        try:
            self._component._limiter._acquire_nowait(request)
        except BaseException:
            self._changing = None
            raise
        self._moved_to(target)

    def _target(self, component: Component | str) -> Component:
        limiter = self._component._limiter
        target = limiter.find(component) if isinstance(component, str) else component._resolve()
        if target._limiter is not limiter:
            raise ValueError(f"{target!r} belongs to another limiter; release, and ask there")
        return target

    def _transfer_request(self, target: Component, operation: str) -> Request:
        self._changeable_by(operation)
        if self.sender is not None:
            raise ValueError(f"{operation}: it is in flight; deliver() it first")
        if self._state == ALONE:
            raise ValueError(f"{operation}: it holds the pool alone; shrink() it first")
        return Request(
            target._account,
            self._size,
            Kind.GRANT,
            also=(self._options or PLAIN).also,
            source=self._component._account,
        )

    def _moved_to(self, target: Component) -> None:
        with target._limiter._lock:
            self._changing = None
            if self._state != RELEASED:
                self._component._account.holders.discard(self)
                target._account.holders.add(self)
                self._component = target
                self._holder = None  # handed on
                self._options = self._options or PLAIN  # the fast path knows another account
                return
        raise GrantReleased(target.path, "transfer")

    def share(self) -> MemoryGrant:
        """Give another handle of the same bytes; they are given back with the last handle.

        For one message that goes to many: it is charged once. Each handle is released by
        itself, and none can be changed from now on. Never waits.

        Raises:
            GrantReleased: it is not held (any more).
            ValueError: it holds the pool alone.
        """
        limiter = self._held_by("share")
        if getattr(self, "_changing", None) is not None:
            raise RuntimeError("share: another task is waiting to change this grant")
        if self._state == ALONE:
            raise ValueError("share: it holds the pool alone; shrink() it first")
        handle = MemoryGrant(self._component, self._size)
        with limiter._lock:
            self._held_by("share")
            options = self._options or PLAIN
            shares = options.shares or Shares()
            shares.count += 1
            self._options = handle._options = options._replace(shares=shares)
            self._holder = None  # handed on
            handle._become_held(self._size)
        return handle

    def deliver(self, settle: Mapping[str, int] = NOTHING) -> None:
        """Make what is in flight from a sender the component's own; never waits.

        The sender's part is free again. Nothing is drawn from the pool for it.

        Args:
            settle: how much there really is of resources that were charged at an upper
                bound; the rest is given back. 0 gives all of it back.

        Raises:
            GrantReleased: it is not held (any more).
            ValueError: it is not in flight, is shared, or ``settle`` exceeds what it holds.
        """
        self._changeable_by("deliver")
        if self.sender is None:
            raise ValueError("deliver: it is not in flight")
        self._settle(settle)

    def _deliver_at_once(self) -> bool:
        """Deliver it if it is of bytes only, and nobody waits; else do nothing, give False."""
        options, component = self._options, self._component
        if options is None or options.sender is None or options.shares is not None:
            return False
        limiter = component._limiter
        with limiter._lock:
            if self._state == HELD and limiter._ledger.deliver_at_once(
                component._account, options.sender, self._size
            ):
                self._options = None
                return True
        return False

    def _settle(self, settle: Mapping[str, int]) -> None:
        """Deliver it if it is in flight, and give back what is beyond these amounts."""
        options = self._options or PLAIN
        if options.shares is not None:
            return
        also = options.also
        left = also
        over: Mapping[str, int] = NOTHING
        if settle:
            kept = dict(also)
            for resource, amount in settle.items():
                if not 0 <= amount <= also.get(resource, 0):
                    raise ValueError(
                        f"deliver: cannot settle {amount} {resource}; it holds "
                        f"{also.get(resource, 0)}"
                    )
                kept[resource] = amount
            over = {name: amount - kept[name] for name, amount in also.items()}
            left = {name: amount for name, amount in kept.items() if amount}
        if options.sender is None and not also:
            return
        limiter, account = self._component._limiter, self._component._account
        with limiter._lock:
            self._held_by("deliver")
            self._options = options._replace(sender=None, also=left)
            if options.sender is None:
                settled = limiter._ledger.give_back(account, 0, also=over)
            else:
                sender = limiter._ledger.sender(account, options.sender)
                settled = limiter._ledger.deliver(account, self._size, also, sender, over)
        if settled:
            limiter._wake(settled)

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
            if limiter._is_inside():
                self._state = RELEASED  # so that it is not lost as well
                limiter._do_later(partial(self._release_late, state))
                return
            with limiter._lock:
                if self._state == RELEASED:  # another thread was faster
                    return
                self._state = RELEASED
                size = self._size
                self._size = 0
                self._holder = None
                account = component._account
                account.holders.discard(self)
                changing = getattr(self, "_changing", None)
                transfer = changing is not None and changing.source is not None
                if transfer:
                    account = limiter._ledger.end_transfer(changing)
                if self._options is None:
                    settled = limiter._ledger.give_back(account, size, exclusive=state == ALONE)
                else:
                    settled = limiter._let_go_of(account, size, state == ALONE, self._options)
                if transfer:
                    settled = [*settled, changing]
            if settled:
                limiter._wake(settled)
        elif state == NEW:
            self._state = RELEASED

    def _release_late(self, state: int) -> None:
        self._state = state
        self._release()

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
        if getattr(self, "_changing", None) is not None:
            raise RuntimeError(f"{operation}: another task is waiting to change this grant already")
        if self._options is not None and self._options.shares is not None:
            raise ValueError(f"{operation}: it is shared, and others rely on it as it is")
        return limiter

    def _grow_request(self, nbytes: int | str, operation: str) -> Request:
        limiter = self._changeable_by(operation)
        nbytes = parse_size(nbytes, "nbytes")
        options = self._options or PLAIN
        account = self._component._account
        sender = limiter._sender(account, options.sender)
        return Request(
            account,
            nbytes,
            Kind.GROW if sender is None else Kind.GRANT,
            sender=sender,
            held=self._size,
            alone=options.alone,
            exclusive=self._state == ALONE,
        )

    def _lost(self) -> None:
        # From the finaliser: in any thread, and inside the limiter's own lock. It only queues.
        self._component._limiter._abandon(self)
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
    *,
    up_to: int | str | None = None,
    timeout: float | None = None,
    oversize: Literal["raise", "alone"] = "raise",
    also: Mapping[str, int] = NOTHING,
    sender: Hashable | None = None,
) -> MemoryGrant:
    """Check the options of a grant and make it; nothing is asked for yet."""
    if up_to is None and timeout is None and oversize == "raise" and not also and sender is None:
        return MemoryGrant(component, nbytes)
    nbytes = parse_size(nbytes, "nbytes")
    hash(sender)  # raises TypeError
    if up_to is not None:
        up_to = parse_size(up_to, "up_to")
        if up_to < nbytes:
            raise ValueError(
                f"up_to={up_to} is below nbytes={nbytes}; it is the most that is of use"
            )
        if sender is not None:
            raise ValueError("up_to= is for a component's own grants, not for a sender's")
    if timeout is not None and not (
        isinstance(timeout, (int, float)) and math.isfinite(timeout) and timeout >= 0
    ):
        raise ValueError(f"timeout={timeout!r} must be a finite number of seconds, 0 or more")
    if oversize not in ("raise", "alone"):
        raise ValueError(f'oversize={oversize!r} must be "raise" or "alone"')
    if oversize == "alone" and (also or sender is not None):
        raise ValueError('oversize="alone" is for bytes of a component itself, and nothing else')
    options = Options(up_to, timeout, oversize == "alone", check_amounts(component, also), sender)
    return MemoryGrant(component, nbytes, options)


def check_amounts(component: Component, also: Mapping[str, int]) -> Mapping[str, int]:
    """Give amounts of resources besides bytes, as they are charged.

    Raises:
        TypeError, ValueError: an amount makes no sense, or nothing limits that resource.
    """
    if not also:
        return NOTHING
    node = component._resolve()
    limiter = node._limiter
    amounts: dict[str, int] = {}
    for resource, amount in also.items():
        if type(amount) is not int or not 0 <= amount <= MAX_BYTES:
            raise ValueError(f"{resource}={amount!r} must be a whole number, 0 or more")
        if resource == BYTES or not limiter._ledger.knows(node._account, resource):
            known = sorted({*limiter._ledger.pools, *node._account.others} - {BYTES})
            if limiter.is_noop and resource != BYTES:
                continue
            raise ValueError(
                f"nothing limits {resource!r} of {node.path!r} (limited: "
                f"{', '.join(known) or 'bytes only'}); give the limiter or the component a limit "
                "of it, ResourceLimits(...)"
            )
        if amount:
            amounts[resource] = amount
    return amounts


def grant(
    nbytes: int | str,
    *,
    up_to: int | str | None = None,
    component: Component | str | None = None,
    sender: Hashable | None = None,
    timeout: float | None = None,
    oversize: Literal["raise", "alone"] = "raise",
    also: Mapping[str, int] = NOTHING,
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
        sender: on whose behalf the component takes it in: any hashable name. Senders divide
            what the component may have by the same rule, each in a line of its own; see
            `Inbox`.
        timeout: the longest time to wait, in seconds.
        oversize: what if it is more than the quota could ever allow: ``"raise"`` raises
            ``GrantTooLarge``; ``"alone"`` waits until no other grant out of the pool is
            held, and then holds the pool alone.
        also: how much of other resources that the limiter or the component limits, such as
            ``{"fds": 2}``. All of it is given at once, or nothing.

    Raises:
        NoCurrentLimiter: several limiters are entered and none in this context, or none at
            all with ``MEMBOUND_REQUIRED=1``.
        UnknownComponent: there is no component of that path.
        TypeError, ValueError: an argument makes no sense.
    """
    if (
        up_to is None
        and component is None
        and timeout is None
        and oversize == "raise"
        and not also
        and sender is None
    ):
        scope = current_scope.get()
        if scope is not None and scope.component._limiter is not None:
            return MemoryGrant(scope.component, nbytes)
    return make_grant(
        find_component(component),
        nbytes,
        up_to=up_to,
        timeout=timeout,
        oversize=oversize,
        also=also,
        sender=sender,
    )


def grant_nowait(
    nbytes: int | str,
    *,
    up_to: int | str | None = None,
    component: Component | str | None = None,
    sender: Hashable | None = None,
    also: Mapping[str, int] = NOTHING,
) -> MemoryGrant:
    """Give a grant that is held already, for the component whose code is running.

    Arguments and lookup as in ``grant``. Use it in ``with`` or ``async with``, or
    ``release()`` it.

    Raises:
        QuotaExceeded: there is no room now, or somebody waits already. Nothing has changed.
        GrantTooLarge: it could never be had.
        NoCurrentLimiter, UnknownComponent, TypeError, ValueError: as for ``grant``.
    """
    made = make_grant(find_component(component), nbytes, up_to=up_to, also=also, sender=sender)
    return made._acquire_nowait()


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
