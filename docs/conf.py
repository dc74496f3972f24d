"""How Sphinx builds these pages."""

import re
import tomllib
from pathlib import Path
from typing import Any

_pyproject = Path(__file__).parent.parent / "pyproject.toml"

project = "membound_async"
author = "the membound_async authors"
copyright = author
release = tomllib.loads(_pyproject.read_text(encoding="utf-8"))["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!membound_async).*"),
    ("py:class", r"membound_async\..*\.T"),  # a type variable
]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
autoclass_content = "class"
add_module_names = False  # what these pages describe is imported from the package itself
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 110
toc_object_entries_show_parents = "hide"
default_role = "py:obj"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"membound_async {release}"
html_copy_source = False


def without_internals(*event: Any) -> tuple[str, str | None] | None:
    """Leave out of signatures what only the package itself can pass or get."""
    *_, parameters, returned = event
    if re.search(r"\b_[A-Z]", f"{parameters} {returned}"):
        return "()" if returned else "", None
    return None


def setup(app: Any) -> None:
    """Is called by Sphinx."""
    app.connect("autodoc-process-signature", without_internals)
