"""Shared by several test files: options, random arrays, meshes, runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st
from jax.sharding import AxisType

from rmsprop_jax import rmsprop, scale_by_rms


# --- Options --------------------------------------------------------------------------------------------

# Every slot, and a decay.
EVERYTHING = {"centered": True, "momentum": 0.9, "bias_correction": True, "weight_decay": 0.1}
# With an average of one that never moves, RMSProp is gradient descent, to the last bit.
SGD = {"decay": 1.0, "eps": 0.0, "initial_scale": 1.0}
# Each option at least once.
CONFIGURATIONS = {
    "plain": {},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "lr outside": {"momentum": 0.9, "lr_in_momentum": False, "eps_in_sqrt": False},
    "centered, momentum": {"centered": True, "momentum": 0.9, "eps_in_sqrt": False},
    "centered, bias correction": {"centered": True, "bias_correction": True},
    "initial scale, decay": {"initial_scale": 1.0, "weight_decay": 1e-5, "decoupled": True},
}
NARROW_DTYPES = [jnp.bfloat16, jnp.uint8]


def rate(count):
    return 0.1 / (1 + count.astype(jnp.float32))


# Calls that give equal transformations each time.
ALIKE = {
    "number": lambda: rmsprop(1e-3),
    "options": lambda: rmsprop(1e-3, momentum=0.9, centered=True, weight_decay=0.1, state_dtype=jnp.uint8),
    "schedule": lambda: rmsprop(rate, initial_scale=np.float32(1.0)),
    "mask": lambda: rmsprop(1e-3, weight_decay=0.1, weight_decay_mask=(True, False)),
    "scale_by_rms": lambda: scale_by_rms(0.99, state_dtype="bfloat16"),
}


# --- Arrays ---------------------------------------------------------------------------------------------

finite_floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def normal(shape, dtype=jnp.float32, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def mesh_of(axis_type=AxisType.Auto, shape=(8,), names=("x",)):
    """A mesh of the CPU devices that conftest.py makes."""
    devices = jax.devices("cpu")[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape), devices=devices)


# --- Trees ----------------------------------------------------------------------------------------------


def dtypes(tree):
    return jax.tree.map(lambda x: x.dtype, tree)


def types(tree):
    """Shapes, dtypes and, on Explicit meshes, shardings."""
    return jax.tree.map(jax.typeof, tree)


# --- Runs -----------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def follow(tx, gradients, params):
    """The last parameters, all updates and the last state of a run that gets these gradients, in one scan.

    Transformations made alike are equal, so tests that differ in their gradients share one compiled run.
    """

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), updates

    (params, state), updates = jax.lax.scan(step, (params, tx.init(params)), gradients)
    return params, updates, state


@functools.partial(jax.jit, static_argnums=0)
def update(tx, updates, state, params=None):
    """`tx.update` as one program; outside of jit each of its operations is compiled alone."""
    return tx.update(updates, state, params)


def step_of(tx):
    """`step(params, state, grads) -> (params, state)`, to be compiled."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def advance(tx, params, state, steps, gradient):
    """Parameters and state after a loop that calls `update` eagerly, with `gradient(params, t)` for t in `steps`."""
    step = step_of(tx)
    for t in steps:
        params, state = step(params, state, gradient(params, t))
    return params, state
