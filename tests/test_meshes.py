"""Training on a mesh, laid out in each of the usual ways: one device's numbers, bytes divided, nothing sent."""

import functools
import itertools

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from rmsprop_jax import rmsprop


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("users_climate")]

# Larger than the rounding error of a gradient that cancels: otherwise the last bit decides where such an element steps.
EPS = 1e-5
OPTIONS = {"plain": {}, "all slots": {"centered": True, "momentum": 0.9}, "uint8": {"state_dtype": jnp.uint8}}
STATE_BYTES = {"plain": 4, "all slots": 12, "uint8": 1}
# Of the 64*512 + 512 + 512*512 + 512 + 512*10 + 10 parameters, those whose state is on one device (10 are not split).
ON_A_DEVICE = {
    "data parallel": 301_066,
    "tensor parallel": 64 * 256 + 256 + 256 * 512 + 512 + 512 * 5 + 5,
    "FSDP": 301_056 // 8 + 10,
    "ZeRO-1": 301_056 // 8 + 10,
}
AXIS_TYPES = itertools.cycle([AxisType.Auto, AxisType.Explicit])
value_and_grad = jax.value_and_grad(meshes.loss)
few_digits = functools.cache(lambda: jax.tree.map(lambda x: x[:352], meshes.data()))


@functools.cache
def losses(name, layout, axis_type=AxisType.Auto, shape=(4, 2)):
    """The loss before each of thirty full-batch steps. What devices hold and what they send is checked on the way."""
    mesh, auto = meshes.make_mesh(axis_type, shape), meshes.make_mesh(shape=shape)
    params, state, update = meshes.place(rmsprop(1e-3, eps=EPS, **OPTIONS[name]), mesh, layout)
    assert meshes.bytes_per_device(state) == ON_A_DEVICE[layout] * STATE_BYTES[name] + 4  # and count
    # ZeRO-1 gathers each new parameter once, but for the ten that every device has.
    assert meshes.collectives(update.as_text()) == ({"all-gather": 5} if layout == "ZeRO-1" else {})
    before = params, state
    specs = meshes.LAYOUTS[layout][0]
    for_network, for_update = meshes.shardings(auto, specs), meshes.shardings(mesh, specs)
    batch = P("data" if layout == "tensor parallel" else meshes.BOTH)
    digits = jax.device_put(few_digits(), NamedSharding(auto, batch))
    # The network is left to XLA in either case, for it is the update that is tested.
    gradient = jax.jit(value_and_grad, out_shardings=(NamedSharding(auto, P()), for_network))
    values = []
    for _ in range(30):
        value, grads = gradient(jax.device_put(params, for_network), digits)
        params, state = update(jax.device_put(grads, for_update), state, params)
        values.append(float(value))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves((params, state)), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, old.ndim)
    return np.array(values)


def assert_one_devices(values, name):
    alone = losses(name, "data parallel", shape=(1, 1))
    # Sums over the batch are formed in another order. The difference in a gradient's last bits grows, and
    # in uint8 it changes the bits of the rounding at once.
    at_first, later = (5e-3, 0.2) if name == "uint8" else (1e-5, 2e-3)
    np.testing.assert_allclose(values[:8], alone[:8], rtol=at_first)
    np.testing.assert_allclose(values, alone, rtol=later)
    assert values[0] > 2.3
    assert values[-1] < values[0] / 3


@pytest.mark.parametrize(
    ("layout", "name", "axis_type"), [(*case, next(AXIS_TYPES)) for case in itertools.product(meshes.LAYOUTS, OPTIONS)]
)
def test_trains_as_on_one_device_with_a_state_that_stays_divided(layout, name, axis_type):
    assert_one_devices(losses(name, layout, axis_type), name)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("layout", ["data parallel", "FSDP"])
def test_trains_under_shard_map(layout, name):
    mesh = meshes.make_mesh()
    tx = rmsprop(1e-3, eps=EPS, **OPTIONS[name])
    specs = meshes.LAYOUTS[layout][0]
    state_specs, axes = meshes.state_specs(tx, specs), meshes.BOTH

    def whole(params):
        return jax.tree.map(lambda x, spec: jax.lax.all_gather(x, axes, tiled=True) if spec else x, params, specs)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(specs, state_specs, P(axes)),
        out_specs=(specs, state_specs, P()),
        check_vma=False,
    )
    def step(params, state, digits):
        # Through the gather back comes a sum over the devices, already split.
        value, grads = jax.value_and_grad(lambda params: meshes.loss(whole(params), digits))(params)
        grads = jax.tree.map(lambda g, spec: g / 8 if spec else jax.lax.pmean(g, axes), grads, specs)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, jax.lax.pmean(value, axes)

    params = jax.device_put(meshes.start(), meshes.shardings(mesh, specs))
    state = jax.jit(tx.init)(params)
    values = []
    for _ in range(30):
        params, state, value = step(params, state, few_digits())
        values.append(float(value))
    assert meshes.bytes_per_device(state) == ON_A_DEVICE[layout] * STATE_BYTES[name] + 4
    assert_one_devices(np.array(values), name)
