"""Find the component that leaks, in a service of five, while it runs.

    python find_the_leak.py
    python find_the_leak.py --leak sink --seconds 10
    python find_the_leak.py --leak none

Orders come in over the network and go through five components, joined by streams::

    reader --bodies--> decoder --orders--> cache --> enricher --> sink

All of them hold memory, some of them a lot, and what they hold goes up and down with the work.
One of them forgets to remove something small, once in sixteen requests. The memory of the
process does not tell which; the allocation groups of the components do: the program takes
samples of its own groups, and asks which component's *lowest* level rises steadily.

Then it measures what that costs: the same requests again and again, with counting switched on
and off by turns.

Exits with 0 if it named the right one (nobody, where nobody leaks), with 1 if not, and with 2
where allocations cannot be tracked.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import sys
import time
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, count
from statistics import median, quantiles
from typing import Any, NamedTuple

from membound_async import Component, MemoryLimiter, allocator, create_memory_stream
from membound_async.allocator import AllocationStatsSnapshot
from membound_async.sizes import human_size
from membound_async.streams import MemoryReceiveStream, MemorySendStream

KIB, MIB = 1024, 1024 * 1024

# --- who grows: samples in, an answer out


WINDOWS = 10
"""How many lowest levels are compared. What goes up and down must do so within one of them."""

STEADY = 0.7
"""How much more often than falling a level must be rising (Kendall's tau; chance: 1 in 500)."""

LEAST_BYTES = 32 * KIB
"""Growth of less than this, over all the time of watching, is not looked at."""


class Level(NamedTuple):
    """What was live at one moment, or the least that was in a window of time."""

    seconds: float
    nbytes: float


@dataclass(frozen=True)
class Trend:
    """How the memory of one component goes."""

    floors: tuple[Level, ...]
    """The lowest level of each window."""
    per_second: float
    """How fast that rises."""
    grows: bool
    """Whether it rises all the time, and not by chance."""


def trend_of(samples: Sequence[Level]) -> Trend:
    """Tell how memory goes.

    Caches that are refilled, batches and queues go up and down, but come back to the same
    lowest level; a leak lifts it. So the lowest levels are what is compared. They rise at
    the median of the slopes between any two of them (Theil and Sen), which a few odd ones do
    not change. They rise steadily if most of the pairs rise, in the first half of the time
    and in the second one: what has been filled once, or took one step, does not go on.
    """
    floors = floors_of(samples)
    if len(floors) < WINDOWS // 2:
        return Trend(floors, 0.0, grows=False)
    slope = slope_of(floors)
    middle = len(floors) // 2
    goes_on = all(slope_of(half) > slope / 4 for half in (floors[:middle], floors[middle:]))
    growth = slope * (floors[-1].seconds - floors[0].seconds)
    grows = growth >= LEAST_BYTES and goes_on and rising(floors) >= STEADY
    return Trend(floors, slope, grows)


def floors_of(samples: Sequence[Level]) -> tuple[Level, ...]:
    """Cut the time into windows of the same length, and give the lowest level of each."""
    if not samples:
        return ()
    begin, end = samples[0].seconds, samples[-1].seconds
    length = (end - begin) / WINDOWS or 1.0
    lowest: dict[int, float] = {}
    for sample in samples:
        window = min(int((sample.seconds - begin) / length), WINDOWS - 1)
        lowest[window] = min(lowest.get(window, sample.nbytes), sample.nbytes)
    return tuple(
        Level(begin + (window + 0.5) * length, nbytes) for window, nbytes in sorted(lowest.items())
    )


def slope_of(levels: Sequence[Level]) -> float:
    """Give the median of the slopes between any two levels, in bytes per second."""
    slopes = [
        (later.nbytes - earlier.nbytes) / (later.seconds - earlier.seconds)
        for earlier, later in combinations(levels, 2)
    ]
    return median(slopes) if slopes else 0.0


def rising(levels: Sequence[Level]) -> float:
    """Give how steadily levels rise: 1 if each is above all before it, about 0 by chance."""
    signs = [
        (later.nbytes > earlier.nbytes) - (later.nbytes < earlier.nbytes)
        for earlier, later in combinations(levels, 2)
    ]
    return sum(signs) / len(signs) if signs else 0.0


def growing(trends: Mapping[str, Trend]) -> list[str]:
    """Name the components that grow, the fastest first."""
    names = [name for name, trend in trends.items() if trend.grows]
    return sorted(names, key=lambda name: -trends[name].per_second)


# --- the service: five components


BATCH = 40
"""How many orders the sink writes at a time."""

CYCLE = 240
"""After so many requests, all components have done all that they ever do."""

LEAKY = 16
"""One request of so many takes the way that may leak."""

RECENT = 32
"""So many of these are remembered for good reason."""

TRAITS = ";".join(f"trait-{place}={'abcdefgh' * 4}{place}" for place in range(10))
LINES = b'{"article":"A-%d","price":%d,"currency":"EUR","note":"as agreed with the branch"}'
TAILS = [
    b'"customer":%d,"lines":[%b]}' % (place, b",".join([LINES % (place, place)] * (4 + place % 19)))
    for place in range(CYCLE)
]


@dataclass(slots=True)
class Order:
    """What the decoder makes of a request, and how much memory that takes, about."""

    number: int
    fields: dict[str, Any]
    nbytes: int


@dataclass
class Reader:
    """Takes requests from the network into buffers that it keeps."""

    part: Component
    leaks: bool

    async def run(self, network: asyncio.Queue[int | None], out: MemorySendStream[bytes]) -> None:
        """Pass on the body of each request."""
        async with self.part, out:
            buffers = [bytearray(512 * KIB) for _ in range(8)]
            broken_off: dict[int, bytes] = {}
            while (number := await network.get()) is not None:
                body = b'{"id":%d,' % number + TAILS[number % CYCLE]
                buffer = buffers[number % len(buffers)]
                buffer[: len(body)] = body
                if number % LEAKY == 0:
                    # Half an upload, kept in case that the client tries again; it never does.
                    broken_off[number] = bytes(buffer[: 3 * KIB // 2])
                    if not self.leaks:
                        broken_off.pop(number - RECENT * LEAKY, None)
                await out.send(body)


@dataclass
class Decoder:
    """Makes orders of bodies, which take ten times the memory."""

    part: Component
    leaks: bool

    async def run(self, bodies: MemoryReceiveStream[bytes], out: MemorySendStream[Order]) -> None:
        """Decode each body, and now and then the header of a client."""
        async with self.part, bodies, out:
            clients: OrderedDict[str, dict[str, str]] = OrderedDict()
            async for body in bodies:
                nbytes = 10 * len(body)
                async with self.part.grant(nbytes):
                    fields = json.loads(body)
                    number = fields["id"]
                    if number % LEAKY == 0:
                        # Parsed once for each client. But the header also has the request's
                        # number: no two are the same, and nothing is ever found.
                        header = f"{TRAITS};request={number}"
                        if header not in clients:
                            clients[header] = dict(
                                trait.split("=") for trait in header.split(";")[-9:]
                            )
                        if len(clients) > RECENT and not self.leaks:
                            clients.popitem(last=False)
                    await out.send(Order(number, fields, nbytes))


@dataclass
class Cache:
    """Keeps the latest answers, 16 MiB of them."""

    part: Component
    leaks: bool

    async def run(self, orders: MemoryReceiveStream[Order], out: MemorySendStream[Order]) -> None:
        """Answer each order, and remember the answer."""
        async with self.part, orders, out:
            answers: deque[bytes] = deque()
            used = 0
            waiting: dict[str, bytearray] = {}
            for number in count():  # as it was saved yesterday
                if used > 16 * MIB:
                    break
                answers.append(bytes(2 * KIB + number % 19 * 512))
                used += len(answers[-1])
            async for order in orders:
                key = f"order-{order.number}"
                waiting[key] = bytearray(3 * KIB // 2)  # for others who ask for it meanwhile
                try:
                    answers.append(await self.ask(order))
                except TimeoutError:
                    if not self.leaks:
                        del waiting[key]
                else:
                    used += len(answers[-1])
                    while used > 16 * MIB:
                        used -= len(answers.popleft())
                    del waiting[key]
                await out.send(order)

    async def ask(self, order: Order) -> bytes:
        """Ask another service, which does not always answer in time."""
        await asyncio.sleep(0)
        if order.number % LEAKY == 0:
            raise TimeoutError
        return bytes(2 * KIB + order.number % 19 * 512)


@dataclass
class Enricher:
    """Adds what a table of customers says, which is loaded anew again and again."""

    part: Component
    leaks: bool

    async def run(self, orders: MemoryReceiveStream[Order], out: MemorySendStream[Order]) -> None:
        """Join each order with its customer, and note the visit in the session."""
        async with self.part, orders, out:
            customers = await self.load()
            sessions: dict[int, list[str]] = {}
            async for order in orders:
                if order.number % CYCLE == 0:
                    async with self.part.grant(6 * MIB):
                        customers = await self.load()
                order.fields["customer"] = customers[order.fields["customer"]]
                session = order.number // LEAKY
                visit = f"order {order.number} of {order.fields['customer']['name']}"
                sessions.setdefault(session, []).append(visit)
                if not self.leaks:
                    sessions.pop(session - RECENT, None)
                await out.send(order)

    async def load(self) -> dict[int, dict[str, str]]:
        """Give a new table; the old one is in use until it is there."""
        table = {}
        for place in range(8000):
            table[place] = {"name": f"Customer {place}", "city": f"City {place % 97}"}
            if place % 500 == 0:
                await asyncio.sleep(0)
        return table


@dataclass
class Sink:
    """Writes compressed batches, and keeps the last ones for readers."""

    part: Component
    leaks: bool
    written: int = 0

    async def run(self, orders: MemoryReceiveStream[Order]) -> None:
        """Write all orders."""
        async with self.part, orders:
            segments: deque[bytearray] = deque((bytearray(512 * KIB) for _ in range(8)), maxlen=8)
            callbacks: list[Callable[[int], None]] = []
            async for batch in self.part.batches(orders, max_items=BATCH, max_seconds=0.02):
                segments.append(compress(batch))
                self.tell(batch, callbacks)
                del batch  # not to be kept while the next one is waited for

    def tell(self, batch: list[Order], callbacks: list[Callable[[int], None]]) -> None:
        """Tell those who wanted to know that their orders are written."""
        for order in batch:
            if order.number % LEAKY == 0:
                receipt = bytes(3 * KIB // 2)
                callbacks.append(partial(acknowledge, order.number, receipt))
        self.written += len(batch)
        for callback in callbacks:
            callback(self.written)
        if not self.leaks:
            callbacks.clear()


def compress(batch: list[Order]) -> bytearray:
    """Give a segment with the orders in it."""
    text = "\n".join(json.dumps(order.fields) for order in batch)
    segment = bytearray(512 * KIB)
    compressed = zlib.compress(text.encode(), 1)
    segment[: len(compressed)] = compressed
    return segment


def acknowledge(number: int, receipt: bytes, written: int) -> None:
    """Tell a client that its order is safe; again and again, who is never removed."""


class Service:
    """The five components, and the clients that send requests.

    Args:
        limiter: divides the memory among them.
        leak: which of them leaks; any other word for none.
    """

    def __init__(self, limiter: MemoryLimiter, leak: str) -> None:
        self._network: asyncio.Queue[int | None] = asyncio.Queue()
        self._numbers = count()
        self._parts = {
            name: limiter.component(name, minimum=minimum) for name, minimum in COMPONENTS.items()
        }
        self._leak = leak
        self._sent = 0
        self._sink: Sink | None = None

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Start all components."""
        parts = self._parts
        size = order_size
        bodies_in, bodies = create_memory_stream[bytes](component=parts["decoder"])
        orders_in, orders = create_memory_stream[Order](size, parts["cache"])
        answered_in, answered = create_memory_stream[Order](size, parts["enricher"])
        enriched_in, enriched = create_memory_stream[Order](size, parts["sink"])
        leaks = {name: name == self._leak for name in parts}
        self._sink = Sink(parts["sink"], leaks["sink"])
        for run in (
            Reader(parts["reader"], leaks["reader"]).run(self._network, bodies_in),
            Decoder(parts["decoder"], leaks["decoder"]).run(bodies, orders_in),
            Cache(parts["cache"], leaks["cache"]).run(orders, answered_in),
            Enricher(parts["enricher"], leaks["enricher"]).run(answered, enriched_in),
            self._sink.run(enriched),
        ):
            tasks.create_task(run)

    def send(self, requests: int) -> None:
        """Send so many requests."""
        self._sent += requests
        for _ in range(requests):
            self._network.put_nowait(next(self._numbers))

    async def send_for(self, seconds: float, rate: int) -> None:
        """Send so many requests a second, in bursts, for so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            burst = random.randint(1, 40)  # noqa: S311
            self.send(burst)
            await asyncio.sleep(burst / rate)

    async def settle(self) -> None:
        """Wait until all that was sent is written; fill up the last batch before."""
        assert self._sink is not None
        self.send(-self._sent % CYCLE)
        while self._sink.written < self._sent:  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    def stop(self) -> None:
        """Let all components end."""
        self._network.put_nowait(None)


def order_size(order: Order) -> int:
    """Give how much memory an order takes."""
    return order.nbytes


COMPONENTS: dict[str, int | str] = {
    "reader": "4MiB",
    "decoder": "2MiB",
    "cache": "17MiB",
    "enricher": 0,
    "sink": "5MiB",
}
"""And what each needs at least."""


# --- watching it


@dataclass(frozen=True)
class Watch:
    """What was seen of the groups."""

    seconds: float
    samples: Mapping[str, Sequence[Level]]
    last: Mapping[str, AllocationStatsSnapshot]
    delta: Mapping[str, AllocationStatsSnapshot]
    """What has happened from the first sample to the last one."""


async def watch(seconds: float) -> Watch:
    """Take samples of all groups, a few dozen a second, at no regular times.

    What the samples themselves take is charged to a group of its own.
    """
    own = allocator.registry.register("watch")
    with own.enter():
        begun = time.monotonic()
        first = last = allocator.registry.snapshot()
        samples: dict[str, list[Level]] = {path: [] for path in first if path != own.path}
        while (now := time.monotonic() - begun) < seconds:
            last = allocator.registry.snapshot()
            for path, levels in samples.items():
                levels.append(Level(now, last[path].live_bytes))
            show_live(f"watching, {now:.0f} of {seconds:.0f} s")
            await asyncio.sleep(random.uniform(0.01, 0.05))  # noqa: S311
        show_live("")
        delta = {path: last[path].delta(first[path]) for path in samples}
        return Watch(seconds, samples, last, delta)


@dataclass(frozen=True)
class Cost:
    """CPU seconds for the same requests, turn by turn."""

    on: Sequence[float]
    off: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        """How much more it was with counting on, in each round."""
        return [on / off for on, off in zip(self.on, self.off, strict=True)]

    @property
    def noise(self) -> list[float]:
        """The same of turns that are alike: each with counting off, and the one before."""
        return [later / earlier for earlier, later in zip(self.off, self.off[1:], strict=False)]


async def measure(service: Service, rounds: int) -> Cost:
    """Have the same requests served with counting on and off, in alternating turns."""
    turns: dict[bool, list[float]] = {True: [], False: []}
    for place in range(rounds):
        show_live(f"measuring, round {place + 1} of {rounds}")
        for counting in (True, False) if place % 2 else (False, True):
            (allocator.enable if counting else allocator.disable)()
            gc.collect()  # or one turn would pay for another
            begun = time.process_time()
            service.send(CYCLE)
            await service.settle()
            turns[counting].append(time.process_time() - begun)
    show_live("")
    allocator.enable()
    return Cost(turns[True], turns[False])


# --- saying it


def report(watched: Watch, trends: Mapping[str, Trend]) -> Iterator[str]:
    """Give a table of the components as lines, the one that grows fastest first."""
    cells = "{:<10}{:>10}{:>10}{:>13}{:>16}  {:<{}}{}"
    head = ("component", "live", "peak", "allocates", "growth", "lowest levels", WINDOWS, "")
    title = cells.format(*head)
    yield paint(title, "bold")
    yield "-" * 79
    tallest = max([LEAST_BYTES, *(span(trend.floors) for trend in trends.values())])
    for path in sorted(trends, key=lambda path: -trends[path].per_second):
        trend, last = trends[path], watched.last[path]
        allocates = watched.delta[path].allocated_bytes / watched.seconds
        line = cells.format(
            path,
            human_size(last.live_bytes),
            human_size(last.peak_live_bytes),
            f"{human_size(round(allocates))}/s",
            f"{per_minute(trend)}/min",
            sparks(trend.floors, tallest),
            WINDOWS,
            "  grows" if trend.grows else "",
        ).rstrip()
        yield paint(line, "red") if trend.grows else line


def per_minute(trend: Trend) -> str:
    """Say how fast it grows, in a unit a person can read."""
    nbytes = round(trend.per_second * 60)
    return f"{'+' if nbytes > 0 else ''}{human_size(nbytes)}"


def span(levels: Sequence[Level]) -> float:
    """Give the difference between the highest level and the lowest one."""
    heights = [level.nbytes for level in levels]
    return max(heights, default=0.0) - min(heights, default=0.0)


def sparks(levels: Sequence[Level], tallest: float) -> str:
    """Draw levels above the lowest of them, on a scale where the top is ``tallest``."""
    marks = "▁▂▃▄▅▆▇█"
    least = min((level.nbytes for level in levels), default=0.0)
    heights = [(level.nbytes - least) / tallest for level in levels]
    return "".join(marks[min(int(height * len(marks)), len(marks) - 1)] for height in heights)


def conclusion(trends: Mapping[str, Trend], seconds: float) -> Iterator[str]:
    """Name the one that grows."""
    names = growing(trends)
    if not names:
        yield f"Nobody grows: no component's lowest level rose steadily in {seconds:.0f} s."
        return
    first, *others = names
    yield f"{first} grows, by {per_minute(trends[first]).lstrip('+')} a minute."
    if others:
        yield f"So do, more slowly: {', '.join(others)}."
    yield "What to do next: docs/howto/find-the-leak.md"


def price(cost: Cost) -> Iterator[str]:
    """Say what counting costs."""
    on, off = (median(turns) / CYCLE * 1e6 for turns in (cost.on, cost.off))
    percent = (median(cost.ratios) - 1) * 100
    yield f"Counting costs {percent:+.1f} % CPU time ({on:.0f} µs a request, {off:.0f} µs without):"
    yield f"  on / off    {spread(cost.ratios)}"
    if cost.noise:
        yield f"  off / off   {spread(cost.noise)}, which is noise"


def spread(ratios: Sequence[float]) -> str:
    """Give the median of ratios, and where half of them are."""
    if len(ratios) < 2:
        return f"{ratios[0]:.3f} in one round"
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.3f}, the median of {len(ratios)} rounds; half of them {low:.3f} to {high:.3f}"


COLOURS = {"red": 31, "bold": 1}


def paint(text: str, colour: str) -> str:
    """Colour text for a terminal that wants it."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return text
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m"


def show_live(line: str) -> None:
    """Write over the present line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


# --- the command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="find_the_leak.py", description=str(__doc__).partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument(
        "--leak",
        choices=(*COMPONENTS, "none"),
        default="decoder",
        help="who leaks; default: decoder",
    )
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="how long it is watched; default: 30"
    )
    parser.add_argument(
        "--rate", type=int, default=400, help="requests per second meanwhile; default: 400"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=50,
        help="how often the cost is measured afterwards; 0 for not at all; default: 50",
    )
    arguments = parser.parse_args(argv)
    if arguments.seconds <= 0 or arguments.rate <= 0 or arguments.rounds < 0:
        parser.error("--seconds and --rate must be above 0, --rounds not below")
    return arguments


async def run(arguments: argparse.Namespace) -> int:
    """Run the service, watch it and say who grows; give the exit status."""
    async with MemoryLimiter("512MiB") as limiter, asyncio.TaskGroup() as tasks:
        service = Service(limiter, arguments.leak)
        service.start(tasks)
        service.send(3 * CYCLE)  # what is filled once is full then
        await service.settle()
        clients = tasks.create_task(service.send_for(arguments.seconds, arguments.rate))
        watched = await watch(arguments.seconds)
        await clients
        await service.settle()
        trends = {path: trend_of(samples) for path, samples in watched.samples.items()}
        print("\n".join(report(watched, trends)), end="\n\n")
        print("\n".join(conclusion(trends, arguments.seconds)), flush=True)
        if arguments.rounds:
            cost = await measure(service, arguments.rounds)
            print("", *price(cost), sep="\n")
        service.stop()
    if allocator.displaced():
        print("find_the_leak.py: another tool has discarded the hooks", file=sys.stderr)
        return 2
    leaks = [] if arguments.leak == "none" else [arguments.leak]
    return 0 if growing(trends)[:1] == leaks else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; give its exit status."""
    arguments = parse_arguments(argv)
    if not allocator.available:
        print(
            "find_the_leak.py: allocations cannot be tracked here, so nobody can be named:\n"
            f"  {allocator.unavailable_reason}\n"
            "Install a C compiler and Python's headers, then membound-async again with\n"
            "  MEMBOUND_EXTENSION=yes pip install --force-reinstall --no-deps membound-async\n"
            "which says what is missing.",
            file=sys.stderr,
        )
        return 2
    allocator.install()  # first of all: what is there before is not counted
    print(
        f"Five components, {arguments.rate} requests a second, watched for "
        f"{arguments.seconds:g} s (--leak {arguments.leak}):\n",
        flush=True,
    )
    try:
        return asyncio.run(run(arguments))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
