"""``python -m membound_async.cli``: the same as ``membound``."""

from __future__ import annotations

import sys

from membound_async.cli import main

if __name__ == "__main__":
    sys.exit(main())
