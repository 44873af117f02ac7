"""The benchmarks run and count right. No test depends on their timings."""

import functools
import inspect
import json
import pathlib
import re
import sys

import accelerators
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reinforcement
import report
import signed_code
import speed
import training
import watching


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


def compiled_tables(c):
    updates = accelerators.tables(c["updates"]).values()
    rest = [accelerators.without_empty(c[part]) for part in ("host", "peaks") if part in c]
    return [*updates, accelerators.meshes_table(c["meshes"]), *rest]


TABLES = {
    "cpu": lambda c: [
        *(speed.time_table(c["updates"]), speed.cost_table(c["updates"]), speed.steps_table(c["steps"])),
        *(c["memory"], c["outside jit"], c["sweep"]),
    ],
    "accelerators": compiled_tables,
    "gpus": compiled_tables,
    "training": lambda c: [training.evidence_table(c["evidence"])],
    "reinforcement": lambda c: [c["table"]],
    "signed_code": lambda c: [signed_code.table(c["signed code"])],
    "watching": lambda c: [watching.table(c["watching"])],
}


@pytest.mark.parametrize("name", TABLES)
def test_the_page_of_numbers_quotes_what_was_printed(name):
    here = pathlib.Path(__file__).parent / "benchmarks"
    page = (here / "README.md").read_text()
    content = json.loads((here / "results" / f"{name}.json").read_text())
    assert content["machine"] in page
    for table in TABLES[name](content):
        assert report.markdown(table) in page


def test_the_readme_quotes_the_peaks():
    here = pathlib.Path(__file__).parent
    measured: dict[int, dict[str, str]] = {}
    for chip, name, part in (("v5e", "accelerators", "peaks"), ("h100", "gpus", "peaks"), (None, "cpu", "memory")):
        for row in json.loads((here / "benchmarks" / "results" / f"{name}.json").read_text())[part]:
            if row.get("chip") == chip and row["parameters"] == "100,524,304":
                measured.setdefault(round(row["parameters and state"]), {})[name] = report.short(row["peak"])
    rows = re.findall(r"^\|[^|]*\| (\d+) \|([^|]*)\|([^|]*)\|([^|]*)\|$", (here.parent / "README.md").read_text(), re.M)
    assert len(rows) == 5
    for held, *peaks in rows:
        expected = [measured[int(held)].get(name, "") for name in ("accelerators", "gpus", "cpu")]
        assert [peak.strip() for peak in peaks] == expected


def test_the_table_of_agents_is_that_of_their_curves():
    content = json.loads((pathlib.Path(__file__).parent / "benchmarks" / "results" / "reinforcement.json").read_text())
    assert reinforcement.table(content["reinforcement"]) == content["table"]


PARTS = ("updates", "outside jit", "sweep")


def test_speed_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "LAYOUTS", {"16M": lambda: [(64,)], "160 x 100k": lambda: [(8,)] * 3})
    monkeypatch.setattr(speed, "PREPARED", ("160 x 100k",))
    monkeypatch.setattr(speed, "is_here", lambda name: name in ("jax", "optax"))
    monkeypatch.setattr(speed, "sweep", functools.partial(speed.sweep, count=3, steps=2))
    monkeypatch.setattr(
        sys, "argv", ["speed.py", "--seconds", "0.1", "--json", str(tmp_path / "out.json"), "--parts", *PARTS]
    )
    with jax.numpy_rank_promotion("allow"):  # Optax's and the sweep's scalars
        speed.main()
    content = json.loads((tmp_path / "out.json").read_text())
    rows = {(row["layout"], row["candidate"]): row for row in content["updates"]}
    assert len(rows) == (1 + 3 * 4 + 2) + (1 + 4)
    for variant, bytes_per_parameter in (("plain", (4, 2, 1)), ("momentum", (8, 4, 2)), ("centered", (8, 4, 3))):
        for name, expected in zip(("float32", "bfloat16", "uint8"), bytes_per_parameter, strict=True):
            row = rows["16M", f"ours {name}, {variant}"]
            assert row["state bytes per parameter"] == expected + 4 / 64  # and count
            assert row["rounds"] >= 5
            assert row["milliseconds"] > 0
            assert row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]
    for name, expected in (("three", 1), ("four", 2)):
        row = rows["16M", f"ours {name} bytes"]
        assert row["state bytes per parameter"] == expected + 8 / 64  # and count and step
        assert row["instructions ratio"] == row["instructions"] / rows["16M", "optax, plain"]["instructions"]
    assert all(rows[layout, "optax, plain"]["ratio"] == 1 for layout in speed.LAYOUTS)
    prepared = rows["160 x 100k", "ours float32, plain"]
    for what in ("trace", "compile", "first call"):
        assert rows["160 x 100k", "optax, plain"][f"{what} ratio"] == 1
        assert prepared[f"{what} quartiles"][0] <= prepared[f"{what} ratio"] <= prepared[f"{what} quartiles"][1]
        assert f"{what} ratio" not in rows["16M", "ours float32, plain"]
    assert min(prepared["trace seconds"], prepared["compile seconds"]) > 0
    assert rows["160 x 100k", "optax, plain"]["instructions ratio"] == 1
    assert 1 < prepared["instructions ratio"] < 2
    printed = capsys.readouterr().out
    assert "| ours uint8, plain |" in printed
    assert "| ours float32, plain | 160 x 100k | 4.17 | 0 |" in printed
    assert f"jax {jax.__version__}" in printed


def test_the_timed_step_updates_the_parameters():
    optimizer = speed.rmsprop(speed.RATE)
    candidate = speed.of_jax(optimizer, [(4,)], [jnp.ones(4)])
    for _ in range(3):
        candidate.step()
    held = inspect.getclosurevars(candidate.step).nonlocals["held"]
    assert held[1].count == 3
    # α (1/√.1 + 1/√.19 + 1/√.271)
    np.testing.assert_allclose(1 - held[0][0], 1e-3 * (0.1**-0.5 + 0.19**-0.5 + 0.271**-0.5), rtol=1e-4)


@pytest.mark.parametrize("tx", speed.WITH_BFLOAT16.values(), ids=speed.WITH_BFLOAT16)
def test_the_timed_step_has_parameters_like_its_gradients(tx):
    candidate = speed.of_jax(tx, [(64,)], [jnp.ones(64, jnp.bfloat16)])
    candidate.step()
    params, (_, rounding) = inspect.getclosurevars(candidate.step).nonlocals["held"]
    assert params[0].dtype == jnp.bfloat16
    assert rounding.step == 1
    assert (params[0] < 1).any()


def test_the_fit_recovers_its_coefficients():
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


def test_whole_steps_train(users_climate, monkeypatch):
    monkeypatch.setattr(speed, "MODELS", {"small": lambda: speed.language(11, 8, 16, 2, 1, batch=2)})
    rows = speed.training_steps(0.1, lambda: None)
    assert [row["step"] for row in rows] == list(speed.trained())
    assert {row["ratio"] for row in rows if row["step"] == "optax.rmsprop"} == {1.0}
    table = speed.steps_table(rows)
    assert "update" in table[-1]["small"]
    assert "update" not in table[0]["small"]


def test_memory_is_that_of_parameters_and_state(users_climate, monkeypatch):
    language = speed.language
    monkeypatch.setattr(speed, "language", lambda *_, batch: language(11, 8, 16, 2, 1, batch=batch))
    held = {row["training step"]: row["parameters and state"] for row in speed.memory()}
    for name, expected in {
        "optax.adam": 12,
        "optax.rmsprop": 8,
        "ours, bfloat16 state": 6,
        "ours, uint8 state": 5,
    }.items():
        assert expected <= held[name] < expected + 0.1  # and the batch
    assert 3 <= held["ours, uint8 state, bfloat16 parameters"] < 3.1
    assert 4 <= held["ours, four bytes"] < 4.1


def test_the_grid_compares_equal_starts_and_batches(users_climate, monkeypatch):
    problem = training.digits()._replace(steps=2)
    monkeypatch.setattr(training, "GRID", {"convnet": lambda: problem})
    monkeypatch.setattr(training, "DECAYS", (0.9,))
    monkeypatch.setattr(training, "SCALES", (1.0, 2.0**20))
    monkeypatch.setattr(training, "SEEDS", range(1))
    rows = training.grid(["convnet"], ["plain"])
    optax_rmsprop = training.optax.rmsprop
    again = training.runs(problem, lambda rate, decay: optax_rmsprop(rate, decay, eps=1.2e-38))(0.9, 1.0, 0)
    losses = {(row["dtype"], row["scale"]): row["loss"] for row in rows}
    assert losses["float32", 1.0] == pytest.approx(again[0], rel=1e-4)
    # A power of two changes nothing but exponents; also in the codes.
    assert losses["float32", 2.0**20] == pytest.approx(losses["float32", 1.0], rel=1e-4)
    assert losses["uint8", 1.0] != losses["float32", 1.0]
    (line,) = [x for x in training.grid_table(rows) if x["scale"] == 1.0]
    assert line["float32"].startswith(f"{losses['float32', 1.0]:.4f}")


def test_the_evidence_counts_bytes_and_pairs_seeds(users_climate, monkeypatch):
    monkeypatch.setattr(training, "EVIDENCE", {"digits": lambda: training.digits()._replace(steps=20)})
    monkeypatch.setattr(training, "SEEDS", range(2))
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    rows = list(training.evidence(["digits"], None))
    table = training.evidence_table(rows)
    assert [round(line["bytes per parameter"]) for line in table] == [12, 8, 8, 6, 5, 6, 4, 3, 6, 4, 3]
    ours = next(line for line in table if line["optimizer"] == "rmsprop")
    assert ours["loss minus float32's"] == "+0.0000 ± 0.0000"
    assert all(len(row["curve"]) == 20 for row in rows)


def test_agents_learn_and_their_statistics_are_right(users_climate):
    setting = reinforcement.SETTINGS["A2C, CartPole"]._replace(frames=40_000)
    curves = reinforcement.train(setting, setting.dialects["pytorch"], 2)
    assert curves.shape == (2, reinforcement.POINTS)
    assert np.nanmean(curves[:, :5]) < 30 < reinforcement.last_tenth(curves).mean()
    setting = reinforcement.SETTINGS["DQN, CartPole"]._replace(frames=2000)
    assert np.isfinite(reinforcement.train(setting, setting.dialects["dqn"], 2)).any()
    low, high = reinforcement.bootstrap(np.arange(100.0))
    assert low == pytest.approx(49.5 - 1.96 * 2.887, abs=0.3)
    assert high == pytest.approx(49.5 + 1.96 * 2.887, abs=0.3)
    # Of 20 ways to part six values into threes, two are as far apart as these.
    assert reinforcement.permutation(np.array([1.0, 2, 3]), np.array([4.0, 5, 6])) == pytest.approx(0.1, abs=0.01)
    assert reinforcement.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_the_other_signed_code_is_right_in_the_mean():
    x = jnp.array([-3e-13, 1e-3, -0.7, 100.0])
    gaps = np.array([2.0**-40, 2.0**-11, 2.0**-2, 2.0**5])
    keys = jax.random.split(jax.random.key(0), 20_000)
    kept = np.asarray(jax.vmap(lambda key: signed_code.through_code(x, key))(keys), np.float64)
    np.testing.assert_array_less(np.abs(kept.mean(0) - np.asarray(x)), 5 * gaps / 2 / np.sqrt(len(keys)))
    assert (np.array([len(np.unique(column)) for column in kept.T]) <= 2).all()
