"""State follows the parameters over eight CPU devices, and the update moves nothing between them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from rmsprop_jax import _storage, rmsprop


pytestmark = pytest.mark.slow


EVERYTHING = {"centered": True, "momentum": 0.9, "nesterov": True, "bias_correction": True, "initial_scale": 1.0}
OPTIONS = [{}, EVERYTHING, {"state_dtype": jnp.uint8, "initial_scale": 1.0}, EVERYTHING | {"state_dtype": jnp.bfloat16}]
COLLECTIVES = r"all-\w+|collective-\w+|reduce-scatter"
SPECS = {"w": P("x", None), "v": P(None, "y"), "b": P(("x", "y")), "r": P(), "c": P("y"), "s": P()}
# b, c and s are of one shape, and yet each has a sharding of its own.
SHAPES = {"w": (8, 6), "v": (3, 4), "b": (16,), "r": (5,), "c": (16,), "s": (16,)}


def mesh(axis_type):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2, devices=jax.devices("cpu")[:8])


def sharded(mesh, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        k: jax.device_put(rng.normal(size=SHAPES[k]).astype(dtype), NamedSharding(mesh, spec))
        for k, spec in SPECS.items()
    }


def slots(state):
    return [tree for tree in (state.nu, state.mu, state.trace) if tree is not None]


def assert_sharded_alike(state, params):
    for slot in slots(state):
        for k, x in slot.items():
            assert x.sharding.is_equivalent_to(params[k].sharding, x.ndim), (k, x.sharding)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_h_init_keeps_the_sharding(axis_type, options):
    params = sharded(mesh(axis_type))
    tx = rmsprop(0.1, **options)
    for init in (tx.init, jax.jit(tx.init)):
        state = init(params)
        assert_sharded_alike(state, params)
        for slot in slots(state):
            assert slot["w"].addressable_shards[0].data.shape == (2, 6)
    updates, state = tx.update(params, state, params)
    assert_sharded_alike(state, params)
    assert_sharded_alike(state._replace(nu=updates, mu=None, trace=None), params)


@pytest.mark.parametrize("options", OPTIONS)
def test_h_init_inside_a_larger_jit_keeps_a_constraint(options):
    auto = mesh(AxisType.Auto)
    tx = rmsprop(0.1, **options)

    @jax.jit
    def start(key):
        w = jax.lax.with_sharding_constraint(jax.random.normal(key, (8, 6)), NamedSharding(auto, P("x", None)))
        return w, tx.init(w)

    w, state = start(jax.random.key(0))
    for slot in slots(state):
        assert slot.sharding.is_equivalent_to(w.sharding, 2)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("jit_init", [False, True])
def test_h_one_compilation_for_a_whole_run(axis_type, options, jit_init, compilations):
    params = sharded(mesh(axis_type))
    grads = sharded(mesh(axis_type))
    tx = rmsprop(0.1, **options)
    state = (jax.jit(tx.init) if jit_init else tx.init)(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with compilations() as compiled:
        for _ in range(3):
            params, state = step(params, state)
    assert len(compiled) == 1


@pytest.mark.parametrize("options", OPTIONS)
def test_h_the_update_has_no_collectives_and_one_devices_numbers(options):
    params = sharded(mesh(AxisType.Auto))
    tx = rmsprop(0.1, **options)
    state = tx.init(params)
    compiled = jax.jit(tx.update).lower(params, state, params).compile()
    text = compiled.as_text()
    assert "f32[2,6]" in text  # one device's part of w
    assert re.findall(rf"\b(?:{COLLECTIVES})[\w-]*\(", text) == []
    alone = jax.tree.map(np.asarray, params)
    after = compiled(params, state, params)
    expected = jax.jit(tx.update)(alone, tx.init(alone), alone)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
        # XLA rounds the last elements, which do not fill a vector register, otherwise than the others.
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6 if a.dtype == jnp.float32 else 0)


@pytest.mark.parametrize("options", [{}, {"centered": True, "momentum": 0.9}])
@pytest.mark.parametrize("state_dtype", [jnp.bfloat16, jnp.uint8])
@pytest.mark.parametrize("how", [AxisType.Auto, AxisType.Explicit, "shard_map"], ids=str)
def test_rounding_is_that_of_one_device(how, state_dtype, options):
    axis_type = AxisType.Auto if how == "shard_map" else how
    one = jax.make_mesh((8,), ("x",), axis_types=(axis_type,), devices=jax.devices("cpu")[:8])
    tx = rmsprop(0.1, 0.99, state_dtype=state_dtype, **options)

    def run(params, gradients):
        state = tx.init(params)
        for gradient in gradients:
            updates, state = tx.update(gradient, state, params)
        return updates, slots(state)

    # 256 elements a device: whole vectors everywhere, and so the same rounding of the arithmetic itself.
    params = jax.random.normal(jax.random.key(0), (64, 32))
    gradients = jax.random.normal(jax.random.key(1), (20, 64, 32))
    expected = jax.jit(run)(params, gradients)
    sharding = NamedSharding(one, P("x"))
    split = jax.device_put(params, sharding), jax.device_put(gradients, NamedSharding(one, P(None, "x")))
    if how != "shard_map":
        compiled = jax.jit(run).lower(*split).compile()
        assert re.findall(rf"\b(?:{COLLECTIVES})[\w-]*\(", compiled.as_text()) == []
    else:
        compiled = jax.jit(jax.shard_map(run, mesh=one, in_specs=(P("x"), P(None, "x")), out_specs=P("x")))
    for a, b in zip(jax.tree.leaves(compiled(*split)), jax.tree.leaves(expected), strict=True):
        assert a.sharding.is_equivalent_to(sharding, a.ndim)
        if how != "shard_map":
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        else:  # a place is then that in the local array: other bits, of the same mean
            a, b = (np.asarray(_storage.decode(x), np.float64) for x in (a, b))
            assert (a != b).any()
            assert abs(a.mean() - b.mean()) < 5 * (a - b).std() / np.sqrt(a.size)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("transform", ["vmap", "scan", "remat", "grad", "shard_map"])
def test_h_init_under_transformations(transform, options):
    tx = rmsprop(0.1, **options)
    params = jnp.ones((8, 3))

    def init(params):
        return tx.init(params).nu

    if transform == "vmap":
        nu = jax.jit(jax.vmap(init))(params)
    elif transform == "scan":
        nu = jax.lax.scan(lambda _, p: (None, init(p)), None, params)[1]
    elif transform == "remat":
        nu = jax.jit(jax.checkpoint(init))(params)
    elif transform == "grad":
        nu = jax.jit(jax.grad(lambda p: (init(p).astype(jnp.float32) * p).sum()))(params)
    else:
        one = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:8])
        nu = jax.jit(jax.shard_map(init, mesh=one, in_specs=P("x"), out_specs=P("x")))(params)
    expected = tx.init(np.ones((8, 3), np.float32)).nu
    np.testing.assert_array_equal(nu.astype(jnp.float32), expected.astype(jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
@pytest.mark.parametrize("options", OPTIONS)
def test_explicit_sharding_types_are_stable(dtype, options):
    """From Optax's sharding_test.py: the types of the state after init, update and jit are one."""
    one = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices("cpu")[:8])
    tx = rmsprop(1.0, **options)
    with jax.set_mesh(one):
        params = jnp.zeros((2, 8, 4), dtype, out_sharding=NamedSharding(one, P(None, "x")))
        state = tx.init(params)
        types = jax.tree.map(jax.typeof, state)
        assert jax.tree.map(jax.typeof, jax.jit(tx.init)(params)) == types
        for update in (tx.update, jax.jit(tx.update)):
            assert jax.tree.map(jax.typeof, update(params, state, params)[1]) == types
