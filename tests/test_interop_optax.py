"""Optax's states, both ways."""

import jax
import jax.numpy as jnp
import optax
import pytest
import resume
from resume import difference, END, limit, ORIGIN, RATES, STOP

from rmsprop_jax import interop, rmsprop, scale_by_rms


OPTAX = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "initial_scale": 1.0},
    {"centered": True},
    {"centered": True, "momentum": 0.9, "eps_in_sqrt": False},
    {"bias_correction": True, "momentum": 0.9},
]


@pytest.mark.parametrize("options", OPTAX, ids=str)
def test_resumes_optax_both_ways(options):
    accepted = limit("optax", options)
    options = {"eps": resume.EPS} | options
    rate = lambda count: jnp.asarray(RATES)[count]  # noqa: E731
    ours, theirs = rmsprop(rate, **options), optax.rmsprop(rate, **options)
    with jax.numpy_dtype_promotion("standard"):
        middle, state = resume.run_transformation(theirs, theirs.init(ORIGIN), ORIGIN, 0, STOP)
        whole, _ = resume.run_transformation(theirs, theirs.init(ORIGIN), ORIGIN, 0, END)
        end, _ = resume.run_transformation(ours, interop.from_optax(state), middle, STOP, END)
        assert difference(end, whole) < accepted
        our_middle, our_state = resume.run_transformation(ours, ours.init(ORIGIN), ORIGIN, 0, STOP)
        like = theirs.init(ORIGIN)
        carried = interop.to_optax(our_state, like)
        assert jax.tree.structure(carried) == jax.tree.structure(like)
        back, _ = resume.run_transformation(theirs, carried, our_middle, STOP, END)
        assert difference(back, whole) < accepted


def test_optax_scale_by_rms_and_half_precision():
    params = {"w": jnp.ones(3, jnp.bfloat16), "z": jnp.ones(2, jnp.complex64)}
    theirs = optax.scale_by_rms()
    with jax.numpy_dtype_promotion("standard"):
        _, state = theirs.update(params, theirs.init(params))
    carried = interop.from_optax(state)
    assert {k: x.dtype.name for k, x in carried.nu.items()} == {"w": "float32", "z": "float32"}
    expected = scale_by_rms().init(params)
    assert jax.tree.map(jnp.shape, carried) == jax.tree.map(jnp.shape, expected)
    again = interop.to_optax(carried, theirs.init(params))
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), again, state))
