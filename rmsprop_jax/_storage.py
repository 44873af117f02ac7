"""How an accumulator is kept: its dtype, its bits and its sharding. Arrays only, no trees.

`bfloat16` and the one-byte codes are the upper bits of a float32, rounded stochastically. An average moves by a
fraction 1-ρ of itself per update, far less than the gap between two codes: rounded to nearest, it
would never move. A `uint8` code holds 7 bits of the exponent and 1 of the mantissa::

    code = (bits(max(x, 2⁻⁹⁰)) - bits(2⁻⁹⁰) + r) >> 22       r: 22 random bits
    x    = float((code << 22) + bits(2⁻⁹⁰))

It stands for 2⁻⁹⁰ · {1, 1.5, 2, 3, 4, 6, ...} up to 1.5 · 2³⁷. There is no sign, no zero and no scale
beside it. The bits of a float are linear in its value between two codes, so the mean over r is exact.

An `int8` code has a sign, 5 bits of the exponent and 2 of the mantissa, of |x| + 2⁻²² so that there is
a zero. It stands for ± 2⁻²² · {0, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 4, ...} up to 1.75 · 2⁹, and -128 for NaN.
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike


# What a user can ask for instead of the dtype in which an accumulator is computed.
STATE_DTYPES = (np.dtype(jnp.bfloat16), np.dtype(jnp.uint8))

Seed = tuple[jax.Array, jax.Array]


class Accumulator(NamedTuple):
    """One accumulator of one array: what the state holds, and its value for the arithmetic."""

    kept: jax.Array
    value: jax.Array
    noise: jax.Array | None = None  # random bits; None where nothing is rounded

    def set(self, x: jax.Array) -> "Accumulator":
        """Keeps `x`. The new value is what the state can hold of it."""
        kept = store(x, self.kept.dtype, self.noise)
        return Accumulator(kept, _load(kept).astype(x.dtype), self.noise)

    @property
    def largest(self) -> float:
        """A bound for |g|² and for the square of each component of g, so that an average can be kept.

        A uint8 code saturates. In a float an average of |g - μ|² over two components can reach 8 times
        the square of one, and rounded weights can add up to slightly more than one.
        """
        dtype = self.kept.dtype
        return float(_UNSIGNED.largest if dtype == jnp.uint8 else jnp.finfo(dtype).max / 16)


def read(
    kept: jax.Array, dtype: DTypeLike | None = None, seed: Seed | None = None, source: jax.Array | None = None
) -> Accumulator:
    """The accumulator that a state holds.

    Args:
        kept: what the state holds.
        dtype: of the value, by default that of `kept` or at least float32.
        seed: from `seeds`, needed only to `set` an accumulator whose dtype is rounded.
        source: the array, of the same shape, whose bits tell the elements' random bits apart.
    """
    value = _load(kept)
    random = noise(seed, source) if is_rounded(kept.dtype) and seed is not None and source is not None else None
    return Accumulator(kept, value if dtype is None else value.astype(dtype), random)


def is_rounded(dtype: DTypeLike) -> bool:
    """Whether an accumulator kept in `dtype` is rounded stochastically."""
    return dtype in (*STATE_DTYPES, jnp.int8)


def compute_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype for arithmetic on `dtype`, and for averages of it: at least float32.

    Half precision cannot hold an average: in bfloat16, 0.999 is 1.0; in float16, 1e-8 is 0 and 300² is inf.
    """
    wide = np.float32 if is_rounded(dtype) or jnp.finfo(dtype).bits < 32 else dtype
    return np.dtype(jax.dtypes.canonicalize_dtype(wide))


def real_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype of |x| for x of `dtype`."""
    return np.dtype(jnp.finfo(dtype).dtype)


def kept_dtype(dtype: DTypeLike, state_dtype: np.dtype | None, one_byte: DTypeLike) -> np.dtype:
    """The dtype that keeps an accumulator computed in `dtype`; `one_byte` where uint8 is asked for.

    There is no complex dtype of half precision, so complex accumulators stay as they are.
    """
    if state_dtype is None or jnp.issubdtype(dtype, jnp.complexfloating):
        return np.dtype(dtype)
    return np.dtype(one_byte) if state_dtype == jnp.uint8 else state_dtype


def full_like(param: Any, value: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """A new array of `param`'s shape and sharding that keeps `value`, rounded to nearest, in `dtype`."""
    if dtype in (jnp.uint8, jnp.int8):
        # abs, because -0 has a sign bit.
        value = store(jnp.abs(jnp.asarray(value, jnp.float32)), dtype, np.uint32(1 << 31))
    sharding = None if isinstance(param, Tracer) else getattr(param, "sharding", None)
    if sharding is not None and sharding.memory_kind not in (None, "device"):
        # The state is in device memory, also where the parameter is in host memory.
        return jnp.full_like(param, value, dtype, device=sharding.with_memory_kind("device"))
    array = jnp.full_like(param, value, dtype)
    if isinstance(param, Tracer):
        # Under jit on an Auto mesh nothing ties a constant to its parameter: XLA would replicate it,
        # or leave it on one device. So add a zero that depends on the parameter. XLA does not know
        # that it is zero when it propagates shardings. (jax.experimental.shard_alike does not work
        # here: its calls for arrays of one shape are lowered once, and share one sharding.)
        never = jax.lax.bitwise_and(jax.lax.ne(param, param), jax.lax.eq(param, param))
        zero = jax.lax.convert_element_type(never, dtype)
        # A parameter may live in host memory, where nothing can be added to it.
        array = jax.lax.add(array, jax.device_put(zero, jax.memory.Space.Device))
    return array


def seeds(count: jax.Array, purpose: str) -> Seed:
    """The a and b of `noise` for update number `count`. Another purpose, such as another slot, has others."""
    x = _once(count.astype(jnp.uint32)) * np.uint32(2) + np.uint32(zlib.crc32(purpose.encode()))
    return _once(_mix(x) | 1), _once(_mix(x + 1))


def noise(seed: Seed, *arrays: jax.Array) -> jax.Array:
    """Random bits for each element: a·bits(arrays) + b.

    They are uniform whatever the arrays hold, because b is. They are independent for elements that
    differ, because a is odd and new in each update. There is no key and no index in them, so neither
    the place of an element nor its neighbours matter.
    """
    a, b = seed
    bits = _bits(arrays[0])
    for array in arrays[1:]:
        # The bits of bfloat16 are in the upper half of a word; a multiplication carries nothing downwards.
        bits = (bits ^ (bits >> 16)) * np.uint32(0x9E3779B1) + _bits(array)
        bits = bits ^ (bits >> 15)
    return bits * a + b


def _mix(x: jax.Array) -> jax.Array:
    # lowbias32, https://nullprogram.com/blog/2018/07/31/
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _once(x: jax.Array) -> jax.Array:
    """`x`, computed once for all leaves. XLA repeats cheap scalar operations in the kernel of each leaf."""
    # It does not repeat a division. The two largest numbers become 0 and 1, and all others stay as they are.
    return x % np.uint32(0xFFFFFFFE)


class _Code(NamedTuple):
    """The upper bits of a float32 from `smallest` to `largest`, counted from those of `smallest`."""

    dropped: int  # bits of the mantissa that are left out
    smallest: np.float32  # in which these bits are 0
    largest: np.float32

    def encode(self, x: jax.Array, noise: Any) -> jax.Array:
        first, last = self.smallest.view(np.uint32), self.largest.view(np.uint32)
        # Clamped as bits, not as values: NaN has no code, and is kept as the largest.
        bits = jax.lax.clamp(first, _bits(x), last) - first
        # The bits left out exceed r with the right probability; this compares them at the top of a word.
        up = (bits << (32 - self.dropped)) > noise
        # The last operation has two arrays, because XLA's CPU backend recomputes what ends in an operation
        # on one array wherever it is read. Then the step would read the old codes, and they would have to be copied.
        return (bits >> self.dropped).astype(jnp.uint8) + up.astype(jnp.uint8)

    def decode(self, code: jax.Array) -> jax.Array:
        bits = (code.astype(jnp.uint32) << self.dropped) + self.smallest.view(np.uint32)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)


_UNSIGNED = _Code(22, np.float32(2.0**-90), np.float32(1.5 * 2.0**37))
_SIGNED = _Code(21, np.float32(2.0**-22), np.float32(1.75 * 2.0**9))  # of |x| + 2⁻²²
_NAN = np.int8(-128)


def store(x: jax.Array, dtype: DTypeLike, noise: Any) -> jax.Array:
    """What `dtype` keeps of `x`."""
    if dtype == jnp.uint8:
        return _UNSIGNED.encode(x, noise)
    if dtype == jnp.int8:
        size = _SIGNED.encode(jnp.abs(x) + float(_SIGNED.smallest), noise).astype(jnp.int8)
        return jnp.where(jnp.isnan(x), _NAN, jnp.where(x < 0, -size, size))
    return to_bfloat16(x, noise) if dtype == jnp.bfloat16 else x.astype(dtype)


def _load(kept: jax.Array) -> jax.Array:
    if kept.dtype == jnp.uint8:
        return _UNSIGNED.decode(kept)
    if kept.dtype == jnp.int8:
        size = _SIGNED.decode(jnp.abs(kept.astype(jnp.int32))) - _SIGNED.smallest
        return jnp.where(kept == _NAN, jnp.nan, jnp.where(kept < 0, -size, size))
    return kept.astype(compute_dtype(kept.dtype))


def to_bfloat16(x: jax.Array, noise: Any, rest: jax.Array | None = None) -> jax.Array:
    """Rounds to one of the two bfloat16 neighbours of `x`. The mean over the noise is `x`, or `x + rest`.

    `rest` is what float32 could not hold of `x`: at most half of its last place.
    """
    bits = _bits(x)
    upper = bits + (noise >> 16)
    if rest is not None:
        upper = upper + _carry(bits, rest, noise)
    upper = upper & np.uint32(0xFFFF0000)
    # The noise would carry NVIDIA's NaN, 0x7fffffff, over into -0. The select is of float32, and the
    # conversion comes last: XLA's CPU backend would widen a select of bfloat16, and recompute it from
    # the old state wherever it is read, which has to be copied for that.
    rounded = jax.lax.bitcast_convert_type(upper, jnp.float32)
    return jnp.where(jnp.isnan(x), x.astype(jnp.float32), rounded).astype(jnp.bfloat16)


def _carry(bits: jax.Array, rest: jax.Array, noise: jax.Array) -> jax.Array:
    """-1, 0 or 1 of the last place of a float32, so that the mean over the lower 16 bits of the noise is `rest`."""
    # Bits grow away from zero. Just below a power of two, numbers are twice as close as above it.
    outward = jnp.where(bits >> 31 == 1, -rest, rest)
    outward = jnp.where((outward < 0) & (bits & 0x7FFFFF == 0), 2 * outward, outward)
    exponent = jnp.minimum(bits & 0x7F800000, 0x7F000000)  # inf has none
    one_over_size = jax.lax.bitcast_convert_type(np.uint32(0x7F000000) - exponent, jnp.float32)
    places = jnp.floor(outward * one_over_size * np.float32(2.0 ** (23 + 16))).astype(jnp.int32)
    return (((noise & 0xFFFF).astype(jnp.int32) + places) >> 16).astype(jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    """The bits of `x` as a float32, saturated; of both components if complex."""
    if jnp.iscomplexobj(x):
        return _bits(x.real) + 3 * _bits(x.imag)
    if x.dtype != jnp.float32:
        limit = float(np.finfo(np.float32).max) / 2
        x = jnp.clip(x.astype(compute_dtype(x.dtype)), -limit, limit).astype(jnp.float32)
    return jax.lax.bitcast_convert_type(x, jnp.uint32)
