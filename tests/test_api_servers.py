"""The status API under real servers with real sockets, and mounted in frameworks."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import fastapi
import httpx
import hypercorn.config
import hypercorn.trio
import jsonschema
import litestar
import pytest
import starlette.applications
import trio
import uvicorn
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Mount

from membound_async import MemoryLimiter, testing
from membound_async.api import MemoryAPI
from tests.test_api import SCHEMA

pytestmark = pytest.mark.slow

MIB = 2**20
PATIENCE_SECONDS = 60
"""How long a test waits for what must come; nothing depends on how long it takes."""


def limiter_of(components: int) -> MemoryLimiter:
    limiter = testing.limiter("64MiB")
    for number in range(components):
        limiter.component(f"part{number}", firm_limit=MIB + number)
    return limiter


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "this never came true"
        time.sleep(0.01)


class Served:
    """An application under uvicorn, in a thread with an event loop of its own."""

    def __init__(self, app: Any, **options: Any) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        # What is on its way to a client that does not read is in here, and so cannot be much.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        self.address = self.socket.getsockname()
        self.url = "http://{}:{}".format(*self.address)
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", **options))
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))

    @property
    def unsent_bytes(self) -> int:
        """What the server holds for clients that do not read."""
        return max(
            (one.transport.get_write_buffer_size() for one in self.server.server_state.connections),
            default=0,
        )


@contextmanager
def served(app: Any, **options: Any) -> Iterator[Served]:
    serving = Served(app, **options)
    serving.thread.start()
    try:
        wait_until(lambda: serving.server.started)
        yield serving
    finally:
        serving.server.should_exit = True
        serving.thread.join(PATIENCE_SECONDS)
        assert not serving.thread.is_alive()


def connect(address: tuple[str, int], path: str) -> socket.socket:
    """Ask for something, and read nothing yet."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    client.settimeout(PATIENCE_SECONDS)
    client.connect(address)
    client.sendall(f"GET {path} HTTP/1.1\r\nhost: service\r\n\r\n".encode())
    return client


def ids_of(lines: Iterator[str]) -> Iterator[int]:
    """Give the numbers of events as they come, each when the whole event is there."""
    number = 0
    for line in lines:
        if line.startswith("id: "):
            number = int(line.removeprefix("id: "))
        if not line:
            yield number


@pytest.fixture(params=["h11", "httptools"])
def http(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    return str(request.param)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_it_runs_by_itself_under_uvicorn(http, loop):
    api = MemoryAPI(limiter_of(3))
    with served(api, http=http, loop=loop) as serving, httpx.Client(base_url=serving.url) as client:
        status = client.get("/memory/status").json()
        jsonschema.validate(status, SCHEMA)
        assert status["components"]["part1"]["firm_limit_bytes"] == MIB + 1
        assert client.get("/memory", follow_redirects=True).url.path == "/memory/"
        head = client.head("/memory/bounds")
        assert int(head.headers["content-length"]) == len(client.get("/memory/bounds").content)
        assert client.post("/memory/status").status_code == 405
        with client.stream("GET", "/memory/events") as stream:
            numbers = ids_of(stream.iter_lines())
            first = next(numbers)
            assert [next(numbers), next(numbers)] == [first + 1, first + 2]
        wait_until(lambda: api._readers.count == 0)  # it has seen that the client has gone


def test_a_slow_reader_holds_no_more_memory_and_gets_fewer(http):
    api = MemoryAPI(limiter_of(1000), interval_seconds=0.1)
    with served(api, http=http) as serving, httpx.Client(base_url=serving.url) as client:
        event_bytes = len(client.get("/memory/status").content)
        assert event_bytes > 400_000
        slow = connect(serving.address, "/memory/events")
        wait_until(lambda: api._readers.count == 1 and serving.unsent_bytes > 0)
        with client.stream("GET", "/memory/events") as stream:
            numbers = ids_of(stream.iter_lines())
            quick = [next(numbers) for _ in range(30)]
            # The event that it is in the middle of, and no other: that is what a buffer that is
            # full when an event comes may hold.
            assert serving.unsent_bytes < 2 * event_bytes
            with slow:
                file = slow.makefile("r", newline="\n")
                missed = ids_of(line.rstrip("\r\n") for line in file if not is_chunk_size(line))
                got = [next(missed) for _ in range(4)]
                file.close()
            assert got[0] <= quick[0]
            assert got[-1] > quick[-1]
            assert len([number for number in got if number <= quick[-1]]) <= 3


def is_chunk_size(line: str) -> bool:
    """Tell whether a line is of the transfer and not of what is transferred."""
    return line.endswith("\r\n") and set(line.strip()) <= set("0123456789abcdefABCDEF")


def test_a_stream_that_is_closed_lets_the_server_end(http):
    api = MemoryAPI(limiter_of(1))
    with served(api, http=http) as serving:
        client = connect(serving.address, "/memory/events")
        wait_until(lambda: api._readers.count == 1)
        api.close()
        answer = client.makefile("rb").read()
        client.close()
    assert answer.endswith(b"\r\n0\r\n\r\n")  # the end of chunks, and not of patience


PROGRAM = """
import sys
import fastapi, uvicorn
from membound_async import testing
from membound_async.api import MemoryAPI

app = fastapi.FastAPI()
app.mount("/ops", MemoryAPI(testing.limiter("64MiB")))
config = uvicorn.Config(app, port=0, log_level="info")
uvicorn.Server(config).run()
"""


def test_uvicorn_can_be_ended_while_somebody_looks():
    """A stream has no end of its own, and uvicorn waits for it; for ever, if nobody tells."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stderr=subprocess.PIPE, text=True
    ) as program:
        try:
            assert program.stderr is not None
            line = next(line for line in program.stderr if "running on" in line)
            port = int(line.split("127.0.0.1:")[1].split()[0])
            client = connect(("127.0.0.1", port), "/ops/memory/events")
            stream = client.makefile("rb")
            assert any(line.startswith(b"data: ") for line in stream)
            program.terminate()
            assert stream.read().endswith(b"0\r\n\r\n")
            stream.close()
            client.close()
            assert "Error" not in program.stderr.read()
            assert program.wait(PATIENCE_SECONDS) in {0, -15}
        finally:
            program.kill()


def test_it_runs_under_hypercorn_on_trio():
    api: Any = MemoryAPI(limiter_of(3))
    config = hypercorn.config.Config()
    config.bind = ["127.0.0.1:0"]
    config.errorlog = config.accesslog = None
    found: list[Any] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            bound = await nursery.start(
                partial(hypercorn.trio.serve, api, config, shutdown_trigger=trio.sleep_forever)
            )
            await trio.to_thread.run_sync(ask, bound[0])
            nursery.cancel_scope.cancel()

    def ask(url: str) -> None:
        with httpx.Client(base_url=url) as client:
            found.append(client.get("/memory/status").json())
            with client.stream("GET", "/memory/events") as stream:
                numbers = ids_of(stream.iter_lines())
                found.extend(next(numbers) for _ in range(2))

    trio.run(main)
    jsonschema.validate(found[0], SCHEMA)
    assert found[2] == found[1] + 1


# --- in frameworks


def starlette_app(api: MemoryAPI) -> Any:
    return starlette.applications.Starlette(routes=[Mount("/ops", api)])


def starlette_deeper(api: MemoryAPI) -> Any:
    inner = starlette.applications.Starlette(routes=[Mount("/ops", api)])
    return starlette.applications.Starlette(routes=[Mount("/deep", inner)])


def starlette_with_middleware(api: MemoryAPI) -> Any:
    async def through(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    return starlette.applications.Starlette(
        routes=[Mount("/ops", api)],
        middleware=[
            Middleware(CORSMiddleware, allow_origins=["*"]),
            Middleware(GZipMiddleware),
            Middleware(BaseHTTPMiddleware, dispatch=through),
        ],
    )


def fastapi_app(api: MemoryAPI) -> Any:
    app = fastapi.FastAPI()

    @app.get("/")
    def nothing() -> str:
        return "of ours"

    app.mount("/ops", api)
    return app


def fastapi_at_the_top(api: MemoryAPI) -> Any:
    app = fastapi.FastAPI()
    app.mount("/", api)
    return app


def litestar_app(api: MemoryAPI) -> Any:
    return litestar.Litestar(
        [litestar.asgi("/ops", is_mount=True, copy_scope=True)(litestar_handler(api))]
    )


def litestar_handler(api: MemoryAPI) -> Any:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await api(scope, receive, send)

    handler.__annotations__ = {
        "scope": litestar.types.Scope,
        "receive": litestar.types.Receive,
        "send": litestar.types.Send,
        "return": None,
    }
    return handler


MOUNTS = {
    "starlette": (starlette_app, "/ops"),
    "starlette, deeper": (starlette_deeper, "/deep/ops"),
    "starlette, middleware": (starlette_with_middleware, "/ops"),
    "fastapi": (fastapi_app, "/ops"),
    "fastapi, at the top": (fastapi_at_the_top, ""),
    "litestar": (litestar_app, "/ops"),
}


@pytest.mark.parametrize("root_path", ["", "/proxied"])
@pytest.mark.parametrize(("mount", "prefix"), MOUNTS.values(), ids=[*MOUNTS])
def test_it_can_be_mounted(mount, prefix, root_path):
    api = MemoryAPI(limiter_of(3), token="s3cret", interval_seconds=0.1)
    app = mount(api)
    with served(app, root_path=root_path) as serving, httpx.Client(
        base_url=serving.url + prefix, auth=("anybody", "s3cret")
    ) as client:  # fmt: skip
        jsonschema.validate(client.get("/memory/status").json(), SCHEMA)
        assert client.get("/memory/bounds").json()["problem"] is None
        assert client.get("/memory/grants?held_limit=x").status_code == 400
        assert client.get("/memory/grants?held_limit=1").status_code == 200
        assert client.get("/healthz").status_code == 200
        assert client.head("/healthz").status_code == 200
        assert client.get("/metrics").status_code in {200, 404}
        assert client.get("/nowhere").status_code == 404
        page = client.get("/memory", follow_redirects=True)
        assert (page.status_code, page.url.path) == (200, f"{prefix}/memory/")
        for name in [*api._routes]:
            if name.startswith("/memory/assets/"):
                assert client.get(name).status_code == 200
        for _ in range(2):  # what a middleware adds to one answer is not in the next
            with client.stream("GET", "/memory/events") as stream:
                assert len(stream.headers.get_list("x-accel-buffering")) == 1
                assert len(stream.headers.get_list("vary")) <= 1
                lines = stream.iter_lines()
                data = next(line for line in lines if line.startswith("data: "))
                jsonschema.validate(json.loads(data.removeprefix("data: ")), SCHEMA)
        wait_until(lambda: api._readers.count == 0)
        assert httpx.get(f"{serving.url}{prefix}/memory/status").status_code == 401
