"""What can go wrong, as a tree that callers can catch by branch.

::

    MemboundError
    ├── BoundsError
    │   ├── InvalidComponentBounds       a component's parts make no sense
    │   ├── InsufficientMinimumMemory    the minimums do not fit
    │   ├── FirmLimitExceedsAvailable    the firm limits do not fit
    │   └── UnknownComponent             no component has that path
    ├── GrantError
    │   ├── QuotaExceeded                not now (``grant_nowait``)
    │   ├── GrantTooLarge                never
    │   ├── GrantTimeout                 not in time (also a ``TimeoutError``)
    │   ├── GrantDeadlock                never, unless somebody who waits as well gives up
    │   └── GrantReleased                the grant was given back already
    ├── LimitError
    │   ├── LimitNotDetected             nothing says how much memory there is
    │   ├── InvalidLimit                 the limit, or what it is measured with, makes no sense
    │   └── NoCurrentLimiter             it is not clear which limiter is meant
    ├── ReclaimReentry                   a reclaimer asks for memory itself
    └── TrackingError                    allocations cannot be counted like that
        └── TrackingUnavailable          nor here at all

An error carries its numbers as attributes (bytes unless the name says otherwise), says
them in its message with what to do about them, and survives pickling. Raising one has
changed nothing.
"""

from __future__ import annotations

from .sizes import format_size

__all__ = [
    "BoundsError",
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
    "MemboundError",
    "NoCurrentLimiter",
    "QuotaExceeded",
    "ReclaimReentry",
    "TrackingError",
    "TrackingUnavailable",
    "UnknownComponent",
]


def _restore(cls: type[MemboundError], message: str, facts: dict[str, object]) -> MemboundError:
    error = cls.__new__(cls, message)
    error.args = (message,)
    error.__dict__.update(facts)
    return error


def _amount(number: int, resource: str) -> str:
    return format_size(number) if resource == "bytes" else f"{number} {resource}"


class MemboundError(Exception):
    """The root of every error that this package raises on purpose."""

    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (type(self), str(self), self.__dict__.copy())


class BoundsError(MemboundError):
    """What components declare cannot be kept.

    ``report`` is the tree of declared bounds, largest first, ready to print; empty when
    the error concerns one declaration only.
    """

    report: str = ""


class InvalidComponentBounds(BoundsError):
    """One component's declaration makes no sense.

    Attributes:
        component: its path.
        reason: what is wrong, with the numbers.
    """

    def __init__(self, component: str, reason: str) -> None:
        self.component = component
        self.reason = reason
        super().__init__(f"bounds of component {component!r}: {reason}")


class InsufficientMinimumMemory(BoundsError):
    """The minimums together do not fit into what is available.

    Attributes:
        required_bytes: sum of all minimums.
        available_bytes: effective limit less the baseline.
        suggested_limit_bytes: the smallest limit, slop included, that would pass.
        report: the tree of bounds.
    """

    def __init__(
        self,
        required_bytes: int,
        available_bytes: int,
        suggested_limit_bytes: int,
        report: str = "",
    ) -> None:
        self.required_bytes = required_bytes
        self.available_bytes = available_bytes
        self.suggested_limit_bytes = suggested_limit_bytes
        self.report = report
        super().__init__(
            f"the components need at least {format_size(required_bytes)}, but only "
            f"{format_size(available_bytes)} is available; lower a minimum, or raise the "
            f"limit to {format_size(suggested_limit_bytes)}" + (f"\n{report}" if report else "")
        )


class FirmLimitExceedsAvailable(BoundsError):
    """The firm limits, all together or of one component, exceed what is available.

    Attributes:
        component: path of the one that is too large by itself; None for the sum.
        firm_limit_bytes: that component's firm limit, or the sum of all.
        available_bytes: what it may be: effective limit less the baseline, times
            ``overcommit`` for the sum.
        overcommit: the factor in force.
        suggested_limit_bytes: the smallest limit, slop included, that would pass.
        report: the tree of bounds.
    """

    def __init__(
        self,
        component: str | None,
        firm_limit_bytes: int,
        available_bytes: int,
        overcommit: float,
        suggested_limit_bytes: int,
        report: str = "",
    ) -> None:
        self.component = component
        self.firm_limit_bytes = firm_limit_bytes
        self.available_bytes = available_bytes
        self.overcommit = overcommit
        self.suggested_limit_bytes = suggested_limit_bytes
        self.report = report
        if component is None:
            subject = f"the firm limits together are {format_size(firm_limit_bytes)}"
            remedy = "lower one, raise overcommit, or raise the limit"
        else:
            subject = f"component {component!r} has a firm limit of {format_size(firm_limit_bytes)}"
            remedy = "lower it, or raise the limit"
        super().__init__(
            f"{subject}, but at most {format_size(available_bytes)} is allowed "
            f"(overcommit {overcommit:g}); {remedy} to {format_size(suggested_limit_bytes)}"
            + (f"\n{report}" if report else "")
        )


class UnknownComponent(BoundsError, LookupError):
    """No component has that path.

    Attributes:
        component: the path that was asked for.
        known: the paths there are, at most twenty.
    """

    def __init__(self, component: str, known: tuple[str, ...] = ()) -> None:
        self.component = component
        self.known = known
        there_is = ", ".join(map(repr, known)) if known else "none"
        super().__init__(f"no component {component!r}; there is: {there_is}")

    __str__ = Exception.__str__


class GrantError(MemboundError):
    """A grant was not given, or cannot be used as asked."""


class QuotaExceeded(GrantError):
    """There is no room now, and the call does not wait.

    Attributes:
        component: who asked.
        wanted_bytes: what was asked for.
        available_bytes: the most this component could have had at that moment.
        reason: why not more, in a few words.
        resource: what there is not enough of. If it is not ``"bytes"``, the two numbers are
            of that.
    """

    def __init__(
        self,
        component: str,
        wanted_bytes: int,
        available_bytes: int,
        reason: str,
        resource: str = "bytes",
    ) -> None:
        self.component = component
        self.wanted_bytes = wanted_bytes
        self.available_bytes = available_bytes
        self.reason = reason
        self.resource = resource
        super().__init__(
            f"component {component!r} wanted {_amount(wanted_bytes, resource)}, but may have "
            f"{_amount(available_bytes, resource)} now: {reason}; use grant() to wait"
        )


class GrantTooLarge(GrantError):
    """Not even an idle limiter could give that much, so waiting is no use.

    Attributes:
        component: who asked.
        wanted_bytes: what was asked for; of a grow, with what the grant holds already.
        most_bytes: the most that this component can ever have in one grant.
        reason: what sets that bound.
        resource: what there is not enough of. If it is not ``"bytes"``, the two numbers are
            of that.
    """

    def __init__(
        self,
        component: str,
        wanted_bytes: int,
        most_bytes: int,
        reason: str,
        resource: str = "bytes",
    ) -> None:
        self.component = component
        self.wanted_bytes = wanted_bytes
        self.most_bytes = most_bytes
        self.reason = reason
        self.resource = resource
        super().__init__(
            f"component {component!r} wanted {_amount(wanted_bytes, resource)}, but can have "
            f"{_amount(most_bytes, resource)} at the most ({reason}); ask for less at a time, or "
            "raise the limit, the share or the component's bounds"
        )


class GrantTimeout(GrantError, TimeoutError):
    """The wait took longer than ``timeout=`` allows; nothing was granted.

    Attributes:
        component: who asked.
        wanted_bytes: what was asked for.
        waited_seconds: how long it waited.
    """

    def __init__(self, component: str, wanted_bytes: int, waited_seconds: float) -> None:
        self.component = component
        self.wanted_bytes = wanted_bytes
        self.waited_seconds = waited_seconds
        super().__init__(
            f"component {component!r} waited {waited_seconds:.3f} s for "
            f"{format_size(wanted_bytes)} in vain; see limiter.statistics() for who holds what"
        )


class GrantDeadlock(GrantError):
    """All who hold memory wait for more, and none of them can be given any.

    Those get it who have held something for the shortest time, as few as will do. The others go
    on as soon as their blocks have given back what they hold.

    Attributes:
        component: who asked.
        wanted_bytes: what was asked for.
        holders: who holds what: pairs of a component and its granted bytes, the most first.
    """

    def __init__(
        self, component: str, wanted_bytes: int, holders: tuple[tuple[str, int], ...]
    ) -> None:
        self.component = component
        self.wanted_bytes = wanted_bytes
        self.holders = holders
        held = ", ".join(f"{name!r}: {format_size(nbytes)}" for name, nbytes in holders[:5])
        more = f" and {len(holders) - 5} more" if len(holders) > 5 else ""
        super().__init__(
            f"component {component!r} waited for {format_size(wanted_bytes)}, but all who hold "
            f"memory wait for more ({held}{more}); ask once for all that is needed, for example "
            "with up_to=, or give back before asking again"
        )


class GrantReleased(GrantError):
    """The grant was given back already and cannot be used any more.

    Attributes:
        component: whose grant it was.
    """

    def __init__(self, component: str, operation: str) -> None:
        self.component = component
        self.operation = operation
        super().__init__(
            f"{operation}: this grant of component {component!r} has been released; ask for "
            "a new one"
        )


class LimitError(MemboundError):
    """The memory limit, or the limiter that keeps it, is not usable."""


class LimitNotDetected(LimitError):
    """Nothing on this machine says how much memory the process may use.

    Attributes:
        tried: what was looked at.
    """

    def __init__(self, tried: tuple[str, ...]) -> None:
        self.tried = tried
        super().__init__(
            f"no memory limit found (looked at: {', '.join(tried)}); pass limit=, for example "
            'MemoryLimiter("512MiB"), or set MEMBOUND_LIMIT'
        )


class InvalidLimit(LimitError, ValueError):
    """A limit, a setting or a reading that the limiter cannot work with."""


class NoCurrentLimiter(LimitError, LookupError):
    """It is not clear which limiter is meant.

    Attributes:
        candidates: how many limiters the process has entered.
    """

    def __init__(self, candidates: int) -> None:
        self.candidates = candidates
        if candidates:
            reason = (
                f"{candidates} limiters are entered in this process and none in this context; "
                "use limiter.grant() or component.grant()"
            )
        else:
            reason = (
                "MEMBOUND_REQUIRED is set, but no limiter is entered; use `async with "
                "MemoryLimiter(): ...`, limiter.install(), or `membound run`"
            )
        super().__init__(reason)

    __str__ = Exception.__str__


class ReclaimReentry(MemboundError):
    """A reclaimer has asked for memory while it was to free some; it was given none.

    Attributes:
        reclaimer: its name.
        component: for whom it asked.
        wanted_bytes: what it asked for.
    """

    def __init__(self, reclaimer: str, component: str, wanted_bytes: int) -> None:
        self.reclaimer = reclaimer
        self.component = component
        self.wanted_bytes = wanted_bytes
        super().__init__(
            f"reclaimer {reclaimer!r} asked for {format_size(wanted_bytes)} for component "
            f"{component!r} while it was to free memory; have it release and shrink grants "
            "only, and ask for what it needs before, when it is registered"
        )


class TrackingError(MemboundError):
    """The allocation tracker was asked for what it cannot do; nothing has changed."""


class TrackingUnavailable(TrackingError):
    """Allocations cannot be tracked here; the rest of the package works all the same.

    Attributes:
        reason: what is missing.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"allocations cannot be tracked: {reason}; look at "
            "membound_async.allocator.available before asking for it"
        )
