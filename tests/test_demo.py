"""The command line: it learns, it counts bytes, it meets PyTorch, it says what to install."""

import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from rmsprop_jax import __main__ as demo, _digits, dialects


pytestmark = pytest.mark.usefixtures("users_climate")


@pytest.mark.slow
def test_the_command_learns_and_counts_bytes(capsys):
    demo.main(["--epochs", "2"])
    out = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    rows = {name: [float(cell.strip("%")) for cell in row] for name, *row in cells}
    assert [held for _, held, *_ in rows.values()] == [8, 12, 8, 8, 5, 3]
    # 44 steps. The runs of ours and of Optax are one but for rounding.
    assert min(accuracy for *_, accuracy in rows.values()) > 70
    np.testing.assert_allclose(rows["rmsprop_jax"][2], rows["optax.rmsprop"][2], rtol=0.02)
    assert re.search(r"dialects.pytorch ends \de-07 away, and\s+optax.rmsprop 1e-01", out.replace("\n", " "))


def test_it_meets_the_recorded_run_of_pytorch():
    assert demo.distance(dialects.pytorch) < 1e-6
    assert demo.distance(dialects.stable_baselines3) > 1e-2


@pytest.mark.slow
def test_the_split_leaves_nothing_out_and_nothing_twice():
    train, test = _digits.load(0)
    assert (len(train.labels), len(test.labels)) == (1437, 360)
    together = np.concatenate([train.images, test.images]).reshape(1797, -1)
    everything = load_digits().data / 16
    order = np.lexsort(together.T), np.lexsort(everything.T)
    np.testing.assert_allclose(together[order[0]], everything[order[1]], rtol=1e-6)
    first, second = np.split(np.concatenate(list(_digits.batches(1437, 2, 0))), 2)
    assert len(set(first)) == len(set(second)) == len(first) == 22 * 64
    chex.assert_trees_all_equal(_digits.initial(3)[1], _digits.initial(3)[1])
    assert not np.array_equal(*(jax.tree.leaves(_digits.initial(seed)[1])[-1] for seed in (3, 4)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: 0: allowed is 1 to 1000000"),
        (["--epochs", "1.5"], "argument --epochs: 1.5: allowed is 1 to 1000000"),
        (["--seed", "1e3"], "argument --seed: 1e3: allowed is 0 to 4294967295"),
        (["--seed", "-1"], "argument --seed: -1: allowed is 0 to 4294967295"),
        (["--plot", "x.png"], "unrecognized arguments: --plot x.png"),
    ],
)
def test_bad_arguments_are_told_before_the_training(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_info:
        demo.main(arguments)
    assert exit_info.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def run(code, **environment):
    command, root = [sys.executable, *code], pathlib.Path(__file__).parents[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_table_of_dialects_where_there_is_no_greek():
    done = run(["-m", "rmsprop_jax", "--dialects"], PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert all(
        f"| {row['dialect']} " in done.stdout and row["class or paper"] in done.stdout for row in dialects.table()
    )
    assert "| first ? " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("package", ["flax", "rich", "sklearn"])
def test_a_missing_package_is_one_line_with_a_command_that_works(package):
    # A module that is None in sys.modules is one that cannot be imported.
    code = f"import sys, runpy; sys.modules[{package!r}] = None; runpy.run_module('rmsprop_jax', run_name='__main__')"
    done = run(["-c", code])
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"python -m rmsprop_jax needs {package}: pip install ")
    assert "Traceback" not in done.stderr
    for name in done.stderr.strip().partition("pip install ")[2].split():
        importlib.metadata.version(name)  # it has this name on PyPI
