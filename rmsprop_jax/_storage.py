"""How an accumulator is kept: the dtype of the state, the dtype of the arithmetic, and the conversion between them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from . import _bits, _placement


__all__ = ["Accumulator", "compute_dtype", "decode", "is_rounded", "new", "real_dtype", "recode", "saturate", "widened"]


class Accumulator(NamedTuple):
    """One accumulator of one array, as the state keeps it and as a value for the arithmetic."""

    encoded: jax.Array
    value: jax.Array
    noise: jax.Array | None = None  # random bits; None where nothing is rounded

    def set(self, x: jax.Array) -> "Accumulator":
        """Keeps `x`. The new value is `x` as the state holds it."""
        encoded = _encode(x, self.encoded.dtype, self.noise)
        return Accumulator(encoded, decode(encoded).astype(x.dtype), self.noise)

    @property
    def largest(self) -> float:
        """A bound for |g|² and for the square of each component of g, so that an average can be kept.

        A uint8 code saturates. In a float an average of |g - μ|² over two components can reach 8 times
        the square of one, and rounded weights can add up to slightly more than one.
        """
        code = _bits.CODES.get(self.encoded.dtype)
        return float(code.largest if code else jnp.finfo(self.encoded.dtype).max / 16)


def _encode(x: jax.Array, dtype: DTypeLike, noise: Any) -> jax.Array:
    """Rounds `x` to `dtype`: stochastically if `dtype` is narrow, where `noise` is random bits."""
    if code := _bits.CODES.get(np.dtype(dtype)):
        return code.encode(x, noise)
    return _bits.to_bfloat16(x, noise) if dtype == jnp.bfloat16 else x.astype(dtype)


def decode(encoded: jax.Array) -> jax.Array:
    """The value of an array in the state, in at least float32."""
    code = _bits.CODES.get(encoded.dtype)
    return code.decode(encoded) if code else encoded.astype(compute_dtype(encoded.dtype))


def recode(encoded: jax.Array, dtype: DTypeLike, count: jax.Array, purpose: str) -> jax.Array:
    """Converts an array of a state to another dtype. `count` and `purpose` choose the random bits."""
    if encoded.dtype == dtype:
        return encoded
    value = decode(encoded)
    return _encode(value, dtype, _bits.noise(_bits.seeds(count, purpose), value) if is_rounded(dtype) else None)


def new(param: Any, value: ArrayLike, state_dtype: np.dtype | None, narrowest: np.dtype) -> jax.Array:
    """A new array of `param`'s shape and sharding that keeps `value`, rounded to nearest.

    Its dtype is that of the arithmetic, `state_dtype`, or `narrowest` where one byte is asked for. If `narrowest` is
    unsigned, it is real. There is no complex dtype of half precision, so complex accumulators stay as they are.
    """
    dtype = compute_dtype(jnp.result_type(param))
    if jnp.issubdtype(narrowest, jnp.unsignedinteger):
        dtype = real_dtype(dtype)
    if state_dtype is not None and not jnp.issubdtype(dtype, jnp.complexfloating):
        dtype = narrowest if state_dtype == jnp.uint8 else state_dtype
    if dtype in _bits.CODES:
        # abs, because -0 has a sign bit.
        value = _encode(jnp.abs(jnp.asarray(value, jnp.float32)), dtype, np.uint32(1 << 31))
    return _placement.full_like(param, value, dtype)


def is_rounded(dtype: DTypeLike) -> bool:
    """Whether an accumulator kept in `dtype` is rounded stochastically."""
    return dtype == jnp.bfloat16 or np.dtype(dtype) in _bits.CODES


def compute_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype for arithmetic on `dtype`, and for averages of it: at least float32.

    Half precision cannot hold an average: bfloat16 rounds 0.999 to 1, and float16 rounds 1e-8 to 0 and 300² to inf.
    """
    wide = np.float32 if is_rounded(dtype) or jnp.finfo(dtype).bits < 32 else dtype
    return np.dtype(jax.dtypes.canonicalize_dtype(wide))


def widened(x: ArrayLike) -> jax.Array:
    """`x` in the dtype for arithmetic on it."""
    return jnp.asarray(x, compute_dtype(jnp.result_type(x)))


def real_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype of |x| for x of `dtype`."""
    return np.dtype(jnp.finfo(dtype).dtype)


def saturate(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`x` in `dtype`. A finite number beyond the range of float16 becomes its largest."""
    if dtype == jnp.float16:
        largest = float(jnp.finfo(jnp.float16).max)
        x = jnp.where(jnp.isinf(x), x, jnp.clip(x, -largest, largest))
    return x.astype(dtype)
