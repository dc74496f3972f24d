"""What a scrape costs, and what a collection of OpenTelemetry does, for many components.

Milliseconds of CPU time, each the median of all rounds. The rounds of all candidates are
interleaved, so that a noisy machine spoils single rounds and not the comparison.

    python tests/benchmarks/metrics.py [--components 200] [--rounds 100]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from membound_async import MemoryLimiter, testing
from membound_async.metrics.opentelemetry import MemoryInstruments
from membound_async.metrics.prometheus import MemoryCollector, exposition

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def candidates(limiter: MemoryLimiter, components: int) -> dict[str, Callable[[], object]]:
    registry, others = CollectorRegistry(), CollectorRegistry()
    MemoryCollector(limiter, max_components=components).register(registry)
    MemoryCollector(limiter, max_components=20).register(others)
    encode_text, encode_openmetrics = choose_encoder("")[0], choose_encoder(OPENMETRICS)[0]
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    MemoryInstruments(limiter, meter_provider=provider, max_components=components)
    return {
        "limiter.statistics()": limiter.statistics,
        "exposition, text": lambda: exposition(registry),
        "exposition, OpenMetrics": lambda: exposition(registry, OPENMETRICS),
        "exposition, OpenMetrics, 20 components": lambda: exposition(others, OPENMETRICS),
        "prometheus-client, text": lambda: encode_text(registry),
        "prometheus-client, OpenMetrics": lambda: encode_openmetrics(registry),
        "OpenTelemetry SDK": reader.get_metrics_data,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--components", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()

    limiter = testing.limiter("1GiB")
    for number in range(options.components):
        limiter.component(f"part{number // 10}.worker{number}", minimum=1000)
    runs = candidates(limiter, options.components + 100)
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            started = time.process_time()
            run()
            took[name].append(time.process_time() - started)
    text = exposition(MemoryCollector(limiter, max_components=options.components + 100))[1]
    lines = [line for line in text.splitlines() if not line.startswith(b"#")]
    print(f"{options.components} components, {len(lines)} series, {len(text):,} bytes")
    for name, seconds in took.items():
        print(f"{name:40} {1000 * statistics.median(seconds):6.2f} ms")


if __name__ == "__main__":
    main()
