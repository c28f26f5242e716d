"""How Sphinx builds these pages: ``make docs``."""

from __future__ import annotations

import re
from pathlib import Path

import fastfusion

HERE = Path(__file__).parent


def operator_gain(work: str) -> str:
    """How many times faster than eager PyTorch, from the page of the operators."""
    page = (HERE / "performance-cpu.md").read_text()
    found = re.search(rf"^\| {re.escape(work)} \|.*?\beager ([\d.]+)", page, re.MULTILINE)
    return f"{float(found[1]):.1f}"


def model_gain(model: str) -> str:
    """The same for a whole model in inference, over its sizes, from the page of the models."""
    rows = (HERE / "performance-models.md").read_text().splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    gains = [float(c[5].split()[0]) for c in cells if c[:1] == [model] and c[2] == "inference"]
    return " to ".join(dict.fromkeys(f"{gain:.1f}" for gain in (min(gains), max(gains))))


# So that the first page tells what the tables tell.
myst_substitutions = {
    "latent_operator": operator_gain("latent_operator LSO 4x4"),
    "frequency_filter": operator_gain("frequency_filter2d circular"),
    "dilated": operator_gain("depthwise_conv2d 7x7 dilation 3 NCHW"),
    "convnext": model_gain("ConvNeXt-Tiny"),
    "lsm": model_gain("LSM"),
}

project = "fastfusion"
version = release = fastfusion.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["dollarmath", "colon_fence", "substitution"]
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
