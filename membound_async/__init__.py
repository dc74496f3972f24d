"""Keeps an asyncio service inside its memory limit: declare, verify, grant, track, report."""

from __future__ import annotations

from .bounds import ComponentBounds, MemoryBounds, MemoryBoundsBuilder, UsageExpr
from .component import Component
from .context import current_component
from .exceptions import (
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
    TrackingError,
    TrackingUnavailable,
    UnknownComponent,
)
from .grant import MemoryGrant, grant, grant_nowait
from .limiter import MemoryLimiter, current_limiter
from .limits import MemoryLimit
from .pressure import PressurePolicy
from .probes import MemoryProbe, PressureStall
from .registry import ComponentRegistry
from .settings import LimiterSettings
from .statistics import ComponentStatistics, LimiterStatistics
from .streams import bounded, create_memory_stream
from .verifier import BoundsVerifier, VerifiedBounds

__all__ = [
    "BoundsError",
    "BoundsVerifier",
    "Component",
    "ComponentBounds",
    "ComponentRegistry",
    "ComponentStatistics",
    "FirmLimitExceedsAvailable",
    "GrantDeadlock",
    "GrantError",
    "GrantReleased",
    "GrantTimeout",
    "GrantTooLarge",
    "InsufficientMinimumMemory",
    "InvalidComponentBounds",
    "InvalidLimit",
    "LimitError",
    "LimitNotDetected",
    "LimiterSettings",
    "LimiterStatistics",
    "MemboundError",
    "MemoryBounds",
    "MemoryBoundsBuilder",
    "MemoryGrant",
    "MemoryLimit",
    "MemoryLimiter",
    "MemoryProbe",
    "NoCurrentLimiter",
    "PressurePolicy",
    "PressureStall",
    "QuotaExceeded",
    "TrackingError",
    "TrackingUnavailable",
    "UnknownComponent",
    "UsageExpr",
    "VerifiedBounds",
    "bounded",
    "create_memory_stream",
    "current_component",
    "current_limiter",
    "grant",
    "grant_nowait",
]
