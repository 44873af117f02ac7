"""RMSProp: the two public transformations, and the rule for one array."""

# No `from __future__ import annotations`: optax.inject_hyperparams looks at the annotation of
# `learning_rate`, and must find the object, not a string.

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from . import _checks, _equality, _pytree, _storage, _trees


__all__ = ["RMSPropState", "rmsprop", "scale_by_rms"]


@_pytree.exportable
class RMSPropState(NamedTuple):
    """The state of RMSProp: trees shaped like the parameters, or `None` for a slot whose option is off."""

    # Updates made so far; shape=(), dtype=int32, stops at the largest.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] (tuple.count)
    nu: Any  # average of |g|², or the variance of g if centered; real; of `state_dtype`
    mu: Any = None  # average of g, if centered
    trace: Any = None  # momentum buffer b, as in p ← p - b


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
    weight_decay: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: Any = None,
    decoupled: bool = True,
    state_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """RMSProp in every variant: divides the gradient by the root of its mean square.

    With gradient g, parameter p, learning rate α and decay ρ, one update is::

        g ← g + λp                          if weight_decay λ, unless decoupled
        ν ← ρν + (1-ρ)|g|²                  or, if centered, the variance:
        ν ← ρ(ν + (1-ρ)|g - μ|²),  μ ← μ + (1-ρ)(g - μ)
        ν̂ = ν                               or (ν + ρᵗ|μ|²) / (1-ρᵗ)  if bias_correction
        u ← g / √(ν̂ + ε)                    or g / (√ν̂ + ε)           unless eps_in_sqrt
        b ← mb + αu,  p ← p - b             if momentum m, or
        b ← mb + u,   p ← p - αb            unless lr_in_momentum
        p ← p - αλp                         if weight_decay and decoupled

    Averages are computed and kept in float32 or wider, unless `state_dtype` says otherwise. Updates have the
    gradient's dtype. A gradient of zero gives an update of zero, even with `eps=0`. Finite gradients give finite
    updates, and NaN and inf give NaN: see :func:`optax.apply_if_finite`. With `eps=0`, a gradient whose square is too
    small for ν counts as zero.

    The positional arguments, their defaults and the results are those of :func:`optax.rmsprop`,
    with two exceptions. With `centered`, Optax subtracts two averages, which gives NaN for a nearly constant gradient,
    and its bias correction starts from a variance of 0. With `bias_correction` and a decay above 0.999, ours computes
    1-ρᵗ without the rounding of ρ to float32.

    Integer and boolean parameters do not train: their state is `None`, their gradient must be
    `None` or float0, and their update is `None`. A `None` gradient of any other parameter leaves its
    state as it was. `equinox.apply_updates` applies such updates; :func:`optax.apply_updates` and
    :class:`optax.MultiSteps` need an array in every place.

    Transformations made with the same arguments are equal, so a new one does not compile a training step again.
    This does not hold for arguments that are arrays or dicts, nor for functions that are not the same object, and
    :func:`optax.chain`, :class:`optax.MultiSteps` and :func:`optax.inject_hyperparams` around it return a new object
    each time: make those once.

    A training step can be exported with its state by :mod:`jax.export`. (Register the states of Optax that it holds.)

    Args:
        learning_rate: α. A number, or a schedule: a function of the number of past updates.
            A negative learning rate ascends.
        decay: ρ, in [0, 1]. The average looks back over about 1/(1-ρ) updates.
        eps: ε. Inside the root it is compared with g², outside with |g|.
        initial_scale: ν before the first update. TensorFlow 1 uses 1.
        eps_in_sqrt: √(ν + ε) as in TensorFlow, instead of √ν + ε as in PyTorch.
        centered: divide by the standard deviation instead of the root mean square.
        momentum: m, in [0, 1]. `None` keeps no buffer.
        nesterov: step with mb + αu, one update ahead (Optax's form). Needs `momentum`.
        bias_correction: correct for an average that started from zero.
        lr_in_momentum: the buffer holds αu as in TensorFlow, instead of u as in PyTorch. The two
            differ only if α changes. `False` needs `momentum`.
        weight_decay: λ, a number or a schedule, as in :func:`optax.adamw`. `update` then needs `params`.
        weight_decay_mask: which parameters decay, as in :func:`optax.adamw`: a tree of booleans
            like the parameters' or a prefix of it, or a function from the parameters to it. `None`:
            all. An Equinox module of booleans is a tree, also if it can be called. With
            :func:`optax.inject_hyperparams`, name a function in `static_args`.
        decoupled: shrink p by αλ directly, as AdamW does. `False` adds λp to g ("L2"), as PyTorch
            does, and needs `weight_decay`.
        state_dtype: how ν is kept: `None` in the dtype of the arithmetic, in 4 bytes; `jnp.bfloat16` in 2;
            `jnp.uint8` in 1. Both are rounded stochastically, so ν is right in the mean. A uint8 code
            is one of 2⁻⁹⁰ · {1, 1.5, 2, 3, 4, 6, ...} up to 1.5 · 2³⁷, which resolves |g| from 3e-14 to 4e5.
            Its noise is 0.15 to 0.45 of ν, whatever the decay, and makes steps 1 to 7 percent longer
            in the mean; with sparse gradients up to 0.73 of ν and 13 percent.
            `momentum` keeps its buffer in as many bytes: with `jnp.uint8` in an int8 code,
            ±2⁻²² · {0, 0.25, 0.5, 0.75, 1, 1.5, 2, ...} up to 896. For a momentum of 0.99, or parameters
            below 1e-4, prefer `jnp.bfloat16`. `centered` keeps its mean in bfloat16 in both cases.
            Complex averages are never narrowed. Derivatives do not pass through a rounded state.

    Returns:
        A transformation whose state is an :class:`RMSPropState`. `update` is compiled once for a
        tree and a set of options, whatever the numbers. Inside `jax.jit` it becomes part of the caller's
        program.

    Raises:
        ValueError: a number is out of range, or options contradict each other.
        TypeError: an argument has the wrong type; in `init` or `update`, a leaf has.

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

        To schedule another number than the learning rate, inject it. Here the decay is 1 - t^-0.8. Injected
        hyperparameters can be read and set:

        >>> tx = optax.inject_hyperparams(rmsprop_jax.rmsprop)(
        ...     learning_rate=1e-3, decay=lambda count: 1 - (count.astype(jnp.float32) + 1) ** -0.8
        ... )
        >>> state = tx.init(params)
        >>> for _ in range(10):
        ...     _, state = tx.update(params, state, params)
        >>> print(f"{state.hyperparams['decay']:.3f} {state.hyperparams['learning_rate']:.3f}")
        0.842 0.001

        When the batch size changes, this decay has the same half-life in examples:

        >>> old_batch, new_batch = 64, 256
        >>> print(f"{0.999 ** (new_batch / old_batch):.3f}")
        0.996

    References:
        Tieleman and Hinton, Lecture 6.5 - RMSProp, COURSERA: Neural Networks for Machine
        Learning, 2012.
        Graves, `Generating sequences with recurrent neural networks
        <https://arxiv.org/abs/1308.0850>`_, 2013 (centered, with momentum).
    """
    if learning_rate is None:
        raise ValueError("learning_rate=None: pass a number or a schedule, or use scale_by_rms without one")
    dtype = getattr(decay, "dtype", None)
    if dtype in (jnp.float16, jnp.bfloat16):
        warnings.warn(
            f"decay arrived as {dtype}, which rounds 0.999 to {np.asarray(0.999, dtype)}: "
            "with optax.inject_hyperparams, set hyperparam_dtype=jnp.float32",
            stacklevel=2,
        )
    rule = _Rule(
        eps_in_sqrt=eps_in_sqrt,
        centered=centered,
        momentum=momentum is not None,
        nesterov=nesterov,
        bias_correction=bias_correction,
        lr_in_momentum=lr_in_momentum,
        decoupled=decoupled,
    )
    for option, name, value in (
        ("nesterov=True" if rule.nesterov else None, "momentum", momentum),
        (None if rule.lr_in_momentum else "lr_in_momentum=False", "momentum", momentum),
        (None if rule.decoupled else "decoupled=False", "weight_decay", weight_decay),
        (None if weight_decay_mask is None else "weight_decay_mask", "weight_decay", weight_decay),
    ):
        if option is not None and value is None:
            raise ValueError(f"{option} needs {name}, got {name}=None")
    state_dtype, mask = _requested_dtype(state_dtype), _trees.checked_mask(weight_decay_mask)
    arguments = (rule, learning_rate, decay, eps, initial_scale, momentum, weight_decay, mask, state_dtype)

    decay, eps = _checks.share("decay", decay), _checks.number("eps", eps)
    momentum = None if momentum is None else _checks.share("momentum", momentum)
    rate = _checks.schedule("learning_rate", learning_rate, lower=-math.inf)
    strength = _checks.schedule("weight_decay", weight_decay)
    # A larger ε is far above what ν or its root can lose.
    tiny: Any = 1e-20 if rule.eps_in_sqrt else 1e-10
    tx = _pytree.transformation(
        dataclasses.replace(rule, eps_may_be_tiny=_checks.is_traced(eps) or eps < tiny),
        # 1 - ρ here, in the precision of a Python float: in float32, 1 - 0.999 is off by 1e-5.
        lambda count: _Scalars(rate(count), decay, 1 - decay, eps, momentum, strength(count)),
        RMSPropState,
        {"nu": _checks.number("initial_scale", initial_scale)},
        state_dtype,
        needs_params=None if weight_decay is None else "weight_decay",
        params_mask=mask,
    )
    return _equality.equal_by_arguments(tx, arguments)


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
        decay: ρ. This and all other arguments are those of :func:`rmsprop`.
        eps: ε.
        initial_scale: ν before the first update.
        eps_in_sqrt: √(ν + ε) instead of √ν + ε.
        bias_correction: correct for an average that started from zero.
        centered: divide by the standard deviation.
        state_dtype: how ν is kept.

    Returns:
        A transformation like that of :func:`rmsprop`, which raises the same errors.

    Example:
        >>> import jax.numpy as jnp, optax, rmsprop_jax
        >>> tx = optax.chain(
        ...     rmsprop_jax.scale_by_rms(0.75), optax.trace(0.9), optax.scale_by_learning_rate(0.1)
        ... )
        >>> grads = jnp.array([1.0, -1000.0])
        >>> updates, _ = tx.update(grads, tx.init(jnp.zeros(2)))
        >>> print([f"{u:.3f}" for u in updates])
        ['-0.200', '0.200']

        ν lags behind a gradient that suddenly grows, and the step is then too long. Clip the updates to
        avoid that:

        >>> tx = optax.chain(
        ...     rmsprop_jax.scale_by_rms(0.99), optax.clip_by_block_rms(1.0), optax.scale_by_learning_rate(0.1)
        ... )
        >>> updates, _ = tx.update(grads, tx.init(jnp.zeros(2)))
        >>> print([f"{u:.3f}" for u in updates])
        ['-0.100', '0.100']

    References:
        :func:`optax.scale_by_rms`. With `eps_in_sqrt=False, bias_correction=True` it equals
        :func:`optax.scale_by_adam` with `b1=0`, and keeps no first moment.
    """
    # At a rate of -1, the update -αu is u itself.
    options = {"bias_correction": bias_correction, "state_dtype": state_dtype}
    return rmsprop(-1.0, decay, eps, initial_scale, eps_in_sqrt, centered, **options)


def _requested_dtype(value: DTypeLike | None) -> np.dtype | None:
    """Checks the argument `state_dtype`."""
    if value is None:
        return None
    allowed = "allowed are None, jnp.bfloat16 and jnp.uint8"
    if isinstance(value, (jax.Array, np.ndarray)):
        # optax.inject_hyperparams calls every callable with the count, and jnp.uint8 is one.
        raise ValueError(f"state_dtype is an array: {allowed}; with optax.inject_hyperparams, write them as strings")
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype not in (jnp.bfloat16, jnp.uint8):
        raise ValueError(f"state_dtype={value!r}: {allowed}")
    return dtype


# --- The rule ---------------------------------------------------------------------------------------------


class _Scalars(NamedTuple):
    """The scalars of the rule, computed once for all leaves."""

    learning_rate: Any
    decay: Any
    one_minus_decay: Any
    eps: Any
    momentum: Any
    weight_decay: Any
    # The rule derives the others from these.
    minus_learning_rate: Any = None
    variance_gain: Any = None  # (1-ρ)/ρ
    decay_power: Any = None  # ρᵗ
    bias: Any = None  # ν/ν̂ if not centered: 1 - ρᵗ, or 1 without a correction
    least: Any = None  # a smaller ν̂ counts as 0
    at_zero: Any = None  # what stands for the sum with ε there: ε, or 1 if ε is 0
    root_gain: Any = None  # √ν̂ / |g| if all gradients were equal; 0 if centered


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The update of one array. The fields are structure: each combination is a program of its own."""

    eps_in_sqrt: bool
    centered: bool
    momentum: bool
    nesterov: bool
    bias_correction: bool
    lr_in_momentum: bool
    decoupled: bool
    eps_may_be_tiny: bool = True  # False leaves out guards, which take time to compile

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, _checks.flag(name, value))

    @property
    def slots(self) -> dict[str, np.dtype]:
        slots = {"nu": np.dtype(jnp.uint8)}
        if self.centered:
            # A mean in one byte could not tell gradients apart that differ by less than half of it.
            slots["mu"] = np.dtype(jnp.bfloat16)
        if self.momentum:
            slots["trace"] = np.dtype(jnp.int8)
        return slots

    def scalars(self, count: jax.Array, hyperparameters: _Scalars) -> _Scalars:
        decay, one_minus_decay, eps = hyperparameters.decay, hyperparameters.one_minus_decay, hyperparameters.eps
        tiny = float(jnp.finfo(decay.dtype).tiny)
        power, one_minus_power = _powers(decay, one_minus_decay, count)
        scalars = hyperparameters._replace(
            minus_learning_rate=-hyperparameters.learning_rate,
            # Two selects, because the derivative of the branch that is not selected must be finite as well.
            variance_gain=jnp.where(decay > tiny, one_minus_decay / jnp.where(decay > tiny, decay, 1), 0),
            decay_power=power,
            # An average that never moves, at ρ = 1, has no bias.
            bias=jnp.where(one_minus_power < tiny, 1, one_minus_power) if self.bias_correction else 1,
            least=tiny,
            at_zero=eps,
        )
        if not self.eps_may_be_tiny:
            return scalars
        # An update loses (1-ρ)|g|² if that is below `tiny`, so ν̂ can be too small by tiny / (1-ρ). (Some machines keep
        # such subnormal numbers. Here they count as 0 on every machine.)
        least = tiny / jnp.where(one_minus_decay < tiny, 1, one_minus_decay)
        gain = 0 if self.centered else jnp.sqrt(jax.lax.stop_gradient(one_minus_power / scalars.bias))
        floor = least if self.eps_in_sqrt else jnp.sqrt(least) if self.centered else 0
        at_least = jnp.maximum(eps, jax.lax.stop_gradient(floor))
        is_zero = eps < tiny
        return scalars._replace(
            eps=jnp.where(is_zero, 0, at_least) if self.eps_in_sqrt else eps,
            least=jax.lax.stop_gradient(least),
            at_zero=jnp.where(is_zero, 1, at_least),
            root_gain=gain,
        )

    def __call__(
        self,
        scalars: _Scalars,
        grad: jax.Array,
        param: jax.Array | None,
        slots: Mapping[str, _storage.Accumulator],
    ) -> tuple[jax.Array, dict[str, _storage.Accumulator]]:
        new = dict(slots)

        if scalars.weight_decay is not None and param is not None and not self.decoupled:
            grad = grad + scalars.weight_decay * param
        # Clip a gradient whose square ν cannot hold. Its step is then as long as any other, and ν has recovered after
        # about 90/(1-ρ) updates.
        nu = slots["nu"]
        g = _clip(grad, np.sqrt(nu.largest, dtype=nu.value.dtype))

        if self.centered:
            # With the new mean g - μ' = ρ(g - μ), so this is ρ(ν + (1-ρ)|g - μ|²). With the old mean
            # XLA's CPU backend copies the donated buffers.
            mu = new["mu"] = slots["mu"].set(slots["mu"].value + scalars.one_minus_decay * (g - slots["mu"].value))
            nu = new["nu"] = nu.set(scalars.decay * nu.value + scalars.variance_gain * _abs_sq(g - mu.value))
            second_moment = nu.value + scalars.decay_power * _abs_sq(mu.value) if self.bias_correction else nu.value
        else:
            # Here, bounding |g|² compiles faster than clipping g.
            square = jnp.minimum(_abs_sq(grad), nu.largest)
            nu = new["nu"] = nu.set(scalars.decay * nu.value + scalars.one_minus_decay * square)
            second_moment = nu.value

        # grad - grad is 0, or NaN where grad is inf: clipping must not hide it.
        u = g / self._denominator(scalars, second_moment, g, grad - grad)

        if scalars.momentum is not None:
            increment = scalars.learning_rate * u if self.lr_in_momentum else u
            trace = new["trace"] = slots["trace"].set(scalars.momentum * slots["trace"].value + increment)
            b = scalars.momentum * trace.value + increment if self.nesterov else trace.value
            step = -b if self.lr_in_momentum else scalars.minus_learning_rate * b
        else:
            step = scalars.minus_learning_rate * u
        if scalars.weight_decay is not None and param is not None and self.decoupled:
            step = step + scalars.minus_learning_rate * scalars.weight_decay * param
        return step, new

    def _denominator(self, scalars: _Scalars, second_moment: jax.Array, g: jax.Array, zero: jax.Array) -> jax.Array:
        # NaN passes. The selects keep the zero out of the root and the quotient, so that derivatives of any order are
        # finite.
        nu_hat = second_moment / scalars.bias if self.bias_correction else second_moment
        is_zero = nu_hat < scalars.least
        if self.eps_in_sqrt:
            square = nu_hat + scalars.eps
            return _sqrt_plus(jnp.where(is_zero, scalars.at_zero, square) if self.eps_may_be_tiny else square, zero)
        at_zero = scalars.at_zero
        if self.eps_may_be_tiny and not self.centered:
            # |g| may be too small for its square and yet larger than ε. The root is then that of equal gradients. The
            # largest g that is not clipped, divided by this, is finite, and so is the derivative.
            root = scalars.root_gain * jax.lax.stop_gradient(jnp.abs(g))
            at_zero = jnp.maximum(at_zero + root, float(jnp.finfo(root.dtype).tiny) ** 0.5)
        return jnp.where(is_zero, at_zero, jnp.sqrt(jnp.where(is_zero, 1, nu_hat)) + scalars.eps) + zero


def _powers(decay: jax.Array, one_minus_decay: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """ρᵗ and 1 - ρᵗ, which is right also where float32 rounds ρ = 0.99999 by 0.1 percent of 1-ρ."""
    t = count.astype(decay.dtype)
    # Below, 1 - ρᵗ as Optax computes it is off by 1e-5 at most. So at 0.999 we equal optax.scale_by_adam.
    short, power = decay < 0.9991, decay**t
    exponent = t * jnp.log1p(-jnp.where(short, 0.5, one_minus_decay))  # 0.5: the logarithm of 0 has no derivative
    return jnp.where(short, power, jnp.exp(exponent)), jnp.where(short, 1 - power, -jnp.expm1(exponent))


def _sqrt_plus(x: jax.Array, zero: jax.Array) -> jax.Array:
    """√x, and NaN where `zero` is NaN."""
    if jnp.iscomplexobj(zero):
        return jnp.sqrt(x) + zero
    # The sum outside the root keeps XLA from turning g / sqrt(x) into g * rsqrt(x): its CPU backend does not
    # vectorize rsqrt where cores get unequal parts of an array, and takes more than twice as long. A TPU has an
    # instruction for rsqrt, and needs half of the arithmetic with it.
    return jax.lax.platform_dependent(
        x, zero, cpu=lambda x, zero: jnp.sqrt(x) + zero, default=lambda x, zero: jnp.sqrt(x + zero)
    )


def _clip(g: jax.Array, limit: np.floating) -> jax.Array:
    if jnp.iscomplexobj(g):
        return jax.lax.complex(_clip(g.real, limit), _clip(g.imag, limit))
    return jax.lax.clamp(-limit, g, limit)


def _abs_sq(x: jax.Array) -> jax.Array:
    # Not jnp.abs(x)**2: its derivative at a complex zero is NaN.
    return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x
