"""The benchmarks run, and count right. What they measure decides no test."""

import functools
import inspect
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest


sys.path.insert(0, str(pathlib.Path(__file__).parent / "benchmarks"))

import speed
import training


pytestmark = pytest.mark.slow


def test_shapes_are_those_of_the_networks():
    for layout, leaves, size in (("ResNet-50", 161, 25_557_032), ("GPT-2 small", 148, 124_439_808)):
        shapes = speed.LAYOUTS[layout]()
        assert (len(shapes), sum(int(np.prod(shape)) for shape in shapes)) == (leaves, size)
    assert [sum(int(np.prod(s)) for s in speed.LAYOUTS[k]()) for k in ("16M", "160 x 100k", "1000 x 1k")] == [
        2**24,
        16_000_000,
        1_000_000,
    ]


def test_the_readme_quotes_what_was_printed():
    here = pathlib.Path(__file__).parent
    readme = (here.parent / "README.md").read_text()
    content = json.loads((here / "benchmarks" / "results" / "cpu.json").read_text())
    assert content["machine"] in readme
    rows = content["updates"]
    for table in (speed.time_table(rows), speed.cost_table(rows), content["outside jit"], content["sweep"]):
        assert speed.markdown(table) in readme


def test_speed_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "LAYOUTS", {"16M": lambda: [(64,)], "160 x 100k": lambda: [(8,)] * 3})
    monkeypatch.setattr(speed, "PREPARED", ("160 x 100k",))
    monkeypatch.setattr(speed, "is_here", lambda name: name in ("jax", "optax"))
    monkeypatch.setattr(speed, "sweep", functools.partial(speed.sweep, count=3, steps=2))
    monkeypatch.setattr(sys, "argv", ["speed.py", "--seconds", "0.1", "--json", str(tmp_path / "out.json")])
    with jax.numpy_rank_promotion("allow"):  # Optax's and the sweep's scalars
        speed.main()
    content = json.loads((tmp_path / "out.json").read_text())
    rows = {(row["layout"], row["candidate"]): row for row in content["updates"]}
    assert len(rows) == (1 + 3 * 4) + (1 + 4)
    for variant, bytes_per_parameter in (("plain", (4, 2, 1)), ("momentum", (8, 4, 3)), ("centered", (8, 4, 3))):
        for name, expected in zip(("float32", "bfloat16", "uint8"), bytes_per_parameter, strict=True):
            row = rows["16M", f"ours {name}, {variant}"]
            assert row["state bytes per parameter"] == expected + 4 / 64  # and count
            assert row["rounds"] >= 5
            assert row["milliseconds"] > 0
            assert row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]
    assert all(rows[layout, "optax, plain"]["ratio"] == 1 for layout in speed.LAYOUTS)
    prepared = rows["160 x 100k", "ours float32, plain"]
    for what in ("trace", "compile", "first call"):
        assert rows["160 x 100k", "optax, plain"][f"{what} ratio"] == 1
        assert prepared[f"{what} quartiles"][0] <= prepared[f"{what} ratio"] <= prepared[f"{what} quartiles"][1]
        assert f"{what} ratio" not in rows["16M", "ours float32, plain"]
    assert min(prepared["trace seconds"], prepared["compile seconds"]) > 0
    printed = capsys.readouterr().out
    assert "| ours uint8, plain |" in printed
    assert "| ours float32, plain | 160 x 100k | 4.17 | 0 |" in printed
    assert f"jax {jax.__version__}" in printed


def test_what_is_timed_updates_the_parameters():
    optimizer = speed.rmsprop(speed.RATE)
    candidate = speed.of_jax(optimizer, [(4,)], [jnp.ones(4)])
    for _ in range(3):
        candidate.step()
    held = inspect.getclosurevars(candidate.step).nonlocals["held"]
    assert held[1].count == 3
    # α (1/√.1 + 1/√.19 + 1/√.271)
    np.testing.assert_allclose(1 - held[0][0], 1e-3 * (0.1**-0.5 + 0.19**-0.5 + 0.271**-0.5), rtol=1e-4)


def test_the_fit_finds_what_it_was_made_of():
    rows = [
        {"candidate": "ours uint8", "leaves": leaves, "parameters": size, "milliseconds": 0.02 * leaves + 2e-6 * size}
        | {"trace seconds": 0.001 * leaves, "compile seconds": 1e-6 * leaves**2}
        for leaves, size in ((10, 10_000), (100, 100_000), (1000, 1_000_000), (1, 10**4), (1, 10**8))
    ]
    (fit,) = speed.fits(rows)
    assert fit["us per leaf"] == pytest.approx(20)
    assert fit["ns per parameter"] == pytest.approx(2)
    assert (fit["trace ~ leaves^"], fit["compile ~ leaves^"]) == (pytest.approx(1), pytest.approx(2))
    assert fit["1e9 on 8 devices"] == "0.125 GB, 0.25 s"
    assert fit["1e12 on 1024 devices"] == "0.977 GB, 2 s"


def test_training_compares_equal_starts_and_batches(monkeypatch):
    problem = training.digits()._replace(steps=2)
    monkeypatch.setattr(training, "PROBLEMS", {"convnet": lambda: problem})
    monkeypatch.setattr(training, "DECAYS", (0.9,))
    monkeypatch.setattr(training, "SCALES", (1.0, 2.0**20))
    monkeypatch.setattr(training, "SEEDS", range(1))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # Flax's
        rows = training.compare(["convnet"], ["plain"])
        again = training.runs(problem, lambda rate, decay: training.optax.rmsprop(rate, decay, eps=1.2e-38))(
            0.9, 1.0, 0
        )
    losses = {(row["dtype"], row["scale"]): row["loss"] for row in rows}
    assert losses["float32", 1.0] == pytest.approx(again[0], rel=1e-4)
    # A power of two changes nothing but exponents; also in the codes.
    assert losses["float32", 2.0**20] == pytest.approx(losses["float32", 1.0], rel=1e-4)
    assert losses["uint8", 1.0] != losses["float32", 1.0]
    (line,) = [x for x in training.summary(rows) if x["scale"] == 1.0]
    assert line["float32"].startswith(f"{losses['float32', 1.0]:.4f}")
    assert training.markdown([line]).count("\n") == 2
