"""``membound verify``: whether what a program declares fits into a limit."""

from __future__ import annotations

import argparse
import inspect
import os
import shutil
from typing import Any

from membound_async.bounds import ComponentBounds, MemoryBounds
from membound_async.component import Component
from membound_async.exceptions import BoundsError, InvalidLimit, MemboundError
from membound_async.limiter import MemoryLimiter
from membound_async.limits import MemoryLimit, resolve
from membound_async.probes import ProcessProbe
from membound_async.registry import ComponentRegistry
from membound_async.settings import LimiterSettings
from membound_async.sizes import human_size, parse_size
from membound_async.verifier import BoundsVerifier, render

from . import CannotStart
from .program import find_object, is_target, put_first_on_path

__all__ = ["verify"]

Declared = ComponentRegistry | ComponentBounds


def verify(arguments: argparse.Namespace) -> int:
    """Print the bounds that an object declares, and whether they fit.

    Args:
        arguments: of ``membound verify``.

    Returns:
        0 if they fit, 1 if they do not, 2 if MODULE has raised something else.

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
        print(f"does not fit any limit: {error}")
        return 1
    except MemboundError as error:
        raise CannotStart(str(error)) from None
    except CannotStart:
        raise
    except Exception as error:
        sys.excepthook(type(error), error, from_program_on(error))
        return 2
    try:
        limit = _limit(arguments, limiter)
        baseline_bytes = _baseline_bytes(arguments, limiter)
        overcommit = _overcommit(arguments, limiter)
        verifier = BoundsVerifier(
            declared,
            limit.effective_bytes,
            baseline_bytes,
            overcommit,
            slop_factor=limit.slop_factor,
        )
    except (MemboundError, ValueError) as error:
        raise CannotStart(str(error)) from None
    width = shutil.get_terminal_size().columns
    print(
        render(
            declared.tree(),
            effective_bytes=limit.effective_bytes,
            baseline_bytes=baseline_bytes,
            overcommit=overcommit,
            width=width,
        )
    )
    source = f"--limit {arguments.limit}" if arguments.limit else limit.source
    try:
        verifier.check()
    except (BoundsError, InvalidLimit) as error:
        report = getattr(error, "report", "")
        verdict, exit_code = f"DOES NOT FIT: {str(error).removesuffix(report).rstrip()}", 1
    else:
        smallest = format_size(verifier.smallest_limit_bytes)
        verdict, exit_code = f"FITS; the smallest limit that would do is {smallest}", 0
    ...
