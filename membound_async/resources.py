"""Limits of several resources at once: bytes, and whatever else can be counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Self

from .exceptions import InvalidLimit
from .settings import limit_size
from .sizes import MAX_BYTES
from .stocks import BYTES

__all__ = ["ResourceLimits"]


class ResourceLimits(Mapping[str, int]):
    """How much there is of each resource; immutable.

    ::

        ResourceLimits("64MiB", messages=1000, fds=64)

    Args:
        nbytes: how many bytes, or ``"64MiB"``; None to leave bytes alone.
        others: how much of other resources, by any name.

    Raises:
        InvalidLimit: a limit makes no sense.
    """

    def __init__(self, nbytes: int | str | None = None, /, **others: int) -> None:
        self._limits: dict[str, int] = {}
        if nbytes is not None:
            self._limits[BYTES] = limit_size(nbytes, BYTES)
        for resource, limit in others.items():
            if resource == BYTES or type(limit) is not int or not 0 <= limit <= MAX_BYTES:
                raise InvalidLimit(
                    f"{resource}={limit!r} makes no sense: a limit is a whole number, 0 or more, "
                    "and that of bytes comes first, without a name"
                )
            self._limits[resource] = limit

    @classmethod
    def bus1(cls) -> Self:
        """Give the limits that bus1 has for one user.

        16 MiB in flight, 16384 slices (messages), 65536 handles, and 4096 file descriptors.
        """
        return cls("16MiB", slices=16384, handles=65536, fds=4096)

    @property
    def others(self) -> dict[str, int]:
        """All but bytes."""
        return {name: limit for name, limit in self._limits.items() if name != BYTES}

    def __getitem__(self, resource: str) -> int:
        return self._limits[resource]

    def __iter__(self) -> Iterator[str]:
        return iter(self._limits)

    def __len__(self) -> int:
        return len(self._limits)

    def __repr__(self) -> str:
        return f"ResourceLimits({', '.join(f'{k}={v}' for k, v in self._limits.items())})"
