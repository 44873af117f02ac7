"""Records half-finished runs of RMSProp as frameworks save them: python tests/golden/checkpoints.py [--into FOLDER] NAME

One file for each case, checkpoints/<name>,<options>.npz: the parameters at step 100, every form of checkpoint there,
and the parameters at step 200. `<name>,others.npz` has checkpoints of other optimizers, made after one step.
It needs NumPy and the one framework, and runs on every Python from 3.7 on: old frameworks need old Pythons.
"""

import base64
import collections
import copy
import gzip
import importlib
import importlib.util
import io
import json
import os
import pathlib
import platform
import sys
import tempfile
import zipfile

import numpy as np


HERE = pathlib.Path(__file__).parent
STOP, END, EPS = 100, 200, 1e-3
RATES = np.float32([2e-2 * min((t + 1) / 20, 0.97 ** (t // 4)) for t in range(END)])
CONSTANT = float(RATES[STOP])
MOMENTUM, CENTERED = {"momentum": 0.9}, {"centered": True}
BOTH = {**MOMENTUM, **CENTERED}

# A convolution and a dense layer, in PyTorch's layout: small, and so that converting transposes.
SHAPES = {"conv.weight": (4, 2, 3, 3), "fc.weight": (3, 8), "fc.bias": (3,)}
_rng = np.random.default_rng(1)
ORIGIN = {k: _rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
_TARGET = {k: _rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
_CURVATURE = {k: np.logspace(-1, 1, int(np.prod(s))).astype(np.float32).reshape(s) for k, s in SHAPES.items()}
_NOISE = {k: (0.3 * _CURVATURE[k] * _rng.normal(size=(END,) + s)).astype(np.float32) for k, s in SHAPES.items()}


def grads(params, t):
    return {k: _CURVATURE[k] * (p - _TARGET[k]) + _NOISE[k][t] for k, p in params.items()}


# The same for a tensor that is large enough for 8 bits: 16 blocks of 256 elements, and one of 64.
TABLE = "table.weight"
TABLE_ORIGIN = np.random.default_rng(2).normal(size=(65, 64)).astype(np.float32)


def table_grads(p, t):
    curvature = np.logspace(-1, 1, p.size).astype(np.float32).reshape(p.shape)
    return (curvature * (p + 0.3 * np.random.default_rng(100 + t).normal(size=p.shape))).astype(np.float32)


class Layout:
    """Where a framework keeps the axes of PyTorch's weights."""

    def __init__(self, **axes):
        self.axes = {k.replace("_", "."): v for k, v in axes.items()}

    def to(self, arrays):
        return [np.ascontiguousarray(arrays[k].transpose(axes)) for k, axes in self.axes.items()]

    def back(self, arrays):
        return {k: np.array(x).transpose(np.argsort(axes)) for (k, axes), x in zip(self.axes.items(), arrays)}

    def grads(self, arrays, t):
        return self.to(grads(self.back(arrays), t))


KERAS = Layout(conv_weight=(2, 3, 1, 0), fc_weight=(1, 0), fc_bias=(0,))
SONNET = Layout(conv_weight=(2, 3, 1, 0), fc_bias=(0,), fc_weight=(1, 0))
PADDLE = Layout(conv_weight=(0, 1, 2, 3), fc_weight=(1, 0), fc_bias=(0,))
MLX = Layout(conv_weight=(0, 2, 3, 1), fc_weight=(0, 1), fc_bias=(0,))
TORCH = Layout(conv_weight=(0, 1, 2, 3), fc_weight=(0, 1), fc_bias=(0,))


# --- Keras and TensorFlow ---------------------------------------------------------------------------------


def keras_model(keras):
    layers = keras.layers
    conv, fc = layers.Conv2D(4, 3, use_bias=False, name="conv"), layers.Dense(3, name="fc")
    inputs = layers.Input((3, 4, 2))
    return keras.models.Model(inputs, fc(layers.Flatten()(conv(inputs))))


def h5_arrays(file):
    """The optimizer's arrays, as h5py visits them: sorted."""
    import h5py

    found = {}

    def visit(name, item):
        if name.startswith("optimizer") and isinstance(item, h5py.Dataset):
            found[name] = item[()]

    with h5py.File(file, "r") as opened:
        opened.visititems(visit)
    return found


def keras_files(model, folder):
    """The files in which Keras saves a model with its optimizer; old ones have no .keras."""
    model.save(folder + "/model.h5")
    saved = {"h5": h5_arrays(folder + "/model.h5")}
    try:
        model.save(folder + "/model.keras")
        with zipfile.ZipFile(folder + "/model.keras") as opened:
            saved["keras"] = h5_arrays(io.BytesIO(opened.read("model.weights.h5")))
    except (zipfile.BadZipFile, KeyError):
        pass
    return saved


def read(tf, path):
    reader = tf.train.load_checkpoint(path)
    return {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}


def saved_model(tf, model, folder):
    """The checkpoint in a SavedModel; Keras 3 saves none."""
    try:
        model.save(folder + "/saved")
    except ValueError:
        return {}
    return {"saved_model": read(tf, folder + "/saved/variables/variables")}


def tensorflow_run(make, layout=KERAS, network=None, files=False):
    """A run under TensorFlow: `make` gets TensorFlow, the rate and the options, and returns an optimizer and a setter of its rate."""

    def start(options):
        import tensorflow as tf

        model = (network or keras_model_of)(tf)
        weights = model.trainable_variables
        for variable, value in zip(weights, layout.to(ORIGIN)):
            variable.assign(value)
        apply, set_rate, optimizer = make(tf, float(RATES[0]), **options)

        def advance(t):
            set_rate(float(RATES[t]))
            g = layout.grads([w.numpy() for w in weights], t)
            apply([tf.constant(x) for x in g], weights)

        def saved():
            with tempfile.TemporaryDirectory() as folder:
                path = tf.train.Checkpoint(model=model, optimizer=optimizer).save(folder + "/checkpoint")
                forms = {"checkpoint": read(tf, path)}
                if files:
                    model.compile(optimizer=optimizer, loss="mse")
                    variables = optimizer.variables() if callable(optimizer.variables) else optimizer.variables
                    forms["variables"] = {getattr(v, "path", v.name): v.numpy() for v in variables}
                    forms.update(keras_files(model, folder))
                    forms.update(saved_model(tf, model, folder))
                return forms

        return advance, lambda: layout.back([w.numpy() for w in weights]), saved

    return start


def keras_model_of(tf):
    return keras_model(tf.keras)


def keras_optimizer(module, name="RMSprop"):
    """Keras' class `name` of the module that `module` finds in TensorFlow; `mixed`: in the loss scaler of `mixed_float16`."""

    def make(tf, rate, mixed=False, **options):
        inner = getattr(module(tf), name)(rate, **options)
        scalers = (
            tf.keras.optimizers if hasattr(tf.keras.optimizers, "LossScaleOptimizer") else tf.keras.mixed_precision
        )
        optimizer = scalers.LossScaleOptimizer(inner) if mixed else inner

        def set_rate(value):
            inner.learning_rate = value

        def apply(gs, ws):
            if mixed and hasattr(optimizer, "get_scaled_loss"):  # before Keras 3
                gs = optimizer.get_unscaled_gradients([optimizer.get_scaled_loss(g) for g in gs])
            elif mixed:
                gs = [optimizer.scale_loss(g) for g in gs]
            optimizer.apply_gradients(list(zip(gs, ws)))

        return apply, set_rate, optimizer

    return make


def tensorflow1_optimizer(name):
    def make(tf, rate, **options):
        variable = tf.Variable(rate)
        optimizer = getattr(tf.compat.v1.train, name)(lambda: variable, **options)
        return lambda gs, ws: optimizer.apply_gradients(list(zip(gs, ws))), variable.assign, optimizer

    return make


def tensorflow1_graph():
    """A graph and a session, as version 1 has them."""

    def start(options):
        import tensorflow as tf

        v1 = tf.compat.v1
        with tf.Graph().as_default() as graph:
            ps = {k: v1.get_variable(k.replace(".", "_"), initializer=v) for k, v in ORIGIN.items()}
            gs = {k: v1.placeholder(tf.float32, v.shape) for k, v in ORIGIN.items()}
            rate = v1.placeholder(tf.float32, ())
            optimizer = v1.train.RMSPropOptimizer(rate, **options)
            update = optimizer.apply_gradients([(gs[k], ps[k]) for k in ps])
            slots = {v.op.name: v for v in optimizer.variables()}
            session = v1.Session(graph=graph)
            session.run(v1.global_variables_initializer())

        def advance(t):
            g = grads(session.run(ps), t)
            session.run(update, dict([(gs[k], g[k]) for k in g] + [(rate, RATES[t])]))

        return advance, lambda: session.run(ps), lambda: {"slots": session.run(slots)}

    return start


def sonnet_model(tf):
    import sonnet as snt

    class Net(snt.Module):
        def __init__(self):
            super().__init__(name="net")
            self.conv = snt.Conv2D(4, 3, with_bias=False, padding="VALID", name="conv")
            self.fc = snt.Linear(3, name="fc")

    net = Net()
    net.fc(tf.reshape(net.conv(tf.ones((1, 3, 4, 2))), (1, 8)))
    return net


def sonnet_optimizer(name):
    def make(tf, rate, **options):
        import sonnet as snt

        variable = tf.Variable(rate, name="learning_rate")
        optimizer = getattr(snt.optimizers, name)(variable, **options)
        return optimizer.apply, variable.assign, optimizer

    return make


def keras2(name="RMSprop"):
    """Keras before it was TensorFlow's: 2.3 and older."""

    def start(options):
        import keras
        from keras import backend

        model = keras_model(keras)
        model.set_weights(KERAS.to(ORIGIN))
        optimizer = getattr(keras.optimizers, name)(lr=float(RATES[0]), **options)
        model.compile(optimizer, "mse")
        gs = [backend.placeholder(backend.int_shape(w)) for w in model.trainable_weights]
        loss = sum(backend.sum(g * w) for g, w in zip(gs, model.trainable_weights))
        step = backend.function(gs, [loss], optimizer.get_updates(loss, model.trainable_weights))

        def advance(t):
            backend.set_value(optimizer.lr, float(RATES[t]))
            step(KERAS.grads(model.get_weights(), t))

        def saved():
            with tempfile.TemporaryDirectory() as folder:
                model.save(folder + "/model.h5")
                weights = {str(i): x for i, x in enumerate(optimizer.get_weights())}
                return {"weights": weights, "h5": h5_arrays(folder + "/model.h5")}

        return advance, lambda: KERAS.back(model.get_weights()), saved

    return start


# --- PyTorch, Paddle, MindSpore, MLX ----------------------------------------------------------------------


def past_init(module):
    """A module of a package whose __init__ imports more than its optimizer needs: torch alone."""
    packages = module.split(".")[:-1]
    for i in range(len(packages)):
        name = ".".join(packages[: i + 1])
        sys.modules[name] = importlib.util.module_from_spec(importlib.util.find_spec(name))
    return importlib.import_module(module)


def torch_run(find, table=False):
    """A run of the class that `find` returns; with a tensor that is large enough for 8 bits, or without."""

    def start(options):
        import torch

        origin = {**ORIGIN, TABLE: TABLE_ORIGIN} if table else ORIGIN
        ps = {k: torch.nn.Parameter(torch.from_numpy(v.copy())) for k, v in origin.items()}
        optimizer = find()(list(ps.values()), lr=float(RATES.max()), **options)

        def params():
            return {k: p.detach().numpy().copy() for k, p in ps.items()}

        def advance(t):
            optimizer.param_groups[0]["lr"] = float(RATES[t])
            now = params()
            g = grads({k: now[k] for k in SHAPES}, t)
            if table:
                g[TABLE] = table_grads(now[TABLE], t)
            for k, p in ps.items():
                p.grad = torch.from_numpy(g[k])
            optimizer.step()

        def saved():
            forms = {"state_dict": optimizer.state_dict()}
            if table:
                forms["last rows of nu"] = {"nu": decoded(optimizer.state[ps[TABLE]])[-6:]}
            return forms

        return advance, params, saved

    return start


def torch(name="RMSprop"):
    return torch_run(lambda: getattr(importlib.import_module("torch.optim"), name))


def timm():
    # timm imports torchvision, which CPU builds lack.
    return torch_run(lambda: past_init("timm.optim.rmsprop_tf").RMSpropTF)


def bitsandbytes(name):
    table = name.endswith("8bit")  # small tensors stay in 32
    return torch_run(lambda: getattr(importlib.import_module("bitsandbytes.optim"), name), table)


def decoded(state):
    import bitsandbytes as bnb

    return bnb.functional.dequantize_blockwise(
        state["state1"], absmax=state["absmax1"], code=state["qmap1"], blocksize=256
    )


def paddle(name="RMSProp", scheduler=True):
    def start(options):
        import paddle as pd

        net = pd.nn.Layer()
        net.conv = pd.nn.Conv2D(2, 4, 3, bias_attr=False)
        net.fc = pd.nn.Linear(8, 3)
        weights = [net.conv.weight, net.fc.weight, net.fc.bias]
        for weight, value in zip(weights, PADDLE.to(ORIGIN)):
            weight.set_value(value)
        rates = pd.optimizer.lr.LambdaDecay(1.0, lambda epoch: float(RATES[min(epoch, END - 1)]))
        rate = rates if scheduler else CONSTANT
        optimizer = getattr(pd.optimizer, name)(rate, parameters=net.parameters(), **options)

        def advance(t):
            g = PADDLE.grads([w.numpy() for w in weights], t)
            sum((w * pd.to_tensor(x)).sum() for w, x in zip(weights, g)).backward()
            optimizer.step()
            optimizer.clear_grad()
            if scheduler:
                rates.step()

        def saved():
            with tempfile.TemporaryDirectory() as folder:
                pd.save(optimizer.state_dict(), folder + "/net.pdopt")
                names = {p.name: k for k, p in net.named_parameters()}
                return {"pdopt": pd.load(folder + "/net.pdopt", return_numpy=True), "names": names}

        return advance, lambda: PADDLE.back([w.numpy() for w in weights]), saved

    return start


def mindspore(name="RMSProp", scheduled=True):
    def start(options):
        import mindspore as ms
        from mindspore import nn, Tensor

        class Net(nn.Cell):
            def __init__(self):
                super().__init__()
                self.conv, self.fc = nn.Conv2d(2, 4, 3, has_bias=False), nn.Dense(8, 3)

        net = Net()
        weights = [net.conv.weight, net.fc.weight, net.fc.bias]
        for weight, value in zip(weights, TORCH.to(ORIGIN)):
            weight.set_data(Tensor(value))
        rate = [float(r) for r in RATES] if scheduled else CONSTANT
        optimizer = getattr(nn, name)(net.trainable_params(), learning_rate=rate, **options)

        def advance(t):
            g = TORCH.grads([w.asnumpy() for w in weights], t)
            optimizer(tuple(Tensor(x) for x in g))

        def saved():
            with tempfile.TemporaryDirectory() as folder:
                ms.save_checkpoint(optimizer, folder + "/optimizer.ckpt")
                loaded = ms.load_checkpoint(folder + "/optimizer.ckpt")
                return {"ckpt": {k: v.asnumpy() for k, v in loaded.items()}}

        return advance, lambda: TORCH.back([w.asnumpy() for w in weights]), saved

    return start


def mlx(name="RMSprop"):
    def start(options):
        import mlx.core as mx
        import mlx.nn as nn
        import mlx.optimizers as optim
        from mlx.utils import tree_flatten

        net = nn.Module()
        net.conv, net.fc = nn.Conv2d(2, 4, 3, bias=False), nn.Linear(8, 3)
        net.conv.weight, net.fc.weight, net.fc.bias = (mx.array(x) for x in MLX.to(ORIGIN))
        optimizer = getattr(optim, name)(float(RATES[0]), **options)

        def now():
            return [np.array(w) for w in (net.conv.weight, net.fc.weight, net.fc.bias)]

        def advance(t):
            optimizer.learning_rate = mx.array(RATES[t])
            conv, fc, bias = (mx.array(g) for g in MLX.grads(now(), t))
            optimizer.update(net, {"conv": {"weight": conv}, "fc": {"weight": fc, "bias": bias}})

        def saved():
            with tempfile.TemporaryDirectory() as folder:
                file = folder + "/optimizer.safetensors"
                mx.save_safetensors(file, dict(tree_flatten(optimizer.state)))
                return {"safetensors": {k: np.array(v) for k, v in mx.load(file).items()}}

        return advance, lambda: MLX.back(now()), saved

    return start


# --- The rows: name, the run, its cases, and other optimizers with the same kind of checkpoint ------------


def tf_keras(module, files=True):
    run = lambda name="RMSprop": tensorflow_run(keras_optimizer(module, name), files=files)  # noqa: E731
    return run


def optimizers(tf):
    return tf.keras.optimizers


def legacy(tf):
    return tf.keras.optimizers.legacy


def sonnet(name="RMSProp"):
    return tensorflow_run(sonnet_optimizer(name), SONNET, sonnet_model)


def tensorflow1(name="RMSProp"):
    return tensorflow_run(tensorflow1_optimizer(name + "Optimizer"), SONNET, sonnet_model)


EPSILON = {"epsilon": EPS}
TORCHS = [dict(o, eps=EPS) for o in (MOMENTUM, BOTH, CENTERED)]
ALL = [{**o, **EPSILON} for o in (MOMENTUM, BOTH, CENTERED)]
MIXED = [{**MOMENTUM, **EPSILON, "mixed": True}]
OTHERS = {"Adam": {}, "SGD": MOMENTUM, "Adagrad": {}, "Adadelta": {}, "Ftrl": {}}

Row = collections.namedtuple("Row", "modules make cases others")  # make: from the name of an optimizer to its run

ROWS = {
    "keras-2.3": Row(["keras", "tensorflow"], keras2, [EPSILON], {"Adam": {}, "SGD": MOMENTUM, "Adagrad": {}}),
    "tf.keras-2.10": Row(["keras", "tensorflow"], tf_keras(optimizers), ALL + MIXED, OTHERS),
    "tf.keras-2.15": Row(["keras", "tensorflow"], tf_keras(optimizers), ALL + MIXED, OTHERS),
    "tf.keras-2.15-legacy": Row(["keras", "tensorflow"], tf_keras(legacy), ALL[:1], {}),
    "keras-3": Row(["keras", "tensorflow"], tf_keras(optimizers), ALL + MIXED, OTHERS),
    "sonnet": Row(["sonnet", "tensorflow"], sonnet, ALL[:2], {"Adam": {}, "SGD": {}, "Momentum": MOMENTUM}),
    "tensorflow1": Row(
        ["tensorflow"],
        tensorflow1,
        ALL[:2],
        {"Adam": {}, "Momentum": MOMENTUM, "Adagrad": {}},
    ),
    "tensorflow1-graph": Row(["tensorflow"], tensorflow1_graph, ALL[:2], {}),
    "torch": Row(
        ["torch"],
        torch,
        TORCHS + [dict(MOMENTUM, weight_decay=0.1, eps=EPS)],
        {"Adam": {}, "SGD": MOMENTUM, "Adagrad": {}},
    ),
    "timm": Row(["timm.version", "torch"], timm, TORCHS, {}),
    "bitsandbytes-32bit": Row(
        ["bitsandbytes", "torch"], bitsandbytes, [{"eps": EPS}], {"Adam32bit": {}, "Lion32bit": {}}
    ),
    "bitsandbytes-8bit": Row(["bitsandbytes", "torch"], bitsandbytes, [{"eps": EPS}], {}),
    "paddle": Row(
        ["paddle"], paddle, ALL, {"Adam": {}, "Momentum": MOMENTUM, "Adagrad": {}, "Adamax": {}, "Adadelta": {}}
    ),
    "paddle-constant": Row(["paddle"], lambda name="RMSProp": paddle(name, scheduler=False), ALL[:1], {}),
    # With ε at its default, because the vectorized part of its CPU kernel puts it outside the root.
    "mindspore": Row(
        ["mindspore"],
        mindspore,
        [MOMENTUM, BOTH, CENTERED],
        {"Adam": {}, "SGD": MOMENTUM, "Adagrad": {}, "Momentum": MOMENTUM},
    ),
    "mindspore-constant": Row(["mindspore"], lambda name="RMSProp": mindspore(name, scheduled=False), [MOMENTUM], {}),
    "mlx": Row(
        ["mlx.core"], mlx, [{"eps": EPS}], {"Adam": {}, "SGD": MOMENTUM, "Adagrad": {}, "AdaDelta": {}, "Lion": {}}
    ),
}
NAMES = {"bitsandbytes-32bit": "RMSprop32bit", "bitsandbytes-8bit": "RMSprop8bit"}


def encode(x):
    """What JSON does not know: arrays, PyTorch's too, and bytes."""
    if isinstance(x, bytes):
        return {"bytes": base64.b64encode(x).decode()}
    x = np.asarray(x.detach().numpy() if hasattr(x, "detach") else x, order="C")
    return {"dtype": x.dtype.str, "shape": x.shape, "base64": base64.b64encode(x.tobytes()).decode()}


def decode(x):
    if "bytes" in x:
        return base64.b64decode(x["bytes"])
    if "base64" in x:
        return np.frombuffer(base64.b64decode(x["base64"]), x["dtype"]).reshape(x["shape"])
    return x


def recorded(name, folder=HERE / "checkpoints"):
    """What a file holds."""
    return json.loads(gzip.decompress((folder / (name + ".json.gz")).read_bytes()), object_hook=decode)


def case_name(name, options):
    return ",".join([name] + ["%s=%s" % item for item in options.items() if item[0] not in ("eps", "epsilon")])


def write(name, folder):
    modules, make, cases, others = ROWS[name]
    run = make(NAMES[name]) if name in NAMES else make()
    for options in cases:
        advance, params, saved = run(options)
        for t in range(STOP):
            advance(t)
        middle, checkpoint = params(), copy.deepcopy(saved())  # PyTorch goes on in the same tensors
        for t in range(STOP, END):
            advance(t)
        save(folder, case_name(name, options), modules, {"middle": middle, "checkpoint": checkpoint, "end": params()})
    checkpoints = {}
    for other, options in others.items():
        advance, _, saved = make(other)(options)
        advance(0)
        checkpoints[other] = saved()
    if checkpoints:
        save(folder, name + ",others", modules, checkpoints)


def save(folder, name, modules, tree):
    versions = {m.partition(".")[0]: importlib.import_module(m).__version__ for m in modules + ["numpy"]}
    versions["python"] = platform.python_version()
    text = json.dumps(dict(tree, versions=versions), default=encode)
    file = folder / (name + ".json.gz")
    with gzip.GzipFile(str(file), "wb", mtime=0) as opened:
        opened.write(text.encode())
    print(file.name, versions, file.stat().st_size, "bytes")


if __name__ == "__main__":
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    elsewhere = sys.argv[1] == "--into"
    folder, names = (pathlib.Path(sys.argv[2]), sys.argv[3:]) if elsewhere else (HERE / "checkpoints", sys.argv[1:])
    for name in names:
        write(name, folder)
