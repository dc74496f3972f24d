"""What the allocation tracker's tests share: groups, whom a block is charged to, new processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import pytest

from membound_async import allocator
from membound_async.allocator import AllocationGroup, current_group, registry

PROGRAM = """
import sys
sys.path.append({root!r})
from {module} import {name} as test
test.__wrapped__()
"""


def need_tracker() -> None:
    """Skip the test where nothing can be tracked."""
    if not allocator.available:
        pytest.skip(f"nothing can be tracked: {allocator.unavailable_reason}")


@contextmanager
def new_group(path: str) -> Iterator[AllocationGroup]:
    """Count in this process, and give a group that nothing was charged to."""
    need_tracker()
    allocator.install()
    yield registry.register(path)
    if registry.get(path) is not None:
        registry.unregister(path)
    allocator.disable()


def charged_path() -> str:
    """Give the path of the group that a block made here is charged to, however one looks."""
    from membound_async.allocator import _tracker

    group = current_group()
    assert _tracker._hook_group() == group._index
    for n in (100, 1_000, 100_000):  # from pymalloc, and from the raw domain
        for block in (bytes(n), b"z" * n):
            assert _tracker._block(id(block)) == (group._index, sys.getsizeof(block))
    return group.path


def in_new_process(**variables: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Run a test in a process where nothing is tracked yet, with these environment variables."""

    def decorate(test: Callable[[], None]) -> Callable[[], None]:
        program = PROGRAM.format(
            root=str(Path(__file__).parents[1]), module=test.__module__, name=test.__name__
        )

        @wraps(test)
        def run() -> None:
            if variables.get("MEMBOUND_EXTENSION") != "no":
                need_tracker()
            ended = subprocess.run(
                [sys.executable, "-P", "-X", "faulthandler", "-c", program],
                check=False,
                capture_output=True,
                text=True,
                timeout=120,
                env=os.environ | variables,
            )
            assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout + ended.stderr

        return run

    return decorate
