"""From a rule for one array to an Optax transformation: trees, jit, dtypes, leaf errors.

Nothing here knows what the rule computes.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_flatten_with_path
from jax.typing import ArrayLike, DTypeLike

from . import _storage


class Rule(Protocol):
    """The update of one array. Hashed by value: equal rules share one compiled update."""

    def scalars(self, hyper: Any, count: jax.Array) -> Any:
        """What is the same for all leaves of a precision, from `lift`'s numbers and the number of this update."""
        ...

    def __call__(self, *args: Any, **slots: Any) -> jax.Array:
        """rule(scalars, grad, param or None, keep, largest, **slots) -> update, all in one precision.

        keep(name, value) puts a slot's new value into the state and returns what the state then holds, which
        may be rounded; `largest` is the largest value that every slot can hold.
        """
        ...


class Slot(NamedTuple):
    """What a rule remembers of each parameter."""

    initial: ArrayLike  # shape=()
    non_negative: bool = False  # and real even where the parameter is complex


def lift(
    rule: Rule,
    hyper: Callable[[jax.Array], Any],
    slots: Mapping[str, Slot | None],
    state_type: Callable[..., Any],
    state_dtype: np.dtype | None = None,
    params_for: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lifts a rule for one array to a gradient transformation.

    Args:
        rule: the update of one array.
        hyper: from the number of updates made so far to the rule's numbers, a tree of scalars.
        slots: what the state holds beside `count`; None where it holds nothing.
        state_type: builds the state, a NamedTuple, from `count` and the slots' names.
        state_dtype: how `init` has the slots kept; `update` leaves them in the dtype they have.
        params_for: the option for which `update` needs `params`, if there is one.
    """

    def init(params: optax.Params) -> Any:
        # Slot by slot, not leaf by leaf: optax.tree.map_params hands in a node without leaves.
        def build(slot: Slot) -> optax.Params:
            def leaf(path: Any, param: Any) -> jax.Array:
                dtype = _storage.compute_dtype(_checked_dtype("parameter", path, param))
                dtype = _storage.real_dtype(dtype) if slot.non_negative else dtype
                return _storage.full_like(
                    param, slot.initial, _storage.kept_dtype(dtype, state_dtype, slot.non_negative)
                )

            return jax.tree.map_with_path(leaf, params)

        trees = {name: None if slot is None else build(slot) for name, slot in slots.items()}
        return state_type(count=_zero_count(params), **trees)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        if params_for is None:
            params = None
        elif params is None:
            paths = [keystr(path) for path, _ in tree_flatten_with_path(updates)[0]]
            raise ValueError(f"{params_for} needs the parameters {paths}: call update(updates, state, params)")
        for name, slot in slots.items():
            # (A tree that is None has state that is None.)
            if updates is not None and (slot is None) != (getattr(state, name) is None):
                raise ValueError(f"state.{name} is {'not ' if slot is None else ''}None: made with other options")
        return _update(rule, hyper(state.count), updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


# At module level, with every number an argument: a transformation that is built anew at
# each step, as optax.inject_hyperparams does, finds the update that the last one compiled.
@functools.partial(jax.jit, static_argnames="rule", inline=True)
def _update(
    rule: Rule, hyper: Any, updates: optax.Updates, state: Any, params: optax.Params | None
) -> tuple[optax.Updates, Any]:
    count = jnp.asarray(optax.safe_increment(state.count))
    scalars_in = functools.cache(
        lambda dtype: rule.scalars(jax.tree.map(lambda x: jnp.asarray(x, dtype), hyper), count)
    )
    trees = {name: tree for name, tree in state._asdict().items() if name != "count" and tree is not None}
    seeds = {name: _storage.seeds(count, i) for i, name in enumerate(trees)}

    leaves, treedef = tree_flatten_with_path(updates)
    params_column = _column(updates, params, "params") if params is not None else [None] * len(leaves)
    columns = {name: _column(updates, tree, f"state.{name}") for name, tree in trees.items()}

    steps: list[jax.Array] = []
    new_columns: dict[str, list[jax.Array]] = {name: [] for name in trees}
    for i, (path, grad) in enumerate(leaves):
        kept = {name: column[i] for name, column in columns.items()}
        step, new = _update_leaf(rule, scalars_in, seeds, path, grad, params_column[i], kept)
        steps.append(step)
        for name in trees:
            new_columns[name].append(new[name])
    new_trees = {name: treedef.unflatten(column) for name, column in new_columns.items()}
    return treedef.unflatten(steps), state._replace(count=count, **new_trees)


def _update_leaf(
    rule: Rule,
    scalars_in: Callable[[Any], Any],
    seeds: Mapping[str, Any],
    path: Any,
    grad: Any,
    param: Any,
    kept: dict[str, Any],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    grad_dtype = _checked_dtype("gradient", path, grad)
    for name, other in {"parameter": param, **kept}.items():
        if other is not None and jnp.shape(other) != jnp.shape(grad):
            raise ValueError(
                f"gradient{keystr(path)} has shape {jnp.shape(grad)}, its {name} {jnp.shape(other)}: they must be equal"
            )
    # In the gradient's precision or the state's, whichever is higher.
    wide = np.result_type(*(_storage.compute_dtype(dtype) for dtype in (grad_dtype, *(x.dtype for x in kept.values()))))
    step, new = _apply(rule, wide, scalars_in(_storage.real_dtype(wide)), seeds, grad, param, kept)
    if step.dtype != grad_dtype or any(new[name].dtype != x.dtype for name, x in kept.items()):
        raise TypeError(f"gradient{keystr(path)} is {grad_dtype}: it must be complex just where its parameter is")
    return step, new


# One array, once for all leaves of a shape: traced once, and lowered to one function with a call
# for each leaf. XLA inlines the calls before it simplifies and fuses: the program is the same.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(
    rule: Rule,
    wide: np.dtype,
    scalars: Any,
    seeds: Mapping[str, Any],
    grad: Any,
    param: Any,
    kept: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    real = _storage.real_dtype(wide)
    grad_wide = jnp.asarray(grad, wide)
    param_wide = None if param is None else jnp.asarray(param, wide)
    slots = {name: _storage.load(x).astype(wide if jnp.iscomplexobj(x) else real) for name, x in kept.items()}
    new: dict[str, jax.Array] = {}

    def keep(name: str, x: jax.Array) -> jax.Array:
        dtype = kept[name].dtype
        new[name] = _storage.store(x, dtype, seeds[name], grad_wide) if _holds(dtype, x) else x
        return _storage.load(new[name]).astype(x.dtype)

    largest = min(_storage.largest(x.dtype) for x in kept.values())
    with jax.numpy_dtype_promotion("standard"):  # strict promotion forbids real times complex
        step = rule(scalars, grad_wide, param_wide, keep, largest, **slots)
    dtype = jnp.result_type(grad)
    return step.astype(dtype) if _holds(dtype, step) else step, new


def _holds(dtype: DTypeLike, x: jax.Array) -> bool:
    """Whether no imaginary part would be lost. If one would, the caller, who knows the leaf's path, says so."""
    return jnp.issubdtype(dtype, jnp.complexfloating) or not jnp.iscomplexobj(x)


def _column(updates: optax.Updates, tree: Any, name: str) -> list[Any]:
    """The leaves of `tree` in the order of `updates`' leaves; an error that names those without a partner."""
    treedef = jax.tree.structure(updates)
    if jax.tree.structure(tree) == treedef:
        return jax.tree.leaves(tree)
    grads, others = ({keystr(path) for path, _ in tree_flatten_with_path(t)[0]} for t in (updates, tree))
    lacking = [f"no gradient for {path} of {name}" for path in sorted(others - grads)]
    surplus = [f"no {path} in {name} for its gradient" for path in sorted(grads - others)]
    what = "; ".join(lacking + surplus) or f"{treedef} is not {jax.tree.structure(tree)}"
    raise ValueError(f"the gradients must have the structure of {name}: {what}")


def _checked_dtype(kind: str, path: Any, leaf: Any) -> DTypeLike:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"{kind}{keystr(path)} has dtype {dtype}, allowed are floating and complex: "
            "leave other leaves out (None, optax.masked) or convert them"
        )
    return dtype


def _zero_count(params: optax.Params) -> jax.Array:
    # On the parameters' mesh from the start. The first update would move it there, and the
    # second, finding it elsewhere than the first did, would compile again.
    for leaf in jax.tree.leaves(params):
        sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding):
            return jnp.zeros((), jnp.int32, device=NamedSharding(sharding.mesh, PartitionSpec()))
    return jnp.zeros((), jnp.int32)
