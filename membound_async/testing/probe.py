"""A probe that reads the memory that a test wants it to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["ScriptedProbe"]


class ScriptedProbe:
    """A memory probe that reads what it is told to, sensible or not.

    Args:
        source: bytes in use. An ``int`` is read each time. A sequence is read item by
            item, and its last one again and again. A function is called at each
            reading; it may raise, as a probe may.

    Attributes:
        name: what reports say that the probe measures.
        reads: how many times it has been read.

    Raises:
        TypeError: ``source`` is none of these.
        ValueError: ``source`` is an empty sequence.
    """

    name = "scripted"

    def __init__(self, source: int | Sequence[int] | Callable[[], int] = 0) -> None:
        self.reads = 0
        self.set(source)

    def set(self, source: int | Sequence[int] | Callable[[], int]) -> None:
        """Read ``source`` from now on, a sequence from its first item.

        Raises:
            TypeError: ``source`` is no ``int``, sequence of them or function.
            ValueError: ``source`` is an empty sequence.
        """
        if callable(source):
            self._next = source
        elif isinstance(source, int):
            self._next = lambda: source
        elif isinstance(source, Sequence) and not isinstance(source, (str, bytes)):
            if not source:
                raise ValueError("source=[] has nothing to read; give it one number at least")
            script = tuple(source)
            position = iter(range(len(script) - 1))
            self._next = lambda: script[next(position, -1)]
        else:
            raise TypeError(
                "source is a number of bytes, a sequence of them or a function that gives one, "
                f"not {source!r} ({type(source).__name__})"
            )

    def read(self) -> int:
        """Give the next reading, in bytes, unchecked; raises what the function raises."""
        self.reads += 1
        return self._next()
