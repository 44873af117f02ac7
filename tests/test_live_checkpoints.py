"""Checkpoints that the installed frameworks write here and now: they are as recorded, and runs are resumed from every form."""

import copy
import functools
import importlib.metadata
import inspect
import io
import json
import os
import pathlib
import subprocess
import sys
import zipfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from frameworks import FRAMEWORKS, is_here, RATES, StableBaselines3, Timm, Torch, where_it_is
from golden import checkpoints
from golden.checkpoints import case_name, END, EPS, ORIGIN, recorded, ROWS, STOP
from recordings import difference, from_torch_layout, LIMIT, run

from rmsprop_jax import carry_over, dialects, interop


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("users_climate")]


# --- As recorded ------------------------------------------------------------------------------------------


def distribution(module):
    module = module.partition(".")[0]
    return {"sonnet": "dm-sonnet", "paddle": "paddlepaddle"}.get(module, module)


def is_as_recorded(name):
    """Whether the versions are installed that the recording was made with."""
    versions = recorded(case_name(name, ROWS[name].cases[0]))["versions"]
    modules = {module.partition(".")[0] for module in ROWS[name].modules}
    try:
        return all(importlib.metadata.version(distribution(module)) == versions[module] for module in modules)
    except importlib.metadata.PackageNotFoundError:
        return False


RECORDED = [name for name in ROWS if is_as_recorded(name)]


def leaves(tree, path=""):
    """Arrays and names by path. An object graph is bytes, whose order TensorFlow does not promise."""
    if isinstance(tree, dict):
        return {k: x for key, value in tree.items() for k, x in leaves(value, f"{path}/{key}").items()}
    return {} if isinstance(tree, bytes) else {path: tree}


def test_what_must_be_here_is():
    must = set(os.environ.get("RMSPROP_JAX_LIVE", "").split())  # by distribution, as in .noxfile.py
    distributions = {name: {distribution(module) for module in row.modules} for name, row in ROWS.items()}
    assert must & set().union(*distributions.values()) <= set().union(*(distributions[name] for name in RECORDED))


if RECORDED:

    @pytest.mark.parametrize("name", RECORDED)
    def test_the_framework_saves_what_was_recorded(name, tmp_path):
        # Each in a process of its own: they do not get along in one.
        command = [sys.executable, checkpoints.__file__, "--into", tmp_path, name]
        environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}  # others want Keras on JAX
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        files = [file.name.removesuffix(".json.gz") for file in pathlib.Path(tmp_path).iterdir()]
        assert files
        for file in files:
            now, then = (leaves(recorded(file, *folder)) for folder in ((tmp_path,), ()))
            assert set(now) == set(then)
            for path, x in then.items():
                if path.startswith("/versions"):
                    continue
                if isinstance(x, np.ndarray) and x.dtype == np.uint8:  # codes: one step apart where rounding differs
                    assert np.mean(x != now[path]) < 0.01
                elif isinstance(x, np.ndarray):
                    np.testing.assert_allclose(now[path], x, rtol=1e-4, atol=1e-6, err_msg=f"{file} {path}")
                else:
                    assert str(now[path]) == str(x)


# --- Both ways --------------------------------------------------------------------------------------------


def run_framework(name, arguments, arrays, start, end, checkpoint=None):
    """The framework's parameters and checkpoint after the steps from `start` to `end`."""
    runner = FRAMEWORKS[name].runner(arrays, RATES, arguments)
    if checkpoint is not None:
        runner.load(checkpoint)
    for t in range(start, end):
        runner.step(checkpoints.grads(runner.params(), t), RATES[t])
    return runner.params(), runner.checkpoint()


def test_live_runs_are_resumed_here_and_go_back(subtests):
    for name, framework in FRAMEWORKS.items():
        for options in framework.resumed if is_here(name) else ():
            with subtests.test(case_name(name, options)):
                both_ways(name, framework, options)


def both_ways(name, framework, options):
    epsilon = "epsilon" if "epsilon" in inspect.signature(framework.dialect).parameters else "eps"
    arguments = {epsilon: EPS, **options}
    tx = framework.dialect(lambda count: jnp.asarray(RATES)[count], **arguments)
    # Keras takes E[g²] - E[g]² in float32.
    accepted = 4e-6 if name == "keras" and options == {"centered": True} else LIMIT
    middle, checkpoint = run_framework(name, arguments, ORIGIN, 0, STOP)
    theirs, _ = run_framework(name, arguments, ORIGIN, 0, END)
    ours, _ = run(tx, framework.read(checkpoint), middle)
    assert difference(ours, theirs) < accepted
    # And back: we make the first half, the framework goes on from our state.
    middle, state = run(tx, tx.init(from_torch_layout(ORIGIN)), ORIGIN, 0, STOP)
    back, _ = run_framework(name, arguments, middle, STOP, END, framework.write(state))
    assert difference(back, theirs) < accepted


# --- As they come -----------------------------------------------------------------------------------------


def torch_model():
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))


def torch_steps(model, optimizer, first, last, noise=0.3):
    import torch

    for t in range(first, last):
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(16, 3, generator=generator)
        loss = (model(x) - noise * x[:, :2]).square().mean()
        optimizer.zero_grad()
        (-loss if optimizer.param_groups[0].get("maximize") else loss).backward()
        optimizer.step()


def torch_gradient(params, t, maximize=False):
    import torch

    x = jnp.asarray(torch.randn(16, 3, generator=torch.Generator().manual_seed(t)).numpy())

    def loss(p):
        h = jnp.tanh(x @ p["0.weight"].T + p["0.bias"])
        h = h @ p["2.weight"].T + p["2.bias"]
        out = h @ p["3.weight"].T + p["3.bias"]
        return (-1 if maximize else 1) * ((out - 0.3 * x[:, :2]) ** 2).mean()

    return jax.grad(loss)(params)


def weights(model):
    return {name: jnp.asarray(p.detach().float().numpy()) for name, p in model.named_parameters()}


MOVING = {"lr": 3e-3, "alpha": 0.9, "eps": 1e-3, "momentum": 0.9, "centered": True}


def torch_cases():
    """Groups as people make them, and the transformation that goes on."""
    import torch

    RMSprop = torch.optim.RMSprop

    def by_decay(model):
        decay = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim < 2]
        return RMSprop([{"params": rest}, {"params": decay, "weight_decay": 0.1}], **MOVING)

    def by_name(model):
        named = list(model.named_parameters())
        groups = [
            {"params": [n for n in named if "bias" in n[0]]},
            {"params": [n for n in named if "bias" not in n[0]]},
        ]
        return RMSprop(groups, **MOVING)

    def two_kinds(model):
        head = {"params": model[3].parameters(), "momentum": 0.5, "centered": False}
        return RMSprop([head, {"params": [*model[0].parameters(), *model[2].parameters()]}], **MOVING)

    def frozen(model):
        model[0].requires_grad_(False)
        return RMSprop(model.parameters(), **MOVING)

    pytorch = functools.partial(dialects.pytorch, **MOVING)
    labels = {f"{i}.{kind}": "head" if i == 3 else "body" for i in (0, 2, 3) for kind in ("weight", "bias")}
    return {
        "groups by decay, not in the model's order": (
            by_decay,
            pytorch(weight_decay=0.1, weight_decay_mask=lambda params: {k: p.ndim > 1 for k, p in params.items()}),
        ),
        "named parameters": (by_name, pytorch()),
        "groups with other momentum and centering": (
            two_kinds,
            optax.partition(
                {"body": pytorch(), "head": dialects.pytorch(**MOVING | {"momentum": 0.5, "centered": False})}, labels
            ),
        ),
        "a frozen layer": (
            frozen,
            optax.partition(
                {"body": pytorch(), "frozen": optax.set_to_zero()},
                {k: "frozen" if k[0] == "0" else "body" for k in labels},
            ),
        ),
        "maximize": (lambda model: RMSprop(model.parameters(), maximize=True, **MOVING), pytorch(maximize=True)),
    }


@where_it_is("torch")
def test_live_torch_checkpoints_as_they_come(subtests):
    for name, (make, tx) in torch_cases().items():
        with subtests.test(name):
            model = torch_model()
            optimizer = make(model)
            torch_steps(model, optimizer, 0, 100)
            name_of = {p: n for n, p in model.named_parameters()}
            stored = "param_names" in optimizer.state_dict()["param_groups"][0]
            weights_in_order = {name_of[p]: p for group in optimizer.param_groups for p in group["params"]}
            names = None if stored else weights_in_order
            assert stored == (name == "named parameters")
            start = params = weights(model)
            state = interop.from_pytorch(optimizer.state_dict(), names)
            state = carry_over(state, tx.init(params))
            torch_steps(model, optimizer, 100, 200)
            for t in range(100, 200):
                updates, state = tx.update(torch_gradient(params, t, name == "maximize"), state, params)
                params = optax.apply_updates(params, updates)
            end = weights(model)
            way = max(float(jnp.abs(end[k] - start[k]).max()) for k in end)
            gap = max(float(jnp.abs(end[k] - params[k]).max()) for k in end) / way
            print(f"{name}: {gap:.1e}")
            assert gap < 1e-5  # the two compute the gradients of a network


@where_it_is("torch")
def test_live_torch_half_precision_and_foreign_optimizers():
    import torch

    for dtype in (torch.float16, torch.bfloat16):
        p = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        optimizer = torch.optim.RMSprop([("w", p)], eps=1e-3)
        p.grad = torch.full_like(p, 0.5)
        optimizer.step()
        state = interop.from_pytorch(optimizer.state_dict())
        np.testing.assert_allclose(state.nu["w"], 0.0025, rtol=1e-2)
    for make in (
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.SGD,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
        torch.optim.NAdam,
    ):
        optimizer = make([p], lr=0.1)
        p.grad = torch.ones_like(p)
        optimizer.step()
        with pytest.raises(ValueError, match="not the checkpoint of RMSprop, but of"):
            interop.from_pytorch(optimizer.state_dict(), ["w"])


def keras_model(keras, names=("a", "b")):
    return keras.Sequential([keras.layers.Input((3,)), *(keras.layers.Dense(3, name=name) for name in names)])


@where_it_is("keras")
def test_live_keras_checkpoints_as_they_come(tmp_path, subtests):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    x, y = np.random.default_rng(0).normal(size=(2, 12, 3)).astype(np.float32)

    def trained(optimizer, epochs=4):
        model = keras_model(keras)
        model.compile(optimizer, "mse")
        model.fit(x, y, batch_size=4, epochs=epochs, verbose=0, shuffle=False)
        return model

    def read(model, **options):
        return interop.from_keras([(v.path, np.asarray(v)) for v in model.optimizer.variables], **options)

    with subtests.test("use_ema"):
        state = read(trained(keras.optimizers.RMSprop(momentum=0.9, use_ema=True)))
        assert state.count == 12
        assert len(state.trace) == 4
    with subtests.test("accumulation"):
        model = trained(keras.optimizers.RMSprop(gradient_accumulation_steps=3))
        assert read(model, gradient_accumulation_steps=3).count == 4
        with pytest.raises(ValueError, match="gradient_accumulation_steps=None, but the optimizer has 4"):
            read(model)
    with subtests.test("mixed_float16"):
        keras.mixed_precision.set_global_policy("mixed_float16")
        try:
            model = trained(keras.optimizers.RMSprop(momentum=0.9))
            state = read(model)
        finally:
            keras.mixed_precision.set_global_policy("float32")
        assert len(state.nu) == len(state.trace) == 4
        # The scaler skips steps that overflow.
        assert state.count == int(model.optimizer.inner_optimizer.iterations) > 8
    with subtests.test("a .keras file"):
        model = trained(keras.optimizers.RMSprop(centered=True))
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        jax.tree.map(np.testing.assert_array_equal, list(read(loaded).nu.values()), list(read(model).nu.values()))
    with subtests.test("a .weights.h5 file"):
        model.save_weights(tmp_path / "model.weights.h5")
        other = trained(keras.optimizers.RMSprop(centered=True), epochs=1)
        other.load_weights(tmp_path / "model.weights.h5")
        jax.tree.map(np.testing.assert_array_equal, list(read(other).nu.values()), list(read(model).nu.values()))
    with subtests.test("two layers of one name"):
        layers = [keras.layers.Dense(3, name="d") for _ in range(2)]
        optimizer = keras.optimizers.RMSprop()
        optimizer.build([v for layer in layers for v in (layer(x), layer.trainable_variables)[1]])
        with pytest.raises(ValueError, match="the checkpoint has .*d_kernel_velocity, .* twice"):
            interop.from_keras([(v.path, np.asarray(v)) for v in optimizer.variables])
    for other in (
        keras.optimizers.Adam(),
        keras.optimizers.SGD(momentum=0.9),
        keras.optimizers.Nadam(),
        keras.optimizers.Adagrad(),
    ):
        with (
            subtests.test(other.name),
            pytest.raises(ValueError, match=f"not the variables of Keras' RMSprop, but of {other.name}"),
        ):
            read(trained(other, 1))


@where_it_is("tf-keras")
def test_live_legacy_tf_keras_variables():
    import tf_keras

    optimizer = tf_keras.optimizers.legacy.RMSprop(0.01, momentum=0.9, centered=True, epsilon=1e-3)
    model = tf_keras.Sequential([tf_keras.layers.Dense(2, name="d", input_shape=(3,))])
    model.compile(optimizer, "mse")
    model.fit(np.ones((4, 3)), np.ones((4, 2)), epochs=3, verbose=0)
    state = interop.from_keras([(v.name, v.numpy()) for v in optimizer.variables()])
    assert state.count == 3
    assert sorted(state.nu) == sorted(state.mu) == sorted(state.trace) == ["d/bias", "d/kernel"]


@where_it_is("tensorflow")
def test_live_tensorflow_checkpoint_with_other_variables(tmp_path):
    import tensorflow as tf

    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        w = v1.get_variable("scope/w", initializer=np.ones((3, 2), np.float32))
        global_step = v1.train.get_or_create_global_step()
        step = v1.train.RMSPropOptimizer(0.1, momentum=0.9).minimize(v1.reduce_sum(w * w), global_step)
        average = v1.train.ExponentialMovingAverage(0.9).apply([w])
        session.run(v1.global_variables_initializer())
        for _ in range(5):
            session.run([step, average])
        path = v1.train.Saver().save(session, str(tmp_path / "model"))
        expected = session.run({v.op.name: v for v in v1.global_variables()})
    reader = tf.train.load_checkpoint(path)
    slots = {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}
    assert "scope/w/ExponentialMovingAverage" in slots
    state = interop.from_tensorflow1(slots)
    assert state.count == 5
    np.testing.assert_array_equal(state.nu["scope/w"], expected["scope/w/RMSProp"])
    np.testing.assert_array_equal(state.trace["scope/w"], expected["scope/w/RMSProp_1"])


@where_it_is("stable-baselines3")
def test_live_stable_baselines3_zip(tmp_path):
    import gymnasium
    import torch
    from stable_baselines3 import A2C
    from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

    policy = {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"alpha": 0.99, "eps": 1e-5}}
    model = A2C("MlpPolicy", gymnasium.make("CartPole-v1"), policy_kwargs=policy, device="cpu").learn(100)
    model.save(tmp_path / "a2c.zip")
    with zipfile.ZipFile(tmp_path / "a2c.zip") as file, file.open("policy.optimizer.pth") as pth:
        checkpoint = torch.load(io.BytesIO(pth.read()), weights_only=True)
    name_of = {p: n for n, p in model.policy.named_parameters()}
    names = [name_of[p] for group in model.policy.optimizer.param_groups for p in group["params"]]
    state = interop.from_stable_baselines3(checkpoint, names)
    assert state.count == 20
    for name, p in model.policy.named_parameters():
        np.testing.assert_allclose(state.nu[name], model.policy.optimizer.state[p]["square_avg"].numpy(), rtol=1e-6)


# --- In every form ----------------------------------------------------------------------------------------


class Pair(NamedTuple):
    real: np.ndarray
    imaginary: np.ndarray


@where_it_is("torch")
def test_torch_optimizers_as_people_save_them():
    import torch

    model = torch_model()
    optimizer = torch.optim.RMSprop(model.parameters(), **MOVING)
    torch_steps(model, optimizer, 0, 5)
    expected = interop.from_pytorch(optimizer.state_dict(), dict(model.named_parameters()))
    assert expected.count == 5
    # Without state_dict: the keys are the parameters themselves, which need no order.
    raw = {"state": optimizer.state, "param_groups": optimizer.param_groups}
    shuffled = dict(reversed(list(model.named_parameters())))
    for names in (shuffled, model.named_parameters(), [name for name, _ in model.named_parameters()]):
        found = interop.from_pytorch(raw, names)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    # Through files: numbers become strings, or arrays.
    kept = json.loads(json.dumps(optimizer.state_dict(), default=lambda x: x.tolist()))
    found = interop.from_pytorch(kept, model.named_parameters())
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, expected)
    arrays = {**optimizer.state_dict(), "param_groups": [{**optimizer.state_dict()["param_groups"][0]}]}
    arrays["param_groups"][0]["params"] = torch.arange(6)
    jax.tree.map(np.testing.assert_array_equal, interop.from_pytorch(arrays, model.named_parameters()), expected)


@where_it_is("torch")
def test_a_live_torch_optimizer_and_its_model():
    """The head comes first in the optimizer, a bias is tied, a weight is frozen, and a buffer is optimized."""
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].bias = model[0].bias
    model[0].weight.requires_grad_(False)
    model.register_buffer("scale", torch.ones(4, requires_grad=True))
    groups = [{"params": [*model[2].parameters(), model.scale]}, {"params": model[:2].parameters(), "momentum": 0.9}]
    optimizer = torch.optim.RMSprop(groups, lr=3e-3)
    for _ in range(5):
        optimizer.zero_grad()
        (model(torch.randn(16, 4)) * model.scale).square().mean().backward()
        optimizer.step()
    state = interop.from_pytorch(optimizer, model)
    expected = {name: optimizer.state.get(p) for name, p in [*model.named_parameters(), ("scale", model.scale)]}
    assert set(state.nu) == set(expected)
    tensors = model.state_dict() | {"scale": model.scale.data}  # others, of the same memory
    del tensors["1.bias"]
    jax.tree.map(np.testing.assert_array_equal, interop.from_pytorch(optimizer, tensors), state)
    with pytest.raises(ValueError, match="the optimizer has other tensors than names"):
        interop.from_pytorch(optimizer, copy.deepcopy(model))
    with pytest.raises(ValueError, match="names has Parameter"):
        interop.from_pytorch(optimizer, model.parameters())
    for name, entry in expected.items():
        np.testing.assert_array_equal(state.nu[name], entry["square_avg"].numpy() if entry else np.zeros((4, 4)))
    with pytest.raises(ValueError, match="shapes do not tell which weight is which"):
        interop.from_pytorch(optimizer.state_dict(), {name: torch.ones(4, 4) for name in expected})


@where_it_is("torch")
@pytest.mark.parametrize("kind", ["sparse", "csr", "quantized", "bfloat16", "DTensor", "meta", "fake"])
def test_torch_tensors_of_other_kinds(kind):
    import torch
    import torch.distributed
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed.tensor import distribute_tensor, init_device_mesh, Shard

    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.RMSprop([p])
    p.grad = torch.full_like(p, 8.0)
    optimizer.step()
    x = optimizer.state[p]["square_avg"].fill_(1.5)
    if kind == "DTensor":
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        optimizer.state[p]["square_avg"] = {
            "sparse": lambda: x.to_sparse(),
            "csr": lambda: x.to_sparse_csr(),
            "quantized": lambda: torch.quantize_per_tensor(x, 0.5, 0, torch.quint8),
            "bfloat16": lambda: x.bfloat16(),
            "DTensor": lambda: distribute_tensor(x, init_device_mesh("cpu", (1,)), [Shard(0)]),
            "meta": lambda: x.to("meta"),
            "fake": lambda: FakeTensorMode().from_tensor(x),
        }[kind]()
        if kind in ("meta", "fake"):
            with pytest.raises(ValueError, match=r"square_avg of w is a \w*Tensor that NumPy cannot read"):
                interop.from_pytorch(optimizer, ["w"])
        else:
            np.testing.assert_array_equal(interop.from_pytorch(optimizer, ["w"]).nu["w"], np.full((2, 2), 1.5))
    finally:
        if kind == "DTensor":
            torch.distributed.destroy_process_group()


@where_it_is("torch")
@pytest.mark.parametrize("flat", [False, True])
def test_torch_distributed_state_dicts(flat):
    import torch
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, StateDictOptions

    model = torch_model()
    model[2].weight.requires_grad_(False)
    optimizer = torch.optim.RMSprop(
        [{"params": model[3].parameters(), "momentum": 0.5}, {"params": model[:3].parameters()}], **MOVING
    )
    torch_steps(model, optimizer, 0, 5)
    kept = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    weights = dict(model.named_parameters())
    state = interop.from_pytorch(kept, weights)
    assert state.count == 5
    for name, p in weights.items():
        if name != "2.weight":
            np.testing.assert_allclose(state.trace[name], optimizer.state[p]["momentum_buffer"].numpy(), rtol=1e-6)
    assert (state.nu["2.weight"] == 0).all()


@where_it_is("torch")
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "centered": True}], ids=str)
def test_torch_complex_parameters(options):
    """As the error says: view_as_real before, split_real_and_imaginary behind."""
    import torch

    def gradient(t):
        rng = np.random.default_rng(t)
        return (rng.normal(size=3) + 1j * rng.normal(size=3)).astype(np.complex64)

    p = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = torch.optim.RMSprop([p], lr=0.1, **options)

    def steps(first, last):
        for t in range(first, last):
            p.grad = torch.from_numpy(gradient(t))
            optimizer.step()

    steps(0, 10)
    kept = optimizer.state_dict()
    with pytest.raises(ValueError, match="view_as_real"):
        interop.from_pytorch(kept, ["w"])
    entry = {k: torch.view_as_real(x) if x.is_complex() else x for k, x in kept["state"][0].items()}
    state = interop.from_pytorch({**kept, "state": {0: entry}}, ["w"], lambda a: {"w": Pair(*a["w"].T)})
    tx = optax.contrib.split_real_and_imaginary(dialects.pytorch(0.1, **options))
    params = {"w": jnp.asarray(p.detach().numpy())}
    state = carry_over(state, tx.init(params))
    steps(10, 30)
    for t in range(10, 30):
        updates, state = tx.update({"w": jnp.asarray(gradient(t))}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], p.detach().numpy(), rtol=1e-5)


@where_it_is("stable-baselines3")
def test_classes_tell_each_other_apart():
    import torch

    classes = {
        "from_pytorch": Torch.optimizer_class(),
        "from_timm": Timm.optimizer_class(),
        "from_stable_baselines3": StableBaselines3.optimizer_class(),
    }
    for writer, make in classes.items():
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = make([p], lr=0.1)
        p.grad = torch.ones_like(p)
        optimizer.step()
        for reader in classes:
            if reader == writer:
                assert getattr(interop, reader)(optimizer.state_dict(), ["w"]).count == 1
                continue
            with pytest.raises(ValueError, match=f"use {writer}"):
                getattr(interop, reader)(optimizer.state_dict(), ["w"])


@where_it_is("tf-keras")
def test_keras_files_that_are_sorted(tmp_path, subtests):
    """h5py gives groups in groups, and names in alphabetical order."""
    import h5py
    import keras
    import tf_keras

    options = {"learning_rate": 0.01, "momentum": 0.9, "epsilon": 1e-3}
    for module, optimizers in (
        (tf_keras, tf_keras.optimizers.legacy),
        (tf_keras, tf_keras.optimizers),
        (keras, keras.optimizers),
    ):
        for centered in (False, True):
            with subtests.test(f"{optimizers.__name__}, centered={centered}"):
                optimizer = optimizers.RMSprop(**options, centered=centered)
                model = module.Sequential([module.layers.Input((3,)), module.layers.Dense(2, name="d")])
                model.compile(optimizer, "mse")
                model.fit(np.ones((4, 3)), np.ones((4, 2)), epochs=3, verbose=0)
                variables = optimizer.variables() if callable(optimizer.variables) else optimizer.variables
                state = interop.from_keras([(getattr(v, "path", v.name), v.numpy()) for v in variables])
                assert state.count == 3
                model.save(tmp_path / "model.h5")
                with h5py.File(tmp_path / "model.h5") as file:
                    for found in (file["optimizer_weights"], {"optimizer_weights": file["optimizer_weights"]}):
                        jax.tree.map(np.testing.assert_array_equal, interop.from_keras(found), state)
        with subtests.test(f"{optimizers.__name__}, Adam"):
            model.compile(optimizers.Adam(0.01), "mse")
            model.fit(np.ones((4, 3)), np.ones((4, 2)), epochs=3, verbose=0)
            model.save(tmp_path / "adam.h5")
            with (
                h5py.File(tmp_path / "adam.h5") as file,
                pytest.raises(ValueError, match="not the variables of Keras' RMSprop, but of adam"),
            ):
                interop.from_keras(file["optimizer_weights"])


@where_it_is("torch")
def test_blocks_of_bitsandbytes_in_tensors():
    import torch
    from test_interop_bitsandbytes import HIDDEN, NAMES, state_dict

    tensors = state_dict()
    for entry in tensors["state"].values():
        entry[HIDDEN] = {k: torch.from_numpy(x.copy()) for k, x in entry[HIDDEN].items()}
    expected = interop.from_bitsandbytes(state_dict(), NAMES)
    jax.tree.map(np.testing.assert_array_equal, interop.from_bitsandbytes(tensors, NAMES), expected)
