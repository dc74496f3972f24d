"""The ASGI middleware in Starlette and FastAPI, behind real uvicorn, with real sockets."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest
import uvicorn
from fastapi import FastAPI, Request
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from membound_async import MemoryLimiter, grant, testing
from membound_async.integrations.asgi import MemoryMiddleware, request_grant

pytestmark = pytest.mark.slow

MIB = 2**20

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers and body."""


class Service:
    """An application that is being served, and the limiter before it."""

    def __init__(self, port: int, limiter: MemoryLimiter, middleware: MemoryMiddleware) -> None:
        self.port = port
        self.limiter = limiter
        self.middleware = middleware

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        give_up = time.monotonic() + 20
        while not is_so():
            assert time.monotonic() < give_up
            time.sleep(0.002)

    def wait_until_all_is_back(self) -> None:
        def is_back() -> bool:
            snapshot = self.limiter.statistics()
            return (
                (snapshot.free_bytes, snapshot.grants) == (snapshot.effective_limit_bytes, 0)
                and snapshot.waiting == 0
                and self.middleware.statistics()[:2] == (0, 0)
            )

        self.wait_until(is_back)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def post(self, path: str, *parts: bytes | float, head: str) -> Answer:
        """Send a request, with pauses, and read all of what comes."""
        with self.connect() as client:
            client.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode())
            with contextlib.suppress(ConnectionError):  # it was answered already
                for one in parts:
                    if isinstance(one, bytes):
                        client.sendall(one)
                    else:
                        time.sleep(one)
            return answer_of(client)

    def upload(self, nbytes: int, path: str = "/upload") -> Answer:
        head = f"Content-Length: {nbytes}\r\nConnection: close"
        return self.post(path, *[bytes(min(nbytes, MIB))] * (nbytes // MIB or 1), head=head)


def answer_of(client: socket.socket) -> Answer:
    """Give status, headers and body of what a server says until it closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while more := client.recv(65536):
            received += more
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return int(first.split()[1]), headers, body


@contextlib.contextmanager
def serve(app: Any, limit: int, *, http: Any = "httptools", **options: Any) -> Iterator[Service]:
    """Serve an application in another thread, behind the middleware."""
    limiter = testing.limiter(limit, share=1)
    middleware = MemoryMiddleware(app, limiter, **options)
    config = uvicorn.Config(
        middleware,
        port=0,
        http=http,
        ws="websockets-sansio",
        loop="uvloop" if http == "httptools" else "asyncio",
        log_config=None,
        lifespan="on",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.002)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Service(port, limiter, middleware)
    finally:
        server.should_exit = True
        thread.join()


class Pause:
    """Holds handlers up until the test lets them go on."""

    def __init__(self) -> None:
        self.entered = 0
        self.is_over = threading.Event()

    async def __call__(self) -> None:
        self.entered += 1
        while not self.is_over.is_set():
            await anyio.sleep(0.002)


def starlette_app(pause: Pause | None = None, *middleware: Any) -> Starlette:
    async def upload(request: Request) -> Response:
        body = await request.body()
        if pause is not None:
            await pause()
        return PlainTextResponse(f"{len(body)} {zlib.crc32(body)}")

    async def stream(request: Request) -> Response:
        total = 0
        async for chunk in request.stream():
            total += len(chunk)
        return PlainTextResponse(f"{total}")

    async def download(request: Request) -> Response:
        async def parts() -> Any:
            for _ in range(3):
                yield f"{request_grant().size} "

        return StreamingResponse(parts())

    async def talk(socket: WebSocket) -> None:
        await socket.accept()
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                data = await socket.receive_bytes()
                await socket.send_text(f"{len(data)} {request_grant().size}")

    routes = [
        Route("/upload", upload, methods=["POST"]),
        Route("/stream", stream, methods=["POST"]),
        Route("/download", download, methods=["GET", "POST"]),
        WebSocketRoute("/talk", talk),
    ]
    return Starlette(routes=routes, middleware=[Middleware(one) for one in middleware])


class Outer(BaseHTTPMiddleware):
    """Runs what is behind it in a task of its own."""

    async def dispatch(self, request: Any, call_next: Any) -> Any:
        return await call_next(request)


def fastapi_app(pause: Pause | None = None) -> FastAPI:
    app = FastAPI()

    @app.post("/upload")
    async def upload(request: Request) -> Response:
        body = await request.body()
        if pause is not None:
            await pause()
        return PlainTextResponse(f"{len(body)} {zlib.crc32(body)}")

    @app.post("/json")
    async def of_json(document: dict[str, Any]) -> dict[str, Any]:
        return {"keys": len(document), "held": request_grant().size}

    @app.post("/thread")
    def in_a_thread() -> dict[str, Any]:
        with grant(1000) as more:
            mine = request_grant()
            answer = {"more": more.component.path, "held": mine.size}
            mine.shrink(mine.size)
        return answer

    @app.post("/more")
    async def more(wanted: int) -> dict[str, Any]:
        async with grant(wanted, timeout=0.05) as held:
            return {"more": held.size}

    return app


APPS = {
    "starlette": starlette_app,
    "starlette in tasks": lambda pause=None: starlette_app(pause, Outer),
    "fastapi": fastapi_app,
}


@pytest.fixture(params=["httptools", "h11"])
def http(request: Any) -> str:
    return str(request.param)


@pytest.fixture(params=APPS)
def app_of(request: Any) -> Any:
    return APPS[request.param]


def test_uploads_are_passed_on_unchanged(http, app_of):
    with serve(app_of(), 8 * MIB, http=http) as service:
        for nbytes in (1, 70_000, 2 * MIB):
            status, _, body = service.upload(nbytes)
            assert (status, body) == (200, f"{nbytes} {zlib.crc32(bytes(nbytes))}".encode())
        service.wait_until_all_is_back()
        assert service.middleware.statistics().served == 3


def test_a_slow_client_is_served(http, app_of):
    with serve(app_of(), 8 * MIB, http=http) as service:
        slow = [part for _ in range(10) for part in (b"x", 0.01)]
        status, _, body = service.post(
            "/upload", *slow, head="Content-Length: 10\r\nConnection: close"
        )
        assert (status, body) == (200, f"10 {zlib.crc32(b'x' * 10)}".encode())
        service.wait_until_all_is_back()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


CHUNKED = "Transfer-Encoding: chunked\r\nConnection: close"


def test_a_body_without_a_length_grows(http, app_of):
    with serve(app_of(), 8 * MIB, http=http) as service:
        parts = [chunk(bytes(300_000)) for _ in range(10)]
        status, _, body = service.post("/upload", *parts, b"0\r\n\r\n", head=CHUNKED)
        assert (status, body) == (200, f"3000000 {zlib.crc32(bytes(3_000_000))}".encode())
        assert service.limiter.find("http").statistics().peak_granted_bytes >= 3_000_000
        service.wait_until_all_is_back()


def test_a_body_that_grows_too_large_is_refused(http, app_of):
    with serve(app_of(), MIB, http=http) as service:
        parts = [chunk(bytes(300_000)) for _ in range(10)]
        status, headers, _ = service.post("/upload", *parts, b"0\r\n\r\n", head=CHUNKED)
        assert (status, headers["connection"]) == (413, "close")
        service.wait_until_all_is_back()


def test_what_is_too_large_is_refused_at_once(http, app_of):
    with serve(app_of(), MIB, http=http) as service:
        status, headers, _ = service.upload(50 * MIB)  # and the client sees it, though it sends
        assert (status, headers["connection"]) == (413, "close")
        assert service.middleware.statistics().served == 0
        status, _, _ = service.post(
            "/upload", head=f"Content-Length: {2 * MIB}\r\nExpect: 100-continue"
        )
        assert status == 413  # and no 100 before
        service.wait_until_all_is_back()


def test_what_waits_too_long_is_shed(http, app_of):
    pause = Pause()
    with serve(app_of(pause), 4 * MIB, http=http, max_wait_seconds=0.2) as service:
        with ThreadPoolExecutor() as clients:
            first = clients.submit(service.upload, 3 * MIB)
            service.wait_until(lambda: pause.entered == 1)
            status, headers, body = service.upload(2 * MIB)
            assert (status, headers["retry-after"], headers["connection"]) == (503, "5", "close")
            assert body == b"Service Unavailable\n"
            pause.is_over.set()
            assert first.result()[0] == 200
        service.wait_until_all_is_back()
        done = service.middleware.statistics()
        assert (done.served, done.shed) == (1, 1)


def test_a_body_that_cannot_grow_is_shed_whatever_the_application_makes_of_that(http, app_of):
    pause = Pause()
    with serve(app_of(pause), 4 * MIB, http=http, max_wait_seconds=0.2) as service:
        with ThreadPoolExecutor() as clients:
            first = clients.submit(service.upload, 3 * MIB)
            service.wait_until(lambda: pause.entered == 1)
            parts = [chunk(bytes(300_000)) for _ in range(10)]
            status, headers, _ = service.post("/upload", *parts, b"0\r\n\r\n", head=CHUNKED)
            assert (status, headers["retry-after"]) == (503, "5")
            pause.is_over.set()
            assert first.result()[0] == 200
        service.wait_until_all_is_back()


def test_a_client_that_sends_less_than_it_said_is_timed_out(http, app_of):
    with serve(app_of(), 4 * MIB, http=http, body_timeout_seconds=0.2) as service:
        status, _, _ = service.post("/upload", bytes(1000), head="Content-Length: 1001")
        assert status == 408
        service.wait_until_all_is_back()


def test_a_client_that_sends_more_than_it_said_gets_no_more(http, app_of):
    with serve(app_of(), 4 * MIB, http=http) as service:
        with service.connect() as client:
            head = b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
            client.sendall(head + bytes(1000) + b"\0" * 50_000)
            status, _, _ = answer_of(client)
        assert status in (200, 400)  # h11 answers before it has seen what follows
        assert service.limiter.find("http").statistics().peak_granted_bytes <= 1000
        service.wait_until_all_is_back()


@pytest.mark.parametrize("sent", [0, 1000, 500_000])
def test_a_client_that_goes_amid_its_body_holds_nothing(http, app_of, sent):
    with serve(app_of(), 4 * MIB, http=http) as service:
        with service.connect() as client:
            client.sendall(b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
            client.sendall(bytes(sent))
            service.wait_until(lambda: service.limiter.statistics().grants == 1)
        service.wait_until_all_is_back()


def test_a_client_that_goes_while_it_waits_holds_nothing(http, app_of):
    """One with a body is found to have gone when it is read, one without at once."""
    pause = Pause()
    options: Any = {"max_wait_seconds": 60, "base_bytes": 1000}
    with serve(app_of(pause), 4 * MIB, http=http, **options) as service:
        with ThreadPoolExecutor() as clients:
            first = clients.submit(service.upload, 3 * MIB)
            service.wait_until(lambda: pause.entered == 1)
            with service.limiter.grant_nowait(MIB - 1500):
                for head in (b"GET /upload HTTP/1.1\r\n", b"POST /upload HTTP/1.1\r\n"):
                    with service.connect() as client:
                        client.sendall(head + b"Host: x\r\n\r\n")
                        service.wait_until(lambda: service.middleware.statistics().waiting == 1)
                    service.wait_until(lambda: service.middleware.statistics().waiting == 0)
            assert service.middleware.statistics().disconnected == 2
            with service.connect() as client:
                client.sendall(b"POST /upload HTTP/1.1\r\nHost: x\r\n")
                client.sendall(b"Content-Length: 2000000\r\n\r\n" + bytes(10_000))
                service.wait_until(lambda: service.middleware.statistics().waiting == 1)
            pause.is_over.set()
            assert first.result()[0] == 200
        service.wait_until_all_is_back()


def test_a_connection_is_kept_where_nothing_is_left_to_be_read(http):
    options: Any = {"base_bytes": 2 * MIB, "routes": {"/ok": None}}
    with serve(starlette_app(), MIB, http=http, **options) as service, service.connect() as client:
        for path, status, text in (
            ("/upload", 413, b"Content Too Large\n"),
            ("/ok", 404, b"Not Found"),
        ):
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            received = b""
            while not received.endswith(text):
                received += client.recv(4096)
            assert received.startswith(f"HTTP/1.1 {status} ".encode())


def test_many_at_once_are_all_answered_and_never_have_more_than_there_is(http, app_of):
    limit = 8 * MIB
    with serve(app_of(), limit, http=http, max_wait_seconds=1, factor=2) as service:

        def client(number: int) -> int:
            if number % 3:
                status, headers, _ = service.upload((1 + number % 5) * MIB)
            else:
                parts = [chunk(bytes(MIB // 2)) for _ in range(1 + number % 7)]
                status, headers, _ = service.post("/upload", *parts, b"0\r\n\r\n", head=CHUNKED)
            assert ("retry-after" in headers) == (status == 503)
            return status

        with ThreadPoolExecutor(48) as clients:
            statuses = list(clients.map(client, range(60)))
        service.wait_until_all_is_back()
        assert set(statuses) <= {200, 413, 503}
        assert statuses.count(200) > 3
        # 10 MiB, with the factor, are never to be had
        assert all(s == 413 for n, s in enumerate(statuses) if n % 3 and n % 5 == 4)
        assert service.limiter.find("http").statistics().peak_granted_bytes <= limit
        done = service.middleware.statistics()
        assert done.shed == statuses.count(503)
        assert done.too_large == statuses.count(413)


def test_a_streaming_response_keeps_what_its_request_holds(http):
    with serve(starlette_app(), MIB, http=http) as service:
        status, _, body = service.post(
            "/download", bytes(777), head="Content-Length: 777\r\nConnection: close"
        )
        assert status == 200
        assert body.count(b"777 ") == 3
        service.wait_until_all_is_back()


def test_handlers_have_the_grant_of_their_request(http):
    limiter = testing.limiter(MIB, share=1)
    app = fastapi_app()
    # Inside of what answers 500 to all errors, so that errors come here first.
    app.add_middleware(MemoryMiddleware, limiter, component="api")
    with serve(app, 64 * MIB, http=http) as service:
        close = "Connection: close\r\nContent-Type: application/json"
        head = f"{close}\r\nContent-Length: 8"
        assert service.post("/json", b'{"a": 1}', head=head)[2] == b'{"keys":1,"held":8}'
        assert service.post("/thread", bytes(8), head=head)[2] == b'{"more":"api","held":8}'
        close = f"{close}\r\nContent-Length: 0"
        assert service.post("/more?wanted=1000", head=close)[2] == b'{"more":1000}'
        assert service.post(f"/more?wanted={2 * MIB}", head=close)[0] == 413
        with limiter.component("other").grant_nowait(MIB // 2):
            status, headers, _ = service.post(f"/more?wanted={MIB}", head=close)
            assert (status, headers["retry-after"]) == (503, "5")
        assert limiter.statistics().free_bytes == MIB
        service.wait_until_all_is_back()


def test_add_middleware_and_a_limiter_of_the_lifespan():
    limiters: list[MemoryLimiter] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> Any:
        async with testing.limiter(MIB) as limiter:
            limiters.append(limiter)
            yield

    async def upload(request: Request) -> Response:
        try:
            return PlainTextResponse(f"{len(await request.body())} {request_grant().size}")
        except ClientDisconnect:
            pytest.fail("it has not")

    app = Starlette(routes=[Route("/upload", upload, methods=["POST"])], lifespan=lifespan)
    app.add_middleware(MemoryMiddleware, factor=3, routes={"/upload": "upload"})
    with serve(app, MIB, routes={"/": None}) as service:
        assert service.upload(1000)[2] == b"1000 3000"
        assert service.upload(200_000)[0] == 413
        assert limiters[0].find("upload").statistics().peak_granted_bytes == 3000


# --- WebSockets


def test_messages_of_a_websocket_are_held_one_at_a_time(http):
    with serve(starlette_app(), MIB, http=http, factor=2) as service:
        with connect(f"ws://127.0.0.1:{service.port}/talk") as client:
            for nbytes in (100_000, 300_000):
                client.send(bytes(nbytes))
                assert client.recv() == f"{nbytes} {2 * nbytes}"
            # idle
            service.wait_until(lambda: service.limiter.statistics().grants == 0)
            assert service.middleware.statistics().in_progress == 1
        service.wait_until_all_is_back()


@pytest.mark.parametrize(("nbytes", "code"), [(2 * MIB, 1009), (600_000, 1013)])
def test_a_message_that_cannot_be_had_closes_the_websocket(http, nbytes, code):
    with serve(starlette_app(), MIB, http=http, max_wait_seconds=0.1) as service:
        with (
            service.limiter.component("other").grant_nowait(MIB // 2),
            connect(f"ws://127.0.0.1:{service.port}/talk") as client,
        ):
            client.send(bytes(100))
            assert client.recv() == "100 100"
            client.send(bytes(nbytes))
            with pytest.raises(ConnectionClosed) as closed:
                client.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == code
        service.wait_until_all_is_back()


def test_a_websocket_that_is_gone_holds_nothing(http):
    with serve(starlette_app(), MIB, http=http) as service:
        with connect(f"ws://127.0.0.1:{service.port}/talk") as client:
            client.send(bytes(100_000))
            client.socket.shutdown(socket.SHUT_RDWR)
            service.wait_until(lambda: service.middleware.statistics().in_progress == 0)
        service.wait_until_all_is_back()
