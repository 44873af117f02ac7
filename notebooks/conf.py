"""The documentation site: `sphinx-build -W notebooks OUT`."""

import pathlib
import sys
import tomllib


HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # `generated`, and the package of this checkout

import rmsprop_jax  # noqa: E402


PROJECT = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]

project, author = PROJECT["name"], PROJECT["authors"][0]["name"]
copyright = f"2026, {author}"
release = version = rmsprop_jax.__version__
placeholders = {"{{ release }}": release, "{{ source }}": PROJECT["urls"]["Source"]}  # for `generated`

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "generated"]
exclude_patterns = ["scripts", "templates"]
templates_path = ["templates"]
default_role = "code"

nb_execution_mode = "off"  # .ci/run executes the notebooks, which are kept with their outputs
myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

autodoc_typehints = "none"  # the docstrings have shapes and dtypes
autosummary_generate = True
python_maximum_signature_line_length = 80

html_theme = "furo"
html_title = project

# What is ours must be found. The pages of others are not looked up, because a build needs no network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!rmsprop_jax\.).*")]
