"""How Sphinx builds these pages."""

import tomllib
from pathlib import Path

_pyproject = Path(__file__).parent.parent / "pyproject.toml"

project = "membound_async"
author = "the membound_async authors"
copyright = author
release = tomllib.loads(_pyproject.read_text(encoding="utf-8"))["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!membound_async).*")]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
autoclass_content = "class"
add_module_names = False  # what these pages describe is imported from the package itself
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
default_role = "py:obj"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"membound_async {release}"
html_copy_source = False
