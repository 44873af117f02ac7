"""The command line: it learns, it explains itself, it says what to install."""

import contextlib
import os
import pathlib
import pty
import re
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from rmsprop_jax import __main__ as demo, rmsprop


ROOT = pathlib.Path(__file__).parents[1]
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
    assert re.search(r"up to \d+% slower", out)


def test_the_dialects_side_by_side(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    demo.main(["--dialects", "--epochs", "2"])
    out, progress = capsys.readouterr()
    assert "Training 11 networks for 44 steps each" in progress
    assert re.search(r"44 of 44 steps.*\n.*optax.rmsprop +loss [\d.]+ accuracy +\d+% grad_rms \d\.\de-\d\d", progress)
    assert all(f"│ {dialect.__name__} " in out for dialect in demo.dialects.DIALECTS)
    distances = {names: float(d) for names, d in re.findall(r"│ ([\w, ]+?) +│ (?:none|0.9) +│ +([\d.]+)%", out)}
    # Every dialect is in one family; those that Optax's defaults are stay with it, PyTorch does not.
    others = {d.__name__ for d in demo.dialects.DIALECTS} - {"dreamer"}
    assert set(", ".join(distances).split(", ")) - {"momentum"} == others
    assert distances["keras, tf_keras, sonnet, tensorflowjs, paddle"] < 0.1
    assert distances["pytorch"] > 10


def test_same_data_and_seed_same_run():
    optimizers = {"ours": rmsprop(1e-3), "again": rmsprop(1e-3), "theirs": optax.rmsprop(1e-3)}
    runs = demo.train(optimizers, epochs=2, seed=3)
    np.testing.assert_array_equal(runs["ours"].losses, runs["again"].losses)
    # Only at first: a network turns a difference of one rounding into one of percents.
    np.testing.assert_allclose(runs["ours"].losses[:10], runs["theirs"].losses[:10], rtol=1e-4)
    assert len(runs["ours"].losses) == len(runs["ours"].seconds) == 2 * (1437 // demo.BATCH)
    # Neither company nor the order of turns changes a run.
    alone = demo.train({"alone": rmsprop(1e-3)}, epochs=1, seed=3)["alone"]
    np.testing.assert_array_equal(alone.losses, runs["ours"].losses[:22])
    assert demo.train({"other": rmsprop(1e-3)}, epochs=1, seed=4)["other"].losses[0] != alone.losses[0]


def test_metrics_are_shown_where_there_is_rmsprop():
    seen = {}
    optimizers = {
        "ours": optax.chain(optax.clip(1.0), rmsprop(1e-3)),
        "theirs": optax.rmsprop(1e-3),
        "Adam": optax.adam(1e-3),
    }
    demo.train(optimizers, epochs=1, report=lambda name, numbers: seen.update({name: numbers}))
    assert seen["Adam"].keys() == {"loss", "accuracy"}
    assert seen["ours"].keys() == seen["theirs"].keys() == set(demo.FORMATS)
    np.testing.assert_allclose(seen["ours"]["grad_rms"], seen["theirs"]["grad_rms"], rtol=0.1)


def test_optimizers_take_turns():
    turns = []
    demo.train({name: optax.sgd(0.1) for name in "abc"}, epochs=1, report=lambda name, numbers: turns.append(name))
    rounds = ["".join(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert len(rounds) == 22
    assert {"".join(sorted(names)) for names in rounds} == {"abc"}
    assert len(set(rounds)) > 3


def run_with(seconds):
    return demo.Run(None, np.array([]), np.array([9.0, *seconds]), 0.0, 0.0, 0)


def test_noise_is_what_changes_between_quarters_and_not_for_all():
    steady, slowed = np.ones(40), np.repeat([1.0, 1.0, 3.0, 1.0], 10)
    assert demo.noise([run_with(steady), run_with(2 * steady)]) == 0
    np.testing.assert_allclose(demo.noise([run_with(slowed), run_with(2 * slowed)]), 0, atol=1e-12)
    # One run is half of both, or three quarters.
    np.testing.assert_allclose(demo.noise([run_with(steady), run_with(slowed)]), 1.0)


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
        (["--epochs", "0"], "--epochs=0: allowed is 1 to 1000000"),
        (["--epochs", "1000000000000"], "--epochs=1000000000000: allowed is 1 to"),
        (["--seed", "-1"], "--seed=-1: allowed is 0 to 4294967295"),
        (["--seed", str(2**32)], "--seed=4294967296: allowed is 0 to"),
        (
            ["--plot", "/nowhere/x.png"],
            "--plot=/nowhere/x.png: No such file or directory; allowed is a file that can be",
        ),
        (["--plot", "notes.txt/x.png"], "--plot=notes.txt/x.png: Not a directory"),
        (["--plot", "folder.png"], "--plot=folder.png: Is a directory"),
        (["--plot", "astray.png"], "--plot=astray.png: No such file or directory"),
        (["--plot", "x" * 300 + ".png"], ".png: File name too long"),
        (["--plot", ""], "--plot='': allowed is a file name that ends in .eps, "),
        (["--plot", "folder.png/.."], "--plot=folder.png/..: allowed is a file name that ends in"),
        (["--plot", ".png"], "--plot=.png: allowed is a file name that ends in"),
        (["--plot", "x.foo"], "--plot=x.foo: allowed is a file name that ends in"),
        (["--plot", "x.pgf"], "--plot=x.pgf: allowed is a file name that ends in"),
        (["--plot", "x"], "--plot=x: allowed is a file name that ends in"),
        (["--plot", "x.png", "--dialects"], "leave out one of the two"),
        (["--plot", "", "--dialects"], "leave out one of the two"),
    ],
)
def test_bad_arguments_are_told_before_the_training(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "train", None)
    pathlib.Path("folder.png").mkdir()
    pathlib.Path("notes.txt").touch()
    pathlib.Path("astray.png").symlink_to("/nowhere/x.png")
    with pytest.raises(SystemExit) as exit_info:
        demo.main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("name", [f"x.{ending}" for ending in demo.PICTURES] + ["X.PNG"])
def test_every_ending_that_is_allowed_can_be_drawn(tmp_path, name):
    run = run_with([])._replace(losses=np.ones(30))
    demo.plot(dict.fromkeys(["SGD", "Adam", "optax.rmsprop", "rmsprop_jax"], run), tmp_path / name)
    assert (tmp_path / name).stat().st_size > 1000


def test_checking_the_plot_changes_nothing(tmp_path):
    old = tmp_path / "old.png"
    old.write_text("a picture")
    for file in (old, tmp_path / "new.png"):
        assert demo.parse(["--plot", str(file)]).plot == str(file)
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"]
    assert old.read_text() == "a picture"


def test_a_full_disk_at_the_end_is_one_line(capsys, monkeypatch, tmp_path):
    (tmp_path / "x.png").symlink_to("/dev/full")
    runs = dict.fromkeys(["SGD", "Adam", "optax.rmsprop", "rmsprop_jax"], run_with([])._replace(losses=np.ones(30)))
    monkeypatch.setattr(demo, "compare_optimizers", lambda *_: runs)
    with pytest.raises(SystemExit) as exit_info:
        demo.main(["--plot", str(tmp_path / "x.png")])
    assert exit_info.value.code == f"--plot={tmp_path}/x.png: No space left on device"


def test_at_80_columns_the_dialects_are_three_tables(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    rows = demo.dialects.table()
    demo.show(demo.Terminal(), "Dialects", rows)
    out = capsys.readouterr().out
    assert all(out.count(f"│ {row['dialect']} ") >= 3 for row in rows)
    words = {word for row in rows for text in (*row, *row.values()) for word in text.split()}
    assert words <= set(out.split())
    assert max(map(len, out.splitlines())) <= 80


def test_a_narrow_terminal_gets_a_list(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "24")
    demo.show(demo.Terminal(), "Dialects", demo.dialects.table())
    lines = capsys.readouterr().out.splitlines()
    assert "  lr vs buffer: outside" in lines
    assert "pytorch" in lines
    assert not [line for line in lines if "…" in line or len(line) > 24]


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


def start(arguments, **environment):
    """The command as a user starts it."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-m", "rmsprop_jax", *arguments]
    return subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment, cwd=ROOT, **pipes)


def test_ascii_can_show_the_dialects():
    out, err = start(["--dialects", "--epochs", "1"], PYTHONIOENCODING="ascii").communicate()
    assert b"Traceback" not in err
    assert b"| first nu " in out
    assert b"| training loss |" in out
    assert b"Training 11 networks for 22 steps each" in err
    (out + err).decode("ascii")


def test_a_terminal_that_can_do_nothing():
    out, err = start(["--epochs", "1"], TERM="dumb", COLUMNS="20", NO_COLOR="1").communicate()
    assert b"Traceback" not in err
    assert re.search(rb"rmsprop_jax\n  test accuracy: ?\n?\d+", out)
    assert b"\x1b" not in out + err


def test_other_characters_are_written_as_python_writes_them(monkeypatch, capsys):
    monkeypatch.setattr(demo.Terminal, "encoding", "ascii")
    demo.Terminal().print("Σ ν é …", "\udcff", "x")
    assert capsys.readouterr().out == "sigma nu \\xe9 \\u2026 \\udcff x\n"


@pytest.mark.parametrize(
    ("arguments", "moment"),
    [
        ([], b"flax."),  # while it imports
        (["--epochs", "9"], b"0 of 198 steps"),  # while it compiles
        (["--epochs", "9"], b"loss"),  # while it trains
        (["--dialects"], b"loss"),
        (["--epochs", "1", "--plot", "x.png"], b"noise"),  # while it draws
    ],
)
def test_ctrl_c_ends_quietly(arguments, moment, tmp_path):
    master, terminal = pty.openpty()
    options = ["-X", "importtime"] if moment == b"flax." else []
    command = [sys.executable, *options, "-m", "rmsprop_jax", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TERM": "xterm", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment, cwd=tmp_path)
    os.close(terminal)
    seen = b""
    while moment not in seen:
        seen += os.read(master, 4096)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # how a terminal ends
        while more := os.read(master, 4096):
            seen += more
    os.close(master)
    assert process.wait() == 130
    for noise in (b"Traceback", b"Interrupt", b"ignored"):
        assert noise not in seen
    assert b"\x1b[?25l" not in seen  # the cursor was never hidden
    assert not list(tmp_path.iterdir())


def test_a_closed_pipe_ends_quietly():
    process = start(["--dialects", "--epochs", "1"])
    assert b"What the call of a dialect stands for" in process.stdout.readline()
    process.stdout.close()
    assert process.wait() == -signal.SIGPIPE
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
