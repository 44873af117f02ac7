"""From a rule for one array to an Optax transformation: trees, jit, dtypes, and errors that name the leaf.

Nothing here knows the equations.
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
    """An accumulator that a rule keeps for each parameter."""

    name: str
    narrowest: DTypeLike  # its dtype in a state of one byte
    non_negative: bool = False  # and therefore real, also for a complex parameter


class Rule(Protocol):
    """The update of one array. Hashed by value: equal rules share one compiled update."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots in use."""
        ...

    def scalars(self, count: jax.Array, hyperparameters: Any) -> Any:
        """The scalars that all leaves of one precision share. `count` is the number of this update, from 1."""
        ...

    def __call__(
        self, scalars: Any, grad: jax.Array, param: jax.Array | None, slots: Mapping[str, _storage.Accumulator]
    ) -> tuple[jax.Array, Mapping[str, _storage.Accumulator]]:
        """The update to add to the parameter, and the new accumulators. `param` is None where none is needed."""
        ...


def lift(
    rule: Rule,
    hyperparameters: Callable[[jax.Array], Any],
    state_type: type[Any],
    initial: Mapping[str, ArrayLike],
    state_dtype: np.dtype | None = None,
    needs_params: str | None = None,
    params_mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Lifts a rule for one array to a gradient transformation.

    Args:
        rule: the update of one array.
        hyperparameters: maps the number of past updates to the rule's hyperparameters, a tree of scalars.
        state_type: a NamedTuple with the fields `count` and the names of the slots.
        initial: first values of slots that do not start at zero.
        state_dtype: the dtype in which `init` makes the slots. `update` leaves them in the dtype they have.
        needs_params: the option for which `update` needs `params`, if there is one.
        params_mask: a tree of booleans, a prefix of the parameters' tree, or a function from the parameters
            to it. The rule gets no `param` where it is False. By default it gets all.
    """

    def init(params: optax.Params) -> Any:
        def build(slot: Slot) -> optax.Params:
            def leaf(path: Any, param: Any) -> jax.Array | None:
                dtype = checked_dtype("parameter", path, param)
                if not jnp.issubdtype(dtype, jnp.inexact):
                    return None
                dtype = _storage.compute_dtype(dtype)
                dtype = _storage.real_dtype(dtype) if slot.non_negative else dtype
                dtype = _storage.state_dtype_of(dtype, state_dtype, slot.narrowest)
                return _storage.full_like(param, initial.get(slot.name, 0.0), dtype)

            return jax.tree.map_with_path(leaf, params)

        # Slot by slot, not leaf by leaf: optax.tree.map_params passes a node without leaves.
        return state_type(count=_placement.zero_count(params), **{slot.name: build(slot) for slot in rule.slots})

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        updates = without_float0(updates)
        _check_state(rule, state, state_type, updates)
        if needs_params is None:
            _check_kinds(updates, params)
            params = None
        elif params is None:
            raise ValueError(f"{needs_params} needs params: call update(updates, state, params)")
        else:
            params = params_with_gradients(updates, params, params_mask)
        return _update(rule, hyperparameters(state.count), updates, state, params, extra_args.get("layer"))

    return optax.GradientTransformationExtraArgs(init, update)


# --- The compiled update ------------------------------------------------------------------------------------


# At module level, with every number an argument. optax.inject_hyperparams builds a new transformation
# in each step; it finds the update that the previous one compiled.
@functools.partial(jax.jit, static_argnames="rule", inline=True)
def _update(
    rule: Rule, hyperparameters: Any, updates: optax.Updates, state: Any, params: optax.Params | None, layer: Any
) -> tuple[optax.Updates, Any]:
    count = jnp.asarray(optax.safe_increment(state.count))

    @functools.cache
    def scalars(dtype: np.dtype) -> Any:
        return rule.scalars(count, jax.tree.map(lambda x: jnp.asarray(x, dtype), hyperparameters))

    @functools.cache
    def seed(slot: str) -> _bits.Seed:
        return _bits.seeds(count, slot)

    leaves, treedef = flatten(updates)
    columns = {slot.name: column(updates, getattr(state, slot.name), f"state.{slot.name}") for slot in rule.slots}
    params_column = [None] * len(leaves) if params is None else column(updates, params, "params")

    steps: list[Any] = [None] * len(leaves)
    for i, (path, grad) in enumerate(leaves):
        if grad is None:
            continue
        encoded = {name: leaves_of_slot[i] for name, leaves_of_slot in columns.items()}
        _check_leaf(rule, path, grad, params_column[i], encoded)
        dtype = np.result_type(*(_storage.compute_dtype(jnp.result_type(x)) for x in (grad, *encoded.values())))
        seeds = {
            name: _bits.within_stack(seed(name), layer, x.shape)
            for name, x in encoded.items()
            if _storage.is_rounded(x.dtype)
        }
        steps[i], new = _update_array(
            rule, dtype, scalars(_storage.real_dtype(dtype)), seeds, grad, params_column[i], encoded
        )
        for name, x in new.items():
            columns[name][i] = x
    trees = {name: treedef.unflatten(leaves_of_slot) for name, leaves_of_slot in columns.items()}
    return treedef.unflatten(steps), state._replace(count=count, **trees)


# One array. It is traced and lowered once for all leaves of a shape, as a function with a call for each
# leaf. XLA inlines the calls before it simplifies and fuses, so the program is the same.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _update_array(
    rule: Rule,
    dtype: np.dtype,
    scalars: Any,
    seeds: Mapping[str, _bits.Seed],
    grad: Any,
    param: Any,
    encoded: Mapping[str, Any],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    g = jnp.asarray(grad, dtype)
    p = None if param is None else jnp.asarray(param, dtype)
    real = _storage.real_dtype(dtype)
    slots = {
        slot.name: _storage.load(encoded[slot.name], real if slot.non_negative else dtype, seeds.get(slot.name), g)
        for slot in rule.slots
    }
    with jax.numpy_dtype_promotion("standard"):  # strict promotion forbids real times complex
        step, slots = rule(scalars, g, p, slots)
    return _storage.saturate(step, jnp.result_type(grad)), {name: slots[name].encoded for name in encoded}


# --- Checks -------------------------------------------------------------------------------------------------


def _check_state(rule: Rule, state: Any, state_type: type[Any], updates: optax.Updates) -> None:
    if not isinstance(state, state_type):
        raise TypeError(f"state has type {type(state).__name__}: allowed is the {state_type.__name__} that init makes")
    if updates is None:  # its state is None, whatever is on
        return
    on = {slot.name for slot in rule.slots}
    for name in state_type._fields[1:]:
        if (name in on) == (getattr(state, name) is None):
            raise ValueError(
                f"state.{name} is {'' if name in on else 'not '}None: the state was made with other options"
            )


def _check_leaf(rule: Rule, path: Any, grad: Any, param: Any, encoded: Mapping[str, Any]) -> None:
    dtype = checked_dtype("gradient", path, grad)
    if any(x is None for x in encoded.values()):
        raise TypeError(
            f"gradient{keystr(path)} has dtype {dtype}, but its parameter has no state, as integers and "
            "booleans have none: allowed are None and float0"
        )
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"gradient{keystr(path)} has dtype {dtype}: allowed are floating and complex dtypes")
    for name, other in {"parameter": param, **encoded}.items():
        if other is not None and jnp.shape(other) != jnp.shape(grad):
            raise ValueError(
                f"gradient{keystr(path)} has shape {jnp.shape(grad)}, its {name} {jnp.shape(other)}: they must be equal"
            )
    for other in [param, *(encoded[slot.name] for slot in rule.slots if not slot.non_negative)]:
        if other is not None:
            _check_kind(path, grad, other)


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


def checked_dtype(kind: str, path: Any, leaf: Any) -> Any:
    """The dtype of a leaf, which must be a number or an array of numbers."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None and isinstance(leaf, (bool, int, float, complex)):
        dtype = jnp.result_type(leaf)
    if dtype is None or not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
        found = f"type {type(leaf).__name__}" if dtype is None else f"dtype {dtype}"
        raise TypeError(
            f"{kind}{keystr(path)} has {found}: allowed are arrays of numbers. Leave it out "
            "with eqx.filter(tree, eqx.is_inexact_array) or optax.masked"
        )
    return dtype


# --- Trees --------------------------------------------------------------------------------------------------


def flatten(tree: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """Leaves with their paths, where None is a leaf: a gradient that is missing, or a state."""
    return tree_flatten_with_path(tree, is_leaf=lambda x: x is None)


def column(updates: optax.Updates, tree: Any, name: str, kind: str = "gradient") -> list[Any]:
    """The leaves of `tree` in the order of the leaves of `updates`, or an error that names those without a partner."""
    (leaves, treedef), (others, other_treedef) = flatten(updates), flatten(tree)
    if treedef == other_treedef:
        return [leaf for _, leaf in others]
    ours, theirs = ({keystr(path) for path, _ in side} for side in (leaves, others))
    lacking = [f"no {kind} for {path} of {name}" for path in sorted(theirs - ours)]
    surplus = [f"no {path} in {name} for its {kind}" for path in sorted(ours - theirs)]
    differences = "; ".join(lacking + surplus) or f"{treedef} is not {other_treedef}"
    raise ValueError(f"the {kind}s must have the structure of {name}: {differences}")


def params_with_gradients(updates: optax.Updates, params: optax.Params, mask: Any) -> optax.Params:
    """`params` with None where there is no gradient or where the mask is False."""
    leaves, treedef = flatten(updates)
    given, selected = column(updates, params, "params"), column(updates, _masked(params, mask), "params")
    for i, (path, grad) in enumerate(leaves):
        if grad is None:
            selected[i] = None
        elif given[i] is None:
            raise ValueError(f"params{keystr(path)} is None, and there is a gradient for it")
        elif selected[i] is not None:
            checked_dtype("parameter", path, selected[i])
    return treedef.unflatten(selected)


def _masked(params: optax.Params, mask: Any) -> optax.Params:
    """`params` with None where the mask is False."""
    if mask is None:
        return params

    def select(path: Any, keep: Any, subtree: Any) -> Any:
        if not isinstance(keep, (bool, np.bool_)):
            raise TypeError(f"the mask{keystr(path)} has type {type(keep).__name__}: allowed are True and False")
        return subtree if keep else jax.tree.map(lambda _: None, subtree)

    tree = mask(params) if callable(mask) else mask
    try:
        return jax.tree.map_with_path(select, tree, params)
    except ValueError as error:
        raise ValueError(f"the mask must be a tree like the parameters', or a prefix of it: {error}") from None


def without_float0(updates: optax.Updates) -> optax.Updates:
    """Gradients of integers, as jax.grad(..., allow_int=True) makes them, become None. All others must be arrays."""
    leaves = jax.tree.leaves(updates)
    if all(isinstance(x, jax.Array) for x in leaves):
        return updates

    def leaf(path: Any, grad: Any) -> Any:
        if getattr(grad, "dtype", None) == jax.dtypes.float0:
            return None
        checked_dtype("gradient", path, grad)
        return grad

    return jax.tree.map_with_path(leaf, updates)
