"""In front of a web application: a request waits for its memory, or is shed before it is read.

`MemoryMiddleware` is plain ASGI 3. It buffers nothing: what the server hands over goes on to the
application, once there is a grant for it.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Generator, Hashable, Mapping, MutableMapping
from contextlib import AsyncExitStack, contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple

import anyio

from membound_async.component import Component
from membound_async.eventloop import current_task
from membound_async.events import log
from membound_async.exceptions import (
    GrantDeadlock,
    GrantError,
    GrantTimeout,
    GrantTooLarge,
    QuotaExceeded,
)
from membound_async.grant import MemoryGrant
from membound_async.limiter import MemoryLimiter, current_limiter
from membound_async.sizes import MAX_BYTES, parse_size, size_of

__all__ = ["MemoryMiddleware", "MiddlewareStatistics", "request_grant"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Place = Component | str | None
"""Whose memory a request takes: a component or its path; None for a request that is let past."""

LINGER_SECONDS = 1.0
"""How long a client may go on sending after it was refused, until its connection is closed."""

WAITED_SECONDS = 0.01
"""What takes longer has waited; less is what the event loop needs."""

LOG_SECONDS = 1.0
"""Of what is refused, one is logged in that time, with how many others there were."""

REASONS = {
    400: b"Bad Request\n",
    408: b"Request Timeout\n",
    413: b"Content Too Large\n",
    503: b"Service Unavailable\n",
}

CLOSE_CODES = {413: 1009, 503: 1013}
"""What a WebSocket is closed with: message too big, try again later."""

_REFUSALS = (GrantTooLarge, GrantTimeout, GrantDeadlock, QuotaExceeded)


class MiddlewareStatistics(NamedTuple):
    """What a middleware has done so far. A message of a WebSocket counts as a request."""

    in_progress: int  #: requests and WebSockets that the application has now
    waiting: int  #: requests that wait for their first grant now
    served: int  #: requests that were handed to the application
    waited: int  #: how many of all had to wait for memory, for longer than 10 ms
    shed: int  #: refused because memory was short: 503, or a WebSocket closed with 1013
    too_large: int  #: refused because there is never so much: 413, or closed with 1009
    malformed: int  #: refused because of what the client did: 400, or 408 if it did nothing
    disconnected: int  #: given up by the client while they waited


_current: ContextVar[_Exchange] = ContextVar("membound_request")


def request_grant() -> MemoryGrant:
    """Give the grant of the request that is being handled; of a WebSocket, of its last message.

    A handler may ``grow()`` it for what it makes of the body, and ``shrink()`` it once it needs
    less; the middleware gives back what is left when the handler is done. It may be used from
    all tasks and threads that the handler has started.

    Raises:
        LookupError: there is no request, or the middleware has let it past.
    """
    exchange = _current.get(None)
    if exchange is None:
        raise LookupError(
            "no request holds memory here; add MemoryMiddleware to the application, or use grant()"
        )
    return exchange.grant


class MemoryMiddleware:
    """Lets requests in as there is memory for them, and sheds those that wait too long.

    ::

        app.add_middleware(MemoryMiddleware, factor=3)  # Starlette, FastAPI
        app = MemoryMiddleware(app, limiter, factor=3)  # any ASGI application

    A request waits for ``base_bytes + factor * Content-Length`` bytes before the application
    sees it. If it has waited ``max_wait_seconds`` it is shed with 503 and ``Retry-After``; one
    that is larger than could ever be had gets 413 at once. Of neither is the body read. A body
    without a length is granted ``ahead_bytes`` ahead of what was received; if more cannot be
    had in time, the answer is 503 and the application is told that the client has gone.

    What is granted is held until the application is done with the request, its response and its
    background tasks included, unless the handler shrinks `request_grant`. The handler runs in
    the request's component, so ``grant()`` there is another grant of that component. A
    ``GrantTimeout``, ``GrantDeadlock`` or ``QuotaExceeded`` that a handler lets out before it
    has begun to answer becomes 503, and a ``GrantTooLarge`` 413.

    A WebSocket holds nothing while it is idle. Each message it receives waits for ``base_bytes
    + factor * size`` bytes, which are given back when the next one is asked for. What is too
    large closes it with code 1009, what waits too long with 1013.

    Many that wait for more while they hold something may block each other, but not for good:
    each gives up after ``max_wait_seconds``. If they hold all there is, the limiter sees that at
    once and refuses the youngest, unless they are charged on behalf of senders.

    While the limiter only observes, nothing is refused. Where there is none, nothing is bounded.
    Cancelled, a request leaves nothing behind.

    Args:
        app: the ASGI application.
        limiter: whose memory it is; None for the one that the process has entered when a
            request comes, for example in the application's lifespan.
        component: whose memory requests take: a component, its path, or a function that gives
            one of these for an ASGI scope, or None for what is let past. A path that is
            named here, or in ``routes``, need not exist; one that a function gives does.
        routes: components of their own for paths that begin like this, the longest first:
            ``{"/upload": "upload", "/healthz": None}``. Whole segments: ``/uploads`` is not
            ``/upload``.
        sender: gives, for an ASGI scope, on whose behalf a request is made: a tenant, the
            client's address. Senders divide what the component may have, so that none takes
            it all; see `Inbox`. None if it is nobody's.
        factor: what the application makes of a byte of the body, in bytes: what it holds at
            once of the body and of what is decoded from it. Or a function that gives it for an
            ASGI scope.
        base_bytes: what a request or message takes besides, or ``"64KiB"``.
        ahead_bytes: how much of a body without a length is granted before it is there.
        max_wait_seconds: how long a request waits for memory, each time.
        retry_after_seconds: when to try again, as it is told to who was shed.
        max_waiting: how many requests may wait for their first grant at once; more are shed
            without waiting. A server has read up to some 300 KiB of the body of each.
        body_timeout_seconds: how long a client may send nothing of a body that memory is held
            for; then it gets 408. None for as long as it likes.

    Raises:
        TypeError, ValueError: an argument makes no sense.
    """

    def __init__(
        self,
        app: Application,
        limiter: MemoryLimiter | None = None,
        *,
        component: Place | Callable[[Scope], Place] = "http",
        routes: Mapping[str, Component | str | None] | None = None,
        sender: Callable[[Scope], Hashable | None] | None = None,
        factor: float | Callable[[Scope], float] = 1,
        base_bytes: int | str = 0,
        ahead_bytes: int | str = "64KiB",
        max_wait_seconds: float = 10.0,
        retry_after_seconds: int = 5,
        max_waiting: int = 1000,
        body_timeout_seconds: float | None = 60.0,
    ) -> None:
        self.app = app
        self._limiter = limiter
        self._component = component
        # The longest first; "/" and "" are all there is.
        self._routes = sorted(
            ((prefix.rstrip("/"), place) for prefix, place in (routes or {}).items()),
            key=lambda route: -len(route[0]),
        )
        if any(prefix and not prefix.startswith("/") for prefix, _ in self._routes):
            raise ValueError(f"routes={routes!r}: a path begins with /")
        self._sender = sender
        self._factor = factor if callable(factor) else _checked_factor(factor)
        self._base_bytes = parse_size(base_bytes, "base_bytes")
        self._ahead_bytes = parse_size(ahead_bytes, "ahead_bytes")
        if not self._ahead_bytes:
            raise ValueError("ahead_bytes=0 would let no body without a length in; give 1 or more")
        self._max_wait_seconds = _checked_seconds(max_wait_seconds, "max_wait_seconds")
        self._retry_after = b"%d" % retry_after_seconds
        if retry_after_seconds < 0:
            raise ValueError(f"retry_after_seconds={retry_after_seconds} must be 0 or more")
        if max_waiting < 0:
            raise ValueError(f"max_waiting={max_waiting} must be 0 or more")
        self._max_waiting = max_waiting
        self._body_timeout_seconds = (
            math.inf
            if body_timeout_seconds is None
            else _checked_seconds(body_timeout_seconds, "body_timeout_seconds")
        )
        self._in_progress = self._waiting = self._served = self._waited = 0
        self._refused = dict.fromkeys(REASONS, 0)
        self._disconnected = 0
        self._log_at = -math.inf
        self._not_logged = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, WebSocket or lifespan, as a server asks for it."""
        place = None
        if scope["type"] in ("http", "websocket"):
            limiter = self._limiter or current_limiter()
            place = self._place_of(scope, limiter)
        if place is None:
            await self.app(scope, receive, send)
            return
        kind = _Request if scope["type"] == "http" else _WebSocket
        exchange = kind(self, place, scope, receive, send)
        before = _current.set(exchange)
        try:
            await exchange.serve()
        finally:
            _current.reset(before)

    def statistics(self) -> MiddlewareStatistics:
        """Give a snapshot of how many requests there are, and what has become of the others."""
        return MiddlewareStatistics(
            in_progress=self._in_progress,
            waiting=self._waiting,
            served=self._served,
            waited=self._waited,
            shed=self._refused[503],
            too_large=self._refused[413],
            malformed=self._refused[400] + self._refused[408],
            disconnected=self._disconnected,
        )

    def _place_of(self, scope: Scope, limiter: MemoryLimiter) -> Component | None:
        """Give the component that a request belongs to; None if it is let past."""
        path: str = scope["path"]
        root: str = scope.get("root_path", "").rstrip("/")
        if root and (path == root or path.startswith(f"{root}/")):
            path = path[len(root) :]
        place = self._component
        for prefix, routed in self._routes:
            if path == prefix or path.startswith(f"{prefix}/"):
                place = routed
                break
        may_be_new = not callable(place)
        if callable(place):
            place = place(scope)
        if isinstance(place, str):
            if limiter.is_noop:  # which is for the whole process, and has no components
                return limiter.root
            # What depends on the client must not make components without end.
            return limiter.component(place) if may_be_new else limiter.find(place)
        return None if place is None else place._resolve()

    def _note(self, component: Component, status: int, reason: str) -> None:
        """Count what was refused, and log it if nothing was logged just now."""
        self._refused[status] += 1
        now = anyio.current_time()
        if now < self._log_at:
            self._not_logged += 1
            return
        others, self._not_logged = self._not_logged, 0
        self._log_at = now + LOG_SECONDS
        log().warning(
            "membound.request_shed",
            component=component.path,
            status=status,
            reason=reason,
            others=others,
        )


class _Refused(Exception):
    """A request cannot go on: with what status, and why."""

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        self.reason = reason
        super().__init__(status, reason)


class _Exchange:
    """What a client and the application have to do with each other, and what it may use."""

    def __init__(
        self,
        middleware: MemoryMiddleware,
        component: Component,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        self.grant = component.grant(0)  # which nobody has asked for
        self._middleware = middleware
        self._component = component
        self._observes: bool = component._limiter._observe
        self._scope = scope
        self._receive = receive
        self._send = send
        factor = middleware._factor
        self._factor = _checked_factor(factor(scope)) if callable(factor) else factor
        self._sender = None if middleware._sender is None else middleware._sender(scope)
        self._is_refused = False

    async def serve(self) -> None:
        """Have the application deal with it, or refuse it."""
        try:
            async with AsyncExitStack() as held:
                if not await self._get_in(held):
                    return
                self._middleware._in_progress += 1
                held.callback(self._leave)
                await self._middleware.app(self._scope, self._pass_in, self._pass_out)
        except _Refused as refused:
            await self._refuse(refused)
        except _REFUSALS as error:
            if not self._is_refused:
                if self._is_too_late():
                    raise
                await self._refuse(_refusal(error))
        except Exception:
            if not self._is_refused:  # else it was told, and has its own way to end
                raise
        await self._end()

    def _leave(self) -> None:
        self._middleware._in_progress -= 1

    def _charge(self, body_bytes: int) -> int:
        """Give what so much of a body takes."""
        return min(math.ceil(body_bytes * self._factor), MAX_BYTES)

    @contextmanager
    def _deadline(self, wanted_bytes: int) -> Generator[None]:
        """Have a wait for memory end in time; what ends it otherwise is why to refuse."""
        began = anyio.current_time()
        try:
            with anyio.move_on_after(self._middleware._max_wait_seconds) as scope:
                yield
        except _REFUSALS as error:
            raise _refusal(error) from None
        finally:
            waited = anyio.current_time() - began
            self._middleware._waited += waited > WAITED_SECONDS
        if scope.cancelled_caught:
            raise _refusal(GrantTimeout(self._component.path, wanted_bytes, waited))

    async def _refuse(self, refused: _Refused) -> None:
        """Tell the client, and let the application say nothing any more."""
        self._is_refused = True
        self._middleware._note(self._component, refused.status, refused.reason)
        if not self._is_too_late():
            with suppress(OSError):  # the client has gone
                await self._tell(refused)

    async def _get_in(self, held: AsyncExitStack) -> bool:
        """Wait until the application may be called; False if the client has gone meanwhile."""
        raise NotImplementedError

    async def _pass_in(self) -> Message:
        """Give the application what the client has sent."""
        raise NotImplementedError

    async def _pass_out(self, message: Message) -> None:
        """Give the client what the application has sent."""
        raise NotImplementedError

    def _is_too_late(self) -> bool:
        """Whether the application has begun to answer, so that nothing else can be said."""
        raise NotImplementedError

    async def _tell(self, refused: _Refused) -> None:
        """Send what the client is to know."""
        raise NotImplementedError

    async def _end(self) -> None:
        """Do what is left to do when the application is done, and all is given back."""


class _Request(_Exchange):
    """An HTTP request."""

    _length: int | None = None
    """How long the body is to be; None if nobody says."""
    _received = 0
    _covered = 0
    """How much of the body there is a grant for."""
    _has_ended = False
    """Whether all of the body was received."""
    _early: Message | None = None
    """What was received while the request waited."""
    _has_started = False
    """Whether the application has begun to answer."""
    _owes_end = False
    """Whether the end of our own answer is still to be sent."""

    # --- before the application

    async def _get_in(self, held: AsyncExitStack) -> bool:
        middleware = self._middleware
        self._length = self._announced()
        self._covered = middleware._ahead_bytes if self._length is None else self._length
        nbytes = min(middleware._base_bytes + self._charge(self._covered), MAX_BYTES)
        self.grant = self._component.grant(nbytes, sender=self._sender)
        with self._deadline(nbytes):
            await held.enter_async_context(self._component)
            held.push_async_exit(self.grant)
            if not self.grant._acquire_at_once() and not await self._wait():
                middleware._disconnected += 1
                return False
        self.grant._holder = current_task()
        middleware._served += 1
        return True

    def _announced(self) -> int | None:
        """Give the length of the body that the request says; None if it does not."""
        lengths = [value for name, value in self._scope["headers"] if name == b"content-length"]
        if any(name == b"transfer-encoding" for name, _ in self._scope["headers"]):
            return None  # it goes before a length
        if not lengths:
            # Only HTTP/1 says whether there is a body.
            return 0 if self._scope.get("http_version", "1.1").startswith("1") else None
        if len(lengths) == 1 and lengths[0].isdigit():
            return int(lengths[0]) if len(lengths[0]) < 16 else MAX_BYTES
        if self._observes:
            return None
        raise _Refused(400, f"its Content-Length is {b', '.join(lengths)!r}")

    async def _wait(self) -> bool:
        """Wait for the first grant; False if the client has gone away meanwhile."""
        middleware = self._middleware
        if middleware._waiting >= middleware._max_waiting and not self._observes:
            raise _Refused(503, f"{middleware._waiting} requests wait already")
        middleware._waiting += 1
        try:
            if self._length != 0:
                # To learn whether the client is there is to read what it sends.
                await self.grant
                return True
            return await self._wait_and_listen()
        finally:
            middleware._waiting -= 1

    async def _wait_and_listen(self) -> bool:
        error: GrantError | None = None
        is_there = True

        async def listen() -> None:
            nonlocal is_there
            while is_there:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    is_there = False
                else:
                    self._early = message
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen)
            try:
                await self.grant
            except _REFUSALS as refusal:  # not in a group
                error = refusal
            tasks.cancel_scope.cancel()
        if error is not None and is_there:
            raise error
        return is_there

    # --- from the client

    async def _pass_in(self) -> Message:
        if self._is_refused:
            return {"type": "http.disconnect"}
        try:
            message = await self._next()
            if message["type"] == "http.request" and not self._has_ended:
                await self._count(message)
        except _Refused as refused:
            await self._refuse(refused)
            return {"type": "http.disconnect"}
        return message

    async def _next(self) -> Message:
        """Receive a message, when there is a grant for what is expected."""
        if self._early is not None:
            message, self._early = self._early, None
            return message
        if self._has_ended:
            return await self._receive()
        if self._length is None:
            await self._cover(self._received + self._middleware._ahead_bytes)
        seconds = math.inf if self._observes else self._middleware._body_timeout_seconds
        with anyio.move_on_after(seconds):
            return await self._receive()
        raise _Refused(408, f"nothing was received of its body for {seconds:g} s")

    async def _count(self, message: Message) -> None:
        """Count a part of the body, which is here; wait for a grant if there is none for it."""
        self._received += len(message.get("body", b""))
        if self._length is None:
            await self._cover(self._received)
        elif self._received > self._length and not self._observes:
            raise _Refused(400, f"its body is longer than its Content-Length, {self._length}")
        if not message.get("more_body", False):
            self._has_ended = True
            spare = math.floor((self._covered - self._received) * self._factor)
            # Unless the handler has begun to do something else with it.
            with suppress(GrantError, RuntimeError, ValueError):
                self.grant.shrink(max(0, min(spare, self.grant.size)))

    async def _cover(self, body_bytes: int) -> None:
        """Wait until there is a grant for so much of the body."""
        more = body_bytes - self._covered
        if more > 0:
            nbytes = self._charge(more)
            # Who waits here acts for the request: it is not about to give anything back.
            self.grant._holder = current_task()
            with self._deadline(nbytes):
                await self.grant.grow(nbytes)
            self._covered = body_bytes

    # --- to the client

    async def _pass_out(self, message: Message) -> None:
        if self._is_refused:
            raise OSError("the request was refused, and its client was told so")
        if message["type"] == "http.response.start":
            self._has_started = True
        await self._send(message)

    def _is_too_late(self) -> bool:
        return self._has_started

    async def _tell(self, refused: _Refused) -> None:
        text = REASONS[refused.status]
        headers = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", b"%d" % len(text)),
        ]
        if refused.status == 503:
            headers.append((b"retry-after", self._middleware._retry_after))
        is_first_version = self._scope.get("http_version", "1.1").startswith("1")
        if is_first_version and self._length != 0 and not self._has_ended:
            # Or the server would read on, to the next request on that connection.
            headers.append((b"connection", b"close"))
            self._owes_end = True
        await self._send(
            {"type": "http.response.start", "status": refused.status, "headers": headers}
        )
        await self._send({"type": "http.response.body", "body": text, "more_body": self._owes_end})

    async def _end(self) -> None:
        if not self._owes_end:
            return
        # A connection that is closed while there is something to be read is reset, and a client
        # that is still sending does not see its answer then. What it sends is dropped.
        with anyio.move_on_after(LINGER_SECONDS):
            while (await self._receive()).get("more_body", False):
                pass
        with suppress(OSError):
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})


class _WebSocket(_Exchange):
    """A WebSocket. Its grant is that of the message it has received last."""

    _is_accepted = False
    _is_closed = False

    async def _get_in(self, held: AsyncExitStack) -> bool:
        with self._deadline(self._component._account.minimum):
            await held.enter_async_context(self._component)
        held.callback(self._give_back)
        return True

    def _give_back(self) -> None:
        self.grant._release()

    async def _pass_in(self) -> Message:
        self._give_back()
        if not self._is_refused:
            message = await self._receive()
            if message["type"] == "websocket.disconnect":
                self._is_closed = True
            if message["type"] != "websocket.receive":
                return message
            try:
                await self._get(message)
            except _Refused as refused:
                await self._refuse(refused)
            else:
                return message
        return {"type": "websocket.disconnect", "code": 1006}

    async def _get(self, message: Message) -> None:
        """Wait for the grant of a message."""
        text = message.get("text")
        size = size_of(message["bytes"] if text is None else text)
        nbytes = min(self._middleware._base_bytes + self._charge(size), MAX_BYTES)
        grant = self._component.grant(nbytes, sender=self._sender)
        with self._deadline(nbytes):
            await grant.__aenter__()
        self.grant = grant
        self._middleware._served += 1

    async def _pass_out(self, message: Message) -> None:
        if self._is_refused:
            raise OSError("the WebSocket was closed, because there is no memory for it")
        self._is_accepted |= message["type"] == "websocket.accept"
        self._is_closed |= message["type"] in ("websocket.close", "websocket.http.response.start")
        await self._send(message)

    def _is_too_late(self) -> bool:
        return self._is_closed

    async def _tell(self, refused: _Refused) -> None:
        code = CLOSE_CODES[refused.status]
        reason = REASONS[refused.status].decode().strip()
        await self._send({"type": "websocket.close", "code": code, "reason": reason})


def _refusal(error: GrantError) -> _Refused:
    return _Refused(413 if isinstance(error, GrantTooLarge) else 503, str(error))


def _checked_factor(factor: object) -> float:
    if not isinstance(factor, (int, float)) or not 0 <= factor < math.inf:
        raise ValueError(f"factor={factor!r} must be a finite number, 0 or more")
    return factor


def _checked_seconds(seconds: object, name: str) -> float:
    if not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
        raise ValueError(f"{name}={seconds!r} must be a finite number of seconds, more than 0")
    return seconds
