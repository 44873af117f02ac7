"""bfloat16 parameters, rounded: right in the mean, the same on every layout, and in other people's loops."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import mesh_of, normal
from hypothesis import given, settings, strategies as st
from jax.sharding import NamedSharding, PartitionSpec as P
from problems import train_digits, trajectory

from rmsprop_jax import rmsprop, round_params_stochastically, RoundParamsState


pytestmark = pytest.mark.usefixtures("users_climate")  # float32 updates of bfloat16 parameters

ROUND = round_params_stochastically()


def unit(x):
    """The distance of bfloat16 numbers just above |x|."""
    return 2.0 ** (np.floor(np.log2(abs(x))) - 7)


def bits(tree):
    return jax.tree.map(lambda x: np.asarray(x).view(np.uint16), tree)


def rounded(params, updates, step=0):
    """The parameters after one update."""
    changed, _ = ROUND.update(updates, RoundParamsState(jnp.int32(step)), params)
    return optax.apply_updates(params, changed)


# --- Statistics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [1e-3, 0.1, 0.5, 0.9, 1.0, 3.3, 10.0])
@pytest.mark.parametrize("start", [1.0, 1.5, 1.9921875, -2.0, 3e-5])
def test_the_mean_of_one_update_is_exact(start, size, sign, dtype):
    """One parameter, one update, 2¹⁶ steps: the mean to within five standard errors."""
    p = jnp.asarray(start, jnp.bfloat16)
    u = jnp.asarray(sign * size * unit(float(p)), dtype)
    ends = np.asarray(jax.jit(jax.vmap(lambda step: rounded(p, u, step)))(jnp.arange(2**16)), np.float64)
    exact = float(p) + float(u)
    gap = unit(exact)
    share = exact / gap % 1
    assert set(ends) <= {np.floor(exact / gap) * gap, np.ceil(exact / gap) * gap}
    assert abs(ends.mean() - exact) <= 5 * gap * np.sqrt(share * (1 - share) / 2**16)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_parameter_of_zero_becomes_the_update(sign):
    for size in (1e-30, 1e-8, 1.0):
        u = jnp.asarray(sign * size, jnp.bfloat16)
        assert rounded(jnp.zeros((), jnp.bfloat16), u) == u


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("steps", [10_000, 100_000])
def test_many_steps_far_below_one_unit_add_up(steps, dtype):
    """About 100 units in 10⁴ and 10⁵ steps, from 64 values between 1 and 1.5: the variance is that of a walk, and no more.

    The updates differ a little: elements that meet with equal updates would go on together.
    """
    moves = (100 * 2.0**-7 / steps * (1 + jnp.arange(64) / 128)).astype(dtype)
    start = (1 + jnp.arange(64) / 128).astype(jnp.bfloat16)

    def step(carry, _):
        params, state = carry
        changed, state = ROUND.update(moves, state, params)
        return (optax.apply_updates(params, changed), state), None

    (end, state), _ = jax.jit(lambda p: jax.lax.scan(step, (p, ROUND.init(p)), None, length=steps))(start)
    assert state.step == steps
    way = (np.asarray(end, np.float64) - np.asarray(start, np.float64)) / (np.asarray(moves, np.float64) * steps)
    # Each walk waits for 100 units, or for fewer that are twice as large above 2: a relative deviation of about 0.1.
    assert abs(way.mean() - 1) < 5 * 0.1 / np.sqrt(64)
    assert 0.03 < way.std() < 0.2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("start", [1.0, 1.5, -2.0, 3e-5])
def test_steps_far_below_the_parameter_add_up(start, size, sign, dtype):
    """Updates of 1e-6 to 1e-2 of p, 512 elements, 2¹⁴ draws: how far do the parameters move?"""
    p = jnp.full(512, start, jnp.bfloat16)
    u = jnp.asarray(sign * size * abs(float(p[0])) * (1 + np.arange(512) / 1024), dtype)

    @jax.jit
    def moved():
        def step(total, t):
            return total + (rounded(p, u, t).astype(jnp.float32) - p.astype(jnp.float32)), None

        return jax.lax.scan(step, jnp.zeros(512), jnp.arange(2**14))[0]

    total = float(np.asarray(moved(), np.float64).sum())
    exact = 2**14 * float(np.asarray(u, np.float64).sum())
    # Below a power of two the unit, and with it the deviation, is half as large.
    inward = sign * start < 0 and np.log2(abs(start)) % 1 == 0
    gap = unit(float(p[0])) / (2 if inward else 1)
    # float32 rounds each sum p + u, by less than 1 % of u in the mean over the elements.
    assert abs(total - exact) <= 5 * np.sqrt(gap * abs(exact)) + 0.01 * abs(exact) * (size < 1e-4)


def test_equal_elements_with_equal_updates_are_rounded_independently():
    """A layer's scales may start alike. Their mean must not wobble as one element does."""
    moves = jnp.asarray([2.0**-7 / 100] * 1000)

    @jax.jit
    def run(first):  # 1,000 steps, which make 10 units
        def step(params, t):
            return rounded(params, moves, t), None

        return jax.lax.scan(step, jnp.ones(1000, jnp.bfloat16), first + jnp.arange(1000))[0]

    ends = (np.stack([run(first) for first in range(0, 16_000, 1000)]).astype(np.float64) - 1) / 2.0**-7
    # A sum of 1,000 draws with a chance of 1/100: a standard deviation of 3.1 for each element, 0.1 for their mean.
    assert 2.9 < ends.std() < 3.4
    assert abs(ends.mean() - 10) < 5 * 3.15 / np.sqrt(ends.size)
    assert abs(ends.mean(1) - 10).max() < 5 * 0.1


@settings(max_examples=200)
@given(
    p=st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30),
    u=st.floats(-(2.0**100), 2.0**100, width=32),
    step=st.integers(0, 2**31 - 2),
)
def test_the_result_is_a_neighbour_of_the_exact_sum(p, u, step):
    p, u = jnp.bfloat16(p), jnp.bfloat16(u)
    exact, end = float(p) + float(u), float(rounded(p, u, step))
    if exact == 0 or abs(exact) < 1e-30:
        return
    if 0.5 * abs(float(p)) < abs(exact) < 2 * abs(float(p)) and exact * float(p) > 0:
        assert abs(end - exact) < max(unit(exact), unit(end))
    assert abs(end - exact) <= 2.5 * max(unit(exact), unit(float(u)) if u else 0)


# --- Numbers that it does not change ----------------------------------------------------------------------


def test_an_update_of_zero_changes_no_bit():
    every = jnp.asarray(np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16))
    # (Subnormal ones are flushed to zero by the addition itself, on a CPU.)
    size = np.abs(np.asarray(every, np.float32))
    finite = every[np.isfinite(size) & ((size == 0) | (size >= 2.0**-126))]
    infinite = jnp.array([jnp.inf, -jnp.inf], jnp.bfloat16)
    for zero in (0.0, -0.0):
        for dtype in (jnp.bfloat16, jnp.float32):
            for params in (finite, infinite):
                np.testing.assert_array_equal(bits(rounded(params, jnp.full(params.shape, zero, dtype))), bits(params))


def test_nan_and_inf_pass_through():
    params = jnp.ones(4, jnp.bfloat16)
    end = rounded(params, jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.0], jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(end, np.float32), [np.nan, np.inf, -np.inf, 1])


def test_other_leaves_and_dtypes_pass_through():
    params = {
        "f": jnp.ones(2),
        "h": jnp.ones(2, jnp.float16),
        "b": jnp.ones(2, jnp.bfloat16),
        "n": jnp.arange(2),
        "x": None,
    }
    updates = {
        "f": jnp.full(2, 1e-9),
        "h": jnp.full(2, 1e-6, jnp.float16),
        "b": jnp.full(2, 1e-3),
        "n": None,
        "x": None,
    }
    changed, state = ROUND.update(updates, ROUND.init(params), params)
    for name in ("f", "h"):  # float16 passes through as it is
        np.testing.assert_array_equal(changed[name], updates[name])
    assert changed["b"].dtype == jnp.float32
    assert changed["n"] is changed["x"] is None
    assert state.step == 1
    changed, _ = ROUND.update(updates | {"b": None}, ROUND.init(params), params)
    assert changed["b"] is None


def test_missing_params_and_wrong_shapes_are_refused():
    p = {"w": jnp.ones(3, jnp.bfloat16)}
    with pytest.raises(
        ValueError, match=r"round_params_stochastically needs params: call update\(updates, state, params\)"
    ):
        ROUND.update(p, ROUND.init(p))
    with pytest.raises(ValueError, match=r"update\['w'\] has shape \(2,\), its parameter \(3,\): they must be equal"):
        ROUND.update({"w": jnp.ones(2, jnp.bfloat16)}, ROUND.init(p), p)


def test_the_state_has_no_second_count():
    tx = optax.chain(rmsprop(0.1), ROUND)
    state = tx.init(jnp.ones(2, jnp.bfloat16))
    assert optax.tree.get(state, "count") == optax.tree.get(state, "step") == 0


# --- The same everywhere ----------------------------------------------------------------------------------


def test_the_rounding_depends_on_the_place_the_step_and_the_values_alone():
    p, u = normal((512,), jnp.bfloat16), normal((512,), jnp.bfloat16, seed=1) * 1e-3
    expected = bits(rounded(p, u, 3))
    np.testing.assert_array_equal(bits(rounded(p.reshape(16, 32), u.reshape(16, 32), 3)).ravel(), expected)
    tree = rounded({"a": -p, "b": p}, {"a": u, "b": u}, 3)
    np.testing.assert_array_equal(bits(tree)["b"], expected)
    np.testing.assert_array_equal(bits(jax.jit(rounded)(p, u, 3)), expected)
    assert (bits(rounded(p, u, 4)) != expected).any()
    assert (bits(rounded(p[::-1], u[::-1], 3)) != expected[::-1]).any()


def test_a_mesh_rounds_as_one_device_does():
    mesh = mesh_of()
    p, u = normal((64, 8), jnp.bfloat16), normal((64, 8), jnp.bfloat16, seed=1) * 1e-3
    step = jax.jit(lambda p, u, s: ROUND.update(u, s, p))
    expected, _ = step(p, u, ROUND.init(p))
    there, updates = (jax.device_put(x, NamedSharding(mesh, P("x"))) for x in (p, u))
    state = ROUND.init(there)
    assert isinstance(state.step.sharding, NamedSharding)
    changed, _ = step(there, updates, state)
    np.testing.assert_array_equal(bits(changed), bits(expected))
    assert changed.sharding.is_equivalent_to(there.sharding, 2)


# --- In other people's loops --------------------------------------------------------------------------------

TARGET = 1 + jnp.arange(64) / 64


def downhill(params, _):
    """The gradient of a parabola."""
    return jax.tree.map(lambda p: (p.astype(jnp.float32) - TARGET).astype(p.dtype), params)


def end_of_training(tx, dtype=jnp.bfloat16):
    """The last parameters of 300 steps that bfloat16 would lose."""
    return trajectory(tx, {"w": jnp.full(64, 1.5, dtype)}, 300, downhill)["w"][-1]


LOOPS = {
    "rmsprop": lambda inner: optax.chain(inner, ROUND),
    "MultiSteps inside": lambda inner: optax.chain(optax.MultiSteps(inner, 2).gradient_transformation(), ROUND),
    "MultiSteps around": lambda inner: optax.MultiSteps(optax.chain(inner, ROUND), 2),
    "masked": lambda inner: optax.chain(inner, optax.masked(ROUND, {"w": True})),
    "partition": lambda inner: optax.partition({"a": optax.chain(inner, ROUND)}, {"w": "a"}),
    "apply_if_finite": lambda inner: optax.apply_if_finite(optax.chain(inner, ROUND), 3),
    "inject_hyperparams": lambda inner: optax.chain(
        optax.inject_hyperparams(rmsprop, hyperparam_dtype=jnp.float32)(learning_rate=1e-3, decay=0.99), ROUND
    ),
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_it_moves_where_rounding_to_nearest_stands_still(loop):
    inner = rmsprop(1e-3, decay=0.99)
    exact = end_of_training(inner, jnp.float32)
    stuck, ours = end_of_training(inner), end_of_training(loop(inner))

    def gap(w):
        return np.abs(w.astype(np.float32) - exact).mean()

    assert gap(ours) < gap(stuck) / 2


def test_rounds_in_nnx_and_equinox():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(1e-4), ROUND), wrt=nnx.Param)
    before = model.kernel[...]
    for _ in range(100):
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    assert model.kernel.dtype == jnp.bfloat16
    assert (model.kernel[...] != before).any()

    linear = jax.tree.map(lambda x: x.astype(jnp.bfloat16), eqx.nn.Linear(2, 3, key=jax.random.key(0)))
    tx = optax.chain(optax.sgd(1e-2), ROUND)
    params = eqx.filter(linear, eqx.is_inexact_array)
    updates, _ = tx.update(params, tx.init(params), params)
    assert eqx.apply_updates(linear, updates).weight.dtype == jnp.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("state_dtype", [None, jnp.uint8])
def test_three_bytes_train_the_digits_as_float32_does(state_dtype):
    """At a rate at which rounding to nearest loses most steps."""
    inner = rmsprop(5e-5, decay=0.99, state_dtype=state_dtype)
    full = train_digits(rmsprop(5e-5, decay=0.99), 500, 128).mean()
    nearest = train_digits(inner, 500, 128, jnp.bfloat16).mean()
    ours = train_digits(optax.chain(inner, ROUND), 500, 128, jnp.bfloat16).mean()
    # Nearest is far behind; ours is where float32 is, to within a tenth of that gap. (One byte of ν makes steps a few
    # percent longer, and here that is further.)
    assert nearest > full + 0.2
    assert ours < full + 0.1 * (nearest - full)
    assert state_dtype == jnp.uint8 or ours > full - 0.1 * (nearest - full)
