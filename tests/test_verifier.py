import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from membound_async import verifier
from membound_async.bounds import ComponentBounds, MemoryBoundsBuilder, UsageExpr
from membound_async.exceptions import (
    BoundsError,
    FirmLimitExceedsAvailable,
    InsufficientMinimumMemory,
    InvalidLimit,
)
from membound_async.limits import MemoryLimit
from membound_async.registry import ComponentRegistry
from membound_async.verifier import (
    BoundsVerifier,
    effective_limit_bytes,
    render,
    smallest_limit_bytes,
)

MIB = 1024 * 1024


def declared(**bounds: tuple[int, int | None]) -> ComponentRegistry:
    registry = ComponentRegistry()
    for path, (minimum, firm_limit) in bounds.items():
        registry.declare(path, minimum=minimum, firm_limit=firm_limit)
    return registry


class TestVerify:
    def test_fits_exactly(self):
        registry = declared(a=(30, 60), b=(20, 40))
        verified = BoundsVerifier(registry, 110, 10).verify()
        assert verified.available_bytes == 100
        assert verified.total_minimum_bytes == 50
        assert verified.total_firm_limit_bytes == 100
        assert verified.smallest_limit_bytes == 110
        assert verified.overcommit == 1.0
        assert "bounds" not in repr(verified).partition("(")[2]

    def test_minimums_one_byte_over(self):
        with pytest.raises(InsufficientMinimumMemory) as caught:
            BoundsVerifier(declared(a=(30, None), b=(21, None)), 60, 10).verify()
        error = caught.value
        assert (error.required_bytes, error.available_bytes) == (51, 50)
        assert error.suggested_limit_bytes == 61
        assert error.report in str(error)
        assert error.report.startswith("component")

    def test_firm_limits_one_byte_over(self):
        registry = declared(a=(0, 50), b=(10, 51))
        with pytest.raises(FirmLimitExceedsAvailable) as caught:
            BoundsVerifier(registry, 100).verify()
        error = caught.value
        assert error.component is None
        assert (error.firm_limit_bytes, error.available_bytes) == (101, 100)
        assert (error.overcommit, error.suggested_limit_bytes) == (1.0, 101)
        assert error.report in str(error)

    def test_one_alone_is_too_large_for_any_overcommit(self):
        registry = declared(a=(0, 50), b=(10, 101))
        with pytest.raises(FirmLimitExceedsAvailable) as caught:
            BoundsVerifier(registry, 100, 0, 10).verify()
        error = caught.value
        assert error.component == "b"
        assert (error.firm_limit_bytes, error.available_bytes) == (101, 100)
        assert error.suggested_limit_bytes == 101

    def test_overcommit(self):
        registry = declared(a=(0, 60), b=(0, 60), c=(30, None))
        assert BoundsVerifier(registry, 100, 0, 1.5).verify().smallest_limit_bytes == 100
        with pytest.raises(FirmLimitExceedsAvailable) as caught:
            BoundsVerifier(registry, 99, 0, 1.5).verify()
        assert caught.value.available_bytes == 148
        assert caught.value.suggested_limit_bytes == 100

    def test_overcommit_is_taken_as_it_is_written(self):
        # In binary 1.15 is a little less, and 114 would be all of 100.
        registry = declared(a=(0, 60), b=(0, 55))
        assert BoundsVerifier(registry, 100, 0, 1.15).verify().smallest_limit_bytes == 100
        with pytest.raises(FirmLimitExceedsAvailable):
            BoundsVerifier(registry, 100, 0, 1.14).check()

    def test_suggestion_meets_all_checks_at_once(self):
        # The minimums fail first, but the firm limits need more than they do.
        with pytest.raises(InsufficientMinimumMemory) as caught:
            BoundsVerifier(declared(a=(20, 500)), 10).verify()
        assert caught.value.suggested_limit_bytes == 500

    def test_baseline_leaves_nothing(self):
        registry = declared(a=(10, None))
        with pytest.raises(InvalidLimit) as caught:
            BoundsVerifier(registry, 100, 100, slop_factor=0.5).verify()
        message = str(caught.value)
        assert "limit of 100 bytes is not above the baseline of 100 bytes" in message
        assert message.endswith("raise the limit to 220 bytes")

    def test_nothing_declared_needs_one_byte_above_the_baseline(self):
        assert BoundsVerifier(ComponentRegistry(), 101, 100).verify().smallest_limit_bytes == 101

    def test_a_tree_is_verified_like_a_registry(self):
        tree = declared(a=(10, 60), **{"a.b": (20, 50)}).tree()
        assert BoundsVerifier(tree, 110).verify().bounds is tree
        with pytest.raises(FirmLimitExceedsAvailable):
            BoundsVerifier(tree, 109).verify()
        with pytest.raises(FirmLimitExceedsAvailable) as caught:
            BoundsVerifier(tree, 59, 0, 2).check()
        assert caught.value.component == "a"

    def test_verified_bounds_are_a_snapshot(self):
        registry = declared(a=(10, 60))
        verified = BoundsVerifier(registry, 100).verify()
        registry.declare("b", minimum=5)
        assert verified.total_minimum_bytes == 10

    def test_check_is_quiet_when_it_fits(self):
        BoundsVerifier(declared(a=(10, 60)), 60).check()

    @pytest.mark.parametrize("overcommit", [0, 0.99, -1, math.nan, math.inf, True, "2", None])
    def test_bad_overcommit(self, overcommit):
        with pytest.raises(InvalidLimit, match=r"overcommit=.* must be a finite number"):
            BoundsVerifier(ComponentRegistry(), 10, 0, overcommit)

    @pytest.mark.parametrize("slop_factor", [1, 1.5, -0.1, math.nan, math.inf, False, "0.1", None])
    def test_bad_slop_factor(self, slop_factor):
        with pytest.raises(InvalidLimit, match=r"slop_factor=.* is no part of the limit"):
            BoundsVerifier(ComponentRegistry(), 10, slop_factor=slop_factor)

    def test_errors_pickle(self):
        for overcommit in (1.0, 3.0):
            with pytest.raises(BoundsError) as caught:
                BoundsVerifier(declared(a=(1, 200), b=(2, 3)), 50, 0, overcommit).verify()
            copy = pickle.loads(pickle.dumps(caught.value))
            assert str(copy) == str(caught.value)
            assert vars(copy) == vars(caught.value)


SLOPS = st.sampled_from([0, 0.0, 0.1, 0.15, 0.25, 1 / 3, 0.5, 0.99, 1e-05]) | st.floats(
    0, 0.999, allow_nan=False
)


class TestLimitArithmetic:
    @given(st.integers(1, 2**53), SLOPS)
    def test_effective_limit_is_that_of_memory_limit(self, limit, slop):
        assert effective_limit_bytes(limit, slop) == MemoryLimit(limit, slop).effective_bytes

    @given(st.integers(1, 2**40), SLOPS)
    def test_smallest_limit(self, effective, slop):
        limit = smallest_limit_bytes(effective, slop)
        assert effective_limit_bytes(limit, slop) >= effective
        assert effective_limit_bytes(limit - 1, slop) < effective

    def test_tenths_are_tenths(self):
        assert effective_limit_bytes(100, 0.1) == 90
        assert smallest_limit_bytes(90, 0.1) == 100


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.none() | st.integers(1, 10**7)), max_size=6),
    st.integers(0, 10**6),
    st.sampled_from([1, 1.0, 1.1, 1.5, 2.75, 10]) | st.floats(1, 20, allow_nan=False),
    SLOPS,
)
def test_suggested_limit_is_the_smallest_that_passes(parts, baseline, overcommit, slop):
    registry = ComponentRegistry()
    for number, (minimum, on_top) in enumerate(parts):
        firm_limit = None if on_top is None else minimum + on_top
        registry.declare(f"c{number}", minimum=minimum, firm_limit=firm_limit)

    def verify(limit):
        return registry.verify(MemoryLimit(limit, slop), overcommit=overcommit, baseline=baseline)

    suggested = verify(2**50).smallest_limit_bytes
    assert verify(suggested).smallest_limit_bytes == suggested
    if suggested > 1:
        with pytest.raises((BoundsError, InvalidLimit)) as caught:
            verify(suggested - 1)
        if isinstance(caught.value, (InsufficientMinimumMemory, FirmLimitExceedsAvailable)):
            assert caught.value.suggested_limit_bytes == suggested


def decoder(b: MemoryBoundsBuilder) -> None:
    b.minimum.fixed("input buffer", "8MiB")
    b.firm.array("batch", count=UsageExpr.config("batch_size", 500), each="112KiB")
    b.subcomponent("cache").firm.config("cache_bytes", "24MiB")
    b.subcomponent("index.lookup").firm.array("airports", count=20_000, each="1.5KiB")


def pipeline() -> ComponentRegistry:
    class Decoder:
        def specify_bounds(self, b: MemoryBoundsBuilder) -> None:
            decoder(b)

    registry = ComponentRegistry()
    registry.register("decode", Decoder())
    registry.declare("sink", minimum="2MiB")
    registry.declare("sink.retries", minimum="1MiB", firm_limit="5MiB")
    registry.component("upload")
    return registry


class TestRender:
    def test_tree(self):
        assert render(pipeline().tree()).splitlines() == [
            "component                                   minimum   firm limit",
            "----------------------------------------------------------------",
            "root                                       11.0 MiB    123.0 MiB",
            "  decode                                    8.0 MiB    116.0 MiB",
            "    batch = 500 (batch_size) x 112 KiB            -     54.7 MiB",
            "    index.lookup                                  -     29.3 MiB",
            "      airports = 20 000 x 1.5 KiB                 -     29.3 MiB",
            "    cache                                         -     24.0 MiB",
            "      cache_bytes = 24 MiB (config)               -     24.0 MiB",
            "    input buffer = 8 MiB                    8.0 MiB      8.0 MiB",
            "  sink                                      3.0 MiB      7.0 MiB*",
            "    retries                                 1.0 MiB      5.0 MiB",
            "    (itself)                                2.0 MiB      2.0 MiB",
            "* no firm limit of its own: bounded by the quota, counted with its minimum",
            "1 component says nothing about bounds",
        ]

    def test_what_is_available_and_left(self):
        lines = render(
            declared(a=(0, 20 * MIB)).tree(),
            effective_bytes=15 * MIB,
            baseline_bytes=MIB,
            overcommit=1.5,
        ).splitlines()
        assert lines[-5:] == [
            "  a                             -     20.0 MiB",
            "----------------------------------------------",
            "available                14.0 MiB     21.0 MiB",
            "left                     14.0 MiB      1.0 MiB",
            "available: effective limit 15.0 MiB, less baseline 1.0 MiB; firm limits x 1.5",
        ]

    def test_nothing_left_and_too_little(self):
        lines = render(declared(a=(MIB, 2 * MIB)).tree(), effective_bytes=MIB).splitlines()
        assert lines[-2:] == [
            "left                          0 B     -1.0 MiB",
            "available: effective limit 1.0 MiB",
        ]

    def test_report_of_verified_bounds(self):
        verified = pipeline().verify("1GiB", baseline="10MiB", overcommit=2)
        assert verified.report() == render(
            verified.bounds,
            effective_bytes=verified.effective_bytes,
            baseline_bytes=10 * MIB,
            overcommit=2,
        )

    def test_error_has_the_tree(self):
        with pytest.raises(FirmLimitExceedsAvailable) as caught:
            pipeline().verify("64MiB")
        report = caught.value.report
        assert "batch = 500 (batch_size) x 112 KiB" in report
        assert "available: effective limit 54.4 MiB" in report

    def test_nothing_declared(self):
        lines = render(ComponentRegistry().tree()).splitlines()
        assert lines[-2:] == [
            "root                            -            -",
            "1 component says nothing about bounds",
        ]
        registry = ComponentRegistry()
        registry.component("a")
        registry.component("b")
        assert render(registry.tree()).endswith("\n2 components say nothing about bounds")

    def test_part_of_a_tree_has_its_path(self):
        assert render(pipeline().bounds("decode.cache")).splitlines()[2].startswith("decode.cache ")

    def test_long_labels_wrap_and_numbers_stay_whole(self):
        registry = ComponentRegistry()
        registry.declare("n" * 70, minimum=5)

        class Table:
            def specify_bounds(self, b: MemoryBoundsBuilder) -> None:
                row = UsageExpr.sum("row", UsageExpr.constant("a fixed header", 10), 1000)
                b.firm.array("the table of all airports", count=20_000, each=row)

        registry.register("table", Table())
        lines = render(registry.tree()).splitlines()
        assert lines[4:8] == [
            "    the table of all airports = 20 000 x (row = 10 B             -     19.3 MiB",
            "        (a fixed header) + 1000 B)",
            "  " + "n" * 51 + "          5 B          5 B*",
            "      " + "n" * 19,
        ]

    @pytest.mark.parametrize("width", [20, 46, 60, 80, 200])
    def test_fits_the_terminal(self, width):
        registry = pipeline()
        registry.declare(".".join(["deep"] * 90), minimum=5, firm_limit=2**50)
        for segment in range(90):
            registry.declare(".".join(["tree"] * (segment + 1)), minimum=5)
        text = render(
            registry.tree(), effective_bytes=5, baseline_bytes=3, overcommit=2, width=width
        )
        assert max(map(len, text.splitlines())) <= max(width, 47)

    def test_only_the_largest_are_shown(self):
        registry = ComponentRegistry()
        for number in range(1000):
            registry.declare(f"workers.w{number}", minimum=100, firm_limit=1000 + number)
        lines = render(registry.tree(), rows=5).splitlines()
        assert [line.split()[0] for line in lines[2:]] == [
            "root",
            "workers",
            "w999",
            "w998",
            "w997",
            "...",
        ]
        assert lines[-1].split() == ["...", "997", "more", "97.4", "KiB", "1.4", "MiB"]
        assert render(registry.tree(), rows=0).splitlines()[-1].split()[:3] == ["...", "1", "more"]

    @given(st.data())
    def test_lines_add_up(self, data):
        sizes = st.integers(0, 1000)

        def tree(path, depth):
            below = data.draw(st.integers(0, 3)) if depth < 3 else 0
            items = [UsageExpr.constant("x", data.draw(sizes)) for _ in range(2)]
            return ComponentBounds(
                path,
                UsageExpr.sum("", *items),
                UsageExpr.constant("y", 1 + data.draw(sizes)) if data.draw(st.booleans()) else None,
                tuple(tree(f"{path}.{n}", depth + 1) for n in range(below)),
            )

        bounds = tree("top", 0)
        rows = data.draw(st.integers(1, 30))
        top = verifier._component_row(bounds, "top")
        verifier._mark_largest(top, rows)
        # The text has the sizes rounded, so look at the lines before they become text.
        lines = list(verifier._lines(top, 0))
        for index, (depth, row) in enumerate(lines):
            below = []
            for other_depth, other in lines[index + 1 :]:
                if other_depth <= depth:
                    break
                if other_depth == depth + 1:
                    below.append(other)
            if below:
                assert row.minimum_bytes == sum(other.minimum_bytes for other in below)
                assert row.firm_limit_bytes == sum(other.firm_limit_bytes for other in below)
        assert sum(not row.label.startswith("...") for _, row in lines) <= rows
