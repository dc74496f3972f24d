"""The ASGI middleware, by hand in virtual time; test_asgi_servers.py has real servers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import structlog.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from membound_async import (
    GrantDeadlock,
    GrantReleased,
    GrantTimeout,
    GrantTooLarge,
    LimiterSettings,
    MemoryGrant,
    MemoryLimiter,
    PressurePolicy,
    QuotaExceeded,
    UnknownComponent,
    current_component,
    grant,
    testing,
)
from membound_async.integrations.asgi import (
    MemoryMiddleware,
    MiddlewareStatistics,
    request_grant,
)
from membound_async.testing import ScriptedProbe, VirtualTimeLoop
from tests.left import assert_nothing_is_left

Application = Callable[[Any, Any, Any], Awaitable[None]]

DISCONNECT = {"type": "http.disconnect"}


def part(body: bytes | int, more: bool = True) -> dict[str, Any]:
    body = bytes(body) if isinstance(body, int) else body
    return {"type": "http.request", "body": body, "more_body": more}


class Exchange:
    """A client and its server: what they pass on, and what they are sent.

    Args:
        script: messages that can be received, and for how many seconds nothing is. When it has
            ended the client waits for its answer.
        length: what the request says of its length; None for chunked.
    """

    def __init__(
        self, *script: dict[str, Any] | float, length: int | bytes | None = 0, **scope: Any
    ) -> None:
        self._script = iter(script)
        self.received = 0
        self.sent: list[dict[str, Any]] = []
        self.ended_at: float | None = None
        self._complete = anyio.Event()
        headers = [(b"host", b"example.org")]
        if length is None:
            headers.append((b"transfer-encoding", b"chunked"))
        elif length:
            value = length if isinstance(length, bytes) else b"%d" % length
            headers.append((b"content-length", value))
        self.scope = {
            "type": "http",
            "http_version": "1.1",
            "path": "/",
            "headers": headers,
            **scope,
        }

    async def receive(self) -> dict[str, Any]:
        for step in self._script:
            if isinstance(step, dict):
                self.received += 1
                return step
            with anyio.move_on_after(step):
                await self._complete.wait()
        await self._complete.wait()
        return DISCONNECT

    async def send(self, message: dict[str, Any]) -> None:
        await anyio.lowlevel.checkpoint()
        self.sent.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._complete.set()

    async def run(self, app: Application) -> Exchange:
        await app(self.scope, self.receive, self.send)
        self.ended_at = anyio.current_time()
        return self

    @property
    def status(self) -> int | None:
        starts = [m["status"] for m in self.sent if m["type"] == "http.response.start"]
        assert len(starts) <= 1
        return starts[0] if starts else None

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def is_complete(self) -> bool:
        return self._complete.is_set()


async def answer(send: Any, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})


async def read(receive: Any) -> bytes | None:
    """Give the body; None if the client has gone before its end."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += bytes(message["body"])
        if not message["more_body"]:
            return body


class Handler:
    """An application that reads the body, works for some seconds, and answers."""

    def __init__(self, seconds: float = 0) -> None:
        self.seconds = seconds
        self.bodies: list[bytes | None] = []
        self.granted: list[int] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.granted.append(request_grant().size)
        body = await read(receive)
        self.bodies.append(body)
        if body is None:
            raise ConnectionResetError("the client has gone")
        await anyio.sleep(self.seconds)
        await answer(send)


async def reader(scope: Any, receive: Any, send: Any) -> None:
    """Read the body and answer."""
    await read(receive)
    await answer(send)


def bounded(app: Application, limit: int = 1000, **options: Any) -> Any:
    """Give the middleware before an application, with all of a new limiter for itself."""
    limiter = options.pop("limiter", None) or testing.limiter(limit, share=1)
    return MemoryMiddleware(app, limiter, **options)


def free(middleware: MemoryMiddleware) -> int:
    assert middleware._limiter is not None
    return middleware._limiter.statistics().free_bytes


def others(middleware: MemoryMiddleware, nbytes: int) -> MemoryGrant:
    """Hold something that is given back by nobody who waits here."""
    assert middleware._limiter is not None
    return middleware._limiter.component("other").grant_nowait(nbytes)


@pytest.mark.virtual_time
async def test_a_request_holds_its_length_times_the_factor_and_a_base_until_it_is_done():
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        component = current_component()
        assert component is not None
        seen.append((component.path, request_grant().size, free(middleware)))
        await read(receive)
        await answer(send)
        seen.append((component.path, request_grant().size, free(middleware)))

    middleware = bounded(app, factor=2.5, base_bytes="16")
    exchange = await Exchange(part(101, more=False), length=101).run(middleware)
    assert exchange.status == 200
    assert seen == [("http", 269, 731)] * 2  # 16 + 252.5, rounded up
    assert free(middleware) == 1000
    assert current_component() is None
    with pytest.raises(LookupError, match="add MemoryMiddleware"):
        request_grant()
    assert middleware.statistics() == MiddlewareStatistics(0, 0, 1, 0, 0, 0, 0, 0)


@pytest.mark.virtual_time
async def test_a_request_waits_for_those_before_it():
    handler = Handler(seconds=3)
    middleware = bounded(handler)
    first = Exchange(part(700, more=False), length=700)
    second = Exchange(part(400, more=False), length=400)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(first.run, middleware)
        await anyio.sleep(1)
        tasks.start_soon(second.run, middleware)
        await anyio.sleep(1)
        assert middleware.statistics() == MiddlewareStatistics(1, 1, 1, 0, 0, 0, 0, 0)
        assert second.received == 0
    assert (first.status, second.status) == (200, 200)
    assert (first.ended_at, second.ended_at) == (3, 6)
    assert middleware.statistics() == MiddlewareStatistics(0, 0, 2, 1, 0, 0, 0, 0)
    assert free(middleware) == 1000


@pytest.mark.virtual_time
async def test_what_waits_too_long_is_shed_before_its_body_is_read():
    handler = Handler()
    middleware = bounded(handler, max_wait_seconds=4, retry_after_seconds=7)
    with others(middleware, 700):
        read_when_answered = []

        class Watched(Exchange):
            async def send(self, message: dict[str, Any]) -> None:
                read_when_answered.append((self.received, anyio.current_time()))
                await super().send(message)

        exchange = await Watched(part(100), part(300, more=False), length=400).run(middleware)
    assert exchange.status == 503
    assert exchange.headers == {
        b"content-type": b"text/plain; charset=utf-8",
        b"content-length": b"20",
        b"retry-after": b"7",
        b"connection": b"close",
    }
    assert b"".join(m["body"] for m in exchange.sent[1:]) == b"Service Unavailable\n"
    assert exchange.is_complete
    assert read_when_answered == [(0, 4), (0, 4), (2, 4)]  # the rest is dropped then
    assert handler.bodies == []
    assert middleware.statistics() == MiddlewareStatistics(0, 0, 0, 1, 1, 0, 0, 0)
    assert free(middleware) == 1000


@pytest.mark.virtual_time
async def test_a_client_that_goes_on_sending_is_read_for_a_second_and_then_cut_off():
    middleware = bounded(Handler())
    slow = [step for _ in range(100) for step in (part(1), 0.3)]
    exchange = await Exchange(*slow, length=5000).run(middleware)
    assert exchange.status == 413
    assert (exchange.ended_at, exchange.received) == (1, 4)
    assert exchange.is_complete


@pytest.mark.virtual_time
@pytest.mark.parametrize("gone", [DISCONNECT, part(0, more=False)])
async def test_a_client_that_stops_sending_is_not_waited_for(gone):
    exchange = await Exchange(part(1), gone, length=5000).run(bounded(Handler()))
    assert (exchange.status, exchange.ended_at) == (413, 0)


@pytest.mark.parametrize(
    ("length", "status"),
    [
        (1000, 200),
        (1001, 413),
        (b"9" * 5000, 413),
        (2**62, 413),
        (b"-1", 400),
        (b"1, 1", 400),
        (b"x", 400),
        ("²".encode(), 400),
    ],
)
async def test_a_length_that_cannot_be_is_refused_at_once(length, status):
    handler = Handler()
    middleware = bounded(handler)
    exchange = await Exchange(part(1000, more=False), length=length).run(middleware)
    assert exchange.status == status
    assert (b"retry-after" in exchange.headers) is False
    assert len(handler.bodies) == (status == 200)
    assert middleware.statistics()[4:7] == (0, status == 413, status == 400)
    assert free(middleware) == 1000


async def test_of_several_lengths_none_is_believed():
    exchange = Exchange(part(1, more=False), length=1)
    exchange.scope["headers"].append((b"content-length", b"1"))
    assert (await exchange.run(bounded(Handler()))).status == 400


async def test_a_body_in_chunks_goes_before_a_length():
    handler = Handler()
    middleware = bounded(handler, ahead_bytes=10)
    exchange = Exchange(part(500, more=False), length=5)
    exchange.scope["headers"].append((b"transfer-encoding", b"chunked"))
    assert (await exchange.run(middleware)).status == 200
    assert handler.granted == [10]


async def test_http_2_says_nothing_of_a_body_without_a_length():
    handler = Handler()
    middleware = bounded(handler, ahead_bytes=10)
    exchange = await Exchange(part(500, more=False), http_version="2").run(middleware)
    assert exchange.status == 200
    assert handler.granted == [10]
    refused = await Exchange(part(500), length=2000, http_version="2").run(middleware)
    assert refused.status == 413
    assert b"connection" not in refused.headers
    assert (refused.received, refused.is_complete) == (0, True)


# --- bodies that grow


async def test_a_body_without_a_length_is_granted_ahead_and_the_rest_given_back():
    sizes = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sizes.append(request_grant().size)
        for _ in range(4):
            await receive()
            sizes.append(request_grant().size)
        await answer(send)

    middleware = bounded(app, factor=2, base_bytes=5, ahead_bytes=50)
    exchange = Exchange(part(30), part(90), part(10), part(0, more=False), length=None)
    assert (await exchange.run(middleware)).status == 200
    # 50 ahead of the 0, 30, 120 and 130 that were received, but 120 when they came unexpected.
    assert sizes == [5 + 2 * n for n in (50, 50, 120, 170, 130)]
    assert free(middleware) == 1000


async def test_a_body_that_is_shorter_than_it_said_gives_back_the_rest():
    sizes = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await read(receive)
        sizes.append(request_grant().size)
        await answer(send)

    middleware = bounded(app, factor=2)
    exchange = await Exchange(part(30), part(40, more=False), length=400).run(middleware)
    assert exchange.status == 200
    assert sizes == [140]


@pytest.mark.virtual_time
async def test_a_body_that_is_longer_than_it_said_is_cut_off():
    handler = Handler()
    middleware = bounded(handler)
    exchange = Exchange(part(30), part(41), part(500, more=False), length=70)
    assert (await exchange.run(middleware)).status == 400
    assert handler.bodies == [None]
    assert middleware.statistics().malformed == 1
    assert free(middleware) == 1000


@pytest.mark.virtual_time
async def test_a_body_that_cannot_grow_in_time_is_shed():
    handler = Handler()
    middleware = bounded(handler, ahead_bytes=100, max_wait_seconds=4)
    with others(middleware, 700):
        exchange = await Exchange(part(90), part(250), part(9), length=None).run(middleware)
    assert exchange.status == 503
    assert (exchange.headers[b"retry-after"], exchange.headers[b"connection"]) == (b"5", b"close")
    assert exchange.ended_at == 4 + 1
    assert handler.bodies == [None]  # and what it raises then is nobody's concern
    assert free(middleware) == 1000
    assert middleware.statistics() == MiddlewareStatistics(0, 0, 1, 1, 1, 0, 0, 0)


async def test_a_body_that_grows_beyond_all_there_is_gets_413():
    middleware = bounded(Handler(), ahead_bytes=100)
    exchange = await Exchange(part(90), part(2500, more=False), length=None).run(middleware)
    assert exchange.status == 413
    assert middleware.statistics().too_large == 1


@pytest.mark.virtual_time
async def test_a_response_that_has_begun_is_not_begun_again():
    events = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()
        events.append(await receive())
        events.append(await receive())
        await send({"type": "http.response.body", "body": b"lost"})

    middleware = bounded(app, ahead_bytes=100, max_wait_seconds=4)
    with others(middleware, 700):
        exchange = await Exchange(part(90), part(250), length=None).run(middleware)
    assert events == [DISCONNECT, DISCONNECT]
    assert exchange.status == 200
    assert len(exchange.sent) == 1  # and no end, so the server cuts it off
    assert middleware.statistics().shed == 1


@pytest.mark.virtual_time
async def test_what_is_sent_after_the_request_was_refused_raises():
    raised = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await read(receive)
        try:
            await answer(send)
        except OSError as error:
            raised.append(error)
            raise

    exchange = await Exchange(part(71), length=70).run(bounded(app))
    assert exchange.status == 400
    assert len(raised) == 1


@pytest.mark.virtual_time
async def test_who_sends_nothing_of_a_body_gives_back_what_it_holds():
    handler = Handler()
    middleware = bounded(handler, body_timeout_seconds=20)
    exchange = await Exchange(part(30), 19, part(30), 1000, length=70).run(middleware)
    assert exchange.status == 408
    assert exchange.ended_at == 19 + 20 + 1
    assert handler.bodies == [None]
    assert free(middleware) == 1000


@pytest.mark.virtual_time
async def test_who_has_sent_its_body_may_wait_for_the_answer_as_long_as_it_likes():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert await read(receive) == bytes(70)
        assert await receive() == DISCONNECT

    exchange = Exchange(part(70, more=False), 5000, DISCONNECT, length=70)
    await exchange.run(bounded(app))
    assert exchange.ended_at == 5000
    assert exchange.sent == []


@pytest.mark.virtual_time
async def test_a_body_timeout_can_be_turned_off():
    exchange = Exchange(part(30), 5000, part(40, more=False), length=70)
    assert (await exchange.run(bounded(reader, body_timeout_seconds=None))).status == 200


# --- many at once


@pytest.mark.virtual_time
@pytest.mark.parametrize("ours", [True, False], ids=["in their task", "in tasks of their own"])
async def test_many_that_hold_something_and_want_more_do_not_block_each_other(ours):
    """All is held by those who want more: the youngest is refused, and not after the deadline."""

    async def apart(scope: Any, receive: Any, send: Any) -> None:
        async with anyio.create_task_group() as tasks:  # as BaseHTTPMiddleware does
            tasks.start_soon(reader, scope, receive, send)

    middleware = bounded(reader if ours else apart, ahead_bytes=100, max_wait_seconds=60)
    # 5 of them want 500 each, and have 200.
    steps = [step for _ in range(5) for step in (part(100), 0.1)]
    exchanges = [Exchange(*steps, part(0, more=False), length=None) for _ in range(5)]
    async with anyio.create_task_group() as tasks:
        for exchange in exchanges:
            tasks.start_soon(exchange.run, middleware)
            await anyio.sleep(0.001)
    statuses = [exchange.status for exchange in exchanges]
    assert statuses[0] == 200
    assert set(statuses) == {200, 503}
    assert max(exchange.ended_at or 0 for exchange in exchanges) < 20
    assert free(middleware) == 1000


@pytest.mark.virtual_time
async def test_many_that_want_more_on_behalf_of_senders_end_with_the_deadline():
    options: Any = {"sender": lambda scope: scope["client"], "max_wait_seconds": 6}
    middleware = bounded(reader, ahead_bytes=100, **options)
    steps = [step for _ in range(5) for step in (part(100), 0.1)]
    exchanges = [Exchange(*steps, part(0, more=False), length=None, client=n) for n in range(5)]
    async with anyio.create_task_group() as tasks:
        for exchange in exchanges:
            tasks.start_soon(exchange.run, middleware)
            await anyio.sleep(0.001)
    assert {exchange.status for exchange in exchanges} == {200, 503}
    assert max(exchange.ended_at or 0 for exchange in exchanges) < 4 * 6
    assert free(middleware) == 1000


@pytest.mark.virtual_time
async def test_no_more_than_so_many_wait():
    middleware = bounded(Handler(), max_waiting=2, max_wait_seconds=8)
    assert middleware._limiter is not None
    exchanges = [Exchange(part(500, more=False), length=500) for _ in range(4)]
    async with (
        middleware._limiter.component("other").grant(700),
        anyio.create_task_group() as tasks,
    ):
        for exchange in exchanges:
            tasks.start_soon(exchange.run, middleware)
            await anyio.sleep(1)
    assert [exchange.status for exchange in exchanges] == [503] * 4
    assert [exchange.ended_at for exchange in exchanges] == [8, 9, 2, 3]
    assert middleware.statistics().shed == 4


@pytest.mark.virtual_time
async def test_a_sender_cannot_take_everything():
    """Of 1000, shared by halves: one sender may have 1/4 of it, the next less."""
    handler = Handler(seconds=10)
    middleware = bounded(
        handler,
        limiter=testing.limiter(1000),
        sender=lambda scope: scope["client"][0],
        max_wait_seconds=1,
    )
    hog = [Exchange(part(100, more=False), length=100, client=("hog", n)) for n in range(9)]
    other = Exchange(part(100, more=False), length=100, client=("other", 1))
    async with anyio.create_task_group() as tasks:
        for exchange in hog:
            tasks.start_soon(exchange.run, middleware)
        await anyio.sleep(2)
        tasks.start_soon(other.run, middleware)
    assert sorted(exchange.status or 0 for exchange in hog) == [200] * 2 + [503] * 7
    assert (other.status, other.ended_at) == (200, 12)
    assert free(middleware) == 1000


# --- clients that go


@pytest.mark.virtual_time
async def test_a_client_that_goes_while_it_waits_is_not_waited_for():
    handler = Handler()
    middleware = bounded(handler, base_bytes=500)
    with others(middleware, 700):
        exchange = await Exchange(part(0, more=False), 3, DISCONNECT).run(middleware)
        assert free(middleware) == 300
    assert exchange.ended_at == 3
    assert (exchange.sent, handler.granted) == ([], [])
    assert middleware.statistics() == MiddlewareStatistics(0, 0, 0, 1, 0, 0, 0, 1)


@pytest.mark.virtual_time
async def test_what_was_received_while_it_waited_is_passed_on():
    handler = Handler()
    middleware = bounded(handler, base_bytes=500)
    exchange = Exchange(part(0, more=False))
    async with anyio.create_task_group() as tasks:
        with others(middleware, 700):
            tasks.start_soon(exchange.run, middleware)
            await anyio.sleep(3)
            assert exchange.received == 1
    assert (exchange.status, handler.bodies) == (200, [b""])


@pytest.mark.virtual_time
async def test_one_without_a_body_is_shed_and_its_connection_kept():
    middleware = bounded(Handler(), base_bytes=500)
    with others(middleware, 700):
        exchange = await Exchange(part(0, more=False)).run(middleware)
    assert (exchange.status, exchange.ended_at) == (503, 10)
    assert b"connection" not in exchange.headers


@pytest.mark.virtual_time
async def test_a_client_that_goes_amid_its_body_is_the_applications_concern():
    handler = Handler()
    middleware = bounded(handler)
    with pytest.raises(ConnectionResetError, match="has gone"):
        await Exchange(part(10), DISCONNECT, length=70).run(middleware)
    assert handler.bodies == [None]
    assert free(middleware) == 1000


@pytest.mark.virtual_time
async def test_a_client_that_has_gone_cannot_be_told():
    class Gone(Exchange):
        async def send(self, message: dict[str, Any]) -> None:
            raise BrokenPipeError

    exchange = await Gone(part(10), DISCONNECT, length=5000).run(bounded(Handler()))
    assert exchange.sent == []


# --- handlers


async def test_a_handler_grows_and_shrinks_the_grant_of_its_request():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = await read(receive)
        assert body is not None
        held = request_grant()
        await held.grow(3 * len(body))
        assert free(middleware) == 600
        held.shrink(350)
        assert free(middleware) == 950
        held.shrink(50)
        held.release()
        await answer(send)

    middleware = bounded(app)
    assert (await Exchange(part(100, more=False), length=100).run(middleware)).status == 200
    assert free(middleware) == 1000


async def test_a_handler_may_release_its_grant_even_where_that_is_watched():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        request_grant().release()
        await read(receive)
        await answer(send)

    limiter = testing.limiter(1000, share=1, settings=LimiterSettings(debug=True, reclaim=False))
    middleware = bounded(app, limiter=limiter)
    assert (await Exchange(part(100, more=False), length=100).run(middleware)).status == 200
    # A body that nobody knows the length of is not read without a grant.
    with pytest.raises(GrantReleased):
        await Exchange(part(100, more=False), length=None).run(
            bounded(app, limiter=limiter, ahead_bytes=10)
        )
    assert limiter.statistics().free_bytes == 1000


async def test_a_grant_in_a_handler_is_another_one_of_its_component():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with grant(300) as more:
            assert more.component.path == "upload"
            assert more is not request_grant()
            assert free(middleware) == 600
        assert free(middleware) == 900
        await answer(send)

    middleware = bounded(app, component="upload")
    assert (await Exchange(length=100).run(middleware)).status == 200


async def test_a_thread_of_a_handler_sees_its_grant():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        def work() -> None:
            assert threading.current_thread() is not threading.main_thread()
            with grant(300) as more:
                assert more.component.path == "http"
                assert free(middleware) == 600
            request_grant().shrink(40)

        await anyio.to_thread.run_sync(work)
        assert free(middleware) == 940
        await answer(send)

    middleware = bounded(app)
    assert (await Exchange(length=100).run(middleware)).status == 200
    assert free(middleware) == 1000


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (GrantTimeout("x", 1, 1.0), 503),
        (GrantDeadlock("x", 1, ()), 503),
        (QuotaExceeded("x", 2, 1, "why"), 503),
        (GrantTooLarge("x", 2, 1, "why"), 413),
    ],
)
async def test_what_a_handler_is_not_granted_becomes_its_answer(error, status):
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/late":
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise error

    middleware = bounded(app)
    assert (await Exchange(length=0).run(middleware)).status == status
    with pytest.raises(type(error)):
        await Exchange(length=0, path="/late").run(middleware)
    assert free(middleware) == 1000


async def test_other_errors_of_a_handler_are_passed_on():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise KeyError("mine")

    middleware = bounded(app)
    with pytest.raises(KeyError, match="mine"):
        await Exchange(length=100).run(middleware)
    assert free(middleware) == 1000


# --- whose memory


@pytest.mark.parametrize(
    ("path", "component"),
    [
        ("/", "http"),
        ("/upload", "upload"),
        ("/upload/a/b", "upload"),
        ("/uploads", "http"),
        ("/upload/video", "video"),
        ("/upload/video/1", "video"),
        ("/healthz", None),
    ],
)
@pytest.mark.parametrize("root", ["", "/app", "/app/"])
async def test_paths_have_their_components(path, component, root):
    seen: list[str | None] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        current = current_component()
        seen.append(None if current is None else current.path)
        await answer(send)

    limiter = testing.limiter(1000)
    video = limiter.component("video", firm_limit=300)
    routes = {"/upload": "upload", "/upload/video/": video, "/healthz": None}
    middleware = bounded(app, limiter=limiter, routes=routes)
    full = root.rstrip("/") + path
    await Exchange(length=100, path=full, root_path=root).run(middleware)
    assert seen == [component]


async def test_a_route_of_all_paths():
    middleware = bounded(reader, routes={"/": None}, component="x")
    exchange = Exchange(part(0, more=False), length=5000, path="/a")
    assert (await exchange.run(middleware)).status == 200


async def test_a_function_gives_a_component_that_is_there():
    limiter = testing.limiter(1000)
    known = limiter.component("tenant.a")
    names = {"/a": "tenant.a", "/b": known, "/c": None, "/d": "tenant.d"}
    middleware = bounded(reader, limiter=limiter, component=lambda scope: names[scope["path"]])
    for path, peak in (("/a", 100), ("/b", 200), ("/c", 200)):
        exchange = Exchange(part(peak, more=False), length=peak, path=path)
        assert (await exchange.run(middleware)).status == 200
        assert known.statistics().peak_granted_bytes == peak
    with pytest.raises(UnknownComponent):
        await Exchange(length=0, path="/d").run(middleware)


async def test_a_factor_for_each_request():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert request_grant().size == {"/json": 900, "/": 100}[scope["path"]]
        await answer(send)

    middleware = bounded(app, factor=lambda scope: 9 if scope["path"] == "/json" else 1)
    for path in ("/json", "/"):
        assert (await Exchange(length=100, path=path).run(middleware)).status == 200


async def test_the_limiter_that_the_process_has_entered_is_found():
    handler = Handler()
    middleware = MemoryMiddleware(handler)
    async with testing.limiter(1000) as limiter:
        assert (await Exchange(part(100, more=False), length=100).run(middleware)).status == 200
        assert limiter.find("http").statistics().peak_granted_bytes == 100
        exchange = Exchange(part(501, more=False), length=501)
        assert (await exchange.run(middleware)).status == 413


async def test_without_a_limiter_nothing_is_bounded():
    handler = Handler()
    middleware = MemoryMiddleware(handler, MemoryLimiter.noop(), component="of my own")
    for length in (2**40, None):
        exchange = await Exchange(part(100, more=False), length=length).run(middleware)
        assert exchange.status == 200
    assert handler.granted == [2**40, 64 * 1024]


@pytest.mark.virtual_time
async def test_a_minimum_is_waited_for_too():
    limiter = testing.limiter(1000, mode="disabled")
    limiter.component("big", minimum=600)
    middleware = bounded(Handler(), limiter=limiter, component="big", max_wait_seconds=3)
    with limiter.component("other").grant_nowait(500):
        exchange = await Exchange(length=100).run(middleware)
        assert (exchange.status, exchange.ended_at) == (503, 3 + 1)
        socket = Socket()
        await socket.run(middleware)
        assert socket.sent == [closed(1013, "Service Unavailable")]
    assert limiter.statistics().free_bytes == 1000


async def test_other_scopes_are_let_past():
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, receive, send))

    await bounded(app)({"type": "lifespan"}, "receive", "send")
    assert seen == [({"type": "lifespan"}, "receive", "send")]


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("script", "length"),
    [
        ([part(5000, more=False)], 5000),
        ([part(5000), 1000, part(1, more=False)], 5001),
        ([part(5000, more=False)], 70),
        ([part(5000), part(1, more=False)], None),
        ([part(5000, more=False)], b"x"),
    ],
)
async def test_while_the_limiter_only_observes_nothing_is_refused(script, length):
    handler = Handler()
    limiter = testing.limiter(1000, observe=True)
    middleware = bounded(handler, limiter=limiter, max_waiting=0)
    exchange = await Exchange(*script, length=length).run(middleware)
    assert exchange.status == 200
    assert handler.bodies == [b"".join(m["body"] for m in script if isinstance(m, dict))]
    assert limiter.statistics().free_bytes == 1000
    assert middleware.statistics()[2:] == (1, 0, 0, 0, 0, 0)


@pytest.mark.virtual_time
async def test_of_many_that_are_shed_one_is_logged_each_second():
    middleware = bounded(Handler())
    with structlog.testing.capture_logs() as logged:
        for _ in range(5):
            await Exchange(length=5000, http_version="2").run(middleware)
            await anyio.sleep(0.4)
    events = [event for event in logged if event["event"] == "membound.request_shed"]
    assert [event["others"] for event in events] == [0, 2]
    assert events[0] == {
        "event": "membound.request_shed",
        "log_level": "warning",
        "component": "http",
        "status": 413,
        "reason": events[0]["reason"],
        "others": 0,
    }
    assert "wanted 5 000 bytes" in events[0]["reason"]


@pytest.mark.parametrize(
    "options",
    [
        {"factor": -1},
        {"factor": float("inf")},
        {"factor": "2"},
        {"base_bytes": -1},
        {"ahead_bytes": 0},
        {"max_wait_seconds": 0},
        {"max_wait_seconds": float("nan")},
        {"retry_after_seconds": -1},
        {"max_waiting": -1},
        {"body_timeout_seconds": -1},
        {"routes": {"upload": "upload"}},
    ],
)
def test_refuses_what_makes_no_sense(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        bounded(reader, **options)


# --- WebSockets


def closed(code: int, reason: str) -> dict[str, Any]:
    return {"type": "websocket.close", "code": code, "reason": reason}


def message(data: str | bytes) -> dict[str, Any]:
    kind = "text" if isinstance(data, str) else "bytes"
    return {"type": "websocket.receive", kind: data}


class Socket(Exchange):
    """A WebSocket, by hand."""

    def __init__(self, *script: dict[str, Any] | float, **scope: Any) -> None:
        connect = {"type": "websocket.connect"}
        super().__init__(connect, *script, **{"type": "websocket", **scope})

    async def receive(self) -> dict[str, Any]:
        received = await super().receive()
        return received if received is not DISCONNECT else gone(1000)

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        if message["type"] == "websocket.close":
            self._complete.set()


def gone(code: int) -> dict[str, Any]:
    return {"type": "websocket.disconnect", "code": code}


class Talk:
    """An application that takes each message, and notes what is held for it."""

    def __init__(self, seconds: float = 0) -> None:
        self.seconds = seconds
        self.held: list[int] = []
        self.ended_with: int | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "websocket.connect"
        assert request_grant().size == 0
        await send({"type": "websocket.accept"})
        while (received := await receive())["type"] == "websocket.receive":
            self.held.append(request_grant().size)
            await anyio.sleep(self.seconds)
            await send({"type": "websocket.send", "text": "ok"})
        self.ended_with = received["code"]
        assert request_grant().size == 0


@pytest.mark.virtual_time
async def test_a_message_is_held_until_the_next_is_asked_for():
    talk = Talk(seconds=1)
    middleware = bounded(talk, factor=2, base_bytes=7)
    script: list[Any] = [message(bytes(100)), 100, message("x" * 60), 100, gone(1001)]
    socket = Socket(*script)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(socket.run, middleware)
        await anyio.sleep(0.5)
        assert free(middleware) == 1000 - 207
        await anyio.sleep(1)
        assert free(middleware) == 1000  # idle
        assert middleware.statistics().in_progress == 1
    assert talk.held == [207, 7 + 2 * "x".__sizeof__() + 2 * 59]
    assert talk.ended_with == 1001
    assert [sent["type"] for sent in socket.sent] == ["websocket.accept", *["websocket.send"] * 2]
    assert middleware.statistics() == MiddlewareStatistics(0, 0, 2, 0, 0, 0, 0, 0)


@pytest.mark.virtual_time
async def test_a_message_waits_for_its_grant():
    talk = Talk()
    middleware = bounded(talk)
    socket = Socket(message(bytes(500)), gone(1000))
    async with anyio.create_task_group() as tasks:
        with others(middleware, 700):
            tasks.start_soon(socket.run, middleware)
            await anyio.sleep(3)
            assert talk.held == []
    assert (talk.held, socket.ended_at) == ([500], 3)
    assert middleware.statistics().waited == 1


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("size", "code", "reason", "at"),
    [(5000, 1009, "Content Too Large", 0), (500, 1013, "Service Unavailable", 10)],
)
async def test_a_message_that_cannot_be_had_closes_the_socket(size, code, reason, at):
    raised = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        assert (await receive())["type"] == "websocket.disconnect"
        assert (await receive())["type"] == "websocket.disconnect"
        with pytest.raises(OSError, match="no memory") as caught:
            await send({"type": "websocket.send", "text": "ok"})
        raised.append(caught.value)
        raise caught.value

    middleware = bounded(app)
    with others(middleware, 700):
        socket = await Socket(message(bytes(size)), message(b"x")).run(middleware)
    assert socket.sent == [{"type": "websocket.accept"}, closed(code, reason)]
    assert socket.ended_at == at
    assert len(raised) == 1
    assert middleware.statistics()[4:6] == ((1, 0) if code == 1013 else (0, 1))
    assert free(middleware) == 1000


@pytest.mark.virtual_time
async def test_what_the_handler_of_a_socket_is_not_granted_closes_it():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await receive()
        if scope["path"] == "/closed":
            await send({"type": "websocket.close"})
        async with grant(10_000):
            pytest.fail("there is not so much")

    middleware = bounded(app)
    socket = await Socket(message(b"1")).run(middleware)
    assert socket.sent[-1] == closed(1009, "Content Too Large")
    with pytest.raises(GrantTooLarge):
        await Socket(message(b"1"), path="/closed").run(middleware)
    assert free(middleware) == 1000


@pytest.mark.virtual_time
async def test_a_socket_that_fails_gives_back_what_it_holds():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await receive()
        assert free(middleware) == 900
        raise KeyError("mine")

    middleware = bounded(app)
    with pytest.raises(KeyError):
        await Socket(message(bytes(100))).run(middleware)
    assert free(middleware) == 1000
    assert middleware.statistics().in_progress == 0


# --- nothing is lost


async def a_length(middleware: MemoryMiddleware) -> None:
    script = [part(300), part(100, more=False)]
    await Exchange(*script, length=400).run(middleware)


async def chunks(middleware: MemoryMiddleware) -> None:
    await Exchange(*[part(90)] * 4, part(0, more=False), length=None).run(middleware)


async def no_body(middleware: MemoryMiddleware) -> None:
    await Exchange(part(0, more=False)).run(middleware)


async def too_large(middleware: MemoryMiddleware) -> None:
    await Exchange(part(10), part(10), part(0, more=False), length=5000).run(middleware)


async def talking(middleware: MemoryMiddleware) -> None:
    await Socket(message(bytes(400)), message(bytes(200)), gone(1000)).run(middleware)


async def app_of_steps(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await Talk()(scope, receive, send)
        return
    await read(receive)
    async with grant(50):
        for _ in range(3):
            await anyio.lowlevel.checkpoint()
    await answer(send)


@pytest.mark.parametrize("delay", [0, 0.0001], ids=["no delay", "delay"])
@pytest.mark.parametrize(
    "scenario",
    [a_length, chunks, no_body, too_large, talking],
    ids=lambda scenario: scenario.__name__,
)
async def test_cancelled_at_every_step(scenario, delay):
    pressure = PressurePolicy(threshold=0.01, min_delay_seconds=delay, max_delay_seconds=delay)
    steps = finished = 0
    met: set[str] = set()
    while finished < 10:  # in a row: trio runs its tasks in an order of chance
        limiter = testing.limiter(
            1000,
            share=1,
            probe=ScriptedProbe(20),
            settings=LimiterSettings(reclaim=False, pressure=pressure),
        )
        limiter._ledger._lowest_free = limiter._ledger.free - 1000  # 20 are no drift
        middleware = bounded(app_of_steps, limiter=limiter, base_bytes=250, ahead_bytes=80)
        done = False

        async def run(middleware: MemoryMiddleware = middleware) -> None:
            nonlocal done
            await scenario(middleware)
            done = True

        async def rival(limiter: MemoryLimiter = limiter) -> None:
            for nbytes in (800, 700, 30):
                async with limiter.component("rival").grant(nbytes):
                    for _ in range(10):
                        await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as outer:
            outer.start_soon(rival)
            await anyio.lowlevel.checkpoint()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run)
                for _ in range(steps):
                    await anyio.lowlevel.checkpoint()
                if not done:
                    if limiter._ledger.waiters.count:
                        met.add("waits")
                    if middleware.statistics().in_progress:
                        met.add("served")
                    tasks.cancel_scope.cancel()
        snapshot = limiter.statistics()
        assert snapshot.free_bytes + snapshot.drift_bytes == 1000, steps
        assert_nothing_is_left(limiter, steps)
        assert middleware.statistics()[:2] == (0, 0)
        finished = finished + 1 if done else 0
        steps += 1
        assert steps < 2000
    assert steps > 11
    assert met == ({"waits", "served"} if scenario is not too_large else set())


class Plan:
    """One client of many: when it comes, what it says and what it does."""

    def __init__(self, at: float, length: int | None, script: Sequence[Any], work: float) -> None:
        self.at, self.length, self.script, self.work = at, length, script, work


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    pauses = st.sampled_from([0.0, 0.5, 5.0, 90.0])
    sizes = draw(st.lists(st.integers(0, 400), max_size=6))
    script: list[Any] = []
    for size in sizes:
        script += [draw(pauses), part(size)]
    script.append(draw(st.sampled_from([part(0, more=False), DISCONNECT])))
    length = draw(st.one_of(st.none(), st.just(max(1, sum(sizes))), st.integers(1, 3000)))
    return Plan(draw(st.floats(0, 20)), length, script, draw(st.sampled_from([0.0, 1.0, 30.0])))


@settings(max_examples=150)
@given(
    st.lists(plans(), min_size=1, max_size=12),
    st.sampled_from([0.5, 1, 2]),
    st.booleans(),
)
def test_whatever_clients_do_all_are_answered_and_all_is_given_back(clients, factor, by_sender):
    async def app(scope: Any, receive: Any, send: Any) -> None:
        snapshot = limiter.statistics()
        assert snapshot.free_bytes >= 0
        if await read(receive) is None:
            raise ConnectionResetError
        await anyio.sleep(scope["work"])
        await answer(send)

    limiter = testing.limiter(1000, share=1)
    middleware = bounded(
        app,
        limiter=limiter,
        factor=factor,
        ahead_bytes=50,
        sender=(lambda scope: scope["sender"]) if by_sender else None,
    )

    async def client(number: int, plan: Plan) -> None:
        await anyio.sleep(plan.at)
        exchange = Exchange(*plan.script, length=plan.length, work=plan.work, sender=number % 3)
        try:
            await exchange.run(middleware)
        except ConnectionResetError:
            assert plan.script[-1] is DISCONNECT
            assert exchange.sent == []
        else:
            assert exchange.status in {200, 400, 408, 413, 503}
            assert exchange.is_complete
            assert (exchange.status == 503) == (b"retry-after" in exchange.headers)
        assert anyio.current_time() < plan.at + 2000

    async def all_of_them() -> None:
        async with anyio.create_task_group() as tasks:
            for number, plan in enumerate(clients):
                tasks.start_soon(client, number, plan)

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(all_of_them())
    snapshot = limiter.statistics()
    assert (snapshot.free_bytes, snapshot.grants, snapshot.waiting) == (1000, 0, 0)
    assert middleware.statistics()[:2] == (0, 0)
