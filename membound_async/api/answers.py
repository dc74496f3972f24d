"""Answers to requests, with the headers that all of them have."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .asgi import Receive, Send

__all__ = ["JSON", "Answer", "Headers", "describe_problem", "json_answer", "start"]

JSON = "application/json"

Headers = Iterable[tuple[bytes, bytes]]

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""A page may use what is served beside it and nothing else, no inline script or style either."""

COMMON_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    content_type: str
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ()

    async def send_to(self, _: Receive, send: Send, *, has_body: bool) -> None:
        """Send it, to a HEAD request without its body."""
        length = (b"content-length", str(len(self.body)).encode())
        await send(start(self.status, self.content_type, (length, *self.headers)))
        await send({"type": "http.response.body", "body": self.body if has_body else b""})


def start(status: int, content_type: str, headers: Headers = ()) -> dict[str, Any]:
    """Give the message that begins an answer."""
    return {
        "type": "http.response.start",
        "status": status,
        "headers": [(b"content-type", content_type.encode()), *COMMON_HEADERS, *headers],
    }


def json_answer(document: object, status: int = 200, *, headers: Headers = ()) -> Answer:
    """Give a document as JSON."""
    body = json.dumps(document, separators=(",", ":")).encode()
    return Answer(status, JSON, body, (*headers,))


def describe_problem(status: int, reason: str, *, headers: Headers = ()) -> Answer:
    """Say why there is no other answer."""
    return json_answer({"error": reason}, status, headers=headers)
