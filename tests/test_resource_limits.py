"""Limits of several resources, of a limiter and of components; and what makes no sense."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from membound_async import (
    GrantTooLarge,
    InvalidComponentBounds,
    InvalidLimit,
    Polynomial,
    QuotaExceeded,
    ResourceLimits,
    testing,
)


def test_limits_are_a_mapping_that_cannot_be_changed() -> None:
    limits = ResourceLimits("64KiB", messages=1000, fds=0)
    assert dict(limits) == {"bytes": 65536, "messages": 1000, "fds": 0}
    assert (limits.others, len(limits)) == ({"messages": 1000, "fds": 0}, 3)
    assert repr(limits) == "ResourceLimits(bytes=65536, messages=1000, fds=0)"
    assert limits == ResourceLimits(65536, fds=0, messages=1000)
    assert pickle.loads(pickle.dumps(limits)) == limits
    limits.others["fds"] = 7
    assert limits["fds"] == 0
    with pytest.raises(TypeError):
        limits["fds"] = 7  # type: ignore[index]
    assert "bytes" not in ResourceLimits(fds=1)
    with pytest.raises(KeyError):
        ResourceLimits(fds=1)["bytes"]


def test_the_limits_of_bus1() -> None:
    assert dict(ResourceLimits.bus1()) == {
        "bytes": 16 * 2**20,
        "slices": 16384,
        "handles": 65536,
        "fds": 4096,
    }


def test_limits_that_make_no_sense() -> None:
    no_limits: list[Any] = [-1, 1.5, True, "3", None, 2**53 + 1]
    for limit in no_limits:
        with pytest.raises(InvalidLimit, match=r"fds=.* makes no sense: a limit is a whole number"):
            ResourceLimits(fds=limit)
    with pytest.raises(InvalidLimit, match="that of bytes comes first, without a name"):
        ResourceLimits(bytes=5)
    for nbytes in (-1, "many"):
        with pytest.raises(InvalidLimit, match="bytes="):
            ResourceLimits(nbytes)
    with pytest.raises(InvalidLimit, match="leave them out of resources="):
        testing.limiter(1000, resources=ResourceLimits(5, fds=3))


async def test_each_resource_of_a_limiter_is_divided_by_the_same_rule() -> None:
    limiter = testing.limiter(1000, resources=ResourceLimits(fds=80))
    a, b = limiter.component("a"), limiter.component("b")
    with a.grant_nowait(0, also={"fds": 40}):
        with pytest.raises(QuotaExceeded) as caught:
            b.grant_nowait(1, also={"fds": 21})
        assert (caught.value.resource, caught.value.available_bytes) == ("fds", 20)
        assert "wanted 21 fds, but may have 20 fds now" in str(caught.value)
        with b.grant_nowait(500, also={"fds": 20}):
            assert limiter._ledger.pools["fds"].free == 20
    with pytest.raises(GrantTooLarge, match="wanted 41 fds, but can have 40 fds at the most"):
        b.grant_nowait(1, also={"fds": 41})
    assert (limiter._ledger.pools["fds"].free, limiter.statistics().free_bytes) == (80, 1000)


async def test_the_other_rule_of_bus1() -> None:
    limiter = testing.limiter(1200, share=Polynomial(), resources=ResourceLimits(fds=12))
    a, b, c = (limiter.component(name) for name in "abc")
    with a.grant_nowait(600, also={"fds": 6}):  # a half, then a third of the rest, a quarter
        with pytest.raises(QuotaExceeded) as caught:
            b.grant_nowait(201)
        assert caught.value.available_bytes == 200
        with b.grant_nowait(200, also={"fds": 2}):
            with pytest.raises(QuotaExceeded) as caught:
                c.grant_nowait(1, also={"fds": 2})
            assert (caught.value.resource, caught.value.available_bytes) == ("fds", 1)
            with c.grant_nowait(100, also={"fds": 1}):
                assert limiter.statistics().free_bytes == 300


async def test_a_component_has_limits_of_its_own() -> None:
    limiter = testing.limiter(1000, resources=ResourceLimits(fds=100))
    limits = ResourceLimits(200, fds=5, tickets=3)
    a = limiter.component("a", 50, limits=limits)
    assert limiter.component("a", 50, limits=limits) is a
    assert a.statistics().firm_limit_bytes == 200
    with a.grant_nowait(200, also={"fds": 5, "tickets": 3}) as g:
        for amounts in ({"fds": 1}, {"tickets": 1}):
            with pytest.raises(QuotaExceeded, match="its firm limit"):
                a.grant_nowait(0, also=amounts)
        assert limiter._ledger.pools["fds"].free == 95
        g.shrink(100)
    for nbytes, amounts in ((201, {}), (0, {"fds": 6}), (0, {"tickets": 4})):
        with pytest.raises(GrantTooLarge, match="its firm limit"):
            await a.grant(nbytes, also=amounts)
    with pytest.raises(ValueError, match=r"nothing limits 'tickets' of 'b' \(limited: fds\)"):
        limiter.grant(1, component=limiter.component("b"), also={"tickets": 1})


def test_a_component_cannot_have_two_limits() -> None:
    limiter = testing.limiter(1000)
    a = limiter.component("a", limits=ResourceLimits(200, fds=5))
    with pytest.raises(InvalidComponentBounds, match="firm_limit= and the bytes of limits= are"):
        limiter.component("b", firm_limit=3, limits=ResourceLimits(3))
    for limits in (ResourceLimits(100, fds=5), ResourceLimits(200, fds=6)):
        with pytest.raises(InvalidComponentBounds, match="'a'"):
            limiter.component("a", limits=limits)
        assert (a._account.firm_limit, a._account.others["fds"].firm_limit) == (200, 5)
    limiter.component("a", limits=ResourceLimits(200, fds=5, tickets=2))
    assert a._account.others["tickets"].firm_limit == 2
