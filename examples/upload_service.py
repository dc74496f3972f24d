"""A small service that takes uploads, and stays inside its memory whatever is uploaded.

    python upload_service.py
    python upload_service.py --limit 256MiB --port 8000
    python upload_service.py --bare

``POST /count`` takes a JSON document, whole, and says how many values are in it: what the service
needs for that is some nine times the document. ``POST /checksum`` reads what it is sent in
pieces, and needs no more than one of them. ``GET /healthz`` says ``ok``, however busy the
service is. Try it::

    curl --data-binary @document.json http://127.0.0.1:8000/count

Each request waits for the memory that it will take, at most ``--wait`` seconds, and is answered
with 503 then; one that is larger than there ever is memory for, with 413. What it holds, and who
waits, is shown at ``/ops/memory/``. With ``--bare`` there is nothing before the handlers. Needs
starlette and uvicorn. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import zlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
import anyio.to_thread
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from membound_async import MemoryLimiter
from membound_async.api import MemoryAPI
from membound_async.integrations.asgi import MemoryMiddleware

DECODED = 12
"""What a byte of JSON takes at the most while it is decoded: itself, twice while the pieces of
the body are joined, and some nine bytes of objects."""


decoding = anyio.CapacityLimiter(1)


def count_values(document: Any) -> int:
    """Count all values in a decoded document."""
    pending, count = [document], 0
    while pending:
        value = pending.pop()
        count += 1
        if isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
    return count


async def count(request: Request) -> Response:
    """Take a JSON document, and say how many values are in it."""

    def decode_and_count(body: bytes) -> int:
        return count_values(json.loads(body))

    try:
        # In a thread, so that a large one does not hold up the others; in one at a time, since
        # with several, Python is no faster but goes to and fro between them.
        body = await request.body()
        values = await anyio.to_thread.run_sync(decode_and_count, body, limiter=decoding)
    except ValueError as error:
        return PlainTextResponse(f"this is no JSON: {error}\n", status_code=400)
    except ClientDisconnect:
        return Response(status_code=400)
    return JSONResponse({"values": values})


async def checksum(request: Request) -> Response:
    """Take anything, and give its size and CRC-32."""
    size = crc = 0
    with contextlib.suppress(ClientDisconnect):
        async for piece in request.stream():
            crc = zlib.crc32(piece, crc)
            size += len(piece)
    return JSONResponse({"bytes": size, "crc32": crc})


async def healthz(_: Request) -> Response:
    """Say that the service is there."""
    return PlainTextResponse("ok\n")


def factor(scope: Any) -> int:
    """Give what the service makes of a byte that is sent to it."""
    return DECODED if scope["path"] == "/count" else 0


def service(limit: str | None, wait_seconds: float, *, bare: bool) -> Starlette:
    """Make the service.

    Args:
        limit: bytes it may use; None for what the system allows.
        wait_seconds: how long a request waits for memory.
        bare: let everything in at once.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        if bare:
            yield
        else:
            async with MemoryLimiter(limit) as limiter:
                limiter.component("uploads")
                yield

    app = Starlette(
        routes=[
            Route("/count", count, methods=["POST"]),
            Route("/checksum", checksum, methods=["POST"]),
            Route("/healthz", healthz),
        ],
        lifespan=lifespan,
    )
    if not bare:
        app.mount("/ops", MemoryAPI())
        app.add_middleware(
            MemoryMiddleware,
            component="uploads",
            routes={"/healthz": None, "/ops": None},
            factor=factor,
            base_bytes="128KiB",
            max_wait_seconds=wait_seconds,
        )
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    parser.add_argument("--limit", help='"256MiB"; without it, what the system allows')
    parser.add_argument(
        "--wait", type=float, default=10.0, metavar="SECONDS", help="for memory (%(default)s)"
    )
    parser.add_argument("--bare", action="store_true", help="without the middleware")
    options = parser.parse_args(arguments)
    app = service(options.limit, options.wait, bare=options.bare)
    uvicorn.run(app, host=options.host, port=options.port, access_log=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
