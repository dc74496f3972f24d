"""Settings: validated, frozen, each with its environment variable."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from membound_async import InvalidLimit, LimiterSettings, PressurePolicy

KNOBS = {
    knob.name
    for cls in (LimiterSettings, PressurePolicy)
    for knob in dataclasses.fields(cls)
    if knob.name != "pressure"
}


def test_every_knob_has_a_variable() -> None:
    values = {
        "OVERCOMMIT": "2.5",
        "STALL_AFTER_SECONDS": "3",
        "LOG_INTERVAL_SECONDS": "7",
        "BYPASS_LIMIT_BYTES": "64KiB",
        "YIELD_AFTER_SECONDS": "0.5",
        "STALE_AFTER_SECONDS": "7",
        "RECLAIM": "no",
        "DEBUG": "on",
        "THRESHOLD": "0.5",
        "MIN_DELAY_SECONDS": "0",
        "MAX_DELAY_SECONDS": "1",
        "MIN_INTERVAL_SECONDS": "0.02",
        "MAX_INTERVAL_SECONDS": "0.5",
    }
    assert {name.lower() for name in values} == KNOBS
    assert LimiterSettings.from_environment(
        {f"MEMBOUND_{name}": value for name, value in values.items()}
    ) == LimiterSettings(
        overcommit=2.5,
        stall_after_seconds=3,
        log_interval_seconds=7,
        bypass_limit_bytes=65536,
        yield_after_seconds=0.5,
        stale_after_seconds=7,
        reclaim=False,
        debug=True,
        pressure=PressurePolicy(
            threshold=0.5,
            min_delay_seconds=0,
            max_delay_seconds=1,
            min_interval_seconds=0.02,
            max_interval_seconds=0.5,
        ),
    )
    assert LimiterSettings.from_environment({"MEMBOUND_DEBUG": " "}) == LimiterSettings()
    assert not LimiterSettings.from_environment({"MEMBOUND_DEBUG": "off"}).debug


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MEMBOUND_OVERCOMMIT", "lots"),
        ("MEMBOUND_OVERCOMMIT", "0.5"),
        ("MEMBOUND_DEBUG", "maybe"),
        ("MEMBOUND_RECLAIM", "maybe"),
        ("MEMBOUND_BYPASS_LIMIT_BYTES", "-1"),
        ("MEMBOUND_THRESHOLD", "1.5"),
        ("MEMBOUND_STALL_AFTER_SECONDS", "inf"),
    ],
)
def test_a_bad_variable_is_named(variable: str, value: str) -> None:
    with pytest.raises(InvalidLimit) as caught:
        LimiterSettings.from_environment({variable: value})
    assert variable in str(caught.value)
    assert value in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overcommit": 0.9}, "overcommit=0.9"),
        ({"overcommit": math.nan}, "overcommit=nan"),
        ({"overcommit": True}, "overcommit=True"),
        ({"stall_after_seconds": 0}, "stall_after_seconds=0"),
        ({"yield_after_seconds": "1"}, "yield_after_seconds='1'"),
        ({"stale_after_seconds": -1}, "stale_after_seconds=-1"),
        ({"bypass_limit_bytes": -1}, "bypass_limit_bytes=-1"),
        ({"bypass_limit_bytes": 1.5}, "bypass_limit_bytes"),
        ({"debug": 1}, "debug=1"),
        ({"reclaim": None}, "reclaim=None"),
        ({"pressure": None}, "pressure=None"),
    ],
)
def test_a_knob_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidLimit, match=message):
        LimiterSettings(**options)


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LimiterSettings().debug = True  # type: ignore[misc]
    assert LimiterSettings(bypass_limit_bytes="1KiB").bypass_limit_bytes == 1024  # type: ignore[arg-type]
