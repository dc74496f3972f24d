"""``membound run --serve``: the status API beside the program."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import threading
from importlib import import_module

from membound_async.limiter import MemoryLimiter

from . import CannotStart

__all__ = ["Server"]

ENDS_WITHIN_SECONDS = 2.0
LOOPBACK = "127.0.0.1"
LOGGERS = ("uvicorn.access", "uvicorn.error")
"""Shared by all of uvicorn's servers in a process, so also by one of the program's."""


class Server:
    """Serves ``MemoryAPI`` with uvicorn, in a thread with an event loop of its own.

    The port is taken at once, so that a port in use is known before the program starts.

    Args:
        address: ``HOST:PORT``, ``:PORT`` or ``PORT``; the host is the loopback one unless it
            is given, and port 0 is any that is free.
        token: what clients must send; None for nothing.

    Raises:
        CannotStart: the address makes no sense or is in use, or uvicorn is not installed.
    """

    def __init__(self, address: str, token: str | None) -> None:
        try:
            # All of it now, as a part of the program's baseline.
            for name in ("uvicorn", "uvicorn.protocols.http.h11_impl", "membound_async.api"):
                import_module(name)
        except ModuleNotFoundError:
            raise CannotStart("--serve needs uvicorn: pip install 'membound-async[cli]'") from None
        self._token = token
        self._socket = _listening(address)
        host, port = self._socket.getsockname()[:2]
        self._is_local = host.startswith("127.") or host == "::1"
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{port}/memory/"
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    def start(self, limiter: MemoryLimiter) -> None:
        """Serve this limiter, and say where on standard error.

        Raises:
            CannotStart: the token makes no sense.
        """
        import uvicorn

        from membound_async.api import MemoryAPI

        try:
            api = MemoryAPI(limiter, token=self._token)
        except ValueError as error:
            self._socket.close()
            raise CannotStart(f"--token: {error}") from None
        config = uvicorn.Config(
            api,
            loop="asyncio",  # uvloop's would be the program's business
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,  # the program's logging stays as it is
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
        )
        for name in LOGGERS:
            logging.getLogger(name).addFilter(self._is_worth_a_word)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run,
            kwargs={"sockets": [self._socket]},
            name="membound serve",
            daemon=True,
        )
        # A forked process has no thread that would answer.
        os.register_at_fork(after_in_child=self._socket.close)
        self._thread.start()
        print(f"membound: {self._announcement()}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Serve no more; not in a forked process."""
        if os.getpid() != self._process:
            return
        if self._thread is None:
            self._socket.close()
            return
        self._server.force_exit = True
        self._server.should_exit = True
        self._thread.join(ENDS_WITHIN_SECONDS)
        for name in LOGGERS:
            logging.getLogger(name).removeFilter(self._is_worth_a_word)

    def _is_worth_a_word(self, record: logging.LogRecord) -> bool:
        """Keep what this server does as a matter of course out of the program's log."""
        is_own = self._thread is not None and record.thread == self._thread.ident
        return not is_own or record.levelno >= logging.WARNING

    def _announcement(self) -> str:
        if self._is_local or self._token:
            return f"serving {self.url}"
        return (
            f"serving {self.url} to whoever reaches this machine; MEMBOUND_API_TOKEN would ask "
            "for a token"
        )


def _listening(address: str) -> socket.socket:
    match = re.fullmatch(r"(?:(?P<host>\[[^]]*\]|[^:\[\]]*):)?(?P<port>\d{1,5})", address)
    if match is None or int(match["port"]) > 65535:
        raise CannotStart(f"--serve {address}: write HOST:PORT, :PORT or PORT")
    host, port = (match["host"] or LOOPBACK).strip("[]"), int(match["port"])
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(where)
            found.listen(128)
        except OSError:
            found.close()
            raise
    except OSError as error:
        raise CannotStart(f"--serve {address}: {error.strerror}") from None
    return found
