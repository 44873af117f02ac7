"""The documentation's generated parts, and the check of a built site. (.ci/run builds it.)"""

import pathlib

import built_site
import pytest

from rmsprop_jax import dialects


@pytest.fixture
def notebooks(monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "notebooks")


@pytest.mark.slow
def test_what_becomes_of_a_dialects_arguments(notebooks, users_climate):
    """By hand, from the frameworks' sources and the dialects' docstrings."""
    import dialect_pages

    found = {d.__name__: {a.name: a for a in dialect_pages.arguments(d)} for d in dialects.DIALECTS}
    kinds = {name: {a.name: a.kind for a in arguments.values()} for name, arguments in found.items()}
    others = {
        "dqn": {"gradient_momentum": "refused"},
        "dreamer": {"momentum": "refused"},
        "pytorch": dict.fromkeys(("capturable", "foreach", "differentiable"), "without meaning"),
        "timm": {"caution": "refused", "foreach": "without meaning"},
        "pfrl": dict.fromkeys(("capturable", "foreach", "differentiable"), "without meaning") | {"maximize": "refused"},
        "bitsandbytes": dict.fromkeys(("momentum", "centered", "optim_bits", "args"), "refused")
        | {"min_8bit_size": "without meaning"},
        "keras": dict.fromkeys(("use_ema", "ema_overwrite_frequency"), "refused")
        | dict.fromkeys(("ema_momentum", "name"), "without meaning"),
        "tf_keras": {"name": "without meaning"},
        "tensorflow1": dict.fromkeys(("use_locking", "name"), "without meaning"),
        "sonnet": {"name": "without meaning"},
        "tensorflowjs": {"centered": "refused"},
        "paddle": dict.fromkeys(("parameters", "grad_clip"), "refused") | {"name": "without meaning"},
        "mindspore": {"use_locking": "without meaning"},
    }
    for name, arguments in kinds.items():
        assert {a: kind for a, kind in arguments.items() if kind != "honoured"} == others.get(name, {}), name
    assert found["pytorch"]["alpha"].meaning == "`decay`"
    assert found["tf_keras"]["momentum"].meaning == "`momentum`, `eps_in_sqrt`"
    assert found["keras"]["gradient_accumulation_steps"].meaning == "`optax.MultiSteps`, around the rule"
    assert "optax.incremental_update" in found["keras"]["use_ema"].meaning


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


def test_a_dead_link_is_found(tmp_path):
    for name in built_site.PAGES:
        path = tmp_path / f"{name}.html"
        path.parent.mkdir(exist_ok=True)
        path.write_text("<p id=here></p>")
    (tmp_path / "searchindex.js").write_text("".join(f'"{word}"' for word in built_site.WORDS))
    assert built_site.problems(tmp_path) == []
    link = '<a href="{}"></a>'
    good = ("index.html", "#here", "start.html#here", "https://example.org")
    bad = ("nowhere.html", "#there", "start.html#there", "api")
    (tmp_path / "loop.html").write_text("<p id=here></p>" + "".join(map(link.format, good + bad)))
    assert [problem.split()[1] for problem in built_site.problems(tmp_path)] == list(bad)
