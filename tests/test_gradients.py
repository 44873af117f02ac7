"""Clips and scales in front of the rule, as dialects have them."""

import contextlib
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import dialects


CLIPPED = {  # what is in front, and what it makes of a gradient in float64
    "clipnorm": ({"clipnorm": 1.0}, lambda g: g / max(1, np.linalg.norm(g))),
    "global_clipnorm": ({"global_clipnorm": 1.0}, lambda g: g / max(1, np.linalg.norm(g))),
    "clipvalue": ({"clipvalue": 1.0}, lambda g: np.clip(g, -1, 1)),
    "loss_scale_factor": ({"loss_scale_factor": jnp.float32(2)}, lambda g: g / 2),
}
every_clip = pytest.mark.parametrize(("arguments", "clip"), CLIPPED.values(), ids=CLIPPED.keys())


@pytest.mark.slow
@every_clip
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_a_clip_keeps_the_dtype_and_does_not_overflow(arguments, clip, dtype):
    g = jnp.asarray(np.random.default_rng(0).normal(size=(300, 300)) * 10, dtype)
    assert np.linalg.norm(np.asarray(g, np.float64)) > 2000  # float16 has no square of this
    tx = dialects.keras(1.0, rho=0.5, epsilon=1.0, **arguments)
    for update in (tx.update, jax.jit(tx.update)):
        updates, _ = update(g, tx.init(g), g)
        assert updates.dtype == dtype
        clipped = clip(np.asarray(g, np.float64))
        expected = -clipped / np.sqrt(0.5 * clipped**2 + 1.0)
        np.testing.assert_allclose(np.asarray(updates, np.float64), expected, rtol=3 * jnp.finfo(dtype).eps, atol=1e-7)


@every_clip
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_clip_of_gradients_whose_squares_are_out_of_range(arguments, clip, dtype, size):
    (transformation,) = inspect.unwrap(dialects.keras)(0.1, **arguments).before
    g = jnp.asarray([3 * size, -4 * size], dtype)
    clipped, _ = transformation.update(g, transformation.init(g))
    expected = clip(np.asarray(g, np.float64))
    np.testing.assert_allclose(np.asarray(clipped, np.float64), expected, rtol=jnp.finfo(dtype).eps)


def test_a_norm_is_that_of_one_variable_or_of_all():
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[0.0], [4.0]]), "c": jnp.float32(0.1)}
    for arguments, scale in (({"clipnorm": 1.0}, (1 / 3, 1 / 4, 1)), ({"global_clipnorm": 1.0}, (1 / 5.001,) * 3)):
        (transformation,) = inspect.unwrap(dialects.keras)(0.1, **arguments).before
        clipped, _ = transformation.update(grads, transformation.init(grads))
        for g, c, factor in zip(grads.values(), clipped.values(), scale, strict=True):
            np.testing.assert_allclose(c, g * factor, rtol=1e-5)


@pytest.mark.parametrize("clip", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_a_clip_of_zero_or_less_is_off_in_keras_and_zero_in_tf_keras(clip):
    g = jnp.array([1.0, -2.0])
    expected, _ = dialects.keras(1.0).update(g, dialects.keras(1.0).init(g))
    for limit in (0.0, -1.0, np.float32(-1.0), np.array(0)):
        tx = dialects.keras(1.0, **{clip: limit})
        np.testing.assert_array_equal(tx.update(g, tx.init(g))[0], expected)
        tx = optax.inject_hyperparams(dialects.keras, hyperparam_dtype=jnp.float32)(1.0, **{clip: float(limit)})
        np.testing.assert_allclose(tx.update(g, tx.init(g))[0], expected, rtol=1e-6)
    tx = dialects.tf_keras(1.0, **{clip: 0.0})
    for same in (g, jnp.zeros(2)):
        np.testing.assert_array_equal(tx.update(same, tx.init(same))[0], 0)


FRONTS = {
    **{name: functools.partial(dialects.keras, 0.1, **arguments) for name, (arguments, _) in CLIPPED.items()},
    "maximize": functools.partial(dialects.pytorch, 0.1, maximize=True),
    "agc": functools.partial(dialects.dreamer, 0.1, warmup=0),
}
every_front = pytest.mark.parametrize("make", FRONTS.values(), ids=FRONTS.keys())


@every_front
@pytest.mark.parametrize("compiled", [True, False])
def test_none_float0_and_scalars_pass(make, compiled):
    tx = make()
    params = {"a": 1.0, "b": jnp.ones(2), "c": jnp.arange(2), "d": np.ones(2), "e": jnp.bfloat16(1)}
    grads = {"a": 0.5, "b": None, "c": np.zeros(2, jax.dtypes.float0), "d": np.ones(2), "e": jnp.bfloat16(1)}
    update = jax.jit(tx.update) if compiled else tx.update
    with contextlib.nullcontext() if compiled else jax.disable_jit():
        updates, state = update(grads, tx.init(params), params)
    assert updates["b"] is updates["c"] is None
    assert updates["d"].dtype == jnp.float32
    assert updates["e"].dtype == jnp.bfloat16
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(updates))
    np.testing.assert_array_equal(state[-1].nu["b"], 0)
    for empty in ({}, None, jnp.zeros((0, 3))):
        tx.update(empty, tx.init(empty), empty)


@every_front
def test_what_is_no_gradient_is_named_by_the_rule(make):
    params = {"w": jnp.ones(2), "n": jnp.arange(2)}
    for gradients, message in (
        ({"w": jnp.ones(2), "n": jnp.arange(2)}, r"gradient\['n'\] has dtype int32"),
        ({"w": "text", "n": None}, r"gradient\['w'\] has type str"),
        ({"w": jnp.ones(3), "n": None}, r"gradient\['w'\] has shape \(3,\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            make().update(gradients, make().init(params), params)


@every_front
def test_a_nan_is_not_hidden(make):
    g = jnp.array([1.0, jnp.nan])
    updates, _ = make().update(g, make().init(g), g)
    assert np.isnan(updates[1])


def test_a_norm_of_inf_makes_zeros_of_finite_gradients_as_in_optax():
    (ours,), theirs = inspect.unwrap(dialects.keras)(0.1, global_clipnorm=1.0).before, optax.clip_by_global_norm(1.0)
    g = jnp.array([1.0, jnp.inf])
    clipped, expected = (tx.update(g, tx.init(g))[0] for tx in (ours, theirs))
    np.testing.assert_array_equal(clipped, expected)
    assert clipped[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "axis_type"),
    list(zip(FRONTS.values(), [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit] * 3, strict=True)),
    ids=FRONTS,
)
def test_norms_of_sharded_gradients(make, axis_type):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    g = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    expected, _ = make().update(g, make().init(g), g)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(g, sharding)
        state = jax.jit(make().init)(sharded)
        program = jax.jit(make().update).lower(sharded, state, sharded).compile()
        for update in (make().update, program):
            updates, _ = update(sharded, state, sharded)
            assert updates.sharding.is_equivalent_to(sharding, 2)
            np.testing.assert_allclose(updates, expected, rtol=1e-5)
    assert not re.search("all-gather|all-to-all|collective-permute", program.as_text())


@every_front
def test_derivatives_through_what_is_in_front_are_finite(make):
    jacobians = jax.jit(jax.jacobian(lambda g, p: make().update(g, make().init(p), p)[0], argnums=(0, 1)))
    for at in np.float32([[0, 0, 0], [3, 4, 0]]):
        for jacobian in jacobians(at, at):
            assert np.isfinite(jacobian).all()


def test_a_new_clip_compiles_nothing(compilations):
    g = jnp.ones(3)

    def step(limit):
        tx = dialects.keras(0.1, clipnorm=limit, loss_scale_factor=2 * limit)
        return tx.update(g, tx.init(g), g)

    step(0.25)
    with compilations() as compiled:
        step(0.5)
    assert compiled == []
