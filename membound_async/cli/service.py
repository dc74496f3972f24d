"""A service that publishes its memory with ``MemoryAPI``: asked over HTTP."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, cast
from urllib.parse import SplitResult, urlsplit

from membound_async.probes import PressureStall
from membound_async.statistics import (
    ComponentStatistics,
    LimiterStatistics,
    ReclaimerStatistics,
    ResourceStatistics,
)

from . import CannotStart
from .usage import Seen

__all__ = ["Service", "ServiceError"]

TIMEOUT_SECONDS = 5.0
Kind = TypeVar("Kind")

MOST_BYTES = 64 * 2**20
"""No status of a limiter is longer; what sends more is something else."""


class ServiceError(Exception):
    """The service was not reached, or its answer is no status. The message says why."""


class Service:
    """The status of one limiter, over HTTP.

    Args:
        address: ``PORT``, ``:PORT``, ``HOST:PORT``, or a URL: of the server, of where the API
            is mounted, of ``/memory``, or of ``/memory/status``.
        token: sent as bearer token.

    Raises:
        CannotStart: the address is none.
    """

    def __init__(self, address: str, token: str | None = None) -> None:
        self._url = _status_url(address)
        self._headers = {"Accept": "application/json", "Connection": "close"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._token = token
        self.name = self._url.netloc.rpartition("@")[2]

    def status(self) -> dict[str, Any]:
        """Ask for the status, and give the document that is the answer.

        Raises:
            ServiceError: it was not reached, or its answer is no status.
        """
        try:
            code, body = self._get()
        except TimeoutError:
            raise ServiceError(
                f"{self.name} does not answer within {TIMEOUT_SECONDS:g} s"
            ) from None
        except ConnectionRefusedError:
            raise ServiceError(
                f"{self.name} refuses the connection: nothing serves there"
            ) from None
        except socket.gaierror as error:
            raise ServiceError(
                f"no host is known by {self._url.hostname}: {error.strerror}"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise ServiceError(
                f"{self.name} cannot be asked: {str(error) or type(error).__name__}"
            ) from None
        if code in (401, 403):
            refused = "does not take this token" if self._token else "wants a token"
            raise ServiceError(
                f"{self.name} {refused} ({code}): give it with --token or MEMBOUND_API_TOKEN"
            )
        try:
            document: Any = json.loads(body) if code == 200 else None
        except ValueError:
            document = None
        if not isinstance(document, dict) or "limiter" not in document:
            raise ServiceError(
                f"{self._url.geturl()} is no membound API (status code {code}); is it mounted "
                "under another path?"
            )
        return cast("dict[str, Any]", document)

    def seen(self, document: Mapping[str, Any]) -> Seen:
        """Read a status.

        Raises:
            ServiceError: it lacks what this version of the package needs.
        """
        try:
            numbers = _limiter(document["limiter"])
            title = f"{self.name}, process {document['pid']}"
            return Seen(
                title=title,
                statistics=numbers,
                status=str(document["status"]),
                reason=document["reason"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            version = document.get("membound_version", "unknown")
            raise ServiceError(
                f"{self.name} runs membound_async {version}, whose status this version does not "
                f"understand ({type(error).__name__}: {error})"
            ) from None

    def _get(self) -> tuple[int, bytes]:
        kind = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        host = self._url.hostname
        assert host is not None
        connection = kind[self._url.scheme](host, self._url.port, timeout=TIMEOUT_SECONDS)
        try:
            target = self._url.path + (f"?{self._url.query}" if self._url.query else "")
            connection.request("GET", target, headers=self._headers)
            answer = connection.getresponse()
            body = answer.read(MOST_BYTES + 1)
        finally:
            connection.close()
        if len(body) > MOST_BYTES:
            raise OSError(f"the answer is longer than {MOST_BYTES} bytes")
        return answer.status, body


def _status_url(address: str) -> SplitResult:
    text = f"127.0.0.1:{address.removeprefix(':')}" if address.lstrip(":").isdigit() else address
    if text.startswith(":"):
        text = "127.0.0.1" + text
    if "://" not in text:
        text = f"http://{text}"
    try:
        url = urlsplit(text)
        is_right = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        is_right = False
        url = SplitResult("", "", "", "", "")
    if not is_right:
        raise CannotStart(f"{address!r} is no address; write HOST:PORT or http://HOST:PORT/PREFIX")
    path = url.path.rstrip("/")
    if not path.endswith("/memory/status"):
        path += "/status" if path.endswith("/memory") else "/memory/status"
    return url._replace(path=path, fragment="")


# --- the numbers in a status


def _limiter(plain: Mapping[str, Any]) -> LimiterStatistics:
    stall = plain["pressure_stall"]
    return _made(
        LimiterStatistics,
        {
            **plain,
            "pressure_stall": None if stall is None else _made(PressureStall, stall),
            "resources": {
                name: _made(ResourceStatistics, one) for name, one in plain["resources"].items()
            },
            "reclaimers": tuple(_made(ReclaimerStatistics, one) for one in plain["reclaimers"]),
            "components": tuple(_made(ComponentStatistics, one) for one in plain["components"]),
        },
    )


def _made(kind: type[Kind], plain: Mapping[str, Any]) -> Kind:
    """Make a dataclass; what a newer version says besides is left out."""
    return kind(**{field.name: plain[field.name] for field in fields(kind)})  # type: ignore[arg-type]
