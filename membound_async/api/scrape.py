"""What ``/metrics`` says, if prometheus-client is there."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module

from membound_async.limiter import MemoryLimiter
from membound_async.metrics.prometheus import MemoryCollector, exposition

from .answers import Answer, describe_problem

with suppress(ImportError):
    # Now, and not at the first scrape: the event loop would have to wait for it.
    import_module("prometheus_client.exposition")

__all__ = ["Scrape"]


class Scrape:
    """Answers scrapes; counts events of the limiter from the first one on, until closed."""

    def __init__(self) -> None:
        self._limiter: MemoryLimiter | None = None
        self._collector: MemoryCollector | None = None

    def answer(self, limiter: MemoryLimiter, accept: str) -> Answer:
        """Give all metrics of the limiter, in the format that the scraper accepts."""
        try:
            if self._collector is None or limiter is not self._limiter:
                self.close()
                self._limiter, self._collector = limiter, MemoryCollector(limiter)
            content_type, text = exposition(self._collector, accept)
        except ImportError:
            needed = "membound-async[prometheus]"
            return describe_problem(404, f"metrics need prometheus-client; install {needed}")
        return Answer(200, content_type, text)

    def close(self) -> None:
        """Count nothing more."""
        if self._collector is not None:
            self._collector.close()
            self._collector = self._limiter = None
