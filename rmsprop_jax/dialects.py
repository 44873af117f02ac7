"""RMSProp as each paper and framework has it, with its own argument names and defaults.

Paste the framework's call, leave out the parameters, and it works::

    torch.optim.RMSprop(params, lr=6e-4, alpha=0.99, eps=0.01)   # becomes
    dialects.pytorch(lr=6e-4, alpha=0.99, eps=0.01)

Each function is a row of data, which maps the framework's arguments to the options of
:func:`rmsprop_jax.rmsprop`. `python -m rmsprop_jax --dialects` prints the rows side by side.

The learning rate can be a number or a schedule. Every dialect also takes it as `learning_rate`, which is the
name in most JAX code. Without either, it is the framework's default.

Arguments that cannot be honoured raise an error with an alternative. Arguments that only say how to
compute, such as `foreach`, `use_locking` and `name`, are accepted and change nothing. What a framework switches
off with 0 is `None` by default; 0 switches it off as well. `state_dtype` and `weight_decay_mask` are those of
:func:`rmsprop_jax.rmsprop`.

Under :func:`optax.inject_hyperparams`, the hyperparameters are the learning rate, under the name under which it
was given, and all other numbers that were given or are defaults. 0 is then a number like any other, and turns on
what `None` leaves off.

The frameworks compute a variance as E[g²] - E[g]². Where that cancels, they differ from us by their
rounding errors. For complex parameters ν is our average of |g|². PyTorch treats the real and the imaginary part
as two parameters: put :func:`optax.contrib.split_real_and_imaginary` around a dialect.
"""

# No `from __future__ import annotations`: see _rmsprop.py.

import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from . import _checks, _gradients, _states
from ._dialect import dialect as _dialect, dialect_of, DIALECTS as _DIALECTS, Recipe
from ._rmsprop import rmsprop


# PyTorch's rule and its relatives: ε outside the root, the learning rate outside the buffer, a coupled decay. The
# rule of TensorFlow and its relatives is the default of `rmsprop`.
_TORCH = {"eps_in_sqrt": False, "lr_in_momentum": False, "decoupled": False}


# --- Papers -----------------------------------------------------------------------------------------------


@_dialect("Hinton's lecture 6.5", 0.001)
def hinton(
    learning_rate: optax.ScalarOrSchedule | None = None, decay: ArrayLike = 0.9, *, state_dtype: DTypeLike | None = None
) -> Recipe:
    """Hinton's slide: g / √E[g²], without any ε.

    The slide gives no learning rate and no first value. The default learning rate, 0.001, is the one usually
    quoted; our average starts from zero. A gradient that has always been zero gives an update of zero.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = hinton(0.5, decay=0.75)
        >>> tx.update(jnp.float32(-3.0), tx.init(jnp.float32(0.0)))[0]
        Array(1., dtype=float32)

    References:
        Tieleman and Hinton, Lecture 6.5 - RMSProp, COURSERA: Neural Networks for Machine Learning, 2012.
    """
    return Recipe({"eps": 0.0})


@_dialect("arXiv 1308.0850", 1e-4)
def graves(
    learning_rate: optax.ScalarOrSchedule | None = None,
    decay: ArrayLike = 0.95,
    momentum: ArrayLike = 0.9,
    eps: ArrayLike = 1e-4,
    *,
    state_dtype: DTypeLike | None = None,
) -> Recipe:
    """Graves' RMSProp for handwriting: centered, with momentum, ε inside the root (equations 38 to 45).

    The default learning rate is 1e-4.

    References:
        `Generating sequences with recurrent neural networks <https://arxiv.org/abs/1308.0850>`_, 2013.
    """
    return Recipe({"centered": True})


@_dialect(
    "NeuralQLearner.lua",
    0.00025,
    refused={"gradient_momentum": ("squared_gradient_momentum", "both decays must be equal; leave it out")},
)
def dqn(
    learning_rate: optax.ScalarOrSchedule | None = None,
    gradient_momentum: ArrayLike | None = None,
    squared_gradient_momentum: ArrayLike = 0.95,
    min_squared_gradient: ArrayLike = 0.01,
    *,
    state_dtype: DTypeLike | None = None,
) -> Recipe:
    """The Nature DQN's RMSProp: centered, ε = 0.01 inside the root, no momentum.

    What the paper calls "gradient momentum" is the decay of the mean that centers, and
    `min_squared_gradient` is ε. There is no momentum buffer, as `DeepMind confirms
    <https://github.com/google-deepmind/dqn/issues/5>`_. Both decays must be equal, as they are in the
    paper; `None` means that they are. The default learning rate is 0.00025.

    Example:
        Dopamine's DQN in TensorFlow is :func:`tensorflow1`, with another ε and an average that starts at 1:

        >>> dopamine = tensorflow1(2.5e-4, decay=0.95, epsilon=1e-5, centered=True)

    References:
        Mnih et al., Human-level control through deep reinforcement learning, 2015; NeuralQLearner.lua.
    """
    return Recipe({"centered": True})


@_dialect(
    "dreamerv3 embodied/jax/opt.py",
    4e-5,
    converted={
        "before": "agc",
        "learning_rate": "beta1 schedule warmup anneal",
        "momentum": "beta1",
        "nesterov": "nesterov",
        "weight_decay": "wd",
        "weight_decay_mask": "wd wdregex weight_decay_mask",
    },
    refused={"momentum": (True, "DreamerV3 accepts it but never reads it; pass beta1=0 to turn the average off")},
)
def dreamer(
    lr: optax.ScalarOrSchedule | None = None,
    agc: ArrayLike | None = 0.3,
    eps: ArrayLike = 1e-20,
    beta1: float | jax.Array = 0.9,
    beta2: ArrayLike = 0.999,
    momentum: bool = True,
    nesterov: bool = False,
    wd: ArrayLike | None = None,
    wdregex: str = r"/kernel$",
    schedule: str = "const",
    warmup: float | jax.Array = 1000,
    anneal: float | jax.Array | None = None,
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: Any = None,
    state_dtype: DTypeLike | None = None,
) -> Recipe:
    """DreamerV3's optimizer (LaProp): clip each tensor adaptively, divide by the root mean square, then average.

    With both averages bias corrected, ε outside the root, and norms over whole tensors::

        g ← g / max(1, |g| / (agc · max(0.001, |p|)))
        u ← g / (√ν̂ + ε)
        p ← p - α (average of u, plus wd·p where wdregex matches)

    :func:`optax.adaptive_grad_clip` clips by units, not by tensors, and gives other numbers. `update` needs
    `params`, unless `agc` and `wd` are off.

    The default learning rate is 4e-5. It rises linearly over `warmup` updates, and is then constant, or falls until
    update `anneal`: linearly to `0.1 * lr`, or along a cosine to `0.1 * lr**2`, as in DreamerV3. A schedule for `lr` is
    multiplied by that shape.

    `wdregex` is searched in the path of a parameter, which has "/" between its keys, and in front of a key that
    stands alone. The `value` in which Flax keeps an array is no part of it. `weight_decay_mask` takes its place.
    DreamerV3 never reads `momentum`.

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
    if schedule not in ("const", "linear", "cosine"):
        raise ValueError(f"schedule={schedule!r}: allowed are 'const', 'linear' and 'cosine'")
    if wd is None and weight_decay_mask is not None:
        raise ValueError("weight_decay_mask needs wd, got wd=None")
    agc, beta1, wd = _checks.limit("agc", agc), _checks.number("beta1", beta1), _checks.off(wd)
    warmup, end = _checks.number("warmup", warmup), _checks.number("anneal", 0.0 if anneal is None else anneal)
    if not _checks.is_traced(beta1) and beta1 >= 1:
        raise ValueError(f"beta1={beta1!r}: allowed is a number in [0, 1), because the average is bias corrected")
    if not _checks.is_traced(end):
        if schedule == "const":
            _checks.refuse("anneal", end, 0, "pass schedule='linear' or 'cosine' with it")
        elif end <= (0 if _checks.is_traced(warmup) else warmup):
            raise ValueError(f"anneal={end!r}: with schedule={schedule!r} it must be larger than warmup={warmup!r}")

    def annealed(count: Any) -> jax.Array:
        return _annealed(_at(lr, count), count, schedule, warmup, end) * _to_average(beta1, count)

    options = _TORCH | {"learning_rate": annealed, "momentum": beta1, "nesterov": nesterov, "bias_correction": True}
    if wd is not None:
        strength = _checks.number("wd", wd)
        mask = functools.partial(_matching, wdregex) if weight_decay_mask is None else weight_decay_mask
        # The decay is not averaged: divide by what corrects the average.
        decay = lambda count: strength / _to_average(beta1, count)  # noqa: E731
        options |= {"weight_decay": decay, "weight_decay_mask": mask, "decoupled": True}
    return Recipe(options, () if agc is None else (_gradients.clip_adaptively(agc),))


# --- The PyTorch family -----------------------------------------------------------------------------------


@_dialect("torch.optim.RMSprop", 1e-2, converted={"before": "maximize"}, inert="capturable foreach differentiable")
def pytorch(
    lr: optax.ScalarOrSchedule | None = None,
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
    learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: Any = None,
    state_dtype: DTypeLike | None = None,
) -> Recipe:
    """`torch.optim.RMSprop`: ε outside the root, learning rate outside the buffer, coupled decay.

    The default learning rate is 0.01. MindSpore's `mint` and `experimental.optim.RMSprop` follow the same rule. Groups
    of parameters become :func:`optax.partition`, with one call for each group.

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

        An injected learning rate keeps the name under which it was given:

        >>> for rate in ({"lr": 1e-3}, {"learning_rate": 1e-3}):
        ...     print(list(optax.inject_hyperparams(pytorch)(**rate).init(params).hyperparams))
        ['lr', 'alpha', 'eps']
        ['alpha', 'eps', 'learning_rate']

    References:
        torch/optim/rmsprop.py, 2.13.0. Versions 2.14 and 2.15 changed its types and its docstring only.
    """
    # In front of the decay, which shrinks the parameter either way.
    return Recipe(_TORCH, (_gradients.scale(-1.0),) if maximize else ())


@_dialect(
    "timm.optim.RMSpropTF",
    1e-2,
    converted={"decoupled": "decoupled_decay", "weight_decay": "corrected_weight_decay max_lr"},
    refused={"caution": (False, "its mask compares the gradient with the buffer, which no chain can do; leave it out")},
    inert="foreach",
)
def timm(
    lr: optax.ScalarOrSchedule | None = None,
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
    learning_rate: optax.ScalarOrSchedule | None = None,
    max_lr: ArrayLike | None = None,
    weight_decay_mask: Any = None,
    state_dtype: DTypeLike | None = None,
) -> Recipe:
    """timm's `RMSpropTF`: TensorFlow 1's rule under PyTorch's names, with an average that starts at 1.

    The default learning rate is 0.01. The factory's `rmsproptf` is this one; its `rmsprop` is PyTorch's with alpha=0.9.
    The factory decays no parameter of one dimension:
    `weight_decay_mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)`.

    `corrected_weight_decay` shrinks by λα²/α_max, where α_max is the learning rate that timm's constructor got. It
    acts only with `decoupled_decay`. With a schedule it needs `max_lr`, an argument that timm does not have.

    Example:
        EfficientNet-B2 as in timm's training_hparam_examples.md, for 256 images a step:

        >>> schedule = optax.exponential_decay(0.016, 12_000, 0.97, staircase=True)  # every 2.4 epochs
        >>> efficientnet = timm(schedule, momentum=0.9, eps=1e-3, weight_decay=1e-5)

    References:
        timm/optim/rmsprop_tf.py, 1.0.31.
    """
    options = {"initial_scale": 1.0, "decoupled": decoupled_decay}
    if corrected_weight_decay:
        largest = lr if max_lr is None else _checks.positive("max_lr", max_lr)
        if callable(largest) or (max_lr is None and (_checks.is_traced(largest) or largest == 0)):
            raise ValueError("corrected_weight_decay=True needs max_lr: pass the lr that timm's constructor got")
        if decoupled_decay and _checks.off(weight_decay) is not None:
            strength = _checks.number("weight_decay", weight_decay)
            options["weight_decay"] = lambda count: strength * _at(lr, count) / largest
    elif max_lr is not None:
        raise ValueError(f"max_lr={max_lr!r} needs corrected_weight_decay=True")
    return Recipe(options)


@_dialect("RMSpropTFLike of stable_baselines3", 1e-2)
def stable_baselines3(
    lr: optax.ScalarOrSchedule | None = None,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike | None = None,
    momentum: ArrayLike | None = None,
    centered: bool = False,
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: Any = None,
    state_dtype: DTypeLike | None = None,
) -> Recipe:
    """Stable Baselines 3's `RMSpropTFLike`: :func:`pytorch` with ε inside the root and an average that starts at 1.

    A2C uses it only with `policy_kwargs=dict(optimizer_class=RMSpropTFLike)`. By default A2C uses
    `torch.optim.RMSprop`, which is :func:`pytorch`, with alpha=0.99 and eps=1e-5. The default learning rate is 0.01.

    References:
        stable_baselines3/common/sb2_compat/rmsprop_tf_like.py, 2.9.2.
    """
    return Recipe(_TORCH | {"initial_scale": 1.0, "eps_in_sqrt": True})


@_dialect(
    "pfrl.optimizers.RMSpropEpsInsideSqrt",
    1e-2,
    refused={"maximize": (False, "PFRL accepts it but never reads it; use optax.chain(optax.scale(-1.0), pfrl(...))")},
    inert="capturable foreach differentiable",
)
def pfrl(
    lr: optax.ScalarOrSchedule | None = None,
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
    learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: Any = None,
    state_dtype: DTypeLike | None = None,
) -> Recipe:
    """PFRL's `RMSpropEpsInsideSqrt`, and the one that A3C shares: :func:`pytorch` with ε inside the root.

    The default learning rate is 0.01.

    References:
        pfrl/optimizers/rmsprop_eps_inside_sqrt.py, 0.4.0.
    """
    return Recipe(_TORCH | {"eps_in_sqrt": True})


@_dialect(
    "bitsandbytes.optim.RMSprop",
    1e-2,
    refused={
        "momentum": (0, "bitsandbytes accepts it but no kernel reads it; use pytorch(momentum=...)"),
        "centered": (False, "bitsandbytes refuses it as well; use pytorch(centered=True)"),
        "optim_bits": (
            32,
            "its 8 bits are blocks with codebooks of their own; pass state_dtype=jnp.uint8 to keep one byte instead",
        ),
        "args": (None, "put the transformation that you need around it with optax.chain"),
    },
    inert="min_8bit_size",
)
def bitsandbytes(
    lr: optax.ScalarOrSchedule | None = None,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike | None = None,
    momentum: ArrayLike | None = None,
    centered: bool = False,
    optim_bits: int | None = None,
    args: Any = None,
    min_8bit_size: int | None = None,
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: Any = None,
    state_dtype: DTypeLike | None = None,
) -> Recipe:
    """`bitsandbytes.optim.RMSprop` with 32 bits: :func:`pytorch` without momentum and centering.

    The default learning rate is 0.01.

    References:
        bitsandbytes/optim/rmsprop.py, 0.50.2.
    """
    return Recipe(_TORCH)


# --- The TensorFlow family --------------------------------------------------------------------------------


@_dialect(
    "keras.optimizers.RMSprop",
    0.001,
    converted={
        "before": "clipnorm clipvalue global_clipnorm loss_scale_factor",
        "accumulate": "gradient_accumulation_steps",
    },
    refused={"use_ema": (False, "average the parameters yourself, with optax.incremental_update")},
    inert="ema_momentum ema_overwrite_frequency name",  # of the average, which is refused
)
def keras(
    learning_rate: optax.ScalarOrSchedule | None = None,
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
) -> Recipe:
    """Keras 3, and tf.keras from TensorFlow 2.11 on: ε inside the root, average from 0, decoupled decay.

    The default learning rate is 0.001. At most one of `clipnorm` (each variable), `global_clipnorm` (all together) and
    `clipvalue` may be set; 0 and less switch them off. `loss_scale_factor` divides the gradients. With
    `gradient_accumulation_steps=k` the mean of k gradients is clipped and makes one update; a schedule then sees
    the count of gradients, as it does in Keras. For what Keras leaves out with `exclude_from_weight_decay`, set
    False in `weight_decay_mask`.

    Example:
        >>> tx = keras(1e-3, momentum=0.9, global_clipnorm=1.0)

    References:
        keras/src/optimizers/rmsprop.py and base_optimizer.py, 3.15.1.
    """
    clips = {"clipvalue": clipvalue, "clipnorm": clipnorm, "global_clipnorm": global_clipnorm}
    if sum(clip is not None for clip in clips.values()) > 1:
        raise ValueError(f"only one of clipnorm, clipvalue and global_clipnorm can be set, got {clips}")
    limits = [_checks.limit(name, clip, lower=-math.inf) for name, clip in clips.items()]
    before = (*_unscaled("loss_scale_factor", loss_scale_factor), *_gradients.clips(*limits))
    k = _checks.off(gradient_accumulation_steps)
    k = None if k is None else _checks.count("gradient_accumulation_steps", k, lower=2)
    options: dict[str, Any] = {"decoupled": True}
    if k is not None and callable(learning_rate):
        options["learning_rate"] = lambda count: learning_rate(k * count + (k - 1))
    return Recipe(options, before, k)


@_dialect(
    "tf.keras.optimizers.legacy.RMSprop",
    0.001,
    converted={
        "before": "clipnorm clipvalue global_clipnorm",
        "learning_rate": "decay",
        "momentum": "momentum",
        "eps_in_sqrt": "momentum",
        "eps": "epsilon",
    },
    inert="name",
)
def tf_keras(
    learning_rate: optax.ScalarOrSchedule | None = None,
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
) -> Recipe:
    """The legacy tf.keras (TensorFlow 2.0 to 2.10, `tf.keras.optimizers.legacy`): :func:`keras` with two places for ε.

    With momentum it calls TensorFlow's kernel, which has ε inside the root. Without, it runs Python code
    that has ε outside. A traced momentum counts as momentum, as a tensor does there. `epsilon=0` silently
    becomes 1e-7 there, and does here. `decay` divides the learning rate, 0.001 by default, by 1 + decay · count. A
    clip of 0 makes gradients 0; a negative one is an error.

    References:
        tf_keras/src/optimizers/legacy/rmsprop.py and optimizer_v2.py, 2.21.0.
    """
    if clipnorm is not None and global_clipnorm is not None:
        raise ValueError(f"only one of {clipnorm=} and {global_clipnorm=} can be set")
    clips = {"clipvalue": clipvalue, "clipnorm": clipnorm, "global_clipnorm": global_clipnorm}
    limits = [None if clip is None else _checks.number(name, clip) for name, clip in clips.items()]
    epsilon = _checks.number("epsilon", 1e-7 if _checks.off(epsilon) is None else epsilon)
    epsilon = jnp.where(epsilon == 0, 1e-7, epsilon) if _checks.is_traced(epsilon) else epsilon
    options = {"momentum": momentum, "eps": epsilon, "eps_in_sqrt": _checks.off(momentum) is not None}
    if _checks.off(decay) is not None:
        slowing = _checks.number("decay", decay)
        options["learning_rate"] = lambda count: _at(learning_rate, count) / (1 + _at(slowing) * _at(count))
    return Recipe(options, _gradients.clips(*limits))


@_dialect("tf.compat.v1.train.RMSPropOptimizer", inert="use_locking name")
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
) -> Recipe:
    """`tf.compat.v1.train.RMSPropOptimizer`: average from 1, ε inside the root, learning rate in the buffer.

    Google's and DeepMind's papers on vision and reinforcement learning used it. Their weight decay is part
    of the loss: use `weight_decay` of :func:`rmsprop_jax.rmsprop`, with `decoupled=False`. This is the dense kernel.
    The sparse one leaves rows alone that a batch does not touch.

    Example:
        >>> efficientnet = tensorflow1(0.016, momentum=0.9, epsilon=1e-3)  # and MnasNet; per 256 images
        >>> inception = tensorflow1(0.165, momentum=0.9, epsilon=1.0)  # v3; per 256 images
        >>> mobilenet_v2 = tensorflow1(0.045, momentum=0.9, epsilon=1.0)  # ε from TF-Slim: the paper has none
        >>> impala = tensorflow1(optax.linear_schedule(4.8e-4, 0.0, 10_000), decay=0.99, epsilon=0.1)
        >>> a2c = tensorflow1(optax.linear_schedule(7e-4, 0.0, 10_000), decay=0.99, epsilon=1e-5)  # OpenAI baselines

        A3C's shared RMSProp starts from 0 (ε is from muupan/async-rl, which asked the authors):

        >>> a3c = pfrl(7e-4, alpha=0.99, eps=0.1)

    References:
        tensorflow/python/training/rmsprop.py and tensorflow/core/kernels/training_ops.cc, 2.21.
    """
    return Recipe({"initial_scale": 1.0})


@_dialect("sonnet.optimizers.RMSProp", inert="name")
def sonnet(
    learning_rate: optax.ScalarOrSchedule,
    decay: ArrayLike = 0.9,
    momentum: ArrayLike | None = None,
    epsilon: ArrayLike = 1e-10,
    centered: bool = False,
    name: str | None = None,
    *,
    state_dtype: DTypeLike | None = None,
) -> Recipe:
    """Sonnet 2's `snt.optimizers.RMSProp`: :func:`tensorflow1` with an average that starts from 0.

    References:
        sonnet/src/optimizers/rmsprop.py, 2.0.2.
    """
    return Recipe({})


@_dialect(
    "tf.train.rmsprop of @tensorflow/tfjs",
    refused={
        "centered": (
            False,
            "TensorFlow.js subtracts epsilon under the root, √(v - (m² + ε)), which is NaN for a nearly constant "
            "gradient; use keras(centered=True), which adds it",
        )
    },
)
def tensorflowjs(
    learningRate: optax.ScalarOrSchedule | None = None,
    decay: ArrayLike = 0.9,
    momentum: ArrayLike | None = None,
    epsilon: ArrayLike | None = None,
    centered: bool = False,
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    state_dtype: DTypeLike | None = None,
) -> Recipe:
    """TensorFlow.js' `tf.train.rmsprop`: :func:`keras` without its other options.

    `epsilon=None` is 1e-7, as in TensorFlow.js where it computes in float32. There is no default learning rate.

    Example:
        With what `optimizer.getConfig()` returns:

        >>> tx = tensorflowjs(
        ...     **{"learningRate": 0.01, "decay": 0.9, "momentum": 0, "epsilon": 1e-7, "centered": False}
        ... )

    References:
        tfjs-core/src/optimizers/rmsprop_optimizer.ts, 4.22.0.
    """
    return Recipe({"eps": 1e-7 if epsilon is None else epsilon})


# --- Others -----------------------------------------------------------------------------------------------


@_dialect(
    "paddle.optimizer.RMSProp",
    refused={
        "parameters": (None, "pass the parameters to init and update"),
        "grad_clip": (None, "put optax.clip or optax.clip_by_global_norm in front with optax.chain"),
    },
    inert="name",
)
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
) -> Recipe:
    """`paddle.optimizer.RMSProp`: :func:`sonnet` with a coupled decay.

    Its documentation mentions Nesterov momentum, but its code has plain momentum, as has this dialect.

    References:
        python/paddle/optimizer/rmsprop.py and rmsprop_kernel_impl.h, 3.3.1.
    """
    return Recipe({"decoupled": False})


@_dialect("mindspore.nn.RMSProp", 0.1, converted={"before": "loss_scale"}, inert="use_locking")
def mindspore(
    learning_rate: optax.ScalarOrSchedule | None = None,
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
) -> Recipe:
    """MindSpore's `nn.RMSProp`: :func:`tensorflow1` with a coupled decay. `loss_scale` divides the gradients.

    The default learning rate is 0.1. Its documentation and most of its kernels compute this. The vectorized part of its
    CPU kernel for tensors of eight and more elements (2.10.0, not centered) has ε outside the root. For a run made
    there, use `rmsprop(..., initial_scale=1.0, eps_in_sqrt=False)`. Its `experimental.optim.RMSprop` is
    :func:`pytorch`.

    References:
        mindspore/nn/optim/rmsprop.py and optimizer.py, 2.10.0.
    """
    return Recipe({"initial_scale": 1.0, "decoupled": False}, _unscaled("loss_scale", loss_scale))


@_dialect("mlx.optimizers.RMSprop")
def mlx(
    learning_rate: optax.ScalarOrSchedule,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    *,
    state_dtype: DTypeLike | None = None,
) -> Recipe:
    """Apple's `mlx.optimizers.RMSprop`: :func:`pytorch` without momentum, centering and decay.

    References:
        python/mlx/optimizers/optimizers.py, 0.32.4.
    """
    return Recipe(_TORCH)


@_dialect("Optimisers.RMSProp", 0.001)
def optimisers_jl(
    eta: optax.ScalarOrSchedule | None = None,
    rho: ArrayLike = 0.9,
    epsilon: ArrayLike = 1e-8,
    centred: bool = False,
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    state_dtype: DTypeLike | None = None,
) -> Recipe:
    """`RMSProp(η, ρ, ϵ; centred)` of Optimisers.jl (Flux): :func:`pytorch` without momentum and decay.

    The default learning rate is 0.001. Its documentation calls ρ momentum; it is the decay. Momentum is another rule in
    its chain, with the learning rate in the buffer: `rmsprop(..., eps_in_sqrt=False, momentum=...)`.

    References:
        Optimisers.jl, src/rules.jl.
    """
    return Recipe(_TORCH)


# --- The table --------------------------------------------------------------------------------------------


DIALECTS = tuple(_DIALECTS)
__all__ = [*(dialect.__name__ for dialect in DIALECTS), "options", "table"]  # pyright: ignore[reportUnsupportedDunderAll]


def __dir__() -> list[str]:
    return __all__


def options(dialect: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """The options of :func:`rmsprop_jax.rmsprop` that a call of a dialect stands for: all options by name.

    They do not include what happens to the gradients before: clipping, scaling, a flipped sign, accumulation. The
    learning rate is `None` where the framework has no default. Options that act only beside a momentum or a weight
    decay have their defaults where it is off.

    Example:
        >>> options(pytorch, momentum=0.9)["lr_in_momentum"]
        False

        The same rule with a learning rate of your own:

        >>> tx = rmsprop(**options(pytorch, momentum=0.9) | {"learning_rate": 3e-4})
    """
    found = dialect_of(dialect)
    required = {} if {found.own, "learning_rate"} & arguments.keys() else {found.own: None}
    recipe = found.recipe(found.arguments(**arguments | required))
    bound = inspect.signature(rmsprop).bind(**recipe.options)
    bound.apply_defaults()
    return bound.arguments


def table() -> list[dict[str, str]]:
    """One row per dialect, one column per option in which they differ; "" where a dialect has no such option."""
    root = {True: "inside", False: "outside"}
    rows = []
    for function, dialect in _DIALECTS.items():
        plain = options(function)
        # With a momentum and a weight decay, where it has them.
        full = options(function, **dict.fromkeys({"momentum", "weight_decay", "wd"} & dialect.honoured.keys(), 0.1))
        moves, decays = full["momentum"] is not None, full["weight_decay"] is not None
        eps = root[plain["eps_in_sqrt"]]
        if full["eps_in_sqrt"] != plain["eps_in_sqrt"]:
            eps += f", {root[full['eps_in_sqrt']]} with momentum"
        decay = ("decoupled" if full["decoupled"] else "coupled") if decays else ""
        rows.append(
            {
                "dialect": function.__name__,
                "lr": "" if dialect.learning_rate is None else f"{dialect.learning_rate:g}",
                "decay": f"{plain['decay']:g}",
                "eps": f"{plain['eps']:g}",
                "eps vs root": eps,
                "first ν": "corrected" if plain["bias_correction"] else f"{plain['initial_scale']:g}",
                "centered": "always" if plain["centered"] else "option" * (("centered",) in dialect.honoured.values()),
                "momentum": f"{plain['momentum'] or 0:g}" if moves else "",
                "lr vs buffer": root[full["lr_in_momentum"]] if moves else "",
                "weight decay": decay + " or decoupled" * ("decoupled_decay" in dialect.honoured),
                "class or paper": dialect.framework,
            }
        )
    return rows


# --- Parts of recipes -------------------------------------------------------------------------------------


def _at(value: Any, count: Any = None) -> jax.Array:
    """A number, or the value of a schedule, in float32."""
    return jnp.asarray(value(count) if callable(value) else value, jnp.float32)


def _to_average(beta: Any, count: Any) -> jax.Array:
    """The factor that makes a momentum buffer, Σ βᵗ⁻ⁱ uᵢ, a bias-corrected average."""
    beta = _at(beta)
    return (1 - beta) / (1 - beta ** (_at(count) + 1))


def _annealed(rate: jax.Array, count: Any, schedule: str, warmup: Any, anneal: Any) -> jax.Array:
    """DreamerV3's learning rate."""
    step, warmup = _at(count), _at(warmup)
    if schedule == "const":
        shape = 1.0
    else:
        past = jnp.clip((step - warmup) / (_at(anneal) - warmup), 0.0, 1.0)
        final = 0.1 * rate
        shape = 1 - 0.9 * past if schedule == "linear" else final + (1 - final) * (1 + jnp.cos(jnp.pi * past)) / 2
    return rate * jnp.where(step < warmup, step / jnp.maximum(warmup, 1.0), shape)


def _matching(regex: str, params: optax.Params) -> Any:
    """Whether the regex finds something in each parameter's path, with a slash in front of a key that stands alone."""

    def matches(name: _states.Name, _: Any) -> bool:
        joined = "/".join(name)
        return any(re.search(regex, text) for text in ((joined,) if len(name) > 1 else (joined, f"/{joined}")))

    return _states.map_arrays(matches, params)


def _unscaled(name: str, factor: Any) -> tuple[optax.GradientTransformation, ...]:
    """Divides gradients by a loss scale."""
    return () if factor is None else (_gradients.scale(1 / _checks.positive(name, factor)),)
