"""Runs programs from a range of seeds, and says what they got to.

    python -m tests.simulation --seeds 100000 --jobs 2 --backend asyncio

stops at the first program that fails, and prints it as a test that fails by itself, as small as
it could be made; with `--keep-going`, it goes on and says how many there were. The exit status
is 1 then. Ctrl-C ends it early, with the same summary.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

from .coverage import missing, report
from .invariants import Broken
from .programs import Program, code, program
from .runner import Machine, machine
from .shrink import shrink

__all__ = ["Failure", "campaign", "main", "run_seeds"]

AT_ONCE = 250
"""How many programs a job runs before it reports."""


@dataclass(frozen=True)
class Failure:
    """A seed whose program fails, why, and how a smaller one does."""

    seed: int
    backend: str
    reason: str
    program: Program
    shrunken_reason: str

    def __str__(self) -> str:
        return (
            f"seed {self.seed} on {self.backend}: {self.reason}\n\n"
            f"the same in less: {self.shrunken_reason}\n\n{code(self.program, self.backend)}"
        )


def run_seeds(
    seeds: range,
    backend: str,
    seen: Counter[str],
    *,
    keep_going: bool = False,
    most_runs: int = 2000,
) -> list[Failure]:
    """Run the programs of some seeds, up to the first failure unless told to go on.

    Args:
        seeds: which ones.
        backend: where.
        seen: counts what happened.
        keep_going: whether to go on after a failure.
        most_runs: how many programs to run to make a failure smaller.
    """
    logging.getLogger("membound_async").setLevel(logging.CRITICAL)
    failures: list[Failure] = []
    with machine(backend, seen) as one:
        for seed in seeds:
            reason = why(one, program(seed))
            if reason is not None:
                failures.append(_failure(one, seed, reason, most_runs))
                if not keep_going:
                    break
    return failures


def why(one: Machine, tried: Program) -> str | None:
    """Say why a program fails; None if it does not."""
    try:
        one.run(tried)
    except Broken as broken:
        return str(broken)
    return None


def _failure(one: Machine, seed: int, reason: str, most_runs: int) -> Failure:
    counted, one.seen = one.seen, Counter()
    reasons = {}

    def fails(tried: Program) -> bool:
        found = why(one, tried)
        if found is None or kind(found) != kind(reason):
            return False
        reasons[tried] = found
        return True

    smaller = shrink(program(seed), fails, most_runs=most_runs)
    one.seen = counted
    return Failure(seed, one.backend, reason, smaller, reasons.get(smaller, reason))


def kind(reason: str) -> str:
    """Say what a reason is about, without its numbers, so that another failure is not taken."""
    words = "".join(" " if letter.isdigit() else letter for letter in reason.partition("(")[0])
    return " ".join(words.split()[:6])


def _job(seeds: range, backend: str, keep_going: bool) -> tuple[Counter[str], list[Failure]]:
    seen: Counter[str] = Counter()
    failures = run_seeds(seeds, backend, seen, keep_going=keep_going)
    return seen, failures


def _go_on() -> None:
    """Leave Ctrl-C to the process that has the summary."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _noted(signum: int) -> Iterator[list[int]]:
    """Note a signal, whatever is being done, instead of acting on it."""
    noted: list[int] = []
    before = signal.signal(signum, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signum, before)


def _chunks(seeds: range) -> Iterator[range]:
    for start in range(seeds.start, seeds.stop, AT_ONCE):
        yield range(start, min(start + AT_ONCE, seeds.stop))


def campaign(
    seeds: range, backend: str, jobs: int, *, keep_going: bool
) -> tuple[Counter[str], list[Failure]]:
    """Run the programs of seeds in several processes, with a line of progress now and then.

    Ctrl-C ends it after what is running, a few hundred programs.
    """
    seen: Counter[str] = Counter()
    failures: list[Failure] = []
    started = told_at = time.monotonic()
    context = get_context("spawn")  # no process inherits what another one has imported
    with (
        _noted(signal.SIGINT) as interrupted,
        ProcessPoolExecutor(jobs, mp_context=context, initializer=_go_on) as pool,
    ):
        chunks = _chunks(seeds)
        job = partial(_job, backend=backend, keep_going=keep_going)
        running: set[Future[tuple[Counter[str], list[Failure]]]] = set()
        ended = False
        while True:
            while not ended and not interrupted and len(running) < 2 * jobs:
                chunk = next(chunks, None)
                if chunk is None:
                    ended = True
                else:
                    running.add(pool.submit(job, chunk))
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for each in done:
                counted, failed = each.result()
                seen += counted
                failures += failed
                for failure in failed:
                    print(f"\n{failure}\n", flush=True)
            if failures and not keep_going:
                ended = True
            now = time.monotonic()
            if now - told_at > 10:
                told_at = now
                count = seen["programs"]
                print(
                    f"{count:,} of {len(seeds):,} programs, {count / (now - started):.0f}/s, "
                    f"{len(failures)} failures",
                    file=sys.stderr,
                    flush=True,
                )
    seen["seconds"] = round(time.monotonic() - started)
    return seen, failures


def main(arguments: list[str] | None = None) -> int:
    """Run a campaign; give its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000, help="how many")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--backend", choices=("asyncio", "trio"), default="asyncio")
    parser.add_argument("--keep-going", action="store_true")
    parser.add_argument("--show", action="store_true", help="print the first program, and end")
    options = parser.parse_args(arguments)
    if options.show:
        print(code(program(options.first), options.backend))
        return 0
    seeds = range(options.first, options.first + options.seeds)
    seen, failures = campaign(seeds, options.backend, options.jobs, keep_going=options.keep_going)
    print(report(seen))
    if never := missing(seen):
        print("no program got to:", ", ".join(never))
    print(f"\n{len(failures)} failures in {seen['programs']:,} programs")
    return 1 if failures else 0
