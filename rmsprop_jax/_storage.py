"""How an accumulator is kept: its dtype, its bits and its sharding. Arrays only, no trees.

`bfloat16` and `uint8` are the upper bits of a float32, rounded stochastically: an average moves by a
part in 1/(1-ρ) per update, far less than the distance of two codes, and rounding to nearest would
leave it where it is for good. `uint8` takes 7 bits of the exponent and 1 of the mantissa::

    code = (bits(max(x, 2⁻⁹⁰)) - bits(2⁻⁹⁰) + r) >> 22       r: 22 random bits, or: the lower
    x    = float((code << 22) + bits(2⁻⁹⁰))                   22 exceed r, one code more

that is 2⁻⁹⁰ · {1, 1.5, 2, 3, 4, 6, ...}, up to 1.5 · 2³⁷: no sign, no zero, no scales beside it. The
bits of a float are linear between two codes, so that the mean over r is exactly x.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike


# What an accumulator can be kept in beside what it is computed in.
STATE_DTYPES = (np.dtype(jnp.bfloat16), np.dtype(jnp.uint8))

_SMALLEST = np.float32(2.0**-90).view(np.uint32)
_LARGEST = np.float32(1.5 * 2.0**37).view(np.uint32)
_BELOW = np.uint8(_SMALLEST >> 22)  # patterns of 10 bits below the first code


def compute_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype for arithmetic on `dtype`, and for averages of it: at least float32.

    Half precision cannot hold an average: in bfloat16 0.999 is 1.0, and in float16 1e-8
    is 0 and 300² is inf.
    """
    return np.result_type(np.float32 if dtype == jnp.uint8 or jnp.finfo(dtype).bits < 32 else dtype)


def real_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype of |x| for x of `dtype`."""
    return np.dtype(jnp.finfo(dtype).dtype)


def kept_dtype(dtype: DTypeLike, state_dtype: np.dtype | None, non_negative: bool) -> np.dtype:
    """The dtype in which an accumulator that is computed in `dtype` is kept.

    A code has no sign, so that uint8 keeps a signed accumulator in bfloat16; and there is
    no complex dtype of half precision, so that a complex one stays as it is.
    """
    if state_dtype is None or jnp.issubdtype(dtype, jnp.complexfloating):
        return np.dtype(dtype)
    return state_dtype if non_negative else np.dtype(jnp.bfloat16)


def largest(dtype: DTypeLike) -> float:
    """The largest value that can be kept in `dtype`."""
    return float(_LARGEST.view(np.float32) if dtype == jnp.uint8 else jnp.finfo(dtype).max)


def full_like(param: Any, value: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """A fresh array with `param`'s shape and sharding that keeps `value`, to nearest, in `dtype`."""
    if dtype == jnp.uint8:
        # abs, because -0 has a sign bit.
        value = _encode(jnp.abs(jnp.asarray(value, jnp.float32)), np.uint32(1 << 31))
    array = jnp.full_like(param, value, dtype)
    if isinstance(param, Tracer):
        # Under jit on an Auto mesh nothing ties a constant to its parameter: XLA would
        # replicate it, or leave it on one device. So zero is added that depends on it: XLA, when
        # it hands shardings on, does not know that it is zero. (jax.experimental.shard_alike does
        # not do: its calls for arrays of one shape are lowered once, for one sharding.)
        never = jax.lax.bitwise_and(jax.lax.ne(param, param), jax.lax.eq(param, param))
        array = jax.lax.add(array, jax.lax.convert_element_type(never, dtype))
    return array


def load(kept: jax.Array) -> jax.Array:
    """The values of an accumulator, in at least float32."""
    if kept.dtype == jnp.uint8:
        return jax.lax.bitcast_convert_type((kept.astype(jnp.uint32) << 22) + _SMALLEST, jnp.float32)
    return kept.astype(compute_dtype(kept.dtype))


def store(x: jax.Array, dtype: DTypeLike, seed: tuple[jax.Array, jax.Array], grad: jax.Array) -> jax.Array:
    """Keeps `x` in `dtype`: the reverse of `load`, in the mean over seeds.

    The random bits of an element are a·bits(gradient) + b: uniform for any gradient, zero too,
    because b is, and independent for different gradients, because a is odd and another one in
    each update. There is neither a key nor an index in them: where an element lives, and with
    which neighbours, changes nothing.
    """
    if dtype not in STATE_DTYPES:
        return x.astype(dtype)
    a, b = seed
    noise = _bits(grad) * a + b
    return _encode(x, noise) if dtype == jnp.uint8 else _upper_half(x, noise)


def seeds(count: jax.Array, salt: int) -> tuple[jax.Array, jax.Array]:
    """a and b for the update of that number; another pair for another `salt`, below 4."""
    x = count.astype(jnp.uint32) * np.uint32(8) + np.uint32(2 * salt)
    return _mixed(x) | 1, _mixed(x + 1)


def _mixed(x: jax.Array) -> jax.Array:
    # lowbias32, https://nullprogram.com/blog/2018/07/31/
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _encode(x: jax.Array, noise: Any) -> jax.Array:
    # Clamped as bits, not as values, so that NaN, which has no code, is kept as the largest.
    bits = jax.lax.clamp(_SMALLEST, _bits(x), _LARGEST)
    up = (bits << 10) > noise
    # Modulo 256: the two bits above fall off. Two arrays are subtracted last, because XLA's CPU
    # backend computes anew, wherever it is read, what ends in an operation on one array; then
    # the step would read the old codes, and they would have to be copied.
    return (bits >> 22).astype(jnp.uint8) - jnp.where(up, _BELOW - 1, _BELOW)


def _upper_half(x: jax.Array, noise: jax.Array) -> jax.Array:
    upper = ((_bits(x) + (noise >> 16)) >> 16).astype(jnp.uint16)
    # NVIDIA's NaN is 0x7fffffff, which the noise would carry over into -0.
    return jnp.where(jnp.isnan(x), jnp.bfloat16(jnp.nan), jax.lax.bitcast_convert_type(upper, jnp.bfloat16))


def _bits(x: jax.Array) -> jax.Array:
    """The bits of x as float32, saturated; of both parts if complex."""
    if jnp.iscomplexobj(x):
        return _bits(x.real) + 3 * _bits(x.imag)
    if x.dtype != jnp.float32:
        limit = np.finfo(np.float32).max / 2
        x = jnp.clip(x, -limit, limit).astype(jnp.float32)
    return jax.lax.bitcast_convert_type(x, jnp.uint32)
