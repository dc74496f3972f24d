"""What ``/memory/events`` sends: a snapshot per interval, to each reader who keeps up.

A snapshot is taken and encoded once per interval, by whichever reader is the first to want it,
and all readers send the same bytes. A reader waits in ``send`` while its client does not read,
and goes on with the newest snapshot: what it has missed is kept nowhere.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from functools import cached_property

import anyio

from .answers import Answer, describe_problem, start
from .asgi import Receive, Send
from .snapshot import StatusSnapshot

__all__ = ["EventStream", "Frame", "Readers", "SnapshotFeed"]

UNBUFFERED = (b"x-accel-buffering", b"no")
"""Or nginx would keep events until it has many."""

EARLY_SECONDS = 0.001
"""How much too early a timer may fire, by the clock of its event loop."""

RETRY_MILLISECONDS = 2000
"""When a client is to connect again after its connection was lost."""

STALLED_SECONDS = 60.0
"""How long a client may take for one snapshot; then its place is for somebody else."""

LOOK_SECONDS = 0.5
"""How often to look whether the server is about to end."""

LAST_WORD_SECONDS = 1.0
"""How long the end of a stream may take."""


class Frame:
    """One snapshot, and the event that all readers send of it."""

    def __init__(self, number: int, snapshot: StatusSnapshot) -> None:
        self.number = number
        self.snapshot = snapshot

    @cached_property
    def event(self) -> bytes:
        """The snapshot as a server-sent event."""
        head = f"event: snapshot\nid: {self.number}\nretry: {RETRY_MILLISECONDS}\ndata: "
        return head.encode() + self.snapshot.to_json() + b"\n\n"


class SnapshotFeed:
    """The newest snapshot; a new one once per interval, when somebody asks.

    Args:
        take: takes a snapshot.
        interval_seconds: how old one may become.
    """

    def __init__(self, take: Callable[[], StatusSnapshot], interval_seconds: float) -> None:
        self._take = take
        self._interval_seconds = interval_seconds
        self._tick = -1
        self._newest: Frame | None = None

    def newest(self) -> Frame:
        """Give the snapshot of this interval."""
        tick = math.floor((anyio.current_time() + EARLY_SECONDS) / self._interval_seconds)
        if self._newest is None or tick != self._tick:
            number = 1 if self._newest is None else self._newest.number + 1
            self._newest = Frame(number, self._take())
            self._tick = tick
        return self._newest


class Readers:
    """Counts those who read event streams.

    Args:
        feed: what they get.
        most: how many there may be at a time.
    """

    def __init__(self, feed: SnapshotFeed, most: int) -> None:
        self.feed = feed
        self._most = most
        self.count = 0
        self.is_closed = False
        """Whether all streams are to end, and no other is to begin."""

    def stream(self, interval_seconds: float) -> Answer | EventStream:
        """Give the answer to one more: a stream, unless there are too many already."""
        if self.is_closed:
            return describe_problem(503, "the server is about to end")
        if self.count >= self._most:
            return describe_problem(
                503,
                f"there are {self.count} readers of events already, and no more are let in "
                f"(max_readers={self._most})",
                headers=[(b"retry-after", b"10")],
            )
        return EventStream(self, interval_seconds)


class EventStream:
    """An answer without an end: a snapshot at each multiple of the interval.

    Args:
        readers: all who read one.
        interval_seconds: how often a snapshot is sent.
    """

    def __init__(self, readers: Readers, interval_seconds: float) -> None:
        self._readers = readers
        self._interval_seconds = interval_seconds

    async def send_to(self, receive: Receive, send: Send, *, has_body: bool) -> None:
        """Send snapshots until the client goes or does not read, or the server ends."""
        self._readers.count += 1
        try:
            await send(start(200, "text/event-stream", [UNBUFFERED]))
            if has_body:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._watch_server, tasks.cancel_scope)
                    tasks.start_soon(_watch_client, receive, tasks.cancel_scope)
                    await self._send_snapshots(send)
                    tasks.cancel_scope.cancel()
            with anyio.move_on_after(LAST_WORD_SECONDS):
                await send(_body(b"", more=False))
        finally:
            self._readers.count -= 1

    async def _send_snapshots(self, send: Send) -> None:
        sent = 0
        while True:
            frame = self._readers.feed.newest()
            if frame.number != sent:
                with anyio.move_on_after(STALLED_SECONDS) as patience:
                    await send(_body(frame.event, more=True))
                if patience.cancelled_caught:
                    return
                sent = frame.number
            # All readers wake together, so that the first of them takes the snapshot for all.
            tick = math.floor((anyio.current_time() + EARLY_SECONDS) / self._interval_seconds)
            await anyio.sleep_until((tick + 1) * self._interval_seconds)

    async def _watch_server(self, scope: anyio.CancelScope) -> None:
        while not (self._readers.is_closed or _server_is_ending()):  # noqa: ASYNC110 -- nobody tells
            await anyio.sleep(LOOK_SECONDS)
        scope.cancel()


def _body(body: bytes, *, more: bool) -> dict[str, object]:
    return {"type": "http.response.body", "body": body, "more_body": more}


async def _watch_client(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def _server_is_ending() -> bool:
    """Tell whether uvicorn, running this process, was asked to end.

    It tells applications only after the last connection has closed, and a stream of events has
    no end of its own: the two would wait for each other until somebody loses patience.
    """
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return getattr(server, "should_exit", None) is True
