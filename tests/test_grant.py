"""Grants: their life, their sizes, their errors; who is asked when nobody is named."""

from __future__ import annotations

import pickle
from typing import Any

import anyio
import pytest
from structlog.testing import capture_logs

import membound_async
from membound_async import (
    Component,
    GrantReleased,
    GrantTooLarge,
    LimiterSettings,
    MemoryBoundsBuilder,
    MemoryGrant,
    NoCurrentLimiter,
    QuotaExceeded,
    UnknownComponent,
    current_component,
    grant,
    grant_nowait,
    testing,
)
from membound_async import limiter as limiter_module


async def test_a_grant_from_beginning_to_end() -> None:
    limiter = testing.limiter("1MiB")
    a = limiter.component("a")
    g = a.grant("64KiB")
    assert (g.size, g.released, g.component) == (0, False, a)
    assert "not asked for" in repr(g)
    async with g as same:
        assert same is g
        assert g.size == 65536
        assert repr(g) == "<MemoryGrant 'a': 65 536 bytes (64.0 KiB), held>"
        await g.grow(1000)
        assert g.size == 66536
        g.grow_nowait("1KiB")
        assert g.size == 67560
        g.shrink(560)
        assert g.size == 67000
        g.resize(70000)
        assert g.size == 70000
        g.resize("1KiB")
        assert g.size == 1024
        assert a.statistics().granted_bytes == 1024
        assert a.statistics().peak_granted_bytes == 70000
        assert a.statistics().grants == 1
    assert (g.size, g.released) == (0, True)
    g.release()
    assert a.statistics().granted_bytes == 0
    assert limiter.statistics().grants == 0


async def test_a_released_grant_refuses_everything() -> None:
    limiter = testing.limiter(1000)
    async with limiter.grant(1) as g:
        pass
    for operation in (
        lambda: g.shrink(0),
        lambda: g.grow_nowait(1),
        lambda: g.resize(1),
        g.__enter__,
    ):
        with pytest.raises(GrantReleased):
            operation()
    with pytest.raises(GrantReleased, match="grow"):
        await g.grow(1)
    with pytest.raises(GrantReleased, match="entering it again"):
        async with g:
            pass
    unused = limiter.grant(1)
    with pytest.raises(RuntimeError, match="not held yet"):
        unused.shrink(1)
    unused.release()
    with pytest.raises(GrantReleased):
        await unused


async def test_debug_mode_refuses_a_second_release() -> None:
    limiter = testing.limiter(1000, settings=LimiterSettings(debug=True))
    g = limiter.grant_nowait(1)
    g.release()
    with pytest.raises(GrantReleased, match="release"):
        g.release()
    async with limiter.grant(1) as g:
        pass


async def test_sizes_are_checked_and_nothing_changes() -> None:
    limiter = testing.limiter(1000)
    for impossible in (-1, "many", "-1", 2**53 + 1):
        with pytest.raises(ValueError, match="nbytes="):
            limiter.grant(impossible)
    no_sizes: list[Any] = [1.5, None, True, float("nan")]
    for no_size in no_sizes:
        with pytest.raises(TypeError, match="nbytes"):
            limiter.grant(no_size)
    with pytest.raises(ValueError, match="up_to=5 is below nbytes=10"):
        limiter.grant(10, up_to=5)
    no_times: list[Any] = [-1, float("nan"), float("inf"), "1"]
    for timeout in no_times:
        with pytest.raises(ValueError, match="timeout"):
            limiter.grant(1, timeout=timeout)
    with pytest.raises(ValueError, match="oversize='perhaps'"):
        limiter.grant(1, oversize="perhaps")  # type: ignore[arg-type]
    async with limiter.grant(10) as g:
        with pytest.raises(ValueError, match="cannot shrink a grant of 10 bytes by 11 bytes"):
            g.shrink(11)
        with pytest.raises(ValueError, match="nbytes=-1"):
            await g.grow(-1)
        with pytest.raises(QuotaExceeded):
            async with limiter.component("b").grant(495):
                g.grow_nowait(400)
        assert g.size == 10
    assert limiter.statistics().free_bytes == 1000


async def test_an_empty_grant_is_a_grant() -> None:
    limiter = testing.limiter(1000)
    async with limiter.grant(0) as g:
        assert g.size == 0
        await g.grow(10)
        assert g.size == 10


@pytest.mark.virtual_time
async def test_one_task_at_a_time() -> None:
    limiter = testing.limiter(1000)
    held = await limiter.component("held").grant(500)
    g = limiter.component("a").grant(300)
    async with anyio.create_task_group() as tasks:

        async def enter() -> None:
            async with g:
                await g.grow(200)

        tasks.start_soon(enter)
        await anyio.sleep(1)
        with pytest.raises(RuntimeError, match="another task is asking"):
            await g
        held.shrink(340)
        await anyio.sleep(1)
        assert g.size == 300
        with pytest.raises(RuntimeError, match="waiting to change"):
            g.grow_nowait(1)
        held.release()
    assert g.released


@pytest.mark.virtual_time
async def test_released_while_it_waits_to_grow() -> None:
    limiter = testing.limiter(1000)
    held = await limiter.component("held").grant(400)
    g = await limiter.component("a").grant(300)
    outcome: list[BaseException] = []

    async def grow() -> None:
        try:
            await g.grow(150)
        except GrantReleased as error:
            outcome.append(error)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(grow)
        await anyio.sleep(1)
        g.release()
        held.release()
    assert len(outcome) == 1
    assert limiter.statistics().free_bytes == 1000


async def test_a_failed_request_may_be_made_again() -> None:
    limiter = testing.limiter(1000)
    g = limiter.component("b").grant(300, timeout=0)
    async with limiter.component("a").grant(500):
        with pytest.raises(TimeoutError):
            await g
    async with g:
        assert g.size == 300


async def test_a_grant_that_is_dropped_is_given_back_and_warned_about() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    with capture_logs() as logs:
        with pytest.warns(ResourceWarning, match="'a': 100 bytes, held"):
            await a.grant(100)
        await anyio.sleep(0.01)
    assert limiter.statistics().free_bytes == 1000
    assert logs[0] == {
        "event": "membound.grant_leaked",
        "log_level": "warning",
        "component": "a",
        "granted_bytes": 100,
    }
    a.grant(1)  # never asked for: nothing to say


@pytest.mark.virtual_time
@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_who_waits_for_what_a_dropped_grant_holds_goes_on() -> None:
    limiter = testing.limiter(1000)

    async def wait(component: Component) -> None:
        async with component.grant(300):
            pass

    dropped = [await limiter.component("a").grant(500)]
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait, limiter.component("b"))
            await anyio.sleep(1)
            assert limiter.statistics().waiting == 1
            dropped.clear()
    assert limiter.statistics().waiting == 0


def test_a_grant_that_is_dropped_without_a_loop() -> None:
    limiter = testing.limiter(1000)
    with pytest.warns(ResourceWarning):
        limiter.grant_nowait(100)
    assert limiter.statistics().free_bytes == 1000
    with pytest.warns(ResourceWarning):
        limiter.grant_nowait(100)
    with limiter.grant(500):
        pass


# --- who is asked


@pytest.fixture
def fresh_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limiter_module, "_warned_of_nobody", False)


async def use() -> MemoryGrant:
    async with grant(100) as g:
        return g


@pytest.mark.usefixtures("fresh_warning")
async def test_with_no_limiter_a_grant_limits_nothing_and_warns_once() -> None:
    with capture_logs() as logs:
        for _ in range(3):
            assert (await use()).released
        grant_nowait("1TiB").release()
        grant_nowait(1, component="anything").release()
        async with Component("decode") as decode, decode.grant("4TiB"):
            assert current_component() is decode
            async with grant(5), decode.component("cache") as cache:
                assert cache.path == "decode.cache"
        assert current_component() is None
    assert [entry["event"] for entry in logs] == ["membound.no_limiter"]


async def test_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMBOUND_REQUIRED", "1")
    with pytest.raises(NoCurrentLimiter, match="MEMBOUND_REQUIRED"):
        await use()
    async with testing.limiter(1000):
        await use()


async def test_lookup_the_context_before_the_process() -> None:
    outer, inner = testing.limiter(1000), testing.limiter(1000)
    async with outer:
        assert (await use()).component is outer.root
        async with inner:
            assert (await use()).component is inner.root
            a, b = inner.component("a"), outer.component("b")
            async with a:
                assert (await use()).component is a
                async with a.component("part") as part:
                    assert part.path == "a.part"
                    assert (await use()).component is part
                assert (await use()).component is a
                # Of another limiter, the context says nothing.
                async with outer.grant(1) as g:
                    assert g.component is outer.root
                async with inner.grant(1) as g:
                    assert g.component is a
                async with grant(1, component=b) as g:
                    assert g.component is b
                async with grant(1, component="a.part") as g:
                    assert g.component is part
                with pytest.raises(UnknownComponent, match=r"'a', 'a\.part'"):
                    grant(1, component="x")
        assert (await use()).component is outer.root
    assert membound_async.current_limiter().is_noop


async def test_lookup_the_only_one_of_the_process() -> None:
    """As in a web server, whose handlers do not run in the lifespan's context."""
    import contextvars

    first, second = testing.limiter(1000), testing.limiter(1000)
    elsewhere = contextvars.Context()
    async with first:
        assert elsewhere.run(membound_async.current_limiter) is first
        second.install()
        assert elsewhere.run(membound_async.current_limiter) is first
        async with second:
            with pytest.raises(NoCurrentLimiter, match="2 limiters"):
                elsewhere.run(membound_async.current_limiter)
            assert membound_async.current_limiter() is second
    assert elsewhere.run(membound_async.current_limiter) is second
    second.uninstall()
    second.uninstall()
    assert elsewhere.run(membound_async.current_limiter).is_noop


async def test_tasks_and_threads_belong_to_the_component_they_were_started_in() -> None:
    limiter = testing.limiter(1000)
    seen: list[Any] = []

    async def look() -> None:
        seen.append(current_component())

    async with limiter.component("a") as a, anyio.create_task_group() as tasks:
        tasks.start_soon(look)
        seen.append(await anyio.to_thread.run_sync(current_component))
    assert seen == [a, a]


class Decoder(Component):
    def __init__(self, path: str, batch: int) -> None:
        super().__init__(path)
        self.batch = batch

    def specify_bounds(self, b: MemoryBoundsBuilder) -> None:
        b.minimum.fixed("input buffer", 100)
        b.firm.array("batch", count=self.batch, each=10)
        b.subcomponent("cache").firm.config("cache_bytes", 50)


async def test_a_component_of_a_subclass() -> None:
    limiter = testing.limiter(1000)
    decoder = limiter.add(Decoder("decode", 20))
    assert limiter.add(decoder) is decoder
    assert limiter.component("decode") is decoder
    assert decoder.statistics().minimum_bytes == 100
    assert decoder.statistics().firm_limit_bytes == 300
    cache = limiter.find("decode.cache")
    assert cache.statistics().firm_limit_bytes == 50
    with pytest.raises(GrantTooLarge):
        await cache.grant(51)
    async with decoder, decoder.grant(300):
        assert limiter.statistics().free_bytes == 700
    with pytest.raises(membound_async.LimitError, match="another limiter"):
        testing.limiter(1000).add(decoder)
    with pytest.raises(membound_async.InvalidComponentBounds):
        limiter.add(Decoder("decode", 21))


async def test_a_component_finds_its_limiter_when_it_is_used() -> None:
    decoder = Decoder("decode", 20)
    for _ in range(2):  # and again in another limiter
        async with testing.limiter(1000) as limiter:
            async with decoder:
                assert limiter.find("decode") is decoder
                assert limiter.statistics().free_bytes == 900
            async with decoder.grant(5) as g:
                assert g.component is decoder
            decoder.grant_nowait(5).release()
        assert decoder._limiter is None
    assert "decode" in repr(decoder)


async def test_two_handles_of_one_path_are_one_component() -> None:
    async with testing.limiter(1000) as limiter:
        first, second = Component("a"), Component("a")
        async with first, second, first.grant(10), second.grant(20):
            assert limiter.find("a").statistics().granted_bytes == 30
            assert limiter.find("a").statistics().entered == 2


async def test_left_in_another_context() -> None:
    """As CPython does with a component entered in an async generator."""
    limiter = testing.limiter(1000)
    a = limiter.component("a")
    import contextvars

    async def enter() -> None:
        await a.__aenter__()

    coroutine = enter()
    with pytest.raises(StopIteration):
        contextvars.copy_context().run(coroutine.send, None)
    assert current_component() is None
    await a.__aexit__(None, None, None)
    assert a.statistics().entered == 0
    assert limiter.statistics().free_bytes == 1000


def test_errors_pickle_and_carry_their_numbers() -> None:
    limiter = testing.limiter(1000)
    with limiter.component("a").grant_nowait(500), pytest.raises(QuotaExceeded) as caught:
        limiter.grant_nowait(251)
    assert caught.value.available_bytes == 250
    error = pickle.loads(pickle.dumps(caught.value))
    assert type(error) is type(caught.value)
    assert str(error) == str(caught.value)
    assert vars(error) == vars(caught.value)
