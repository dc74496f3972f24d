"""How long `import membound_async` takes beyond its three dependencies. Goal: under 100 ms.

    python tests/benchmarks/import_time.py [--rounds 20]

Each round is a new interpreter that has imported the dependencies already; the bytecode
of the package is there, as it is after an installation.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

PROGRAM = """
import time
import anyio, anyio.from_thread, anyio.lowlevel, anyio.to_thread, psutil, structlog
started = time.perf_counter()
import membound_async
print(time.perf_counter() - started)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as bytecode:
        environ = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode}
        environ.pop("PYTHONDONTWRITEBYTECODE", None)
        first, *seconds = (
            float(subprocess.check_output([sys.executable, "-c", PROGRAM], env=environ))
            for _ in range(rounds + 1)
        )
    print("import membound_async, its dependencies being there")
    print(f"  median of {rounds}        {statistics.median(seconds) * 1e3:6.1f} ms (goal: 100)")
    print(f"  slowest             {max(seconds) * 1e3:6.1f} ms")
    print(f"  without bytecode    {first * 1e3:6.1f} ms")


if __name__ == "__main__":
    main()
