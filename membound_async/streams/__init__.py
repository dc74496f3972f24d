"""Around streams: what passes through them is under a grant while anybody has it.

- `bounded`: any async iterable, one item at a time.
- `Batches` (``component.batches()``): any async iterable, in lists.
- `create_memory_stream`: a channel between tasks that holds so many bytes, not items.

An item that was read and then found to be too much for now is kept for the next time it is
asked for; so a cancellation loses none, wherever it comes.
"""

from __future__ import annotations

from .batches import Batches
from .items import Bounded, bounded
from .memory import (
    MemoryReceiveStream,
    MemorySendStream,
    create_memory_stream,
)

__all__ = [
    "Batches",
    "Bounded",
    "MemoryReceiveStream",
    "MemorySendStream",
    "bounded",
    "create_memory_stream",
]
