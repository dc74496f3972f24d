"""The workloads of tracking.py, and the process that runs one of them under one tool.

    python tests/benchmarks/tracking_workloads.py                     what there is, as JSON
    python tests/benchmarks/tracking_workloads.py TOOL WORKLOAD       see `serve`
    python tests/benchmarks/tracking_workloads.py TOOL memory BLOCKS  see `resident`

The tool runs from before the workload's imports and data, as in a program that has it on from
its start. The work itself runs in an allocation group; in an asyncio workload each of the
tasks that last has its own. Working once takes some 30 to 200 ms.

Workloads that take a module ``bm`` are those of pyperformance, from its installed package.
"""

from __future__ import annotations

import asyncio
import csv
import gc
import importlib
import importlib.util
import io
import json
import logging
import operator
import pickle
import random
import re
import socket
import sys
import time
import tracemalloc
import types
import zlib
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil

from membound_async import allocator  # in the baseline too: what is imported burdens the collector

Scope = Callable[[str], AbstractContextManager[Any]]
"""Gives what is entered to be in the group of that name; without a tracker, nothing."""

Work = Callable[[], object]
AsyncWork = Callable[[Scope], Coroutine[Any, Any, object]]

SYNC: dict[str, Callable[[], Work]] = {}
ASYNC: dict[str, Callable[[], AsyncWork]] = {}


def workload(prepare: Callable[[], Work]) -> Callable[[], Work]:
    SYNC[prepare.__name__] = prepare
    return prepare


def async_workload(work: AsyncWork) -> AsyncWork:
    ASYNC[work.__name__] = lambda: work
    return work


# -- pyperformance's


def borrow(name: str) -> Any:
    package = importlib.util.find_spec("pyperformance")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("pyperformance is not installed")
    folder = Path(package.origin).parent / "data-files" / "benchmarks" / f"bm_{name}"
    spec = importlib.util.spec_from_file_location(f"bm_{name}", folder / "run_benchmark.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def log_to_memory(bm: Any) -> object:
    stream = io.StringIO()
    logger = logging.getLogger("benchmark")
    logger.propagate = False
    logger.handlers[:] = [logging.StreamHandler(stream)]
    return bm.bench_formatted_output(500, logger, stream)


PROTOCOL = types.SimpleNamespace(protocol=pickle.HIGHEST_PROTOCOL)

BORROWED: dict[str, tuple[str, Callable[[Any], object]]] = {
    "richards": ("richards", lambda bm: bm.Richards().run(1)),
    "deltablue": ("deltablue", lambda bm: bm.delta_blue(1000)),
    "raytrace": ("raytrace", lambda bm: bm.bench_raytrace(1, 40, 40, None)),
    "nbody": ("nbody", lambda bm: bm.bench_nbody(1, "sun", 10_000)),
    "float": ("float", lambda bm: bm.benchmark(20_000)),
    "go": ("go", lambda bm: bm.versus_cpu()),
    "deepcopy": ("deepcopy", lambda bm: bm.benchmark(150)),
    "generators": ("generators", lambda bm: sum(bm.tree(range(20_000)))),
    "coroutines": ("coroutines", lambda bm: bm.bench_coroutines(1)),
    "comprehensions": ("comprehensions", lambda bm: bm.bench_comprehensions(2000)),
    "pickle_dumps": ("pickle", lambda bm: bm.bench_pickle(100, pickle, PROTOCOL)),
    "pickle_loads": ("pickle", lambda bm: bm.bench_unpickle(100, pickle, PROTOCOL)),
    "regex_v8": ("regex_v8", lambda bm: bm.bench_regex_v8(1)),
    "logging": ("logging", log_to_memory),
    "sqlite": ("sqlite_synth", lambda bm: bm.bench_sqlite(15_000)),
}


def prepare_borrowed(module: str, run: Callable[[Any], object]) -> Work:
    bm = borrow(module)
    return lambda: run(bm)


for _name, (_module, _run) in BORROWED.items():
    SYNC[_name] = lambda module=_module, run=_run: prepare_borrowed(module, run)  # type: ignore[misc]


def trees(kind: str, task_groups: bool) -> AsyncWork:
    """Four of pyperformance's trees at a time, each in its group, of four levels instead of six."""
    bm = borrow("async_tree")
    bm.NUM_RECURSE_LEVELS = 4
    bm.IO_SLEEP_TIME = 0.001

    async def work(scope: Scope) -> None:
        async def grow(number: int) -> None:
            with scope(f"tree{number}"):
                await bm.BENCHMARKS[kind](use_task_groups=task_groups).run()

        await asyncio.gather(*[grow(number) for number in range(4)])

    return work


ASYNC["async_tree"] = lambda: trees("none", task_groups=False)
ASYNC["async_tree_memoization_tg"] = lambda: trees("memoization", task_groups=True)
ASYNC["async_tree_cpu_io_mixed"] = lambda: trees("cpu_io_mixed", task_groups=False)


# -- asyncio

RECORDS = [
    {
        "id": number,
        "name": f"customer {number}",
        "amounts": [number * factor / 7 for factor in range(10)],
        "address": {"street": f"{number} Main Street", "city": "Springfield", "zip": "12345"},
        "tags": ["new", "paid", f"batch-{number % 10}"],
    }
    for number in range(1000)
]
LINES = [json.dumps(record) for record in RECORDS]


@async_workload
async def asyncio_pipeline(scope: Scope) -> None:
    """A producer, two decoders and a sink, joined by queues; a message is a line of JSON."""
    lines: asyncio.Queue[str | None] = asyncio.Queue(50)
    records: asyncio.Queue[Any] = asyncio.Queue(50)

    async def produce() -> None:
        with scope("producer"):
            for line in LINES * 2:
                await lines.put(line + "\n")
            for _ in range(2):
                await lines.put(None)

    async def decode(number: int) -> None:
        with scope(f"decoder{number}"):
            while (line := await lines.get()) is not None:
                await records.put(json.loads(line))
            await records.put(None)

    async def store() -> None:
        with scope("sink"):
            totals: dict[str, float] = {}
            ended = 0
            while ended < 2:
                record = await records.get()
                if record is None:
                    ended += 1
                else:
                    totals[record["name"]] = sum(record["amounts"])

    await asyncio.gather(produce(), decode(0), decode(1), store())


@async_workload
async def asyncio_bytes(scope: Scope) -> None:
    """Chunks of 4 to 64 KB from one task to the next, which cuts them into lines."""
    chunks: asyncio.Queue[bytes | None] = asyncio.Queue(8)
    blob = b"%060d some text\n" % 7 * 1000

    async def produce() -> None:
        with scope("producer"):
            for number in range(500):
                await chunks.put(blob[: 4096 + number % 16 * 4096])
            await chunks.put(None)

    async def consume() -> None:
        with scope("consumer"):
            while (chunk := await chunks.get()) is not None:
                chunk.replace(b"text", b"bytes").splitlines()

    await asyncio.gather(produce(), consume())


@async_workload
async def asyncio_spawn(scope: Scope) -> None:
    """Four tasks, each of which starts and gathers many short ones."""

    async def child(number: int) -> list[int]:
        await asyncio.sleep(0)
        return [number]

    async def parent(number: int) -> None:
        with scope(f"parent{number}"):
            for _ in range(30):
                await asyncio.gather(*[child(each) for each in range(20)])

    await asyncio.gather(*[parent(number) for number in range(4)])


@async_workload
async def asyncio_switch(scope: Scope) -> None:
    """Ten tasks that do nothing but let each other run."""

    async def spin(number: int) -> None:
        with scope(f"task{number}"):
            for _ in range(1500):
                await asyncio.sleep(0)

    await asyncio.gather(*[spin(number) for number in range(10)])


@async_workload
async def asyncio_streams(scope: Scope) -> None:
    """Two connections over which short lines go to and fro."""

    async def talk(number: int) -> None:
        near, far = socket.socketpair()
        ask, answer = (
            await asyncio.open_connection(sock=near),
            await asyncio.open_connection(sock=far),
        )

        async def serve() -> None:
            with scope(f"server{number}"):
                while line := await answer[0].readline():
                    answer[1].write(line.upper())
                    await answer[1].drain()

        serving = asyncio.create_task(serve())
        with scope(f"client{number}"):
            for each in range(300):
                ask[1].write(b"line number %d\n" % each)
                await ask[0].readline()
        ask[1].close()
        await serving
        answer[1].close()

    await asyncio.gather(talk(0), talk(1))


@async_workload
async def asyncio_timers(scope: Scope) -> None:
    """Tasks that wait for an event with a timeout, as servers do for a request."""

    async def serve(number: int) -> None:
        with scope(f"server{number}"):
            for _ in range(300):
                event = asyncio.Event()
                loop.call_soon(event.set)
                async with asyncio.timeout(60):
                    await event.wait()

    loop = asyncio.get_running_loop()
    await asyncio.gather(*[serve(number) for number in range(8)])


# -- the rest


@workload
def json_loads() -> Work:
    text = json.dumps(RECORDS)
    return lambda: [json.loads(text) for _ in range(5)]


@workload
def json_dumps() -> Work:
    return lambda: [json.dumps(RECORDS) for _ in range(5)]


@workload
def bytes_payloads() -> Work:
    """Buffers of 1 to 64 KB, made, cut and joined."""
    source = random.Random(0).randbytes(65536)

    def work() -> None:
        for number in range(18_000):
            payload = source[: 1024 << number % 7]
            head, body = payload[:128], payload[128:]
            b"".join((head, body))
            bytearray(body)

    return work


@workload
def string_operations() -> Work:
    def work() -> None:
        for line in LINES * 4:
            words = line.replace(":", " ").split()
            ",".join(word.strip('"{}[],').lower() for word in words)
            f"{line[:20]!r} has {len(words)} words, the first is {words[0]:>20}"

    return work


@workload
def regex() -> Work:
    number = re.compile(r"-?\d+(?:\.\d+)?")
    word = re.compile(r"(?P<key>\w+)\W+(?P<value>\w+)")

    def work() -> None:
        for line in LINES:
            number.findall(line)
            [match.groupdict() for match in word.finditer(line)]

    return work


@workload
def build_dicts() -> Work:
    def work() -> None:
        for _ in range(20):
            table = {f"k{number}": number for number in range(5000)}
            {value: key for key, value in table.items()}

    return work


@workload
def build_lists() -> Work:
    def work() -> None:
        for _ in range(10):
            rows = [[number, number + 1, number + 2] for number in range(10_000)]
            [tuple(row) for row in rows]
            [item for row in rows for item in row]

    return work


@workload
def int_loop() -> Work:
    """One allocation and one free an operation, and nothing else: the worst case."""

    def work() -> None:
        value = 1000
        while value < 1_000_000:
            value += 1

    return work


class Node:
    def __init__(self, value: int, child: Node | None) -> None:
        self.value = value
        self.child = child


@workload
def objects() -> Work:
    def work() -> None:
        for _ in range(20):
            chain = None
            for number in range(5000):
                chain = Node(number, chain)
            while chain is not None:
                chain = chain.child

    return work


@workload
def sort() -> Work:
    source = random.Random(0)
    numbers = [source.random() for _ in range(30_000)]
    rows = [(f"name {number}", value) for number, value in enumerate(numbers[:10_000])]

    def work() -> None:
        for _ in range(3):
            sorted(numbers)
            sorted(numbers, key=operator.neg)
            sorted(rows, key=operator.itemgetter(1, 0))

    return work


@workload
def csv_rows() -> Work:
    rows = [[number, f"name {number}", number / 7, "a, b", None] for number in range(8000)]

    def work() -> None:
        stream = io.StringIO()
        csv.writer(stream).writerows(rows)
        stream.seek(0)
        list(csv.DictReader(stream, "abcde"))

    return work


@workload
def compress() -> Work:
    chunks = [line.encode() for line in LINES]

    def work() -> None:
        for _ in range(2):
            for packed in [zlib.compress(chunk, 1) for chunk in chunks]:
                zlib.decompress(packed)

    return work


# -- the tools


@contextmanager
def nothing() -> Iterator[Scope]:
    yield nullcontext


@contextmanager
def tracker(enabled: bool = True, groups: Any = 126, enter: bool = True) -> Iterator[Scope]:
    allocator.install(groups)
    if not enabled:
        allocator.disable()
    yield (lambda name: allocator.registry.register(name).enter()) if enter else nullcontext
    # The figures of a tracker that has counted nothing would be too good.
    counted = allocator.registry.snapshot()
    del counted["root"]
    assert any(each.allocated_objects for each in counted.values()) == (enabled and enter)
    assert not allocator.displaced()


@contextmanager
def traced() -> Iterator[Scope]:
    tracemalloc.start(1)
    yield nullcontext
    assert tracemalloc.get_traced_memory()[0]


@contextmanager
def memray(python_allocators: bool) -> Iterator[Scope]:
    tool = importlib.import_module("memray")
    to = tool.FileDestination("/dev/null", overwrite=True)
    with tool.Tracker(destination=to, trace_python_allocators=python_allocators):
        yield nullcontext


TOOLS: dict[str, Callable[[], AbstractContextManager[Scope]]] = {
    "baseline": nothing,
    "again": nothing,
    "on": tracker,
    "wide": lambda: tracker(groups=65535),
    "root": lambda: tracker(enter=False),
    "off": lambda: tracker(enabled=False),
    "tracemalloc": traced,
    "memray": lambda: memray(python_allocators=False),
    "memray-python": lambda: memray(python_allocators=True),
}


def serve(work: Work) -> None:
    """Work once for each line that comes in; answer with the seconds of CPU time."""
    for _ in sys.stdin:
        gc.collect()
        started = time.process_time()
        work()
        print(time.process_time() - started, flush=True)


def serve_workload(name: str, scope: Scope) -> None:
    if name in SYNC:
        with scope("work"):
            serve(SYNC[name]())
    else:
        work = ASYNC[name]()
        with asyncio.Runner() as runner:
            serve(lambda: runner.run(work(scope)))


def resident(scope: Scope, blocks: int) -> int:
    """Give the resident bytes of a process with so many blocks of 24 to 64 bytes alive."""
    with scope("work"):
        # A tuple, an integer, a float and bytes; nothing of them is shared.
        alive = [(n, n / 3, b"%d" % n) for n in range(1000, 1000 + blocks // 4)]
        gc.collect()
        size = psutil.Process().memory_info().rss
    assert alive
    return size


def main() -> None:
    if len(sys.argv) == 1:
        print(json.dumps({"tools": list(TOOLS), "sync": list(SYNC), "async": list(ASYNC)}))
        return
    tool, name, *blocks = sys.argv[1:]
    with TOOLS[tool]() as scope:
        if name == "memory":
            print(resident(scope, int(blocks[0])))
        else:
            serve_workload(name, scope)


if __name__ == "__main__":
    main()
