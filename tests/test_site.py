"""The documentation's generated parts, and the check of a built site. (.ci/run builds it.)"""

import pathlib
import re

import built_site
import pytest

from rmsprop_jax import dialects


NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"


@pytest.fixture
def notebooks(monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "notebooks")


def test_a_page_says_what_becomes_of_each_argument(notebooks):
    import dialect_pages

    found = {d.__name__: {a.name: a for a in dialect_pages.arguments(d)} for d in dialects.DIALECTS}
    assert {a.kind for arguments in found.values() for a in arguments.values()} == {
        "honoured",
        "refused",
        "without meaning",
    }
    assert found["pytorch"]["alpha"].meaning == "`decay`"
    assert found["pytorch"]["foreach"].kind == "without meaning"
    assert found["tf_keras"]["momentum"].meaning == "`momentum`, `eps_in_sqrt`"
    assert found["keras"]["clipnorm"].meaning == "a transformation of the gradients, in front of the rule"
    assert found["keras"]["gradient_accumulation_steps"].meaning == "`optax.MultiSteps`, around the rule"
    assert "optax.incremental_update" in found["keras"]["use_ema"].meaning
    lines = "\n".join(dialect_pages.page(dialects.keras))
    assert "    rmsprop(0.001, eps=1e-07)" in lines
    assert "* - ``use_ema``\n     - refused\n" in lines


def test_equations_become_latex(notebooks):
    import equations

    lines = ["An update is::", "", "    u ← g / √(ν\u0302 + ε)    or g    unless eps_in_sqrt", "", "And so on."]
    assert equations.displayed(lines) == [
        "An update is:",
        "",
        ".. math::",
        "",
        r"   \begin{aligned}",
        r"   & u {\leftarrow} g / \sqrt{\hat{ν} + ε} \qquad \;\text{or}\; g \qquad \;\text{unless eps_in_sqrt}\; \\",
        r"   \end{aligned}",
        "",
        "And so on.",
    ]
    code = ["Read them::", "", "    names = reader.names()", "", "And so on."]
    assert equations.displayed(code) == code
    table = ["The root of |g| is::", "", "    rms    √ mean |g|", "", "    and |g|", "of |g|."]
    assert equations.escaped(table) == [r"The root of \|g\| is::", *table[1:5], r"of \|g\|."]


@pytest.mark.parametrize("page", sorted(NOTEBOOKS.glob("*.md")), ids=lambda path: path.stem)
def test_code_in_the_pages_has_80_columns(page):
    blocks = re.findall(r"^```py(?:thon)?\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert [line for block in blocks for line in block.splitlines() if len(line) > 80] == []


def test_an_entry_of_the_index_is_found_first():
    index = {
        "titles": ["Freeze layers", "Recipes"],
        "alltitles": {"Freeze layers": [[0, None]], "Recipes": [[1, None]]},
    }
    index["indexentries"] = {"freeze": [[1, "word", True]], "frozen": [[0, "word", False]]}
    assert list(built_site.in_titles(index, "freeze")) == []  # less than half of it
    assert list(built_site.in_titles(index, "freeze layer")) == [(-15, "freeze layers", 0)]
    assert list(built_site.in_entries(index, "freeze")) == [(-100, "recipes", 1)]
    assert list(built_site.in_entries(index, "frozen")) == [(0, "freeze layers", 0)]


def test_a_dead_link_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(built_site, "SEARCHES", {})
    for name in built_site.PAGES:
        path = tmp_path / f"{name}.html"
        path.parent.mkdir(exist_ok=True)
        path.write_text("<p id=here></p>")
    (tmp_path / "searchindex.js").write_text("Search.setIndex({})")
    assert built_site.problems(tmp_path) == []
    link = '<a href="{}"></a>'
    good = ("index.html", "#here", "start.html#here", "https://example.org")
    bad = ("nowhere.html", "#there", "start.html#there", "api")
    (tmp_path / "loop.html").write_text("<p id=here></p>" + "".join(map(link.format, good + bad)))
    assert [problem.split()[1] for problem in built_site.problems(tmp_path)] == list(bad)
