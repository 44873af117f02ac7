"""From a rule for one array to an Optax transformation: trees, jit, dtypes, and errors that name the leaf.

Nothing here knows the equations.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export
from jax.tree_util import keystr, tree_flatten_with_path
from jax.typing import ArrayLike

from . import _bits, _placement, _storage, _trees


__all__ = ["Rule", "exportable", "transformation"]


class Rule(Protocol):
    """The update of one array. Hashed by value: equal rules share one compiled update."""

    @property
    def slots(self) -> Mapping[str, np.dtype]:
        """The slots in use, with their dtypes in a state of one byte. An unsigned dtype marks a slot that is real."""
        ...

    def scalars(self, count: jax.Array, hyperparameters: Any) -> Any:
        """The scalars that all leaves of one precision share. `count` is the number of this update, from 1."""
        ...

    def __call__(
        self, scalars: Any, grad: jax.Array, param: jax.Array | None, slots: Mapping[str, _storage.Accumulator]
    ) -> tuple[jax.Array, Mapping[str, _storage.Accumulator]]:
        """The update to add to the parameter, and the new accumulators. `param` is None where none is needed."""
        ...


def transformation(
    rule: Rule,
    hyperparameters: Callable[[jax.Array], Any],
    state_type: type[Any],
    initial: Mapping[str, ArrayLike],
    state_dtype: np.dtype | None = None,
    needs_params: str | None = None,
    params_mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation that applies a rule to each leaf.

    Args:
        rule: the update of one array.
        hyperparameters: maps the number of past updates to a tree of scalars.
        state_type: a NamedTuple with the fields `count` and the names of the slots.
        initial: first values of slots that do not start at zero.
        state_dtype: the dtype in which `init` makes the slots. `update` leaves them in the dtype they have.
        needs_params: the option for which `update` needs `params`, if there is one.
        params_mask: as in :func:`optax.masked`. The rule gets no `param` where it is False.
    """

    def init(params: optax.Params) -> Any:
        def build(slot: str) -> optax.Params:
            def leaf(path: Any, param: Any) -> jax.Array | None:
                if not jnp.issubdtype(_trees.checked_dtype("parameter", path, param), jnp.inexact):
                    return None
                return _storage.new(param, initial.get(slot, 0.0), state_dtype, rule.slots[slot])

            return jax.tree.map_with_path(leaf, params)

        # Slot by slot, not leaf by leaf: optax.tree.map_params passes a node without leaves.
        return state_type(count=_placement.zero_count(params), **{slot: build(slot) for slot in rule.slots})

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        updates = _trees.without_float0(updates)
        _check_state(rule, state, state_type)
        if needs_params is None:
            if params is not None:
                _check_kinds(updates, params)
            params = None
        else:
            params = _trees.params_with_gradients(updates, params, needs_params, params_mask)
        return _update(rule, hyperparameters(state.count), updates, state, params, extra_args.get("layer"))

    return optax.GradientTransformationExtraArgs(init, update)


def exportable(state_type: type[Any]) -> type[Any]:
    """Lets :mod:`jax.export` serialize programs whose arguments or results hold this NamedTuple."""
    # When a module is reloaded, the class of the first load stays registered.
    with contextlib.suppress(ValueError):
        export.register_namedtuple_serialization(
            state_type, serialized_name=f"{state_type.__module__}.{state_type.__name__}"
        )
    return state_type


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

    seed = functools.cache(functools.partial(_bits.seeds, count))

    def leaf(path: Any, grad: Any, param: Any, encoded: dict[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        _check_leaf(rule, path, grad, param, encoded)
        dtype = np.result_type(*(_storage.compute_dtype(jnp.result_type(x)) for x in (grad, *encoded.values())))
        seeds = {
            name: _bits.within_stack(seed(name), layer, x.shape)
            for name, x in encoded.items()
            if _storage.is_rounded(x.dtype)
        }
        return _update_array(rule, dtype, scalars(_storage.real_dtype(dtype)), seeds, grad, param, encoded)

    slots = {slot: getattr(state, slot) for slot in rule.slots}
    steps, slots = _trees.map_leaves(leaf, "gradient", updates, params, slots)
    return steps, state._replace(count=count, **slots)


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
    slots = {}
    for name in rule.slots:
        noise = _bits.noise(seeds[name], g) if name in seeds else None
        value = _storage.decode(encoded[name]).astype(dtype if jnp.iscomplexobj(encoded[name]) else real)
        slots[name] = _storage.Accumulator(encoded[name], value, noise)
    with jax.numpy_dtype_promotion("standard"):  # strict promotion forbids real times complex
        step, slots = rule(scalars, g, p, slots)
    return _storage.saturate(step, jnp.result_type(grad)), {name: slots[name].encoded for name in encoded}


# --- Checks -------------------------------------------------------------------------------------------------


def _check_state(rule: Rule, state: Any, state_type: type[Any]) -> None:
    if not isinstance(state, state_type):
        raise TypeError(f"state has type {type(state).__name__}: allowed is the {state_type.__name__} that init makes")
    if all(x is None for x in state[1:]):  # the tree is one leaf that does not train, whatever is on
        return
    for name in state_type._fields[1:]:
        if (name in rule.slots) == (getattr(state, name) is None):
            found = f"state.{name} is {'' if name in rule.slots else 'not '}None"
            raise ValueError(f"{found}: the state was made with other options. Use carry_over(state, tx.init(params))")


def _check_leaf(rule: Rule, path: Any, grad: Any, param: Any, encoded: Mapping[str, Any]) -> None:
    dtype = _trees.checked_dtype("gradient", path, grad)
    if any(x is None for x in encoded.values()):
        raise TypeError(
            f"gradient{keystr(path)} has dtype {dtype}, but its parameter is an integer or boolean and does not "
            "train: pass None or float0, or leave it out with eqx.partition or optax.masked (as optax.MultiSteps needs)"
        )
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"gradient{keystr(path)} has dtype {dtype}: allowed are floating and complex dtypes")
    signed = [x for name, x in encoded.items() if not jnp.issubdtype(rule.slots[name], jnp.unsignedinteger)]
    for other in [param, *signed]:
        if other is not None:
            _check_kind(path, grad, other)


def _check_kinds(updates: optax.Updates, params: Any) -> None:
    """Checks that a gradient is complex where its parameter is, if the structures of both are equal."""
    (leaves, treedef), (others, other_treedef) = tree_flatten_with_path(updates), jax.tree.flatten(params)
    if treedef == other_treedef:
        for (path, grad), param in zip(leaves, others, strict=True):
            if hasattr(param, "dtype"):
                _check_kind(path, grad, param)


def _check_kind(path: Any, grad: Any, other: Any) -> None:
    if jnp.iscomplexobj(grad) != jnp.iscomplexobj(other):
        kinds = "complex, its parameter is real" if jnp.iscomplexobj(grad) else "real, its parameter is complex"
        raise TypeError(f"gradient{keystr(path)} is {kinds}: both must be real or both complex")
