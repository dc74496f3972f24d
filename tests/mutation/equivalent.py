"""Mutants that do the same as what they are made of: no check can find them. Why, by their names."""

from __future__ import annotations

__all__ = ["EQUIVALENT"]

EQUIVALENT: dict[str, str] = {}
