"""RMSProp as each paper and framework has it, with its own argument names and defaults.

Paste the framework's call, leave out the parameters, and it works::

    torch.optim.RMSprop(params, lr=6e-4, alpha=0.99, eps=0.01)   # becomes
    dialects.pytorch(lr=6e-4, alpha=0.99, eps=0.01)

The body of each function is a row of data that says which options of :func:`rmsprop_jax.rmsprop` the
call stands for, and what stands in front of them and behind. `python -m rmsprop_jax --dialects` prints
the rows side by side.

A learning rate may be a schedule everywhere. Arguments that cannot be honoured raise an error that says
what to do instead. Arguments that only say how to compute, such as `foreach`, `use_locking` and `name`,
are accepted and change nothing. What a framework switches off with 0 has the default `None` here, so that
:func:`optax.inject_hyperparams`, which makes arrays of all numbers, does not switch it on; 0 is accepted,
and off, too. `state_dtype` and `weight_decay_mask` are ours: they are those of :func:`rmsprop_jax.rmsprop`.

The frameworks compute a variance as E[g²] - E[g]². Where that cancels, they differ from us by their
rounding errors. For complex parameters ν is our average of |g|²; for PyTorch's two independent halves, put
:func:`optax.contrib.split_real_and_imaginary` around a dialect.
"""

# No `from __future__ import annotations`: see _rmsprop.py.

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from ._rmsprop import rmsprop


Transformation = optax.GradientTransformationExtraArgs
_P = ParamSpec("_P")


class Row(NamedTuple):
    """What the call of a dialect stands for."""

    options: dict[str, Any]  # the arguments of `rmsprop`
    before: tuple[optax.GradientTransformation, ...] = ()  # in front of it in the chain
    after: tuple[optax.GradientTransformation, ...] = ()  # behind it
    accumulate: int | None = None  # number of gradients whose mean makes one update
    equivalent: dict[str, Any] = {}  # noqa: RUF012 (never changed): options that `before` and `after` amount to


def _dialect(row: Callable[_P, Row]) -> Callable[_P, Transformation]:
    """Makes a function that returns a row a function that returns the transformation."""

    @functools.wraps(row)
    def make(*args: _P.args, **kwargs: _P.kwargs) -> Transformation:
        return _transformation(row(*args, **kwargs))

    signature = inspect.signature(row).replace(return_annotation=Transformation)
    setattr(make, "__signature__", signature)  # noqa: B010 (functions do not declare it)
    return make


def _transformation(row: Row) -> Transformation:
    core = rmsprop(**row.options)
    chain = optax.chain(*row.before, core, *row.after) if row.before or row.after else core
    if row.accumulate is None:
        return optax.with_extra_args_support(chain)
    steps = optax.MultiSteps(chain, row.accumulate).gradient_transformation()
    return optax.with_extra_args_support(steps)


# --- Papers -----------------------------------------------------------------------------------------------


@_dialect
def hinton(
    learning_rate: optax.ScalarOrSchedule = 0.001, decay: ArrayLike = 0.9, *, state_dtype: DTypeLike | None = None
) -> Row:
    """Hinton's slide: g / √E[g²], without any ε.

    The slide gives no learning rate and no first value. 0.001 is the rate that is usually quoted; our
    average starts from zero. A gradient that has always been zero gives an update of zero.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = hinton(0.5, decay=0.75)
        >>> tx.update(jnp.float32(-3.0), tx.init(jnp.float32(0.0)))[0]
        Array(1., dtype=float32)

    References:
        Tieleman and Hinton, Lecture 6.5 - RMSProp, COURSERA: Neural Networks for Machine Learning, 2012.
    """
    return Row(_options(learning_rate=learning_rate, decay=decay, eps=0.0, state_dtype=state_dtype))


@_dialect
def graves(
    learning_rate: optax.ScalarOrSchedule = 1e-4,
    decay: ArrayLike = 0.95,
    momentum: ArrayLike = 0.9,
    eps: ArrayLike = 1e-4,
    *,
    state_dtype: DTypeLike | None = None,
) -> Row:
    """Graves' RMSProp for handwriting: centered, with momentum, ε inside the root (equations 38 to 45).

    References:
        `Generating sequences with recurrent neural networks <https://arxiv.org/abs/1308.0850>`_, 2013.
    """
    return Row(
        _options(
            learning_rate=learning_rate,
            decay=decay,
            eps=eps,
            centered=True,
            momentum=momentum,
            state_dtype=state_dtype,
        )
    )


@_dialect
def dqn(
    learning_rate: optax.ScalarOrSchedule = 0.00025,
    gradient_momentum: ArrayLike | None = None,
    squared_gradient_momentum: ArrayLike = 0.95,
    min_squared_gradient: ArrayLike = 0.01,
    *,
    state_dtype: DTypeLike | None = None,
) -> Row:
    """The Nature DQN's RMSProp: centered, ε = 0.01 inside the root, no momentum.

    What the paper calls "gradient momentum" is the decay of the mean that centers, and
    `min_squared_gradient` is ε. There is no momentum buffer, as `DeepMind confirms
    <https://github.com/google-deepmind/dqn/issues/5>`_. Both decays must be equal, as they are in the
    paper; `None` means that they are.

    Example:
        Dopamine's DQN in TensorFlow is :func:`tensorflow1`, with another ε and an average that starts at 1:

        >>> dopamine = tensorflow1(2.5e-4, decay=0.95, epsilon=1e-5, centered=True)

    References:
        Mnih et al., Human-level control through deep reinforcement learning, 2015; NeuralQLearner.lua.
    """
    _refuse("gradient_momentum", gradient_momentum, squared_gradient_momentum, "the two decays must be equal")
    return Row(
        _options(
            learning_rate=learning_rate,
            decay=squared_gradient_momentum,
            eps=min_squared_gradient,
            centered=True,
            state_dtype=state_dtype,
        )
    )


@_dialect
def dreamer(
    lr: optax.ScalarOrSchedule = 4e-5,
    agc: ArrayLike | None = 0.3,
    eps: ArrayLike = 1e-20,
    beta1: ArrayLike = 0.9,
    beta2: ArrayLike = 0.999,
    momentum: bool = True,
    nesterov: bool = False,
    wd: float | jax.Array | None = None,
    wdregex: str = r"/kernel$",
    schedule: str = "const",
    warmup: float | jax.Array = 1000,
    anneal: float | jax.Array = 0,
    *,
    weight_decay_mask: Any = None,
    state_dtype: DTypeLike | None = None,
) -> Row:
    """DreamerV3's optimizer (LaProp): clip each tensor adaptively, divide by the root mean square, then average.

    With all averages bias corrected, ε outside the root, and norms taken over whole tensors::

        g ← g / max(1, |g| / (agc · max(0.001, |p|)))
        u ← g / (√ν̂ + ε)
        p ← p - α (average of u, plus wd·p where wdregex matches)

    :func:`optax.adaptive_grad_clip` clips by units, not by tensors, and gives other numbers. The learning
    rate rises linearly over `warmup` updates, and is then constant, or falls until update `anneal`:
    linearly to `0.1 * lr`, or along a cosine to `0.1 * lr**2`, as DreamerV3 has it. A schedule
    for `lr` is multiplied by that shape. `wdregex` is searched in the path of a parameter, with "/" between
    keys; `weight_decay_mask` takes its place. DreamerV3 never reads `momentum`.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = dreamer(lr=1e-3, warmup=0)
        >>> params = {"dense": {"kernel": jnp.ones((2, 2))}}
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> print(f"{updates['dense']['kernel'][0, 0]:.6f}")
        -0.001000

    References:
        danijar/dreamerv3 e3f0224: embodied/jax/opt.py, and `_make_opt` in dreamerv3/agent.py.
    """
    _refuse("momentum", momentum, True, "DreamerV3 takes it and never reads it: beta1=0 turns the average off")
    if schedule not in ("const", "linear", "cosine"):
        raise ValueError(f"schedule={schedule!r}: allowed are 'const', 'linear' and 'cosine'")
    if schedule == "const" and not _traced(anneal):
        _refuse("anneal", anneal, 0, "it needs schedule='linear' or 'cosine'")
    elif schedule != "const" and not (_traced(anneal) or _traced(warmup)) and not anneal > warmup:
        raise ValueError(f"anneal={anneal!r}: with schedule={schedule!r} it must be larger than warmup={warmup!r}")

    def rate(count: Any) -> Any:
        base: Any = lr(count) if callable(lr) else lr
        step = jnp.asarray(count, jnp.float32)
        if schedule == "const":
            shape = 1.0
        else:
            past = jnp.clip((step - warmup) / jnp.asarray(anneal - warmup, jnp.float32), 0.0, 1.0)
            final = 0.1 * jnp.asarray(base, jnp.float32)
            shape = 1 - 0.9 * past if schedule == "linear" else final + (1 - final) * (1 + jnp.cos(jnp.pi * past)) / 2
        return base * jnp.where(step < warmup, step / jnp.maximum(jnp.asarray(warmup, jnp.float32), 1.0), shape)

    def corrected(count: Any) -> jax.Array:
        power = jnp.asarray(beta1, jnp.float32) ** (jnp.asarray(count, jnp.float32) + 1)
        return (1 - jnp.asarray(beta1, jnp.float32)) / (1 - power)

    wd = _off(wd)
    by_path = functools.partial(jax.tree.map_with_path, lambda path, _: bool(re.search(wdregex, _joined(path))))
    decay = [] if wd is None else [optax.add_decayed_weights(wd, weight_decay_mask or by_path)]
    # An average is a trace times 1 - β.
    average = [optax.trace(beta1, nesterov, jnp.float32), optax.scale_by_schedule(corrected)]
    return Row(
        _options(
            # A rate of -1 leaves u as it is.
            learning_rate=-1.0,
            decay=beta2,
            eps=eps,
            eps_in_sqrt=False,
            bias_correction=True,
            state_dtype=state_dtype,
        ),
        before=() if _off(agc) is None else (_by_tensor(functools.partial(_adaptively_clipped, agc)),),
        after=(*average, *decay, optax.scale_by_learning_rate(rate)),
        equivalent={"momentum": beta1, "lr_in_momentum": False, "weight_decay": wd, "decoupled": True},
    )


# --- The PyTorch family -----------------------------------------------------------------------------------


@_dialect
def pytorch(
    lr: optax.ScalarOrSchedule = 1e-2,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike | None = None,
    momentum: ArrayLike | None = None,
    centered: bool = False,
    capturable: bool = False,
    foreach: bool | None = None,
    maximize: bool = False,
    differentiable: bool = False,
    *,
    weight_decay_mask: Any = None,
    state_dtype: DTypeLike | None = None,
) -> Row:
    """`torch.optim.RMSprop`: ε outside the root, learning rate outside the buffer, coupled decay.

    MindSpore's `mint` and `experimental.optim.RMSprop` follow the same rule. Groups of parameters become
    :func:`optax.partition`, with one call for each group.

    Example:
        TorchBeast's IMPALA, and torchvision's MobileNetV3, whose ε is the root of TensorFlow's 1e-3:

        >>> impala = optax.chain(
        ...     optax.clip_by_global_norm(40.0),
        ...     pytorch(optax.linear_schedule(4.8e-4, 0.0, 10_000), alpha=0.99, eps=0.01),
        ... )
        >>> mobilenet_v3 = pytorch(lr=0.064, alpha=0.9, momentum=0.9, eps=0.0316, weight_decay=1e-5)

        Two groups of parameters, `RMSprop([dict(params=body), dict(params=head, lr=1e-2, momentum=0.9)], lr=1e-3)`:

        >>> import jax.numpy as jnp
        >>> groups = {"body": pytorch(lr=1e-3), "head": pytorch(lr=1e-2, momentum=0.9)}
        >>> tx = optax.partition(groups, {"body": "body", "head": "head"})
        >>> params = {"body": jnp.ones(2), "head": jnp.ones(3)}
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> print(f"{updates['body'][0]:.3f} {updates['head'][0]:.3f}")
        -0.010 -0.100

        An injected rate has PyTorch's name:

        >>> injected = optax.inject_hyperparams(pytorch)(lr=1e-3)
        >>> print(f"{injected.init(params).hyperparams['lr']:.3f}")
        0.001

    References:
        torch/optim/rmsprop.py, 2.13.0. Versions 2.14 and 2.15 changed its types and its docstring only.
    """
    del capturable, foreach, differentiable
    return Row(
        _options(
            learning_rate=lr,
            decay=alpha,
            eps=eps,
            eps_in_sqrt=False,
            centered=centered,
            momentum=momentum,
            lr_in_momentum=False,
            weight_decay=weight_decay,
            weight_decay_mask=weight_decay_mask,
            state_dtype=state_dtype,
        ),
        # In front of the decay, which shrinks the parameter either way.
        before=(optax.scale(-1.0),) if _flag("maximize", maximize) else (),
    )


@_dialect
def timm(
    lr: optax.ScalarOrSchedule = 1e-2,
    alpha: ArrayLike = 0.9,
    eps: ArrayLike = 1e-10,
    weight_decay: ArrayLike | None = None,
    momentum: ArrayLike | None = None,
    centered: bool = False,
    decoupled_decay: bool = False,
    corrected_weight_decay: bool = False,
    lr_in_momentum: bool = True,
    caution: bool = False,
    foreach: bool | None = None,
    *,
    max_lr: float | None = None,
    weight_decay_mask: Any = None,
    state_dtype: DTypeLike | None = None,
) -> Row:
    """timm's `RMSpropTF`: TensorFlow 1's rule under PyTorch's names, with an average that starts at 1.

    The factory's `rmsproptf` is this one; its `rmsprop` is PyTorch's with alpha=0.9. The factory decays no
    parameter of one dimension: `weight_decay_mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)`.

    `corrected_weight_decay` shrinks by λα²/α_max, where α_max is the rate that timm's constructor got. It
    acts only with `decoupled_decay`, and with a schedule it needs `max_lr`, which is ours.

    Example:
        EfficientNet-B2 as in timm's training_hparam_examples.md, for 256 images a step:

        >>> schedule = optax.exponential_decay(0.016, 12_000, 0.97, staircase=True)  # every 2.4 epochs
        >>> efficientnet = timm(schedule, momentum=0.9, eps=1e-3, weight_decay=1e-5)

    References:
        timm/optim/rmsprop_tf.py, 1.0.31.
    """
    del foreach
    _refuse("caution", caution, False, "its mask compares the gradient with the buffer, which no chain can do")
    decoupled = _flag("decoupled_decay", decoupled_decay)
    corrected: tuple[optax.GradientTransformation, ...] = ()
    if _flag("corrected_weight_decay", corrected_weight_decay):
        largest = lr if max_lr is None else max_lr
        if callable(largest) or _traced(largest):
            raise ValueError("corrected_weight_decay=True needs max_lr, the rate that timm's constructor got")
        if decoupled and _off(weight_decay) is not None:
            corrected = (_corrected_decay(lr, largest, weight_decay, weight_decay_mask),)
    elif max_lr is not None:
        raise ValueError(f"max_lr={max_lr!r} needs corrected_weight_decay=True")
    return Row(
        _options(
            learning_rate=lr,
            decay=alpha,
            eps=eps,
            initial_scale=1.0,
            centered=centered,
            momentum=momentum,
            lr_in_momentum=lr_in_momentum,
            weight_decay=None if corrected else weight_decay,
            weight_decay_mask=weight_decay_mask,
            decoupled=decoupled,
            state_dtype=state_dtype,
        ),
        after=corrected,
        equivalent={"weight_decay": weight_decay} if corrected else {},
    )


@_dialect
def stable_baselines3(
    lr: optax.ScalarOrSchedule = 1e-2,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike | None = None,
    momentum: ArrayLike | None = None,
    centered: bool = False,
    *,
    weight_decay_mask: Any = None,
    state_dtype: DTypeLike | None = None,
) -> Row:
    """Stable Baselines 3's `RMSpropTFLike`: average from 1, ε inside the root, but PyTorch's buffer.

    A2C uses it only with `policy_kwargs=dict(optimizer_class=RMSpropTFLike)`. By default A2C is
    :func:`pytorch` with alpha=0.99 and eps=1e-5.

    References:
        stable_baselines3/common/sb2_compat/rmsprop_tf_like.py, 2.9.2.
    """
    return Row(
        _options(
            learning_rate=lr,
            decay=alpha,
            eps=eps,
            initial_scale=1.0,
            centered=centered,
            momentum=momentum,
            lr_in_momentum=False,
            weight_decay=weight_decay,
            weight_decay_mask=weight_decay_mask,
            state_dtype=state_dtype,
        )
    )


@_dialect
def bitsandbytes(
    lr: optax.ScalarOrSchedule = 1e-2,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike | None = None,
    momentum: ArrayLike | None = None,
    centered: bool = False,
    optim_bits: int | None = None,
    args: Any = None,
    min_8bit_size: int | None = None,
    *,
    weight_decay_mask: Any = None,
    state_dtype: DTypeLike | None = None,
) -> Row:
    """`bitsandbytes.optim.RMSprop` with 32 bits: PyTorch's rule without momentum and centering.

    References:
        bitsandbytes/optim/rmsprop.py, 0.50.2.
    """
    del min_8bit_size
    _refuse("momentum", momentum, 0, "bitsandbytes takes it and no kernel reads it; pytorch(momentum=...) has it")
    _refuse("centered", centered, False, "bitsandbytes refuses it, too; pytorch(centered=True) has it")
    _refuse(
        "optim_bits",
        optim_bits,
        32,
        "its 8 bits are blocks with codebooks of their own; state_dtype=jnp.uint8 is another way to keep one byte",
    )
    _refuse("args", args, None, "chain with the transformation that you need")
    return Row(
        _options(
            learning_rate=lr,
            decay=alpha,
            eps=eps,
            eps_in_sqrt=False,
            weight_decay=weight_decay,
            weight_decay_mask=weight_decay_mask,
            state_dtype=state_dtype,
        )
    )


# --- The TensorFlow family --------------------------------------------------------------------------------


@_dialect
def keras(
    learning_rate: optax.ScalarOrSchedule = 0.001,
    rho: ArrayLike = 0.9,
    momentum: ArrayLike | None = None,
    epsilon: ArrayLike = 1e-7,
    centered: bool = False,
    weight_decay: ArrayLike | None = None,
    clipnorm: ArrayLike | None = None,
    clipvalue: ArrayLike | None = None,
    global_clipnorm: ArrayLike | None = None,
    use_ema: bool = False,
    ema_momentum: ArrayLike = 0.99,
    ema_overwrite_frequency: int | None = None,
    loss_scale_factor: ArrayLike | None = None,
    gradient_accumulation_steps: int | None = None,
    name: str | None = None,
    *,
    weight_decay_mask: Any = None,
    state_dtype: DTypeLike | None = None,
) -> Row:
    """Keras 3, and tf.keras from TensorFlow 2.11 on: ε inside the root, average from 0, decoupled decay.

    At most one of `clipnorm` (each variable), `global_clipnorm` (all together) and `clipvalue` may be set.
    `loss_scale_factor` divides the gradients. With `gradient_accumulation_steps=k` the mean of k gradients is
    clipped and makes one update; a schedule then sees the count of gradients, as it does in Keras.
    What Keras leaves out with `exclude_from_weight_decay` is False in `weight_decay_mask`.

    Example:
        >>> tx = keras(1e-3, momentum=0.9, global_clipnorm=1.0)

    References:
        keras/src/optimizers/rmsprop.py and base_optimizer.py, 3.15.1.
    """
    del ema_momentum, name
    _refuse("use_ema", use_ema, False, "average the parameters yourself, with optax.incremental_update")
    _refuse("ema_overwrite_frequency", ema_overwrite_frequency, None, "overwrite the parameters in your own loop")
    clips = {"clipnorm": clipnorm, "clipvalue": clipvalue, "global_clipnorm": global_clipnorm}
    if sum(clip is not None for clip in clips.values()) > 1:
        raise ValueError(f"only one of clipnorm, clipvalue and global_clipnorm can be set, got {clips}")
    k = _steps("gradient_accumulation_steps", gradient_accumulation_steps)
    if k is not None and callable(learning_rate):
        schedule = learning_rate
        learning_rate = lambda count: schedule(k * count + (k - 1))  # noqa: E731
    return Row(
        _options(
            learning_rate=learning_rate,
            decay=rho,
            eps=epsilon,
            centered=centered,
            momentum=momentum,
            weight_decay=weight_decay,
            weight_decay_mask=weight_decay_mask,
            decoupled=True,
            state_dtype=state_dtype,
        ),
        before=(*_unscaled("loss_scale_factor", loss_scale_factor), *_clips(**{n: _off(c) for n, c in clips.items()})),
        accumulate=k,
    )


@_dialect
def tf_keras(
    learning_rate: optax.ScalarOrSchedule = 0.001,
    rho: ArrayLike = 0.9,
    momentum: ArrayLike | None = None,
    epsilon: ArrayLike = 1e-7,
    centered: bool = False,
    name: str = "RMSprop",
    *,
    decay: ArrayLike | None = None,
    clipnorm: ArrayLike | None = None,
    clipvalue: ArrayLike | None = None,
    global_clipnorm: ArrayLike | None = None,
    state_dtype: DTypeLike | None = None,
) -> Row:
    """The legacy tf.keras (TensorFlow 2.0 to 2.10, `tf.keras.optimizers.legacy`), whose ε moves.

    With momentum it calls TensorFlow's kernel, which has ε inside the root. Without, it runs Python code
    that has ε outside. A traced momentum counts as momentum, as a tensor does there. `epsilon=0` silently
    becomes 1e-7 there, and does here. `decay` divides the learning rate by 1 + decay · count.

    References:
        tf_keras/src/optimizers/legacy/rmsprop.py and optimizer_v2.py, 2.21.0.
    """
    del name
    if clipnorm is not None and global_clipnorm is not None:
        raise ValueError(f"only one of {clipnorm=} and {global_clipnorm=} can be set")
    decay = _off(decay)

    def decayed(count: Any) -> Any:
        rate: Any = learning_rate(count) if callable(learning_rate) else learning_rate
        return rate / (1 + jnp.asarray(decay, jnp.float32) * jnp.asarray(count, jnp.float32))

    return Row(
        _options(
            learning_rate=learning_rate if decay is None else decayed,
            decay=rho,
            eps=1e-7 if _off(epsilon) is None else epsilon,
            eps_in_sqrt=_off(momentum) is not None,
            centered=centered,
            momentum=momentum,
            state_dtype=state_dtype,
        ),
        before=_clips(clipvalue=clipvalue, clipnorm=clipnorm, global_clipnorm=global_clipnorm),
    )


@_dialect
def tensorflow1(
    learning_rate: optax.ScalarOrSchedule,
    decay: ArrayLike = 0.9,
    momentum: ArrayLike | None = None,
    epsilon: ArrayLike = 1e-10,
    use_locking: bool = False,
    centered: bool = False,
    name: str = "RMSProp",
    *,
    state_dtype: DTypeLike | None = None,
) -> Row:
    """`tf.compat.v1.train.RMSPropOptimizer`: average from 1, ε inside the root, learning rate in the buffer.

    Google's and DeepMind's papers on vision and reinforcement learning used it. Their weight decay is part
    of the loss: use `weight_decay` of :func:`rmsprop_jax.rmsprop`. This is the dense kernel. The sparse one
    leaves rows alone that a batch does not touch.

    Example:
        >>> efficientnet = tensorflow1(0.016, momentum=0.9, epsilon=1e-3)  # and MnasNet; per 256 images
        >>> inception = tensorflow1(0.165, momentum=0.9, epsilon=1.0)  # v3; per 256 images
        >>> mobilenet_v2 = tensorflow1(0.045, momentum=0.9, epsilon=1.0)  # ε from TF-Slim: the paper has none
        >>> impala = tensorflow1(optax.linear_schedule(4.8e-4, 0.0, 10_000), decay=0.99, epsilon=0.1)
        >>> a2c = tensorflow1(optax.linear_schedule(7e-4, 0.0, 10_000), decay=0.99, epsilon=1e-5)  # OpenAI baselines

        A3C's shared RMSProp starts from 0 (ε is from muupan/async-rl, which asked the authors):

        >>> a3c = rmsprop(7e-4, decay=0.99, eps=0.1)

    References:
        tensorflow/python/training/rmsprop.py and tensorflow/core/kernels/training_ops.cc, 2.21.
    """
    del use_locking, name
    return Row(
        _options(
            learning_rate=learning_rate,
            decay=decay,
            eps=epsilon,
            initial_scale=1.0,
            centered=centered,
            momentum=momentum,
            state_dtype=state_dtype,
        )
    )


@_dialect
def sonnet(
    learning_rate: optax.ScalarOrSchedule,
    decay: ArrayLike = 0.9,
    momentum: ArrayLike | None = None,
    epsilon: ArrayLike = 1e-10,
    centered: bool = False,
    name: str | None = None,
    *,
    state_dtype: DTypeLike | None = None,
) -> Row:
    """Sonnet 2's `snt.optimizers.RMSProp`: TensorFlow 1's defaults, but the average starts from 0.

    References:
        sonnet/src/optimizers/rmsprop.py, 2.0.2.
    """
    del name
    return Row(
        _options(
            learning_rate=learning_rate,
            decay=decay,
            eps=epsilon,
            centered=centered,
            momentum=momentum,
            state_dtype=state_dtype,
        )
    )


# --- Others -----------------------------------------------------------------------------------------------


@_dialect
def paddle(
    learning_rate: optax.ScalarOrSchedule,
    rho: ArrayLike = 0.95,
    epsilon: ArrayLike = 1e-6,
    momentum: ArrayLike | None = None,
    centered: bool = False,
    parameters: Any = None,
    weight_decay: ArrayLike | None = None,
    grad_clip: Any = None,
    name: str | None = None,
    *,
    weight_decay_mask: Any = None,
    state_dtype: DTypeLike | None = None,
) -> Row:
    """`paddle.optimizer.RMSProp`: ε inside the root, average from 0, coupled decay.

    Its documentation speaks of Nesterov momentum. Its code has plain momentum, and so has this.

    References:
        python/paddle/optimizer/rmsprop.py and rmsprop_kernel_impl.h, 3.3.1.
    """
    del name
    _refuse("parameters", parameters, None, "pass the parameters to init and update")
    _refuse("grad_clip", grad_clip, None, "chain with optax.clip or optax.clip_by_global_norm in front")
    return Row(
        _options(
            learning_rate=learning_rate,
            decay=rho,
            eps=epsilon,
            centered=centered,
            momentum=momentum,
            weight_decay=weight_decay,
            weight_decay_mask=weight_decay_mask,
            state_dtype=state_dtype,
        )
    )


@_dialect
def mindspore(
    learning_rate: optax.ScalarOrSchedule = 0.1,
    decay: ArrayLike = 0.9,
    momentum: ArrayLike | None = None,
    epsilon: ArrayLike = 1e-10,
    use_locking: bool = False,
    centered: bool = False,
    loss_scale: ArrayLike | None = None,
    weight_decay: ArrayLike | None = None,
    *,
    weight_decay_mask: Any = None,
    state_dtype: DTypeLike | None = None,
) -> Row:
    """MindSpore's `nn.RMSProp`: TensorFlow 1's rule, with coupled decay. `loss_scale` divides the gradients.

    This is what its documentation and most of its kernels compute. The vectorized part of its CPU kernel
    for tensors of eight and more elements (2.10.0, not centered) has ε outside the root. For a run made
    there, use `rmsprop(..., initial_scale=1.0, eps_in_sqrt=False)`. Its `experimental.optim.RMSprop` is
    :func:`pytorch`.

    References:
        mindspore/nn/optim/rmsprop.py and optimizer.py, 2.10.0.
    """
    del use_locking
    return Row(
        _options(
            learning_rate=learning_rate,
            decay=decay,
            eps=epsilon,
            initial_scale=1.0,
            centered=centered,
            momentum=momentum,
            weight_decay=weight_decay,
            weight_decay_mask=weight_decay_mask,
            state_dtype=state_dtype,
        ),
        before=_unscaled("loss_scale", loss_scale),
    )


@_dialect
def mlx(
    learning_rate: optax.ScalarOrSchedule,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    *,
    state_dtype: DTypeLike | None = None,
) -> Row:
    """Apple's `mlx.optimizers.RMSprop`: PyTorch's rule without momentum, centering and decay.

    References:
        python/mlx/optimizers/optimizers.py, 0.32.4.
    """
    return Row(_options(learning_rate=learning_rate, decay=alpha, eps=eps, eps_in_sqrt=False, state_dtype=state_dtype))


@_dialect
def optimisers_jl(
    eta: optax.ScalarOrSchedule = 0.001,
    rho: ArrayLike = 0.9,
    epsilon: ArrayLike = 1e-8,
    centred: bool = False,
    *,
    state_dtype: DTypeLike | None = None,
) -> Row:
    """`RMSProp(η, ρ, ϵ; centred)` of Optimisers.jl (Flux): ε outside the root, average from 0.

    Its documentation calls ρ momentum; it is the decay. Momentum is another rule in its chain there, with
    the learning rate in the buffer: `rmsprop(..., eps_in_sqrt=False, momentum=...)`.

    References:
        Optimisers.jl, src/rules.jl.
    """
    return Row(
        _options(
            learning_rate=eta,
            decay=rho,
            eps=epsilon,
            eps_in_sqrt=False,
            centered=centred,
            state_dtype=state_dtype,
        )
    )


# --- The table --------------------------------------------------------------------------------------------


DIALECTS = (
    *(hinton, graves, dqn, dreamer),
    *(pytorch, timm, stable_baselines3, bitsandbytes),
    *(keras, tf_keras, tensorflow1, sonnet),
    *(paddle, mindspore, mlx, optimisers_jl),
)


def options(dialect: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """What the call of a dialect stands for: every argument of `rmsprop`, by name.

    Of what stands in front of the rule or behind it (clipping, a flipped sign, DreamerV3's average), it says
    nothing.

    Example:
        >>> options(pytorch, momentum=0.9)["lr_in_momentum"]
        False
    """
    bound = inspect.signature(rmsprop).bind(**_row(dialect, arguments).options)
    bound.apply_defaults()
    return bound.arguments


def table() -> list[dict[str, str]]:
    """One row per dialect, one column per option in which they differ; "" is what a dialect does not have."""

    def probe(dialect: Callable[..., Any], **arguments: Any) -> dict[str, Any] | None:
        try:
            return options(dialect, **arguments) | _row(dialect, arguments).equivalent
        except (TypeError, ValueError):  # no such argument, or refused
            return None

    rows = []
    for dialect in DIALECTS:
        plain, decaying = probe(dialect) or {}, probe(dialect, weight_decay=0.1) or probe(dialect, wd=0.1)
        moving = plain if plain["momentum"] is not None else probe(dialect, momentum=0.9)
        centering = probe(dialect, centered=True) or probe(dialect, centred=True)
        root = {True: "inside", False: "outside"}
        eps = root[plain["eps_in_sqrt"]]
        if moving and moving["eps_in_sqrt"] != plain["eps_in_sqrt"]:
            eps += f", {root[moving['eps_in_sqrt']]} with momentum"
        decay = "" if decaying is None else "decoupled" if decaying["decoupled"] else "coupled"
        if probe(dialect, weight_decay=0.1, decoupled_decay=True):
            decay += " or decoupled"
        learning_rate, *_ = inspect.signature(dialect).parameters.values()
        rows.append(
            {
                "dialect": dialect.__name__,
                "lr": "" if learning_rate.default is learning_rate.empty else f"{learning_rate.default:g}",
                "decay": f"{plain['decay']:g}",
                "eps": f"{plain['eps']:g}",
                "eps vs root": eps,
                "first ν": "corrected" if plain["bias_correction"] else f"{plain['initial_scale']:g}",
                "centered": "always" if plain["centered"] else "option" if centering else "",
                "momentum": "" if moving is None else f"{plain['momentum'] or 0:g}",
                "lr vs buffer": "" if moving is None else root[moving["lr_in_momentum"]],
                "weight decay": decay,
            }
        )
    return rows


def _row(dialect: Callable[..., Any], arguments: dict[str, Any]) -> Row:
    learning_rate, *_ = inspect.signature(dialect).parameters.values()
    if learning_rate.default is learning_rate.empty:
        arguments = {learning_rate.name: None} | arguments
    return inspect.unwrap(dialect)(**arguments)


# --- Arguments --------------------------------------------------------------------------------------------


def _traced(value: Any) -> bool:
    """Whether the value may be traced, and must not be looked at."""
    return isinstance(value, jax.Array)


def _plain(value: Any) -> Any:
    """NumPy's scalars and 0-d arrays as Python's."""
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and value.size == 1 else value


def _off(value: Any) -> Any:
    """None for None and for a number that is 0, which switches an option off."""
    return None if value is None or (not _traced(value) and _plain(value) == 0) else value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(_plain(value), bool):
        raise TypeError(f"{name}={value!r} has type {type(value).__name__}: allowed are True and False")
    return _plain(value)


def _steps(name: str, value: Any) -> int | None:
    if value is None:
        return None
    if _traced(value):
        raise TypeError(f"{name} is a JAX array: with optax.inject_hyperparams, add it to static_args")
    if not isinstance(_plain(value), int) or isinstance(_plain(value), bool) or value < 2:
        raise ValueError(f"{name}={value!r}: allowed is an integer of at least 2")
    return int(value)


def _refuse(name: str, value: Any, neutral: Any, remedy: str) -> None:
    """Raises unless the value is None or `neutral`. One that may be traced cannot be compared."""
    if value is None or value is neutral:
        return
    if _traced(value) or _traced(neutral):
        raise ValueError(
            f"{name} is a JAX array, and not available here: {remedy}. "
            "optax.inject_hyperparams makes arrays of all numbers: add it to static_args"
        )
    if _plain(value) != _plain(neutral):
        raise ValueError(f"{name}={value!r} is not available here: {remedy}")


def _options(**options: Any) -> dict[str, Any]:
    """Arguments of `rmsprop` as it takes them, from a framework's: a momentum or a decay of 0 is off."""
    options = {"decoupled": False} | {name: _plain(value) for name, value in options.items()}
    for name in ("momentum", "weight_decay"):
        options[name] = _off(options.get(name))
    if options["weight_decay"] is None:
        options["weight_decay_mask"] = None
    return options


def _unscaled(name: str, factor: Any) -> tuple[optax.GradientTransformation, ...]:
    if factor is None:
        return ()
    if not _traced(factor) and not factor > 0:
        raise ValueError(f"{name}={factor!r}: allowed is a number above 0")
    return (optax.scale(1 / factor),)


def _clips(
    clipvalue: Any = None, clipnorm: Any = None, global_clipnorm: Any = None
) -> tuple[optax.GradientTransformation, ...]:
    """In the order of Keras, which has all three."""
    clips = [] if clipvalue is None else [optax.clip(clipvalue)]
    if clipnorm is not None:
        clips.append(_by_tensor(lambda g, _: g * (clipnorm / jnp.maximum(_norm(g), clipnorm)).astype(g.dtype)))
    if global_clipnorm is not None:
        clips.append(optax.clip_by_global_norm(global_clipnorm))
    return tuple(clips)


def _by_tensor(f: Callable[..., jax.Array]) -> optax.GradientTransformation:
    """A stateless transformation of each gradient by f(gradient, parameter); those that are None stay None."""

    def clip(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        def leaf(g: Any, p: Any) -> Any:
            return None if g is None else f(g, p)

        return jax.tree.map(leaf, updates, updates if params is None else params, is_leaf=lambda x: x is None)

    return optax.stateless(clip)


def _adaptively_clipped(agc: Any, g: jax.Array, p: jax.Array) -> jax.Array:
    upper = agc * jnp.maximum(1e-3, _norm(p))
    return g * (1 / jnp.maximum(1.0, _norm(g) / upper)).astype(g.dtype)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.linalg.norm(jnp.ravel(x).astype(jnp.promote_types(x.dtype, jnp.float32)))


def _corrected_decay(lr: Any, largest: Any, weight_decay: Any, mask: Any) -> optax.GradientTransformation:
    """timm's p ← p - λ α²/α_max p."""

    def factor(count: Any) -> Any:
        rate: Any = lr(count) if callable(lr) else lr
        return -weight_decay * rate**2 / largest

    return optax.add_decayed_weights(factor, mask)


def _joined(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
