"""metrics: its numbers against float64 NumPy, in every wrapper, and what it refuses."""

import functools
import inspect
import itertools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from flax.training.train_state import TrainState
from helpers import mesh_of, normal
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from rmsprop_jax import dialects, metrics, rmsprop, RMSPropState, scale_by_rms
from rmsprop_jax._states import LEARNING_RATES


PARAMS = {"w": normal((16, 8)), "layer": {"bias": normal((8,), seed=1), "scale": jnp.float32(-2.0)}}


# --- The reference ----------------------------------------------------------------------------------------


def wide(x):
    """An array in float64; a one-byte code as the docstring of `rmsprop` has it."""
    x = np.asarray(x)
    if x.dtype == np.uint8:
        return 2.0 ** (x // 2 - 90.0) * np.where(x % 2, 1.5, 1.0)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def flat(leaves):
    return np.concatenate([np.ravel(wide(x)) for x in leaves])


def rms(leaves):
    return np.sqrt(np.mean(np.abs(flat(leaves)) ** 2))


def reference(nus, mus=None, updates=None, params=None, eps=None, eps_in_sqrt=True):
    """The numbers of these arrays."""
    nu = flat(nus)
    second = nu if mus is None else nu + np.abs(flat(mus)) ** 2
    found = {"grad_rms": np.sqrt(second.mean()), "nu_min": nu.min(), "nu_max": nu.max()}
    codes = [np.ravel(x) for x in nus if x.dtype == jnp.uint8]
    if codes:
        codes = np.concatenate(codes)
        found |= {"at_floor": np.mean(codes == 0), "at_ceiling": np.mean(codes == 255)}
    if eps is not None:
        found["eps_share"] = np.mean(eps / ((nu if eps_in_sqrt else np.sqrt(nu)) + eps))
    if updates is not None:
        found |= {"update_rms": rms(updates), "update_max": np.abs(flat(updates)).max()}
    if params is not None:
        found["param_rms"] = rms(params)
    if updates is not None and params is not None:
        found["update_to_param"] = np.linalg.norm(flat(updates)) / np.linalg.norm(flat(params))
    return found


def assert_numbers(found, expected, rtol=2e-6):
    assert found.keys() == expected.keys()
    for name, number in found.items():
        assert (number.shape, number.dtype) == ((), jnp.float32), name
        np.testing.assert_allclose(number, expected[name], rtol=rtol, err_msg=name)


@functools.partial(jax.jit, static_argnums=(0, 2))
def trained(tx, params=PARAMS, steps=3):
    """State and updates after some steps with gradients that differ in size."""

    def step(state, scale):
        grads = jax.tree.map(lambda p: p * scale.astype(p.dtype), params)
        return tx.update(grads, state, params)[::-1]

    state, updates = jax.lax.scan(step, tx.init(params), 10.0 ** jnp.arange(-1.0, steps - 1))
    return state, jax.tree.map(lambda x: x[-1], updates)


leaves = jax.tree.leaves


# --- The numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "uint8"])
@pytest.mark.parametrize("centered", [False, True])
def test_numbers_are_those_of_the_reference(state_dtype, centered):
    params = {"w": PARAMS["w"], "complex": normal((5,), jnp.complex64, seed=2)}
    state, updates = trained(rmsprop(0.1, state_dtype=state_dtype, centered=centered), params)
    given = {"eps": 1e-2, "eps_in_sqrt": centered == (state_dtype != "bfloat16")}  # every dtype has both
    mus = leaves(state.mu) if centered else None
    expected = reference(leaves(state.nu), mus, leaves(updates), leaves(params), **given) | {"count": 3}
    assert_numbers(metrics(state, updates, params, **given), expected)


def test_only_what_is_given_is_told():
    state, updates = trained(rmsprop(0.1))
    nus = leaves(state.nu)
    assert_numbers(metrics(state), {"count": 3, **reference(nus)})
    assert_numbers(metrics(state, updates), {"count": 3, **reference(nus, updates=leaves(updates))})
    assert_numbers(metrics(state, params=PARAMS), {"count": 3, **reference(nus, params=leaves(PARAMS))})


def test_each_leaf_has_its_numbers():
    state, updates = trained(rmsprop(0.1, state_dtype="uint8"))
    found = metrics(state, updates, PARAMS, eps=1e-3, per_leaf=True)
    columns = leaves(state.nu), leaves(updates), leaves(PARAMS)
    expected = reference(columns[0], None, *columns[1:], eps=1e-3) | {"count": 3}
    for label, nu, update, param in zip(["layer/bias", "layer/scale", "w"], *columns, strict=True):
        numbers = reference([nu], None, [update], [param], eps=1e-3)
        expected |= {f"{label}/{name}": number for name, number in numbers.items()}
    assert_numbers(found, expected)


def test_half_precision_is_computed_in_float32():
    params = jax.tree.map(lambda p: p.astype(jnp.float16), {"w": PARAMS["w"] * 300, "b": PARAMS["w"][0]})
    state, updates = trained(rmsprop(1e-3), params)
    expected = reference(leaves(state.nu), None, leaves(updates), leaves(params)) | {"count": 3}
    assert expected["param_rms"] > 256  # its square is beyond float16
    assert_numbers(metrics(state, updates, params), expected)


@pytest.mark.parametrize("size", [3e-23, 1e-18, 1e18, 3e38])
def test_squares_neither_overflow_nor_vanish(size):
    values = {"a": jnp.full(1000, size), "b": jnp.full(3, size / 2)}
    state = RMSPropState(jnp.int32(1), jax.tree.map(jnp.zeros_like, values))
    expected = {"count": 1, **reference(leaves(state.nu), None, leaves(values), leaves(values))}
    assert_numbers(metrics(state, values, values), expected)


@pytest.mark.parametrize("size", [1e-37, 1e37, 3e38])
def test_a_mean_of_nu_neither_overflows_nor_vanishes(size):
    state = RMSPropState(jnp.int32(1), {"a": jnp.full(1000, size), "b": jnp.full(3, size / 2)})
    assert_numbers(metrics(state), {"count": 1, **reference(leaves(state.nu))})


def test_nan_and_inf_are_shown():
    state = rmsprop(0.1).init(PARAMS)
    for bad, names in (
        (jnp.nan, ["update_rms", "update_max", "update_to_param"]),
        (jnp.inf, ["update_rms", "update_max"]),
    ):
        found = metrics(state, PARAMS | {"w": PARAMS["w"].at[0, 0].set(bad)}, PARAMS)
        for name in names:
            np.testing.assert_equal(float(found[name]), bad)
        assert np.isfinite(found["param_rms"])


@pytest.mark.usefixtures("x64")
def test_float64_is_computed_in_float64():
    state = RMSPropState(jnp.int32(1), {"a": jnp.full(3, 1e60, jnp.float64), "b": jnp.full(2, 1.0, jnp.float32)})
    found = metrics(state, eps=1e-8)
    np.testing.assert_allclose(found["grad_rms"], np.sqrt(0.6) * 1e30, rtol=1e-6)
    np.testing.assert_allclose(found["eps_share"], 0.4e-8, rtol=1e-6)
    assert {x.dtype for x in found.values()} == {np.dtype("float32")}


@pytest.mark.parametrize(("mean", "nu"), [(1e15, 1e-6), (1e19, 1.0), (1e-18, 0.0)])
def test_a_mean_far_above_the_deviation_neither_overflows_nor_vanishes(mean, nu):
    state = RMSPropState(jnp.int32(1), {"a": jnp.full(1000, nu)}, {"a": jnp.full(1000, mean)})
    assert_numbers(metrics(state), {"count": 1, **reference(leaves(state.nu), leaves(state.mu))})


def test_large_leaves_are_summed_right():
    state = RMSPropState(jnp.int32(1), jnp.ones(20_000_000))  # one by one, a float32 stops at 2²⁴
    assert_numbers(metrics(state, eps=1.0), {"count": 1, "grad_rms": 1, "nu_min": 1, "nu_max": 1, "eps_share": 0.5})


def test_the_ends_of_one_byte():
    nu = jnp.array([0, 0, 0, 1, 254, 255, 255, 100], jnp.uint8)
    found = metrics(RMSPropState(jnp.int32(1), nu))
    assert_numbers(found, {"count": 1, **reference([nu])})
    assert (found["at_floor"], found["at_ceiling"]) == (3 / 8, 2 / 8)


def test_no_eps_has_no_share():
    state = rmsprop(0.1).init(PARAMS)
    assert metrics(state, eps=0)["eps_share"] == 0
    assert metrics(state, eps=1e-20)["eps_share"] == 1
    assert metrics(state, eps=jnp.float16(0.25), eps_in_sqrt=False)["eps_share"] == 1


def test_a_zero_update_of_zero_parameters_is_no_movement():
    zero = jnp.zeros(3)
    state = rmsprop(0.1).init(zero)
    assert metrics(state, zero, zero)["update_to_param"] == 0
    assert metrics(state, jnp.ones(3), zero)["update_to_param"] == jnp.inf


# --- Wrappers ---------------------------------------------------------------------------------------------


PARTS = {"w": "one", "layer": {"bias": "two", "scale": "two"}}
WRAPPED = {
    "chain": lambda tx: optax.chain(optax.clip(1e9), tx, optax.scale(1.0)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "masked": lambda tx: optax.masked(tx, lambda params: jax.tree.map(lambda _: True, params)),
    "partition": lambda tx: optax.partition({"one": tx, "two": tx}, PARTS),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "flatten": optax.flatten,
    "all at once": lambda tx: optax.apply_if_finite(optax.chain(optax.MultiSteps(tx, 1).gradient_transformation()), 3),
}


@pytest.mark.parametrize(("name", "centered"), [*zip(WRAPPED, itertools.cycle([False, True]))])
@pytest.mark.usefixtures("users_climate")
def test_a_wrapper_changes_no_number(name, centered):
    tx = rmsprop(0.1, centered=centered)
    (bare, _), (state, updates) = trained(tx), trained(WRAPPED[name](tx))
    expected = reference(
        leaves(bare.nu), leaves(bare.mu) if centered else None, leaves(updates), leaves(PARAMS), eps=1e-2
    )
    assert_numbers(metrics(state, updates, PARAMS, eps=1e-2), expected | {"count": 3}, rtol=1e-5)


@pytest.mark.usefixtures("users_climate")
def test_lookahead():
    params = optax.LookaheadParams.init_synced(PARAMS)
    tx = optax.lookahead(rmsprop(0.1), 5, 0.5)
    updates, state = jax.jit(tx.update)(PARAMS, tx.init(params), params)
    expected = reference([0.1 * x**2 for x in leaves(PARAMS)], None, leaves(updates.fast), leaves(PARAMS))
    assert_numbers(metrics(state, updates.fast, params.fast), expected | {"count": 1}, rtol=1e-5)


@pytest.mark.parametrize("make", [optax.rmsprop, optax.scale_by_rms], ids=["rmsprop", "scale_by_rms"])
def test_states_of_optax(make):
    state, _ = trained(make(*[0.1][: make is optax.rmsprop]))
    nus = [x for x in leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert_numbers(metrics(state, eps=1e-3), reference(nus, eps=1e-3) | {"count": np.nan})


@pytest.mark.usefixtures("users_climate")
def test_a_centered_state_of_optax_has_our_numbers():
    ours, theirs = (
        trained(f(lambda count: 0.1, centered=True, momentum=0.9), {"w": 10 * PARAMS["w"]})[0]
        for f in (rmsprop, optax.rmsprop)
    )
    assert_numbers(metrics(theirs, eps=1e-3), {k: float(x) for k, x in metrics(ours, eps=1e-3).items()}, rtol=1e-3)


@pytest.mark.usefixtures("users_climate")
def test_groups_with_other_options():
    lean = rmsprop(0.1, state_dtype="uint8", centered=True)
    tx = optax.partition(
        {"one": lean, "two": rmsprop(0.1, momentum=0.9), "rest": optax.sgd(0.1)}, PARTS | {"e": "rest"}
    )
    state, updates = trained(tx, PARAMS | {"e": jnp.ones(3)})
    lean, plain = (state.inner_states[name].inner_state for name in ("one", "two"))
    codes, means = lean.nu["w"], lean.mu["w"]
    nus = [codes, *leaves(plain.nu)]
    trees = [updates["w"], *leaves(updates["layer"])], leaves(PARAMS["w"]) + leaves(PARAMS["layer"])
    zeros = [np.zeros(np.shape(x)) for x in leaves(plain.nu)]
    expected = reference(nus, [means, *zeros], *trees, eps=1e-2)
    found = metrics(state, updates, PARAMS | {"e": jnp.ones(3)}, eps=1e-2, per_leaf=True)
    assert_numbers({k: x for k, x in found.items() if "/" not in k}, expected | {"count": 3})
    assert {k.rpartition("/")[0] for k in found} == {"", "w", "layer/bias", "layer/scale"}
    assert "w/at_floor" in found
    assert "layer/bias/at_floor" not in found


def test_of_different_counts_the_largest():
    state = {"a": RMSPropState(jnp.int32(3), {"x": jnp.ones(2)}), "b": RMSPropState(jnp.int32(5), {"y": jnp.ones(2)})}
    assert metrics(state)["count"] == jax.jit(metrics)(state)["count"] == 5


@pytest.mark.usefixtures("users_climate")
def test_a_linen_train_state_as_a_whole():
    model = nn.Dense(2)
    params = model.init(jax.random.key(0), jnp.ones((1, 3)))
    train_state = TrainState.create(apply_fn=model.apply, params=params, tx=rmsprop(0.1))
    train_state = train_state.apply_gradients(grads=params)
    expected = reference(leaves(train_state.opt_state.nu), params=leaves(train_state.params))
    assert_numbers(metrics(train_state, params=train_state.params), expected | {"count": 1})


class Critic(nnx.Module):
    def __init__(self):
        ones = nnx.initializers.ones
        self.body = nnx.Linear(3, 2, kernel_init=ones, rngs=nnx.Rngs(0))
        self.value = nnx.Linear(2, 1, kernel_init=ones, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))


def test_nnx():
    model = Critic()
    grads = nnx.state(model, nnx.Param)
    make = optax.inject_hyperparams(rmsprop)
    optimizer = nnx.Optimizer(model, make(learning_rate=optax.constant_schedule(0.1)), wrt=nnx.Param)
    start = jax.tree.map(np.array, grads)
    optimizer.update(model, grads)
    new = nnx.state(model, nnx.Param)
    updates = jax.tree.map(lambda a, b: a - b, new, start)
    expected = reference(leaves(optimizer.opt_state.inner_state.nu), None, leaves(updates), leaves(new))
    expected |= {"count": 1, "learning_rate": 0.1}
    assert_numbers(metrics(optimizer.opt_state, updates, new), expected)
    assert_numbers(metrics(optimizer, updates, model), expected)  # without its averages and keys
    names = {name.rpartition("/")[0] for name in metrics(optimizer, updates, model, per_leaf=True)}
    layers = {f"{layer}/{x}" for layer in ("body", "value") for x in ("kernel", "bias")}
    assert names == {"", *layers, "norm/scale", "norm/bias"}


@pytest.mark.usefixtures("users_climate")
def test_complex_parameters_as_pairs():
    params = {"c": normal((5,), jnp.complex64)}
    state, updates = trained(optax.contrib.split_real_and_imaginary(rmsprop(0.1)), params)
    assert {"c/real/grad_rms", "c/imaginary/grad_rms", "c/update_to_param"} <= metrics(
        state, updates, params, per_leaf=True
    ).keys()


# --- The learning rate ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (rmsprop, "learning_rate"),
        (dialects.pytorch, "lr"),
        (dialects.pytorch, "learning_rate"),
        (dialects.optimisers_jl, "eta"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
@pytest.mark.parametrize("value", [0.25, lambda count: 1.0 / (count + 2)], ids=["number", "schedule"])
@pytest.mark.usefixtures("users_climate")
def test_an_injected_rate_is_found_under_each_name(make, name, value):
    tx = optax.chain(
        optax.clip(1.0), optax.MultiSteps(optax.inject_hyperparams(make)(**{name: value}), 1).gradient_transformation()
    )
    state, _ = trained(tx, np.ones(2, np.float32))
    for f in (metrics, jax.jit(metrics)):
        assert f(state)["learning_rate"] == 0.25


def test_the_names_of_rates_are_those_of_the_dialects():
    assert {next(iter(inspect.signature(dialect).parameters)) for dialect in dialects.DIALECTS} == set(LEARNING_RATES)


def test_a_rate_that_is_injected_beside_the_rule():
    tx = optax.chain(scale_by_rms(), optax.inject_hyperparams(optax.scale_by_learning_rate)(0.5))
    assert metrics(trained(tx)[0])["learning_rate"] == 0.5


@pytest.mark.usefixtures("users_climate")
def test_several_rates_are_told_apart_by_their_groups():
    inject = optax.inject_hyperparams(rmsprop)
    state, _ = trained(optax.partition({"one": inject(0.5), "two": inject(0.5)}, PARTS))
    for f in (metrics, jax.jit(metrics)):
        rates = {name: float(x) for name, x in f(state).items() if "rate" in name}
        assert rates == {"one/learning_rate": 0.5, "two/learning_rate": 0.5}
    halves = optax.partition({"b": inject(0.25), "s": inject(0.125)}, {"bias": "b", "scale": "s"})
    state = {"w": inject(0.5).init({"w": PARAMS["w"]}), "layer": halves.init(PARAMS["layer"])}
    rates = {name: float(x) for name, x in metrics(state).items() if "rate" in name}
    assert rates == {"w/learning_rate": 0.5, "layer/b/learning_rate": 0.25, "layer/s/learning_rate": 0.125}


def decreasing(count):
    return 0.5 / (1 + count)


@pytest.mark.parametrize("wrap", [lambda tx: tx, WRAPPED["chain"], WRAPPED["partition"]])
@pytest.mark.usefixtures("users_climate")
def test_a_given_schedule_tells_the_rate_of_the_last_update(wrap):
    """With an average of one that never moves, RMSProp is gradient descent: the update is the rate times the gradient."""
    tx = wrap(rmsprop(decreasing, decay=1.0, eps=0.0, initial_scale=1.0))
    state = tx.init(PARAMS)
    assert metrics(state, learning_rate=decreasing)["learning_rate"] == decreasing(0)
    for _ in range(3):
        updates, state = tx.update(PARAMS, state, PARAMS)
        for f in (metrics, jax.jit(metrics, static_argnames="learning_rate")):
            np.testing.assert_allclose(f(state, learning_rate=decreasing)["learning_rate"] * PARAMS["w"], -updates["w"])
    assert metrics(state, learning_rate=0.25)["learning_rate"] == 0.25
    assert metrics(state, learning_rate=-1)["learning_rate"] == -1


@pytest.mark.usefixtures("users_climate")
def test_with_accumulation_a_schedule_is_read_at_updates():
    tx = optax.MultiSteps(rmsprop(decreasing), 3).gradient_transformation()
    assert metrics(trained(tx, steps=8)[0], learning_rate=decreasing)["learning_rate"] == decreasing(1)


@pytest.mark.usefixtures("users_climate")
def test_a_given_rate_beside_injected_ones():
    state, _ = trained(optax.inject_hyperparams(rmsprop)(0.5))
    with pytest.raises(ValueError, match="learning_rate is given, but state has an injected one"):
        metrics(state, learning_rate=0.5)
    groups = optax.partition(
        {"one": optax.inject_hyperparams(rmsprop)(0.5), "two": optax.inject_hyperparams(rmsprop)(0.25)}, PARTS
    )
    found = metrics(trained(groups)[0], learning_rate=decreasing)
    rates = {name: float(x) for name, x in found.items() if "rate" in name}
    assert rates == {"one/learning_rate": 0.5, "two/learning_rate": 0.25, "learning_rate": np.float32(decreasing(2))}
    # A rate that is injected into another optimizer is not RMSProp's.
    adam = optax.partition({"one": rmsprop(decreasing), "two": optax.inject_hyperparams(optax.adam)(3e-4)}, PARTS)
    found = metrics(trained(adam)[0], learning_rate=decreasing)
    assert {name: float(x) for name, x in found.items() if "rate" in name} == {
        "learning_rate": np.float32(decreasing(2))
    }


# --- What is left out -------------------------------------------------------------------------------------


def test_leaves_that_do_not_train_are_left_out():
    trains = {"w": PARAMS["w"], "s": jnp.float32(2.0)}
    params = trains | {"i": jnp.arange(3), "flag": jnp.array(True), "none": None, "empty": jnp.zeros((0, 3))}
    grads = params | {"i": np.zeros(3, jax.dtypes.float0), "flag": None}
    tx = rmsprop(0.1)
    updates, state = tx.update(grads, tx.init(params), params)
    expected = {"count": 1, **reference(leaves(state.nu), None, [updates["s"], updates["w"]], leaves(trains))}
    assert_numbers(metrics(state, updates, params), expected)
    assert_numbers(metrics(state, grads | {"s": updates["s"], "w": updates["w"]}, params), expected)
    labels = {name.rpartition("/")[0] for name in metrics(state, updates, params, per_leaf=True)}
    assert labels == {"", "s", "w"}


def test_masked_leaves_are_left_out():
    tx = optax.masked(rmsprop(0.1), {"w": True, "layer": False})
    state, updates = trained(tx)
    expected = {"count": 3, **reference(leaves(state.inner_state.nu), None, [updates["w"]], [PARAMS["w"]])}
    assert_numbers(metrics(state, updates, PARAMS), expected)
    masked = {"w": updates["w"], "layer": optax.MaskedNode()}
    assert_numbers(metrics(state, masked, PARAMS), expected)


def test_parameters_without_an_update_are_left_out():
    state, updates = trained(rmsprop(0.1))
    found = metrics(state, updates | {"layer": {"bias": None, "scale": None}}, PARAMS)
    expected = reference(leaves(state.nu), None, [updates["w"]], [PARAMS["w"]])
    assert_numbers(found, expected | {"count": 3})


def test_equinox():
    model = eqx.nn.MLP(3, 2, 4, 0, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    state, updates = trained(rmsprop(0.1), params)
    expected = reference(leaves(state.nu), None, leaves(updates), leaves(params)) | {"count": 3}
    assert_numbers(metrics(state, updates, model), expected)  # the whole module, with its functions
    assert "layers/0/weight/grad_rms" in metrics(state, per_leaf=True)


@pytest.mark.parametrize("params", [{}, {"i": jnp.arange(3)}, {"z": jnp.zeros((0, 2))}, None], ids=str)
def test_without_elements_numbers_are_nan(params):
    state = rmsprop(0.1).init(params)
    found = metrics(state, params, params, eps=1e-8)
    names = ["grad_rms", "nu_min", "nu_max", "eps_share"]
    names += [] if params is None else ["update_rms", "update_max", "param_rms", "update_to_param"]
    assert_numbers(found, {"count": 0, **dict.fromkeys(names, np.nan)})


# --- Names of leaves --------------------------------------------------------------------------------------


class Pair(NamedTuple):
    policy: Any
    value: Any


def labels(params):
    return {name.rpartition("/")[0] for name in metrics(rmsprop(0.1).init(params), per_leaf=True)} - {""}


def test_leaves_are_called_as_users_call_them():
    x = jnp.ones(2)
    assert labels({"mlp/~/linear": {"w": x}, "b": [x, x]}) == {"mlp/~/linear/w", "b/0", "b/1"}
    assert labels(Pair(x, x)) == {"policy", "value"}
    assert labels({"critic": {"value": x}}) == {"critic/value"}
    assert labels({"a": Pair(x, x), "b": nn.Partitioned(x, names=(None,))}) == {"a/policy", "a/value", "b"}
    assert labels(x) == set()  # its numbers are those of all


def test_an_empty_key_does_not_replace_a_total():
    params = {"": jnp.ones(2), "a": {"": jnp.full(3, 2.0)}}
    state = rmsprop(0.1, initial_scale=4.0).init(params)
    found = metrics(state, params, params, per_leaf=True)
    assert {k: float(x) for k, x in found.items() if k.endswith("update_max")} == {
        "update_max": 2,
        "/update_max": 1,
        "a//update_max": 2,
    }
    inject = optax.inject_hyperparams(rmsprop)
    state = optax.partition({"": inject(0.5), "b": inject(0.25)}, {"": "", "a": "b"}).init(params)
    assert {"/learning_rate", "b/learning_rate"} <= metrics(state).keys()


def test_two_leaves_of_one_name_are_an_error():
    state = rmsprop(0.1).init({"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}})
    assert metrics(state)["count"] == 0
    with pytest.raises(ValueError, match=r"several leaves would be called a/b"):
        metrics(state, per_leaf=True)


# --- jit, scan, vmap, meshes --------------------------------------------------------------------------------


def test_in_scan():
    tx = rmsprop(0.1)

    def step(state, scale):
        updates, state = tx.update(jax.tree.map(lambda p: p * scale, PARAMS), state)
        return state, metrics(state, updates, eps=1e-2)

    scales = jnp.array([0.1, 1.0, 10.0])
    state, series = jax.lax.scan(step, tx.init(PARAMS), scales)
    np.testing.assert_array_equal(series["count"], [1, 2, 3])
    last = {name: x[-1] for name, x in series.items()}
    _, updates = trained(tx)
    assert_numbers(last, {"count": 3, **reference(leaves(state.nu), updates=leaves(updates), eps=1e-2)})


def test_in_vmap_and_not_of_a_vmapped_state():
    tx = optax.inject_hyperparams(rmsprop)
    states = jax.vmap(lambda rate: tx(learning_rate=rate).init(PARAMS))(jnp.array([0.1, 0.2]))
    np.testing.assert_array_equal(jax.vmap(metrics)(states)["learning_rate"], np.float32([0.1, 0.2]))
    with pytest.raises(
        ValueError, match=r"count in state.inner_state.count has shape \(2,\), as vmap makes it: call jax.vmap"
    ):
        metrics(states)


LAYOUTS = [(P("x", "y"), P("x")), (P(("x", "y"), None), P()), (P(None, "y"), P("y"))]
OPTIONS = {"float32": {}, "uint8": {"state_dtype": "uint8", "centered": True}}
PLACES = zip(itertools.product([AxisType.Auto, AxisType.Explicit], LAYOUTS), itertools.cycle(OPTIONS))


@pytest.mark.slow
@pytest.mark.parametrize(("axis_type", "layout", "options"), [(*place, options) for place, options in PLACES])
def test_numbers_are_the_same_on_every_layout(axis_type, layout, options):
    tx, params = rmsprop(0.1, **OPTIONS[options]), {"w": PARAMS["w"], "b": PARAMS["layer"]["bias"]}
    state, updates = trained(tx, params)
    numbers = functools.partial(metrics, eps=1e-2, per_leaf=True)
    expected = {name: float(x) for name, x in numbers(state, updates, params).items()}
    mesh = mesh_of(axis_type, (4, 2), ("x", "y"))
    split = {name: NamedSharding(mesh, spec) for name, spec in zip("wb", layout, strict=True)}
    of_state = RMSPropState(NamedSharding(mesh, P()), *(x and split for x in state[1:]))
    placed = jax.device_put((state, updates, params), (of_state, split, split))
    with jax.set_mesh(mesh):
        compiled = jax.jit(numbers).lower(*placed).compile()
        assert_numbers(compiled(*placed), expected)
        if layout is LAYOUTS[0]:  # also without jit
            assert_numbers(numbers(*placed), expected)
    assert "all-gather" not in compiled.as_text()
    assert "all-to-all" not in compiled.as_text()


def test_another_eps_compiles_nothing(compilations):
    state, updates = trained(rmsprop(0.1))
    metrics(state, updates, eps=1e-3)
    with compilations() as compiled:
        for eps in (1e-4, 0.5, np.float32(1e-6)):
            metrics(state, updates, eps=eps)
    assert not compiled


# --- What is refused --------------------------------------------------------------------------------------

STATE = rmsprop(0.1).init(PARAMS)
FLAT = optax.flatten(rmsprop(0.1)).init({"a": jnp.ones(2), "b": jnp.ones(3)})
SHAPES = r"update\['w'\] has shape \(8, 16\), but state has \(16, 8\) for it: they must be equal"


WRONG_VALUES = [
    (lambda: metrics(None), "no state of RMSProp in state, which is a NoneType"),
    (
        lambda: metrics(optax.adam(0.1).init(PARAMS)),
        "no state of RMSProp in state, which is a tuple: it holds ScaleByAdam",
    ),
    (lambda: metrics(PARAMS), "no state of RMSProp in state, which is a dict"),
    (
        lambda: metrics((STATE, STATE)),
        r"2 accumulators for nu\['layer'\]\['bias'\]: \[0\], \[1\]. Pass only one",
    ),
    (lambda: metrics(STATE, eps=-1.0), r"eps=-1.0: allowed is a finite number of at least 0 that"),
    (lambda: metrics(STATE, eps=jnp.ones(2)), r"eps has shape \(2,\)"),
    (lambda: metrics(STATE, eps_in_sqrt=False), "eps_in_sqrt=False needs eps"),
    (lambda: metrics(STATE, {"v": jnp.ones(2)}), r"state has nothing for \['v'\] of updates"),
    (
        lambda: metrics(STATE, PARAMS, {"w": PARAMS["w"]}),
        r"params has nothing for \['layer'\]\['bias'\], \['layer'\]\['scale'\]",
    ),
    (
        lambda: metrics(STATE, params={"w": PARAMS["w"]}),
        r"params has nothing for \['layer'\]\['bias'\], \['layer'\]\['scale'\]",
    ),
    (lambda: metrics(STATE, PARAMS | {"w": jnp.ones((8, 16))}), SHAPES),
    (lambda: metrics(STATE, PARAMS | {"w": jnp.ones(128)}), r"update\['w'\] has shape \(128,\)"),
    (lambda: metrics(STATE, params=PARAMS | {"w": jnp.ones(1)}), r"parameter\['w'\] has shape \(1,\)"),
    (
        lambda: metrics(STATE, PARAMS, PARAMS | {"w": jnp.ones(8)}),
        r"parameter\['w'\] has shape \(8,\), but updates has \(16, 8\) for it",
    ),
    (lambda: metrics(FLAT, {"a": jnp.ones(2), "b": jnp.ones(2)}), r"but state has \(5,\) for it"),
    (lambda: metrics(rmsprop(0.1).init(jnp.ones((2, 3))), jnp.ones((3, 2))), r"has shape \(3, 2\)"),
    (lambda: metrics(STATE._asdict()), r"restored as a dict, put RMSPropState\(\*\*state\)"),
    (lambda: metrics(STATE, learning_rate=np.inf), "learning_rate=inf: allowed is a finite number"),
    (
        lambda: metrics(optax.scale_by_rms().init(PARAMS), learning_rate=lambda t: 0.1),
        "nothing in state counts updates, which a schedule needs",
    ),
]
WRONG_TYPES = [
    (lambda: metrics(STATE, eps="1"), "eps='1' has type str"),
    (lambda: metrics(STATE, eps=1, eps_in_sqrt="no"), "eps_in_sqrt='no' has type str: allowed are True and"),
    (lambda: metrics(STATE, per_leaf=1), "per_leaf=1 has type int"),
    (lambda: metrics(STATE, learning_rate="1"), "learning_rate='1' has type str"),
    (lambda: metrics(STATE, learning_rate=lambda t: None), r"learning_rate\(count\)=None has type"),
    (lambda: metrics(STATE, PARAMS | {"w": "text"}), r"update\['w'\] has type str: allowed are JAX and NumPy arrays"),
    (lambda: metrics(STATE, PARAMS, PARAMS | {"w": print}), r"parameter\['w'\] has type builtin"),
]


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [*((ValueError, *case) for case in WRONG_VALUES), *((TypeError, *case) for case in WRONG_TYPES)],
)
def test_errors_say_what_is_allowed(error, call, message):
    with pytest.raises(error, match=message):
        call()
