"""From one state into another: collect both sides, compare them, then move."""

import functools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jax.tree_util import GetAttrKey, keystr

from . import _checks, _placement, _states, _storage
from ._rmsprop import RMSPropState
from ._states import Accumulators, Contents, Key, Name, Path, shown_names
from ._text import listed


__all__ = ["bare", "carry_over"]


def carry_over(state: Any, into: Any, *, allow_new: bool = False) -> Any:
    """Moves a state into a transformation with other options or in other wrappers.

    Use it to resume a run with a changed optimizer: another momentum or `state_dtype`, another wrapper,
    :func:`optax.rmsprop` before or afterwards, a checkpoint of another framework, Flax NNX for Linen.

    Every accumulator of `state` goes to the parameter of the same name in `into`. Names are the keys on the way to
    a parameter, without the boxes in which Flax keeps arrays (`.value`). Masked parameters are left out. A slot
    that only `into` has starts from zero. A slot that only `state` has is dropped: the mean of a centered state goes
    back into E[g²], and a momentum buffer is lost, as `into` has no momentum. Between ours and Optax's, the sign of the
    buffer and E[g²] or variance are converted. A buffer means something else with another `lr_in_momentum`, which a
    state does not say: that is not converted.

    Arrays of wrappers, such as counters, averages and accumulated gradients, are kept where both sides have the
    wrapper around the same parameters, in the same place relative to RMSProp: in front an average is one of gradients,
    and behind it one of updates. A new wrapper starts as in `into`, but its schedules continue from the count of
    `state`. Injected hyperparameters are those of `into`.

    No value is looked at under :func:`jax.jit`. There :class:`optax.MultiSteps` may lose half an accumulation, and
    groups that become one get the first of their counts.

    Args:
        state: the state of `rmsprop`, `scale_by_rms` or a dialect, or of :func:`optax.rmsprop`,
            :func:`optax.scale_by_rms` or :func:`optax.scale_by_stddev`, in any wrapper; or what a reader of
            :mod:`rmsprop_jax.interop` returns. Optax counts only with a schedule or bias correction. Without them,
            the count is that of the nearest wrapper that counts, or 0.
        into: a state with the structure you want: `tx.init(params)`, `jax.eval_shape(tx.init, params)`, or the
            `opt_state` of a new `TrainState` or `nnx.Optimizer`.
        allow_new: parameters that only `into` has start as they are there. By default they are an error.

    Returns:
        A state with the structure, shapes, dtypes, boxes and shardings of `into`. It shares no buffer with `state` or
        `into`, so it can be donated.

    Raises:
        ValueError: names or shapes differ, there is no state of RMSProp, or `state` has something, such as half an
            accumulation, that has no place in `into`. The error lists the paths.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmsprop_jax import carry_over, rmsprop
        >>> params = jnp.array([1.0, 2.0])
        >>> _, state = rmsprop(0.1).update(params, rmsprop(0.1).init(params))
        >>> lean = rmsprop(0.1, momentum=0.9, state_dtype=jnp.uint8)
        >>> state = carry_over(state, lean.init(params))
        >>> int(state.count), state.nu.dtype, state.trace
        (1, dtype('uint8'), Array([0, 0], dtype=int8))
    """
    allow_new = _checks.flag("allow_new", allow_new)
    # Each side decides whether a tuple on the other is optax.rmsprop's state or a chain of its parts.
    chain, chain_into = (bool(_states.find(side, _states.is_optax_chain)) for side in (state, into))
    old = _states.contents_of(state, whole=not chain_into)
    new = _states.contents_of(into, "`into`", whole=not chain)
    found = _fitted(old, new)
    moves = {**_moves_of_accumulators(found, old, new), **_moves_of_wrappers(old, new)}
    problems = [
        *_unknown(found, old, new, allow_new),
        *_misfits(moves),
        *_lost(old, new, "`into` has no place for it on the same side of RMSProp's state"),
        *_exchanged_buffers(found, new, moves),
    ]
    if problems:
        raise ValueError(f"state and `into` do not fit: {listed(problems, '; ')}")
    # One number for all groups, and for all states that were vmapped: it only chooses random bits.
    number = functools.reduce(jnp.maximum, [jnp.max(x, initial=0) for x in _counts(old).values()])
    return _states.replace(into, {path: _moved(move, number) for path, move in moves.items()})


def bare(state: Any, reason: str) -> tuple[Any, Any]:
    """The count of a state, and its accumulators in one tree like the parameters, without boxes.

    `reason`: why nothing can be done with what wrappers hold.
    """
    contents = _states.contents_of(state)
    if lost := [*_lost(contents, Contents({}, {}, {}, set()), reason)]:
        raise ValueError(listed(lost, "; "))
    counts = _counts(contents)
    if len(counts) > 1:
        raise ValueError(f"the groups have different counts: {_listed(counts)}")
    return next(iter(counts.values())), contents.accumulators_in_one_tree()


# --- Collect ----------------------------------------------------------------------------------------------


class Move(NamedTuple):
    """What becomes of one array of `into`."""

    sources: Mapping[Path, Any]  # the values it can get, by paths. None: it stays as it is. Several: they differ
    array: Any
    slot: str = ""  # if it is an accumulator


def _counts(old: Contents, names: Collection[Name] = ()) -> Mapping[Path, Any]:
    """The count of the groups that have these parameters, or of all groups. Several if they differ; 0 without one."""
    groups = [at for at, node in old.states.items() if {*names}.intersection(_states.names_of(node))] or old.states
    found = {path: x for at in groups for path, x in old.counts(at).items()}
    return _distinct(found) or {(): jnp.zeros((), jnp.int32)}


def _distinct(values: Mapping[Path, Any]) -> Mapping[Path, Any]:
    """One of them if all are equal."""
    paths = [*values]
    alike = all(_equal(values[path], values[paths[0]]) for path in paths)
    return {path: values[path] for path in paths[:1]} if alike else values


def _moves_of_accumulators(found: Mapping[Name, Accumulators], old: Contents, new: Contents) -> dict[Path, Move]:
    moves = {}
    for at, node in new.states.items():
        for path, slot, name, x in _states.slots_of(node):
            if slot == "count":
                moves[at + path] = Move(_counts(old, _states.names_of(node)), x)
            elif not _states.is_masked(x):
                moves[at + path] = Move(_sources(found[name], slot, node, x) if name in found else {}, x, slot)
    return moves


def _sources(found: Accumulators, slot: str, node: Any, x: Any) -> dict[Path, Any]:
    """The value for one slot of a state, as it keeps it."""
    value, ours = getattr(found, slot), isinstance(node, RMSPropState)
    if slot == "nu" and found.mu is not None and not (ours and node.mu is not None):
        value = _states.second_moment(found.nu, found.mu)
    if slot == "trace" and value is not None and not ours:
        value = -_storage.decode(value)
    if value is None:  # a slot that only `into` has
        return {(): jnp.zeros(x.shape, x.dtype)} if isinstance(x, jax.ShapeDtypeStruct) else {}
    return {(): value}


def _fitted(old: Contents, new: Contents) -> dict[Name, Accumulators]:
    """The accumulators of `old`, also where one side has all parameters in one vector, as optax.flatten makes it."""
    names = set().union(*map(_states.names_of, new.states.values()))
    found = {_states.without_box(name, names): x for name, x in old.accumulators().items()}
    if len(old.states) != 1 or len(new.states) != 1:
        return found
    places = {name: np.shape(x) for name, x in _states.arrays_of(_states.nu_of(*new.states.values())).items()}
    shapes = {name: np.shape(x.nu) for name, x in found.items()}
    vectors = [list(side) == [()] and len(side[()]) == 1 for side in (shapes, places)]
    sizes = [sum(map(math.prod, side.values())) for side in (shapes, places)]
    if vectors[0] == vectors[1] or sizes[0] != sizes[1]:
        return found
    joined = [  # a code comes back as it was
        None if any(x is None for x in column) else ravel_pytree([_storage.decode(x) for x in column])[0]
        for column in zip(*found.values(), strict=True)
    ]
    ends = np.cumsum([math.prod(shape) for shape in places.values()]).tolist()
    return {
        name: Accumulators(*(x if x is None else x[end - math.prod(shape) : end].reshape(shape) for x in joined))
        for (name, shape), end in zip(places.items(), ends, strict=True)
    }


def _moves_of_wrappers(old: Contents, new: Contents) -> dict[Path, Move]:
    """A counter of updates that only `into` has gets the count. An array goes to the wrapper of the same parameters."""
    theirs, moves = _by_key(old), {}
    for key, places in _by_key(new).items():
        sources = {} if key.is_injected else theirs.get(key, {})
        for path, names in places.items():
            mine = [at for at, others in sources.items() if not names.isdisjoint(others)] or sources
            found = {at: old.arrays[at] for at in mine}
            # Several wrappers of one kind around the same parameters are in the same order.
            rivals = [other for other, others in places.items() if others == names]
            if len(found) == len(rivals):
                at = [*found][rivals.index(path)]
                values = {at: found[at]}
            else:
                values = _distinct(found)
            if not values and key.counts_updates:
                values = _counts(old, names)
            moves[path] = Move(values, new.arrays[path])
    return moves


def _by_key(contents: Contents) -> dict[Key, dict[Path, frozenset[Name]]]:
    """The arrays of wrappers, with the parameters of the nearest states of RMSProp."""

    @functools.cache
    def names(*states: Path) -> frozenset[Name]:
        return frozenset(name for at in states for name in _states.names_of(contents.states[at]))

    found: dict[Key, dict[Path, frozenset[Name]]] = {}
    for path, key in contents.keys.items():
        found.setdefault(key, {})[path] = names(*_states.nearest(path, contents.states))
    return found


# --- Compare ----------------------------------------------------------------------------------------------


def _unknown(found: Mapping[Name, Accumulators], old: Contents, new: Contents, allow_new: bool) -> Iterator[str]:
    """Parameters that only one of the two has."""
    absent, left_out = old.masked(), new.masked()
    places = set().union(*map(_states.names_of, new.states.values()))
    added = [name for name in places if name not in found and not _below(name, absent)]
    if added and not allow_new:
        yield f"state has nothing for {shown_names(added)}: pass allow_new=True to start them as `into` has them"
    if lost := [name for name in found if name not in places and not _below(name, left_out)]:
        yield f"`into` has no place for {shown_names(lost)}: to drop them, mask them in `into` with optax.masked"


def _misfits(moves: Mapping[Path, Move]) -> Iterator[str]:
    """Arrays of `into` that cannot get their values."""
    for path, (sources, x, slot) in moves.items():
        where: str = keystr(path) or "it"
        source: Any = next(iter(sources.values()), None)
        if len(sources) > 1:
            yield f"state has {len(sources)} values for {where}, which differ: {_listed(sources)}"
        elif not sources:
            if isinstance(x, jax.ShapeDtypeStruct):
                yield f"`into` has only the shape of {where}, and state has no value for it: use into=tx.init(params)"
        elif np.shape(source) != np.shape(x):
            yield f"{where} has shape {np.shape(source)} in state and {np.shape(x)} in `into`"
        elif slot != "nu" and jnp.iscomplexobj(source) != jnp.iscomplexobj(x):  # Optax's ν is complex
            yield f"{where} has dtype {source.dtype} in state and {x.dtype} in `into`"


def _lost(old: Contents, new: Contents, reason: str) -> Iterator[str]:
    """What wrappers hold and `into` has no place for. Counters may go with their wrapper; averages may not."""
    places, half = set(new.keys.values()), _is_half_filled(old)
    fields, frozen = {(key.kind, key.field, key.side) for key in places}, new.masked() - old.masked()
    lost = []
    for path, key in old.keys.items():
        # A field that is empty in the same wrapper: an option that is off, or what the next update measures anew.
        empty = (key.kind, key.side) in new.records and (key.kind, key.field, key.side) not in fields
        if key in places or key.is_injected or empty or _below(key.below, frozen):
            continue
        accumulates = key.kind is optax.MultiStepsState
        if (key.field == "acc_grads" and half) if accumulates else _is_average(key, old.arrays[path]):
            lost.append(keystr(path) + (", gradients of an unfinished update" if accumulates else ""))
    if lost:
        itself = listed(f"state{keystr(path)}" for path in old.states)
        error = f"state also holds {listed(lost)}: {reason}. To drop it, pass RMSProp's own state, {itself}"
        outside = [x for at in old.states for path, x in old.counts(at).items() if path[: len(at)] != at]
        if outside and new.states:  # without the wrapper that counts, the count is 0
            error += f", and then call optax.tree.set(result, count={outside[0]})"
        yield error


def _exchanged_buffers(found: Mapping[Name, Accumulators], new: Contents, moves: Mapping[Path, Move]) -> Iterator[str]:
    """A momentum buffer that would be dropped where `into` starts another one, which means something else."""
    traces = [path for path, key in new.keys.items() if key.kind is optax.TraceState and not moves[path].sources]
    kept = any(move.slot == "trace" for move in moves.values())
    if traces and not kept and any(x.trace is not None for x in found.values()):
        yield (
            f"state has RMSProp's momentum buffer, but `into` has optax.trace at {listed(map(keystr, traces))}, which "
            "keeps another: carry over into a state without momentum first, and then from that into this one"
        )


def _is_half_filled(contents: Contents) -> bool:
    """Whether gradients of half an update are accumulated, as far as that may be seen."""
    is_step = lambda key: (key.kind, key.field) == (optax.MultiStepsState, "mini_step")  # noqa: E731
    return not all(_equal(x, 0 * x) for path, x in contents.arrays.items() if is_step(contents.keys[path]))


def _is_average(key: Key, x: Any) -> bool:
    """Whether an array is more than a counter, a flag, or a random key."""
    if not (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.number)):
        return False
    return np.ndim(x) > 0 or (bool(key.below) and jnp.issubdtype(x.dtype, jnp.inexact))


def _equal(x: Any, y: Any) -> bool:
    """Whether two values are equal, as far as they may be looked at."""
    if isinstance(x, Tracer) or isinstance(y, Tracer):
        return True
    x, y = (jax.random.key_data(z) if _is_random_key(z) else z for z in (x, y))
    return np.array_equal(x, y)


def _is_random_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _listed(values: Mapping[Path, Any]) -> str:
    """Values of one thing with their paths, and how to make them equal."""
    shown = [f"{x} in state{keystr(path)}" if np.ndim(x) == 0 else f"state{keystr(path)}" for path, x in values.items()]
    fields = dict.fromkeys(f"{path[-1].name}=..." for path in values if path and isinstance(path[-1], GetAttrKey))
    way_out = f". Set one for all with optax.tree.set(state, {listed(fields)})" if fields else ""
    return listed(shown) + way_out


def _below(name: Name, prefixes: Iterable[Name]) -> bool:
    return any(name[: len(prefix)] == prefix for prefix in prefixes)


# --- Move -------------------------------------------------------------------------------------------------


def _moved(move: Move, number: Any) -> Any:
    """The new array, in a buffer of its own, with the dtype and the sharding of the old one."""
    x = move.array
    (value,) = move.sources.values() or [x]
    if not hasattr(x, "dtype"):
        return value
    if move.slot:
        value = _storage.recode(value, x.dtype, number, f"carry_over.{move.slot}")
    alike = getattr(value, "dtype", None) == x.dtype
    return _placement.place_like(value if alike else jnp.asarray(value, x.dtype), x)
