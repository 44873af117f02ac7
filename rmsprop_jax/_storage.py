"""How an accumulator is kept: its dtype and its sharding. Arrays only, no trees."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import shard_alike
from jax.typing import ArrayLike, DTypeLike


def compute_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype for arithmetic on `dtype`, and for averages of it: at least float32.

    Half precision cannot hold an average: in bfloat16 0.999 is 1.0, and in float16 1e-8
    is 0 and 300² is inf.
    """
    return np.result_type(np.float32 if jnp.finfo(dtype).bits < 32 else dtype)


def real_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype of |x| for x of `dtype`."""
    return np.dtype(jnp.finfo(dtype).dtype)


def full_like(param: Any, value: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """A fresh array full of `value` with `param`'s shape and sharding, and its own `dtype`."""
    array = jnp.full_like(param, value, dtype)
    if isinstance(param, Tracer):
        # Under jit on an Auto mesh nothing ties a constant to its parameter: XLA would
        # replicate it, or leave it on one device.
        _, array = shard_alike.shard_alike(param, array)
    return array
