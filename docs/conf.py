"""Sphinx configuration.

Build the pages without executing the notebooks, or with them (about five minutes on two cores):

    sphinx-build -W --keep-going -D nb_execution_mode=off docs docs/build/html
    sphinx-build -W --keep-going docs docs/build/html
"""

import sys
from pathlib import Path

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
autosummary_generate = False
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
# Python and shell blocks are plain fences: tests/test_docs.py runs them.
nb_execution_mode = "cache"
nb_execution_timeout = 240
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_merge_streams = True
