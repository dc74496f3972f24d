"""What the package as a whole promises: what it imports and what it ships."""

import ast
import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import membound_async

PACKAGE = Path(membound_async.__file__).parent
DEPENDENCIES = ("anyio", "psutil", "structlog")
THEIR_DEPENDENCIES = ("idna", "sniffio", "typing_extensions")

# Each layer imports only from itself and from those below it.
LAYERS = (
    {"api", "cli", "pytest_plugin"},
    {"integrations", "metrics", "testing"},
    {"inbox", "streams", "accounts", "charges"},
    {"component", "grant", "limiter", "live", "reclaim", "stalls", "eventloop", "context", "forks"},
    {"drift", "eventlog", "holdings"},
    {"hooks"},
    {"gauge", "limits", "probes", "events", "allocator", "garbage"},
    {"deadlocks"},
    {"ledger", "resources", "quota", "waiters", "stocks", "rehearsal"},
    {"advice"},
    {"bounds", "registry", "verifier", "pressure", "settings", "rules"},
    {"fastpath"},
    {"statistics"},
    {"exceptions"},
    {"sizes"},
)
PURE = {
    "advice",
    "deadlocks",
    "drift",
    "ledger",
    "quota",
    "rules",
    "stocks",
    "waiters",
    "bounds",
    "registry",
    "verifier",
    "pressure",
    "sizes",
    "exceptions",
}


def run_python(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],  # -P: not what lies in the current directory
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_nothing_beyond_its_three_dependencies():
    program = f"""
import sys
import {", ".join(DEPENDENCIES)}
there = {{name.partition(".")[0] for name in sys.modules}} | sys.stdlib_module_names
there |= {{*{THEIR_DEPENDENCIES}}}
import json, membound_async
now = {{name.partition(".")[0] for name in sys.modules}}
print(json.dumps(sorted(now - there)))
"""
    assert json.loads(run_python(program)) == ["membound_async"]


def test_every_module_can_be_imported_without_the_extras():
    program = f"""
import sys
allowed = {{"membound_async", *{(*DEPENDENCIES, *THEIR_DEPENDENCIES)}}} | sys.stdlib_module_names

class NothingElse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"no module named {{name!r}}", name=name)

sys.meta_path.insert(0, NothingElse())
import importlib, pkgutil, membound_async
names = [found.name for found in pkgutil.walk_packages(membound_async.__path__, "membound_async.")]
for name in names:
    if not name.endswith(("__main__", "pytest_plugin")):  # that is for pytest alone
        importlib.import_module(name)
print(len(names))
"""
    assert int(run_python(program)) >= 20


def test_ships_its_type_information():
    assert files("membound_async").joinpath("py.typed").is_file()
    assert files("membound_async").joinpath("_fast.pyi").is_file()
    assert files("membound_async.allocator").joinpath("_tracker.pyi").is_file()


def test_ships_the_schema_and_the_page_of_the_api():
    assert files("membound_async.api").joinpath("schema.json").is_file()
    assert files("membound_async.api").joinpath("dashboard", "index.html").is_file()


def test_ships_the_header_of_the_tracker_and_no_source_in_c():
    assert files("membound_async.allocator").joinpath("membound_tracker.h").is_file()
    if "site-packages" in str(PACKAGE):
        assert {path.name for path in PACKAGE.rglob("*.[ch]")} == {"membound_tracker.h"}


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """Give the modules of the package, and the others, that a file needs to be imported."""
    own: set[str] = set()
    others: set[str] = set()
    depth = len(path.relative_to(PACKAGE).parts)  # `from .`, `from ..` in a package inside
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        match node:
            case ast.ImportFrom(level=level, module=module, names=names) if level:
                if level == depth:
                    own |= {module.partition(".")[0]} if module else {one.name for one in names}
            case ast.ImportFrom(module=str(module)):
                others.add(module.partition(".")[0])
            case ast.Import(names=names):
                others |= {one.name.partition(".")[0] for one in names}
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), orelse=orelse):
                pending += orelse
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                pass  # what it imports, it imports later
            case _:
                pending += ast.iter_child_nodes(node)
    return own, others


def modules() -> dict[str, Path]:
    return {
        path.relative_to(PACKAGE).parts[0].removesuffix(".py"): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py" or path.parent != PACKAGE
    }


def test_every_module_has_its_layer():
    assert set(modules()) == set().union(*LAYERS)


@pytest.mark.parametrize("name", sorted(set().union(*LAYERS)))
def test_a_layer_imports_only_from_layers_below(name):
    own = {
        imported
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0].removesuffix(".py") == name
        for imported in imports_of(path)[0]
    }
    level = next(number for number, layer in enumerate(LAYERS) if name in layer)
    assert own <= set().union(*LAYERS[level:], {"_fast"})  # the same as fastpath, in C


@pytest.mark.parametrize("name", sorted(PURE))
def test_the_decision_core_knows_no_clock_and_no_event_loop(name):
    own, others = imports_of(PACKAGE / f"{name}.py")
    assert not others & {"anyio", "asyncio", "os", "psutil", "structlog", "threading", "time"}
    assert own <= PURE | {"fastpath", "rehearsal", "statistics"}
