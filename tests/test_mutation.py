"""The check of the checks: what it breaks, and that it finds out. `python -m tests.mutation`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutation.bench import PACKAGE, ROOT
from tests.mutation.defects import DEFECTS, Defect
from tests.mutation.mutants import mutants

SOURCE = '''
"""A docstring."""
LIMIT: int = 3


def found(x: int, n: int = 1) -> bool:
    assert x < 9
    while x:
        x -= n
        if x > 2 and not n:
            break
    print(x)
    return False
'''


def test_mutants_of_a_function(tmp_path: Path):
    path = tmp_path / "m.py"
    path.write_text(SOURCE)
    made = {(each.name, each.line, each.in_function) for each in mutants(path)}
    assert made == {
        ("m : LIMIT: int = 3 -> LIMIT: int = 4", 3, False),
        ("m : LIMIT: int = 3 -> LIMIT: int = 2", 3, False),
        ("m found: 1 -> 2", 6, False),
        ("m found: 1 -> 0", 6, False),
        ("m found: while x: -> while not x:", 8, True),
        ("m found: x -= n -> x += n", 9, True),
        ("m found: x -= n -> pass", 9, True),
        ("m found: if x > 2 and (not n): -> if x >= 2 and (not n):", 10, True),
        ("m found: if x > 2 and (not n): -> if x <= 2 and (not n):", 10, True),
        ("m found: if x > 2 and (not n): -> if x > 3 and (not n):", 10, True),
        ("m found: if x > 2 and (not n): -> if x > 1 and (not n):", 10, True),
        ("m found: if x > 2 and (not n): -> if x > 2 or not n:", 10, True),
        ("m found: if x > 2 and (not n): -> if x > 2 and n:", 10, True),
        ("m found: break -> continue", 11, True),
        ("m found: print(x) -> pass", 12, True),
        ("m found: return False -> return True", 13, True),
    }


def test_a_mutant_does_what_its_name_says(tmp_path: Path):
    path = tmp_path / "m.py"
    path.write_text("def double(x):\n    return 2 * x\n")
    done = {}
    for mutant in mutants(path):
        namespace: dict = {}
        exec(mutant.code, namespace)
        done[mutant.name.partition(" -> ")[2]] = namespace["double"](5)
    assert done == {"return None": None, "return 2 + x": 7, "return 3 * x": 15, "return 1 * x": 5}


def test_each_defect_is_in_its_module_still():
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS)
    for defect in DEFECTS:
        compile(defect.source((PACKAGE / defect.module).read_text()), defect.module, "exec")
    with pytest.raises(ValueError, match="wrong: 'x' is 2 times there"):
        Defect("wrong", "rules.py", "x", "y").source("x + x")


PROGRAM = """
import os
os.environ["MEMBOUND_EXTENSION"] = "no"
from membound_async.rules import Polynomial, Share
from tests.mutation.bench import PACKAGE, Killer, attempt

path = PACKAGE / "rules.py"
text = path.read_text()

def tried(check, old="consumers + 1", new="consumers + 2", in_function=True):
    code = compile(text.replace(old, new), path, "exec")
    return str(attempt(path, code, [Killer("it", check, 0.3)], in_function=in_function))

def part():
    from membound_async.rules import Polynomial
    return str(Polynomial().part(1))

def forever():
    while True:
        pass

print(tried(lambda: None), tried(lambda: str(Polynomial().part(1))), sep="; ")
print(tried(part, in_function=False), Polynomial().part(1), sep="; ")
print(tried(lambda: str(Polynomial.unit)), tried(part, "unit = 1", "unit = x", False), sep="; ")
print(tried(forever), tried(lambda: os._exit(3)), sep="; ")
print(tried(lambda: 1 / 0))
"""


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_copy_says_what_it_finds_and_the_next_one_is_whole():
    assert run("-c", PROGRAM).splitlines() == [
        "None; it: (1, 3)",
        "it: (1, 3); (1, 2)",
        "it: 1; it: NameError: name 'x' is not defined",
        "it: it does not end, or well (status=27); it: it does not end, or well (status=768)",
        "it: ZeroDivisionError: division by zero",
    ]


@pytest.mark.slow
def test_the_command_says_what_has_found_a_defect():
    said = run("-m", "tests.mutation", "firm", "limit", "looked")
    assert "the firm limit is not looked at" in said
    assert "simulator: in " in said
    assert said.endswith("1 defects, 0 survive\n")
