"""From a rule for one array to an Optax transformation: trees, jit, dtypes, errors that name the leaf.

Nothing here knows what the rule computes.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_flatten_with_path
from jax.typing import ArrayLike, DTypeLike

from . import _bits, _placement, _storage


class Slot(NamedTuple):
    """What a rule remembers of each parameter."""

    name: str
    one_byte: DTypeLike  # what keeps it if a state of one byte is asked for
    non_negative: bool = False  # and therefore real, also for a complex parameter


class Rule(Protocol):
    """The update of one array. Hashed by value: equal rules share one compiled update."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots in use."""
        ...

    def numbers(self, count: jax.Array, hyperparameters: Any) -> Any:
        """What is the same for all leaves of one precision. `count` is the number of this update, from 1."""
        ...

    def __call__(
        self, numbers: Any, grad: jax.Array, param: jax.Array | None, slots: Mapping[str, _storage.Accumulator]
    ) -> tuple[jax.Array, Mapping[str, _storage.Accumulator]]:
        """The update to add to the parameter, and the new accumulators. `param` is None where none is needed."""
        ...


def lift(
    rule: Rule,
    hyperparameters: Callable[[jax.Array], Any],
    state_type: type[Any],
    initial: Mapping[str, ArrayLike],
    state_dtype: np.dtype | None = None,
    params_for: str | None = None,
    params_mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Lifts a rule for one array to a gradient transformation.

    Args:
        rule: the update of one array.
        hyperparameters: from the number of past updates to the rule's hyperparameters, a tree of scalars.
        state_type: a NamedTuple with the fields `count` and the names of the slots.
        initial: first values of slots that do not start at zero.
        state_dtype: how `init` has the slots kept. `update` leaves them in the dtype they have.
        params_for: the option for which `update` needs `params`, if there is one.
        params_mask: a tree of booleans, a prefix of the parameters' tree, or a function from the parameters
            to it; the rule gets no `param` where it is False. By default it gets all.
    """

    def init(params: optax.Params) -> Any:
        def build(slot: Slot) -> optax.Params:
            def leaf(path: Any, param: Any) -> jax.Array | None:
                dtype = _dtype("parameter", path, param)
                if not jnp.issubdtype(dtype, jnp.inexact):
                    return None
                dtype = _storage.compute_dtype(dtype)
                dtype = _storage.real_dtype(dtype) if slot.non_negative else dtype
                kept = _storage.state_dtype_of(dtype, state_dtype, slot.one_byte)
                return _storage.full_like(param, initial.get(slot.name, 0.0), kept)

            return jax.tree.map_with_path(leaf, params)

        # Slot by slot, not leaf by leaf: optax.tree.map_params passes a node without leaves.
        return state_type(count=_placement.zero_count(params), **{slot.name: build(slot) for slot in rule.slots})

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        if not isinstance(state, state_type):
            raise TypeError(
                f"state has type {type(state).__name__}: allowed is the {state_type.__name__} that init makes"
            )
        updates = _without_float0(updates)
        for name in state_type._fields[1:]:
            on = any(slot.name == name for slot in rule.slots)
            # (A tree that is None has state that is None.)
            if updates is not None and on == (getattr(state, name) is None):
                raise ValueError(f"state.{name} is {'' if on else 'not '}None: the state was made with other options")
        if params_for is None:
            _check_kinds(updates, params)
            params = None
        elif params is None:
            paths = [keystr(path) for path, _ in tree_flatten_with_path(updates)[0]]
            raise ValueError(f"{params_for} needs the parameters {paths}: call update(updates, state, params)")
        else:
            params = _masked(updates, params, params_mask)
        return _update(rule, hyperparameters(state.count), updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


# At module level, with every number an argument. optax.inject_hyperparams builds a new transformation
# in each step; it finds the update that the previous one compiled.
@functools.partial(jax.jit, static_argnames="rule", inline=True)
def _update(
    rule: Rule, hyperparameters: Any, updates: optax.Updates, state: Any, params: optax.Params | None
) -> tuple[optax.Updates, Any]:
    count = jnp.asarray(optax.safe_increment(state.count))

    @functools.cache
    def numbers(dtype: np.dtype) -> Any:
        return rule.numbers(count, jax.tree.map(lambda x: jnp.asarray(x, dtype), hyperparameters))

    @functools.cache
    def seed(slot: str) -> _bits.Seed:
        return _bits.seeds(count, slot)

    leaves, treedef = _flatten(updates)
    columns = {slot.name: _column(updates, getattr(state, slot.name), f"state.{slot.name}") for slot in rule.slots}
    params_column = [None] * len(leaves) if params is None else _column(updates, params, "params")

    steps: list[Any] = [None] * len(leaves)
    for i, (path, grad) in enumerate(leaves):
        if grad is None:
            continue
        kept = {name: column[i] for name, column in columns.items()}
        dtype = _checked_dtype(rule, path, grad, params_column[i], kept)
        seeds = {name: seed(name) for name, x in kept.items() if _storage.is_rounded(x.dtype)}
        steps[i], new = _update_array(
            rule, dtype, numbers(_storage.real_dtype(dtype)), seeds, grad, params_column[i], kept
        )
        for name, x in new.items():
            columns[name][i] = x
    trees = {name: treedef.unflatten(column) for name, column in columns.items()}
    return treedef.unflatten(steps), state._replace(count=count, **trees)


# One array. It is traced and lowered once for all leaves of a shape, as a function with a call for each
# leaf. XLA inlines the calls before it simplifies and fuses, so the program is the same.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _update_array(
    rule: Rule,
    dtype: np.dtype,
    numbers: Any,
    seeds: Mapping[str, _bits.Seed],
    grad: Any,
    param: Any,
    kept: Mapping[str, Any],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    g = jnp.asarray(grad, dtype)
    p = None if param is None else jnp.asarray(param, dtype)
    real = _storage.real_dtype(dtype)
    slots = {
        slot.name: _storage.load(kept[slot.name], real if slot.non_negative else dtype, seeds.get(slot.name), g)
        for slot in rule.slots
    }
    with jax.numpy_dtype_promotion("standard"):  # strict promotion forbids real times complex
        step, slots = rule(numbers, g, p, slots)
    return step.astype(jnp.result_type(grad)), {name: slots[name].encoded for name in kept}


def _checked_dtype(rule: Rule, path: Any, grad: Any, param: Any, kept: Mapping[str, Any]) -> np.dtype:
    """The dtype to compute in: the gradient's precision or the state's, whichever is higher."""
    grad_dtype = _dtype("gradient", path, grad)
    if any(x is None for x in kept.values()):
        raise TypeError(
            f"gradient{keystr(path)} has dtype {grad_dtype}, but its parameter has no state, as integers and "
            "booleans have none: allowed are None and float0"
        )
    if not jnp.issubdtype(grad_dtype, jnp.inexact):
        raise TypeError(f"gradient{keystr(path)} has dtype {grad_dtype}: allowed are floating and complex dtypes")
    for name, other in {"parameter": param, **kept}.items():
        if other is not None and jnp.shape(other) != jnp.shape(grad):
            raise ValueError(
                f"gradient{keystr(path)} has shape {jnp.shape(grad)}, its {name} {jnp.shape(other)}: they must be equal"
            )
    signed = [kept[slot.name] for slot in rule.slots if not slot.non_negative]
    for other in [*signed, *([] if param is None else [param])]:
        _check_kind(path, grad, other)
    dtypes = [grad_dtype, *(x.dtype for x in kept.values())]
    return np.result_type(*map(_storage.compute_dtype, dtypes))


def _check_kinds(updates: optax.Updates, params: Any) -> None:
    """Parameters that the update does not need still tell which gradients should be complex."""
    if params is None or jax.tree.structure(params) != jax.tree.structure(updates):
        return
    for (path, grad), param in zip(tree_flatten_with_path(updates)[0], jax.tree.leaves(params), strict=True):
        if hasattr(param, "dtype"):
            _check_kind(path, grad, param)


def _check_kind(path: Any, grad: Any, other: Any) -> None:
    if jnp.iscomplexobj(grad) != jnp.iscomplexobj(other):
        kinds = "complex, its parameter is real" if jnp.iscomplexobj(grad) else "real, its parameter is complex"
        raise TypeError(f"gradient{keystr(path)} is {kinds}: both must be real or both complex")


def _masked(updates: optax.Updates, params: optax.Params, mask: Any) -> optax.Params:
    """`params` with None where the mask is False."""
    for (path, grad), param in zip(_flatten(updates)[0], _column(updates, params, "params"), strict=True):
        if grad is not None and param is None:
            raise ValueError(f"params{keystr(path)} is None, and there is a gradient for it")
    if mask is None:
        return params

    def select(path: Any, keep: Any, subtree: Any) -> Any:
        if not isinstance(keep, (bool, np.bool_)):
            raise TypeError(f"the mask{keystr(path)} has type {type(keep).__name__}: allowed are True and False")
        return subtree if keep else jax.tree.map(lambda _: None, subtree)

    return jax.tree.map_with_path(select, mask(params) if callable(mask) else mask, params)


def _flatten(tree: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """Leaves with their paths, where None is a leaf: a gradient that is missing, or a state."""
    return tree_flatten_with_path(tree, is_leaf=lambda x: x is None)


def _column(updates: optax.Updates, tree: Any, name: str) -> list[Any]:
    """The leaves of `tree` in the order of the leaves of `updates`, or an error that names those without a partner."""
    (leaves, treedef), (others, other_treedef) = _flatten(updates), _flatten(tree)
    if treedef == other_treedef:
        return [leaf for _, leaf in others]
    grads, paths = ({keystr(path) for path, _ in column} for column in (leaves, others))
    lacking = [f"no gradient for {path} of {name}" for path in sorted(paths - grads)]
    surplus = [f"no {path} in {name} for its gradient" for path in sorted(grads - paths)]
    what = "; ".join(lacking + surplus) or f"{treedef} is not {other_treedef}"
    raise ValueError(f"the gradients must have the structure of {name}: {what}")


def _without_float0(updates: optax.Updates) -> optax.Updates:
    """Gradients of integers, as jax.grad(..., allow_int=True) makes them, become None. All others must be arrays."""
    leaves = jax.tree.leaves(updates)
    if all(isinstance(x, jax.Array) for x in leaves):
        return updates

    def leaf(path: Any, grad: Any) -> Any:
        if getattr(grad, "dtype", None) == jax.dtypes.float0:
            return None
        _dtype("gradient", path, grad)
        return grad

    return jax.tree.map_with_path(leaf, updates)


def _dtype(kind: str, path: Any, leaf: Any) -> Any:
    """The dtype of a leaf that is an array of numbers or a number."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None and isinstance(leaf, (bool, int, float, complex)):
        dtype = jnp.result_type(leaf)
    if dtype is None or not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
        what = f"type {type(leaf).__name__}" if dtype is None else f"dtype {dtype}"
        raise TypeError(
            f"{kind}{keystr(path)} has {what}: allowed are arrays of numbers. Leave it out, "
            "with eqx.filter(tree, eqx.is_inexact_array) or optax.masked"
        )
    return dtype
