"""The tree of all components that have been named, with running totals of their bounds."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import islice

from .bounds import (
    ROOT,
    ComponentBounds,
    MemoryBounds,
    MemoryBoundsBuilder,
    UsageExpr,
    split_path,
    subpath,
)
from .exceptions import InvalidComponentBounds, InvalidLimit, UnknownComponent
from .sizes import format_size, parse_size
from .verifier import BoundsVerifier, EffectiveLimit, VerifiedBounds, effective_limit_bytes

__all__ = ["ComponentRegistry", "RegistryNode"]


class RegistryNode:
    """A component's place in the registry. Only the registry changes one.

    Attributes:
        path: the dotted path; ``root`` for the root.
        own: what the component itself declares.
    """

    __slots__ = ("children", "own", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self.own = ComponentBounds(path)
        self.children: dict[str, RegistryNode] = {}

    @property
    def minimum_bytes(self) -> int:
        """Its own minimum."""
        return self.own.minimum_bytes

    @property
    def firm_limit_bytes(self) -> int | None:
        """Its own firm limit, minimum included; None if only the quota bounds it."""
        return self.own.firm_limit_bytes

    def bounds(self) -> ComponentBounds:
        """Give what it and everything in it declare, as it is now."""
        # A list first, which is made at once: another thread may be naming a component.
        below = tuple(child.bounds() for child in [*self.children.values()])
        return ComponentBounds(self.path, self.own.minimum, self.own.firm, below)

    def walk(self) -> Iterator[RegistryNode]:
        """Give this node and all below it, each before those below it."""
        yield self
        for child in self.children.values():
            yield from child.walk()

    def __repr__(self) -> str:
        return f"<RegistryNode {self.path!r}: {_in_words(self.own)}>"


class ComponentRegistry:
    """All components by their dotted paths, and what they declare.

    A component is there from the moment its path is first named, and so are those that
    its path leads through; the root is always there. What is declared is added up as it
    is declared, so that the totals cost the same for ten components and for ten thousand.

    It is plain data: nothing in it waits, and it is not for several threads at once. An
    error has changed nothing.
    """

    def __init__(self) -> None:
        self._root = RegistryNode(ROOT)
        self._nodes = {ROOT: self._root}
        self._total_minimum_bytes = 0
        self._total_firm_limit_bytes = 0
        self._largest = self._root

    @property
    def total_minimum_bytes(self) -> int:
        """The minimums of all components."""
        return self._total_minimum_bytes

    @property
    def total_firm_limit_bytes(self) -> int:
        """The firm limits of all components; one without a firm limit counts its minimum."""
        return self._total_firm_limit_bytes

    @property
    def largest(self) -> RegistryNode:
        """The component with the largest firm limit of its own."""
        return self._largest

    def component(self, path: str) -> RegistryNode:
        """Give the component of that path, the same one each time; it is made if need be.

        Raises:
            InvalidComponentBounds: no component can have that path; see ``split_path``.
        """
        node = self._nodes.get(path)
        if node is None:
            node = self._root
            for segment in split_path(path):
                if segment not in node.children:
                    child = RegistryNode(subpath(node.path, segment))
                    node.children[segment] = self._nodes[child.path] = child
                node = node.children[segment]
        return node

    def declare(
        self,
        path: str,
        *,
        minimum: int | str = 0,
        firm_limit: int | str | None = None,
        replace: bool = False,
    ) -> RegistryNode:
        """Declare a component's bounds as two numbers.

        Args:
            path: the component.
            minimum: bytes it needs to work at all.
            firm_limit: the most bytes it may ever hold, minimum included; None for no
                limit but the quota. With no minimum either, nothing is declared, and
                what was declared before remains.
            replace: these bounds take the place of others that the component has.

        Raises:
            InvalidComponentBounds: a size does not parse or is negative, the firm limit is
                0 or below the minimum, or the component has other bounds already.
        """
        try:
            minimum_bytes = parse_size(minimum, "minimum")
            firm_bytes = None if firm_limit is None else parse_size(firm_limit, "firm_limit")
        except (TypeError, ValueError) as error:
            raise InvalidComponentBounds(path, str(error)) from error
        firm = None
        if firm_bytes is not None:
            if minimum_bytes > firm_bytes:
                raise InvalidComponentBounds(
                    path,
                    f"its minimum of {format_size(minimum_bytes)} is above its firm limit of "
                    f"{format_size(firm_bytes)}; the firm limit includes the minimum",
                )
            firm = UsageExpr.constant("", firm_bytes - minimum_bytes)
        bounds = ComponentBounds(
            path, UsageExpr.constant("", minimum_bytes) if minimum_bytes else None, firm
        )
        self._apply([bounds], replace)
        return self.component(path)

    def register(self, path: str, source: MemoryBounds, *, replace: bool = False) -> RegistryNode:
        """Declare what ``source.specify_bounds()`` says, for a component and its parts.

        Args:
            path: the component; the parts that the source names become components in it.
            source: what knows the bounds.
            replace: these bounds take the place of all that was declared for the component
                and for everything in it.

        Raises:
            TypeError: ``source`` has no ``specify_bounds``.
            InvalidComponentBounds: it makes no sense, or other bounds are there already.
        """
        if not isinstance(source, MemoryBounds):
            raise TypeError(f"{source!r} has no specify_bounds(), so it declares no bounds")
        builder = MemoryBoundsBuilder(path)
        source.specify_bounds(builder)
        declared = {bounds.path: bounds for bounds in builder.build().walk()}
        if replace and path in self._nodes:
            for node in self._nodes[path].walk():
                declared.setdefault(node.path, ComponentBounds(node.path))
        self._apply(declared.values(), replace)
        return self.component(path)

    def bounds(self, path: str) -> ComponentBounds:
        """Give what a component and everything in it declare, as it is now.

        Raises:
            UnknownComponent: no component of that path has been named.
        """
        if path not in self._nodes:
            raise UnknownComponent(path, tuple(islice(self._nodes, 20)))
        return self._nodes[path].bounds()

    def tree(self) -> ComponentBounds:
        """Give what all components declare, as it is now."""
        return self._root.bounds()

    def walk(self) -> Iterator[RegistryNode]:
        """Give the root and all other components, each before those in it."""
        return self._root.walk()

    def __iter__(self) -> Iterator[str]:
        """Give the paths of all components, in the order of ``walk()``."""
        return (node.path for node in self.walk())

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, path: object) -> bool:
        return path in self._nodes

    def verify(
        self,
        limit: EffectiveLimit | int | str,
        *,
        overcommit: float = 1.0,
        baseline: int | str = 0,
        slop_factor: float = 0.15,
    ) -> VerifiedBounds:
        """Check that what is declared fits into a limit.

        Args:
            limit: a ``MemoryLimit``, or a number of bytes such as ``"512MiB"``.
            overcommit: how many times the available memory the firm limits together may
                promise; at least 1.
            baseline: bytes that the process has before any component starts.
            slop_factor: part of the limit to hold back, if the limit is only a number.

        Raises:
            InvalidLimit: one of these makes no sense, or the limit leaves nothing above
                the baseline.
            InsufficientMinimumMemory, FirmLimitExceedsAvailable: see ``BoundsVerifier``.
        """
        try:
            baseline_bytes = parse_size(baseline, "baseline")
            if isinstance(limit, (int, str)):
                limit_bytes = parse_size(limit, "limit")
                effective_bytes = effective_limit_bytes(limit_bytes, slop_factor)
            else:
                effective_bytes, slop_factor = limit.effective_bytes, limit.slop_factor
        except (TypeError, ValueError) as error:
            raise InvalidLimit(str(error)) from error
        return BoundsVerifier(
            self, effective_bytes, baseline_bytes, overcommit, slop_factor=slop_factor
        ).verify()

    def _apply(self, declared: Collection[ComponentBounds], replace: bool) -> None:
        """Set the bounds of some components, of all or of none."""
        if not replace:
            declared = [bounds for bounds in declared if self._is_news(bounds)]
        for bounds in declared:
            self._set(self.component(bounds.path), bounds)

    def _is_news(self, bounds: ComponentBounds) -> bool:
        node = self._nodes.get(bounds.path)
        if node is None or not node.own.is_declared:
            return True
        if bounds.is_declared and _own_bytes(bounds) != _own_bytes(node.own):
            raise InvalidComponentBounds(
                bounds.path,
                f"{_in_words(bounds)}, but it has {_in_words(node.own)} already; declare it "
                "once, or with replace=True",
            )
        return False

    def _set(self, node: RegistryNode, bounds: ComponentBounds) -> None:
        before, node.own = node.own, bounds
        if bounds.subcomponents:
            node.own = ComponentBounds(node.path, bounds.minimum, bounds.firm)
        self._total_minimum_bytes += node.own.total_minimum_bytes - before.total_minimum_bytes
        self._total_firm_limit_bytes += (
            node.own.total_firm_limit_bytes - before.total_firm_limit_bytes
        )
        firm_limit_bytes = node.own.firm_limit_bytes or 0
        if node is self._largest and firm_limit_bytes < (before.firm_limit_bytes or 0):
            self._largest = max(self.walk(), key=lambda node: node.firm_limit_bytes or 0)
        elif firm_limit_bytes > (self._largest.firm_limit_bytes or 0):
            self._largest = node


def _own_bytes(bounds: ComponentBounds) -> tuple[int, int | None]:
    return bounds.minimum_bytes, bounds.firm_limit_bytes


def _in_words(bounds: ComponentBounds) -> str:
    minimum, firm_limit = _own_bytes(bounds)
    limit = "no firm limit" if firm_limit is None else f"a firm limit of {format_size(firm_limit)}"
    return f"a minimum of {format_size(minimum)} and {limit}"
