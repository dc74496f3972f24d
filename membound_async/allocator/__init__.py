"""What each component's code really has allocated: exact, live, by a native hook.

::

    from membound_async import allocator

    allocator.install()
    tenant = allocator.registry.register("tenants.acme")
    with tenant.enter():
        cache = build_cache()  # whatever this allocates is the tenant's until it is freed
    print(tenant.live_bytes)

Every block of CPython's allocators is charged to the group of the context that made it, and
credited to that group when it is freed, in whatever task or thread. Entering a ``Component``
enters the group of its path. What no group claims is ``root``'s.

`available` is False, and `unavailable_reason` says why, where the extension was not built or
cannot work; the rest of the package works without it.
"""

from __future__ import annotations

from .groups import (
    AllocationGroup,
    AllocationGroupRegistry,
    AllocationScope,
    current_group,
    registry,
)
from .hooks import (
    available,
    disable,
    displaced,
    enable,
    enabled,
    get_include,
    install,
    installed,
    trim,
    unavailable_reason,
)
from .snapshot import AllocationStatsSnapshot

__all__ = [
    "AllocationGroup",
    "AllocationGroupRegistry",
    "AllocationScope",
    "AllocationStatsSnapshot",
    "available",
    "current_group",
    "disable",
    "displaced",
    "enable",
    "enabled",
    "get_include",
    "install",
    "installed",
    "registry",
    "trim",
    "unavailable_reason",
]
