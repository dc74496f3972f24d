"""Advice: what is proposed is never less than what was seen, and says why."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from membound_async import ComponentStatistics, LimiterStatistics, testing
from membound_async.advice import (
    HEADROOM,
    MORE,
    SMALLEST_BYTES,
    Advice,
    ComponentAdvice,
    advise,
    handsome_size,
    time_in_words,
)
from membound_async.verifier import effective_limit_bytes

KIB, MIB, GIB = 2**10, 2**20, 2**30

with testing.limiter("1GiB").grant_nowait(1):
    EMPTY = testing.limiter("1GiB").statistics()
NOTHING: dict[str, Any] = {
    field.name: 0
    for field in fields(ComponentStatistics)
    if field.name not in {"path", "firm_limit_bytes", "resources"}
}
NOBODY = replace(EMPTY.components[0], **NOTHING)


def component(path: str = "decode", **numbers: Any) -> ComponentStatistics:
    return replace(NOBODY, path=path, **{"admissions": 1000, **numbers})


def limiter(*components: ComponentStatistics, **numbers: Any) -> LimiterStatistics:
    usual = {
        "age_seconds": 2400.0,
        "limit_bytes": GIB,
        "slop_factor": 0.15,
        "effective_limit_bytes": effective_limit_bytes(GIB, 0.15),
        "baseline_bytes": 40 * MIB,
        "peak_measured_bytes": 700 * MIB,
    }
    return replace(EMPTY, components=components, **{**usual, **numbers})


def advice_for(**numbers: Any) -> ComponentAdvice:
    seconds = {"age_seconds": numbers.pop("age_seconds")} if "age_seconds" in numbers else {}
    (advice,) = advise(limiter(component(**numbers), **seconds)).components
    return advice


# --- the rules, one by one


def test_a_firm_limit_far_above_the_peak_is_lowered() -> None:
    advice = advice_for(peak_granted_bytes=61 * MIB, firm_limit_bytes=256 * MIB)
    assert advice.verdict == "change"
    assert advice.proposed_firm_limit_bytes == 80 * MIB
    assert advice.proposed_minimum_bytes == 0
    assert advice.reason == (
        "granted peak 61.0 MiB of firm 256 MiB in 40 min, never waited: firm 80 MiB would do"
    )


def test_a_firm_limit_that_is_about_right_is_kept() -> None:
    advice = advice_for(peak_granted_bytes=61 * MIB, firm_limit_bytes=120 * MIB)
    assert (advice.verdict, advice.proposed_firm_limit_bytes) == ("keep", 120 * MIB)
    assert advice.reason.endswith("in 40 min, never waited: stays as it is")
    advice = advice_for(peak_granted_bytes=61 * MIB, firm_limit_bytes=120 * MIB + 1)
    assert (advice.verdict, advice.proposed_firm_limit_bytes) == ("change", 80 * MIB)


@pytest.mark.parametrize("numbers", [{"age_seconds": 59.9}, {"admissions": 19}])
def test_of_a_short_run_or_few_requests_nothing_is_said(numbers: dict[str, Any]) -> None:
    declared = {"peak_granted_bytes": MIB, "firm_limit_bytes": GIB, "minimum_bytes": 512 * MIB}
    advice = advice_for(**declared, **numbers)
    assert advice.verdict == "too little seen"
    assert advice.reason.endswith(": too little seen")
    proposed = (advice.proposed_minimum_bytes, advice.proposed_firm_limit_bytes)
    assert proposed == (512 * MIB, GIB)
    enough = {name: {"age_seconds": 60.0, "admissions": 20}[name] for name in numbers}
    assert advice_for(**declared, **enough).verdict == "change"


@pytest.mark.parametrize(
    "trouble",
    [
        {"total_wait_seconds": 121.0},
        {"oldest_wait_seconds": 121.0},
        {"would_wait_seconds": 121.0, "would_wait": 3},
        {"refusals": 11},
    ],
)
def test_who_is_held_up_at_its_firm_limit_gets_a_higher_one(trouble: dict[str, Any]) -> None:
    advice = advice_for(peak_granted_bytes=60 * MIB, firm_limit_bytes=64 * MIB, **trouble)
    assert advice.proposed_firm_limit_bytes == 96 * MIB
    assert advice.reason.endswith("its firm limit holds it up, firm 96 MiB would let it through")


def test_who_waits_a_little_is_not_held_up() -> None:
    advice = advice_for(
        peak_granted_bytes=60 * MIB,
        firm_limit_bytes=64 * MIB,
        total_wait_seconds=119.0,
        refusals=10,
    )
    assert advice.verdict == "keep"
    assert advice.reason == (
        "granted peak 60.0 MiB of firm 64 MiB in 40 min, waited 2 min in all, 10 of 1 010 "
        "refused: stays as it is"
    )


def test_who_is_held_up_below_its_firm_limit_gets_a_higher_minimum() -> None:
    numbers = {
        "peak_granted_bytes": 60 * MIB,
        "firm_limit_bytes": 256 * MIB,
        "total_wait_seconds": 1200.0,
    }
    advice = advice_for(**numbers)
    assert advice.proposed_minimum_bytes == 30 * MIB
    assert advice.proposed_firm_limit_bytes == 256 * MIB
    assert advice.reason == (
        "granted peak 60.0 MiB of firm 256 MiB in 40 min, waited 20 min in all: the pool holds "
        "it up, minimum 30 MiB would keep it going"
    )
    advice = advice_for(**numbers, minimum_bytes=30 * MIB)
    assert advice.proposed_minimum_bytes == 30 * MIB
    assert advice.reason.endswith("the pool holds it up, not its own bounds: the limit is short")


def test_a_minimum_far_above_what_was_used_is_lowered() -> None:
    advice = advice_for(peak_granted_bytes=10 * MIB, minimum_bytes=64 * MIB)
    assert advice.proposed_minimum_bytes == 13 * MIB
    assert advice.proposed_firm_limit_bytes is None
    assert advice.reason == (
        "granted peak 10.0 MiB, minimum 64 MiB in 40 min, never waited: minimum 13 MiB would do"
    )


def test_a_firm_limit_is_not_lowered_below_the_minimum() -> None:
    advice = advice_for(peak_granted_bytes=10 * MIB, minimum_bytes=19 * MIB, firm_limit_bytes=GIB)
    assert advice.proposed_minimum_bytes == advice.proposed_firm_limit_bytes == 19 * MIB


def test_who_declares_nothing_gets_both() -> None:
    advice = advice_for(peak_granted_bytes=40 * MIB)
    assert advice.proposed_minimum_bytes == 10 * MIB
    assert advice.proposed_firm_limit_bytes == 52 * MIB
    assert advice.reason.endswith("declares nothing, minimum 10 MiB and firm 52 MiB would do")


def test_grants_that_are_too_small_get_a_factor() -> None:
    advice = advice_for(
        peak_granted_bytes=20 * MIB,
        firm_limit_bytes=64 * MIB,
        peak_live_bytes=49 * MIB,
        peak_overdraft_bytes=29 * MIB,
    )
    assert advice.grant_factor == 2.5
    assert advice.proposed_firm_limit_bytes == 64 * MIB
    assert advice.reason == (
        "granted peak 20.0 MiB of firm 64 MiB in 40 min, live peak 49.0 MiB, never waited: "
        "its grants are too small, ask for 2.5 times as much"
    )


def test_what_lives_beyond_the_firm_limit_raises_it() -> None:
    advice = advice_for(
        peak_granted_bytes=20 * MIB,
        firm_limit_bytes=32 * MIB,
        peak_live_bytes=40 * MIB,
        peak_overdraft_bytes=20 * MIB,
    )
    assert (advice.grant_factor, advice.proposed_firm_limit_bytes) == (2.0, 52 * MIB)
    assert advice.reason.endswith("ask for 2 times as much; needs firm 52 MiB")


def test_memory_that_outlives_its_grants_is_named() -> None:
    advice = advice_for(
        peak_granted_bytes=60 * MIB,
        firm_limit_bytes=64 * MIB,
        peak_live_bytes=50 * MIB,
        peak_overdraft_bytes=40 * MIB,
    )
    assert advice.grant_factor is None
    assert advice.reason.endswith("keeps memory when its grants are released: hold them for longer")


def test_small_overdrafts_are_nobody_s_concern() -> None:
    for granted, overdraft in ((100, MIB), (100 * MIB, 25 * MIB)):
        advice = advice_for(
            peak_granted_bytes=granted,
            firm_limit_bytes=128 * MIB,
            total_wait_seconds=0.0,
            peak_live_bytes=granted,
            peak_overdraft_bytes=overdraft,
        )
        assert advice.grant_factor is None
        assert "released" not in advice.reason


def test_who_never_asks_but_holds_memory_is_told_to_declare_it() -> None:
    advice = advice_for(admissions=0, peak_live_bytes=40 * MIB, peak_overdraft_bytes=40 * MIB)
    assert advice.proposed_firm_limit_bytes == 52 * MIB
    assert advice.reason == (
        "granted peak 0 B in 40 min, live peak 40.0 MiB, never asked: 40.0 MiB live without a "
        "grant; declares nothing, minimum 10 MiB and firm 52 MiB would do"
    )


def test_root_is_told_to_make_components_and_to_declare_nothing() -> None:
    advice = advice_for(path="root", peak_live_bytes=40 * MIB, peak_overdraft_bytes=40 * MIB)
    assert (advice.proposed_minimum_bytes, advice.proposed_firm_limit_bytes) == (0, None)
    assert advice.reason.endswith("give what allocates so much a component, or grants")
    assert advice_for(path="root", peak_granted_bytes=40 * MIB).verdict == "keep"


# --- the limiter


def test_a_peak_above_the_effective_limit_proposes_a_limit() -> None:
    advice = advise(limiter(peak_measured_bytes=900 * MIB))
    assert advice.proposed_limit_bytes == 1408 * MIB
    assert advice.notes == (
        "measured peak 900.0 MiB of 870.4 MiB effective: a limit of 1.375 GiB would leave room",
    )
    assert advise(limiter(peak_measured_bytes=900 * MIB, age_seconds=59.0)).notes == ()


def test_a_limit_that_nobody_needs_is_lowered() -> None:
    used = component(peak_granted_bytes=10 * MIB, firm_limit_bytes=16 * MIB)
    advice = advise(limiter(used, peak_measured_bytes=80 * MIB))
    assert advice.proposed_limit_bytes == 128 * MIB
    (note,) = advice.notes
    assert note == (
        "measured peak 80.0 MiB of 870.4 MiB effective, and nobody waited: a limit of 128 MiB "
        "would do"
    )
    for other in (replace(used, total_wait_seconds=0.1), replace(used, refusals=1)):
        assert advise(limiter(other, peak_measured_bytes=80 * MIB)).notes == ()
    assert advise(limiter(peak_measured_bytes=80 * MIB)).notes == ()  # nothing was asked of it
    few = replace(used, admissions=3)
    assert advise(limiter(few, peak_measured_bytes=80 * MIB)).notes == ()


def test_what_is_proposed_and_does_not_fit_is_said() -> None:
    one = component("a", peak_granted_bytes=500 * MIB, minimum_bytes=500 * MIB)
    other = replace(one, path="b")
    advice = advise(limiter(one, other))
    assert advice.proposed_minimums_bytes == 1000 * MIB
    assert advice.available_bytes == effective_limit_bytes(GIB, 0.15) - 40 * MIB
    assert advice.proposed_limit_bytes == 1280 * MIB
    (note,) = advice.notes
    assert note == (
        "the minimums add up to 1000.0 MiB, but the limit leaves 830.4 MiB: they need a limit of "
        "1.25 GiB"
    )
    one = component("a", peak_granted_bytes=500 * MIB, firm_limit_bytes=600 * MIB)
    advice = advise(limiter(one, replace(one, path="b")))
    assert advice.proposed_limit_bytes is None
    (note,) = advice.notes
    assert note == (
        "the firm limits add up to 1.2 GiB, but the limit leaves 830.4 MiB: together they need "
        "overcommit 1.5, or a limit of 1.5 GiB"
    )


def test_drift_is_named() -> None:
    assert "drift 100.0 MiB" in advise(limiter(drift_bytes=100 * MIB)).notes[0]
    assert advise(limiter(drift_bytes=80 * MIB)).notes == ()


# --- what always holds

sizes = st.one_of(st.integers(0, 4 * GIB), st.sampled_from([0, 1, 64 * KIB, MIB, GIB]))
times = st.floats(0, 1e6)
counts = st.integers(0, 10**6)


@st.composite
def components_of(draw: st.DrawFn, path: str) -> ComponentStatistics:
    minimum = draw(sizes)
    return component(
        path,
        minimum_bytes=minimum,
        firm_limit_bytes=draw(st.none() | sizes.map(lambda more: minimum + more)),
        peak_granted_bytes=draw(sizes),
        peak_live_bytes=draw(sizes),
        peak_overdraft_bytes=draw(sizes),
        admissions=draw(counts),
        refusals=draw(counts),
        total_wait_seconds=draw(times),
    )


@st.composite
def limiters(draw: st.DrawFn) -> LimiterStatistics:
    paths = [*draw(st.lists(st.sampled_from("abcdefg"), unique=True)), "root"]
    limit = draw(st.integers(GIB, 64 * GIB))
    slop = draw(st.sampled_from([0.0, 0.15, 0.5]))
    return limiter(
        *[draw(components_of(path)) for path in sorted(paths)],
        limit_bytes=limit,
        slop_factor=slop,
        effective_limit_bytes=effective_limit_bytes(limit, slop),
        age_seconds=draw(times),
        peak_measured_bytes=draw(sizes),
        drift_bytes=draw(sizes),
    )


@given(limiters())
def test_proposals_make_sense(numbers: LimiterStatistics) -> None:
    advice = advise(numbers)
    assert sorted(one.path for one in advice.components) == [one.path for one in numbers.components]
    for one in advice.components:
        minimum, firm = one.proposed_minimum_bytes, one.proposed_firm_limit_bytes
        seen = max(one.peak_granted_bytes, one.peak_live_bytes)
        assert firm is None or minimum <= firm
        if one.verdict == "change" and one.path != "root":
            assert firm is None or firm >= seen
            assert minimum >= min(seen, one.minimum_bytes)
        elif one.verdict != "change":
            assert (minimum, firm) == (one.minimum_bytes, one.firm_limit_bytes)
            assert one.grant_factor is None
        assert one.grant_factor is None or one.grant_factor > 1
        assert one.reason
        assert "\n" not in one.reason
    check_sums(advice, numbers)
    json.dumps(advice.to_dict(), allow_nan=False)


def check_sums(advice: Advice, numbers: LimiterStatistics) -> None:
    minimums = sum(one.proposed_minimum_bytes for one in advice.components)
    assert advice.proposed_minimums_bytes == minimums
    assert advice.proposed_firm_limits_bytes == sum(
        one.proposed_minimum_bytes
        if one.proposed_firm_limit_bytes is None
        else one.proposed_firm_limit_bytes
        for one in advice.components
    )
    if numbers.age_seconds >= 60:
        effective = numbers.effective_limit_bytes
        if advice.proposed_limit_bytes is not None:
            effective = effective_limit_bytes(advice.proposed_limit_bytes, numbers.slop_factor)
        available = effective - numbers.baseline_bytes
        assert minimums <= available  # it fits now, or the proposed limit would have it fit
        if advice.proposed_firm_limits_bytes > available:
            assert any("firm limits add up" in note for note in advice.notes) or (
                advice.proposed_limit_bytes is not None
            )
        if advice.proposed_limit_bytes is not None:
            assert effective >= HEADROOM * numbers.peak_measured_bytes or (
                numbers.peak_measured_bytes <= numbers.effective_limit_bytes
            )


@given(limiters())
def test_who_follows_the_advice_gets_no_other(numbers: LimiterStatistics) -> None:
    """With the bounds proposed and nobody held up, they stay as they are."""
    proposed = {one.path: one for one in advise(numbers).components}
    followed = [
        replace(
            one,
            minimum_bytes=proposed[one.path].proposed_minimum_bytes,
            firm_limit_bytes=proposed[one.path].proposed_firm_limit_bytes,
            total_wait_seconds=0.0,
            refusals=0,
            admissions=one.admissions + one.refusals,
            peak_overdraft_bytes=0,
        )
        for one in numbers.components
    ]
    for one in advise(replace(numbers, components=tuple(followed))).components:
        before = proposed[one.path]
        if before.verdict == "change" and not (before.waited_seconds or before.refusals):
            assert one.verdict == "keep", one.reason


@given(st.floats(0, 2**52))
def test_a_handsome_size_is_little_above(nbytes: float) -> None:
    size = handsome_size(nbytes)
    assert max(nbytes, SMALLEST_BYTES) <= size <= max(nbytes * 1.125 + 1, SMALLEST_BYTES)
    digits = size
    while digits % 2 == 0:
        digits //= 2
    assert digits < 16
    assert handsome_size(size) == size


def test_sizes_and_times_in_words() -> None:
    assert [handsome_size(size * MIB) // MIB for size in (61, 79.3, 80, 81, 150)] == [
        64,
        80,
        80,
        88,
        160,
    ]
    words = [time_in_words(seconds) for seconds in (0.0101, 1, 99, 100, 2400, 6000, 1e5, 1e6)]
    assert words == ["11 ms", "1 s", "99 s", "2 min", "40 min", "2 h", "28 h", "12 days"]
    assert MORE > 1.125  # what is proposed once must not be too much the next time
