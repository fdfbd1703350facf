"""The documentation site: Sphinx, since docstrings are in its markup; tutorials are run when it is built."""

import os
import re
from importlib.metadata import version as version_of

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tutorials: threads would cost more than they give

project = "pyro-nbvae"
author = "pyro-nbvae contributors"
copyright = f"2026, {author}"
release = version_of("pyro-nbvae")
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "myst_nb",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "pyro-nbvae"

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Reference", "notes_style")]
napoleon_use_ivar = True


_STARRED = "event_shape|latent_shape|options|parameters|rest|args|kwargs"


def _escape(app, what, name, obj, options, lines):
    """Docstrings write shapes as (B, *event_shape) and absolute values as |l|, which the markup takes for its own."""
    for k, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            line = re.sub(rf"(?<![\\*])(\*{{1,2}})(?=({_STARRED})\b)", r"\\\1", line)
            lines[k] = line.replace(r"\**", r"\*\*").replace("|l|", r"\|l\|")


def setup(app):
    app.connect("autodoc-process-docstring", _escape, priority=900)
