"""Configure Sphinx: the pages of this folder, the docstrings, and two notebooks run at build."""

from __future__ import annotations

import re
import shutil
from importlib import metadata
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

HERE = Path(__file__).parent
ROOT = HERE.parent

project = "bidfmkd-fast"
author = copyright = "bidfmkd-fast contributors"
release = metadata.version("bidfmkd-fast")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["package_index.md"]
html_theme = "furo"
html_title = f"bidfmkd-fast {release}"
html_show_sphinx = False
html_math_renderer = "mathml"  # `_math` below; MathJax would come from another host
html_static_path = ["_static"]
html_css_files = ["wide_tables.css"]
templates_path: list[str] = []

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_ipywidgets_js: dict[str, str] = {}  # widgets would load code from another host

default_role = "literal"  # docstrings put code between single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
napoleon_use_ivar = True  # properties are documented where they are defined
python_use_unqualified_type_names = True

linkcheck_ignore = [r"https?://"]  # the build has no network; only links inside are checked

# Pages of the root folder, which a page here includes under its name in lower case.
INCLUDED = ("CONTRIBUTING", "CHANGELOG", "SECURITY")
NOTEBOOKS = ("adapt_from_a_folder", "gradients_from_queries")


def _bring_notebooks(app: Sphinx) -> None:
    """Copy the notebooks of `examples/`, which Sphinx cannot read outside of its folder."""
    (HERE / "notebooks").mkdir(exist_ok=True)
    for name in NOTEBOOKS:
        shutil.copy(ROOT / "examples" / f"{name}.ipynb", HERE / "notebooks")


def _within_the_site(app: Sphinx, page: str, source: list[str]) -> None:
    """Let links to pages and notebooks outside of this folder lead to those of the site."""
    for name in INCLUDED:
        source[0] = source[0].replace(f"](../{name}.md", f"]({name.lower()}.md")
    for name in NOTEBOOKS:
        source[0] = source[0].replace(f"(../examples/{name}.ipynb", f"(notebooks/{name}.ipynb")
    # A folder is no page; its name says where it lies in a clone.
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./(examples/\w+)/?\)", r"`\2`", source[0])


def _math(writer: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Write TeX as MathML."""
    block = isinstance(node, nodes.math_block)
    writer.body.append(tex2mathml(node.astext().strip(), as_block=block))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (_math, None), (_math, None))
    app.connect("builder-inited", _bring_notebooks)
    app.connect("source-read", _within_the_site)
