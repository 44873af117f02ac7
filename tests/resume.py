"""A run of a small model in each framework, which can stop, hand out its checkpoint, and go on from one.

The model is a convolution and a dense layer in PyTorch's layout, so that a conversion has something to transpose.
"""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from frameworks import RATES, timm_class, torch_class

from rmsprop_jax import dialects, interop


SHAPES = {"conv.weight": (4, 2, 3, 3), "fc.weight": (3, 8), "fc.bias": (3,)}
STOP, END = 100, 200

_rng = np.random.default_rng(1)
ORIGIN = {k: _rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
_TARGET = {k: _rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
_CURVATURE = {k: np.logspace(-1, 1, int(np.prod(s))).astype(np.float32).reshape(s) for k, s in SHAPES.items()}
_NOISE = {k: (0.3 * _CURVATURE[k] * _rng.normal(size=(END, *s))).astype(np.float32) for k, s in SHAPES.items()}

Arrays = dict[str, np.ndarray]


def grads(params: Arrays, t: int) -> Arrays:
    return {k: _CURVATURE[k] * (params[k] - _TARGET[k]) + _NOISE[k][t] for k in SHAPES}


def convert(arrays):
    """To Flax: convolutions are (height, width, in, out), dense kernels (in, out)."""
    named = {k.replace("_", "."): v for k, v in arrays.items()}
    return {
        "conv": {"kernel": named["conv.weight"].transpose(2, 3, 1, 0)},
        "fc": {"kernel": named["fc.weight"].T, "bias": named["fc.bias"]},
    }


def convert_back(tree):
    return {
        "conv.weight": np.asarray(tree["conv"]["kernel"]).transpose(3, 2, 0, 1),
        "fc.weight": np.asarray(tree["fc"]["kernel"]).T,
        "fc.bias": np.asarray(tree["fc"]["bias"]),
    }


def with_underscores(tree):
    return {k.replace(".", "_"): v for k, v in convert_back(tree).items()}


def run_torch(load: Callable[[], Any]):
    def run(arguments, params, start, end, checkpoint=None):
        import torch

        ps = {k: torch.nn.Parameter(torch.from_numpy(v.copy())) for k, v in params.items()}
        optimizer = load()(list(ps.values()), lr=float(RATES.max()), **arguments)
        if checkpoint is not None:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": checkpoint})
        for t in range(start, end):
            optimizer.param_groups[0]["lr"] = float(RATES[t])
            for k, g in grads({k: p.detach().numpy() for k, p in ps.items()}, t).items():
                ps[k].grad = torch.from_numpy(g)
            optimizer.step()
        return {k: p.detach().numpy().copy() for k, p in ps.items()}, optimizer.state_dict()

    return run


def run_keras(arguments, params, start, end, checkpoint=None):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    ps = {k: keras.Variable(v, name=k.replace(".", "_")) for k, v in params.items()}
    optimizer = keras.optimizers.RMSprop(float(RATES[0]), **arguments)
    optimizer.build(list(ps.values()))
    if checkpoint is not None:
        values = dict(checkpoint)
        for variable in optimizer.variables:
            if variable.name != "learning_rate":
                variable.assign(values.pop(variable.name))
        assert not values
    for t in range(start, end):
        optimizer.learning_rate = float(RATES[t])
        g = grads({k: np.asarray(p) for k, p in ps.items()}, t)
        optimizer.apply([keras.ops.convert_to_tensor(g[k]) for k in ps], list(ps.values()))
    return {k: np.array(p) for k, p in ps.items()}, [(v.path, np.asarray(v)) for v in optimizer.variables]


def run_tensorflow1(arguments, params, start, end, checkpoint=None):
    import tensorflow as tf

    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        ps = {k: v1.get_variable(k.replace(".", "_"), initializer=v) for k, v in params.items()}
        gs = {k: v1.placeholder(tf.float32, v.shape) for k, v in params.items()}
        rate = v1.placeholder(tf.float32, ())
        optimizer = v1.train.RMSPropOptimizer(rate, **arguments)
        step = optimizer.apply_gradients([(gs[k], ps[k]) for k in ps])
        session.run(v1.global_variables_initializer())
        if checkpoint is not None:
            by_name = {v.op.name: v for v in optimizer.variables()}
            assert set(by_name) == set(checkpoint)
            for name, value in checkpoint.items():
                by_name[name].load(value, session)
        for t in range(start, end):
            g = grads(session.run(ps), t)
            session.run(step, {gs[k]: g[k] for k in ps} | {rate: RATES[t]})
        slots = {v.op.name: v for v in optimizer.variables()}
        return session.run(ps), session.run(slots)


def run_optax(arguments, params, start, end, checkpoint=None):
    tx = optax.rmsprop(lambda count: jnp.asarray(RATES)[count], **arguments)
    return run_transformation(tx, tx.init(params) if checkpoint is None else checkpoint, params, start, end)


def run_transformation(tx, state, params, start, end):
    """Any Optax transformation on the model in the framework's layout."""
    params = {k: jnp.asarray(v) for k, v in params.items()}
    for t in range(start, end):
        g = grads({k: np.asarray(p) for k, p in params.items()}, t)
        updates, state = tx.update({k: jnp.asarray(v) for k, v in g.items()}, state, params)
        params = optax.apply_updates(params, updates)
    return {k: np.asarray(p) for k, p in params.items()}, state


def run_ours(tx, state, params, start, end):
    """Ours, in Flax's layout, from and to the framework's."""
    params = convert({k: jnp.asarray(v) for k, v in params.items()})
    for t in range(start, end):
        g = convert(grads(convert_back(params), t))
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return convert_back(params), state


class Source(NamedTuple):
    distribution: str
    run: Callable[..., Any]  # (arguments, params, start, end, checkpoint) -> (params, checkpoint)
    dialect: Callable[..., Any]
    read: Callable[[Any], Any]  # checkpoint -> our state
    write: Callable[[Any], Any]  # our state -> what `run` takes
    options: list[dict[str, Any]]


NAMES = list(SHAPES)
OPTIONS = [{"momentum": 0.9}, {"momentum": 0.9, "centered": True}, {"centered": True}]

SOURCES = {
    "torch": Source(
        "torch",
        run_torch(torch_class),
        dialects.pytorch,
        lambda c: interop.from_pytorch(c, NAMES, convert),
        lambda s: interop.to_pytorch(s, NAMES, convert_back),
        [*OPTIONS, {"momentum": 0.9, "weight_decay": 0.1}],
    ),
    "timm": Source(
        "timm",
        run_torch(timm_class),
        dialects.timm,
        lambda c: interop.from_timm(c, NAMES, convert),
        lambda s: interop.to_pytorch(s, NAMES, convert_back),
        OPTIONS,
    ),
    "keras": Source(
        "keras",
        run_keras,
        dialects.keras,
        lambda c: interop.from_keras(c, convert),
        lambda s: interop.to_keras(s, with_underscores),
        OPTIONS,
    ),
    "tensorflow": Source(
        "tensorflow",
        run_tensorflow1,
        dialects.tensorflow1,
        lambda c: interop.from_tensorflow1(c, convert, STOP),
        lambda s: interop.to_tensorflow1(s, with_underscores),
        OPTIONS[:2],
    ),
}


def case_name(source: str, options: dict[str, Any]) -> str:
    return ",".join([source, *(f"{k}={v}" for k, v in options.items())])


RECORDED = pathlib.Path(__file__).parent / "golden" / "resume"


class Recorded(NamedTuple):
    middle: Arrays
    checkpoint: Any  # in the framework's own structure
    end: Arrays


def recorded(name: str, options: dict[str, Any]) -> Recorded:
    """What golden/make.py kept of a run."""
    golden = np.load(RECORDED / f"{case_name(name, options)}.npz")
    middle, end = ({k: golden[f"/{part}/{k}"] for k in SHAPES} for part in ("middle", "end"))
    entries = {k.removeprefix("/checkpoint/"): golden[k] for k in golden if k.startswith("/checkpoint/")}
    if name in ("keras", "tensorflow"):
        return Recorded(middle, list(entries.items()) if name == "keras" else entries, end)
    groups = json.loads(str(entries.pop("param_groups")))
    state: dict[int, Arrays] = {}
    for path, value in entries.items():
        _, key, slot = path.split("/")
        state.setdefault(int(key), {})[slot] = value
    return Recorded(middle, {"state": state, "param_groups": groups}, end)


CASES = [(name, options) for name, source in SOURCES.items() for options in source.options]
EPS = 1e-3


def foreign(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options with the framework's name for ε."""
    return {"epsilon" if name in ("keras", "tensorflow") else "eps": EPS} | options


def difference(a, b):
    """Largest difference, relative to the largest distance from the start."""
    return max(np.abs(a[k] - b[k]).max() for k in SHAPES) / max(np.abs(b[k] - ORIGIN[k]).max() for k in SHAPES)


def dialect_of(source, name, options):
    return source.dialect(lambda count: jnp.asarray(RATES)[count], **foreign(name, options))


def limit(name, options):
    # Keras and Optax take E[g²] - E[g]² in float32: in this run they end 2.5e-6 from float64, where we end 2.7e-7.
    return 4e-6 if name in ("keras", "optax") and options == {"centered": True} else 1e-6
