"""Every framework's own RMSProp: how to run it, and the dialect and the reader that must agree with it.

A `Framework` is a row: its `Runner`, and the calls, in its own argument names, that are compared. The golden files
(`golden/make.py`) and the live tests read these rows. `golden/checkpoints.py` records checkpoints.
To add a framework, add a runner and a row.
"""

import abc
import functools
import importlib.metadata
import inspect
import itertools
import json
import os
import pathlib
import subprocess
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.example_libraries.optimizers as jax_examples
import jax.numpy as jnp
import numpy as np
import optax
from golden.checkpoints import past_init, STOP
from problems import grads, scanned, START, STEPS
from recordings import Arrays, from_torch_layout, from_underscores, NAMES, to_torch_layout, with_underscores

from rmsprop_jax import dialects, interop, rmsprop


# A warm-up, then a staircase, so that it matters whether the momentum buffer holds the learning rate.
RATES = np.float32([3e-3 * min((t + 1) / 20, 0.97 ** (t // 4)) for t in range(STEPS)])
CONSTANT = np.full(STEPS, np.float32(3e-3))


# --- Runners --------------------------------------------------------------------------------------------


class Runner(abc.ABC):
    """A framework's optimizer and the parameters that it updates."""

    @abc.abstractmethod
    def __init__(self, params: Arrays, rates: np.ndarray, arguments: dict[str, Any]) -> None:
        """Starts at `params`. `rates` are the learning rates of all steps, `arguments` all others of the optimizer."""

    @abc.abstractmethod
    def params(self) -> Arrays:
        """The present parameters, copied."""

    @abc.abstractmethod
    def step(self, grads: Arrays, rate: np.float32) -> None:
        """One update."""


class Resumable(Runner):
    """One whose checkpoints `interop` reads."""

    @abc.abstractmethod
    def checkpoint(self) -> Any:
        """The optimizer's state as a user saves it."""

    @abc.abstractmethod
    def load(self, checkpoint: Any) -> None:
        """Goes on from a checkpoint."""


class Torch(Resumable):
    @staticmethod
    def optimizer_class():
        import torch

        return torch.optim.RMSprop

    def __init__(self, params, rates, arguments):
        import torch

        self.ps = {k: torch.nn.Parameter(torch.from_numpy(v.copy())) for k, v in params.items()}
        self.optimizer = self.optimizer_class()(list(self.ps.values()), lr=float(rates.max()), **arguments)

    def params(self):
        return {k: p.detach().numpy().copy() for k, p in self.ps.items()}

    def step(self, grads, rate):
        import torch

        self.optimizer.param_groups[0]["lr"] = float(rate)
        for k, p in self.ps.items():
            p.grad = torch.from_numpy(grads[k])
        self.optimizer.step()

    def checkpoint(self):
        return self.optimizer.state_dict()

    def load(self, checkpoint):
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": checkpoint})


class Timm(Torch):
    @staticmethod
    def optimizer_class():
        return past_init("timm.optim.rmsprop_tf").RMSpropTF  # timm imports torchvision, which CPU builds lack


class Pfrl(Torch):
    @staticmethod
    def optimizer_class():
        return past_init("pfrl.optimizers.rmsprop_eps_inside_sqrt").RMSpropEpsInsideSqrt  # pfrl imports gym


class StableBaselines3(Torch):
    @staticmethod
    def optimizer_class():
        from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

        return RMSpropTFLike


class Bitsandbytes(Torch):
    @staticmethod
    def optimizer_class():
        import bitsandbytes

        return bitsandbytes.optim.RMSprop32bit


class Keras(Resumable):
    def __init__(self, params, rates, arguments):
        os.environ.setdefault("KERAS_BACKEND", "jax")
        import keras

        arguments = dict(arguments)
        excluded = arguments.pop("exclude", None)
        self.ps = {k: keras.Variable(v, name=k.replace(".", "_")) for k, v in params.items()}
        self.optimizer = keras.optimizers.RMSprop(float(rates[0]), **arguments)
        if excluded is not None:
            self.optimizer.exclude_from_weight_decay([list(self.ps.values())[excluded]])
        self.optimizer.build(list(self.ps.values()))

    def params(self):
        return {k: np.array(p) for k, p in self.ps.items()}

    def step(self, grads, rate):
        import keras

        self.optimizer.learning_rate = float(rate)
        self.optimizer.apply([keras.ops.convert_to_tensor(grads[k]) for k in self.ps], list(self.ps.values()))

    def checkpoint(self):
        return [(v.path, np.asarray(v)) for v in self.optimizer.variables]

    def load(self, checkpoint):
        values = dict(checkpoint)
        for variable in self.optimizer.variables:
            if variable.name != "learning_rate":
                variable.assign(values.pop(variable.name))
        assert not values


class TensorFlow2(Runner):
    """An optimizer that runs eagerly on TensorFlow's variables."""

    @abc.abstractmethod
    def make(self, rate: Any, **arguments: Any) -> Callable[[list[Any], list[Any]], Any]:
        """The optimizer's method that takes gradients and variables. `rate` is a variable."""

    def __init__(self, params, rates, arguments):
        import tensorflow as tf

        self.ps = {k: tf.Variable(v) for k, v in params.items()}
        self.rate = tf.Variable(rates[0])
        self.apply = self.make(self.rate, **arguments)

    def params(self):
        return {k: p.numpy() for k, p in self.ps.items()}

    def step(self, grads, rate):
        import tensorflow as tf

        self.rate.assign(rate)
        self.apply([tf.constant(grads[k]) for k in self.ps], list(self.ps.values()))


class TfKeras(TensorFlow2):
    def make(self, rate, **arguments):
        import tf_keras

        optimizer = tf_keras.optimizers.legacy.RMSprop(lambda: rate, **arguments)
        return lambda gs, ps: optimizer.apply_gradients(list(zip(gs, ps, strict=True)))


class Sonnet(TensorFlow2):
    def make(self, rate, **arguments):
        import sonnet

        return sonnet.optimizers.RMSProp(rate, **arguments).apply


class TensorFlow1(Resumable):
    """A graph and a session, as version 1 has them."""

    def __init__(self, params, rates, arguments):
        import tensorflow as tf

        v1 = tf.compat.v1
        with tf.Graph().as_default() as graph:
            self.ps = {k: v1.get_variable(k.replace(".", "_"), initializer=v) for k, v in params.items()}
            self.gs = {k: v1.placeholder(tf.float32, v.shape) for k, v in params.items()}
            self.rate = v1.placeholder(tf.float32, ())
            optimizer = v1.train.RMSPropOptimizer(self.rate, **arguments)
            self.update = optimizer.apply_gradients([(self.gs[k], self.ps[k]) for k in self.ps])
            self.slots = {v.op.name: v for v in optimizer.variables()}
            self.session = v1.Session(graph=graph)
            self.session.run(v1.global_variables_initializer())

    def params(self):
        return self.session.run(self.ps)

    def step(self, grads, rate):
        self.session.run(self.update, {self.gs[k]: grads[k] for k in self.ps} | {self.rate: rate})

    def checkpoint(self):
        return self.session.run(self.slots)

    def load(self, checkpoint):
        assert set(self.slots) == set(checkpoint)
        with self.session.graph.as_default():
            for name, value in checkpoint.items():
                self.slots[name].load(value, self.session)


class Paddle(Runner):
    def __init__(self, params, rates, arguments):
        import paddle

        self.ps = {k: paddle.to_tensor(v.copy(), stop_gradient=False) for k, v in params.items()}
        self.optimizer = paddle.optimizer.RMSProp(float(rates[0]), parameters=list(self.ps.values()), **arguments)

    def params(self):
        return {k: p.numpy().copy() for k, p in self.ps.items()}

    def step(self, grads, rate):
        import paddle

        self.optimizer.set_lr(float(rate))
        for k, p in self.ps.items():
            (p * paddle.to_tensor(grads[k])).sum().backward()
        self.optimizer.step()
        self.optimizer.clear_grad()


class MindSpore(Runner):
    # Pieces of four: the vectorized part of its CPU kernel puts ε outside the root (see the dialect).
    PIECE = 4

    def __init__(self, params, rates, arguments):
        import mindspore

        self.shapes = {k: v.shape for k, v in params.items()}
        self.parts = [
            mindspore.Parameter(mindspore.Tensor(piece), name=f"{k}{i}")
            for k, v in params.items()
            for i, piece in enumerate(self.pieces(v))
        ]
        rates = [float(r) for r in rates]
        self.optimizer = mindspore.nn.RMSProp(self.parts, learning_rate=rates, **arguments)

    def pieces(self, array):
        return np.split(array.ravel(), range(self.PIECE, array.size, self.PIECE))

    def params(self):
        sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        whole = np.split(np.concatenate([part.asnumpy() for part in self.parts]), np.cumsum(sizes)[:-1])
        return {k: x.reshape(shape) for (k, shape), x in zip(self.shapes.items(), whole, strict=True)}

    def step(self, grads, rate):
        import mindspore

        self.optimizer(tuple(mindspore.Tensor(piece) for k in self.shapes for piece in self.pieces(grads[k])))


class Mlx(Runner):
    def __init__(self, params, rates, arguments):
        import mlx.core as mx
        import mlx.optimizers

        self.ps = {k: mx.array(v) for k, v in params.items()}
        self.optimizer = mlx.optimizers.RMSprop(float(rates[0]), **arguments)

    def params(self):
        return {k: np.array(p) for k, p in self.ps.items()}

    def step(self, grads, rate):
        import mlx.core as mx

        self.optimizer.learning_rate = mx.array(rate)
        self.ps = self.optimizer.apply_gradients({k: mx.array(g) for k, g in grads.items()}, self.ps)


class TensorFlowJs(Runner):
    """TensorFlow.js under Node, from the folder with node_modules that TENSORFLOWJS names."""

    def __init__(self, params, rates, arguments):
        call = inspect.signature(dialects.tensorflowjs).bind(float(rates[0]), **arguments).arguments
        options = inspect.signature(dialects.tensorflowjs).parameters
        self.ps = params
        self.process = subprocess.Popen(
            ["node", pathlib.Path(__file__).parent / "golden" / "tensorflowjs.js"],
            env=os.environ | {"NODE_PATH": f"{os.environ['TENSORFLOWJS']}/node_modules"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        names = list(options)[:5]
        defaults = {name: 0 if name == "momentum" else options[name].default for name in names}
        self.send({"arguments": list((defaults | call).values()), "params": self.lists(params)})

    def lists(self, arrays: Arrays) -> dict[str, list[float]]:
        return {k: v.astype(np.float64).tolist() for k, v in arrays.items()}

    def send(self, message: Any) -> None:
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def params(self):
        return self.ps

    def step(self, grads, rate):
        self.send({"rate": float(rate), "grads": self.lists(grads)})
        self.ps = {k: np.float32(v) for k, v in json.loads(self.process.stdout.readline()).items()}


class Optax(Runner):
    """Any gradient transformation."""

    def make(self, rates: np.ndarray, **arguments: Any) -> Any:
        return optax.rmsprop(lambda count: jnp.asarray(rates)[count], **arguments)

    def __init__(self, params, rates, arguments):
        tx = self.make(rates, **arguments)

        @jax.jit
        def update(grads, state, params):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.update, self.ps = update, jax.tree.map(jnp.asarray, params)
        self.state = tx.init(self.ps)

    def params(self):
        return {k: np.array(p) for k, p in self.ps.items()}

    def step(self, grads, rate):
        self.ps, self.state = self.update(grads, self.state, self.ps)


class Dreamer(Optax):
    """DreamerV3's own transforms, from a checkout that DREAMERV3 names, in the chain that its agent makes."""

    def make(self, rates, **arguments):
        arguments = {**inspect.signature(inspect.unwrap(dialects.dreamer)).parameters, **arguments}
        default = lambda name: getattr(arguments[name], "default", arguments[name])  # noqa: E731
        names = self.source()
        lr, warmup, anneal = float(rates.max()), default("warmup"), default("anneal")
        schedule = {
            "const": lambda: optax.constant_schedule(lr),
            "linear": lambda: optax.linear_schedule(lr, 0.1 * lr, anneal - warmup),
            "cosine": lambda: optax.cosine_decay_schedule(lr, anneal - warmup, 0.1 * lr),
        }[default("schedule")]()
        if warmup:
            schedule = optax.join_schedules([optax.linear_schedule(0.0, lr, warmup), schedule], [warmup])
        wd = default("wd")
        return optax.chain(
            names["clip_by_agc"](default("agc")),
            names["scale_by_rms"](default("beta2"), default("eps")),
            names["scale_by_momentum"](default("beta1"), default("nesterov")),
            *([optax.add_decayed_weights(wd, {"a/kernel": True, "b": False})] if wd else []),
            optax.scale_by_learning_rate(schedule),
        )

    def source(self) -> dict[str, Any]:
        """The definitions in its file, without the rest of its package."""
        file = pathlib.Path(os.environ["DREAMERV3"]) / "embodied" / "jax" / "opt.py"
        source = file.read_text().replace(
            "from . import", "import types; internal = nets = nj = types.SimpleNamespace() #"
        )
        source = source.replace("import ninjax as nj", "nj = __import__('types').SimpleNamespace(Module=object)")
        source = source.replace("internal = nets = nj =", "internal = nets =")
        names: dict[str, Any] = {}
        exec(compile(source, str(file), "exec"), names)
        return names


class JaxExamples(Runner):
    def __init__(self, params, rates, arguments):
        make = jax_examples.rmsprop_momentum if "momentum" in arguments else jax_examples.rmsprop
        init, self.update, self.params_of = make(lambda t: jnp.asarray(rates)[t], **arguments)
        self.state, self.t = init(jax.tree.map(jnp.asarray, params)), 0

    def params(self):
        return {k: np.array(p) for k, p in self.params_of(self.state).items()}

    def step(self, grads, rate):
        self.state, self.t = self.update(self.t, jax.tree.map(jnp.asarray, grads), self.state), self.t + 1


def as_jax_examples(step_size, gamma=0.9, eps=1e-8, momentum=None):
    return rmsprop(step_size, gamma, eps, momentum=momentum)


# --- The rows -------------------------------------------------------------------------------------------

SPLIT = 24  # where the vector is divided, if its parts matter


class Framework(NamedTuple):
    distributions: tuple[str, ...]  # on PyPI (with "@": on npm), the first one is the one whose version counts
    runner: type[Runner]
    dialect: Callable[..., optax.GradientTransformationExtraArgs]
    calls: list[dict[str, Any]]
    parts: tuple[str, ...] = ("p",)  # names of the two tensors, where more than one matters
    resumed: Sequence[dict[str, Any]] = ()  # options of the runs that go on from a checkpoint
    read: Callable[[Any], Any] | None = None  # checkpoint -> our state
    write: Callable[[Any], Any] | None = None  # our state -> a checkpoint that the runner loads

    def run(self, arguments: dict[str, Any], rates: np.ndarray) -> np.ndarray:
        """The framework's own trajectory of the vector."""
        runner = self.runner(self.divided(START), rates, arguments)
        out = [START]
        for t, rate in enumerate(rates):
            g = grads(out[-1], t) * loss_scale(arguments)
            assert g.dtype == np.float32
            runner.step(self.divided(g), rate)
            out.append(np.concatenate([runner.params()[part] for part in self.parts]))
        return np.stack(out[1:])

    def divided(self, vector: np.ndarray) -> Arrays:
        return dict(zip(self.parts, np.split(vector, [SPLIT] * (len(self.parts) - 1)), strict=True))


def loss_scale(arguments: dict[str, Any]) -> float:
    """The factor by which the framework expects the loss to be multiplied."""
    return arguments.get("loss_scale_factor", arguments.get("loss_scale", 1))


def combinations(*axes: dict[str, Any], **common: Any) -> list[dict[str, Any]]:
    """Each set of extra arguments switched on or off, with every other."""
    rows = itertools.product(*[({}, axis) for axis in axes])
    return [common | {k: v for axis in row for k, v in axis.items()} for row in rows]


MOMENTUM, CENTERED, DECAY = {"momentum": 0.9}, {"centered": True}, {"weight_decay": 0.1}
RESUMED = [MOMENTUM, MOMENTUM | CENTERED, CENTERED]

FRAMEWORKS = {
    "torch": Framework(
        ("torch",),
        Torch,
        dialects.pytorch,
        [*combinations(MOMENTUM, CENTERED, DECAY, eps=1e-3), {"maximize": True, **DECAY}, {"alpha": 0.9}],
        resumed=[*RESUMED, MOMENTUM | DECAY],
        read=lambda c: interop.from_pytorch(c, NAMES, from_torch_layout),
        write=lambda s: interop.to_pytorch(s, NAMES, to_torch_layout),
    ),
    "timm": Framework(
        ("timm", "torch"),
        Timm,
        dialects.timm,
        [
            *combinations(MOMENTUM, CENTERED, DECAY, eps=1e-3),
            *combinations(MOMENTUM, {"decoupled_decay": True}, eps=1e-3, **DECAY),
            {**MOMENTUM, "lr_in_momentum": False},
            {"alpha": 0.99},
            {"decoupled_decay": True, "corrected_weight_decay": True, **DECAY, **MOMENTUM},
            {"corrected_weight_decay": True, **DECAY},
        ],
        resumed=RESUMED,
        read=lambda c: interop.from_timm(c, NAMES, from_torch_layout),
        write=lambda s: interop.to_pytorch(s, NAMES, to_torch_layout),
    ),
    "stable-baselines3": Framework(
        ("stable-baselines3", "torch"),
        StableBaselines3,
        dialects.stable_baselines3,
        [*combinations(MOMENTUM, CENTERED, DECAY, eps=1e-3), {}],
    ),
    "pfrl": Framework(
        ("pfrl", "torch"),
        Pfrl,
        dialects.pfrl,
        [*combinations(MOMENTUM, CENTERED, DECAY, eps=1e-3), {}],
    ),
    "bitsandbytes": Framework(
        ("bitsandbytes", "torch"),
        Bitsandbytes,
        dialects.bitsandbytes,
        combinations(DECAY, {"alpha": 0.9}, eps=1e-3),
    ),
    "keras": Framework(
        ("keras", "jax"),
        Keras,
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
        resumed=RESUMED,
        read=lambda c: interop.from_keras(c, from_underscores),
        write=lambda s: interop.to_keras(s, with_underscores),
    ),
    "tf-keras": Framework(
        ("tf-keras", "tensorflow"),
        TfKeras,
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
        TensorFlow1,
        dialects.tensorflow1,
        [*combinations(MOMENTUM, CENTERED, epsilon=1e-3), {"decay": 0.99}, {}],
        resumed=RESUMED[:2],
        read=lambda c: interop.from_tensorflow1(c, from_underscores, count=STOP),
        write=lambda s: interop.to_tensorflow1(s, with_underscores),
    ),
    "dm-sonnet": Framework(
        ("dm-sonnet", "tensorflow"),
        Sonnet,
        dialects.sonnet,
        [*combinations(MOMENTUM, CENTERED, epsilon=1e-3), {"decay": 0.99}],
    ),
    "tensorflowjs": Framework(
        ("@tensorflow/tfjs",),
        TensorFlowJs,
        dialects.tensorflowjs,
        [*combinations(MOMENTUM, epsilon=1e-3), {"decay": 0.99}, {}],
    ),
    "paddlepaddle": Framework(
        ("paddlepaddle",),
        Paddle,
        dialects.paddle,
        [*combinations(MOMENTUM, CENTERED, DECAY, epsilon=1e-3), {}],
    ),
    "mindspore": Framework(
        ("mindspore",),
        MindSpore,
        dialects.mindspore,
        [*combinations(MOMENTUM, CENTERED, DECAY, epsilon=1e-3), {}, {"loss_scale": 8.0, **DECAY, "epsilon": 1e-3}],
    ),
    "mlx": Framework(("mlx",), Mlx, dialects.mlx, [{"eps": 1e-3}, {}, {"alpha": 0.9}]),
    "dreamerv3": Framework(
        ("optax", "jax"),
        Dreamer,
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
        Optax,
        rmsprop,
        [*combinations(MOMENTUM, CENTERED, {"initial_scale": 1.0}, eps=1e-3), {**MOMENTUM, "nesterov": True}],
    ),
    "jax-example-libraries": Framework(
        ("jax",), JaxExamples, as_jax_examples, combinations(MOMENTUM, {"gamma": 0.99}, eps=1e-3)
    ),
}

SCHEDULES = {"constant": CONSTANT, "schedule": RATES}


def in_two(tx: Any, first: str = "0", second: str = "1") -> optax.GradientTransformationExtraArgs:
    """A transformation of the whole vector by one of its two parts."""

    def split(x):
        return None if x is None else dict(zip((first, second), jnp.split(x, [SPLIT]), strict=True))

    def update(updates, state, params=None):
        updates, state = tx.update(split(updates), state, split(params))
        return jnp.concatenate([updates[first], updates[second]]), state

    return optax.with_extra_args_support(optax.GradientTransformation(lambda params: tx.init(split(params)), update))


def ours(framework: Framework, arguments: dict[str, Any], rates: np.ndarray) -> np.ndarray:
    """The dialect's trajectory, with the gradients that the framework gets."""
    numbers = {name: value for name, value in arguments.items() if isinstance(value, float)}
    others = tuple((name, value) for name, value in arguments.items() if name not in numbers)
    # optax.MultiSteps mixes dtypes.
    with jax.numpy_dtype_promotion("standard" if "gradient_accumulation_steps" in arguments else "strict"):
        return np.asarray(_ours(framework.dialect, framework.parts, others, numbers, rates))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _ours(dialect, parts, others, numbers, rates):
    """The numbers are traced: calls that differ in them alone, and relatives, share their compiled program."""
    arguments = dict(others) | numbers
    if arguments.get("corrected_weight_decay"):
        arguments["max_lr"] = rates.max()
    if "exclude" in arguments:
        excluded = arguments.pop("exclude")
        arguments["weight_decay_mask"] = {part: i != excluded for i, part in enumerate(parts)}
    tx = dialect(rates.max() if dialect is dialects.dreamer else lambda count: rates[count], **arguments)
    tx = in_two(tx, *parts) if len(parts) == 2 else tx
    return scanned(tx, STEPS, lambda p, t: loss_scale(arguments) * grads(p, t), jnp.asarray(START))


def case_name(arguments: dict[str, Any], schedule: str) -> str:
    return ",".join([f"{k}={v}" for k, v in arguments.items()] + [schedule])


def cases(framework: Framework):
    """(name, arguments, learning rates) of everything that is compared."""
    for arguments, (schedule, rates) in itertools.product(framework.calls, SCHEDULES.items()):
        yield case_name(arguments, schedule), arguments, rates


def version(distribution: str) -> str:
    """The version that is installed."""
    if not distribution.startswith("@"):
        return importlib.metadata.version(distribution)
    folder = pathlib.Path(os.environ["TENSORFLOWJS"]) / "node_modules" / distribution
    return json.loads((folder / "package.json").read_text())["version"]


def is_here(name):
    """Whether a framework or distribution is installed, or must be: .ci/run names those whose absence is a failure."""
    if name in os.environ.get("RMSPROP_JAX_LIVE", "").split():
        return True
    if name in ("dreamerv3", "tensorflowjs"):  # not on PyPI
        return name.upper() in os.environ
    try:
        distributions = FRAMEWORKS[name].distributions if name in FRAMEWORKS else (name,)
        return all(importlib.metadata.version(distribution) for distribution in distributions)
    except importlib.metadata.PackageNotFoundError:
        return False


def where_it_is(name):
    """Leaves a test out where its framework is not installed. conftest.py reports those that are not."""
    return lambda test: test if is_here(name) else None
