"""Where the arrays of a new state lie: under every transformation of JAX, and in every memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import mesh_of
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from rmsprop_jax import rmsprop, round_params_stochastically


ALL_SLOTS = {"momentum": 0.9, "centered": True, "initial_scale": 1.0}


@pytest.mark.parametrize(
    ("kind", "state_dtype"), [("pinned_host", None), ("unpinned_host", jnp.bfloat16), ("device", jnp.uint8)]
)
def test_a_state_is_in_device_memory(kind, state_dtype):
    device = jax.devices()[0]
    if kind not in {memory.kind for memory in device.addressable_memories()}:
        kind = device.default_memory().kind
    sharding = jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
    params = {"w": jax.device_put(jnp.ones((2, 3)), sharding)}
    tx = rmsprop(0.1, state_dtype=state_dtype, **ALL_SLOTS)
    for init in (tx.init, jax.jit(tx.init)):
        state = init(params)
        assert {x.sharding.memory_kind for x in jax.tree.leaves(state)} == {device.default_memory().kind}
        chex.assert_trees_all_equal(state, tx.init({"w": jnp.ones((2, 3))}))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_parameter_does_not_reach_the_state(bad):
    """Under jit, `init` adds a zero that depends on the parameter."""
    params = jnp.array([1.0, bad])
    for state_dtype in (None, jnp.uint8):
        tx = rmsprop(0.1, state_dtype=state_dtype, **ALL_SLOTS)
        chex.assert_trees_all_equal(jax.jit(tx.init)(params), tx.init(jnp.ones(2)))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("tx", "dtype"),
    [
        (rmsprop(0.1, **ALL_SLOTS), jnp.float32),
        (rmsprop(0.1, state_dtype=jnp.uint8, **ALL_SLOTS), jnp.bfloat16),
        (optax.chain(rmsprop(0.1), round_params_stochastically(keep_rest=True)), jnp.bfloat16),
    ],
    ids=["float32", "uint8", "with a remainder"],
)
@pytest.mark.parametrize("wrap", ["shard_map", "vmap", "pmap"])
def test_a_training_step_may_start_inside(wrap, tx, dtype, axis_type, jit):
    """As reinforcement learning in the style of Anakin does: `init` inside of the mapped function."""
    mesh = mesh_of(axis_type)

    def start(params):
        state = tx.init(params)
        return tx.update({"w": params["w"], "n": None}, state, params)[0]["w"]

    params = {"w": jnp.ones((8, 3), dtype), "n": jnp.arange(8)}
    expected = start(params)
    if wrap == "shard_map":
        params = jax.device_put(params, NamedSharding(mesh, P("x")))
        start = jax.shard_map(start, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    else:
        start = getattr(jax, wrap)(start)
    updates = (jax.jit(start) if jit else start)(params)
    if dtype == jnp.float32:
        np.testing.assert_array_equal(updates, expected)
    assert updates.dtype == dtype
    assert (updates < 0).all()


@pytest.mark.parametrize("options", [{}, ALL_SLOTS, {"state_dtype": jnp.uint8, "initial_scale": 1.0}], ids=str)
@pytest.mark.parametrize("transform", ["vmap", "scan", "remat", "grad"])
def test_init_under_transformations(transform, options):
    tx, params = rmsprop(0.1, **options), jnp.ones((8, 3))

    def init(params):
        return tx.init(params).nu

    transformed = {
        "vmap": jax.vmap(init),
        "scan": lambda params: jax.lax.scan(lambda _, p: (None, init(p)), None, params)[1],
        "remat": jax.checkpoint(init),
        "grad": jax.grad(lambda p: (init(p).astype(jnp.float32) * p).sum()),
    }[transform]
    expected = init(params).astype(jnp.float32)
    np.testing.assert_array_equal(jax.jit(transformed)(params).astype(jnp.float32), expected)
