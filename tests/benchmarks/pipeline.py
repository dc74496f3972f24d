"""The throughput of examples/log_pipeline.py under ``membound run`` with ample memory, beside bare.

Both read the same flights with a sink that takes everything at once. The runs are
interleaved; the ratio is the median of the ratios within the rounds, of CPU seconds and of
wall-clock time.

    python tests/benchmarks/pipeline.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
PIPELINE = [
    str(EXAMPLES / "log_pipeline.py"),
    "--rate=0",
    str(EXAMPLES / "data" / "flights.csv.gz"),
]
WAYS = {
    "bare": [sys.executable, *PIPELINE],
    "bounded": [
        *(sys.executable, "-m", "membound_async.cli", "run", "--limit=8GiB", "--report=none"),
        *PIPELINE,
    ],
}


def run(command: list[str]) -> tuple[float, float]:
    """Give the wall-clock and the CPU seconds of a run."""
    started, before = time.perf_counter(), os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    cpu = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    return time.perf_counter() - started, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for _ in range(options.rounds):
        for name, command in WAYS.items():
            taken[name].append(run(command))
    print(f"Python {sys.version.split()[0]}, {options.rounds} rounds")
    for index, clock in enumerate(("wall-clock", "CPU")):
        for name, runs in taken.items():
            print(f"{name:8} {statistics.median(each[index] for each in runs):6.2f} s {clock}")
        ratio = statistics.median(
            bare[index] / bounded[index]
            for bare, bounded in zip(taken["bare"], taken["bounded"], strict=True)
        )
        print(f"throughput bounded: {ratio:.3f} x bare ({clock})")


main()
