"""Log events: through structlog, and never to stdout unless the application says so."""

from __future__ import annotations

import logging

import structlog

__all__ = ["log"]

_to_stdlib = structlog.wrap_logger(
    logging.getLogger("membound_async"),
    processors=[
        structlog.stdlib.filter_by_level,
        structlog.processors.KeyValueRenderer(key_order=["event"]),
    ],
    wrapper_class=structlog.stdlib.BoundLogger,
)


def log() -> structlog.stdlib.BoundLogger:
    """Give the logger to write an event with.

    The application's, once it has configured structlog; until then the stdlib logger
    ``membound_async``.
    """
    logger: structlog.stdlib.BoundLogger = (
        structlog.get_logger("membound_async") if structlog.is_configured() else _to_stdlib
    )
    return logger
