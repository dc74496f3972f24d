"""How Sphinx builds these pages."""

from importlib.metadata import version as version_of

project = "membound_async"
author = "the membound_async authors"
release = version_of("membound-async")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!membound_async).*")]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autoclass_content = "class"
default_role = "py:obj"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "membound_async"
