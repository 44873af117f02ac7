"""From one state into another, whatever wrappers are around them.

`collect` takes a state apart: states of RMSProp, and the arrays that wrappers hold. `fill` does so with both
sides, compares them, and then puts everything into its place. Nothing moves before everything fits.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.tree_util import DictKey, GetAttrKey, keystr, SequenceKey, tree_flatten_with_path, tree_map_with_path

from .. import _placement, _storage
from .._rmsprop import RMSPropState
from .._text import listed, repeated
from . import _rows
from ._rows import Path, Row


# --- What a state holds -----------------------------------------------------------------------------------


class Key(NamedTuple):
    """Which array of which wrapper it is, wherever the wrapper lies."""

    kind: Any  # the type of the innermost NamedTuple around the array; None if there is none
    field: str  # of that NamedTuple
    below: Path  # the path from there
    side: frozenset[str]  # of RMSProp's state: "in front", "behind", "around", or "beside" in another group

    @property
    def counts(self) -> bool:
        """Whether it counts updates."""
        return (self.kind, self.field) in _counters()


class Contents(NamedTuple):
    """A state, taken apart. Everything is by its path in the state."""

    states: dict[Path, Any]  # of RMSProp, ours or Optax's
    keys: dict[Path, Key]  # of the arrays of wrappers
    leaves: dict[Path, Any]  # both, in the order of the tree
    treedef: Any

    def rows(self) -> dict[Path, Row]:
        """The accumulators of each parameter, in our terms."""
        found = [(place, path, row) for place, node in self.states.items() for path, row in _rows.rows(node).items()]
        for twice in repeated(path for _, path, _ in found):
            places = [keystr(place) or "top" for place, path, _ in found if path == twice]
            raise ValueError(
                f"{len(places)} accumulators for nu{keystr(twice)}: {listed(places)}. Pass the state of one of them"
            )
        return {path: row for _, path, row in found}

    def counts(self) -> dict[Path, Any]:
        """Updates made so far: RMSProp's counts or, if it has none, those of the nearest wrappers that count."""
        # Flax NNX wraps every array, which is then the only leaf.
        own = {path: jax.tree.leaves(_rows.fields(node).count)[:1] for path, node in self.states.items()}
        if any(own.values()):
            return {path: count[0] for path, count in own.items() if count}
        depths = {
            path: max(shared_keys(path, at) for at in self.states) for path, key in self.keys.items() if key.counts
        }
        return {path: self.leaves[path] for path, depth in depths.items() if depth == max(depths.values())}

    def counted(self) -> Any:
        """The one count that all agree on, or 0 if nothing counts."""
        counts = self.counts()
        if not counts:
            return jnp.zeros((), jnp.int32)
        if self.states.keys() & counts.keys():
            return _agreed([*counts.values()], "the groups have different counts")
        return _agreed([*counts.values()], f"RMSProp has no count of its own, and {listed(map(keystr, counts))} differ")

    def masked(self) -> set[Path]:
        """Parameters, or subtrees of them, that a state of RMSProp leaves to others."""
        columns = [_rows.by_path(_rows.fields(node).nu) for node in self.states.values()]
        return {path for column in columns for path, x in column.items() if _rows.is_masked(x)}

    def by_key(self) -> dict[Key, list[Path]]:
        """The arrays of wrappers; several where wrappers of one kind lie on the same side."""
        found: dict[Key, list[Path]] = {}
        for path, key in self.keys.items():
            found.setdefault(key, []).append(path)
        return found


def collect(state: Any, whole: bool = True) -> Contents:
    """Takes a state apart. `whole`: a tuple that could be optax.rmsprop's state is one."""
    leaves, treedef = tree_flatten_with_path(state, is_leaf=functools.partial(_rows.is_rmsprop, whole=whole))
    states = {path: x for path, x in leaves if _rows.is_rmsprop(x, whole)}
    keys = {path: Key(*_owner(state, path), _side(path, states)) for path, _ in leaves if path not in states}
    return Contents(states, keys, dict(leaves), treedef)


def _owner(tree: Any, path: Path) -> tuple[Any, str, Path]:
    """The type of the innermost NamedTuple on the way to a leaf, its field, and the path from there."""
    kind, field, below = None, "", path
    for i, (key, container) in enumerate(zip(path, _containers(tree, path), strict=False)):
        if isinstance(container, tuple) and hasattr(container, "_fields"):
            kind, field, below = type(container), key.name, path[i + 1 :]
    return kind, field, below


def _containers(tree: Any, path: Path) -> Iterator[Any]:
    """The nodes on the way to a leaf, and not the leaf: Flax NNX warns of who reads a variable's `value`."""
    for key in path:
        yield tree
        match key:
            case SequenceKey():
                tree = tree[key.idx]
            case DictKey():
                tree = tree[key.key]
            case GetAttrKey():
                tree = getattr(tree, key.name)
            case _:  # a container of somebody else, in which no wrapper's state can be
                return


def _side(path: Path, states: Iterable[Path]) -> frozenset[str]:
    """Where an array lies, seen from the nearest states of RMSProp."""
    shared = {state: shared_keys(path, state) for state in states}
    nearest = max(shared.values(), default=0)
    return frozenset(_direction(path[n], state[n]) for state, n in shared.items() if n == nearest)


def _direction(mine: Any, theirs: Any) -> str:
    """On which side of the other path one goes on, from where the two part."""
    if isinstance(mine, SequenceKey):
        return "in front" if mine.idx < theirs.idx else "behind"
    return "around" if isinstance(mine, GetAttrKey) else "beside"


def shared_keys(path: Path, other: Path) -> int:
    """How many keys two paths have in common before they part."""
    return next((i for i, (x, y) in enumerate(zip(path, other, strict=False)) if x != y), min(len(path), len(other)))


@functools.cache  # at first use: importing must not compute anything
def _counters() -> frozenset[tuple[type, str]]:
    """The fields of Optax's wrappers that count updates. It does not export all of their types."""
    injected: Any = optax.inject_hyperparams(optax.sgd)(optax.constant_schedule(1.0)).init(jnp.zeros(()))
    schedule = injected.hyperparams_states["learning_rate"]
    counts = [(type(injected), "count"), (type(schedule), "count"), (optax.ScaleByScheduleState, "count")]
    return frozenset([*counts, (optax.MultiStepsState, "gradient_step")])


def _agreed(values: list[Any], what: str) -> Any:
    if not all(_equal(value, values[0]) for value in values):
        raise ValueError(f"{what}: [{listed(values)}]")
    return values[0]


def _equal(x: Any, y: Any) -> bool:
    """Whether two values are equal, as far as they may be looked at."""
    return isinstance(x, Tracer) or isinstance(y, Tracer) or np.array_equal(x, y)


# --- Into one bare state ----------------------------------------------------------------------------------


def bare(state: Any, reason: str) -> RMSPropState:
    """One state of ours, as our update takes it: zeros where only other groups have a slot.

    `reason`: why it cannot hold what wrappers hold.
    """
    contents = collect(state)
    check_has_rmsprop(contents, state, "this")
    if lost := [*_lost(contents, contents.by_key(), reason)]:
        raise ValueError(listed(lost, "; "))
    rows, states = contents.rows(), [_rows.fields(node) for node in contents.states.values()]
    whole = functools.reduce(_rows.merged, [state.nu for state in states])

    def leaf(slot: str, path: Path) -> jax.Array:
        value = getattr(rows[path], slot)
        return jnp.zeros_like(_storage.decode(rows[path].nu)) if value is None else jnp.array(value, copy=True)

    trees = {
        slot: tree_map_with_path(lambda path, _, slot=slot: leaf(slot, path), whole)
        for slot in Row._fields
        if slot == "nu" or any(getattr(state, slot) is not None for state in states)
    }
    return RMSPropState(jnp.array(contents.counted(), jnp.int32), **trees)


# --- Into another state -----------------------------------------------------------------------------------


def fill(state: Any, like: Any, strict: bool = False) -> Any:
    """`like`, with what `state` has for every state of RMSProp in it, and for the wrappers that both have.

    `strict`: both have the same slots.
    """
    old, new = _both(state, like)
    rows, count, taken = _rows_for(old, new), old.counted(), _taken(old, new)
    problems = [
        *_misfits_of_rows(old, new, rows, strict),
        *_misfits_of_wrappers(old, new, count, taken),
        *_lost(old, set(old.by_key()) - set(new.by_key()), _NO_PLACE),
    ]
    if problems:
        raise ValueError(f"state and like do not fit: {listed(problems, '; ')}")

    def value(path: Path, x: Any) -> Any:
        if path in new.states:
            return _state(x, rows, count)
        if taken[path]:
            return _own(old.leaves[taken[path][0]], x)
        return _own(count if new.keys[path].counts else x, x)

    return new.treedef.unflatten([value(path, x) for path, x in new.leaves.items()])


_NO_PLACE = "like has no place for it on the same side of RMSProp's state"


def _both(state: Any, like: Any) -> tuple[Contents, Contents]:
    """Both sides, taken apart. The other side decides whether a tuple is optax.rmsprop's state or a chain's."""
    old, new = collect(state, whole=not _has_chain(like)), collect(like, whole=not _has_chain(state))
    check_has_rmsprop(old, state, "this")
    check_has_rmsprop(new, like, "like, which is a")
    return old, new


def _has_chain(tree: Any) -> bool:
    return any(map(_rows.is_chain, jax.tree.leaves(tree, is_leaf=_rows.is_chain)))


def _rows_for(old: Contents, new: Contents) -> dict[Path, Row]:
    """The rows of `old`, under the paths that `new` has for them."""
    rows = old.rows()
    if len(old.states) != 1 or len(new.states) != 1:
        return rows
    (node,) = new.states.values()
    return _rows.refitted(rows, {path: x for path, x in _rows.by_path(_rows.fields(node).nu).items()})


def _taken(old: Contents, new: Contents) -> dict[Path, list[Path]]:
    """For each array of a wrapper in `new`, the arrays of `old` that it can take over: none, one, or several."""
    sources = old.by_key()
    taken: dict[Path, list[Path]] = {}
    for key, places in new.by_key().items():
        found = [] if key.field == "hyperparams" else sources.get(key, [])
        if len(found) == len(places):
            taken |= {place: [source] for place, source in zip(places, found, strict=True)}
            continue
        alike = all(_equal(old.leaves[source], old.leaves[found[0]]) for source in found)
        taken |= dict.fromkeys(places, found[:1] if alike else found)
    return taken


def _state(node: Any, rows: Mapping[Path, Row], count: Any) -> Any:
    """A state like `node`, with these rows in it."""
    new = _rows.fields(node)
    kept = {path: _rows.in_terms_of(node, rows[path]) for path in _rows.by_path(new.nu) if path in rows}
    number = jnp.max(count, initial=0)  # one for all states that were vmapped: it only chooses random bits

    def leaf(slot: str, path: Path, x: Any) -> Any:
        value = getattr(kept.get(path), slot, None)
        if value is None:  # new: as `like` has it, or zero
            return _own(jnp.zeros(x.shape, x.dtype) if _is_shape(x) else x, x)
        return _own(_storage.recode(value, x.dtype, number, f"interop.{slot}"), x)

    trees = {
        slot: tree_map_with_path(lambda path, x, slot=slot: leaf(slot, path, x), getattr(new, slot))
        for slot in Row._fields
    }
    return _rows.with_fields(node, {"count": jax.tree.map(lambda x: _own(count, x), new.count), **trees})


def _own(value: Any, x: Any) -> Any:
    """`value` in a buffer of its own, with the dtype and the sharding of `x`."""
    if not hasattr(x, "dtype"):
        return value
    alike = getattr(value, "dtype", None) == x.dtype
    return _placement.place_like(value if alike else jnp.asarray(value, x.dtype), x)


def _is_shape(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


# --- What does not fit ------------------------------------------------------------------------------------


def check_has_rmsprop(contents: Contents, state: Any, name: str) -> None:
    if not contents.states:
        kinds = sorted({getattr(key.kind, "__name__", "other arrays") for key in contents.keys.values()})
        raise ValueError(
            f"no state of RMSProp in {name} {type(state).__name__}: it holds {listed(kinds) or 'nothing'}. "
            "(Restored from a checkpoint as a dict, it is RMSPropState(**kept).)"
        )


def _misfits_of_rows(old: Contents, new: Contents, rows: Mapping[Path, Row], strict: bool) -> Iterator[str]:
    """Why the accumulators cannot go into the states of RMSProp in `new`."""
    count, absent, left_out, places = old.counted(), old.masked(), new.masked(), set()
    for at, node in new.states.items():
        state = _rows.fields(node)
        columns = {slot: _rows.by_path(getattr(state, slot)) for slot in Row._fields}
        here = [path for path, x in columns["nu"].items() if not _rows.is_masked(x)]
        places.update(here)
        for path, slot in ((path, slot) for slot in Row._fields for path in here):
            where = f"{keystr(at)}.{slot}{keystr(path)}"
            if path in columns[slot]:
                known = path in rows or _below(path, absent)
                yield from _misfits_of_slot(where, slot, rows.get(path), columns[slot][path], known, strict)
        for slot in (slot for slot in Row._fields if strict and not columns[slot]):
            if any(getattr(rows.get(path), slot, None) is not None for path in here):
                yield f"like has no {keystr(at)}.{slot}: the options differ"
        for x in jax.tree.leaves(state.count):
            yield from _unequal(f"{keystr(at)}.count", count, x)
    lost = [path for path in rows if path not in places and not _below(path, left_out)]
    yield from (f"like has no place for {keystr(path)}" for path in lost)


def _misfits_of_slot(where: str, slot: str, row: Row | None, x: Any, known: bool, strict: bool) -> Iterator[str]:
    """Why one accumulator cannot become `x`; `row` is None where the parameter has none, `known` if it was masked."""
    value = None if row is None else getattr(row, slot)
    if not known:
        yield f"state has nothing for {where}"
    elif row is None and _is_shape(x):
        yield f"like has only the shape of {where}, and state has no value for it"
    elif row is not None and strict and value is None:
        yield f"state has nothing for {where}: the options differ"
    elif row is not None:
        yield from _unequal(where, row.nu if value is None else value, x)
    if slot != "nu" and value is not None and jnp.iscomplexobj(value) != jnp.iscomplexobj(x):
        yield f"{where} has dtype {value.dtype} in state and {x.dtype} in like"


def _misfits_of_wrappers(old: Contents, new: Contents, count: Any, taken: Mapping[Path, list[Path]]) -> Iterator[str]:
    """Why the arrays of wrappers cannot go into those of `new`."""
    for path, key in new.keys.items():
        where, x, sources = keystr(path), new.leaves[path], taken[path]
        if len(sources) > 1:
            yield f"state has {len(sources)} values for {where}, which differ"
        elif sources:
            yield from _unequal(keystr(sources[0]), old.leaves[sources[0]], x)
        elif key.counts:
            yield from _unequal(where, count, x)
        elif _is_shape(x):
            yield f"like has only the shape of {where}, and state has no value for it"


def _unequal(where: str, value: Any, x: Any) -> Iterator[str]:
    if np.shape(value) != np.shape(x):
        yield f"{where} has shape {np.shape(value)} in state and {np.shape(x)} in like"


def _lost(contents: Contents, without_place: Iterable[Key], reason: str) -> Iterator[str]:
    """What wrappers hold and would be lost. Counters may go with their wrapper; averages may not."""
    found, fields = contents.by_key(), {(key.kind, key.field) for key in without_place}
    alone = listed(f"state{keystr(path)}" for path in contents.states)
    for key in sorted(without_place, key=lambda key: keystr(found[key][0])):
        values = {keystr(path): contents.leaves[path] for path in found[key]}
        if key.kind is optax.MultiStepsState:
            kept_apart = key.field == "acc_grads" and (key.kind, "mini_step") not in fields
            half = (key.field == "mini_step" or kept_apart) and _is_half_filled(contents)
            lost = [f"{where}, gradients of half an update" for where in values if half]
        else:
            lost = [where for where, x in values.items() if key.field != "hyperparams" and _is_average(key, x)]
        if lost:
            yield f"state also holds {listed(lost)}: {reason}. To leave it behind, pass RMSProp's own state, {alone}"


def _is_half_filled(contents: Contents) -> bool:
    """Whether gradients of half an update are accumulated, as far as that may be seen."""
    steps = [
        contents.leaves[path] for path, key in contents.keys.items() if key[:2] == (optax.MultiStepsState, "mini_step")
    ]
    return not all(_equal(x, np.zeros(np.shape(x))) for x in steps)


def _is_average(key: Key, x: Any) -> bool:
    inexact = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)
    return inexact and (bool(key.below) or np.ndim(x) > 0)


def _below(path: Path, prefixes: Iterable[Path]) -> bool:
    return any(path[: len(prefix)] == prefix for prefix in prefixes)
