"""Programs: finds them and runs them like ``python`` does."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import Any

from . import CannotStart

__all__ = [
    "async_function",
    "find_object",
    "from_program_on",
    "is_target",
    "module",
    "put_first_on_path",
    "script",
]

_HERE = os.path.dirname(__file__)

_DOTTED = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"


def is_target(word: str) -> bool:
    """Tell whether a word reads ``MODULE:OBJECT``."""
    return re.fullmatch(f"{_DOTTED}:{_DOTTED}", word) is not None


def put_first_on_path(directory: str) -> None:
    """Have modules looked for there first, where ``python`` had this command's directory."""
    if not sys.flags.safe_path:
        sys.path[0] = directory


def from_program_on(error: BaseException) -> TracebackType | None:
    """Give the traceback without the frames that are this command's own."""
    traceback = error.__traceback__
    while traceback and os.path.dirname(traceback.tb_frame.f_code.co_filename) == _HERE:
        traceback = traceback.tb_next
    return traceback


# --- scripts and modules


def script(path: str, arguments: Sequence[str]) -> Callable[[], None]:
    """Give what runs a script, or a directory or zip file with ``__main__.py`` in it.

    Raises:
        CannotStart: there is no such file, or it cannot be read.
    """
    location = os.path.abspath(path)
    importer = pkgutil.get_importer(location)
    if importer is not None:
        spec = importer.find_spec("__main__", None)
        if spec is None:
            raise CannotStart(f"can't find '__main__' module in {path!r}")
        directory = location
        run_it = partial(_run_spec, spec)
    else:
        loader = SourceFileLoader("__main__", location)
        try:
            source = loader.get_data(location)
        except OSError as error:
            raise CannotStart(f"can't open file {path!r}: {error.strerror}") from None
        directory = os.path.dirname(os.path.realpath(location))
        run_it = partial(_run_source, source, loader)

    def run() -> None:
        sys.argv = [path, *arguments]
        put_first_on_path(directory)
        run_it()

    return run


def _run_source(source: bytes, loader: SourceFileLoader) -> None:
    code = compile(source, loader.path, "exec", dont_inherit=True)
    _run_as_main(code, __file__=loader.path, __loader__=loader, __package__=None, __cached__=None)


def module(name: str, arguments: Sequence[str]) -> Callable[[], None]:
    """Give what runs a module, or the ``__main__`` of a package.

    It raises ``CannotStart`` if there is no such module.
    """

    def run() -> None:
        sys.argv = ["-m", *arguments]  # the same is seen by a package that is imported for it
        put_first_on_path(os.getcwd())
        spec = _find_runnable(name)
        sys.argv[0] = spec.origin or name
        _run_spec(spec)

    return run


def _find_runnable(name: str) -> ModuleSpec:
    spec = _find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        package, name = name, f"{name}.__main__"
        spec = _find_spec(name)
        if spec is None:
            raise CannotStart(f"{package!r} is a package without a __main__ module")
    if spec is None:
        raise CannotStart(f"no module named {name!r}")
    return spec


def _find_spec(name: str) -> ModuleSpec | None:
    if not re.fullmatch(_DOTTED, name) or name == "__main__":
        return None
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if not _is_part_of(error.name, name):
            raise
        return None


def _is_part_of(missing: str | None, name: str) -> bool:
    """Tell whether it is the module itself that was not found, not one that it imports."""
    return missing is not None and (name + ".").startswith(missing + ".")


def _run_spec(spec: ModuleSpec) -> None:
    get_code = getattr(spec.loader, "get_code", None)
    code = get_code(spec.name) if get_code is not None else None
    if code is None:
        raise CannotStart(f"{spec.name!r} has no Python code to run")
    _run_as_main(
        code,
        __file__=spec.origin,
        __loader__=spec.loader,
        __package__=spec.parent,
        __cached__=spec.cached,
        __spec__=spec,
    )


def _run_as_main(code: CodeType, **attributes: object) -> None:
    """Run code as the module ``__main__``, which it stays until the interpreter ends.

    So what the program defines can be pickled by name, threads and exit handlers that
    outlive it find its globals, and ``multiprocessing`` finds it by file or by name.
    """
    main = ModuleType("__main__")
    vars(main).update(attributes, __builtins__=builtins)
    sys.modules["__main__"] = main
    exec(code, vars(main))  # noqa: S102  running the program is what this is for


# --- objects by name


def find_object(target: str) -> Any:
    """Import ``MODULE`` of ``MODULE:OBJECT`` and give the object.

    Raises:
        CannotStart: there is no such module, or nothing of that name in it.
        Exception: whatever the module raises.
    """
    name, _, path = target.partition(":")
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not _is_part_of(error.name, name):
            raise
        raise CannotStart(f"no module named {error.name!r}") from None
    for attribute in path.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError:
            from difflib import get_close_matches

            close = get_close_matches(attribute, dir(found), 1)
            hint = f"; is it {close[0]!r}?" if close else ""
            raise CannotStart(f"{name!r} has no {path!r}{hint}") from None
    return found


def async_function(target: str) -> Callable[[], Coroutine[Any, Any, object]]:
    """Import ``MODULE`` of ``MODULE:FUNC`` and give the function.

    Raises:
        CannotStart: there is no such module or function, it is not async, or it cannot be
            called without arguments.
        Exception: whatever the module raises.
    """
    function = find_object(target)
    if not (inspect.iscoroutinefunction(function) or _has_async_call(function)):
        kind = "a function" if inspect.isfunction(function) else f"a {type(function).__name__}"
        raise CannotStart(f"{target} is {kind}, but must be an async function")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise CannotStart(
            f"{target} must do without arguments: {error}; what follows it on the command "
            "line is in sys.argv"
        ) from None
    return function  # type: ignore[no-any-return]


def _has_async_call(found: Any) -> bool:
    return callable(found) and inspect.iscoroutinefunction(found.__call__)
