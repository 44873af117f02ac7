"""Four bytes: a bfloat16 parameter and its rest are a float of 24 bits that moves as float32 does."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import example, given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from rmsprop_jax import (
    carry_over,
    params_in_bfloat16,
    params_in_float32,
    rmsprop,
    round_params_stochastically,
    RoundParamsState,
)


pytestmark = pytest.mark.usefixtures("users_climate")  # float32 updates of bfloat16 parameters

FOUR_BYTES = round_params_stochastically(keep_rest=True)


@jax.jit
def moved(params, rest, updates, step=0):
    """The parameters and the rest after one update."""
    changed, state = FOUR_BYTES.update(updates, RoundParamsState(jnp.int32(step), rest), params)
    return optax.apply_updates(params, changed), state.rest


def weights(params, rest):
    return np.asarray(params_in_float32(params, RoundParamsState(jnp.int32(0), rest)), np.float64)


def unit(x):
    """The distance of numbers of 24 bits just above |x|."""
    return 2.0 ** (np.floor(np.log2(abs(x))) - 15)


def bits(x):
    return np.asarray(x).view(np.uint16)


# --- One update -------------------------------------------------------------------------------------------

numbers = st.floats(2.0**-100, 2.0**100, width=32).flatmap(lambda x: st.sampled_from([x, -x]))


@settings(max_examples=300)
@given(p=numbers, rest=st.integers(-128, 127), share=st.floats(-0.4, 0.9), step=st.integers(0, 2**31 - 2))
@example(p=1.0, rest=-128, share=-(2.0**-9), step=0)  # just above a power of two, and below it
@example(p=-2.0, rest=127, share=2.0**-9, step=5)
def test_a_weight_lands_on_a_neighbour_of_24_bits(p, rest, share, step):
    p, rest = jnp.asarray([p], jnp.bfloat16), jnp.asarray([rest], jnp.int8)
    for dtype in (jnp.bfloat16, jnp.float32):
        before = weights(p, rest)
        u = jnp.asarray(before * share, dtype)
        exact = before + np.asarray(u, np.float64)
        new, new_rest = moved(p, rest, u, step)
        after = weights(new, new_rest)
        assert abs(after - exact) <= unit(max(abs(after), abs(exact))) * (1 + 2.0**-7)
        assert np.sign(after) == np.sign(np.float64(new[0]))
        # The network runs on the nearest bfloat16.
        assert abs(after - np.float64(new[0])) <= 2.0**7 * unit(np.float64(new[0]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("start", [1.0, 1.5, -2.0, 3e-5])
def test_the_mean_is_right(start, size, sign, dtype):
    """512 elements, 2¹² draws, updates of 1e-6 to 1e-2 of the weight."""
    p, rest = jnp.full(512, start, jnp.bfloat16), jnp.asarray(np.arange(512) % 256 - 128, jnp.int8)
    u = jnp.asarray(sign * size * abs(start) * (1 + np.arange(512) / 1024), dtype)
    exact = weights(p, rest) + np.asarray(u, np.float64)
    origin = p[0].astype(jnp.float32)

    @jax.jit
    def total():
        def step(total, t):
            new, new_rest = moved(p, rest, u, t)
            return total + (params_in_float32(new, RoundParamsState(t, new_rest)) - origin), None

        return jax.lax.scan(step, jnp.zeros(512), jnp.arange(2**12))[0]

    found = np.asarray(total(), np.float64) / 2**12 + float(origin)
    # A draw is off by half a unit at most in the root mean square, and float32 rounds each sum.
    assert abs((found - exact).mean()) <= 5 * 0.5 * unit(start * 1.9) / np.sqrt(512 * 2**12) + 2.0**-25 * abs(start)


@pytest.mark.parametrize("sign", [1, -1])
def test_steps_far_below_one_unit_add_up(sign):
    """10⁵ steps of a thousandth of 24 bits' last place: 100 units, where rounding to nearest stands still."""
    start = jnp.full(256, 1.0, jnp.bfloat16)
    u = jnp.full(256, sign * 2.0**-15 / 1000 * 4)  # float32 still holds this beside 1

    def step(carry, t):
        return moved(*carry, u, t), None

    run = jax.jit(lambda p: jax.lax.scan(step, (p, jnp.zeros(256, jnp.int8)), jnp.arange(100_000))[0])
    way = weights(*run(start)) - 1.0
    # float32 holds 4 thousandths as one unit of its own, 2⁻²³ or, below 1, 2⁻²⁴.
    step_in_float32 = np.float64(np.float32(1.0) + np.float32(u[0])) - 1.0
    assert abs(way.mean() / (step_in_float32 * 100_000) - 1) < 0.1


def test_an_update_of_zero_changes_no_bit():
    every = jnp.asarray(np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16))
    size = np.abs(np.asarray(every, np.float32))
    p = jnp.repeat(every[np.isfinite(size) & (size >= 2.0**-100)], 8)
    rest = jnp.asarray(np.random.default_rng(0).integers(-128, 128, p.shape), jnp.int8)
    for zero in (0.0, -0.0):
        for dtype in (jnp.bfloat16, jnp.float32):
            new, new_rest = moved(p, rest, jnp.full(p.shape, zero, dtype))
            np.testing.assert_array_equal(bits(new), bits(p))
            np.testing.assert_array_equal(new_rest, rest)


def test_nan_and_inf_pass_and_keep_no_rest():
    p, rest = jnp.ones(6, jnp.bfloat16), jnp.full(6, 17, jnp.int8)
    p = p.at[3:].set(jnp.array([jnp.inf, -jnp.inf, jnp.nan], jnp.bfloat16))
    new, new_rest = moved(p, rest.at[3:].set(0), jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0, 0, 0], jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(new, np.float32), [np.nan, np.inf, -np.inf, np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(new_rest, np.zeros(6))


def test_a_step_across_zero_makes_no_nan():
    """p + (p' - p) may land on the zero of the other sign, or beside p': no rest of p' may stay."""
    rng = np.random.default_rng(0)
    p = jnp.asarray(rng.normal(size=100_000), jnp.bfloat16)
    rest = jnp.asarray(rng.integers(-128, 128, p.shape), jnp.int8)
    for u in (-p, -1.001 * p.astype(jnp.float32), -30 * p, jnp.asarray(rng.normal(size=p.shape), jnp.bfloat16)):
        new, new_rest = moved(p, rest, u)
        after = weights(new, new_rest)
        assert np.isfinite(after).all()
        assert (np.sign(after) == np.sign(np.asarray(new, np.float64))).all()
        assert (abs(after - np.asarray(new, np.float64)) <= 2.0**-8 * abs(np.asarray(new, np.float64))).all()
    # A parameter that somebody has set to zero has lost its rest.
    np.testing.assert_array_equal(weights(jnp.zeros(256, jnp.bfloat16), jnp.arange(-128, 128).astype(jnp.int8)), 0.0)


# --- Trees, errors, wrappers ------------------------------------------------------------------------------

PARAMS = {
    "w": jnp.full((16, 8), 1.5, jnp.bfloat16),
    "f": jnp.ones(2),
    "h": jnp.ones(2, jnp.float16),
    "n": jnp.arange(2),
    "x": None,
}
GRADS = {"w": jnp.ones((16, 8), jnp.bfloat16), "f": jnp.ones(2), "h": jnp.ones(2, jnp.float16), "n": None, "x": None}


def test_other_leaves_pass_and_have_no_rest():
    state = FOUR_BYTES.init(PARAMS)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state.rest) == {"w": ((16, 8), jnp.int8)} | dict.fromkeys("fhnx")
    changed, state = FOUR_BYTES.update(GRADS, state, PARAMS)
    for name in "fhnx":
        assert changed[name] is GRADS[name] or (changed[name] == GRADS[name]).all()
        assert state.rest[name] is None
    wide = params_in_float32(PARAMS, state)
    assert {k: None if x is None else x.dtype.name for k, x in wide.items()} == {
        "w": "float32", "f": "float32", "h": "float32", "n": "int32", "x": None,
    }  # fmt: skip
    changed, after = FOUR_BYTES.update(GRADS | {"w": None}, state, PARAMS)
    assert changed["w"] is None
    np.testing.assert_array_equal(after.rest["w"], state.rest["w"])


def test_errors_name_the_way_out():
    three = round_params_stochastically()
    with pytest.raises(TypeError, match="keep_rest='yes' has type str: allowed are True and False"):
        round_params_stochastically("yes")
    for tx in (three, FOUR_BYTES):
        for state in (rmsprop(0.1).init(PARAMS), None, (), optax.EmptyState()):
            with pytest.raises(TypeError, match="allowed is the RoundParamsState that init makes"):
                tx.update(GRADS, state, PARAMS)
    with pytest.raises(
        ValueError, match=r"state.rest is None, and keep_rest=True: carry the state over with carry_over"
    ):
        FOUR_BYTES.update(GRADS, three.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=r"state.rest is not None, and keep_rest=False: carry"):
        three.update(GRADS, FOUR_BYTES.init(PARAMS), PARAMS)
    state = FOUR_BYTES.init(PARAMS)
    wrong = state._replace(rest=state.rest | {"w": jnp.zeros((8, 16), jnp.int8)})
    with pytest.raises(ValueError, match=r"update\['w'\] has shape \(16, 8\), its state.rest \(8, 16\)"):
        FOUR_BYTES.update(GRADS, wrong, PARAMS)
    with pytest.raises(ValueError, match=r"no \['w'\] in params for its update"):
        FOUR_BYTES.update(GRADS, state, {k: v for k, v in PARAMS.items() if k != "w"})
    for params in ({}, PARAMS | {"w": jnp.ones(3)}):
        with pytest.raises(
            ValueError, match=r"state has a remainder for params\['w'\], and there is no array of its shape"
        ):
            params_in_float32(params, state)


INNER = rmsprop(1e-5, decay=0.99, eps_in_sqrt=False)
WRAPPED = {
    "chain": lambda tx: tx,
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": False}),
    "partition": lambda tx: optax.partition({"a": tx, "b": tx}, {"w": "a", "b": "b"}),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "inject_hyperparams": lambda tx: optax.chain(
        optax.inject_hyperparams(rmsprop, hyperparam_dtype=jnp.float32)(1e-5, 0.99), FOUR_BYTES
    ),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_weights_follow_float32_in_any_wrapper(wrap):
    """400 steps of 1e-5: a tenth of bfloat16's distance between 1 and 2."""
    params = {"w": jnp.full(256, 1.5, jnp.bfloat16), "b": jnp.full(64, 1.5, jnp.bfloat16)}
    tx = wrap(optax.chain(INNER, FOUR_BYTES))

    def run(tx, params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, length=400)[0])(params)

    ours = params_in_float32(*run(tx, params))
    steps = 200 if wrap is WRAPPED["MultiSteps"] else 400
    expected = 1.5 - 1e-5 * sum(1 / np.sqrt(1 - 0.99 ** (t + 1)) for t in range(steps))
    # A step is rounded by half a unit of 24 bits at most, in the root mean square.
    deviation = 0.5 * 2.0**-15 * np.sqrt(steps)
    np.testing.assert_allclose(np.asarray(ours["w"]).mean(), expected, atol=5 * deviation / np.sqrt(256))
    np.testing.assert_allclose(np.asarray(ours["w"]), expected, atol=6 * deviation)


@pytest.mark.parametrize("size", [1e-3, 1.0])  # steps as long as the weights land beside the nearest bfloat16
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_gives_the_same_bits_and_shards_the_rest(axis_type, size):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,), devices=jax.devices()[:8])
    p = jax.random.normal(jax.random.key(0), (64, 8)).astype(jnp.bfloat16)
    u = (size * p * jax.random.normal(jax.random.key(1), p.shape)).astype(jnp.bfloat16)

    @jax.jit
    def step(p, u, s):
        updates, s = FOUR_BYTES.update(u, s, p)
        return optax.apply_updates(p, updates), s

    expected = step(p, u, FOUR_BYTES.init(p))
    there, updates = (jax.device_put(x, NamedSharding(mesh, P("x"))) for x in (p, u))
    for init in (FOUR_BYTES.init, jax.jit(FOUR_BYTES.init)):
        state = init(there)
        assert state.rest.sharding.is_equivalent_to(there.sharding, 2)
        changed, after = step(there, updates, state)
        assert after.rest.sharding.is_equivalent_to(there.sharding, 2)
        for a, b in zip(jax.tree.leaves((changed, after)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_run_goes_on_in_a_chain_that_keeps_a_rest_and_back():
    params = {"w": PARAMS["w"]}
    three, four = (optax.chain(INNER, round_params_stochastically(keep)) for keep in (False, True))
    grads = {"w": GRADS["w"]}
    _, state = three.update(grads, three.init(params), params)
    state = carry_over(state, four.init(params))
    assert (state[1].rest["w"] == 0).all()
    assert state[1].step == state[0].count == 1
    updates, state = four.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    wrapped = carry_over(state, optax.apply_if_finite(four, 3).init(params))
    np.testing.assert_array_equal(params_in_float32(params, wrapped)["w"], params_in_float32(params, state)["w"])
    assert (params_in_float32(params, wrapped)["w"] != params["w"].astype(jnp.float32)).any()


def test_whole_models_of_flax_and_equinox():
    tx = optax.chain(INNER, FOUR_BYTES)
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    params = nnx.state(model, nnx.Param)
    kernel = params_in_float32(params, optimizer.opt_state)["kernel"][...]
    assert kernel.dtype == jnp.float32
    assert (kernel != params["kernel"][...].astype(jnp.float32)).any()

    mlp = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0), dtype=jnp.bfloat16)
    grads = eqx.filter(mlp, eqx.is_inexact_array)
    updates, state = tx.update(grads, tx.init(grads), mlp)
    mlp = eqx.apply_updates(mlp, updates)
    wide = params_in_float32(mlp, state)
    assert wide.activation is mlp.activation
    assert wide.layers[0].weight.dtype == jnp.float32
    assert (wide.layers[0].weight != mlp.layers[0].weight.astype(jnp.float32)).any()


# --- Parameters in float32 and back -----------------------------------------------------------------------

SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 3.4028235e38, -3.4028235e38, 3.39e38, 1.0, -1.9999999, 0.1]


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit])
def test_float32_weights_keep_24_bits_in_four_bytes(jit):
    rng = np.random.default_rng(0)
    normal = rng.normal(size=10_000) * 10.0 ** rng.integers(-30, 30, 10_000)
    w = {"w": jnp.asarray(normal, jnp.float32), "special": jnp.asarray(SPECIAL, jnp.float32), "n": jnp.arange(3)}
    state = optax.apply_if_finite(FOUR_BYTES, 2).init(w | {k: w[k].astype(jnp.bfloat16) for k in ("w", "special")})
    params, state = jit(params_in_bfloat16)(w, state)
    assert params["w"].dtype == params["special"].dtype == jnp.bfloat16
    assert params["n"].dtype == jnp.int32
    back = params_in_float32(params, state)
    bits = np.asarray(w["w"]).view(np.uint32)
    np.testing.assert_array_equal(back["w"], ((bits + 0x80) & 0xFFFFFF00).view(np.float32))
    np.testing.assert_allclose(params["w"].astype(jnp.float32), back["w"], rtol=2.0**-8)
    np.testing.assert_allclose(back["special"], [
        *SPECIAL[:5], 3.3961256e38, -3.3961256e38, *SPECIAL[7:]
    ], rtol=2.0**-16)  # fmt: skip
    assert np.signbit(back["special"][1])
    again, _ = params_in_bfloat16(params, state)
    np.testing.assert_array_equal(again["w"], params["w"])


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.checkpoint])
def test_the_derivative_of_params_in_float32_is_that_of_a_cast(transform):
    state = RoundParamsState(jnp.int32(0), jnp.asarray([5, -100, 0], jnp.int8))
    p = jnp.asarray([1.0, -2.0, 0.0], jnp.bfloat16)
    loss = transform(lambda p: (params_in_float32(p, state) ** 2).sum())
    wide = params_in_float32(p, state)
    np.testing.assert_array_equal(jax.grad(loss)(p), (2 * wide).astype(jnp.bfloat16))
    np.testing.assert_array_equal(jax.jvp(loss, (p,), (p,))[1], (2 * wide * p.astype(jnp.float32)).sum())
    np.testing.assert_array_equal(params_in_float32(wide, state), wide)  # float32 leaves have their remainder


def test_what_is_no_state_with_remainders_is_refused():
    p, w = {"w": jnp.ones(3, jnp.bfloat16)}, {"w": jnp.ones(3)}
    state = FOUR_BYTES.init(p)
    for f in (params_in_float32, params_in_bfloat16):
        with pytest.raises(TypeError, match="params has a RoundParamsState in it: the parameters come first"):
            f(state, p)
        with pytest.raises(
            TypeError, match=r"state\[0\] was restored as a dict: put RoundParamsState\(\*\*state\[0\]\) there"
        ):
            f(p, [state._asdict()])
    for nothing in (FOUR_BYTES.init(w), round_params_stochastically().init(p), optax.sgd(0.1).init(p)):
        with pytest.raises(ValueError, match="state keeps no remainder"):
            params_in_bfloat16(w, nothing)
    with pytest.raises(ValueError, match=r"state.rest\['w'\] has a remainder, and the parameter is not in bfloat16"):
        FOUR_BYTES.update(w, state, w)
    with pytest.raises(ValueError, match=r"state.rest\['w'\] has no remainder, and the parameter is in bfloat16"):
        FOUR_BYTES.update(p, FOUR_BYTES.init(w), p)


@pytest.mark.parametrize("params", [jnp.ones(3), {}, {"a": jnp.ones(3)}, ()], ids=str)
def test_what_has_no_bfloat16_passes_with_keep_rest(params):
    updates, state = FOUR_BYTES.update(params, FOUR_BYTES.init(params), params)
    assert updates == params if not jax.tree.leaves(params) else (jax.tree.leaves(updates)[0] == 1).all()
    assert jax.tree.leaves(state) == [1]
