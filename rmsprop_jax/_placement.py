"""Where new arrays are placed: their sharding and their memory."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike


__all__ = ["full_like", "place_like", "zero_count"]


def full_like(param: Any, value: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """A new array of `param`'s shape and sharding, filled with `value`, in device memory."""
    sharding = _sharding(param)
    if sharding is not None and sharding.memory_kind not in (None, "device"):
        return jnp.full_like(param, value, dtype, device=sharding.with_memory_kind("device"))
    array = jnp.full_like(param, value, dtype)
    if isinstance(param, Tracer):
        # Under jit on an Auto mesh, XLA does not shard a constant like its parameter: it replicates it, or keeps it on
        # one device (test_sharding.py). So add a zero that depends on the parameter. XLA does not know that it is
        # zero when it propagates shardings. (jax.experimental.shard_alike does not work here: its calls for
        # arrays of one shape are lowered once, and share one sharding.)
        never = jax.lax.bitwise_and(jax.lax.ne(param, param), jax.lax.eq(param, param))
        zero = jax.lax.convert_element_type(never, dtype)
        # A parameter may live in host memory, where nothing can be added to it. (Only then: jax.shard_map refuses
        # device_put outside of jax.jit.)
        if jax.typeof(zero).memory_space != jax.memory.Space.Device:
            zero = jax.device_put(zero, jax.memory.Space.Device)
        array = jax.lax.add(array, zero)
    return array


def zero_count(params: Any) -> jax.Array:
    """A count of updates, on the mesh of the parameters."""
    # Otherwise the first update would move it to the mesh, and the second would compile again.
    for leaf in jax.tree.leaves(params):
        sharding = _sharding(leaf)
        if isinstance(sharding, NamedSharding):
            return jnp.zeros((), jnp.int32, device=NamedSharding(sharding.mesh, PartitionSpec()))
    return jnp.zeros((), jnp.int32)


def place_like(value: jax.Array, like: Any) -> jax.Array:
    """A copy of `value` with the sharding of `like`, if `like` was placed explicitly."""
    value = jnp.array(value, copy=True)
    sharding, own = _sharding(like), _sharding(value)
    if isinstance(getattr(sharding, "mesh", None), AbstractMesh):
        # Of jax.eval_shape on an Explicit mesh, which knows no devices: those of the value, if its mesh is like that.
        like_it = isinstance(own, NamedSharding) and own.mesh.abstract_mesh == sharding.mesh
        sharding = NamedSharding(own.mesh, sharding.spec) if like_it else None
    if isinstance(value, Tracer) or sharding is None or not getattr(like, "committed", True):
        return value
    # Of a copy: even with may_alias=False, device_put of an array on one device to a mesh shares the buffer there
    # (tests/test_carry.py, test_the_result_has_the_new_state_s_shardings).
    return jax.device_put(value, sharding)


def _sharding(array: Any) -> Any:
    """The sharding of a concrete array. A tracer's is not known yet."""
    return None if isinstance(array, Tracer) else getattr(array, "sharding", None)
