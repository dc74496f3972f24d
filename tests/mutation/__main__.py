"""Breaks the core on purpose, one place at a time, and says what has found it.

    python -m tests.mutation

tries the seeded defects, or those that have the words given in their names; and

    python -m tests.mutation --mutants quota.py ledger.py waiters.py

all mutants of these modules, or `--sample` of each. The exit status is 1 if one survives.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from random import Random
from typing import TYPE_CHECKING

os.environ["MEMBOUND_EXTENSION"] = "no"  # the defects are in the code in Python

from tests.mutation.bench import PACKAGE, Killer, attempt
from tests.mutation.defects import DEFECTS, Defect
from tests.mutation.equivalent import EQUIVALENT
from tests.mutation.killers import by_chance, simulated, unit_tests, with_tests
from tests.mutation.mutants import mutants

if TYPE_CHECKING:
    import pytest

OF_LEDGER = ("waiters", "quota", "holdings", "limiter", "transfer", "resources")
OF_LIMITER = (
    "grant",
    "pressure",
    "limiter",
    "deadlocks",
    "reclaim",
    "limits",
    "probes",
    "transfer",
)
LEDGER = ("quota.py", "ledger.py", "waiters.py", "rules.py")
COSTLY = "small_cost small_the_cost little_is_remembered hundreds_of_sequences"


def must_pass_whole(modules: Iterable[str], killers: Sequence[Killer]) -> None:
    """Check that nothing is found in modules that are as they are, put in place as a defect is.

    Raises:
        RuntimeError: something is found; then all that is found in defects says nothing.
    """
    for module in modules:
        path = PACKAGE / module
        code = compile(path.read_text(encoding="utf-8"), path, "exec")
        for in_function in (True, False):
            if found := attempt(path, code, killers, in_function=in_function):
                raise RuntimeError(f"{module} is whole, but {found}")


def try_defects(defects: Sequence[Defect], items: Sequence[pytest.Item]) -> int:
    """Try seeded defects; give how many survive."""
    of_ledger = [*by_chance(1, 4), unit_tests(items, OF_LEDGER, but=COSTLY)]
    of_limiter = [*by_chance(1, 4)[-1:], unit_tests(items, OF_LIMITER, but=COSTLY)]
    must_pass_whole({defect.module for defect in defects}, of_ledger[:-1])
    survived = 0
    for defect in defects:
        others = of_ledger if defect.module in LEDGER else of_limiter
        killers = [simulated(range(700), 120), *others]
        path = PACKAGE / defect.module
        code = compile(defect.source(path.read_text(encoding="utf-8")), path, "exec")
        found = attempt(path, code, killers)
        survived += found is None
        print(f"{defect.module:<13}{defect.name:<70} {found or 'SURVIVES'}", flush=True)
    print(f"{len(defects)} defects, {survived} survive")
    return survived


def try_mutants(
    modules: Sequence[str], words: Sequence[str], sample: int | None, seed: int,
    items: Sequence[pytest.Item],
) -> int:  # fmt: skip
    """Try mutants of modules; give how many survive that are not known to be equivalent."""
    killers = [
        *by_chance(1, 1)[:2],
        unit_tests(items, OF_LEDGER[:3], but=COSTLY),
        *by_chance(1, 1)[2:],
        *by_chance(5, 4),
        unit_tests(items, OF_LEDGER[3:], but=COSTLY),
        unit_tests(items, OF_LEDGER[:2]),
    ]
    must_pass_whole(modules, killers[:2])
    survived = 0
    for module in modules:
        path = PACKAGE / module
        made = list(mutants(path))
        chosen = [each for each in made if all(word in each.name for word in words)]
        if sample is not None:
            chosen = Random(seed).sample(chosen, min(sample, len(chosen)))
        print(f"{module}: {len(chosen)} of {len(made)} mutants", flush=True)
        by: Counter[str] = Counter()
        for mutant in chosen:
            if mutant.name in EQUIVALENT:
                by["equivalent"] += 1
                continue
            found = attempt(path, mutant.code, killers, in_function=mutant.in_function)
            by[found.killer if found else "nothing"] += 1
            if found is None:
                print(f"SURVIVES line {mutant.line}: {mutant.name}", flush=True)
        counted = len(chosen) - by["equivalent"]
        killed = counted - by["nothing"]
        survived += by["nothing"]
        print(
            f"{module}: {killed} of {counted} killed ({killed / max(1, counted):.1%}), "
            f"{by['equivalent']} equivalent; by {dict(by)}",
            flush=True,
        )
    return survived


def main() -> int:
    """Do what the command line says; give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("words", nargs="*", help="what names have in them")
    parser.add_argument("--mutants", nargs="+", metavar="MODULE", default=[])
    parser.add_argument("--sample", type=int, metavar="N", help="try so many of each module")
    parser.add_argument("--seed", type=int, default=1, help="which ones")
    options = parser.parse_args()
    if options.mutants:
        trying = partial(try_mutants, options.mutants, options.words, options.sample, options.seed)
        return with_tests(OF_LEDGER, trying) > 0
    chosen = [each for each in DEFECTS if all(word in each.name for word in options.words)]
    return with_tests(OF_LEDGER + OF_LIMITER, partial(try_defects, chosen)) > 0


if __name__ == "__main__":
    sys.exit(main())
