"""Allocation groups: whose code has allocated what."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from membound_async.bounds import split_path
from membound_async.exceptions import TrackingError

from .hooks import available, needed
from .snapshot import AllocationStatsSnapshot

if TYPE_CHECKING or available:
    from ._tracker import Group, Scope
else:

    class Group:
        """What a group is where nothing can be tracked: none can be made."""

        __slots__ = ()

        def __init__(self, _path: str) -> None:
            needed()

    class Scope:
        """What a scope is where nothing can be tracked."""

        __slots__ = ()


__all__ = [
    "AllocationGroup",
    "AllocationGroupRegistry",
    "AllocationScope",
    "current_group",
    "registry",
]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

ROOT = "root"


class AllocationScope(Scope):
    """A block of code that charges a group: ``with group.enter():``.

    What is called, awaited and started as a task inside charges the group, too, unless it
    enters another; so do ``asyncio.to_thread`` and anyio's threads, but not
    ``loop.run_in_executor``. Scopes are left in the opposite order, each in the task that has
    entered it: anything else raises ``TrackingError`` and changes nothing.

    As a decorator (``@group.enter()``), each call of the function is such a block.
    """

    __slots__ = ()

    def __call__(self, function: F) -> F:
        """Make each call of a function, or of a coroutine function, charge the group.

        Raises:
            TypeError: a generator function: its group would be current in its caller's code
                between two items.
        """
        group = self.group
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"{function.__qualname__} is a generator: its caller would charge "
                f"{group.path!r} between two items; enter the group in what consumes it"
            )
        if inspect.iscoroutinefunction(function):

            @wraps(function)
            async def entered_async(*args: Any, **kwargs: Any) -> Any:
                with AllocationScope(group):
                    return await function(*args, **kwargs)

            return cast("F", entered_async)

        @wraps(function)
        def entered(*args: Any, **kwargs: Any) -> Any:
            with AllocationScope(group):
                return function(*args, **kwargs)

        return cast("F", entered)


class AllocationGroup(Group):
    """Whose allocations are counted together: a component, a tenant, a connection.

    Made by ``registry.register(path)``. ``live_bytes`` and ``live_objects`` are what is
    allocated and not freed yet; ``statistics()`` tells the rest.

    ``charge(nbytes)`` and ``discharge(nbytes)`` add and take memory that CPython's allocators
    know nothing of (an mmap, a C library's buffers). From any thread. Discharging more than is
    charged raises ``TrackingError`` and changes nothing.
    """

    __slots__ = ("__weakref__",)

    def enter(self) -> AllocationScope:
        """Give a scope, to be entered once: ``with group.enter():``; or a decorator."""
        return AllocationScope(self)

    async def track(self, awaitable: Awaitable[T]) -> T:
        """Await it with what it allocates charged to this group.

        A coroutine runs in this group; a task or future that runs already stays in its own.
        Cancelling cancels it, as a plain ``await`` would.
        """
        with AllocationScope(self):
            return await awaitable

    def statistics(self) -> AllocationStatsSnapshot:
        """Give all counts, as of now.

        Raises:
            TrackingError: it was unregistered, and another group has its place.
        """
        allocated, objects, deallocated, freed, peak = self._counts()
        return AllocationStatsSnapshot(
            allocated_bytes=allocated,
            allocated_objects=objects,
            deallocated_bytes=deallocated,
            deallocated_objects=freed,
            peak_live_bytes=peak,
        )


class AllocationGroupRegistry:
    """The groups of the process, by path. There is one: ``membound_async.allocator.registry``."""

    def __init__(self) -> None:
        self._groups: dict[str, AllocationGroup] = {}
        if available:
            self._groups[ROOT] = AllocationGroup(ROOT)

    def register(self, path: str) -> AllocationGroup:
        """Give the group of a dotted path, the same one each time.

        Raises:
            TrackingUnavailable: nothing can be tracked here.
            TrackingError: all groups are in use.
            InvalidComponentBounds: no component can have that path.
        """
        group = self._groups.get(path)
        if group is None:
            split_path(path)
            group = self._groups.setdefault(path, AllocationGroup(path))
        return group

    def unregister(self, path: str) -> None:
        """Let another group have its place, once all that it has allocated is freed.

        It cannot be entered any more. Code that is in it goes on to charge it, and its
        statistics go on until its place is taken.

        Raises:
            TrackingError: there is no group of that path, or it is ``"root"``.
        """
        group = self._groups.get(path)
        if group is None:
            raise TrackingError(f"no allocation group is registered as {path!r}")
        group._retire()
        del self._groups[path]

    def get(self, path: str) -> AllocationGroup | None:
        """Give the group of a path; None if there is none."""
        return self._groups.get(path)

    @property
    def root(self) -> AllocationGroup:
        """The group of all code that is in no other.

        Raises:
            TrackingUnavailable: nothing can be tracked here.
        """
        return self.register(ROOT)

    def visit(self, visitor: Callable[[AllocationGroup, AllocationStatsSnapshot], object]) -> None:
        """Call ``visitor`` with each group and its statistics."""
        for group in self:
            visitor(group, group.statistics())

    def snapshot(self) -> dict[str, AllocationStatsSnapshot]:
        """Give the statistics of all groups, by path."""
        return {group.path: group.statistics() for group in self}

    def __iter__(self) -> Iterator[AllocationGroup]:
        return iter(list(self._groups.values()))

    def __len__(self) -> int:
        return len(self._groups)


registry = AllocationGroupRegistry()
"""The groups of the process."""


def current_group() -> AllocationGroup:
    """Give the group whose code is running.

    Raises:
        TrackingUnavailable: nothing can be tracked here.
    """
    group: AllocationGroup = needed().current()
    return group
