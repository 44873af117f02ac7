"""RMSProp as each paper and framework has it: its own names and defaults, and one call of `rmsprop`.

Paste the framework's call, leave out the parameters, and go on::

    torch.optim.RMSprop(params, lr=6e-4, alpha=0.99, eps=0.01)   # becomes
    dialects.pytorch(lr=6e-4, alpha=0.99, eps=0.01)

The body of each function is its translation table; `python -m rmsprop_jax --dialects` prints them
side by side. A learning rate may be a schedule everywhere. What a framework has and we cannot do is
refused by name, with the way to get it; switches that only say how to compute (`foreach`,
`use_locking`, `name`) are accepted, and change nothing here either.

All frameworks but ours take the variance as E[g²] - E[g]²; where that cancels, they differ from us by
their rounding errors. Complex parameters are ours: ν is the average of |g|². PyTorch's two
independent halves are :func:`optax.contrib.split_real_and_imaginary` around a dialect. `state_dtype` is
ours, too: that of :func:`rmsprop`.
"""

# No `from __future__ import annotations`: see _rmsprop.py.

import inspect
import numbers
from collections.abc import Callable
from typing import Any
from unittest import mock

import optax
from jax.typing import ArrayLike, DTypeLike

from ._rmsprop import rmsprop


Transformation = optax.GradientTransformationExtraArgs


# --- Papers -------------------------------------------------------------------------------------------


def hinton(
    learning_rate: optax.ScalarOrSchedule = 0.001, decay: ArrayLike = 0.9, *, state_dtype: DTypeLike | None = None
) -> Transformation:
    """Hinton's slide: g / √E[g²], and no ε at all.

    The slide gives no learning rate and no first value; 0.001 is the common quotation, and we start from
    zero. A gradient that has always been zero gives a step of zero.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = hinton(0.5, decay=0.75)
        >>> tx.update(jnp.float32(-3.0), tx.init(jnp.float32(0.0)))[0]
        Array(1., dtype=float32)

    References:
        Tieleman and Hinton, Lecture 6.5 - RMSProp, COURSERA: Neural Networks for Machine Learning, 2012.
    """
    return rmsprop(learning_rate, decay, eps=0.0, state_dtype=state_dtype)


def graves(
    learning_rate: optax.ScalarOrSchedule = 1e-4,
    decay: ArrayLike = 0.95,
    momentum: ArrayLike = 0.9,
    eps: ArrayLike = 1e-4,
    *,
    state_dtype: DTypeLike | None = None,
) -> Transformation:
    """Graves' handwriting RMSProp: centered, with momentum, ε in the root (equations 38 to 45).

    References:
        `Generating sequences with recurrent neural networks <https://arxiv.org/abs/1308.0850>`_, 2013.
    """
    return rmsprop(learning_rate, decay, eps, centered=True, momentum=momentum, state_dtype=state_dtype)


def dqn(
    learning_rate: optax.ScalarOrSchedule = 0.00025,
    gradient_momentum: ArrayLike = 0.95,
    squared_gradient_momentum: ArrayLike = 0.95,
    min_squared_gradient: ArrayLike = 0.01,
    *,
    state_dtype: DTypeLike | None = None,
) -> Transformation:
    """The Nature DQN's: centered, ε = 0.01 in the root, and no momentum.

    Its "gradient momentum" is the decay of the mean that centers, `min_squared_gradient` is ε: there is
    no heavy ball, as `DeepMind confirms <https://github.com/google-deepmind/dqn/issues/5>`_. Both decays
    are one here, as they are in the paper.

    Example:
        Dopamine's DQN in TensorFlow is :func:`tensorflow1`, with another ε and an average from one:

        >>> dopamine = tensorflow1(2.5e-4, decay=0.95, epsilon=1e-5, centered=True)

    References:
        Mnih et al., Human-level control through deep reinforcement learning, 2015; NeuralQLearner.lua.
    """
    _refuse(
        gradient_momentum=(gradient_momentum, squared_gradient_momentum, "must equal squared_gradient_momentum"),
    )
    return rmsprop(
        learning_rate, squared_gradient_momentum, min_squared_gradient, centered=True, state_dtype=state_dtype
    )


# --- The PyTorch family -------------------------------------------------------------------------------


def pytorch(
    lr: optax.ScalarOrSchedule = 1e-2,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    momentum: ArrayLike = 0.0,
    centered: bool = False,
    capturable: bool = False,
    foreach: bool | None = None,
    maximize: bool = False,
    differentiable: bool = False,
    *,
    state_dtype: DTypeLike | None = None,
) -> Transformation:
    """`torch.optim.RMSprop`: ε outside the root, learning rate outside the buffer, coupled decay.

    Example:
        TorchBeast's IMPALA, and torchvision's MobileNetV3, whose ε is the root of TensorFlow's 1e-3:

        >>> impala = optax.chain(
        ...     optax.clip_by_global_norm(40.0),
        ...     pytorch(optax.linear_schedule(4.8e-4, 0.0, 10_000), alpha=0.99, eps=0.01),
        ... )
        >>> mobilenet_v3 = pytorch(lr=0.064, alpha=0.9, momentum=0.9, eps=0.0316, weight_decay=1e-5)

    References:
        torch/optim/rmsprop.py, 2.13.0.
    """
    del capturable, foreach, differentiable
    tx = rmsprop(
        lr,
        alpha,
        eps,
        eps_in_sqrt=False,
        centered=centered,
        momentum=_or_none(momentum),
        lr_in_momentum=False,
        weight_decay=_or_none(weight_decay),
        state_dtype=state_dtype,
    )
    # The flip comes before the decay, which shrinks the parameter either way.
    return optax.chain(optax.scale(-1.0), tx) if maximize else tx


def timm(
    lr: optax.ScalarOrSchedule = 1e-2,
    alpha: ArrayLike = 0.9,
    eps: ArrayLike = 1e-10,
    weight_decay: ArrayLike = 0.0,
    momentum: ArrayLike = 0.0,
    centered: bool = False,
    decoupled_decay: bool = False,
    corrected_weight_decay: bool = False,
    lr_in_momentum: bool = True,
    caution: bool = False,
    foreach: bool | None = None,
    *,
    state_dtype: DTypeLike | None = None,
) -> Transformation:
    """timm's `RMSpropTF`: TensorFlow 1's rule under PyTorch's names, average from one.

    The factory's `rmsproptf` is this one; its `rmsprop` is PyTorch's with alpha=0.9. It leaves parameters
    of one dimension without decay: :func:`optax.partition`.

    Example:
        EfficientNet-B2 as timm's training_hparam_examples.md has it, for 256 images a step:

        >>> schedule = optax.exponential_decay(0.016, 12_000, 0.97, staircase=True)  # every 2.4 epochs
        >>> efficientnet = timm(schedule, momentum=0.9, eps=1e-3, weight_decay=1e-5)

    References:
        timm/optim/rmsprop_tf.py, 1.0.31.
    """
    del foreach
    _refuse(
        corrected_weight_decay=(
            corrected_weight_decay,
            False,
            "chain with optax.add_decayed_weights(lambda count: -weight_decay * lr(count)**2 / max_lr)",
        ),
        caution=(caution, False, "its mask needs the gradient beside the buffer; no transformation gives it"),
    )
    return rmsprop(
        lr,
        alpha,
        eps,
        initial_scale=1.0,
        centered=centered,
        momentum=_or_none(momentum),
        lr_in_momentum=lr_in_momentum,
        weight_decay=_or_none(weight_decay),
        decoupled=decoupled_decay,
        state_dtype=state_dtype,
    )


def stable_baselines3(
    lr: optax.ScalarOrSchedule = 1e-2,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    momentum: ArrayLike = 0.0,
    centered: bool = False,
    *,
    state_dtype: DTypeLike | None = None,
) -> Transformation:
    """Stable Baselines 3's `RMSpropTFLike`: average from one, ε in the root, but PyTorch's buffer.

    Without this class A2C is plain :func:`pytorch` there, with alpha=0.99 and eps=1e-5.

    References:
        stable_baselines3/common/sb2_compat/rmsprop_tf_like.py, 2.9.2.
    """
    return rmsprop(
        lr,
        alpha,
        eps,
        initial_scale=1.0,
        centered=centered,
        momentum=_or_none(momentum),
        lr_in_momentum=False,
        weight_decay=_or_none(weight_decay),
        state_dtype=state_dtype,
    )


def bitsandbytes(
    lr: optax.ScalarOrSchedule = 1e-2,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    momentum: ArrayLike = 0.0,
    centered: bool = False,
    optim_bits: int = 32,
    args: Any = None,
    min_8bit_size: int = 4096,
    *,
    state_dtype: DTypeLike | None = None,
) -> Transformation:
    """`bitsandbytes.optim.RMSprop` with 32 bits: PyTorch's without momentum and centering.

    References:
        bitsandbytes/optim/rmsprop.py, 0.50.2.
    """
    del min_8bit_size
    _refuse(
        momentum=(momentum, 0, "bitsandbytes takes it and no kernel of it reads it; pytorch(momentum=...) has it"),
        centered=(centered, False, "bitsandbytes raises too; pytorch(centered=True) has it"),
        optim_bits=(
            optim_bits,
            32,
            "blocks and codebooks of its own, on CUDA only; state_dtype=jnp.uint8 has one byte, too",
        ),
        args=(args, None, "chain with the transformation you need"),
    )
    return rmsprop(lr, alpha, eps, eps_in_sqrt=False, weight_decay=_or_none(weight_decay), state_dtype=state_dtype)


# --- The TensorFlow family ----------------------------------------------------------------------------


_CLIPNORM = (
    "it clips each variable by its own norm; chain with optax.stateless_with_tree_map("
    "lambda g, _: g * jnp.minimum(1, clipnorm / jnp.linalg.norm(g)))"
)
_CLIPVALUE = "chain with optax.clip(clipvalue) in front"
_GLOBAL_CLIPNORM = "chain with optax.clip_by_global_norm(global_clipnorm) in front"


def keras(
    learning_rate: optax.ScalarOrSchedule = 0.001,
    rho: ArrayLike = 0.9,
    momentum: ArrayLike = 0.0,
    epsilon: ArrayLike = 1e-7,
    centered: bool = False,
    weight_decay: ArrayLike | None = None,
    clipnorm: float | None = None,
    clipvalue: float | None = None,
    global_clipnorm: float | None = None,
    use_ema: bool = False,
    ema_momentum: float = 0.99,
    ema_overwrite_frequency: int | None = None,
    loss_scale_factor: float | None = None,
    gradient_accumulation_steps: int | None = None,
    name: str | None = None,
    *,
    state_dtype: DTypeLike | None = None,
) -> Transformation:
    """Keras 3, and tf.keras from TensorFlow 2.11 on: ε in the root, average from zero, decoupled decay.

    Example:
        >>> tx = optax.chain(optax.clip(0.5), keras(1e-3, momentum=0.9))

    References:
        keras/src/optimizers/rmsprop.py, 3.15.1.
    """
    del ema_momentum, name
    _refuse(
        clipnorm=(clipnorm, None, _CLIPNORM),
        clipvalue=(clipvalue, None, _CLIPVALUE),
        global_clipnorm=(global_clipnorm, None, _GLOBAL_CLIPNORM),
        use_ema=(use_ema, False, "average the parameters beside it with optax.incremental_update"),
        ema_overwrite_frequency=(ema_overwrite_frequency, None, "overwrite the parameters in your own loop"),
        loss_scale_factor=(loss_scale_factor, None, "chain with optax.scale(1 / loss_scale_factor) in front"),
        gradient_accumulation_steps=(gradient_accumulation_steps, None, "wrap in optax.MultiSteps"),
    )
    return rmsprop(
        learning_rate,
        rho,
        epsilon,
        centered=centered,
        momentum=_or_none(momentum),
        weight_decay=weight_decay,
        decoupled=True,
        state_dtype=state_dtype,
    )


def tf_keras(
    learning_rate: optax.ScalarOrSchedule = 0.001,
    rho: ArrayLike = 0.9,
    momentum: ArrayLike = 0.0,
    epsilon: ArrayLike = 1e-7,
    centered: bool = False,
    name: str = "RMSprop",
    *,
    decay: float = 0.0,
    clipnorm: float | None = None,
    clipvalue: float | None = None,
    global_clipnorm: float | None = None,
    state_dtype: DTypeLike | None = None,
) -> Transformation:
    """The legacy tf.keras (TensorFlow 2.0 to 2.10, `tf.keras.optimizers.legacy`), whose ε moves.

    With momentum it calls TensorFlow's kernel, which has ε in the root; without, its own Python, which
    has ε outside. `epsilon=0` is silently 1e-7 there, and here. A traced momentum counts as one, as a
    tensor does there: with :func:`optax.inject_hyperparams` say `static_args="momentum"`.

    References:
        tf_keras/src/optimizers/legacy/rmsprop.py, 2.21.0.
    """
    del name
    _refuse(
        decay=(decay, 0, "learning_rate=lambda count: learning_rate / (1 + decay * count)"),
        clipnorm=(clipnorm, None, _CLIPNORM),
        clipvalue=(clipvalue, None, _CLIPVALUE),
        global_clipnorm=(global_clipnorm, None, _GLOBAL_CLIPNORM),
    )
    return rmsprop(
        learning_rate,
        rho,
        1e-7 if _or_none(epsilon) is None else epsilon,
        eps_in_sqrt=_or_none(momentum) is not None,
        centered=centered,
        momentum=_or_none(momentum),
        state_dtype=state_dtype,
    )


def tensorflow1(
    learning_rate: optax.ScalarOrSchedule,
    decay: ArrayLike = 0.9,
    momentum: ArrayLike = 0.0,
    epsilon: ArrayLike = 1e-10,
    use_locking: bool = False,
    centered: bool = False,
    name: str = "RMSProp",
    *,
    state_dtype: DTypeLike | None = None,
) -> Transformation:
    """`tf.compat.v1.train.RMSPropOptimizer`: average from one, ε in the root, learning rate in the buffer.

    What the vision and RL papers of Google and DeepMind were run with. Weight decay is in their loss:
    `weight_decay` of :func:`rmsprop`. Dense gradients: TensorFlow's sparse kernel leaves untouched rows alone.

    Example:
        >>> efficientnet = tensorflow1(0.016, momentum=0.9, epsilon=1e-3)  # and MnasNet; per 256 images
        >>> inception = tensorflow1(0.165, momentum=0.9, epsilon=1.0)  # v3; per 256 images
        >>> mobilenet_v2 = tensorflow1(0.045, momentum=0.9, epsilon=1.0)  # ε from TF-Slim: the paper has none
        >>> impala = tensorflow1(optax.linear_schedule(4.8e-4, 0.0, 10_000), decay=0.99, epsilon=0.1)
        >>> a2c = tensorflow1(optax.linear_schedule(7e-4, 0.0, 10_000), decay=0.99, epsilon=1e-5)  # OpenAI baselines

        A3C's shared RMSProp starts from zero (by muupan/async-rl, from the authors; the paper has no ε):

        >>> a3c = rmsprop(7e-4, decay=0.99, eps=0.1)

    References:
        tensorflow/python/training/rmsprop.py and tensorflow/core/kernels/training_ops.cc, 2.21.
    """
    del use_locking, name
    return rmsprop(
        learning_rate,
        decay,
        epsilon,
        initial_scale=1.0,
        centered=centered,
        momentum=_or_none(momentum),
        state_dtype=state_dtype,
    )


def sonnet(
    learning_rate: optax.ScalarOrSchedule,
    decay: ArrayLike = 0.9,
    momentum: ArrayLike = 0.0,
    epsilon: ArrayLike = 1e-10,
    centered: bool = False,
    name: str | None = None,
    *,
    state_dtype: DTypeLike | None = None,
) -> Transformation:
    """Sonnet 2's `snt.optimizers.RMSProp`: TensorFlow 1's defaults, but the average from zero.

    References:
        sonnet/src/optimizers/rmsprop.py, 2.0.2.
    """
    del name
    return rmsprop(
        learning_rate, decay, epsilon, centered=centered, momentum=_or_none(momentum), state_dtype=state_dtype
    )


# --- Others -------------------------------------------------------------------------------------------


def paddle(
    learning_rate: optax.ScalarOrSchedule,
    rho: ArrayLike = 0.95,
    epsilon: ArrayLike = 1e-6,
    momentum: ArrayLike = 0.0,
    centered: bool = False,
    parameters: Any = None,
    weight_decay: ArrayLike | None = None,
    grad_clip: Any = None,
    name: str | None = None,
    *,
    state_dtype: DTypeLike | None = None,
) -> Transformation:
    """`paddle.optimizer.RMSProp`: ε in the root, average from zero, coupled decay.

    Its documentation says Nesterov momentum; its code is a heavy ball, and so is this.

    References:
        python/paddle/optimizer/rmsprop.py and rmsprop_kernel_impl.h, 3.3.1.
    """
    del name
    _refuse(
        parameters=(parameters, None, "parameters go to init and update"),
        grad_clip=(grad_clip, None, "chain with optax.clip or optax.clip_by_global_norm in front"),
    )
    return rmsprop(
        learning_rate,
        rho,
        epsilon,
        centered=centered,
        momentum=_or_none(momentum),
        weight_decay=weight_decay,
        state_dtype=state_dtype,
    )


def mindspore(
    learning_rate: optax.ScalarOrSchedule = 0.1,
    decay: ArrayLike = 0.9,
    momentum: ArrayLike = 0.0,
    epsilon: ArrayLike = 1e-10,
    use_locking: bool = False,
    centered: bool = False,
    loss_scale: float = 1.0,
    weight_decay: ArrayLike = 0.0,
    *,
    state_dtype: DTypeLike | None = None,
) -> Transformation:
    """MindSpore's `nn.RMSProp`: TensorFlow 1's, with coupled decay.

    This is what its documentation and most of its kernels compute. The vectorized part of its CPU kernel
    for tensors of eight elements and more (2.10.0, not centered) puts ε outside the root: for a run made
    there, `rmsprop(..., initial_scale=1.0, eps_in_sqrt=False)`.

    References:
        mindspore/nn/optim/rmsprop.py, 2.10.0.
    """
    del use_locking
    _refuse(loss_scale=(loss_scale, 1, "chain with optax.scale(1 / loss_scale) in front"))
    return rmsprop(
        learning_rate,
        decay,
        epsilon,
        initial_scale=1.0,
        centered=centered,
        momentum=_or_none(momentum),
        weight_decay=_or_none(weight_decay),
        state_dtype=state_dtype,
    )


def mlx(
    learning_rate: optax.ScalarOrSchedule,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    *,
    state_dtype: DTypeLike | None = None,
) -> Transformation:
    """Apple's `mlx.optimizers.RMSprop`: PyTorch's, without momentum, centering and decay.

    References:
        python/mlx/optimizers/optimizers.py, 0.32.4.
    """
    return rmsprop(learning_rate, alpha, eps, eps_in_sqrt=False, state_dtype=state_dtype)


def optimisers_jl(
    eta: optax.ScalarOrSchedule = 0.001,
    rho: ArrayLike = 0.9,
    epsilon: ArrayLike = 1e-8,
    centred: bool = False,
    *,
    state_dtype: DTypeLike | None = None,
) -> Transformation:
    """Optimisers.jl's (Flux's) `RMSProp(η, ρ, ϵ; centred)`: ε outside the root, average from zero.

    Julia calls ρ "momentum"; it is the decay. The real one is another rule in its chain, with the learning
    rate in the buffer: `rmsprop(..., eps_in_sqrt=False, momentum=...)`.

    References:
        Optimisers.jl, src/rules.jl.
    """
    return rmsprop(eta, rho, epsilon, eps_in_sqrt=False, centered=centred, state_dtype=state_dtype)


# --- The table ----------------------------------------------------------------------------------------


DIALECTS = (
    *(hinton, graves, dqn),
    *(pytorch, timm, stable_baselines3, bitsandbytes),
    *(keras, tf_keras, tensorflow1, sonnet),
    *(paddle, mindspore, mlx, optimisers_jl),
)


def options(dialect: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """What a call of a dialect comes to: every argument of `rmsprop`, by name.

    Example:
        >>> options(pytorch, momentum=0.9)["lr_in_momentum"]
        False
    """

    signature = inspect.signature(rmsprop)

    def record(*args: Any, **kwargs: Any) -> dict[str, Any]:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    learning_rate, *_ = inspect.signature(dialect).parameters.values()
    if learning_rate.default is learning_rate.empty:
        arguments = {learning_rate.name: None} | arguments
    with mock.patch.dict(globals(), rmsprop=record):
        return dialect(**arguments)


def table() -> list[dict[str, str]]:
    """One row per dialect, one column per option in which they differ; "" is what one does not have."""

    def probe(dialect: Callable[..., Any], **arguments: Any) -> dict[str, Any] | None:
        try:
            return options(dialect, **arguments)
        except (TypeError, ValueError):  # no such argument, or refused
            return None

    rows = []
    for dialect in DIALECTS:
        plain, moving, decaying = options(dialect), probe(dialect, momentum=0.9), probe(dialect, weight_decay=0.1)
        centering = probe(dialect, centered=True) or probe(dialect, centred=True)
        root = {True: "inside", False: "outside"}
        eps = root[plain["eps_in_sqrt"]]
        if moving and moving["eps_in_sqrt"] != plain["eps_in_sqrt"]:
            eps += f", {root[moving['eps_in_sqrt']]} with momentum"
        decay = "" if decaying is None else "decoupled" if decaying["decoupled"] else "coupled"
        if probe(dialect, weight_decay=0.1, decoupled_decay=True):
            decay += " or decoupled"
        rows.append(
            {
                "dialect": dialect.__name__,
                "lr": "" if plain["learning_rate"] is None else f"{plain['learning_rate']:g}",
                "decay": f"{plain['decay']:g}",
                "eps": f"{plain['eps']:g}",
                "eps vs root": eps,
                "first ν": f"{plain['initial_scale']:g}",
                "centered": "always" if plain["centered"] else "option" if centering else "",
                "momentum": "" if moving is None else f"{plain['momentum'] or 0:g}",
                "lr vs buffer": "" if moving is None else root[moving["lr_in_momentum"]],
                "weight decay": decay,
            }
        )
    return rows


def _or_none(value: Any) -> Any:
    """A number that is zero switches its option off; one that may be traced cannot."""
    return None if value is None or (isinstance(value, numbers.Real) and value == 0) else value


def _refuse(**arguments: tuple[Any, Any, str]) -> None:
    """Raises for each argument, given as (value, what it must be, what to do), that is something else."""
    for name, (value, neutral, remedy) in arguments.items():
        plain = value is None or isinstance(value, (numbers.Real, str)) or not hasattr(value, "dtype")
        if plain and value != neutral:
            raise ValueError(f"{name}={value!r} is not available here: {remedy}")
