"""States of RMSProp, ours and Optax's, as rows: the accumulators of one parameter, by its path.

Every row is in our terms: ν is a variance if there is a mean beside it, and the buffer is that of p ← p - b.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import tree_flatten_with_path

from .. import _storage
from .._rmsprop import RMSPropState


Path = tuple[Any, ...]


class Row(NamedTuple):
    """The accumulators of one parameter; None where its group has no such slot."""

    nu: Any
    mu: Any = None
    trace: Any = None


# --- One state and its rows -------------------------------------------------------------------------------


def is_rmsprop(x: Any, whole: bool = True) -> bool:
    """Whether this is a state of ours, or of optax.scale_by_rms, optax.scale_by_stddev or optax.rmsprop.

    The state of optax.rmsprop is a tuple of three, which a chain of the same three parts has as well. Without
    `whole` only its first part counts.
    """
    if isinstance(x, (RMSPropState, *_second_moments())):
        return True
    return whole and _is_triple(x, _second_moments(), (optax.EmptyState, optax.TraceState))


def is_chain(x: Any) -> bool:
    """Whether this is a chain of the three parts of optax.rmsprop, of which the first may be ours."""
    return _is_triple(x, (RMSPropState, *_second_moments()), (optax.TraceState,)) and fields(x[0]).trace is None


def _is_triple(x: Any, first: tuple[type, ...], last: tuple[type, ...]) -> bool:
    parts = first, (optax.EmptyState, optax.ScaleByScheduleState), last
    return type(x) is tuple and len(x) == 3 and all(map(isinstance, x, parts))


def fields(node: Any) -> RMSPropState:
    """Such a state under our names, with everything in it as it is."""
    parts = node if type(node) is tuple else (node,)
    named = {name: value for part in reversed(parts) for name, value in part._asdict().items()}
    return RMSPropState(**{"count": None} | named)  # pyright: ignore[reportArgumentType] (Optax may not count)


def with_fields(node: Any, values: Mapping[str, Any]) -> Any:
    """The reverse of `fields`."""
    parts = node if type(node) is tuple else (node,)
    new = tuple(part._replace(**{name: x for name, x in values.items() if name in part._fields}) for part in parts)
    return new if type(node) is tuple else new[0]


def rows(node: Any) -> dict[Path, Row]:
    """The rows of such a state, in our terms."""
    state = fields(node)
    columns = [by_path(getattr(state, slot)) for slot in Row._fields]
    found = {path: Row(*(column.get(path) for column in columns)) for path, x in columns[0].items() if not is_masked(x)}
    return found if isinstance(node, RMSPropState) else {path: _from_optax(row) for path, row in found.items()}


def in_terms_of(node: Any, row: Row) -> Row:
    """A row as `node` keeps it."""
    theirs = not isinstance(node, RMSPropState)
    if row.mu is not None and (theirs or fields(node).mu is None):
        row = row._replace(nu=second_moment(row.nu, row.mu))
    if theirs and row.trace is not None:
        row = row._replace(trace=-_storage.decode(row.trace))
    return row


def _from_optax(row: Row) -> Row:
    nu, mu, trace = (None if x is None else jnp.asarray(x, _storage.compute_dtype(x.dtype)) for x in row)
    nu = None if nu is None else nu.real  # complex there, with an imaginary part of zero
    return Row(nu if mu is None else variance(nu, mu), mu, None if trace is None else -trace)


@functools.cache  # at first use: importing must not compute anything
def _second_moments() -> tuple[type, ...]:
    """The states of Optax that have a second moment. It does not export all of them."""
    transformations = [optax.scale_by_rms, optax.scale_by_stddev]
    return tuple(type(make(bias_correction=flag).init(())) for make in transformations for flag in (False, True))


# --- Mean square and variance -----------------------------------------------------------------------------


def variance(second: Any, mean: Any) -> Any:
    """E[g²] - |E[g]|²."""
    return (abs(second) - abs(mean) ** 2).clip(0)


def second_moment(nu: Any, mu: Any) -> Any:
    """The reverse of `variance`, from accumulators as a state keeps them."""
    return _storage.decode(nu) + abs(_storage.decode(mu)) ** 2


# --- Paths ------------------------------------------------------------------------------------------------


def by_path(tree: Any) -> dict[Path, Any]:
    """Leaves by their paths; a masked subtree is a leaf."""
    return dict(tree_flatten_with_path(tree, is_leaf=is_masked)[0])


def is_masked(x: Any) -> bool:
    """Whether another group, or nobody, has the parameters of this subtree."""
    return isinstance(x, optax.MaskedNode)


# --- All parameters as one vector -------------------------------------------------------------------------


def refitted(found: dict[Path, Row], places: Mapping[Path, Any]) -> dict[Path, Row]:
    """The rows for these places, where one of the two is a vector of all parameters, as optax.flatten makes it."""
    shapes = {path: np.shape(row.nu) for path, row in found.items()}, {path: np.shape(x) for path, x in places.items()}
    vectors = [list(side) == [()] and len(side[()]) == 1 for side in shapes]
    sizes = [sum(map(math.prod, side.values())) for side in shapes]
    if vectors[0] == vectors[1] or sizes[0] != sizes[1]:
        return found
    if vectors[1]:
        return {(): Row(*map(_joined, zip(*found.values(), strict=True)))}
    ends = np.cumsum([math.prod(shape) for shape in shapes[1].values()]).tolist()
    return {
        path: Row(*(x if x is None else x[end - math.prod(shape) : end].reshape(shape) for x in found[()]))
        for (path, shape), end in zip(shapes[1].items(), ends, strict=True)
    }


def _joined(column: tuple[Any, ...]) -> Any:
    if any(x is None for x in column):
        return None
    alike = len({x.dtype for x in column}) == 1
    flat = [jnp.ravel(x if alike else _storage.decode(x)) for x in column]
    widest = jnp.result_type(*flat)
    return jnp.concatenate([x.astype(widest) for x in flat])


# --- Several states as one --------------------------------------------------------------------------------


def merged(tree: Any, other: Any) -> Any:
    """The trees of two groups as one: each is masked where the other has its parameters."""
    holes = {path for path, x in by_path(other).items() if is_masked(x)}
    return jax.tree_util.tree_map_with_path(
        lambda _, x, y: y if is_masked(x) else x,
        tree,
        other,
        is_leaf=lambda path, x: is_masked(x) or path in holes,
        is_leaf_takes_path=True,
    )
