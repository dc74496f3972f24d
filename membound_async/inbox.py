"""Inboxes: messages are charged to their receiver before they are sent, on behalf of senders.

From bus1: what is in flight to a component is divided among those who send to it. A send that
succeeded can always be received; whoever floods an inbox leaves the others their part; and
who never receives holds up nothing but what is sent to it.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Coroutine, Hashable, Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Self, TypeVar

import anyio
import anyio.abc
import anyio.lowlevel

from .charges import Charge, check_count, measure
from .component import Component
from .context import current_component
from .eventloop import running_loop
from .exceptions import QuotaExceeded
from .grant import MemoryGrant, Options, check_amounts, find_component
from .limiter import current_limiter
from .sizes import size_of
from .waiters import NOTHING

__all__ = ["Inbox", "InboxStatistics", "Received"]

T = TypeVar("T")

IN_FLIGHT_ONLY = frozenset({"fds"})
"""What is given back on delivery, unless an inbox says otherwise."""


class InboxStatistics(NamedTuple):
    """What goes on in an inbox; the first six are those of anyio's memory streams."""

    current_buffer_used: int  #: how many messages are in it
    max_buffer_size: float  #: how many there may be (or ``math.inf``)
    open_send_streams: int  #: how many clones of its send streams are open
    open_receive_streams: int  #: how many clones of its receive streams are open
    tasks_waiting_send: int  #: how many tasks wait in ``send()``
    tasks_waiting_receive: int  #: how many tasks wait in ``receive()``
    charged_bytes: int  #: granted for what is in it
    dropped: int  #: how many messages have made room for later ones


class Received(Generic[T]):
    """A message that was delivered, and what its receiver holds for it until ``release()``.

    ::

        async with await inbox.receive() as received:
            ...  # received.message

    Attributes:
        message: what was sent.
        sender: on whose behalf; None if the component has sent it to itself.
        grant: what the receiving component holds for it.
    """

    __slots__ = ("grant", "message", "sender")

    def __init__(self, message: T, sender: Hashable | None, grant: MemoryGrant) -> None:
        self.message = message
        self.sender = sender
        self.grant = grant

    def release(self) -> None:
        """Give back what is held for it; never waits, and may be done again."""
        self.grant._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class _Places:
    """How many more messages there may be. Waiting is for tasks, the rest works anywhere."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: dict[anyio.Event, None] = {}

    def take_nowait(self) -> bool:
        """Take a place; False if there is none."""
        if not self._free:  # and there is none while anybody waits
            return False
        self._free -= 1
        return True

    async def take(self) -> None:
        """Wait for a place, in order, and take it."""
        if self.take_nowait():
            return
        told = anyio.Event()
        self._waiting[told] = None
        try:
            await told.wait()
        except BaseException:
            if told in self._waiting:
                del self._waiting[told]
            else:
                self.give_back()
            raise

    def give_back(self) -> None:
        """Give a place to who has waited longest, else have one more."""
        if self._waiting:
            told = next(iter(self._waiting))
            del self._waiting[told]
            told.set()
        else:
            self._free += 1


class _Sending:
    """Somebody who waits to send."""

    def __init__(self, end: object) -> None:
        self.end = end
        self.scope = anyio.CancelScope()
        self.is_next = anyio.Event()
        """Set when all that its sender has sent before is put in."""


class _Receiving(Generic[T]):
    """Somebody who waits to receive."""

    def __init__(self, end: object) -> None:
        self.end = end
        self.told = anyio.Event()
        self.taken: Received[T] | None = None
        self.gave_up = False


class Inbox(anyio.abc.ObjectReceiveStream[Received[T]]):
    """A component's receiving side: what is in flight to it is bounded, sender by sender.

    ::

        inbox = Inbox[bytes](component=decoding)
        await inbox.send(b"...", sender="tenant 7", fds=1)
        async with await inbox.receive() as received: ...

    A message is charged to the component *before* it is sent, on behalf of its sender, who
    waits for that: a sender may have in flight half of what the other senders and the
    component itself leave of what the component may have. So a message that was sent can
    always be received, and nobody can use up the place of others. On delivery the sender's
    part is free again; the message is the component's own then, until it is released. What a
    component sends to itself is its own from the beginning.

    It is for tasks of one event loop; from threads, use
    ``anyio.from_thread.run(inbox.send, ...)``. Where there is no limiter, nothing is bounded but
    ``max_messages``.

    Args:
        component: whose inbox it is, or its path; None for the one in whose block this is
            called, else ``root`` of the limiter that is current at the first message.
        size: gives the bytes of a message; None if all are buffers or ``str``
            (``sizes.size_of``), or ``send(bytes=...)`` says it.
        overflow: what ``send()`` does if there is no room: ``"wait"``; ``"raise"`` raises as
            ``send_nowait()`` does; ``"drop_oldest"`` drops the oldest messages of the same
            sender, and waits only when it has none left there.
        max_messages: how many messages it may hold besides.
        settle: gives, on delivery, how much there really is of resources that a message was
            charged for at an upper bound: ``{"handles": 3}``. What is not named stays.
        in_flight_only: resources that are given back on delivery.

    Raises:
        ValueError: ``max_messages`` or ``overflow`` makes no sense.
        UnknownComponent: there is no component of that path.
    """

    def __init__(
        self,
        component: Component | str | None = None,
        *,
        size: Callable[[T], int] | None = None,
        overflow: Literal["wait", "drop_oldest", "raise"] = "wait",
        max_messages: float = math.inf,
        settle: Callable[[T], Mapping[str, int]] | None = None,
        in_flight_only: Collection[str] = IN_FLIGHT_ONLY,
    ) -> None:
        check_count(max_messages, "max_messages")
        if overflow not in ("wait", "drop_oldest", "raise"):
            raise ValueError(f'overflow={overflow!r} must be "wait", "drop_oldest" or "raise"')
        self._size: Callable[[T], int] = size_of if size is None else size
        self._overflow = overflow
        self._max_messages = max_messages
        self._places = _Places(int(max_messages)) if max_messages < math.inf else None
        self._settle = settle
        self._in_flight_only = in_flight_only
        self._buffer: deque[Received[T]] = deque()
        self._sending: dict[_Sending, None] = {}
        self._lines: dict[Hashable | None, OrderedDict[_Sending, None]] = {}
        """Those of each sender, in order."""
        self._receiving: dict[_Receiving[T], None] = {}
        self._handed_over = 0
        """How many messages a receiver was given that has not run since."""
        self._thread = 0
        """That of the tasks that have waited here."""
        self._dropped = 0
        self._open_send_streams = self._open_receive_streams = 0
        self._ended = False
        """Whether there were send streams, and all are closed."""
        self._closed = False
        if component is None:
            self._component = current_component()
        else:
            self._component = find_component(component) if isinstance(component, str) else component

    # --- sending

    async def send(
        self,
        message: T,
        *,
        sender: Hashable | None = None,
        bytes: int | None = None,  # noqa: A002
        grant: MemoryGrant | None = None,
        **also: int,
    ) -> None:
        """Wait until the receiver may have the message on behalf of its sender, and send it.

        Senders do not wait for each other, but for their own part; each is served in order.
        Cancelled, it has sent nothing and nothing is charged.

        Args:
            message: what to send.
            sender: on whose behalf: any hashable name, or a component; None for the
                component whose code is running.
            bytes: how large it is; None for what the inbox's ``size`` says.
            grant: a grant that is held for it already, such as a handle of one that is
                shared (`MemoryGrant.share`): it is handed on with the message, which is not
                charged again. If sending fails it is still the caller's.
            also: how much of other resources, at the most; ``slices=1`` unless said
                otherwise, where slices are limited.

        Raises:
            GrantTooLarge: a sender can never have that much in flight.
            GrantDeadlock: all who hold memory wait for more, this task among them; see ``grow()``.
            QuotaExceeded: only with ``overflow="raise"``: there is no room now.
            GrantReleased: ``grant`` is not held any more.
            TypeError, ValueError: a size or an amount makes no sense, or nothing limits it.
            anyio.BrokenResourceError: the inbox is closed, or was closed meanwhile.
        """
        charge = self._charge(message, sender, bytes, grant, also)
        await self._turn(always=True)
        if not self._send_at_once(message, charge):
            await self._send(self, message, charge)

    def send_nowait(
        self,
        message: T,
        *,
        sender: Hashable | None = None,
        bytes: int | None = None,  # noqa: A002
        grant: MemoryGrant | None = None,
        **also: int,
    ) -> None:
        """Send it if the receiver may have it now, as bus1 does; else nothing has changed.

        Arguments and errors as for ``send()``.

        Raises:
            QuotaExceeded: there is no room now, or the sender waits already.
            RuntimeError: tasks of an event loop in another thread wait here.
        """
        self._check_thread()
        charge = self._charge(message, sender, bytes, grant, also)
        self._check_open()
        self._admit_nowait(charge)
        self._put(message, charge)

    def send_stream(self, sender: Hashable | None = None) -> MemorySendStream[T]:
        """Give an anyio send stream into this inbox, on behalf of one sender.

        When all of them are closed, receivers get what is left, and then ``EndOfStream``.
        """
        from .streams.memory import MemorySendStream

        return MemorySendStream(self, sender)

    def receive_stream(self) -> MemoryReceiveStream[T]:
        """Give an anyio receive stream, which gives bare messages out of this inbox.

        Each stays charged until it is asked for the next one. When all of them are closed,
        so is the inbox.
        """
        from .streams.memory import MemoryReceiveStream

        return MemoryReceiveStream(self)

    def _charge(
        self,
        message: T,
        sender: Hashable | None,
        nbytes: int | None,
        grant: MemoryGrant | None,
        also: Mapping[str, int],
    ) -> MemoryGrant:
        """Give what a message travels under; nothing is asked for yet."""
        if grant is not None:
            grant._held_by("send")
            return grant
        component = self._component
        if component is None or component._limiter is None:
            component = self._receiver()
        if sender is None:
            running = current_component()
            sender = None if running is None else running.path
        elif isinstance(sender, Component):
            sender = sender.path
        if sender is not None:
            hash(sender)  # raises TypeError
            if sender == component.path:
                sender = None
        if nbytes is None:
            nbytes = measure(self._size, message)
        slices = component._limiter._ledger.knows(component._account, "slices")
        if also or slices:
            also = check_amounts(component, {"slices": 1, **also} if slices else also)
        return Charge(component, nbytes, Options(None, None, False, also or NOTHING, sender))

    def _receiver(self) -> Component:
        component = self._component
        if component is None:
            limiter = current_limiter()
            component = limiter.root
            if not limiter.is_noop:
                self._component = component
        return component._resolve()

    def _turn(self, *, always: bool = False) -> Coroutine[Any, Any, None]:
        """Give what lets others run, ``always`` or if that is due; and ends a cancelled task.

        Who sends always does: those who fill an inbox would else have what is left of it one
        after the other, and not at the same time.
        """
        component = self._component
        if component is not None and component._limiter is not None:
            limiter = component._limiter
            now = limiter._now()
            if now < limiter._yield_at:
                if not always:
                    return anyio.lowlevel.checkpoint_if_cancelled()
            elif asyncio._get_running_loop() is limiter._loop_token:
                limiter._has_yielded(now)
        return anyio.lowlevel.checkpoint()

    def _send_at_once(self, message: T, charge: MemoryGrant) -> bool:
        """Send a message if there is nothing at all to wait for."""
        if self._closed:
            raise anyio.BrokenResourceError
        if self._admit_at_once(charge):
            self._put(message, charge)
            return True
        return False

    async def _send(self, end: object, message: T, charge: MemoryGrant) -> None:
        """Send a message for which something may have to be waited for or to give way."""
        if self._overflow == "wait":
            await self._wait_to_send(end, charge)
        else:
            while True:
                try:
                    self._admit_nowait(charge)
                    break
                except QuotaExceeded:
                    if self._overflow == "raise":
                        raise
                if not self._drop_oldest(charge.sender):
                    await self._wait_to_send(end, charge)
                    break
        self._put(message, charge)

    def _admit_at_once(self, charge: MemoryGrant) -> bool:
        """Charge a message if there is nothing at all to wait for, not even delay."""
        if self._lines and charge.sender in self._lines:
            return False
        if self._places is not None and not self._places.take_nowait():
            return False
        if charge._is_held() or charge._acquire_at_once():
            return True
        if self._places is not None:
            self._places.give_back()
        return False

    def _admit_nowait(self, charge: MemoryGrant) -> None:
        if self._lines and charge.sender in self._lines:
            path = self._receiver().path
            raise QuotaExceeded(path, charge._wanted, 0, "others of the sender wait already")
        if self._places is not None and not self._places.take_nowait():
            receiver = self._receiver()
            limiter = receiver._limiter
            if not charge._is_held() and not limiter._observe:
                never = limiter._ledger.refusal(charge._request())
                if never is not None:
                    raise never
            raise QuotaExceeded(receiver.path, 1, 0, "max_messages are there", "messages")
        if not charge._is_held():
            try:
                charge._acquire_nowait()
            except BaseException:
                if self._places is not None:
                    self._places.give_back()
                raise

    async def _wait_to_send(self, end: object, charge: MemoryGrant) -> None:
        """Wait for memory and for a place; when it is back, the message may be put."""
        sending = _Sending(end)
        self._sending[sending] = None
        sender = charge.sender
        line = self._lines.setdefault(sender, OrderedDict())
        if not line:
            sending.is_next.set()
        line[sending] = None
        self._thread = threading.get_ident()
        handed_in = charge._is_held()
        placed = False
        try:
            with sending.scope:  # which closing cancels
                # Memory first: who waits for that must not keep a place from others.
                if not handed_in:
                    await charge._acquire(has_yielded=True)  # or those behind might come first
                # Those that are admitted at once may run in any order.
                await sending.is_next.wait()
                if self._places is not None:
                    await self._places.take()
                placed = True
            self._check_end(end)
            charge._held_by("send")
        except BaseException:
            if not handed_in:
                charge._release()
            if placed and self._places is not None:
                self._places.give_back()
            raise
        finally:
            del self._sending[sending]
            del line[sending]
            if line:
                next(iter(line)).is_next.set()
            else:
                del self._lines[sender]

    def _drop_oldest(self, sender: Hashable | None) -> bool:
        """Drop the oldest message of a sender; False if there is none."""
        for place, received in enumerate(self._buffer):
            if received.sender == sender:
                del self._buffer[place]
                self._drop(received)
                self._dropped += 1
                return True
        return False

    def _drop(self, received: Received[T]) -> None:
        received.release()
        if self._places is not None:
            self._places.give_back()

    def _put(self, message: T, charge: MemoryGrant) -> None:
        """Give a message to who has waited longest, else keep it."""
        options = charge._options
        received = Received(message, None if options is None else options.sender, charge)
        if self._receiving:
            self._hand_over(next(iter(self._receiving)), received)
        else:
            self._buffer.append(received)

    # --- receiving

    async def receive(self) -> Received[T]:
        """Wait for a message, and have it delivered; release what it gives.

        Never waits for memory. Cancelled, it leaves the message to others. What ``settle=``
        raises comes from here; that message is lost, and everything for it given back.

        Raises:
            anyio.ClosedResourceError: the inbox is closed, or was closed meanwhile.
            anyio.EndOfStream: nothing is left, and all send streams are closed.
        """
        await self._turn()
        if self._buffer and not self._closed:
            return self._deliver(self._buffer.popleft())
        received = await self._take(self)
        assert received is not None
        return received

    def receive_nowait(self) -> Received[T]:
        """Have a message delivered that is there already.

        Raises:
            anyio.WouldBlock: there is none.
            anyio.ClosedResourceError: the inbox is closed.
            anyio.EndOfStream: nothing is left, and all send streams are closed.
        """
        self._check_thread()
        return self._take_nowait()

    async def _take(self, end: object, holding: Component | None = None) -> Received[T] | None:
        """Wait for a message; None if others wait for what the caller holds for a component."""
        holders: list[Component] = []
        try:
            return self._take_nowait()
        except anyio.WouldBlock:
            if holding is not None:
                holders = [self._receiver(), holding._resolve()]
                if any(each._account.is_waited_for for each in holders):
                    return None
        self._thread = threading.get_ident()
        receiving = _Receiving[T](end)
        self._receiving[receiving] = None
        for each in holders:
            each._limiter._tell_of_waiters(
                each._account, receiving, partial(self._give_up, receiving)
            )
        try:
            await receiving.told.wait()
        except BaseException:
            self._receiving.pop(receiving, None)
            if receiving.taken is not None:
                self._handed_over -= 1
                self._put_back(receiving.taken)
                self._tell_end()
            raise
        finally:
            for each in holders:
                each._limiter._tell_no_more(each._account, receiving)
        if receiving.taken is not None:
            self._handed_over -= 1
            self._tell_end()
            return self._deliver(receiving.taken)
        if receiving.gave_up:
            return None
        raise anyio.EndOfStream if self._ended and not self._closed else anyio.ClosedResourceError

    def _give_up(self, receiving: _Receiving[T]) -> None:
        if receiving in self._receiving:
            del self._receiving[receiving]
            receiving.gave_up = True
            receiving.told.set()

    def _take_nowait(self) -> Received[T]:
        if self._closed:
            raise anyio.ClosedResourceError
        if self._buffer:
            return self._deliver(self._buffer.popleft())
        if self._ended and not self._handed_over:
            raise anyio.EndOfStream
        raise anyio.WouldBlock

    def _deliver(self, received: Received[T]) -> Received[T]:
        grant = received.grant
        if self._places is not None:
            self._places.give_back()
        options = grant._options
        if options is not None:
            also = options.also
            if not also and grant._deliver_at_once():
                return received
            try:
                settle = {each: 0 for each in self._in_flight_only if each in also}
                if also and self._settle is not None:
                    real = self._settle(received.message)
                    for resource in real.keys() & also.keys():
                        settle[resource] = min(real[resource], also[resource])
                grant._settle(settle)
            except BaseException:
                received.release()
                raise
        return received

    def _put_back(self, received: Received[T]) -> None:
        """Take back a message from who was cancelled before getting it."""
        receiving = next(iter(self._receiving), None)
        if receiving is not None:
            self._hand_over(receiving, received)
        elif not self._closed:
            self._buffer.appendleft(received)
        else:
            self._drop(received)

    def _hand_over(self, receiving: _Receiving[T], received: Received[T]) -> None:
        del self._receiving[receiving]
        self._handed_over += 1
        receiving.taken = received
        receiving.told.set()

    # --- closing

    def close(self) -> None:
        """Close it without waiting: what is in it is dropped and given back.

        Who waits to send gets ``BrokenResourceError``, who waits to receive
        ``ClosedResourceError``.
        """
        if not self._closed:
            self._closed = True
            self._end_receiving()
            self._end_sending()
            while self._buffer:
                self._drop(self._buffer.popleft())

    async def aclose(self) -> None:
        """Close it; the same as ``close()``."""
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise anyio.BrokenResourceError

    def _check_end(self, end: object) -> None:
        """Raise what a sender gets whose wait was ended by closing."""
        if end is not self and getattr(end, "_closed", False):
            raise anyio.ClosedResourceError
        self._check_open()

    def _end_sending(self, end: object = None) -> None:
        """End the waits of one who sends, or of all."""
        for sending in self._sending:
            if end in (None, sending.end):
                sending.scope.cancel()

    def _wake_senders_soon(self) -> None:
        """End the waits of all who send, from a finaliser, which may not do it itself."""
        if self._sending:
            component = self._component
            loop = component._limiter._loop if component is not None else None
            loop = loop or running_loop()
            if loop is not None:
                loop.call_soon(self._end_sending)

    def _tell_end(self) -> None:
        """End the waits of all who receive, if no message will come any more.

        One that was handed over may come back, if its receiver was cancelled.
        """
        if self._ended and not self._handed_over:
            self._end_receiving()

    def _check_thread(self) -> None:
        """Refuse to wake tasks from another thread than theirs.

        Raises:
            RuntimeError: tasks of an event loop in another thread wait here.
        """
        if (self._sending or self._receiving) and threading.get_ident() != self._thread:
            raise RuntimeError(
                "an inbox is for one event loop, and tasks of another thread's wait here; from "
                "a thread use anyio.from_thread.run(inbox.send, ...)"
            )

    def _end_receiving(self, end: object = None) -> None:
        """End the waits of one who receives, or of all, with nothing."""
        for receiving in [each for each in self._receiving if end in (None, each.end)]:
            del self._receiving[receiving]
            receiving.told.set()

    def statistics(self) -> InboxStatistics:
        """Give a snapshot of what goes on in it."""
        return InboxStatistics(
            len(self._buffer),
            self._max_messages,
            self._open_send_streams,
            self._open_receive_streams,
            len(self._sending),
            len(self._receiving),
            sum(received.grant.size for received in self._buffer),
            self._dropped,
        )


if TYPE_CHECKING:
    from .streams.memory import MemoryReceiveStream, MemorySendStream
