"""States of one and two bytes: averages rounded stochastically, and training with them."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import dtypes, EVERYTHING, follow, NARROW_DTYPES, normal, SGD
from problems import train_digits

from rmsprop_jax import _bits, _storage, carry_over, interop, rmsprop, scale_by_rms


def values(kept):
    return np.asarray(_storage.decode(kept), np.float64)


@pytest.mark.parametrize("state_dtype", NARROW_DTYPES)
def test_float64_saturates(x64, state_dtype):
    tx = rmsprop(0.1, 0.5, momentum=0.5, state_dtype=state_dtype)
    params = jnp.zeros(2, jnp.float64)
    updates, state = tx.update(jnp.array([1e300, -1e-300]), tx.init(params))
    assert updates.dtype == jnp.float64
    assert np.isfinite(values(state.nu)).all()
    assert jnp.isfinite(updates).all()


@pytest.mark.parametrize("state_dtype", [None, *NARROW_DTYPES])
@pytest.mark.slow
def test_every_dtype_where_float64_is_on(x64, state_dtype):
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64, jnp.complex64, jnp.complex128):
        for options in ({}, {"centered": True, "momentum": 0.9, "bias_correction": True}):
            tx = rmsprop(0.1, state_dtype=state_dtype, **options)
            params = jnp.ones(3, dtype)
            updates, state = tx.update(2 * params, tx.init(params))
            assert updates.dtype == dtype
            assert (updates.real < 0).all()
            assert dtypes(state) == dtypes(tx.init(params))


@pytest.mark.parametrize("state_dtype", NARROW_DTYPES)
def test_initial_scale_is_kept_to_nearest(state_dtype):
    for scale, code in ((0.0, 0), (-0.0, 0), (1.0, 180), (1.5, 181), (1.2, 180), (1.3, 181), (1e-40, 0), (1e30, 255)):
        tx = rmsprop(0.1, initial_scale=scale, state_dtype=state_dtype)
        for init in (tx.init, jax.jit(tx.init)):
            nu = init(jnp.ones((2, 3), jnp.bfloat16)).nu
            assert nu.dtype == state_dtype
            assert nu.shape == (2, 3)
            assert (nu == (code if state_dtype == jnp.uint8 else jnp.bfloat16(scale))).all()


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


def every(n, shape):
    return (jnp.arange(shape[0])[:, None] % n == 0).astype(jnp.float32) * jnp.ones(shape)


GRADIENTS = {
    "normal": lambda shape: normal(shape),
    "bfloat16": lambda shape: normal(shape, jnp.bfloat16).astype(jnp.float32),
    "float16": lambda shape: normal(shape, jnp.float16).astype(jnp.float32),
    "constant": lambda shape: jnp.broadcast_to(jnp.linspace(0.5, 2.0, shape[1]), shape),
    "signs": lambda shape: 1.3 * jnp.sign(normal(shape)),
    "alternating": lambda shape: 0.3 + 0.9 * every(2, shape),
    "sparse": lambda shape: normal(shape) * jax.random.bernoulli(jax.random.key(1), 0.1, shape).astype(jnp.float32),
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


@pytest.mark.parametrize("state_dtype", NARROW_DTYPES)
def test_a_slow_average_follows(state_dtype):
    # Down to 1e-4 and up again by 1e-3 of itself at a time: rounded to nearest it would never move.
    gradients = jnp.concatenate([jnp.full((15_000, COLUMNS), 1e-2), jnp.full((10_000, COLUMNS), 1.0)])
    kept, exact = kept_and_exact(0.999, gradients * (1 + 0.1 * normal(gradients.shape)), state_dtype)
    for t in (14_999, 24_999):
        assert abs(kept[t].mean() / exact[t].mean() - 1) < 5 * SPREAD[state_dtype] / np.sqrt(COLUMNS)


@pytest.mark.slow
def test_a_hundred_thousand_updates():
    kept, exact = kept_and_exact(0.9999, normal((100_000, 32)), jnp.uint8)
    kept, exact = kept[20_000:], exact[20_000:]
    assert abs(kept.mean() / exact.mean() - 1) < 5 * SPREAD[jnp.uint8] / np.sqrt(32 * 8 / 2)
    # It neither runs away nor gets stuck: within three octaves of 1, and every column on the way again and again.
    assert 0.1 < kept.min() < kept.max() < 8
    assert (np.diff(kept, axis=0) != 0).sum(0).min() > 10


@pytest.mark.parametrize("decay", [0.9, 0.999])
@pytest.mark.parametrize("state_dtype", NARROW_DTYPES)
def test_a_rare_gradient_is_forgotten_at_the_right_rate(state_dtype, decay):
    memory = round(1 / (1 - decay))
    kept, exact = kept_and_exact(decay, jnp.zeros((3 * memory, 4096)), state_dtype)
    for t in (memory // 2, memory - 1, 3 * memory - 1):
        # The variance doubles in about two memories, as nothing pulls it back.
        assert abs(kept[t].mean() / exact[t].mean() - 1) < 5 * 2 * SPREAD[state_dtype] / np.sqrt(4096)


def test_an_average_recovers_from_zero_gradients():
    gradients = jnp.zeros((800, COLUMNS)).at[700:].set(1.0)
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
    size = np.abs(np.asarray(gradients))[500:]
    assert low < (size / np.sqrt(kept[500:])).mean() / (size / np.sqrt(exact[500:])).mean() < high


@pytest.mark.parametrize("others", [{}, {"centered": True}])
def test_a_slot_is_rounded_by_its_own_seeds_whatever_else_is_on(others):
    # With an average that stays one, u is g. With a rate of 1 the buffer is also g, before it is rounded.
    g, first = normal((512,)), jnp.int32(1)

    def expected(slot, exact):
        return _bits.to_bfloat16(exact, _bits.noise(_bits.seeds(first, slot), g))

    tx = rmsprop(1.0, **SGD, momentum=0.5, state_dtype=jnp.bfloat16, **others)
    _, state = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(state.trace, expected("trace", g))
    assert (state.trace != expected("nu", g)).any()
    tx = rmsprop(1.0, 0.5, momentum=0.5, state_dtype=jnp.bfloat16, **others)
    _, state = tx.update(g, tx.init(g))
    if others:
        np.testing.assert_array_equal(state.mu, expected("mu", 0.5 * g))
    else:
        np.testing.assert_array_equal(state.nu, expected("nu", 0.5 * g * g))


# --- Which element gets which noise -------------------------------------------------------------------


def codes(tx, gradients):
    state = tx.init(gradients[0])
    step = jax.jit(lambda s, g: tx.update(g, s)[1])
    for g in gradients:
        state = step(state, g)
    return jax.tree.leaves((state.nu, state.mu, state.trace))


@pytest.mark.parametrize("state_dtype", NARROW_DTYPES)
@pytest.mark.parametrize("options", [{}, {"centered": True, "momentum": 0.9}])
def test_the_rounding_depends_on_the_place_in_the_array_and_not_on_its_shape(state_dtype, options):
    tx = rmsprop(0.1, 0.99, state_dtype=state_dtype, **options)
    gradients = normal((10, 512))
    expected = [np.asarray(x) for x in codes(tx, gradients)]
    for x, y in zip(codes(tx, gradients[:, ::-1]), expected, strict=True):
        assert (x != y[::-1]).any()
    for x, y in zip(codes(tx, gradients.reshape(10, 16, 32)), expected, strict=True):
        np.testing.assert_array_equal(x.ravel(), y)
    # The other leaves of a tree do not matter.
    for names in ("abc", "xyc"):
        company = [{k: g if k == "c" else -2 * g for k in names} for g in gradients]
        trees = codes(tx, company)
        for i, y in enumerate(expected):
            np.testing.assert_array_equal(trees[3 * i + sorted(names).index("c")], y)


@pytest.mark.parametrize("decay", [0.99, 0.999])
@pytest.mark.parametrize("slot", ["nu", "trace"])
def test_elements_with_equal_gradients_are_rounded_independently(slot, decay):
    """An embedding of which a batch touches 1 %: with one random number for all zeros the whole table drifts together."""
    shape = (600, 8192)
    gradients = normal(shape) * jax.random.bernoulli(jax.random.key(1), 0.01, shape).astype(jnp.float32)

    def means(state_dtype):
        tx = rmsprop(1.0, decay, 1e-8, 2.0**-7, momentum=decay, state_dtype=state_dtype)

        def step(state, g):
            state = tx.update(g, state)[1]
            return state, jnp.abs(_storage.decode(getattr(state, slot))).mean()

        return np.asarray(jax.jit(lambda g: jax.lax.scan(step, tx.init(g[0]), g)[1])(gradients))

    ratio = (means(jnp.uint8) / means(None))[100:]
    assert ratio.std() < 0.02
    assert 0.97 < ratio.min() < ratio.max() < (1.03 if slot == "nu" else 1.08)  # one-byte ν makes steps longer


@pytest.mark.parametrize("state_dtype", NARROW_DTYPES)
def test_the_step_divides_by_what_is_kept(state_dtype):
    tx = scale_by_rms(0.9, eps=0.0, state_dtype=state_dtype)
    g = normal((64,))
    state = tx.init(g)
    for _ in range(5):
        updates, state = tx.update(g, state)
        np.testing.assert_allclose(updates, np.asarray(g) / np.sqrt(values(state.nu)), rtol=1e-6)
    again = tx.init(g)
    for _ in range(5):
        repeated, again = tx.update(g, again)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("state_dtype", "name", "dtype"),
    [
        (state_dtype, name, dtype)
        for (state_dtype, name), dtype in zip(
            itertools.product(NARROW_DTYPES, OPTIONS),
            itertools.cycle([jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64]),
            strict=False,
        )
    ],
)
def test_the_mean_trajectory_is_that_of_float32(state_dtype, name, dtype):
    """The mean of 512 walks of 200 steps that are equal but for their gradients' noise."""
    gradients = 3.0 + normal((200, 512))
    if dtype == jnp.complex64:
        gradients = jax.lax.complex(gradients, normal((200, 512))[:, ::-1])
    gradients = gradients.astype(dtype)

    def walk(state_dtype):
        tx = rmsprop(1e-3, 0.99, state_dtype=state_dtype, **OPTIONS[name])
        params = jnp.ones(512, dtype)
        wide = jnp.complex64 if dtype == jnp.complex64 else jnp.float32

        def step(carry, g):
            position, state = carry
            updates, state = tx.update(g, state, params)
            return (position + updates.astype(wide), state), None

        start = jnp.zeros(512, wide), tx.init(params)
        (position, state), _ = jax.jit(lambda g: jax.lax.scan(step, start, g))(gradients)
        return np.asarray(position), state

    (ours, state), (full, _) = walk(state_dtype), walk(None)
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
    *_, state = follow(tx, sign * (1 + 0.01 * normal((8000, 1024))), jnp.zeros(1024))
    # In the mean a step is a few percent longer for ν's noise, and a buffer's noise is half a step of its code.
    expected = sign * 1e-2 * (1 - 0.999**8000) / (1 - 0.999)
    ratio = values(state.trace).mean() / expected
    assert abs(ratio - 1) < 2e-3 if state_dtype == jnp.bfloat16 else 0.97 < ratio < 1.06


def test_a_buffer_decays_to_zero():
    tx = rmsprop(1.0, 1.0, 0.0, 1.0, momentum=0.9, state_dtype=jnp.uint8)  # u is g
    g = normal((4096,))
    state = tx.init(g)
    for gradient in [g] + [1e-30 * g] * 5:  # with zeros they would be rounded alike
        _, state = tx.update(gradient, state)
    assert abs((values(state.trace) / np.asarray(g)).mean() / 0.9**5 - 1) < 5 * 2 * SPREAD[jnp.uint8] / np.sqrt(4096)
    steps = jax.jit(lambda s: jax.lax.scan(lambda s, _: (tx.update(0 * g, s)[1], None), s, length=500)[0])
    assert (steps(state).trace == 0).all()


def test_an_update_keeps_the_dtype_of_an_old_buffer():
    # Version 0.1 kept it in bfloat16.
    tx = rmsprop(0.1, momentum=0.9, state_dtype=jnp.uint8)
    g = normal((64,))
    state = tx.init(g)._replace(trace=jnp.zeros(64, jnp.bfloat16))
    for _ in range(3):
        _, state = tx.update(g, state)
    assert (state.nu.dtype, state.trace.dtype) == (jnp.uint8, jnp.bfloat16)
    carried = carry_over(state, tx.init(g))
    np.testing.assert_allclose(values(carried.trace), values(state.trace), rtol=0.25, atol=2.0**-24)


@pytest.mark.parametrize("state_dtype", NARROW_DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.slow
def test_nan_and_inf_are_not_hidden_and_apply_if_finite_restores(options, state_dtype):
    params, bad = jnp.ones(5), jnp.array([1.0, jnp.inf, -jnp.inf, jnp.nan, 1.0])
    finite = [True, False, False, False, True]
    guarded = optax.apply_if_finite(rmsprop(1e-3, state_dtype=state_dtype, **options), 5)
    _, state = guarded.update(params, guarded.init(params), params)
    _, after = guarded.update(bad, state, params)
    chex.assert_trees_all_equal(after.inner_state, state.inner_state, strict=True)
    updates, after = rmsprop(1e-3, state_dtype=state_dtype, **options).update(bad, state.inner_state, params)
    assert jnp.isfinite(updates).tolist() == finite
    if "momentum" in options:
        assert np.isfinite(values(after.trace)).tolist() == finite


@pytest.mark.parametrize("state_dtype", NARROW_DTYPES)
@pytest.mark.parametrize("options", [{}, {"centered": True}, {"eps_in_sqrt": False}, {"bias_correction": True}])
def test_recovers_from_a_huge_gradient(options, state_dtype):
    huge = jnp.array([1e5, 1e6, 1e10, 1e25, -3e38])
    gradients = jnp.ones((1600, 6)).at[::2].set(-0.5).at[10, :5].set(huge)
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
    updates, state = tx.update(params, tx.init(params))
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
    _, state = tx.update({"w": normal((8,))}, tx.init(params))
    arrays = dict(interop.to_keras(state, lambda tree: tree))
    second = values(state.nu["w"]) + values(state.mu["w"]) ** 2
    np.testing.assert_allclose(arrays["w_velocity"], second, rtol=1e-6)
    np.testing.assert_allclose(arrays["w_momentum"], values(state.trace["w"]), rtol=1e-6)
    theirs = carry_over(state, optax.rmsprop(0.1, momentum=0.9, centered=True).init(params))
    np.testing.assert_allclose(theirs[0].nu["w"], second, rtol=1e-6)


# --- Training -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("state_dtype", NARROW_DTYPES)
def test_trains_the_digits_as_float32_does(state_dtype, scale):
    """A network of two layers, three seeds at once; tests/benchmarks/training.py has the larger ones."""

    def losses(state_dtype):
        rate = lambda count: 3e-3 * (1 - count.astype(jnp.float32) / 400)  # noqa: E731
        return train_digits(rmsprop(rate, 0.99, eps=0.0, state_dtype=state_dtype), 400, scale=scale)

    full, narrow = losses(None), losses(state_dtype)
    assert full.max() < np.log(10) / 10
    # Within the spread of the seeds, and a loss that starts at 2.3 never more than 0.01 off.
    assert abs(narrow.mean() - full.mean()) < max(3 * full.std(), 0.01)
