"""A limiter for OpenTelemetry: observable instruments, of its API alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from threading import RLock
from typing import TYPE_CHECKING, Self

from membound_async.hooks import Event, GrantWaited
from membound_async.limiter import MemoryLimiter

from .quantities import GROUPS, WAIT_HELP, WAIT_SECONDS, Group, Quantity
from .snapshots import DEFAULT_MAX_COMPONENTS, MeteredLimiter, Snapshot, metered

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation

__all__ = ["MemoryInstruments"]

LONGEST_SHARED_SECONDS = 1.0
"""How old a snapshot may be that another callback has asked for."""

ATTRIBUTES = {"error": "error.type"}
"""Labels that OpenTelemetry has a name for; the others begin with ``membound.``."""


class MemoryInstruments:
    """Gives OpenTelemetry what there is to know of a limiter, when it collects.

    One snapshot serves all instruments of a collection. How long requests waited goes to a
    histogram at once. OpenTelemetry cannot take instruments away: after ``close()`` they
    have nothing to tell.

    Args:
        limiter: the limiter; or several, each under a name that becomes the attribute
            ``membound.limiter``.
        meter_provider: whose meter is used; None for the global one.
        max_components: how many components are told apart; the rest are one,
            ``(others)``.

    Raises:
        ImportError: opentelemetry-api is not installed (the extra ``opentelemetry``).
        ValueError: ``max_components`` is no number from 0 on.
    """

    def __init__(
        self,
        limiter: MemoryLimiter | Mapping[str, MemoryLimiter],
        *,
        meter_provider: MeterProvider | None = None,
        max_components: int = DEFAULT_MAX_COMPONENTS,
    ) -> None:
        from opentelemetry.metrics import get_meter

        meter = get_meter("membound_async", meter_provider=meter_provider)
        self._metered = metered(limiter, max_components)
        self._snapshots: list[tuple[MeteredLimiter, Snapshot]] = []
        self._asked: set[str] = set()
        self._taken_at = -math.inf
        self._lock = RLock()
        for group in GROUPS:
            for quantity in group.quantities:
                create = _creator(meter, quantity)
                create(
                    f"membound.memory.{quantity.name}",
                    [partial(self._observe, group, quantity)],
                    quantity.unit,
                    quantity.help,
                )
        waits = meter.create_histogram(
            "membound.memory.grant_wait",
            "s",
            WAIT_HELP,
            explicit_bucket_boundaries_advisory=WAIT_SECONDS,
        )

        def record(attributes: dict[str, str], event: Event) -> None:
            if isinstance(event, GrantWaited):
                waits.record(event.waited_seconds, attributes)

        self._hooked = [
            one.limiter.add_hook(partial(record, _attributes(one, (), ()))) for one in self._metered
        ]

    def close(self) -> None:
        """Have nothing more to tell; does nothing the second time."""
        for hooked in self._hooked:
            hooked.remove()
        for one in self._metered:
            one.close()
        with self._lock:
            self._metered = []
            self._taken_at = -math.inf

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _observe(
        self, group: Group, quantity: Quantity, _: CallbackOptions
    ) -> Iterator[Observation]:
        from opentelemetry.metrics import Observation

        for one, snapshot in self._shared(quantity.name):
            for values, item in group.items(snapshot):
                value = quantity.value(item)
                if value is not None:
                    yield Observation(value + 0, _attributes(one, group.labels, values))

    def _shared(self, name: str) -> list[tuple[MeteredLimiter, Snapshot]]:
        """Give the snapshots of this collection.

        A callback is not told which collection it is called for; but who asks a second time
        asks for another one.
        """
        with self._lock:
            now = time.monotonic()
            if name in self._asked or now - self._taken_at > LONGEST_SHARED_SECONDS:
                self._snapshots = [(one, one.snapshot()) for one in self._metered]
                self._asked.clear()
                self._taken_at = now
            self._asked.add(name)
            return self._snapshots


def _creator(meter: Meter, quantity: Quantity) -> Callable[..., object]:
    if quantity.kind == "counter":
        return meter.create_observable_counter
    if quantity.kind == "updown":
        return meter.create_observable_up_down_counter
    return meter.create_observable_gauge


def _attributes(
    one: MeteredLimiter, names: tuple[str, ...], values: tuple[str, ...]
) -> dict[str, str]:
    return {
        ATTRIBUTES.get(name, f"membound.{name}"): value for name, value in one.labels(names, values)
    }
