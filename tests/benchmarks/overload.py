"""The goodput of examples/upload_service.py while more is uploaded than it can take.

The service runs in a memory cgroup where one can be made, else with ``--limit``. First its
capacity is looked for: clients that come again when they were answered; 1, 2, 4, ... of them,
and how many get through the most. Each round then measures that peak again, and after it uploads
that come by chance (Poisson), whether earlier ones were answered or not, at 1, 2 and 4 times the
rate of the peak. Counted are answers of 200 a second, from when the first would be shed. Ratios
are taken within the round, to the best of it; the last table has their medians. ``busy`` is how
much of one processor the service took, ``clients`` how much they did.

    python -m tests.benchmarks.overload [--rounds 3] [--limit 256MiB] [--rows 40000]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import time
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, NamedTuple

import psutil

from membound_async.sizes import human_size, parse_size
from tests.cgroups import CgroupUnavailable, memory_cgroup
from tests.uploads import Answer, Service, at_rate, document, in_turn, serving, status

GOAL = 0.85
LOADS = (1, 2, 4)


class Measured(NamedTuple):
    """What was seen under one load."""

    name: str
    offered: float  #: requests a second
    good: float  #: answers of 200 a second
    shed: float  #: answers of 503 a second
    lost: int  #: requests without an answer
    busy: float  #: processors that the service took
    client_busy: float  #: processors that the clients took

    def show(self, best: float) -> str:
        return (
            f"{self.name:>12} {self.offered:9.1f} {self.good:8.2f} {self.shed:8.2f} {self.lost:5} "
            f"{self.busy:6.0%} {self.client_busy:8.0%} {self.good / best:8.0%}"
        )


HEADER = "        load offered/s    200/s    503/s  lost   busy  clients  of best"


@contextlib.contextmanager
def limited(limit: int, wait: float) -> Iterator[tuple[Service, str]]:
    """Run the service with so much memory; say by whose limit."""
    options = f"--wait={wait}"
    with contextlib.ExitStack() as stack:
        try:
            cgroup = stack.enter_context(memory_cgroup(limit))
        except CgroupUnavailable:
            yield stack.enter_context(serving(options, f"--limit={limit}")), "--limit"
        else:
            yield stack.enter_context(serving(options, inside=cgroup.command)), "memory cgroup"


class Bench:
    """Loads a service, and counts.

    Args:
        service: which.
        body: what is uploaded.
        seconds: how long is counted.
        warm_up: how long it is loaded before.
    """

    def __init__(self, service: Service, body: bytes, seconds: float, warm_up: float) -> None:
        self._port = service.port
        self._process = psutil.Process(service.process.pid)
        self._body = body
        self._seconds = seconds
        self._warm_up = warm_up

    async def closed(self, clients: int) -> Measured:
        """Load it with so many that come again when they were answered."""
        load = in_turn(self._port, self._body, clients, self._warm_up + self._seconds)
        return await self._count(f"{clients} in turn", load)

    async def open(self, peak: float, times: int) -> Measured:
        """Load it with so many times the rate of its peak."""
        load = at_rate(self._port, self._body, times * peak, self._warm_up + self._seconds)
        return await self._count(f"{times} x peak", load)

    async def _count(self, name: str, load: Coroutine[Any, Any, list[Answer]]) -> Measured:
        answering = asyncio.create_task(load)
        await asyncio.sleep(self._warm_up)
        begin, before, own_before = time.monotonic(), self._cpu_seconds(), time.process_time()
        await asyncio.sleep(self._seconds)
        end, after, own_after = time.monotonic(), self._cpu_seconds(), time.process_time()
        answers = await answering
        seconds = end - begin

        def rate(code: int) -> float:
            return sum(a.status == code and begin <= a.ended < end for a in answers) / seconds

        return Measured(
            name,
            offered=sum(begin <= answer.began < end for answer in answers) / seconds,
            good=rate(200),
            shed=rate(503),
            lost=sum(answer.status not in (200, 503) for answer in answers),
            busy=(after - before) / seconds,
            client_busy=(own_after - own_before) / seconds,
        )

    def _cpu_seconds(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system


async def peak_of(bench: Bench) -> int:
    """Give how many clients get through the most: more than twice as many get no more."""
    best = await bench.closed(1)
    print(f"looking for the peak\n{HEADER}\n{best.show(best.good)}", flush=True)
    clients = at_best = 1
    while clients < 4 * at_best:
        clients *= 2
        now = await bench.closed(clients)
        print(now.show(best.good), flush=True)
        if now.good > best.good:
            best, at_best = now, clients
    return at_best


async def measure(bench: Bench, rounds: int) -> list[list[Measured]]:
    """Give what was seen in each round."""
    clients = await peak_of(bench)
    taken: list[list[Measured]] = []
    for number in range(rounds):
        peak = await bench.closed(clients)
        loads = [peak] + [await bench.open(peak.good, times) for times in LOADS]
        taken.append(loads)
        print(f"round {number + 1}\n{HEADER}")
        print("\n".join(load.show(best_of(loads)) for load in loads), flush=True)
    return taken


def best_of(loads: Sequence[Measured]) -> float:
    return max(load.good for load in loads)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=parse_size, default="256MiB", help="(%(default)s)")
    parser.add_argument("--rows", type=int, default=40_000, help="of a document (%(default)s)")
    parser.add_argument("--seconds", type=float, default=8, help="counted each (%(default)s)")
    parser.add_argument("--wait", type=float, default=2, help="for memory (%(default)s)")
    options = parser.parse_args()
    body = document(options.rows)
    with limited(options.limit, options.wait) as (service, by):
        print(
            f"Python {sys.version.split()[0]}; documents of {human_size(len(body))}; "
            f"{human_size(options.limit)} by {by}; shed after {options.wait:g} s"
        )
        bench = Bench(service, body, options.seconds, options.wait + 1)
        rounds = asyncio.run(measure(bench, options.rounds))
        numbers = asyncio.run(status(service.port))
    print("median of the rounds")
    median = 0.0
    for loads in zip(*rounds, strict=True):
        ratios = [load.good / best_of(r) for load, r in zip(loads, rounds, strict=True)]
        median = statistics.median(ratios)
        print(f"{loads[0].name:>12} {median:8.0%} of best ({min(ratios):.0%} to {max(ratios):.0%})")
    print(f"peak of memory: {human_size(numbers['peak_measured_bytes'])}; goal: {GOAL:.0%} at 4 x")
    return 0 if median >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
