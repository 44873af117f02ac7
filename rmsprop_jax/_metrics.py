"""Numbers to watch while a network trains."""

import collections
import functools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path
from jax.typing import ArrayLike

from . import _checks, _pytree, _storage
from ._rmsprop import _abs_sq
from ._text import listed, repeated
from .interop import _carry, _rows


Names = tuple[str, ...]  # the keys on the way to a leaf

LEARNING_RATES = ("learning_rate", "lr", "eta", "learningRate")  # as the dialects call it


def metrics(
    state: Any,
    updates: optax.Updates | None = None,
    params: optax.Params | None = None,
    *,
    eps: ArrayLike | None = None,
    eps_in_sqrt: bool = True,
    per_leaf: bool = False,
) -> dict[str, jax.Array]:
    """Numbers for a progress bar or TensorBoard, which tell whether a run is healthy.

    With ν as the state keeps it, without bias correction, and with the mean μ if centered::

        count            updates made
        learning_rate    the injected one, if one is injected
        grad_rms         √ mean(ν + |μ|²)       root mean square of recent gradients
        nu_min, nu_max   min ν, max ν           of the variance if centered
        at_floor         share of ν in code 0   the smallest, of all ν in one byte
        at_ceiling       share in code 255      the largest
        eps_share        mean ε / (ν + ε)       or ε / (√ν + ε) unless eps_in_sqrt; with `eps`
        update_rms       √ mean |u|²            with `updates`
        update_max       max |u|                with `updates`
        param_rms        √ mean |p|²            with `params`
        update_to_param  ‖u‖ / ‖p‖              with both

    An `eps_share` near 1 means that ε has taken over. RMSProp is then gradient descent at a rate of α/√ε, or α/ε
    outside the root. This is what makes the dialects part.

    Means are over all elements, so a large parameter weighs more than a small one. Leaves that are masked, `None`,
    integer or empty are left out. If none remains, the numbers are NaN. Squares neither overflow nor vanish.

    The learning rate is the one that :func:`optax.inject_hyperparams` keeps, with or without a schedule, under
    any name that a dialect has for it. Several rates, as in groups of :func:`optax.partition`, have their group
    in front: `kernels/learning_rate` and `rest/learning_rate`. If groups have different counts, `count` is the
    largest. It is NaN where nothing counts, as in a bare state of :func:`optax.scale_by_rms`.

    Args:
        state: the optimizer's state, in any wrapper, or a whole Flax `TrainState` or `nnx.Optimizer`. The states of
            :func:`optax.rmsprop`, :func:`optax.scale_by_rms` and :func:`optax.scale_by_stddev` are taken as well.
        updates: the updates that the optimizer returned, a tree like the parameters.
        params: the parameters, before or after the step. With `updates`, those that have an update count.
        eps: ε as the optimizer has it. The state does not keep it.
        eps_in_sqrt: as the optimizer has it.
        per_leaf: give the numbers of each leaf as well, such as `layer/kernel/grad_rms`. Flax's `value` at the end of
            a path is left out.

    Returns:
        A flat dict of scalars in float32. It can be computed inside `jax.jit`, `jax.lax.scan` and `jax.vmap`. The
        numbers are the same on any layout of devices, up to the order of summation.

    Raises:
        ValueError: `state` has no state of RMSProp, several for one parameter, or one that was vmapped; the trees do
            not fit; `eps` is out of range, or `eps_in_sqrt=False` is given without it.
        TypeError: an argument has the wrong type, or a leaf is no array.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from rmsprop_jax import metrics, rmsprop
        >>> def train(tx, scale, **options):
        ...     params = {"w": jnp.linspace(1.0, 2.0, 100)}
        ...     state = tx.init(params)
        ...     for _ in range(100):
        ...         grads = jax.tree.map(lambda p: scale * p, params)
        ...         updates, state = tx.update(grads, state, params)
        ...         params = optax.apply_updates(params, updates)
        ...     for name, number in metrics(state, updates, params, **options).items():
        ...         print(f"{name:15} {number:.2g}")

        A healthy run: ε is far below ν, and steps are as long as the learning rate.

        >>> train(optax.inject_hyperparams(rmsprop)(learning_rate=1e-3), scale=1.0, eps=1e-8)
        count           1e+02
        learning_rate   0.001
        eps_share       5.9e-09
        grad_rms        1.4
        nu_max          3.6
        nu_min          0.81
        param_rms       1.4
        update_max      0.001
        update_rms      0.00099
        update_to_param 0.0007

        ε is too large for these gradients, and steps are 60 times too short:

        >>> train(rmsprop(1e-3, eps=1e-8), scale=1e-6, eps=1e-8)
        count           1e+02
        eps_share       1
        grad_rms        1.5e-06
        nu_max          4e-12
        nu_min          1e-12
        param_rms       1.5
        update_max      2e-05
        update_rms      1.5e-05
        update_to_param 1e-05

        These gradients are too large for one byte. All codes are the largest:

        >>> train(rmsprop(1e-3, state_dtype=jnp.uint8), scale=1e8)
        count           1e+02
        at_ceiling      1
        at_floor        0
        grad_rms        4.5e+05
        nu_max          2.1e+11
        nu_min          2.1e+11
        param_rms       1.4
        update_max      0.001
        update_rms      0.001
        update_to_param 0.0007
    """
    eps_in_sqrt, per_leaf = _checks.flag("eps_in_sqrt", eps_in_sqrt), _checks.flag("per_leaf", per_leaf)
    if eps is None and not eps_in_sqrt:
        raise ValueError("eps_in_sqrt=False says where eps is added: it needs eps, got eps=None")
    eps = None if eps is None else _checks.number("eps", eps)

    contents = _carry.collect(state)
    _carry.check_has_rmsprop(contents, state, "this")
    rows = {_names(path): row._replace(trace=None) for path, row in contents.rows().items()}
    masked = {_names(path) for path in contents.masked()}
    changes = None if updates is None else _of_rmsprop(updates, rows, masked)
    values = None if params is None else _with_partner(params, rows if changes is None else changes)
    columns = _not_empty(rows), _not_empty(changes), _not_empty(values)

    numbers, of_leaves = _numbers(*columns, eps, eps_in_sqrt=eps_in_sqrt)
    found = {"count": _count(contents), **_learning_rates(contents), **numbers}
    if not per_leaf:
        return found
    labels = _labels(of_leaves)
    return found | {
        "/".join(filter(None, (labels[names], name))): number
        for names, numbers in of_leaves.items()
        for name, number in numbers.items()
    }


# --- The numbers ------------------------------------------------------------------------------------------


# At module level, with eps as an argument: outside jit one program serves all runs with these shapes.
@functools.partial(jax.jit, static_argnames="eps_in_sqrt")
def _numbers(
    rows: Mapping[Names, _rows.Row] | None,
    updates: Mapping[Names, Any] | None,
    params: Mapping[Names, Any] | None,
    eps: Any,
    eps_in_sqrt: bool,
) -> tuple[dict[str, jax.Array], dict[Names, dict[str, jax.Array]]]:
    """The numbers of all leaves together, and those of each."""
    of_leaves: dict[Names, dict[str, jax.Array]] = collections.defaultdict(dict)
    found: dict[str, list[tuple[int, jax.Array]]] = collections.defaultdict(list)  # sizes of leaves, and their numbers
    of_state = functools.partial(_of_state, eps=eps, eps_in_sqrt=eps_in_sqrt)
    for column, of_array in ((rows, of_state), (updates, _of_update), (params, _of_param)):
        for names, x in (column or {}).items():
            numbers = of_array(x)
            of_leaves[names] |= numbers
            for name, number in numbers.items():
                found[name].append((_size(x), number))
    expected = ["grad_rms", "nu_min", "nu_max", *(["eps_share"] if eps is not None else [])]
    expected += ["update_rms", "update_max"] if updates is not None else []
    expected += ["param_rms"] if params is not None else []
    of_all: dict[str, jax.Array] = dict.fromkeys(expected, jnp.asarray(jnp.nan, jnp.float32))
    for name, leaves in found.items():
        sizes, numbers = zip(*leaves, strict=True)
        of_all[name] = _of_all(name, sizes, numbers)
    return _finished(of_all), {names: _finished(numbers) for names, numbers in of_leaves.items()}


# One array. It is traced once for all leaves of a shape. Each reduction reads the array itself: what two of them share,
# such as |x|, XLA's CPU backend writes to memory, which takes five times as long.
@functools.partial(jax.jit, static_argnames="eps_in_sqrt")
def _of_state(row: _rows.Row, eps: Any, eps_in_sqrt: bool) -> dict[str, jax.Array]:
    nu, smallest, largest = (_storage.decode(x) for x in (row.nu, jnp.min(row.nu), jnp.max(row.nu)))
    second, bound = nu, largest
    if row.mu is not None:
        second, bound = _rows.second_moment(row.nu, row.mu), largest + _largest(_storage.decode(row.mu)) ** 2
    scale = _scale(bound)
    grad_rms = jnp.sqrt(scale) * jnp.sqrt(jnp.mean(second / scale))
    numbers = {"grad_rms": grad_rms, "nu_min": smallest, "nu_max": largest}
    if row.nu.dtype == jnp.uint8:
        numbers |= {"at_floor": jnp.mean(row.nu == 0), "at_ceiling": jnp.mean(row.nu == 255)}
    if eps is not None:
        eps = jnp.asarray(eps, nu.dtype)
        denominator = (nu if eps_in_sqrt else jnp.sqrt(nu)) + eps
        # An eps of 0 has no share in a denominator of 0.
        numbers["eps_share"] = jnp.mean(eps / jnp.maximum(denominator, float(jnp.finfo(nu.dtype).tiny)))
    return numbers


@jax.jit
def _of_update(x: Any) -> dict[str, jax.Array]:
    x = jnp.asarray(x, _storage.compute_dtype(jnp.result_type(x)))
    return {"update_rms": _rms(x), "update_max": _largest(x)}


@jax.jit
def _of_param(x: Any) -> dict[str, jax.Array]:
    return {"param_rms": _rms(jnp.asarray(x, _storage.compute_dtype(jnp.result_type(x))))}


def _rms(x: jax.Array, shares: jax.Array | None = None) -> jax.Array:
    """The root mean square, with the share that each element has."""
    scale = _scale(_largest(x))
    return scale * jnp.sqrt(jnp.average(_abs_sq(x / scale.astype(x.dtype)), weights=shares))


def _scale(largest: jax.Array) -> jax.Array:
    """A divisor that keeps sums and squares from overflowing or vanishing. NaN and inf stay as they are."""
    return jnp.where((largest > 0) & (largest < jnp.inf), largest, 1)


def _largest(x: jax.Array) -> jax.Array:
    """The largest |x|."""
    return jnp.max(jnp.abs(x)) if jnp.iscomplexobj(x) else jnp.maximum(jnp.max(x), -jnp.min(x))


def _of_all(name: str, sizes: Sequence[int], numbers: Sequence[jax.Array]) -> jax.Array:
    """The number of all leaves, from those of each."""
    dtype = np.result_type(*(x.dtype for x in numbers))
    x, shares = jnp.stack([x.astype(dtype) for x in numbers]), jnp.asarray(np.array(sizes) / sum(sizes), dtype)
    match name.rpartition("_")[2]:
        case "rms":
            return _rms(x, shares)
        case "min":
            return jnp.min(x)
        case "max":
            return jnp.max(x)
        case _:  # a share of the elements
            return jnp.sum(x * shares)


def _finished(numbers: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The numbers in float32, with update_to_param where both of its parts are there."""
    numbers = {name: x.astype(jnp.float32) for name, x in numbers.items()}
    if not {"update_rms", "param_rms"} <= numbers.keys():
        return numbers
    # Both are of the same elements, so the ratio of the norms is this. An update of zero is no movement, also of zero.
    update, param = numbers["update_rms"], numbers["param_rms"]
    return numbers | {"update_to_param": jnp.where(update == 0, 0, update / param)}


# --- What wrappers hold -------------------------------------------------------------------------------------


def _count(contents: _carry.Contents) -> jax.Array:
    counts = [_scalar("count", path, x) for path, x in contents.counts().items()]
    return functools.reduce(jnp.maximum, counts) if counts else jnp.float32(jnp.nan)


def _learning_rates(contents: _carry.Contents) -> dict[str, jax.Array]:
    """Injected rates. Where there are several, they are told apart by the keys at which their paths part."""
    found = {
        path: _scalar("the learning rate", path, contents.leaves[path])
        for path, key in contents.keys.items()
        if key.field == "hyperparams" and keystr(key.below[:1], simple=True) in LEARNING_RATES
    }
    rates = {}
    for path, rate in found.items():
        parts = {_carry.shared_keys(path, other) for other in found if other != path}
        rates["/".join(keystr((path[i],), simple=True) for i in sorted(parts)), "learning_rate"] = rate
    return {"/".join(filter(None, name)): rate for name, rate in rates.items()}


def _scalar(what: str, path: _rows.Path, x: Any) -> jax.Array:
    if np.shape(x) != ():
        raise ValueError(
            f"{what} in state{keystr(path)} has shape {np.shape(x)}, as vmap makes it: call jax.vmap(metrics)(state)"
        )
    return jnp.asarray(x, jnp.float32)


# --- Leaves by their names ----------------------------------------------------------------------------------


_BOX = ".value"  # the array in a variable of Flax


def _names(path: _rows.Path) -> Names:
    """The keys of a path. Those of a module and of its state are the same, though one has attributes."""
    names = tuple(keystr((key,), simple=True) for key in path)
    return (*names[:-1], _BOX) if path[-1:] == (GetAttrKey("value"),) else names


def _of_rmsprop(updates: optax.Updates, rows: Collection[Names], masked: Collection[Names]) -> dict[Names, Any]:
    """The updates of parameters that have a state."""
    leaves = _numeric("update", _leaves(updates))
    if strange := leaves.keys() - _related(leaves, {*rows, *masked}):
        raise ValueError(f"updates has {_listed(strange)}, and state nothing for it: both must be like the parameters")
    return {names: leaves[names] for names in _related(leaves, rows)}


def _with_partner(params: optax.Params, partners: Collection[Names]) -> dict[Names, Any]:
    """The parameters at the places of the updates, or of the state."""
    leaves = _leaves(params)
    found = _numeric("parameter", {names: leaves[names] for names in _related(leaves, partners)})
    if lacking := set(partners) - _related(partners, found):
        raise ValueError(f"params has nothing for {_listed(lacking)}: it must have all parameters that are updated")
    return found


def _leaves(tree: Any) -> dict[Names, tuple[_rows.Path, Any]]:
    return {_names(path): (path, x) for path, x in tree_flatten_with_path(tree)[0]}


def _numeric(kind: str, leaves: Mapping[Names, tuple[_rows.Path, Any]]) -> dict[Names, Any]:
    """Those of floating or complex numbers. Integers do not train, nor does float0, which stands for their gradient."""
    return {
        names: x
        for names, (path, x) in leaves.items()
        if getattr(x, "dtype", None) != jax.dtypes.float0
        and jnp.issubdtype(_pytree.checked_dtype(kind, path, x), jnp.inexact)
    }


def _related(paths: Iterable[Names], others: Iterable[Names]) -> set[Names]:
    """Those of the paths that lie at, above or below one of the others."""
    others = set(others)
    above = {other[:n] for other in others for n in range(len(other))}
    return {path for path in paths if path in above or any(path[:n] in others for n in range(len(path) + 1))}


def _listed(paths: Iterable[Names]) -> str:
    return listed(sorted("/".join(names) for names in paths))


def _not_empty(column: Mapping[Names, Any] | None) -> dict[Names, Any] | None:
    return None if column is None else {names: x for names, x in column.items() if _size(x)}


def _size(x: Any) -> int:
    return math.prod(np.shape(x.nu if isinstance(x, _rows.Row) else x))


def _labels(paths: Iterable[Names]) -> dict[Names, str]:
    """What to call each leaf: nobody wants to see Flax's boxes."""
    paths = set(paths)
    siblings = collections.Counter(names[:n] for names in paths for n in range(len(names)))

    def label(names: Names) -> str:
        if names[-1:] != (_BOX,):
            return "/".join(names)
        return "/".join(names[:-1] if siblings[names[:-1]] == 1 else (*names[:-1], "value"))

    labels = {names: label(names) for names in paths}
    if twice := repeated(labels.values()):
        raise ValueError(f"several leaves would be called {listed(twice)}: rename the keys that contain a slash")
    return labels
