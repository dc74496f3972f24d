"""Errors: a tree to catch by branch; each says its numbers, carries them, and pickles."""

from __future__ import annotations

import pickle

import pytest

from membound_async import (
    BoundsError,
    FirmLimitExceedsAvailable,
    GrantDeadlock,
    GrantError,
    GrantReleased,
    GrantTimeout,
    GrantTooLarge,
    InsufficientMinimumMemory,
    InvalidComponentBounds,
    InvalidLimit,
    LimitError,
    LimitNotDetected,
    MemboundError,
    NoCurrentLimiter,
    QuotaExceeded,
    ReclaimReentry,
    UnknownComponent,
)

ERRORS: list[tuple[MemboundError, type[MemboundError], str]] = [
    (InvalidComponentBounds("a", "no sense"), BoundsError, "bounds of component 'a': no sense"),
    (
        InsufficientMinimumMemory(2048, 1024, 4096, "the tree"),
        BoundsError,
        "a minimum, or raise the limit to 4 096 bytes (4.0 KiB)\nthe tree",
    ),
    (
        FirmLimitExceedsAvailable(None, 2048, 1024, 1.5, 4096),
        BoundsError,
        "the firm limits together are 2 048 bytes",
    ),
    (
        FirmLimitExceedsAvailable("a.b", 2048, 1024, 1.5, 4096, "the tree"),
        BoundsError,
        "component 'a.b' has a firm limit of 2 048 bytes",
    ),
    (UnknownComponent("x", ("a", "b")), BoundsError, "no component 'x'; there is: 'a', 'b'"),
    (UnknownComponent("x"), BoundsError, "no component 'x'; there is: none"),
    (
        QuotaExceeded("a", 10, 5, "its firm limit"),
        GrantError,
        "component 'a' wanted 10 bytes, but may have 5 bytes now: its firm limit; use grant()",
    ),
    (
        GrantTooLarge("a", 10, 5, "its firm limit"),
        GrantError,
        "component 'a' wanted 10 bytes, but can have 5 bytes at the most (its firm limit)",
    ),
    (GrantTimeout("a", 10, 1.25), GrantError, "waited 1.250 s for 10 bytes in vain"),
    (
        GrantDeadlock("a", 10, tuple((name, 5) for name in "abcdefg")),
        GrantError,
        "'c': 5 bytes, 'd': 5 bytes, 'e': 5 bytes and 2 more); ask once for all",
    ),
    (GrantReleased("a", "grow"), GrantError, "grow: this grant of component 'a'"),
    (LimitNotDetected(("cgroup", "RAM")), LimitError, "looked at: cgroup, RAM"),
    (InvalidLimit("limit=0"), LimitError, "limit=0"),
    (
        ReclaimReentry("cache", "a", 10),
        MemboundError,
        "reclaimer 'cache' asked for 10 bytes for component 'a' while it was to free memory; have",
    ),
    (NoCurrentLimiter(2), LimitError, "2 limiters are entered"),
    (NoCurrentLimiter(0), LimitError, "MEMBOUND_REQUIRED is set"),
]


@pytest.mark.parametrize(
    ("error", "branch", "message"), ERRORS, ids=lambda value: type(value).__name__
)
def test_an_error(error: MemboundError, branch: type[MemboundError], message: str) -> None:
    assert isinstance(error, branch)
    assert isinstance(error, MemboundError)
    assert message in str(error)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(error, protocol))
        assert type(again) is type(error)
        assert (str(again), vars(again), again.args) == (str(error), vars(error), error.args)


def test_they_are_also_what_python_calls_them() -> None:
    assert issubclass(GrantTimeout, TimeoutError)
    assert issubclass(InvalidLimit, ValueError)
    assert issubclass(NoCurrentLimiter, LookupError)
    assert issubclass(UnknownComponent, LookupError)
