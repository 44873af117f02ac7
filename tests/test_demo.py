"""The command line: it learns, it explains itself, it says what to install."""

import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from rmsprop_jax import __main__ as demo, rmsprop


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("users_climate")]


def test_the_command_learns(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    file = tmp_path / "curves.png"
    demo.main(["--epochs", "10", "--plot", str(file)])
    out = capsys.readouterr().out
    rows = dict(re.findall(r"│ (\S+) +│ +([\d.]+)%", out))
    assert list(rows) == ["SGD", "Adam", "optax.rmsprop", "rmsprop_jax"]
    # Of 360 images: as many as Optax's to within 3 % (its run is ours but for rounding), and nine in ten.
    assert abs(float(rows["rmsprop_jax"]) - float(rows["optax.rmsprop"])) <= 3
    assert float(rows["rmsprop_jax"]) >= 90
    state_bytes = {name: int(n.replace(",", "")) for name, n in re.findall(r"│ (\S+) .*│ +([\d,]+) │", out)}
    # Four bytes per parameter and the counts: ours, the schedule's.
    assert state_bytes["rmsprop_jax"] == 4 * 38_282 + 4
    assert state_bytes["Adam"] == 8 * 38_282 + 8
    assert file.read_bytes().startswith(b"\x89PNG")


def test_the_dialects_side_by_side(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    demo.main(["--dialects", "--epochs", "2"])
    out = capsys.readouterr().out
    assert all(f"│ {dialect.__name__} " in out for dialect in demo.dialects.DIALECTS)
    distances = {names: float(d) for names, d in re.findall(r"│ ([\w, ]+?) +│ (?:None|0.9) +│ +([\d.]+)%", out)}
    # Every dialect is in one family; those that Optax's defaults are stay with it, PyTorch does not.
    others = {d.__name__ for d in demo.dialects.DIALECTS} - {"dreamer"}
    assert sorted(", ".join(distances).split(", ")) == sorted(others)
    assert distances["keras, tf_keras, sonnet, paddle"] < 0.1
    assert distances["pytorch"] > 10


def test_same_data_and_seed_same_run():
    runs = [demo.train(f(1e-3), epochs=2, seed=3) for f in (rmsprop, rmsprop, optax.rmsprop)]
    np.testing.assert_array_equal(runs[0].losses, runs[1].losses)
    # Only at first: a network turns a difference of one rounding into one of percents.
    np.testing.assert_allclose(runs[0].losses[:10], runs[2].losses[:10], rtol=1e-4)
    assert len(runs[0].losses) == 2 * (1437 // demo.BATCH)
    assert demo.train(rmsprop(1e-3), epochs=1, seed=4).losses[0] != runs[0].losses[0]


def test_the_split_leaves_nothing_out_and_nothing_twice():
    train, test = demo.load(0)
    assert (len(train.labels), len(test.labels)) == (1437, 360)
    together = np.concatenate([train.images, test.images]).reshape(1797, -1)
    everything = load_digits().data / 16
    order = np.lexsort(together.T), np.lexsort(everything.T)
    np.testing.assert_allclose(together[order[0]], everything[order[1]], rtol=1e-6)
    assert train.images.dtype == jnp.float32
    indices = list(demo.batches(1437, 2, 0))
    first_epoch = np.concatenate(indices[: len(indices) // 2])
    assert len(set(first_epoch)) == len(first_epoch) == 1437 // demo.BATCH * demo.BATCH


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs=0: allowed is 1 or more"),
        (["--seed", "-1"], "--seed=-1: allowed is 0 to 4294967295"),
        (["--seed", str(2**32)], "--seed=4294967296: allowed is 0 to"),
        (["--plot", "/nowhere/x.png"], "--plot=/nowhere/x.png: No such file or directory"),
        (["--plot", "x.foo"], "--plot=x.foo: allowed are the endings"),
        (["--plot", "x"], "--plot=x: allowed are the endings"),
        (["--plot", "x.png", "--dialects"], "leave out one of the two"),
    ],
)
def test_bad_arguments_are_told_before_the_training(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "train", None)
    with pytest.raises(SystemExit) as exit_info:
        demo.main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_a_narrow_terminal_gets_a_list(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    demo.show(demo.Console(), "Dialects", demo.dialects.table())
    lines = capsys.readouterr().out.splitlines()
    assert "  lr vs buffer: outside" in lines
    assert "pytorch" in lines
    assert not [line for line in lines if "…" in line or len(line) > 40]


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_info:
        demo.main(["--help"])
    assert exit_info.value.code == 0
    assert "handwritten digits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("package", "arguments"),
    [("flax", []), ("rich", []), ("sklearn", []), ("matplotlib", ["--epochs=1", "--plot=x.png"])],
)
def test_a_missing_extra_is_one_line(package, arguments):
    # A module that is None in sys.modules is one that cannot be imported.
    code = f"import sys, runpy; sys.modules[{package!r}] = None; sys.argv[1:] = {arguments}; "
    code += "runpy.run_module('rmsprop_jax', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].endswith(f'needs {package}: pip install "rmsprop_jax[demo]"')
    assert "Traceback" not in done.stderr
