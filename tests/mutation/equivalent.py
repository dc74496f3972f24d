"""Mutants that do what the module does, and why, by name: no check can find them."""

from __future__ import annotations

__all__ = ["EQUIVALENT"]

EQUIVALENT: dict[str, str] = {}
