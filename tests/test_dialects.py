"""Each dialect against the framework it is named after: golden everywhere, live where installed; papers in float64."""

import inspect
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from frameworks import cases, CONSTANT, FRAMEWORKS, ours, RATES
from problems import distance, grads, START, STEPS, trajectory

from rmsprop_jax import dialects, rmsprop


GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = [
    pytest.param(name, case, arguments, rates, id=f"{name}-{case}")
    for name, framework in FRAMEWORKS.items()
    for case, arguments, rates in cases(framework)
]


@pytest.mark.parametrize(("name", "case", "arguments", "rates"), CASES)
def test_golden_trajectories(name, case, arguments, rates):
    golden = np.load(GOLDEN / f"{name}.npz")
    assert distance(ours(FRAMEWORKS[name], arguments, rates)[9::10], golden[case]) < 1e-5


def test_golden_files_hold_the_cases_and_say_what_made_them():
    assert {path.stem for path in GOLDEN.glob("*.npz")} == set(FRAMEWORKS)
    for name, framework in FRAMEWORKS.items():
        golden = np.load(GOLDEN / f"{name}.npz")
        assert set(golden) == {case for case, *_ in cases(framework)} | {"versions"}
        assert set(framework.distributions) <= set(json.loads(str(golden["versions"])))
        # All frameworks ran the same problem, and went somewhere.
        for case, *_ in cases(framework):
            assert golden[case].shape == (STEPS // 10, len(START))
            assert np.abs(golden[case][-1] - START).max() > 0.01


# --- Papers: float64 transcriptions of their equations ------------------------------------------------------


def lua_dqn(rates):
    """NeuralQLearner.lua: w += lr * dw / sqrt(g2 - g*g + 0.01), where dw is uphill."""
    w, g, g2, out = START.astype(np.float64), 0.0, 0.0, []
    for t, lr in enumerate(rates.astype(np.float64)):
        dw = -grads(w, t)
        g = 0.95 * g + 0.05 * dw
        g2 = 0.95 * g2 + 0.05 * dw * dw
        w = w + lr * dw / np.sqrt(g2 - g * g + 0.01)
        out.append(w)
    return np.stack(out)


def graves_eq_38_to_45(rates):
    """n, g and a buffer that is added: the signs are the paper's."""
    w, n, g, delta, out = START.astype(np.float64), 0.0, 0.0, 0.0, []
    for t, lr in enumerate(rates.astype(np.float64)):
        e = grads(w, t)
        n = 0.95 * n + 0.05 * e**2
        g = 0.95 * g + 0.05 * e
        delta = 0.9 * delta - lr * e / np.sqrt(n - g**2 + 1e-4)
        w = w + delta
        out.append(w)
    return np.stack(out)


def hinton_slide(rates):
    w, mean_square, out = START.astype(np.float64), 0.0, []
    for t, lr in enumerate(rates.astype(np.float64)):
        e = grads(w, t)
        mean_square = 0.9 * mean_square + 0.1 * e**2
        w = w - lr * e / np.sqrt(mean_square)
        out.append(w)
    return np.stack(out)


@pytest.mark.parametrize("rates", [CONSTANT, RATES], ids=["constant", "schedule"])
@pytest.mark.parametrize(
    ("dialect", "paper"),
    [(dialects.hinton, hinton_slide), (dialects.graves, graves_eq_38_to_45), (dialects.dqn, lua_dqn)],
)
def test_papers(dialect, paper, rates):
    ours = trajectory(dialect(lambda count: jnp.asarray(rates)[count]))
    assert distance(ours, paper(rates)) < 1e-5


def test_optimisers_jl():
    """Not on PyPI: quad, lin and dx/(√(quad - |lin|²) + ϵ), src/rules.jl."""
    for centred in (False, True):
        options = {"eps": 1e-3, "eps_in_sqrt": False, "centered": centred}
        theirs = reference.rmsprop(grads, START, STEPS, lambda t: float(RATES[t]), 0.95, **options)
        tx = dialects.optimisers_jl(lambda count: jnp.asarray(RATES)[count], 0.95, 1e-3, centred=centred)
        assert distance(trajectory(tx), theirs) < 1e-5


# --- Signatures, refusals ---------------------------------------------------------------------------------

REFUSED = {
    "dqn": {"gradient_momentum": 0.9},
    "timm": {"corrected_weight_decay": True, "caution": True},
    "bitsandbytes": {"momentum": 0.9, "centered": True, "optim_bits": 8, "args": object()},
    "keras": {
        **{"clipnorm": 1.0, "clipvalue": 1.0, "global_clipnorm": 1.0, "use_ema": True, "ema_overwrite_frequency": 3},
        **{"loss_scale_factor": 2.0, "gradient_accumulation_steps": 4},
    },
    "tf_keras": {"decay": 0.1, "clipnorm": 1.0, "clipvalue": 1.0, "global_clipnorm": 1.0},
    "paddle": {"parameters": [1], "grad_clip": object()},
    "mindspore": {"loss_scale": 2.0},
}


@pytest.mark.parametrize(("name", "argument"), [(n, a) for n, row in REFUSED.items() for a in row])
def test_refused_by_name_with_a_remedy(name, argument):
    dialect = getattr(dialects, name)
    with pytest.raises(ValueError, match=f"^{argument}=.* is not available here: ...") as error:
        dialect(0.1, **{argument: REFUSED[name][argument]})
    # Every argument is read: none is in the signature and nowhere in the body.
    assert len(str(error.value).partition("here: ")[2]) > 15


def test_every_argument_is_used_or_refused():
    for dialect in dialects.DIALECTS:
        code = inspect.getsource(dialect).rpartition('"""')[2]
        for name in inspect.signature(dialect).parameters:
            assert name in code, (dialect.__name__, name)


def test_every_dialect_takes_a_schedule_and_inject_hyperparams():
    for dialect in dialects.DIALECTS:
        learning_rate = next(iter(inspect.signature(dialect).parameters))
        plain = trajectory(dialect(1e-2), steps=5)
        np.testing.assert_array_equal(trajectory(dialect(lambda count: 1e-2), steps=5), plain)
        # A traced momentum counts as momentum, and moves tf_keras' ε: see its docstring.
        static = ("momentum",) if dialect is dialects.tf_keras else ()
        injected = optax.inject_hyperparams(dialect, static)(**{learning_rate: 1e-2})
        np.testing.assert_allclose(trajectory(injected, steps=5), plain, rtol=2e-4)


def test_the_remedies_work():
    """What the refusals tell the user to write."""
    gradient = jnp.array([3.0, 4.0])
    clipnorm = 1.0
    clip = optax.stateless_with_tree_map(lambda g, _: g * jnp.minimum(1, clipnorm / jnp.linalg.norm(g)))
    np.testing.assert_allclose(clip.update(gradient, clip.init(gradient))[0], gradient / 5, rtol=1e-6)
    # timm's corrected decay at a rate of a quarter of the largest: p ← p - α²/α_max λ p.
    weight_decay, max_lr = 0.5, 0.4
    lr = optax.constant_schedule(0.1)
    tx = optax.chain(
        dialects.timm(lr, eps=1e30), optax.add_decayed_weights(lambda count: -weight_decay * lr(count) ** 2 / max_lr)
    )
    updates, _ = tx.update(gradient, tx.init(gradient), gradient)
    np.testing.assert_allclose(updates, -0.0125 * gradient, rtol=1e-6)


def test_tf_keras_moves_its_epsilon_also_when_traced():
    def first_step(momentum):
        tx = dialects.tf_keras(1.0, momentum=momentum, epsilon=1.0)
        return tx.update(jnp.float32(1.0), tx.init(jnp.float32(0.0)))[0]

    np.testing.assert_allclose(first_step(0.0), -1 / (np.sqrt(0.1) + 1), rtol=1e-6)
    np.testing.assert_allclose(first_step(0.9), -1 / np.sqrt(0.1 + 1), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(first_step)(0.9), -1 / np.sqrt(0.1 + 1), rtol=1e-6)


def test_no_buffer_that_is_not_used():
    params = jnp.ones(2)
    for dialect in dialects.DIALECTS:
        state = dialect(1e-2).init(params)
        assert (state.trace is None) == (dialect is not dialects.graves), dialect.__name__
        assert (state.mu is None) == (dialect not in (dialects.graves, dialects.dqn)), dialect.__name__


def test_readme_calls_are_rmsprop():
    """The call in the module's docstring, option by option."""
    tx = dialects.pytorch(lr=6e-4, alpha=0.99, eps=0.01)
    expected = rmsprop(6e-4, 0.99, 0.01, eps_in_sqrt=False)
    np.testing.assert_array_equal(trajectory(tx), trajectory(expected))
