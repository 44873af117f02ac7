"""States of one and two bytes: averages rounded stochastically, and training with them."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import dtypes, EVERYTHING, follow, NARROW_DTYPES, SGD, update
from problems import train_digits

from rmsprop_jax import _bits, _storage, carry_over, interop, rmsprop, scale_by_rms


def values(kept):
    return np.asarray(_storage.decode(kept), np.float64)


@pytest.mark.parametrize("state_dtype", NARROW_DTYPES)
def test_float64_saturates(x64, state_dtype):
    tx = rmsprop(0.1, 0.5, momentum=0.5, state_dtype=state_dtype)
    updates, state = update(tx, np.array([1e300, -1e-300]), tx.init(jnp.zeros(2, jnp.float64)))
    assert updates.dtype == jnp.float64
    assert np.isfinite(values(state.nu)).all()
    assert np.isfinite(updates).all()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"centered": True, "momentum": 0.9, "bias_correction": True}])
@pytest.mark.parametrize("state_dtype", [None, *NARROW_DTYPES])
def test_every_dtype_where_float64_is_on(x64, state_dtype, options):
    kinds = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64, jnp.complex64, jnp.complex128)
    tx, params = rmsprop(0.1, state_dtype=state_dtype, **options), [np.full(3, 2, kind) for kind in kinds]
    start = jax.jit(tx.init)(params)
    updates, state = update(tx, params, start)
    assert dtypes(updates) == dtypes(params)
    assert all((np.asarray(u).real < 0).all() for u in updates)
    assert dtypes(state) == dtypes(start)


@pytest.mark.parametrize("state_dtype", NARROW_DTYPES)
def test_initial_scale_is_kept_to_nearest(state_dtype):
    codes = ((0.0, 0), (-0.0, 0), (1.0, 180), (1.5, 181), (1.2, 180), (1.3, 181), (1e-40, 0), (1e30, 255))

    def averages(param):
        return [rmsprop(0.1, initial_scale=scale, state_dtype=state_dtype).init(param).nu for scale, _ in codes]

    for init in (averages, jax.jit(averages)):
        for nu, (scale, code) in zip(init(jnp.ones((2, 3), jnp.bfloat16)), codes, strict=True):
            assert nu.dtype == state_dtype
            assert nu.shape == (2, 3)
            assert (np.asarray(nu) == (code if state_dtype == jnp.uint8 else np.asarray(scale, jnp.bfloat16))).all()


# --- The rounding of an average -----------------------------------------------------------------------

# Noise that an average collects has a variance of E|g²/ν - 1|/2 steps of the code, relative, whatever the decay: the
# standard deviation is at most about the root of a step. It forgets in 1/(1-ρ) updates.
SPREAD = {jnp.uint8: 0.5**0.5, jnp.bfloat16: 2**-3.5}
COLUMNS = 256


def kept_and_exact(decay, gradients, state_dtype):
    """ν over time from 1, in the state and in float64."""
    exact, nu = [], np.ones(gradients.shape[1:])
    for g in np.asarray(gradients, np.float64):
        nu = decay * nu + (1 - decay) * g**2
        exact.append(nu)
    return np.asarray(kept_averages(decay, state_dtype, gradients), np.float64), np.stack(exact)


@functools.partial(jax.jit, static_argnums=(0, 1))
def kept_averages(decay, state_dtype, gradients):
    # Each column starts from another count, so that it has its own noise.
    counts = jnp.arange(gradients.shape[1], dtype=jnp.int32) * 1_000_003
    tx = scale_by_rms(decay, initial_scale=1.0, state_dtype=state_dtype)

    def step(state, g):
        state = jax.vmap(tx.update)(g, state)[1]
        return state, _storage.decode(state.nu)

    return jax.lax.scan(step, jax.vmap(tx.init)(gradients[0])._replace(count=counts), gradients)[1]


def gaussian(shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def sparse(shape, share):
    return gaussian(shape) * (np.random.default_rng(1).random(shape, np.float32) < share)


def every(n, shape):
    return np.broadcast_to(np.float32(np.arange(shape[0])[:, None] % n == 0), shape)


GRADIENTS = {
    "normal": gaussian,
    "bfloat16": lambda shape: gaussian(shape).astype(jnp.bfloat16).astype(np.float32),
    "float16": lambda shape: gaussian(shape).astype(np.float16).astype(np.float32),
    "constant": lambda shape: np.broadcast_to(np.linspace(0.5, 2.0, shape[1], dtype=np.float32), shape),
    "signs": lambda shape: np.float32(1.3) * np.sign(gaussian(shape)),
    "alternating": lambda shape: np.float32(0.3) + np.float32(0.9) * every(2, shape),
    "sparse": lambda shape: sparse(shape, 0.1),
    "one in seven": lambda shape: every(7, shape),
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "decay"), list(zip(GRADIENTS, itertools.cycle([0.9, 0.99, 0.999]), strict=False)))
@pytest.mark.parametrize("state_dtype", NARROW_DTYPES)
def test_an_average_is_right_in_the_mean(state_dtype, kind, decay):
    memory = round(1 / (1 - decay))
    kept, exact = kept_and_exact(decay, GRADIENTS[kind]((12 * memory, COLUMNS)), state_dtype)
    kept, exact = kept[2 * memory :], exact[2 * memory :]
    tolerance = 5 * SPREAD[state_dtype] / np.sqrt(COLUMNS * 10 / 2)
    assert abs(kept.mean() / exact.mean() - 1) < tolerance < 0.1
    assert (kept / exact).std() > SPREAD[state_dtype] ** 2 / 10  # that it is rounded at all


@pytest.mark.slow
@pytest.mark.parametrize("state_dtype", NARROW_DTYPES)
def test_a_slow_average_follows(state_dtype):
    # Down to 1e-4 and up again by 1e-3 of itself at a time: rounded to nearest it would never move.
    sizes = np.repeat(np.float32([1e-2, 1.0]), [15_000, 10_000])[:, None]
    kept, exact = kept_and_exact(0.999, sizes * (1 + np.float32(0.1) * gaussian((25_000, COLUMNS))), state_dtype)
    for t in (14_999, 24_999):
        assert abs(kept[t].mean() / exact[t].mean() - 1) < 5 * SPREAD[state_dtype] / np.sqrt(COLUMNS)


@pytest.mark.slow
def test_a_hundred_thousand_updates():
    kept, exact = kept_and_exact(0.9999, gaussian((100_000, 32)), jnp.uint8)
    kept, exact = kept[20_000:], exact[20_000:]
    assert abs(kept.mean() / exact.mean() - 1) < 5 * SPREAD[jnp.uint8] / np.sqrt(32 * 8 / 2)
    # It neither runs away nor gets stuck: within three octaves of 1, and every column on the way again and again.
    assert 0.1 < kept.min() < kept.max() < 8
    assert (np.diff(kept, axis=0) != 0).sum(0).min() > 10


@pytest.mark.parametrize("decay", [0.9, 0.999])
@pytest.mark.parametrize("state_dtype", NARROW_DTYPES)
def test_a_rare_gradient_is_forgotten_at_the_right_rate(state_dtype, decay):
    memory = round(1 / (1 - decay))
    kept, exact = kept_and_exact(decay, np.zeros((3 * memory, 4096), np.float32), state_dtype)
    for t in (memory // 2, memory - 1, 3 * memory - 1):
        # The variance doubles in about two memories, as nothing pulls it back.
        assert abs(kept[t].mean() / exact[t].mean() - 1) < 5 * 2 * SPREAD[state_dtype] / np.sqrt(4096)


def test_an_average_recovers_from_zero_gradients():
    gradients = np.repeat(np.float32([0, 1]), [700, 100])[:, None] * np.ones(COLUMNS, np.float32)
    kept, _ = kept_and_exact(0.9, gradients, jnp.uint8)
    assert kept[699].max() == 2.0**-90  # the smallest that a code stands for
    assert abs(kept[750:].mean() - 1) < 5 * SPREAD[jnp.uint8] / np.sqrt(COLUMNS * 2)


@pytest.mark.parametrize(
    ("decay", "kind", "low", "high"),
    [(0.9, "constant", 1.0, 1.02), (0.9, "normal", 1.01, 1.06), (0.99, "normal", 1.04, 1.09)],
)
def test_the_mean_step_is_longer_by_a_few_percent(decay, kind, low, high):
    # As the docstring says: by 1 to 7 percent.
    gradients = GRADIENTS[kind]((2000, COLUMNS))
    kept, exact = kept_and_exact(decay, gradients, jnp.uint8)
    size = np.abs(gradients)[500:]
    assert low < (size / np.sqrt(kept[500:])).mean() / (size / np.sqrt(exact[500:])).mean() < high


@pytest.mark.parametrize("others", [{}, {"centered": True}])
def test_a_slot_is_rounded_by_its_own_seeds_whatever_else_is_on(others):
    # With an average that stays one, u is g. With a rate of 1 the buffer is also g, before it is rounded.
    g = gaussian(512)

    @functools.partial(jax.jit, static_argnums=0)
    def expected(slot, exact):
        return _bits.to_bfloat16(exact, _bits.noise(_bits.seeds(jnp.int32(1), slot), jnp.asarray(g)))

    tx = rmsprop(1.0, **SGD, momentum=0.5, state_dtype=jnp.bfloat16, **others)
    _, state = update(tx, g, tx.init(g))
    np.testing.assert_array_equal(state.trace, expected("trace", g))
    assert (np.asarray(state.trace) != np.asarray(expected("nu", g))).any()
    tx = rmsprop(1.0, 0.5, momentum=0.5, state_dtype=jnp.bfloat16, **others)
    _, state = update(tx, g, tx.init(g))
    if others:
        np.testing.assert_array_equal(state.mu, expected("mu", np.float32(0.5) * g))
    else:
        np.testing.assert_array_equal(state.nu, expected("nu", np.float32(0.5) * g * g))


# --- Which element gets which noise -------------------------------------------------------------------


def codes(tx, gradients):
    *_, state = follow(tx, gradients, jax.tree.map(lambda g: g[0], gradients))
    return [jax.tree.map(np.asarray, slot) for slot in (state.nu, state.mu, state.trace) if slot is not None]


SHAPES = {"a": (512,), "b": (16, 32), "c": (512,)}


@pytest.mark.parametrize("state_dtype", NARROW_DTYPES)
@pytest.mark.parametrize("options", [{}, {"centered": True, "momentum": 0.9}])
def test_the_rounding_depends_on_the_place_in_the_array_and_not_on_its_shape(state_dtype, options):
    tx = rmsprop(0.1, 0.99, state_dtype=state_dtype, **options)
    g = gaussian((10, 512))
    expected = codes(tx, g)
    for x, y in zip(codes(tx, g[:, ::-1]), expected, strict=True):
        assert (x != y[::-1]).any()
    # The other leaves of a tree do not matter.
    for names in ("ab", "c"):
        trees = codes(tx, {k: (g if k in names else -2 * g).reshape(10, *shape) for k, shape in SHAPES.items()})
        for tree, y in zip(trees, expected, strict=True):
            for name in names:
                np.testing.assert_array_equal(tree[name].ravel(), y)


@pytest.mark.parametrize("decay", [0.99, 0.999])
def test_elements_with_equal_gradients_are_rounded_independently(decay):
    """An embedding of which a batch touches 1 %: with one random number for all zeros the whole table drifts together."""
    gradients = sparse((600, 8192), 0.01)

    def means(state_dtype):
        tx = rmsprop(1.0, decay, 1e-8, 2.0**-7, momentum=decay, state_dtype=state_dtype)

        def step(state, g):
            state = tx.update(g, state)[1]
            return state, [jnp.abs(_storage.decode(slot)).mean() for slot in (state.nu, state.trace)]

        return np.asarray(jax.jit(lambda g: jax.lax.scan(step, tx.init(g[0]), g)[1])(gradients))

    for ratio, largest in zip((means(jnp.uint8) / means(None))[:, 100:], (1.03, 1.08), strict=True):
        assert ratio.std() < 0.02
        assert 0.97 < ratio.min() < ratio.max() < largest  # one-byte ν makes steps longer


@pytest.mark.parametrize("state_dtype", NARROW_DTYPES)
def test_the_step_divides_by_what_is_kept(state_dtype):
    tx = scale_by_rms(0.9, eps=0.0, state_dtype=state_dtype)
    g = gaussian(64)
    state = tx.init(g)
    for _ in range(5):
        updates, state = update(tx, g, state)
        np.testing.assert_allclose(updates, g / np.sqrt(values(state.nu)), rtol=1e-6)
    again = tx.init(g)
    for _ in range(5):
        repeated, again = update(tx, g, again)
    np.testing.assert_array_equal(repeated, updates)


# --- All options --------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "outside": {"eps_in_sqrt": False, "bias_correction": True},
    "centered": {"centered": True},
    "centered, corrected": {"centered": True, "bias_correction": True},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "lr_in_momentum": False, "initial_scale": 1.0},
    "decay": {"weight_decay": 0.1, "decoupled": True, "momentum": 0.9, "centered": True},
}


@functools.cache
def walk(name, dtype, state_dtype):
    """The sum of 200 updates for each of 512 elements, and the last state."""
    tx = rmsprop(1e-3, 0.99, state_dtype=state_dtype, **OPTIONS[name])
    gradients, wide = 3 + gaussian((200, 512)), jnp.float32
    if dtype == jnp.complex64:
        gradients, wide = gradients + 1j * gaussian((200, 512))[:, ::-1], jnp.complex64

    def step(carry, g):
        position, state = carry
        updates, state = tx.update(g, state, jnp.ones(512, dtype))
        return (position + updates.astype(wide), state), None

    start = np.zeros(512, wide), tx.init(jnp.ones(512, dtype))
    (position, state), _ = jax.jit(lambda g: jax.lax.scan(step, start, g))(gradients.astype(dtype))
    return np.asarray(position), state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    list(zip(OPTIONS, itertools.cycle([jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64]), strict=False)),
)
@pytest.mark.parametrize("state_dtype", NARROW_DTYPES)
def test_the_mean_trajectory_is_that_of_float32(state_dtype, name, dtype):
    """The mean of 512 walks of 200 steps that are equal but for their gradients' noise."""
    (ours, state), (full, _) = walk(name, dtype, state_dtype), walk(name, dtype, None)
    assert state.nu.dtype == state_dtype
    buffer = jnp.int8 if state_dtype == jnp.uint8 else jnp.bfloat16
    for slot, signed in ((state.mu, jnp.bfloat16), (state.trace, buffer)):
        assert slot is None or slot.dtype == (dtype if dtype == jnp.complex64 else signed)
    assert all(slot is None or slot.shape == (512,) for slot in (state.nu, state.mu, state.trace))
    ratio = ours.mean() / full.mean()
    assert abs(ratio.imag) < 0.01
    if state_dtype == jnp.bfloat16:
        assert abs(ratio.real - 1) < 0.005
    else:
        assert 0.98 < ratio.real < 1.10


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("state_dtype", NARROW_DTYPES)
def test_a_slow_buffer_reaches_its_limit(state_dtype, sign):
    # Each update moves b by 0.001 of the way: rounded to nearest it would stop at half a step of its code.
    tx = rmsprop(1e-2, 0.5, momentum=0.999, state_dtype=state_dtype)
    *_, state = follow(tx, sign * (1 + np.float32(0.01) * gaussian((8000, 1024))), jnp.zeros(1024))
    # In the mean a step is a few percent longer for ν's noise, and a buffer's noise is half a step of its code.
    expected = sign * 1e-2 * (1 - 0.999**8000) / (1 - 0.999)
    ratio = values(state.trace).mean() / expected
    assert abs(ratio - 1) < 2e-3 if state_dtype == jnp.bfloat16 else 0.97 < ratio < 1.06


def test_a_buffer_decays_to_zero():
    tx = rmsprop(1.0, 1.0, 0.0, 1.0, momentum=0.9, state_dtype=jnp.uint8)  # u is g
    g = gaussian(4096)
    gradients = np.float32([1] + [1e-30] * 5 + [0] * 500)[:, None] * g  # zeros alone would be rounded alike
    (*_, state), (*_, end) = (follow(tx, gradients[:steps], g) for steps in (6, 506))
    assert abs((values(state.trace) / g).mean() / 0.9**5 - 1) < 5 * 2 * SPREAD[jnp.uint8] / np.sqrt(4096)
    assert not np.asarray(end.trace).any()


def test_an_update_keeps_the_dtype_of_an_old_buffer():
    # Version 0.1 kept it in bfloat16.
    tx = rmsprop(0.1, momentum=0.9, state_dtype=jnp.uint8)
    g = gaussian(64)
    state = tx.init(g)._replace(trace=jnp.zeros(64, jnp.bfloat16))
    for _ in range(3):
        _, state = update(tx, g, state)
    assert (state.nu.dtype, state.trace.dtype) == (jnp.uint8, jnp.bfloat16)
    carried = jax.jit(carry_over)(state, tx.init(g))
    np.testing.assert_allclose(values(carried.trace), values(state.trace), rtol=0.25, atol=2.0**-24)


@pytest.mark.parametrize(("name", "state_dtype"), list(zip(OPTIONS, itertools.cycle(NARROW_DTYPES), strict=False)))
def test_nan_and_inf_are_not_hidden_and_apply_if_finite_restores(name, state_dtype):
    params, bad = np.ones(5, np.float32), np.float32([1.0, np.inf, -np.inf, np.nan, 1.0])
    finite = [True, False, False, False, True]
    tx = rmsprop(1e-3, state_dtype=state_dtype, **OPTIONS[name])
    guarded = optax.apply_if_finite(tx, 1)  # lets the second one in a row pass
    _, state = update(guarded, params, guarded.init(params), params)
    _, after = update(guarded, bad, state, params)
    chex.assert_trees_all_equal(after.inner_state, state.inner_state, strict=True)
    updates, after = update(guarded, bad, after, params)
    assert np.isfinite(updates).tolist() == finite
    if "momentum" in OPTIONS[name]:
        assert np.isfinite(values(after.inner_state.trace)).tolist() == finite


@pytest.mark.parametrize("state_dtype", NARROW_DTYPES)
@pytest.mark.parametrize("options", [{}, {"centered": True}, {"eps_in_sqrt": False}, {"bias_correction": True}])
def test_recovers_from_a_huge_gradient(options, state_dtype):
    gradients = np.tile(np.float32([[-0.5], [1.0]]), (800, 6))
    gradients[10, :5] = [1e5, 1e6, 1e10, 1e25, -3e38]
    tx = rmsprop(1e-3, state_dtype=state_dtype, **options)
    _, updates, _ = follow(tx, gradients, jnp.zeros(6))
    # Its step is as long as a first one, 1/√(1-ρ), and once more the root of a code's step, and a centered one's.
    steps = np.abs(updates[10, :5])
    assert 1e-3 < steps.min() <= steps.max() < 1.5 * 1e-3 / np.sqrt(0.1 * 0.9)
    late = np.abs(updates[-400:]).mean(0)
    np.testing.assert_allclose(late[:5], late[5], rtol=0.1)
    assert late.min() > 3e-4


# --- The argument -------------------------------------------------------------------------------------


def test_the_allowed_values_of_state_dtype():
    for given_dtype, expected in ((None, "float32"), ("uint8", "uint8"), (np.uint8, "uint8"), ("bfloat16", "bfloat16")):
        assert scale_by_rms(state_dtype=given_dtype).init(jnp.ones(1)).nu.dtype == expected
    for bad in (jnp.int8, "float32", jnp.float16, np.float64, float, "anything", 8):
        for make in (functools.partial(rmsprop, 0.1), scale_by_rms):
            with pytest.raises(ValueError, match=r"state_dtype=.*allowed are None, jnp.bfloat16 and jnp.uint8"):
                make(state_dtype=bad)


def test_inject_hyperparams_takes_state_dtype_as_a_string():
    tx = optax.inject_hyperparams(rmsprop)(learning_rate=0.1, state_dtype="uint8")
    params = jnp.ones(2)
    updates, state = update(tx, params, tx.init(params))
    assert state.inner_state.nu.dtype == jnp.uint8
    assert (updates < 0).all()
    with pytest.raises(ValueError, match=r"state_dtype is an array.*inject_hyperparams, write them as strings"):
        optax.inject_hyperparams(rmsprop)(learning_rate=0.1, state_dtype=jnp.uint8).init(params)


def test_bytes_of_a_state():
    params = {"w": jnp.ones((100, 10)), "b": jnp.ones(10, jnp.bfloat16)}
    lean = [rmsprop(0.1, state_dtype=jnp.uint8, **o) for o in ({}, {"momentum": 0.9}, EVERYTHING)]
    # As the README says: an accumulation makes seven bytes of three.
    for tx, each in zip([*lean, optax.MultiSteps(lean[0], 2)], (1, 2, 4, 5), strict=True):
        assert sum(x.nbytes for x in jax.tree.leaves(tx.init(params)) if x.ndim) == 1010 * each


def test_interop_writes_values_and_not_codes():
    params = {"w": jnp.ones(8)}
    tx = rmsprop(0.1, momentum=0.9, centered=True, state_dtype=jnp.uint8)
    _, state = update(tx, {"w": gaussian(8)}, tx.init(params))
    arrays = dict(interop.to_keras(state, lambda tree: tree))
    second = values(state.nu["w"]) + values(state.mu["w"]) ** 2
    np.testing.assert_allclose(arrays["w_velocity"], second, rtol=1e-6)
    np.testing.assert_allclose(arrays["w_momentum"], values(state.trace["w"]), rtol=1e-6)
    theirs = carry_over(state, optax.rmsprop(0.1, momentum=0.9, centered=True).init(params))
    np.testing.assert_allclose(theirs[0].nu["w"], second, rtol=1e-6)


# --- Training -----------------------------------------------------------------------------------------


def linear(count):
    return 3e-3 * (1 - count.astype(jnp.float32) / 400)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("state_dtype", NARROW_DTYPES)
def test_trains_the_digits_as_float32_does(state_dtype, scale):
    """A network of two layers, three seeds at once; tests/benchmarks/training.py has the larger ones."""
    full, narrow = (
        train_digits(rmsprop(linear, 0.99, eps=0.0, state_dtype=dtype), 400, scale=scale)
        for dtype in (None, state_dtype)
    )
    assert full.max() < np.log(10) / 10
    # Within the spread of the seeds, and a loss that starts at 2.3 never more than 0.01 off.
    assert abs(narrow.mean() - full.mean()) < max(3 * full.std(), 0.01)
