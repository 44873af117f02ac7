"""bfloat16 parameters, rounded: right in the mean, the same on every layout, with and without a remainder."""

import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import mesh_of, update
from hypothesis import example, given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from problems import train_digits, trajectory

from rmsprop_jax import (
    carry_over,
    params_in_bfloat16,
    params_in_float32,
    rmsprop,
    round_params_stochastically,
    RoundParamsState,
)


pytestmark = pytest.mark.usefixtures("users_climate")  # float32 updates of bfloat16 parameters

THREE, FOUR = (round_params_stochastically(keep_rest) for keep_rest in (False, True))
DTYPES = [jnp.bfloat16, jnp.float32]  # of updates


@jax.jit
def three(params, updates, step=0):
    """The parameters after one update."""
    return optax.apply_updates(params, THREE.update(updates, RoundParamsState(jnp.int32(step)), params)[0])


@jax.jit
def four(params, rest, updates, step=0):
    """The parameters and their remainders after one update."""
    changed, state = FOUR.update(updates, RoundParamsState(jnp.int32(step), rest), params)
    return optax.apply_updates(params, changed), state.rest


widened, narrowed = jax.jit(params_in_float32), jax.jit(params_in_bfloat16)


def weights(params, rest):
    return np.asarray(widened(params, RoundParamsState(np.int32(0), rest)), np.float64)


def gaussian(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def unit(x, bits=8):
    """The distance of numbers with this many significant bits just above |x|."""
    return 2.0 ** (np.floor(np.log2(abs(x))) - bits + 1)


def words(x):
    return np.asarray(x).view(np.uint16)


# --- The mean ---------------------------------------------------------------------------------------------


@jax.jit
def three_many_times(p, u):
    return jax.vmap(lambda step: three(p, u, step))(jnp.arange(2**16))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("place", "size"), [*enumerate([1e-3, 0.1, 0.5, 0.9, 1.0, 3.3, 10.0])])
@pytest.mark.parametrize("start", [1.0, 1.5, 1.9921875, -2.0, 3e-5])
def test_the_mean_of_one_update_is_exact(start, place, size, sign):
    """One parameter, one update, 2¹⁶ steps: the mean to within five standard errors."""
    dtype = DTYPES[(place + (sign < 0)) % 2]
    p, u = jnp.asarray(start, jnp.bfloat16), jnp.asarray(sign * size * unit(start), dtype)
    ends = np.asarray(three_many_times(p, u), np.float64)
    exact = float(p) + float(u)
    gap = unit(exact)
    share = exact / gap % 1
    assert set(ends) <= {np.floor(exact / gap) * gap, np.ceil(exact / gap) * gap}
    assert abs(ends.mean() - exact) <= 5 * gap * np.sqrt(share * (1 - share) / 2**16)


@jax.jit
def sum_of_moves(p, u):
    """Over 2¹⁴ draws."""

    def step(total, t):
        return total + (three(p, u, t).astype(jnp.float32) - p.astype(jnp.float32)), None

    return jax.lax.scan(step, jnp.zeros(p.shape), jnp.arange(2**14))[0]


@jax.jit
def sum_of_moves_with_remainder(p, rest, u):
    """Over 2¹² draws."""
    origin = p.astype(jnp.float32)

    def step(total, t):
        new, new_rest = four(p, rest, u, t)
        return total + (params_in_float32(new, RoundParamsState(t, new_rest)) - origin), None

    return jax.lax.scan(step, jnp.zeros(p.shape), jnp.arange(2**12))[0]


SMALL_STEPS = [
    (dtype, start, sign, size)
    for i, size in enumerate((1e-6, 1e-5, 1e-4, 1e-3, 1e-2))
    for j, start in enumerate((1.0, 1.5, -2.0, 3e-5))
    for dtype, sign in zip(DTYPES, (1, -1) if (i + j) % 2 else (-1, 1), strict=True)
]


@pytest.mark.parametrize(("dtype", "start", "sign", "size"), SMALL_STEPS)
def test_steps_far_below_the_parameter_add_up(dtype, start, sign, size):
    """Updates of 1e-6 to 1e-2 of p, 512 elements: how far do the parameters move?"""
    p = np.full(512, start, jnp.bfloat16)
    u = jnp.asarray(sign * size * abs(float(p[0])) * (1 + np.arange(512) / 1024), dtype)
    total, exact = (float(np.asarray(x, np.float64).sum()) for x in (sum_of_moves(p, u), u))
    exact *= 2**14
    # Below a power of two the unit, and with it the deviation, is half as large.
    inward = sign * start < 0 and np.log2(abs(start)) % 1 == 0
    gap = unit(float(p[0])) / (2 if inward else 1)
    # float32 rounds each sum p + u, by less than 1 % of u in the mean over the elements.
    assert abs(total - exact) <= 5 * np.sqrt(gap * abs(exact)) + 0.01 * abs(exact) * (size < 1e-4)


def test_a_weight_that_doubles_keeps_its_remainder():
    tx, params = round_params_stochastically(keep_rest=True), jnp.ones(4, jnp.bfloat16)
    updates, state = tx.update(jnp.full(4, 1 + 2.0**-12), tx.init(params), params)
    weights = params_in_float32(params + updates.astype(jnp.bfloat16), state)
    np.testing.assert_array_equal(weights, np.full(4, 2 + 2.0**-12))


@pytest.mark.parametrize(("dtype", "start", "sign", "size"), SMALL_STEPS)
def test_the_mean_with_a_remainder_is_right(dtype, start, sign, size):
    p, rest = np.full(512, start, jnp.bfloat16), np.int8(np.arange(512) % 256 - 128)
    u = jnp.asarray(sign * size * abs(start) * (1 + np.arange(512) / 1024), dtype)
    exact = weights(p, rest) + np.asarray(u, np.float64)
    found = np.asarray(sum_of_moves_with_remainder(p, rest, u), np.float64) / 2**12 + float(p[0])
    # A draw is off by half a unit at most in the root mean square, and float32 rounds each sum.
    assert abs((found - exact).mean()) <= 5 * 0.5 * unit(start * 1.9, 16) / np.sqrt(512 * 2**12) + 2.0**-25 * abs(start)


@pytest.mark.parametrize(("steps", "dtype"), [(10_000, jnp.bfloat16), (100_000, jnp.float32)])
def test_many_steps_far_below_one_unit_add_up(steps, dtype):
    """About 100 units, from 64 values between 1 and 1.5: the variance is that of a walk, and no more.

    The updates differ a little: elements that meet with equal updates would go on together.
    """
    start = (1 + np.arange(64) / 128).astype(jnp.bfloat16)
    moves = (100 * 2.0**-7 / steps * np.float32(start)).astype(dtype)
    end, _ = jax.jit(lambda p: jax.lax.scan(lambda p, t: (three(p, moves, t), None), p, jnp.arange(steps)))(start)
    way = (np.asarray(end, np.float64) - np.asarray(start, np.float64)) / (np.asarray(moves, np.float64) * steps)
    # Each walk waits for 100 units, or for fewer that are twice as large above 2: a relative deviation of about 0.1.
    assert abs(way.mean() - 1) < 5 * 0.1 / np.sqrt(64)
    assert 0.03 < way.std() < 0.2


@pytest.mark.parametrize("sign", [1, -1])
def test_many_steps_far_below_one_unit_of_24_bits_add_up(sign):
    """10⁵ steps of four thousandths of 24 bits' last place, where rounding to nearest stands still."""
    u = jnp.full(256, sign * 2.0**-15 / 1000 * 4)  # float32 still holds this beside 1
    start = jnp.ones(256, jnp.bfloat16), jnp.zeros(256, jnp.int8)
    end = jax.jit(lambda w: jax.lax.scan(lambda w, t: (four(*w, u, t), None), w, jnp.arange(100_000))[0])(start)
    # float32 holds 4 thousandths as one unit of its own, 2⁻²³ or, below 1, 2⁻²⁴.
    step_in_float32 = np.float64(np.float32(1.0) + np.float32(u[0])) - 1.0
    assert abs((weights(*end) - 1.0).mean() / (step_in_float32 * 100_000) - 1) < 0.1


def test_equal_elements_with_equal_updates_are_rounded_independently():
    """A layer's scales may start alike. Their mean must not wobble as one element does."""
    moves = jnp.asarray([2.0**-7 / 100] * 1000)

    @jax.jit
    def run(first):  # 1,000 steps, which make 10 units
        steps = first + jnp.arange(1000)
        return jax.lax.scan(lambda p, t: (three(p, moves, t), None), jnp.ones(1000, jnp.bfloat16), steps)[0]

    ends = (np.stack([run(first) for first in range(0, 16_000, 1000)]).astype(np.float64) - 1) / 2.0**-7
    # A sum of 1,000 draws with a chance of 1/100: a standard deviation of 3.1 for each element, 0.1 for their mean.
    assert 2.9 < ends.std() < 3.4
    assert abs(ends.mean() - 10) < 5 * 3.15 / np.sqrt(ends.size)
    assert abs(ends.mean(1) - 10).max() < 5 * 0.1


def test_opposite_parameters_are_rounded_independently():
    ends = [np.asarray(three_many_times(*(sign * jnp.asarray([1.0, 1e-3], jnp.bfloat16)))) for sign in (1, -1)]
    moved = [abs(x.astype(np.float64)) - 1 for x in ends]
    assert abs(np.corrcoef(*moved)[0, 1]) < 5 / 2**8


# --- One update -------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    p=st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30),
    u=st.floats(-(2.0**100), 2.0**100, width=32),
    step=st.integers(0, 2**31 - 2),
)
@example(p=0.0, u=1e-30, step=0)
@example(p=0.0, u=-1.0, step=0)
def test_the_result_is_a_neighbour_of_the_exact_sum(p, u, step):
    p, u = jnp.bfloat16(p), jnp.bfloat16(u)
    exact, end = float(p) + float(u), float(three(p, u, step))
    if exact == 0 or abs(exact) < 1e-30:
        return
    if p == 0:
        assert end == u
    if 0.5 * abs(float(p)) < abs(exact) < 2 * abs(float(p)) and exact * float(p) > 0:
        assert abs(end - exact) < max(unit(exact), unit(end))
    assert abs(end - exact) <= 2.5 * max(unit(exact), unit(float(u)) if u else 0)


numbers = st.floats(2.0**-100, 2.0**100, width=32).flatmap(lambda x: st.sampled_from([x, -x]))


@settings(max_examples=200)
@given(p=numbers, rest=st.integers(-128, 127), share=st.floats(-0.4, 0.9), step=st.integers(0, 2**31 - 2))
@example(p=1.0, rest=-128, share=-(2.0**-9), step=0)  # just above a power of two, and below it
@example(p=-2.0, rest=127, share=2.0**-9, step=5)
def test_a_weight_lands_on_a_neighbour_of_24_bits(p, rest, share, step):
    p, rest = np.asarray([p], jnp.bfloat16), np.int8([rest])
    for dtype in DTYPES:
        before = weights(p, rest)
        u = np.asarray(before * share, dtype)
        exact = before + np.asarray(u, np.float64)
        new, new_rest = four(p, rest, u, step)
        after = weights(new, new_rest)
        assert abs(after - exact) <= unit(max(abs(after), abs(exact)), 16) * (1 + 2.0**-7)
        assert np.sign(after) == np.sign(np.float64(new[0]))
        # The network runs on the nearest bfloat16.
        assert abs(after - np.float64(new[0])) <= unit(np.float64(new[0])) / 2


@pytest.mark.parametrize("keep_rest", [False, True])
def test_an_update_of_zero_changes_no_bit(keep_rest):
    every = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16)
    # (Subnormal ones are flushed to zero by the addition itself, on a CPU.)
    size = np.abs(np.asarray(every, np.float32))
    p = every[(size == 0) | (size >= 2.0**-100)]  # without NaN
    rest = np.int8(np.random.default_rng(0).integers(-128, 128, p.shape))
    rest[(p == 0) | ~np.isfinite(np.float32(p))] = 0
    for zero in (0.0, -0.0):
        for dtype in DTYPES:
            u = np.full(p.shape, zero, dtype)
            new, new_rest = four(p, rest, u) if keep_rest else (three(p, u), rest)
            np.testing.assert_array_equal(words(new), words(p))
            np.testing.assert_array_equal(new_rest, rest)


def test_nan_and_inf_pass_and_keep_no_remainder():
    nan = np.uint32([0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001]).view(np.float32)
    nan16 = np.uint16([0x7FC0, 0xFFC0, 0x7FFF, 0xFFFF, 0x7F81]).view(jnp.bfloat16)
    p = np.concatenate([np.asarray([1.0] * 8 + [np.inf, -np.inf], jnp.bfloat16), nan16])
    rest = np.int8([17] * 8 + [0] * 7)
    for dtype, nans in ((jnp.float32, nan), (jnp.bfloat16, nan16)):
        u = np.concatenate([nans, np.asarray([np.inf, -np.inf, 0.0] + [0.5] * 7, dtype)])
        expected = [np.nan] * 5 + [np.inf, -np.inf, 1.0, np.inf, -np.inf] + [np.nan] * 5
        for step in range(20):
            new, new_rest = four(p, rest, u, step)
            np.testing.assert_array_equal(np.asarray(new, np.float32), expected)
            np.testing.assert_array_equal(new_rest, [0] * 7 + [17] + [0] * 7)
            np.testing.assert_array_equal(np.asarray(three(p, u, step), np.float32), expected)


def test_there_is_no_remainder_where_the_update_does_not_land_on_the_nearest_bfloat16():
    """A bfloat16 u cannot hold the difference of 1 and 1001.37, and no sum below the largest bfloat16 lands on inf."""
    largest = float(jnp.finfo(jnp.bfloat16).max)
    p, rest = np.asarray([1.0078125, largest, 1.0], jnp.bfloat16), np.int8([77, 127, 77])
    u = np.asarray([1000.0, largest / 512, 2.0**-7], jnp.bfloat16)
    for step in range(20):
        new, new_rest = map(np.asarray, four(p, rest, u, step))
        assert new_rest[0] == 0
        assert new_rest[2] in (77, 78)
        assert (float(new[1]), int(new_rest[1])) == (np.inf, 0)
    _, kept = four(p, rest, u.astype(jnp.float32))
    assert kept[0] != 0


def test_a_step_across_zero_makes_no_nan():
    """p + (p' - p) may land on the zero of the other sign, or beside p': no remainder of p' may stay."""
    rng = np.random.default_rng(0)
    p = rng.normal(size=100_000).astype(jnp.bfloat16)
    rest = np.int8(rng.integers(-128, 128, p.shape))
    for u in (-p, np.float32(-1.001) * np.float32(p), -jnp.bfloat16(30) * p, rng.permutation(p)):
        new, new_rest = four(p, rest, u)
        after, nearest = weights(new, new_rest), np.asarray(new, np.float64)
        assert np.isfinite(after).all()
        assert (np.sign(after) == np.sign(nearest)).all()
        assert (abs(after - nearest) <= 2.0**-8 * abs(nearest)).all()
        assert not np.asarray(new_rest)[nearest == 0].any()
    # A parameter that somebody has set to zero has lost its remainder.
    np.testing.assert_array_equal(weights(np.zeros(256, jnp.bfloat16), np.arange(-128, 128, dtype=np.int8)), 0.0)


# --- Trees and errors -------------------------------------------------------------------------------------

PARAMS = {
    "w": jnp.full((16, 8), 1.5, jnp.bfloat16),
    "f": jnp.ones(2),
    "h": jnp.ones(2, jnp.float16),
    "n": jnp.arange(2),
    "x": None,
}
GRADS = {
    "w": jnp.full((16, 8), 1e-3, jnp.bfloat16),
    "f": jnp.full(2, 1e-9),
    "h": jnp.full(2, 1e-6, jnp.float16),
    "n": np.zeros(2, jax.dtypes.float0),
    "x": None,
}


@pytest.mark.parametrize("tx", [THREE, FOUR])
def test_other_leaves_pass_and_have_no_remainder(tx):
    state = tx.init(PARAMS)
    changed, after = tx.update(GRADS, state, PARAMS)
    for name in "fh":
        np.testing.assert_array_equal(changed[name], GRADS[name])
    assert changed["n"] is changed["x"] is jax.jit(tx.update)(GRADS, state, PARAMS)[0]["n"] is None
    assert changed["w"].dtype == jnp.bfloat16
    assert tx.update(GRADS | {"w": jnp.ones((16, 8))}, state, PARAMS)[0]["w"].dtype == jnp.float32
    assert after.step == 1
    if tx is FOUR:
        for rest in (state.rest, after.rest):
            assert jax.tree.map(lambda x: x.dtype.name, rest) == {"w": "int8"} | dict.fromkeys("fhnx")
    changed, unchanged = tx.update(GRADS | {"w": None}, after, PARAMS)
    assert changed["w"] is None
    chex.assert_trees_all_equal(unchanged.rest, after.rest)


@pytest.mark.parametrize("params", [jnp.ones(3), {}, {"a": jnp.ones(3)}, ()], ids=str)
def test_what_has_no_bfloat16_passes_with_keep_rest(params):
    updates, state = FOUR.update(params, FOUR.init(params), params)
    chex.assert_trees_all_equal(updates, params)
    assert jax.tree.leaves(state) == [1]
    flat = optax.flatten(FOUR)
    if jax.tree.leaves(params):
        chex.assert_trees_all_equal(flat.update(params, flat.init(params), params)[0], params)


def test_the_number_of_the_update_stops_at_the_largest():
    state = RoundParamsState(jnp.int32(2**31 - 2))
    seen = []
    for _ in range(3):
        _, state = THREE.update(GRADS, state, PARAMS)
        seen.append(int(state.step))
    assert seen == [2**31 - 1] * 3


def test_the_state_has_no_second_count():
    state = optax.chain(rmsprop(0.1), THREE).init(jnp.ones(2, jnp.bfloat16))
    assert optax.tree.get(state, "count") == optax.tree.get(state, "step") == 0


def test_errors_name_the_way_out():
    with pytest.raises(TypeError, match="keep_rest='yes' has type str: allowed are True and False"):
        round_params_stochastically("yes")  # pyright: ignore[reportArgumentType]
    for tx in (THREE, FOUR):
        for state in (rmsprop(0.1).init(PARAMS), None, (), optax.EmptyState()):
            with pytest.raises(TypeError, match="allowed is the RoundParamsState that init makes"):
                tx.update(GRADS, state, PARAMS)
        with pytest.raises(ValueError, match=r"needs params: call update\(updates, state, params\)"):
            tx.update(GRADS, tx.init(PARAMS))
        with pytest.raises(ValueError, match=r"update\['w'\] has shape \(2,\), but its parameter has \(16, 8\)"):
            tx.update(GRADS | {"w": jnp.ones(2)}, tx.init(PARAMS), PARAMS)
        with pytest.raises(ValueError, match=r"no \['w'\] in params for its update"):
            tx.update(GRADS, tx.init(PARAMS), {k: v for k, v in PARAMS.items() if k != "w"})
    with pytest.raises(ValueError, match=r"state.rest is None, and keep_rest=True: carry the state over with carry_ov"):
        FOUR.update(GRADS, THREE.init(PARAMS), PARAMS)
    state = FOUR.init(PARAMS)
    with pytest.raises(ValueError, match=r"state.rest is not None, and keep_rest=False: carry"):
        THREE.update(GRADS, state, PARAMS)
    with pytest.raises(ValueError, match=r"update\['w'\] has shape \(16, 8\), but its state.rest has \(8, 16\)"):
        FOUR.update(GRADS, state._replace(rest=state.rest | {"w": jnp.zeros((8, 16), jnp.int8)}), PARAMS)
    wide = PARAMS | {"w": jnp.ones((16, 8))}
    with pytest.raises(ValueError, match=r"state.rest\['w'\] has a remainder, but the parameter is not in bfloat16"):
        FOUR.update(GRADS, state, wide)
    with pytest.raises(ValueError, match=r"state.rest\['w'\] has no remainder, but the parameter is in bfloat16"):
        FOUR.update(GRADS, FOUR.init(wide), PARAMS)


def test_remainders_of_two_states_are_not_mixed():
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    both = {"actor": FOUR.init(params), "critic": FOUR.init(params)}
    for convert in (params_in_float32, params_in_bfloat16):
        with pytest.raises(
            ValueError, match=r"remainders for params\['w'\] in state\['actor'\], state\['critic'\]: pass one"
        ):
            convert(params, both)


# --- The same everywhere ----------------------------------------------------------------------------------


def test_the_rounding_depends_on_the_place_the_step_and_the_values_alone():
    p, u = np.asarray(gaussian(512)), np.asarray(gaussian(512, seed=1)) * jnp.bfloat16(1e-3)
    expected = words(three(p, u, 3))
    tree = three({"a": -p, "b": p, "c": p.reshape(16, 32)}, {"a": u, "b": u, "c": u.reshape(16, 32)}, 3)
    for name in "bc":
        np.testing.assert_array_equal(words(tree[name]).ravel(), expected)
    assert (words(three(p, u, 4)) != expected).any()
    assert (words(three(p[::-1], u[::-1], 3)) != expected[::-1]).any()


MADE = {
    "given": lambda p, g: g,
    "a product": lambda p, g: g * jnp.bfloat16(-3e-3),
    "two products": lambda p, g: g * jnp.bfloat16(-3e-3) - p * jnp.bfloat16(1e-3),
    "in float32": lambda p, g: (g.astype(jnp.float32) * p.astype(jnp.float32)).astype(jnp.bfloat16),
}


@pytest.mark.slow
@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("tx", [THREE, FOUR])
def test_every_layout_gives_the_same_bits(tx, made):
    """On one device, outside jit, on Auto and Explicit meshes; of updates that are given or made in the program.

    XLA keeps a product in bfloat16 unrounded for what follows it, on one device and on Auto meshes.
    """

    def step(p, state, g):
        updates, state = tx.update(MADE[made](p, g), state, p)
        return optax.apply_updates(p, updates), state

    compiled = jax.jit(step)
    p = gaussian((64, 32))
    for size in (1e-3, 1e-1, 1.0):  # steps as long as the weights land beside the nearest bfloat16
        g = jnp.asarray(size * np.float32(p) * np.float32(gaussian(p.shape, seed=1)), jnp.bfloat16)
        expected = compiled(p, tx.init(p), g)
        chex.assert_trees_all_equal(step(p, tx.init(p), g), expected)
        for axis_type in (AxisType.Auto, AxisType.Explicit):
            there, grads = (jax.device_put(x, NamedSharding(mesh_of(axis_type), P("x"))) for x in (p, g))
            for init in (tx.init, jax.jit(tx.init)):
                found = compiled(there, init(there), grads)
                chex.assert_trees_all_equal(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, expected))
                for x in jax.tree.leaves(found):
                    assert x.ndim == 0 or x.sharding.is_equivalent_to(there.sharding, 2)


# --- In other people's loops ------------------------------------------------------------------------------

TARGET = np.float32(1 + np.arange(64) / 64)


def downhill(params, _):
    """The gradient of a parabola."""
    return jax.tree.map(lambda p: (p.astype(jnp.float32) - TARGET).astype(p.dtype), params)


def end_of_training(tx, dtype=jnp.bfloat16):
    """The last parameters of 300 steps that bfloat16 would lose."""
    return trajectory(tx, {"w": jnp.full(64, 1.5, dtype)}, 300, downhill)["w"][-1]


def inner(rate):
    return rmsprop(rate, decay=0.99)


LOOPS = {
    "chain": lambda rate, last: optax.chain(inner(rate), last),
    "MultiSteps inside": lambda rate, last: optax.chain(
        optax.MultiSteps(inner(rate), 2).gradient_transformation(), last
    ),
    "MultiSteps around": lambda rate, last: optax.MultiSteps(
        optax.chain(inner(rate), last), 2
    ).gradient_transformation(),
    "masked": lambda rate, last: optax.chain(inner(rate), optax.masked(last, lambda tree: {k: k == "w" for k in tree})),
    "partition": lambda rate, last: optax.partition(
        dict.fromkeys("wb", optax.chain(inner(rate), last)), lambda tree: {k: k for k in tree}
    ),
    "apply_if_finite": lambda rate, last: optax.apply_if_finite(optax.chain(inner(rate), last), 3),
    "inject_hyperparams": lambda rate, last: optax.chain(
        optax.inject_hyperparams(rmsprop, hyperparam_dtype=jnp.float32)(rate, 0.99), last
    ),
}


@functools.cache
def without_rounding():
    """Where float32 parameters end, and how far from there bfloat16 parameters do."""
    exact = end_of_training(inner(1e-3), jnp.float32)
    return exact, abs(end_of_training(inner(1e-3)).astype(np.float32) - exact).mean()


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_it_moves_where_rounding_to_nearest_stands_still(loop):
    exact, stuck = without_rounding()
    assert abs(end_of_training(loop(1e-3, THREE)).astype(np.float32) - exact).mean() < stuck / 2


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS)
def test_weights_follow_float32_in_any_wrapper(loop):
    """400 steps of 1e-5, a tenth of bfloat16's distance between 1 and 2; and the weights go back into another state."""
    params = {"w": np.full(256, 1.5, jnp.bfloat16), "b": np.full(64, 1.5, jnp.bfloat16)}
    tx = LOOPS[loop](1e-5, FOUR)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, length=400)[0])
    ended, state = run(params)
    ours = widened(ended, state)
    steps = 200 if "MultiSteps" in loop else 400
    expected = 1.5 - 1e-5 * sum(1 / np.sqrt(1 - 0.99 ** (t + 1)) for t in range(steps))
    # A step is rounded by half a unit of 24 bits at most, in the root mean square.
    deviation = 0.5 * 2.0**-15 * np.sqrt(steps)
    np.testing.assert_allclose(np.asarray(ours["w"]).mean(), expected, atol=5 * deviation / np.sqrt(256))
    np.testing.assert_allclose(np.asarray(ours["w"]), expected, atol=6 * deviation)
    again, filled = narrowed(ours, tx.init(params))
    chex.assert_trees_all_equal(again["w"], ended["w"])
    chex.assert_trees_all_equal(widened(again, filled)["w"], ours["w"])


SLOW = inner(1e-5)


@pytest.mark.slow
def test_whole_models_of_flax_and_equinox():
    tx = optax.chain(SLOW, FOUR)
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.ones, param_dtype=jnp.bfloat16)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    nnx.jit(nnx.Optimizer.update)(optimizer, model, nnx.state(model, nnx.Param))
    params, state = nnx.state(model, nnx.Param), optimizer.opt_state
    wide = params_in_float32(params, state)
    assert wide["kernel"][...].dtype == jnp.float32
    assert (np.asarray(wide["kernel"][...]) != np.float32(params["kernel"][...])).any()
    chex.assert_trees_all_equal(params_in_bfloat16(wide, state), (params, state))
    # As Orbax restores them. (A plain parameter may be called "value", too.)
    plain = jax.tree.map(lambda x: {"value": x}, nnx.to_pure_dict(params))
    chex.assert_trees_all_equal(
        params_in_float32(plain, state), jax.tree.map(lambda x: {"value": x}, nnx.to_pure_dict(wide))
    )
    called = {"critic": {"value": jnp.ones(3, jnp.bfloat16)}, "value": jnp.ones((2, 3), jnp.bfloat16)}
    kept = FOUR.init(called)
    chex.assert_trees_all_equal(params_in_bfloat16(params_in_float32(called, kept), kept), (called, kept))

    mlp = eqx.nn.MLP(2, 3, 3, 0, key=jax.random.key(0), dtype=jnp.bfloat16)
    grads = eqx.filter(mlp, eqx.is_inexact_array)
    updates, state = eqx.filter_jit(tx.update)(grads, tx.init(grads), mlp)
    mlp = eqx.apply_updates(mlp, updates)
    wide = params_in_float32(mlp, state)
    assert wide.activation is mlp.activation
    assert (np.asarray(wide.layers[0].weight) != np.float32(mlp.layers[0].weight)).any()
    assert eqx.tree_equal(params_in_bfloat16(wide, state), (mlp, state))


def test_a_run_resumes_in_a_chain_that_keeps_a_remainder_and_back():
    params, grads = {"w": PARAMS["w"]}, {"w": GRADS["w"]}
    three, four = (optax.chain(SLOW, tx) for tx in (THREE, FOUR))
    _, state = update(three, grads, three.init(params), params)
    state = carry_over(state, four.init(params))
    assert not np.asarray(state[1].rest["w"]).any()
    assert state[1].step == state[0].count == 1
    updates, state = update(four, grads, state, params)
    params = optax.apply_updates(params, updates)
    wrapped = carry_over(state, optax.apply_if_finite(four, 3).init(params))
    chex.assert_trees_all_equal(widened(params, wrapped), widened(params, state))
    assert (np.asarray(widened(params, wrapped)["w"]) != np.float32(params["w"])).any()


def test_float32_gradients_keep_what_is_small_beside_a_step():
    """A decay of 1e-6 beside steps of 1e-4, in parameters of 0.02: as docstring and site say, a bfloat16 u loses it."""
    tx = optax.chain(rmsprop(1e-4, weight_decay=0.01), FOUR)
    signs = np.random.default_rng(0).choice(np.float32([-1, 1]), 4096)

    @jax.jit
    def decayed(dtype_of):
        def step(carry, t):
            params, state = carry
            grads = (signs * (1 - 2 * (t % 2))).astype(jnp.bfloat16).astype(dtype_of.dtype)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = jnp.full(4096, 0.02, jnp.bfloat16)
        end, _ = jax.lax.scan(step, (start, tx.init(start)), jnp.arange(1000))
        return 1 - params_in_float32(*end).mean() / start[0].astype(jnp.float32)

    assert abs(decayed(jnp.float32(0)) / 1e-3 - 1) < 0.1
    assert abs(decayed(jnp.bfloat16(0)) / 1e-3) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("state_dtype", [None, jnp.uint8])
def test_three_bytes_train_the_digits_as_float32_does(state_dtype):
    """At a rate at which rounding to nearest loses most steps."""
    inner = rmsprop(5e-5, decay=0.99, state_dtype=state_dtype)
    full = train_digits(rmsprop(5e-5, decay=0.99), 500).mean()
    nearest, ours = (train_digits(tx, 500, dtype=jnp.bfloat16).mean() for tx in (inner, optax.chain(inner, THREE)))
    # Nearest is far behind; ours is where float32 is, to within a tenth of that gap. (One byte of ν makes steps a few
    # percent longer, and here that is further.)
    assert nearest > full + 0.2
    assert ours < full + 0.1 * (nearest - full)
    assert state_dtype == jnp.uint8 or ours > full - 0.1 * (nearest - full)


# --- Parameters in float32 and back -----------------------------------------------------------------------

LARGEST = 3.3961256e38  # the largest bfloat16 and a remainder of 127
SPECIAL = {
    **{x: x for x in (0.0, np.inf, -np.inf, 3.39e38, 1.0, -1.9999999, 0.1, -1e-30)},
    **{3.4028235e38: LARGEST, -3.4e38: -LARGEST},
}


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_float32_weights_keep_24_bits_in_four_bytes(jit):
    rng = np.random.default_rng(0)
    spread = rng.normal(size=10_000) * 10.0 ** rng.integers(-30, 30, 10_000)
    wide = np.float32([*spread, *SPECIAL, -0.0, np.nan, 1e-45, -1e-45])
    w = {"w": jnp.asarray(wide), "float32": jnp.ones(3), "n": jnp.arange(3)}
    narrow = w | {"w": w["w"].astype(jnp.bfloat16)}
    params, state = jit(params_in_bfloat16)(w, FOUR.init(narrow))
    assert jax.tree.map(jnp.result_type, params) == jax.tree.map(jnp.result_type, narrow)
    assert jax.tree.structure(state) == jax.tree.structure(FOUR.init(narrow))
    back = np.asarray(jit(params_in_float32)(params, state)["w"])
    exact = (wide[:10_000].view(np.uint32) + 0x80) & 0xFFFFFF00
    np.testing.assert_array_equal(back[:10_000].view(np.uint32), exact)
    np.testing.assert_allclose(np.float32(params["w"])[:10_000], back[:10_000], rtol=2.0**-8)
    np.testing.assert_allclose(back[10_000:-4], np.float32([*SPECIAL.values()]), rtol=2.0**-16)
    np.testing.assert_array_equal(back[-4:], [-0.0, np.nan, 0.0, 0.0])
    assert np.signbit(back[-4])
    np.testing.assert_array_equal(state.rest["w"][-4:], 0)
    chex.assert_trees_all_equal(params_in_bfloat16(params, state), (params, state))
    # The next step moves the weights from there.
    updates, _ = FOUR.update(jax.tree.map(jnp.zeros_like, narrow), state, params)
    np.testing.assert_array_equal(np.asarray(optax.apply_updates(params, updates)["w"])[:-4], params["w"][:-4])


def test_float64_and_complex_parameters_stay_as_they_are(x64):
    params = {
        "d": jnp.ones(2, jnp.float64),
        "c": jnp.ones(2, jnp.complex64),
        "h": jnp.ones(2, jnp.float16),
        "s": "name",
    }
    for state in ((), FOUR.init({k: x for k, x in params.items() if k != "s"})):
        wide = params_in_float32(params, state)
        assert [wide[k].dtype.name for k in "dch"] == ["float64", "complex64", "float32"]
        assert wide["s"] == "name"
    w = {"b": jnp.asarray([0.1, 1e300, -np.inf])}
    back = params_in_float32(*params_in_bfloat16(w, FOUR.init({"b": jnp.ones(3, jnp.bfloat16)})))
    np.testing.assert_allclose(back["b"], [0.1, 1.7014118e38, -1.7014118e38], rtol=2.0**-15)


def test_weights_on_a_mesh_keep_their_shardings():
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        w = jax.device_put(jnp.ones((64, 8)), NamedSharding(mesh_of(axis_type), P("x")))
        for f in (params_in_bfloat16, jax.jit(params_in_bfloat16)):
            params, state = f(w, FOUR.init(w.astype(jnp.bfloat16)))
            for x in (params, state.rest, params_in_float32(params, state)):
                assert x.sharding.is_equivalent_to(w.sharding, 2)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.checkpoint], ids=["eager", "jit", "checkpoint"])
def test_the_derivative_of_params_in_float32_is_that_of_a_cast(transform):
    state = RoundParamsState(jnp.int32(0), jnp.asarray([5, -100, 0], jnp.int8))
    p = jnp.asarray([1.0, -2.0, 0.0], jnp.bfloat16)
    loss = transform(lambda p: (params_in_float32(p, state) ** 2).sum())
    wide = params_in_float32(p, state)
    np.testing.assert_array_equal(jax.grad(loss)(p), (2 * wide).astype(jnp.bfloat16))
    np.testing.assert_array_equal(jax.jvp(loss, (p,), (p,))[1], (2 * np.asarray(wide) * np.float32(p)).sum())
    np.testing.assert_array_equal(jax.jit(jax.hessian(loss))(p), 2 * np.eye(3))
    rows = jax.jit(jax.vmap(jax.grad(lambda p, rest: params_in_float32(p, state._replace(rest=rest)).sum())))
    np.testing.assert_array_equal(rows(p[:, None], state.rest[:, None]), np.ones((3, 1)))
    np.testing.assert_array_equal(params_in_float32(wide, state), wide)  # float32 leaves have their remainder


def test_derivatives_of_rounded_updates_are_zero():
    p, rest = jnp.asarray([1.0, 0.0, -3.0]).astype(jnp.bfloat16), jnp.asarray([1, 0, 100], jnp.int8)
    u = jnp.asarray([1e-3, 0.0, 1.0])
    for f in (lambda p, u: three(p, u).sum(), lambda p, u: four(p, rest, u)[0].sum()):
        chex.assert_trees_all_equal(jax.grad(f, argnums=(0, 1))(p, u), (np.ones_like(p), np.zeros_like(u)))


def test_what_is_no_state_with_remainders_is_refused():
    p, w = {"w": jnp.ones(3, jnp.bfloat16)}, {"w": jnp.ones(3)}
    state = FOUR.init(p)
    for f in (params_in_float32, params_in_bfloat16):
        for swapped in (state, optax.chain(SLOW, FOUR).init(p), rmsprop(0.1).init(p)):
            with pytest.raises(TypeError, match=r"params has a R.*State in it: pass the parameters first"):
                f(swapped, p)
        with pytest.raises(TypeError, match=r"state\[0\] was restored as a dict: put RoundParamsState\(\*\*state\[0"):
            f(p, [state._asdict()])
        for params in ({}, {"w": jnp.ones(4)}, {"v": w["w"]}):
            with pytest.raises(ValueError, match=r"state has a remainder for params\['w'\], but params has no array"):
                f(params, state)
    for nothing in (FOUR.init(w), THREE.init(p), optax.sgd(0.1).init(p)):
        with pytest.raises(ValueError, match="state keeps no remainder"):
            params_in_bfloat16(w, nothing)
    with pytest.raises(TypeError, match=r"params\['w'\] has dtype int32, but state has a remainder for it: allowed"):
        params_in_bfloat16({"w": jnp.arange(3)}, state)
