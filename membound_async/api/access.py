"""Who may see it: a token, or a function of the user's that looks at the request."""

from __future__ import annotations

import base64
import binascii
import hmac
import inspect
from collections.abc import Awaitable, Callable

from .answers import Answer, describe_problem
from .asgi import Scope, header

__all__ = ["Access", "Guard"]

Guard = Callable[[Scope], bool | Awaitable[bool]]
"""Looks at the ASGI scope of a request and says whether it may have an answer."""

CHALLENGES = (
    (b"www-authenticate", b'Bearer realm="membound"'),
    # What a browser knows: it asks for a name and a password, and sends them with whatever the
    # page requests, which a script cannot do for an EventSource.
    (b"www-authenticate", b'Basic realm="membound", charset="UTF-8"'),
)


class Access:
    """Lets requests in that have the token, if there is one, and that the guard lets in.

    Args:
        token: what a request must bring as bearer token, or as password of HTTP Basic.
        guard: see `Guard`.

    Raises:
        TypeError: one of them is of another type.
        ValueError: the token is empty or could not be sent in a header.
    """

    def __init__(self, token: str | None, guard: Guard | None) -> None:
        if token is not None and not isinstance(token, str):
            raise TypeError(f"token is a str or None, not {type(token).__name__}")
        # An empty one is that of a variable which is not set, and must not open the door.
        if token is not None and not (token and token.isascii() and token.isprintable()):
            raise ValueError("token is empty or has characters besides printable ASCII")
        if token is not None and " " in token:
            raise ValueError("token has spaces, which end a bearer token")
        if guard is not None and not callable(guard):
            raise TypeError(f"guard is a function of the ASGI scope, not {guard!r}")
        self._token = None if token is None else token.encode()
        self._guard = guard

    async def refusal(self, scope: Scope) -> Answer | None:
        """Give the answer to a request that may not have what it asks for; None if it may."""
        if self._token is not None:
            given = _credentials(header(scope, b"authorization") or "")
            # Takes the same time wherever the first wrong character is.
            if not hmac.compare_digest(given, self._token):
                reason = "the token is missing or wrong; send it as `Authorization: Bearer TOKEN`"
                return describe_problem(401, reason, headers=CHALLENGES)
        if self._guard is not None:
            allowed = self._guard(scope)
            if inspect.isawaitable(allowed):
                allowed = await allowed
            if not allowed:
                return describe_problem(403, "the guard of this API has refused the request")
        return None


def _credentials(authorization: str) -> bytes:
    scheme, _, credentials = authorization.partition(" ")
    credentials = credentials.strip(" ")
    match scheme.lower():
        case "bearer":
            return credentials.encode()
        case "basic":
            try:
                decoded = base64.b64decode(credentials, validate=True)
            except (binascii.Error, ValueError):
                return b""
            return decoded.partition(b":")[2]
        case _:
            return b""
