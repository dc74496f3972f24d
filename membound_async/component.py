"""Components: the named parts of a program that use memory."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from .bounds import MemoryBoundsBuilder, split_path, subpath
from .context import Scope, current_scope
from .exceptions import TrackingError
from .grant import MemoryGrant, make_grant
from .live import enter_group
from .waiters import NOTHING

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable
    from typing import TypeVar

    from .limiter import MemoryLimiter
    from .statistics import ComponentStatistics
    from .streams import Batches

    T = TypeVar("T")

__all__ = ["Component"]


class Component:
    """A named part of the program: whose minimum is reserved, and whose grants are counted.

    An async context manager. ``async with component:`` waits until its minimum can be
    reserved; tasks started inside belong to it, and where allocations are tracked (see
    ``membound_async.allocator``) what their code allocates counts as its live bytes. Many
    tasks may be in it at once; the last to leave gives up the minimum. Leaving never waits.
    Cancelled while entering, it is not entered and nothing is reserved.

    Quick form: ``limiter.component("decode", minimum="8MiB", firm_limit="64MiB")``. For
    bounds that say why, subclass it and give it to ``limiter.add()``, or just enter it where
    a limiter is current::

        class Decoder(Component):
            def specify_bounds(self, b: MemoryBoundsBuilder) -> None:
                b.minimum.fixed("input buffer", "8MiB")

    Where no limiter is entered, a component limits nothing.

    Args:
        path: its dotted path, ``"ingest.decode"``.

    Raises:
        InvalidComponentBounds: no component can have that path.
    """

    _limiter: Any = None
    """The ``MemoryLimiter`` it belongs to; None until it is first used with one."""
    _account: Any = None

    def __init__(self, path: str) -> None:
        split_path(path)
        self.path = path

    def specify_bounds(self, b: MemoryBoundsBuilder, /) -> None:
        """Declare what it needs; nothing, unless a subclass says otherwise."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path!r}>"

    # --- grants

    def grant(
        self,
        nbytes: int | str,
        *,
        up_to: int | str | None = None,
        sender: Hashable | None = None,
        timeout: float | None = None,
        oversize: Literal["raise", "alone"] = "raise",
        also: Mapping[str, int] = NOTHING,
    ) -> MemoryGrant:
        """Give a grant of this component: ``async with component.grant(n): ...``.

        Args:
            nbytes: how much to wait for, or ``"64KiB"``.
            up_to: take as much as the rule allows at that moment, at most this.
            sender: on whose behalf, see ``membound_async.grant``.
            timeout: the longest time to wait, in seconds.
            oversize: what if it is more than the quota could ever allow: ``"raise"`` or
                ``"alone"``, see ``membound_async.grant``.
            also: how much of other resources, see ``membound_async.grant``.

        Raises:
            TypeError, ValueError: an argument makes no sense.
        """
        if (
            up_to is None
            and timeout is None
            and oversize == "raise"
            and not also
            and sender is None
        ):
            return MemoryGrant(self, nbytes)
        return make_grant(
            self,
            nbytes,
            up_to=up_to,
            timeout=timeout,
            oversize=oversize,
            also=also,
            sender=sender,
        )

    def grant_nowait(
        self,
        nbytes: int | str,
        *,
        up_to: int | str | None = None,
        sender: Hashable | None = None,
        also: Mapping[str, int] = NOTHING,
    ) -> MemoryGrant:
        """Give a grant of this component that is held already.

        Raises:
            QuotaExceeded: there is no room now, or somebody waits already. Nothing has
                changed.
            GrantTooLarge: it could never be had.
            TypeError, ValueError: an argument makes no sense.
        """
        return make_grant(self, nbytes, up_to=up_to, also=also, sender=sender)._acquire_nowait()

    def batches(
        self,
        source: AsyncIterable[T],
        *,
        size: Callable[[T], int] | None = None,
        max_items: int | None = None,
        max_seconds: float | None = None,
    ) -> Batches[T]:
        """Give the items of ``source`` in lists, each under one grant of this component.

        See ``membound_async.streams.Batches``.
        """
        from .streams import Batches

        return Batches(
            source, component=self, size=size, max_items=max_items, max_seconds=max_seconds
        )

    # --- the tree

    def component(
        self, name: str, minimum: int | str = 0, firm_limit: int | str | None = None
    ) -> Component:
        """Give the component of that name in this one, the same one each time.

        It is a consumer of its own; see ``MemoryLimiter.component``. Without a limiter it
        is one that limits nothing.
        """
        limiter = self._resolve()._limiter
        found: Component = limiter.component(subpath(self.path, name), minimum, firm_limit)
        return found

    def statistics(self) -> ComponentStatistics:
        """Give a snapshot of what it has, needs and waits for."""
        node = self._resolve()
        found: ComponentStatistics = node._limiter._component_statistics(node._account)
        return found

    # --- entering and leaving

    async def __aenter__(self) -> Self:
        """Wait until its minimum can be reserved, and reserve it, once for all who are in it.

        Does not wait where that is done already, or where there is no minimum. Cancelled while
        it waits, it reserves nothing.

        Raises:
            InsufficientMinimumMemory, FirmLimitExceedsAvailable, InvalidComponentBounds: the
                declared bounds do not fit, and the limiter's mode is ``"strict"``.
            GrantTooLarge: the minimum exceeds what there can be, in that mode.
            GrantDeadlock: all who hold memory wait for more, this task among them; see ``grow()``.
            ReclaimReentry: called from a reclaimer that is to give memory back.
            LimitError: the limiter is in use by another event loop.
        """
        node = self._resolve()
        await node._limiter._enter(node)
        current_scope.set(Scope(self, current_scope.get(), enter_group(self.path)))
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        scope = current_scope.get()
        if scope is not None and scope.component is self:
            current_scope.set(scope.outer)
            if scope.allocations is not None:
                with suppress(TrackingError):  # left in another context than it was entered in
                    scope.allocations.__exit__(None, None, None)
        node = self._resolve()
        node._limiter._leave(node)

    def _resolve(self) -> Component:
        """Give the component that is charged: this one, once it belongs to a limiter."""
        if self._limiter is not None:
            return self
        from .limiter import current_limiter

        limiter: MemoryLimiter = current_limiter(besides=self)
        return limiter._adopt(self)
