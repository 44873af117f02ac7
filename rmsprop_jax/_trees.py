"""Trees of gradients and parameters: leaves in one order, and errors that name a leaf by its path."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_flatten_with_path

from ._text import listed


__all__ = ["checked_dtype", "checked_mask", "map_leaves", "params_with_gradients", "without_float0"]


_Flat = tuple[list[tuple[Any, Any]], Any]  # leaves with their paths, and the structure


def _flatten(tree: Any) -> _Flat:
    """Flattens a tree in which None is a leaf: a gradient that is missing, or a parameter that does not train."""
    return tree_flatten_with_path(tree, is_leaf=lambda x: x is None)


def _column(flat: _Flat, tree: Any, name: str, kind: str) -> list[Any]:
    """The leaves of `tree`, which must have the structure of `flat`. `name` and `kind` are for the error."""
    (leaves, treedef), (others, other_treedef) = flat, _flatten(tree)
    if treedef == other_treedef:
        return [leaf for _, leaf in others]
    ours, theirs = ({keystr(path) for path, _ in side} for side in (leaves, others))
    lacking = [f"no {kind} for {path} of {name}" for path in sorted(theirs - ours)]
    surplus = [f"no {path} in {name} for its {kind}" for path in sorted(ours - theirs)]
    differences = listed(lacking + surplus, "; ") or f"{treedef} is not {other_treedef}"
    raise ValueError(f"the {kind}s must have the structure of {name}: {differences}")


def map_leaves(
    function: Callable[[Any, Any, Any, dict[str, Any]], tuple[Any, Mapping[str, Any]]],
    kind: str,
    updates: Any,
    params: Any,
    slots: Mapping[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """New updates and new slots: `function(path, update, param, of_slots) -> (update, of_slots)` for each leaf.

    Where an update is None, its slots stay as they are. `params`, if there are any, and the trees in `slots` must have
    the structure of `updates`, and arrays of the same shapes. `kind` is for errors.
    """
    flat = leaves, treedef = _flatten(updates)
    of_params = [None] * len(leaves) if params is None else _column(flat, params, "params", kind)
    columns = {name: _column(flat, tree, f"state.{name}", kind) for name, tree in slots.items()}
    new: list[Any] = [None] * len(leaves)
    for i, ((path, leaf), param) in enumerate(zip(leaves, of_params, strict=True)):
        if leaf is None:
            continue
        of_slots = {name: column[i] for name, column in columns.items()}
        for name, x in [("parameter", param), *((f"state.{name}", x) for name, x in of_slots.items())]:
            if x is not None and jnp.shape(x) != jnp.shape(leaf):
                found = f"{kind}{keystr(path)} has shape {jnp.shape(leaf)}"
                raise ValueError(f"{found}, but its {name} has {jnp.shape(x)}: they must be equal")
        new[i], of_slots = function(path, leaf, param, of_slots)
        for name, x in of_slots.items():
            columns[name][i] = x
    return treedef.unflatten(new), {name: treedef.unflatten(column) for name, column in columns.items()}


def params_with_gradients(updates: Any, params: Any, option: str, mask: Any = None) -> Any:
    """`params`, which `option` needs, with None where there is no gradient or the mask is False."""
    if params is None:
        raise ValueError(f"{option} needs params: call update(updates, state, params)")
    flat = leaves, treedef = _flatten(updates)
    given = _column(flat, params, "params", "gradient")
    selected = given if mask is None else _column(flat, _masked(params, mask), "params", "gradient")

    def leaf(path: Any, grad: Any, given: Any, selected: Any) -> Any:
        if grad is None:
            return None
        if given is None:
            raise ValueError(f"params{keystr(path)} is None, and there is a gradient for it: pass None as the gradient")
        if selected is not None:
            checked_dtype("parameter", path, selected)
        return selected

    columns = zip(leaves, given, selected, strict=True)
    return treedef.unflatten(leaf(path, grad, param, kept) for (path, grad), param, kept in columns)


def checked_mask(mask: Any) -> Any:
    """Checks the argument `weight_decay_mask`, as far as it tells without parameters."""
    if isinstance(mask, (bool, np.bool_, jax.Array, np.ndarray)):
        # optax.inject_hyperparams calls whatever can be called, with the count.
        raise TypeError(
            f"weight_decay_mask is a single {type(mask).__name__}: allowed are a tree of booleans and a function of "
            "the parameters; with optax.inject_hyperparams, name it in static_args"
        )
    return mask


def _masked(params: optax.Params, mask: Any) -> optax.Params:
    """`params` with None where the mask is False."""

    def select(path: Any, keep: Any, subtree: Any) -> Any:
        if not isinstance(keep, (bool, np.bool_)):
            # The mappings and lists of configuration systems, which JAX does not know.
            foreign = hasattr(keep, "keys") or hasattr(keep, "append")
            way_out = ". Convert it with OmegaConf.to_container(mask) or mask.to_dict()" if foreign else ""
            raise TypeError(
                f"weight_decay_mask{keystr(path)} has type {type(keep).__name__}: allowed are True and False{way_out}"
            )
        return subtree if keep else jax.tree.map(lambda _: None, subtree)

    # As in optax.masked: an Equinox module of booleans is a tree, although it can be called.
    tree = mask(params) if callable(mask) and all(map(callable, jax.tree.leaves(mask))) else mask
    try:
        return jax.tree.map_with_path(select, tree, params)
    except ValueError as error:
        raise ValueError(f"weight_decay_mask must be a tree like the parameters', or a prefix of it: {error}") from None


def without_float0(updates: optax.Updates) -> optax.Updates:
    """Gradients of integers, as jax.grad(..., allow_int=True) makes them, become None. All others must be arrays."""
    float0 = jax.dtypes.float0  # a NumPy array outside of jit, and a tracer, which is a jax.Array, inside
    if all(isinstance(x, jax.Array) and x.dtype != float0 for x in jax.tree.leaves(updates)):
        return updates

    def leaf(path: Any, grad: Any) -> Any:
        if getattr(grad, "dtype", None) == float0:
            return None
        checked_dtype("gradient", path, grad)
        return grad

    return jax.tree.map_with_path(leaf, updates)


_NUMBERS = (bool, int, float, complex)
_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)


def checked_dtype(kind: str, path: Any, leaf: Any) -> Any:
    """The dtype of a leaf, which must be a number or an array of numbers. `kind` is for the error."""
    ours = isinstance(leaf, (*_NUMBERS, *_ARRAYS)) or hasattr(leaf, "__jax_array__")
    dtype = (jnp.result_type(leaf) if isinstance(leaf, _NUMBERS) else leaf.dtype) if ours else None
    if dtype is not None and (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
        return dtype
    found = f"type {type(leaf).__name__}" if dtype is None else f"dtype {dtype}"
    way_out = "Leave it out with eqx.filter(tree, eqx.is_inexact_array) or optax.masked"
    if dtype is None and hasattr(leaf, "shape"):
        library = type(leaf).__module__.partition(".")[0]
        found += f" of {library}"
        way_out = (
            f"Convert it with jnp.asarray({'x.detach().cpu().numpy()' if library == 'torch' else 'np.asarray(x)'})"
        )
    raise TypeError(f"{kind}{keystr(path)} has {found}: allowed are JAX and NumPy arrays of numbers. {way_out}")
