"""What components declare: how much memory they need, how much they may use, and why."""

from __future__ import annotations

import builtins
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from numbers import Number
from typing import Literal, Protocol, Self, runtime_checkable

from .exceptions import InvalidComponentBounds
from .sizes import MAX_BYTES, format_size, human_size, parse_size

__all__ = [
    "ROOT",
    "BoundsSection",
    "ComponentBounds",
    "MemoryBounds",
    "MemoryBoundsBuilder",
    "UsageExpr",
    "split_path",
    "subpath",
]

ROOT = "root"
"""The component that all others are in; it is left out of their paths."""

MAX_DEPTH = 100
"""Paths of more segments are refused, so that a tree can be walked by recursion."""

_HAS_GC_HEADER = 1 << 14  # Py_TPFLAGS_HAVE_GC
_GC_HEADER_BYTES = sys.getsizeof([]) - list.__basicsize__


def split_path(path: str) -> tuple[str, ...]:
    """Give the segments of a component's path; none for the root.

    Raises:
        TypeError: it is no ``str``.
        InvalidComponentBounds: a segment is empty or has whitespace or control
            characters, there are more than 100, or it starts with ``root.``.
    """
    if not isinstance(path, str):
        raise TypeError(f"a component's path is a str such as 'decode.cache', not {path!r}")
    if path == ROOT:
        return ()
    segments = tuple(path.split("."))
    for segment in segments:
        # A printable character that is whitespace can only be the ASCII space.
        if not segment or not segment.isprintable() or " " in segment:
            raise InvalidComponentBounds(
                path,
                f"{segment!r} is no name; a path is names without whitespace or control "
                "characters, separated by dots, such as 'decode.cache'",
            )
    if segments[0] == ROOT:
        rest = ".".join(segments[1:])
        raise InvalidComponentBounds(path, f"the root is not part of a path; write {rest!r}")
    if len(segments) > MAX_DEPTH:
        raise InvalidComponentBounds(
            path, f"it is {len(segments)} levels deep; use at most {MAX_DEPTH}"
        )
    return segments


def subpath(parent: str, name: str) -> str:
    """Give the path of the sub-component ``name`` of the component ``parent``."""
    return name if parent == ROOT else f"{parent}.{name}"


@dataclass(frozen=True, slots=True)
class UsageExpr:
    """A number of bytes that remembers where it comes from (after Saluki).

    Build one with the class methods; combine them with ``product`` and ``sum``::

        batch = UsageExpr.product("batch", UsageExpr.config("batch_size", 500), "2KiB")
        batch.evaluate()  # 1024000
        str(batch)  # 'batch = 500 (batch_size) x 2 KiB'

    Attributes:
        kind: how the number comes about.
        name: what it is for; may be empty for a part of another expression.
        value: the number; bytes, or a count if it is a factor of a product that is not
            the last one.
        children: the factors of a product, the terms of a sum.
        origin: where a single number is from: ``"config"``, or a type's name.
    """

    kind: Literal["constant", "config", "type_size", "product", "sum"]
    name: str
    value: int
    children: tuple[UsageExpr, ...] = ()
    origin: str = ""

    @classmethod
    def constant(cls, name: str, value: int | str) -> Self:
        """Give a fixed number of bytes: an ``int``, or a ``str`` such as ``"8MiB"``.

        Raises:
            TypeError, ValueError: the name or the value makes no sense. So with the others.
        """
        return cls("constant", _checked(name), parse_size(value, name or "value"))

    @classmethod
    def config(cls, name: str, value: int | str) -> Self:
        """Give a number that the configuration sets under ``name``."""
        return cls("config", _checked(name), parse_size(value, name), origin="config")

    @classmethod
    def type_size(cls, name: str, of: object) -> Self:
        """Give the size of one object of a kind, without what it refers to.

        Args:
            name: what it is for.
            of: a class, for the fixed part of its instances; such an object; or the
                number of bytes, as ``int`` or ``str`` (``sizes.deep(sample)``, for example,
                or ``ctypes.sizeof(Record)``).
        """
        if isinstance(of, builtins.type):
            header = _GC_HEADER_BYTES if of.__flags__ & _HAS_GC_HEADER else 0
            return cls("type_size", _checked(name), of.__basicsize__ + header, (), of.__name__)
        if isinstance(of, (int, str)):
            return cls("type_size", _checked(name), parse_size(of, name), (), "type")
        if of is None or isinstance(of, Number):
            raise TypeError(f"{name} is the size of a class, an object or a size, not {of!r}")
        return cls("type_size", _checked(name), sys.getsizeof(of), (), type(of).__name__)

    @classmethod
    def product(cls, name: str, *factors: UsageExpr | int | str) -> Self:
        """Multiply; the last factor is bytes, those before it are counts."""
        return cls._combine("product", name, factors, math.prod)

    @classmethod
    def sum(cls, name: str, *terms: UsageExpr | int | str) -> Self:
        """Add up terms, which are bytes."""
        return cls._combine("sum", name, terms, builtins.sum)

    @classmethod
    def _combine(
        cls,
        kind: Literal["product", "sum"],
        name: str,
        parts: tuple[UsageExpr | int | str, ...],
        combine: Callable[[Iterator[int]], int],
    ) -> Self:
        if not parts:
            raise ValueError(f"{name or kind}: a {kind} needs at least one part")
        children = tuple(
            part if isinstance(part, UsageExpr) else UsageExpr.constant("", part) for part in parts
        )
        result = cls(kind, _checked(name), combine(child.value for child in children), children)
        if result.value > MAX_BYTES:
            raise ValueError(
                f"{result} is {format_size(result.value)}, above 2**53, more than any machine has"
            )
        return result

    def evaluate(self) -> int:
        """Give the number that it stands for."""
        return self.value

    def __str__(self) -> str:
        why = _why(self)
        return f"{self.name} = {why}" if self.name else why


def _why(expr: UsageExpr, *, is_count: bool = False) -> str:
    """Say how the number comes about, without the name."""
    if expr.kind == "sum":
        return " + ".join(_part(term, is_count=is_count) for term in expr.children)
    if expr.kind == "product":
        *counts, each = expr.children
        factors = [_part(count, is_count=True) for count in counts]
        return " x ".join([*factors, _part(each, is_count=is_count)])
    return _number(expr.value, is_count) + (f" ({expr.origin})" if expr.origin else "")


def _part(expr: UsageExpr, *, is_count: bool) -> str:
    """Say what an expression contributes to another one."""
    if expr.children:
        why = _why(expr, is_count=is_count)
        return f"({expr.name} = {why})" if expr.name else f"({why})"
    label = expr.name or expr.origin
    return _number(expr.value, is_count) + (f" ({label})" if label else "")


def _number(value: int, is_count: bool) -> str:
    if is_count:
        return f"{value:,}".replace(",", " ")
    human = human_size(value)
    # "2 KiB" is exactly that; "2.0 KiB" has been rounded.
    whole = human.replace(".0 ", " ")
    return whole if "." not in whole and parse_size(whole) == value else human


def _checked(name: object) -> str:
    """Refuse a name that would break a report; the empty one is for unnamed parts."""
    if not isinstance(name, str):
        raise TypeError(f"the name of a bound is a str, not {name!r}")
    if not name.isprintable():
        raise ValueError(f"the name {name!r} of a bound has characters that cannot be printed")
    return name


@dataclass(frozen=True, slots=True)
class ComponentBounds:
    """What one component declares, and what the components in it declare.

    Attributes:
        path: where it is in the tree.
        minimum: what it needs to work at all; None for nothing.
        firm: what it may use on top of the minimum; None if only the quota bounds it.
        subcomponents: the components in it, in the order in which they were declared.
        total_minimum_bytes: the minimums of it and of everything in it.
        total_firm_limit_bytes: the firm limits likewise; a component without one counts
            its minimum.

    Raises:
        InvalidComponentBounds: its firm limit is 0, or above 2**53 bytes.
    """

    path: str
    minimum: UsageExpr | None = None
    firm: UsageExpr | None = None
    subcomponents: tuple[ComponentBounds, ...] = ()
    total_minimum_bytes: int = field(init=False, repr=False, compare=False)
    total_firm_limit_bytes: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        minimum, firm_limit = self.minimum_bytes, self.firm_limit_bytes
        if firm_limit is None:
            firm_limit = minimum
        elif not 0 < firm_limit <= MAX_BYTES:
            raise InvalidComponentBounds(
                self.path,
                f"its firm limit is {format_size(firm_limit)}; it must be above 0 and at most "
                "2**53 bytes, or be left out (then only the quota bounds the component)",
            )
        for sub in self.subcomponents:
            minimum += sub.total_minimum_bytes
            firm_limit += sub.total_firm_limit_bytes
        # Kept, so that a total costs the same for any number of components.
        object.__setattr__(self, "total_minimum_bytes", minimum)
        object.__setattr__(self, "total_firm_limit_bytes", firm_limit)

    @property
    def minimum_bytes(self) -> int:
        """Its own minimum."""
        return 0 if self.minimum is None else self.minimum.evaluate()

    @property
    def firm_limit_bytes(self) -> int | None:
        """Its own firm limit, minimum included; None if only the quota bounds it."""
        return None if self.firm is None else self.minimum_bytes + self.firm.evaluate()

    @property
    def is_declared(self) -> bool:
        """Whether it says anything about its own bounds."""
        return self.minimum is not None or self.firm is not None

    @property
    def largest(self) -> ComponentBounds:
        """The component of this tree that has the largest firm limit of its own."""
        return max(self.walk(), key=lambda bounds: bounds.firm_limit_bytes or 0)

    def walk(self) -> Iterator[ComponentBounds]:
        """Give this component and everything in it, each before what is in it."""
        yield self
        for sub in self.subcomponents:
            yield from sub.walk()

    def tree(self) -> ComponentBounds:
        """Give the tree itself: what is verified may also be a ``ComponentRegistry``."""
        return self


@runtime_checkable
class MemoryBounds(Protocol):
    """Something that knows how much memory it needs and may use."""

    def specify_bounds(self, b: MemoryBoundsBuilder, /) -> None:
        """Write the bounds of this object and of its parts into ``b``."""


class BoundsSection:
    """The items of one side of a component's bounds, its minimum or its firm limit.

    Each method adds an item and gives the section back. Sizes are bytes, as ``int`` or as
    ``str`` such as ``"8MiB"``.

    Raises:
        InvalidComponentBounds: a name, a size or a count makes no sense; names the component.
    """

    __slots__ = ("_items", "_path", "_total_bytes")

    def __init__(self, path: str) -> None:
        self._path = path
        self._items: list[UsageExpr] = []
        self._total_bytes = 0

    def fixed(self, name: str, size: int | str) -> Self:
        """Add a fixed size."""
        return self._add(lambda: UsageExpr.constant(name, size))

    def config(self, name: str, value: int | str) -> Self:
        """Add a size that the configuration sets under ``name``."""
        return self._add(lambda: UsageExpr.config(name, value))

    def array(
        self,
        name: str,
        *,
        count: int | UsageExpr,
        each: int | str | UsageExpr | builtins.type[object],
    ) -> Self:
        """Add ``count`` things of a size: bytes, a class, or an expression that says why."""
        return self._add(lambda: _array(name, count, each))

    def type(self, name: str, of: object) -> Self:
        """Add one object of a kind; see ``UsageExpr.type_size``."""
        return self._add(lambda: UsageExpr.type_size(name, of))

    def expr(self, expr: UsageExpr) -> Self:
        """Add an expression."""
        return self._add(lambda: expr)

    def build(self) -> UsageExpr | None:
        """Give the one expression that all items make; None if there are none."""
        if len(self._items) > 1:
            return UsageExpr.sum("", *self._items)
        return self._items[0] if self._items else None

    def _add(self, make: Callable[[], UsageExpr]) -> Self:
        try:
            item = make()
            total_bytes = _total_with(item, self._total_bytes)
        except (TypeError, ValueError) as error:
            raise InvalidComponentBounds(self._path, str(error)) from error
        self._items.append(item)
        self._total_bytes = total_bytes
        return self


def _total_with(item: UsageExpr, total_bytes: int) -> int:
    if not isinstance(item, UsageExpr):
        raise TypeError(f"an expression is a UsageExpr, not {item!r}")
    if not (item.name or item.children):
        raise ValueError("an item needs a name, so that a report can say what it is for")
    total_bytes += item.value
    if total_bytes > MAX_BYTES:
        raise ValueError(
            f"with {item} it is {format_size(total_bytes)}, above 2**53, more than any machine has"
        )
    return total_bytes


def _array(
    name: str, count: int | UsageExpr, each: int | str | UsageExpr | type[object]
) -> UsageExpr:
    if not isinstance(count, (int, UsageExpr)):
        raise TypeError(f"{name}: count={count!r} is no whole number")
    if not isinstance(count, UsageExpr):
        count = UsageExpr.constant("", parse_size(count, f"{name}: count"))
    if isinstance(each, type):
        each = UsageExpr.type_size("", each)
    elif not isinstance(each, UsageExpr):
        each = UsageExpr.constant("", parse_size(each, f"{name}: each"))
    return UsageExpr.product(name, count, each)


class MemoryBoundsBuilder:
    """Collects what a component says about itself and its parts.

    ::

        def specify_bounds(self, b: MemoryBoundsBuilder) -> None:
            b.minimum.fixed("input buffer", "8MiB")
            b.firm.array("batch", count=self.batch, each=RECORD_BYTES)
            b.subcomponent("cache").firm.config("cache_bytes", self.cache_bytes)

    Attributes:
        path: the component's path.
        minimum: what it needs to work at all.
        firm: what it may use on top of that. Without any item there is no firm limit: only
            the quota bounds the component.
    """

    __slots__ = ("_subcomponents", "firm", "minimum", "path")

    def __init__(self, path: str = ROOT) -> None:
        split_path(path)
        self.path = path
        self.minimum = BoundsSection(path)
        self.firm = BoundsSection(path)
        self._subcomponents: dict[str, MemoryBoundsBuilder] = {}

    def subcomponent(self, name: str) -> MemoryBoundsBuilder:
        """Give the builder of a part of this component; the same one for the same name.

        Raises:
            InvalidComponentBounds: no such name is allowed; see ``split_path``.
        """
        builder = self
        for segment in split_path(name):
            parts = builder._subcomponents
            if segment not in parts:
                parts[segment] = MemoryBoundsBuilder(subpath(builder.path, segment))
            builder = parts[segment]
        if builder is self:
            raise InvalidComponentBounds(self.path, f"{ROOT!r} cannot be a sub-component")
        return builder

    def build(self) -> ComponentBounds:
        """Give what was collected, with all parts.

        Raises:
            InvalidComponentBounds: a firm limit is 0 or above 2**53 bytes.
        """
        return ComponentBounds(
            self.path,
            self.minimum.build(),
            self.firm.build(),
            tuple(sub.build() for sub in self._subcomponents.values()),
        )
