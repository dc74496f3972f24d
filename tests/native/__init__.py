"""C helpers of the tests, built by the interpreter's own compiler when they are needed."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

__all__ = ["compiler", "load"]

FOLDER = Path(__file__).parent
BUILT = FOLDER.parent.parent / "build" / f"tests-{sys.implementation.cache_tag}"


def compiler() -> list[str] | None:
    """Give the C compiler's command; None if there is none."""
    command = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "gcc")
    return command if shutil.which(command[0]) else None


def load(name: str) -> ModuleType:
    """Give the module that ``name``.c is, built again if the source is newer."""
    source = FOLDER / f"{name}.c"
    library = BUILT / f"{name}.so"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        command = compiler()
        assert command, "there is no C compiler"
        BUILT.mkdir(parents=True, exist_ok=True)
        building = library.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [
                *command,
                *("-shared", "-fPIC", "-O2", "-g", "-pthread", "-std=gnu11", "-Wall", "-Wextra"),
                f"-I{sysconfig.get_path('include')}",
                *(str(source), "-o", str(building)),
            ],
            check=True,
        )
        building.replace(library)
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
