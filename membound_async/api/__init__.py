"""A limiter over HTTP: an ASGI application for scripts, for Prometheus and for a person."""

from .app import MemoryAPI
from .snapshot import ComponentUsage, StatusSnapshot

__all__ = ["ComponentUsage", "MemoryAPI", "StatusSnapshot"]
