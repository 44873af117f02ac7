"""Accumulators by the names of their weights, as frameworks keep them, from and to trees of parameters."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from .. import _storage
from .._rmsprop import RMSPropState
from .._text import listed, repeated
from . import _carry, _rows


Arrays = dict[str, np.ndarray]
Convert = Callable[[Arrays], Any]
ConvertBack = Callable[[Any], Mapping[str, Any]]


# --- From a framework -------------------------------------------------------------------------------------


def state_of(
    slots: Mapping[str, Arrays],
    foreign: Mapping[str, str],
    convert: Convert | None,
    count: int,
    names: Iterable[str] = (),
) -> RMSPropState:
    """A state from arrays by our slots and by the weights' names.

    Args:
        slots: the arrays. ν is E[g²].
        foreign: the framework's names of the slots, for errors.
        convert: from arrays by name to a tree of parameters. None: the dict itself.
        count: of updates.
        names: of weights that must be there.
    """
    names = sorted(set(names).union(*slots.values()))
    lacking = {foreign[slot]: [name for name in names if name not in arrays] for slot, arrays in slots.items()}
    lacking = {slot: missing for slot, missing in lacking.items() if missing}
    if lacking or not names:
        raise ValueError(f"the checkpoint lacks {lacking or list(foreign.values())}")
    _check_shapes(slots, foreign)
    if negative := [name for name, x in slots["nu"].items() if (x < 0).any()]:
        raise ValueError(
            f"{foreign['nu']} of {listed(negative)} is negative: it averages no squares. Another optimizer's?"
        )
    convert = convert or dict
    try:
        _check_convert(convert, slots["nu"])
    except KeyError as error:
        hint = "; strip prefixes as `module.` in convert" if any("." in name for name in names) else ""
        raise ValueError(f"convert asks for {error}, the checkpoint has {names}{hint}") from error
    trees = {slot: convert(dict(arrays)) for slot, arrays in slots.items()}
    if "mu" in trees:
        trees["nu"] = jax.tree.map(_rows.variance, trees["nu"], trees["mu"])
    arrays = {slot: jax.tree.map(lambda x: jnp.array(x, jnp.float32), tree) for slot, tree in trees.items()}
    return RMSPropState(count=jnp.asarray(count, jnp.int32), **arrays)


def _check_shapes(slots: Mapping[str, Arrays], foreign: Mapping[str, str]) -> None:
    for name in slots["nu"]:
        shapes = {foreign[slot]: arrays[name].shape for slot, arrays in slots.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"the accumulators of {name} have different shapes: {shapes}")


def _check_convert(convert: Convert, arrays: Arrays) -> None:
    """Raises unless every element of `arrays` comes out of `convert`, which gets each array's number in its place."""
    # Odd numbers from 4097: float32 holds them, and neither float16 nor bfloat16 does.
    number = {name: 4097.0 + 2 * i for i, name in enumerate(arrays)}
    numbers = {name: np.full(x.shape, number[name]) for name, x in arrays.items()}
    leaves = {keystr(path): np.asarray(x) for path, x in tree_flatten_with_path(convert(numbers))[0]}
    for path, x in leaves.items():
        if not jnp.issubdtype(x.dtype, jnp.floating) or jnp.finfo(x.dtype).bits < 32:
            raise ValueError(
                f"convert makes {x.dtype} of {path or 'the array'}, and accumulators need float32: cast the weights "
                "after convert, not in it. from_rmsprop(state, tx.init(params)) keeps the state in fewer bytes"
            )
    values = np.concatenate([np.zeros(0), *(np.ravel(x.astype(np.float64)) for x in leaves.values())])
    times = dict(zip(*np.unique(values, return_counts=True), strict=True))
    found = {name: times.get(number[name], 0) for name in arrays}
    # convert drops an array on purpose by putting None in its place. One that it only pops may have been forgotten.
    kept = [name for name in arrays if numbers.get(name, found) is not None]
    if forgotten := [name for name in kept if found[name] < arrays[name].size]:
        repeated = [name for name, x in arrays.items() if found[name] > x.size]
        also = f", and uses more than once {repeated}" if repeated else ""
        drop = f"say so in convert: arrays[{forgotten[0]!r}] = None"
        raise ValueError(f"convert leaves out, or changes the values of, {forgotten}{also}. If they are to go, {drop}")


# --- To a framework ---------------------------------------------------------------------------------------


def arrays_of(
    state: Any, convert_back: ConvertBack, names: Iterable[str] | None = None
) -> tuple[np.ndarray, dict[str, Arrays]]:
    """The reverse of `state_of`: the count, and arrays by our slots and by the weights' names."""
    bare = _carry.bare(state, "a framework's checkpoint has no place for it")
    if np.shape(bare.count):
        raise ValueError(f"the count has shape {np.shape(bare.count)}: take one of the states that jax.vmap made")
    if masked := [keystr(path) for path, x in _rows.by_path(bare.nu).items() if _rows.is_masked(x)]:
        raise ValueError(f"the state has no accumulators for {listed(masked)}, which were masked")
    trees = {slot: jax.tree.map(_storage.decode, getattr(bare, slot)) for slot in _rows.Row._fields}
    if bare.mu is not None:
        trees["nu"] = jax.tree.map(_rows.second_moment, bare.nu, bare.mu)
    slots = {slot: convert_back(tree) for slot, tree in trees.items() if tree is not None}
    if names is not None:
        _check_names(list(names), list(slots["nu"]))
    # Contiguous: a framework does not want to own a transposed view.
    arrays = {
        slot: {name: array(x).astype(np.float32, order="C") for name, x in named.items()}
        for slot, named in slots.items()
    }
    return np.asarray(bare.count), arrays


def _check_names(names: list[str], found: list[str]) -> None:
    if twice := repeated(names):
        raise ValueError(f"names has a name more than once: {listed(twice)}")
    lacking, surplus = sorted(set(names) - set(found)), sorted(set(found) - set(names))
    if lacking or surplus:
        raise ValueError(f"convert_back lacks {lacking} of names, and has {surplus} beside them")


# --- Arrays and names as they come ------------------------------------------------------------------------


def array(x: Any) -> np.ndarray:
    """Any framework's array in float64, so that E[g²] - E[g]² loses nothing more."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x if x.is_complex() else x.double()  # NumPy has no bfloat16
    x = np.asarray(x)
    if np.iscomplexobj(x):
        raise ValueError(
            "complex accumulators: frameworks average the squares of the real and the imaginary part apart, or g² "
            "itself. Make real arrays of them, such as torch.view_as_real makes, which convert takes apart into a "
            "NamedTuple of `real` and `imaginary`, and go on with optax.contrib.split_real_and_imaginary(tx)"
        )
    return x.astype(np.float64)


def pairs(variables: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values, from pairs of them or from nested mappings such as the groups of an HDF5 file."""
    for name, value in variables.items() if isinstance(variables, Mapping) else variables:
        if isinstance(value, Mapping):
            yield from pairs(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def by_slot(
    foreign: Mapping[str, str], found: Iterable[tuple[str, str, Any]], names: Mapping[str, str] | None = None
) -> dict[str, Arrays]:
    """Arrays by our slots and by the weights' names.

    Args:
        foreign: the framework's names of our slots.
        found: for each array the framework's name of its slot, the framework's name of its weight, and the array.
        names: from the framework's names of the weights to others. None: the framework's.
    """
    slot_of = {kind: slot for slot, kind in foreign.items()}
    named = [(slot_of[kind], (names or {}).get(name, name), x) for kind, name, x in found]
    if twice := repeated(f"{foreign[slot]} of {name}" for slot, name, _ in named):
        raise ValueError(f"the checkpoint has {listed(twice)} twice")
    slots: dict[str, Arrays] = {slot: {} for slot in foreign if slot in {"nu"}.union(slot for slot, *_ in named)}
    for slot, name, x in named:
        slots[slot][name] = array(x)
    return slots


def count_of(given: int | None, stored: Any) -> int:
    """The updates made: what the caller says, or else what the checkpoint says."""
    if given is None and stored is None:
        raise ValueError("the checkpoint does not say how many updates were made: pass count, for schedules")
    count = array(stored if given is None else given).item()
    if count < 0 or count % 1:
        raise ValueError(f"count={count:g}: allowed are 0 and positive integers")
    return int(count)


def somebody_else(ours: str, others: Mapping[str, str], kinds: Iterable[str], found: Iterable[str]) -> ValueError:
    """The error for the checkpoint of another optimizer, which the names of its slots give away."""
    kind = next((kind for slot, kind in others.items() if slot in set(kinds)), "another optimizer")
    return ValueError(f"not the checkpoint of {ours}, but of {kind}: it has {listed(found) or 'nothing'}")
