"""RMSProp: the rule for one array, and the transformations that apply it to trees."""

# No `from __future__ import annotations`: optax.inject_hyperparams looks at the annotation
# of `learning_rate` and must find the object, not a string.

import dataclasses
import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from . import _pytree, _storage


class RMSPropState(NamedTuple):
    """What RMSProp remembers: trees shaped like the parameters, `None` where an option is off."""

    # Updates made so far; shape=(), dtype=int32, stops at the largest.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] (tuple.count)
    nu: Any  # average of |g|², or the variance of g if centered; real; of `state_dtype`
    mu: Any = None  # average of g, if centered
    trace: Any = None  # momentum buffer b, as in p ← p - b


class _Numbers(NamedTuple):
    """The numbers of the rule, scalars. `None` switches an option off: its presence is structure."""

    learning_rate: Any
    decay: Any
    rest: Any  # 1 - decay
    eps: Any
    momentum: Any | None
    weight_decay: Any | None


class _Scalars(NamedTuple):
    """The numbers as the arrays meet them, computed once for all leaves: every operation takes time to compile."""

    learning_rate: jax.Array
    descent: jax.Array  # -α
    decay: jax.Array
    rest: jax.Array
    ratio: jax.Array  # (1-ρ)/ρ
    power: jax.Array  # ρᵗ
    debias: jax.Array  # 1 - ρᵗ
    eps: jax.Array  # in the root at least the smallest normal number
    momentum: jax.Array | None
    weight_decay: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The update of one array. The fields are structure: another value is another program."""

    eps_in_sqrt: bool
    centered: bool
    bias_correction: bool
    nesterov: bool = False
    lr_in_momentum: bool = True
    decoupled: bool = False

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            # A traced flag, or the string "no", would be taken for True.
            if not isinstance(value, (bool, np.bool_)):
                raise TypeError(f"{name}={value!r} is a {type(value).__name__}: allowed are True and False")

    def scalars(self, hyper: _Numbers, count: jax.Array) -> _Scalars:
        lr, decay, rest, eps, momentum, weight_decay = hyper
        tiny = jnp.finfo(decay.dtype).tiny
        power = decay ** count.astype(decay.dtype)
        return _Scalars(
            learning_rate=lr,
            descent=-lr,
            decay=decay,
            rest=rest,
            # Twice, because the derivative of what is not selected must be finite, too.
            ratio=jnp.where(decay > tiny, rest / jnp.where(decay > tiny, decay, 1), 0),
            power=power,
            debias=jnp.maximum(1 - power, tiny),
            eps=jnp.maximum(eps, tiny) if self.eps_in_sqrt else eps,
            momentum=momentum,
            weight_decay=weight_decay,
        )

    def __call__(
        self,
        scalars: _Scalars,
        grad: jax.Array,
        param: Any,
        keep: Callable[[str, jax.Array], jax.Array],
        largest: float,
        nu: Any,
        mu: Any = None,
        trace: Any = None,
    ) -> jax.Array:
        lr, descent, decay, rest, ratio, power, debias, eps, momentum, weight_decay = scalars

        if weight_decay is not None and not self.decoupled:
            grad = grad + weight_decay * param
        # A gradient whose square ν cannot hold comes down to the largest whose square it can: then
        # its step is as long as any other, and ν is back after some 90/(1-ρ) updates. The 16 leaves
        # room for the difference from a mean, for both parts of a complex number, and for the
        # rounded weights of an average, which can add up to more than one.
        g = _clipped(grad, np.sqrt(min(largest, jnp.finfo(nu.dtype).max / 16), dtype=nu.dtype))

        if self.centered:
            # With the new mean: g - μ' = ρ(g - μ), so that this is ρ(ν + (1-ρ)|g - μ|²). With
            # the old one XLA's CPU backend copies the donated buffers, at 2.5 times the time.
            mu = keep("mu", mu + rest * (g - mu))
            nu = keep("nu", decay * nu + ratio * _abs_sq(g - mu))
        else:
            nu = keep("nu", decay * nu + rest * _abs_sq(g))

        nu_hat = nu
        if self.bias_correction:
            second_moment = nu + power * _abs_sq(mu) if self.centered else nu
            nu_hat = second_moment / debias

        # `tiny`, in `scalars` part of eps, turns 0/0 into 0 at eps=0, and keeps the root's derivative
        # finite at a gradient of zero. Added, it costs nothing, and lets NaN through.
        root = jnp.sqrt(nu_hat + eps) if self.eps_in_sqrt else jnp.sqrt(nu_hat + jnp.finfo(nu.dtype).tiny) + eps
        u = g / root
        # Zero, but NaN for the inf that clipping hid. A `where` here, or doing it to g
        # itself, makes XLA's CPU backend three times slower.
        u = u + (grad - grad)

        if momentum is None:
            step = descent * u
        else:
            force = lr * u if self.lr_in_momentum else u
            trace = keep("trace", momentum * trace + force)
            b = momentum * trace + force if self.nesterov else trace
            step = -b if self.lr_in_momentum else descent * b
        if weight_decay is not None and self.decoupled:
            step = step + descent * weight_decay * param
        return step


def _clipped(g: jax.Array, limit: np.floating) -> jax.Array:
    if jnp.iscomplexobj(g):
        return jax.lax.complex(_clipped(g.real, limit), _clipped(g.imag, limit))
    return jax.lax.clamp(-limit, g, limit)


def _abs_sq(x: jax.Array) -> jax.Array:
    # Not jnp.abs(x)**2: its derivative at a complex zero is NaN.
    return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x


def rmsprop(
    learning_rate: optax.ScalarOrSchedule,
    decay: ArrayLike = 0.9,
    eps: ArrayLike = 1e-8,
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: ArrayLike | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    lr_in_momentum: bool = True,
    weight_decay: ArrayLike | None = None,
    decoupled: bool = False,
    state_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """RMSProp, in every variant: divide the gradient by the root of its mean square.

    With gradient g, parameter p, learning rate α and decay ρ, one update is::

        g ← g + λp                          if weight_decay λ, unless decoupled
        ν ← ρν + (1-ρ)|g|²                  or, if centered, the variance:
        ν ← ρ(ν + (1-ρ)|g - μ|²),  μ ← μ + (1-ρ)(g - μ)
        ν̂ = ν                               or (ν + ρᵗ|μ|²) / (1-ρᵗ)  if bias_correction
        u ← g / √(ν̂ + ε)                    or g / (√ν̂ + ε)           unless eps_in_sqrt
        b ← mb + αu,  p ← p - b             if momentum m, or
        b ← mb + u,   p ← p - αb            unless lr_in_momentum
        p ← p - αλp                         if weight_decay and decoupled

    Averages are computed in at least float32, and kept in it unless `state_dtype` says
    otherwise; updates have the gradient's dtype.
    A gradient of zero gives a step of zero also at `eps=0`, and a finite gradient of any
    size a finite step. NaN and inf come out as NaN: see :func:`optax.apply_if_finite`.

    Positional arguments and defaults are those of :func:`optax.rmsprop`, and so are the
    numbers, except with `centered`: there Optax subtracts two averages, which cancel into
    NaN on a nearly constant gradient, and its bias correction starts from a variance of 0.

    Args:
        learning_rate: α; a number, or a schedule from the count of past updates (from 0).
        decay: ρ, in [0, 1]; the average looks back over about 1/(1-ρ) updates.
        eps: ε, in units of g² inside the root, of |g| outside.
        initial_scale: ν before the first update; TensorFlow 1 takes 1.
        eps_in_sqrt: √(ν + ε) as in TensorFlow, instead of √ν + ε as in PyTorch.
        centered: divide by the standard deviation instead of the root mean square.
        momentum: m, in [0, 1]; `None` keeps no buffer.
        nesterov: step with mb + αu, one update ahead (Optax's form); needs `momentum`.
        bias_correction: make up for an average that started from zero.
        lr_in_momentum: the buffer holds αu as in TensorFlow, instead of u as in PyTorch. It
            matters only when α changes.
        weight_decay: λ; `update` then needs `params`. For some of the leaves only, chain
            with a masked :func:`optax.add_decayed_weights` instead.
        decoupled: shrink p by αλ directly (as AdamW does), instead of adding λp to g.
        state_dtype: how ν is kept: `None` in the dtype it is computed in, 4 bytes;
            `jnp.bfloat16` in 2, `jnp.uint8` in 1, rounded stochastically so that it is right
            in the mean. For uint8 a code stands for 2⁻⁹⁰ · {1, 1.5, 2, 3, 4, 6, ...} up to
            2³⁸, that is |g| from 3e-14 to 4e5; the noise is 0.15 to 0.45 of ν whatever the
            decay, and makes steps longer by 1 to 7 percent in the mean. The signed averages
            (`centered`, `momentum`) are then in bfloat16, complex ones as ever. No derivative
            goes through the state.

    Returns:
        A transformation with :class:`RMSPropState` as its state. `update` is compiled once
        for a tree and a set of options, whatever the numbers; inside `jax.jit` it inlines.

    Raises:
        ValueError: a number is out of range, or options contradict each other.
        TypeError: an argument, or at `init` or `update` a leaf, is of the wrong type.

    Example:
        >>> import jax, jax.numpy as jnp, optax, rmsprop_jax
        >>> tx = rmsprop_jax.rmsprop(0.1, momentum=0.5)
        >>> params = jnp.array([1.0, 100.0])
        >>> state = tx.init(params)
        >>> for _ in range(30):
        ...     grads = jax.grad(lambda x: jnp.sum(x**2))(params)
        ...     updates, state = tx.update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(jnp.round(params, 1))
        [ 0.  92.5]

    References:
        Tieleman and Hinton, Lecture 6.5 - RMSProp, COURSERA: Neural Networks for Machine
        Learning, 2012.
        Graves, `Generating sequences with recurrent neural networks
        <https://arxiv.org/abs/1308.0850>`_, 2013 (centered, with momentum).
    """
    if learning_rate is None:
        raise ValueError("learning_rate=None: to divide by the root mean square alone use scale_by_rms")
    rule = _Rule(
        eps_in_sqrt=eps_in_sqrt,
        centered=centered,
        nesterov=nesterov,
        bias_correction=bias_correction,
        lr_in_momentum=lr_in_momentum,
        decoupled=decoupled,
    )
    if nesterov and momentum is None:
        raise ValueError("nesterov=True needs momentum, got momentum=None")
    return _transformation(
        rule,
        learning_rate if callable(learning_rate) else _number("learning_rate", learning_rate),
        decay=decay,
        eps=eps,
        initial_scale=initial_scale,
        momentum=None if momentum is None else _number("momentum", momentum, upper=1.0),
        weight_decay=None if weight_decay is None else _number("weight_decay", weight_decay),
        state_dtype=state_dtype,
    )


def scale_by_rms(
    decay: ArrayLike = 0.9,
    eps: ArrayLike = 1e-8,
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    centered: bool = False,
    state_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Divides by the root mean square alone, for :func:`optax.chain`: g / √(ν + ε).

    The sign is not flipped: follow it with :func:`optax.scale_by_learning_rate`.

    Args:
        decay: this and all the others are those of :func:`rmsprop`.
        eps: ε
        initial_scale: ν before the first update.
        eps_in_sqrt: √(ν + ε), else √ν + ε.
        bias_correction: make up for an average that started from zero.
        centered: divide by the standard deviation.
        state_dtype: how ν is kept.

    Returns:
        A transformation with :class:`RMSPropState` as its state.

    Raises:
        ValueError: a number is out of range.
        TypeError: an argument, or at `init` or `update` a leaf, is of the wrong type.

    Example:
        >>> import jax.numpy as jnp, optax, rmsprop_jax
        >>> tx = optax.chain(
        ...     rmsprop_jax.scale_by_rms(0.75), optax.trace(0.9), optax.scale_by_learning_rate(0.1)
        ... )
        >>> grads = jnp.array([1.0, -1000.0])
        >>> updates, _ = tx.update(grads, tx.init(jnp.zeros(2)))
        >>> print([f"{u:.3f}" for u in updates])
        ['-0.200', '0.200']

    References:
        :func:`optax.scale_by_rms`; with `eps_in_sqrt=False, bias_correction=True` it is
        :func:`optax.scale_by_adam` at `b1=0`, without the memory of the first moment.
    """
    rule = _Rule(eps_in_sqrt=eps_in_sqrt, centered=centered, bias_correction=bias_correction)
    # p ← p - αu with α = -1: the update is u itself.
    return _transformation(rule, -1.0, decay=decay, eps=eps, initial_scale=initial_scale, state_dtype=state_dtype)


def _transformation(
    rule: _Rule,
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: ArrayLike,
    eps: ArrayLike,
    initial_scale: ArrayLike,
    momentum: ArrayLike | None = None,
    weight_decay: ArrayLike | None = None,
    state_dtype: DTypeLike | None,
) -> optax.GradientTransformationExtraArgs:
    decay = _number("decay", decay, upper=1.0)
    dtype = getattr(decay, "dtype", None)
    if dtype in (jnp.float16, jnp.bfloat16):
        warnings.warn(
            f"decay arrived as {dtype}, which rounds 0.999 to {jnp.asarray(0.999, dtype)}: "
            "with optax.inject_hyperparams set hyperparam_dtype=jnp.float32",
            stacklevel=3,
        )
    eps = _number("eps", eps)

    def hyper(count: jax.Array) -> _Numbers:
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        # 1 - ρ here, in the precision of a Python float: in float32 1 - 0.999 is off by 1e-5.
        return _Numbers(rate, decay, 1 - decay, eps, momentum, weight_decay)

    return _pytree.lift(
        rule,
        hyper,
        slots={
            "nu": _pytree.Slot(_number("initial_scale", initial_scale), non_negative=True),
            "mu": _pytree.Slot(0.0) if rule.centered else None,
            "trace": None if momentum is None else _pytree.Slot(0.0),
        },
        state_type=RMSPropState,
        state_dtype=_checked_state_dtype(state_dtype),
        params_for=None if weight_decay is None else "weight_decay",
    )


def _checked_state_dtype(value: Any) -> np.dtype | None:
    if value is None:
        return None
    allowed = "allowed are None, jnp.bfloat16 and jnp.uint8"
    if isinstance(value, (jax.Array, np.ndarray)):
        # optax.inject_hyperparams calls with the count whatever can be called: jnp.uint8, too.
        raise ValueError(f"state_dtype is an array: {allowed}; for optax.inject_hyperparams, as strings")
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype not in _storage.STATE_DTYPES:
        raise ValueError(f"state_dtype={value!r}: {allowed}")
    return dtype


def _number(name: str, value: Any, upper: float = math.inf) -> Any:
    """Checks a number. The value of an array is never looked at: it may be traced."""
    if isinstance(value, (jax.Array, np.ndarray)):
        if value.shape != ():
            raise ValueError(f"{name} has shape {value.shape}: allowed is a scalar (vmap over the transformation)")
        return value
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: allowed is a number or a scalar array")
    number = float(value)
    if not (0 <= number <= upper and math.isfinite(number)):
        raise ValueError(f"{name}={value!r}: allowed is a finite number in [0, {upper}]")
    return number
