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


def test_a_bad_parameter_does_not_reach_the_state():
    """Under jit, `init` adds a zero that depends on the parameter."""
    params = jnp.array([1.0, np.nan, np.inf, -np.inf])
    for state_dtype in (None, jnp.uint8):
        tx = rmsprop(0.1, state_dtype=state_dtype, **ALL_SLOTS)
        chex.assert_trees_all_equal(jax.jit(tx.init)(params), tx.init(np.ones(4, np.float32)))


TX = {
    "float32": (rmsprop(0.1, **ALL_SLOTS), jnp.float32),
    "uint8": (rmsprop(0.1, state_dtype=jnp.uint8, **ALL_SLOTS), jnp.bfloat16),
    "with a remainder": (optax.chain(rmsprop(0.1), round_params_stochastically(keep_rest=True)), jnp.bfloat16),
}
# Without jit each operation of an update is a program, so only one transformation runs there.
EAGER = {"shard_map, Auto": "float32", "shard_map, Explicit": "with a remainder", "vmap": "uint8", "pmap": "uint8"}
JITTED = [(wrap, name, True) for wrap in EAGER for name in TX]


@pytest.mark.slow
@pytest.mark.parametrize(("wrap", "name", "jit"), [*JITTED, *((*case, False) for case in EAGER.items())])
def test_a_training_step_may_start_inside(wrap, name, jit):
    """As reinforcement learning in the style of Anakin does: `init` inside of the mapped function."""
    tx, dtype = TX[name]

    def start(params):
        state = tx.init(params)
        return tx.update({"w": params["w"], "n": None}, state, params)[0]["w"]

    params = {"w": jnp.ones((8, 3), dtype), "n": jnp.arange(8)}
    expected = start(params) if name == "float32" else None
    if wrap.startswith("shard_map"):
        mesh = mesh_of(AxisType[wrap.partition(", ")[2]])
        params = jax.device_put(params, NamedSharding(mesh, P("x")))
        start = jax.shard_map(start, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    else:
        start = getattr(jax, wrap)(start)
    updates = np.asarray((jax.jit(start) if jit else start)(params))
    if name == "float32":
        np.testing.assert_array_equal(updates, expected)
    assert updates.dtype == dtype
    assert (updates < 0).all()


@pytest.mark.parametrize("options", [ALL_SLOTS, {"state_dtype": jnp.uint8, "initial_scale": 1.0}], ids=str)
def test_init_under_transformations(options):
    tx, params = rmsprop(0.1, **options), jnp.ones((8, 3))

    def init(params):
        return tx.init(params).nu

    transformed = {
        "vmap": jax.vmap(init),
        "scan": lambda params: jax.lax.scan(lambda _, p: (None, init(p)), None, params)[1],
        "remat": jax.checkpoint(init),
        "grad": jax.grad(lambda p: (init(p).astype(jnp.float32) * p).sum()),
    }
    expected = init(params).astype(np.float32)
    found = jax.jit(lambda params: jax.tree.map(lambda f: f(params), transformed))(params)
    for name in transformed:
        np.testing.assert_array_equal(found[name].astype(np.float32), expected, name)
