"""Codes of narrow floats, their stochastic rounding, and the random bits for it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import normal
from hypothesis import example, given, settings, strategies as st

from rmsprop_jax import _bits


# Every value that uint8 can hold: 7 bits of exponent, 1 of mantissa, from 2⁻⁹⁰.
LADDER = np.array([2.0 ** (code // 2 - 90) * (1 + 0.5 * (code % 2)) for code in range(256)])
# And int8, for codes from 0: 5 bits of exponent and 2 of mantissa, from 2⁻²², less the first number.
SIGNED_LADDER = np.float32([2.0**-22 * (2.0 ** (code // 4) * (1 + 0.25 * (code % 4)) - 1) for code in range(128)])
# Noise that differs only in the bits that count, and takes all their values evenly.
EVERY_NOISE = np.arange(2**16, dtype=np.uint32) << 16
# NaN of x86, of NVIDIA, of anybody.
NAN_WORDS = np.array([0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32)

to_uint8, to_int8 = (jax.jit(_bits.CODES[np.dtype(dtype)].encode) for dtype in (np.uint8, np.int8))
to_bfloat16 = jax.jit(_bits.to_bfloat16)
to_24_bits = jax.jit(_bits.to_24_bits)


def stored(encode, x, noise):
    """The codes of the values, rounded with this noise."""
    return encode(*np.broadcast_arrays(np.float32(x), np.uint32(noise)))


def value(code):
    """What a code stands for."""
    decoded = _bits.CODES[code.dtype].decode(code) if code.dtype in _bits.CODES else code
    return np.asarray(decoded, np.float64)


# --- Codes --------------------------------------------------------------------------------------------


def test_the_values_of_all_codes():
    np.testing.assert_array_equal(value(jnp.arange(256, dtype=jnp.uint8)), LADDER)
    signed = jnp.arange(-128, 128).astype(jnp.int8)
    np.testing.assert_array_equal(value(signed), [np.nan, *-SIGNED_LADDER[:0:-1], *SIGNED_LADDER])


@pytest.mark.parametrize("noise", [0, 1 << 31, 2**32 - 1])
def test_a_value_that_has_a_code_keeps_it(noise):
    np.testing.assert_array_equal(stored(to_uint8, LADDER, noise), np.arange(256))
    np.testing.assert_array_equal(stored(to_int8, SIGNED_LADDER, noise), np.arange(128))
    np.testing.assert_array_equal(stored(to_int8, -SIGNED_LADDER, noise), -np.arange(128))
    exact = np.arange(0x0080, 0x7F80, 7, dtype=np.uint16).view(ml_dtypes.bfloat16)
    for sign in (1, -1):
        numbers = sign * exact.astype(np.float32)
        np.testing.assert_array_equal(stored(to_bfloat16, numbers, noise), numbers.astype(ml_dtypes.bfloat16))


@settings(max_examples=200)
@given(x=st.floats(2.0**-90, 1.5 * 2.0**37, width=32))
@example(x=float(np.nextafter(np.float32(1), np.float32(0))))
@example(x=float(np.nextafter(np.float32(1), np.float32(2))))
def test_uint8_takes_one_of_two_neighbours_and_is_exact_in_the_mean(x):
    chosen = value(stored(to_uint8, x, EVERY_NOISE))
    below, above = LADDER[x >= LADDER].max(), LADDER[x <= LADDER].min()
    assert set(chosen) <= {below, above}
    # Over 2¹⁶ of the 2²² noises: the mean is off by less than one of them.
    assert abs(chosen.mean() - x) <= (above - below) * 2.0**-16


@settings(max_examples=200)
@given(x=st.floats(-896, 896, width=32) | st.floats(-(2.0**-20), 2.0**-20, width=32))
@example(x=2.0**-50)
@example(x=-(2.0**-25))
def test_int8_takes_one_of_two_neighbours_and_is_exact_in_the_mean(x):
    chosen = value(stored(to_int8, x, EVERY_NOISE))
    # |x| + 2⁻²² is rounded to float32: a number that close to a code may go to its other side.
    rounding = 2.0**-24 * (abs(x) + 2.0**-22)
    below = SIGNED_LADDER[abs(x) + rounding >= SIGNED_LADDER].max().astype(np.float64)
    above = SIGNED_LADDER[abs(x) - rounding <= SIGNED_LADDER].min().astype(np.float64)
    assert set(abs(chosen)) <= {below, above} | set(SIGNED_LADDER[abs(SIGNED_LADDER - abs(x)) <= rounding])
    assert (chosen * x >= 0).all()
    assert abs(chosen.mean() - x) <= abs(above - below) * 2.0**-16 + 2 * rounding


@settings(max_examples=200)
@given(x=st.floats(-(2.0**126), 2.0**126, width=32, allow_subnormal=False))
def test_bfloat16_takes_one_of_two_neighbours_and_is_exact_in_the_mean(x):
    chosen = value(stored(to_bfloat16, x, EVERY_NOISE))
    word = np.float32(x).view(np.uint32) & np.uint32(0xFFFF0000)
    towards_zero, away = (np.float64(w.view(np.float32)) for w in (word, word + np.uint32(0x10000)))
    assert set(chosen) <= {towards_zero, away}
    assert abs(chosen.mean() - x) <= abs(away - towards_zero) * 2.0**-16


@pytest.mark.parametrize("noise", [0, 12345 << 10, 2**32 - 1])
def test_values_beyond_the_range_saturate_and_nan_stays(noise):
    ends = {0.0: 0, 1e-45: 0, 2.0**-91: 0, 2.0**-90: 0, 1.5 * 2.0**37: 255, 2.0**38: 255, 3e38: 255, np.inf: 255}
    np.testing.assert_array_equal(stored(to_uint8, list(ends), noise), list(ends.values()))
    nan = NAN_WORDS.view(np.float32)
    assert (stored(to_uint8, nan, noise) == 255).all()
    assert (stored(to_int8, nan, noise) == -128).all()
    assert np.isnan(value(stored(to_bfloat16, nan, noise))).all()
    assert value(stored(to_bfloat16, [np.inf, -np.inf, 0.0], noise)).tolist() == [np.inf, -np.inf, 0.0]
    far = np.array([896.0, 1000.0, 3e38, np.inf])
    codes = stored(to_int8, [*far, *-far, 0.0, -0.0], noise)
    np.testing.assert_array_equal(codes, [127] * 4 + [-127] * 4 + [0, 0])


def test_bfloat16_saturates_what_float32_cannot_hold(x64):
    kept = _bits.to_bfloat16(jnp.array([1e300, -1e300, jnp.nan]), np.uint32(0))
    largest = float(jnp.finfo(jnp.float32).max) / 2
    np.testing.assert_allclose(np.asarray(kept, np.float64), [largest, -largest, np.nan], rtol=0.01)


# --- A bfloat16 and eight bits ------------------------------------------------------------------------


def test_every_weight_of_24_bits_has_one_encoding():
    """All of one binade, of both signs: the nearest bfloat16, half up, and a remainder that gives the weight again."""
    magnitude = np.arange(2**15 + 2**9, dtype=np.uint32) * 256 + np.float32(1.0).view(np.uint32)
    for word in (magnitude, magnitude | np.uint32(1 << 31)):
        nearest, rest = _bits.nearest_16_bits(jnp.asarray(word)), _bits.remainder_of(jnp.asarray(word))
        exact, upper = (np.float64(x) for x in (word.view(np.float32), np.asarray(nearest)))
        unit = 2.0 ** (np.floor(np.log2(abs(exact))) - 7)
        assert (nearest == nearest.astype(jnp.bfloat16).astype(jnp.float32)).all()
        assert (abs(upper - exact) <= unit / 2).all()
        assert (abs(upper) > abs(exact))[abs(upper - exact) == unit / 2].all()
        assert set(np.unique(rest)) == set(range(-128, 128))
        joined = _bits.join(nearest.astype(jnp.bfloat16), rest)
        np.testing.assert_array_equal(np.asarray(joined).view(np.uint32), word)


@settings(max_examples=200)
@given(x=st.floats(-(2.0**126), 2.0**126, width=32, allow_subnormal=False))
def test_24_bits_take_one_of_two_neighbours_and_are_exact_in_the_mean(x):
    word = np.float32(x).view(np.uint32)
    chosen = np.asarray(to_24_bits(np.full(256, x, np.float32), np.arange(256, dtype=np.uint32) << 24)) & 0xFFFFFF00
    below, above = word & np.uint32(0xFFFFFF00), (word & np.uint32(0xFFFFFF00)) + np.uint32(256)
    assert set(chosen) <= {below, above}
    assert (chosen == above).sum() == word - below
    nearest = np.asarray(_bits.nearest_24_bits(jnp.float32(x))) & 0xFFFFFF00
    assert nearest == (above if word - below >= 128 else below)


@pytest.mark.parametrize("noise", [0, 2**32 - 1])
def test_nan_and_inf_stay_in_24_bits(noise):
    nan, inf = NAN_WORDS.view(np.float32), np.float32([np.inf, -np.inf])
    for x, same in ((nan, np.isnan), (inf, lambda y: y == inf)):
        for word in (to_24_bits(x, np.full(x.shape, noise, np.uint32)), _bits.nearest_24_bits(jnp.asarray(x))):
            assert same(np.asarray(_bits.nearest_16_bits(word))).all()
            assert not np.asarray(_bits.remainder_of(word)).any()


# --- Random bits --------------------------------------------------------------------------------------


@jax.jit
def draws(counts, *arrays):
    """The random bits of each count, centered, with variance 1."""
    words = jax.vmap(lambda count: _bits.noise(_bits.seeds(count, "nu"), *arrays))(counts)
    return ((words >> 16).astype(jnp.float32) / 2**16 - 0.5) * np.sqrt(12)


RELATED = [(1.0, 1.0), (1.0, -1.0), (0.0, -0.0), (1 + 2j, 1 - 2j), (1 + 2j, -1 - 2j), (1 + 2j, 2 + 1j)]


@pytest.mark.parametrize(("one", "other"), RELATED)
def test_noise_of_related_values_is_independent(one, other):
    """Over 4,096 updates and 64 places: also for equal values, opposite ones, and conjugates."""
    noise = np.asarray(draws(jnp.arange(1, 4097), jnp.asarray([one, other] * 32)))
    assert np.abs(noise.mean(0)).max() < 5 / np.sqrt(4096)
    assert np.abs(noise.T @ noise / len(noise) - np.eye(64)).max() < 6 / np.sqrt(4096)


@pytest.mark.parametrize(("one", "other"), [*RELATED[1:], (1.0, 2.0**64)])
def test_noise_at_one_place_is_independent_for_different_values(one, other):
    """As in two leaves: opposite values differ in the first bit of a word, which a product does not spread."""
    noise = [np.asarray(draws(jnp.arange(1, 4097), jnp.full(64, x))) for x in (one, other)]
    assert abs((noise[0] * noise[1]).mean(0)).max() < 6 / np.sqrt(4096)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_noise_is_uniform_and_independent(dtype):
    gradients = normal((4096,), dtype).astype(jnp.float32)

    def noise(slot):
        bits = jax.vmap(lambda count: _bits.noise(_bits.seeds(count, slot), gradients))(jnp.arange(1, 257))
        return (np.asarray(bits) >> np.uint32(10)) / 2**22 - 0.5

    rows, others = noise("nu"), noise("mu")
    sigma = 1 / np.sqrt(12 * 256)  # of a mean over the updates, which are independent for sure
    assert abs(rows.mean()) < 5 * sigma
    assert abs(rows.mean(0)).max() < 5 * sigma
    assert abs(rows.var() * 12 - 1) < 0.02
    for pair in (rows[1:] * rows[:-1], rows * others, rows[:, 1:] * rows[:, :-1]):  # updates, slots, neighbours
        assert abs(pair.mean() * 12) < 0.02


def test_noise_is_independent_where_elements_share_a_value():
    """Over steps and over elements, of which many share their parameter or their update."""
    p, u = normal((8, 8), jnp.bfloat16), normal((8, 8), jnp.bfloat16, seed=1) * jnp.bfloat16(1e-3)
    p, u = (x.astype(jnp.float32).ravel() for x in (p.at[:4].set(p[0]), u.at[:, 4:].set(u[0, 0])))
    noise = np.asarray(draws(jnp.arange(4096), p, u))
    assert np.abs(noise.mean(0)).max() < 5 / np.sqrt(4096)
    assert np.abs(noise.T @ noise / 4096 - np.eye(64)).max() < 6 / np.sqrt(4096)
    assert np.abs((noise[1:] * noise[:-1]).mean(0)).max() < 6 / np.sqrt(4096)


def test_every_update_and_slot_has_its_own_seeds():
    pairs = [jax.vmap(lambda c, slot=slot: _bits.seeds(c, slot))(jnp.arange(1, 3001)) for slot in ("nu", "mu", "trace")]
    a, b = (np.concatenate(column) for column in zip(*pairs, strict=True))
    assert (a % 2 == 1).all()
    # b is a permutation of the counts, so equal values mean equal seeds; a has lost a bit to being odd.
    assert len(set(b)) == len(b)
    assert len(set(a)) > len(a) - 20
    assert not set(a) & set(b)
