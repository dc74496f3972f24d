"""What happens in a limiter, told to whoever wants to know: events, and the hooks they go to.

A hook is any function of one event::

    def count(event: Event) -> None:
        if isinstance(event, GrantRefused):
            refused[event.component] += 1

    with limiter.add_hook(count):
        ...

It is called at once, in the thread where it happens, and never with a lock of the limiter held.
It must not wait. What it raises is logged, once for each hook, and changes nothing. A grant that
is had at once is no event, so hooks cost nothing while memory is plenty.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from .events import log
from .exceptions import GrantError

__all__ = [
    "DriftRose",
    "Event",
    "GrantDelayed",
    "GrantLeaked",
    "GrantRefused",
    "GrantWaited",
    "Hook",
    "Hooked",
    "Hooks",
    "LimitChanged",
    "Reclaimed",
    "StallEnded",
    "Stalled",
]


@dataclass(frozen=True, slots=True)
class GrantWaited:
    """A request was admitted after it had to wait."""

    component: str
    wanted_bytes: int
    waited_seconds: float

    name: ClassVar[str] = "membound.grant_waited"


@dataclass(frozen=True, slots=True)
class GrantDelayed:
    """A grant is held back under pressure, for so long from now."""

    component: str
    wanted_bytes: int
    delay_seconds: float

    name: ClassVar[str] = "membound.grant_delayed"


@dataclass(frozen=True, slots=True)
class GrantRefused:
    """A request has got an error instead of a grant."""

    component: str
    wanted_bytes: int
    #: ``QuotaExceeded``, ``GrantTooLarge``, ``GrantTimeout`` or ``GrantDeadlock``
    error: GrantError

    name: ClassVar[str] = "membound.grant_refused"


@dataclass(frozen=True, slots=True)
class Stalled:
    """Somebody waits, and nothing was granted or given back for ``stall_after_seconds``."""

    free_bytes: int
    drift_bytes: int
    measured_bytes: int
    waiting: int
    #: at most ten components, those who hold the most first
    holders: list[dict[str, Any]]
    #: at most ten components, those who have waited longest first
    waiters: list[dict[str, Any]]

    name: ClassVar[str] = "membound.stalled"


@dataclass(frozen=True, slots=True)
class StallEnded:
    """Something moves again."""

    after_seconds: float

    name: ClassVar[str] = "membound.stall_ended"


@dataclass(frozen=True, slots=True)
class DriftRose:
    """There is more memory that nobody was granted, by at least a tenth of the effective limit."""

    drift_bytes: int
    measured_bytes: int
    free_bytes: int

    name: ClassVar[str] = "membound.drift_rose"


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """Memory is short, and a reclaimer was asked for some."""

    reclaimer: str
    wanted_bytes: int
    #: what measured memory has fallen by
    freed_bytes: int
    #: what the reclaimer says itself
    reported_bytes: int
    seconds: float

    name: ClassVar[str] = "membound.reclaimed"


@dataclass(frozen=True, slots=True)
class GrantLeaked:
    """A grant was garbage-collected that nobody had released; it is given back."""

    component: str
    granted_bytes: int

    name: ClassVar[str] = "membound.grant_leaked"


@dataclass(frozen=True, slots=True)
class LimitChanged:
    """The limit of the container has changed, or ``resize()`` was called."""

    limit_bytes: int
    before_bytes: int
    limit_source: str

    name: ClassVar[str] = "membound.limit_changed"


Event = (
    GrantWaited
    | GrantDelayed
    | GrantRefused
    | Stalled
    | StallEnded
    | DriftRose
    | Reclaimed
    | GrantLeaked
    | LimitChanged
)


class Hook(Protocol):
    """What is told of every event."""

    def __call__(self, event: Event, /) -> object:
        """Take note of an event, at once."""


class Hooks:
    """The hooks of one limiter."""

    def __init__(self, *hooks: Hook) -> None:
        self._hooks = hooks
        self._failed: set[int] = set()

    def add(self, hook: Hook) -> Hooked:
        """Tell that hook, too, from now on."""
        if not callable(hook):
            raise TypeError(f"hook={hook!r} is no function of an event")
        self._hooks = (*self._hooks, hook)
        return Hooked(self, hook)

    def remove(self, hook: Hook) -> None:
        """Tell that hook no more; of one that was added twice, once."""
        hooks = [*self._hooks]
        with suppress(ValueError):
            hooks.remove(hook)
        self._hooks = tuple(hooks)

    def tell(self, event: Event) -> None:
        """Tell all hooks of an event."""
        for hook in self._hooks:
            try:
                hook(event)
            except Exception as error:  # noqa: BLE001  anybody's code
                if id(hook) not in self._failed:
                    self._failed.add(id(hook))
                    log().warning(
                        "membound.hook_failed", hook=repr(hook), error=repr(error), on=event.name
                    )


class Hooked(AbstractContextManager["Hooked"]):
    """A hook that was added; ``remove()``, or the end of a ``with`` block, takes it away."""

    def __init__(self, hooks: Hooks, hook: Hook) -> None:
        self._hooks: Hooks | None = hooks
        self._hook = hook

    def remove(self) -> None:
        """Tell the hook no more; does nothing the second time."""
        if self._hooks is not None:
            self._hooks.remove(self._hook)
            self._hooks = None

    def __exit__(self, *_: object) -> None:
        self.remove()
