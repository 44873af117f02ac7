"""Codes of narrow floats, stochastic rounding, and the random bits for it. One array at a time, no dtype decisions.

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

import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


__all__ = [
    "CODES",
    "Seed",
    "join",
    "nearest_16_bits",
    "nearest_24_bits",
    "noise",
    "remainder_of",
    "seeds",
    "to_16_bits",
    "to_24_bits",
    "to_bfloat16",
    "within_stack",
]


Seed = tuple[jax.Array, jax.Array]


# --- Random bits ------------------------------------------------------------------------------------------


def seeds(count: jax.Array, purpose: str) -> Seed:
    """The a and b of `noise` for update number `count`. Each purpose, such as a slot, has its own."""
    x = _for_all_leaves(count.astype(jnp.uint32)) * np.uint32(2) + np.uint32(zlib.crc32(purpose.encode()))
    return _for_all_leaves(_mix(x) | 1), _for_all_leaves(_mix(x + 1))


def within_stack(seed: Seed, layer: jax.Array | None, shape: tuple[int, ...]) -> Seed:
    """The seed for one array of a stack of such arrays: the bits are those that it has as a part of the stack."""
    a, b = seed
    return seed if layer is None else (a, b + layer.astype(jnp.uint32) * np.uint32(math.prod(shape) % 2**32))


def noise(seed: Seed, *arrays: jax.Array) -> jax.Array:
    """Random bits for each element: a·x + b, where x mixes the bits of the arrays with the element's place.

    They are uniform whatever the arrays hold, because b is. They are independent for elements that differ in
    the upper 24 bits of a value or in place, because a is odd and new in each update. A place is that in the whole
    array, so the bits are the same on any layout of devices. Inside `shard_map`, `vmap` and `pmap` positions are local
    to the shard, so other, equally good, random bits are used.
    """
    a, b = seed
    x, *others = (bits(y) for x in arrays for y in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,)))
    for other in others:
        # The bits of bfloat16 are in the upper half of a word. Those of two such arrays then fill it.
        x = x ^ (x >> 16) ^ other
    # Not a sum over axes: a TPU would compute the product of each in a kernel of its own, and takes more instructions.
    place = jax.lax.iota(jnp.uint32, math.prod(x.shape)).reshape(x.shape)
    return (_spread_sign(x) ^ (place + b)) * a


def _spread_sign(x: jax.Array) -> jax.Array:
    """The upper 24 bits of a word, behind eight copies of the first: that alone would change one bit of a product."""
    shifted = jax.lax.bitcast_convert_type(x, jnp.int32) >> 8
    return jax.lax.bitcast_convert_type(shifted, jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    # lowbias32, https://nullprogram.com/blog/2018/07/31/
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _for_all_leaves(x: jax.Array) -> jax.Array:
    """`x`, computed once for all leaves, and not again in the kernel of each."""
    # XLA duplicates cheap scalar operations but not a remainder, and this one is the identity except for the two
    # largest x. tests/test_compilation.py counts the operations.
    return x % np.uint32(0xFFFFFFFE)


# --- One byte ---------------------------------------------------------------------------------------------


class _Code(NamedTuple):
    """The upper bits of a float32 from `smallest` to `largest`, counted from those of `smallest`."""

    dropped: int  # bits of the mantissa that are left out
    smallest: np.float32  # in which these bits are 0
    largest: np.float32

    def encode(self, x: jax.Array, noise: Any) -> jax.Array:
        x = _as_float32(x)
        above = bits(jnp.maximum(x, self.smallest)) - self.smallest.view(np.uint32)
        code = (above + (noise >> (32 - self.dropped))) >> self.dropped
        # NaN has no code and is kept as the largest. The last operation has two arrays, because XLA's CPU backend
        # recomputes what ends in an operation on one array wherever it is read. Then the step would read the
        # old codes, and they would have to be copied.
        last = (self.largest.view(np.uint32) - self.smallest.view(np.uint32)) >> np.uint32(self.dropped)
        return jnp.where(x < self.largest, code.astype(jnp.uint8), last.astype(np.uint8))

    def decode(self, code: jax.Array) -> jax.Array:
        return _float32((code.astype(jnp.uint32) << self.dropped) + self.smallest.view(np.uint32))


_NAN = np.int8(-128)


class _SignedCode(_Code):
    """A sign, and the code of |x| + smallest."""

    def encode(self, x: jax.Array, noise: Any) -> jax.Array:
        size = super().encode(jnp.abs(x) + float(self.smallest), noise).astype(jnp.int8)
        return jnp.where(jnp.isnan(x), _NAN, jnp.where(x < 0, -size, size))

    def decode(self, code: jax.Array) -> jax.Array:
        size = super().decode(jnp.abs(code.astype(jnp.int32))) - self.smallest
        return jnp.where(code == _NAN, jnp.nan, jnp.where(code < 0, -size, size))


CODES = {
    np.dtype(np.uint8): _Code(22, np.float32(2.0**-90), np.float32(1.5 * 2.0**37)),
    np.dtype(np.int8): _SignedCode(21, np.float32(2.0**-22), np.float32(1.75 * 2.0**9)),
}


# --- Two bytes --------------------------------------------------------------------------------------------


def to_bfloat16(x: jax.Array, noise: Any) -> jax.Array:
    """Rounds to one of the two bfloat16 neighbours of `x`. The mean over the noise is `x`."""
    # The select is of float32, and the conversion comes last: XLA's CPU backend would widen a select of bfloat16,
    # and recompute it from the old state wherever it is read, which has to be copied for that.
    return to_16_bits(x, noise).astype(jnp.bfloat16)


def to_16_bits(x: jax.Array, noise: Any) -> jax.Array:
    """`to_bfloat16`, as a float32."""
    x = _as_float32(x)
    # The noise would carry NVIDIA's NaN, 0x7fffffff, over into -0.
    return jnp.where(jnp.isnan(x), x, _upper_half(bits(x) + (noise >> 16)))


# --- Three bytes: a bfloat16 and the eight bits behind it --------------------------------------------------


def to_24_bits(x: jax.Array, noise: Any) -> jax.Array:
    """The bits of a float32, rounded stochastically to 24. Ignore the last eight."""
    # A carry out of these 24 bits is right, and none comes out of inf. Some NaN have one, but not that of NumPy.
    return jnp.where(jnp.isnan(x), np.float32(np.nan).view(np.uint32), bits(x) + (noise >> 24))


def nearest_24_bits(x: jax.Array) -> jax.Array:
    """The bits of a float32, rounded to the nearest 24, and finite if it is. Ignore the others."""
    x = _as_float32(x)
    largest = float(np.uint32(0x7F7F7F00).view(np.float32))  # the largest bfloat16 and a remainder of 127
    return to_24_bits(jnp.where(jnp.isinf(x), x, jnp.clip(x, -largest, largest)), np.uint32(1 << 31))


def nearest_16_bits(weight: jax.Array) -> jax.Array:
    """The bfloat16 nearest to a weight of 24 bits, as a float32."""
    # Round half up: with half to even, some weights would have two encodings.
    return _upper_half(weight + np.uint32(0x8000))


def remainder_of(weight: jax.Array) -> jax.Array:
    """A weight of 24 bits minus its nearest bfloat16, in units of 2⁻⁸ of the bfloat16's last place."""
    return (weight >> 8).astype(jnp.int8)


@jax.custom_jvp
def join(upper: jax.Array, rest: jax.Array) -> jax.Array:
    """The float32 that a bfloat16 and its remainder stand for. Its derivative is that of a cast."""
    # Somebody may have set the parameter to zero. A remainder below zero would then make the bits of a NaN.
    rest = jnp.where(upper == 0, jnp.int8(0), rest)
    return _float32((bits(upper).astype(jnp.int32) + (rest.astype(jnp.int32) << 8)).astype(jnp.uint32))


@join.defjvp
def _derivative_of_a_cast(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array]:
    return join(*primals), tangents[0].astype(jnp.float32)


# --- Floats as integers -----------------------------------------------------------------------------------


def bits(x: jax.Array) -> jax.Array:
    """The bits of a real `x` as a float32."""
    return jax.lax.bitcast_convert_type(_as_float32(x), jnp.uint32)


def _as_float32(x: jax.Array) -> jax.Array:
    """`x` as a float32. A float64 beyond its range saturates."""
    if x.dtype == jnp.float64:
        limit = float(np.finfo(np.float32).max) / 2
        x = jnp.clip(x, -limit, limit)
    return x.astype(jnp.float32)


def _upper_half(word: jax.Array) -> jax.Array:
    return _float32(word & np.uint32(0xFFFF0000))


def _float32(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
