"""What pyproject.toml cannot say: the optional extensions, see fastpath.py and allocator/.

MEMBOUND_EXTENSION=no builds without them, =yes fails if they cannot be built.
"""

import os
import sys
import sysconfig
from glob import glob

from setuptools import Extension, setup

wanted = os.environ.get("MEMBOUND_EXTENSION", "").strip().lower()
if wanted not in ("", "yes", "no"):
    raise SystemExit(f"MEMBOUND_EXTENSION={wanted!r}: use yes, no or nothing")

# It reads Linux's clock as CPython does, and relies on the GIL.
supported = (
    sys.platform == "linux"
    and sys.implementation.name == "cpython"
    and not sysconfig.get_config_var("Py_GIL_DISABLED")
)
if wanted == "yes" and not supported:
    raise SystemExit("MEMBOUND_EXTENSION=yes: it is for CPython with a GIL, on Linux")

WARNINGS = ["-Wall", "-Wextra", "-Wno-missing-field-initializers"]
extensions = [
    Extension(
        "membound_async._fast",
        ["membound_async/_fast.c"],
        extra_compile_args=["-std=c11", *WARNINGS],
        optional=wanted != "yes",
    ),
    Extension(
        "membound_async.allocator._tracker",
        ["membound_async/allocator/_tracker.c"],
        depends=glob("membound_async/allocator/*.h"),
        extra_compile_args=["-std=gnu11", "-O2", "-fno-plt", "-fvisibility=hidden", *WARNINGS],
        optional=wanted != "yes",
    ),
]
setup(ext_modules=extensions if supported and wanted != "no" else [])
