"""The public names and their types: what mypy and pyright make of a user's program.

The type checkers read this file in CI; running it checks the same names at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import assert_type

import membound_async
from membound_async import (
    Account,
    AccountUsage,
    Component,
    ComponentStatistics,
    HeldGrant,
    Inbox,
    InboxStatistics,
    LimiterStatistics,
    MemoryBoundsBuilder,
    MemoryGrant,
    MemoryLimit,
    MemoryLimiter,
    MemoryProbe,
    Polynomial,
    Received,
    Reclaimer,
    ReclaimerStatistics,
    ResourceLimits,
    VerifiedBounds,
    WaitingRequest,
    current_component,
    current_limiter,
    grant,
    grant_nowait,
    testing,
)
from membound_async.testing import BoundedReport, FakeMemory, ScriptedProbe


async def shrink(wanted_bytes: int) -> int:
    return wanted_bytes


class Decoder(Component):
    def specify_bounds(self, b: MemoryBoundsBuilder) -> None:
        b.minimum.fixed("buffer", "1KiB")


def bus1_others() -> ResourceLimits:
    return ResourceLimits(None, **ResourceLimits.bus1().others)


async def test_types_of_what_a_program_uses() -> None:
    probe: MemoryProbe = ScriptedProbe(0)
    async with MemoryLimiter(
        "1MiB", slop_factor=0, share=Fraction(1, 2), baseline=0, probe=probe
    ) as limiter:
        assert_type(limiter, MemoryLimiter)
        assert_type(limiter.limit, MemoryLimit)
        assert_type(limiter.verify(), VerifiedBounds)
        assert_type(limiter.component("a", minimum="1KiB", firm_limit=4096), Component)
        assert_type(limiter.statistics(), LimiterStatistics)
        assert_type(limiter.statistics().components[0], ComponentStatistics)
        assert_type(limiter.statistics().reclaimers[0], ReclaimerStatistics)
        assert_type(limiter.held_grants(10), list[HeldGrant])
        assert_type(limiter.waiting_requests(10), list[WaitingRequest])
        with limiter.add_reclaimer(shrink, priority=1) as reclaimer:
            assert_type(reclaimer, Reclaimer)
        limiter.add_reclaimer(lambda wanted_bytes: wanted_bytes, name="cache").remove()
        async with Decoder("decode") as decoder:
            assert_type(decoder, Decoder)
            assert_type(decoder.grant(1), MemoryGrant)
            assert_type(current_component(), Component | None)
            async with decoder.grant("1KiB", up_to=2048, timeout=1.0) as held:
                assert_type(held, MemoryGrant)
                assert_type(held.size, int)
                assert_type(await held.grow(1), None)
            async with grant(1) as of_context:
                assert_type(of_context, MemoryGrant)
            with grant_nowait(1) as at_once:
                assert_type(at_once, MemoryGrant)
            handed_on = await limiter.grant(1, oversize="alone")
            assert_type(handed_on, MemoryGrant)
            handed_on.release()
        assert_type(current_limiter(), MemoryLimiter)
    bus1 = ResourceLimits.bus1()
    assert_type(bus1, ResourceLimits)
    async with MemoryLimiter(
        "64MiB", slop_factor=0, baseline=0, probe=probe, share=Polynomial(), resources=bus1_others()
    ) as limiter:
        peer = limiter.account("peer", bus1)
        assert_type(peer, Account)
        assert_type(peer.usage(), dict[str, AccountUsage])
        receiver = peer.component("receiver")
        assert_type(receiver, Component)
        assert_type(limiter.component("other", limits=bus1), Component)
        async with Inbox[bytes](receiver, overflow="drop_oldest") as inbox:
            await inbox.send(b"abc", sender="x", bytes=100, handles=2, fds=1)
            inbox.send_nowait(b"abc", sender=receiver)
            assert_type(inbox.statistics(), InboxStatistics)
            received = await inbox.receive()
            assert_type(received, Received[bytes])
            assert_type(received.message, bytes)
            assert_type(received.grant, MemoryGrant)
            received.release()
            with inbox.receive_nowait() as second:
                assert_type(second, Received[bytes])
            with inbox.send_stream("y") as send, inbox.receive_stream() as receive:
                await send.send(b"def")
                assert_type(await receive.receive(), bytes)
        async with receiver.grant(100, sender="x", also={"fds": 1}) as in_flight:
            in_flight.deliver({"fds": 0})
            assert_type(in_flight.also, Mapping[str, int])
            assert_type(in_flight.split(10), MemoryGrant).release()
            assert_type(await in_flight.transfer("other"), None)
            in_flight.transfer_nowait(receiver)
            assert_type(in_flight.share(), MemoryGrant).release()
    assert_type(testing.limiter("64MiB"), MemoryLimiter)
    async with testing.watch_bounded(testing.limiter("1MiB", probe=FakeMemory())) as watch:
        assert_type(watch, testing.Watch)
        async with watch.limiter.grant(1):
            pass
    assert_type(watch.report, BoundedReport)
    assert_type(watch.report.peak, testing.MemoryUsage)
    assert_type(MemoryLimiter.noop(), MemoryLimiter)


def test_all_public_names_are_importable_and_documented() -> None:
    for module in (membound_async, testing):
        names = module.__all__
        assert sorted(set(names)) == sorted(names, key=str)
        for name in names:
            assert getattr(module, name).__doc__, name
