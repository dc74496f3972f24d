"""What all tests share: the event loops they run on, and a watch over blocking calls.

Every ``async def`` test runs on asyncio, asyncio with uvloop, and trio. One marked
``@pytest.mark.virtual_time`` runs on asyncio and trio with a clock that jumps to the next
timer when nothing else is to be done, so that it may sleep for hours; `anyio.current_time`
tells that clock's time, which starts at 0 there.
"""

from __future__ import annotations

import gc
import linecache
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import blockbuster
import pytest
import trio.testing
from hypothesis import settings

from membound_async.testing import VirtualTimeLoop

# The same examples each time, so that a pass is a pass; thorough looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.register_profile(
    "thorough", max_examples=20_000, stateful_step_count=100, deadline=None, print_blob=True
)
settings.load_profile("repeatable")

# What the caller has set for its own programs is not for the tests, but for which of the two
# fast paths they test.
for name in [*os.environ]:
    is_ours = name.startswith("MEMBOUND_") and name != "MEMBOUND_EXTENSION"
    if is_ours or name in {"WEB_CONCURRENCY", "COLUMNS", "LINES"}:
        del os.environ[name]

# Started in the background of a script, Ctrl-C is ignored here and in all that is started from
# here; the programs that are tested are to see it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave out of all garbage collections to come what stays until the end."""
    gc.collect()
    gc.freeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "anyio_backend" not in metafunc.fixturenames:
        return
    test = metafunc.definition
    chosen_by_test = hasattr(metafunc.module, "anyio_backend") or any(
        "anyio_backend" in mark.args[0] for mark in test.iter_markers("parametrize")
    )
    if not chosen_by_test:
        virtual = test.get_closest_marker("virtual_time") is not None
        names = ["asyncio", "trio"] if virtual else ["asyncio", "asyncio+uvloop", "trio"]
        metafunc.parametrize("anyio_backend", names, indirect=True)


@pytest.fixture
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """The event loop, in the form that anyio's plugin takes: backend and its options."""
    virtual = request.node.get_closest_marker("virtual_time") is not None
    match request.param:
        case "asyncio":
            # Debug mode refuses calls from a thread that is not the loop's.
            options: dict[str, Any] = {"debug": True}
            return "asyncio", {**options, "loop_factory": VirtualTimeLoop} if virtual else options
        case "asyncio+uvloop":
            return "asyncio", {"use_uvloop": True}
        case _:
            clock = trio.testing.MockClock(autojump_threshold=0)
            return "trio", {"clock": clock} if virtual else {}


@pytest.fixture(scope="session", autouse=True)
def sources_stay_as_they_are() -> Iterator[None]:
    """Have nobody look on the disk whether a source has changed since it was read.

    In asyncio's debug mode that would be done for each file on the stack, whenever a task or a
    future is made: more work than all the tests on that loop.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linecache, "checkcache", lambda filename=None: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_blocking_calls() -> Iterator[None]:
    """Have any call of the package that blocks an asyncio loop raise `BlockingError`."""
    # `membound run` runs other people's programs, which may block as they like.
    watch = blockbuster.BlockBuster("membound_async", excluded_modules=["membound_async.cli"])
    for name, function in watch.functions.items():
        if name.startswith(("io.", "os.read", "os.stat")):
            function.can_block_predicate = _or_kernel_file(function.can_block_predicate)
    # A thread that is in the limiter has its lock for some microseconds; the loop waits.
    del watch.functions["threading.Lock.acquire"]
    watch.activate()
    yield
    watch.deactivate()


def _or_kernel_file(allowed: Callable[..., bool]) -> Callable[..., bool]:
    def predicate(file: Any, *args: Any, **kwargs: Any) -> bool:
        return allowed(file, *args, **kwargs) or _is_kernel_file(file)

    return predicate


def _is_kernel_file(file: IO[Any] | int | str | os.PathLike[str]) -> bool:
    """Tell whether a file is one of /proc or /sys: no disk, ready in microseconds."""
    if isinstance(file, (str, os.PathLike)):
        path = Path(file)
    else:
        descriptor = file if isinstance(file, int) else file.fileno()
        try:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
        except OSError:
            return False
    return path.parts[:2] in {("/", "proc"), ("/", "sys")}


@pytest.fixture
def group() -> Iterator[Any]:
    """Give an allocation group that nothing was charged to, while allocations are counted."""
    from tests.tracking import new_group

    with new_group("tests.mine") as made:
        yield made


@pytest.fixture
def other() -> Iterator[Any]:
    """Give another one."""
    from tests.tracking import new_group

    with new_group("tests.other") as made:
        yield made
