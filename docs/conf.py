"""Sphinx configuration.

Build the pages without executing the notebooks, or with them (two to three minutes on two cores):

    sphinx-build -W --keep-going -D nb_execution_mode=off docs docs/build/html
    sphinx-build -W --keep-going docs docs/build/html
"""

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "extensions")]

project = "tljax"
author = "The tljax authors"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "myst_nb",
    "benchmark_tables",
]
exclude_patterns = ["build", "extensions"]
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "furo"
html_title = "tljax"

# Single backticks in docstrings link to a documented name where there is one.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", ".*"),  # docstrings also name what the API reference leaves out
    ("py:exc", ".*"),
    ("py:class", r"(?!tljax\.).*"),  # other libraries
    ("py:class", r"tljax\.(attack|data|runtime|train\.checkpoint|features\.extract\.View).*"),
]
autosummary_generate = False
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_attr_annotations = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_timeout = 240
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_merge_streams = True


def simplify_signature(*event: Any) -> tuple[str, str | None] | None:
    """Drop value ranges from annotations, and write defaults so that Sphinx can parse them."""
    *_, signature, returns = event
    if not signature:
        return None
    signature = re.sub(r"(?:~?typing\.)?Annotated\[(\w+), [^()]*\([^()]*\)\]", r"\1", signature)
    return signature.replace("<factory>", "..."), returns


def keep_first_line(
    _app: Any, kind: str, _name: str, _object: Any, _options: Any, lines: list[str]
):
    """Keep napoleon from reading the first words of a constant's docstring as its type."""
    if kind in ("data", "attribute", "property"):
        lines[:0] = ["..", ""]  # an empty comment


def setup(app: Any) -> None:
    """Connect the two functions to autodoc; the second one runs before napoleon."""
    app.connect("autodoc-process-signature", simplify_signature)
    app.connect("autodoc-process-docstring", keep_first_line, priority=400)
