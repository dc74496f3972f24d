"""Where the package is broken: each time in a process of its own, a copy of one that is ready.

All imports are done before, and the unit tests are collected. A copy takes some milliseconds, so
that most mutants cost less than a second. What runs is the code in Python, not that in C.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

__all__ = ["PACKAGE", "ROOT", "Found", "Killer", "attempt"]

ROOT = Path(__file__).parents[2]
_found = importlib.util.find_spec("membound_async")
assert _found is not None
assert _found.origin is not None
PACKAGE = Path(_found.origin).parent
"""The package that is imported: of this checkout, or installed."""

MOST_BYTES = 3 << 30
MOST_SECONDS = 600
"""How long a copy may take that uses no processor."""


@dataclass(frozen=True)
class Killer:
    """A check: it says what is wrong, or None.

    Attributes:
        name: of the check.
        check: what is done; raises or says what is wrong.
        cpu_seconds: after how many it is taken for an endless loop.
    """

    name: str
    check: Callable[[], str | None]
    cpu_seconds: float


@dataclass(frozen=True)
class Found:
    """What has found that something is wrong, and what it has said."""

    killer: str
    reason: str

    def __str__(self) -> str:
        return f"{self.killer}: {' '.join(self.reason.split())[:120]}"


def attempt(
    path: Path, code: CodeType, killers: Sequence[Killer], *, in_function: bool = True
) -> Found | None:
    """Run checks on the package with another code of one module, up to the first that fails.

    Args:
        path: of the module.
        code: of the module.
        killers: the checks, in order.
        in_function: whether it is another in bodies of functions only.
    """
    reader, writer = os.pipe()
    copy = os.fork()
    if copy == 0:
        try:
            _be_copy(path, code, killers, in_function, writer)
        finally:
            os._exit(1)
    os.close(writer)
    lines = _read(reader, copy).splitlines()
    os.close(reader)
    _, status = os.waitpid(copy, 0)
    if status == 0:
        found = json.loads(lines[-1])
        return None if found is None else Found(**found)
    return Found(lines[-1] if lines else "import", f"it does not end, or well ({status=})")


def _read(reader: int, copy: int) -> str:
    """Give what a copy writes until it ends, or is ended."""
    text = b""
    deadline = time.monotonic() + MOST_SECONDS
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            os.kill(copy, signal.SIGKILL)
        part = os.read(reader, 1 << 16)
        if not part:
            return text.decode()
        text += part


def _be_copy(
    path: Path, code: CodeType, killers: Sequence[Killer], in_function: bool, writer: int
) -> None:
    with open(os.devnull, "r+b") as nothing:
        for descriptor in (0, 1, 2):
            os.dup2(nothing.fileno(), descriptor)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    found = None
    change = Killer("import", lambda: _change(path, code, in_function), 30)
    for killer in (change, *killers):
        os.write(writer, f"{killer.name}\n".encode())
        signal.setitimer(signal.ITIMER_PROF, killer.cpu_seconds)  # whose signal is the end
        try:
            reason = killer.check()
        except BaseException as error:  # noqa: BLE001  a broken package may raise anything
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            found = asdict(Found(killer.name, reason[:400]))
            break
    os.write(writer, json.dumps(found).encode())
    os._exit(0)


# --- another code


def _change(path: Path, code: CodeType, in_function: bool) -> None:
    """Have the package run that code for one of its modules."""
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    if in_function and _exchange(sys.modules[name], code):
        return
    for each in [*sys.modules]:
        if each.startswith(("membound_async", "tests.")) and "mutation" not in each:
            del sys.modules[each]
    sys.meta_path.insert(0, _Finder(name, path, code))


def _exchange(module: ModuleType, code: CodeType) -> bool:
    """Have the functions of a module do what they do in that code; False if that cannot be."""
    codes = {(each.co_qualname, each.co_firstlineno): each for each in _codes(code)}
    for function in _functions(module, module.__name__):
        before = function.__code__
        after = codes.get((before.co_qualname, before.co_firstlineno), before)
        if after.co_freevars != before.co_freevars:
            return False
        function.__code__ = after
    return True


def _codes(code: CodeType) -> Iterator[CodeType]:
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield each
            yield from _codes(each)


def _functions(owner: ModuleType | type, module: str) -> Iterator[FunctionType]:
    """Give the functions of a module and of its classes."""
    for each in vars(owner).values():
        if isinstance(each, property):
            each = each.fget
        elif isinstance(each, (staticmethod, classmethod)):
            each = each.__func__
        if getattr(each, "__module__", None) != module:
            continue
        if isinstance(each, FunctionType):
            yield each
        elif isinstance(each, type):
            yield from _functions(each, module)


class _Finder:
    """Finds one module, and loads another code for it."""

    def __init__(self, name: str, path: Path, code: CodeType) -> None:
        self._name = name
        self._loader = _Loader(name, str(path))
        self._loader.code = code

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        return importlib.util.spec_from_file_location(name, loader=self._loader)


class _Loader(SourceFileLoader):
    code: CodeType

    def get_code(self, fullname: str) -> CodeType:
        return self.code
