"""Arrays and counts as other frameworks hand them over."""

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .. import _checks


__all__ = ["array", "mapping", "pairs", "updates", "whole"]


def array(key: str, x: Any, allowed: str = "an array of numbers") -> np.ndarray:
    """Any framework's array, or nested lists of numbers as in JSON, in float64: E[g²] - E[g]² then loses nothing more.

    What is no array of real numbers is an error. Its name in the checkpoint and `allowed` are for that.
    """
    if isinstance(x, Tracer):
        raise ValueError(f"{key} is traced: read checkpoints outside of jax.jit")
    try:
        found = np.asarray(_strided(x))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{key} is a {type(x).__name__} that NumPy cannot read, so convert it: {error}") from error
    if np.iscomplexobj(found):
        raise ValueError(
            f"{key} is complex: make real arrays of complex accumulators with torch.view_as_real, and a NamedTuple of "
            "`real` and `imaginary` in convert. Then use optax.contrib.split_real_and_imaginary(tx)"
        )
    if found.dtype == np.dtype("V2"):  # HDF5 and npz files forget that this is bfloat16
        found = found.view(jnp.bfloat16)
    is_number = jnp.issubdtype(found.dtype, jnp.floating) or jnp.issubdtype(found.dtype, jnp.integer)
    if not is_number or found.dtype.kind == "m":  # to NumPy, a timedelta64 is an integer
        raise ValueError(f"{key} is {reprlib.repr(x)}: allowed is {allowed}")
    return found.astype(np.float64)


def _strided(x: Any) -> Any:
    """A torch tensor of any kind as one that NumPy reads; everything else as it is."""
    if hasattr(x, "full_tensor"):  # a DTensor, which FSDP spreads over devices
        x = x.full_tensor()
    if not hasattr(x, "detach"):
        return x
    x = x.detach().cpu()
    if getattr(x, "is_quantized", False):
        x = x.dequantize()
    # Paddle's dense tensors have this method as well, and it fails.
    if str(getattr(x, "layout", "")).startswith(("torch.sparse", "torch._mkldnn")):
        x = x.to_dense()
    # NumPy has no bfloat16.
    return x.double() if hasattr(x, "double") and x.is_floating_point() else x


LOAD = "Load a file first, as the documentation shows"


def mapping(
    found: Any, content: str = "arrays by name", name: str = "checkpoint", way_out: str = LOAD
) -> Mapping[str, Any]:
    """What is found, if it is a mapping from strings. The other arguments are for errors."""
    if not isinstance(found, Mapping):
        kind = f"{name}={reprlib.repr(found)} is a {type(found).__name__}"
        raise ValueError(f"{kind}: allowed is a mapping of {content}. {way_out}")
    if strange := [key for key in found if not isinstance(key, str)]:
        raise ValueError(f"{name} has the key {strange[0]!r}: allowed is a mapping of {content}, with strings as keys")
    return found


def pairs(variables: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values, from pairs of them or from nested mappings such as the groups of an HDF5 file."""
    items = variables.items() if isinstance(variables, Mapping) else variables
    if isinstance(items, (str, bytes)) or not hasattr(items, "__iter__"):
        mapping(items, "variables by path, or pairs of path and array")
    for item in items:
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            allowed = "pairs of path and array, such as (v.path, v.numpy())"
            raise ValueError(f"checkpoint has {reprlib.repr(item)}: allowed are {allowed}")
        name, value = item
        if isinstance(value, Mapping):
            yield from pairs(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def updates(count: Any, stored: Mapping[str, Any]) -> int:
    """The updates made: what the caller says, or else the one number that the checkpoint has."""
    if count is not None:
        return whole("count", count)
    found = {key: whole(key, x) for key, x in stored.items()}
    if len(set(found.values())) > 1:
        raise ValueError(f"the checkpoint has several counts, which differ: {found}. Pass the right one as count")
    if not found:
        raise ValueError("the checkpoint does not say how many updates were made: pass count, which schedules need")
    return next(iter(found.values()))


def whole(key: str, x: Any) -> int:
    """A count in any framework's array of one element."""
    found = array(key, x, allowed := _checks.COUNTS.format(0))
    if found.size != 1:
        raise ValueError(f"{key} has shape {found.shape}: allowed is {allowed}")
    value = found.item()
    return _checks.count(key, int(value) if value.is_integer() else value)
