"""Numbers to watch while a network trains."""

import collections
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr
from jax.typing import ArrayLike

from . import _checks, _states, _storage, _trees
from ._rmsprop import _abs_sq
from ._states import Accumulators, Name, shown_names
from ._text import listed, repeated


__all__ = ["metrics"]


def metrics(
    state: Any,
    updates: optax.Updates | None = None,
    params: optax.Params | None = None,
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    eps: ArrayLike | None = None,
    eps_in_sqrt: bool = True,
    per_leaf: bool = False,
) -> dict[str, jax.Array]:
    """Numbers for a progress bar or TensorBoard, which tell whether a run is healthy.

    With ν as the state keeps it, without bias correction, and with the mean μ if centered::

        count            updates made
        learning_rate    of the last update     if injected, or with `learning_rate`
        grad_rms         √ mean(ν + |μ|²)       root mean square of recent gradients
        nu_min, nu_max   min ν, max ν           of the variance if centered
        at_floor         share of ν in code 0   the smallest, of all ν in one byte
        at_ceiling       share in code 255      the largest
        eps_share        mean ε / (ν + ε)       or ε / (√ν + ε) unless eps_in_sqrt; with `eps`
        update_rms       √ mean |u|²            with `updates`
        update_max       max |u|                with `updates`
        param_rms        √ mean |p|²            with `params`
        update_to_param  ‖u‖ / ‖p‖              with both

    An `eps_share` near 1 means that ε has taken over. RMSProp is then gradient descent with a learning rate of α/√ε, or
    α/ε outside the root. This is where the dialects differ most.

    Means are over all elements, so a large parameter weighs more than a small one. Leaves that are masked, `None`,
    integer or empty are left out. If none remains, the numbers are NaN. Squares neither overflow nor vanish.

    The learning rate is the one that :func:`optax.inject_hyperparams` keeps, with or without a schedule, under
    any name that a dialect has for it. With several, as in groups of :func:`optax.partition`, each has its group
    in front: `kernels/learning_rate` and `rest/learning_rate`. If groups have different counts, `count` is the
    largest. It is NaN where nothing counts, as in a bare state of :func:`optax.scale_by_rms`.

    A schedule that is not injected is no part of the state. Pass it as `learning_rate`: it is read where the last
    update has read it, at `count - 1`, or at 0 before the first update.

    Args:
        state: the optimizer's state, in any wrapper, or a whole Flax `TrainState` or `nnx.Optimizer`. The states of
            :func:`optax.rmsprop`, :func:`optax.scale_by_rms` and :func:`optax.scale_by_stddev` are taken as well.
        updates: the updates that the optimizer returned, a tree like the parameters.
        params: the parameters, before or after the step. With `updates`, those that have an update count.
        learning_rate: the schedule that the optimizer has, or a number, if none is injected.
        eps: ε as the optimizer has it. The state does not keep it.
        eps_in_sqrt: as the optimizer has it.
        per_leaf: give the numbers of each leaf as well, such as `layer/kernel/grad_rms`. The boxes in which Flax keeps
            arrays (`.value`) are left out.

    Returns:
        A flat dict of scalars in float32. It can be computed inside `jax.jit`, `jax.lax.scan` and `jax.vmap`. The
        numbers are the same on any layout of devices, up to the order of summation.

    Raises:
        ValueError: `state` has no state of RMSProp, several for one parameter, or one that was vmapped; names or
            shapes differ; `eps` is out of range, or `eps_in_sqrt=False` is given without it; `learning_rate` is given
            and one is injected, or it is a schedule and nothing counts.
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
        ...     return {name: f"{x:.2g}" for name, x in metrics(state, updates, params, **options).items()}

        A healthy run: ε is far below ν, and steps are as long as the learning rate.

        >>> numbers = train(optax.inject_hyperparams(rmsprop)(learning_rate=1e-3), scale=1.0, eps=1e-8)
        >>> for name, number in numbers.items():
        ...     print(f"{name:15} {number}")
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

        >>> numbers = train(rmsprop(1e-3, eps=1e-8), scale=1e-6, eps=1e-8)
        >>> numbers["eps_share"], numbers["update_rms"]
        ('1', '1.5e-05')

        These gradients are too large for one byte. All codes are the largest:

        >>> numbers = train(rmsprop(1e-3, state_dtype=jnp.uint8), scale=1e8)
        >>> numbers["at_ceiling"], numbers["nu_max"]
        ('1', '2.1e+11')
    """
    eps_in_sqrt, per_leaf = _checks.flag("eps_in_sqrt", eps_in_sqrt), _checks.flag("per_leaf", per_leaf)
    if eps is None and not eps_in_sqrt:
        raise ValueError("eps_in_sqrt=False needs eps, got eps=None: pass the eps of the optimizer")
    eps = None if eps is None else _checks.number("eps", eps)

    contents = _states.contents_of(state)
    found = {name: x._replace(trace=None) for name, x in contents.accumulators().items()}
    shapes = {name: np.shape(x.nu) for name, x in found.items()}
    changes = None if updates is None else _updates_for(updates, shapes, contents.masked())
    partners = ("state", shapes) if changes is None else ("updates", {name: np.shape(x) for name, x in changes.items()})
    values = None if params is None else _params_for(params, *partners)

    of_all, of_leaves = _numbers(found, changes, values, eps, eps_in_sqrt=eps_in_sqrt)
    count = _count(contents)
    numbers = {"count": jnp.asarray(count, jnp.float32), **_learning_rates(contents, learning_rate, count), **of_all}
    if not per_leaf:
        return numbers
    labels = {name: "/".join(name) for name in of_leaves if name}  # a bare array's are those of all
    if twice := repeated(labels.values()):
        raise ValueError(f"several leaves would be called {listed(twice)}: rename the keys that contain a slash")
    return numbers | {f"{label}/{key}": x for name, label in labels.items() for key, x in of_leaves[name].items()}


# --- The numbers ------------------------------------------------------------------------------------------


# At module level, with eps as an argument: outside jit one program serves all runs with these shapes.
@functools.partial(jax.jit, static_argnames="eps_in_sqrt")
def _numbers(
    accumulators: Mapping[Name, Accumulators],
    updates: Mapping[Name, Any] | None,
    params: Mapping[Name, Any] | None,
    eps: Any,
    eps_in_sqrt: bool,
) -> tuple[dict[str, jax.Array], dict[Name, dict[str, jax.Array]]]:
    """The numbers of all leaves together, and those of each."""
    of_leaves: dict[Name, dict[str, jax.Array]] = collections.defaultdict(dict)
    found: dict[str, list[tuple[int, jax.Array]]] = collections.defaultdict(list)  # sizes of leaves, and their numbers
    of_state = functools.partial(_of_state, eps=eps, eps_in_sqrt=eps_in_sqrt)
    nan = jnp.float32(jnp.nan)
    for column, of_array, nothing in (
        (accumulators, of_state, Accumulators(nan)),
        (updates, _of_update, nan),
        (params, _of_param, nan),
    ):
        if column is None:
            continue
        for name, x in ({name: x for name, x in column.items() if _size(x)} or {(): nothing}).items():
            numbers = of_array(x)
            of_leaves[name] |= numbers
            for key, number in numbers.items():
                found[key].append((_size(x), number))
    of_all = {key: _of_all(key, *zip(*leaves, strict=True)) for key, leaves in found.items()}
    return _finished(of_all), {name: _finished(numbers) for name, numbers in of_leaves.items()}


# One array. It is traced once for all leaves of a shape. Each reduction reads the array itself: what two of them share,
# such as |x|, XLA's CPU backend writes to memory, which takes five times as long.
@functools.partial(jax.jit, static_argnames="eps_in_sqrt")
def _of_state(state: Accumulators, eps: Any, eps_in_sqrt: bool) -> dict[str, jax.Array]:
    nu, smallest, largest = (_storage.decode(x) for x in (state.nu, jnp.min(state.nu), jnp.max(state.nu)))
    second, bound = nu, largest
    if state.mu is not None:
        second, bound = _states.second_moment(state.nu, state.mu), largest + _largest(_storage.decode(state.mu)) ** 2
    scale = _scale(bound)
    grad_rms = jnp.sqrt(scale) * jnp.sqrt(jnp.mean(second / scale))
    numbers = {"grad_rms": grad_rms, "nu_min": smallest, "nu_max": largest}
    if state.nu.dtype == jnp.uint8:
        numbers |= {"at_floor": jnp.mean(state.nu == 0), "at_ceiling": jnp.mean(state.nu == 255)}
    if eps is not None:
        eps = jnp.asarray(eps, nu.dtype)
        denominator = (nu if eps_in_sqrt else jnp.sqrt(nu)) + eps
        # An eps of 0 has no share in a denominator of 0.
        numbers["eps_share"] = jnp.mean(eps / jnp.maximum(denominator, float(jnp.finfo(nu.dtype).tiny)))
    return numbers


@jax.jit
def _of_update(x: Any) -> dict[str, jax.Array]:
    x = _storage.widened(x)
    return {"update_rms": _rms(x), "update_max": _largest(x)}


@jax.jit
def _of_param(x: Any) -> dict[str, jax.Array]:
    return {"param_rms": _rms(_storage.widened(x))}


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


# --- What the state says ----------------------------------------------------------------------------------


def _count(contents: _states.Contents) -> Any:
    """The updates made, the most of all groups; NaN where nothing counts."""
    counts = [_scalar("count", path, x) for at in contents.states for path, x in contents.counts(at).items()]
    return functools.reduce(jnp.maximum, counts) if counts else jnp.nan


def _learning_rates(contents: _states.Contents, given: Any, count: Any) -> dict[str, jax.Array]:
    """Injected rates and the one that is given. Several are told apart by the keys at which their paths part."""
    injected = {path: _scalar("the learning rate", path, x) for path, x in contents.learning_rates().items()}
    rates = {}
    for path, rate in injected.items():
        parts = sorted({_states.shared_keys(path, other) for other in injected if other != path})
        rates["/".join([*(keystr((path[i],), simple=True) for i in parts), "learning_rate"])] = rate
    if given is not None:
        if "learning_rate" in rates:
            raise ValueError("learning_rate is given, but state has an injected one: leave the argument out")
        if callable(given) and not isinstance(count, jax.Array):
            raise ValueError("nothing in state counts updates, which a schedule needs: pass a number as learning_rate")
        last = jnp.maximum(count - 1, 0)  # `update` reads a schedule before it counts
        rates["learning_rate"] = _checks.schedule("learning_rate", given, lower=-math.inf)(last)
    return {name: jnp.asarray(rate, jnp.float32) for name, rate in rates.items()}


def _scalar(what: str, path: _states.Path, x: Any) -> jax.Array:
    if np.shape(x) != ():
        raise ValueError(
            f"{what} in state{keystr(path)} has shape {np.shape(x)}, as vmap makes it: call jax.vmap(metrics)(state)"
        )
    return jnp.asarray(x)


# --- Trees like the parameters ----------------------------------------------------------------------------


Shapes = Mapping[Name, tuple[int, ...]]


def _updates_for(updates: Any, shapes: Shapes, masked: Collection[Name]) -> dict[Name, Any]:
    """The updates of parameters that have a state."""
    leaves = _states.arrays_of(updates)
    found = _fitting("update", leaves, "state", shapes)
    left = leaves.keys() - found.keys()
    if strange := [name for name in left if not _start(name, masked) and _trains("update", name, leaves[name])]:
        raise ValueError(f"state has nothing for {shown_names(strange)} of updates: pass both of the same model")
    return found


def _params_for(params: Any, other: str, shapes: Shapes) -> dict[Name, Any]:
    """The parameters that have an update or, if no updates are given, a state."""
    leaves = _states.arrays_of(params)
    if lacking := shapes.keys() - {partner for _, partner in _pairs(leaves, shapes)}:
        raise ValueError(f"params has nothing for {shown_names(lacking)}: pass all parameters that are updated")
    return _fitting("parameter", leaves, other, shapes)


def _pairs(leaves: Collection[Name], shapes: Collection[Name]) -> list[tuple[Name, Name]]:
    """Leaves with their partners.

    One name may continue the other: optax.flatten makes one vector of all parameters, and
    optax.contrib.split_real_and_imaginary makes two arrays of one.
    """
    found = {(name, partner) for name in leaves for partner in _start(name, shapes)}
    return sorted(found | {(name, partner) for partner in shapes for name in _start(partner, leaves)})


def _start(name: Name, others: Collection[Name]) -> list[Name]:
    """The other name that this one equals or continues, if there is one."""
    return [name[:n] for n in range(len(name) + 1) if name[:n] in others]


def _fitting(kind: str, leaves: Mapping[Name, Any], other: str, shapes: Shapes) -> dict[Name, Any]:
    """The leaves that train and have a partner, which must have their shape."""
    pairs = [(name, partner) for name, partner in _pairs(leaves, shapes) if _trains(kind, name, leaves[name])]
    found = {name: leaves[name] for name, _ in pairs}
    vector = (sum(map(_size, found.values())),)
    for name, partner in pairs:
        shape, wanted = np.shape(leaves[name]), shapes[partner]
        if shape != wanted and (partner, wanted) != ((), vector):
            raise ValueError(
                f"{kind}{_states.shown(name)} has shape {shape}, but {other} has {wanted} for it: they must be equal"
            )
    return found


def _trains(kind: str, name: Name, x: Any) -> bool:
    if getattr(x, "dtype", None) == jax.dtypes.float0:  # the gradient of an integer
        return False
    return jnp.issubdtype(_trees.checked_dtype(f"{kind}{_states.shown(name)}", (), x), jnp.inexact)


def _size(x: Any) -> int:
    return math.prod(np.shape(x.nu if isinstance(x, Accumulators) else x))
