"""How Sphinx builds these pages: ``make docs``."""

from __future__ import annotations

import fastfusion

project = "fastfusion"
version = release = fastfusion.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_mock_imports: list[str] = []
nitpicky = False
html_theme = "furo"
html_title = f"fastfusion {version}"
html_copy_source = False
exclude_patterns = ["_build"]
