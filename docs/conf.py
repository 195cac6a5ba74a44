"""Sphinx: `make docs`. Pages are Markdown that reads as well on a code host."""

import sys
from pathlib import Path

import tokquant

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "tokquant"
version = release = tokquant.__version__
copyright = "the tokquant authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "docstrings", "commands"]
exclude_patterns = ["_build"]

myst_heading_anchors = 3
highlight_language = "text"
smartquotes = False  # --scales has two hyphens

# docstrings put code in single backticks, as Markdown does
default_role = "code"
autodoc_member_order = "bysource"
autodoc_default_options = {"exclude-members": "model_config"}  # pydantic's own
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

nitpicky = True
nitpick_ignore_regex = [
    # other libraries: their inventories would have to be fetched
    ("py:.*", r"(torch|numpy|pydantic|transformers|diffusers|pathlib|os|collections|typing|types)\..*"),
    # types that signatures name and `tokquant` does not
    ("py:.*", r"tokquant\.\w+\..*"),
]

html_theme = "furo"
html_title = "tokquant"
html_show_sourcelink = False
