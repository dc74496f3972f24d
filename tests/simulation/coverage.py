"""What programs got to: each kind of step with each of its outcomes, and what the limiter did."""

from __future__ import annotations

from collections import Counter

__all__ = ["EXPECTED", "missing", "report"]

EXPECTED = (
    *(f"Grant {how}" for how in ("with", "await", "nowait", "current")),
    *(f"Grant {how} GrantTooLarge" for how in ("with", "await", "nowait", "current")),
    *(f"Grant {how} {error}" for how in ("with", "current") for error in ("GrantTimeout",)),
    "Grant with GrantDeadlock",
    "Grant nowait QuotaExceeded",
    "Grant cancelled",
    *(
        f"Change {what}"
        for what in (
            "grow",
            "grow_nowait",
            "shrink",
            "resize",
            "split",
            "transfer",
            "transfer_nowait",
            "share",
            "deliver",
            "release",
            "enter_again",
            "drop",
            "hand_on",
        )
    ),
    "Change grow GrantDeadlock",
    "Change grow GrantReleased",
    "Change grow GrantTooLarge",
    "Change grow RuntimeError",
    "Change grow ValueError",
    "Change grow_nowait QuotaExceeded",
    "Change transfer GrantDeadlock",
    "Change transfer GrantReleased",
    "Change transfer GrantTooLarge",
    "Change transfer ValueError",
    "Change transfer_nowait QuotaExceeded",
    "Change cancelled",
    "Take done",
    "Enter done",
    "Enter GrantTooLarge",
    "Enter FirmLimitExceedsAvailable",
    "Enter InsufficientMinimumMemory",
    "verify FirmLimitExceedsAvailable",
    "verify InsufficientMinimumMemory",
    "Enter cancelled",
    "Within over",
    "Raise Planned",
    "Cancel now",
    "Cancel woken",
    "cancelled when it was woken",
    "Put inbox",
    "Put stream",
    "Put given",
    "Put GrantTooLarge",
    "Put QuotaExceeded",
    "Put BrokenResourceError",
    "Put ClosedResourceError",
    "Put cancelled",
    "Put nowait QuotaExceeded",
    "Put nowait WouldBlock",
    "Receive inbox",
    "Receive stream",
    "Receive EndOfStream",
    "Receive ClosedResourceError",
    "Receive nowait WouldBlock",
    "Receive cancelled",
    *(f"{what} {how}" for what in ("Read", "Drain") for how in ("bounded", "batches")),
    *(f"Read {how} GrantTooLarge" for how in ("bounded", "batches")),
    "Read cancelled",
    "Close inbox",
    "Close send",
    "Close receive",
    "Resize done",
    *(f"Look {what}" for what in ("statistics", "held_grants", "waiting_requests", "component")),
    *(f"reclaimer {what}" for what in ("helps", "lies", "raises", "hangs", "asks", "releases")),
    *(
        f"event {what}"
        for what in (
            "DriftRose",
            "GrantDelayed",
            "GrantLeaked",
            "GrantRefused",
            "GrantWaited",
            "LimitChanged",
            "Reclaimed",
            "StallEnded",
            "Stalled",
        )
    ),
    "admissions",
    "admissions of a barrier",
    "admissions of one that is alone",
    "admissions out of turn",
    "order suspended",
    "deadlocks",
    "waits",
    "tasks cancelled",
    "tasks done",
    "tasks failed",
)
"""What a campaign of some thousand programs gets to."""


def missing(seen: Counter[str]) -> list[str]:
    """Give what should have happened, and has not."""
    return [what for what in EXPECTED if not seen[what]]


def report(seen: Counter[str]) -> str:
    """Say how often what has happened."""
    lines = []
    seconds = seen["seconds"]
    if seconds:
        lines.append(
            f"{seen['programs']:,} programs with {seen['steps']:,} steps in {seconds:,} s: "
            f"{seen['programs'] / seconds:.0f} programs/s"
        )
    lines += [
        f"  {what:<42}{count:>12,}"
        for what, count in sorted(seen.items())
        if what not in ("programs", "steps", "seconds")
    ]
    return "\n".join(lines)
