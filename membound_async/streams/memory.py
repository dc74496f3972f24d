"""A channel between tasks that is bounded in bytes: an inbox with one sender."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Hashable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import anyio
import anyio.abc

from membound_async.charges import check_count
from membound_async.exceptions import QuotaExceeded
from membound_async.grant import MemoryGrant
from membound_async.inbox import Inbox, InboxStatistics

if TYPE_CHECKING:
    from membound_async.component import Component

__all__ = ["MemoryReceiveStream", "MemorySendStream", "create_memory_stream"]

T = TypeVar("T")

_numbers = itertools.count(1)
"""What tells the streams of one component apart, as senders to it."""


class _End:
    """What both ends of a stream have in common: they are closed, and warn if they are not."""

    _closed = True
    _inbox: Inbox[Any]

    def close(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        """Close it; the same as ``close()``."""
        self.close()

    def statistics(self) -> InboxStatistics:
        """Give a snapshot of what goes on in the stream."""
        return self._inbox.statistics()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:
            self._dropped()
            warnings.warn(
                f"Unclosed <{type(self).__name__} at {id(self):x}>",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    def _dropped(self) -> None:
        """Do what a finaliser may of what closing does."""


class MemorySendStream(_End, anyio.abc.ObjectSendStream[T]):
    """The end of a memory stream or inbox that items are put in at.

    See `create_memory_stream` and `Inbox.send_stream`.
    """

    def __init__(self, inbox: Inbox[T], sender: Hashable | None) -> None:
        self._inbox = inbox
        self._sender = sender
        self._closed = False
        inbox._open_send_streams += 1
        inbox._ended = False

    async def send(self, item: T) -> None:
        """Wait until the receiving component may have the item's bytes, and send it.

        Cancelled, it has sent nothing.

        Raises:
            GrantTooLarge: a sender to the component can never have that much in flight.
            GrantDeadlock: all who hold memory wait for more, this task among them; see ``grow()``.
            TypeError, ValueError: the size of the item is not known or makes no sense.
            anyio.ClosedResourceError: this stream is closed, or was closed meanwhile.
            anyio.BrokenResourceError: all receive streams are closed, or were meanwhile.
        """
        inbox = self._inbox
        await inbox._turn(always=True)
        inbox._check_end(self)
        charge = inbox._charge(item, self._sender, None, None, {})
        if not inbox._send_at_once(item, charge):
            await inbox._send(self, item, charge)

    def send_nowait(self, item: T) -> None:
        """Send an item if the receiving component may have its bytes now.

        Raises:
            anyio.WouldBlock: it may not, somebody waits already, or it is full.
            GrantTooLarge, TypeError, ValueError: as for ``send()``.
            anyio.ClosedResourceError: this stream is closed.
            anyio.BrokenResourceError: all receive streams are closed.
        """
        self._inbox._check_end(self)
        try:
            self._inbox.send_nowait(item, sender=self._sender)
        except QuotaExceeded:
            raise anyio.WouldBlock from None

    def clone(self) -> MemorySendStream[T]:
        """Give another end of the same stream, to be closed by itself.

        Raises:
            anyio.ClosedResourceError: this one is closed.
        """
        if self._closed:
            raise anyio.ClosedResourceError
        return MemorySendStream(self._inbox, self._sender)

    def close(self) -> None:
        """Close it without waiting; receivers get what is left, and then the end."""
        if not self._closed:
            self._closed = True
            inbox = self._inbox
            inbox._open_send_streams -= 1
            if not inbox._open_send_streams:
                inbox._ended = True
                inbox._tell_end()
            inbox._end_sending(self)


class MemoryReceiveStream(_End, anyio.abc.ObjectReceiveStream[T]):
    """The end of a memory stream or inbox that items come out of.

    See `create_memory_stream` and `Inbox.receive_stream`.
    """

    _last: MemoryGrant | None = None
    """What is charged for the item that was received last."""

    def __init__(self, inbox: Inbox[T]) -> None:
        self._inbox = inbox
        self._closed = False
        inbox._open_receive_streams += 1

    async def receive(self) -> T:
        """Wait for an item; the one before it is given back at once.

        Cancelled, it leaves the item to others.

        Raises:
            anyio.ClosedResourceError: this stream is closed, or was closed meanwhile.
            anyio.EndOfStream: nothing is left, and all send streams are closed.
        """
        self._give_back()
        await self._inbox._turn()
        taken = await self.take()
        assert taken is not None
        return self._keep(taken)

    def receive_nowait(self) -> T:
        """Give an item that is there already; the one before it is given back in any case.

        Raises:
            anyio.WouldBlock: there is none.
            anyio.ClosedResourceError: this stream is closed.
            anyio.EndOfStream: nothing is left, and all send streams are closed.
        """
        self._give_back()
        self._check_open()
        received = self._inbox.receive_nowait()
        return self._keep((received.message, received.grant))

    async def take(self, *, holding: Component | None = None) -> tuple[T, MemoryGrant] | None:
        """Wait for an item and its charge, which the caller has to release; for iterators.

        Args:
            holding: whose memory the caller holds: give None rather than have others wait
                for that, or for what the receiving component has.
        """
        self._check_open()
        received = await self._inbox._take(self, holding)
        return None if received is None else (received.message, received.grant)

    def _check_open(self) -> None:
        if self._closed:
            raise anyio.ClosedResourceError

    def _keep(self, taken: tuple[T, MemoryGrant]) -> T:
        self._give_back()
        item, grant = taken
        if self._closed:
            grant._release()
        else:
            self._last = grant
        return item

    def _give_back(self) -> None:
        if self._last is not None:
            self._last._release()
            self._last = None

    def clone(self) -> MemoryReceiveStream[T]:
        """Give another end of the same stream, to be closed by itself.

        Raises:
            anyio.ClosedResourceError: this one is closed.
        """
        self._check_open()
        return MemoryReceiveStream(self._inbox)

    def close(self) -> None:
        """Close it without waiting, and give back what it received last.

        With the last one, what is left in the stream is dropped and given back, and senders
        get ``BrokenResourceError``.
        """
        if not self._closed:
            self._closed = True
            inbox = self._inbox
            inbox._open_receive_streams -= 1
            inbox._end_receiving(self)
            self._give_back()
            if not inbox._open_receive_streams:
                inbox.close()

    def _dropped(self) -> None:
        # Finalisers of charges may run anywhere; releasing them may not.
        self._closed = True
        inbox = self._inbox
        inbox._open_receive_streams -= 1
        if not inbox._open_receive_streams:
            inbox._closed = True
            inbox._buffer.clear()
            inbox._wake_senders_soon()


class create_memory_stream(  # noqa: N801
    tuple[MemorySendStream[T], MemoryReceiveStream[T]]
):
    """Make a channel between tasks that is bounded in bytes, by its receiver's quota.

    ::

        send, receive = create_memory_stream[bytes](component=decoding)

    Both ends are used and closed like those of ``anyio.create_memory_object_stream``. It is
    an `Inbox` that has one sender, the stream. So an item is charged to the *receiving*
    component before it is sent, and what is in flight is at the most half of what the
    component may have: it can still get grants of its own to work with. An item stays
    charged until the receive stream is asked for the next one, or is closed; what is left in
    the stream when its last receive stream goes is given back.

    Args:
        size: gives the bytes of an item; None if all are buffers or ``str``, see
            ``sizes.size_of``.
        component: whose quota it is, the receiver's, or its path; None for the one in whose
            block this is called, else ``root`` of the limiter that is current at the first
            item. Where there is no limiter, nothing is bounded but ``max_items``.
        max_items: how many items it may hold besides.

    Returns:
        The send stream and the receive stream.

    Raises:
        ValueError: ``max_items`` is not 1 or more.
        UnknownComponent: there is no component of that path.
    """

    __slots__ = ()

    def __new__(
        cls,
        size: Callable[[T], int] | None = None,
        component: Component | str | None = None,
        max_items: float = math.inf,
    ) -> Self:
        """Make both ends."""
        check_count(max_items, "max_items")
        inbox = Inbox[T](component, size=size, max_messages=max_items)
        return super().__new__(
            cls, (inbox.send_stream(f"stream {next(_numbers)}"), inbox.receive_stream())
        )
