"""What a request may ask for behind the question mark."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl

from .asgi import Scope

__all__ = ["BadQuery", "Query"]

MAX_FIELDS = 16
"""More than any route knows."""


class BadQuery(ValueError):
    """A value makes no sense; says which, and what would."""


class Query:
    """The values of a request, of which each may be there once.

    Args:
        scope: of the request.
        known: the names that the route knows. A misspelt one is an error, so that nobody takes
            the default for what was asked for.

    Raises:
        BadQuery: another name is there, or one of them twice.
    """

    def __init__(self, scope: Scope, known: tuple[str, ...]) -> None:
        text = scope.get("query_string", b"").decode("latin-1")
        try:
            pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=MAX_FIELDS)
        except ValueError as error:
            raise BadQuery(f"more than {MAX_FIELDS} values") from error
        self._values = dict(pairs)
        for name in self._values:
            if name not in known:
                raise BadQuery(f"{_shown(name)} is not known here; use {', '.join(known)}")
        if len(self._values) < len(pairs):
            raise BadQuery("a name is there more than once")

    def whole(self, name: str, default: int, *, most: int) -> int:
        """Give a whole number from 0 to ``most``.

        Raises:
            BadQuery: it is something else.
        """
        text = self._values.get(name)
        if text is None:
            return default
        if not re.fullmatch(r"[0-9]{1,12}", text) or int(text) > most:
            raise BadQuery(f"{name}={_shown(text)} is no whole number from 0 to {most}")
        return int(text)

    def seconds(self, name: str, default: float, *, least: float, most: float) -> float:
        """Give a number of seconds within bounds.

        Raises:
            BadQuery: it is something else.
        """
        text = self._values.get(name)
        if text is None:
            return default
        if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) or not least <= float(text) <= most:
            raise BadQuery(f"{name}={_shown(text)} is no number from {least:g} to {most:g}")
        return float(text)


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 40 else f"{text[:40]}...")
