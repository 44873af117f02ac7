"""The repository: README, CHANGELOG, notebooks, layout and imports agree with each other."""

import ast
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import figures
import jax
import numpy as np
import optax
import pages
import pytest

import rmsprop_jax


ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PACKAGE = ROOT / "rmsprop_jax"
PAGES = [ROOT / "README.md", *sorted((ROOT / "notebooks").glob("*.md")), ROOT / "tests" / "benchmarks" / "README.md"]
PAGES += [ROOT / "CHANGELOG.md", *sorted((ROOT / ".github").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{path.parent.name}/{path.name}-{i}")
    for path in PAGES
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
    # A compiled program cannot move arrays to another memory of a CPU before jax 0.11, as the page says.
    if "pinned_host" not in block or jax.__version_info__ >= (0, 11)
]


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_code_in_the_pages_runs_as_pasted(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_links_and_pictures_of_the_pages_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_the_readme_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 120
    assert len(README.split()) <= 1000


@pytest.mark.parametrize("table", [rmsprop_jax.dialects.table, rmsprop_jax.interop.table], ids=["dialects", "formats"])
def test_a_page_has_the_tables_of_the_package(table):
    rows = table()
    lines = ["| " + " | ".join(row) + " |" for row in (rows[0].keys(), *(row.values() for row in rows))]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    page = (ROOT / "notebooks" / "from_another_framework.md").read_text()
    assert "\n".join(lines).replace("|  |", "| |").replace("|  |", "| |") in page, "\n".join(lines)


CALLS = [
    pytest.param(call, id=f"{page}-{i}")
    for page, column in (("papers", 1), ("from_another_framework", 2))
    for i, call in enumerate(
        row.split(" | ")[column].strip("| `")
        for row in (ROOT / "notebooks" / f"{page}.md").read_text().splitlines()
        if re.match(r"\| .*`.*\b(dialects\.|rmsprop\().*", row)
    )
]


@pytest.mark.parametrize("call", CALLS)
def test_the_calls_in_the_tables_run(call):
    numbers = {"steps": 1000, "epoch": 100, "rate": 1e-3, "decayed": {"kernel": True, "bias": False}}
    tx = eval(call, numbers | {"optax": optax, "dialects": rmsprop_jax.dialects, "rmsprop": rmsprop_jax.rmsprop})
    params = {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}
    with jax.numpy_dtype_promotion("standard"):  # for Optax's schedules
        updates = jax.jit(lambda: tx.update(params, tx.init(params), params)[0])()
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_every_public_name_has_a_page():
    page = (ROOT / "notebooks" / "api.md").read_text()
    parts = dict(re.findall(r"currentmodule:: (\S+)\n.*?:toctree: api\n\n(.*?)```", page, re.DOTALL))
    listed = {module: set(names.split()) for module, names in parts.items()}
    assert listed == {
        "rmsprop_jax": public(rmsprop_jax) - {"dialects", "interop"},
        "rmsprop_jax.dialects": {d.__name__ for d in rmsprop_jax.dialects.DIALECTS} | {"options", "table"},
        "rmsprop_jax.interop": public(rmsprop_jax.interop),
    }


def public(module):
    return {name for name in vars(module) if not name.startswith("_")}


with (ROOT / "pyproject.toml").open("rb") as pyproject:
    ADDRESS = tomllib.load(pyproject)["project"]["urls"]["Source"]


def test_the_address_of_the_repository_stands_in_one_place():
    """And in the first cell of each notebook, which is compared with it below."""
    pages = [*PAGES, *(ROOT / "notebooks").glob("*.py")]
    assert [path.name for path in pages if ADDRESS in path.read_text()] == []


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
INSTALL = f"""# Installs rmsprop_jax where it is missing: from the checkout that this notebook is in, or else from its repository.
import importlib
import importlib.util
import pathlib


if importlib.util.find_spec("rmsprop_jax") is None:
    checkout = pathlib.Path("..").resolve()
    source = "rmsprop_jax[notebooks] @ git+{ADDRESS}"
    if (checkout / "rmsprop_jax").is_dir():
        source = f"{{checkout}}[notebooks]"
    %pip install -q "{{source}}"
    importlib.invalidate_caches()"""


def test_every_notebook_is_in_the_index():
    index = (ROOT / "notebooks" / "README.md").read_text()
    assert sorted(set(re.findall(r"\]\((\w+)\.ipynb\)", index))) == [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_outputs_and_explains_its_figures(path):
    """This checks the outputs that are committed. .ci/run executes the notebook."""
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert "".join(code[0]["source"]) == INSTALL
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    with_figure = [
        i for i, cell in enumerate(cells) if any("image/png" in x.get("data", ()) for x in cell.get("outputs", ()))
    ]
    assert len(with_figure) >= 2
    assert all(cells[i + 1]["cell_type"] == "markdown" for i in with_figure)


@pytest.mark.parametrize("page", pages.pages(), ids=lambda path: path.name)
def test_the_tables_of_the_pages_are_those_of_the_results(page):
    text = page.read_text()
    assert text == pages.with_tables(text), "python tests/benchmarks/pages.py writes them"


def test_every_table_stands_on_a_page():
    text = "".join(page.read_text() for page in pages.pages())
    assert set(re.findall("<!-- table: (.*?) -->", text)) == set(pages.TABLES)


def test_pictures_are_the_outputs_of_the_notebooks():
    """Only tests/benchmarks/figures.py writes them, so running a notebook changes none."""
    pictures = figures.from_notebooks()
    assert len(pictures) >= len(NOTEBOOKS)
    stale = [name for name, png in pictures.items() if (figures.FIGURES / f"{name}.png").read_bytes() != png]
    assert not stale, "python tests/benchmarks/figures.py writes them"
    for path in NOTEBOOKS:
        assert "savefig" not in path.read_text(), path


def test_version_is_the_top_of_the_changelog():
    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] == rmsprop_jax.__version__


# Imports point down only. Nothing else of the package may be imported by a module of a lower floor.
FLOORS = [
    ["_bits", "_placement", "_checks", "_digits", "_equality", "_text"],
    ["_storage", "_trees"],
    ["_pytree"],
    ["_rmsprop", "_gradients"],
    ["_states"],
    ["_carry", "_rounding"],
    ["interop/_arrays"],
    ["interop/_named"],
    ["interop/_state_dict"],
    [f"interop/_{name}" for name in ("bitsandbytes", "keras", "mindspore", "mlx", "paddle", "pytorch", "tensorflow1")],
    ["interop/_tensorflow2"],
    ["interop/_table"],
    ["_dialect"],
    ["dialects", "interop/__init__"],
    ["_metrics", "_layers"],
    ["__main__"],
    ["__init__"],
]
MODULES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}


def imported(name):
    """The package's modules that one of them imports."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = "interop/" if name.startswith("interop/") and node.level == 1 else ""
            for found in [node.module] if node.module else [alias.name for alias in node.names]:
                module = f"{folder}{found}"
                yield f"{module}/__init__" if f"{module}/__init__" in MODULES else module


def test_imports_point_one_way():
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    assert sorted(floor) == sorted(MODULES)
    for name in MODULES:
        for found in imported(name):
            assert floor.get(found, floor["_rmsprop"]) < floor[name], (name, found)


def test_every_module_says_what_it_offers():
    for name, path in MODULES.items():
        if name != "__init__":
            assert re.search(r"^__all__ = ", path.read_text(), re.MULTILINE), name
    assert set(rmsprop_jax.__all__) == public(rmsprop_jax) | {"__version__"}


def test_no_private_imports_of_the_hosts():
    for path in MODULES.values():
        assert not re.search(r"\b(jax|optax|flax)\._\w+", path.read_text()), path.name


def test_the_package_imports_without_metadata(tmp_path):
    """Vendored, or on PYTHONPATH: nothing is installed, and importing computes nothing."""
    shutil.copytree(PACKAGE, tmp_path / "rmsprop_jax", ignore=shutil.ignore_patterns("__pycache__"))
    code = """
import importlib.metadata, sys
def missing(name, found=importlib.metadata.distribution):
    if "rmsprop" in name:
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.distribution = importlib.metadata.version = missing
import jax, rmsprop_jax
from rmsprop_jax import dialects, interop
assert rmsprop_jax.__file__.startswith(sys.argv[1]), rmsprop_jax.__file__
assert not jax._src.xla_bridge._backends, "importing has started a backend"
print(rmsprop_jax.__version__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == rmsprop_jax.__version__


@pytest.mark.parametrize(
    "arguments", [["-n", "0"], ["--pdb", "-p", "no:xdist", "-o", "addopts="], ["-n", "2"]], ids=" ".join
)
@pytest.mark.slow
def test_a_file_alone_can_be_tested(arguments):
    """With a debugger, in one process, in several: nothing in the tests depends on how they are called."""
    command = [sys.executable, "-m", "pytest", "-q", "--co", *arguments, "tests/test_rmsprop.py", "tests/golden"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d{3} tests collected", done.stdout)


def test_nothing_refers_to_files_that_are_not_here():
    for path in [*ROOT.glob("*.md"), *MODULES.values(), *(ROOT / "tests").rglob("*.py")]:
        if path.name != "test_house.py":
            assert not re.search(r"(design|ecosystem|rmsprop-dialects)\.md", path.read_text()), path
