"""What the allocation tracker costs, beside tracemalloc and memray. Goals at most:

    geomean 1.10 on a Python built without PGO, 1.15 with; asyncio 1.08; off 1.04;
    8 bytes of resident memory for each small block that is alive

In each round a workload gets a new process under each tool, and these work in turns, so that
whatever else the machine does hits them alike. A round's ratio is the median of those within
its turns, of CPU time; the figure is the median of the rounds. ``again`` is a second baseline:
what it differs from 1 is noise. memray writes to /dev/null, where it is cheapest.

    python tests/benchmarks/tracking.py [--rounds 5] [--python /usr/bin/python3.11]
        [--variants baseline,again,on,off] [--workloads json_loads,asyncio_pipeline]

There are also ``wide``, the tracker with 65535 groups, and ``root``, the tracker while no group
is entered; ``memray-python`` is memray with trace_python_allocators. The interpreter under test
needs membound_async, pyperformance and memray; what does not run is said and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

WORKLOADS = Path(__file__).with_name("tracking_workloads.py")
VARIANTS = "baseline,again,on,off,tracemalloc,memray,memray-python"
WARM_UP = 2
"""Turns that do not count: the interpreter specializes its code in them."""

Times = dict[str, list[list[float]]]
"""By variant, the seconds of each turn of each round."""


def start(python: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [python, WORKLOADS, *map(str, arguments)],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Give the rest of what it prints."""
    output, errors = process.communicate(timeout=600)
    if process.returncode:
        lines = errors.strip().splitlines() or [""]
        raise RuntimeError(f"exit status {process.returncode}: {lines[-1]}")
    return output


def ask(python: str, *arguments: object) -> Any:
    with start(python, *arguments) as process:
        return json.loads(finish(process))


def turn(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    print(file=process.stdin, flush=True)
    line = process.stdout.readline()
    if not line:
        finish(process)
        raise RuntimeError("ended too early")
    return float(line)


def rotated(variants: list[str], by: int) -> list[str]:
    by %= len(variants)
    return variants[by:] + variants[:by]


def measure(python: str, workload: str, variants: list[str], turns: int) -> dict[str, list[float]]:
    """Give the seconds of each turn of one round."""
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    with ExitStack() as stack:
        workers = {
            variant: stack.enter_context(start(python, variant, workload)) for variant in variants
        }
        for number in range(WARM_UP + turns):
            for variant in rotated(variants, number):
                try:
                    seconds[variant].append(turn(workers[variant]))
                except (RuntimeError, OSError) as failure:
                    raise RuntimeError(f"{variant}: {failure}") from failure
        for worker in workers.values():
            finish(worker)
    return {variant: taken[WARM_UP:] for variant, taken in seconds.items()}


def ratio(times: Times, variant: str, baseline: str) -> float:
    return statistics.median(
        statistics.median(tool / bare for tool, bare in zip(*turns, strict=True))
        for turns in zip(times[variant], times[baseline], strict=True)
    )


def row(name: str, cells: Iterable[str]) -> str:
    return f"| {' | '.join((name, *cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=7, help="in each round")
    parser.add_argument("--python", default=sys.executable, help="the interpreter under test")
    parser.add_argument("--variants", default=VARIANTS, help="the first is the baseline")
    parser.add_argument("--workloads", help="default: all")
    parser.add_argument("--blocks", type=int, default=4_000_000, help="alive for the memory; or 0")
    parser.add_argument("--json", type=Path, help="a file for all that was measured")
    options = parser.parse_args()
    python = options.python
    known = ask(python)
    missing: list[str] = []

    def miss(name: str, reason: object) -> None:
        missing.append(f"NOT MEASURED: {name}: {reason}")
        print(f"\n*** {missing[-1]}\n", file=sys.stderr)

    variants = []
    for variant in options.variants.split(","):
        try:
            ask(python, variant, "memory", 1000)
            variants.append(variant)
        except RuntimeError as failure:
            miss(variant, failure)
    baseline, *tools = variants
    workloads = (
        options.workloads.split(",") if options.workloads else known["sync"] + known["async"]
    )
    times: dict[str, Times] = {name: {each: [] for each in variants} for name in workloads}
    memory: dict[str, list[int]] = {variant: [] for variant in variants}
    load = os.getloadavg()[0]
    for number in range(options.rounds):
        for name in list(times):
            print(f"round {number + 1}: {name}", file=sys.stderr)
            try:
                taken = measure(python, name, variants, options.turns)
            except RuntimeError as failure:
                miss(name, failure)
                del times[name]
                continue
            for variant, seconds in taken.items():
                times[name][variant].append(seconds)
        if options.blocks:
            for variant in variants:
                memory[variant].append(ask(python, variant, "memory", options.blocks))

    ratios = {
        name: {tool: ratio(each, tool, baseline) for tool in tools} for name, each in times.items()
    }
    version = subprocess.check_output([python, "-VV"], text=True).strip()
    print(f"{version}; {options.rounds} rounds; load {load:.1f} to {os.getloadavg()[0]:.1f}\n")
    print(row("workload", (f"{baseline}, ms", *tools)))
    print(row("---", ["---:"] * len(variants)))
    for name, each in times.items():
        milliseconds = statistics.median(map(statistics.median, each[baseline])) * 1e3
        cells = (f"{ratios[name][tool]:.3f}" for tool in tools)
        print(row(name, (f"{milliseconds:.1f}", *cells)))
    for title, subset in (
        (f"geomean of {len(times)}", list(times)),
        ("geomean of asyncio", [name for name in times if name in known["async"]]),
    ):
        if subset:
            means = (
                statistics.geometric_mean(ratios[name][tool] for name in subset) for tool in tools
            )
            print(row(title, ("", *(f"{mean:.3f}" for mean in means))))
    if options.blocks:
        bare = statistics.median(memory[baseline])
        each_block = ((statistics.median(memory[tool]) - bare) / options.blocks for tool in tools)
        print(row("RSS, bytes per small block", ("", *(f"{each:.2f}" for each in each_block))))
    for line in missing:
        print(f"\n**{line}**")
    if options.json:
        everything = {"python": version, "times": times, "ratios": ratios, "memory": memory}
        options.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
