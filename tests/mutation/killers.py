"""The checks that defects and mutants must not survive."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import pytest

import membound_async
from tests.mutation.bench import ROOT, Killer

__all__ = ["by_chance", "simulated", "unit_tests", "with_tests"]

PREPARED = (
    "anyio._backends._asyncio",
    "anyio._backends._trio",
    "tests.fuzz_bus1",
    "tests.fuzz_deadlocks",
    "tests.fuzz_ledger",
    "tests.fuzz_resources",
    "tests.simulation.campaign",
)
OPTIONS: tuple[str, ...] = (
    *("-x", "-s", "-p", "no:cacheprovider", "-p", "no:terminal"),
    *("-o", "addopts=--import-mode=importlib", "-c", str(ROOT / "pyproject.toml")),
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),
)


# --- random operations and programs


def by_chance(first: int, scale: int) -> list[Killer]:
    """Give those from that seed, so many, the fastest first."""
    return [
        Killer("tests.fuzz_ledger", partial(_fuzz_ledger, first, scale), 10 + 4 * scale),
        Killer("tests.fuzz_bus1", partial(_fuzz_bus1, first, 4 * scale), 10 + 4 * scale),
        simulated(range(40 * first, 40 * (first + scale)), 10 + 10 * scale),
        Killer("tests.fuzz_resources", partial(_fuzz_resources, first, scale), 10 + 8 * scale),
        Killer("tests.fuzz_deadlocks", partial(_fuzz_deadlocks, first, 15 * scale), 10 + 4 * scale),
    ]


def simulated(seeds: range, cpu_seconds: float) -> Killer:
    """Give the simulated programs of these seeds."""
    return Killer("simulator", partial(_simulate, seeds), cpu_seconds)


def _simulate(seeds: range) -> str | None:
    seen: Counter[str] = Counter()
    campaign = importlib.import_module("tests.simulation.campaign")
    failures: list[Any] = campaign.run_seeds(seeds, "asyncio", seen, most_runs=0)
    if failures:
        return f"in {seen['programs'] + 1} programs: {failures[0].reason}"
    return None


def _fuzz_ledger(first: int, count: int) -> str | None:
    fuzz = importlib.import_module("tests.fuzz_ledger")
    factory = fuzz.load_factory(fuzz.DEFAULT_CORE)
    for seed in range(first, first + count):
        _, done, difference = fuzz.random_episode(seed, 300, factory)
        if difference is not None:
            return f"seed {seed}, step {len(done)}: {difference}"
    return None


def _fuzz_resources(first: int, count: int) -> str | None:
    fuzz = importlib.import_module("tests.fuzz_resources")
    for seed in range(first, first + count):
        _, done, broken = fuzz.episode(seed, 120, fuzz.Watched, Counter())
        if broken is not None:
            return f"seed {seed}, step {len(done)}: {broken}"
    return None


def _fuzz_bus1(first: int, count: int) -> None:
    fuzz = importlib.import_module("tests.fuzz_bus1")
    for seed in range(first, first + count):
        fuzz.run(seed)


def _fuzz_deadlocks(first: int, count: int) -> None:
    importlib.import_module("tests.fuzz_deadlocks").run_programs(first, range(count))


# --- unit tests


class _FirstFailure:
    """Notes which test fails first."""

    name: str | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.name is None:
            self.name = report.nodeid


class _Instead:
    """Does something else with the tests that were collected than to run them."""

    def __init__(self, do: Callable[[Sequence[pytest.Item]], int]) -> None:
        self._do = do
        self.status = 1

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.status = self._do(session.items)
        return True


def _arguments(files: Iterable[str]) -> list[str]:
    return [*OPTIONS, *(str(ROOT / "tests" / f"test_{name}.py") for name in files)]


def with_tests(files: Iterable[str], do: Callable[[Sequence[pytest.Item]], int]) -> int:
    """Import all that is needed, collect the tests of these files, and go on with them."""
    for name in PREPARED:
        importlib.import_module(name)
    instead = _Instead(do)
    pytest.main(_arguments(files), plugins=[instead])
    return instead.status


def unit_tests(items: Sequence[pytest.Item], files: Sequence[str], *, but: str = "") -> Killer:
    """Give the tests of these files, without those that have one of these words in the name."""
    chosen = [
        item
        for name in files
        for item in items
        if item.path.stem == f"test_{name}" and not any(word in item.name for word in but.split())
    ]
    return Killer("unit tests", partial(_run_tests, chosen, files), 60)


def _run_tests(items: Sequence[pytest.Item], files: Sequence[str]) -> str | None:
    first = _FirstFailure()
    if sys.modules.get("membound_async") is not membound_async:  # all is imported anew
        pytest.main(_arguments(files), plugins=[first])
        return first.name
    items[0].config.pluginmanager.register(first)
    for item, following in zip(items, [*items[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if first.name is not None:
            break
    return first.name
