"""bfloat16 parameters that keep learning."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import _bits, _placement


class RoundParamsState(NamedTuple):
    """The state of :func:`round_params_stochastically`."""

    step: jax.Array  # updates made so far; shape=(), dtype=int32, stops at the largest


def round_params_stochastically() -> optax.GradientTransformationExtraArgs:
    """Rounds bfloat16 parameters up or down at random, so that small steps are not lost.

    A bfloat16 parameter of size 1 cannot move by less than 2⁻⁸ of itself. Steps below half of that are lost
    when they are rounded to nearest, and training stands still. This transformation comes last in a
    chain, behind any optimizer. It replaces each update u of a bfloat16 parameter p by::

        p' = p + u, rounded to one of its two bfloat16 neighbours
        u ← p' - p

    with probabilities that make the mean of p' equal to p + u, down to steps of a millionth of p's last place,
    which float32 parameters would lose. :func:`optax.apply_updates` then lands on p': exactly if p' is
    between p/2 and 2p, and within three units in the last place otherwise, where a bfloat16 u may not hold
    the difference. An update of zero changes no bit. NaN and inf pass.

    The random bits are a hash of the bits of p and of u and of the number of the update. There is no key, and
    the same parameters, updates and step give the same result on any layout of devices. Elements with
    equal p and equal u are rounded alike in one update: right in the mean over updates, but they do not
    average out against each other.

    Updates keep their dtype. Leaves that are not bfloat16 pass through: float32 does not need this, and
    the range of float16 is too small to keep parameters in it. Float32 updates of bfloat16 parameters need
    JAX's standard dtype promotion in :func:`optax.apply_updates`.

    Returns:
        A transformation whose `update` needs `params`, and whose state is the number of updates.

    Raises:
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
    """

    def init(params: optax.Params) -> RoundParamsState:
        return RoundParamsState(_placement.zero_count(params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, RoundParamsState]:
        del extra_args
        if params is None:
            raise ValueError("round_params_stochastically needs params: call update(updates, state, params)")
        return _update(updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


@jax.jit
def _update(updates: optax.Updates, state: Any, params: optax.Params) -> tuple[optax.Updates, RoundParamsState]:
    step = jnp.asarray(optax.safe_increment(state.step))
    seed = _bits.seeds(step, "params")

    def leaf(path: Any, u: Any, p: Any) -> Any:
        if u is None or p is None or jnp.result_type(p) != jnp.bfloat16:
            return u
        if jnp.shape(u) != jnp.shape(p):
            where = jax.tree_util.keystr(path)
            raise ValueError(
                f"update{where} has shape {jnp.shape(u)}, its parameter {jnp.shape(p)}: they must be equal"
            )
        return _round_array(seed, u, p)

    return jax.tree.map_with_path(leaf, updates, params, is_leaf=lambda x: x is None), RoundParamsState(step)


@jax.jit
def _round_array(seed: _bits.Seed, u: jax.Array, p: jax.Array) -> jax.Array:
    start, move = p.astype(jnp.float32), u.astype(jnp.float32)
    total = start + move
    # What float32 loses of the sum, exactly (TwoSum, Knuth): all of a step below 1e-5 of the last place of p.
    moved = total - start
    rest = (start - (total - moved)) + (move - moved)
    rest = jnp.where(jnp.isfinite(rest), rest, 0)
    end = _bits.to_bfloat16(total, _bits.noise(seed, start, move), rest).astype(jnp.float32)
    # -0 is the number that changes nothing when it is added, not even -0; and inf - inf is NaN.
    return jnp.where(end == start, -0.0, end - start).astype(u.dtype)
