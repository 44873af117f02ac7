"""Every framework's own RMSProp on one problem, and the dialect call that must give its trajectory.

A `Framework` is a row: how to run it, and the calls, in its own argument names, that are compared. The golden
trajectories (`golden/make.py`) and the live tests both read these rows.
"""

import importlib
import importlib.util
import inspect
import itertools
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
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


# Two tensors, so that a norm of each is another one than that of both.
SPLIT = 24


def run_keras(arguments, rates):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    arguments = dict(arguments)
    excluded = arguments.pop("exclude", None)
    parts = [keras.Variable(part) for part in np.split(START, [SPLIT])]
    optimizer = keras.optimizers.RMSprop(float(rates[0]), **arguments)
    if excluded is not None:
        optimizer.exclude_from_weight_decay([parts[excluded]])
    optimizer.build(parts)
    out = [START]
    for t, rate in enumerate(rates):
        optimizer.learning_rate = float(rate)
        pieces = np.split(gradient(out[-1], t) * arguments.get("loss_scale_factor", 1), [SPLIT])
        optimizer.apply([keras.ops.convert_to_tensor(g) for g in pieces], parts)
        out.append(np.concatenate([np.array(p) for p in parts]))
    return np.stack(out[1:])


def tf_like(make: Callable[..., Callable[[Any, Any], Any]]):
    def run(arguments, rates):
        import tensorflow as tf

        parts, rate = [tf.Variable(part) for part in np.split(START, [SPLIT])], tf.Variable(rates[0])
        apply = make(rate, **arguments)
        out = [START]
        for t, value in enumerate(rates):
            rate.assign(value)
            apply([tf.constant(g) for g in np.split(gradient(out[-1], t), [SPLIT])], parts)
            out.append(np.concatenate([part.numpy() for part in parts]))
        return np.stack(out[1:])

    return run


def make_tf_keras(rate, **arguments):
    import tf_keras

    optimizer = tf_keras.optimizers.legacy.RMSprop(lambda: rate, **arguments)
    return lambda gs, ps: optimizer.apply_gradients(list(zip(gs, ps, strict=True)))


def make_tensorflow1(rate, **arguments):
    import tensorflow as tf

    optimizer = tf.compat.v1.train.RMSPropOptimizer(lambda: rate, **arguments)
    return lambda gs, ps: optimizer.apply_gradients(list(zip(gs, ps, strict=True)))


def make_sonnet(rate, **arguments):
    import sonnet

    optimizer = sonnet.optimizers.RMSProp(rate, **arguments)
    return lambda gs, ps: optimizer.apply(gs, ps)


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
        g = gradient(out[-1], t) * arguments.get("loss_scale", 1)
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


def run_dreamer(arguments, rates):
    """DreamerV3's own transforms, from a checkout that DREAMERV3 names, in the chain that its agent makes."""
    arguments = {**inspect.signature(inspect.unwrap(dialects.dreamer)).parameters, **arguments}
    default = lambda name: getattr(arguments[name], "default", arguments[name])  # noqa: E731
    file = pathlib.Path(os.environ["DREAMERV3"]) / "embodied" / "jax" / "opt.py"
    source = file.read_text().replace("from . import", "import types; internal = nets = nj = types.SimpleNamespace() #")
    names: dict[str, Any] = {}
    source = source.replace("import ninjax as nj", "nj = __import__('types').SimpleNamespace(Module=object)")
    source = source.replace("internal = nets = nj =", "internal = nets =")
    exec(compile(source, str(file), "exec"), names)
    lr, warmup, anneal = float(rates.max()), default("warmup"), default("anneal")
    schedule = {
        "const": lambda: optax.constant_schedule(lr),
        "linear": lambda: optax.linear_schedule(lr, 0.1 * lr, anneal - warmup),
        "cosine": lambda: optax.cosine_decay_schedule(lr, anneal - warmup, 0.1 * lr),
    }[default("schedule")]()
    if warmup:
        schedule = optax.join_schedules([optax.linear_schedule(0.0, lr, warmup), schedule], [warmup])
    wd = default("wd")
    tx = optax.chain(
        names["clip_by_agc"](default("agc")),
        names["scale_by_rms"](default("beta2"), default("eps")),
        names["scale_by_momentum"](default("beta1"), default("nesterov")),
        *([optax.add_decayed_weights(wd, {"a/kernel": True, "b": False})] if wd else []),
        optax.scale_by_learning_rate(schedule),
    )
    return trajectory(in_two(tx, "a/kernel", "b"))


def in_two(tx: Any, first: str = "0", second: str = "1") -> optax.GradientTransformationExtraArgs:
    """A transformation of the whole vector by one of its two parts."""

    def split(x):
        return None if x is None else dict(zip((first, second), jnp.split(x, [SPLIT]), strict=True))

    def update(updates, state, params=None):
        updates, state = tx.update(split(updates), state, split(params))
        return jnp.concatenate([updates[first], updates[second]]), state

    return optax.with_extra_args_support(optax.GradientTransformation(lambda params: tx.init(split(params)), update))


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
    parts: tuple[str, str] | None = None  # names of the two tensors, where more than one matters


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
            {"decoupled_decay": True, "corrected_weight_decay": True, **DECAY, **MOMENTUM},
            {"corrected_weight_decay": True, **DECAY},
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
        [
            *combinations(MOMENTUM, CENTERED, DECAY, epsilon=1e-3),
            {"rho": 0.99},
            *({clip: 2.0, "epsilon": 1e-3} for clip in ("clipnorm", "clipvalue", "global_clipnorm")),
            {"loss_scale_factor": 8.0, "clipnorm": 2.0, "epsilon": 1e-3},
            *combinations(MOMENTUM, {"global_clipnorm": 2.0, **DECAY}, epsilon=1e-3, gradient_accumulation_steps=3),
            {"exclude": 1, **DECAY, "epsilon": 1e-3},
        ],
        ("0", "1"),
    ),
    "tf-keras": Framework(
        ("tf-keras", "tensorflow"),
        tf_like(make_tf_keras),
        dialects.tf_keras,
        [
            *combinations(MOMENTUM, CENTERED, epsilon=1e-3),
            {"rho": 0.99},
            {"epsilon": 0.0},
            *({clip: 2.0, "epsilon": 1e-3} for clip in ("clipnorm", "clipvalue", "global_clipnorm")),
            {"clipvalue": 0.5, "clipnorm": 2.0, "epsilon": 1e-3},
            {"decay": 0.01, **MOMENTUM},
        ],
        ("0", "1"),
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
        [*combinations(MOMENTUM, CENTERED, DECAY, epsilon=1e-3), {}, {"loss_scale": 8.0, **DECAY, "epsilon": 1e-3}],
    ),
    "mlx": Framework(("mlx",), run_mlx, dialects.mlx, [{"eps": 1e-3}, {}, {"alpha": 0.9}]),
    "dreamerv3": Framework(
        ("optax", "jax"),
        run_dreamer,
        dialects.dreamer,
        [
            {},
            {"warmup": 0, "agc": 0.0},
            {"warmup": 20, "nesterov": True, "wd": 0.1, "wdregex": "kernel$"},
            {"warmup": 20, "schedule": "linear", "anneal": 150, "beta2": 0.99},
            {"warmup": 20, "schedule": "cosine", "anneal": 150, "eps": 1e-3, "agc": 0.01},
        ],
        ("a/kernel", "b"),
    ),
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
    arguments = dict(arguments)
    scale = arguments.get("loss_scale_factor", arguments.get("loss_scale", 1))
    if arguments.get("corrected_weight_decay"):
        arguments["max_lr"] = float(rates.max())
    if "exclude" in arguments:
        arguments["weight_decay_mask"] = {part: i != arguments["exclude"] for i, part in enumerate(framework.parts)}
        del arguments["exclude"]
    rate = float(rates.max()) if framework.dialect is dialects.dreamer else lambda count: jnp.asarray(rates)[count]
    tx = framework.dialect(rate, **arguments)
    tx = in_two(tx, *framework.parts) if framework.parts else tx
    # optax.MultiSteps mixes dtypes.
    with jax.numpy_dtype_promotion("standard" if "gradient_accumulation_steps" in arguments else "strict"):
        return trajectory(tx, grads=lambda p, t: scale * grads(p, t))


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
    if name == "dreamerv3":  # not on PyPI
        return "DREAMERV3" in os.environ
    try:
        return all(importlib.metadata.version(d) for d in FRAMEWORKS[name].distributions)
    except importlib.metadata.PackageNotFoundError:
        return False
