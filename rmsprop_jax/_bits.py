"""Codes of narrow floats, stochastic rounding, and the random bits for it. One array at a time.

`bfloat16` and the one-byte codes are the upper bits of a float32, rounded stochastically. An average moves by a
fraction 1-ρ of itself per update, far less than the gap between two codes: rounded to nearest, it
would never move. A `uint8` code holds 7 bits of the exponent and 1 of the mantissa::

    code = (bits(max(x, 2⁻⁹⁰)) - bits(2⁻⁹⁰) + r) >> 22       r: 22 random bits
    x    = float((code << 22) + bits(2⁻⁹⁰))

It stands for 2⁻⁹⁰ · {1, 1.5, 2, 3, 4, 6, ...} up to 1.5 · 2³⁷. There is no sign, no zero and no separate
scale. The bits of a float are linear in its value between two codes, so the mean over r is exact.

An `int8` code has a sign, 5 bits of the exponent and 2 of the mantissa, of |x| + 2⁻²² so that there is
a zero. It stands for ± 2⁻²² · {0, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 4, ...} up to 1.75 · 2⁹, and -128 for NaN.
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


Seed = tuple[jax.Array, jax.Array]


# --- Random bits ------------------------------------------------------------------------------------------


def seeds(count: jax.Array, purpose: str) -> Seed:
    """The a and b of `noise` for update number `count`. Each purpose, such as a slot, has its own."""
    x = _once(count.astype(jnp.uint32)) * np.uint32(2) + np.uint32(zlib.crc32(purpose.encode()))
    return _once(_mix(x) | 1), _once(_mix(x + 1))


def noise(seed: Seed, *arrays: jax.Array) -> jax.Array:
    """Random bits for each element: a·bits(arrays) + b.

    They are uniform whatever the arrays hold, because b is. They are independent for elements that
    differ, because a is odd and new in each update. There is no key and no index in them, so neither
    the place of an element nor its neighbours matter.
    """
    a, b = seed
    x = bits(arrays[0])
    for array in arrays[1:]:
        # The bits of bfloat16 are in the upper half of a word; a multiplication carries nothing downwards.
        x = (x ^ (x >> 16)) * np.uint32(0x9E3779B1) + bits(array)
        x = x ^ (x >> 15)
    return x * a + b


def _mix(x: jax.Array) -> jax.Array:
    # lowbias32, https://nullprogram.com/blog/2018/07/31/
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _once(x: jax.Array) -> jax.Array:
    """`x`, computed once for all leaves. XLA repeats cheap scalar operations in the kernel of each leaf."""
    # It does not repeat a division. (x mod 2³²-2 changes only the two largest x.)
    return x % np.uint32(0xFFFFFFFE)


# --- One byte ---------------------------------------------------------------------------------------------


class _Code(NamedTuple):
    """The upper bits of a float32 from `smallest` to `largest`, counted from those of `smallest`."""

    dropped: int  # bits of the mantissa that are left out
    smallest: np.float32  # in which these bits are 0
    largest: np.float32

    def encode(self, x: jax.Array, noise: Any) -> jax.Array:
        first, last = self.smallest.view(np.uint32), self.largest.view(np.uint32)
        # Clamped as bits, not as values: NaN has no code, and is kept as the largest.
        above = jax.lax.clamp(first, bits(x), last) - first
        # The bits left out exceed r with the right probability; this compares them at the top of a word.
        up = (above << (32 - self.dropped)) > noise
        # The last operation has two arrays, because XLA's CPU backend recomputes what ends in an operation
        # on one array wherever it is read. Then the step would read the old codes, and they would have to be copied.
        return (above >> self.dropped).astype(jnp.uint8) + up.astype(jnp.uint8)

    def decode(self, code: jax.Array) -> jax.Array:
        return _float32((code.astype(jnp.uint32) << self.dropped) + self.smallest.view(np.uint32))


_UNSIGNED = _Code(22, np.float32(2.0**-90), np.float32(1.5 * 2.0**37))
_SIGNED = _Code(21, np.float32(2.0**-22), np.float32(1.75 * 2.0**9))  # of |x| + 2⁻²²
_NAN = np.int8(-128)

LARGEST_UINT8 = float(_UNSIGNED.largest)


def to_uint8(x: jax.Array, noise: Any) -> jax.Array:
    """The code of a number that is not negative."""
    return _UNSIGNED.encode(x, noise)


def from_uint8(code: jax.Array) -> jax.Array:
    """The float32 that a code stands for."""
    return _UNSIGNED.decode(code)


def to_int8(x: jax.Array, noise: Any) -> jax.Array:
    """The code of a number of either sign."""
    size = _SIGNED.encode(jnp.abs(x) + float(_SIGNED.smallest), noise).astype(jnp.int8)
    return jnp.where(jnp.isnan(x), _NAN, jnp.where(x < 0, -size, size))


def from_int8(code: jax.Array) -> jax.Array:
    """The float32 that a code stands for."""
    size = _SIGNED.decode(jnp.abs(code.astype(jnp.int32))) - _SIGNED.smallest
    return jnp.where(code == _NAN, jnp.nan, jnp.where(code < 0, -size, size))


# --- Two bytes --------------------------------------------------------------------------------------------


def to_bfloat16(x: jax.Array, noise: Any, rest: jax.Array | None = None) -> jax.Array:
    """Rounds to one of the two bfloat16 neighbours of `x`. The mean over the noise is `x`, or `x + rest`.

    `rest` is what float32 could not hold of `x`: at most half of its last place.
    """
    exact = bits(x)
    upper = exact + (noise >> 16)
    if rest is not None:
        upper = upper + _carry(exact, rest, noise)
    # The noise would carry NVIDIA's NaN, 0x7fffffff, over into -0. The select is of float32, and the
    # conversion comes last: XLA's CPU backend would widen a select of bfloat16, and recompute it from
    # the old state wherever it is read, which has to be copied for that.
    rounded = _float32(upper & np.uint32(0xFFFF0000))
    return jnp.where(jnp.isnan(x), x.astype(jnp.float32), rounded).astype(jnp.bfloat16)


def _carry(exact: jax.Array, rest: jax.Array, noise: jax.Array) -> jax.Array:
    """-1, 0 or 1 of the last place of a float32, so that the mean over the lower 16 bits of the noise is `rest`."""
    # Bits grow away from zero. Just below a power of two, numbers are twice as close as above it.
    outward = jnp.where(exact >> 31 == 1, -rest, rest)
    outward = jnp.where((outward < 0) & (exact & 0x7FFFFF == 0), 2 * outward, outward)
    exponent = jnp.minimum(exact & 0x7F800000, 0x7F000000)  # inf has none
    one_over_size = _float32(np.uint32(0x7F000000) - exponent)
    places = jnp.floor(outward * one_over_size * np.float32(2.0 ** (23 + 16))).astype(jnp.int32)
    return (((noise & 0xFFFF).astype(jnp.int32) + places) >> 16).astype(jnp.uint32)


# --- Floats as integers -----------------------------------------------------------------------------------


def bits(x: jax.Array) -> jax.Array:
    """The bits of `x` as a float32, saturated; of both components if complex."""
    if jnp.iscomplexobj(x):
        return bits(x.real) + 3 * bits(x.imag)
    if x.dtype == jnp.float64:
        limit = float(np.finfo(np.float32).max) / 2
        x = jnp.clip(x, -limit, limit)
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)


def _float32(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
