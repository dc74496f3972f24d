"""Numbers of bytes: "64MiB" to int and back, and how large an object is."""

from __future__ import annotations

import re
from decimal import Decimal

__all__ = ["format_size", "parse_size"]

MAX_BYTES = 2**53
"""Sizes above this are refused: no machine has them, and a float could not hold them."""

_UNITS = {
    "": 1,
    "b": 1,
    **{prefix + "b": 1000**power for power, prefix in enumerate("kmgtp", 1)},
    **{prefix + "ib": 1024**power for power, prefix in enumerate("kmgtp", 1)},
    **{prefix + "i": 1024**power for power, prefix in enumerate("kmgtp", 1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)


def parse_size(size: int | str, name: str = "size") -> int:
    """Give the number of bytes that ``size`` stands for.

    Args:
        size: an ``int``, or a ``str`` of a decimal number and a unit: ``"512"``,
            ``"64KiB"``, ``"1.5 GiB"`` (powers of 1024), ``"2MB"`` (powers of 1000).
        name: what the number is, for the error message.

    Raises:
        TypeError: neither an ``int`` nor a ``str``; a ``bool`` and a ``float`` are not sizes.
        ValueError: it does not parse, is negative, is no whole number of bytes, or is
            above 2**53.
    """
    if type(size) is int:
        value = size
    elif isinstance(size, str):
        match = _SIZE.fullmatch(size)
        factor = _UNITS.get(match[2].lower()) if match else None
        if match is None or factor is None:
            raise ValueError(
                f"{name}={size!r} is no size; write a number of bytes or, for example, "
                '"64KiB", "1.5GiB" or "2MB"'
            )
        exact = Decimal(match[1]) * factor
        value = int(exact)
        if value != exact:
            raise ValueError(f"{name}={size!r} is {exact} bytes, which is no whole number")
    elif isinstance(size, int) and not isinstance(size, bool):
        value = int(size)
    else:
        raise TypeError(
            f'{name} is a number of bytes (int) or a str such as "64KiB", not {size!r} '
            f"({type(size).__name__})"
        )
    if value < 0:
        raise ValueError(f"{name}={size!r} is negative; a size is 0 bytes or more")
    if value > MAX_BYTES:
        raise ValueError(f"{name}={size!r} is above 2**53 bytes, more than any machine has")
    return value


def format_size(nbytes: int) -> str:
    """Say a number of bytes so that it can be read and is still exact.

    ``"512 bytes"``, ``"1 536 bytes (1.50 KiB)"``; negative numbers too.
    """
    exact = f"{nbytes:,} bytes".replace(",", " ")
    human = human_size(nbytes)
    return exact if human.endswith(" B") else f"{exact} ({human})"


def human_size(nbytes: int) -> str:
    """Say a number of bytes in a unit a person can read: ``"64.0 MiB"``."""
    if abs(nbytes) < 1024:
        return f"{nbytes} B"
    value, unit = nbytes / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        if abs(value) >= 1023.95:
            value, unit = value / 1024, larger
    return f"{value:.1f} {unit}"
