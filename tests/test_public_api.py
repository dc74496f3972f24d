"""The public names and their types: what mypy and pyright make of a user's program.

The type checkers read this file in CI; running it checks the same names at run time.
"""

from __future__ import annotations

from fractions import Fraction
from typing import assert_type

import membound_async
from membound_async import (
    Component,
    ComponentStatistics,
    LimiterStatistics,
    MemoryBoundsBuilder,
    MemoryGrant,
    MemoryLimit,
    MemoryLimiter,
    MemoryProbe,
    Reclaimer,
    ReclaimerStatistics,
    VerifiedBounds,
    current_component,
    current_limiter,
    grant,
    grant_nowait,
    testing,
)
from membound_async.testing import ScriptedProbe


async def shrink(wanted_bytes: int) -> int:
    return wanted_bytes


class Decoder(Component):
    def specify_bounds(self, b: MemoryBoundsBuilder) -> None:
        b.minimum.fixed("buffer", "1KiB")


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
    assert_type(testing.limiter("64MiB"), MemoryLimiter)
    assert_type(MemoryLimiter.noop(), MemoryLimiter)


def test_all_public_names_are_importable_and_documented() -> None:
    names = membound_async.__all__
    assert sorted(set(names)) == sorted(names, key=str)
    for name in names:
        assert getattr(membound_async, name).__doc__, name
