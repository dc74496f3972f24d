"""Keeps an asyncio service inside its memory limit: declare, verify, grant, track, report."""

from __future__ import annotations

from .accounts import Account, AccountUsage
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
    ReclaimReentry,
    TrackingError,
    TrackingUnavailable,
    UnknownComponent,
)
from .grant import MemoryGrant, grant, grant_nowait
from .inbox import Inbox, InboxStatistics, Received
from .limiter import MemoryLimiter, current_limiter
from .limits import MemoryLimit
from .pressure import PressurePolicy
from .probes import MemoryProbe, PressureStall
from .reclaim import Reclaimer
from .registry import ComponentRegistry
from .resources import ResourceLimits
from .rules import Polynomial
from .settings import LimiterSettings
from .statistics import (
    ComponentStatistics,
    HeldGrant,
    LimiterStatistics,
    ReclaimerStatistics,
    ResourceStatistics,
    WaitingRequest,
)
from .streams import bounded, create_memory_stream
from .verifier import BoundsVerifier, VerifiedBounds

__all__ = [
    "Account",
    "AccountUsage",
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
    "HeldGrant",
    "Inbox",
    "InboxStatistics",
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
    "Polynomial",
    "PressurePolicy",
    "PressureStall",
    "QuotaExceeded",
    "Received",
    "ReclaimReentry",
    "Reclaimer",
    "ReclaimerStatistics",
    "ResourceLimits",
    "ResourceStatistics",
    "TrackingError",
    "TrackingUnavailable",
    "UnknownComponent",
    "UsageExpr",
    "VerifiedBounds",
    "WaitingRequest",
    "bounded",
    "create_memory_stream",
    "current_component",
    "current_limiter",
    "grant",
    "grant_nowait",
]
