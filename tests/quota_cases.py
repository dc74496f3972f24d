"""The cases of the quota rule that come with the design, for whoever implements it."""

from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from membound_async.rules import Polynomial, Rule

__all__ = ["CASES", "DESIGN", "HALF_CASES", "OURS", "Case"]

HERE = Path(__file__).parent


class Case(NamedTuple):
    """What happens in one case: requests that are admitted or refused at once, and releases."""

    limit_bytes: int
    rule: Fraction | Rule
    operations: list[tuple[str, str, int, bool]]
    """``request`` or ``release``, the component, bytes, and whether it is admitted."""

    @property
    def share(self) -> Fraction:
        """The part of what nobody else has; of a case of that rule."""
        assert isinstance(self.rule, Fraction)
        return self.rule


def _read(path: Path) -> list[Any]:
    return [
        pytest.param(
            Case(
                case["limit"],
                Fraction(*case["share"]) if case["rule"] == "half" else Polynomial(),
                [
                    (what, name, nbytes, end == ["admit"])
                    for what, name, nbytes, *end in case["ops"]
                ],
            ),
            id=f"{path.parent.parent.name}: {case['name']}",
        )
        for case in json.loads(path.read_text())
    ]


OURS = HERE / "vectors" / "quota.json"
DESIGN = Path(os.environ.get("VECTORS", HERE.parents[1] / "shared" / "vectors")) / "quota.json"

CASES = [case for path in (OURS, DESIGN) if path.exists() for case in _read(path)]
"""The cases of both rules: our copy, and the design's own."""

HALF_CASES = [case for case in CASES if isinstance(case.values[0].rule, Fraction)]
"""Those of the rule "half of what nobody else has"."""
