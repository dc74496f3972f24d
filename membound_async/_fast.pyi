# What the extension has. The same classes in Python say what each is for.
from .fastpath import (
    AccountState,
    GrantState,
    Holders,
    LedgerState,
    LimiterState,
    WaitersState,
)

__all__ = [
    "AccountState",
    "GrantState",
    "Holders",
    "LedgerState",
    "LimiterState",
    "WaitersState",
]
