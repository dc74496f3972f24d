"""``python -m tests.simulation``; see `tests.simulation.campaign`."""

from __future__ import annotations

from .campaign import main

if __name__ == "__main__":
    raise SystemExit(main())
