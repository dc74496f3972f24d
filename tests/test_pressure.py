"""The pressure curve, by numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from membound_async import InvalidLimit, PressurePolicy

L = 1_000_000


@pytest.mark.parametrize(
    ("measured", "level", "delay_ms"),
    [
        (0, 0, 0),
        (950_000, 0, 0),
        (960_000, 0.2, 5.8),
        (975_000, 0.5, 13),
        (990_000, 0.8, 20.2),
        (1_000_000, 1, 25),
        (9_000_000, 1, 25),
    ],
)
def test_level_and_delay(measured: int, level: float, delay_ms: float) -> None:
    policy = PressurePolicy()
    assert policy.level(measured, L) == pytest.approx(level)
    assert policy.delay_seconds(measured, L) * 1000 == pytest.approx(delay_ms)


@pytest.mark.parametrize(
    ("measured", "interval"),
    [(0, 0.25), (475_000, 0.25), (712_500, 0.125), (940_000, 0.01), (2_000_000, 0.01)],
)
def test_the_interval_shrinks_towards_the_threshold(measured: int, interval: float) -> None:
    assert PressurePolicy().interval_seconds(measured, L) == pytest.approx(interval)


def test_a_quarter_of_the_headroom_may_go_unsampled() -> None:
    policy = PressurePolicy()
    assert policy.unsampled_bytes(600_000, L) == 100_000
    assert policy.unsampled_bytes(L + 1, L) == 0


@given(st.integers(0, 2 * L), st.integers(0, 2 * L))
def test_more_memory_never_means_less_delay(one: int, other: int) -> None:
    policy = PressurePolicy()
    low, high = sorted((one, other))
    assert policy.delay_seconds(low, L) <= policy.delay_seconds(high, L)
    assert policy.interval_seconds(low, L) >= policy.interval_seconds(high, L)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0}, "threshold=0"),
        ({"threshold": 1}, "threshold=1"),
        ({"threshold": math.nan}, "threshold=nan"),
        ({"threshold": "high"}, "threshold='high'"),
        ({"threshold": True}, "threshold=True"),
        ({"min_delay_seconds": -1}, "min_delay_seconds=-1"),
        ({"min_delay_seconds": 1}, "min_delay_seconds=1, max_delay_seconds=0.025"),
        ({"max_delay_seconds": math.inf}, "max_delay_seconds=inf"),
        ({"min_interval_seconds": 0}, "min_interval_seconds=0"),
        ({"max_interval_seconds": math.nan}, "max_interval_seconds=nan"),
    ],
)
def test_a_curve_that_makes_no_sense_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidLimit, match=message):
        PressurePolicy(**options)
