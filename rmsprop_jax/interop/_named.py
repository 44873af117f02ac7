"""What all readers and writers do: from and to arrays by slot and by the name of their weight."""

import collections
import functools
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from .. import _carry, _states, _storage
from .._rmsprop import RMSPropState
from .._text import listed, repeated
from ._arrays import array, updates


__all__ = ["Arrays", "Convert", "ConvertBack", "Entry", "Optimizer", "arrays_of", "somebody_else", "state_of"]

Arrays = dict[str, np.ndarray]
Convert = Callable[[Arrays], Any]
ConvertBack = Callable[[Any], Mapping[str, Any]]


class Optimizer(NamedTuple):
    """The RMSProp of a framework, as its checkpoints show it."""

    title: str
    slots: Mapping[str, str]  # its names of our slots
    always: Sequence[str] = ("nu",)  # those of our slots that it writes with all options
    others: Mapping[str, str] = {}  # other optimizers, by slots that RMSProp does not have


class Entry(NamedTuple):
    """One array of a checkpoint."""

    slot: str  # the framework's name of it
    name: str  # of the weight
    array: Any
    key: str  # what the checkpoint calls it


# --- From a framework -------------------------------------------------------------------------------------


def state_of(
    optimizer: Optimizer,
    entries: Sequence[Entry],
    convert: Convert | None,
    count: int | None,
    stored: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...] | None] | None = None,
) -> RMSPropState:
    """The state from all accumulators of a checkpoint, in any order. Its ν is E[g²].

    `stored` has the checkpoint's own counts, by its names for them; `shapes` those of the weights that must be there,
    by name, and None where nobody knows.
    """
    slots = _by_slot(optimizer, entries)
    _check_slots(optimizer, slots, shapes or {})
    made, convert = updates(count, stored), _function("convert", dict if convert is None else convert)
    try:
        _check_use("convert", convert, slots["nu"])
    except KeyError as error:
        found = f"the checkpoint has {sorted(slots['nu'])}"
        raise ValueError(f"convert asks for {error}, but {found}: strip prefixes like `module.` there") from error
    trees = {slot: jax.tree.map(np.asarray, convert(dict(arrays))) for slot, arrays in slots.items()}
    if "mu" in trees:
        trees["nu"] = jax.tree.map(_states.variance, trees["nu"], trees["mu"])
    arrays = {slot: jax.tree.map(lambda x: jnp.array(x, jnp.float32), tree) for slot, tree in trees.items()}
    return RMSPropState(count=jnp.asarray(made, jnp.int32), **arrays)


def _by_slot(optimizer: Optimizer, entries: Sequence[Entry]) -> dict[str, Arrays]:
    """The arrays by our slots and by name; raises if they are not this optimizer's."""
    kinds, theirs = {entry.slot for entry in entries}, optimizer.slots
    if not kinds <= set(theirs.values()) or theirs["nu"] not in kinds:
        foreign = [entry.key for entry in entries if entry.slot not in theirs.values()]
        raise somebody_else(optimizer, kinds, foreign or [entry.key for entry in entries])
    for kind, name in repeated((entry.slot, entry.name) for entry in entries):
        both = " and ".join(entry.key for entry in entries if (entry.slot, entry.name) == (kind, name))
        raise ValueError(f"the checkpoint has {kind} of {name} twice, and they cannot be told apart: {both}")
    return {
        slot: {entry.name: array(entry.key, entry.array) for entry in entries if entry.slot == kind}
        for slot, kind in theirs.items()
        if kind in kinds or slot in optimizer.always
    }


def somebody_else(optimizer: Optimizer, kinds: Iterable[str], found: Iterable[Any]) -> ValueError:
    """The error for the checkpoint of another optimizer, which the names of its slots or options give away."""
    kinds, found = set(kinds), listed(found)
    refused = f"not the checkpoint of {optimizer.title}, but of "
    if not found:
        return ValueError(f"{refused}one without accumulators, such as SGD: it has no accumulators")
    kind = next((kind for slot, kind in optimizer.others.items() if slot in kinds), None)
    mixed = "" if kind or optimizer.slots["nu"] not in kinds else " beside it. Pass the optimizer's arrays alone"
    return ValueError(f"{refused}{kind or 'another optimizer'}: it has {found}{mixed}")


def _check_slots(
    optimizer: Optimizer, slots: Mapping[str, Arrays], known: Mapping[str, tuple[int, ...] | None]
) -> None:
    """Raises unless every weight has every slot, in its own shape, and ν is no average of something else."""
    theirs, names = optimizer.slots, set(known).union(*slots.values())
    if lacking := {theirs[slot]: sorted(names - x.keys()) for slot, x in slots.items() if names - x.keys()}:
        raise ValueError(f"the checkpoint lacks {lacking}, which {optimizer.title} writes with these options")
    for name in slots["nu"]:
        shapes = {theirs[slot]: arrays[name].shape for slot, arrays in slots.items()} | {"weight": known.get(name)}
        if len({*shapes.values()} - {None}) > 1:
            raise ValueError(f"{name} has arrays of different shapes: {shapes}. Are the names in another order?")
    if negative := [name for name, nu in slots["nu"].items() if (nu < 0).any()]:
        raise ValueError(f"{theirs['nu']} of {listed(negative)} has negative elements: pass the state of RMSprop")
    large = [f"{theirs[slot]} of {name}" for slot, arrays in slots.items() for name, x in arrays.items() if _large(x)]
    if large:
        raise ValueError(f"{listed(large)} has elements above 3.4e38, which float32 cannot hold: replace them")


def _large(x: np.ndarray) -> bool:
    return bool((np.isfinite(x) & (abs(x) > np.finfo(np.float32).max)).any())


# --- To a framework ---------------------------------------------------------------------------------------


def arrays_of(state: Any, convert_back: ConvertBack) -> tuple[np.ndarray, dict[str, Arrays]]:
    """The reverse of `state_of`: the count, and arrays by our slots and by the weights' names."""
    count, tree = _carry.bare(state, "a framework's checkpoint has no place for it")
    if np.shape(count):
        raise ValueError(f"the count has shape {np.shape(count)}: pass one of the states that jax.vmap made")
    if masked := [_states.shown(name) for name, x in _states.arrays_of(tree).items() if _states.is_masked(x)]:
        raise ValueError(f"the state has no accumulators for {listed(masked)}, which were masked: unmask them")
    is_leaf = lambda x: isinstance(x, _states.Accumulators)  # noqa: E731
    found: list[_states.Accumulators] = jax.tree.leaves(tree, is_leaf=is_leaf)
    slots, convert_back = {}, _function("convert_back", convert_back)
    for slot in _states.Accumulators._fields:
        if slot == "nu" or any(getattr(x, slot) is not None for x in found):
            arrays = jax.tree.map(functools.partial(_decoded, slot), tree, is_leaf=is_leaf)
            if slot == "nu":
                _check_use("convert_back", lambda x: _by_name(convert_back(x)), arrays)
            named = convert_back(arrays)
            # Contiguous: a framework does not want to own a transposed view.
            slots[slot] = {k: array(f"{slot} of {k}", x).astype(np.float32, order="C") for k, x in named.items()}
    return np.asarray(count), slots


def _decoded(slot: str, found: _states.Accumulators) -> Any:
    """One slot as frameworks keep it: E[g²], and zeros where only other groups have the slot."""
    if slot == "nu" and found.mu is not None:
        return _states.second_moment(found.nu, found.mu)
    x = getattr(found, slot)
    return jnp.zeros_like(_storage.decode(found.nu)) if x is None else _storage.decode(x)


def _by_name(found: Any) -> dict[str, Any]:
    """What convert_back made, checked to be a mapping from names."""
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"convert_back makes {reprlib.repr(found)}: allowed is a mapping from names to arrays")
    return dict(found)


# --- Both ways --------------------------------------------------------------------------------------------

# How to drop an array on purpose, and what to do about elements of a leaf that come from none.
ADVICE = {
    "convert": (
        "set arrays{} = None",
        "put optax.MaskedNode() in the place of a new parameter, which carry_over will initialize",
    ),
    "convert_back": ("put None in its place, in what it gets or in the state", "leave them out"),
}


def _function(name: str, value: Any) -> Callable[[Any], Any]:
    """What the caller gives, if it is a function."""
    if not callable(value):
        raise ValueError(f"{name}={reprlib.repr(value)} is a {type(value).__name__}: allowed is a function of arrays")
    return value


def _check_use(name: str, function: Callable[[Any], Any], tree: Any) -> None:
    """Raises unless every element of `tree` comes out of `function`, and nothing else does but padding of zeros.

    The function gets each array's number in its place. On the way back it may cut the padding off.
    """
    drop, way_out = ADVICE[name]
    arrays = tree_flatten_with_path(tree)[0]
    # Odd numbers from 4097: float32 holds them, and neither float16 nor bfloat16 does.
    number = {path: 4097.0 + 2 * i for i, (path, _) in enumerate(arrays)}
    full_like = lambda path, x: (np if isinstance(x, np.ndarray) else jnp).full_like(x, number[path])  # noqa: E731
    numbers = jax.tree.map_with_path(full_like, tree)
    if isinstance(tree, dict):
        numbers = {key: numbers[key] for key in tree}  # JAX sorts them
    leaves = [(keystr(path) or "the array", x) for path, x in tree_flatten_with_path(function(numbers))[0]]
    made = {path: _times(name, path, x) for path, x in leaves}
    times = collections.Counter()
    for counts in made.values():
        times.update(counts)
    found = {path: times[number[path]] for path, _ in arrays}
    # To drop an array on purpose is to put None in its place. One that is only popped may have been forgotten.
    dropped = [path for path, x in tree_flatten_with_path(numbers, is_leaf=lambda x: x is None)[0] if x is None]
    kept = [(path, x.size) for path, x in arrays if not any(path[: len(start)] == start for start in dropped)]
    least = {path: size if name == "convert" else min(size, 1) for path, size in kept}
    if forgotten := [keystr(path) for path, size in least.items() if found[path] < size]:
        twice = [keystr(path) for path, x in arrays if found[path] > x.size]
        also = f", and uses {listed(twice)} more than once" if twice else ""
        drop = drop.format(forgotten[0])
        raise ValueError(f"{name} leaves out or changes {listed(forgotten)}{also}. To drop one on purpose, {drop}")
    known = {*number.values()}
    if foreign := [path for path, x in made.items() if x and (x.keys() - known - {0.0} or not x.keys() & known)]:
        raise ValueError(f"{name} makes elements of {listed(foreign)} that come from none of its arrays: {way_out}")


def _times(name: str, path: str, x: Any) -> collections.Counter[float]:
    """How often each number is in a leaf that a function made, and which must be able to hold an accumulator."""
    try:
        found = np.asarray(x)
    except (TypeError, ValueError, RuntimeError):  # keys of random numbers, and bfloat16 of torch
        found = np.asarray(None)
    if not jnp.issubdtype(found.dtype, jnp.floating) or jnp.finfo(found.dtype).bits < 32:
        ways_out = [
            f"cast after {name}",
            "leave out what is no parameter, with eqx.filter(tree, eqx.is_inexact_array) or "
            "nnx.filter_state(state, nnx.Param)",
        ]
        if not jnp.issubdtype(found.dtype, jnp.number):
            raise ValueError(f"{name} returns {path} of type {type(x).__name__}: {ways_out[1]}")
        way_out = ways_out[0] if jnp.issubdtype(found.dtype, jnp.inexact) else ", or ".join(ways_out)
        raise ValueError(f"{name} casts {path} to {found.dtype}, but accumulators need float32: {way_out}")
    return collections.Counter(
        dict(zip(*(part.tolist() for part in np.unique(found, return_counts=True)), strict=True))
    )
