"""Around streams: what passes through them is under a grant while anybody has it.

- `bounded`: any async iterable, one item at a time.
- `Batches` (``component.batches()``): any async iterable, in lists.
- `create_memory_stream`: a channel between tasks that holds so many bytes, not items.

An item that was read and then found to be too much for now is kept for the next time it is
asked for; so a cancellation loses none, wherever it comes.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, NoReturn, Self, TypeVar, cast

import anyio
import anyio.abc
import anyio.lowlevel

from .context import current_component
from .eventloop import EventLoop, Handle, running_loop
from .exceptions import GrantTimeout, GrantTooLarge, QuotaExceeded
from .grant import ALONE, HELD, MemoryGrant, find_component
from .limiter import current_limiter
from .sizes import MAX_BYTES, parse_size, size_of
from .waiters import Request

if TYPE_CHECKING:
    from .component import Component

__all__ = [
    "Batches",
    "Bounded",
    "MemoryReceiveStream",
    "MemorySendStream",
    "MemoryStreamStatistics",
    "bounded",
    "create_memory_stream",
]

T = TypeVar("T")

_NOTHING: Final[Any] = object()
"""In the place of an item where there is none."""


class _Charge(MemoryGrant):
    """A grant that an iterator or a stream holds: dropped with it, it goes without a word."""

    __slots__ = ()

    def __del__(self) -> None:
        if self._state == HELD or self._state == ALONE:
            component = self._component
            limiter = component._limiter
            # This may be running in the midst of the limiter, in the thread that has its lock.
            if limiter._lock.acquire(blocking=False):
                limiter._lock.release()
                MemoryGrant._release(self)
            else:
                limiter._abandon(component._account, self._size, self._state == ALONE)


def _measure(size: Callable[[Any], int], item: object) -> int:
    nbytes = size(item)
    if type(nbytes) is not int or nbytes < 0:
        nbytes = parse_size(nbytes, "size(item)")
    return nbytes


async def _close(*parts: object) -> None:
    """Close an iterator and what it came from, those that can be closed, each once."""
    for part in dict.fromkeys(map(id, parts)):
        aclose = getattr(next(each for each in parts if id(each) == part), "aclose", None)
        if aclose is not None:
            await aclose()


class _OneConsumer(AsyncIterator[T]):
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
            return await self._next()
        finally:
            self._busy = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _next(self) -> T:
        raise NotImplementedError

    async def aclose(self) -> None:
        raise NotImplementedError


# --- one item at a time


class Bounded(_OneConsumer[T]):
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
        self._size = size_of if size is None else size
        self._ahead = parse_size(ahead, "ahead")
        self._component = current_component() if component is None else component
        self._grant: MemoryGrant | None = None
        self._item: Any = _NOTHING
        """What was read but not handed out yet, because its grant is still waited for."""

    async def _next(self) -> T:
        if self._item is _NOTHING:
            self._give_back()
            self._item = await self._read()
        try:
            await self._charge(_measure(self._size, self._item))
        except Exception:
            self._item = _NOTHING
            self._give_back()
            raise
        item: T = self._item
        self._item = _NOTHING
        return item

    async def _read(self) -> T:
        if not self._ahead:
            return await self._iterator.__anext__()
        self._grant = await self._new_grant(self._ahead)
        try:
            return await self._iterator.__anext__()
        except BaseException:
            self._give_back()
            raise

    async def _charge(self, nbytes: int) -> None:
        grant = self._grant
        if grant is None:
            self._grant = await self._new_grant(nbytes)
        elif grant.size < nbytes:
            await grant.grow(nbytes - grant.size)
        else:
            grant.shrink(grant.size - nbytes)

    def _new_grant(self, nbytes: int) -> MemoryGrant:
        component = self._component
        if component is None or isinstance(component, str):
            component = self._component = find_component(component)
        return _Charge(component, nbytes)

    def _give_back(self) -> None:
        if self._grant is not None:
            self._grant.release()
            self._grant = None

    async def aclose(self) -> None:
        """Give the item's bytes back, and close the source if it can be closed.

        The bytes are back at once; closing waits if the source's ``aclose()`` does.
        """
        self._closed = True
        self._item = _NOTHING
        self._give_back()
        await _close(self._iterator, self._source)


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
    if it is cancelled while it waits for memory, the item comes the next time. Do not use it
    on a memory stream (`create_memory_stream`), whose items are under a grant already.

    Args:
        source: what to read.
        size: gives the bytes of an item; None if all are buffers or ``str``, see
            ``sizes.size_of``. ``sizes.decoded_json`` and ``sizes.deep`` estimate others.
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
    """
    return Bounded(source, size=size, ahead=ahead, component=component)


# --- lists of items

_STEP_BYTES = 65536
"""How much a batch that grows asks for in advance, at the most."""


class Batches(_OneConsumer[list[T]]):
    """The items of a source in lists, each list under a grant; see ``component.batches()``.

    ::

        async for batch in component.batches(rows, size=len, max_items=500):
            await database.insert(batch)

    The bytes of a list are held until the next one is asked for, and given back then, at
    ``aclose()`` and when the iterator is dropped. A list is handed over when it has
    ``max_items``, when ``max_seconds`` are over, when the source ends or raises (which is
    raised after it), and *when there is no memory for its next item*: it never waits for
    memory while it holds something, so a list larger than the quota cannot hang. The item
    then begins the next list.

    Without ``max_seconds`` the source is read in the task that iterates. With it, a task of
    its own reads, and goes on when the time is over: no read is ever cancelled but by
    ``aclose()`` or by dropping the iterator, and what it brings begins the next list. It
    reads ahead by one item at the most.

    The items of a memory stream (`create_memory_stream`) of the same component keep the
    charge that they came with, and if a sender waits for memory, the list is handed over.

    One task at a time may iterate; if it is cancelled while it waits, everything that was
    read comes the next time. ``async with`` closes the source too, if it can be closed.

    Args:
        source: what to read.
        component: whose grants these are.
        size: gives the bytes of an item; None if all are buffers or ``str`` (``size_of``),
            or come from a memory stream, which knows.
        max_items: how many items a list may have; None for no limit.
        max_seconds: how long a list is held open from its first item on; None for no limit.

    Raises:
        TypeError, ValueError: an argument makes no sense; from the iterator: the size of an
            item is not known or makes no sense.
        GrantTooLarge: from the iterator: an item can never be granted, not even alone. It is
            left out; the next list can be asked for.
    """

    def __init__(
        self,
        source: AsyncIterable[T],
        *,
        component: Component,
        size: Callable[[T], int] | None = None,
        max_items: int | None = None,
        max_seconds: float | None = None,
    ) -> None:
        if max_items is not None:
            _check_count(max_items, "max_items")
        if max_seconds is not None and not (
            isinstance(max_seconds, (int, float))
            and not isinstance(max_seconds, bool)
            and 0 < max_seconds < math.inf
        ):
            raise ValueError(
                f"max_seconds={max_seconds!r} must be a finite number of seconds above 0"
            )
        self._held: list[MemoryGrant] = []
        self._batch = _Batch(source, component, size, max_items or math.inf)
        self._reader = None if max_seconds is None else _Reader(self._batch, max_seconds)

    async def _next(self) -> list[T]:
        self._give_back()
        await (self._batch if self._reader is None else self._reader).fill()
        if self._closed:
            self._batch.drop()
            raise StopAsyncIteration
        items, self._held = self._batch.take()
        return items

    def _give_back(self) -> None:
        held, self._held = self._held, []
        for grant in held:
            grant.release()

    async def aclose(self) -> None:
        """Give all bytes back, end the reading, and close the source if it can be closed.

        The bytes are back at once; what was read and not handed over is lost. Waits until a
        read in a task of its own has been cancelled and the source is closed.
        """
        self._closed = True
        self._give_back()
        self._batch.drop()
        await (self._batch if self._reader is None else self._reader).aclose()

    def __del__(self) -> None:
        reader = getattr(self, "_reader", None)
        if reader is not None:
            reader.abandon()


def _check_count(value: float, name: str) -> None:
    if value != math.inf and (type(value) is not int or value < 1):
        raise ValueError(f"{name}={value!r} must be a whole number of items, 1 or more")


class _Batch(Generic[T]):
    """The list that is being gathered, and the item that came too late for the last one."""

    def __init__(
        self,
        source: AsyncIterable[T],
        component: Component,
        size: Callable[[T], int] | None,
        max_items: float,
    ) -> None:
        self._source = source
        self._iterator = aiter(source)
        self._stream = (
            cast("MemoryReceiveStream[T]", source)
            if isinstance(source, MemoryReceiveStream)
            else None
        )
        self._component = component
        self._size = size
        self._max_items = max_items
        self.timer: _Reader[T] | None = None
        self.complete = False
        """Whether there is something to hand over: a list, or an error."""
        self._error: BaseException | None = None
        self._items: list[T] = []
        self._charges: list[MemoryGrant] = []
        """The grants of the list, its own first if it has one."""
        self._own: MemoryGrant | None = None
        self._room = 0
        """How much of its own grant no item uses yet."""
        self._step = _STEP_BYTES
        self._item: Any = _NOTHING
        """What was read but is in no list yet, its size, and the charge it came with."""
        self._nbytes = 0
        self._charge: MemoryGrant | None = None

    async def fill(self) -> None:
        """Read on until there is something to hand over, or nobody wants it any more.

        Cancelled, it leaves everything as it is.
        """
        iterator, stream, timer = self._iterator, self._stream, self.timer
        size = size_of if self._size is None else self._size
        while not self.complete:
            if self._item is _NOTHING:
                try:
                    if stream is None:
                        item = await iterator.__anext__()
                        nbytes = size(item)
                        if type(nbytes) is not int or nbytes < 0:
                            nbytes = parse_size(nbytes, "size(item)")
                        self._nbytes = nbytes
                        self._item = item
                    elif not await self._receive(stream):
                        break
                except Exception as error:  # noqa: BLE001
                    self._error = error
                    break
                if timer is not None and not timer.wanted:
                    return
            if self._items and self._charge is None and self._nbytes <= self._room:
                self._room -= self._nbytes
            elif not await self._admit():
                break
            self._items.append(self._item)
            self._item = _NOTHING
            if len(self._items) >= self._max_items:
                break
            if timer is not None:
                timer.has_put(first=len(self._items) == 1)
        self.complete = True

    async def _receive(self, stream: MemoryReceiveStream[T]) -> bool:
        """Take an item with its charge; False if a sender waits for what this list holds."""
        try:
            taken = await stream._take(patient=not self._items)
        except anyio.EndOfStream:
            raise StopAsyncIteration from None
        if taken is None:
            return False
        item, charge = taken
        account = self._component._resolve()._account
        if charge.component._account is not account:
            self._nbytes = charge.size if self._size is None else _measure(self._size, item)
        self._item, self._charge = item, charge
        return True

    async def _admit(self) -> bool:
        """See to it that the item that was read is paid for; False if it has to wait."""
        charge = self._charge
        if charge is not None and charge.component._account is self._component._resolve()._account:
            self._charges.append(charge)
            self._charge = None
            return True
        if self._items:
            if not self._grow():
                return False
            self._drop_charge()
        else:
            # It is charged to somebody else, who may be waited for: not both at a time.
            self._drop_charge()
            try:
                await self._begin()
            except Exception as error:  # noqa: BLE001
                self._item = _NOTHING
                self._error = error
                return False
        return True

    async def _begin(self) -> None:
        nbytes = self._nbytes
        more = min(nbytes, self._step) if self._max_items > 1 else 0
        options = (min(nbytes + more, MAX_BYTES), None, False) if more else None
        self._own = await _Charge(self._component, nbytes, options)
        self._room = self._own.size - nbytes
        self._charges.append(self._own)

    def _grow(self) -> bool:
        """Get more room without waiting: in steps, so that few items have to ask."""
        missing = self._nbytes - self._room
        if missing > 0:
            own = self._own
            if own is None:
                own = _Charge(self._component, 0)._acquire_nowait()
                self._own = own
                self._charges.append(own)
            step = min(own.size, self._step)
            if step > missing:
                try:
                    own.grow_nowait(step)
                except (QuotaExceeded, GrantTooLarge):
                    self._step = 0
                else:
                    self._room += step - self._nbytes
                    return True
            try:
                own.grow_nowait(missing)
            except (QuotaExceeded, GrantTooLarge):
                return False
            self._room += missing
        self._room -= self._nbytes
        return True

    def _drop_charge(self) -> None:
        if self._charge is not None:
            self._charge.release()
            self._charge = None

    def take(self) -> tuple[list[T], list[MemoryGrant]]:
        """Hand over the list and its grants; raise what there was instead of one."""
        if self.timer is not None:
            self.timer.stop()
        if not self._items:
            self.complete = False
            error, self._error = self._error, None
            assert error is not None
            raise error
        if self._room and self._own is not None:
            self._own.shrink(self._room)
        taken = self._items, self._charges
        self._items, self._charges, self._own = [], [], None
        self._room, self._step = 0, _STEP_BYTES
        self.complete = self._error is not None
        return taken

    def fail(self, error: BaseException) -> None:
        """Have an error raised once the list that there is has been handed over."""
        self._error = error
        self.complete = True

    @property
    def is_over(self) -> bool:
        """Whether the source has ended or raised, which was not told yet."""
        return self._error is not None

    def drop(self) -> None:
        """Give up what there is, and its bytes."""
        self._drop_charge()
        for charge in self._charges:
            charge.release()
        self._items, self._charges, self._own = [], [], None
        self._room, self._item = 0, _NOTHING

    async def aclose(self) -> None:
        """Close the source."""
        await _close(self._iterator, self._source)


class _Reader(Generic[T]):
    """Fills a batch in a task of its own, so that its time can be over without cancelling.

    Attributes:
        wanted: whether anybody waits for the batch.
    """

    def __init__(self, batch: _Batch[T], max_seconds: float) -> None:
        self._batch = batch
        batch.timer = self
        self._max_seconds = max_seconds
        self._due_at = math.inf
        self._timer: Handle | None = None
        self.wanted = False
        self._loop: EventLoop | None = None
        self._task: Handle | None = None
        self._running = self._started = self._closing = False
        self._parked: Any = None
        """Where the task waits until the batch is wanted."""
        self._waiting: list[Any] = []
        """Where others wait for the task."""
        self._close_error: BaseException | None = None

    # --- for who waits

    async def fill(self) -> None:
        """Wait until there is something to hand over."""
        batch = self._batch
        if batch.complete:
            return
        loop = self._loop
        if loop is None:
            loop = self._loop = running_loop()
            assert loop is not None
        self.wanted = True
        try:
            if not self._running:
                self._running = True
                self._started = False
                self._task = loop.spawn(self._run)
            elif self._parked is not None:
                loop.wake(self._parked)
            while self._running and not batch.complete:
                await self._changed(loop)
        finally:
            self.wanted = False

    async def aclose(self) -> None:
        """End the task, which closes the source, and wait for that."""
        self.stop()
        self._closing = True
        if self._running and self._loop is not None:
            self._end()
            while self._running:
                await self._changed(self._loop)
            if self._close_error is not None:
                raise self._close_error
        else:
            await self._batch.aclose()

    def abandon(self) -> None:
        """End the task, from a finaliser; the source is left as it is."""
        if self._running and self._loop is not None:
            self._loop.call_soon(self._end)

    async def _changed(self, loop: EventLoop) -> None:
        place = loop.place()
        self._waiting.append(place)
        try:
            await cast("Any", place)
        finally:
            self._waiting.remove(place)

    def _tell(self) -> None:
        assert self._loop is not None
        for place in self._waiting:
            self._loop.wake(place)

    def _end(self) -> None:
        self.stop()
        if self._started and self._task is not None:
            self._task.cancel()
        else:
            self._running = self._closing  # it has not begun, and will see that it need not

    # --- the time

    def has_put(self, *, first: bool) -> None:
        """Note that the batch has got an item."""
        loop = self._loop
        assert loop is not None
        now = loop.now()
        if first:
            self._due_at = now + self._max_seconds
            self._timer = loop.call_later(self._max_seconds, self._overdue)
        elif now >= self._due_at:
            self._batch.complete = True

    def stop(self) -> None:
        """Forget the time of a batch that was taken."""
        self._due_at = math.inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _overdue(self) -> None:
        self._batch.complete = True
        self._tell()

    # --- the task

    async def _run(self) -> None:
        self._started = True
        batch, loop = self._batch, self._loop
        assert loop is not None
        try:
            while self._running and not self._closing and not batch.is_over:
                if self.wanted and not batch.complete:
                    await batch.fill()
                    self._tell()
                else:
                    self._parked = loop.place()
                    try:
                        await cast("Any", self._parked)
                    finally:
                        self._parked = None
        except BaseException as error:
            batch.fail(error)
            raise
        finally:
            if self._closing:
                with anyio.CancelScope(shield=True):
                    try:
                        await batch.aclose()
                    except Exception as error:  # noqa: BLE001
                        self._close_error = error
            self._running = False
            self._tell()


# --- between tasks


class MemoryStreamStatistics(NamedTuple):
    """What goes on in a memory stream; the first six are those of anyio's."""

    current_buffer_used: int  #: how many items are in it
    max_buffer_size: float  #: how many there may be (or ``math.inf``)
    open_send_streams: int  #: how many clones of the send stream are open
    open_receive_streams: int  #: how many clones of the receive stream are open
    tasks_waiting_send: int  #: how many tasks wait in ``send()``
    tasks_waiting_receive: int  #: how many tasks wait in ``receive()``
    charged_bytes: int  #: granted for what is in it, and for what was received from it last


class _InFlight(_Charge):
    """What is charged for an item of a memory stream, from sending to its being let go."""

    __slots__ = ("_channel", "_in_flight")

    _channel: _Channel[Any]
    _in_flight: int

    def _release(self) -> None:
        super()._release()
        in_flight, self._in_flight = self._in_flight, 0
        self._channel.give_back(in_flight)

    def __del__(self) -> None:
        super().__del__()
        if self._in_flight:
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
            self._component = (
                find_component(component) if isinstance(component, str) else component
            )

    # --- memory

    async def admit(self, sender: _Sender, nbytes: int) -> _InFlight:
        """Wait for a turn, for a place and for the grant of an item."""
        component = self._receiving()
        while True:
            if sender is next(iter(self.senders)) and len(self.buffer) < self.max_items:
                if not self.in_flight:
                    self.is_dry = self._available(component) < nbytes
                    try:
                        self._tell_if_dry()
                        return await self._grant(component, nbytes)
                    finally:
                        self.is_dry = False
                if self._leaves_room(component, nbytes):
                    try:
                        return await self._grant(component, nbytes, timeout=0.0)
                    except GrantTimeout:  # somebody else was faster
                        if not self.in_flight:
                            continue
                self._check_possible(component, nbytes)
                self.is_dry = True
                self._tell_if_dry()
            sender.called = anyio.Event()
            try:
                await sender.called.wait()
            finally:
                sender.called = None
                self.is_dry = False

    def admit_nowait(self, nbytes: int) -> _InFlight:
        """Give the grant of an item if it can be had at once, else raise ``WouldBlock``."""
        component = self._receiving()
        if self.senders or len(self.buffer) >= self.max_items:
            raise anyio.WouldBlock
        if self.in_flight and not self._leaves_room(component, nbytes):
            self._check_possible(component, nbytes)
            raise anyio.WouldBlock
        grant = self._new_grant(component, nbytes)
        try:
            grant._acquire_nowait()
        except QuotaExceeded:
            raise anyio.WouldBlock from None
        return self._sent(grant, nbytes)

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

    def _new_grant(
        self, component: Component, nbytes: int, timeout: float | None = None
    ) -> _InFlight:
        grant = _InFlight(component, nbytes, None if timeout is None else (None, timeout, False))
        grant._channel = self
        grant._in_flight = 0
        return grant

    async def _grant(
        self, component: Component, nbytes: int, timeout: float | None = None
    ) -> _InFlight:
        return self._sent(await self._new_grant(component, nbytes, timeout), nbytes)

    def _sent(self, grant: _InFlight, nbytes: int) -> _InFlight:
        grant._in_flight = nbytes
        self.in_flight += nbytes
        return grant

    def _leaves_room(self, component: Component, nbytes: int) -> bool:
        return self.in_flight + 2 * nbytes <= self._available(component)

    @staticmethod
    def _available(component: Component) -> int:
        """Give the most that the component could have now, without waiting."""
        limiter = component._limiter
        if limiter._observe:
            return 2 * MAX_BYTES
        available: int = limiter._ledger.available(component._account)
        return available

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

    def _tell_if_dry(self) -> None:
        if self.is_dry:
            for receiver in [each for each in self.receivers if not each.patient]:
                del self.receivers[receiver]
                receiver.dry = True
                receiver.told.set()

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
        nbytes = _measure(channel.size, item)
        grant = None
        sender = _Sender(self)
        channel.senders[sender] = None
        try:
            with sender.scope:
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
        channel.put(item, grant)

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
        channel.put(item, channel.admit_nowait(_measure(channel.size, item)))

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
        taken = await self._take()
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

    async def _take(self, *, patient: bool = True) -> tuple[T, _InFlight] | None:
        """Wait for an item and its charge.

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

    def __new__(  # type: ignore[misc]
        cls,
        size: Callable[[T], int] | None = None,
        component: Component | str | None = None,
        max_items: float = math.inf,
    ) -> tuple[MemorySendStream[T], MemoryReceiveStream[T]]:
        _check_count(max_items, "max_items")
        channel = _Channel[T](size, component, max_items)
        return MemorySendStream(channel), MemoryReceiveStream(channel)
