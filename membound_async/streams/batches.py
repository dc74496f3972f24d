"""Any async iterable, in lists under a grant each."""

from __future__ import annotations

import math
from collections.abc import AsyncIterable, Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import anyio

from membound_async.charges import Charge, available_to, belongs_to, check_count, measure
from membound_async.eventloop import EventLoop, Handle, running_loop
from membound_async.exceptions import GrantTooLarge, QuotaExceeded
from membound_async.grant import MemoryGrant, Options
from membound_async.sizes import MAX_BYTES, parse_size, size_of

from .items import NOTHING, OneConsumer, close
from .memory import MemoryReceiveStream

if TYPE_CHECKING:
    from membound_async.component import Component

__all__ = ["Batches"]

T = TypeVar("T")

_STEP_BYTES = 65536
"""How much a batch that grows asks for in advance, at the most."""


class Batches(OneConsumer[list[T]]):
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
    charge that they came with, and if anybody waits for memory of that component or of this
    one, the list is handed over.

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
        GrantDeadlock: from the iterator: the same, because all who hold memory wait for more,
            this task among them; see ``grow()``.
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
            check_count(max_items, "max_items")
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
        if self._reader is None:
            await self._batch.fill()
        else:
            await self._reader.fill()
            self._reader.stop_timer()
        if self._closed:
            raise StopAsyncIteration
        items, self._held = self._batch.take()
        return items

    def _give_back(self) -> None:
        held, self._held = self._held, []
        for grant in held:
            grant.release()

    def _let_go(self) -> None:
        self._give_back()
        self._batch.drop()

    async def _close_source(self) -> None:
        await (self._batch if self._reader is None else self._reader).aclose()

    def __del__(self) -> None:
        reader = getattr(self, "_reader", None)
        if reader is not None:
            reader.abandon()


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
        self._stream = source if isinstance(source, MemoryReceiveStream) else None
        self._component = component
        self._size = size
        self._max_items = max_items
        self.complete = False
        """Whether there is something to hand over: a list, or an error."""
        self._error: BaseException | None = None
        self._items: list[T] = []
        self._charges: list[MemoryGrant] = []
        """The grants of the list, its own first if it has one."""
        self._own: MemoryGrant | None = None
        self._room = 0
        """How much of its own grant no item uses yet."""
        self._item: Any = NOTHING
        """What was read but is in no list yet, its size, and the charge it came with."""
        self._nbytes = 0
        self._charge: MemoryGrant | None = None

    async def fill(self, timer: _Reader[T] | None = None) -> None:
        """Read on until there is something to hand over, or nobody wants it any more.

        Cancelled, it leaves everything as it is.
        """
        iterator, stream = self._iterator, self._stream
        size = size_of if self._size is None else self._size
        while not self.complete:
            if self._item is NOTHING:
                try:
                    if stream is None:
                        item = await iterator.__anext__()
                        nbytes = size(item)
                        if type(nbytes) is not int or not 0 <= nbytes <= MAX_BYTES:
                            nbytes = parse_size(nbytes, "size(item)")
                        self._nbytes = nbytes
                        self._item = item
                    elif not await self._receive(stream):
                        if self._items:
                            break
                        continue  # the list was taken meanwhile, so there is nothing to let go
                except Exception as error:  # noqa: BLE001
                    self._drop_charge()
                    self._error = error
                    break
                if timer is not None and not timer.wanted:
                    return
            if self._items and self._charge is None and self._nbytes <= self._room:
                self._room -= self._nbytes
            elif not await self._admit():
                break
            self._items.append(self._item)
            self._item = NOTHING
            if len(self._items) >= self._max_items:
                break
            if timer is not None:
                timer.has_put(first=len(self._items) == 1)
        self.complete = True

    async def _receive(self, stream: MemoryReceiveStream[T]) -> bool:
        """Take an item with its charge; False if somebody waits for what this list holds."""
        try:
            taken = await stream.take(holding=self._component if self._items else None)
        except anyio.EndOfStream:
            raise StopAsyncIteration from None
        if taken is None:
            return False
        item, charge = taken
        self._charge = charge
        if not belongs_to(charge, self._component):
            size = self._size
            self._nbytes = charge.size if size is None else measure(size, item)
        self._item = item
        return True

    async def _admit(self) -> bool:
        """See to it that the item that was read is paid for; False if it has to wait."""
        charge = self._charge
        if charge is not None and belongs_to(charge, self._component):
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
                self._item = NOTHING
                self._error = error
                return False
        return True

    async def _begin(self) -> None:
        nbytes = self._nbytes
        up_to = nbytes + self._advance(nbytes)
        options = Options(up_to) if up_to > nbytes else None
        self._own = await Charge(self._component, nbytes, options)
        self._room = self._own.size - nbytes
        self._charges.append(self._own)

    def _grow(self) -> bool:
        """Get room for the item without waiting; False if there is none."""
        missing = self._nbytes - self._room
        if missing > 0:
            if self._own is None:  # what is there has come with charges, from another limiter
                return False
            more = max(missing, self._advance(self._own.size))
            try:
                self._own.grow_nowait(more)
            except (QuotaExceeded, GrantTooLarge):
                return False
            self._room += more
        self._room -= self._nbytes
        return True

    def _advance(self, used: int) -> int:
        """Say how much more to ask for, in advance, so that few items have to ask.

        A batch that lasts asks for twice as much each time; never for what others may miss.
        """
        if self._max_items == 1:
            return 0
        return int(min(used, _STEP_BYTES, available_to(self._component) / 64))

    def _drop_charge(self) -> None:
        if self._charge is not None:
            self._charge.release()
            self._charge = None

    def take(self) -> tuple[list[T], list[MemoryGrant]]:
        """Hand over the list and its grants; raise what there was instead of one."""
        if not self._items:
            self.complete = False
            error, self._error = self._error, None
            assert error is not None
            raise error
        if self._room and self._own is not None:
            self._own.shrink(self._room)
        taken = self._items, self._charges
        self._items, self._charges, self._own = [], [], None
        self._room = 0
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
        self._room, self._item, self._error = 0, NOTHING, None

    async def aclose(self) -> None:
        """Close the source."""
        await close(self._iterator, self._source)


class _Reader(Generic[T]):
    """Fills a batch in a task of its own, so that its time can be over without cancelling.

    Attributes:
        wanted: whether anybody waits for the batch.
    """

    def __init__(self, batch: _Batch[T], max_seconds: float) -> None:
        self._batch = batch
        self._max_seconds = max_seconds
        self._due_at = math.inf
        self._timer: Handle | None = None
        self.wanted = False
        self._loop: EventLoop | None = None
        self._task: Handle | None = None
        self._running = self._started = self._closing = self._abandoned = False
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
        self._abandoned = True
        if self._loop is not None:
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
        self.stop_timer()
        if self._abandoned and not self._running:
            self._batch.drop()
        # A task that is cancelled before it begins would never close the source.
        if self._task is not None and (self._started or not self._closing):
            self._task.cancel()

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

    def stop_timer(self) -> None:
        """Forget the time of the batch."""
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
                    await batch.fill(self)
                    self._tell()
                else:
                    self._parked = loop.place()
                    try:
                        await self._parked
                    finally:
                        self._parked = None
        except BaseException as error:
            if self._abandoned:
                batch.drop()  # now: the error and what it passed through hold each other
            elif not self._closing:
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
