import ctypes
import math
import pickle
import sys
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from membound_async.bounds import (
    MAX_DEPTH,
    ROOT,
    ComponentBounds,
    MemoryBounds,
    MemoryBoundsBuilder,
    UsageExpr,
    split_path,
    subpath,
)
from membound_async.exceptions import BoundsError, InvalidComponentBounds
from membound_async.sizes import MAX_BYTES

KIB = 1024
MIB = 1024 * KIB


class Slotted:
    __slots__ = ("left", "right")


class Decoder:
    """The example of the semantics page."""

    batch = 500
    cache_bytes = 24 * MIB

    def specify_bounds(self, b: MemoryBoundsBuilder) -> None:
        b.minimum.fixed("input buffer", "8MiB")
        b.firm.array("batch", count=self.batch, each=2 * KIB)
        b.subcomponent("cache").firm.config("cache_bytes", self.cache_bytes)


class TestPaths:
    @pytest.mark.parametrize(
        ("path", "segments"),
        [
            ("root", ()),
            ("decode", ("decode",)),
            ("decode.cache", ("decode", "cache")),
            ("a-b.c_d.é:1/2", ("a-b", "c_d", "é:1/2")),
            (".".join("x" * MAX_DEPTH), ("x",) * MAX_DEPTH),
        ],
    )
    def test_segments(self, path, segments):
        assert split_path(path) == segments

    @pytest.mark.parametrize(
        ("path", "named"),
        [
            ("", "''"),
            (".", "''"),
            ("a.", "''"),
            (".a", "''"),
            ("a..b", "''"),
            ("a b", "'a b'"),
            ("a.b\t", r"'b\t'"),
            ("a\n", r"'a\n'"),
            ("a\x00b", r"'a\x00b'"),
            ("a\u00a0b", r"'a\xa0b'"),
            ("\u2028", r"'\u2028'"),
        ],
    )
    def test_bad_segment_is_named(self, path, named):
        with pytest.raises(InvalidComponentBounds) as caught:
            split_path(path)
        assert caught.value.component == path
        assert caught.value.reason.startswith(f"{named} is no name")

    def test_root_is_not_part_of_a_path(self):
        with pytest.raises(InvalidComponentBounds, match=r"write 'decode\.cache'$"):
            split_path("root.decode.cache")

    def test_too_deep(self):
        with pytest.raises(InvalidComponentBounds, match="101 levels deep; use at most 100"):
            split_path(".".join("x" * 101))

    @pytest.mark.parametrize("path", [None, 5, b"decode", ["decode"]])
    def test_no_str(self, path):
        with pytest.raises(TypeError, match="a component's path is a str"):
            split_path(path)

    def test_subpath(self):
        assert subpath(ROOT, "decode") == "decode"
        assert subpath("decode", "cache") == "decode.cache"


class TestUsageExpr:
    @pytest.mark.parametrize(
        ("expr", "value", "why"),
        [
            (UsageExpr.constant("buffer", "8MiB"), 8 * MIB, "buffer = 8 MiB"),
            (UsageExpr.constant("buffer", 2049), 2049, "buffer = 2.0 KiB"),
            (UsageExpr.constant("buffer", 1331), 1331, "buffer = 1.3 KiB"),
            (UsageExpr.constant("buffer", 0), 0, "buffer = 0 B"),
            (UsageExpr.constant("", 7), 7, "7 B"),
            (UsageExpr.config("cache_bytes", "1.5KiB"), 1536, "cache_bytes = 1.5 KiB (config)"),
            (UsageExpr.product("batch", 500, "2KiB"), 1_024_000, "batch = 500 x 2 KiB"),
            (UsageExpr.product("batch", 2000, 3, 10), 60_000, "batch = 2 000 x 3 x 10 B"),
            (
                UsageExpr.product("batch", UsageExpr.config("batch_size", 500), "2KiB"),
                1_024_000,
                "batch = 500 (batch_size) x 2 KiB",
            ),
            (
                UsageExpr.product("batch", 3, UsageExpr.type_size("", 48)),
                144,
                "batch = 3 x 48 B (type)",
            ),
            (
                UsageExpr.sum("buffers", UsageExpr.constant("in", "4KiB"), "8KiB"),
                12 * KIB,
                "buffers = 4 KiB (in) + 8 KiB",
            ),
            (
                UsageExpr.product(
                    "queue", 10, UsageExpr.sum("", 100, UsageExpr.product("p", 2, 3))
                ),
                1060,
                "queue = 10 x (100 B + (p = 2 x 3 B))",
            ),
            # Everything in a count is a count.
            (
                UsageExpr.product("grid", UsageExpr.product("", 4, 5), 6),
                120,
                "grid = (4 x 5) x 6 B",
            ),
        ],
    )
    def test_value_and_why(self, expr, value, why):
        assert expr.evaluate() == value
        assert str(expr) == why

    def test_kinds_and_children(self):
        count, each = UsageExpr.config("batch_size", 500), UsageExpr.type_size("", Slotted)
        batch = UsageExpr.product("batch", count, each)
        assert (batch.kind, batch.children) == ("product", (count, each))
        assert UsageExpr.sum("all", batch).kind == "sum"
        assert (count.kind, count.children) == ("config", ())
        assert each.kind == "type_size"
        assert UsageExpr.constant("n", 1).kind == "constant"

    def test_type_size_of_a_class_is_that_of_its_instances(self):
        expr = UsageExpr.type_size("record", Slotted)
        assert expr.evaluate() == sys.getsizeof(Slotted())
        assert str(expr) == f"record = {expr.evaluate()} B (Slotted)"

    def test_type_size_of_a_class_without_gc_header(self):
        assert UsageExpr.type_size("x", float).evaluate() == sys.getsizeof(1.5)

    def test_type_size_of_an_object(self):
        expr = UsageExpr.type_size("row", b"x" * 100)
        assert expr.evaluate() == sys.getsizeof(b"x" * 100)
        assert expr.origin == "bytes"

    def test_type_size_of_a_size(self):
        class Pair(ctypes.Structure):
            _fields_ = (("a", ctypes.c_int64), ("b", ctypes.c_int64))

        assert UsageExpr.type_size("pair", ctypes.sizeof(Pair)).evaluate() == 16
        assert UsageExpr.type_size("pair", "2KiB").evaluate() == 2048

    @pytest.mark.parametrize("of", [None, 1.5, math.nan, True])
    def test_type_size_of_a_number_that_is_no_size(self, of):
        with pytest.raises(TypeError, match="pair is "):
            UsageExpr.type_size("pair", of)

    @pytest.mark.parametrize("make", [UsageExpr.constant, UsageExpr.config, UsageExpr.product])
    @pytest.mark.parametrize(
        ("value", "error"),
        [(-1, ValueError), ("8 MBit", ValueError), (2**53 + 1, ValueError), (math.nan, TypeError)],
    )
    def test_bad_value_is_named(self, make, value, error):
        with pytest.raises(error) as caught:
            make("batch", value)
        assert repr(value) in str(caught.value)

    @pytest.mark.parametrize("make", [UsageExpr.product, UsageExpr.sum])
    def test_nothing_to_combine(self, make):
        with pytest.raises(ValueError, match=r"^batch: a .* needs at least one part$"):
            make("batch")

    def test_result_that_no_machine_has(self):
        with pytest.raises(ValueError, match=r"batch = 9 007 .* x 2 B is 18 .*, above 2\*\*53"):
            UsageExpr.product("batch", MAX_BYTES, 2)
        assert UsageExpr.product("batch", MAX_BYTES // 2, 2).evaluate() == MAX_BYTES

    def test_bad_name(self):
        with pytest.raises(TypeError, match="the name of a bound is a str, not 5"):
            UsageExpr.constant(5, 1)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"'a\\nb'"):
            UsageExpr.constant("a\nb", 1)

    def test_immutable_comparable_and_picklable(self):
        expr = UsageExpr.product("batch", 500, "2KiB")
        with pytest.raises(FrozenInstanceError):
            expr.value = 1  # type: ignore[misc]
        assert expr == pickle.loads(pickle.dumps(expr))
        assert hash(expr) == hash(UsageExpr.product("batch", 500, 2048))

    @given(
        st.recursive(
            st.integers(0, 40),
            lambda part: st.tuples(st.booleans(), st.lists(part, min_size=1, max_size=3)),
            max_leaves=6,
        )
    )
    def test_evaluates_like_arithmetic(self, shape):
        def expected(shape):
            if isinstance(shape, int):
                return shape
            is_sum, parts = shape
            return (sum if is_sum else math.prod)(expected(part) for part in parts)

        def build(shape):
            if isinstance(shape, int):
                return UsageExpr.constant("n", shape)
            is_sum, parts = shape
            make = UsageExpr.sum if is_sum else UsageExpr.product
            return make("n", *map(build, parts))

        assert build(shape).evaluate() == expected(shape)
        assert str(build(shape)).startswith("n = ")


class TestComponentBounds:
    def test_numbers(self):
        bounds = ComponentBounds(
            "decode", UsageExpr.constant("buffer", 10), UsageExpr.constant("batch", 30)
        )
        assert bounds.minimum_bytes == 10
        assert bounds.firm_limit_bytes == 40
        assert bounds.is_declared

    def test_firm_without_minimum(self):
        assert ComponentBounds("a", None, UsageExpr.constant("x", 5)).firm_limit_bytes == 5

    def test_nothing_declared(self):
        bounds = ComponentBounds("decode")
        assert (bounds.minimum_bytes, bounds.firm_limit_bytes) == (0, None)
        assert (bounds.total_minimum_bytes, bounds.total_firm_limit_bytes) == (0, 0)
        assert not bounds.is_declared

    def test_without_firm_limit_the_minimum_counts(self):
        leaf = ComponentBounds("a.b", UsageExpr.constant("x", 7))
        top = ComponentBounds(
            "a", UsageExpr.constant("x", 1), UsageExpr.constant("y", 2), (leaf, leaf)
        )
        assert leaf.firm_limit_bytes is None
        assert top.total_minimum_bytes == 15
        assert top.total_firm_limit_bytes == 3 + 7 + 7

    @pytest.mark.parametrize("minimum", [None, UsageExpr.constant("x", 0)])
    def test_firm_limit_of_nothing(self, minimum):
        with pytest.raises(InvalidComponentBounds, match="its firm limit is 0 bytes; it must be"):
            ComponentBounds("a", minimum, UsageExpr.constant("y", 0))

    def test_firm_limit_that_is_the_minimum(self):
        bounds = ComponentBounds("a", UsageExpr.constant("x", 4), UsageExpr.constant("y", 0))
        assert bounds.firm_limit_bytes == 4

    def test_firm_limit_that_no_machine_has(self):
        half = UsageExpr.constant("x", MAX_BYTES // 2)
        assert ComponentBounds("a", half, half).firm_limit_bytes == MAX_BYTES
        with pytest.raises(InvalidComponentBounds, match="at most 2\\*\\*53 bytes"):
            ComponentBounds("a", half, UsageExpr.constant("x", MAX_BYTES // 2 + 1))

    def test_walk_and_largest(self):
        small = ComponentBounds("a.s", None, UsageExpr.constant("x", 5))
        large = ComponentBounds("a.l.l", None, UsageExpr.constant("x", 9))
        top = ComponentBounds(
            "a",
            None,
            UsageExpr.constant("x", 8),
            (small, ComponentBounds("a.l", None, None, (large,))),
        )
        assert [bounds.path for bounds in top.walk()] == ["a", "a.s", "a.l", "a.l.l"]
        assert top.largest is large
        assert top.tree() is top

    def test_pickles(self):
        bounds = MemoryBoundsBuilder("decode")
        Decoder().specify_bounds(bounds)
        tree = bounds.build()
        copy = pickle.loads(pickle.dumps(tree))
        assert copy == tree
        assert copy.total_firm_limit_bytes == tree.total_firm_limit_bytes


class TestBuilder:
    def test_example(self):
        builder = MemoryBoundsBuilder("decode")
        Decoder().specify_bounds(builder)
        bounds = builder.build()
        assert bounds.path == "decode"
        assert (bounds.minimum_bytes, bounds.firm_limit_bytes) == (8 * MIB, 8 * MIB + 1_024_000)
        (cache,) = bounds.subcomponents
        assert cache.path == "decode.cache"
        assert (cache.minimum_bytes, cache.firm_limit_bytes) == (0, 24 * MIB)
        assert bounds.total_firm_limit_bytes == 32 * MIB + 1_024_000
        assert bounds.total_minimum_bytes == 8 * MIB
        assert str(bounds.firm) == "batch = 500 x 2 KiB"

    def test_is_the_protocol(self):
        assert isinstance(Decoder(), MemoryBounds)
        assert not isinstance(object(), MemoryBounds)

    def test_items_add_up(self):
        builder = MemoryBoundsBuilder("a")
        section = builder.firm.fixed("x", 1).config("y", "1KiB")
        section.array("z", count=3, each=Slotted).array("w", count=2, each="4KiB")
        section.array("v", count=UsageExpr.config("n", 5), each=UsageExpr.constant("e", 7))
        section.type("t", Slotted).expr(UsageExpr.sum("u", 5, 6)).expr(UsageExpr.product("", 2, 2))
        size = sys.getsizeof(Slotted())
        firm = builder.build().firm
        assert firm is not None
        assert firm.evaluate() == 1 + 1024 + 3 * size + 8192 + 35 + size + 11 + 4
        assert [str(item) for item in firm.children] == [
            "x = 1 B",
            "y = 1 KiB (config)",
            f"z = 3 x {size} B (Slotted)",
            "w = 2 x 4 KiB",
            "v = 5 (n) x 7 B (e)",
            f"t = {size} B (Slotted)",
            "u = 5 B + 6 B",
            "2 x 2 B",
        ]

    def test_nothing_said(self):
        builder = MemoryBoundsBuilder()
        assert builder.path == ROOT
        assert builder.build() == ComponentBounds(ROOT)

    def test_minimum_only_is_no_firm_limit(self):
        builder = MemoryBoundsBuilder("a")
        builder.minimum.fixed("x", 5)
        assert builder.build().firm_limit_bytes is None

    def test_subcomponents(self):
        builder = MemoryBoundsBuilder()
        inner = builder.subcomponent("a.b")
        assert inner.path == "a.b"
        assert builder.subcomponent("a").subcomponent("b") is inner
        assert MemoryBoundsBuilder("x").subcomponent("y.z").path == "x.y.z"
        assert [bounds.path for bounds in builder.build().walk()] == ["root", "a", "a.b"]

    @pytest.mark.parametrize("name", ["", "a b", "root", "root.a", "a..b"])
    def test_bad_subcomponent(self, name):
        builder = MemoryBoundsBuilder("a")
        with pytest.raises(InvalidComponentBounds):
            builder.subcomponent(name)
        assert builder.build().subcomponents == ()

    def test_bad_path(self):
        with pytest.raises(InvalidComponentBounds):
            MemoryBoundsBuilder("a b")

    def test_too_deep_together(self):
        builder = MemoryBoundsBuilder(".".join("x" * 99))
        with pytest.raises(InvalidComponentBounds, match="101 levels"):
            builder.subcomponent("y.z")

    @pytest.mark.parametrize(
        ("add", "reason"),
        [
            (lambda s: s.fixed("buffer", "8 MBit"), "buffer='8 MBit' is no size"),
            (lambda s: s.fixed("buffer", -1), "buffer=-1 is negative"),
            (lambda s: s.fixed("buffer", math.nan), "buffer is a number of bytes"),
            (lambda s: s.fixed("", 5), "an item needs a name"),
            (lambda s: s.config("n", 1.5), "n is a number of bytes"),
            (lambda s: s.array("a", count=-1, each=1), "a: count=-1 is negative"),
            (lambda s: s.array("a", count="5", each=1), "a: count='5' is no whole number"),
            (lambda s: s.array("a", count=True, each=1), "a: count is a number of bytes"),
            (lambda s: s.array("a", count=1, each=math.inf), "a: each is a number of bytes"),
            (lambda s: s.array("a", count=2**52, each=3), "a = 4 503 .* x 3 B is"),
            (lambda s: s.type("t", None), "t is the size of a class"),
            (lambda s: s.expr(5), "an expression is a UsageExpr, not 5"),
            (lambda s: s.expr(UsageExpr.constant("", 5)), "an item needs a name"),
        ],
    )
    def test_bad_item_names_component_and_changes_nothing(self, add, reason):
        builder = MemoryBoundsBuilder("decode.cache")
        builder.minimum.fixed("x", 3)
        with pytest.raises(BoundsError, match=reason) as caught:
            add(builder.minimum)
        assert type(caught.value) is InvalidComponentBounds
        assert caught.value.component == "decode.cache"
        assert builder.build().minimum_bytes == 3

    def test_items_that_no_machine_has_together(self):
        section = MemoryBoundsBuilder("a").firm.fixed("x", MAX_BYTES)
        with pytest.raises(InvalidComponentBounds, match=r"with y = 1 B it is .* above 2\*\*53"):
            section.fixed("y", 1)

    def test_firm_limit_of_nothing(self):
        builder = MemoryBoundsBuilder("a")
        builder.subcomponent("b").firm.array("batch", count=0, each="1KiB")
        with pytest.raises(InvalidComponentBounds) as caught:
            builder.build()
        assert caught.value.component == "a.b"
