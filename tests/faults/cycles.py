"""Load and rest, over and over: does a limiter stay as fast as it was in the first cycle?

    python tests/faults/cycles.py [--cycles 50] [--limit 256MiB] [--report json]

A load decodes JSON documents that inflate ninefold, each under a grant of that size, holds
every one for a moment, as a writer would, and releases it, but for a record here and there
that a cache remembers. Then comes a rest, with nothing granted. What the cache remembers is
little, but keeps most of the heap of a load from going back to the system. A limiter that
took that heap for somebody else's memory would let fewer and fewer documents in at a time;
since they are held, that is what the throughput of a load measures.

Exits with 0 if the last fifth of the cycles kept at least 80 % of the first one's
throughput, by their median: what else the machine does shows in single cycles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import anyio

from membound_async import Component, MemoryLimiter
from membound_async.sizes import human_size, parse_size

INFLATION = 9
DOCUMENTS = 24
"""How many documents a load has; more than fit into the limit at a time."""

REMEMBERED_EACH = 1000
"""One record of so many is remembered; an arena of the allocator takes some thousands."""

HOLD_SECONDS = 0.5
REST_SECONDS = 0.05
GOAL = 0.8


def make_document(nbytes: int) -> bytes:
    """Give JSON of about that size that takes nine times as much memory when decoded."""
    row = b'{"id":%d,"price":%d.5}'
    length = len(row % (10_000, 10_000)) + 1
    rows = [row % (i, i) for i in range(10_000, 10_000 + nbytes // length)]
    return b"[" + b",".join(rows) + b"]"


async def load(component: Component, document: bytes, cache: deque[Any]) -> None:
    """Decode and hold the documents, as many at a time as there is memory for."""

    async def work() -> None:
        async with component.grant(len(document) * INFLATION):
            decoded = json.loads(document)
            await anyio.sleep(HOLD_SECONDS)
            cache.extend(decoded[::REMEMBERED_EACH])
            del decoded

    async with anyio.create_task_group() as tasks:
        for _ in range(DOCUMENTS):
            tasks.start_soon(work)


async def run(cycles: int, limit: int, document_bytes: int, as_json: bool) -> dict[str, Any]:
    """Run the cycles; give what was measured."""
    document = make_document(document_bytes)
    throughputs: list[float] = []
    cache: deque[Any] = deque(maxlen=DOCUMENTS * document.count(b"{") // REMEMBERED_EACH)
    async with MemoryLimiter(limit) as limiter, limiter.component("decode") as decode:
        before = now = limiter.statistics()
        for cycle in range(cycles):
            begun = time.perf_counter()
            await load(decode, document, cache)
            seconds = time.perf_counter() - begun
            throughputs.append(DOCUMENTS * len(document) / seconds)
            await anyio.sleep(REST_SECONDS)
            now = limiter.statistics()
            if not as_json:
                print(
                    f"cycle {cycle + 1:3}: {human_size(round(throughputs[-1])):>9}/s, "
                    f"{throughputs[-1] / throughputs[0]:4.0%} of the first; "
                    f"measured {human_size(now.measured_bytes):>9}, "
                    f"drift {human_size(now.drift_bytes):>9}, free {human_size(now.free_bytes):>9}",
                    flush=True,
                )
        last = throughputs[-(cycles // 5 or 1) :]
        return {
            "cycles": cycles,
            "documents": decode.statistics().admissions,
            "first_bytes_per_second": round(throughputs[0]),
            "median_ratio": statistics.median(throughputs) / throughputs[0],
            "slowest_ratio": min(throughputs) / throughputs[0],
            "last_ratio": statistics.median(last) / throughputs[0],
            "granted_bytes": sum(c.granted_bytes for c in now.components),
            "free_bytes_before": before.free_bytes,
            "free_bytes": now.free_bytes,
            "drift_bytes": now.drift_bytes,
            "peak_measured_bytes": now.peak_measured_bytes,
            "limit_bytes": now.limit_bytes,
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; give its exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--limit", type=parse_size, default="256MiB")
    parser.add_argument("--document", type=parse_size, default="1MiB", help="JSON in each")
    parser.add_argument("--report", choices=("text", "json"), default="text")
    arguments = parser.parse_args(argv)
    as_json = arguments.report == "json"
    outcome = anyio.run(run, arguments.cycles, arguments.limit, arguments.document, as_json)
    if as_json:
        print(json.dumps(outcome))
    else:
        print(
            f"{arguments.cycles} cycles; of the first one's throughput the last ones kept "
            f"{outcome['last_ratio']:.0%} (goal: {GOAL:.0%}), the median "
            f"{outcome['median_ratio']:.0%}, the slowest {outcome['slowest_ratio']:.0%}; "
            f"peak {human_size(outcome['peak_measured_bytes'])} of "
            f"{human_size(outcome['limit_bytes'])}"
        )
    return 0 if outcome["last_ratio"] >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
