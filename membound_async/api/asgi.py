"""What an ASGI server hands over, and where in it the request's path is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

__all__ = ["Receive", "Scope", "Send", "header", "paths"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def paths(scope: Scope) -> Iterator[str]:
    """Give what the path below the mount point may be, the likelier one first.

    ASGI has ``root_path`` as the beginning of ``path``. Some servers and frameworks leave it out
    of ``path``, which then may begin like it by chance.
    """
    path: str = scope["path"]
    if path.endswith("/") and not scope.get("raw_path", b"/").endswith(b"/"):
        path = path[:-1]  # Litestar appends one, to whatever is asked for below a mount point
    root_path: str = scope.get("root_path", "").rstrip("/")
    if root_path and path.startswith(f"{root_path}/"):
        yield path[len(root_path) :]
    yield path


def header(scope: Scope, name: bytes) -> str | None:
    """Give a header of the request; None if it is not there exactly once."""
    found = [value for key, value in scope["headers"] if key.lower() == name]
    return found[0].decode("latin-1") if len(found) == 1 else None
