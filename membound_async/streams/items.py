"""Any async iterable, one item at a time under a grant."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterable, AsyncIterator, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import anyio

from membound_async.charges import Charge, belongs_to, measure
from membound_async.context import current_component
from membound_async.grant import MemoryGrant, find_component
from membound_async.sizes import parse_size, size_of

from .memory import MemoryReceiveStream

if TYPE_CHECKING:
    from membound_async.component import Component

__all__ = ["NOTHING", "Bounded", "OneConsumer", "bounded", "close"]

T = TypeVar("T")

NOTHING: Final[Any] = object()
"""In the place of an item where there is none."""


async def close(iterator: object, source: object) -> None:
    """Close an iterator and what it came from, if they can be closed."""
    for part in (iterator,) if iterator is source else (iterator, source):
        aclose = getattr(part, "aclose", None)
        if aclose is not None:
            await aclose()


class OneConsumer(AsyncIterator[T]):
    """An iterator that one task at a time may ask, and that can be closed."""

    _busy = False
    _closed = False

    async def __anext__(self) -> T:
        if self._busy:
            raise anyio.BusyResourceError("reading from")
        if self._closed:
            raise StopAsyncIteration
        self._busy = True
        try:
            item = await self._next()
        finally:
            self._busy = False
            if self._closed:
                self._let_go()
        if self._closed:
            raise StopAsyncIteration
        return item

    async def aclose(self) -> None:
        """Give all bytes back, and close the source if it can be closed.

        The bytes are back at once; what was read but not handed over is lost. Waits for the
        source's ``aclose()``, and for the end of a read that goes on in a task of its own.
        """
        self._closed = True
        self._let_go()
        await self._close_source()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    @abstractmethod
    async def _next(self) -> T: ...

    @abstractmethod
    def _let_go(self) -> None: ...

    @abstractmethod
    async def _close_source(self) -> None: ...


class Bounded(OneConsumer[T]):
    """The items of a source, one at a time, each under a grant; see `bounded`."""

    def __init__(
        self,
        source: AsyncIterable[T],
        *,
        size: Callable[[T], int] | None = None,
        ahead: int | str = 0,
        component: Component | str | None = None,
    ) -> None:
        self._source = source
        self._iterator = aiter(source)
        self._stream = source if isinstance(source, MemoryReceiveStream) else None
        self._size = size
        self._ahead = parse_size(ahead, "ahead")
        self._component = current_component() if component is None else component
        self._grant: MemoryGrant | None = None
        self._item: Any = NOTHING
        """What was read but not handed out yet, because its grant is still waited for."""
        self._nbytes = 0

    async def _next(self) -> T:
        if self._item is NOTHING:
            self._give_back()
            await (self._read() if self._stream is None else self._receive(self._stream))
        grant = self._grant
        try:
            if grant is None:
                self._grant = await Charge(self._owner(), self._nbytes)
            elif grant.size < self._nbytes:
                await grant.grow(self._nbytes - grant.size)
            elif grant.size > self._nbytes:
                grant.shrink(grant.size - self._nbytes)
        except Exception:
            self._let_go()
            raise
        item: T = self._item
        self._item = NOTHING
        return item

    async def _read(self) -> None:
        if self._ahead:
            self._grant = await Charge(self._owner(), self._ahead)
        try:
            item = await self._iterator.__anext__()
            self._nbytes = measure(size_of if self._size is None else self._size, item)
        except BaseException:
            self._give_back()
            raise
        self._item = item

    async def _receive(self, stream: MemoryReceiveStream[T]) -> None:
        try:
            taken = await stream.take()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None
        assert taken is not None
        item, charge = taken
        if belongs_to(charge, self._owner()):
            self._grant = charge
            self._nbytes = charge.size
        else:
            # Never both at a time: one of the two may have to wait for the other.
            self._nbytes = charge.size
            charge.release()
            if self._size is not None:
                self._nbytes = measure(self._size, item)
        self._item = item

    def _owner(self) -> Component:
        component = self._component
        if component is None or isinstance(component, str):
            component = self._component = find_component(component)
        return component

    def _give_back(self) -> None:
        if self._grant is not None:
            self._grant.release()
            self._grant = None

    def _let_go(self) -> None:
        self._item = NOTHING
        self._give_back()

    async def _close_source(self) -> None:
        await close(self._iterator, self._source)


def bounded(
    source: AsyncIterable[T],
    size: Callable[[T], int] | None = None,
    ahead: int | str = 0,
    component: Component | str | None = None,
) -> Bounded[T]:
    """Give the items of any async iterable one at a time, each under a grant.

    ::

        async for chunk in bounded(response.aiter_bytes()): ...

    The grant is held until the next item is asked for, and given back then, at the end, when
    the source raises, at ``aclose()``, and when the iterator is dropped after a ``break``.
    ``async with bounded(source) as items:`` closes the source too, if it can be closed.

    The item is read first and its size asked for then, so that one item at a time is not
    accounted for; ``ahead=`` is for who cannot afford that. One task at a time may iterate;
    if it is cancelled while it waits for memory, the item comes the next time.

    The items of a memory stream (`create_memory_stream`) of the same component keep the
    charge that they came with.

    Args:
        source: what to read.
        size: gives the bytes of an item; None if all are buffers or ``str``
            (``sizes.size_of``), or come from a memory stream, which knows.
            ``sizes.decoded_json`` and ``sizes.deep`` estimate others.
        ahead: bytes to get before each read, or ``"64KiB"``; once it is there, more is
            waited for if the item is larger, and the rest given back if it is smaller.
        component: whose grants these are, or its path; None for the one whose block this
            is, else as for ``grant()`` at the first item.

    Raises:
        TypeError: ``source`` is no async iterable, or an argument makes no sense. From the
            iterator: the size of an item is not known; pass ``size=``.
        ValueError: ``ahead`` or a size makes no sense.
        GrantTooLarge: from the iterator: an item can never be granted. It is left out; the
            next one can be asked for.
        GrantDeadlock: from the iterator: the same, because all who hold memory wait for more,
            this task among them; see ``grow()``.
    """
    return Bounded(source, size=size, ahead=ahead, component=component)
