"""State follows the parameters over eight CPU devices, and the update moves nothing between them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import follow, mesh_of, normal, types
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from rmsprop_jax import _storage, rmsprop


pytestmark = pytest.mark.slow


EVERYTHING = {"centered": True, "momentum": 0.9, "nesterov": True, "bias_correction": True, "initial_scale": 1.0}
OPTIONS = [{}, EVERYTHING, {"state_dtype": jnp.uint8, "initial_scale": 1.0}, EVERYTHING | {"state_dtype": jnp.bfloat16}]
decode = jax.jit(_storage.decode)
SPECS = {"w": P("x", None), "v": P(None, "y"), "b": P(("x", "y")), "r": P(), "c": P("y"), "s": P()}
# b, c and s are of one shape, and yet each has a sharding of its own.
SHAPES = {"w": (8, 6), "v": (3, 4), "b": (16,), "r": (5,), "c": (16,), "s": (16,)}


def sharded(axis_type=AxisType.Auto):
    mesh = mesh_of(axis_type, (4, 2), ("x", "y"))
    rng = np.random.default_rng(0)
    return {
        k: jax.device_put(rng.normal(size=SHAPES[k]).astype(np.float32), NamedSharding(mesh, spec))
        for k, spec in SPECS.items()
    }


def slots(state):
    return [tree for tree in (state.nu, state.mu, state.trace) if tree is not None]


def assert_sharded_alike(state, params):
    for slot in slots(state):
        for k, x in slot.items():
            assert x.sharding.is_equivalent_to(params[k].sharding, x.ndim), (k, x.sharding)


@functools.cache
def alone(i):
    """The first update on one device."""
    params, tx = jax.tree.map(np.asarray, sharded()), rmsprop(0.1, **OPTIONS[i])
    return jax.jit(tx.update)(params, tx.init(params), params)


@pytest.mark.parametrize("i", range(len(OPTIONS)))
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_state_and_update_keep_the_sharding_and_have_the_numbers_of_one_device(axis_type, i):
    params, tx = sharded(axis_type), rmsprop(0.1, **OPTIONS[i])
    for init in (tx.init, jax.jit(tx.init)):
        state = init(params)
        assert_sharded_alike(state, params)
        for slot in slots(state):
            assert slot["w"].addressable_shards[0].data.shape == (2, 6)
    after = updates, state = tx.update(params, state, params)
    assert_sharded_alike(state, params)
    assert_sharded_alike(state._replace(nu=updates, mu=None, trace=None), params)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(alone(i)), strict=True):
        # XLA rounds the last elements, which do not fill a vector register, otherwise than the others.
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6 if a.dtype == jnp.float32 else 0)


def test_init_inside_a_larger_jit_keeps_a_constraint():
    auto = mesh_of(AxisType.Auto, (4, 2), ("x", "y"))

    @jax.jit
    def start(key):
        w = jax.lax.with_sharding_constraint(jax.random.normal(key, (8, 6)), NamedSharding(auto, P("x", None)))
        return w, [slots(rmsprop(0.1, **options).init(w)) for options in OPTIONS]

    w, states = start(jax.random.key(0))
    assert all(slot.sharding.is_equivalent_to(w.sharding, 2) for slot in jax.tree.leaves(states))


@pytest.mark.parametrize("options", [{}, {"centered": True, "momentum": 0.9}])
@pytest.mark.parametrize("state_dtype", [jnp.bfloat16, jnp.uint8])
@pytest.mark.parametrize("how", [AxisType.Auto, AxisType.Explicit, "shard_map"], ids=str)
def test_rounding_is_that_of_one_device(how, state_dtype, options):
    one = mesh_of(AxisType.Auto if how == "shard_map" else how)
    tx = rmsprop(0.1, 0.99, state_dtype=state_dtype, **options)

    def run(gradients, params):
        _, updates, state = follow(tx, gradients, params)
        return updates, slots(state)

    # 256 elements a device: whole vectors everywhere, and so the same rounding of the arithmetic itself.
    params, gradients = normal((64, 32)), normal((20, 64, 32), seed=1)
    expected = run(gradients, params)
    stacked, sharding = NamedSharding(one, P(None, "x")), NamedSharding(one, P("x"))
    if how == "shard_map":
        specs = stacked.spec, sharding.spec
        run = jax.shard_map(run, mesh=one, in_specs=specs, out_specs=specs)
    ours = run(jax.device_put(gradients, stacked), jax.device_put(params, sharding))
    assert ours[0].sharding.is_equivalent_to(stacked, 3)
    assert all(x.sharding.is_equivalent_to(sharding, x.ndim) for x in jax.tree.leaves(ours[1]))
    if how != "shard_map":
        chex.assert_trees_all_equal(ours, expected, strict=True)
        return
    # A place is then that in the local array: other bits, of the same mean.
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(decode(x), np.float64) for x in (a, b))
        assert (a != b).any()
        assert abs(a.mean() - b.mean()) < 5 * (a - b).std() / np.sqrt(a.size)


@pytest.mark.parametrize(
    ("dtype", "options"), list(zip([jnp.float16, jnp.float32, jnp.float32, jnp.float16], OPTIONS, strict=True))
)
def test_explicit_sharding_types_are_stable(dtype, options):
    """From Optax's sharding_test.py: the types of the state after init, update and jit are one."""
    one = mesh_of(AxisType.Explicit)
    tx = rmsprop(1.0, **options)
    with jax.set_mesh(one):
        params = jnp.zeros((2, 8, 4), dtype, out_sharding=NamedSharding(one, P(None, "x")))
        state = tx.init(params)
        expected = types(state)
        assert types(jax.jit(tx.init)(params)) == expected
        for update in (tx.update, jax.jit(tx.update)):
            assert types(update(params, state, params)[1]) == expected
