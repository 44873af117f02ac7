"""Each dialect against the framework it is named after: golden everywhere, live where installed; papers in float64."""

import functools
import inspect
import json
import pathlib
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from frameworks import cases, CONSTANT, FRAMEWORKS, in_two, ours, RATES, SPLIT
from problems import distance, grads, START, STEPS, trajectory

from rmsprop_jax import dialects, rmsprop


GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = [
    # The short loop takes every call once, with the schedule.
    pytest.param(name, case, arguments, rates, id=f"{name}-{case}", marks=[pytest.mark.slow] * (rates is CONSTANT))
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


# --- Every argument has an effect, is refused, or says only how to compute ------------------------------


class Argument(NamedTuple):
    value: Any  # another one than the default
    beside: dict[str, Any] = {}  # noqa: RUF012 (other arguments, without which it would have no effect)
    instead: dict[str, Any] | None = None  # the arguments of the call to compare with, where that needs others


def refused(value, **beside):
    return ("refused", value, beside)


def inert(value):
    return ("inert", value, {})


MOVING, DECAYING = {"momentum": 0.9}, {"weight_decay": 0.1}
SHRINKING = {"decoupled_decay": True, "weight_decay": 0.1}
CORRECTED = {**SHRINKING, "corrected_weight_decay": True}
NUMBERS = {name: Argument(0.5) for name in ("decay", "alpha", "rho", "eps", "epsilon", "min_squared_gradient")}
MASK = Argument({"0": True, "1": False}, DECAYING)
COMMON = NUMBERS | {
    **{name: Argument(2e-2) for name in ("learning_rate", "lr", "eta")},
    **{name: Argument(True) for name in ("centered", "centred")},
    "momentum": Argument(0.9),
    "weight_decay": Argument(0.1),
    "weight_decay_mask": MASK,
    "state_dtype": Argument("uint8"),
    **{name: inert(True) for name in ("foreach", "capturable", "differentiable", "use_locking")},
    "name": inert("another"),
}
CLIPS = {name: Argument(1e-2) for name in ("clipnorm", "clipvalue", "global_clipnorm")}
OTHERS = {
    "graves": {"momentum": Argument(0.5)},
    "dqn": {"gradient_momentum": refused(0.9), "squared_gradient_momentum": Argument(0.5)},
    "dreamer": {
        "agc": Argument(1e-3),
        **{name: Argument(0.5) for name in ("beta1", "beta2")},
        "momentum": refused(False),
        "nesterov": Argument(True),
        "wd": Argument(0.1, {"wdregex": "0"}),
        "wdregex": Argument("0", {"wd": 0.1}),
        "schedule": Argument("linear", {"anneal": 10, "warmup": 3}, {"warmup": 3}),
        "warmup": Argument(5),
        "anneal": Argument(8, {"schedule": "cosine", "warmup": 3}, {"schedule": "cosine", "warmup": 3, "anneal": 100}),
        "weight_decay_mask": Argument({"0": True, "1": False}, {"wd": 0.1}),
    },
    "pytorch": {"maximize": Argument(True)},
    "timm": {
        "decoupled_decay": Argument(True, DECAYING),
        "corrected_weight_decay": Argument(True, {**SHRINKING, "max_lr": 1.0}, SHRINKING),
        "max_lr": Argument(0.5, CORRECTED, {**CORRECTED, "max_lr": 1.0}),
        "lr_in_momentum": Argument(False, MOVING),
        "caution": refused(True),
    },
    "bitsandbytes": {
        "momentum": refused(0.9),
        "centered": refused(True),
        "optim_bits": refused(8),
        "args": refused(object()),
        "min_8bit_size": inert(1),
    },
    "keras": {
        **CLIPS,
        "use_ema": refused(True),
        "ema_momentum": inert(0.5),
        "ema_overwrite_frequency": refused(3),
        "loss_scale_factor": Argument(2.0),
        "gradient_accumulation_steps": Argument(2),
    },
    "tf_keras": {**CLIPS, "decay": Argument(0.5)},
    "paddle": {"parameters": refused([1]), "grad_clip": refused(object())},
    "mindspore": {"loss_scale": Argument(2.0)},
}
ARGUMENTS = [
    pytest.param(dialect, name, id=f"{dialect.__name__}-{name}")
    for dialect in dialects.DIALECTS
    for name in inspect.signature(dialect).parameters
]


def rate_of(dialect):
    return next(iter(inspect.signature(dialect).parameters))


def moves(dialect, **arguments):
    """Where 6 steps lead, with a rate that changes, so that its place in the buffer matters."""
    schedule = lambda count: 1e-2 / (1 + jnp.asarray(count, jnp.float32))  # noqa: E731
    tx = in_two(dialect(**{rate_of(dialect): schedule} | arguments))
    params = jnp.asarray(START)
    state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):  # optax.MultiSteps
        for t in range(6):
            updates, state = tx.update(grads(params, t), state, params)
            params = optax.apply_updates(params, updates)
    return np.asarray(params)


def default_of(dialect, name):
    return inspect.signature(dialect).parameters[name].default


def values_of(value):
    """A value as Python, NumPy and JAX have it."""
    yield value
    if isinstance(value, (bool, int, float)):
        yield np.asarray(value)
        yield np.asarray(value)[()]


@pytest.mark.parametrize(("dialect", "name"), ARGUMENTS)
def test_every_argument(dialect, name):
    row = (OTHERS.get(dialect.__name__, {}) | {rate_of(dialect): Argument(2e-2)}).get(name) or COMMON[name]
    kind, value, beside = ("effect", row.value, row.beside) if isinstance(row, Argument) else row
    if kind == "refused":
        for same in values_of(value):
            with pytest.raises(ValueError, match=f"^{name}=.* is not available here: .{{15,}}"):
                dialect(**{rate_of(dialect): 0.1}, **beside, **{name: same})
        if isinstance(value, (bool, int, float)):
            with pytest.raises(ValueError, match=f"^{name} is a JAX array, .*static_args"):
                dialect(**{rate_of(dialect): 0.1}, **beside, **{name: jnp.asarray(value)})
        return
    instead = getattr(row, "instead", None)
    plain = moves(dialect, **beside if instead is None else instead)
    for same in values_of(value):
        changed = moves(dialect, **beside | {name: same})
        assert np.array_equal(changed, plain) == (kind == "inert")


OFF = {
    "momentum": (0, 0.0, np.float32(0), np.array(0.0), None),
    "weight_decay": (0, 0.0, np.array(0), None),
    "wd": (0.0, None),
    "clipnorm": (None,),
    "loss_scale": (1, None),
    "decay": (0, None),
}


# Not tensorflow1's `decay`, which is ρ, nor DreamerV3's `momentum`, which is a flag.
SWITCHES = [p for p in ARGUMENTS if p.values[1] in OFF and default_of(*p.values) is None]


@pytest.mark.parametrize(("dialect", "name"), SWITCHES)
def test_what_is_off_is_off_however_it_is_said(dialect, name):
    plain = moves(dialect)
    for value in OFF[name]:
        np.testing.assert_array_equal(moves(dialect, **{name: value}), plain)


def test_injecting_turns_nothing_on():
    params = {"0": jnp.asarray(START[:SPLIT]), "1": jnp.asarray(START[SPLIT:])}
    for dialect in dialects.DIALECTS:
        rate = rate_of(dialect)
        tx = optax.inject_hyperparams(dialect, hyperparam_dtype=jnp.float32)(**{rate: 1e-2})
        # No `params`: an injected decay of zero would ask for them. (DreamerV3 clips by the parameters' norms.)
        needed = params if dialect is dialects.dreamer else None
        # (optax.inject_hyperparams itself looks at the parameters' dtype, unless it is told one.)
        updates, state = tx.update(params, tx.init(params), needed)
        plain = dialect(**{rate: 1e-2})
        expected, plain_state = plain.update(params, plain.init(params), needed)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4), updates, expected)
        assert jax.tree.structure(state.inner_state) == jax.tree.structure(plain_state), dialect.__name__


@pytest.mark.slow
def test_every_dialect_takes_a_schedule_and_inject_hyperparams():
    for dialect in dialects.DIALECTS:
        plain = trajectory(dialect(1e-2), steps=5)
        np.testing.assert_allclose(trajectory(dialect(lambda count: 1e-2), steps=5), plain, rtol=1e-6)
        injected = optax.inject_hyperparams(dialect)(**{rate_of(dialect): 1e-2})
        np.testing.assert_allclose(trajectory(injected, steps=5), plain, rtol=2e-4)


def test_an_injected_rate_is_read_under_the_framework_s_name():
    tx = optax.inject_hyperparams(dialects.pytorch)(lr=lambda count: 0.1 / (1 + count.astype(jnp.float32)))
    state = tx.init(jnp.ones(2))
    for expected in (0.1, 0.05):
        with jax.numpy_dtype_promotion("standard"):
            _, state = tx.update(jnp.ones(2), state)
        assert state.hyperparams["lr"] == pytest.approx(expected)


def test_calls_that_a_framework_refuses_too():
    for clips in ({"clipnorm": 1.0, "clipvalue": 1.0}, {"clipnorm": 1.0, "global_clipnorm": 1.0}):
        with pytest.raises(ValueError, match="only one of clipnorm, clipvalue and global_clipnorm"):
            dialects.keras(**clips)
    with pytest.raises(ValueError, match=r"only one of clipnorm=1.0 and global_clipnorm=1.0"):
        dialects.tf_keras(clipnorm=1.0, global_clipnorm=1.0)
    for steps in (1, 0, 2.0, True):
        with pytest.raises(ValueError, match=f"gradient_accumulation_steps={steps}.*integer of at least 2"):
            dialects.keras(gradient_accumulation_steps=steps)
    with pytest.raises(TypeError, match="gradient_accumulation_steps is a JAX array.*static_args"):
        dialects.keras(gradient_accumulation_steps=jnp.int32(4))
    for scale in (0, -1.0):
        with pytest.raises(ValueError, match="loss_scale_factor=.*above 0"):
            dialects.keras(loss_scale_factor=scale)
        with pytest.raises(ValueError, match="loss_scale=.*above 0"):
            dialects.mindspore(loss_scale=scale)
    with pytest.raises(ValueError, match="needs max_lr, the rate that timm's constructor got"):
        dialects.timm(optax.constant_schedule(0.1), corrected_weight_decay=True)
    with pytest.raises(ValueError, match="max_lr=0.1 needs corrected_weight_decay=True"):
        dialects.timm(0.1, max_lr=0.1)
    with pytest.raises(ValueError, match=r"anneal=500.* is not available here: it needs schedule"):
        dialects.dreamer(anneal=500)
    with pytest.raises(ValueError, match=r"anneal=500.*it must be larger than warmup=1000"):
        dialects.dreamer(anneal=500, schedule="cosine")
    with pytest.raises(ValueError, match=r"schedule='exp': allowed are 'const', 'linear' and 'cosine'"):
        dialects.dreamer(schedule="exp")
    for flag, make in (("maximize", dialects.pytorch), ("decoupled_decay", dialects.timm)):
        with pytest.raises(TypeError, match=f"{flag}='yes' has type str: allowed are True and False"):
            make(**{flag: "yes"})


def test_dreamer_clips_a_whole_tensor_by_its_norm_or_a_thousandth():
    (clip,) = inspect.unwrap(dialects.dreamer)(agc=0.25).before
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.3, 0.4]), "c": None}
    params = {"a": jnp.array([0.0, 2.0]), "b": jnp.zeros(2), "c": jnp.ones(1)}
    clipped, _ = clip.update(grads, clip.init(params), params)
    np.testing.assert_allclose(clipped["a"], [0.3, 0.4], rtol=1e-6)  # 5 comes down to 0.25 · 2
    np.testing.assert_allclose(clipped["b"], [1.5e-4, 2e-4], rtol=1e-6)  # 0.5 comes down to 0.25 · 0.001
    assert clipped["c"] is None
    small = {"a": 1e-3 * grads["a"], "b": 1e-4 * grads["b"], "c": None}
    np.testing.assert_array_equal(clip.update(small, (), params)[0]["a"], small["a"])


def test_threads_do_not_see_each_other():
    """`options` looks at data: nothing is patched while another thread builds its optimizer."""
    stop = threading.Event()

    def look():
        while not stop.is_set():
            dialects.options(dialects.pytorch, momentum=0.9)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        made = [dialects.pytorch(lr=0.1) for _ in range(300)]
    finally:
        stop.set()
        thread.join()
    assert all(isinstance(tx, optax.GradientTransformationExtraArgs) for tx in made)
    assert dialects.options(dialects.pytorch, maximize=True)["eps_in_sqrt"] is False


# --- Decay of some of the parameters ----------------------------------------------------------------------

MASKED = [
    pytest.param(dialect, decoupled, id=f"{dialect.__name__}{',decoupled' * decoupled}")
    for dialect in dialects.DIALECTS
    for decoupled in (False, True)
    if "weight_decay" in inspect.signature(dialect).parameters
    and (not decoupled or "decoupled_decay" in inspect.signature(dialect).parameters)
]


@pytest.mark.parametrize(("dialect", "decoupled"), MASKED)
def test_a_mask_is_a_partition_with_and_without_decay(dialect, decoupled):
    options = {"weight_decay": 0.1} | ({"decoupled_decay": True} if decoupled else {})
    mask = {"0": True, "1": False}
    parts = {True: dialect(1e-2, **options), False: dialect(1e-2)}
    expected = trajectory(in_two(optax.partition(parts, mask)), steps=50)
    for given in (mask, lambda params: {name: len(p) == SPLIT for name, p in params.items()}):
        np.testing.assert_array_equal(
            trajectory(in_two(dialect(1e-2, **options, weight_decay_mask=given)), steps=50), expected
        )


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_mask_is_that_of_adamw(decoupled):
    params = {"body": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "head": jnp.ones(3)}
    mask = {"body": {"kernel": True, "bias": False}, "head": True}
    sgd = {"decay": 1.0, "eps": 0.0, "initial_scale": 1.0}
    tx = rmsprop(0.5, weight_decay=0.25, decoupled=decoupled, weight_decay_mask=mask, **sgd)
    grads = jax.tree.map(jnp.zeros_like, params)
    state = tx.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(rmsprop(0.1).init(params))
    for update in (tx.update, jax.jit(tx.update)):
        updates, _ = update(grads, state, params)
        assert jax.tree.map(lambda u: float(u.ravel()[0]), updates) == {
            "body": {"kernel": -0.125, "bias": 0.0},
            "head": -0.125,
        }
    prefix = rmsprop(0.5, weight_decay=0.25, decoupled=decoupled, weight_decay_mask={"body": False, "head": True})
    updates, _ = prefix.update(grads, state, params)
    assert (updates["body"]["kernel"] == 0).all()
    assert (updates["head"] < 0).all()


@pytest.mark.parametrize("mask", [lambda params: jax.tree.map(lambda p: p.ndim > 1, params), True, np.True_])
def test_a_mask_that_inject_hyperparams_called_is_refused(mask):
    make = optax.inject_hyperparams(rmsprop)
    with pytest.raises(TypeError, match="weight_decay_mask is a single.*add it to static_args"):
        make(learning_rate=0.1, weight_decay=0.1, weight_decay_mask=mask).init({"w": jnp.ones((2, 2))})


def test_a_mask_beside_a_decay_of_zero():
    # As in a sweep over decays.
    tx = dialects.pytorch(weight_decay=0.0, weight_decay_mask=lambda params: params)
    np.testing.assert_array_equal(trajectory(tx, steps=3), trajectory(dialects.pytorch(), steps=3))


def test_a_mask_of_other_things_than_booleans():
    params = {"w": jnp.ones(2)}
    for mask in ({"w": 1}, {"w": jnp.array(True)}, {"w": "yes"}):
        tx = rmsprop(0.1, weight_decay=0.1, weight_decay_mask=mask)
        with pytest.raises(TypeError, match=r"the mask\['w'\] has type .*allowed are True and False"):
            tx.update(params, tx.init(params), params)


def test_a_mask_as_static_argument():
    mask = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    tx = optax.inject_hyperparams(rmsprop, static_args="weight_decay_mask")(
        learning_rate=0.1, weight_decay=0.1, weight_decay_mask=mask
    )
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert (updates["b"] == 0).all()
    assert (updates["w"] < 0).all()


def test_tf_keras_moves_its_epsilon_also_when_traced():
    def first_step(momentum):
        tx = dialects.tf_keras(1.0, momentum=momentum, epsilon=1.0)
        return tx.update(jnp.float32(1.0), tx.init(jnp.float32(0.0)))[0]

    np.testing.assert_allclose(first_step(0.0), -1 / (np.sqrt(0.1) + 1), rtol=1e-6)
    np.testing.assert_allclose(first_step(0.9), -1 / np.sqrt(0.1 + 1), rtol=1e-6)
    np.testing.assert_allclose(first_step(None), -1 / (np.sqrt(0.1) + 1), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(first_step)(0.9), -1 / np.sqrt(0.1 + 1), rtol=1e-6)


def test_no_buffer_that_is_not_used():
    params = jnp.ones(2)
    for dialect in dialects.DIALECTS:
        tx = dialect(1e-2)
        state = tx.init(params)
        if dialect is dialects.dreamer:  # its momentum is a trace of Optax's
            state = state[1]
        assert (state.trace is None) == (dialect is not dialects.graves), dialect.__name__
        assert (state.mu is None) == (dialect not in (dialects.graves, dialects.dqn)), dialect.__name__


def test_readme_calls_are_rmsprop():
    """The call in the module's docstring, option by option."""
    tx = dialects.pytorch(lr=6e-4, alpha=0.99, eps=0.01)
    expected = rmsprop(6e-4, 0.99, 0.01, eps_in_sqrt=False)
    np.testing.assert_array_equal(trajectory(tx), trajectory(expected))
