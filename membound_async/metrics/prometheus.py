"""A limiter for Prometheus: a collector for any registry, and a fast exposition of it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from itertools import accumulate, pairwise
from threading import RLock
from typing import TYPE_CHECKING, Self, cast

from membound_async.hooks import Event, GrantWaited, Hooked
from membound_async.limiter import MemoryLimiter

from .quantities import GROUPS, WAIT_HELP, WAIT_SECONDS, Quantity
from .snapshots import DEFAULT_MAX_COMPONENTS, MeteredLimiter, Snapshot, metered

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector

__all__ = ["MemoryCollector", "exposition"]

UNITS = {"By": "bytes", "s": "seconds", "1": "ratio"}
"""The base units, as names of metrics end."""


class MemoryCollector:
    """Gives what Prometheus wants to know of a limiter, one snapshot for each scrape.

    Made, it counts events of the limiter until ``close()``: how long requests waited, and
    what was refused. Registered, it is scraped with the registry; `exposition` needs no
    registry. Both may happen in any thread.

    Args:
        limiter: the limiter; or several, each under a name that becomes the label
            ``limiter`` of its series.
        max_components: how many components have series of their own; the rest are one
            component, ``(others)``. Each has about a dozen.
        wait_seconds: the upper ends of the buckets of ``membound_grant_wait_seconds``.

    Raises:
        ImportError: prometheus-client is not installed (the extra ``prometheus``).
        ValueError: ``max_components`` is no number from 0 on, or ``wait_seconds`` do not rise.
    """

    def __init__(
        self,
        limiter: MemoryLimiter | Mapping[str, MemoryLimiter],
        *,
        max_components: int = DEFAULT_MAX_COMPONENTS,
        wait_seconds: Sequence[float] = WAIT_SECONDS,
    ) -> None:
        import_module("prometheus_client")  # so that it is missed here, not at a scrape
        if not wait_seconds or any(low >= high for low, high in pairwise(wait_seconds)):
            raise ValueError(f"wait_seconds={wait_seconds!r} must be numbers that rise")
        self._sources = [_Source(one, wait_seconds) for one in metered(limiter, max_components)]
        self._registries: list[CollectorRegistry] = []

    def register(self, registry: CollectorRegistry | None = None) -> Self:
        """Register it with ``registry``, or prometheus-client's own, until ``close()``.

        Raises:
            ValueError: another collector of limiters is registered there.
        """
        from prometheus_client import REGISTRY

        if registry is None:
            registry = REGISTRY
        try:
            registry.register(self)
        except ValueError as error:
            raise ValueError(
                "the registry has metrics of these names; several limiters go into one "
                "collector: MemoryCollector({'ingest': limiter, 'serve': other})"
            ) from error
        self._registries.append(registry)
        return self

    def close(self) -> None:
        """Unregister it, and count no more events. Twice is once."""
        while self._registries:
            self._registries.pop().unregister(self)
        for source in self._sources:
            source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def describe(self) -> Iterator[Metric]:
        """Give all metrics that there may be, without values. Takes no reading of memory."""
        return self._families([])

    def collect(self) -> Iterator[Metric]:
        """Take a snapshot of each limiter, and give the metrics that there are."""
        snapshots = [(source, source.metered.snapshot()) for source in self._sources]
        return (family for family in self._families(snapshots) if family.samples)

    def _families(self, snapshots: list[tuple[_Source, Snapshot]]) -> Iterator[Metric]:
        from prometheus_client.metrics_core import Metric
        from prometheus_client.samples import Sample

        for group in GROUPS:
            items = [
                (source.labels(group.labels, values), item)
                for source, snapshot in snapshots
                for values, item in group.items(snapshot)
            ]
            for quantity in group.quantities:
                family = Metric(*_described(quantity))
                name = family.name + "_total" if family.type == "counter" else family.name
                value_of = quantity.value
                family.samples = [
                    Sample(name, labels, value)
                    for labels, item in items
                    if (value := value_of(item)) is not None
                ]
                yield family
        yield self._waits(source for source, _ in snapshots)

    def _waits(self, sources: Iterable[_Source]) -> Metric:
        from prometheus_client.metrics_core import Metric
        from prometheus_client.samples import Sample

        family = Metric("membound_grant_wait_seconds", WAIT_HELP, "histogram", "seconds")
        for source in sources:
            buckets, seconds = source.waits.read()
            family.samples += [
                Sample(f"{family.name}_bucket", source.labels(("le",), (end,)), count)
                for end, count in buckets
            ]
            labels = source.labels((), ())
            family.samples.append(Sample(f"{family.name}_count", labels, buckets[-1][1]))
            family.samples.append(Sample(f"{family.name}_sum", labels, seconds))
        return family


def exposition(registry: Collector, accept: str = "") -> tuple[str, bytes]:
    """Give what a scrape of ``registry`` is answered with: the content type, and the text.

    The same as prometheus-client gives, in a fraction of the time as far as it is about
    limiters: how their labels are written is known from the scrape before.

    Args:
        registry: a registry, or a `MemoryCollector` by itself.
        accept: the scraper's ``Accept`` header: OpenMetrics for who wants that, else the
            plain text format.

    Raises:
        ImportError: prometheus-client is not installed (the extra ``prometheus``).
    """
    from prometheus_client.exposition import choose_encoder

    encode, content_type = choose_encoder(accept)
    is_openmetrics = content_type.startswith("application/openmetrics-text")
    text: list[str] = []
    others: list[Metric] = []
    for family in registry.collect():
        if family.samples and isinstance(family.samples[0].labels, Labels):
            _write(family, text, is_openmetrics=is_openmetrics)
        else:
            others.append(family)
    # Ours come first: what ends a text of OpenMetrics is in that of the others.
    return content_type, "".join(text).encode() + encode(_Collected(others))


def _write(family: Metric, text: list[str], *, is_openmetrics: bool) -> None:
    """Append the lines of a family of ours."""
    name = family.name
    if is_openmetrics:
        text.append(f"# HELP {name} {family.documentation}\n# TYPE {name} {family.type}\n")
        if family.unit:
            text.append(f"# UNIT {name} {family.unit}\n")
    else:
        name += "_total" if family.type == "counter" else ""
        text.append(f"# HELP {name} {family.documentation}\n# TYPE {name} {family.type}\n")
    # An int is written as it is, exactly; repr() of a float is the shortest text that is it.
    for sample in family.samples:
        labels = cast("Labels", sample.labels)
        text.append(f"{sample.name}{labels.text} {sample.value + 0!r}\n")  # a bool + 0 is an int


class _Collected:
    """Metrics that were collected already, for an encoder."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


class Labels(dict[str, str]):
    """Labels of a series that know how they are written.

    Attributes:
        text: so, with braces.
    """

    __slots__ = ("text",)

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        super().__init__(pairs)
        written = ",".join(f'{name}="{_escaped(value)}"' for name, value in sorted(self.items()))
        self.text = f"{{{written}}}" if written else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


class _Source:
    """A limiter that is collected, with what is kept of it from scrape to scrape."""

    def __init__(self, metered_limiter: MeteredLimiter, wait_seconds: Sequence[float]) -> None:
        self.metered = metered_limiter
        self.waits = WaitHistogram(wait_seconds)
        self._hooked: Hooked = metered_limiter.limiter.add_hook(self.waits)
        self._labels: dict[tuple[str, ...], Labels] = {}

    def close(self) -> None:
        self._hooked.remove()
        self.metered.close()

    def labels(self, names: tuple[str, ...], values: tuple[str, ...]) -> Labels:
        """Give the labels of a series, the same object each time."""
        key = names + values
        found = self._labels.get(key)
        if found is None:
            found = self._labels[key] = Labels(self.metered.labels(names, values))
        return found


class WaitHistogram:
    """A hook that counts how long requests waited that were admitted then. In any thread.

    Args:
        ends: the upper ends of the buckets, in seconds.
    """

    def __init__(self, ends: Sequence[float]) -> None:
        self._ends = [float(end) for end in ends]
        self._counts = [0] * (len(ends) + 1)
        self._seconds = 0.0
        # A finaliser that runs meanwhile in this very thread may ask for a grant.
        self._lock = RLock()

    def __call__(self, event: Event) -> None:
        """Count an event, if it is one."""
        if isinstance(event, GrantWaited):
            with self._lock:
                self._counts[bisect_left(self._ends, event.waited_seconds)] += 1
                self._seconds += event.waited_seconds

    def read(self) -> tuple[list[tuple[str, int]], float]:
        """Give, for each end, how many waited no longer; and how long all have waited."""
        with self._lock:
            counts, seconds = [*accumulate(self._counts)], self._seconds
        ends = [*map(str, self._ends), "+Inf"]
        return [*zip(ends, counts, strict=True)], seconds


def _described(quantity: Quantity) -> tuple[str, str, str, str]:
    """Give name, help, type and unit of the metric of a quantity."""
    unit = UNITS.get(quantity.unit, "")
    name = "membound_" + quantity.name.replace(".", "_") + (f"_{unit}" if unit else "")
    return name, quantity.help, "counter" if quantity.kind == "counter" else "gauge", unit
