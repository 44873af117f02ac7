"""Ours has every property of conformance.py, and the suite finds what is wrong elsewhere. Then wrappers of Optax's."""

import chex
import conformance
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import run
from helpers import CONFIGURATIONS, SGD, step_of

from rmsprop_jax import rmsprop, scale_by_rms


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("check", conformance.properties(rmsprop, CONFIGURATIONS), ids=lambda check: check.__name__)
def test_rmsprop_has_every_property(check):
    check()


def stateless(update):
    """A factory of optimizers whose update is a function of the learning rate and a gradient."""
    return lambda learning_rate: optax.stateless_with_tree_map(lambda g, _: update(learning_rate, g))


def keeping(init):
    """A factory of optimizers that keep `init(params)`, and step along the gradient."""

    def make(learning_rate):
        return optax.GradientTransformation(init, lambda g, state, params=None: (g, state))

    return make


def counting(learning_rate):
    """Its count starts as an integer."""
    return optax.GradientTransformation(lambda _: jnp.int32(0), lambda g, count, params=None: (g, count + 1.0))


# For each property an optimizer that lacks it.
WRONG = {
    "converges": lambda learning_rate: optax.sgd(-learning_rate),
    "converges_with_complex_parameters": stateless(lambda rate, g: -rate * g.conj()),
    "keeps_dtypes_through_cond": counting,
    "counts_small_gradients_in_half_precision": stateless(lambda rate, g: -rate * g / jnp.sqrt(g * g + 1e-10)),
    "remembers_in_bfloat16": lambda learning_rate: optax.ema(0.9999),
    "stays_finite": stateless(lambda rate, g: -rate * g / abs(g)),
    "has_a_derivative_in_the_rate": stateless(lambda rate, g: -(rate + 0 * jnp.sqrt(rate - rate)) * g),
    "obeys_strict_promotion": stateless(lambda rate, g: -jnp.float32(rate) * g),
    "takes_a_schedule": stateless(lambda rate, g: -rate * g),
    "can_be_injected": stateless(lambda rate, g: -(5e-3 if isinstance(rate, float) else 0) * g),
    "follows_an_injected_rate": stateless(lambda rate, g: -g),
    "trains_a_grid_of_rates": stateless(lambda rate, g: -float(rate) * g),
    "is_equal_to_one_made_alike": stateless(lambda rate, g: -rate * g),
    "is_the_same_without_jit": stateless(lambda rate, g: -rate * (1 + isinstance(g, jax.core.Tracer)) * g),
    "ignores_extra_arguments": lambda learning_rate: optax.GradientTransformationExtraArgs(
        lambda _: (), lambda g, state, params=None, value=1.0, **_: (jax.tree.map(lambda x: value * x, g), state)
    ),
    "starts_from_shapes": keeping(lambda params: jax.tree.map(jnp.array, params)),
    "takes_trees_without_leaves": keeping(lambda params: jax.tree.leaves(params)[0].shape),
    "tells_params_from_numbers": keeping(lambda params: [jnp.zeros(p.shape) for p in jax.tree.leaves(params)]),
    "can_be_masked": keeping(lambda params: params["b"].shape),
    "accumulates_gradients": stateless(lambda rate, g: -rate * g * (g.dtype == jnp.bfloat16)),
    "can_donate_its_state": keeping(lambda params: params),
    "lies_where_the_parameters_lie": keeping(lambda params: jax.tree.map(jnp.zeros_like, params)),
}


@pytest.mark.parametrize("name", [check.__name__ for check in conformance.PROPERTIES])
def test_an_optimizer_without_a_property_is_found(name):
    (check,) = (c for c in conformance.properties(WRONG[name], {"": {}}) if c.__name__ == f"{name}-")
    try:
        check()
    except Exception as error:
        print(repr(error))
    else:
        pytest.fail(f"{name} holds")


# --- Wrappers: the same results around ours as around Optax's, or around exact SGD ------------------------
# (Those of the table in notebooks/loop.md are in test_ecosystem.py.)

BIASES = {"w": False, "b": True}
WRAPPERS = {
    "masked": lambda f: optax.masked(f(0.1, momentum=0.9), BIASES),
    "masked by a function": lambda f: optax.masked(f(0.1), lambda p: BIASES),
    "partition": lambda f: optax.partition(
        {"a": f(0.1, momentum=0.9), "b": f(0.01, centered=True)}, {"w": "a", "b": "b"}
    ),
    "freeze": lambda f: optax.partition({"a": f(0.1), "b": optax.set_to_zero()}, {"w": "a", "b": "b"}),
    "flatten": lambda f: optax.flatten(f(0.1, momentum=0.9)),
    "named_chain": lambda f: optax.named_chain(("clip", optax.clip(0.5)), ("rms", f(0.1))),
    "conditionally_transform": lambda f: optax.conditionally_transform(f(0.1), lambda step: step % 2 == 0),
    "skip_not_finite": lambda f: optax.MultiSteps(f(0.1), 2, should_skip_update_fn=optax.skip_not_finite),
    "add_decayed_weights": lambda f: optax.chain(f(0.1), optax.add_decayed_weights(-0.01, mask=BIASES)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_wrappers_around_ours_and_around_optax(wrapper):
    with jax.numpy_dtype_promotion("standard"):
        (ours, _), (theirs, _) = (run(wrapper(f), steps=20) for f in (rmsprop, optax.rmsprop))
    chex.assert_trees_all_close(ours, theirs, rtol=2e-5, atol=1e-6)


def as_sgd(rate, **options):
    return rmsprop(rate, **SGD, **options)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_sgd_is_a_special_case(options):
    # Optax puts the learning rate outside the buffer of sgd.
    place = {"lr_in_momentum": False} if options else {}
    (ours, _), (theirs, _) = run(as_sgd(0.125, **options, **place)), run(optax.sgd(0.125, **options))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)


@jax.jit
@jax.grad
def slope_of_a_valley(p):
    """Rosenbrock's."""
    return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2


def test_sam():
    def sam(f):
        tx = optax.contrib.sam(f(1e-3), optax.chain(optax.contrib.normalize(), f(1e-3)), sync_period=2)
        step, params, state = jax.jit(step_of(tx)), np.zeros(2, np.float32), tx.init(np.zeros(2, np.float32))
        for _ in range(50):
            params, state = step(params, state, slope_of_a_valley(params))
        return params

    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose(sam(as_sgd), sam(optax.sgd), rtol=1e-6)
        np.testing.assert_allclose(sam(rmsprop), sam(optax.rmsprop), rtol=1e-4)


@pytest.mark.parametrize(
    "search",
    [lambda: optax.scale_by_backtracking_linesearch(20), lambda: optax.scale_by_zoom_linesearch(20)],
    ids=["backtracking", "zoom"],
)
def test_line_search(search):
    goal = np.float32([1.0, -1.0, 1.0])

    def loss(p):
        return jnp.sum((p - goal) ** 2)

    def end(f):
        tx, params = optax.chain(f(1.0), search()), jnp.array([-1.0, 10.0, 1.0])

        @jax.jit
        def step(params, state):
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=loss)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        for _ in range(30):
            params, state = step(params, state)
        return params

    with jax.numpy_dtype_promotion("standard"):
        ours, theirs = end(as_sgd), end(optax.sgd)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(ours, goal, atol=1e-3)


def test_scale_by_rms_in_a_chain_is_rmsprop():
    chained = optax.chain(scale_by_rms(0.9, centered=True), optax.scale_by_learning_rate(0.1), optax.trace(0.9))
    expected, _ = run(rmsprop(0.1, centered=True, momentum=0.9))
    chex.assert_trees_all_close(run(chained)[0], expected, rtol=1e-5)
