"""The ASGI application: which path is answered by what, and for whom."""

from __future__ import annotations

from collections.abc import Callable
from traceback import format_exc

from membound_async.events import log
from membound_async.exceptions import NoCurrentLimiter
from membound_async.limiter import MemoryLimiter, current_limiter

from .access import Access, Guard
from .answers import JSON, Answer, describe_problem, json_answer
from .asgi import Receive, Scope, Send, header, paths
from .assets import ASSETS
from .bounds import describe_bounds
from .events import EventStream, Readers, SnapshotFeed
from .grants import PAGE_NAMES, describe_grants
from .queries import BadQuery, Query
from .scrape import Scrape
from .snapshot import StatusSnapshot

__all__ = ["MemoryAPI"]

LEAST_INTERVAL_SECONDS = 0.1
MOST_INTERVAL_SECONDS = 60.0

METHODS = ("GET", "HEAD")

Route = Answer | Callable[[Scope], Answer | EventStream]
"""What a path is answered with: always the same, or what a function says to the request."""


class MemoryAPI:
    """Shows what a limiter knows over HTTP: a plain ASGI application that changes nothing.

    Mount it under any path of Starlette, FastAPI or Litestar, or have uvicorn run it by itself
    (hypercorn on trio as well). It answers GET and HEAD:

    - ``/memory/``: the dashboard, for a person.
    - ``/memory/status``: a `StatusSnapshot`; ``/memory/schema`` is its JSON Schema.
    - ``/memory/bounds``: what components declare, and why.
    - ``/memory/grants``: who holds what, and who waits for what.
    - ``/memory/events``: a snapshot per interval, as server-sent events.
    - ``/metrics``: for Prometheus, if prometheus-client is installed.
    - ``/healthz``: 200, or 503 and the reason when memory is short. Needs no token and asks no
      guard, because those who look at it seldom have one; it names no component.

    It may run in another thread and event loop than the program that uses the limiter.

    Args:
        limiter: whose; None for the one that the process has at each request.
        token: what a request must bring, as bearer token or as password of HTTP Basic with any
            name, which is what a browser asks a person for; None to let everybody in.
        guard: a function, async or not, that gets the ASGI scope of a request and says whether
            it may have an answer; asked after the token. It must not wait without ``await``.
        interval_seconds: how often event streams get a new snapshot; also how old the one may
            be that ``/healthz`` goes by.
        max_readers: how many event streams there may be at a time.

    Raises:
        TypeError, ValueError: an argument makes no sense.
    """

    def __init__(
        self,
        limiter: MemoryLimiter | None = None,
        *,
        token: str | None = None,
        guard: Guard | None = None,
        interval_seconds: float = 1.0,
        max_readers: int = 32,
    ) -> None:
        if limiter is not None and not isinstance(limiter, MemoryLimiter):
            raise TypeError(f"limiter is a MemoryLimiter or None, not {limiter!r}")
        if not LEAST_INTERVAL_SECONDS <= interval_seconds <= MOST_INTERVAL_SECONDS:
            raise ValueError(
                f"interval_seconds={interval_seconds!r} is not from {LEAST_INTERVAL_SECONDS:g} "
                f"to {MOST_INTERVAL_SECONDS:g}"
            )
        if not max_readers >= 0:
            raise ValueError(f"max_readers={max_readers!r} is below 0")
        self._limiter = limiter
        self._access = Access(token, guard)
        self._interval_seconds = interval_seconds
        self._feed = SnapshotFeed(self._take, interval_seconds)
        self._readers = Readers(self._feed, max_readers)
        self._scrape = Scrape()
        self._routes: dict[str, Route] = {
            # Relative to the path that the client sees, which may be longer than what is seen here.
            "/memory": Answer(307, "text/plain", b"", ((b"location", b"memory/"),)),
            **ASSETS,
            "/memory/status": self._status,
            "/memory/bounds": self._bounds,
            "/memory/grants": self._grants,
            "/memory/events": self._events,
            "/metrics": self._metrics,
            "/healthz": self._health,
        }

    def close(self) -> None:
        """End all event streams within a second, for good; whatever the thread.

        The end of a lifespan does it. A server that waits for its connections first, and a
        framework that keeps the lifespan from what is mounted in it, make it necessary to call
        this; not uvicorn in the main thread, which is asked whether it is about to end.
        """
        self._readers.is_closed = True
        self._scrape.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, as an ASGI server asks for it."""
        match scope["type"]:
            case "http":
                await self._serve(scope, receive, send)
            case "lifespan":
                await self._live(receive, send)
            case "websocket":
                await receive()  # websocket.connect
                await send({"type": "websocket.close", "code": 1000})
            case other:
                raise NotImplementedError(f"{other!r} is no protocol that MemoryAPI speaks")

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            kind = (await receive())["type"]
            if kind == "lifespan.startup":
                self._readers.is_closed = False
            else:
                self.close()
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await self._answer(scope)
        except Exception:  # noqa: BLE001 -- what went wrong is for the log, not for the client
            log().error("membound.api_failed", path=scope["path"], traceback=format_exc())
            answer = describe_problem(500, "this failed; the log of the program says why")
        try:
            await answer.send_to(receive, send, has_body=scope["method"] != "HEAD")
        except* OSError:
            pass  # the client has gone
        except* Exception:  # noqa: BLE001 -- it has begun: all that is left is to break off
            log().error("membound.api_failed", path=scope["path"], traceback=format_exc())

    async def _answer(self, scope: Scope) -> Answer | EventStream:
        path = next((path for path in paths(scope) if path in self._routes), None)
        if path != "/healthz":
            refusal = await self._access.refusal(scope)
            if refusal is not None:
                return refusal
        if path is None:
            return describe_problem(404, "nothing is here; there is a page at memory/")
        if scope["method"] not in METHODS:
            return describe_problem(
                405, "this can only be read", headers=[(b"allow", ", ".join(METHODS).encode())]
            )
        try:
            route = self._routes[path]
            return route if isinstance(route, Answer) else route(scope)
        except BadQuery as error:
            return describe_problem(400, str(error))
        except NoCurrentLimiter as error:
            return describe_problem(503, str(error))

    # --- what each path answers

    def _status(self, _: Scope) -> Answer:
        return Answer(200, JSON, self._take().to_json())

    def _bounds(self, _: Scope) -> Answer:
        return json_answer(describe_bounds(self._current()))

    def _grants(self, scope: Scope) -> Answer:
        return json_answer(describe_grants(self._current(), Query(scope, PAGE_NAMES)))

    def _events(self, scope: Scope) -> Answer | EventStream:
        interval_seconds = Query(scope, ("interval",)).seconds(
            "interval",
            self._interval_seconds,
            least=self._interval_seconds,
            most=MOST_INTERVAL_SECONDS,
        )
        self._current()
        return self._readers.stream(interval_seconds)

    def _metrics(self, scope: Scope) -> Answer:
        return self._scrape.answer(self._current(), header(scope, b"accept") or "")

    def _health(self, _: Scope) -> Answer:
        snapshot = self._feed.newest().snapshot
        return json_answer(
            {"status": snapshot.status, "reason": snapshot.reason},
            200 if snapshot.status == "ok" else 503,
        )

    def _take(self) -> StatusSnapshot:
        return StatusSnapshot.take(self._current())

    def _current(self) -> MemoryLimiter:
        return current_limiter() if self._limiter is None else self._limiter
