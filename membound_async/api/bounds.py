"""What ``/memory/bounds`` says: what all components declare, and why."""

from __future__ import annotations

from typing import Any

from membound_async.bounds import ComponentBounds, UsageExpr
from membound_async.exceptions import BoundsError
from membound_async.limiter import MemoryLimiter

__all__ = ["describe_bounds"]


def describe_bounds(limiter: MemoryLimiter) -> dict[str, Any]:
    """Give the tree of bounds, with totals, what they must fit into, and whether they do."""
    tree = limiter.registry.tree()
    statistics = limiter.statistics()
    try:
        limiter.verify()
        problem = None
    except BoundsError as error:
        problem = str(error)
    return {
        "limit_bytes": statistics.limit_bytes,
        "limit_source": statistics.limit_source,
        "slop_factor": statistics.slop_factor,
        "effective_limit_bytes": statistics.effective_limit_bytes,
        "baseline_bytes": statistics.baseline_bytes,
        "available_bytes": statistics.effective_limit_bytes - statistics.baseline_bytes,
        "total_minimum_bytes": tree.total_minimum_bytes,
        "total_firm_limit_bytes": tree.total_firm_limit_bytes,
        "problem": problem,
        "bounds": _component(tree),
    }


def _component(bounds: ComponentBounds) -> dict[str, Any]:
    return {
        "path": bounds.path,
        "minimum_bytes": bounds.minimum_bytes,
        "firm_limit_bytes": bounds.firm_limit_bytes,
        "total_minimum_bytes": bounds.total_minimum_bytes,
        "total_firm_limit_bytes": bounds.total_firm_limit_bytes,
        "minimum": None if bounds.minimum is None else _expression(bounds.minimum),
        "firm": None if bounds.firm is None else _expression(bounds.firm),
        "subcomponents": [_component(sub) for sub in bounds.subcomponents],
    }


def _expression(expr: UsageExpr) -> dict[str, Any]:
    return {
        "name": expr.name,
        "kind": expr.kind,
        "value": expr.value,
        "origin": expr.origin,
        "why": str(expr),
        "children": [_expression(child) for child in expr.children],
    }
