"""What an optimizer's state holds, in any wrapper: one walk that finds it, and one that replaces it.

Accumulators come out in our terms, whichever RMSProp made them: ν is a variance if there is a mean beside it, and the
buffer is that of p ← p - b. A parameter has the same name with and without the box in which Flax keeps an array.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import DictKey, GetAttrKey, keystr, SequenceKey, tree_flatten_with_path, tree_map_with_path

from . import _storage
from ._rmsprop import RMSPropState
from ._text import listed, repeated


__all__ = [
    "Accumulators",
    "Contents",
    "Key",
    "Name",
    "Path",
    "arrays_of",
    "contents_of",
    "find",
    "is_masked",
    "is_optax_chain",
    "map_arrays",
    "name_of",
    "names_of",
    "nearest",
    "nu_of",
    "replace",
    "second_moment",
    "shared_keys",
    "shown",
    "shown_names",
    "slots_of",
    "variance",
    "without_box",
]

Path = tuple[Any, ...]  # keys of jax.tree_util, from the top of a state
Name = tuple[str, ...]  # the keys on the way to a parameter, as texts: the same in a dict, a list, and a module

LEARNING_RATES = ("learning_rate", "lr", "eta", "learningRate")  # as the dialects call it
_INJECTIONS = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


def find(state: Any, is_node: Callable[[Any], bool]) -> dict[Path, Any]:
    """The nodes of a state that `is_node` accepts, by their paths."""
    found, _ = tree_flatten_with_path(_without_dict_boxes(state), is_leaf=is_node)
    return {path: x for path, x in found if is_node(x)}


def replace(state: Any, values: Mapping[Path, Any]) -> Any:
    """The state with other nodes or arrays at these paths. An array goes into the box that is there."""

    def new(path: Path, x: Any) -> Any:
        if path not in values:
            return x
        return jax.tree.map(lambda _: values[path], x) if _is_box(x) else values[path]

    return tree_map_with_path(new, state, is_leaf=lambda path, _: path in values, is_leaf_takes_path=True)


class Accumulators(NamedTuple):
    """The accumulators of one parameter, in our terms; None where its group has no such slot."""

    nu: Any
    mu: Any = None
    trace: Any = None


class Key(NamedTuple):
    """Which array of which wrapper it is, wherever the wrapper lies."""

    kind: type | None  # of the innermost record around the array, such as optax.EmaState
    field: str  # of that record
    below: Name  # from there to the array, as the name of a parameter
    side: frozenset[str]  # of RMSProp's state: "in front", "behind", "around", or "beside" in another group

    @property
    def counts_updates(self) -> bool:
        """Whether the array is the number of updates so far."""
        return (self.kind, self.field) in _update_counters()

    @property
    def is_injected(self) -> bool:
        """Whether the array is a hyperparameter of optax.inject_hyperparams."""
        return self.field == "hyperparams" and self.kind in _INJECTIONS


class Contents(NamedTuple):
    """What a state holds, by paths in it. Arrays are without Flax's boxes."""

    states: dict[Path, Any]  # of RMSProp, ours or Optax's
    arrays: dict[Path, Any]  # of everything around them
    keys: dict[Path, Key]  # of these arrays
    records: set[tuple[type, frozenset[str]]]  # kinds of wrappers and their sides, also of those without arrays

    def accumulators(self) -> dict[Name, Accumulators]:
        """The accumulators of each parameter."""
        found = [(path, name, x) for path, node in self.states.items() for name, x in _accumulators(node).items()]
        for twice in repeated(name for _, name, _ in found):
            places = [keystr(path) or "top" for path, name, _ in found if name == twice]
            raise ValueError(
                f"{len(places)} accumulators for nu{shown(twice)}: {listed(places)}. Pass only one of these states"
            )
        return {name: x for _, name, x in found}

    def accumulators_in_one_tree(self) -> Any:
        """A tree like the parameters with the accumulators of each, or a mask where no state has them."""
        found = self.accumulators()
        whole = functools.reduce(_merged, map(nu_of, self.states.values()))
        return tree_map_with_path(
            lambda path, x: x if is_masked(x) else found.get(name_of(path)), whole, is_leaf=_is_leaf
        )

    def masked(self) -> set[Name]:
        """Parameters, or subtrees of them, that the states of RMSProp leave to others."""
        return {name for node in self.states.values() for name, x in arrays_of(nu_of(node)).items() if is_masked(x)}

    def counts(self, at: Path) -> dict[Path, Any]:
        """Updates that a state of RMSProp has made: its own count or, if it has none, those of its nearest wrappers."""
        if own := [(at + path, x) for path, slot, _, x in slots_of(self.states[at]) if slot == "count"]:
            return dict(own[:1])
        depths = {
            path: shared_keys(path, at)
            for path, key in self.keys.items()
            if key.counts_updates and "beside" not in key.side and at in nearest(path, self.states)
        }
        return {path: self.arrays[path] for path, depth in depths.items() if depth == max(depths.values())}

    def learning_rates(self) -> dict[Path, Any]:
        """The injected learning rates, without those of another optimizer beside RMSProp."""
        rates = {(name,) for name in LEARNING_RATES}
        mine = {path: key for path, key in self.keys.items() if key.is_injected and "beside" not in key.side}
        return {path: self.arrays[path] for path, key in mine.items() if key.below in rates}


def contents_of(state: Any, argument: str = "state", whole: bool = True) -> Contents:
    """Takes a state apart, or raises if no RMSProp is in it.

    `whole`: whether a tuple that could be the state of optax.rmsprop is one, and no chain of its parts.
    """
    state = _without_dict_boxes(state)
    is_node = functools.partial(_is_rmsprop, whole=whole)
    found, records, chains = _walk(state, is_node)
    states = {path: x for path, x in found.items() if is_node(x)}
    arrays = {path: _unboxed(x) for path, x in found.items() if path not in states}
    # A record among the parameters, such as a module, is no wrapper, also where an average of them is kept.
    of_params = {kind for x in states.values() for kind in _walk(nu_of(x), is_masked)[1].values()}
    wrappers = {path: kind for path, kind in records.items() if kind not in of_params}
    sides = {path: _side(path, states, chains) for path in (*arrays, *wrappers)}
    keys = {path: _key(path, wrappers, states, sides[path]) for path in arrays}
    contents = Contents(states, arrays, keys, {(kind, sides[path]) for path, kind in wrappers.items()})
    if not states:
        raise ValueError(_without_rmsprop(state, argument, contents))
    return contents


def _without_rmsprop(state: Any, argument: str, contents: Contents) -> str:
    kinds = sorted({getattr(key.kind, "__name__", "other arrays") for key in contents.keys.values()})
    error = (
        f"no state of RMSProp in {argument}, which is a {type(state).__name__}: it holds {listed(kinds) or 'nothing'}"
    )
    if restored := find(state, _is_restored):
        where = f"{argument}{keystr(next(iter(restored)))}"
        error += f". If {where} is of rmsprop_jax, restored as a dict, put RMSPropState(**{where}) there"
    if any(DictKey("nu") in path for path in contents.arrays):
        error += ". If a state of Optax was restored as dicts, restore it with a target such as tx.init(params)"
    return error


def _is_restored(x: Any) -> bool:
    """Whether a dict may be our state, with or without the fields that are None."""
    keys = set(x) if isinstance(x, Mapping) else set()
    return {"count", "nu"} <= keys <= set(RMSPropState._fields)


# --- A state of RMSProp -----------------------------------------------------------------------------------


def slots_of(node: Any) -> Iterator[tuple[Path, str, Name, Any]]:
    """The arrays of a state of RMSProp: the path in it, the slot, the parameter's name, and the array."""
    above = 1 if type(node) is tuple else 0
    for path, x in tree_flatten_with_path(node, is_leaf=_is_leaf)[0]:
        yield path, path[above].name, name_of(path[above + 1 :]), _unboxed(x)


def nu_of(node: Any) -> Any:
    """ν of a state of RMSProp, as a tree like the parameters."""
    return node[0].nu if type(node) is tuple else node.nu


def is_optax_chain(x: Any) -> bool:
    """Whether this is a chain of the three parts of optax.rmsprop, of which the first may be ours."""
    return _is_triple(x, (RMSPropState, *_second_moments()), (optax.TraceState,)) and (
        getattr(x[0], "trace", None) is None
    )


def _is_rmsprop(x: Any, whole: bool = True) -> bool:
    """Whether this is a state of ours, or of optax.scale_by_rms, optax.scale_by_stddev or optax.rmsprop.

    The state of optax.rmsprop is a tuple of three, which a chain of the same three parts has as well. Without
    `whole` only its first part counts.
    """
    if isinstance(x, (RMSPropState, *_second_moments())):
        return True
    return whole and _is_triple(x, _second_moments(), (optax.EmptyState, optax.TraceState))


def _is_triple(x: Any, first: tuple[type, ...], last: tuple[type, ...]) -> bool:
    parts = first, (optax.EmptyState, optax.ScaleByScheduleState), last
    return type(x) is tuple and len(x) == 3 and all(map(isinstance, x, parts))


def names_of(node: Any) -> list[Name]:
    """The parameters that have accumulators in a state of RMSProp."""
    arrays = {name: x for name, x in arrays_of(nu_of(node)).items() if not is_masked(x)}
    # Optax has accumulators of integers as well, which do not train.
    ours = isinstance(node, RMSPropState)
    return [name for name, x in arrays.items() if ours or jnp.issubdtype(x.dtype, jnp.inexact)]


def _accumulators(node: Any) -> dict[Name, Accumulators]:
    found: dict[Name, dict[str, Any]] = {name: {} for name in names_of(node)}
    for _, slot, name, x in slots_of(node):
        if name in found and slot in Accumulators._fields:
            found[name][slot] = x
    return {name: _in_our_terms(node, **slots) for name, slots in found.items()}


def _in_our_terms(node: Any, nu: Any, mu: Any = None, trace: Any = None) -> Accumulators:
    if isinstance(node, RMSPropState):
        return Accumulators(nu, mu, trace)
    nu, mu, trace = (x if x is None else _storage.decode(x) for x in (nu, mu, trace))
    nu = nu.real  # of a complex parameter it is complex in Optax, and its imaginary part zero
    return Accumulators(nu if mu is None else variance(nu, mu), mu, None if trace is None else -trace)


def variance(second: Any, mean: Any) -> Any:
    """E[g²] - |E[g]|²."""
    return (abs(second) - abs(mean) ** 2).clip(0)


def second_moment(nu: Any, mu: Any) -> Any:
    """The reverse of `variance`, from accumulators as a state keeps them."""
    return _storage.decode(nu) + abs(_storage.decode(mu)) ** 2


@functools.cache  # at first use: importing must not compute anything
def _second_moments() -> tuple[type, ...]:
    """The states of Optax that have a second moment. It does not export all of them."""
    transformations = [optax.scale_by_rms, optax.scale_by_stddev]
    return tuple(type(make(bias_correction=flag).init(())) for make in transformations for flag in (False, True))


# --- Parameters by name, and boxes ------------------------------------------------------------------------


def name_of(path: Path) -> Name:
    """The name of a parameter, from its path in any tree."""
    return tuple(keystr((key,), simple=True) for key in path)


def without_box(name: Name, names: Collection[Name]) -> Name:
    """One of `names`, also in NNX's box as Orbax restores it without a target: {"value": array}."""
    return name[:-1] if name not in names and name[-1:] == ("value",) else name


def shown(name: Name) -> str:
    """A name in an error, such as ['layer']['kernel']."""
    return keystr(tuple(map(DictKey, name)))


def shown_names(names: Iterable[Name]) -> str:
    """Names in an error."""
    return listed(shown(name) or "its one array" for name in sorted(names))


def arrays_of(tree: Any) -> dict[Name, Any]:
    """The arrays of a tree like the parameters, by name. A masked subtree is one of them."""
    return {name_of(path): _unboxed(x) for path, x in tree_flatten_with_path(tree, is_leaf=_is_leaf)[0]}


def map_arrays(function: Callable[[Name, Any], Any], tree: Any) -> Any:
    """A tree like the parameters with `function(name, array)` for each array. Boxes and masks stay."""

    def new(path: Path, x: Any) -> Any:
        return x if is_masked(x) else jax.tree.map(lambda array: function(name_of(path), array), x)

    return tree_map_with_path(new, tree, is_leaf=_is_leaf)


def is_masked(x: Any) -> bool:
    """Whether another group, or nobody, has the parameters of this subtree. A box may be around the mask."""
    return isinstance(_unboxed(x), optax.MaskedNode)


def _merged(tree: Any, other: Any) -> Any:
    """One tree of two groups', each of which is masked where the other has the parameters."""
    holes = {name for name, x in arrays_of(other).items() if is_masked(x)}
    return tree_map_with_path(
        lambda _, x, y: y if is_masked(x) else x,
        tree,
        other,
        is_leaf=lambda path, x: _is_leaf(x) or name_of(path) in holes,
        is_leaf_takes_path=True,
    )


def _is_leaf(x: Any) -> bool:
    return is_masked(x) or _is_box(x)


def _is_box(x: Any) -> bool:
    """Whether Flax keeps one array, or its mask, in this: a variable of NNX, or a partitioned array of Linen."""
    if isinstance(x, (tuple, list, dict, jax.Array, np.ndarray)):
        return False
    children, _ = tree_flatten_with_path(x, is_leaf=lambda child: child is not x)
    if [path for path, _ in children] != [(GetAttrKey("value"),)]:
        return False
    ((_, child),) = children
    return isinstance(child, optax.MaskedNode) or jax.tree_util.all_leaves([child])


def _unboxed(x: Any) -> Any:
    return jax.tree.leaves(x, is_leaf=lambda child: child is not x)[0] if _is_box(x) else x


def _without_dict_boxes(state: Any) -> Any:
    """The state without {"value": array} around each array, as Orbax restores NNX's boxes without a target."""
    leaves, _ = tree_flatten_with_path(state)
    in_boxes = all(path[-1:] == (DictKey("value"),) for path, _ in leaves)
    # Without a counter in a box, a "value" is a parameter that somebody calls so.
    if not (in_boxes and any(isinstance(path[-2], GetAttrKey) and _is_counter(x) for path, x in leaves if path[1:])):
        return state
    is_box = lambda x: isinstance(x, Mapping) and x.keys() == {"value"} and jax.tree_util.all_leaves(x.values())  # noqa: E731
    return jax.tree.map(lambda x: x["value"] if is_box(x) else x, state, is_leaf=is_box)


def _is_counter(x: Any) -> bool:
    return np.shape(x) == () and jnp.issubdtype(x.dtype, jnp.integer)


# --- Wrappers ---------------------------------------------------------------------------------------------


def _walk(tree: Any, is_node: Callable[[Any], bool]) -> tuple[dict[Path, Any], dict[Path, type], dict[Path, list[Any]]]:
    """The nodes and other arrays of a tree, the kinds of the records on the way to them, and the keys of chains."""
    records: dict[Path, type] = {}
    chains: dict[Path, list[Any]] = {}

    def is_leaf(path: Path, x: Any) -> bool:
        if is_node(x) or _is_box(x):
            return True
        if _is_record(x):
            records[path] = type(x)
        elif isinstance(x, (tuple, list)):
            chains[path] = [*map(SequenceKey, range(len(x)))]
        elif isinstance(x, collections.OrderedDict):  # of optax.named_chain
            chains[path] = [*map(DictKey, x)]
        return False

    return dict(tree_flatten_with_path(tree, is_leaf=is_leaf, is_leaf_takes_path=True)[0]), records, chains


def _is_record(x: Any) -> bool:
    """Whether this is a node with named fields, as the states of most wrappers are."""
    named = isinstance(x, tuple) and hasattr(x, "_fields")
    return (named or dataclasses.is_dataclass(x)) and not _is_box(x)


def _key(path: Path, records: Mapping[Path, type], states: Iterable[Path], side: frozenset[str]) -> Key:
    """The innermost record around an array, but not around RMSProp's state, and the array's side."""
    shared = max((shared_keys(path, at) for at in states), default=0)
    around = [n for n in range(shared, len(path)) if path[:n] in records]
    if not around:  # as in a chain of plain dicts
        return Key(None, "", name_of(path[shared + 1 :]), side)
    depth = around[-1]
    return Key(records[path[:depth]], path[depth].name, name_of(path[depth + 1 :]), side)


def nearest(path: Path, states: Iterable[Path]) -> list[Path]:
    """The states of RMSProp with which a path shares the most keys."""
    shared = {at: shared_keys(path, at) for at in states}
    most = max(shared.values(), default=0)
    return [at for at, n in shared.items() if n == most]


def _side(path: Path, states: Iterable[Path], chains: Mapping[Path, list[Any]]) -> frozenset[str]:
    """On which side of the nearest states of RMSProp a path lies."""

    def side(at: Path) -> str:
        n = shared_keys(path, at)
        if path[n:] and path[:n] in chains:
            order = chains[path[:n]]
            return "in front" if order.index(path[n]) < order.index(at[n]) else "behind"
        return "beside" if path[n:] and not isinstance(path[n], GetAttrKey) else "around"

    return frozenset(map(side, nearest(path, states)))


def shared_keys(path: Path, other: Path) -> int:
    """How many keys two paths share before they part."""
    return next((i for i, (x, y) in enumerate(zip(path, other, strict=False)) if x != y), min(len(path), len(other)))


@functools.cache
def _update_counters() -> frozenset[tuple[type, str]]:
    """The fields of Optax's wrappers that count updates. It does not export all of their types."""
    schedule = optax.constant_schedule(0.1)
    injected: Any = optax.inject_hyperparams(optax.sgd)(schedule).init(())
    decay = optax.add_decayed_weights(schedule).init(())
    kinds = type(injected.hyperparams_states["learning_rate"]), type(decay), optax.ScaleByScheduleState
    counts = [(kind, "count") for kind in (*_INJECTIONS, *kinds, optax.AddNoiseState)]
    steps = [(kind, "step") for kind in (optax.ConditionallyTransformState, optax.ConditionallyMaskState)]
    return frozenset([*counts, *steps, (optax.MultiStepsState, "gradient_step")])
