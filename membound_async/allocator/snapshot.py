"""What was counted for one allocation group, at one moment."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AllocationStatsSnapshot"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationStatsSnapshot:
    """Counts since the group was registered; or of the time between two, see ``delta``.

    Bytes are what was asked for, as ``sys.getsizeof`` and tracemalloc count them. A block that
    is resized is deallocated and allocated again.
    """

    allocated_bytes: int = 0
    allocated_objects: int = 0
    deallocated_bytes: int = 0
    deallocated_objects: int = 0
    #: the most bytes that were live at one time
    peak_live_bytes: int = 0

    @property
    def live_bytes(self) -> int:
        """Bytes that are allocated, and not freed yet."""
        return self.allocated_bytes - self.deallocated_bytes

    @property
    def live_objects(self) -> int:
        """Blocks that are allocated, and not freed yet."""
        return self.allocated_objects - self.deallocated_objects

    def delta(self, previous: AllocationStatsSnapshot) -> AllocationStatsSnapshot:
        """Give what has happened since ``previous``; its live bytes are the growth.

        The peak is that of the whole time until now.
        """
        return AllocationStatsSnapshot(
            allocated_bytes=self.allocated_bytes - previous.allocated_bytes,
            allocated_objects=self.allocated_objects - previous.allocated_objects,
            deallocated_bytes=self.deallocated_bytes - previous.deallocated_bytes,
            deallocated_objects=self.deallocated_objects - previous.deallocated_objects,
            peak_live_bytes=self.peak_live_bytes,
        )

    def merge(self, other: AllocationStatsSnapshot) -> AllocationStatsSnapshot:
        """Give the sum of both, as of two groups that are looked at as one.

        Their peaks may have been at different times: the sum is the most that it can have been.
        """
        return AllocationStatsSnapshot(
            allocated_bytes=self.allocated_bytes + other.allocated_bytes,
            allocated_objects=self.allocated_objects + other.allocated_objects,
            deallocated_bytes=self.deallocated_bytes + other.deallocated_bytes,
            deallocated_objects=self.deallocated_objects + other.deallocated_objects,
            peak_live_bytes=self.peak_live_bytes + other.peak_live_bytes,
        )
