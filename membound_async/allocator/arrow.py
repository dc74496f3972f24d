"""PyArrow's memory, charged to an allocation group."""

from __future__ import annotations

import ctypes
from importlib import import_module
from threading import Lock
from typing import Any

from .groups import AllocationGroup

__all__ = ["ArrowPool"]


class ArrowPool:
    """Memory for PyArrow that is a group's: pass ``pool`` as ``memory_pool=``.

    ::

        arrow = ArrowPool(registry.register("reader"))
        for batch in pyarrow.csv.open_csv(path, memory_pool=arrow.pool):
            arrow.refresh()
            ...

    Arrow has allocators of its own, which tell nobody: `refresh` asks for the bytes that are
    allocated now, and charges or discharges the group by the difference. So the group is as of
    the last refresh, and bytes are charged that were live at one; call it after each batch, and
    once more when all is freed. Bytes are as Arrow counts them, in multiples of 64; there are no
    objects.

    Attributes:
        group: whose memory it is.
        pool: a ``pyarrow.MemoryPool``, which takes its memory from the default one. It stays
            for the life of the process, because what was made from it cannot be freed without
            it: make one for each group, not one for each request.

    Raises:
        ImportError: PyArrow is not installed.
    """

    def __init__(self, group: AllocationGroup) -> None:
        pyarrow: Any = import_module("pyarrow")
        self.group = group
        self.pool: Any = pyarrow.proxy_memory_pool(pyarrow.default_memory_pool())
        # PyArrow's buffers point to it and do not hold it, even when the interpreter ends.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.pool))
        self._charged = 0
        self._lock = Lock()

    def refresh(self) -> None:
        """Charge the group what is allocated now. From any thread.

        Raises:
            TrackingError: the group was unregistered, and another has its place.
        """
        with self._lock:
            now: int = self.pool.bytes_allocated()
            if now > self._charged:
                self.group.charge(now - self._charged)
            elif now < self._charged:
                self.group.discharge(self._charged - now)
            self._charged = now
