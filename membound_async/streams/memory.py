"""A channel between tasks that is bounded in bytes."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Self, TypeVar

import anyio
import anyio.abc
import anyio.lowlevel

from membound_async.context import current_component
from membound_async.exceptions import GrantTimeout, QuotaExceeded
from membound_async.grant import find_component
from membound_async.limiter import current_limiter
from membound_async.sizes import size_of
from membound_async.waiters import Request

from .charges import Charge, available_to, check_count, measure

if TYPE_CHECKING:
    from membound_async.component import Component

__all__ = [
    "MemoryReceiveStream",
    "MemorySendStream",
    "MemoryStreamStatistics",
    "create_memory_stream",
]

T = TypeVar("T")

_LOOK_AGAIN_SECONDS = 0.25
"""How often a sender that waits for memory looks for what others have given back."""


class MemoryStreamStatistics(NamedTuple):
    """What goes on in a memory stream; the first six are those of anyio's."""

    current_buffer_used: int  #: how many items are in it
    max_buffer_size: float  #: how many there may be (or ``math.inf``)
    open_send_streams: int  #: how many clones of the send stream are open
    open_receive_streams: int  #: how many clones of the receive stream are open
    tasks_waiting_send: int  #: how many tasks wait in ``send()``
    tasks_waiting_receive: int  #: how many tasks wait in ``receive()``
    charged_bytes: int  #: granted for what is in it, and for what was received from it last


class _InFlight(Charge):
    """What is charged for an item of a memory stream, from sending to its being let go."""

    __slots__ = ("_channel", "_in_flight")

    _channel: _Channel[Any]
    _in_flight: int

    def sent_into(self, channel: _Channel[Any]) -> Self:
        """Count it as in flight; it is held now."""
        self._channel = channel
        self._in_flight = self._size
        channel.in_flight += self._size
        return self

    def _release(self) -> None:
        super()._release()
        in_flight, self._in_flight = self._in_flight, 0
        self._channel.give_back(in_flight)

    def _lost(self) -> None:
        super()._lost()
        loop = self._component._limiter._loop
        if loop is not None:
            loop.call_soon(partial(self._channel.give_back, self._in_flight))


class _Sender:
    """Somebody who waits to send: for a turn, for a place, or for memory."""

    def __init__(self, stream: MemorySendStream[Any]) -> None:
        self.stream = stream
        self.scope = anyio.CancelScope()
        self.called: anyio.Event | None = None


class _Receiver(Generic[T]):
    """Somebody who waits to receive."""

    def __init__(self, stream: MemoryReceiveStream[T], patient: bool) -> None:
        self.stream = stream
        self.patient = patient
        """False if it would rather get nothing than wait for a sender that lacks memory."""
        self.told = anyio.Event()
        self.taken: tuple[T, _InFlight] | None = None
        self.dry = False


class _Channel(Generic[T]):
    """What the ends of a memory stream share.

    Senders are served in order. Only the first asks for memory, and it waits for it in the
    limiter only if nothing is in flight. Else it waits here, for what is in flight to be let
    go, and sends no more than it leaves to the component (bus1: a sender may have half of
    what is left of the receiver's quota):

        in flight + c <= (available + in flight) / 2    <=>    in flight + 2 * c <= available

    Otherwise those who send would take all that the receiver needs to work off what they
    have sent, or stand before it in the component's queue: nobody could ever go on.
    """

    def __init__(
        self,
        size: Callable[[T], int] | None,
        component: Component | str | None,
        max_items: float,
    ) -> None:
        self.size = size_of if size is None else size
        self.max_items = max_items
        self.buffer: deque[tuple[T, _InFlight]] = deque()
        self.in_flight = 0
        self.senders: dict[_Sender, None] = {}
        self.receivers: dict[_Receiver[T], None] = {}
        self.open_send_streams = self.open_receive_streams = 0
        self.is_dry = False
        """Whether the first sender waits for memory."""
        if component is None:
            self._component = current_component()
        else:
            self._component = find_component(component) if isinstance(component, str) else component

    # --- memory

    def admit_at_once(self, nbytes: int) -> _InFlight | None:
        """Give the grant of an item if there is nothing at all to wait for, not even delay."""
        component = self._receiving()
        if not self._is_free() or not self._leaves_room(component, nbytes):
            return None
        grant = _InFlight(component, nbytes)
        waiting = grant.__await__()
        try:
            next(waiting)
        except StopIteration:
            return grant.sent_into(self)
        waiting.close()
        return None

    async def admit(self, sender: _Sender, nbytes: int) -> _InFlight:
        """Wait for a turn, for a place and for the grant of an item."""
        component = self._receiving()
        while True:
            lacks_memory = False
            if sender is next(iter(self.senders)) and len(self.buffer) < self.max_items:
                if self._leaves_room(component, nbytes):
                    try:
                        return await self._ask(component, nbytes, timeout=0.0)
                    except GrantTimeout:
                        pass  # somebody else was faster
                if not self.in_flight:
                    with self._dry(True):
                        return await self._ask(component, nbytes)
                self._check_possible(component, nbytes)
                lacks_memory = True
            sender.called = anyio.Event()
            # Nobody tells when memory comes back that is not in flight here.
            patience = _LOOK_AGAIN_SECONDS if lacks_memory else math.inf
            with self._dry(lacks_memory), anyio.move_on_after(patience):
                await sender.called.wait()

    def admit_nowait(self, nbytes: int) -> _InFlight:
        """Give the grant of an item if it can be had at once, else raise ``WouldBlock``."""
        component = self._receiving()
        if not self._is_free():
            raise anyio.WouldBlock
        if not self._leaves_room(component, nbytes):
            self._check_possible(component, nbytes)
            raise anyio.WouldBlock
        try:
            return _InFlight(component, nbytes)._acquire_nowait().sent_into(self)
        except QuotaExceeded:
            raise anyio.WouldBlock from None

    def give_back(self, nbytes: int) -> None:
        """Note that something in flight was let go."""
        self.in_flight -= nbytes
        self.call_next_sender()

    def _receiving(self) -> Component:
        component = self._component
        if component is None:
            limiter = current_limiter()
            component = limiter.root
            if not limiter.is_noop:
                self._component = component
        return component._resolve()

    async def _ask(
        self, component: Component, nbytes: int, timeout: float | None = None
    ) -> _InFlight:
        options = None if timeout is None else (None, timeout, False)
        return (await _InFlight(component, nbytes, options)).sent_into(self)

    def _is_free(self) -> bool:
        return not self.senders and len(self.buffer) < self.max_items

    def _leaves_room(self, component: Component, nbytes: int) -> bool:
        wanted = self.in_flight + 2 * nbytes if self.in_flight else nbytes
        return wanted <= available_to(component)

    @staticmethod
    def _check_possible(component: Component, nbytes: int) -> None:
        refusal = component._limiter._ledger.refusal(Request(component._account, nbytes))
        if refusal is not None:
            raise refusal

    # --- items

    def put(self, item: T, grant: _InFlight) -> None:
        """Give an item to who has waited longest, else keep it."""
        receiver = next(iter(self.receivers), None)
        if receiver is None:
            self.buffer.append((item, grant))
        else:
            self._hand_over(receiver, (item, grant))

    def put_back(self, taken: tuple[T, _InFlight]) -> None:
        """Take back an item from who was cancelled before getting it."""
        receiver = next(iter(self.receivers), None)
        if receiver is not None:
            self._hand_over(receiver, taken)
        elif self.open_receive_streams:
            self.buffer.appendleft(taken)
        else:
            taken[1].release()

    def _hand_over(self, receiver: _Receiver[T], taken: tuple[T, _InFlight]) -> None:
        del self.receivers[receiver]
        receiver.taken = taken
        receiver.told.set()

    @contextmanager
    def _dry(self, lacks_memory: bool) -> Generator[None]:
        """Say meanwhile that the first sender waits for memory, if it does."""
        if not lacks_memory:
            yield
            return
        self.is_dry = True
        for receiver in [each for each in self.receivers if not each.patient]:
            del self.receivers[receiver]
            receiver.dry = True
            receiver.told.set()
        try:
            yield
        finally:
            self.is_dry = False

    # --- who waits

    def call_next_sender(self) -> None:
        """Have the first sender look again."""
        sender = next(iter(self.senders), None)
        if sender is not None and sender.called is not None:
            sender.called.set()

    def send_off(self, stream: MemorySendStream[T] | None = None) -> None:
        """End the waits of a send stream, or of all."""
        for sender in self.senders:
            if stream is None or sender.stream is stream:
                sender.scope.cancel()

    def send_home(self, stream: MemoryReceiveStream[T] | None = None) -> None:
        """End the waits of a receive stream, or of all, with nothing."""
        for receiver in [each for each in self.receivers if stream in (None, each.stream)]:
            del self.receivers[receiver]
            receiver.told.set()

    def statistics(self) -> MemoryStreamStatistics:
        """Give a snapshot."""
        return MemoryStreamStatistics(
            len(self.buffer),
            self.max_items,
            self.open_send_streams,
            self.open_receive_streams,
            len(self.senders),
            len(self.receivers),
            self.in_flight,
        )


class MemorySendStream(anyio.abc.ObjectSendStream[T]):
    """The end of a memory stream that items are put in at; see `create_memory_stream`."""

    _closed = True

    def __init__(self, channel: _Channel[T]) -> None:
        self._channel = channel
        self._closed = False
        channel.open_send_streams += 1

    async def send(self, item: T) -> None:
        """Wait until the receiving component may have the item's bytes, and send it.

        Cancelled, it has sent nothing.

        Raises:
            GrantTooLarge: the receiving component can never have that much.
            TypeError, ValueError: the size of the item is not known or makes no sense.
            anyio.ClosedResourceError: this stream is closed, or was closed meanwhile.
            anyio.BrokenResourceError: all receive streams are closed, or were meanwhile.
        """
        await anyio.lowlevel.checkpoint()
        self._check_open()
        channel = self._channel
        nbytes = measure(channel.size, item)
        grant = channel.admit_at_once(nbytes)
        if grant is None:
            grant = await self._wait_to_send(nbytes)
        channel.put(item, grant)

    async def _wait_to_send(self, nbytes: int) -> _InFlight:
        channel = self._channel
        grant = None
        sender = _Sender(self)
        channel.senders[sender] = None
        try:
            with sender.scope:  # which closing cancels
                grant = await channel.admit(sender, nbytes)
        finally:
            del channel.senders[sender]
            channel.call_next_sender()
        try:
            self._check_open()
        except BaseException:
            if grant is not None:
                grant.release()
            raise
        assert grant is not None
        return grant

    def send_nowait(self, item: T) -> None:
        """Send an item if the receiving component may have its bytes now.

        Raises:
            anyio.WouldBlock: it may not, somebody waits already, or ``max_items`` are there.
            GrantTooLarge, TypeError, ValueError: as for ``send()``.
            anyio.ClosedResourceError: this stream is closed.
            anyio.BrokenResourceError: all receive streams are closed.
        """
        self._check_open()
        channel = self._channel
        channel.put(item, channel.admit_nowait(measure(channel.size, item)))

    def _check_open(self) -> None:
        if self._closed:
            raise anyio.ClosedResourceError
        if not self._channel.open_receive_streams:
            raise anyio.BrokenResourceError

    def clone(self) -> MemorySendStream[T]:
        """Give another end of the same stream, to be closed by itself.

        Raises:
            anyio.ClosedResourceError: this one is closed.
        """
        if self._closed:
            raise anyio.ClosedResourceError
        return MemorySendStream(self._channel)

    def close(self) -> None:
        """Close it without waiting; receivers get what is left, and then the end."""
        if not self._closed:
            self._closed = True
            channel = self._channel
            channel.open_send_streams -= 1
            if not channel.open_send_streams:
                channel.send_home()
            channel.send_off(self)

    async def aclose(self) -> None:
        """Close it; the same as ``close()``."""
        self.close()

    def statistics(self) -> MemoryStreamStatistics:
        """Give a snapshot of what goes on in the stream."""
        return self._channel.statistics()

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
            _warn_unclosed(self)


class MemoryReceiveStream(anyio.abc.ObjectReceiveStream[T]):
    """The end of a memory stream that items come out of; see `create_memory_stream`."""

    _closed = True
    _last: _InFlight | None = None
    """What is charged for the item that was received last."""

    def __init__(self, channel: _Channel[T]) -> None:
        self._channel = channel
        self._closed = False
        channel.open_receive_streams += 1

    async def receive(self) -> T:
        """Wait for an item; the one before it is given back at once.

        Cancelled, it leaves the item to others.

        Raises:
            anyio.ClosedResourceError: this stream is closed, or was closed meanwhile.
            anyio.EndOfStream: nothing is left, and all send streams are closed.
        """
        self._give_back()
        await anyio.lowlevel.checkpoint()
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
        return self._keep(self._take_nowait())

    async def take(self, *, patient: bool = True) -> tuple[T, _InFlight] | None:
        """Wait for an item and its charge, which the caller has to release; for iterators.

        Unless ``patient``, give None rather than wait for a sender that waits for memory.
        """
        channel = self._channel
        try:
            return self._take_nowait()
        except anyio.WouldBlock:
            if channel.is_dry and not patient:
                return None
        receiver = _Receiver(self, patient)
        channel.receivers[receiver] = None
        try:
            await receiver.told.wait()
        except BaseException:
            channel.receivers.pop(receiver, None)
            if receiver.taken is not None:
                channel.put_back(receiver.taken)
            raise
        if receiver.taken is None and not receiver.dry:
            raise anyio.ClosedResourceError if self._closed else anyio.EndOfStream
        return receiver.taken

    def _take_nowait(self) -> tuple[T, _InFlight]:
        channel = self._channel
        if self._closed:
            raise anyio.ClosedResourceError
        if channel.buffer:
            taken = channel.buffer.popleft()
            channel.call_next_sender()
            return taken
        if not channel.open_send_streams:
            raise anyio.EndOfStream
        raise anyio.WouldBlock

    def _keep(self, taken: tuple[T, _InFlight]) -> T:
        self._give_back()
        item, grant = taken
        if self._closed:
            grant.release()
        else:
            self._last = grant
        return item

    def _give_back(self) -> None:
        if self._last is not None:
            self._last.release()
            self._last = None

    def clone(self) -> MemoryReceiveStream[T]:
        """Give another end of the same stream, to be closed by itself.

        Raises:
            anyio.ClosedResourceError: this one is closed.
        """
        if self._closed:
            raise anyio.ClosedResourceError
        return MemoryReceiveStream(self._channel)

    def close(self) -> None:
        """Close it without waiting, and give back what it received last.

        With the last one, what is left in the stream is dropped and given back, and senders
        get ``BrokenResourceError``.
        """
        if not self._closed:
            self._closed = True
            channel = self._channel
            channel.open_receive_streams -= 1
            channel.send_home(self)
            self._give_back()
            if not channel.open_receive_streams:
                while channel.buffer:
                    channel.buffer.popleft()[1].release()
                channel.send_off()

    async def aclose(self) -> None:
        """Close it; the same as ``close()``."""
        self.close()

    def statistics(self) -> MemoryStreamStatistics:
        """Give a snapshot of what goes on in the stream."""
        return self._channel.statistics()

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
            # Finalisers of charges may run anywhere; releasing them may not.
            self._closed = True
            channel = self._channel
            channel.open_receive_streams -= 1
            if not channel.open_receive_streams:
                channel.buffer.clear()
            _warn_unclosed(self)


def _warn_unclosed(stream: object) -> None:
    warnings.warn(
        f"Unclosed <{type(stream).__name__} at {id(stream):x}>",
        ResourceWarning,
        stacklevel=2,
        source=stream,
    )


class create_memory_stream(  # noqa: N801
    tuple[MemorySendStream[T], MemoryReceiveStream[T]]
):
    """Make a channel between tasks that is bounded in bytes, by its receiver's quota.

    ::

        send, receive = create_memory_stream[bytes](component=decoding)

    Both ends are used and closed like those of ``anyio.create_memory_object_stream``. An
    item is charged to the *receiving* component before it is sent. It stays charged until
    the receive stream is asked for the next one, or is closed; what is left in the stream
    when its last receive stream goes is given back.

    What is in flight is at the most as much as it leaves to the component, so that it can
    still get grants of its own to work with; a single item may be as large as any grant.

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
        channel = _Channel[T](size, component, max_items)
        return super().__new__(cls, (MemorySendStream(channel), MemoryReceiveStream(channel)))
