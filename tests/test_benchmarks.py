"""The benchmarks run and count right. No test depends on their timings."""

import functools
import inspect
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pages
import pytest
import reinforcement
import report
import signed_code
import speed
import tasks
import training
import tuning
from flax import nnx


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


@pytest.mark.parametrize("page", pages.pages(), ids=lambda path: path.name)
def test_the_tables_of_the_pages_are_those_of_the_results(page):
    text = page.read_text()
    assert text == pages.with_tables(text), "python tests/benchmarks/pages.py writes them"


def test_every_table_stands_on_a_page():
    text = "".join(page.read_text() for page in pages.pages())
    assert set(re.findall("<!-- table: (.*?) -->", text)) == set(pages.TABLES)


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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_transformer_computes_in_the_dtype_of_its_parameters(users_climate, dtype):
    graph, params = nnx.split(tasks.Transformer(11, 8, 16, 2, 1, nnx.Rngs(0)), nnx.Param)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    program = jax.make_jaxpr(lambda params, tokens: nnx.merge(graph, params)(tokens))(params, jnp.zeros((2, 8), int))
    (result,) = program.out_avals
    assert result.dtype == dtype
    products = [x for x in program.jaxpr.eqns if x.primitive.name == "dot_general"]
    assert {v.aval.dtype for x in products for v in x.invars} == {jnp.dtype(dtype)}


def test_the_grid_compares_equal_starts_and_batches(users_climate, monkeypatch):
    problem = tasks.digits()._replace(steps=2)
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


def regression(steps):
    """A task that compiles in no time: a matrix of 32 x 32 from noisy products."""
    truth = jax.random.normal(jax.random.key(2), (32, 32))

    def batch(key):
        return jax.random.normal(key, (16, 32))

    def loss(params, batch):
        error = ((batch @ (params["w"] - truth)) ** 2).mean()
        return error, 1 / (1 + error)

    def init(key):
        return {"w": 0.1 * jax.random.normal(key, (32, 32))}

    return tasks.Problem(init, batch, loss, batch(jax.random.key(3))[None], steps, learning_rate=1e-3)


def measurements(what, keys=None, file=None, minutes=None):
    return tuning.Measurements(report.Report(file), what, keys or training.STUDIES[what].keys, minutes)


def test_the_evidence_counts_bytes_and_pairs_seeds(users_climate, monkeypatch):
    monkeypatch.setattr(training, "SEEDS", range(2))
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    kept = measurements("evidence")
    training.evidence(kept, "regression", lambda: regression(20))
    table = training.evidence_table(kept.rows())
    assert [round(line["bytes per parameter"]) for line in table] == [12, 8, 8, 6, 5, 6, 3, 6, 3, 7, 4]
    ours = next(line for line in table if line["optimizer"] == "rmsprop")
    assert ours["loss minus float32's"] == "+0.0000 ± 0.0000"
    assert all(len(row["curve"]) == 20 for row in kept.rows())


def test_four_bytes_end_nearer_to_float32_than_three(users_climate, monkeypatch):
    monkeypatch.setattr(training, "SMALL_RATES", (1e-5,))
    monkeypatch.setattr(training, "SEEDS", range(1))
    kept = measurements("weights")
    training.weights(kept, "regression", lambda: regression(50))
    rows = {(row["parameters"], row["state"]): row for row in kept.rows()}
    assert rows["float32", "float32"]["distance"] == 0
    four, three = (rows[params, "uint8"] for params in (training.REST, training.STOCHASTIC))
    assert four["distance"] < three["distance"] / 2
    assert [round(row["bytes per parameter"]) for row in rows.values()] == [8, 5, 3, 3, 7, 4]
    assert training.weights_table(kept.rows())[0]["network"] == "+0.0000"


def test_other_seeds_report_on_the_best_rate(users_climate, tmp_path):
    file = str(tmp_path / "peers.json")
    everyone = [x for x in training.peers() if x.name in ("Muon", "schedule-free RMSProp", "RMSProp, three bytes")]
    study = functools.partial(
        training.tune_all, name="regression", make=lambda: regression(20), everyone=lambda: everyone, count=3
    )
    study(measurements("peers", file=file))
    rows = json.loads(pathlib.Path(file).read_text())["peers"]
    for line in training.peers_table(rows):
        mine = [row for row in rows if row["optimizer"] == line["optimizer"]]
        chosen = min((row for row in mine if row["seed"] == 0), key=lambda row: row["loss"])
        assert line["best rate"] == chosen["learning rate"]
        fresh = [row["loss"] for row in mine if row["seed"] > 0]
        assert len(fresh) == 3
        assert line["loss"] == training.spread(fresh)
    # A second run has nothing left to do.
    study(measurements("peers", file=file, minutes=0))
    assert json.loads(pathlib.Path(file).read_text())["peers"] == rows


def test_every_peer_trains(users_climate):
    problem = regression(200)
    for peer in [*training.peers(), *training.batch_peers(4), *training.batch_peers(64)]:
        curve = training.measured(problem, peer.candidate)(0, peer.rate)["curve"]
        assert curve[-1] < curve[0], peer.name


def test_a_batch_touches_one_row_in_a_hundred(users_climate):
    text = " ".join(f"{chr(97 + i // 26 % 26)}{chr(97 + i % 26)}{chr(97 + i // 676)}" for i in range(10_000))
    problem = tasks.rare_words(text, held_out=500, answers=50)
    rows = problem.init(jax.random.key(0))["embed"]["embedding"].get_value().shape[0]
    assert rows == 10_000
    assert problem.test.shape == (10, 10, 5)
    assert 200 < len(np.unique(problem.batch(jax.random.key(1)))) < 321


def test_a_rate_is_searched_beyond_the_ends_of_the_grid():
    tried = []

    def cost(rate):
        tried.append(rate)
        return (np.log10(rate) + 4.6) ** 2  # best at 2.5e-5

    costs = tuning.search(tuning.grid(1e-2), cost)
    assert tried == [1e-3, 3.2e-3, 1e-2, 3.2e-2, 1e-1, 3.2e-4, 1e-4, 3.2e-5]
    assert tuning.cheapest(costs) == 3.2e-5
    assert tuning.cheapest({1.0: np.nan, 2.0: 5.0}) == 2.0


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ({1e-4: 2.0, 1e-3: 1.0, 1e-2: 2.0}, "1.6"),  # a tenth of each decade
        ({1e-4: 1.0, 1e-3: 1.0, 1e-2: 2.0}, "≥ 13"),
        ({1e-4: 2.0, 1e-3: 1.0, 1e-2: np.nan}, "1.3"),
        ({1e-4: -90.0, 1e-3: -100.0, 1e-2: -80.0}, "≥ 32"),  # returns: half of a decade, and a whole one
    ],
)
def test_the_width_is_that_of_the_range_within_a_tenth(costs, expected):
    assert str(tuning.width(costs)) == expected


def test_measurements_go_on_with_what_the_file_has(tmp_path):
    file = str(tmp_path / "kept.json")
    first, second = (measurements("table", ("name",), file) for _ in range(2))
    assert first.get({"name": "a"}, lambda: {"value": 1}) == {"name": "a", "value": 1}
    assert second.get({"name": "a"}, lambda: pytest.fail("measured again"))["value"] == 1
    second.get({"name": "b"}, lambda: {"value": 2})
    assert [row["name"] for row in first.rows()] == ["a", "b"]
    other = report.Report(file)
    other.add("another", [{"x": 1, "y": 1}, {"x": 2, "y": 2}])
    other.update("another", [{"x": 3, "y": 3}, {"x": 1, "y": 4}], ("x",))
    assert other.rows("another") == [{"x": 1, "y": 4}, {"x": 2, "y": 2}, {"x": 3, "y": 3}]
    assert len(first.rows()) == 2
    late = measurements("table", ("name",), file, minutes=0)
    assert late.get({"name": "b"}, lambda: pytest.fail("measured again"))["value"] == 2
    with pytest.raises(tuning.TimeIsUp):
        late.get({"name": "c"}, lambda: {})


def test_agents_learn_and_their_statistics_are_right(users_climate):
    setting = reinforcement.SETTINGS["A2C, CartPole"]._replace(frames=40_000)
    run = reinforcement.trainer(setting, setting.dialects["pytorch"])
    curves = run(range(2), setting.rate)
    assert curves.shape == (2, reinforcement.POINTS)
    assert np.nanmean(curves[:, :5]) < 30 < reinforcement.last_tenth(curves).mean()
    np.testing.assert_array_equal(run([1], setting.rate)[0], curves[1])  # a seed is the same in any company
    assert np.nanmean(run(range(2), 0.0)) < 30
    setting = reinforcement.SETTINGS["DQN, CartPole"]._replace(frames=2000)
    assert np.isfinite(reinforcement.trainer(setting, setting.dialects["dqn"])(range(2), setting.rate)).any()
    low, high = reinforcement.bootstrap(np.arange(100.0))
    assert low == pytest.approx(49.5 - 1.96 * 2.887, abs=0.3)
    assert high == pytest.approx(49.5 + 1.96 * 2.887, abs=0.3)
    # Of 20 ways to part six values into threes, two are as far apart as these.
    assert reinforcement.permutation(np.array([1.0, 2, 3]), np.array([4.0, 5, 6])) == pytest.approx(0.1, abs=0.01)
    assert reinforcement.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_other_seeds_report_on_the_best_rate_of_a_dialect(users_climate, monkeypatch):
    setting = reinforcement.tuned_settings()["A2C, CartPole"]._replace(frames=16_000)
    monkeypatch.setattr(reinforcement, "GRID_SEEDS", range(2))
    monkeypatch.setattr(reinforcement, "FRESH_SEEDS", range(2, 4))
    kept = measurements("tuned", ("setting", "dialect", "rate", "seeds"))
    for dialect in ("tensorflow1", "pytorch"):
        reinforcement.tune(kept, "A2C, CartPole", setting, dialect)
    for line in reinforcement.tuned_table(kept.rows()):
        found = reinforcement.returns(kept.rows(), "A2C, CartPole", line["dialect"])
        assert len(found) >= 5
        assert line["best rate"] == max(found, key=lambda rate: found[rate])
        (fresh,) = [r for r in kept.rows() if (r["dialect"], r["seeds"]) == (line["dialect"], "fresh")]
        assert len(fresh["curves"]) == 2
        assert line["return"].startswith(f"{reinforcement.ends_of(fresh).mean():.0f} [")


def test_the_interval_of_a_difference():
    a, b = np.arange(100.0), np.arange(100.0) + 10
    low, high = (float(x) for x in reinforcement.difference(b, a, 1).partition("[")[2][:-1].split(", "))
    assert low == pytest.approx(10 - 1.96 * 2.887 * 2**0.5, abs=0.4)
    assert high == pytest.approx(10 + 1.96 * 2.887 * 2**0.5, abs=0.4)


def test_the_other_signed_code_is_right_in_the_mean():
    x = jnp.array([-3e-13, 1e-3, -0.7, 100.0])
    gaps = np.array([2.0**-40, 2.0**-11, 2.0**-2, 2.0**5])
    keys = jax.random.split(jax.random.key(0), 20_000)
    kept = np.asarray(jax.vmap(lambda key: signed_code.through_code(x, key))(keys), np.float64)
    np.testing.assert_array_less(np.abs(kept.mean(0) - np.asarray(x)), 5 * gaps / 2 / np.sqrt(len(keys)))
    assert (np.array([len(np.unique(column)) for column in kept.T]) <= 2).all()
