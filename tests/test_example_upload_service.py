"""The example of uploads: it runs, and answers; and it sheds what it has no memory for."""

from __future__ import annotations

import json
import signal
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from tests.uploads import serving


@contextmanager
def running(*arguments: str) -> Iterator[httpx.Client]:
    """Run the service as a program; give a client of it."""
    with serving(*arguments) as (program, port):
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=30)
        assert "Traceback" not in errors.replace("KeyboardInterrupt", "")


DOCUMENT = json.dumps([{"n": n, "text": "x"} for n in range(50_000)]).encode()


@pytest.mark.parametrize("arguments", [["--bare"], ["--limit=1GiB"]])
def test_the_service_answers(arguments):
    with running(*arguments) as client:
        assert client.post("/count", content=DOCUMENT).json() == {"values": 150_001}
        assert client.post("/count", content=b"[1, ").status_code == 400
        pieces = (DOCUMENT[at : at + 10_000] for at in range(0, len(DOCUMENT), 10_000))
        summed = {"bytes": len(DOCUMENT), "crc32": zlib.crc32(DOCUMENT)}
        assert client.post("/checksum", content=pieces).json() == summed
        assert client.get("/healthz").text == "ok\n"


def test_the_service_sheds_what_it_has_no_memory_for():
    with running("--limit=200MiB", "--wait=0.2") as client:

        def post(path: str) -> tuple[str, int]:
            response = client.post(path, content=DOCUMENT)
            assert ("retry-after" in response.headers) == (response.status_code == 503)
            return path, response.status_code

        with ThreadPoolExecutor(24) as clients:
            answers = set(clients.map(post, ["/count"] * 23 + ["/healthz"]))
        assert (
            {("/count", 200), ("/count", 503)}
            <= answers
            <= {
                ("/count", 200),
                ("/count", 503),
                ("/healthz", 405),
            }
        )
        assert client.post("/count", content=DOCUMENT * 20).status_code == 413
