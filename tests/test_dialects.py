"""Each dialect against the framework it is named after: recordings, papers in float64, and every argument."""

import functools
import inspect
import itertools
import json
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from frameworks import case_name, cases, FRAMEWORKS, in_two, ours, RATES, SCHEDULES, SPLIT
from helpers import mesh_of
from problems import distance, grads, START, STEPS, trajectory

from rmsprop_jax import dialects, rmsprop


every_dialect = pytest.mark.parametrize("dialect", dialects.DIALECTS, ids=lambda dialect: dialect.__name__)
FACTS = {dialect: dialects.dialect_of(dialect) for dialect in dialects.DIALECTS}
NEEDED = {dialect: {facts.own: 0.1} for dialect, facts in FACTS.items()}
HALVES = {"0": jnp.asarray(START[:SPLIT]), "1": jnp.asarray(START[SPLIT:])}


def has(dialect, name):
    return name in inspect.signature(dialect).parameters


def default_of(dialect, name):
    return inspect.signature(dialect).parameters[name].default


# --- Recordings ---------------------------------------------------------------------------------------------

GOLDEN = pathlib.Path(__file__).parent / "golden"
CALLS = [
    pytest.param(name, arguments, id=",".join([name, *(f"{k}={v}" for k, v in arguments.items())]))
    for name, framework in FRAMEWORKS.items()
    for arguments in framework.calls
]


@pytest.mark.parametrize(("name", "arguments"), CALLS)
def test_golden_trajectories(name, arguments):
    golden = np.load(GOLDEN / f"{name}.npz")
    for schedule, rates in SCHEDULES.items():
        expected = golden[case_name(arguments, schedule)]
        assert distance(ours(FRAMEWORKS[name], arguments, rates)[9::10], expected) < 1e-5


def test_golden_files_hold_the_cases_and_say_what_made_them():
    assert {path.stem for path in GOLDEN.glob("*.npz")} == set(FRAMEWORKS)
    for name, framework in FRAMEWORKS.items():
        golden = np.load(GOLDEN / f"{name}.npz")
        assert set(golden) == {case for case, *_ in cases(framework)} | {"versions"}
        assert set(framework.distributions) <= set(json.loads(str(golden["versions"])))
        # All frameworks ran the same problem, and moved.
        for case, *_ in cases(framework):
            assert golden[case].shape == (STEPS // 10, len(START))
            assert np.abs(golden[case][-1] - START).max() > 0.01


# --- Papers: float64 transcriptions of their equations ------------------------------------------------------


def lua_dqn(rates):
    """NeuralQLearner.lua: w += lr * dw / sqrt(g2 - g*g + 0.01), where dw is uphill."""
    w, g, g2 = START.astype(np.float64), 0.0, 0.0
    for t, lr in enumerate(rates):
        dw = -grads(w, t)
        g = 0.95 * g + 0.05 * dw
        g2 = 0.95 * g2 + 0.05 * dw * dw
        w = w + lr * dw / np.sqrt(g2 - g * g + 0.01)
        yield w


def graves_eq_38_to_45(rates):
    """n, g and a buffer that is added: the signs are the paper's."""
    w, n, g, delta = START.astype(np.float64), 0.0, 0.0, 0.0
    for t, lr in enumerate(rates):
        e = grads(w, t)
        n = 0.95 * n + 0.05 * e**2
        g = 0.95 * g + 0.05 * e
        delta = 0.9 * delta - lr * e / np.sqrt(n - g**2 + 1e-4)
        w = w + delta
        yield w


def hinton_slide(rates):
    w, mean_square = START.astype(np.float64), 0.0
    for t, lr in enumerate(rates):
        e = grads(w, t)
        mean_square = 0.9 * mean_square + 0.1 * e**2
        w = w - lr * e / np.sqrt(mean_square)
        yield w


def optimisers_jl(centred):
    """Not on PyPI: quad, lin and dx/(√(quad - |lin|²) + ϵ), src/rules.jl."""

    def run(rates):
        options = {"eps": 1e-3, "eps_in_sqrt": False, "centered": centred}
        return reference.rmsprop(grads, START, STEPS, lambda t: float(rates[t]), 0.95, **options)

    return functools.partial(dialects.optimisers_jl, rho=0.95, epsilon=1e-3, centred=centred), run


PAPERS = {
    "hinton": (dialects.hinton, hinton_slide),
    "graves": (dialects.graves, graves_eq_38_to_45),
    "dqn": (dialects.dqn, lua_dqn),
    "optimisers_jl": optimisers_jl(False),
    "optimisers_jl, centred": optimisers_jl(True),
}


@pytest.mark.parametrize("paper", PAPERS)
def test_papers(paper):
    dialect, equations = PAPERS[paper]
    for rates in SCHEDULES.values():
        theirs = np.stack(list(equations(rates.astype(np.float64))))
        assert distance(trajectory(dialect(lambda count, rates=rates: jnp.asarray(rates)[count])), theirs) < 1e-5


# --- Every argument has an effect, is refused, or says only how to compute ------------------------------

# What each framework's documentation has between the parentheses, without the parameters.
DOCUMENTED = {
    "hinton": "learning_rate=1e-3, decay=0.9",
    "graves": "learning_rate=1e-4, decay=0.95, momentum=0.9, eps=1e-4",
    "dqn": "learning_rate=0.00025, gradient_momentum=0.95, squared_gradient_momentum=0.95, min_squared_gradient=0.01",
    "dreamer": "lr=4e-5, agc=0.3, eps=1e-20, beta1=0.9, beta2=0.999, momentum=True, nesterov=False, wd=0.0, "
    "wdregex=r'/kernel$', schedule='const', warmup=1000, anneal=0",
    "pytorch": "lr=0.01, alpha=0.99, eps=1e-08, weight_decay=0, momentum=0, centered=False, capturable=False, "
    "foreach=None, maximize=False, differentiable=False",
    "timm": "lr=1e-2, alpha=0.9, eps=1e-10, weight_decay=0., momentum=0., centered=False, decoupled_decay=False, "
    "corrected_weight_decay=False, lr_in_momentum=True, caution=False, foreach=None",
    "stable_baselines3": "lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0, centered=False",
    "pfrl": "lr=0.01, alpha=0.99, eps=1e-08, weight_decay=0, momentum=0, centered=False, capturable=False, "
    "foreach=None, maximize=False, differentiable=False",
    "bitsandbytes": "lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0, centered=False, optim_bits=32, "
    "args=None, min_8bit_size=4096",
    "keras": "learning_rate=0.001, rho=0.9, momentum=0.0, epsilon=1e-07, centered=False, weight_decay=None, "
    "clipnorm=None, clipvalue=None, global_clipnorm=None, use_ema=False, ema_momentum=0.99, "
    "ema_overwrite_frequency=None, loss_scale_factor=None, gradient_accumulation_steps=None, name='rmsprop'",
    "tf_keras": "learning_rate=0.001, rho=0.9, momentum=0.0, epsilon=1e-07, centered=False, name='RMSprop'",
    "tensorflow1": "learning_rate, decay=0.9, momentum=0.0, epsilon=1e-10, use_locking=False, centered=False, "
    "name='RMSProp'",
    "sonnet": "learning_rate, decay=0.9, momentum=0.0, epsilon=1e-10, centered=False, name=None",
    "tensorflowjs": "learningRate, decay=0.9, momentum=0.0, epsilon=None, centered=False",
    "paddle": "learning_rate, rho=0.95, epsilon=1e-06, momentum=0.0, centered=False, parameters=None, "
    "weight_decay=None, grad_clip=None, name=None",
    "mindspore": "learning_rate=0.1, decay=0.9, momentum=0.0, epsilon=1e-10, use_locking=False, centered=False, "
    "loss_scale=1.0, weight_decay=0.0",
    "mlx": "learning_rate, alpha=0.99, eps=1e-08",
    "optimisers_jl": "eta=0.001, rho=0.9, epsilon=1e-8, centred=False",
}


@every_dialect
def test_its_arguments_are_those_of_the_documentation(dialect):
    theirs = inspect.signature(eval(f"lambda {DOCUMENTED[dialect.__name__]}: None")).parameters
    facts, parameters = FACTS[dialect], inspect.signature(dialect).parameters
    assert list(theirs) == [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    default = theirs[facts.own].default
    assert facts.learning_rate == (None if default is inspect.Parameter.empty else default)
    written_out = {name: p.default for name, p in theirs.items() if name != facts.own}
    for name, value in written_out.items():
        assert parameters[name].default in (value, None)
    options, _, k = seen(dialect, **written_out)
    assert (options, k) == (seen(dialect)[0], None)


# Where not any number will do, and what has an effect only beside others.
VALUES = {"gradient_accumulation_steps": 2, "optim_bits": 8, "ema_overwrite_frequency": 100, "args": "another"}
VALUES |= {"schedule": "cosine", "anneal": 8.0, "wdregex": "0", "weight_decay_mask": {"0": True, "1": False}}
VALUES |= {"state_dtype": "uint8", "name": "another", "agc": 1e-3} | dict.fromkeys(["grad_clip", "parameters"], (1,))
VALUES |= {"nesterov": True, "warmup": 5.0, "clipnorm": 1e-2, "clipvalue": 1e-2, "global_clipnorm": 1e-2}
SHRINKING = {"decoupled_decay": True, "weight_decay": 0.1}
ANNEALED = {"schedule": "linear", "warmup": 3.0, "anneal": 20.0}
BESIDE = {
    **dict.fromkeys(("schedule", "anneal"), ANNEALED),
    "corrected_weight_decay": SHRINKING,
    "max_lr": {**SHRINKING, "corrected_weight_decay": True},
    "decoupled_decay": {"weight_decay": 0.1},
    "lr_in_momentum": {"momentum": 0.9},
    "wd": {"wdregex": "0"},
    "wdregex": {"wd": 0.1},
}
ARGUMENTS = [
    pytest.param(dialect, name, id=f"{dialect.__name__}-{name}")
    for dialect, facts in FACTS.items()
    for name in facts.signature.parameters
    if name not in (facts.own, "learning_rate")
]


def beside(dialect, name):
    if name == "weight_decay_mask":
        return {"wd" if has(dialect, "wd") else "weight_decay": 0.1}
    return BESIDE.get(name, {})


def another(dialect, name):
    """A value that is not the default."""
    default = default_of(dialect, name)
    flag = isinstance(default, bool) or name in ("foreach", "caution")
    return VALUES.get(name, (not default) if flag else 0.5)


def seen(dialect, **arguments):
    """All options of a call, with schedules at some counts; whether something is in front; the accumulation."""
    arguments, params = NEEDED[dialect] | arguments, {"0": jnp.ones(2), "1": jnp.ones(2)}
    recipe = FACTS[dialect].recipe(FACTS[dialect].arguments(**arguments))
    options = dialects.options(dialect, **arguments)
    for name in [name for name, option in options.items() if callable(option)]:
        calls = [params] if name == "weight_decay_mask" else [jnp.int32(count) for count in (0, 3, 6, 2500)]
        options[name] = [jax.tree.map(float, options[name](x)) for x in calls]
    return options, len(recipe.before), recipe.accumulate


def steps_of(dialect, **arguments):
    """Where 6 steps lead, with a rate that changes, so that its place in the buffer matters."""
    given = {FACTS[dialect].own: lambda count: 1e-2 / (1 + jnp.asarray(count, jnp.float32))} | arguments
    if given.get("corrected_weight_decay"):
        given.setdefault("max_lr", 1.0)
    with jax.numpy_dtype_promotion("standard"):  # optax.MultiSteps
        return trajectory(in_two(dialect(**given)), steps=6)[-1]


plain_steps = functools.cache(lambda dialect, arguments: steps_of(dialect, **dict(arguments)))


def spellings(value):
    """A value as Python and NumPy have it."""
    yield value
    if isinstance(value, (bool, int, float)):
        yield np.asarray(value)
        yield np.asarray(value)[()]


@pytest.mark.slow
@pytest.mark.parametrize(("dialect", "name"), ARGUMENTS)
def test_every_argument(dialect, name):
    facts, value, given = FACTS[dialect], another(dialect, name), beside(dialect, name)
    if name in facts.refused:
        for same in spellings(value):
            with pytest.raises(ValueError, match=f"^{name}=.* is not available here: .{{15,}}"):
                dialect(**NEEDED[dialect], **{name: same})
        if isinstance(value, (bool, int, float)):
            with pytest.raises(ValueError, match=f"^{name} is a JAX array, .*static_args"):
                dialect(**NEEDED[dialect], **{name: jnp.asarray(value)})
        return
    (before, *_), (after, front, k) = seen(dialect, **given), seen(dialect, **given | {name: value})
    assert all(seen(dialect, **given | {name: same}) == (after, front, k) for same in spellings(value))
    moved = {option for option in before if before[option] != after[option]}
    if name in facts.inert:
        assert not moved
        return
    places = set(facts.honoured[name])
    assert (front > 0) >= ("before" in places)
    assert (k is not None) == ("accumulate" in places)
    # A momentum or a decay that is switched on brings its own options.
    assert moved - {"lr_in_momentum", "decoupled"} - places == set()
    assert places - {"before", "accumulate"} <= moved
    if not places <= moved:  # an option's own effect: test_rmsprop.py
        plain = plain_steps(dialect, tuple(given.items()))
        assert not np.array_equal(steps_of(dialect, **given | {name: value}), plain)


CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")
OFF = dict.fromkeys(
    ("momentum", "weight_decay", "wd", "anneal", "gradient_accumulation_steps"), (0, 0.0, np.float32(0))
)
OFF |= {"decay": (0, np.array(0)), "clipnorm": (0, -1.0), "clipvalue": (0.0,), "global_clipnorm": (np.array(-1.0),)}


@every_dialect
def test_what_is_off_is_off_however_it_is_said(dialect):
    """Not tensorflow1's `decay`, which is ρ, nor DreamerV3's `momentum`, which is a flag, nor a clip of tf_keras."""
    for name in OFF.keys() & inspect.signature(dialect).parameters.keys():
        if default_of(dialect, name) is None and not (dialect is dialects.tf_keras and "clip" in name):
            for value in (*OFF[name], None):
                assert seen(dialect, **{name: value}) == seen(dialect)


REFUSED_THERE_TOO = [
    ("keras(clipnorm=1.0, clipvalue=1.0)", "only one of clipnorm, clipvalue and global_clipnorm can be set"),
    ("keras(clipnorm=1.0, global_clipnorm=1.0)", "only one of clipnorm, clipvalue and global_clipnorm can be set"),
    ("tf_keras(clipnorm=1.0, global_clipnorm=1.0)", "only one of clipnorm=1.0 and global_clipnorm=1.0"),
    *((f"keras({clip}=nan)", f"{clip}=nan: allowed is a finite number") for clip in CLIPS),
    *((f"tf_keras({clip}=-1.0)", f"{clip}=-1.0: allowed is a finite number") for clip in CLIPS),
    ("tf_keras(decay=-0.1)", "decay=-0.1: allowed is a finite number of at least 0"),
    *((f"keras(gradient_accumulation_steps={k})", f"={k}: .*whole number from 2 to") for k in (1, 2.0, -2, True)),
    ("jit(lambda k: keras(gradient_accumulation_steps=k).init(k))(4)", "steps is traced.*static_args"),
    *((f"keras(loss_scale_factor={x})", f"loss_scale_factor={x}.*above 0") for x in (0, -1.0, 1e-45)),
    *((f"mindspore(loss_scale={x})", f"loss_scale={x}.*above 0") for x in (0, -1.0, 1e-40)),
    ("timm(lambda count: 0.1, corrected_weight_decay=True)", "needs max_lr: pass the lr that timm's constructor got"),
    ("timm(0.0, corrected_weight_decay=True)", "needs max_lr: pass"),
    ("timm(0.1, corrected_weight_decay=True, max_lr=0.0)", "max_lr=0.0: allowed is a number above 0"),
    ("timm(0.1, max_lr=0.1)", "max_lr=0.1 needs corrected_weight_decay=True"),
    ("dreamer(anneal=500)", "anneal=500.* is not available here: pass schedule"),
    ("dreamer(anneal=500, schedule='cosine')", "anneal=500.*it must be larger than warmup=1000"),
    ("dreamer(anneal=1000, schedule='linear')", "anneal=1000.*it must be larger than warmup=1000"),
    ("dreamer(schedule='cosine')", "anneal=0.*it must be larger than warmup=1000"),
    ("dreamer(schedule='exp')", "schedule='exp': allowed are 'const', 'linear' and 'cosine'"),
    *((f"dreamer({name}=-0.1)", f"^{name}=-0.1: allowed is a") for name in ("agc", "beta1", "eps", "wd", "warmup")),
    *((f"dreamer({name}=nan)", f"^{name}=nan: allowed is a") for name in ("agc", "beta1", "eps", "wd", "warmup", "lr")),
    ("dreamer(anneal=nan)", "^anneal=nan: allowed is a"),
    ("dreamer(beta1=1.0)", "^beta1=1.0: allowed is a number in"),
    ("dreamer(beta2=1.1)", "^beta2=1.1: allowed is a"),
    ("tf_keras(rho=2)", r"^rho=2: allowed is a finite number in \[0, 1\]"),
    ("keras(rho=None)", "^rho=None has type NoneType: allowed is a number"),
    ("options(pytorch, alpha=2)", "^alpha=2: allowed is"),
    ("pfrl(maximize=True)", r"use optax.chain\(optax.scale\(-1.0\), pfrl"),
    ("options(rmsprop)", "rmsprop.* is not a dialect: allowed are hinton, graves, "),
    ("pytorch(maximize='yes')", "^maximize='yes' has type str: allowed are True and False"),
    ("timm(decoupled_decay='yes')", "^decoupled_decay='yes' has type str"),
    ("timm(lr_in_momentum='yes')", "^lr_in_momentum='yes' has type str"),
    ("optimisers_jl(centred='yes')", "^centred='yes' has type str"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED_THERE_TOO, ids=[call for call, _ in REFUSED_THERE_TOO])
def test_calls_that_a_framework_refuses_too(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        eval(call, vars(dialects) | {"jit": jax.jit, "nan": float("nan")})


@every_dialect
def test_an_error_names_the_argument_as_the_framework_does(dialect):
    for name in FACTS[dialect].honoured.keys() - {"wdregex"}:
        for value in ("x", float("nan"), -1j):
            with pytest.raises((TypeError, ValueError), match=f"^{name}\\b"):
                dialect(**NEEDED[dialect], **{name: value})


# --- The learning rate has two names ------------------------------------------------------------------------


@every_dialect
def test_the_learning_rate_has_two_names_and_a_default(dialect):
    own, rate = FACTS[dialect].own, FACTS[dialect].learning_rate
    tx = dialect(1e-2)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert inspect.signature(dialect).return_annotation is dialect.__annotations__["return"] is type(tx)
    assert tx == dialect(**{own: 1e-2}) == dialect(learning_rate=1e-2)
    assert hash(tx) == hash(dialect(1e-2))
    assert tx != dialect(2e-2)
    assert dialects.options(dialect, learning_rate=-1e-2) != dialects.options(dialect)  # ascent
    if own != "learning_rate":
        with pytest.raises(ValueError, match="are two names of one argument: pass one of them"):
            dialect(**{own: 1e-2, "learning_rate": 1e-2})
    for name in {own, "learning_rate"}:
        with pytest.raises(ValueError, match=f"^{name}=nan: allowed is a finite number"):
            dialect(**{name: float("nan")})
        with pytest.raises(TypeError, match=f"^{name}='fast' has type str"):
            dialect(**{name: "fast"})
    if rate is None:
        for call in (dialect, lambda: dialect(**{own: None})):
            with pytest.raises((TypeError, ValueError), match=f"{dialect.__name__}.*{own}"):
                call()
        assert dialects.options(dialect)["learning_rate"] is None
    else:
        assert dialect() == dialect(**{own: None}) == dialect(rate)
        assert rate in [float(x) for x in re.findall(r"\d+\.?\d*(?:e-?\d+)?", dialect.__doc__)]


@every_dialect
def test_an_unexpected_argument_is_answered_with_those_there_are(dialect):
    own = FACTS[dialect].own
    with pytest.raises(TypeError, match=f"unexpected keyword argument 'beta': {dialect.__name__} takes {own}, "):
        dialect(**{own: 0.1}, beta=0.9)
    with pytest.raises(TypeError, match=f"too many positional arguments: {dialect.__name__} takes {own}, "):
        dialect(*[0.1] * 30)


# --- Under optax.inject_hyperparams ---------------------------------------------------------------------------


def float32(value):
    return float(np.float32(value)) if isinstance(value, float) else value


def numbers_of(dialect):
    """The numbers that are defaults."""
    defaults = {name: p.default for name, p in inspect.signature(dialect).parameters.items()}
    return {k: v for k, v in defaults.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


@pytest.mark.slow
@every_dialect
def test_injected_it_is_the_direct_call(dialect):
    """sbx makes an optimizer this way, and logs state.hyperparams["learning_rate"]."""
    facts, schedule = FACTS[dialect], lambda count: jnp.asarray(RATES)[count]
    switched_on = {"momentum", "weight_decay", "wd", "loss_scale", "clipnorm"} & facts.honoured.keys()
    for name, given in ("learning_rate", {}), (facts.own, {name: another(dialect, name) for name in switched_on}):
        numbers = numbers_of(dialect) | given
        direct = dialect(schedule, **{name: float32(value) for name, value in numbers.items()})
        expected = trajectory(in_two(direct), steps=50)
        tx = optax.inject_hyperparams(dialect)(**{name: schedule}, **given)
        hyperparams = {k: float(v) for k, v in tx.init(HALVES).hyperparams.items()}
        assert hyperparams == pytest.approx({name: RATES[0]} | numbers, rel=1e-6, abs=0)
        assert distance(trajectory(in_two(tx), steps=50), expected) < 2e-6


@every_dialect
def test_an_injected_number_can_be_set(dialect):
    numbers = {"learning_rate": 2e-2} | {name: value / 2 for name, value in numbers_of(dialect).items()}
    tx, direct = optax.inject_hyperparams(dialect)(learning_rate=1e-2), dialect(**numbers)
    state, theirs = tx.init(HALVES), direct.init(HALVES)
    state.hyperparams.update({name: jnp.float32(value) for name, value in numbers.items()})
    for _ in range(3):
        updates, state = tx.update(HALVES, state, HALVES)
        expected, theirs = direct.update(HALVES, theirs, HALVES)
    chex.assert_trees_all_close(updates, expected, rtol=3e-5)
    assert np.abs(expected["0"]).max() > 0


INJECTED = {
    "an argument refused": (
        dialects.bitsandbytes,
        {"momentum": 0.0},
        "momentum is a JAX array, .*pytorch.*static_args",
    ),
    "two decays": (dialects.dqn, {"gradient_momentum": 0.95}, "gradient_momentum is a JAX array, .*; leave it out"),
    "a flag": (dialects.pytorch, {"centered": np.array(True)}, "centered=.*allowed are True and False.*static_args"),
    "two names": (dialects.pytorch, {"lr": 1e-2}, "lr and learning_rate are two names of one argument"),
    "two clips": (dialects.keras, {"clipnorm": 1.0, "clipvalue": 1.0}, "only one of clipnorm, clipvalue and"),
    "no anneal": (dialects.dreamer, {"schedule": "cosine"}, "anneal=0.*it must be larger than"),
    "a mask alone": (dialects.pytorch, {"weight_decay_mask": {"w": True}}, "weight_decay_mask needs weight_decay"),
    "a mask as function": (
        dialects.dreamer,
        {"wd": 0.1, "weight_decay_mask": lambda params: jax.tree.map(lambda _: False, params)},
        "weight_decay_mask is a single bool.*name it in static_args",
    ),
    "a mask of one value": (
        rmsprop,
        {"weight_decay": 0.1, "weight_decay_mask": np.True_},
        "weight_decay_mask is a single.*name it in static_args",
    ),
}


@pytest.mark.parametrize("call", INJECTED)
def test_what_injection_cannot_have(call):
    dialect, arguments, message = INJECTED[call]
    with pytest.raises((TypeError, ValueError), match=message):
        optax.inject_hyperparams(dialect)(learning_rate=0.1, **arguments).init({"w": jnp.ones(2)})


def test_of_two_decays_the_one_that_is_an_array_is_named_and_both_can_be_static():
    both = ("gradient_momentum", "squared_gradient_momentum")
    message = (
        "^squared_gradient_momentum is a JAX array, .*gradient_momentum and squared_gradient_momentum in static_args"
    )
    with pytest.raises(ValueError, match=message):
        optax.inject_hyperparams(dialects.dqn, static_args=both[0])(gradient_momentum=0.95).init(HALVES)
    optax.inject_hyperparams(dialects.dqn, static_args=both)(gradient_momentum=0.95).init(HALVES)


def test_what_injection_takes_as_static():
    params = {"kernel": jnp.ones(2), "bias": jnp.ones(2)}
    static = {"gradient_accumulation_steps": 2, "weight_decay_mask": lambda params: {"kernel": True, "bias": False}}
    tx = optax.inject_hyperparams(dialects.keras, static_args=static.keys())(1.0, weight_decay=0.5, **static)
    state = tx.init(params)
    assert "gradient_accumulation_steps" not in state.hyperparams
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(2):
            updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    assert jax.tree.map(lambda u: float(u[0]), updates) == {"kernel": -0.5, "bias": 0.0}


def test_an_integer_beside_accumulation_is_left_out_as_the_error_says():
    """optax.MultiSteps makes a gradient of zeros where there is none."""
    params, grads = {"w": jnp.ones(2), "i": jnp.arange(2)}, {"w": jnp.ones(2), "i": None}
    tx = dialects.keras(gradient_accumulation_steps=2)
    message = r"gradient\['i'\] has dtype .*leave it out with eqx.partition or optax.masked"
    with jax.numpy_dtype_promotion("standard"):
        with pytest.raises(TypeError, match=message):
            tx.update(grads, tx.init(params), params)
        tx = optax.masked(tx, {"w": True, "i": False})
        assert tx.update(grads, tx.init(params), params)[0]["i"] is None


def test_numbers_that_are_off_stay_off_when_injected():
    # An epsilon of 0 is 1e-7 in tf_keras. Keras' clips: test_gradients.py.
    for dialect, arguments in (
        (dialects.tf_keras, {"epsilon": 0.0}),
        (dialects.dreamer, {"agc": 0.0, "anneal": 0.0, "warmup": 0.0}),
    ):
        expected = trajectory(in_two(dialect(1e-2, **arguments)), steps=5)
        tx = optax.inject_hyperparams(dialect)(1e-2, **arguments)
        assert distance(trajectory(in_two(tx), steps=5), expected) < 3e-5


# --- Data ---------------------------------------------------------------------------------------------------


def test_the_module_shows_dialects():
    names = {dialect.__name__ for dialect in dialects.DIALECTS}
    assert set(dir(dialects)) == set(dialects.__all__) == names | {"options", "table"}
    assert [row["dialect"] for row in dialects.table()] == [dialect.__name__ for dialect in dialects.DIALECTS]
    named = {row["dialect"]: row["class or paper"] for row in dialects.table()}
    assert named["pytorch"] == "torch.optim.RMSprop"  # which Stable Baselines 3's A2C uses by default
    assert named["stable_baselines3"].startswith("RMSpropTFLike")


@every_dialect
def test_its_options_are_a_call_of_rmsprop(dialect):
    wanted = {"momentum": 0.9, "centered": True, "centred": True, "weight_decay": 0.1}
    given = {name: value for name, value in wanted.items() if name in FACTS[dialect].honoured}
    if dialect is dialects.dreamer:
        given |= {"agc": None, "wd": 0.1, "nesterov": True}
    for arguments in ({"agc": None} if dialect is dialects.dreamer else {}, given):
        ours = dialect(1e-2, **arguments)
        theirs = rmsprop(**dialects.options(dialect, learning_rate=1e-2, **arguments))
        state, expected = ours.init(HALVES), theirs.init(HALVES)
        chex.assert_trees_all_equal(state, expected)
        # No buffer without need.
        assert (state.trace is None) == (arguments.get("momentum") is None and dialect not in MOVING)
        assert (state.mu is None) == (not {"centered", "centred"} & arguments.keys() and dialect not in CENTERED)
        for _ in range(3):
            updates, state = ours.update(HALVES, state, HALVES)
            wanted, expected = theirs.update(HALVES, expected, HALVES)
        chex.assert_trees_all_equal(updates, wanted)
    if {"weight_decay", "wd"} & given.keys():  # whatever the default of `rmsprop`
        assert "decoupled" in FACTS[dialect].recipe(FACTS[dialect].arguments(0.1, **given)).options


MOVING, CENTERED = (dialects.graves, dialects.dreamer), (dialects.graves, dialects.dqn)


def test_tf_keras_moves_its_epsilon_also_when_traced():
    def first_step(momentum):
        tx = dialects.tf_keras(1.0, momentum=momentum, epsilon=1.0)
        return tx.update(jnp.float32(1.0), tx.init(jnp.float32(0.0)))[0]

    np.testing.assert_allclose(first_step(0.0), -1 / (np.sqrt(0.1) + 1), rtol=1e-6)
    np.testing.assert_allclose(first_step(0.9), -1 / np.sqrt(0.1 + 1), rtol=1e-6)
    np.testing.assert_allclose(first_step(None), -1 / (np.sqrt(0.1) + 1), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(first_step)(0.9), -1 / np.sqrt(0.1 + 1), rtol=1e-6)
    assert dialects.options(dialects.tf_keras, epsilon=0)["eps"] == 1e-7  # what it is there as well


# --- Where the state lies -----------------------------------------------------------------------------------

AXIS_TYPES = [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit]
MESHED = {dialect.__name__: functools.partial(dialect, 1e-2) for dialect in dialects.DIALECTS}
MESHED |= {
    "accumulation": functools.partial(
        dialects.keras, lambda count: 0.1 / (1 + count), momentum=0.9, clipnorm=1.0, gradient_accumulation_steps=2
    ),
    "slower and slower": functools.partial(dialects.tf_keras, decay=0.1, global_clipnorm=1.0),
    "annealed": functools.partial(dialects.dreamer, wd=0.1, schedule="cosine", anneal=2000),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "axis_type"), list(zip(MESHED, itertools.cycle(AXIS_TYPES), strict=False)))
@pytest.mark.usefixtures("users_climate")
def test_a_mesh_compiles_one_step(name, axis_type, compilations):
    """A counter that starts on one device would be moved by the first update, and the second would compile again."""
    tx, mesh = MESHED[name](), mesh_of(axis_type)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = jax.device_put({"kernel": np.ones((16, 2), np.float32)}, sharding)
    for init in (tx.init, jax.jit(tx.init)):
        state, step = init(params), jax.jit(lambda params, state: tx.update(params, state, params)[1])
        with compilations() as compiled:
            for _ in range(3):
                state = step(params, state)
        assert len(compiled) == 1
        for x in jax.tree.leaves(state):
            assert x.ndim == 0 or x.sharding.is_equivalent_to(sharding, x.ndim)


# --- Decay of some of the parameters ----------------------------------------------------------------------


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_mask_is_that_of_adamw(decoupled):
    params = {"body": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "head": jnp.ones(3)}
    options = {"decay": 1.0, "eps": 0.0, "initial_scale": 1.0, "weight_decay": 0.25, "decoupled": decoupled}  # SGD
    for mask, (kernel, bias, head) in (
        ({"body": {"kernel": True, "bias": False}, "head": True}, (-0.125, 0, -0.125)),
        ({"body": False, "head": True}, (0, 0, -0.125)),
    ):
        tx = rmsprop(0.5, **options, weight_decay_mask=mask)
        state = tx.init(params)
        chex.assert_trees_all_equal_structs(state, rmsprop(0.1).init(params))
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        expected = {"body": {"kernel": kernel, "bias": bias}, "head": head}
        assert jax.tree.map(lambda u: float(u.ravel()[0]), updates) == expected


@pytest.mark.parametrize("dialect", [*dialects.DIALECTS, rmsprop], ids=lambda dialect: dialect.__name__)
def test_a_mask_beside_no_decay(dialect):
    if not has(dialect, "weight_decay_mask"):
        return
    decay = "wd" if dialect is dialects.dreamer else "weight_decay"
    with pytest.raises(ValueError, match=f"weight_decay_mask needs {decay}, got {decay}=None"):
        dialect(0.1, weight_decay_mask={"w": True})
    if dialect is not rmsprop:  # as in a sweep over decays
        assert seen(dialect, **{decay: 0.0}, weight_decay_mask=lambda params: params) == seen(dialect)


@pytest.mark.parametrize("mask", [{}, {"w": True}, {"w": True, "b": False, "c": True}])
def test_a_mask_that_does_not_fit_is_refused(mask):
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    for tx in (
        dialects.pytorch(weight_decay=0.1, weight_decay_mask=mask),
        dialects.dreamer(wd=0.1, weight_decay_mask=mask),
        optax.inject_hyperparams(dialects.dreamer)(learning_rate=0.1, wd=0.1, weight_decay_mask=mask),
    ):
        with pytest.raises(ValueError, match="weight_decay_mask must be a tree like the parameters', or a prefix"):
            tx.update(params, tx.init(params), params)


# --- DreamerV3 ----------------------------------------------------------------------------------------------


def test_dreamer_clips_a_whole_tensor_by_its_norm_or_a_thousandth():
    (clip,) = inspect.unwrap(dialects.dreamer)(agc=0.25).before
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.3, 0.4]), "c": None}
    params = {"a": jnp.array([0.0, 2.0]), "b": jnp.zeros(2), "c": jnp.ones(1)}
    clipped, _ = clip.update(grads, clip.init(params), params)
    np.testing.assert_allclose(clipped["a"], [0.3, 0.4], rtol=1e-6)  # 5 comes down to 0.25 · 2
    np.testing.assert_allclose(clipped["b"], [1.5e-4, 2e-4], rtol=1e-6)  # 0.5 comes down to 0.25 · 0.001
    assert clipped["c"] is None
    small = {"a": 1e-3 * grads["a"], "b": 1e-4 * grads["b"], "c": None}
    np.testing.assert_array_equal(clip.update(small, (), params)[0]["a"], small["a"])


def laprop(grads, params, rates, wd=0.0, agc=0.3):
    """DreamerV3's equations in NumPy, real or complex, with a constant learning rate."""
    p, nu, mu, out = params, 0.0, 0.0, []
    for t, rate in enumerate(rates, 1):
        g = grads(p, t - 1)
        g = g / max(1, np.linalg.norm(g) / (agc * max(1e-3, np.linalg.norm(p))))
        nu = 0.999 * nu + 0.001 * np.abs(g) ** 2
        mu = 0.9 * mu + 0.1 * g / (np.sqrt(nu / (1 - 0.999**t)) + 1e-20)
        p = p - rate * (mu / (1 - 0.9**t) + wd * p)
        out.append(p)
    return np.stack(out)


@pytest.mark.parametrize("phase", [1.0, np.exp(0.5j)], ids=["real", "complex"])
def test_dreamer_is_laprop_also_for_complex_parameters(phase):
    start = (START * phase).astype(np.complex64 if np.iscomplexobj(phase) else np.float32)
    wide = start.astype(np.complex128 if np.iscomplexobj(phase) else np.float64)
    expected = laprop(lambda p, t: grads(p, t), wide, [3e-3] * 50, wd=0.1)
    tx = dialects.dreamer(3e-3, warmup=0, wd=0.1, weight_decay_mask=lambda params: True)
    assert distance(trajectory(tx, start, steps=50), expected, start) < 1e-5


@pytest.mark.parametrize(
    ("state_dtype", "kept"),
    [(None, ("float32", "float32")), ("bfloat16", ("bfloat16", "bfloat16")), ("uint8", ("uint8", "int8"))],
)
def test_dreamer_has_one_state_and_state_dtype_is_for_both_averages(state_dtype, kept):
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    tx = dialects.dreamer(1e-2, warmup=0, wd=0.1, state_dtype=state_dtype)
    state = tx.init(params)
    updates, state = tx.update(params, state, params)
    assert updates["w"].dtype == jnp.bfloat16
    ours = state[-1]
    assert (ours.nu["w"].dtype, ours.trace["w"].dtype) == kept
    assert jax.tree.structure(state) == jax.tree.structure((optax.EmptyState(), ours))


def test_dreamer_needs_the_parameters():
    g = {"w": jnp.ones(2)}
    for arguments, option in (({}, "agc"), ({"agc": None, "wd": 0.1}, "weight_decay")):
        tx = dialects.dreamer(**arguments)
        with pytest.raises(ValueError, match=rf"{option} needs .*update\(updates, state, params\)"):
            tx.update(g, tx.init(g))
    tx = dialects.dreamer(agc=None)
    tx.update(g, tx.init(g))


def test_dreamer_without_an_average():
    g = jnp.array([1.0, -2.0])
    for nesterov in (False, True):
        tx = dialects.dreamer(0.1, warmup=0, agc=None, beta1=0.0, nesterov=nesterov)
        state = tx.init(g)
        assert state.trace is None
        np.testing.assert_allclose(tx.update(g, state)[0], [-0.1, 0.1], rtol=1e-5)


def decayed(tx, params):
    """Which parameters shrink, when no gradient moves them."""
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    return jax.tree.map(lambda u: bool((u != 0).all()), updates)


def test_wdregex_is_searched_in_the_path_without_its_container():
    tx = dialects.dreamer(1.0, warmup=0, wd=0.5)
    ones = jnp.ones(2)
    params = {"kernel": ones, "bias": ones, "dense": {"kernel": ones, "bias": ones, "value": ones}}
    expected = {"kernel": True, "bias": False, "dense": {"kernel": True, "bias": False, "value": False}}
    assert decayed(tx, params) == expected

    class Model(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
            self.dense.bias[...] += 1
            self.kernel = nnx.Param(jnp.ones(2))

    state = nnx.to_pure_dict(decayed(tx, nnx.split(Model(), nnx.Param)[1]))
    assert state == {"dense": {"kernel": True, "bias": False}, "kernel": True}

    for regex, which in (("^kernel$", {"a": False, "kernel": True}), ("^(?!a)", {"a": False, "kernel": True})):
        tx = dialects.dreamer(1.0, warmup=0, wd=0.5, wdregex=regex)
        assert decayed(tx, {"a": {"kernel": ones}, "kernel": ones}) == {"a": {"kernel": which["a"]}, "kernel": True}
    # A key of the user's own that is called "value" belongs to the path.
    tx = dialects.dreamer(1.0, warmup=0, wd=0.5, wdregex="/value$")
    assert decayed(tx, {"net": {"value": ones, "kernel": ones}}) == {"net": {"value": True, "kernel": False}}


def test_a_decay_of_dreamer_is_not_averaged():
    p = {"kernel": jnp.array([2.0, -4.0])}
    for state_dtype in (None, "uint8"):
        tx = dialects.dreamer(0.25, warmup=0, wd=0.5, state_dtype=state_dtype)
        state = tx.init(p)
        for _ in range(3):
            updates, state = tx.update({"kernel": jnp.zeros(2)}, state, p)
            np.testing.assert_allclose(updates["kernel"], [-0.25, 0.5], rtol=1e-6)
