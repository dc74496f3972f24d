"""What pyproject.toml cannot say: the optional extension, see membound_async/fastpath.py.

MEMBOUND_EXTENSION=no builds without it, MEMBOUND_EXTENSION=yes fails if it cannot be built.
"""

import os
import sys
import sysconfig

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

extension = Extension(
    "membound_async._fast",
    ["membound_async/_fast.c"],
    extra_compile_args=["-std=c11", "-Wall", "-Wextra", "-Wno-missing-field-initializers"],
    optional=wanted != "yes",
)
setup(ext_modules=[extension] if supported and wanted != "no" else [])
