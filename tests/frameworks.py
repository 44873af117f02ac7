"""Every framework's own RMSProp on one problem, and the dialect call that must give its trajectory.

A `Framework` is a row: how to run it, and the calls, in its own argument names, that are compared. The golden
trajectories (`golden/make.py`) and the live tests both read these rows.
"""

import importlib
import importlib.util
import itertools
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.example_libraries.optimizers as jax_examples
import jax.numpy as jnp
import numpy as np
import optax
from problems import grads, START, STEPS, trajectory

from rmsprop_jax import dialects, rmsprop


# A warm-up, then a staircase: what makes the learning rate's place in the buffer matter.
RATES = np.float32([3e-3 * min((t + 1) / 20, 0.97 ** (t // 4)) for t in range(STEPS)])
CONSTANT = np.full(STEPS, np.float32(3e-3))


def gradient(p: np.ndarray, t: int) -> np.ndarray:
    g = grads(np.asarray(p), t)
    assert g.dtype == np.float32
    return g


# --- Runners: (arguments of the optimizer, learning rates) -> parameters after each step -------------------


def torch_like(load: Callable[[], Any]):
    def run(arguments: dict[str, Any], rates: np.ndarray) -> np.ndarray:
        import torch

        p = torch.nn.Parameter(torch.from_numpy(START.copy()))
        optimizer = load()([p], lr=float(rates.max()), **arguments)
        out = []
        for t, rate in enumerate(rates):
            optimizer.param_groups[0]["lr"] = float(rate)
            p.grad = torch.from_numpy(gradient(p.detach().numpy(), t))
            optimizer.step()
            out.append(p.detach().numpy().copy())
        return np.stack(out)

    return run


def torch_class():
    import torch

    return torch.optim.RMSprop


def timm_class():
    # timm's __init__ imports torchvision, which has no build for the CPU build of torch. Its optimizers need torch
    # alone: enter the package past its __init__.
    for name in ("timm", "timm.optim"):
        spec = importlib.util.find_spec(name)
        assert spec
        sys.modules[name] = importlib.util.module_from_spec(spec)
    return importlib.import_module("timm.optim.rmsprop_tf").RMSpropTF


def sb3_class():
    from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

    return RMSpropTFLike


def bitsandbytes_class():
    import bitsandbytes

    return bitsandbytes.optim.RMSprop32bit


def run_keras(arguments, rates):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    p = keras.Variable(START)
    optimizer = keras.optimizers.RMSprop(float(rates[0]), **arguments)
    optimizer.build([p])
    out = []
    for t, rate in enumerate(rates):
        optimizer.learning_rate = float(rate)
        optimizer.apply([keras.ops.convert_to_tensor(gradient(np.asarray(p), t))], [p])
        out.append(np.array(p))
    return np.stack(out)


def tf_like(make: Callable[..., Callable[[Any, Any], Any]]):
    def run(arguments, rates):
        import tensorflow as tf

        p, rate = tf.Variable(START), tf.Variable(rates[0])
        apply = make(rate, **arguments)
        out = []
        for t, value in enumerate(rates):
            rate.assign(value)
            apply(tf.constant(gradient(p.numpy(), t)), p)
            out.append(p.numpy().copy())
        return np.stack(out)

    return run


def make_tf_keras(rate, **arguments):
    import tf_keras

    optimizer = tf_keras.optimizers.legacy.RMSprop(lambda: rate, **arguments)
    return lambda g, p: optimizer.apply_gradients([(g, p)])


def make_tensorflow1(rate, **arguments):
    import tensorflow as tf

    optimizer = tf.compat.v1.train.RMSPropOptimizer(lambda: rate, **arguments)
    return lambda g, p: optimizer.apply_gradients([(g, p)])


def make_sonnet(rate, **arguments):
    import sonnet

    optimizer = sonnet.optimizers.RMSProp(rate, **arguments)
    return lambda g, p: optimizer.apply([g], [p])


def run_paddle(arguments, rates):
    import paddle

    p = paddle.to_tensor(START.copy(), stop_gradient=False)
    optimizer = paddle.optimizer.RMSProp(float(rates[0]), parameters=[p], **arguments)
    out = []
    for t, rate in enumerate(rates):
        optimizer.set_lr(float(rate))
        (p * paddle.to_tensor(gradient(p.numpy(), t))).sum().backward()
        optimizer.step()
        optimizer.clear_grad()
        out.append(p.numpy().copy())
    return np.stack(out)


def run_mindspore(arguments, rates):
    import mindspore

    # Pieces of four: the vectorized part of its CPU kernel puts ε outside the root (see the dialect).
    pieces = np.arange(len(START)).reshape(-1, 4)
    parts = [mindspore.Parameter(mindspore.Tensor(START[i]), name=f"p{i[0]}") for i in pieces]
    optimizer = mindspore.nn.RMSProp(parts, learning_rate=[float(r) for r in rates], **arguments)
    out = [START]
    for t in range(len(rates)):
        g = gradient(out[-1], t)
        optimizer(tuple(mindspore.Tensor(g[i]) for i in pieces))
        out.append(np.concatenate([part.asnumpy() for part in parts]))
    return np.stack(out[1:])


def run_mlx(arguments, rates):
    import mlx.core as mx
    import mlx.optimizers

    p = {"p": mx.array(START)}
    optimizer = mlx.optimizers.RMSprop(float(rates[0]), **arguments)
    out = []
    for t, rate in enumerate(rates):
        optimizer.learning_rate = mx.array(rate)
        p = optimizer.apply_gradients({"p": mx.array(gradient(np.array(p["p"]), t))}, p)
        out.append(np.array(p["p"]))
    return np.stack(out)


def run_optax(arguments, rates):
    return trajectory(optax.rmsprop(lambda count: jnp.asarray(rates)[count], **arguments))


def run_jax_examples(arguments, rates):
    arguments = dict(arguments)
    make = jax_examples.rmsprop_momentum if "momentum" in arguments else jax_examples.rmsprop
    init, update, params_of = make(lambda t: jnp.asarray(rates)[t], **arguments)
    state = init(jnp.asarray(START))
    out = []
    for t in range(len(rates)):
        state = update(t, jnp.asarray(gradient(np.asarray(params_of(state)), t)), state)
        out.append(np.asarray(params_of(state)))
    return np.stack(out)


def as_jax_examples(step_size, gamma=0.9, eps=1e-8, momentum=None):
    return rmsprop(step_size, gamma, eps, momentum=momentum)


# --- The rows -------------------------------------------------------------------------------------------


class Framework(NamedTuple):
    distributions: tuple[str, ...]  # on PyPI, the first one is the one whose version counts
    run: Callable[[dict[str, Any], np.ndarray], np.ndarray]
    dialect: Callable[..., optax.GradientTransformationExtraArgs]
    calls: list[dict[str, Any]]


def combinations(*axes: dict[str, Any], **common: Any) -> list[dict[str, Any]]:
    """Each set of extra arguments switched on or off, with every other."""
    rows = itertools.product(*[({}, axis) for axis in axes])
    return [common | {k: v for axis in row for k, v in axis.items()} for row in rows]


MOMENTUM, CENTERED, DECAY = {"momentum": 0.9}, {"centered": True}, {"weight_decay": 0.1}

FRAMEWORKS = {
    "torch": Framework(
        ("torch",),
        torch_like(torch_class),
        dialects.pytorch,
        [*combinations(MOMENTUM, CENTERED, DECAY, eps=1e-3), {"maximize": True, **DECAY}, {"alpha": 0.9}],
    ),
    "timm": Framework(
        ("timm", "torch"),
        torch_like(timm_class),
        dialects.timm,
        [
            *combinations(MOMENTUM, CENTERED, DECAY, eps=1e-3),
            *combinations(MOMENTUM, {"decoupled_decay": True}, eps=1e-3, **DECAY),
            {**MOMENTUM, "lr_in_momentum": False},
            {"alpha": 0.99},
        ],
    ),
    "stable-baselines3": Framework(
        ("stable-baselines3", "torch"),
        torch_like(sb3_class),
        dialects.stable_baselines3,
        [*combinations(MOMENTUM, CENTERED, DECAY, eps=1e-3), {}],
    ),
    "bitsandbytes": Framework(
        ("bitsandbytes", "torch"),
        torch_like(bitsandbytes_class),
        dialects.bitsandbytes,
        combinations(DECAY, {"alpha": 0.9}, eps=1e-3),
    ),
    "keras": Framework(
        ("keras", "jax"),
        run_keras,
        dialects.keras,
        [*combinations(MOMENTUM, CENTERED, DECAY, epsilon=1e-3), {"rho": 0.99}],
    ),
    "tf-keras": Framework(
        ("tf-keras", "tensorflow"),
        tf_like(make_tf_keras),
        dialects.tf_keras,
        [*combinations(MOMENTUM, CENTERED, epsilon=1e-3), {"rho": 0.99}, {"epsilon": 0.0}],
    ),
    "tensorflow": Framework(
        ("tensorflow",),
        tf_like(make_tensorflow1),
        dialects.tensorflow1,
        [*combinations(MOMENTUM, CENTERED, epsilon=1e-3), {"decay": 0.99}, {}],
    ),
    "dm-sonnet": Framework(
        ("dm-sonnet", "tensorflow"),
        tf_like(make_sonnet),
        dialects.sonnet,
        [*combinations(MOMENTUM, CENTERED, epsilon=1e-3), {"decay": 0.99}],
    ),
    "paddlepaddle": Framework(
        ("paddlepaddle",),
        run_paddle,
        dialects.paddle,
        [*combinations(MOMENTUM, CENTERED, DECAY, epsilon=1e-3), {}],
    ),
    "mindspore": Framework(
        ("mindspore",),
        run_mindspore,
        dialects.mindspore,
        [*combinations(MOMENTUM, CENTERED, DECAY, epsilon=1e-3), {}],
    ),
    "mlx": Framework(("mlx",), run_mlx, dialects.mlx, [{"eps": 1e-3}, {}, {"alpha": 0.9}]),
    "optax": Framework(
        ("optax", "jax"),
        run_optax,
        rmsprop,
        [*combinations(MOMENTUM, CENTERED, {"initial_scale": 1.0}, eps=1e-3), {**MOMENTUM, "nesterov": True}],
    ),
    "jax-example-libraries": Framework(
        ("jax",), run_jax_examples, as_jax_examples, combinations(MOMENTUM, {"gamma": 0.99}, eps=1e-3)
    ),
}

SCHEDULES = {"constant": CONSTANT, "schedule": RATES}


def ours(framework: Framework, arguments: dict[str, Any], rates: np.ndarray) -> np.ndarray:
    """The dialect's trajectory; a maximizing one sees the gradients that the framework sees."""
    return trajectory(framework.dialect(lambda count: jnp.asarray(rates)[count], **arguments))


def case_name(arguments: dict[str, Any], schedule: str) -> str:
    return ",".join([f"{k}={v}" for k, v in arguments.items()] + [schedule])


def cases(framework: Framework):
    """(name, arguments, learning rates) of everything that is compared."""
    for arguments, (schedule, rates) in itertools.product(framework.calls, SCHEDULES.items()):
        yield case_name(arguments, schedule), arguments, rates


def is_here(name):
    """Whether a framework is installed, or must be: .ci/run names those whose absence is a failure."""
    if name in os.environ.get("RMSPROP_JAX_LIVE", "").split():
        return True
    try:
        return all(importlib.metadata.version(d) for d in FRAMEWORKS[name].distributions)
    except importlib.metadata.PackageNotFoundError:
        return False
