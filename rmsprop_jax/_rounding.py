"""bfloat16 parameters that keep learning."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from . import _bits, _checks, _equality, _placement, _pytree, _states, _storage, _trees
from ._rmsprop import RMSPropState
from ._states import Name
from ._text import listed, repeated


__all__ = ["RoundParamsState", "params_in_bfloat16", "params_in_float32", "round_params_stochastically"]


@_pytree.exportable
class RoundParamsState(NamedTuple):
    """The state of :func:`round_params_stochastically`."""

    step: jax.Array  # updates made so far; shape=(), dtype=int32, stops at the largest
    rest: Any = None  # with `keep_rest`, the remainders: a tree like the parameters; int8, or None where not bfloat16


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

    With `keep_rest` the state keeps the remainder of the rounding, in one more byte. Parameter and remainder together
    are a float of 24 bits, w, which is rounded stochastically below those::

        w' = w + u, rounded to one of its two neighbours of 24 bits
        p' = the bfloat16 nearest to w',  rest' = w' - p' in units of 2⁻⁸ of p's last place

    The network runs on p, and the optimizer moves w, as it would move a float32 parameter but for the rounding.
    Where a bfloat16 u cannot hold p' - p, the remainder is 0. :func:`params_in_float32` gives w, and
    :func:`params_in_bfloat16` takes one.

    The random bits are a hash of the values, of the place in the array and of the number of the update. There is
    no key, and the same parameters, updates and step give the same result on any layout of devices.

    Updates keep their dtype. An update in bfloat16 has been rounded to nearest before it arrives here, so a small part
    of it is lost beside a large one: with a learning rate of 1e-4, a weight decay of 0.01 and parameters of 0.02,
    nothing decays. Cast the gradients to float32 to keep it: `jax.tree.map(lambda g: g.astype(jnp.float32), grads)`.
    In the program that updates the parameters this takes no memory and no time. Float32 updates of bfloat16 parameters
    need JAX's standard dtype promotion in :func:`optax.apply_updates`.

    Leaves that are not bfloat16 pass through: float32 does not need this, and the range of float16 is too small to
    keep parameters in it. The derivative of a rounded update is zero.

    :class:`optax.MultiSteps` accumulates gradients in float32, in four more bytes for each parameter. To avoid them,
    use a larger batch in one step, or small batches without accumulation and `decay ** (new_batch / old_batch)`.

    Args:
        keep_rest: keep the remainder of each bfloat16 parameter in one byte.

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
        `FlashOptim <https://arxiv.org/abs/2602.23349>`_, 2026, keeps a remainder as well, rounded to nearest.
    """
    keep_rest = _checks.flag("keep_rest", keep_rest)

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
        has_rest = state.rest is not None
        if has_rest != keep_rest and any(map(_is_bfloat16, jax.tree.leaves(params))):
            raise ValueError(
                f"state.rest is {'not ' if has_rest else ''}None, and keep_rest={keep_rest}: "
                "carry the state over with carry_over(state, tx.init(params))"
            )
        # The others pass through, and some may be no arrays: the functions of an Equinox module.
        params = jax.tree.map(lambda p: p if _is_bfloat16(p) else None, params)
        return _update(_trees.without_float0(updates), state, params, extra_args.get("layer"))

    return _equality.equal_by_arguments(optax.GradientTransformationExtraArgs(init, update), (keep_rest,))


def params_in_float32(params: optax.Params, state: Any) -> optax.Params:
    """The parameters in float32, with the remainders that :func:`round_params_stochastically` keeps.

    For evaluation, averages and export. An average of bfloat16 parameters stands still at decays of 0.99 and
    more, so average these. Its derivative is that of a cast, so a loss may call it.

    Args:
        params: the parameters. Those in half precision become float32; all others stay as they are, also leaves
            that are no arrays.
        state: the optimizer's state, in any wrapper. Without a remainder in it, this is a cast.

    Returns:
        A tree like `params`.

    Raises:
        TypeError: `params` is an optimizer's state, or `state` has lost its types in a checkpoint.
        ValueError: `state` has a remainder for parameters that `params` lacks, or has in another shape.

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
    remainders = _remainders(params, state)

    def joined(name: Name, p: Any) -> Any:
        if _is_bfloat16(p) and (name := _states.without_box(name, remainders)) in remainders:
            return _bits.join(p, remainders[name])
        inexact = hasattr(p, "dtype") and jnp.issubdtype(p.dtype, jnp.inexact)
        return _storage.widened(p) if inexact else p

    return _states.map_arrays(joined, params)


def params_in_bfloat16(params: optax.Params, state: Any) -> tuple[optax.Params, Any]:
    """Float32 parameters as bfloat16, with their remainders in the state: the reverse of :func:`params_in_float32`.

    Training resumes in four bytes from a float32 checkpoint, and no weight loses any of its first 24 bits (8 of the
    exponent, 16 of the mantissa).

    Args:
        params: the parameters. Those for which `state` has a remainder become bfloat16, unless they are already; all
            others stay as they are.
        state: the optimizer's state, in any wrapper, made for bfloat16 parameters with `keep_rest=True`.

    Returns:
        The parameters, and the state with their remainders. A weight is rounded to the nearest of 24 bits. One that
        is finite stays finite: beyond the range of bfloat16 it becomes the largest weight, 3.396e38.

    Raises:
        TypeError: `params` is an optimizer's state, `state` has lost its types in a checkpoint, or a parameter that
            should become bfloat16 is not real.
        ValueError: `state` keeps no remainder, or has one for parameters that `params` lacks, or has in another shape.

    Example:
        >>> import jax, jax.numpy as jnp, optax, rmsprop_jax
        >>> tx = optax.chain(optax.sgd(1e-5), rmsprop_jax.round_params_stochastically(keep_rest=True))
        >>> weights = {"w": jnp.array([0.1, 0.2, 0.3])}
        >>> state = tx.init(jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights))
        >>> params, state = rmsprop_jax.params_in_bfloat16(weights, state)
        >>> print(params["w"].dtype, [f"{x:.5f}" for x in rmsprop_jax.params_in_float32(params, state)["w"]])
        bfloat16 ['0.10000', '0.20000', '0.30000']
    """
    remainders = _remainders(params, state)
    if not remainders and any(map(_is_float, jax.tree.leaves(params))):
        raise ValueError(
            "state keeps no remainder, so bfloat16 parameters would lose most of their bits: make it for bfloat16 "
            "parameters with round_params_stochastically(keep_rest=True). To drop the bits, use astype(jnp.bfloat16)"
        )

    def split(name: Name, p: Any) -> Any:
        name = _states.without_box(name, remainders)
        if name not in remainders or _is_bfloat16(p):
            return p
        if not _is_float(p):
            at = f"params{_states.shown(name)}"
            raise TypeError(f"{at} has dtype {p.dtype}, but state has a remainder for it: allowed are floating dtypes")
        upper, remainders[name] = _split(p)
        return upper

    params = _states.map_arrays(split, params)
    nodes = {
        path: node._replace(rest=_states.map_arrays(lambda name, _: remainders[name], node.rest))
        for path, node in _states.find(state, _is_rounding).items()
    }
    return params, _states.replace(state, nodes)


@jax.jit
def _update(
    updates: optax.Updates, state: Any, params: optax.Params, layer: Any
) -> tuple[optax.Updates, RoundParamsState]:
    step = jnp.asarray(optax.safe_increment(state.step))
    seed = _bits.seeds(step, "params")

    def leaf(path: Any, u: jax.Array, p: Any, slots: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        if slots and (p is None) != (slots["rest"] is None):
            found = "a remainder, but the parameter is not" if p is None else "no remainder, but the parameter is"
            raise ValueError(
                f"state.rest{keystr(path)} has {found} in bfloat16: make the state for these parameters with init, or "
                "the parameters for this state with params_in_bfloat16"
            )
        if p is None:
            return u, slots
        return _round_array(_bits.within_stack(seed, layer, p.shape), u, p, **slots)

    slots = {} if state.rest is None else {"rest": state.rest}
    updates, slots = _trees.map_leaves(leaf, "update", updates, params, slots)
    return updates, RoundParamsState(step, **slots)


# One array. It is traced once for all leaves of a shape. Without a remainder there is none in the result.
@jax.jit
def _round_array(
    seed: _bits.Seed, u: jax.Array, p: jax.Array, rest: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    u, p = jax.lax.stop_gradient((u, p))
    start = p.astype(jnp.float32)
    # XLA may keep a product in bfloat16 unrounded for what follows it in a program, on some layouts and not on others.
    # tests/test_rounding.py shows one, in test_every_layout_gives_the_same_bits.
    exact = (start if rest is None else _bits.join(p, rest)) + _rounded(u.astype(jnp.float32), u.dtype)
    noise = _bits.noise(seed, exact)
    if rest is None:
        return _difference(_bits.to_16_bits(exact, noise), start).astype(u.dtype), {}
    weight = _bits.to_24_bits(exact, noise)
    difference = _difference(_bits.nearest_16_bits(weight), start)
    update = _rounded(difference, u.dtype)
    # No remainder where u cannot hold the difference, or where it is inf: then this is inf - inf.
    exactly = update - difference == 0
    update = update.astype(u.dtype)
    # As in optax.apply_updates: a TPU computes parameter and remainder in one kernel if one of them needs the other.
    # tests/test_tpu.py counts the kernels.
    wide = jnp.promote_types(p.dtype, u.dtype)
    landed = (p.astype(wide) + update.astype(wide)).astype(p.dtype)
    return update, {"rest": jnp.where(exactly & (landed != 0), _bits.remainder_of(weight), jnp.int8(0))}


def _difference(end: jax.Array, start: jax.Array) -> jax.Array:
    """What to add to `start`: -0.0 where they are equal, since x + (-0.0) is x even for -0.0, and inf - inf is NaN."""
    return jnp.where(end == start, -0.0, end - start)


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """A float32 rounded to `dtype`. XLA may leave out a conversion there and back, but never `reduce_precision`."""
    precision = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, precision.nexp, precision.nmant)


# --- Parameters with their remainders ---------------------------------------------------------------------


def _remainders(params: Any, state: Any) -> dict[Name, jax.Array]:
    """The remainders in a state, by the names of their parameters."""
    if states := _states.find(params, lambda x: isinstance(x, (RoundParamsState, RMSPropState))):
        found = next(iter(states.values()))
        raise TypeError(f"params has a {type(found).__name__} in it: pass the parameters first, and then the state")
    if dicts := _states.find(state, lambda x: isinstance(x, Mapping) and x.keys() == set(RoundParamsState._fields)):
        at = f"state{keystr(next(iter(dicts)))}"
        raise TypeError(f"{at} was restored as a dict: put RoundParamsState(**{at}) there")
    nodes = _states.find(state, _is_rounding).items()
    found = [(path, name, x) for path, node in nodes for name, x in _states.arrays_of(node.rest).items()]
    found = [(path, name, rest) for path, name, rest in found if not _states.is_masked(rest)]
    if twice := repeated(name for _, name, _ in found):
        places = [f"state{keystr(path)}" for path, name, _ in found if name == twice[0]]
        raise ValueError(
            f"remainders for params{_states.shown(twice[0])} in {listed(places)}: pass one of these states"
        )
    remainders = {name: rest for _, name, rest in found}
    arrays = _states.arrays_of(params).items()
    shapes = {_states.without_box(name, remainders): getattr(p, "shape", None) for name, p in arrays}
    if wrong := [f"params{_states.shown(name)}" for name, rest in remainders.items() if shapes.get(name) != rest.shape]:
        raise ValueError(
            f"state has a remainder for {listed(wrong)}, but params has no array of its shape: pass the parameters "
            "that the optimizer was initialized with. (Inside optax.flatten, a remainder is one vector.)"
        )
    return remainders


def _is_rounding(x: Any) -> bool:
    return isinstance(x, RoundParamsState)


@jax.jit
def _split(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The nearest bfloat16 and the remainder."""
    word = _bits.nearest_24_bits(weight)
    upper = _bits.nearest_16_bits(word)
    return upper.astype(jnp.bfloat16), _bits.remainder_of(word)


def _is_bfloat16(p: Any) -> bool:
    return getattr(p, "dtype", None) == jnp.bfloat16


def _is_float(p: Any) -> bool:
    return hasattr(p, "dtype") and jnp.issubdtype(p.dtype, jnp.floating)
