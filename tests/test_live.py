"""The frameworks themselves, where they are installed: .ci/run installs them, and says that they must be here."""

import importlib
import inspect

import jax
import pytest
from frameworks import cases, FRAMEWORKS, is_here, ours, RATES
from problems import distance

from rmsprop_jax import dialects


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
