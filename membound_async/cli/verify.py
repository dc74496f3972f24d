"""``membound verify``: whether what a program declares fits into a limit."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from typing import Any

from membound_async.bounds import ComponentBounds, MemoryBounds
from membound_async.component import Component
from membound_async.exceptions import BoundsError, InvalidLimit, MemboundError
from membound_async.limiter import MemoryLimiter
from membound_async.limits import MemoryLimit, resolve
from membound_async.probes import ProcessProbe
from membound_async.registry import ComponentRegistry
from membound_async.settings import LimiterSettings
from membound_async.sizes import format_size, human_size, parse_size
from membound_async.verifier import BoundsVerifier, report_of

from . import CannotStart
from .layout import columns_of, paragraph
from .program import find_object, from_program_on, is_target, put_first_on_path
from .report import limit_source
from .tree import print_tree

__all__ = ["verify"]


def verify(arguments: argparse.Namespace) -> int:
    """Print the bounds that an object declares, and whether they fit.

    Args:
        arguments: of ``membound verify``.

    Returns:
        0 if they fit, 1 if they do not, 2 if the program has raised something else.

    Raises:
        CannotStart: an argument makes no sense, or the object is not found.
    """
    target: str = arguments.object
    if not is_target(target):
        raise CannotStart(f"{target!r} is not MODULE:OBJECT, such as shop.bounds:registry")
    put_first_on_path(os.getcwd())
    try:
        declared, limiter = _declared(find_object(target), target)
    except BoundsError as error:
        _say(f"INVALID: {error}", columns_of(sys.stdout))
        return 1
    except (CannotStart, MemboundError) as error:
        raise CannotStart(str(error)) from None
    except SystemExit as error:
        raise CannotStart(f"importing it ended by SystemExit({error.code!r})") from None
    except Exception as error:  # noqa: BLE001  any program's
        traceback = from_program_on(error)
        sys.excepthook(type(error), error.with_traceback(traceback), traceback)
        return 2
    try:
        return _print_verdict(declared, limiter, arguments)
    except (InvalidLimit, ValueError) as error:
        raise CannotStart(str(error)) from None


def _print_verdict(
    declared: ComponentRegistry | ComponentBounds,
    limiter: MemoryLimiter | None,
    arguments: argparse.Namespace,
) -> int:
    limit = _limit(limiter, arguments)
    baseline_bytes, measured = _baseline(limiter, arguments)
    settings = LimiterSettings.from_environment() if limiter is None else limiter.settings
    overcommit = settings.overcommit if arguments.overcommit is None else arguments.overcommit
    verifier = BoundsVerifier(
        declared, limit.effective_bytes, baseline_bytes, overcommit, slop_factor=limit.slop_factor
    )
    columns = columns_of(sys.stdout)
    report = report_of(
        declared.tree(),
        effective_bytes=limit.effective_bytes,
        baseline_bytes=baseline_bytes,
        overcommit=overcommit,
    )
    if not print_tree(report):
        print(report.to_text(columns))
    if measured:
        _say(f"baseline: {measured}; see --baseline", columns)
    source = limit_source(limit.source, is_option=arguments.limit is not None)
    limit_in_words = f"{human_size(limit.limit_bytes)} ({source})"
    try:
        verifier.check()
    except (BoundsError, InvalidLimit) as error:
        reason = str(error).removesuffix(getattr(error, "report", "")).rstrip()
        _say(f"DOES NOT FIT {limit_in_words}: {reason}", columns)
        return 1
    _say(f"FITS {limit_in_words}", columns)
    print(f"smallest limit that fits: {format_size(verifier.smallest_limit_bytes)}")
    return 0


def _declared(
    found: Any, target: str, *, was_called: bool = False
) -> tuple[ComponentRegistry | ComponentBounds, MemoryLimiter | None]:
    """Give what the object declares, and the limiter that it belongs to, if it does."""
    if isinstance(found, MemoryLimiter):
        return found.registry, found
    if isinstance(found, (ComponentRegistry, ComponentBounds)):
        return found, None
    if isinstance(found, Component) and found._limiter is not None:
        limiter: MemoryLimiter = found._limiter
        return limiter.registry.bounds(found.path), limiter
    if isinstance(found, MemoryBounds) and not isinstance(found, type):
        registry = ComponentRegistry()
        name = target.rpartition(":")[2].rpartition(".")[2]
        registry.register(found.path if isinstance(found, Component) else name, found)
        return registry, None
    if callable(found) and not was_called:
        return _declared(_called(found, target), target, was_called=True)
    gives = "gives" if was_called else "is"
    raise CannotStart(
        f"{target} {gives} a {type(found).__name__}, which declares no bounds; name a "
        "MemoryLimiter, a ComponentRegistry, a Component, something with specify_bounds(), or a "
        "function that gives one"
    )


def _called(function: Any, target: str) -> Any:
    if inspect.iscoroutinefunction(function):
        raise CannotStart(f"{target} is async; name a function that is not, or an object")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise CannotStart(f"{target} cannot be called without arguments: {error}") from None
    return function()


def _limit(limiter: MemoryLimiter | None, arguments: argparse.Namespace) -> MemoryLimit:
    own = None if limiter is None or limiter.is_noop else limiter.limit
    slop_factor = arguments.slop
    if slop_factor is None:
        slop_factor = _default_slop_factor() if own is None else own.slop_factor
    if own is not None and arguments.limit is None:
        return MemoryLimit(own.limit_bytes, slop_factor, own.source)
    found = resolve(arguments.limit)
    return MemoryLimit(found.limit_bytes, slop_factor, found.source)


def _default_slop_factor() -> float:
    text = os.environ.get("MEMBOUND_SLOP_FACTOR", "").strip()
    try:
        return float(text) if text else MemoryLimit.slop_factor
    except ValueError:
        raise InvalidLimit(f"MEMBOUND_SLOP_FACTOR={text!r} is no number; write 0.15") from None


def _baseline(
    limiter: MemoryLimiter | None, arguments: argparse.Namespace
) -> tuple[int, str | None]:
    """Give what the process has before any component starts, and how that is known."""
    if arguments.baseline is not None:
        return parse_size(arguments.baseline, "baseline"), None
    if limiter is not None and not limiter.is_noop:
        return limiter.statistics().baseline_bytes, "the limiter's own"
    probe = ProcessProbe()
    return probe.read(), f"{probe.name} with the module imported"


def _say(text: str, columns: int) -> None:
    first, *more = text.split("\n")  # a report below the first line keeps its form
    print("\n".join([*paragraph(first, columns), *more]))
