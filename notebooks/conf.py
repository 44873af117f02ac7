"""The documentation site: `sphinx-build -W notebooks OUT`."""

import json
import pathlib
import sys
import tomllib
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml


HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the files beside this one, and the package of this checkout

import dialect_pages  # noqa: E402
import equations  # noqa: E402

import rmsprop_jax  # noqa: E402


PROJECT = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]

project, author = PROJECT["name"], PROJECT["authors"][0]["name"]
copyright = f"2026, {author}"
release = version = rmsprop_jax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["scripts", "static", "templates"]
templates_path = ["templates"]
default_role = "code"

nb_execution_mode = "off"  # .ci/run executes the notebooks, which are kept with their outputs
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

autodoc_typehints = "none"  # the docstrings have shapes and dtypes
autosummary_generate = True
python_maximum_signature_line_length = 80

html_theme = "furo"
html_title = project
html_theme_options = {
    "source_repository": PROJECT["urls"]["Source"],
    "source_branch": "main",
    "source_directory": "notebooks/",
}
html_static_path, html_css_files, html_favicon = ["static"], ["site.css"], "static/favicon.svg"
pygments_style, pygments_dark_style = "default", "github-dark"

# What is ours must be found. The pages of others are not looked up, because a build needs no network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!rmsprop_jax\.).*")]


# --- What Sphinx calls ------------------------------------------------------------------------------------


def visit_inline(self: Any, node: nodes.Element) -> None:
    """MathML in a line."""
    self.body.append(tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def visit_block(self: Any, node: nodes.Element) -> None:
    """MathML of its own. What is wider than the page scrolls."""
    mathml = tex2mathml(node.astext(), as_block=True).replace("<mtd>", '<mtd style="text-align: left">')
    self.body.append(f'<div style="overflow-x: auto">{mathml}</div>')
    raise nodes.SkipNode


def on_source(app: Any, name: str, source: list[str]) -> None:
    """Fills in what stands in pyproject.toml, and says where a notebook can be run."""
    address = PROJECT["urls"]["Source"]
    for placeholder, text in (("{{ release }}", release), ("{{ source }}", address)):
        source[0] = source[0].replace(placeholder, text)
    if (HERE / f"{name}.ipynb").exists():
        notebook = json.loads(source[0])
        repository = address.removeprefix("https://github.com/")
        colab = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}.ipynb"
        notebook["cells"][0]["source"].append(f"\n\n[Open it in Colab]({colab})\n")
        source[0] = json.dumps(notebook)


def on_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Edits a docstring before Sphinx reads it."""
    lines[:] = equations.escaped(equations.displayed(lines))
    if obj in rmsprop_jax.dialects.DIALECTS:
        lines += dialect_pages.page(obj)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", inline_renderers=(visit_inline, None), block_renderers=(visit_block, None))
    app.connect("source-read", on_source)
    app.connect("autodoc-process-docstring", on_docstring, priority=400)  # before napoleon
