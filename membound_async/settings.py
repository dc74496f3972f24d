"""Every knob of a limiter in one frozen, validated object; each has an environment variable."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from fractions import Fraction
from functools import partial
from typing import Any, Literal, NoReturn, Self

from .exceptions import InvalidLimit
from .pressure import PressurePolicy
from .rules import Polynomial, Rule, Share
from .sizes import parse_size

__all__ = ["LimiterSettings"]

Mode = Literal["strict", "permissive", "disabled"]
"""What to do with bounds that do not fit: raise, log and go on, or not look."""

_FALSE = frozenset({"0", "false", "no", "off"})
_TRUE = frozenset({"1", "true", "yes", "on"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LimiterSettings:
    """What a limiter does besides its limit; the defaults suit most programs.

    ``MEMBOUND_<NAME>`` sets the field of that name where the program does not:
    ``MEMBOUND_STALL_AFTER_SECONDS=30``; the fields of ``pressure`` likewise
    (``MEMBOUND_THRESHOLD=0.9``).

    Attributes:
        overcommit: how many times the available memory the firm limits together may
            promise; at least 1.
        stall_after_seconds: waiters, and nothing granted or given back for that long, are
            reported; a barrier that was not served for that long is lifted.
        bypass_limit_bytes: how many bytes of the pool may be granted past a waiter before
            nobody else is served; None for the effective limit.
        yield_after_seconds: uncontended grants let other tasks run once in that time.
        stale_after_seconds: a probe that has failed for that long counts as full pressure.
        log_interval_seconds: what happens again within that time, in the same component, is
            logged once; see ``membound_async.eventlog``.
        reclaim: whether garbage is collected and free heap returned to the system when memory
            is short; reclaimers of the program are asked in any case.
        debug: releasing a grant twice raises ``GrantReleased`` instead of being ignored.
        pressure: thresholds, delays and sampling intervals.

    Raises:
        InvalidLimit: a value makes no sense; names it and says what would.
    """

    overcommit: float = 1.0
    stall_after_seconds: float = 10.0
    bypass_limit_bytes: int | None = None
    yield_after_seconds: float = 0.001
    stale_after_seconds: float = 2.0
    log_interval_seconds: float = 10.0
    reclaim: bool = True
    debug: bool = False
    pressure: PressurePolicy = field(default_factory=PressurePolicy)

    def __post_init__(self) -> None:
        _check_at_least("overcommit", self.overcommit, 1.0)
        for name in (
            "stall_after_seconds",
            "yield_after_seconds",
            "stale_after_seconds",
            "log_interval_seconds",
        ):
            _check_at_least(name, getattr(self, name), 1e-6)
        if self.bypass_limit_bytes is not None:
            bypass = limit_size(self.bypass_limit_bytes, "bypass_limit_bytes")
            object.__setattr__(self, "bypass_limit_bytes", bypass)
        for name in ("reclaim", "debug"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidLimit(f"{name}={getattr(self, name)!r} must be True or False")
        if not isinstance(self.pressure, PressurePolicy):
            raise InvalidLimit(f"pressure={self.pressure!r} must be a PressurePolicy")

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Give the defaults, with what the environment variables change.

        Raises:
            InvalidLimit: a variable does not parse or is out of range; names it.
        """
        parsers: dict[str, Callable[[str], Any]] = {
            "reclaim": partial(parse_switch, name="reclaim"),
            "debug": partial(parse_switch, name="debug"),
            "bypass_limit_bytes": parse_size,
        }
        curve, others = _from(environ, PressurePolicy, {}), _from(environ, cls, parsers)
        try:
            return cls(pressure=PressurePolicy(**curve), **others)
        except InvalidLimit as error:
            variables = ", ".join(f"MEMBOUND_{name.upper()}" for name in {**curve, **others})
            raise InvalidLimit(f"{error} (set by {variables})") from None


def _from(
    environ: Mapping[str, str], settings: type[Any], parsers: Mapping[str, Callable[[str], Any]]
) -> dict[str, Any]:
    """Read the variables that name fields of ``settings``."""
    values: dict[str, Any] = {}
    for knob in fields(settings):
        variable = f"MEMBOUND_{knob.name.upper()}"
        text = environ.get(variable, "").strip()
        if not text or knob.name == "pressure":
            continue
        try:
            values[knob.name] = parsers.get(knob.name, float)(text)
        except ValueError as error:
            raise InvalidLimit(f"{variable}={text!r}: {error}") from None
    return values


# --- the arguments of a limiter, each of which has a variable too


def given(value: Any, variable: str, default: Any) -> Any:
    """Give the argument, else what ``MEMBOUND_<variable>`` says, else the default."""
    if value is not None:
        return value
    return os.environ.get(f"MEMBOUND_{variable}", "").strip() or default


def parse_mode(value: Any) -> Mode:
    """Give the mode that the value names, or raise ``InvalidLimit``."""
    if value not in ("strict", "permissive", "disabled"):
        _refuse("mode", value, 'use "strict", "permissive" or "disabled"')
    mode: Mode = value
    return mode


def parse_switch(value: Any, name: str) -> bool:
    """Give the bool that the value is or names, or raise ``InvalidLimit``."""
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word not in _TRUE | _FALSE:
        _refuse(name, value, "use 1 or 0, true or false, yes or no, on or off")
    return word in _TRUE


def parse_slop_factor(value: Any) -> float:
    """Give the slop factor that the value is or names, or raise ``InvalidLimit``."""
    slop = math.nan
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with suppress(ValueError):
            slop = float(value)
    if not 0 <= slop < 1:
        _refuse("slop_factor", value, "use a number of at least 0 and below 1, for example 0.15")
    return slop


def parse_share(value: Any) -> Rule:
    """Give the rule that the value is or names: a share, exactly; or raise ``InvalidLimit``."""
    if isinstance(value, Polynomial) or str(value).strip().lower() == "polynomial":
        return Polynomial()
    try:
        share = Fraction(str(value) if isinstance(value, float) else value)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        share = Fraction(0)
    if isinstance(value, bool) or not 0 < share <= 1:
        _refuse("share", value, "use a part above 0 and at most 1, for example Fraction(1, 2)")
    return Share(share)


def limit_size(value: int | str, name: str) -> int:
    """Give a number of bytes, or raise ``InvalidLimit``."""
    try:
        return parse_size(value, name)
    except (TypeError, ValueError) as error:
        raise InvalidLimit(str(error)) from None


def _refuse(name: str, value: object, remedy: str) -> NoReturn:
    raise InvalidLimit(f"{name}={value!r} (or MEMBOUND_{name.upper()}) makes no sense: {remedy}")


def _check_at_least(name: str, value: object, least: float) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value < least
    ):
        raise InvalidLimit(f"{name}={value!r} must be a finite number of at least {least:g}")
