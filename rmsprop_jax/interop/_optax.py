"""Optax's states, and ours in other wrappers or with other options."""

from typing import Any

from . import _carry


def from_optax(state: Any, like: Any = None) -> Any:
    """Our state from that of `optax.rmsprop` or `optax.scale_by_rms`, inside any wrapper.

    Args:
        state: Optax's. Without a schedule and without bias correction Optax does not count. Then the count is
            that of the nearest wrapper that counts, and 0 if none does.
        like: a state with the structure you want: `tx.init(params)` with the same options as Optax's, in the
            same or other wrappers; see :func:`from_rmsprop`. `None`: a bare :class:`RMSPropState`, for
            `rmsprop`, or for `scale_by_rms` if Optax's was one.

    Raises:
        ValueError: there is no second moment in `state`, or it and `like` do not fit. The error lists where.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from rmsprop_jax import interop, rmsprop
        >>> state = optax.rmsprop(0.1, momentum=0.9).init(jnp.zeros(2))
        >>> updates, _ = rmsprop(0.1, momentum=0.9).update(jnp.ones(2), interop.from_optax(state))
    """
    if like is None:
        return _carry.bare(state, "a bare state has no place for it, `like` may have one")
    return _carry.fill(state, like, strict=True)


def to_optax(state: Any, like: Any) -> Any:
    """Optax's state from ours, inside any wrapper.

    Args:
        state: ours.
        like: a state with the structure you want: `optax.rmsprop(...).init(params)`, with the same options; see
            :func:`from_rmsprop`.

    Raises:
        ValueError: the two do not fit. The error lists where.
    """
    return _carry.fill(state, like, strict=True)


def from_rmsprop(state: Any, like: Any) -> Any:
    """Our state, for a transformation with other options or in other wrappers.

    The accumulators of `state`, wherever they are in it, go to the places in `like` that have the same
    path below the parameters. Masked places are left out. An accumulator that is new starts from
    zero; one that is gone is dropped, with the mean going back into E[g²]. A buffer means something else
    with another `lr_in_momentum`: that is not converted.

    The arrays of wrappers, such as counters and accumulated gradients, are kept where both have the wrapper, on
    the same side of RMSProp. (In front of it an average is one of gradients, and behind it one of updates.) A
    new wrapper starts as in `like`, and its schedule goes on where the run is. Injected
    hyperparameters are those of `like`.

    Under `jax.jit` no value is looked at. Then `MultiSteps` may lose gradients of half an update without an error,
    and counts of groups are not compared.

    Args:
        state: ours, or one that has ours inside: of `optax.chain`, `MultiSteps`, `inject_hyperparams`, `masked`,
            `partition`, `apply_if_finite`, `lookahead`, `flatten`.
        like: a state with the structure you want: `tx.init(params)`, or `jax.eval_shape(tx.init, params)`.

    Returns:
        A state with the structure, shapes, dtypes and shardings of `like`. It shares no buffer with `state` or
        `like`.

    Raises:
        ValueError: paths or shapes differ, `state` has no RMSProp state, or it has something, such as half
            accumulated gradients, that `like` has no place for. The error lists the paths.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmsprop_jax import interop, rmsprop
        >>> params = jnp.array([1.0, 2.0])
        >>> _, state = rmsprop(0.1).update(params, rmsprop(0.1).init(params))
        >>> lean = rmsprop(0.1, momentum=0.9, state_dtype=jnp.uint8)
        >>> state = interop.from_rmsprop(state, lean.init(params))
        >>> int(state.count), state.nu.dtype, state.trace
        (1, dtype('uint8'), Array([0, 0], dtype=int8))
    """
    return _carry.fill(state, like)
