"""Configuration of the documentation, see https://www.sphinx-doc.org."""

import os
import pathlib
import sys

# Before any import of jax, also in the kernels that execute the pages.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE / "_ext")]
os.environ["PYTHONPATH"] = str(ROOT)

import mtljax  # noqa: E402

project = "mtljax"
author = "The mtljax developers"
copyright = "The mtljax developers"
version = release = mtljax.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",
    "pages",
    "figures",
]
offline = os.environ.get("MTLJAX_DOCS_OFFLINE") == "1"
if offline:
    extensions.append("sphinx-mathjax-offline")
else:
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
    }

exclude_patterns = [
    "_build",
    "_ext",
    "_generated",
    "conf.py",
    "examples",
    "**/.ipynb_checkpoints",
]
nitpicky = True
add_module_names = False
toc_object_entries = False

# Shapes are in the docstrings; annotations with shapes are hard to read as types.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_attr_annotations = False

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = os.environ.get("MTLJAX_DOCS_EXECUTE", "cache")
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True
# The notebooks are committed with their outputs; `make notebooks` executes them.
nb_execution_excludepatterns = ["notebooks/*"]

html_theme = "sphinx_book_theme"
html_title = "mtljax"
html_static_path = ["_static"]  # the README refers to its toy.png
html_css_files = ["narrow.css"]
html_theme_options = {
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "home_page_in_toc": False,
    "navbar_persistent": [],  # the sidebar has a search field
}
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = ">>> "
