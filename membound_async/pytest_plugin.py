"""Fixtures and markers for pytest, for those who ask for them.

In ``conftest.py``::

    pytest_plugins = ["membound_async.pytest_plugin"]

- The fixture `memory_limiter` is a ``testing.limiter()``, installed for the test, which fails if
  grants are out at its end. `memory_probe` is its probe.
- ``@pytest.mark.memory_limit("64MiB", ...)`` says what ``testing.limiter()`` it is.
- ``@pytest.mark.virtual_time`` has a test that anyio's plugin runs (``@pytest.mark.anyio``) run
  on virtual time: on asyncio, or on the backends that are named,
  ``@pytest.mark.virtual_time("asyncio", "trio")``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .hooks import Event, GrantLeaked
from .limiter import MemoryLimiter
from .probes import MemoryProbe
from .sizes import human_size
from .testing import limiter, virtual_time

__all__ = ["memory_limiter", "memory_probe"]


def pytest_configure(config: pytest.Config) -> None:
    """Tell pytest of the markers."""
    for line in (
        "memory_limit(limit, **options): what testing.limiter() the fixture memory_limiter is",
        "virtual_time(*backends): run on a clock that waits for nobody, on asyncio or on these",
    ):
        config.addinivalue_line("markers", line)


@pytest.hookimpl(tryfirst=True)  # before the backends that anyio's fixture has itself
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests that are marked so on virtual time."""
    mark = metafunc.definition.get_closest_marker("virtual_time")
    if mark is None:
        return
    if "anyio_backend" not in metafunc.fixturenames:
        pytest.fail(
            f"{metafunc.definition.nodeid}: virtual_time is for tests that anyio's plugin runs; "
            "mark it with @pytest.mark.anyio, too",
            pytrace=False,
        )
    backends = mark.args or ("asyncio",)
    loops = [*map(virtual_time, backends)]
    metafunc.definition.add_marker(pytest.mark.parametrize("anyio_backend", loops, ids=backends))


def pytest_itemcollected(item: pytest.Item) -> None:
    """Give each test on virtual time a clock of its own: trio's does not go back to 0."""
    parameters = getattr(item, "callspec", None)
    if parameters is not None and item.get_closest_marker("virtual_time") is not None:
        backend, _ = parameters.params["anyio_backend"]
        parameters.params["anyio_backend"] = virtual_time(backend)


@pytest.fixture
def memory_limiter(request: pytest.FixtureRequest) -> Iterator[MemoryLimiter]:
    """A limiter with round numbers, which code in the test finds by itself.

    64 MiB, or what ``@pytest.mark.memory_limit`` says. At the end all grants must have been
    released.
    """
    mark = request.node.get_closest_marker("memory_limit")
    made = limiter() if mark is None else limiter(*mark.args, **mark.kwargs)
    leaked: list[GrantLeaked] = []

    def note(event: Event) -> None:
        if isinstance(event, GrantLeaked):
            leaked.append(event)

    made.install()
    with made.add_hook(note):
        yield made
        made.statistics()  # has what was dropped given back
    held = made.held_grants()
    made.uninstall()
    found = [
        f"{one.component!r} {human_size(one.size_bytes)} for {one.age_seconds:.2f} s"
        for one in held
    ]
    found += [
        f"{one.component!r} {human_size(one.granted_bytes)}, dropped without release"
        for one in leaked
    ]
    if found:
        pytest.fail(f"grants that were never released: {', '.join(found)}", pytrace=False)


@pytest.fixture
def memory_probe(memory_limiter: MemoryLimiter) -> MemoryProbe:
    """The probe of `memory_limiter`: a ``ScriptedProbe``, unless the marker gives another."""
    return memory_limiter._gauge.probe
