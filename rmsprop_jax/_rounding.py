"""bfloat16 parameters that keep learning."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr, tree_flatten_with_path

from . import _bits, _equality, _placement, _pytree, _storage


class RoundParamsState(NamedTuple):
    """The state of :func:`round_params_stochastically`."""

    step: jax.Array  # updates made so far; shape=(), dtype=int32, stops at the largest
    rest: Any = None  # with `keep_rest`, a tree like the parameters; int8, or None for leaves that are not bfloat16


def round_params_stochastically(keep_rest: bool = False) -> optax.GradientTransformationExtraArgs:
    """Rounds bfloat16 parameters up or down at random, so that small steps are not lost.

    A bfloat16 parameter of size 1 cannot move by less than 2⁻⁸ of itself. Steps below half of that are lost
    when they are rounded to nearest, and training stands still. This transformation comes last in a
    chain, behind any optimizer. It replaces each update u of a bfloat16 parameter p by::

        p' = p + u, rounded to one of its two bfloat16 neighbours
        u ← p' - p

    with probabilities that make the mean of p' equal to p + u. The sum is that of float32, so a step is lost
    only where a float32 parameter would lose it. :func:`optax.apply_updates` then lands on p': exactly if p' is
    between p/2 and 2p, and within three units in the last place otherwise, where a bfloat16 u may not hold
    the difference. An update of zero changes no bit. NaN and inf pass.

    With `keep_rest` the state keeps what is rounded away, in one more byte. Parameter and rest together are a
    float of 24 bits, w, which is rounded stochastically below those::

        w' = w + u, rounded to one of its two neighbours of 24 bits
        p' = the bfloat16 nearest to w',  rest' = w' - p' in units of 2⁻⁸ of p's last place

    The network runs on p, and the optimizer moves w, as it would move a float32 parameter but for the rounding.
    Where a bfloat16 u cannot hold p' - p, the rest is 0. :func:`params_in_float32` gives w.

    The random bits are a hash of the values, of the place in the array and of the number of the update. There is
    no key, and the same parameters, updates and step give the same result on any layout of devices.

    Updates keep their dtype. Leaves that are not bfloat16 pass through: float32 does not need this, and
    the range of float16 is too small to keep parameters in it. Float32 updates of bfloat16 parameters need
    JAX's standard dtype promotion in :func:`optax.apply_updates`. Derivatives do not pass through the rounding:
    they are zero.

    :class:`optax.MultiSteps` accumulates gradients in float32, in four more bytes for each parameter. To avoid them,
    use a larger batch in one step, or small batches without accumulation and `decay ** (new_batch / old_batch)`.

    Args:
        keep_rest: keep the rest of each bfloat16 parameter in one byte.

    Returns:
        A transformation whose `update` needs `params`, and whose state is a :class:`RoundParamsState`.

    Raises:
        TypeError: `keep_rest` is not a boolean, or `state` is another transformation's.
        ValueError: in `update`, `params` is missing, or a shape or structure differs from that of the updates.

    Example:
        >>> import jax, jax.numpy as jnp, optax, rmsprop_jax
        >>> tx = optax.chain(optax.sgd(1e-4), rmsprop_jax.round_params_stochastically())
        >>> grads = jax.random.uniform(jax.random.key(0), (10_000,), jnp.bfloat16)
        >>> params = jnp.ones(10_000, jnp.bfloat16)
        >>> state = tx.init(params)
        >>> for _ in range(100):
        ...     updates, state = tx.update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(f"{params.astype(jnp.float32).mean() - 1:.3f}")  # rounded to nearest, they would still be 1
        -0.005

    References:
        Zamirai et al., `Revisiting BFloat16 training <https://arxiv.org/abs/2010.06192>`_, 2020.
        Ozkara et al., `Stochastic rounding for LLM training <https://arxiv.org/abs/2502.20566>`_, 2025.
        `FlashOptim <https://arxiv.org/abs/2602.23349>`_, 2026, keeps a rest as well, rounded to nearest.
    """
    if not isinstance(keep_rest, bool):
        raise TypeError(f"keep_rest={keep_rest!r} has type {type(keep_rest).__name__}: allowed are True and False")

    def init(params: optax.Params) -> RoundParamsState:
        def rest(p: Any) -> jax.Array | None:
            return _placement.full_like(p, 0, jnp.int8) if _is_bfloat16(p) else None

        return RoundParamsState(_placement.zero_count(params), jax.tree.map(rest, params) if keep_rest else None)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, RoundParamsState]:
        if not isinstance(state, RoundParamsState):
            raise TypeError(f"state has type {type(state).__name__}: allowed is the RoundParamsState that init makes")
        if params is None:
            raise ValueError("round_params_stochastically needs params: call update(updates, state, params)")
        if updates is not None and (state.rest is None) == keep_rest:
            raise ValueError(
                f"state.rest is {'' if keep_rest else 'not '}None, and keep_rest={keep_rest}: "
                "carry the state over with interop.from_rmsprop(state, tx.init(params))"
            )
        # The others pass through, and some may be no arrays: the functions of an Equinox module.
        params = jax.tree.map(lambda p: p if _is_bfloat16(p) else None, params)
        return _update(_pytree.without_float0(updates), state, params, extra_args.get("layer"))

    return _equality.equal_by_arguments(optax.GradientTransformationExtraArgs(init, update), (keep_rest,))


def params_in_float32(params: optax.Params, state: Any) -> optax.Params:
    """The parameters in float32, with the rest that :func:`round_params_stochastically` keeps.

    For evaluation, averages and export. An average of bfloat16 parameters stands still at decays of 0.99 and
    more, so average these.

    Args:
        params: the parameters. Those in half precision become float32; all others stay as they are, also leaves
            that are no arrays.
        state: the optimizer's state, in any wrapper. Without a rest in it, this is a cast.

    Raises:
        ValueError: `state` has a rest for parameters that `params` lacks, or has in another shape.

    Example:
        >>> import jax.numpy as jnp, optax, rmsprop_jax
        >>> tx = optax.chain(optax.sgd(1e-5), rmsprop_jax.round_params_stochastically(keep_rest=True))
        >>> params = jnp.ones(3, jnp.bfloat16)
        >>> state = tx.init(params)
        >>> for _ in range(100):
        ...     updates, state = tx.update(jnp.ones(3, jnp.bfloat16), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print([f"{x:.3f}" for x in rmsprop_jax.params_in_float32(params, state)])
        ['0.999', '0.999', '0.999']
    """
    rests: dict[Any, Any] = {}
    for node in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, RoundParamsState)):
        if isinstance(node, RoundParamsState):
            rests |= dict(tree_flatten_with_path(node.rest)[0])
    leaves, treedef = tree_flatten_with_path(params)
    shapes = {path: getattr(p, "shape", None) for path, p in leaves}
    if wrong := [f"params{keystr(path)}" for path, rest in rests.items() if shapes.get(path) != rest.shape]:
        raise ValueError(
            f"state has a rest for {', '.join(wrong)}, and there is no array of its shape: give the parameters that "
            "the optimizer was initialized with. (Inside optax.flatten, a rest is one vector.)"
        )
    return treedef.unflatten(_in_float32(p, rests.get(path)) for path, p in leaves)


@jax.jit
def _update(
    updates: optax.Updates, state: Any, params: optax.Params, layer: Any
) -> tuple[optax.Updates, RoundParamsState]:
    step = jnp.asarray(optax.safe_increment(state.step))
    seed = _bits.seeds(step, "params")
    leaves, treedef = _pytree.flatten(updates)
    params_column = _pytree.column(updates, params, "params", "update")
    new: list[Any] = [u for _, u in leaves]
    rests: list[Any] = new if state.rest is None else _pytree.column(updates, state.rest, "state.rest", "update")
    for i, ((path, u), p) in enumerate(zip(leaves, params_column, strict=True)):
        if u is None or p is None:
            continue
        _check_shape(path, u, "parameter", p)
        if state.rest is None:
            new[i] = _round_array(_bits.within_stack(seed, layer, p.shape), u, p)
        else:
            _check_shape(path, u, "state.rest", rests[i])
            new[i], rests[i] = _round_array_and_rest(_bits.within_stack(seed, layer, p.shape), u, p, rests[i])
    rest = None if state.rest is None else treedef.unflatten(rests)
    return treedef.unflatten(new), RoundParamsState(step, rest)


def _check_shape(path: Any, u: Any, name: str, other: Any) -> None:
    if getattr(other, "shape", None) != jnp.shape(u):
        found = "None" if other is None else jnp.shape(other)
        raise ValueError(f"update{keystr(path)} has shape {jnp.shape(u)}, its {name} {found}: they must be equal")


@jax.jit
def _round_array(seed: _bits.Seed, u: jax.Array, p: jax.Array) -> jax.Array:
    start = p.astype(jnp.float32)
    exact = start + u.astype(jnp.float32)
    return _narrow(u.dtype, _difference(_bits.to_16_bits(exact, _bits.noise(seed, exact)), start))


@jax.jit
def _round_array_and_rest(seed: _bits.Seed, u: jax.Array, p: jax.Array, rest: jax.Array) -> tuple[jax.Array, jax.Array]:
    exact = _bits.join(p, rest) + u.astype(jnp.float32)
    return jax.lax.platform_dependent(
        *(p, _bits.to_24_bits(exact, _bits.noise(seed, exact))),
        cpu=functools.partial(_update_and_rest_on_cpu, u.dtype),
        default=functools.partial(_update_and_rest, u.dtype),
    )


def _update_and_rest(dtype: Any, p: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    update = _difference(_bits.nearest_16_bits(weight), p.astype(jnp.float32))
    # XLA may leave out a conversion to bfloat16 and back, but never reduce_precision.
    precision = jnp.finfo(dtype)
    if precision.nmant < 23:
        update = jax.lax.reduce_precision(update, precision.nexp, precision.nmant)
    update = update.astype(dtype)
    # As in optax.apply_updates: then a TPU computes the parameter and the rest in one kernel.
    wide = jnp.promote_types(p.dtype, dtype)
    return update, _rest(weight, p.astype(wide) + update.astype(wide))


def _update_and_rest_on_cpu(dtype: Any, p: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    # XLA's CPU backend has no kernel with two results. It computes everything again for each of them, and from copies
    # of p and of the old rest, unless one result needs the other: then it keeps what both need, the weight. So the
    # update comes from the weight without its rest. The nearest bfloat16 is the same.
    start = p.astype(jnp.float32)

    def update(weight: jax.Array) -> jax.Array:
        return _narrow(dtype, _difference(_bits.nearest_16_bits(weight), start))

    # The sum stays in float32: on some meshes, and not on others, XLA would leave out that it is rounded.
    rest = _rest(weight, start + update(weight).astype(jnp.float32))
    return update(_bits.without_rest(weight, rest)), rest


def _rest(weight: jax.Array, landed: jax.Array) -> jax.Array:
    """The rest of a weight: 0 where optax.apply_updates does not land on the nearest bfloat16, or lands on inf."""
    off = landed.astype(jnp.float32) - _bits.nearest_16_bits(weight)
    return jnp.where(off == 0, _bits.rest_of(weight), jnp.int8(0))


def _difference(end: jax.Array, start: jax.Array) -> jax.Array:
    # -0 is the number that changes nothing when it is added, not even -0; and inf - inf is NaN.
    return jnp.where(end == start, -0.0, end - start)


def _narrow(dtype: Any, x: jax.Array) -> jax.Array:
    """A difference of bfloat16 numbers, in the dtype of an update."""
    if dtype != jnp.bfloat16:
        return x.astype(dtype)
    # XLA's CPU backend takes eight instructions for a conversion to bfloat16.
    return jax.lax.platform_dependent(x, cpu=_bits.nearest_bfloat16, default=lambda x: x.astype(jnp.bfloat16))


def _in_float32(p: Any, rest: jax.Array | None) -> Any:
    if rest is not None:
        return _bits.join(p, rest)
    if not (hasattr(p, "dtype") and jnp.issubdtype(p.dtype, jnp.inexact)):
        return p
    return jnp.asarray(p, _storage.compute_dtype(p.dtype))


def _is_bfloat16(p: Any) -> bool:
    return getattr(p, "dtype", None) == jnp.bfloat16
