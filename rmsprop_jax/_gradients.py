"""Transformations in front of the rule: they clip and scale gradients.

They treat None and float0 as the rule does, and keep dtypes. Their norms neither overflow nor gather a sharded array.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import _storage, _trees


__all__ = ["clip_adaptively", "clips", "scale"]


def scale(factor: Any) -> optax.GradientTransformation:
    return _before(_scale, factor)


def clips(value: Any = None, norm: Any = None, global_norm: Any = None) -> tuple[optax.GradientTransformation, ...]:
    """Clips each number, the norm of each gradient, and the norm of all together, in this order; None is off."""
    limits = {_clip_values: value, _clip_each: norm, _clip_together: global_norm}
    return tuple(_before(change, limit) for change, limit in limits.items() if limit is not None)


def clip_adaptively(agc: Any) -> optax.GradientTransformation:
    """Clips the norm of each gradient to `agc` times the norm of its parameter, or of 0.001 if that is larger."""
    return _before(_clip_adaptively, agc, params_for="agc")


# --- One place for trees, dtypes and jit --------------------------------------------------------------------


_Change = Callable[[Any, list[jax.Array], list[Any]], list[jax.Array]]


def _before(change: _Change, number: Any, params_for: str | None = None) -> optax.GradientTransformation:
    """A stateless transformation: `change` gets the number, the gradients that train, and parameters if needed.

    None and integers pass as they are; float0 becomes None, as in the rule.
    """

    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        updates = _trees.without_float0(updates)
        live = jax.tree.map(lambda g: g if jnp.issubdtype(jnp.result_type(g), jnp.inexact) else None, updates)
        grads, treedef = jax.tree.flatten(live)
        theirs = []
        if params_for is not None and grads:
            theirs = jax.tree.leaves(_trees.params_with_gradients(live, params, params_for))
        changed = treedef.unflatten(_changed(change, number, grads, theirs))
        return jax.tree.map(lambda grad, new: grad if new is None else new, updates, changed)

    return optax.stateless(update)


# At module level, with the number as an argument, like the rule's update: see _pytree.py.
@functools.partial(jax.jit, static_argnames="change", inline=True)
def _changed(change: _Change, number: Any, grads: list[Any], params: list[Any]) -> list[jax.Array]:
    # A float16 norm above 256 has a square that float16 cannot hold.
    wide, of_params = ([_storage.widened(x) for x in arrays] for arrays in (grads, params))
    with jax.numpy_dtype_promotion("standard"):  # strict promotion forbids real times complex
        new = change(number, wide, of_params)
    return [_storage.saturate(x, jnp.result_type(grad)) for x, grad in zip(new, grads, strict=True)]


# --- The changes, of lists of arrays ------------------------------------------------------------------------


def _scale(factor: Any, grads: list[jax.Array], params: list[jax.Array]) -> list[jax.Array]:
    return [factor * g for g in grads]


def _clip_values(limit: Any, grads: list[jax.Array], params: list[jax.Array]) -> list[jax.Array]:
    return [jnp.clip(g, -limit, limit) for g in grads]


def _clip_each(limit: Any, grads: list[jax.Array], params: list[jax.Array]) -> list[jax.Array]:
    return [g for grad in grads for g in _limited([grad], limit)]


def _clip_together(limit: Any, grads: list[jax.Array], params: list[jax.Array]) -> list[jax.Array]:
    return _limited(grads, limit)


def _clip_adaptively(agc: Any, grads: list[jax.Array], params: list[jax.Array]) -> list[jax.Array]:
    limits = [agc * jnp.maximum(1e-3, math.prod(_norm([p]))) for p in params]
    return [g for grad, limit in zip(grads, limits, strict=True) for g in _limited([grad], limit)]


def _limited(arrays: list[jax.Array], limit: Any) -> list[jax.Array]:
    """The arrays, scaled down by one factor if their common norm exceeds the limit."""
    unit, norm = _norm(arrays)
    fits = unit * norm <= limit
    factor = limit / jnp.where(fits, 1, norm)
    return [jnp.where(fits, x, x / unit * factor) for x in arrays]


def _norm(arrays: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The common norm of arrays, as a unit and the norm in that unit, so that squares of large numbers stay finite.

    Without reshaping, which would gather an array that is sharded. The derivative at 0 is 0.
    """
    parts = [part for x in arrays for part in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))]
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x), initial=0.0) for x in parts], jnp.float32(0.0))
    largest = jax.lax.stop_gradient(largest)
    unit = jnp.where((largest > jnp.finfo(largest.dtype).tiny) & (largest < jnp.inf), largest, 1)
    square = functools.reduce(jnp.add, [jnp.sum(jnp.square(x / unit)) for x in parts], jnp.float32(0.0))
    return unit, jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))
