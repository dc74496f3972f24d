import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from membound_async.bounds import ComponentBounds, MemoryBoundsBuilder
from membound_async.exceptions import InvalidComponentBounds, InvalidLimit, UnknownComponent
from membound_async.limits import MemoryLimit
from membound_async.registry import ComponentRegistry
from membound_async.sizes import MAX_BYTES
from membound_async.verifier import BoundsVerifier

MIB = 1024 * 1024


class Part:
    """Bounds from a dict of sub-component: (minimum, on top)."""

    def __init__(self, /, **bounds):
        self.bounds = bounds

    def specify_bounds(self, b: MemoryBoundsBuilder) -> None:
        for name, (minimum, firm) in self.bounds.items():
            builder = b if name == "self" else b.subcomponent(name)
            if minimum is not None:
                builder.minimum.fixed("needs", minimum)
            if firm is not None:
                builder.firm.fixed("may use", firm)


def recursive_totals(bounds: ComponentBounds) -> tuple[int, int]:
    """Add up a tree the slow way."""
    minimum = 0 if bounds.minimum is None else bounds.minimum.evaluate()
    firm = 0 if bounds.firm is None else bounds.firm.evaluate()
    below = [recursive_totals(sub) for sub in bounds.subcomponents]
    return (
        minimum + sum(total for total, _ in below),
        minimum + firm + sum(total for _, total in below),
    )


def check_sums(registry: ComponentRegistry) -> None:
    tree = registry.tree()
    totals = recursive_totals(tree)
    assert (registry.total_minimum_bytes, registry.total_firm_limit_bytes) == totals
    assert (tree.total_minimum_bytes, tree.total_firm_limit_bytes) == totals
    firm_limits = [bounds.firm_limit_bytes or 0 for bounds in tree.walk()]
    assert (registry.largest.firm_limit_bytes or 0) == max(firm_limits)
    assert (tree.largest.firm_limit_bytes or 0) == max(firm_limits)


def snapshot(registry: ComponentRegistry) -> object:
    return (
        registry.tree(),
        list(registry),
        registry.total_minimum_bytes,
        registry.total_firm_limit_bytes,
        registry.largest.path,
    )


class TestComponents:
    def test_same_node_each_time_and_those_on_the_way(self):
        registry = ComponentRegistry()
        node = registry.component("ingest.decode.cache")
        assert registry.component("ingest.decode.cache") is node
        assert registry.component("ingest.decode").children == {"cache": node}
        assert list(registry) == ["root", "ingest", "ingest.decode", "ingest.decode.cache"]
        assert len(registry) == 4
        assert "ingest.decode" in registry
        assert "decode" not in registry
        assert [node.path for node in registry.walk()] == list(registry)

    def test_root_is_there(self):
        registry = ComponentRegistry()
        assert list(registry) == ["root"]
        assert registry.component("root").path == "root"
        registry.declare("root", minimum=3)
        assert registry.tree().minimum_bytes == 3

    def test_repr(self):
        registry = ComponentRegistry()
        node = registry.declare("decode", minimum="1KiB")
        assert repr(node) == (
            "<RegistryNode 'decode': a minimum of 1 024 bytes (1.0 KiB) and no firm limit>"
        )

    @pytest.mark.parametrize("path", ["", "a..b", "a b", "root.a", "a." * 100 + "a"])
    def test_bad_path_makes_nothing(self, path):
        registry = ComponentRegistry()
        for call in (
            registry.component,
            lambda path: registry.declare(path, minimum=1),
            registry.declare,
            lambda path: registry.register(path, Part()),
        ):
            with pytest.raises(InvalidComponentBounds) as caught:
                call(path)
            assert caught.value.component == path
        assert list(registry) == ["root"]
        assert registry.total_minimum_bytes == 0

    def test_unknown(self):
        registry = ComponentRegistry()
        for number in range(30):
            registry.component(f"c{number}")
        with pytest.raises(UnknownComponent) as caught:
            registry.bounds("decode")
        assert caught.value.component == "decode"
        assert caught.value.known == ("root", *(f"c{number}" for number in range(19)))


class TestDeclare:
    def test_numbers(self):
        registry = ComponentRegistry()
        node = registry.declare("decode", minimum="8MiB", firm_limit="64MiB")
        assert (node.minimum_bytes, node.firm_limit_bytes) == (8 * MIB, 64 * MIB)
        bounds = registry.bounds("decode")
        assert (bounds.minimum_bytes, bounds.firm_limit_bytes) == (8 * MIB, 64 * MIB)
        check_sums(registry)

    def test_minimum_only(self):
        registry = ComponentRegistry()
        assert registry.declare("decode", minimum=5).firm_limit_bytes is None
        assert (registry.total_minimum_bytes, registry.total_firm_limit_bytes) == (5, 5)

    def test_firm_limit_only_and_equal(self):
        registry = ComponentRegistry()
        assert registry.declare("a", firm_limit=5).minimum_bytes == 0
        assert registry.declare("b", minimum=7, firm_limit=7).firm_limit_bytes == 7
        assert (registry.total_minimum_bytes, registry.total_firm_limit_bytes) == (7, 12)

    def test_twice_the_same(self):
        registry = ComponentRegistry()
        node = registry.declare("a", minimum=1024, firm_limit=4096)
        assert registry.declare("a", minimum="1KiB", firm_limit="4KiB") is node
        check_sums(registry)
        assert registry.total_firm_limit_bytes == 4096

    def test_without_bounds_says_nothing(self):
        registry = ComponentRegistry()
        registry.declare("a")
        assert not registry.bounds("a").is_declared
        registry.declare("a", minimum=5, firm_limit=9)
        registry.declare("a")
        assert registry.bounds("a").firm_limit_bytes == 9

    @pytest.mark.parametrize(("minimum", "firm_limit"), [(6, 9), (5, 8), (5, None), (0, 9), (0, 5)])
    def test_other_bounds_are_refused(self, minimum, firm_limit):
        registry = ComponentRegistry()
        registry.declare("a", minimum=5, firm_limit=9)
        before = snapshot(registry)
        with pytest.raises(InvalidComponentBounds) as caught:
            registry.declare("a", minimum=minimum, firm_limit=firm_limit)
        assert "a minimum of 5 bytes and a firm limit of 9 bytes already" in str(caught.value)
        assert snapshot(registry) == before

    def test_intermediate_node_may_be_declared_later(self):
        registry = ComponentRegistry()
        registry.declare("a.b", minimum=5)
        registry.declare("a", minimum=1, firm_limit=2)
        assert registry.bounds("a").total_minimum_bytes == 6
        check_sums(registry)

    @pytest.mark.parametrize(
        ("given", "reason"),
        [
            ({"minimum": 6, "firm_limit": 5}, "minimum of 6 bytes is above its firm limit of 5 b"),
            ({"firm_limit": 0}, "its firm limit is 0 bytes"),
            ({"minimum": 1, "firm_limit": 0}, "above its firm limit of 0 bytes"),
            ({"minimum": -1}, "minimum=-1 is negative"),
            ({"minimum": "8 MBit"}, "minimum='8 MBit' is no size"),
            ({"minimum": math.nan}, "minimum is a number of bytes .*not nan"),
            ({"minimum": None}, "minimum is a number of bytes .*not None"),
            ({"minimum": True}, "minimum is a number of bytes .*not True"),
            ({"firm_limit": -1}, "firm_limit=-1 is negative"),
            ({"firm_limit": math.nan}, "firm_limit is a number of bytes .*not nan"),
            ({"firm_limit": MAX_BYTES + 1}, r"above 2\*\*53"),
        ],
    )
    def test_senseless_bounds_change_nothing(self, given, reason):
        registry = ComponentRegistry()
        registry.declare("x", minimum=1)
        before = snapshot(registry)
        with pytest.raises(InvalidComponentBounds, match=reason) as caught:
            registry.declare("decode", **given)
        assert caught.value.component == "decode"
        assert snapshot(registry) == before

    def test_replace(self):
        registry = ComponentRegistry()
        registry.declare("a", minimum=5, firm_limit=9)
        registry.declare("a.b", minimum=2, firm_limit=20)
        registry.declare("a", minimum=1, firm_limit=3, replace=True)
        assert (registry.total_minimum_bytes, registry.total_firm_limit_bytes) == (3, 23)
        assert registry.largest.path == "a.b"
        registry.declare("a.b", minimum=1, firm_limit=2, replace=True)
        assert registry.largest.path == "a"
        registry.declare("a", replace=True)
        assert (registry.total_minimum_bytes, registry.total_firm_limit_bytes) == (1, 2)
        check_sums(registry)


class TestRegister:
    def test_parts_become_components(self):
        registry = ComponentRegistry()
        node = registry.register(
            "ingest.decode", Part(self=(1, 2), cache=(3, None), **{"x.y": (None, 4)})
        )
        assert node is registry.component("ingest.decode")
        assert (node.minimum_bytes, node.firm_limit_bytes) == (1, 3)
        assert list(registry)[2:] == [
            "ingest.decode",
            "ingest.decode.cache",
            "ingest.decode.x",
            "ingest.decode.x.y",
        ]
        assert registry.component("ingest.decode.cache").minimum_bytes == 3
        assert node.own.subcomponents == ()
        assert str(registry.bounds("ingest.decode").minimum) == "needs = 1 B"
        assert (registry.total_minimum_bytes, registry.total_firm_limit_bytes) == (4, 10)
        check_sums(registry)

    def test_of_the_root(self):
        registry = ComponentRegistry()
        registry.register("root", Part(self=(1, None), cache=(2, None)))
        assert list(registry) == ["root", "cache"]
        assert registry.total_minimum_bytes == 3

    def test_twice_the_same(self):
        registry = ComponentRegistry()
        part = Part(self=(1, 2), cache=(3, 4))
        registry.register("a", part)
        registry.register("a", part)
        registry.declare("a.cache", minimum=3, firm_limit=7)
        assert registry.total_firm_limit_bytes == 10
        # The first one is kept: it can say why.
        assert str(registry.bounds("a.cache").minimum) == "needs = 3 B"

    def test_all_or_nothing(self):
        registry = ComponentRegistry()
        registry.declare("a.z", minimum=3)
        before = snapshot(registry)
        with pytest.raises(InvalidComponentBounds) as caught:
            registry.register("a", Part(self=(1, 2), new=(1, 1), z=(4, None)))
        assert caught.value.component == "a.z"
        assert snapshot(registry) == before

    def test_error_in_the_source_changes_nothing(self):
        class Broken:
            def specify_bounds(self, b: MemoryBoundsBuilder) -> None:
                b.minimum.fixed("x", 1)
                b.subcomponent("y").minimum.fixed("x", -1)

        registry = ComponentRegistry()
        with pytest.raises(InvalidComponentBounds) as caught:
            registry.register("a", Broken())
        assert caught.value.component == "a.y"
        assert list(registry) == ["root"]

    def test_no_source(self):
        with pytest.raises(TypeError, match=r"5 has no specify_bounds\(\)"):
            ComponentRegistry().register("a", 5)  # type: ignore[arg-type]

    def test_replace_takes_the_place_of_all_below(self):
        registry = ComponentRegistry()
        registry.register("a", Part(self=(1, 2), cache=(30, 40), index=(5, 6)))
        registry.declare("b", minimum=1000)
        registry.register("a", Part(self=(2, 2), index=(7, None)), replace=True)
        assert registry.bounds("a").minimum_bytes == 2
        assert not registry.bounds("a.cache").is_declared
        assert registry.bounds("a.index").firm_limit_bytes is None
        assert (registry.total_minimum_bytes, registry.total_firm_limit_bytes) == (1009, 1011)
        assert "a.cache" in registry
        check_sums(registry)

    def test_replace_what_is_new(self):
        registry = ComponentRegistry()
        registry.register("a", Part(self=(1, 2)), replace=True)
        assert registry.total_firm_limit_bytes == 3


NAMES = st.sampled_from(["root", "a", "b", "a.b", "a.b.c", "c.a", "c.a.b"])
SIZES = st.none() | st.integers(0, 50)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["component", "declare", "register"]), NAMES, SIZES, SIZES, st.booleans()
    ),
    max_size=30,
)


@given(STEPS)
def test_sums_hold_after_any_declarations(steps):
    registry = ComponentRegistry()
    for kind, path, minimum, firm, replace in steps:
        before = snapshot(registry)
        try:
            if kind == "component":
                registry.component(path)
            elif kind == "declare":
                registry.declare(path, minimum=minimum or 0, firm_limit=firm, replace=replace)
            else:
                part = Part(self=(minimum, firm), **{"x.y": (firm, minimum)})
                registry.register(path, part, replace=replace)
        except InvalidComponentBounds:
            assert snapshot(registry) == before
        check_sums(registry)


class TestVerify:
    def test_a_limit_object(self):
        registry = ComponentRegistry()
        registry.declare("a", minimum=30, firm_limit=75)
        verified = registry.verify(MemoryLimit(100, 0.2), baseline=5)
        assert verified.effective_bytes == 80
        assert verified.available_bytes == 75
        assert verified.total_minimum_bytes == 30
        assert verified.total_firm_limit_bytes == 75
        assert verified.smallest_limit_bytes == 100
        assert verified.bounds == registry.tree()

    @pytest.mark.parametrize(
        ("limit", "effective"), [(100, 85), ("100", 85), ("1KiB", 870), ("512MiB", 456340275)]
    )
    def test_a_number_has_the_default_slop(self, limit, effective):
        assert ComponentRegistry().verify(limit).effective_bytes == effective

    def test_a_number_with_slop_and_baseline(self):
        verified = ComponentRegistry().verify("1MiB", slop_factor=0.5, baseline="1KiB")
        assert verified.available_bytes == MIB // 2 - 1024

    @pytest.mark.parametrize(
        ("given", "named"),
        [
            ({"limit": "lots"}, "limit='lots'"),
            ({"limit": -5}, "limit=-5"),
            ({"limit": True}, "limit is a number"),
            ({"limit": 2**53 + 1}, "limit=9007199254740993"),
            ({"limit": 0}, "effective limit of 0 bytes"),
            ({"baseline": -1}, "baseline=-1"),
            ({"baseline": math.nan}, "baseline is a number"),
            ({"overcommit": 0.5}, "overcommit=0.5"),
            ({"overcommit": math.nan}, "overcommit=nan"),
            ({"slop_factor": 1}, "slop_factor=1 "),
            ({"slop_factor": math.nan}, "slop_factor=nan"),
        ],
    )
    def test_bad_numbers(self, given, named):
        with pytest.raises(InvalidLimit, match=named):
            ComponentRegistry().verify(**{"limit": "1MiB", **given})


def test_the_totals_are_kept_while_ten_thousand_components_are_declared():
    registry = ComponentRegistry()
    for number in range(10_000):
        registry.declare(f"workers.group{number % 100}.w{number}", minimum=100, firm_limit=200)
        assert registry.total_minimum_bytes == 100 * (number + 1)
        assert registry.total_firm_limit_bytes == 200 * (number + 1)
        assert registry.largest.firm_limit_bytes == 200
    assert len(registry) == 10_102


def test_check_of_ten_thousand_components_looks_at_none_of_them():
    registry = ComponentRegistry()
    for number in range(10_000):
        registry.declare(f"workers.w{number}", minimum=100, firm_limit=200)

    def no_tree() -> ComponentBounds:
        raise AssertionError

    registry.tree = no_tree  # type: ignore[method-assign]
    BoundsVerifier(registry, 2_000_000).check()
