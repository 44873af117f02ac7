"""The frameworks themselves, where they are installed: .ci/run installs them, and says that they must be here."""

import functools
import importlib
import inspect
import io
import os
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from frameworks import cases, FRAMEWORKS, is_here, ours, RATES
from problems import distance
from resume import (
    case_name,
    CASES,
    convert,
    dialect_of,
    difference,
    END,
    foreign,
    limit,
    ORIGIN,
    run_framework,
    run_ours,
    SOURCES,
    STOP,
)

from rmsprop_jax import carry_over, dialects, interop


pytestmark = pytest.mark.slow

LIVE = [
    pytest.param(name, case, arguments, rates, id=f"{name}-{case}")
    for name, framework in FRAMEWORKS.items()
    if is_here(name)
    for case, arguments, rates in cases(framework)
    if rates is RATES  # a constant rate is one of them; golden trajectories have both
]


@pytest.mark.parametrize(("name", "case", "arguments", "rates"), LIVE)
@pytest.mark.filterwarnings("ignore")  # theirs
def test_live_trajectories(name, case, arguments, rates):
    framework = FRAMEWORKS[name]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = framework.run(arguments, rates)
    assert distance(ours(framework, arguments, rates), theirs) < 1e-5


# dialect: (framework, module, class, arguments that we leave out)
SIGNATURES = {
    "pytorch": ("torch", "torch.optim", "RMSprop", {"params"}),
    "stable_baselines3": (
        *("stable-baselines3", "stable_baselines3.common.sb2_compat.rmsprop_tf_like", "RMSpropTFLike"),
        {"params"},
    ),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes.optim", "RMSprop", {"params"}),
    "keras": ("keras", "keras.optimizers", "RMSprop", {"kwargs"}),
    "tf_keras": ("tf-keras", "tf_keras.optimizers.legacy", "RMSprop", {"kwargs"}),
    "tensorflow1": ("tensorflow", "tensorflow.compat.v1.train", "RMSPropOptimizer", set()),
    "sonnet": ("dm-sonnet", "sonnet.optimizers", "RMSProp", set()),
    "paddle": ("paddlepaddle", "paddle.optimizer", "RMSProp", set()),
    "mindspore": ("mindspore", "mindspore.nn", "RMSProp", {"params"}),
    "mlx": ("mlx", "mlx.optimizers", "RMSprop", set()),
    "rmsprop": ("optax", "optax", "rmsprop", set()),
}


# Where a framework switches something off with a number, our default is None.
OFF = {"momentum": 0, "weight_decay": 0, "loss_scale": 1, "optim_bits": 32, "min_8bit_size": 4096}


RATES_BY_DEFAULT = {row["dialect"]: float(row["lr"]) for row in dialects.table() if row["lr"]}


def arguments_of_dialect(name):
    """Its arguments, with the default rate, which its signature does not have."""
    (rate, default), *others = arguments_of(getattr(dialects, name), set())
    return [(rate, RATES_BY_DEFAULT.get(name, default)), *others]


def arguments_of(function, without):
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return [(p.name, OFF.get(p.name) if p.default is None else p.default) for p in parameters if p.name not in without]


@pytest.mark.parametrize("name", [name for name, row in SIGNATURES.items() if is_here(row[0])])
@pytest.mark.filterwarnings("ignore")
def test_live_signatures(name):
    _, module, attribute, without = SIGNATURES[name]
    if module == "tensorflow.compat.v1.train":
        import tensorflow

        theirs = tensorflow.compat.v1.train.RMSPropOptimizer
    else:
        theirs = getattr(importlib.import_module(module), attribute)
    function = theirs.__init__ if inspect.isclass(theirs) else theirs
    assert arguments_of_dialect(name) == arguments_of(function, without | {"self"})


@pytest.mark.filterwarnings("ignore")  # theirs
def test_live_resumes_both_ways(subtests):
    for name, options in (case for case in CASES if is_here(case[0])):
        with subtests.test(case_name(name, options)):
            both_ways(name, options)


def both_ways(name, options):
    source, tx = SOURCES[name], dialect_of(SOURCES[name], name, options)
    run = functools.partial(run_framework, source, foreign(name, options))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        middle, checkpoint = run(ORIGIN, 0, STOP)
        theirs, _ = run(ORIGIN, 0, END)
        ours, _ = run_ours(tx, source.read(checkpoint), middle, STOP, END)
        assert difference(ours, theirs) < limit(name, options)
        # And back: we make the first half, the framework goes on from our state.
        middle, state = run_ours(tx, tx.init(convert(ORIGIN)), ORIGIN, 0, STOP)
        back, _ = run(middle, STOP, END, source.write(state))
        assert difference(back, theirs) < limit(name, options)


# --- Checkpoints as they come -----------------------------------------------------------------------------


def where_it_is(name):
    """Leaves a test out, instead of skipping it, where its framework is not installed: .ci/run says where it must be."""
    return lambda test: test if is_here(name) else None


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
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("users_climate")
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
@pytest.mark.filterwarnings("ignore")
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
        with pytest.raises(ValueError, match="not RMSprop's but that of"):
            interop.from_pytorch(optimizer.state_dict(), ["w"])


def keras_model(keras, names=("a", "b")):
    return keras.Sequential([keras.layers.Input((3,)), *(keras.layers.Dense(3, name=name) for name in names)])


@where_it_is("keras")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("users_climate")
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
        with pytest.raises(ValueError, match="variables has .*d_kernel_velocity, .* twice"):
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
@pytest.mark.filterwarnings("ignore")
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
@pytest.mark.filterwarnings("ignore")
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
@pytest.mark.filterwarnings("ignore")
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
