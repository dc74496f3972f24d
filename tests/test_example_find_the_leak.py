"""The example that finds a leak: what it makes of samples, and that it names the right one."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from membound_async import allocator
from tests.tracking import need_tracker

EXAMPLE = Path(__file__).parent.parent / "examples" / "find_the_leak.py"
KIB, MIB = 1024, 1024 * 1024
SECONDS = 30.0


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_find_the_leak", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


leak = example()


def trend(memory: Callable[[float], float], seconds: float = SECONDS, per_second: int = 20):
    times = (place / per_second for place in range(int(seconds * per_second) + 1))
    return leak.trend_of([leak.Level(time, memory(time)) for time in times])


def noise(amplitude: float) -> Callable[[float], float]:
    chance = random.Random(3)
    return lambda _: amplitude * chance.random()


def sawtooth(period: float, amplitude: float) -> Callable[[float], float]:
    return lambda time: amplitude * max(0.0, time % period / period - 0.1)  # empty for a moment


def step(at: float, nbytes: float) -> Callable[[float], float]:
    return lambda time: nbytes if time >= at else 0.0


def line(per_second: float) -> Callable[[float], float]:
    return lambda time: per_second * time


def total(*parts: Callable[[float], float]) -> Callable[[float], float]:
    return lambda time: sum(part(time) for part in parts)


# --- the decision


@pytest.mark.parametrize(
    "memory",
    [
        pytest.param(line(0), id="flat"),
        pytest.param(noise(20 * MIB), id="noisy"),
        pytest.param(sawtooth(1.7, 50 * MIB), id="sawtooth"),
        pytest.param(total(sawtooth(2.3, 9 * MIB), noise(MIB)), id="noisy sawtooth"),
        pytest.param(step(4.0, 10 * MIB), id="early step"),
        pytest.param(step(15.0, 10 * MIB), id="step in the middle"),
        pytest.param(step(27.0, 10 * MIB), id="late step"),
        pytest.param(lambda time: min(time, 12.0) * MIB, id="cache that is full in the end"),
        pytest.param(lambda time: 10 * MIB * (1 - 0.5**time), id="warm-up"),
        pytest.param(line(-MIB), id="falling"),
        pytest.param(line(KIB / 2), id="too little to tell"),
    ],
)
def test_does_not_grow(memory):
    assert not trend(memory).grows


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param(line(0), id="nothing else"),
        pytest.param(lambda _: 500 * MIB, id="much that stays"),
        pytest.param(sawtooth(1.3, 50 * MIB), id="under a sawtooth"),
        pytest.param(noise(2 * MIB), id="under noise"),
        pytest.param(lambda time: MIB * (10.0 < time < 14.0), id="with an odd window"),
    ],
)
def test_grows_slowly(rest):
    slow = 2 * MIB / 60
    found = trend(total(line(slow), rest))
    assert found.grows
    assert found.per_second == pytest.approx(slow, rel=0.25)


def test_chance_is_rarely_taken_for_growth():
    chance = random.Random(7)
    assert sum(trend(lambda _: chance.gauss(0, MIB)).grows for _ in range(200)) <= 2


def test_growth_in_steps_is_growth():
    assert trend(lambda time: time // 4 * MIB).grows


def test_a_few_samples_say_nothing():
    assert leak.trend_of([]) == leak.Trend((), 0.0, grows=False)
    for number in range(1, leak.WINDOWS // 2):
        found = leak.trend_of([leak.Level(time, time * MIB) for time in range(number)])
        assert not found.grows
    assert not leak.trend_of([leak.Level(1.0, MIB)] * 50).grows


def test_compares_the_lowest_level_of_each_window():
    samples = [leak.Level(float(time), [9, 5, 7][time % 3]) for time in range(31)]
    floors = leak.floors_of(samples)
    assert [level.nbytes for level in floors] == [5] * leak.WINDOWS
    assert [level.seconds for level in floors] == [1.5 + 3 * place for place in range(10)]


def test_samples_may_be_missing():
    samples = [leak.Level(time / 20, time * KIB) for time in range(601) if not 200 < time < 300]
    found = leak.trend_of(samples)
    assert len(found.floors) == 9
    assert found.grows
    assert found.per_second == pytest.approx(20 * KIB)


def test_names_the_fastest_first():
    trends = {
        "reader": leak.Trend((), 9e9, grows=False),
        "decoder": leak.Trend((), 2.0, grows=True),
        "cache": leak.Trend((), 3.0, grows=True),
    }
    assert leak.growing(trends) == ["cache", "decoder"]
    said = "\n".join(leak.conclusion(trends, 30.0))
    assert said.startswith("cache grows, by 180 B a minute.\nSo do, more slowly: decoder.\n")
    assert leak.growing({"reader": trends["reader"]}) == []


def test_the_price_is_the_median_of_the_rounds():
    cost = leak.Cost(on=[1.1, 5.5, 1.1], off=[1.0, 1.0, 1.0])
    first, ratio, same = leak.price(cost)
    assert first.startswith("Counting costs +10.0 % CPU time")
    assert ratio.split()[3] == "1.100,"
    assert same.split()[3] == "1.000,"
    assert len([*leak.price(leak.Cost([1.1], [1.0]))]) == 2


# --- the program


def run(*arguments: str) -> tuple[int, str]:
    need_tracker()
    ended = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLE, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.stderr == ""
    return ended.returncode, ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decoder", "sink"])
def test_names_the_one_that_leaks(name):
    status, printed = run(f"--leak={name}", "--seconds=8", "--rounds=0")
    assert status == 0, printed
    assert f"\n{name} grows, by " in printed
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.slow
def test_names_nobody_where_nobody_leaks():
    status, printed = run("--leak=none", "--seconds=6", "--rounds=2")
    assert status == 0, printed
    assert "\nNobody grows: " in printed
    assert "\nCounting costs " in printed
    rows = printed.split("-\n", 1)[1].split("\n\n")[0].splitlines()
    assert {row.split()[0] for row in rows} == {*leak.COMPONENTS, "root"}


def test_says_what_to_do_where_nothing_can_be_tracked(monkeypatch, capsys):
    monkeypatch.setattr(allocator, "available", False)
    monkeypatch.setattr(allocator, "unavailable_reason", "it was a Monday")
    assert leak.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "it was a Monday" in said.err
    assert "MEMBOUND_EXTENSION=yes" in said.err


@pytest.mark.parametrize("argument", ["--leak=me", "--seconds=0", "--rate=-1", "--rounds=-1"])
def test_refuses_arguments_that_make_no_sense(argument, capsys):
    with pytest.raises(SystemExit):
        leak.main([argument])
    assert "usage:" in capsys.readouterr().err
