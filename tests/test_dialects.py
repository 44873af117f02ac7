"""Each dialect against the framework it is named after: golden everywhere, live where installed; papers in float64."""

import contextlib
import functools
import inspect
import json
import pathlib
import re
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from frameworks import cases, CONSTANT, FRAMEWORKS, in_two, ours, RATES, SPLIT
from problems import distance, grads, START, STEPS, trajectory

from rmsprop_jax import dialects, rmsprop, RMSPropState


GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = [
    # The short loop takes every call once, with the schedule.
    pytest.param(name, case, arguments, rates, id=f"{name}-{case}", marks=[pytest.mark.slow] * (rates is CONSTANT))
    for name, framework in FRAMEWORKS.items()
    for case, arguments, rates in cases(framework)
]


@pytest.mark.parametrize(("name", "case", "arguments", "rates"), CASES)
def test_golden_trajectories(name, case, arguments, rates):
    golden = np.load(GOLDEN / f"{name}.npz")
    assert distance(ours(FRAMEWORKS[name], arguments, rates)[9::10], golden[case]) < 1e-5


def test_golden_files_hold_the_cases_and_say_what_made_them():
    assert {path.stem for path in GOLDEN.glob("*.npz")} == set(FRAMEWORKS)
    for name, framework in FRAMEWORKS.items():
        golden = np.load(GOLDEN / f"{name}.npz")
        assert set(golden) == {case for case, *_ in cases(framework)} | {"versions"}
        assert set(framework.distributions) <= set(json.loads(str(golden["versions"])))
        # All frameworks ran the same problem, and went somewhere.
        for case, *_ in cases(framework):
            assert golden[case].shape == (STEPS // 10, len(START))
            assert np.abs(golden[case][-1] - START).max() > 0.01


# --- Papers: float64 transcriptions of their equations ------------------------------------------------------


def lua_dqn(rates):
    """NeuralQLearner.lua: w += lr * dw / sqrt(g2 - g*g + 0.01), where dw is uphill."""
    w, g, g2, out = START.astype(np.float64), 0.0, 0.0, []
    for t, lr in enumerate(rates.astype(np.float64)):
        dw = -grads(w, t)
        g = 0.95 * g + 0.05 * dw
        g2 = 0.95 * g2 + 0.05 * dw * dw
        w = w + lr * dw / np.sqrt(g2 - g * g + 0.01)
        out.append(w)
    return np.stack(out)


def graves_eq_38_to_45(rates):
    """n, g and a buffer that is added: the signs are the paper's."""
    w, n, g, delta, out = START.astype(np.float64), 0.0, 0.0, 0.0, []
    for t, lr in enumerate(rates.astype(np.float64)):
        e = grads(w, t)
        n = 0.95 * n + 0.05 * e**2
        g = 0.95 * g + 0.05 * e
        delta = 0.9 * delta - lr * e / np.sqrt(n - g**2 + 1e-4)
        w = w + delta
        out.append(w)
    return np.stack(out)


def hinton_slide(rates):
    w, mean_square, out = START.astype(np.float64), 0.0, []
    for t, lr in enumerate(rates.astype(np.float64)):
        e = grads(w, t)
        mean_square = 0.9 * mean_square + 0.1 * e**2
        w = w - lr * e / np.sqrt(mean_square)
        out.append(w)
    return np.stack(out)


@pytest.mark.parametrize("rates", [CONSTANT, RATES], ids=["constant", "schedule"])
@pytest.mark.parametrize(
    ("dialect", "paper"),
    [(dialects.hinton, hinton_slide), (dialects.graves, graves_eq_38_to_45), (dialects.dqn, lua_dqn)],
)
def test_papers(dialect, paper, rates):
    ours = trajectory(dialect(lambda count: jnp.asarray(rates)[count]))
    assert distance(ours, paper(rates)) < 1e-5


def test_optimisers_jl():
    """Not on PyPI: quad, lin and dx/(√(quad - |lin|²) + ϵ), src/rules.jl."""
    for centred in (False, True):
        options = {"eps": 1e-3, "eps_in_sqrt": False, "centered": centred}
        theirs = reference.rmsprop(grads, START, STEPS, lambda t: float(RATES[t]), 0.95, **options)
        tx = dialects.optimisers_jl(lambda count: jnp.asarray(RATES)[count], 0.95, 1e-3, centred=centred)
        assert distance(trajectory(tx), theirs) < 1e-5


# --- Every argument has an effect, is refused, or says only how to compute ------------------------------


class Argument(NamedTuple):
    value: Any  # another one than the default
    beside: dict[str, Any] = {}  # noqa: RUF012 (other arguments, without which it would have no effect)
    instead: dict[str, Any] | None = None  # the arguments of the call to compare with, where that needs others


def refused(value, **beside):
    return ("refused", value, beside)


def inert(value):
    return ("inert", value, {})


MOVING, DECAYING = {"momentum": 0.9}, {"weight_decay": 0.1}
SHRINKING = {"decoupled_decay": True, "weight_decay": 0.1}
CORRECTED = {**SHRINKING, "corrected_weight_decay": True}
NUMBERS = {name: Argument(0.5) for name in ("decay", "alpha", "rho", "eps", "epsilon", "min_squared_gradient")}
MASK = Argument({"0": True, "1": False}, DECAYING)
COMMON = NUMBERS | {
    **{name: Argument(2e-2) for name in ("learning_rate", "learningRate", "lr", "eta")},
    **{name: Argument(True) for name in ("centered", "centred")},
    "momentum": Argument(0.9),
    "weight_decay": Argument(0.1),
    "weight_decay_mask": MASK,
    "state_dtype": Argument("uint8"),
    **{name: inert(True) for name in ("foreach", "capturable", "differentiable", "use_locking")},
    "name": inert("another"),
}
CLIPS = {name: Argument(1e-2) for name in ("clipnorm", "clipvalue", "global_clipnorm")}
OTHERS = {
    "graves": {"momentum": Argument(0.5)},
    "dqn": {"gradient_momentum": refused(0.9), "squared_gradient_momentum": Argument(0.5)},
    "dreamer": {
        "agc": Argument(1e-3),
        **{name: Argument(0.5) for name in ("beta1", "beta2")},
        "momentum": refused(False),
        "nesterov": Argument(True),
        "wd": Argument(0.1, {"wdregex": "0"}),
        "wdregex": Argument("0", {"wd": 0.1}),
        "schedule": Argument("linear", {"anneal": 10, "warmup": 3}, {"warmup": 3}),
        "warmup": Argument(5),
        "anneal": Argument(8, {"schedule": "cosine", "warmup": 3}, {"schedule": "cosine", "warmup": 3, "anneal": 100}),
        "weight_decay_mask": Argument({"0": True, "1": False}, {"wd": 0.1}),
    },
    "pytorch": {"maximize": Argument(True)},
    "pfrl": {"maximize": refused(True)},
    "tensorflowjs": {"centered": refused(True)},
    "timm": {
        "decoupled_decay": Argument(True, DECAYING),
        "corrected_weight_decay": Argument(True, {**SHRINKING, "max_lr": 1.0}, SHRINKING),
        "max_lr": Argument(0.5, CORRECTED, {**CORRECTED, "max_lr": 1.0}),
        "lr_in_momentum": Argument(False, MOVING),
        "caution": refused(True),
    },
    "bitsandbytes": {
        "momentum": refused(0.9),
        "centered": refused(True),
        "optim_bits": refused(8),
        "args": refused(object()),
        "min_8bit_size": inert(1),
    },
    "keras": {
        **CLIPS,
        "use_ema": refused(True),
        "ema_momentum": inert(0.5),
        "ema_overwrite_frequency": refused(3),
        "loss_scale_factor": Argument(2.0),
        "gradient_accumulation_steps": Argument(2),
    },
    "tf_keras": {**CLIPS, "decay": Argument(0.5)},
    "paddle": {"parameters": refused([1]), "grad_clip": refused(object())},
    "mindspore": {"loss_scale": Argument(2.0)},
}
ARGUMENTS = [
    pytest.param(dialect, name, id=f"{dialect.__name__}-{name}")
    for dialect in dialects.DIALECTS
    for i, name in enumerate(inspect.signature(dialect).parameters)
    if i == 0 or name != "learning_rate"  # the second name of the rate has tests of its own
]


def rate_of(dialect):
    return next(iter(inspect.signature(dialect).parameters))


def moves(dialect, **arguments):
    """Where 6 steps lead, with a rate that changes, so that its place in the buffer matters."""
    schedule = lambda count: 1e-2 / (1 + jnp.asarray(count, jnp.float32))  # noqa: E731
    tx = in_two(dialect(**{rate_of(dialect): schedule} | arguments))
    params = jnp.asarray(START)
    state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):  # optax.MultiSteps
        for t in range(6):
            updates, state = tx.update(grads(params, t), state, params)
            params = optax.apply_updates(params, updates)
    return np.asarray(params)


def default_of(dialect, name):
    return inspect.signature(dialect).parameters[name].default


def values_of(value):
    """A value as Python, NumPy and JAX have it."""
    yield value
    if isinstance(value, (bool, int, float)):
        yield np.asarray(value)
        yield np.asarray(value)[()]


@pytest.mark.parametrize(("dialect", "name"), ARGUMENTS)
def test_every_argument(dialect, name):
    row = (OTHERS.get(dialect.__name__, {}) | {rate_of(dialect): Argument(2e-2)}).get(name) or COMMON[name]
    kind, value, beside = ("effect", row.value, row.beside) if isinstance(row, Argument) else row
    if kind == "refused":
        for same in values_of(value):
            with pytest.raises(ValueError, match=f"^{name}=.* is not available here: .{{15,}}"):
                dialect(**{rate_of(dialect): 0.1}, **beside, **{name: same})
        if isinstance(value, (bool, int, float)):
            with pytest.raises(ValueError, match=f"^{name} is a JAX array, .*static_args"):
                dialect(**{rate_of(dialect): 0.1}, **beside, **{name: jnp.asarray(value)})
        return
    instead = getattr(row, "instead", None)
    plain = moves(dialect, **beside if instead is None else instead)
    for same in values_of(value):
        changed = moves(dialect, **beside | {name: same})
        assert np.array_equal(changed, plain) == (kind == "inert")


OFF = {
    "momentum": (0, 0.0, np.float32(0), np.array(0.0), None),
    "weight_decay": (0, 0.0, np.array(0), None),
    "wd": (0.0, None),
    "clipnorm": (None,),
    "loss_scale": (1, None),
    "decay": (0, None),
}


# Not tensorflow1's `decay`, which is ρ, nor DreamerV3's `momentum`, which is a flag.
SWITCHES = [p for p in ARGUMENTS if p.values[1] in OFF and default_of(*p.values) is None]


@pytest.mark.parametrize(("dialect", "name"), SWITCHES)
def test_what_is_off_is_off_however_it_is_said(dialect, name):
    plain = moves(dialect)
    for value in OFF[name]:
        np.testing.assert_array_equal(moves(dialect, **{name: value}), plain)


# --- The learning rate has two names ------------------------------------------------------------------------


every_dialect = pytest.mark.parametrize("dialect", dialects.DIALECTS, ids=lambda dialect: dialect.__name__)


def names_of_rate(dialect):
    return sorted({rate_of(dialect), "learning_rate"})


@every_dialect
def test_learning_rate_is_an_argument_of_every_dialect(dialect):
    expected = trajectory(dialect(1e-2), steps=5)
    for name in names_of_rate(dialect):
        np.testing.assert_array_equal(trajectory(dialect(**{name: 1e-2}), steps=5), expected)
        np.testing.assert_allclose(trajectory(dialect(**{name: lambda _: 1e-2}), steps=5), expected, rtol=1e-6)
    if rate_of(dialect) != "learning_rate":
        both = dict.fromkeys(names_of_rate(dialect), 1e-2)
        with pytest.raises(ValueError, match="are two names of one argument: give one of them"):
            dialect(**both)
        with pytest.raises(ValueError, match="are two names of one argument: give one of them"):
            optax.inject_hyperparams(dialect)(**both).init(jnp.ones(2))


@every_dialect
def test_a_rate_that_is_no_number_is_named_as_given(dialect):
    for name in names_of_rate(dialect):
        with pytest.raises(ValueError, match=f"^{name}=nan: allowed is a finite number"):
            dialect(**{name: float("nan")})
        with pytest.raises(TypeError, match=f"^{name}='fast' has type str"):
            dialect(**{name: "fast"})


DEFAULT_RATES = {row["dialect"]: row["lr"] for row in dialects.table()}


@every_dialect
def test_without_a_rate_it_is_the_framework_s_default(dialect):
    default = DEFAULT_RATES[dialect.__name__]
    if default:
        np.testing.assert_array_equal(trajectory(dialect(), steps=5), trajectory(dialect(float(default)), steps=5))
        assert float(default) in [float(x) for x in re.findall(r"\d+\.?\d*(?:e-?\d+)?", dialect.__doc__)]
        assert dialects.options(dialect)["learning_rate"] is not None
        return
    for call in (lambda: dialect(), lambda: dialect(**{rate_of(dialect): None})):
        with pytest.raises((TypeError, ValueError), match=f"{dialect.__name__}.*{rate_of(dialect)}"):
            call()
    assert dialects.options(dialect)["learning_rate"] is None


@every_dialect
def test_injected_hyperparameters_are_those_given_under_their_names(dialect):
    """sbx makes an optimizer this way, and logs state.hyperparams["learning_rate"]."""
    params = {"0": jnp.asarray(START[:SPLIT]), "1": jnp.asarray(START[SPLIT:])}
    schedule = lambda count: 0.1 / (1 + jnp.asarray(count, jnp.float32))  # noqa: E731
    plain = dialect(schedule)
    expected, plain_state = plain.update(params, plain.init(params), params)
    for name in names_of_rate(dialect):
        tx = optax.inject_hyperparams(dialect)(**{name: schedule})
        state = tx.init(params)
        updates, state = tx.update(params, state, params)
        assert set(state.hyperparams) - {"learning_rate"} <= set(inspect.signature(dialect).parameters)
        assert state.hyperparams[name] == pytest.approx(0.1)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=3e-5), updates, expected)
        assert jax.tree.structure(state.inner_state) == jax.tree.structure(plain_state)
        _, state = tx.update(params, state, params)
        assert state.hyperparams[name] == pytest.approx(0.05)


@every_dialect
def test_an_injected_rate_can_be_set(dialect):
    params = jnp.asarray(START)
    tx = optax.inject_hyperparams(dialect)(learning_rate=1e-2)
    state = tx.init(params)
    state.hyperparams["learning_rate"] = jnp.float32(2e-2)
    plain = dialect(2e-2)
    for _ in range(2):  # DreamerV3's first step is 0
        updates, state = tx.update(params, state, params)
    plain_state = plain.init(params)
    for _ in range(2):
        expected, plain_state = plain.update(params, plain_state, params)
    np.testing.assert_allclose(updates, expected, rtol=1e-6 if dialect is not dialects.dreamer else 3e-5)
    assert np.abs(expected).max() > 0


def test_every_number_is_injected():
    tx = optax.inject_hyperparams(dialects.pytorch)(learning_rate=1e-3, eps=1e-5, momentum=0.9)
    assert set(tx.init(jnp.ones(2)).hyperparams) == {"learning_rate", "alpha", "eps", "momentum"}


def test_injecting_turns_nothing_on():
    params = {"0": jnp.asarray(START[:SPLIT]), "1": jnp.asarray(START[SPLIT:])}
    for dialect in dialects.DIALECTS:
        rate = rate_of(dialect)
        tx = optax.inject_hyperparams(dialect, hyperparam_dtype=jnp.float32)(**{rate: 1e-2})
        # No `params`: an injected decay of zero would ask for them. (DreamerV3 clips by the parameters' norms.)
        needed = params if dialect is dialects.dreamer else None
        # (optax.inject_hyperparams itself looks at the parameters' dtype, unless it is told one.)
        updates, _ = tx.update(params, tx.init(params), needed)
        plain = dialect(**{rate: 1e-2})
        expected, _ = plain.update(params, plain.init(params), needed)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), updates, expected)


@every_dialect
def test_an_unexpected_argument_is_answered_with_those_there_are(dialect):
    own = rate_of(dialect)
    with pytest.raises(TypeError, match=f"unexpected keyword argument 'beta': {dialect.__name__} takes {own}, "):
        dialect(**{own: 0.1}, beta=0.9)
    with pytest.raises(TypeError, match=f"too many positional arguments: {dialect.__name__} takes {own}, "):
        dialect(*[0.1] * 30)


# --- Data ---------------------------------------------------------------------------------------------------


@every_dialect
def test_a_dialect_returns_a_transformation_and_says_so(dialect):
    assert inspect.signature(dialect).return_annotation is optax.GradientTransformationExtraArgs
    assert dialect.__annotations__["return"] is optax.GradientTransformationExtraArgs
    assert isinstance(dialect(0.1), optax.GradientTransformationExtraArgs)


@every_dialect
def test_its_options_are_a_call_of_rmsprop(dialect):
    expected = trajectory(dialect(1e-2), steps=20)
    given = trajectory(rmsprop(**dialects.options(dialect, **{rate_of(dialect): 1e-2})), steps=20)
    replaced = trajectory(rmsprop(**dialects.options(dialect) | {"learning_rate": 1e-2}), steps=20)
    if dialect is dialects.dreamer:  # it clips, and its rate is a schedule
        given, expected = given[:0], expected[:0]
        replaced = expected
    np.testing.assert_array_equal(given, expected)
    np.testing.assert_array_equal(replaced, expected)


@every_dialect
def test_a_decay_is_coupled_or_decoupled_whatever_the_default_of_rmsprop(dialect):
    name = {"weight_decay", "wd"} & set(inspect.signature(dialect).parameters)
    if name:
        assert "decoupled" in inspect.unwrap(dialect)(0.1, **dict.fromkeys(name, 0.1)).options


@every_dialect
def test_dialects_made_alike_are_equal(dialect):
    tx = dialect(1e-2)
    assert tx == dialect(**{rate_of(dialect): 1e-2}) == dialect(learning_rate=1e-2)
    assert hash(tx) == hash(dialect(1e-2))
    assert tx != dialect(2e-2)


def test_the_table_names_the_class():
    named = {row["dialect"]: row["class or paper"] for row in dialects.table()}
    assert set(named) == {dialect.__name__ for dialect in dialects.DIALECTS}
    assert named["pytorch"] == "torch.optim.RMSprop"  # which Stable Baselines 3's A2C uses by default
    assert named["stable_baselines3"].startswith("RMSpropTFLike")


def test_calls_that_a_framework_refuses_too():
    for clips in ({"clipnorm": 1.0, "clipvalue": 1.0}, {"clipnorm": 1.0, "global_clipnorm": 1.0}):
        with pytest.raises(ValueError, match="only one of clipnorm, clipvalue and global_clipnorm"):
            dialects.keras(**clips)
    with pytest.raises(ValueError, match=r"only one of clipnorm=1.0 and global_clipnorm=1.0"):
        dialects.tf_keras(clipnorm=1.0, global_clipnorm=1.0)
    for steps in (1, 2.0, True):
        with pytest.raises(ValueError, match=f"gradient_accumulation_steps={steps}.*integer of at least 2"):
            dialects.keras(gradient_accumulation_steps=steps)
    with pytest.raises(TypeError, match="gradient_accumulation_steps is traced.*static_args"):
        jax.jit(lambda steps: dialects.keras(gradient_accumulation_steps=steps).init(steps))(4)
    for scale in (0, -1.0):
        with pytest.raises(ValueError, match="loss_scale_factor=.*above 0"):
            dialects.keras(loss_scale_factor=scale)
        with pytest.raises(ValueError, match="loss_scale=.*above 0"):
            dialects.mindspore(loss_scale=scale)
    with pytest.raises(ValueError, match="needs max_lr, the rate that timm's constructor got"):
        dialects.timm(optax.constant_schedule(0.1), corrected_weight_decay=True)
    with pytest.raises(ValueError, match="max_lr=0.1 needs corrected_weight_decay=True"):
        dialects.timm(0.1, max_lr=0.1)
    with pytest.raises(ValueError, match=r"anneal=500.* is not available here: it needs schedule"):
        dialects.dreamer(anneal=500)
    with pytest.raises(ValueError, match=r"anneal=500.*it must be larger than warmup=1000"):
        dialects.dreamer(anneal=500, schedule="cosine")
    with pytest.raises(ValueError, match=r"schedule='exp': allowed are 'const', 'linear' and 'cosine'"):
        dialects.dreamer(schedule="exp")
    for clip in ("clipnorm", "clipvalue", "global_clipnorm"):
        with pytest.raises(ValueError, match=f"{clip}=-1.0: allowed is a finite number in"):
            dialects.tf_keras(**{clip: -1.0})
        with pytest.raises(ValueError, match=f"{clip}=nan: allowed is a finite number"):
            dialects.keras(**{clip: float("nan")})
    with pytest.raises(ValueError, match="max_lr=0.0: allowed is a number above 0"):
        dialects.timm(0.1, corrected_weight_decay=True, max_lr=0.0)
    with pytest.raises(ValueError, match="needs max_lr, the rate"):
        dialects.timm(0.0, corrected_weight_decay=True)
    with pytest.raises(TypeError, match="rmsprop.* is no dialect: allowed are hinton, graves, "):
        dialects.options(rmsprop)
    with pytest.raises(ValueError, match="decay=-0.1: allowed is a finite number in"):
        dialects.tf_keras(decay=-0.1)
    for flag, make in (("maximize", dialects.pytorch), ("decoupled_decay", dialects.timm)):
        with pytest.raises(TypeError, match=f"{flag}='yes' has type str: allowed are True and False"):
            make(**{flag: "yes"})


def test_threads_do_not_see_each_other():
    """`options` looks at data: nothing is patched while another thread builds its optimizer."""
    stop = threading.Event()

    def look():
        while not stop.is_set():
            dialects.options(dialects.pytorch, momentum=0.9)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        made = [dialects.pytorch(lr=0.1) for _ in range(300)]
    finally:
        stop.set()
        thread.join()
    assert all(isinstance(tx, optax.GradientTransformationExtraArgs) for tx in made)
    assert dialects.options(dialects.pytorch, maximize=True)["eps_in_sqrt"] is False


# --- Decay of some of the parameters ----------------------------------------------------------------------

MASKED = [
    pytest.param(dialect, decoupled, id=f"{dialect.__name__}{',decoupled' * decoupled}")
    for dialect in dialects.DIALECTS
    for decoupled in (False, True)
    if "weight_decay" in inspect.signature(dialect).parameters
    and (not decoupled or "decoupled_decay" in inspect.signature(dialect).parameters)
]


@pytest.mark.parametrize(("dialect", "decoupled"), MASKED)
def test_a_mask_is_a_partition_with_and_without_decay(dialect, decoupled):
    options = {"weight_decay": 0.1} | ({"decoupled_decay": True} if decoupled else {})
    mask = {"0": True, "1": False}
    parts = {True: dialect(1e-2, **options), False: dialect(1e-2)}
    expected = trajectory(in_two(optax.partition(parts, mask)), steps=50)
    for given in (mask, lambda params: {name: len(p) == SPLIT for name, p in params.items()}):
        np.testing.assert_array_equal(
            trajectory(in_two(dialect(1e-2, **options, weight_decay_mask=given)), steps=50), expected
        )


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_mask_is_that_of_adamw(decoupled):
    params = {"body": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "head": jnp.ones(3)}
    mask = {"body": {"kernel": True, "bias": False}, "head": True}
    sgd = {"decay": 1.0, "eps": 0.0, "initial_scale": 1.0}
    tx = rmsprop(0.5, weight_decay=0.25, decoupled=decoupled, weight_decay_mask=mask, **sgd)
    grads = jax.tree.map(jnp.zeros_like, params)
    state = tx.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(rmsprop(0.1).init(params))
    for update in (tx.update, jax.jit(tx.update)):
        updates, _ = update(grads, state, params)
        assert jax.tree.map(lambda u: float(u.ravel()[0]), updates) == {
            "body": {"kernel": -0.125, "bias": 0.0},
            "head": -0.125,
        }
    prefix = rmsprop(0.5, weight_decay=0.25, decoupled=decoupled, weight_decay_mask={"body": False, "head": True})
    updates, _ = prefix.update(grads, state, params)
    assert (updates["body"]["kernel"] == 0).all()
    assert (updates["head"] < 0).all()


@pytest.mark.parametrize("mask", [lambda params: jax.tree.map(lambda p: p.ndim > 1, params), True, np.True_])
def test_a_mask_that_inject_hyperparams_called_is_refused(mask):
    make = optax.inject_hyperparams(rmsprop)
    with pytest.raises(TypeError, match="weight_decay_mask is a single.*add it to static_args"):
        make(learning_rate=0.1, weight_decay=0.1, weight_decay_mask=mask).init({"w": jnp.ones((2, 2))})


@every_dialect
def test_a_mask_beside_a_decay_of_zero(dialect):
    # As in a sweep over decays.
    for name in {"weight_decay", "wd"} & set(inspect.signature(dialect).parameters):
        tx = dialect(1e-2, **{name: 0.0}, weight_decay_mask=lambda params: params)
        np.testing.assert_array_equal(trajectory(tx, steps=3), trajectory(dialect(1e-2), steps=3))


@pytest.mark.parametrize("dialect", [*dialects.DIALECTS, rmsprop], ids=lambda dialect: dialect.__name__)
def test_a_mask_without_a_decay_is_refused(dialect):
    if "weight_decay_mask" not in inspect.signature(dialect).parameters:
        return
    decay = "wd" if dialect is dialects.dreamer else "weight_decay"
    for make in (dialect, lambda *args, **kw: optax.inject_hyperparams(dialect)(*args, **kw).init(jnp.ones(2))):
        with pytest.raises(ValueError, match=f"weight_decay_mask needs {decay}, got {decay}=None"):
            make(0.1, weight_decay_mask={"w": True})


@pytest.mark.parametrize("mask", [{}, {"w": True}, {"w": True, "b": False, "c": True}])
def test_a_mask_that_does_not_fit_is_refused(mask):
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    for tx in (
        dialects.pytorch(weight_decay=0.1, weight_decay_mask=mask),
        dialects.dreamer(wd=0.1, weight_decay_mask=mask),
        optax.inject_hyperparams(dialects.dreamer)(learning_rate=0.1, wd=0.1, weight_decay_mask=mask),
    ):
        with pytest.raises(ValueError, match="the mask must be a tree like the parameters', or a prefix of it"):
            tx.update(params, tx.init(params), params)


def test_a_mask_of_other_things_than_booleans():
    params = {"w": jnp.ones(2)}
    for mask in ({"w": 1}, {"w": jnp.array(True)}, {"w": "yes"}):
        tx = rmsprop(0.1, weight_decay=0.1, weight_decay_mask=mask)
        with pytest.raises(TypeError, match=r"the mask\['w'\] has type .*allowed are True and False"):
            tx.update(params, tx.init(params), params)


def test_a_mask_as_static_argument():
    mask = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    tx = optax.inject_hyperparams(rmsprop, static_args="weight_decay_mask")(
        learning_rate=0.1, weight_decay=0.1, weight_decay_mask=mask
    )
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert (updates["b"] == 0).all()
    assert (updates["w"] < 0).all()


def test_tf_keras_moves_its_epsilon_also_when_traced():
    def first_step(momentum):
        tx = dialects.tf_keras(1.0, momentum=momentum, epsilon=1.0)
        return tx.update(jnp.float32(1.0), tx.init(jnp.float32(0.0)))[0]

    np.testing.assert_allclose(first_step(0.0), -1 / (np.sqrt(0.1) + 1), rtol=1e-6)
    np.testing.assert_allclose(first_step(0.9), -1 / np.sqrt(0.1 + 1), rtol=1e-6)
    np.testing.assert_allclose(first_step(None), -1 / (np.sqrt(0.1) + 1), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(first_step)(0.9), -1 / np.sqrt(0.1 + 1), rtol=1e-6)


@every_dialect
def test_no_buffer_that_is_not_used(dialect):
    (state,) = rmsprop_states(dialect(1e-2).init(jnp.ones(2)))
    assert (state.trace is None) == (dialect not in (dialects.graves, dialects.dreamer))
    assert (state.mu is None) == (dialect not in (dialects.graves, dialects.dqn))


def rmsprop_states(state):
    is_ours = lambda x: isinstance(x, RMSPropState)  # noqa: E731
    return [x for x in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(x)]


def test_readme_calls_are_rmsprop():
    """The call in the module's docstring, option by option."""
    tx = dialects.pytorch(lr=6e-4, alpha=0.99, eps=0.01)
    expected = rmsprop(6e-4, 0.99, 0.01, eps_in_sqrt=False)
    np.testing.assert_array_equal(trajectory(tx), trajectory(expected))


# --- In front of the rule -----------------------------------------------------------------------------------


CLIPPED = {  # what is in front, and what it makes of a gradient in float64
    "clipnorm": ({"clipnorm": 1.0}, lambda g: g / max(1, np.linalg.norm(g))),
    "global_clipnorm": ({"global_clipnorm": 1.0}, lambda g: g / max(1, np.linalg.norm(g))),
    "clipvalue": ({"clipvalue": 1.0}, lambda g: np.clip(g, -1, 1)),
    "loss_scale_factor": ({"loss_scale_factor": jnp.float32(2)}, lambda g: g / 2),
}
every_clip = pytest.mark.parametrize(("arguments", "clip"), CLIPPED.values(), ids=CLIPPED.keys())


@every_clip
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_a_clip_keeps_the_dtype_and_does_not_overflow(arguments, clip, dtype):
    g = jnp.asarray(np.random.default_rng(0).normal(size=(300, 300)) * 10, dtype)
    assert np.linalg.norm(np.asarray(g, np.float64)) > 2000  # float16 has no square of this
    tx = dialects.keras(1.0, rho=0.5, epsilon=1.0, **arguments)
    for update in (tx.update, jax.jit(tx.update)):
        updates, _ = update(g, tx.init(g), g)
        assert updates.dtype == dtype
        clipped = clip(np.asarray(g, np.float64))
        expected = -clipped / np.sqrt(0.5 * clipped**2 + 1.0)
        np.testing.assert_allclose(np.asarray(updates, np.float64), expected, rtol=3 * jnp.finfo(dtype).eps, atol=1e-7)


@every_clip
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_clip_of_gradients_whose_squares_are_out_of_range(arguments, clip, dtype, size):
    (transformation,) = inspect.unwrap(dialects.keras)(0.1, **arguments).before
    g = jnp.asarray([3 * size, -4 * size], dtype)
    clipped, _ = transformation.update(g, transformation.init(g))
    expected = clip(np.asarray(g, np.float64))
    np.testing.assert_allclose(np.asarray(clipped, np.float64), expected, rtol=jnp.finfo(dtype).eps)


def test_a_norm_is_that_of_one_variable_or_of_all():
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[0.0], [4.0]]), "c": jnp.float32(0.1)}
    for arguments, scale in (({"clipnorm": 1.0}, (1 / 3, 1 / 4, 1)), ({"global_clipnorm": 1.0}, (1 / 5.001,) * 3)):
        (transformation,) = inspect.unwrap(dialects.keras)(0.1, **arguments).before
        clipped, _ = transformation.update(grads, transformation.init(grads))
        for g, c, factor in zip(grads.values(), clipped.values(), scale, strict=True):
            np.testing.assert_allclose(c, g * factor, rtol=1e-5)


@pytest.mark.parametrize("clip", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_a_clip_of_zero_or_less_is_off_in_keras_and_zero_in_tf_keras(clip):
    g = jnp.array([1.0, -2.0])
    expected, _ = dialects.keras(1.0).update(g, dialects.keras(1.0).init(g))
    for limit in (0.0, -1.0, np.float32(-1.0), np.array(0)):
        tx = dialects.keras(1.0, **{clip: limit})
        np.testing.assert_array_equal(tx.update(g, tx.init(g))[0], expected)
        tx = optax.inject_hyperparams(dialects.keras, hyperparam_dtype=jnp.float32)(1.0, **{clip: float(limit)})
        np.testing.assert_allclose(tx.update(g, tx.init(g))[0], expected, rtol=1e-6)
    tx = dialects.tf_keras(1.0, **{clip: 0.0})
    for same in (g, jnp.zeros(2)):
        np.testing.assert_array_equal(tx.update(same, tx.init(same))[0], 0)


FRONTS = {
    **{name: functools.partial(dialects.keras, 0.1, **arguments) for name, (arguments, _) in CLIPPED.items()},
    "maximize": functools.partial(dialects.pytorch, 0.1, maximize=True),
    "agc": functools.partial(dialects.dreamer, 0.1, warmup=0),
}
every_front = pytest.mark.parametrize("make", FRONTS.values(), ids=FRONTS.keys())


@every_front
@pytest.mark.parametrize("compiled", [True, False])
def test_none_float0_and_scalars_pass(make, compiled):
    tx = make()
    params = {"a": 1.0, "b": jnp.ones(2), "c": jnp.arange(2), "d": np.ones(2), "e": jnp.bfloat16(1)}
    grads = {"a": 0.5, "b": None, "c": np.zeros(2, jax.dtypes.float0), "d": np.ones(2), "e": jnp.bfloat16(1)}
    with contextlib.nullcontext() if compiled else jax.disable_jit():
        updates, state = tx.update(grads, tx.init(params), params)
    assert updates["b"] is None
    assert updates["c"] is None
    assert updates["d"].dtype == jnp.float32
    assert updates["e"].dtype == jnp.bfloat16
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(updates))
    (state,) = rmsprop_states(state)
    np.testing.assert_array_equal(state.nu["b"], 0)
    for empty in ({}, None, jnp.zeros((0, 3))):
        tx.update(empty, tx.init(empty), empty)


@every_front
def test_what_is_no_gradient_is_named_by_the_rule(make):
    params = {"w": jnp.ones(2), "n": jnp.arange(2)}
    for gradients, message in (
        ({"w": jnp.ones(2), "n": jnp.arange(2)}, r"gradient\['n'\] has dtype int32"),
        ({"w": "text", "n": None}, r"gradient\['w'\] has type str"),
        ({"w": jnp.ones(3), "n": None}, r"gradient\['w'\] has shape \(3,\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            make().update(gradients, make().init(params), params)


@every_front
def test_a_nan_is_not_hidden(make):
    g = jnp.array([1.0, jnp.nan])
    updates, _ = make().update(g, make().init(g), g)
    assert np.isnan(updates[1])


@every_front
@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_norms_of_sharded_gradients(make, axis_type):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    g = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    expected, _ = make().update(g, make().init(g), g)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(g, sharding)
        state = jax.jit(make().init)(sharded)
        for update in (make().update, jax.jit(make().update)):
            updates, _ = update(sharded, state, sharded)
            assert updates.sharding.is_equivalent_to(sharding, 2)
            np.testing.assert_allclose(updates, expected, rtol=1e-5)
        program = jax.jit(make().update).lower(sharded, state, sharded).compile().as_text()
    assert not re.search("all-gather|all-to-all|collective-permute", program)


@every_front
@pytest.mark.parametrize("at", [np.zeros(3, np.float32), np.array([3.0, 4.0, 0.0], np.float32)])
def test_derivatives_through_what_is_in_front_are_finite(make, at):
    def updated(g, p):
        return make().update(g, make().init(p), p)[0]

    for jacobian in jax.jacobian(updated, argnums=(0, 1))(jnp.asarray(at), jnp.asarray(at)):
        assert np.isfinite(jacobian).all()


def test_a_new_clip_compiles_nothing(compilations):
    g = jnp.ones(3)

    def step(limit):
        tx = dialects.keras(0.1, clipnorm=limit, loss_scale_factor=2 * limit)
        return tx.update(g, tx.init(g), g)

    step(0.25)
    with compilations() as compiled:
        step(0.5)
    assert compiled == []


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
    (ours,) = rmsprop_states(state)
    assert (ours.nu["w"].dtype, ours.trace["w"].dtype) == kept
    assert jax.tree.structure(state) == jax.tree.structure((optax.EmptyState(), ours))


def test_dreamer_keeps_the_average_of_a_parameter_without_gradient():
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    tx = dialects.dreamer(1e-2, warmup=0)
    _, state = tx.update(params, tx.init(params), params)
    updates, after = tx.update({"a": params["a"], "b": None}, state, params)
    assert updates["b"] is None
    for slot in ("nu", "trace"):
        kept, was = (getattr(rmsprop_states(s)[0], slot)["b"] for s in (after, state))
        np.testing.assert_array_equal(kept, was)
        assert (was != 0).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [("agc", -0.1), ("beta1", -0.1), ("beta1", 1.0), ("beta2", 1.1), ("eps", -1.0), ("wd", -0.1), ("warmup", -1)]
    + [(name, float("nan")) for name in ("agc", "beta1", "beta2", "eps", "wd", "warmup", "anneal", "lr")],
)
def test_dreamer_checks_its_numbers(name, value):
    argument = "decay" if name == "beta2" else name
    with pytest.raises(ValueError, match=f"^{argument}={value}: allowed is a"):
        dialects.dreamer(**{name: value})


def test_dreamer_needs_the_parameters():
    g = {"w": jnp.ones(2)}
    for arguments, option in (({}, "agc"), ({"agc": None, "wd": 0.1}, "weight_decay")):
        tx = dialects.dreamer(**arguments)
        with pytest.raises(ValueError, match=rf"{option} needs .*update\(updates, state, params\)"):
            tx.update(g, tx.init(g))
    tx = dialects.dreamer(agc=None)
    tx.update(g, tx.init(g))
    tx = dialects.dreamer()
    with pytest.raises(ValueError, match=r"no \['w'\] in params for its gradient"):
        tx.update(g, tx.init(g), {"v": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"params\['w'\] is None, and there is a gradient for it"):
        tx.update(g, tx.init(g), {"w": None})


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


@pytest.mark.parametrize("static", [(), ("weight_decay_mask",)])
def test_dreamer_honours_a_mask_under_injection_or_refuses_it(static):
    params = {"kernel": jnp.ones(2), "b": {"kernel": jnp.ones(2)}}
    make = optax.inject_hyperparams(dialects.dreamer, static_args=static)
    arguments = {"learning_rate": 1.0, "warmup": 0, "wd": 0.5}
    assert decayed(make(**arguments), params) == {"kernel": True, "b": {"kernel": True}}
    none = {"kernel": False, "b": {"kernel": False}}
    assert decayed(make(**arguments, weight_decay_mask=none), params) == none
    tx = make(**arguments, weight_decay_mask=lambda params: jax.tree.map(lambda _: False, params))
    if static:
        assert decayed(tx, params) == none
    else:
        with pytest.raises(TypeError, match="weight_decay_mask is a single bool.*add it to static_args"):
            tx.init(params)


def test_a_decay_of_dreamer_is_not_averaged():
    p = {"kernel": jnp.array([2.0, -4.0])}
    for state_dtype in (None, "uint8"):
        tx = dialects.dreamer(0.25, warmup=0, wd=0.5, state_dtype=state_dtype)
        state = tx.init(p)
        for _ in range(3):
            updates, state = tx.update({"kernel": jnp.zeros(2)}, state, p)
            np.testing.assert_allclose(updates["kernel"], [-0.25, 0.5], rtol=1e-6)
