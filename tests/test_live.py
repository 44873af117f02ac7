"""The frameworks themselves, where they are installed: .ci/run installs them, and says that they must be here."""

import importlib
import inspect

import jax
import pytest
from frameworks import cases, FRAMEWORKS, is_here, ours
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
    run_ours,
    SOURCES,
    STOP,
)

from rmsprop_jax import dialects


LIVE = [
    pytest.param(name, case, arguments, rates, id=f"{name}-{case}")
    for name, framework in FRAMEWORKS.items()
    if is_here(name)
    for case, arguments, rates in cases(framework)
]


@pytest.mark.parametrize(("name", "case", "arguments", "rates"), LIVE)
@pytest.mark.filterwarnings("ignore")  # theirs
def test_live_trajectories(name, case, arguments, rates):
    framework = FRAMEWORKS[name]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = framework.run(arguments, rates)
    assert distance(ours(framework, arguments, rates), theirs) < 1e-5


# dialect: (framework, module, class, what it has and we leave out)
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


def arguments_of(function, without):
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return [(p.name, p.default) for p in parameters if p.name not in without]


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
    assert arguments_of(getattr(dialects, name), set()) == arguments_of(function, without | {"self"})


@pytest.mark.filterwarnings("ignore")  # theirs
def test_live_resumes_both_ways(subtests):
    for name, options in (case for case in CASES if is_here(case[0])):
        with subtests.test(case_name(name, options)):
            both_ways(name, options)


def both_ways(name, options):
    source, arguments = SOURCES[name], foreign(name, options)
    tx = dialect_of(source, name, options)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        middle, checkpoint = source.run(arguments, ORIGIN, 0, STOP)
        theirs, _ = source.run(arguments, ORIGIN, 0, END)
        ours, _ = run_ours(tx, source.read(checkpoint), middle, STOP, END)
        assert difference(ours, theirs) < limit(name, options)
        # And back: we make the first half, the framework goes on from our state.
        middle, state = run_ours(tx, tx.init(convert(ORIGIN)), ORIGIN, 0, STOP)
        back, _ = source.run(arguments, middle, STOP, END, source.write(state))
        assert difference(back, theirs) < limit(name, options)
