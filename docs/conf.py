"""How the site is built: `make docs`, strictly, from Markdown, without a network."""

import sys
from pathlib import Path

import shardwise

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "shardwise"
author = "The shardwise authors"
copyright = author
version = release = shardwise.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "generated",
]
exclude_patterns = ["_build", "_ext"]
nitpicky = True
default_role = "code"  # docstrings quote names with single backticks

myst_enable_extensions = ["colon_fence", "attrs_block"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
# Types of signatures are shown; the site documents functions, not every class that they name.
nitpick_ignore_regex = [("py:.*", ".*")]

html_theme = "furo"
html_title = f"shardwise {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
html_theme_options = {
    # Furo asks no server for fonts or scripts; neither do we.
    "light_css_variables": {"color-brand-primary": "#1f5f8b", "color-brand-content": "#1f5f8b"},
    "dark_css_variables": {"color-brand-primary": "#7cc0ea", "color-brand-content": "#7cc0ea"},
}
copybutton_exclude = ".linenos, .gp, .go"
