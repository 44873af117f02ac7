"""What interop returns may be donated: every array of it has memory of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from interop_helpers import assert_own_buffers, buffers, checkpoint, entry, group
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from rmsprop_jax import interop, rmsprop, round_params_stochastically


pytestmark = pytest.mark.usefixtures("users_climate")

PARAMS = {"a": jnp.arange(1.0, 4.0), "b": jnp.ones((2, 2))}


def make(rms=rmsprop, **options):
    tx = rms(lambda count: 0.1, momentum=0.9, **options)
    return {
        "bare": tx,
        "MultiSteps": optax.MultiSteps(tx, 2).gradient_transformation(),
        "inject_hyperparams": optax.inject_hyperparams(rms)(learning_rate=lambda count: 0.1, momentum=0.9, **options),
        "apply_if_finite": optax.apply_if_finite(tx, 3),
        "partition": optax.partition({"x": tx, "y": tx}, {"a": "x", "b": "y"}),
        "with averages": optax.chain(optax.ema(0.9), tx, optax.trace(0.5), round_params_stochastically()),
        "all at once": optax.MultiSteps(
            optax.apply_if_finite(optax.chain(tx, optax.ema(0.9)), 3), 2
        ).gradient_transformation(),
    }


def advanced(tx):
    state = tx.init(PARAMS)
    for _ in range(2):
        _, state = tx.update(PARAMS, state, PARAMS)
    return state


def assert_can_be_donated(tx, state, *sources):
    assert_own_buffers(state, PARAMS, *sources)
    before = jax.tree.map(np.array, sources)
    jax.jit(tx.update, donate_argnums=1)(PARAMS, state, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, sources), before)  # none was deleted


PAIRS = [
    *((name, name) for name in make()),
    ("bare", "MultiSteps"),
    ("bare", "inject_hyperparams"),
    ("bare", "partition"),
    ("bare", "all at once"),
    ("partition", "MultiSteps"),
    ("MultiSteps", "bare"),
    ("inject_hyperparams", "MultiSteps"),
]


@pytest.mark.parametrize(("old", "new"), PAIRS, ids=map(" into ".join, PAIRS))
def test_from_rmsprop(old, new):
    tx, state = make()[new], advanced(make()[old])
    like = tx.init(PARAMS)
    assert_can_be_donated(tx, interop.from_rmsprop(state, like), state, like)


@pytest.mark.parametrize(("old", "new"), PAIRS[::2], ids=map(" into ".join, PAIRS[::2]))
def test_from_and_to_optax(old, new):
    theirs, tx = make(optax.rmsprop), make()[new]
    state, like = advanced(theirs[old]), tx.init(PARAMS)
    assert_can_be_donated(tx, interop.from_optax(state, like), state, like)
    ours, like = advanced(make()[old]), theirs[new].init(PARAMS)
    assert_can_be_donated(theirs[new], interop.to_optax(ours, like), ours, like)


def test_a_bare_state():
    for options in ({}, {"state_dtype": jnp.uint8}):
        theirs = make(optax.rmsprop)["partition"] if not options else make(**options)["partition"]
        state = advanced(theirs)
        assert_can_be_donated(make(**options)["bare"], interop.from_optax(state), state)


def test_other_options():
    state = advanced(rmsprop(0.1))
    for options in ({"momentum": 0.9}, {"centered": True}, {"state_dtype": jnp.uint8}, {}):
        tx = rmsprop(0.1, **options)
        like = tx.init(PARAMS)
        assert_can_be_donated(tx, interop.from_rmsprop(state, like), state, like)


def test_arrays_of_a_framework():
    """A convert may return its argument, JAX's arrays, or one array twice."""
    arrays = {0: entry(1.0, square_avg=np.ones(64, np.float32)), 1: entry(2.0, square_avg=np.ones(64, np.float32))}
    found = checkpoint([group([0, 1])], arrays)
    kept = []

    def convert(x):
        kept.append(jnp.asarray(x["a"], jnp.float32))
        return {"a": kept[-1], "tied": kept[-1], "b": x["b"]}

    for function in (None, convert, lambda x: {k: np.float32(v) for k, v in x.items()}):
        state = interop.from_pytorch(found, ["a", "b"], function)
        assert_own_buffers(state, kept)
        jax.jit(rmsprop(0.1).update, donate_argnums=1)(jax.tree.map(jnp.copy, state.nu), state)
    assert (arrays[0]["square_avg"] == 1).all()


def test_on_a_mesh():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    params = jax.device_put({"w": jnp.arange(8.0)}, NamedSharding(mesh, P("x")))
    tx = rmsprop(0.1, momentum=0.9)
    state, like = tx.init(params), tx.init(params)
    result = interop.from_rmsprop(state, like)
    assert len(buffers(result)) > 8
    assert_own_buffers(result, state, like)


@pytest.mark.parametrize(("old", "new"), PAIRS[5:10], ids=map(" into ".join, PAIRS[5:10]))
def test_inside_jit(old, new):
    tx, state = make()[new], advanced(make()[old])
    like = tx.init(PARAMS)
    result = jax.jit(interop.from_rmsprop)(state, like)
    jax.tree.map(np.testing.assert_array_equal, result, interop.from_rmsprop(state, like))
    assert_can_be_donated(tx, result, state, like)
