"""The properties that Optax asks of its own optimizers, and its wrappers around ours.

After optax/_src/alias_test.py, optax/contrib/_common_test.py and optax/transforms/*_test.py, as shipped in its wheel.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import advance, assert_close, assert_equal, CONFIGURATIONS, SGD, types

from rmsprop_jax import rmsprop, scale_by_rms


pytestmark = pytest.mark.slow


every_configuration = pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())


def abs_sq(x):
    return (x * x.conj()).real


def parabola(dtype):
    final = jnp.array([1.0, -1.0, 1.0], dtype) * jnp.array(1 + 1j if jnp.issubdtype(dtype, complex) else 1, dtype)
    return jnp.array([-1.0, 10.0, 1.0], dtype), final, lambda p: jnp.sum(abs_sq(p - final))


def rosenbrock(dtype):
    a = jnp.array(1 + 1j if jnp.issubdtype(dtype, complex) else 1, dtype)
    return (
        jnp.zeros(2, dtype),
        jnp.stack([a, a**2]),
        lambda p: abs_sq(a - p[0]) + 100 * abs_sq(p[1] - p[0] ** 2),
    )


def make_step(tx, loss, **extra):
    @jax.jit
    def step(params, state):
        # The gradient of a real function of complex parameters points uphill when conjugated.
        grads = jax.grad(loss)(params).conj()
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


@every_configuration
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
@pytest.mark.parametrize("problem", [parabola, rosenbrock])
def test_converges(options, problem, dtype):
    start, final, loss = problem(dtype)
    tx = rmsprop(5e-3, **options)
    step = make_step(tx, loss)
    state = optax.tree.map_params(tx, lambda x: x, tx.init(start))
    (params, _), _ = jax.lax.scan(lambda carry, _: (step(*carry), None), (start, state), length=10_000)
    np.testing.assert_allclose(params, final, rtol=3e-2, atol=3e-2)


@every_configuration
def test_accepts_extra_arguments(options):
    start, _, loss = rosenbrock(jnp.float32)
    tx = rmsprop(5e-3, **options)
    step, plain = make_step(tx, loss, unexpected=1, value=2.0), make_step(tx, loss)
    assert_equal(step(start, tx.init(start)), plain(start, tx.init(start)))


@every_configuration
def test_inject_hyperparams(options):
    params = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2))]
    grads = [jnp.ones((2, 3)), -jnp.ones((2, 5, 2))]
    plain = rmsprop(5e-3, **options)
    injected = optax.inject_hyperparams(rmsprop)(5e-3, **options)
    state, injected_state = jax.jit(plain.init)(params), jax.jit(injected.init)(params)
    for _ in range(3):
        updates, state = jax.jit(plain.update)(grads, state, params)
        injected_updates, injected_state = jax.jit(injected.update)(grads, injected_state, params)
    # 1 - decay is taken in float32 here, and in Python there: one part in 1e6 at 0.9.
    assert_close((injected_updates, injected_state.inner_state), (updates, state), rtol=1e-5)
    injected_state.hyperparams["learning_rate"] = jnp.float32(1e-2)
    assert optax.tree.get(injected_state, "learning_rate") == jnp.float32(1e-2)


def test_inject_hyperparams_with_a_schedule_and_its_value():
    tx = optax.inject_hyperparams(rmsprop)(
        lambda count: 0.1 / (1 + count.astype(jnp.float32)), decay=1.0, eps=0.0, initial_scale=1.0
    )
    state = tx.init(jnp.ones(1))
    for expected in (0.1, 0.05):
        updates, state = tx.update(jnp.ones(1), state)
        np.testing.assert_allclose(updates, -expected, rtol=1e-6)
        np.testing.assert_allclose(state.hyperparams["learning_rate"], expected, rtol=1e-6)


@every_configuration
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_preserves_dtype(options, dtype):
    params = jnp.array([1.0, 2.0], dtype)
    tx = rmsprop(5e-3, **options)
    updates, _ = jax.jit(tx.update)(2 * params, jax.jit(tx.init)(params), params)
    assert updates.dtype == dtype


@every_configuration
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"])
def test_state_is_stable_through_cond(options, name):
    with jax.enable_x64(name in ("float64", "complex128")):
        start, _, loss = parabola(jnp.dtype(name))
        tx = rmsprop(5e-3, **options)

        @jax.jit
        def step(params, state, take):
            grads = jax.grad(loss)(params).conj()
            updates, state = jax.lax.cond(
                take, lambda: tx.update(grads, state, params), lambda: (jnp.zeros_like(grads), state)
            )
            return optax.apply_updates(params, updates), state

        params, state = start, tx.init(start)
        for take in (True, False, True):
            params, new = step(params, state, take)
            assert params.dtype == name
            assert types(new) == types(state)
            state = new
        assert state.count == 2


@every_configuration
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_multi_steps_in_mixed_precision(options, dtype):
    params = jnp.array([1.0, 2.0], dtype)
    inner = rmsprop(5e-3, **options)
    tx = optax.MultiSteps(inner, every_k_schedule=4)
    state = jax.jit(tx.init)(params)
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps mixes dtypes
        for i in range(4):
            updates, state = jax.jit(tx.update)(2 * params, state, params)
            assert (updates == 0).all() == (i < 3)
    expected, _ = inner.update(2 * params, inner.init(params), params)
    np.testing.assert_array_equal(updates, expected.astype(updates.dtype))


@every_configuration
def test_takes_a_schedule(options):
    params = jnp.array([1.0, -2.0])
    constant, scheduled = rmsprop(5e-3, **options), rmsprop(lambda count: 5e-3, **options)
    assert_equal(*(tx.update(params, tx.init(params), params) for tx in (constant, scheduled)))


@every_configuration
def test_init_on_abstract_parameters(options):
    state = rmsprop(5e-3, **options).init(jax.ShapeDtypeStruct((2, 4, 8), jnp.float32))
    assert state.nu.shape == (2, 4, 8)


# --- Wrappers: the same results around ours as around Optax's, or around exact SGD ------------------------
# (Those of the table in notebooks/loop.md are in test_ecosystem.py.)


def run(tx):
    params = {"w": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "b": jnp.array([0.1, -4.0])}
    return advance(tx, params, tx.init(params), range(20), lambda p, _: jax.tree.map(lambda x: 2 * x - 1, p))[0]


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
        ours, theirs = run(wrapper(rmsprop)), run(wrapper(optax.rmsprop))
    assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


def as_sgd(rate, **options):
    return rmsprop(rate, **SGD, **options)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_sgd_is_a_special_case(options):
    # Optax puts the learning rate outside the buffer of sgd.
    place = {"lr_in_momentum": False} if options else {}
    ours, theirs = run(as_sgd(0.125, **options, **place)), run(optax.sgd(0.125, **options))
    assert_close(ours, theirs, rtol=1e-6)


def test_sam():
    start, _, loss = rosenbrock(jnp.float32)

    def sam(f):
        tx = optax.contrib.sam(f(1e-3), optax.chain(optax.contrib.normalize(), f(1e-3)), sync_period=2)
        step = make_step(tx, loss)
        params, state = start, tx.init(start)
        for _ in range(50):
            params, state = step(params, state)
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
    start, final, loss = parabola(jnp.float32)
    results = []
    with jax.numpy_dtype_promotion("standard"):
        for f in (as_sgd, optax.sgd):
            tx = optax.chain(f(1.0), search())
            params, state = start, tx.init(start)

            @jax.jit
            def step(params, state, tx=tx):
                value, grads = jax.value_and_grad(loss)(params)
                updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=loss)
                return optax.apply_updates(params, updates), state

            for _ in range(30):
                params, state = step(params, state)
            results.append(params)
    np.testing.assert_array_equal(*results)
    np.testing.assert_allclose(results[0], final, atol=1e-3)


def test_scale_by_rms_in_a_chain_is_rmsprop():
    chained = optax.chain(scale_by_rms(0.9, centered=True), optax.scale_by_learning_rate(0.1), optax.trace(0.9))
    assert_close(run(chained), run(rmsprop(0.1, centered=True, momentum=0.9)), rtol=1e-5)
